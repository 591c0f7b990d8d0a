"""Supports of TFP's families: each holds the point that stands for those outside, and what it draws."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributions.tfp_oracle import tfb, tfd

from gjflax.distributions import support
from gjflax.distributions.arguments import free_promotion

V = jnp.array([0.5, 1.5, 3.0])
FACTOR = jnp.linalg.cholesky(jnp.array([[2.0, 0.5], [0.5, 1.0]]))

EXAMPLES: dict[str, tuple[Any, ...]] = {
    "Normal": (V, 2.0),
    "LogNormal": (0.5, V),
    "HalfNormal": (V,),
    "TruncatedNormal": (V, 2.0, -1.0, 4.0),
    "TruncatedCauchy": (V, 2.0, -1.0, 4.0),
    "Triangular": (-1.0, 4.0, V),
    "PERT": (-1.0, V, 4.0),
    "StudentT": (V, 1.0, 2.0),
    "HalfStudentT": (V, -V, 2.0),
    "HalfCauchy": (-V, 2.0),
    "Gamma": (V, 2.0),
    "Pareto": (V, V),
    "Uniform": (-V, V),
    "Beta": (V, 2.0),
    "Dirichlet": (V,),
    "WishartTriL": (4.0, FACTOR),
    "LKJ": (3, 2.0),
    "CholeskyLKJ": (3, 2.0),
    "Bernoulli": (V,),
    "Binomial": (4.0, V),
    "Categorical": (V,),
    "OneHotCategorical": (V,),
    "Multinomial": (4.0, V),
    "Poisson": (V,),
    "Zipf": (1.0 + V,),
    "MultivariateNormalTriL": (jnp.zeros(2), FACTOR),
    "Independent": (tfd.Gamma(V, 2.0), 1),
    "MixtureSameFamily": (tfd.Categorical(logits=V), tfd.HalfCauchy(-V, 2.0)),
    "TransformedDistribution": (tfd.Pareto(V, V), tfb.Shift(3.0)),
    "HiddenMarkovModel": (tfd.Categorical(logits=V), tfd.Categorical(logits=jnp.ones((3, 3))), tfd.Gamma(V, 2.0), 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_point_for_values_outside_is_inside(name: str) -> None:
    with free_promotion():
        distribution = getattr(tfd, name)(*EXAMPLES[name])
        known = support.support_of(distribution)
        assert known is not None
        shape = tuple(distribution.batch_shape) + tuple(distribution.event_shape)
        for outside in (jnp.nan, jnp.inf, -jnp.inf):
            value = jnp.full(shape, outside)
            assert not np.any(known.contains(value, distribution))
            point = jnp.broadcast_to(jnp.asarray(known.interior(value, distribution), jnp.float32), shape)
            assert np.all(known.contains(point, distribution)), point


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 3.0), (-np.inf, 3.0), (-1.0, np.inf), (-np.inf, np.inf), (1e6, 1e6 + 1), (0.0, 1e-6)]
)
def test_an_interval_may_be_unbounded_large_or_small(low: float, high: float) -> None:
    distribution = tfd.TruncatedNormal(jnp.float32(0), 2.0, jnp.float32(low), jnp.float32(high))
    point = support.interval.interior(jnp.float32(np.nan), distribution)
    assert support.interval.contains(point, distribution)
    assert not support.interval.contains(jnp.float32(np.inf), distribution)


def test_a_class_that_is_not_tfp_s_has_no_support_by_its_name() -> None:
    class Gamma(tfd.Normal):  # pyright: ignore[reportUntypedBaseClass]
        """Another distribution of that name."""

    assert support.support_of(Gamma(0.0, 1.0)) is None
    assert support.support_of(tfd.Independent(Gamma(V, 1.0), 1)) is None
    assert support.support_of(tfd.MixtureSameFamily(tfd.Categorical(logits=V), Gamma(V, 1.0))) is None


@pytest.mark.parametrize(
    ("distribution", "whole", "discrete"),
    [
        (tfd.Normal(0.0, 1.0), False, False),
        (tfd.Poisson(2.0), True, True),
        (tfd.Independent(tfd.Poisson(V), 1), True, True),
        (tfd.Sample(tfd.Poisson(2.0), 3), True, True),
        (tfd.MixtureSameFamily(tfd.Categorical(logits=V), tfd.Poisson(V)), True, True),
        (tfd.MixtureSameFamily(tfd.Categorical(logits=V), tfd.Normal(V, 1.0)), False, False),
        (tfd.Mixture(tfd.Categorical(logits=V[:2]), [tfd.Normal(0.0, 1.0), tfd.Normal(0.0, 2.0)]), False, False),
        (tfd.TransformedDistribution(tfd.Poisson(2.0), tfb.Exp()), False, True),
        (tfd.FiniteDiscrete([0.5, 1.5], probs=[0.3, 0.7]), False, True),
        (tfd.BatchReshape(tfd.Poisson(V), (3, 1)), True, True),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_whole_and_discrete_values_are_known(distribution: Any, whole: bool, discrete: bool) -> None:
    assert support.is_whole(distribution) == whole
    assert support.is_discrete(distribution) == discrete


def test_an_asymmetric_matrix_is_not_positive_definite() -> None:
    distribution = tfd.WishartTriL(jnp.float32(4), FACTOR)
    matrices = jnp.array([[[2.0, 0.5], [0.5, 1.0]], [[2.0, 0.5], [0.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])
    np.testing.assert_array_equal(support.positive_definite.contains(matrices, distribution), [True, False, False])


def test_a_simplex_allows_for_rounding() -> None:
    value = jax.nn.softmax(jnp.linspace(-5.0, 5.0, 1000))
    assert support.simplex.contains(value, None)
    assert not support.simplex.contains(value * 1.01, None)

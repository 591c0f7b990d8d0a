"""`Shaped`: a distribution whose value has a given shape and dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import gjflax
from gjflax import (
    AllSelection,
    Bernoulli,
    Categorical,
    Dirichlet,
    Exponential,
    Gamma,
    MultivariateNormalTriL,
    Normal,
    Uniform,
    choice_map,
)
from gjflax.distributions.shaped import Shaped, shaped

KEY = jax.random.key(0)
FACTOR = np.array([[1.5, 0.0], [0.4, 0.7]], np.float32)
COVARIANCE = FACTOR.astype(np.float64) @ FACTOR.T


def f64(value: Any) -> Any:
    return np.asarray(value, np.float64)


CASES = {
    "scalar": (Normal, (0.5, 2.0), (), lambda v: stats.norm.logpdf(v, 0.5, 2.0)),
    "copies of a scalar": (Normal, (0.5, 2.0), (3, 2), lambda v: stats.norm.logpdf(v, 0.5, 2.0)),
    "the shape as it is": (
        Normal,
        (jnp.arange(3.0), 2.0),
        (3,),
        lambda v: stats.norm.logpdf(v, np.arange(3.0), 2.0),
    ),
    "copies of a vector": (
        Normal,
        (jnp.arange(3.0), 2.0),
        (2, 3),
        lambda v: stats.norm.logpdf(v, np.arange(3.0), 2.0),
    ),
    "arguments that broadcast": (
        Normal,
        (0.5, jnp.array([[1.0], [3.0]])),
        (2, 3),
        lambda v: stats.norm.logpdf(v, 0.5, np.array([[1.0], [3.0]])),
    ),
    "a family of TFP": (Gamma, (2.0, 3.0), (2, 2), lambda v: stats.gamma.logpdf(v, 2.0, scale=1 / 3.0)),
    "copies of events": (
        MultivariateNormalTriL,
        (jnp.array([1.0, -1.0]), FACTOR),
        (3, 2),
        lambda v: stats.multivariate_normal.logpdf(v, [1.0, -1.0], COVARIANCE),
    ),
    "events of a simplex": (
        Dirichlet,
        (jnp.array([1.5, 2.0, 0.8]),),
        (2, 2, 3),
        lambda v: np.array([stats.dirichlet.logpdf(row / row.sum(), [1.5, 2.0, 0.8]) for row in v.reshape(-1, 3)]),
    ),
    "discrete": (
        Bernoulli.by_keyword("probs"),
        (0.3,),
        (4,),
        lambda v: stats.bernoulli.logpmf(v.astype(int), 0.3),
    ),
    "categories": (
        Categorical.by_keyword("probs"),
        (jnp.array([0.2, 0.3, 0.5]),),
        (2, 4),
        lambda v: np.log(np.array([0.2, 0.3, 0.5])[v.astype(int)]),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_shape_dtype_and_density(name):
    distribution, args, shape, logpdf = CASES[name]
    prior = Shaped(distribution, shape, np.dtype(np.float32))
    _, tr = prior.simulate(KEY, args)
    assert tr.get_retval().shape == shape
    value = f64(tr.get_retval())
    np.testing.assert_allclose(tr.get_score(), np.sum(logpdf(value)), rtol=2e-5, atol=2e-5)
    assert np.unique(value).size > 1 or value.size == 1, "copies are drawn independently"
    _, (_, score) = prior.assess(KEY, tr.get_retval(), args)
    assert score == tr.get_score()
    _, (_, weight, new, discard) = prior.update(KEY, tr, np.asarray(tr.get_retval()), args)
    assert weight == 0.0 and discard == choice_map(tr.get_retval())
    assert jax.tree.structure(new) == jax.tree.structure(tr)
    same = [jax.jit(prior.simulate)(KEY, args)[1].get_args(), tr.get_args()]
    jax.tree.map(np.testing.assert_array_equal, *same)


@pytest.mark.parametrize(
    "name", ["copies of a scalar", "arguments that broadcast", "copies of events", "a family of TFP"]
)
def test_to_and_from_all_reals(name):
    distribution, args, shape, _ = CASES[name]
    prior = shaped(distribution, shape, np.dtype(np.float32))
    _, tr = prior.simulate(KEY, args)
    unconstrained, log_det = prior.unconstrain(tr, AllSelection())
    choices, back = prior.constrain(unconstrained, args)
    np.testing.assert_allclose(choices.get_value(), tr.get_retval(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(back, -log_det, rtol=1e-5)
    whole = lambda point: prior.constrain(point.reshape(unconstrained.get_value().shape), args)[0].get_value().ravel()
    _, by_jacobian = np.linalg.slogdet(f64(jax.jacobian(whole)(unconstrained.get_value().ravel())))
    np.testing.assert_allclose(back, by_jacobian, rtol=1e-4, atol=1e-5)


def test_copies_of_a_simplex_lose_a_dimension_each():
    prior = shaped(Dirichlet, (2, 2, 3), np.dtype(np.float32))
    args = (jnp.array([1.5, 2.0, 0.8]),)
    _, tr = prior.simulate(KEY, args)
    unconstrained, log_det = prior.unconstrain(tr, AllSelection())
    assert unconstrained.get_value().shape == (2, 2, 2)
    each = [
        Dirichlet.importance(KEY, row, args)[1][1].unconstrain(AllSelection()) for row in tr.get_retval().reshape(-1, 3)
    ]
    np.testing.assert_allclose(log_det, sum(float(det) for _, det in each), rtol=1e-4)
    choices, _ = prior.constrain(unconstrained, args)
    np.testing.assert_allclose(choices.get_value(), tr.get_retval(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_scored_in_single(dtype):
    prior = shaped(Normal, (200,), np.dtype(dtype))
    _, tr = prior.simulate(KEY, (0.1, 3.0))
    assert tr.get_retval().dtype == dtype and tr.get_score().dtype == jnp.float32
    np.testing.assert_allclose(tr.get_score(), stats.norm.logpdf(f64(tr.get_retval()), 0.1, 3.0).sum(), rtol=1e-5)
    exact = jnp.linspace(0.0, 1.0, 200)
    _, (_, new) = prior.importance(KEY, exact, (0.1, 3.0))
    assert new.get_retval().dtype == dtype
    np.testing.assert_allclose(new.get_score(), stats.norm.logpdf(f64(exact.astype(dtype)), 0.1, 3.0).sum(), rtol=1e-5)


def test_outside_of_the_support():
    prior = shaped(Uniform, (3,), np.dtype(np.float32))
    _, (_, score) = prior.assess(KEY, jnp.array([0.2, 0.5, 1.5]), (0.0, 1.0))
    assert score == -jnp.inf


def test_the_gradient_of_the_density():
    prior = shaped(Exponential, (4, 2), np.dtype(np.float32))
    _, tr = prior.simulate(KEY, (2.5,))
    _, gradient = prior.choice_grad(KEY, tr, AllSelection())
    np.testing.assert_allclose(gradient.get_value(), np.full((4, 2), -2.5), rtol=1e-5)
    _, gradient = prior.arg_grad(KEY, tr, 0)
    np.testing.assert_allclose(gradient, 8 / 2.5 - f64(tr.get_retval()).sum(), rtol=1e-5)


def test_samples_are_independent_copies():
    """Means and variances of 5000 draws of 6 elements, and their correlations; 4 standard errors."""
    prior = shaped(Normal, (3, 2), np.dtype(np.float32))
    draws = jax.vmap(lambda key: prior.simulate(key, (0.5, 2.0))[1].get_retval())(jax.random.split(KEY, 5000))
    flat = f64(draws).reshape(5000, 6)
    assert np.all(np.abs(flat.mean(0) - 0.5) < 4 * 2.0 / np.sqrt(5000))
    assert np.all(np.abs(((flat - 0.5) ** 2).mean(0) - 4.0) < 4 * 4.0 * np.sqrt(2 / 5000))
    assert np.all(np.abs(np.corrcoef(flat.T)[np.triu_indices(6, 1)]) < 4 / np.sqrt(5000))


def test_shapes_that_do_not_fit_are_refused():
    prior = shaped(Normal, (3, 2), np.dtype(np.float32))
    with pytest.raises(gjflax.ChoiceShapeError, match=r"draws the shape \(3,\) at its arguments.*\(3, 2\)"):
        prior.simulate(KEY, (jnp.zeros(3), 1.0))
    with pytest.raises(gjflax.ChoiceShapeError):
        shaped(Normal, (), np.dtype(np.float32)).simulate(KEY, (jnp.zeros(3), 1.0))
    with pytest.raises(gjflax.ChoiceShapeError, match=r"has shape \(2, 3\)"):
        prior.importance(KEY, jnp.zeros((2, 3)), (0.0, 1.0))

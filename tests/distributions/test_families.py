"""Densities and draws of the named families of numbers, against SciPy in float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributions.table import BY_LOGITS, FAMILIES, Family, differences
from scipy import stats

import gjflax

KEY = jax.random.key(3)
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
FORMS = (*FAMILIES, *BY_LOGITS)
each_form = pytest.mark.parametrize(
    "form", range(len(FORMS)), ids=[f"{family.name}-{family.names[-1]}" for family in FORMS]
)


def gen_fn(family: Family) -> Any:
    exported = getattr(gjflax, family.name)
    return exported.by_keyword(*family.by_keyword) if family.by_keyword else exported


def as_value(family: Family, value: Any) -> jax.Array:
    return jnp.asarray(value, jnp.int32 if family.discrete else jnp.float32)


def score_of(family: Family) -> Any:
    """The score as a function of the value and the list of arguments."""
    distribution = gen_fn(family)
    return lambda value, args: distribution.assess(KEY, value, tuple(args))[1][1]


def score_and_gradients(family: Family) -> Any:
    """The score, and its gradients in the arguments and, of a continuous family, in the value."""
    of = (1,) if family.discrete else (1, 0)
    return jax.value_and_grad(score_of(family), argnums=of)


@functools.cache
def at_points(form: int) -> tuple[np.ndarray, Any, Any]:
    """Scores and gradients of a family at its first setting, at values inside and outside of the support."""
    family = FORMS[form]
    outside = [v for v in family.outside if not family.discrete or np.isfinite(v)]
    values = as_value(family, [*family.inside, *outside])
    return values, *jax.jit(jax.vmap(score_and_gradients(family), (0, None)))(values, family.settings(0))


@functools.cache
def at_vectors(form: int) -> Any:
    """Scores and gradients of a family at vectors of three values, with its three settings."""
    family = FORMS[form]
    compiled = jax.jit(score_and_gradients(family))
    return lambda values: compiled(values, family.settings())


def close(got: Any, want: Any, rtol: float = 2e-5, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol, atol=atol)


@each_form
def test_scores_are_the_log_density(form: int) -> None:
    family = FORMS[form]
    values, scores, _ = at_points(form)
    count = len(family.inside)
    close(scores[:count], family.oracle(values[:count], family.settings(0)), atol=1e-4)


@each_form
def test_the_score_of_a_vector_is_a_sum(form: int) -> None:
    family = FORMS[form]
    for value in (family.inside[0], family.inside[-1]):
        values = as_value(family, [value, family.inside[1], value])
        close(at_vectors(form)(values)[0], family.oracle(values, family.settings()).sum(), atol=2e-4)


@each_form
def test_parameters_go_by_name_in_any_order(form: int) -> None:
    family = FORMS[form]
    named = dict(zip(family.names, family.settings(1), strict=True))
    callee, args = getattr(gjflax, family.name).positional((), dict(reversed(named.items())))
    value = as_value(family, family.inside[1])
    close(callee.assess(KEY, value, args)[1][1], family.oracle(value, family.settings(1)), atol=1e-4)


@each_family
def test_arguments_broadcast(family: Family) -> None:
    # The first argument varies along rows, the others along columns.
    first, *others = family.settings()
    args = [np.broadcast_to(first[:2, None], (2, 1)), *others]
    shape = np.broadcast_shapes(*(arg.shape for arg in args))
    values = as_value(family, np.full(shape, family.inside[1]))
    close(score_of(family)(values, args), family.oracle(values, args).sum(), atol=2e-4)


@each_form
def test_outside_of_the_support_the_score_is_minus_infinity_and_no_gradient_is_nan(form: int) -> None:
    _, scores, gradients = at_points(form)
    count = len(FORMS[form].inside)
    assert np.all(np.isneginf(scores[count:])), scores
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient[:count]).all()
        assert not np.isnan(gradient).any()


@each_form
def test_one_element_outside_of_the_support_leaves_the_gradients_finite(form: int) -> None:
    family = FORMS[form]
    outside = [v for v in family.outside if np.isfinite(v)]
    if not outside:
        pytest.skip("the support is the real line")
    score, gradients = at_vectors(form)(as_value(family, [family.inside[0], outside[0], family.inside[1]]))
    assert np.isneginf(score)
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))


@pytest.mark.slow
@each_form
def test_gradients_in_vector_arguments_and_values_are_the_density_s(form: int) -> None:
    family = FORMS[form]
    args = family.settings()
    values = as_value(family, [family.inside[1]] * 3)
    _, (of_args, *of_value) = at_vectors(form)(values)
    for position, name in enumerate(family.names):
        if name == "total_count":
            continue  # a count, although the formula goes on between whole numbers

        def moved(arg: np.ndarray, position: int = position) -> Any:
            return family.oracle(values, [arg if i == position else other for i, other in enumerate(args)])

        close(of_args[position], differences(moved, args[position]), rtol=2e-3, atol=2e-3)
    if not family.discrete:
        want = differences(lambda value: family.oracle(value, args), values)
        close(of_value[0], want, rtol=2e-3, atol=2e-3)


DRAWS = 4000


SLOW_TO_DRAW = ("Beta", "Chi2", "InverseGamma", "NegativeBinomial", "StudentT", "VonMises")
"""Families whose samplers are TFP's and, for the most part, made of Gamma draws."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        pytest.param(i, marks=pytest.mark.slow if i >= len(FAMILIES) or family.name in SLOW_TO_DRAW else ())
        for i, family in enumerate(FORMS)
    ],
    ids=[f"{family.name}-{family.names[-1]}" for family in FORMS],
)
def test_draws_have_the_distribution_and_their_score_is_the_density(form: int) -> None:
    family = FORMS[form]
    args = family.settings()
    distribution = gen_fn(family)

    @jax.jit
    @jax.vmap
    def run(key: Any) -> Any:
        trace = distribution.simulate(key, tuple(args))[1]
        return trace.get_retval(), trace.get_score()

    values, scores = run(jax.random.split(KEY, DRAWS))
    assert values.shape == (DRAWS, 3)
    assert values.dtype == (jnp.int32 if family.discrete else jnp.float32)
    values = np.asarray(values, np.float64)
    elementwise, regular = family.oracle(values, args), np.full(DRAWS, True)
    if family.discrete:
        check_frequencies(family, values, args)
        uniforms = values
    else:
        parameters = dict(zip(family.names, (np.asarray(arg, np.float64) for arg in args), strict=True))
        uniforms = family.cdf(values, **parameters)
        for column in uniforms.T:
            # D √n < 2.2 fails once in 10⁴ for true uniforms.
            assert stats.kstest(column, "uniform").statistic < 2.2 / np.sqrt(DRAWS)
        # Near the ends of the support a density may be so steep that float32 does not tell its values apart.
        regular = np.all((uniforms > 0.05) & (uniforms < 0.95), axis=1)
    close(np.asarray(scores)[regular], elementwise[regular].sum(1), rtol=2e-3, atol=2e-3)
    correlations = np.corrcoef(uniforms.T)[np.triu_indices(3, 1)]
    assert np.all(np.abs(correlations) < 4 / np.sqrt(DRAWS)), correlations


def check_frequencies(family: Family, values: np.ndarray, args: list[Any]) -> None:
    for outcome in range(0, 25):
        expected = np.exp(family.oracle(np.full(3, outcome), args))
        error = np.sqrt(expected * (1 - expected) / DRAWS)
        # Three counts of slack: those of an outcome expected less than once are not normally distributed.
        assert np.all(np.abs((values == outcome).mean(0) - expected) <= 4 * error + 3 / DRAWS), outcome


@each_family
def test_scalar_arguments_draw_a_scalar(family: Family) -> None:
    draw = jax.eval_shape(lambda key, args: gen_fn(family).simulate(key, args)[1], KEY, tuple(family.settings(0)))
    assert draw.value.shape == () == draw.score.shape
    assert draw.score.dtype == jnp.float32


EDGES = [
    ("Uniform", {"low": -1.0, "high": 3.0}, -1.0, -np.log(4)),
    ("Uniform", {"low": -1.0, "high": 3.0}, 3.0, -np.log(4)),
    ("Exponential", {"rate": 2.0}, 0.0, np.log(2)),
    ("HalfNormal", {"scale": 2.0}, 0.0, stats.halfnorm(scale=2).logpdf(0)),
    ("HalfCauchy", {"loc": 1.0, "scale": 2.0}, 1.0, stats.halfcauchy(1, 2).logpdf(1)),
    ("LogNormal", {"loc": 0.5, "scale": 2.0}, 0.0, -np.inf),
    ("InverseGamma", {"concentration": 2.0, "scale": 3.0}, 0.0, -np.inf),
    ("Gamma", {"concentration": 1.0, "rate": 2.0}, 0.0, np.log(2)),
    ("Gamma", {"concentration": 3.0, "rate": 2.0}, 0.0, -np.inf),
    ("Gamma", {"concentration": 0.5, "rate": 2.0}, 0.0, np.inf),
    ("Chi2", {"df": 2.0}, 0.0, -np.log(2)),
    ("Chi2", {"df": 1.0}, 0.0, np.inf),
    ("Weibull", {"concentration": 1.0, "scale": 2.0}, 0.0, -np.log(2)),
    ("Weibull", {"concentration": 2.0, "scale": 2.0}, 0.0, -np.inf),
    ("Weibull", {"concentration": 0.5, "scale": 2.0}, 0.0, np.inf),
    ("Pareto", {"concentration": 2.0, "scale": 3.0}, 3.0, np.log(2 / 3)),
    ("Beta", {"concentration1": 1.0, "concentration0": 2.0}, 0.0, np.log(2)),
    ("Beta", {"concentration1": 1.0, "concentration0": 2.0}, 1.0, -np.inf),
    ("Beta", {"concentration1": 0.5, "concentration0": 2.0}, 0.0, np.inf),
    ("Beta", {"concentration1": 2.0, "concentration0": 0.5}, 1.0, np.inf),
    ("Kumaraswamy", {"concentration1": 1.0, "concentration0": 2.0}, 0.0, np.log(2)),
    ("Kumaraswamy", {"concentration1": 2.0, "concentration0": 3.0}, 1.0, -np.inf),
    (
        "TruncatedNormal",
        {"loc": 0.0, "scale": 2.0, "low": -1.0, "high": 3.0},
        3.0,
        stats.truncnorm(-0.5, 1.5, 0, 2).logpdf(3),
    ),
    (
        "TruncatedNormal",
        {"loc": 0.0, "scale": 2.0, "low": -1.0, "high": 3.0},
        -1.0,
        stats.truncnorm(-0.5, 1.5, 0, 2).logpdf(-1),
    ),
    ("Bernoulli", {"probs": 0.0}, 0, 0.0),
    ("Bernoulli", {"probs": 0.0}, 1, -np.inf),
    ("Bernoulli", {"probs": 1.0}, 1, 0.0),
    ("Bernoulli", {"logits": np.inf}, 1, 0.0),
    ("Bernoulli", {"logits": np.inf}, 0, -np.inf),
    ("Bernoulli", {"logits": -np.inf}, 0, 0.0),
    ("Binomial", {"total_count": 4.0, "probs": 0.0}, 0, 0.0),
    ("Binomial", {"total_count": 4.0, "probs": 1.0}, 4, 0.0),
    ("Binomial", {"total_count": 4.0, "probs": 1.0}, 3, -np.inf),
    ("Binomial", {"total_count": 0.0, "probs": 0.3}, 0, 0.0),
    ("Binomial", {"total_count": 0.0, "probs": 0.3}, 1, -np.inf),
    ("Binomial", {"total_count": 4.0, "logits": -np.inf}, 0, 0.0),
    ("Poisson", {"rate": 0.0}, 0, 0.0),
    ("Poisson", {"rate": 0.0}, 1, -np.inf),
    ("Poisson", {"log_rate": -np.inf}, 0, 0.0),
    ("Geometric", {"probs": 1.0}, 0, 0.0),
    ("Categorical", {"probs": np.float32([0.5, 0.5, 0.0])}, 2, -np.inf),
    ("Categorical", {"logits": np.float32([0.5, 0.5, -np.inf])}, 2, -np.inf),
    ("Categorical", {"logits": np.float32([0.5, 0.5, -np.inf])}, 1, -np.log(2)),
    ("Deterministic", {"loc": 1.5}, 1.5, 0.0),
    ("Deterministic", {"loc": 1.5}, 1.25, -np.inf),
]


@pytest.mark.parametrize(
    ("name", "parameters", "value", "want"), EDGES, ids=[f"{edge[0]}-{i}" for i, edge in enumerate(EDGES)]
)
def test_at_the_edge_of_the_support_the_score_is_the_limit(name: str, parameters: Any, value: Any, want: float) -> None:
    distribution = getattr(gjflax, name).by_keyword(*parameters)
    args = tuple(jnp.asarray(parameter, jnp.float32) for parameter in parameters.values())
    close(distribution.assess(KEY, value, args)[1][1], want, atol=2e-6)


def test_the_table_and_the_other_modules_cover_every_exported_family() -> None:
    elsewhere = {"Categorical", "Deterministic", "Dirichlet", "MultivariateNormalDiag", "MultivariateNormalTriL"}
    elsewhere |= {"MultivariateNormalFullCovariance", "Wishart", "CholeskyLKJ", "OneHotCategorical", "Multinomial"}
    elsewhere |= {"MixtureSameFamily", "TransformedDistribution", "Independent", "GaussianProcess", "HiddenMarkovModel"}
    elsewhere |= {"LinearGaussianStateSpaceModel"}
    from gjflax.distributions import families

    assert set(families.NAMES) == elsewhere | {family.name for family in FAMILIES}
    assert len(families.NAMES) == 41


def test_the_names_of_older_notebooks_are_aliases() -> None:
    from gjflax.distributions import families

    assert all(getattr(gjflax, f"TFP{name}") is getattr(gjflax, name) for name in families.NAMES)

"""Densities and draws of the named families of categories, vectors and matrices, against SciPy or a formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributions.table import differences, softmax_pick
from scipy import special, stats

import gjflax

KEY = jax.random.key(4)
DRAWS = 4000


@dataclasses.dataclass(frozen=True)
class Case:
    """A family at arguments.

    Attributes:
      name: as gjflax exports it.
      parameters: its arguments by name, all of one event, or with a batch of two.
      oracle: ``oracle(value, **parameters)`` for one event, in float64.
      inside: values of one event inside the support.
      outside: values of one event outside of it.
      moments: ``moments(**parameters)``, the mean and the variance of each element.
      batch: the arguments with a leading axis of two, or None.
      discrete: whether values are whole numbers.
    """

    name: str
    parameters: dict[str, Any]
    oracle: Callable[..., Any]
    inside: tuple[Any, ...]
    outside: tuple[Any, ...] = ()
    moments: Callable[..., tuple[Any, Any]] | None = None
    batch: dict[str, Any] | None = None
    discrete: bool = False

    def at(self) -> tuple[Any, tuple[Any, ...]]:
        """The family by keyword, and its arguments."""
        distribution = getattr(gjflax, self.name).by_keyword(*self.parameters)
        return distribution, as_arguments(self.parameters)

    def value(self, value: Any) -> jax.Array:
        return jnp.asarray(value, jnp.int32 if self.discrete else jnp.float32)

    def want(self, value: Any, parameters: dict[str, Any]) -> float:
        with np.errstate(all="ignore"):
            value = np.asarray(self.value(value), np.float64)
            return float(
                self.oracle(value, **{k: np.asarray(np.float32(v), np.float64) for k, v in parameters.items()})
            )


def as_arguments(parameters: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(v if k == "dimension" else jnp.asarray(v, jnp.float32) for k, v in parameters.items())


def pick_probs(value: Any, probs: Any) -> Any:
    with np.errstate(divide="ignore"):
        return softmax_pick(value, np.log(probs))


def one_hot(value: Any, logits: Any) -> Any:
    return value @ special.log_softmax(logits)


def multinomial(value: Any, total_count: Any, probs: Any) -> Any:
    return stats.multinomial(int(total_count), probs / probs.sum()).logpmf(value)


def dirichlet(value: Any, concentration: Any) -> Any:
    norm = special.gammaln(concentration.sum()) - special.gammaln(concentration).sum()
    return norm + special.xlogy(concentration - 1, value).sum()


def dirichlet_moments(concentration: Any) -> Any:
    made = stats.dirichlet(concentration)
    return made.mean(), made.var()


def wishart(value: Any, df: Any, scale: Any) -> Any:
    return stats.wishart(float(df), scale).logpdf(value)


def cholesky_lkj(value: Any, dimension: Any, concentration: Any) -> Any:
    """D. Lewandowski, D. Kurowicka and H. Joe, 2009, with the Jacobian of the Cholesky factor."""
    d, eta = int(dimension), float(concentration)
    k = np.arange(1, d)
    log_norm = np.sum(
        0.5 * k * np.log(np.pi) + special.gammaln(eta + (d - 1 - k) / 2) - special.gammaln(eta + (d - 1) / 2)
    )
    return np.sum((d - np.arange(2, d + 1) + 2 * eta - 2) * np.log(np.diag(value)[1:])) - log_norm


SIMPLEX = [0.2, 0.5, 0.3]
COVARIANCE = np.array([[2.0, 0.6, -0.3], [0.6, 0.5, 0.1], [-0.3, 0.1, 4.0]])
FACTOR = np.linalg.cholesky(COVARIANCE)
LOC = [1.0, -2.0, 30.0]
REAL_VECTORS = ([1.5, -2.2, 31.0], [0.0, 0.0, 20.0])
NOT_FINITE = ([np.inf, 0.0, 0.0], [0.0, -np.inf, 1.0])
SPREAD = np.array([[2.0, 0.5], [0.5, 1.0]])
CORRELATION_FACTOR = np.linalg.cholesky(np.array([[1.0, 0.5, -0.2], [0.5, 1.0, 0.3], [-0.2, 0.3, 1.0]]))

CASES = (
    Case(
        "Categorical",
        {"logits": [0.5, -1.0, 3.0, 0.0]},
        softmax_pick,
        (0, 1, 2, 3),
        (-1, 4),
        None,
        {"logits": [[0.5, -1.0, 3.0, 0.0], [5.0, 1.0, 0.0, -2.0]]},
        True,
    ),
    Case(
        "Categorical",
        {"probs": [1.0, 0.5, 0.0, 2.5]},
        pick_probs,
        (0, 1, 3),
        (-1, 2, 4),
        None,
        {"probs": [[0.2, 0.3, 0.0, 0.5], [0.1, 0.2, 0.3, 0.4]]},
        True,
    ),
    Case(
        "OneHotCategorical",
        {"logits": [0.5, -1.0, 2.0]},
        one_hot,
        ([1, 0, 0], [0, 0, 1]),
        ([0, 0, 0], [1, 1, 0], [2, -1, 0]),
        lambda logits: (special.softmax(logits), special.softmax(logits) * (1 - special.softmax(logits))),
        {"logits": [[0.5, -1.0, 2.0], [3.0, 0.0, 1.0]]},
        True,
    ),
    Case(
        "Multinomial",
        {"total_count": 7.0, "probs": [0.2, 0.5, 0.3]},
        multinomial,
        ([2, 3, 2], [0, 7, 0]),
        ([2, 3, 3], [-1, 5, 3], [8, -1, 0]),
        lambda total_count, probs: (total_count * probs, total_count * probs * (1 - probs)),
        {"total_count": [7.0, 7.0], "probs": [[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]},
        True,
    ),
    Case(
        "Dirichlet",
        {"concentration": [0.7, 2.5, 8.0]},
        dirichlet,
        (SIMPLEX, [0.05, 0.15, 0.8]),
        ([0.2, 0.5, 0.4], [-0.2, 0.5, 0.7], [0.0, 0.0, 0.0], [np.inf, 0.0, 0.0]),
        dirichlet_moments,
        {"concentration": [[0.7, 2.5, 8.0], [1.5, 1.5, 0.5]]},
    ),
    Case(
        "MultivariateNormalDiag",
        {"loc": LOC, "scale_diag": [2.0, 0.5, 5.0]},
        lambda value, loc, scale_diag: stats.multivariate_normal(loc, np.diag(scale_diag**2)).logpdf(value),
        REAL_VECTORS,
        NOT_FINITE,
        lambda loc, scale_diag: (loc, scale_diag**2),
        {"loc": [LOC, [0.0, 1.0, 2.0]], "scale_diag": [[2.0, 0.5, 5.0], [1.0, 3.0, 0.7]]},
    ),
    Case(
        "MultivariateNormalTriL",
        {"loc": LOC, "scale_tril": FACTOR},
        lambda value, loc, scale_tril: stats.multivariate_normal(loc, scale_tril @ scale_tril.T).logpdf(value),
        REAL_VECTORS,
        NOT_FINITE,
        lambda loc, scale_tril: (loc, np.diag(scale_tril @ scale_tril.T)),
        {"loc": [LOC, [0.0, 1.0, 2.0]], "scale_tril": [FACTOR, 2 * FACTOR]},
    ),
    Case(
        "MultivariateNormalFullCovariance",
        {"loc": LOC, "covariance_matrix": COVARIANCE},
        lambda value, loc, covariance_matrix: stats.multivariate_normal(loc, covariance_matrix).logpdf(value),
        REAL_VECTORS,
        NOT_FINITE,
        lambda loc, covariance_matrix: (loc, np.diag(covariance_matrix)),
        {"loc": [LOC, [0.0, 1.0, 2.0]], "covariance_matrix": [COVARIANCE, 3 * COVARIANCE]},
    ),
    Case(
        "Wishart",
        {"df": 4.5, "scale": SPREAD},
        wishart,
        (np.array([[3.0, -0.7], [-0.7, 5.0]]), np.array([[0.4, 0.1], [0.1, 0.2]])),
        (
            np.array([[1.0, 2.0], [2.0, 1.0]]),
            np.array([[1.0, 0.5], [0.1, 1.0]]),
            -np.eye(2),
            np.zeros((2, 2)),
            np.array([[np.inf, 0.0], [0.0, 1.0]]),
        ),
        lambda df, scale: (df * scale, df * (scale**2 + np.outer(np.diag(scale), np.diag(scale)))),
        {"df": [4.5, 6.0], "scale": [SPREAD, np.eye(2)]},
    ),
    Case(
        "Wishart",
        {"df": 4.5, "scale_tril": np.linalg.cholesky(SPREAD)},
        lambda value, df, scale_tril: wishart(value, df, scale_tril @ scale_tril.T),
        (np.array([[3.0, -0.7], [-0.7, 5.0]]),),
    ),
    Case(
        "CholeskyLKJ",
        {"dimension": 3, "concentration": 2.5},
        cholesky_lkj,
        (CORRELATION_FACTOR, np.eye(3)),
        (2 * CORRELATION_FACTOR, CORRELATION_FACTOR.T, -np.eye(3), np.full((3, 3), np.nan)),
    ),
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{list(case.parameters)[-1]}")


def close(got: Any, want: Any, rtol: float = 3e-5, atol: float = 1e-4) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol, atol=atol)


@each_case
def test_scores_are_the_log_density_and_minus_infinity_outside_of_the_support(case: Case) -> None:
    distribution, args = case.at()
    static = case.parameters.get("dimension") is not None
    values = case.value([*case.inside, *case.outside])

    def score(value: Any, free: tuple[Any, ...]) -> Any:
        return distribution.assess(KEY, value, (args[0], *free) if static else free)[1][1]

    free = args[1:] if static else args
    scores, gradients = jax.jit(jax.vmap(jax.value_and_grad(score, 1), (0, None)))(values, free)
    count = len(case.inside)
    close(scores[:count], [case.want(value, case.parameters) for value in case.inside])
    assert np.all(np.isneginf(scores[count:])), scores
    assert not any(np.isnan(gradient).any() for gradient in gradients)


@pytest.mark.parametrize("case", [case for case in CASES if case.batch], ids=lambda case: case.name)
def test_the_score_of_a_batch_is_a_sum(case: Case) -> None:
    assert case.batch is not None
    distribution = getattr(gjflax, case.name).by_keyword(*case.batch)
    values = [case.inside[0], case.inside[1]]
    settings = [{name: np.asarray(value)[i] for name, value in case.batch.items()} for i in range(2)]
    want = sum(case.want(value, setting) for value, setting in zip(values, settings, strict=True))
    _, (_, score) = distribution.assess(KEY, case.value(values), as_arguments(case.batch))
    close(score, want, atol=3e-4)


@pytest.mark.parametrize(
    ("name", "parameters", "value", "oracle"),
    [
        ("Dirichlet", {"concentration": np.array([0.7, 2.5, 8.0])}, SIMPLEX, dirichlet),
        (
            "MultivariateNormalDiag",
            {"loc": np.array(LOC), "scale_diag": np.array([2.0, 0.5, 5.0])},
            REAL_VECTORS[0],
            None,
        ),
        ("MultivariateNormalTriL", {"loc": np.array(LOC), "scale_tril": FACTOR}, REAL_VECTORS[0], None),
        ("Categorical", {"logits": np.array([0.5, -1.0, 3.0, 0.0])}, 1, softmax_pick),
        ("Multinomial", {"total_count": np.array(7.0), "probs": np.array(SIMPLEX)}, [2, 3, 2], None),
    ],
)
def test_gradients_in_the_arguments_are_the_density_s(name: str, parameters: Any, value: Any, oracle: Any) -> None:
    case = next(case for case in CASES if case.name == name)
    oracle = oracle or case.oracle
    distribution, args = case.at()
    got = jax.grad(lambda args: distribution.assess(KEY, case.value(value), args)[1][1])(args)
    for position, (parameter, point) in enumerate(parameters.items()):
        if parameter in ("total_count", "probs"):
            continue  # the oracle divides by the sum of the probabilities, as TFP does not
        want = differences(
            lambda moved, p=parameter: oracle(np.asarray(value, float), **{**parameters, p: moved}), point
        )
        mask = np.tril(np.ones((3, 3))) if parameter == "scale_tril" else 1.0
        close(got[position], want * mask, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("case", [case for case in CASES if case.moments], ids=lambda case: case.name)
def test_draws_have_the_moments_and_their_score_is_the_density(case: Case) -> None:
    assert case.moments is not None
    distribution, args = case.at()
    traces = jax.jit(jax.vmap(lambda key: distribution.simulate(key, args)[1]))(jax.random.split(KEY, DRAWS))
    values = np.asarray(traces.value, np.float64)
    assert traces.value.dtype == (jnp.int32 if case.discrete else jnp.float32)
    mean, variance = case.moments(**{name: np.asarray(value, float) for name, value in case.parameters.items()})
    assert np.all(np.abs(values.mean(0) - mean) <= 4 * np.sqrt(variance / DRAWS))
    # The standard error of a variance, from the draws' own fourth moments.
    deviations = (values - mean) ** 2
    assert np.all(np.abs(deviations.mean(0) - variance) <= 4 * deviations.std(0) / np.sqrt(DRAWS))
    for index in range(5):
        want = case.want(traces.value[index], case.parameters)
        if want > -20:
            close(traces.score[index], want, rtol=1e-3, atol=1e-3)


def test_draws_of_a_correlation_have_beta_marginals() -> None:
    concentration, dimension = 1.7, 3
    draw = jax.vmap(lambda key: gjflax.CholeskyLKJ.simulate(key, (dimension, concentration))[1].value)
    factors = np.asarray(jax.jit(draw)(jax.random.split(KEY, DRAWS)), np.float64)
    correlations = factors @ np.swapaxes(factors, 1, 2)
    np.testing.assert_allclose(np.diagonal(correlations, axis1=1, axis2=2), 1, atol=1e-5)
    shape = concentration + (dimension - 2) / 2
    for i, j in ((1, 0), (2, 0), (2, 1)):
        assert stats.kstest((correlations[:, i, j] + 1) / 2, stats.beta(shape, shape).cdf).statistic < 2.2 / DRAWS**0.5


@pytest.mark.parametrize("form", ["logits", "probs"])
def test_draws_of_categories_have_their_frequencies(form: str) -> None:
    probs = np.array([[0.2, 0.5, 0.3, 0.0], [0.7, 0.1, 0.1, 0.1]])
    with np.errstate(divide="ignore"):
        parameter = jnp.asarray(2 * probs if form == "probs" else 3 + np.log(probs), jnp.float32)
    draw = jax.vmap(lambda key: gjflax.Categorical.by_keyword(form).simulate(key, (parameter,))[1].value)
    values = np.asarray(draw(jax.random.split(KEY, DRAWS)))
    assert values.dtype == np.int32
    for outcome in range(4):
        expected = probs[:, outcome]
        error = np.sqrt(expected * (1 - expected) / DRAWS)
        assert np.all(np.abs((values == outcome).mean(0) - expected) <= 4 * error)
    assert abs(np.corrcoef(values.T)[0, 1]) < 4 / np.sqrt(DRAWS)


def test_a_probability_of_zero_elsewhere_leaves_the_gradient_finite() -> None:
    categorical = gjflax.Categorical.by_keyword("probs")
    probs = jnp.array([0.5, 0.5, 0.0])
    gradient = jax.grad(lambda probs: categorical.assess(KEY, 0, (probs,))[1][1])(probs)
    np.testing.assert_allclose(gradient, [1.0, -1.0, -1.0], rtol=1e-6)


def test_a_scalar_is_no_array_of_categories() -> None:
    with pytest.raises(gjflax.ChoiceShapeError, match="one logit or probability for each category"):
        gjflax.Categorical.simulate(KEY, (0.5,))


@pytest.mark.parametrize("loc", [1.5, jnp.array([1.0, -2.0]), jnp.array([3, 4]), True])
def test_deterministic_is_a_point_mass_of_any_dtype(loc: Any) -> None:
    _, trace = gjflax.Deterministic.simulate(KEY, (loc,))
    assert trace.value.dtype == jnp.asarray(loc).dtype and np.array_equal(trace.value, loc)
    assert trace.get_score() == 0 and trace.get_score().dtype == jnp.float32
    assert trace.is_discrete != jnp.issubdtype(jnp.asarray(loc).dtype, jnp.floating)
    other = ~trace.value if loc is True else trace.value + 1
    assert np.isneginf(gjflax.Deterministic.assess(KEY, other, (loc,))[1][1])

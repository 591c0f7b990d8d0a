"""Every estimator of every distribution: the gradient of an expectation against its closed form.

The model has the guide's own distribution and one more cost f(z): so the bound is E[f(z)], and its gradient in the
distribution's arguments is known. All distributions stand side by side in one guide: what is estimated for one may not
hear of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learning.gradients import DRAWS, assert_unbiased, narrow, variance

import gjflax
from gjflax import ELBO, ENUM, REINFORCE, MeasureValued, Reparameterized, distribution, gen, trace
from gjflax.learning.estimators.estimator import GradientEstimator

factor = distribution(lambda key, cost: 0.0 * cost, lambda value, cost: cost + 0.0 * value, name="factor")
"""Its log density is its argument: a cost."""


class Row(NamedTuple):
    """A distribution at arguments, a cost, and its expectation as a function of the arguments."""

    distribution: Any
    args: tuple[Any, ...]
    cost: Callable[[Any], Any]
    expectation: Callable[..., Any]


def real(value: Any) -> Any:
    return value.astype(jnp.result_type(float))


digamma, gamma = jax.scipy.special.digamma, lambda x: jnp.exp(jax.scipy.special.gammaln(x))
A = np.asarray

PATHWISE: dict[str, Row] = {
    "Normal": Row(gjflax.Normal, (0.4, 1.3), lambda z: z**2, lambda m, s: m**2 + s**2),
    "vector": Row(
        gjflax.Normal,
        (A([0.4, -1.0]), 1.3),
        lambda z: z[0] * z[1] ** 2,
        lambda m, s: m[0] * (m[1] ** 2 + s**2),
    ),
    "LogNormal": Row(gjflax.LogNormal, (0.2, 0.5), lambda z: z, lambda m, s: jnp.exp(m + s**2 / 2)),
    "HalfNormal": Row(gjflax.HalfNormal, (1.3,), lambda z: z, lambda s: s * math.sqrt(2 / math.pi)),
    "Laplace": Row(gjflax.Laplace, (0.4, 0.7), lambda z: z**2, lambda m, s: m**2 + 2 * s**2),
    "Exponential": Row(gjflax.Exponential, (1.7,), lambda z: z**2, lambda r: 2 / r**2),
    "Gamma": Row(gjflax.Gamma, (2.5, 1.4), lambda z: z + jnp.log(z), lambda a, b: a / b + digamma(a) - jnp.log(b)),
    "InverseGamma": Row(gjflax.InverseGamma, (3.5, 1.4), lambda z: 1 / z, lambda a, b: a / b),
    "Beta": Row(gjflax.Beta, (2.5, 1.4), lambda z: jnp.log(z), lambda a, b: digamma(a) - digamma(a + b)),
    "Dirichlet": Row(
        gjflax.Dirichlet,
        (A([1.5, 2.5, 0.8]),),
        lambda z: jnp.log(z[0]) + z[1] ** 2,
        lambda a: digamma(a[0]) - digamma(a.sum()) + a[1] * (a[1] + 1) / (a.sum() * (a.sum() + 1)),
    ),
    "Logistic": Row(gjflax.Logistic, (0.4, 0.7), lambda z: z**2, lambda m, s: m**2 + (s * math.pi) ** 2 / 3),
    "Gumbel": Row(gjflax.Gumbel, (0.4, 0.7), lambda z: z, lambda m, s: m + s * np.euler_gamma),
    "Weibull": Row(gjflax.Weibull, (1.8, 1.3), lambda z: z, lambda k, s: s * gamma(1 + 1 / k)),
    "MultivariateNormalDiag": Row(
        gjflax.MultivariateNormalDiag,
        (A([0.4, -1.0]), A([1.3, 0.6])),
        lambda z: jnp.sum(z) ** 2,
        lambda m, s: jnp.sum(m) ** 2 + jnp.sum(s**2),
    ),
    "MultivariateNormalTriL": Row(
        gjflax.MultivariateNormalTriL,
        (A([0.4, -1.0]), A([[1.3, 0.0], [0.5, 0.6]])),
        lambda z: z[0] * z[1],
        lambda m, s: m[0] * m[1] + (jnp.tril(s) @ jnp.tril(s).T)[0, 1],
    ),
}
"""Distributions whose support does not depend on their arguments, with a reparameterisation."""

OF_SUPPORT: dict[str, Row] = {
    "Uniform": Row(gjflax.Uniform, (-0.5, 1.2), lambda z: z**2, lambda a, b: (a**2 + a * b + b**2) / 3),
}
"""Distributions whose support does depend on them: they have no score function."""

ENUMERABLE: dict[str, Row] = {
    "Bernoulli": Row(gjflax.Bernoulli, (0.4,), lambda z: 2.0 * real(z) - 1, lambda x: 2 * jax.nn.sigmoid(x) - 1),
    "Bernoulli by probs": Row(gjflax.Bernoulli.by_keyword("probs"), (0.3,), lambda z: 3.0 * real(z), lambda p: 3 * p),
    "Categorical": Row(
        gjflax.Categorical,
        (A([0.4, -0.5, 1.0]),),
        lambda z: real(z) ** 2,
        lambda x: jax.nn.softmax(x) @ np.array([0.0, 1.0, 4.0]).astype(x.dtype),
    ),
    "Categorical by probs": Row(
        gjflax.Categorical.by_keyword("probs"),
        (A([0.2, 0.3, 0.5]),),
        lambda z: real(z) ** 2,
        lambda p: (p @ np.array([0.0, 1.0, 4.0]).astype(p.dtype)) / p.sum(),
    ),
    "OneHotCategorical": Row(
        gjflax.OneHotCategorical,
        (A([0.4, -0.5, 1.0]),),
        lambda z: real(z)[1] - 2 * real(z)[2],
        lambda x: jax.nn.softmax(x)[1] - 2 * jax.nn.softmax(x)[2],
    ),
}

COUNTED: dict[str, Row] = {
    "Poisson": Row(gjflax.Poisson, (1.7,), lambda z: real(z) ** 2, lambda r: r + r**2),
    "Poisson by log_rate": Row(gjflax.Poisson.by_keyword("log_rate"), (0.4,), lambda z: real(z), lambda x: jnp.exp(x)),
}

DISCRETE: dict[str, Row] = {
    **ENUMERABLE,
    **COUNTED,
    "Geometric": Row(gjflax.Geometric.by_keyword("probs"), (0.4,), lambda z: real(z), lambda p: (1 - p) / p),
    "Binomial": Row(
        gjflax.Binomial.by_keyword("total_count", "probs"),
        (A(4.0), 0.3),
        lambda z: real(z) ** 2,
        lambda n, p: 4 * p * (1 - p) + 16 * p**2 + 0 * n,
    ),
    "NegativeBinomial": Row(
        gjflax.NegativeBinomial.by_keyword("total_count", "probs"),
        (A(3.0), 0.3),
        lambda z: real(z),
        lambda n, p: 3 * p / (1 - p) + 0 * n,
    ),
}
MEASURED: dict[str, Row] = {
    "Normal": PATHWISE["Normal"],
    "vector": PATHWISE["vector"],
    **{name: row for name, row in ENUMERABLE.items() if name.startswith("Bernoulli")},
    **COUNTED,
}
HELD = {"Binomial": 0, "NegativeBinomial": 0}
"""Arguments in which there is no gradient: numbers of trials."""


def _mixture() -> Row:
    """A mixture of Normals, whose sampler is differentiable code: but its derivative is not that of the choice."""

    def sample(key: Any, logits: Any, locs: Any) -> Any:
        which, noise = jax.random.split(key)
        return locs[jax.random.categorical(which, logits)] + 0.5 * jax.random.normal(noise, dtype=locs.dtype)

    def logpdf(value: Any, logits: Any, locs: Any) -> Any:
        each = jax.scipy.stats.norm.logpdf(value, locs, 0.5)
        return jax.nn.logsumexp(jax.nn.log_softmax(logits) + each)

    return Row(
        distribution(sample, logpdf, name="mixture"),
        (A([0.3, -0.4]), A([-1.0, 1.5])),
        lambda z: z**2,
        lambda x, m: jax.nn.softmax(x) @ (m**2) + 0.25,
    )


def problem_of(rows: dict[str, Row], estimator: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Draws of the loss and its gradient in the arguments of all rows: a function of keys."""

    @gen
    def guide(args):
        for name, row in rows.items():
            trace(name, estimator(row.distribution))(*args[name])

    @gen
    def model(args):
        for name, row in rows.items():
            z = trace(name, row.distribution)(*args[name])
            trace(f"cost of {name}", factor)(row.cost(z))

    observed = {f"cost of {name}": jnp.zeros(()) for name in rows}
    args = arguments(rows)
    objective = ELBO(model, guide)

    def loss(args: Any, key: Any) -> Any:
        return -objective.apply({}, observed, (args,), (args,), rngs={"choice": key})

    return jax.jit(jax.vmap(lambda key: jax.value_and_grad(loss)(args, key)))


def arguments(rows: dict[str, Row]) -> Any:
    return {name: tuple(jnp.asarray(arg, jnp.float32) for arg in row.args) for name, row in rows.items()}


def wanted(rows: dict[str, Row]) -> Any:
    """The sum of the expectations, and its gradient, in float64."""
    with jax.enable_x64(True):
        args = {name: tuple(jnp.asarray(arg, jnp.float64) for arg in row.args) for name, row in rows.items()}

        def total(args: Any) -> Any:
            return sum(row.expectation(*args[name]) for name, row in rows.items())

        return narrow(jax.value_and_grad(total)(args))


def without_held(gradients: Any) -> Any:
    value, args = gradients
    return value, {
        name: tuple(arg for place, arg in enumerate(of_row) if HELD.get(name) != place) for name, of_row in args.items()
    }


def plain(distribution: Any) -> Any:
    return distribution


CASES: dict[str, tuple[dict[str, Row], Callable[[Any], Any]]] = {
    "reparameterised, by default": ({**PATHWISE, **OF_SUPPORT}, plain),
    "reparameterised, demanded": ({name: PATHWISE[name] for name in ("Normal", "Gamma", "Beta")}, Reparameterized),
    "score function, by default": ({**DISCRETE}, plain),
    "score function, chosen": ({**PATHWISE, **DISCRETE}, REINFORCE),
    "measure-valued": (MEASURED, MeasureValued),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_mean_of_draws_is_the_exact_gradient(name: str):
    """4 standard errors of 40,000 draws."""
    rows, estimator = CASES[name]
    drawn = problem_of(rows, estimator)(jax.random.split(jax.random.key(3), 4 * DRAWS))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(drawn))
    assert_unbiased(without_held(drawn), without_held(wanted(rows)))


def test_the_mean_of_draws_is_the_exact_gradient_of_some():
    """4 standard errors of 10,000 draws, of one distribution for each estimator: all in one guide."""
    chosen = {
        "Gamma": PATHWISE["Gamma"],
        "Bernoulli": ENUMERABLE["Bernoulli"],
        "Normal": PATHWISE["Normal"],
        "Poisson": COUNTED["Poisson"],
    }
    of = {"Bernoulli": plain, "Normal": REINFORCE, "Poisson": MeasureValued, "Gamma": Reparameterized}
    drawn = problem_of(chosen, lambda d: of[d.label](d))(jax.random.split(jax.random.key(3), DRAWS))
    assert_unbiased(drawn, wanted(chosen))


def test_a_sampler_that_is_not_declared_reparameterised_is_not_differentiated():
    """The derivative of a mixture's draw in its components, added to the score function's, would be counted twice."""
    rows = {"mixture": _mixture()}
    drawn = problem_of(rows, plain)(jax.random.split(jax.random.key(1), DRAWS))
    assert_unbiased(drawn, wanted(rows))


def test_enumeration_is_exact():
    """One draw gives the gradient itself."""
    value, gradients = problem_of(ENUMERABLE, ENUM)(jax.random.split(jax.random.key(0), 2))
    exact_value, exact_gradients = wanted(ENUMERABLE)
    np.testing.assert_allclose(value, np.full(2, exact_value), rtol=2e-6)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, np.stack([want, want]), rtol=1e-5, atol=2e-6),
        gradients,
        exact_gradients,
    )


@pytest.mark.slow
def test_enumeration_of_given_values():
    row = DISCRETE["Binomial"]
    value, gradients = problem_of({"Binomial": row}, lambda d: ENUM(d, values=range(5)))(jax.random.key(0)[None])
    exact_value, exact_gradients = wanted({"Binomial": row})
    np.testing.assert_allclose(value[0], exact_value, rtol=1e-5)
    np.testing.assert_allclose(gradients["Binomial"][1][0], exact_gradients["Binomial"][1], rtol=1e-5)


# The ground truths of GenJAX's tests of its estimators, with tight bounds ---------------------------------------------


def test_the_tangent_of_a_flip():
    """E[−p/2 where the flip fails] = −p (1 − p) / 2, with slope p − ½."""

    @gen
    def guide(p):
        trace("flip", ENUM(gjflax.Bernoulli))(probs=p)

    @gen
    def model(p):
        flip = trace("flip", gjflax.Bernoulli)(probs=p)
        trace("cost", factor)(jnp.where(flip == 1, 0.0, -p / 2))

    def expectation(p: Any) -> Any:
        loss = ELBO(model, guide).apply({}, {"cost": jnp.zeros(())}, (p,), (p,), rngs={"choice": jax.random.key(0)})
        return -loss

    p = jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])
    slopes = jax.jit(jax.vmap(jax.grad(expectation)))(p)
    np.testing.assert_allclose(slopes, p - 0.5, atol=1e-6)


def test_linear_costs_have_no_variance():
    """Of a Normal's mean by its draw, and of a coin's probability by the two values that it has."""

    def linear(z: Any) -> Any:
        return 3.0 * z.astype(jnp.float32)

    for dist, args, estimator in (
        (gjflax.Normal, (0.5, 1.0), plain),
        (gjflax.Bernoulli.by_keyword("probs"), (0.5,), MeasureValued),
        (gjflax.Bernoulli.by_keyword("probs"), (0.5,), ENUM),
    ):
        rows = {"z": Row(dist, args, linear, plain)}
        _, gradients = problem_of(rows, estimator)(jax.random.split(jax.random.key(0), 8))
        np.testing.assert_allclose(gradients["z"][0], np.full(8, 3.0), rtol=1e-5)


@pytest.mark.slow
def test_the_estimators_differ_in_variance():
    """Of E[z²] in the mean of a Normal: through the draw 4 σ² and no more; the score function far above it."""
    rows = {"z": PATHWISE["Normal"]}
    keys = jax.random.split(jax.random.key(5), DRAWS)
    of = {e.__name__: problem_of(rows, e)(keys)[1]["z"][0] for e in (Reparameterized, MeasureValued, REINFORCE)}
    found = {name: variance(samples) for name, samples in of.items()}
    # 4 standard errors of the variance of a Normal sample: 4 √(2 / 10,000).
    assert abs(found["Reparameterized"] / (4 * 1.3**2) - 1) < 0.06
    assert found["MeasureValued"] < found["REINFORCE"]


def test_estimators_are_distributions():
    for estimator in (REINFORCE, Reparameterized, MeasureValued):
        wrapped = estimator(gjflax.Normal)
        assert isinstance(wrapped, GradientEstimator) and wrapped == estimator(gjflax.Normal)

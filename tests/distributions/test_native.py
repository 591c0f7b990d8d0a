"""The families that are built without TFP: precision at extremes, and the programs that they make."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributions.tfp_oracle import tfd
from scipy import special, stats

import gjflax
from gjflax.distributions import discrete, tfp

KEY = jax.random.key(8)


def score(name: str, value: Any, **parameters: Any) -> float:
    made = getattr(gjflax, name).by_keyword(*parameters)
    args = tuple(jnp.float32(parameter) for parameter in parameters.values())
    return float(made.assess(KEY, value, args)[1][1])


@pytest.mark.parametrize(("count", "probs"), [(1, 0.3), (2, 0.5), (10, 1e-6), (1000, 0.3), (100_000, 0.3)])
def test_large_counts_of_a_binomial_do_not_cancel(count: int, probs: float) -> None:
    probs = float(np.float32(probs))
    logits = float(np.float32(special.logit(probs)))
    mean, deviation = count * probs, np.sqrt(count * probs * (1 - probs))
    for value in {0, count, round(mean), round(min(mean + 2 * deviation, count))}:
        want = stats.binom(count, probs).logpmf(value)
        got = score("Binomial", value, total_count=count, probs=probs)
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-5 + 1e-9 * count)
        want = stats.binom(count, special.expit(logits)).logpmf(value)
        got = score("Binomial", value, total_count=count, logits=logits)
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-5 + 1e-9 * count)


@pytest.mark.parametrize("rate", [1e-8, 0.3, 12.0, 1000.0, 100_000.0])
def test_large_counts_of_a_poisson_do_not_cancel(rate: float) -> None:
    rate = float(np.float32(rate))
    for value in {0, 1, round(rate), round(rate + 2 * np.sqrt(rate))}:
        want = stats.poisson(rate).logpmf(value)
        np.testing.assert_allclose(score("Poisson", value, rate=rate), want, rtol=2e-6, atol=1e-5 + 2e-9 * rate)


def test_the_error_of_stirling_s_formula_is_known() -> None:
    counts = np.concatenate([np.arange(1.0, 40.0), [100.0, 1e4]])
    with jax.enable_x64(True):
        got = np.asarray(discrete._stirling_error(jnp.asarray(counts)))
    want = special.gammaln(counts + 1) - counts * np.log(counts) + counts - 0.5 * np.log(2 * np.pi * counts)
    np.testing.assert_allclose(got, want, atol=2e-8)


def test_a_small_probability_is_told_from_none() -> None:
    # log(1 − p) is −p here, not 0.
    np.testing.assert_allclose(score("Bernoulli", 0, probs=1e-9), -1e-9, rtol=1e-5)
    np.testing.assert_allclose(score("Bernoulli", 1, logits=30.0), -np.exp(-30.0), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameter", "point", "value", "want"),
    [
        ("Bernoulli", "probs", 0.0, 0, -1.0),
        ("Bernoulli", "probs", 1.0, 1, 1.0),
        ("Bernoulli", "probs", 0.0, 5, 0.0),
        ("Bernoulli", "probs", 1.0, 5, 0.0),
        ("Bernoulli", "logits", np.inf, 1, 0.0),
        ("Bernoulli", "logits", -np.inf, 0, 0.0),
        ("Binomial", "probs", 0.0, 0, -4.0),
        ("Binomial", "probs", 1.0, 4, 4.0),
        ("Binomial", "probs", 1.0, 9, 0.0),
        ("Binomial", "logits", -np.inf, 0, 0.0),
        ("Poisson", "rate", 0.0, 0, -1.0),
        ("Poisson", "rate", 0.0, -1, 0.0),
        ("Poisson", "log_rate", -np.inf, 0, 0.0),
    ],
)
def test_gradients_at_the_ends_of_a_parameter_are_its_limits(
    name: str, parameter: str, point: float, value: int, want: float
) -> None:
    names = ("total_count", parameter) if name == "Binomial" else (parameter,)
    made = getattr(gjflax, name).by_keyword(*names)
    fixed = (4.0,) if name == "Binomial" else ()
    gradient = jax.grad(lambda p: made.assess(KEY, value, (*fixed, p))[1][1])(jnp.float32(point))
    np.testing.assert_allclose(gradient, want, atol=1e-6)


@pytest.mark.parametrize("name", ["Bernoulli", "Binomial"])
@pytest.mark.parametrize("probs", [0.0, 1.0])
def test_a_certain_outcome_is_drawn(name: str, probs: float) -> None:
    made = getattr(gjflax, name).by_keyword("probs")
    args = (jnp.full(50, probs),) if name == "Bernoulli" else (4.0, jnp.full(50, probs))
    _, drawn = made.simulate(KEY, args)
    assert np.all(np.asarray(drawn.value) == (1 if name == "Bernoulli" else 4) * probs)


def test_no_trials_have_no_success() -> None:
    _, drawn = gjflax.Binomial.by_keyword("probs").simulate(KEY, (0, 0.3))
    assert drawn.value == 0 and drawn.get_score() == 0


def equations(jaxpr: Any) -> int:
    """How many operations a program has, those of the functions that it calls among them."""
    inner = [parameter.jaxpr for eqn in jaxpr.eqns for parameter in eqn.params.values() if hasattr(parameter, "jaxpr")]
    return sum(eqn.primitive.name not in ("jit", "pjit") for eqn in jaxpr.eqns) + sum(map(equations, inner))


@pytest.mark.parametrize(
    ("value", "loc", "scale"),
    [
        (np.ones(3, np.float32), np.ones(3, np.float32), np.float32(2)),
        (np.ones(3, np.float32), np.ones(3, np.float32), 2.0),
        (np.float32(1), np.float32(1), np.float32(2)),
        (np.float32(1), 0.0, 1.0),
    ],
)
def test_a_normal_density_is_eight_operations(value: Any, loc: Any, scale: Any) -> None:
    numbers = [isinstance(arg, float) for arg in (loc, scale)]
    arrays = [arg for arg, number in zip((loc, scale), numbers, strict=True) if not number]

    def density(key: Any, value: Any, *arrays: Any) -> Any:
        rest = iter(arrays)
        args = tuple(arg if number else next(rest) for arg, number in zip((loc, scale), numbers, strict=True))
        return gjflax.Normal.assess(key, value, args)[1][1]

    assert equations(jax.make_jaxpr(density)(KEY, value, *arrays).jaxpr) <= 8


def test_a_family_is_traced_once_for_many_choices() -> None:
    count = 0

    def density(value: Any, scale: Any) -> Any:
        nonlocal count
        count += 1
        return -value / scale

    from gjflax.distributions.native import Native

    def assess(values: Any, scales: Any) -> Any:
        made = [Native(density, density, scale).logpdf(value) for value, scale in zip(values, scales, strict=True)]
        return sum(made)

    jax.make_jaxpr(assess)([jnp.ones(3)] * 5, [jnp.ones(3)] * 5)
    jax.make_jaxpr(assess)([jnp.ones(3)] * 2, [jnp.ones(3)] * 2)
    assert count == 1


@pytest.mark.parametrize("name", [name for name in tfp.NATIVE if name != "Deterministic"])
def test_arguments_go_by_tfp_s_names_in_tfp_s_order(name: str) -> None:
    import inspect

    ours = inspect.signature(tfp.NATIVE[name].__init__)
    theirs = inspect.signature(getattr(tfd, name).__init__)
    names = [parameter for parameter in theirs.parameters if parameter in ours.parameters]
    assert list(ours.parameters) == names[: len(ours.parameters)]

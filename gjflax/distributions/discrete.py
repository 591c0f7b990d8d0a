r"""The discrete families that models use most, without TFP. Their values are int32. See `native`.

Factorials are taken by Stirling's formula, n! = √(2π n) (n/e)ⁿ exp δ(n), with the exact δ(n). The large terms then
meet those of the parameters and cancel before they are rounded: lgamma(10⁵) alone has an error of 0.06 in float32.
After C. Loader, "Fast and accurate computation of binomial probabilities", 2000.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gjflax.core.errors import ArgumentError, ChoiceShapeError
from gjflax.core.typing import PRNGKey
from gjflax.distributions.arguments import site
from gjflax.distributions.native import HALF_LOG_TWO_PI, Native
from gjflax.distributions.softplus import softplus


def one_of(label: str, first: Any, second: Any, names: str) -> None:
    """An error unless exactly one of two arguments is given."""
    if (first is None) == (second is None):
        given = "none" if first is None else "both"
        raise ArgumentError(f"The distribution of {site(label)} takes either {names}, not {given}.")


def _given(label: str, logits: Any, probs: Any) -> Any:
    one_of(label, logits, probs, "`logits` or `probs`")
    return probs if logits is None else logits


def _bernoulli_of_logits(value: Any, logits: Any) -> Any:
    # What depends on the value alone is chosen before it meets the logits: over samples these have one axis more, and XLA on a
    # CPU takes four times as long for a `where` whose flag is broadcast along the innermost axis.
    sign = jnp.where(value == 1, -1.0, jnp.where(value == 0, 1.0, 0.0))
    outside = jnp.where((value == 0) | (value == 1), 0.0, -jnp.inf)
    return outside - softplus(sign * logits)


def _bernoulli_of_probs(value: Any, probs: Any) -> Any:
    success, failure = value == 1, value == 0
    log_success = jnp.log(jnp.where(success, probs, 1.0))
    log_failure = jnp.log1p(-jnp.where(failure, probs, 0.0))
    return jnp.where(success | failure, log_success + log_failure, -jnp.inf)


def _draw_bernoulli_of_probs(key: PRNGKey, like: Any, probs: Any) -> Any:
    return (jax.random.uniform(key, like.shape, like.dtype) < probs).astype(jnp.int32)


def _draw_bernoulli_of_logits(key: PRNGKey, like: Any, logits: Any) -> Any:
    return _draw_bernoulli_of_probs(key, like, jax.nn.sigmoid(logits))


class Bernoulli(Native):
    r"""v log p + (1 − v) log(1 − p), for v in {0, 1}."""

    is_discrete = True

    def __init__(self, logits: Any = None, probs: Any = None):
        parameter = _given("Bernoulli", logits, probs)
        if logits is None:
            super().__init__(_bernoulli_of_probs, _draw_bernoulli_of_probs, parameter)
        else:
            super().__init__(_bernoulli_of_logits, _draw_bernoulli_of_logits, parameter)


def _pick(value: Any, parameter: Any) -> tuple[Any, Any]:
    """Whether the value is a category, and the parameter at it."""
    inside = (value >= 0) & (value < parameter.shape[-1])
    index = jnp.where(inside, value, 0)[..., None]
    return inside, jnp.take_along_axis(parameter, index, axis=-1)[..., 0]


def _categorical_of_logits(value: Any, logits: Any) -> Any:
    inside, logit = _pick(value, logits)
    return jnp.where(inside, logit - jax.nn.logsumexp(logits, axis=-1), -jnp.inf)


def _categorical_of_probs(value: Any, probs: Any) -> Any:
    # The logarithm of the one that counts: of a probability of 0 elsewhere it has no derivative.
    inside, prob = _pick(value, probs)
    return jnp.where(inside, jnp.log(jnp.where(inside, prob, 1.0)) - jnp.log(jnp.sum(probs, axis=-1)), -jnp.inf)


def _draw_categorical_of_logits(key: PRNGKey, like: Any, logits: Any) -> Any:
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _draw_categorical_of_probs(key: PRNGKey, like: Any, probs: Any) -> Any:
    return _draw_categorical_of_logits(key, like, jnp.log(probs))


class Categorical(Native):
    r"""logits[v] − logsumexp(logits), over the last axis, for v in {0, …, K − 1}. `probs` need not add up to 1."""

    is_discrete = True

    def __init__(self, logits: Any = None, probs: Any = None):
        parameter = _given("Categorical", logits, probs)
        if logits is None:
            super().__init__(_categorical_of_probs, _draw_categorical_of_probs, parameter)
        else:
            super().__init__(_categorical_of_logits, _draw_categorical_of_logits, parameter)

    def _shape(self, label: str) -> tuple[int, ...]:
        shape = jnp.shape(self.parameters[0])
        if not shape:
            raise ChoiceShapeError(
                f"The distribution of {site(label)} takes an array with one logit or probability for each category, "
                "not a scalar."
            )
        return shape[:-1]


_STIELTJES = (1 / 12, 1 / 30, 53 / 210, 195 / 371, 22999 / 22737, 29944523 / 19733142, 109535241009 / 48264275462)
"""The coefficients of δ(n) as a continued fraction, c₀ / (n + c₁ / (n + c₂ / …)), which converges for every n > 0."""


def _stirling_error(count: Any) -> Any:
    """δ(n) = log n! − n log n + n − ½ log(2π n), for n ≥ 1, to 10⁻⁸: by arithmetic alone, which compiles fast."""
    fraction = jnp.zeros_like(count)
    for coefficient in reversed(_STIELTJES):
        fraction = coefficient / (count + 1.0 + fraction)
    # δ(n) = δ(n + 1) + (n + ½) log((n + 1) / n) − 1, a power series in y² = 1 / (2n + 1)².
    square, series = 1.0 / ((2.0 * count + 1.0) * (2.0 * count + 1.0)), jnp.zeros_like(count)
    for term in range(8, 0, -1):
        series = square * (1 / (2 * term + 1) + series)
    return fraction + series


def _log_success(logits: Any) -> Any:
    return -softplus(-logits)


def _log_failure(logits: Any) -> Any:
    return -softplus(logits)


def _log_complement(probs: Any) -> Any:
    return jnp.log1p(-probs)


def _log_where_counted(factor: Any, log: Callable[[Any], Any], argument: Any) -> Any:
    """log(argument), or 0 where its factor is 0: there neither it nor its slope counts, though they may be infinite."""
    there = factor > 0
    return jnp.where(there, log(jnp.where(there, argument, 0.5)), 0.0)


def _excess(count: Any, log_ratio: Any) -> Any:
    """count · (e − (exp e − 1)), with e the logarithm of what was expected over the count, where that is near 0.

    In it the parts that cancel have done so; it is known to few digits only if e is, and then it is small.
    """
    return count * (log_ratio - jnp.expm1(log_ratio))


def _binomial_of_logits(value: Any, total_count: Any, logits: Any) -> Any:
    return _binomial(value, total_count, logits, _log_success, _log_failure)


def _binomial_of_probs(value: Any, total_count: Any, probs: Any) -> Any:
    return _binomial(value, total_count, probs, jnp.log, _log_complement)


def _binomial(value: Any, total_count: Any, parameter: Any, log_success: Any, log_failure: Any) -> Any:
    value = value.astype(parameter.dtype)
    inside = (value >= 0) & (value <= total_count)
    successes, failures = jnp.where(inside, value, 0.0), jnp.where(inside, total_count - value, 0.0)
    log_p = _log_where_counted(successes, log_success, parameter)
    log_q = _log_where_counted(failures, log_failure, parameter)
    both = (successes > 0) & (failures > 0)
    v, u = jnp.where(both, successes, 1.0), jnp.where(both, failures, 1.0)
    n = v + u
    e_v, e_u = log_p - jnp.log(v / n), log_q - jnp.log(u / n)
    # v (exp e_v − 1) + u (exp e_u − 1) is n p − v + n q − u, which is 0.
    near = both & (jnp.abs(e_v) < 1) & (jnp.abs(e_u) < 1)
    shape = jnp.where(
        near, _excess(v, jnp.where(near, e_v, 0.0)) + _excess(u, jnp.where(near, e_u, 0.0)), v * e_v + u * e_u
    )
    scale = 0.5 * jnp.log(n / (2 * math.pi * v * u)) + _stirling_error(n) - _stirling_error(v) - _stirling_error(u)
    # With one outcome only there is one way.
    score = jnp.where(both, shape + scale, successes * log_p + failures * log_q)
    return jnp.where(inside, score, -jnp.inf)


def _draw_binomial_of_probs(key: Any, like: Any, total_count: Any, probs: Any) -> Any:
    return jax.random.binomial(key, total_count, probs, like.shape, like.dtype).astype(jnp.int32)


def _draw_binomial_of_logits(key: PRNGKey, like: Any, total_count: Any, logits: Any) -> Any:
    return _draw_binomial_of_probs(key, like, total_count, jax.nn.sigmoid(logits))


class Binomial(Native):
    r"""log C(n, v) + v log p + (n − v) log(1 − p), for v in {0, …, n}. With u = n − v and by Stirling's formula,

    log C(n, v) = −v log(v/n) − u log(u/n) + ½ log(n / (2π v u)) + δ(n) − δ(v) − δ(u).
    """

    is_discrete = True

    def __init__(self, total_count: Any, logits: Any = None, probs: Any = None):
        parameter = _given("Binomial", logits, probs)
        if logits is None:
            super().__init__(_binomial_of_probs, _draw_binomial_of_probs, total_count, parameter)
        else:
            super().__init__(_binomial_of_logits, _draw_binomial_of_logits, total_count, parameter)


def _poisson_of_rate(value: Any, rate: Any) -> Any:
    return _poisson(value, rate, jnp.log(jnp.where(value > 0, rate, 1.0)))


def _poisson_of_log_rate(value: Any, log_rate: Any) -> Any:
    return _poisson(value, jnp.exp(log_rate), jnp.where(value > 0, log_rate, 0.0))


def _poisson(value: Any, rate: Any, log_rate: Any) -> Any:
    """The density; `log_rate` is anything finite where the value is 0."""
    some = value > 0
    v = jnp.where(some, value, 1).astype(rate.dtype)
    e = log_rate - jnp.log(v)
    near = some & (jnp.abs(e) < 1)
    shape = jnp.where(near, _excess(v, jnp.where(near, e, 0.0)), v * e + (v - rate))
    positive = shape - 0.5 * jnp.log(v) - HALF_LOG_TWO_PI - _stirling_error(v)
    return jnp.where(some, positive, jnp.where(value == 0, -rate, -jnp.inf))


def _draw_poisson_of_rate(key: PRNGKey, like: Any, rate: Any) -> Any:
    return jax.random.poisson(key, rate, like.shape, jnp.int32)


def _draw_poisson_of_log_rate(key: PRNGKey, like: Any, log_rate: Any) -> Any:
    return _draw_poisson_of_rate(key, like, jnp.exp(log_rate))


class Poisson(Native):
    r"""v log rate − rate − log v!, for v in {0, 1, …}. For v > 0 that is, by Stirling's formula,

    v (log rate − log v) + (v − rate) − ½ log(2π v) − δ(v).
    """

    is_discrete = True

    def __init__(self, rate: Any = None, log_rate: Any = None):
        one_of("Poisson", rate, log_rate, "`rate` or `log_rate`")
        if log_rate is None:
            super().__init__(_poisson_of_rate, _draw_poisson_of_rate, rate)
        else:
            super().__init__(_poisson_of_log_rate, _draw_poisson_of_log_rate, log_rate)

r"""The densities that models use most, written in as few JAX operations as they need.

Building a TFP object costs some milliseconds for every `trace` statement, and its densities more operations than
their formulas. These families are built without TFP; everything rarer goes through it. Each is the formula at its
class, elementwise; arguments broadcast against each other.

A formula is traced once for each combination of shapes and dtypes, and its operations are written into the caller's
program: so a thousand choices of one family cost a thousand look-ups, not a thousand evaluations in Python.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gjflax.core.errors import ArgumentError, ChoiceShapeError
from gjflax.core.typing import PRNGKey
from gjflax.distributions import bijectors
from gjflax.distributions.arguments import aligned, as_array, common_shape, float_dtype, is_number, site, wider
from gjflax.distributions.distribution import Applied

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _score(formula: Callable[..., Any], dtype: Any, value: Any, *parameters: Any) -> Any:
    """The sum of a formula over a value. It gets floats in one dtype; integer values as they are."""
    if jnp.issubdtype(value.dtype, jnp.floating):
        value = lax.convert_element_type(value, dtype)
    terms = formula(value, *(aligned(parameter, value, dtype) for parameter in parameters))
    return lax.convert_element_type(jnp.sum(terms) if terms.ndim else terms, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _draw(sampler: Callable[..., Any], shape: tuple[int, ...], dtype: Any, key: PRNGKey, *parameters: Any) -> Any:
    like = jax.ShapeDtypeStruct(shape, dtype)
    return sampler(key, like, *(aligned(parameter, like, dtype) for parameter in parameters))


class _Native(Applied):
    """A family whose parameters are floats that broadcast.

    A subclass gives ``formula(value, *parameters)``, the log density elementwise, and
    ``sampler(key, like, *parameters)``, a draw of the shape and dtype of `like`.
    """

    formula: Callable[..., Any]
    sampler: Callable[..., Any]

    def __init__(self, *parameters: Any):
        label = type(self).__name__
        arrays = [as_array(label, parameter) for parameter in parameters]
        self.parameters = tuple(float(array) if is_number(array) else array for array in arrays)
        self.dtype = float_dtype(*self.parameters)
        self.shape = self._shape(label)

    def _shape(self, label: str) -> tuple[int, ...]:
        return common_shape(label, *self.parameters)

    @property
    def template(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, jnp.int32 if self.is_discrete else self.dtype)

    def sample(self, key: PRNGKey) -> Any:
        return _draw(self.sampler, self.shape, self.dtype, key, *self.parameters)

    def logpdf(self, value: Any) -> Any:
        dtype = wider(value.dtype, self.dtype) if jnp.issubdtype(value.dtype, jnp.floating) else self.dtype
        return _score(self.formula, dtype, value, *self.parameters)


class _Continuous(_Native):
    reparameterized = True


class Normal(_Continuous):
    r"""−½ ((v − loc) / scale)² − log scale − ½ log 2π."""

    def __init__(self, loc: Any, scale: Any):
        super().__init__(loc, scale)

    @staticmethod
    def sampler(key: PRNGKey, like: Any, loc: Any, scale: Any) -> Any:
        return loc + scale * jax.random.normal(key, like.shape, like.dtype)

    @staticmethod
    def formula(value: Any, loc: Any, scale: Any) -> Any:
        z = (value - loc) / scale
        return -0.5 * (z * z) - (jnp.log(scale) + _HALF_LOG_TWO_PI)

    def bijector(self) -> bijectors.Bijector:
        return bijectors.Identity()


class LogNormal(_Continuous):
    r"""The normal density of log v, over v; for v > 0."""

    def __init__(self, loc: Any, scale: Any):
        super().__init__(loc, scale)

    @staticmethod
    def sampler(key: PRNGKey, like: Any, loc: Any, scale: Any) -> Any:
        return jnp.exp(Normal.sampler(key, like, loc, scale))

    @staticmethod
    def formula(value: Any, loc: Any, scale: Any) -> Any:
        inside = (value > 0) & (value < jnp.inf)
        log_value = jnp.log(jnp.where(inside, value, 1.0))
        return jnp.where(inside, Normal.formula(log_value, loc, scale) - log_value, -jnp.inf)

    def bijector(self) -> bijectors.Bijector:
        return bijectors.Exp()


class HalfNormal(_Continuous):
    r"""log 2 − ½ (v / scale)² − log scale − ½ log 2π, for v ≥ 0."""

    def __init__(self, scale: Any):
        super().__init__(scale)

    @staticmethod
    def sampler(key: PRNGKey, like: Any, scale: Any) -> Any:
        return scale * jnp.abs(jax.random.normal(key, like.shape, like.dtype))

    @staticmethod
    def formula(value: Any, scale: Any) -> Any:
        return jnp.where(value >= 0, math.log(2) + Normal.formula(value, 0.0, scale), -jnp.inf)

    def bijector(self) -> bijectors.Bijector:
        return bijectors.Softplus()


class Laplace(_Continuous):
    r"""−|v − loc| / scale − log(2 scale)."""

    def __init__(self, loc: Any, scale: Any):
        super().__init__(loc, scale)

    @staticmethod
    def sampler(key: PRNGKey, like: Any, loc: Any, scale: Any) -> Any:
        return loc + scale * jax.random.laplace(key, like.shape, like.dtype)

    @staticmethod
    def formula(value: Any, loc: Any, scale: Any) -> Any:
        return -jnp.abs(value - loc) / scale - (jnp.log(scale) + math.log(2))

    def bijector(self) -> bijectors.Bijector:
        return bijectors.Identity()


class Exponential(_Continuous):
    r"""log rate − rate v, for v ≥ 0."""

    def __init__(self, rate: Any):
        super().__init__(rate)

    @staticmethod
    def sampler(key: PRNGKey, like: Any, rate: Any) -> Any:
        return jax.random.exponential(key, like.shape, like.dtype) / rate

    @staticmethod
    def formula(value: Any, rate: Any) -> Any:
        return jnp.where(value >= 0, jnp.log(rate) - rate * value, -jnp.inf)

    def bijector(self) -> bijectors.Bijector:
        return bijectors.Softplus()


class Uniform(_Continuous):
    r"""−log(high − low), for low ≤ v ≤ high: at both ends too, which rounding may draw."""

    def __init__(self, low: Any = 0.0, high: Any = 1.0):
        super().__init__(low, high)

    @staticmethod
    def sampler(key: PRNGKey, like: Any, low: Any, high: Any) -> Any:
        return low + (high - low) * jax.random.uniform(key, like.shape, like.dtype)

    @staticmethod
    def formula(value: Any, low: Any, high: Any) -> Any:
        return jnp.where((value >= low) & (value <= high), -jnp.log(high - low), -jnp.inf)

    def bijector(self) -> bijectors.Bijector:
        return bijectors.Sigmoid(*self.parameters)


class Deterministic(Applied):
    r"""A point mass: 0 at v = loc, −inf elsewhere. Its values have the dtype of `loc`."""

    reparameterized = True

    def __init__(self, loc: Any):
        loc = jnp.asarray(as_array("Deterministic", loc))
        self.loc = lax.convert_element_type(loc, jax.dtypes.canonicalize_dtype(loc.dtype))
        self.is_discrete = not jnp.issubdtype(loc.dtype, jnp.floating)

    @property
    def template(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.loc.shape, self.loc.dtype)

    def sample(self, key: PRNGKey) -> Any:
        return self.loc

    def logpdf(self, value: Any) -> Any:
        return jnp.where(value == lax.convert_element_type(self.loc, value.dtype), 0.0, -jnp.inf)


def one_of(label: str, logits: Any, probs: Any, names: str = "`logits` or `probs`") -> None:
    """An error unless exactly one of two arguments is given."""
    if (logits is None) == (probs is None):
        raise ArgumentError(
            f"The distribution of {site(label)} takes either {names}, not {'none' if probs is None else 'both'}."
        )


class _Discrete(_Native):
    """A family of ``logits`` or ``probs``, with int32 values."""

    is_discrete = True
    by_logits: Callable[..., Any]
    by_probs: Callable[..., Any]
    sample_by_probs: Callable[..., Any]

    def __init__(self, *others: Any, logits: Any, probs: Any):
        one_of(type(self).__name__, logits, probs)
        self._by_logits = logits is not None
        super().__init__(*others, logits if self._by_logits else probs)

    @property
    def formula(self) -> Callable[..., Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.by_logits if self._by_logits else self.by_probs

    @property
    def sampler(self) -> Callable[..., Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.sample_by_logits if self._by_logits else self.sample_by_probs

    @classmethod
    def sample_by_logits(cls, key: PRNGKey, like: Any, *parameters: Any) -> Any:
        *others, logits = parameters
        return cls.sample_by_probs(key, like, *others, jax.nn.sigmoid(logits))


def _times_log(factor: Any, log: Callable[[Any], Any], argument: Any, harmless: float) -> Any:
    """factor · log(argument), which is 0 where the factor is, also where the logarithm and its slope are infinite."""
    there = factor != 0
    return jnp.where(there, factor * log(jnp.where(there, argument, harmless)), 0.0)


class Bernoulli(_Discrete):
    r"""v log p + (1 − v) log(1 − p), for v in {0, 1}; by logits, −softplus(∓logit)."""

    def __init__(self, logits: Any = None, probs: Any = None):
        super().__init__(logits=logits, probs=probs)

    @staticmethod
    def by_logits(value: Any, logits: Any) -> Any:
        inside = (value == 0) | (value == 1)
        return jnp.where(inside, -jax.nn.softplus(jnp.where(value == 1, -logits, logits)), -jnp.inf)

    @staticmethod
    def by_probs(value: Any, probs: Any) -> Any:
        success, failure = value == 1, value == 0
        log_success = jnp.log(jnp.where(success, probs, 1.0))
        log_failure = jnp.log1p(-jnp.where(failure, probs, 0.0))
        return jnp.where(success | failure, log_success + log_failure, -jnp.inf)

    @staticmethod
    def sample_by_probs(key: PRNGKey, like: Any, probs: Any) -> Any:
        return (jax.random.uniform(key, like.shape, like.dtype) < probs).astype(jnp.int32)


class Categorical(_Discrete):
    r"""logits[v] − logsumexp(logits), over the last axis, for v in {0, …, K − 1}; `probs` need not add up to 1."""

    def __init__(self, logits: Any = None, probs: Any = None):
        super().__init__(logits=logits, probs=probs)

    def _shape(self, label: str) -> tuple[int, ...]:
        if is_number(self.parameters[0]) or self.parameters[0].ndim < 1:
            raise ChoiceShapeError(
                f"The distribution of {site(label)} takes an array with one logit or probability for each category, "
                "not a scalar."
            )
        return self.parameters[0].shape[:-1]

    @staticmethod
    def _pick(value: Any, parameter: Any) -> tuple[Any, Any]:
        """Whether the value is a category, and the parameter at it."""
        inside = (value >= 0) & (value < parameter.shape[-1])
        index = jnp.where(inside, value, 0)[..., None]
        return inside, jnp.take_along_axis(parameter, index, axis=-1)[..., 0]

    @staticmethod
    def by_logits(value: Any, logits: Any) -> Any:
        inside, logit = Categorical._pick(value, logits)
        return jnp.where(inside, logit - jax.nn.logsumexp(logits, axis=-1), -jnp.inf)

    @staticmethod
    def by_probs(value: Any, probs: Any) -> Any:
        # The logarithm of the one that counts: at a probability of 0 elsewhere it has no derivative.
        inside, prob = Categorical._pick(value, probs)
        return jnp.where(inside, jnp.log(jnp.where(inside, prob, 1.0)) - jnp.log(jnp.sum(probs, axis=-1)), -jnp.inf)

    @classmethod
    def sample_by_logits(cls, key: PRNGKey, like: Any, *parameters: Any) -> Any:
        return jax.random.categorical(key, *parameters).astype(jnp.int32)

    @staticmethod
    def sample_by_probs(key: PRNGKey, like: Any, probs: Any) -> Any:
        return jax.random.categorical(key, jnp.log(probs)).astype(jnp.int32)


class Binomial(_Discrete):
    r"""log C(n, v) + v log p + (n − v) log(1 − p), for v in {0, …, n}.

    By Stirling's formula the factorials are √(2π n) (n/e)ⁿ exp δ(n), and the large terms meet those of p:

        v (log p − log v/n) + u (log(1 − p) − log u/n) + ½ log(n / (2π v u)) + δ(n) − δ(v) − δ(u),   u = n − v,

    so that nothing large cancels. After C. Loader, "Fast and accurate computation of binomial probabilities", 2000.
    """

    def __init__(self, total_count: Any, logits: Any = None, probs: Any = None):
        super().__init__(total_count, logits=logits, probs=probs)

    @staticmethod
    def by_logits(value: Any, total_count: Any, logits: Any) -> Any:
        log_success, log_failure = (lambda logits: -jax.nn.softplus(-logits)), (lambda logits: -jax.nn.softplus(logits))
        return Binomial._density(value, total_count, logits, log_success, log_failure, 0.0)

    @staticmethod
    def by_probs(value: Any, total_count: Any, probs: Any) -> Any:
        return Binomial._density(value, total_count, probs, jnp.log, lambda probs: jnp.log1p(-probs), 0.5)

    @staticmethod
    def _density(
        value: Any,
        total_count: Any,
        parameter: Any,
        log_success: Callable[[Any], Any],
        log_failure: Callable[[Any], Any],
        harmless: float,
    ) -> Any:
        count = jnp.asarray(total_count, jnp.result_type(float) if is_number(total_count) else None)
        floats = value.astype(count.dtype)
        inside = (floats >= 0) & (floats <= count)
        successes = jnp.where(inside, floats, 0.0)
        failures = jnp.where(inside, count - floats, 0.0)
        terms = _times_log(successes, log_success, parameter, harmless)
        terms = terms + _times_log(failures, log_failure, parameter, harmless)
        between = (successes > 0) & (failures > 0)
        v, u, n = jnp.where(between, successes, 1.0), jnp.where(between, failures, 1.0), jnp.where(between, count, 2.0)
        log_ways = -v * jnp.log(v / n) - u * jnp.log(u / n) + 0.5 * jnp.log(n / (2 * math.pi * v * u))
        log_ways = log_ways + _stirling_error(n) - _stirling_error(v) - _stirling_error(u)
        return jnp.where(inside, jnp.where(between, log_ways, 0.0) + terms, -jnp.inf)

    @staticmethod
    def sample_by_probs(key: PRNGKey, like: Any, total_count: Any, probs: Any) -> Any:
        count = jnp.asarray(total_count, like.dtype)
        return jax.random.binomial(key, count, jnp.asarray(probs, like.dtype), like.shape, like.dtype).astype(jnp.int32)


def _stirling_error(count: Any) -> Any:
    """δ(n) = log n! − n log n + n − ½ log(2π n), for n ≥ 1."""
    small = count < 12
    low, high = jnp.where(small, count, 1.0), jnp.where(small, 12.0, count)
    exact = lax.lgamma(low + 1.0) - (low + 0.5) * jnp.log(low) + low - _HALF_LOG_TWO_PI
    square = 1.0 / (high * high)
    series = (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680))) / high
    return jnp.where(small, exact, series)

r"""The densities that models use most, written in as few JAX operations as they need.

Building a TFP object costs some milliseconds for every `trace` statement, and its densities more operations than
their formulas. These families are built without TFP; everything rarer goes through it. Each is the formula at its
class, elementwise; arguments broadcast against each other.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gjflax.core.errors import ArgumentError, ChoiceShapeError
from gjflax.core.typing import PRNGKey
from gjflax.distributions.distribution import Applied

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and not isinstance(value, np.generic)


def as_floats(*values: Any) -> tuple[Any, ...]:
    """The arguments as floating point arrays of one dtype, single precision at least; numbers stay numbers.

    A Python number is a constant of the program: its logarithm is taken while tracing.
    """
    arrays = [value if _is_number(value) else jnp.asarray(value) for value in values]
    dtypes = [array.dtype for array in arrays if not _is_number(array) and jnp.issubdtype(array.dtype, jnp.inexact)]
    default = jnp.zeros(()).dtype
    dtype = jnp.result_type(jnp.float32, *dtypes) if dtypes else default
    return tuple(float(array) if _is_number(array) else lax.convert_element_type(array, dtype) for array in arrays)


def common_shape(*values: Any) -> tuple[int, ...]:
    """The shape to which the arguments broadcast.

    Raises:
      ChoiceShapeError: if they do not.
    """
    shapes = [jnp.shape(value) for value in values]
    try:
        return jnp.broadcast_shapes(*shapes)
    except ValueError as error:
        raise ChoiceShapeError(f"The arguments of a distribution have shapes that do not broadcast: {shapes}.") from error


def _float_dtype(*values: Any) -> Any:
    dtypes = [value.dtype for value in values if not _is_number(value)]
    return jnp.result_type(*dtypes) if dtypes else jnp.zeros(()).dtype


def _lift(value: Any, to: Any) -> Any:
    """An argument in the dtype of a value, and with its axes unless it is a scalar."""
    if _is_number(value):
        return value
    value = lax.convert_element_type(value, to.dtype)
    return value if value.ndim in (0, to.ndim) else jnp.broadcast_to(value, to.shape)


def _log(value: Any) -> Any:
    if not _is_number(value):
        return jnp.log(value)
    return math.log(value) if value > 0 else math.nan


class _Continuous(Applied):
    """A continuous family whose parameters are floats that broadcast."""

    reparameterized = True

    def __init__(self, *parameters: Any):
        self.parameters = as_floats(*parameters)
        self.shape = common_shape(*self.parameters)

    @property
    def template(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, _float_dtype(*self.parameters))

    def _given(self, value: Any) -> tuple[Any, ...]:
        """The value and the parameters, in one dtype."""
        dtype = jnp.promote_types(value.dtype, self.template.dtype)
        value = lax.convert_element_type(value, dtype)
        return (value, *(_lift(parameter, value) for parameter in self.parameters))

    def _standard(self, draw: Any, key: PRNGKey) -> tuple[Any, ...]:
        """A standard draw, and the parameters."""
        noise = draw(key, self.shape, self.template.dtype)
        return (noise, *(_lift(parameter, noise) for parameter in self.parameters))


class Normal(_Continuous):
    r"""−½ ((v − loc) / scale)² − log scale − ½ log 2π."""

    def __init__(self, loc: Any, scale: Any):
        super().__init__(loc, scale)

    def sample(self, key: PRNGKey) -> Any:
        noise, loc, scale = self._standard(jax.random.normal, key)
        return loc + scale * noise

    def logpdf(self, value: Any) -> Any:
        value, loc, scale = self._given(value)
        z = (value - loc) / scale
        return -0.5 * (z * z) - (_log(scale) + _HALF_LOG_TWO_PI)


class LogNormal(_Continuous):
    r"""The normal density of log v, over v; for v > 0."""

    def __init__(self, loc: Any, scale: Any):
        super().__init__(loc, scale)

    def sample(self, key: PRNGKey) -> Any:
        noise, loc, scale = self._standard(jax.random.normal, key)
        return jnp.exp(loc + scale * noise)

    def logpdf(self, value: Any) -> Any:
        value, loc, scale = self._given(value)
        inside = value > 0
        log_value = jnp.log(jnp.where(inside, value, 1.0))
        z = (log_value - loc) / scale
        return jnp.where(inside, -0.5 * (z * z) - (_log(scale) + _HALF_LOG_TWO_PI) - log_value, -jnp.inf)


class HalfNormal(_Continuous):
    r"""log 2 − ½ (v / scale)² − log scale − ½ log 2π, for v ≥ 0."""

    def __init__(self, scale: Any):
        super().__init__(scale)

    def sample(self, key: PRNGKey) -> Any:
        noise, scale = self._standard(jax.random.normal, key)
        return scale * jnp.abs(noise)

    def logpdf(self, value: Any) -> Any:
        value, scale = self._given(value)
        z = value / scale
        return jnp.where(value >= 0, math.log(2) - 0.5 * (z * z) - (_log(scale) + _HALF_LOG_TWO_PI), -jnp.inf)


class Laplace(_Continuous):
    r"""−|v − loc| / scale − log(2 scale)."""

    def __init__(self, loc: Any, scale: Any):
        super().__init__(loc, scale)

    def sample(self, key: PRNGKey) -> Any:
        noise, loc, scale = self._standard(jax.random.laplace, key)
        return loc + scale * noise

    def logpdf(self, value: Any) -> Any:
        value, loc, scale = self._given(value)
        return -jnp.abs(value - loc) / scale - (_log(scale) + math.log(2))


class Exponential(_Continuous):
    r"""log rate − rate v, for v ≥ 0."""

    def __init__(self, rate: Any):
        super().__init__(rate)

    def sample(self, key: PRNGKey) -> Any:
        noise, rate = self._standard(jax.random.exponential, key)
        return noise / rate

    def logpdf(self, value: Any) -> Any:
        value, rate = self._given(value)
        return jnp.where(value >= 0, _log(rate) - rate * value, -jnp.inf)


class Uniform(_Continuous):
    r"""−log(high − low), for low ≤ v ≤ high."""

    def __init__(self, low: Any = 0.0, high: Any = 1.0):
        super().__init__(low, high)

    def sample(self, key: PRNGKey) -> Any:
        noise, low, high = self._standard(jax.random.uniform, key)
        return low + (high - low) * noise

    def logpdf(self, value: Any) -> Any:
        value, low, high = self._given(value)
        return jnp.where((value >= low) & (value <= high), -_log(high - low), -jnp.inf)


class Deterministic(Applied):
    r"""A point mass: 0 at v = loc, −inf elsewhere."""

    reparameterized = True

    def __init__(self, loc: Any):
        loc = jnp.asarray(loc)
        self.loc = lax.convert_element_type(loc, jax.dtypes.canonicalize_dtype(loc.dtype))

    @property
    def template(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.loc.shape, self.loc.dtype)

    def sample(self, key: PRNGKey) -> Any:
        return self.loc

    def logpdf(self, value: Any) -> Any:
        return jnp.where(value == lax.convert_element_type(self.loc, value.dtype), 0.0, -jnp.inf)


def _one_of(name: str, logits: Any, probs: Any) -> None:
    if (logits is None) == (probs is None):
        raise ArgumentError(f"`{name}` takes either `logits` or `probs`, not {'both' if probs is not None else 'none'}.")


class _Discrete(Applied):
    """A discrete family of ``logits`` or ``probs``, with int32 values."""

    is_discrete = True

    def __init__(self, logits: Any = None, probs: Any = None):
        _one_of(type(self).__name__, logits, probs)
        self.by_logits = logits is not None
        (parameter,) = as_floats(logits if self.by_logits else probs)
        self.parameter = jnp.asarray(parameter)

    @property
    def template(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.parameter.shape, jnp.int32)


def _log_odds(probs: Any) -> Any:
    return jnp.log(probs) - jnp.log1p(-probs)


def _bernoulli_terms(successes: Any, failures: Any, parameter: Any, by_logits: bool) -> Any:
    """successes · log p + failures · log(1 − p), finite where a factor is 0 and its logarithm −inf."""
    if by_logits:
        return successes * parameter - (successes + failures) * jax.nn.softplus(parameter)
    return jax.scipy.special.xlogy(successes, parameter) + jax.scipy.special.xlog1py(failures, -parameter)


class Bernoulli(_Discrete):
    r"""v log p + (1 − v) log(1 − p), for v in {0, 1}; by logits, v·logit − softplus(logit)."""

    def sample(self, key: PRNGKey) -> Any:
        probs = jax.nn.sigmoid(self.parameter) if self.by_logits else self.parameter
        uniform = jax.random.uniform(key, self.parameter.shape, self.parameter.dtype)
        return (uniform < probs).astype(jnp.int32)

    def logpdf(self, value: Any) -> Any:
        floats = value.astype(self.parameter.dtype)
        inside = (value == 0) | (value == 1)
        return jnp.where(inside, _bernoulli_terms(floats, 1.0 - floats, self.parameter, self.by_logits), -jnp.inf)


class Categorical(_Discrete):
    r"""logits[v] − logsumexp(logits), over the last axis, for v in {0, …, K − 1}."""

    def __init__(self, logits: Any = None, probs: Any = None):
        super().__init__(logits, probs)
        if self.parameter.ndim < 1:
            raise ChoiceShapeError("`Categorical` takes one logit or probability for each category: an array, not a scalar.")

    @property
    def template(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.parameter.shape[:-1], jnp.int32)

    def _log_probs(self) -> Any:
        if self.by_logits:
            return jax.nn.log_softmax(self.parameter, axis=-1)
        return jnp.log(self.parameter)

    def sample(self, key: PRNGKey) -> Any:
        logits = self.parameter if self.by_logits else jnp.log(self.parameter)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    def logpdf(self, value: Any) -> Any:
        inside = (value >= 0) & (value < self.parameter.shape[-1])
        index = jnp.where(inside, value, 0)[..., None]
        log_prob = jnp.take_along_axis(self._log_probs(), index, axis=-1)[..., 0]
        return jnp.where(inside, log_prob, -jnp.inf)


class Binomial(_Discrete):
    r"""log C(n, v) + v log p + (n − v) log(1 − p), for v in {0, …, n}."""

    def __init__(self, total_count: Any, logits: Any = None, probs: Any = None):
        super().__init__(logits, probs)
        total_count, parameter = as_floats(total_count, self.parameter)
        shape = common_shape(total_count, parameter)
        self.parameter = jnp.broadcast_to(parameter, shape)
        self.total_count = _lift(total_count, self.parameter)

    def sample(self, key: PRNGKey) -> Any:
        probs = jax.nn.sigmoid(self.parameter) if self.by_logits else self.parameter
        count = jnp.asarray(self.total_count, probs.dtype)
        return jax.random.binomial(key, count, probs, probs.shape, probs.dtype).astype(jnp.int32)

    def logpdf(self, value: Any) -> Any:
        floats, count = value.astype(self.parameter.dtype), self.total_count
        inside = (floats >= 0) & (floats <= count)
        successes = jnp.where(inside, floats, 0.0)
        failures = count - successes
        log_gamma = jax.scipy.special.gammaln
        log_ways = log_gamma(count + 1.0) - log_gamma(successes + 1.0) - log_gamma(failures + 1.0)
        terms = _bernoulli_terms(successes, failures, self.parameter, self.by_logits)
        return jnp.where(inside, log_ways + terms, -jnp.inf)

r"""The continuous families that models use most, written in as few JAX operations as they need.

Building a TFP object costs some milliseconds for every `trace` statement, and its densities more operations than
their formulas. These families are built without TFP, as are the discrete ones of `discrete`; everything rarer goes
through it. Each is the formula at its class, elementwise; arguments broadcast against each other.

A formula is compiled by itself, so traced once for each combination of shapes and dtypes: a thousand choices of one
family cost a thousand look-ups, not a thousand evaluations in Python, and so do their derivatives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gjflax.core.typing import PRNGKey
from gjflax.distributions import bijectors
from gjflax.distributions.applied import Applied
from gjflax.distributions.arguments import aligned, as_array, common_shape, float_dtype, is_number, wider, with_dtype

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(formula: Callable[..., Any], dtype: Any, value: Any, *parameters: Any) -> Any:
    """The sum of a formula over a value. It gets floats in one dtype; integer values as they are."""
    if jnp.issubdtype(value.dtype, jnp.floating):
        value = lax.convert_element_type(value, dtype)
    terms = formula(value, *(aligned(parameter, value, dtype) for parameter in parameters))
    return lax.convert_element_type(jnp.sum(terms) if terms.ndim else terms, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(sampler: Callable[..., Any], shape: tuple[int, ...], dtype: Any, key: PRNGKey, *parameters: Any) -> Any:
    like = jax.ShapeDtypeStruct(shape, dtype)
    return sampler(key, like, *(aligned(parameter, like, dtype) for parameter in parameters))


class Native(Applied):
    """A family without TFP, whose parameters are floats that broadcast.

    Args:
      formula: ``formula(value, *parameters)``, the log density elementwise.
      sampler: ``sampler(key, like, *parameters)``, a draw of the shape of `like`, in floats of its dtype.
      parameters: the arguments.
    """

    def __init__(self, formula: Callable[..., Any], sampler: Callable[..., Any], *parameters: Any):
        label = type(self).__name__
        arrays = [as_array(label, parameter) for parameter in parameters]
        self._formula, self._sampler = formula, sampler
        self.parameters = tuple(float(array) if is_number(array) else array for array in arrays)
        self.dtype = float_dtype(*self.parameters)
        self.shape = self._shape(label)

    def _shape(self, label: str) -> tuple[int, ...]:
        return common_shape(label, *self.parameters)

    @property
    def template(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, jnp.int32 if self.is_discrete else self.dtype)

    def sample(self, key: PRNGKey) -> Any:
        return _draw(self._sampler, self.shape, self.dtype, key, *with_dtype(self.dtype, *self.parameters))

    def logpdf(self, value: Any) -> Any:
        dtype = wider(value.dtype, self.dtype) if jnp.issubdtype(value.dtype, jnp.floating) else self.dtype
        return _score(self._formula, dtype, value, *with_dtype(dtype, *self.parameters))


def _normal(value: Any, loc: Any, scale: Any) -> Any:
    z = (value - loc) / scale
    return -0.5 * (z * z) - (jnp.log(scale) + HALF_LOG_TWO_PI)


def _draw_normal(key: PRNGKey, like: Any, loc: Any, scale: Any) -> Any:
    return loc + scale * jax.random.normal(key, like.shape, like.dtype)


class Normal(Native):
    r"""−½ ((v − loc) / scale)² − log scale − ½ log 2π."""

    reparameterized = True

    def __init__(self, loc: Any, scale: Any):
        super().__init__(_normal, _draw_normal, loc, scale)

    def bijector(self) -> bijectors.Bijector:
        return bijectors.Identity()


def _log_normal(value: Any, loc: Any, scale: Any) -> Any:
    inside = (value > 0) & (value < jnp.inf)
    log_value = jnp.log(jnp.where(inside, value, 1.0))
    return jnp.where(inside, _normal(log_value, loc, scale) - log_value, -jnp.inf)


def _draw_log_normal(key: PRNGKey, like: Any, loc: Any, scale: Any) -> Any:
    return jnp.exp(_draw_normal(key, like, loc, scale))


class LogNormal(Native):
    r"""The normal density of log v, over v; for v > 0."""

    reparameterized = True

    def __init__(self, loc: Any, scale: Any):
        super().__init__(_log_normal, _draw_log_normal, loc, scale)

    def bijector(self) -> bijectors.Bijector:
        return bijectors.Exp()


def _half_normal(value: Any, scale: Any) -> Any:
    inside = (value >= 0) & (value < jnp.inf)
    return jnp.where(inside, math.log(2) + _normal(jnp.where(inside, value, 0.0), 0.0, scale), -jnp.inf)


def _draw_half_normal(key: PRNGKey, like: Any, scale: Any) -> Any:
    return scale * jnp.abs(jax.random.normal(key, like.shape, like.dtype))


class HalfNormal(Native):
    r"""log 2 − ½ (v / scale)² − log scale − ½ log 2π, for v ≥ 0."""

    reparameterized = True

    def __init__(self, scale: Any):
        super().__init__(_half_normal, _draw_half_normal, scale)

    def bijector(self) -> bijectors.Bijector:
        return bijectors.Softplus()


def _laplace(value: Any, loc: Any, scale: Any) -> Any:
    return -jnp.abs(value - loc) / scale - (jnp.log(scale) + math.log(2))


def _draw_laplace(key: PRNGKey, like: Any, loc: Any, scale: Any) -> Any:
    return loc + scale * jax.random.laplace(key, like.shape, like.dtype)


class Laplace(Native):
    r"""−|v − loc| / scale − log(2 scale)."""

    reparameterized = True

    def __init__(self, loc: Any, scale: Any):
        super().__init__(_laplace, _draw_laplace, loc, scale)

    def bijector(self) -> bijectors.Bijector:
        return bijectors.Identity()


def _exponential(value: Any, rate: Any) -> Any:
    inside = (value >= 0) & (value < jnp.inf)
    return jnp.where(inside, jnp.log(rate) - rate * jnp.where(inside, value, 0.0), -jnp.inf)


def _draw_exponential(key: PRNGKey, like: Any, rate: Any) -> Any:
    return jax.random.exponential(key, like.shape, like.dtype) / rate


class Exponential(Native):
    r"""log rate − rate v, for v ≥ 0."""

    reparameterized = True

    def __init__(self, rate: Any):
        super().__init__(_exponential, _draw_exponential, rate)

    def bijector(self) -> bijectors.Bijector:
        return bijectors.Softplus()


def _uniform(value: Any, low: Any, high: Any) -> Any:
    return jnp.where((value >= low) & (value <= high), -jnp.log(high - low), -jnp.inf)


def _draw_uniform(key: PRNGKey, like: Any, low: Any, high: Any) -> Any:
    return low + (high - low) * jax.random.uniform(key, like.shape, like.dtype)


class Uniform(Native):
    r"""−log(high − low), for low ≤ v ≤ high: at both ends too, which rounding may draw."""

    reparameterized = True

    def __init__(self, low: Any = 0.0, high: Any = 1.0):
        super().__init__(_uniform, _draw_uniform, low, high)

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
        certain = jnp.zeros((), float_dtype(self.loc))
        return jnp.where(value == lax.convert_element_type(self.loc, value.dtype), certain, -jnp.inf)

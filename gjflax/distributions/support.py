r"""Supports: where a family's density is not 0.

TFP computes its densities by formulas that hold inside the support, and outside of it returns NaN, or a finite
number, unless it is asked to validate its arguments, which it does by raising. A sampler that proposes such a value
needs −inf. A `Support` says which values are inside, and gives a value that is, so that neither the density nor its
gradient is ever computed outside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Support:
    """A support.

    Attributes:
      contains: ``contains(value, distribution)``, a boolean for each event of the TFP distribution.
      interior: ``interior(value, distribution)``, a value inside, of the shape of `value`.
      event_ndims: the number of axes of one event.
    """

    contains: Callable[[Any, Any], Any]
    interior: Callable[[Any, Any], Any]
    event_ndims: int = 0

    def guard(self, logpdf: Callable[[Any], Any], value: Any, distribution: Any) -> Any:
        """``logpdf(value)`` inside the support and −inf outside, with a gradient that is finite in both."""
        inside = self.contains(value, distribution)
        event = inside.reshape(inside.shape + (1,) * self.event_ndims)
        safe = jnp.where(event, value, self.interior(value, distribution).astype(value.dtype))
        return jnp.where(inside, logpdf(safe), -jnp.inf)


def _constant(number: float) -> Callable[[Any, Any], Any]:
    return lambda value, _: jnp.full(value.shape, number, value.dtype)


def _whole(value: Any) -> Any:
    return value == jnp.floor(value)


def _tolerance(value: Any) -> float:
    """How far a sum of floats may be from what it should be."""
    return float(jnp.finfo(value.dtype).eps) ** 0.5


def _in_simplex(value: Any, _: Any) -> Any:
    return jnp.all(value >= 0, -1) & (jnp.abs(jnp.sum(value, -1) - 1) <= _tolerance(value))


def _is_one_hot(value: Any, _: Any) -> Any:
    return jnp.all((value == 0) | (value == 1), -1) & (jnp.sum(value, -1) == 1)


def _first_axis(value: Any, _: Any) -> Any:
    return jnp.zeros_like(value).at[..., 0].set(1)


def _adds_up(value: Any, distribution: Any) -> Any:
    return jnp.all((value >= 0) & _whole(value), -1) & (jnp.sum(value, -1) == distribution.total_count)


def _all_in_first(value: Any, distribution: Any) -> Any:
    return _first_axis(value, None) * jnp.asarray(distribution.total_count)[..., None]


def _is_positive_definite(value: Any, _: Any) -> Any:
    # Eigenvalues and not a Cholesky factor, which reads one triangle only and so takes asymmetric matrices.
    transposed = jnp.swapaxes(value, -1, -2)
    close = jnp.abs(value - transposed) <= _tolerance(value) * (1 + jnp.abs(value))
    return jnp.all(close, (-1, -2)) & (jnp.linalg.eigvalsh((value + transposed) / 2)[..., 0] > 0)


def _is_correlation_cholesky(value: Any, _: Any) -> Any:
    lower = jnp.all(jnp.triu(value, 1) == 0, (-1, -2))
    positive = jnp.all(jnp.diagonal(value, axis1=-2, axis2=-1) > 0, -1)
    return lower & positive & jnp.all(jnp.abs(jnp.sum(value**2, -1) - 1) <= 4 * _tolerance(value), -1)


def _identity(value: Any, _: Any) -> Any:
    return jnp.broadcast_to(jnp.eye(value.shape[-1], dtype=value.dtype), value.shape)


positive = Support(lambda v, _: v > 0, _constant(1.0))
nonnegative = Support(lambda v, _: v >= 0, _constant(1.0))
unit_interval = Support(lambda v, _: (v >= 0) & (v <= 1), _constant(0.5))
counts = Support(lambda v, _: (v >= 0) & _whole(v), _constant(0.0))
bounded_counts = Support(lambda v, d: (v >= 0) & (v <= d.total_count) & _whole(v), _constant(0.0))
simplex = Support(_in_simplex, lambda v, _: jnp.full(v.shape, 1 / v.shape[-1], v.dtype), 1)
one_hot = Support(_is_one_hot, _first_axis, 1)
fixed_total = Support(_adds_up, _all_in_first, 1)
positive_definite = Support(_is_positive_definite, _identity, 2)
correlation_cholesky = Support(_is_correlation_cholesky, _identity, 2)

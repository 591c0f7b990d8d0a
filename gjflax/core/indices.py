"""Indices of elements of a vector, and whether they repeat.

An element that is named twice would be given two values, and would count twice. Where the indices are known this is an
error; where they are traced, the weight is NaN, as of an index that is none of an element. Sorting k indices tells, at a
cost that does not grow with the vector, and one index cannot repeat.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def certainly_outside(indices: Any, length: int) -> bool:
    """Whether indices are known, and one is that of no element of a vector of this length: none counts from its end."""
    if isinstance(indices, Tracer):
        return False
    known = np.asarray(indices)
    return bool(np.any((known < 0) | (known >= length)))


def certainly_repeat(indices: Any) -> bool:
    """Whether indices, on the last axis, are known and repeat."""
    if isinstance(indices, Tracer) or np.shape(indices)[-1] < 2:
        return False
    ordered = np.sort(np.asarray(indices), axis=-1)
    return bool(np.any(ordered[..., 1:] == ordered[..., :-1]))


def nan_where_repeated(weight: Any, indices: Any) -> Any:
    """A weight, NaN where the indices of one axis that it is for are traced and repeat."""
    if not isinstance(indices, Tracer) or indices.shape[0] < 2:
        return weight
    ordered = jnp.sort(indices)
    return jnp.where(jnp.any(ordered[1:] == ordered[:-1]), jnp.nan, weight)

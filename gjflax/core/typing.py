"""Names for the types that signatures speak of."""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Key, UInt32

FloatArray: TypeAlias = Float[Array, "..."]
"""A floating point array of any shape."""

IntArray: TypeAlias = Integer[Array, "..."]
"""An integer array of any shape."""

BoolArray: TypeAlias = Bool[Array, "..."]
"""A boolean array of any shape."""

Score: TypeAlias = Float[Array | np.ndarray, "..."]
"""A log density or log weight: a scalar, or a batch of scalars where the trace is a batch of traces.

A trace that was read from a file holds NumPy arrays.
"""

PRNGKey: TypeAlias = Key[Array, ""] | UInt32[Array | np.ndarray, "2"]
"""A typed JAX key (``jax.random.key``) or a legacy one (``jax.random.PRNGKey``)."""

PRNGKeys: TypeAlias = Key[Array, " n"] | UInt32[Array, "n 2"]
"""A vector of keys."""

Component: TypeAlias = str | int | np.integer | Integer[Array, ""]
"""One part of an address: a name, or an index into a vector of choices."""

Address: TypeAlias = Component | tuple[Component, ...]
"""The address of a choice: ``"x"``, ``("y", "pos")``, ``("y", 3, "pos")``."""

Arguments: TypeAlias = tuple[Any, ...]
"""The arguments of a generative function, one tuple."""

T = TypeVar("T")

"""The indices of vectors of choices in another form: known ones static, or static ones as arrays.

Where a vector stands inside of another one, static indices are the same in each element of that; an array has a row for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gjflax.core.choice_map.base import ChoiceMap
from gjflax.core.choice_map.vectors import VectorChoiceMap, vector
from gjflax.core.pytree import Const


def with_static_indices(choices: ChoiceMap) -> ChoiceMap:
    """The choices with static indices, where these are known and the same in each element of the vectors around."""

    def static(part: VectorChoiceMap) -> ChoiceMap:
        indices = part.indices
        if isinstance(indices, (jax.Array, np.ndarray)) and not isinstance(indices, Tracer) and indices.size:
            each = np.asarray(indices).reshape(-1, len(part))
            indices = Const(tuple(each[0].tolist())) if (each == each[0]).all() else indices
        return vector(indices, with_static_indices(part.inner))

    return map_vectors(static, choices)


def with_index_arrays(choices: ChoiceMap, around: tuple[int, ...]) -> ChoiceMap:
    """The choices with indices as arrays, where they stand in vectors of these lengths."""

    def array(part: VectorChoiceMap) -> ChoiceMap:
        inside = (*around, len(part))
        indices = jnp.broadcast_to(jnp.asarray(part.index_array(), jnp.int32), inside)
        return vector(indices, with_index_arrays(part.inner, inside))

    return map_vectors(array, choices)


def map_vectors(
    function: Callable[[VectorChoiceMap], Any], choices: ChoiceMap, otherwise: Callable[[Any], Any] = lambda leaf: leaf
) -> Any:
    """The choices with a function of the outermost vectors in place of these, and another one of what is in none."""
    return jax.tree.map(
        lambda part: function(part) if isinstance(part, VectorChoiceMap) else otherwise(part),
        choices,
        is_leaf=lambda part: isinstance(part, VectorChoiceMap),
    )

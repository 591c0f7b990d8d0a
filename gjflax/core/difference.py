"""What is left of a choice map without the choices of another."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from gjflax.core.choice_map import (
    BuiltinChoiceMap,
    ChoiceMap,
    EmptyChoiceMap,
    ValueChoiceMap,
    VectorChoiceMap,
    by_name,
    masked,
    vector,
)
from gjflax.core.choice_map.vectors import each_element
from gjflax.core.errors import ChoiceMapError, show_address
from gjflax.core.masked import Masked


def difference(one: ChoiceMap, other: ChoiceMap, at: tuple[Any, ...] = ()) -> ChoiceMap:
    """The choices of the first at addresses where the second has none; see ``ChoiceMap.__sub__``."""
    if one.is_empty() or other.is_empty():
        return one
    if isinstance(one, ValueChoiceMap) and isinstance(other, ValueChoiceMap):
        return masked(one, ~other.value.flag) if isinstance(other.value, Masked) else EmptyChoiceMap()
    if isinstance(one, BuiltinChoiceMap) and isinstance(other, BuiltinChoiceMap):
        children = one.children.items()
        return by_name({name: difference(child, other.get_submap(name), (*at, name)) for name, child in children})
    if isinstance(one, VectorChoiceMap) and isinstance(other, VectorChoiceMap):
        return _of_vectors(one, other, at)
    # Whole arrays speak of every element.
    if isinstance(one, VectorChoiceMap) and isinstance(other, (BuiltinChoiceMap, ValueChoiceMap)):
        return vector(one.indices, _of_elements(one, other, at))
    if isinstance(other, VectorChoiceMap) and isinstance(other.static_indices, range):
        return difference(one, other.inner, at)
    raise ChoiceMapError(
        f"Of two choice maps, one has a single choice or whole arrays at {show_address(at)}, and the other has names or some "
        "elements there. They cannot be choices of one model, so the one cannot be taken from the other."
    )


def _of_vectors(one: VectorChoiceMap, other: VectorChoiceMap, at: tuple[Any, ...]) -> ChoiceMap:
    ours, theirs = one.known_indices, other.known_indices
    if ours is None or theirs is None:
        raise ChoiceMapError(
            f"The elements of {show_address(at)} are given by indices that are not known while tracing: which are left is "
            "not known either."
        )
    shared = [index for index in theirs if index in ours]
    if not shared:
        return one
    there = _elements(one, [ours.index(index) for index in shared])
    theirs_there = _elements(other, [theirs.index(index) for index in shared])
    left = _of_elements(VectorChoiceMap(tuple(shared), there), theirs_there, at)
    if len(shared) == len(ours):
        # In our order.
        order = [shared.index(index) for index in ours]
        return vector(one.indices, jax.tree.map(lambda leaf: leaf[np.asarray(order)], left))
    kept = [index for index in ours if index not in theirs]
    if left.is_empty():
        return VectorChoiceMap(tuple(kept), _elements(one, [ours.index(index) for index in kept]))
    if jax.tree.structure(left) != jax.tree.structure(there):
        raise ChoiceMapError(
            f"What is left of the vector of choices at {show_address(at)} has other addresses at the elements {shared} than "
            f"at {kept}, and a vector has the same at each."
        )
    return one


def _of_elements(one: VectorChoiceMap, other: ChoiceMap, at: tuple[Any, ...]) -> ChoiceMap:
    """What is left at all elements; of both the values have a leading axis."""
    return each_element(lambda ours, theirs: difference(ours, theirs, at), one.inner, other)


def _elements(choices: VectorChoiceMap, positions: list[int]) -> ChoiceMap:
    at = np.asarray(positions, np.int32)
    return jax.tree.map(lambda leaf: leaf[at], choices.inner)

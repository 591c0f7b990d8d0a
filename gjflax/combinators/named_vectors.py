"""Vectors of choices beside names, where a combinator adds choices by name to those of a map.

A map has the choices ``{0: {"y": …}, 1: {"y": …}}``, one `VectorChoiceMap`. Beside other names it stands below its own:
``{"y": {0: …, 1: …}, "kernel": …}``, in which the address ``("y", 1)`` reads the same.
"""

from __future__ import annotations

from typing import Any

from gjflax.core.choice_map import BuiltinChoiceMap, ChoiceMap, VectorChoiceMap, by_name, vector
from gjflax.core.context import current_address
from gjflax.core.errors import ChoiceMapError, show_address
from gjflax.core.pytree import Const


def names_above_vectors(choices: ChoiceMap) -> ChoiceMap:
    """A vector of choices by name as names of vectors; anything else as it is."""
    if not isinstance(choices, VectorChoiceMap) or choices.is_value():
        return choices
    return by_name({name: vector(choices.indices, choices.inner.get_submap(name)) for name in choices.names()})


def vectors_above_names(choices: ChoiceMap) -> ChoiceMap:
    """Names of vectors as a vector of choices by name; whole arrays stay as they are.

    Raises:
      ChoiceMapError: if the vectors are of different elements.
    """
    if not isinstance(choices, BuiltinChoiceMap):
        return choices
    first, *others = _indices(choices)
    if first is None and all(other is None for other in others):
        return choices
    if not all(_same(first, other) for other in others):
        raise ChoiceMapError(
            f"The choices given at {show_address(current_address())} are those of a vector, and of different elements of "
            "it. Give the same elements of each."
        )
    return vector(first, _without_vectors(choices))


def _indices(choices: ChoiceMap) -> list[Any]:
    """The indices of the topmost vector at every address, None where there is none."""
    if isinstance(choices, VectorChoiceMap):
        return [choices.indices]
    if isinstance(choices, BuiltinChoiceMap):
        return [indices for child in choices.children.values() for indices in _indices(child)]
    return [None]


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, Const) and isinstance(other, Const) and one == other)


def _without_vectors(choices: ChoiceMap) -> ChoiceMap:
    if isinstance(choices, BuiltinChoiceMap):
        return by_name({name: _without_vectors(child) for name, child in choices.children.items()})
    return choices.inner if isinstance(choices, VectorChoiceMap) else choices

"""Choices as one vector of floats, and back: what optimisers and samplers in R^n work on.

The vector is one concatenation of all values. (For a thousand scalars that one compiles slowly, as would any program that
computes a thousand scalars; a vector-valued choice or a `Map` counts as one.) The way back is one split, whose derivative
is one concatenation, not a sum of as many vectors as there are choices.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import DictKey

from gjflax.core.choice_map import ChoiceMap, ValueChoiceMap
from gjflax.core.errors import ChoiceDtypeError, ChoiceShapeError, SelectionError, nearest, show_address
from gjflax.core.masked import Masked
from gjflax.core.selection import Selection, select


def to_array(choices: ChoiceMap, selection: Any) -> Any:
    """See ``ChoiceMap.to_array``."""
    _, values = _selected(choices, selection)
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*values)
    parts = [lax.convert_element_type(value, dtype).reshape(-1) for value in values]
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, 0)


def from_array(choices: ChoiceMap, array: Any, selection: Any) -> ChoiceMap:
    """See ``ChoiceMap.from_array``."""
    selected, values = _selected(choices, selection)
    sizes = [value.size for value in values]
    if jnp.shape(array) != (sum(sizes),):
        raise ChoiceShapeError(
            f"The selected choices are {sum(sizes)} numbers; got an array of shape {jnp.shape(array)}. `to_array` with the "
            "same selection gives a vector of that length; map over a batch of vectors with jax.vmap."
        )
    parts = lax.split(jnp.asarray(array), sizes)
    new = iter(
        lax.convert_element_type(part, value.dtype).reshape(value.shape)
        for part, value in zip(parts, values, strict=True)
    )

    def replaced(node: Any) -> Any:
        if not isinstance(node, ValueChoiceMap):
            return node
        if isinstance(node.value, Masked):
            return ValueChoiceMap(Masked(jax.tree.map(lambda _: next(new), node.value.value), node.value.flag))
        return ValueChoiceMap(jax.tree.map(lambda _: next(new), node.value))

    return jax.tree.map(replaced, selected, is_leaf=_is_value)


def _is_value(node: Any) -> bool:
    return isinstance(node, ValueChoiceMap)


def _selected(choices: ChoiceMap, selection: Any) -> tuple[ChoiceMap, list[Any]]:
    """The selected choices, and their values as arrays, which are floating point."""
    if selection is not None:
        selection = selection if isinstance(selection, Selection) else select(selection)
    selected = choices if selection is None else choices.filter(selection)
    if selected.is_empty():
        raise SelectionError(f"There is no choice to make a vector of. {nearest('', choices.addresses())}")
    values = []
    for path, node in jax.tree_util.tree_flatten_with_path(selected, is_leaf=_is_value)[0]:
        if not _is_value(node):
            continue
        content = node.value.value if isinstance(node.value, Masked) else node.value
        for value in map(jnp.asarray, jax.tree.leaves(content)):
            if not jnp.issubdtype(value.dtype, jnp.floating):
                at = tuple(part.key for part in path if isinstance(part, DictKey))
                raise ChoiceDtypeError(
                    f"The choice {show_address(at)} has the dtype {value.dtype}, which a vector of floats does not hold "
                    f"exactly. Leave it out of the selection: selection & ~select({show_address(at)})."
                )
            values.append(value)
    return selected, values

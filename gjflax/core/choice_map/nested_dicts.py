"""`choice_map`: choice maps from nested dicts, values and traces.

A key is a name, an index, a range of indices, or a tuple of these; a dict is the union of the choices below its keys. A value
below ranges has their lengths as leading axes; or a list below a range gives the elements one by one. The choices of elements
are stacked, so they have the same addresses.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gjflax.core.choice_map.base import BuiltinChoiceMap, ChoiceMap, EmptyChoiceMap, ValueChoiceMap
from gjflax.core.choice_map.combining import combine
from gjflax.core.choice_map.index_forms import with_index_arrays
from gjflax.core.choice_map.masks import flagged_alike, masked
from gjflax.core.choice_map.vectors import all_vectors_in, checked_indices, vector
from gjflax.core.errors import ChoiceMapError
from gjflax.core.masked import Masked, static_flag
from gjflax.core.pytree import Pytree
from gjflax.core.typing import Component


def choice_map(choices: Any = None) -> ChoiceMap:
    """A choice map from a nested dict, a trace, a value, or a choice map.

    Keys are names, indices, or tuples of these; so ``{("y", 3, "pos"): v}`` is the choice ``"pos"`` of element 3
    of ``"y"``. A range is a key for several elements, whose values have one more leading axis, or which a list gives one by
    one, as nested dicts. The key ``()`` is the root.

    Raises:
      ChoiceMapError: on keys that are not addresses, that contradict each other, or mix names and indices.

    >>> chm = choice_map({"a": 1.0, ("y", "pos"): 2.0})
    >>> chm["a"], chm["y", "pos"]
    (1.0, 2.0)
    >>> choice_map({("y", 3, "pos"): 2.0, ("y", 5, "pos"): 4.0})["y"]
    VectorChoiceMap
    ├── indices: i32[2]
    └── pos: f32[2]
    """
    if isinstance(choices, ChoiceMap):
        return choices
    if choices is None:
        return EmptyChoiceMap()
    strip = getattr(choices, "strip", None)
    if isinstance(choices, Pytree) and strip is not None:
        return strip()
    if isinstance(choices, Mapping):
        return _from_mapping(choices)
    if isinstance(choices, list):
        return ValueChoiceMap(_stacked(choices))
    if isinstance(choices, Masked):
        return _masked_value(choices)
    if isinstance(choices, (numbers.Number, np.ndarray, np.generic, jax.Array)):
        return ValueChoiceMap(choices)
    raise ChoiceMapError(
        f"Expected a choice map, a nested dict or a value, got {type(choices).__name__}: {choices!r:.80}"
    )


def _masked_value(choice: Masked) -> ChoiceMap:
    flag = choice.flag
    if static_flag(flag) is None and getattr(flag, "dtype", None) != jnp.bool_:
        raise ChoiceMapError(f"The flag of a Masked value is a boolean, or an array of booleans; got {flag!r:.80}.")
    return masked(choice_map(choice.value), flag)


def _stacked(values: list[Any]) -> Any:
    try:
        return jnp.asarray(values)
    except (TypeError, ValueError) as error:
        raise ChoiceMapError(f"A list as a value stands for an array; this one is none: {values!r:.80}") from error


def _from_mapping(mapping: Mapping[Any, Any], lengths: tuple[int, ...] = ()) -> ChoiceMap:
    """The choices of a nested dict that stands below ranges of these lengths, which are the leading axes of its values."""
    result: ChoiceMap = EmptyChoiceMap()
    elements: dict[int, ChoiceMap] = {}
    for key, value in mapping.items():
        components = key if isinstance(key, tuple) else (key,)
        for component in components:
            if isinstance(component, bool) or not isinstance(component, (str, int, np.integer, range)):
                raise ChoiceMapError(
                    f"A key of a choice map is a name, an index, a range of indices, or a tuple of these; got {key!r}."
                )
        inside = (*lengths, *(len(component) for component in components if isinstance(component, range)))
        if isinstance(value, Mapping):
            below = _from_mapping(value, inside)
        elif isinstance(value, list) and any(isinstance(element, Mapping) for element in value):
            below = _one_by_one(value, inside, key)
        else:
            below = _check_axes(choice_map(value), inside, key)
        axes = len(inside)
        for component in reversed(components[1:]):
            axes -= isinstance(component, range)
            below = _below(component, below, axes)
        if components and isinstance(components[0], (int, np.integer)):
            index = int(components[0])
            elements[index] = combine(elements.get(index, EmptyChoiceMap()), below, (index,), overwrite=False)
        elif components:
            result = combine(result, _below(components[0], below, len(lengths)), (), overwrite=False)
        else:
            result = combine(result, below, (), overwrite=False)
    if not elements:
        return result
    return combine(result, _stack(elements, len(lengths)), (), overwrite=False)


def _check_axes(choices: ChoiceMap, lengths: tuple[int, ...], key: Any) -> ChoiceMap:
    """The choices, with an error where values do not have the axes of the ranges around them."""
    for leaf in jax.tree.leaves(choices) if lengths else ():
        if jnp.shape(leaf)[: len(lengths)] != lengths:
            raise ChoiceMapError(
                f"The key {key!r} stands at or below ranges of indices, so its values need leading axes of {lengths}; got "
                f"the shape {jnp.shape(leaf)}."
            )
    return choices


def _below(component: Component | range, choices: ChoiceMap, axes: int) -> ChoiceMap:
    """The choices below one component, whose values have so many axes of ranges around them."""
    if choices.is_empty():
        return choices
    if isinstance(component, range):
        return vector(checked_indices(component), choices)
    if isinstance(component, str):
        return BuiltinChoiceMap({component: choices})
    return _stack({int(component): choices}, axes)


def _one_by_one(values: list[Any], lengths: tuple[int, ...], key: Any) -> ChoiceMap:
    """The inner choices of a vector of all elements, of which a list gives each."""
    components = key if isinstance(key, tuple) else (key,)
    if not components or not isinstance(components[-1], range) or len(values) != lengths[-1]:
        raise ChoiceMapError(
            f"A list of dicts gives the elements of a vector, one by one, and stands below a range of as many; got "
            f"{len(values)} below {key!r}."
        )
    around = lengths[:-1]
    elements = [
        _from_mapping(value, around) if isinstance(value, Mapping) else _check_axes(choice_map(value), around, key)
        for value in values
    ]
    return _stacked_alike(elements, range(len(elements)), len(around))


def _stack(elements: dict[int, ChoiceMap], axes: int = 0) -> ChoiceMap:
    return vector(checked_indices(tuple(elements)), _stacked_alike(list(elements.values()), elements, axes))


def _stacked_alike(parts: list[ChoiceMap], indices: Iterable[int], axes: int) -> ChoiceMap:
    """The choices of elements as one choice map, with the elements' axis behind those of the ranges around."""
    parts = flagged_alike(*parts, axes=axes)
    if len({jax.tree.structure(part) for part in parts}) > 1:
        # Vectors in them may have other indices each, as many as the others.
        parts = [with_index_arrays(part, jnp.shape(jax.tree.leaves(part)[0])[:axes]) for part in parts]
    forms = {(jax.tree.structure(part), *(len(inside) for inside in all_vectors_in(part))) for part in parts}
    if len(forms) > 1:
        raise ChoiceMapError(
            f"The elements {sorted(indices)} of a vector have choices at different addresses. Give each the same; or values "
            "for all elements with flags of those that are there, `Masked(values, flags)`."
        )
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves], axes), *parts)

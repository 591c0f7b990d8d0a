"""Choice maps of gjflax as flat dicts from addresses to NumPy values, as the oracle has them; and parts of them.

An address has an index for every vector on its way: ``("y", 3, "pos")``. A `Masked` choice that is absent is not in
the dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from sweep.programs import Address, Values

import gjflax
from gjflax import BuiltinChoiceMap, ChoiceMap, EmptyChoiceMap, Masked, ValueChoiceMap, VectorChoiceMap
from gjflax.core.choice_map import by_name, vector
from gjflax.core.masked import has_masked
from gjflax.core.pytree import Const


def flat(choices: ChoiceMap) -> Values:
    """The choices by address."""
    result: Values = {}
    _flatten(jax.tree.map(np.asarray, choices), (), result)
    return result


def _flatten(choices: Any, at: Address, result: Values) -> None:
    if isinstance(choices, EmptyChoiceMap):
        return
    if isinstance(choices, ValueChoiceMap):
        value = choices.value
        if isinstance(value, Masked):
            if not value.flag:
                return
            value = value.value
        assert at not in result, at
        result[at] = value
    elif isinstance(choices, BuiltinChoiceMap):
        for name, child in choices.children.items():
            _flatten(child, (*at, name), result)
    elif isinstance(choices, VectorChoiceMap):
        for position, index in enumerate(np.asarray(choices.index_array()).tolist()):
            element = jax.tree.map(lambda leaf, p=position: leaf[p], choices.inner)
            _flatten(element, (*at, index), result)
    else:
        raise AssertionError(f"unknown choice map {type(choices)}")


def filled(like: ChoiceMap, values: Values, at: Address = ()) -> ChoiceMap:
    """A choice map of a structure, with these values; a choice that may be absent is where it has none."""
    if isinstance(like, ValueChoiceMap):
        if isinstance(like.value, Masked):
            value = np.asarray(values.get(at, np.zeros(like.value.value.shape)), like.value.value.dtype)
            return ValueChoiceMap(Masked(value, np.asarray(at in values)))
        return ValueChoiceMap(np.asarray(values[at], like.value.dtype))
    if isinstance(like, VectorChoiceMap):
        first = jax.tree.map(lambda leaf: leaf[0], like.inner)
        which: Any = like.static_indices
        if which is None:
            # A call at a key, which may be another one in these values.
            found = sorted({address[len(at)] for address in values if address[: len(at)] == at})
            which = np.asarray(found or like.indices, like.indices.dtype)
        elements = [filled(first, values, (*at, int(index))) for index in which]
        return vector(which, jax.tree.map(lambda *leaves: np.stack(leaves), *elements))
    return by_name({name: filled(like.get_submap(name), values, (*at, name)) for name in like.names()})


def pick(choices: ChoiceMap, decide: Callable[..., int], depth: int = 0) -> tuple[ChoiceMap, ChoiceMap]:
    """A random part of the choices, in one of the forms in which constraints may be written; and plainly written.

    Args:
      choices: the choices of a trace.
      decide: ``decide(n)`` is a number below n; 0 is the simplest.
      depth: how many vectors it is in.
    """
    if isinstance(choices, ValueChoiceMap):
        part = _pick_value(choices, decide, depth)
        return part, part
    if isinstance(choices, BuiltinChoiceMap):
        parts = {name: pick(child, decide, depth) for name, child in choices.children.items()}
        return by_name({name: part for name, (part, _) in parts.items()}), by_name(
            {name: plain for name, (_, plain) in parts.items()}
        )
    if isinstance(choices, VectorChoiceMap):
        return _pick_vector(choices, decide, depth)
    return EmptyChoiceMap(), EmptyChoiceMap()


def _pick_value(choices: ValueChoiceMap, decide: Callable[..., int], depth: int) -> ChoiceMap:
    form = decide(8)
    if form < 4:
        return EmptyChoiceMap()
    if form < 7 or isinstance(choices.value, Masked):
        return choices
    lengths = np.shape(choices.value)[:depth]
    flags = np.asarray([decide(2) == 1 for _ in range(int(np.prod(lengths)))])
    return ValueChoiceMap(Masked(choices.value, flags.reshape(lengths)))


def _pick_vector(choices: VectorChoiceMap, decide: Callable[..., int], depth: int) -> tuple[ChoiceMap, ChoiceMap]:
    inner, plain = pick(choices.inner, decide, depth + 1)
    if inner.is_empty():
        return inner, plain
    if not isinstance(choices.static_indices, range):
        # The one index of a call at a key.
        return vector(choices.indices, inner), vector(choices.indices, plain)
    form = decide(5)
    if has_masked(choices.inner):
        # Of steps beyond a known length an index is an error, also where the branch around them is not taken.
        form = min(form, 2)
    if form < 3:
        # The last are arrays under their names, which have the axes of all vectors above them.
        every = inner if form == 2 and not has_vector(inner) else vector(range(len(choices)), inner)
        return every, vector(range(len(choices)), plain)
    left_out = decide(len(choices))
    # Always as many, for every new shape is compiled anew.
    positions = [position for position in range(len(choices)) if position != left_out] if len(choices) > 1 else [0]
    if decide(3) == 2:
        positions.reverse()
    at = np.asarray(positions)
    indices: Any = Const(tuple(positions))
    if form == 4:
        lengths = np.shape(jax.tree.leaves(plain)[0])[:depth]
        indices = np.broadcast_to(np.asarray(positions, np.int32), (*lengths, len(positions)))
    # In a vector the values have its axis before their own.
    inner, plain = jax.tree.map(lambda leaf: np.take(leaf, at, axis=depth), (inner, plain))
    return vector(indices, inner), vector(Const(tuple(positions)), plain)


def has_discrete(choices: ChoiceMap) -> bool:
    """Whether some of the choices, there or absent, are of a discrete type."""
    values = [choices.get_subtree(address).get_value() for address in choices.addresses()]
    values = [value.value if isinstance(value, Masked) else value for value in values]
    return any(not np.issubdtype(value.dtype, np.floating) for value in values)


def has_vector(choices: Any) -> bool:
    """Whether some of the choices are elements of a vector."""
    nodes = jax.tree.leaves(choices, is_leaf=lambda node: isinstance(node, VectorChoiceMap))
    return any(isinstance(node, VectorChoiceMap) for node in nodes)


def pick_selection(
    choices: ChoiceMap, decide: Callable[..., int]
) -> tuple[gjflax.Selection, Callable[[Address], bool]]:
    """A random selection, and whether it selects an address with indices."""
    form = decide(8)
    if form == 0:
        return gjflax.NoneSelection(), lambda address: False
    if form == 1:
        return gjflax.AllSelection(), lambda address: True
    selection, selects = _pick_addresses(choices, decide)
    if form == 2:
        return ~selection, lambda address: not selects(address)
    if form == 3:
        other, also = _pick_addresses(choices, decide)
        return selection | other, lambda address: selects(address) or also(address)
    if form == 4:
        other, also = _pick_addresses(choices, decide)
        return selection & other, lambda address: selects(address) and also(address)
    return selection, selects


def _pick_addresses(
    choices: ChoiceMap, decide: Callable[..., int]
) -> tuple[gjflax.Selection, Callable[[Address], bool]]:
    prefixes: list[Address] = []
    indexed = decide(3) == 2
    _pick_prefixes(choices, (), decide, indexed, prefixes)
    if () in prefixes:
        return gjflax.AllSelection(), lambda address: True
    if not prefixes:
        return gjflax.NoneSelection(), lambda address: False
    return gjflax.select(*prefixes), lambda address: any(_is_below(address, prefix) for prefix in prefixes)


def _is_below(address: Address, prefix: Address) -> bool:
    """Whether a selection of the prefix selects the address: a name after no index speaks of all elements."""
    if not prefix:
        return True
    if not address:
        return False
    if address[0] == prefix[0]:
        return _is_below(address[1:], prefix[1:])
    if isinstance(address[0], int) and not isinstance(prefix[0], int):
        return _is_below(address[1:], prefix)
    return False


def _pick_prefixes(
    choices: ChoiceMap, at: Address, decide: Callable[..., int], indexed: bool, result: list[Address]
) -> None:
    if isinstance(choices, ValueChoiceMap):
        if decide(2):
            result.append(at)
    elif isinstance(choices, BuiltinChoiceMap):
        if at and decide(6) == 5:
            result.append(at)
            return
        for name, child in choices.children.items():
            _pick_prefixes(child, (*at, name), decide, indexed, result)
    elif isinstance(choices, VectorChoiceMap):
        if not indexed:
            _pick_prefixes(choices.inner, at, decide, indexed, result)
            return
        for index in dict.fromkeys(np.ravel(choices.index_array()).tolist()):
            if decide(2):
                _pick_prefixes(choices.inner, (*at, index), decide, indexed, result)

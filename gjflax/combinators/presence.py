"""Which choices are there: flags by address, and the union of the choices of alternatives.

A flag is a bool where it is known while tracing; otherwise an array of booleans with the axes of the vectors that the
choice stands in, or with the first of them. Where all is known no choice is masked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gjflax.combinators.elements import by_selection
from gjflax.core.choice_map import (
    ChoiceMap,
    EmptyChoiceMap,
    ValueChoiceMap,
    VectorChoiceMap,
    by_name,
    has_vector,
    masked,
    vector,
)
from gjflax.core.context import current_address
from gjflax.core.errors import BranchMismatchError, ChoiceShapeError, show_address
from gjflax.core.masked import Masked, both, where, with_axes
from gjflax.core.selection import Selection, select
from gjflax.core.trace import plain

Flag = Any
Flags = Mapping[tuple[str, ...], Flag]


def either(one: Flag, other: Flag) -> Flag:
    return negated(both(negated(one), negated(other)))


def negated(flag: Flag) -> Flag:
    return not flag if isinstance(flag, bool) else ~flag


def present(choices: ChoiceMap) -> Flags:
    """Whether each choice is there."""
    values = {address: choices.get_subtree(address).get_value() for address in choices.addresses()}
    return {address: value.flag if isinstance(value, Masked) else True for address, value in values.items()}


def selected(choices: ChoiceMap, selection: Selection, prefix: tuple[str, ...] = ()) -> Flags:
    """Whether each choice is selected."""
    if isinstance(choices, ValueChoiceMap):
        return {prefix: selection.includes_root}
    if not isinstance(choices, VectorChoiceMap):
        parts = [(name, choices.get_submap(name), selection[name]) for name in choices.names()]
        return {k: flag for name, part, below in parts for k, flag in selected(part, below, (*prefix, name)).items()}
    length = len(choices)
    if not selection.mentions_indices:
        flags = selected(choices.inner, selection, prefix)
        return {address: _for_each(flag, length) for address, flag in flags.items()}
    result: dict[tuple[str, ...], Any] = {}
    for subselection, positions in by_selection(selection, length):
        for address, flag in selected(choices.inner, subselection, prefix).items():
            here = np.zeros((length, *np.shape(flag)), bool)
            here[positions] = flag
            result[address] = np.asarray(either(result[address], here)) if address in result else here
    return {address: bool(flag.flat[0]) if flag.all() or not flag.any() else flag for address, flag in result.items()}


def _for_each(flag: Flag, length: int) -> Flag:
    return flag if isinstance(flag, bool) else np.broadcast_to(flag, (length, *np.shape(flag)))


def flagged(choices: ChoiceMap, flags: Flags) -> ChoiceMap:
    """The choices that are there by other flags than their own."""
    return _flagged(choices, flags, (), ())


def _flagged(choices: ChoiceMap, flags: Flags, prefix: tuple[str, ...], axes: tuple[int, ...]) -> ChoiceMap:
    if isinstance(choices, VectorChoiceMap):
        return vector(choices.indices, _flagged(choices.inner, flags, prefix, (*axes, len(choices))))
    if not isinstance(choices, ValueChoiceMap):
        return by_name({n: _flagged(choices.get_submap(n), flags, (*prefix, n), axes) for n in choices.names()})
    value = choices.value.value if isinstance(choices.value, Masked) else choices.value
    flag = flags[prefix]
    if isinstance(flag, bool):
        return ValueChoiceMap(value) if flag else EmptyChoiceMap()
    return ValueChoiceMap(Masked(value, jnp.broadcast_to(with_axes(jnp.asarray(flag), len(axes)), axes)))


def only(choices: ChoiceMap, addresses: Iterable[tuple[str, ...]]) -> ChoiceMap:
    """The choices at some addresses."""
    known = set(addresses).intersection(choices.addresses())
    return choices if () in known else choices.filter(select(list(known)))


def given(choices: ChoiceMap, constraints: ChoiceMap) -> Flags:
    """Whether each of the choices is constrained, or there among other choices, which are at their addresses."""
    found = present(_overwritten(choices, constraints))

    def known(address: tuple[str, ...]) -> Flag:
        here = constraints.get_subtree(address)
        if here.is_empty():
            return False
        return True if _every_one_given(choices.get_subtree(address), here) else found[address]

    return {address: known(address) for address in choices.addresses()}


def _overwritten(choices: ChoiceMap, constraints: ChoiceMap) -> ChoiceMap:
    """The choices, there by no flags but those of the constraints, which are at their addresses.

    Indices that are not known while tracing may be one for each element of a vector; so each element is overwritten alone.
    """
    if isinstance(choices, VectorChoiceMap) and isinstance(constraints, VectorChoiceMap):
        if choices.static_indices is not None and choices.indices == constraints.indices and has_vector(choices.inner):
            return vector(choices.indices, jax.vmap(_overwritten)(choices.inner, constraints.inner))
    elif not any(isinstance(part, (ValueChoiceMap, VectorChoiceMap)) for part in (choices, constraints)):
        parts = {name: (choices.get_submap(name), constraints.get_submap(name)) for name in choices.names()}
        return by_name({name: _overwritten(part, given) for name, (part, given) in parts.items()})
    absent = {address: jnp.zeros((), bool) for address in choices.addresses()}
    return flagged(choices, absent).overwrite(_at_indices_of(choices, constraints))


def _every_one_given(choices: ChoiceMap, constraints: ChoiceMap) -> bool:
    """Whether a choice, of all elements of the vectors that it stands in, is certainly constrained."""
    if isinstance(choices, VectorChoiceMap):
        if not isinstance(constraints, VectorChoiceMap) or choices.static_indices is None:
            return False
        same = choices.static_indices == constraints.static_indices
        return same and _every_one_given(choices.inner, constraints.inner)
    return isinstance(constraints, ValueChoiceMap) and not isinstance(constraints.value, Masked)


def _at_indices_of(choices: ChoiceMap, constraints: ChoiceMap) -> ChoiceMap:
    """The constraints, those of a vector whose indices are not known while tracing at these alone."""
    if isinstance(choices, VectorChoiceMap) and isinstance(constraints, VectorChoiceMap):
        if choices.static_indices is not None:
            return constraints
        positions, there = constraints.find(choices.indices)
        here = jax.tree.map(lambda leaf: jnp.asarray(leaf)[positions], constraints.inner)
        return vector(choices.indices, masked(here, there))
    if isinstance(choices, VectorChoiceMap) or isinstance(constraints, (VectorChoiceMap, ValueChoiceMap)):
        return constraints
    return by_name({n: _at_indices_of(choices.get_submap(n), constraints.get_submap(n)) for n in constraints.names()})


def fitted(choices: ChoiceMap, old: ChoiceMap, at: tuple[str, ...] = (), axes: tuple[int, ...] = ()) -> ChoiceMap:
    """The choices in the vectors of those that they overwrite, and floats in their dtypes."""
    if isinstance(old, VectorChoiceMap):
        # Whole arrays speak of every element.
        indices, inner = old.indices, choices
        if isinstance(choices, VectorChoiceMap):
            indices, inner = choices.indices, choices.inner
        length = len(choices) if isinstance(choices, VectorChoiceMap) else len(old)
        return vector(indices, fitted(inner, old.inner, at, (*axes, length)))
    if isinstance(choices, VectorChoiceMap):
        # A single choice that is given element by element: where these are all, they are its value.
        return fitted(choices.inner, old, at, axes) if isinstance(choices.static_indices, range) else choices
    if not isinstance(choices, ValueChoiceMap):
        parts = {name: (choices.get_submap(name), old.get_submap(name)) for name in choices.names()}
        return by_name({name: fitted(part, below, (*at, name), axes) for name, (part, below) in parts.items()})
    masked = choices.value if isinstance(choices.value, Masked) else None
    dtype = jax.tree.leaves(old)[0].dtype

    def convert(value: Any) -> Any:
        if jnp.shape(value)[: len(axes)] != axes:
            raise ChoiceShapeError(
                f"The value given for {show_address((*current_address(), *at))} has shape {jnp.shape(value)}; here every "
                f"value has the leading axes {axes}, of the elements. Give some of them by index, with a `VectorChoiceMap`."
            )
        is_float = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)
        return value.astype(dtype) if is_float and jnp.issubdtype(dtype, jnp.floating) else value

    if masked is None:
        return ValueChoiceMap(jax.tree.map(convert, choices.value))
    flag = jnp.asarray(masked.flag)
    flag = jnp.broadcast_to(flag, axes) if flag.ndim == 0 else flag
    return ValueChoiceMap(Masked(jax.tree.map(convert, masked.value), flag))


def union(parts: Sequence[ChoiceMap], taken: Sequence[Any] | None) -> ChoiceMap:
    """The choices of alternatives, of which one is taken.

    Args:
      parts: the choices of each alternative, or of a batch of it.
      taken: for each a flag, or flags of the batch; None to check the types and give nothing.

    Returns:
      A choice that all alternatives have is there without a flag, with the value of the one that is taken. Others are
      `Masked`: there where an alternative that has them is taken.

    Raises:
      BranchMismatchError: if two alternatives have different things at one address.
    """
    return _union(list(parts), None if taken is None else list(taken), ())


def _union(parts: list[ChoiceMap], taken: list[Any] | None, at: tuple[str, ...]) -> ChoiceMap:
    there = [(number, part) for number, part in enumerate(parts) if not part.is_empty()]
    if not there:
        return EmptyChoiceMap()
    first: Any = there[0][1]
    for number, part in there[1:]:
        if type(part) is not type(first) or (isinstance(part, VectorChoiceMap) and not _fits(first, part)):
            raise _mismatch(at, there[0][0], _kind(first), number, _kind(part))
    if isinstance(first, VectorChoiceMap):
        length = len(first)
        flags = None if taken is None else [jnp.broadcast_to(f[..., None], (*f.shape, length)) for f in taken]
        inner = [part.inner if isinstance(part, VectorChoiceMap) else part for part in parts]
        return vector(_indices(there, taken), _union(inner, flags, at))
    if not isinstance(first, ValueChoiceMap):
        names = dict.fromkeys(name for _, part in there for name in part.names())
        return by_name({name: _union([p.get_submap(name) for p in parts], taken, (*at, name)) for name in names})
    values = [(number, part.get_value()) for number, part in there]
    masks = [value.flag if isinstance(value, Masked) else True for _, value in values]
    values = [(number, value.value if isinstance(value, Masked) else value) for number, value in values]
    for number, value in values[1:]:
        if types(value) != types(values[0][1]):
            raise _mismatch(at, values[0][0], types(values[0][1]), number, types(value))
    if taken is None:
        return EmptyChoiceMap()
    value = choose([taken[number] for number, _ in values], [value for _, value in values])
    if len(values) == len(parts) and all(mask is True for mask in masks):
        return ValueChoiceMap(value)
    flag = both(taken[values[0][0]], masks[0])
    for (number, _), mask in zip(values[1:], masks[1:], strict=True):
        flag = flag | both(taken[number], mask)
    return ValueChoiceMap(Masked(value, flag))


def choose(taken: Sequence[Any], values: Sequence[Any]) -> Any:
    """The value, a tree of arrays, of the alternative that is taken; arbitrary where none is."""
    result = values[-1]
    for flag, value in list(zip(taken, values, strict=True))[-2::-1]:
        result = jax.tree.map(lambda one, other, flag=flag: where(flag, one, other), value, result)
    return result


def types(tree: Any) -> str:
    """The types of the arrays in a tree, as messages show them."""
    return stored_types(plain(tree))


def stored_types(tree: Any) -> str:
    """The types of the arrays in a tree as traces store it, where other values stand in a `Const`."""

    def show(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            return leaf
        return _Shown(f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}")

    return str(jax.tree.map(show, tree))


class _Shown(str):
    """A type, shown without quotation marks."""

    __repr__ = str.__str__


def _fits(one: VectorChoiceMap, other: VectorChoiceMap) -> bool:
    """Whether two alternatives' vectors may be one. Indices that are not known while tracing differ as the values do."""
    ours, theirs = one.static_indices, other.static_indices
    if ours is None or theirs is None:
        return len(one) == len(other)
    return tuple(ours) == tuple(theirs)


def _indices(there: Sequence[tuple[int, Any]], taken: Sequence[Any] | None) -> Any:
    """The indices of the vector of the alternative that is taken."""
    first = there[0][1]
    if taken is None or all(part.static_indices is not None for _, part in there):
        return first.indices
    shape = (*taken[0].shape, len(first))
    # Where an alternative is taken that has no such vector, none of its elements is there; indices must not repeat.
    each = [*(part.index_array() for _, part in there), np.arange(len(first), dtype=np.int32)]
    each = [jnp.broadcast_to(jnp.asarray(indices, np.int32), shape) for indices in each]
    return choose([*(taken[number] for number, _ in there), None], each)


def _kind(choices: ChoiceMap) -> str:
    if isinstance(choices, ValueChoiceMap):
        return "a single value"
    if isinstance(choices, VectorChoiceMap):
        return f"a vector of {len(choices)} choices"
    return f"choices below {', '.join(map(show_address, choices.names()))}"


def _mismatch(at: tuple[str, ...], first: int, one: str, second: int, other: str) -> BranchMismatchError:
    return BranchMismatchError(
        f"Two branches have different choices at {show_address((*current_address(), *at))}: branch {first} has {one}, "
        f"branch {second} {other}. An address that branches share has values of one type; give them different addresses."
    )

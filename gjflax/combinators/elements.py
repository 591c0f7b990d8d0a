"""What combinators over elements have in common: `Map`, `Unfold`, `Scan`.

Their traces are those of the elements, with a leading axis; scores and weights are sums over it. Constraints come for
all elements (arrays with that axis, or a vector of choices that covers them) or for some, by index.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap, VectorChoiceMap, vector
from gjflax.core.context import current_address
from gjflax.core.diff import Diff, no_change, unknown_change
from gjflax.core.errors import ChoiceMapError, ChoiceShapeError, SelectionError, show_address
from gjflax.core.in_place import take_elements, within, write_elements
from gjflax.core.indices import certainly_repeat, nan_where_repeated
from gjflax.core.masked import Masked
from gjflax.core.selection import Selection
from gjflax.core.trace import Trace, canonical, leafwise, plain
from gjflax.core.typing import PRNGKey, PRNGKeys


def sum_elements(scores: Any) -> Any:
    """The sum over the map's own axis, the last one: what stands before it are axes of a batch of traces."""
    return jnp.sum(scores, axis=-1) if jnp.ndim(scores) else scores


def split_key(key: PRNGKey, count: int) -> tuple[PRNGKey, PRNGKeys]:
    key, below = jax.random.split(key)
    return key, jax.random.split(below, count)


def given_elements(choices: ChoiceMap, length: int) -> tuple[ChoiceMap, Any]:
    """The inner choices, with the elements on the leading axis; and the indices, None for all in order."""
    if choices.is_empty():
        return EmptyChoiceMap(), None
    if isinstance(choices, VectorChoiceMap):
        # What an outer vector flagged has one flag for all that stands below its element.
        inner = flag_each(choices.inner, len(choices))
        if choices.covers(length):
            return inner, None
        indices = choices.static_indices
        if indices is not None and sorted(indices) == list(range(length)):
            order = np.argsort(indices)
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[order], inner), None
        known = choices.index_array()
        outside = [] if isinstance(known, Tracer) else [i for i in np.asarray(known).tolist() if not 0 <= i < length]
        if outside:
            raise ChoiceMapError(
                f"The choice map gives element {outside[-1]} of {show_address(current_address())}, which has "
                f"{length} elements (0 to {length - 1})."
            )
        # Also those of a choice map that a compiled function made, where they were not known.
        if indices is None and certainly_repeat(known):
            raise ChoiceMapError(
                f"The choice map gives elements {np.asarray(known).tolist()} of {show_address(current_address())}, by "
                "index. Indices must not repeat."
            )
        return inner, jnp.asarray(known)
    choices = flag_each(choices, length)
    for address in choices.addresses():
        for leaf in jax.tree.leaves(choices.get_subtree(address).get_value()):
            if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != length:
                raise ChoiceShapeError(
                    f"The value given for {show_address((*current_address(), *address))} has shape "
                    f"{jnp.shape(leaf)}; here every value has a leading axis of {length}, one entry for each element "
                    "or step. Give some of them by index, with a `VectorChoiceMap`."
                )
    return jax.tree.map(jnp.asarray, choices), None


def flag_each(choices: ChoiceMap, length: int) -> ChoiceMap:
    """One flag for all elements becomes one for each."""

    def spread(value: Any) -> Any:
        if isinstance(value, Masked) and jnp.ndim(value.flag) == 0:
            return Masked(value.value, jnp.broadcast_to(jnp.asarray(value.flag), (length,)))
        return value

    return jax.tree.map(spread, choices, is_leaf=lambda value: isinstance(value, Masked))


def check_selection(selection: Selection, length: int) -> None:
    if selection.indices and max(selection.indices) >= length:
        raise SelectionError(
            f"The selection names element {max(selection.indices)} of {show_address(current_address())}, which has "
            f"{length} elements (0 to {length - 1})."
        )


def by_selection(selection: Selection, length: int) -> list[tuple[Selection, np.ndarray]]:
    """The elements grouped by what is selected in them."""
    groups: dict[Selection, list[int]] = {}
    for index in range(length):
        groups.setdefault(selection[index], []).append(index)
    return [(subselection, np.asarray(positions)) for subselection, positions in groups.items()]


def simulate_element(inner: Any, key: Any, args: Any) -> Any:
    return inner.simulate(key, args)[1]


def importance_of_element(inner: Any, key: Any, choices: Any, args: Any, **options: Any) -> Any:
    return inner.importance(key, choices, args, **options)[1]


def assess_element(inner: Any, key: Any, choices: Any, args: Any, **options: Any) -> Any:
    _, (retval, score) = inner.assess(key, choices, args, **options)
    return canonical(retval), score


def update_element(inner: Any, key: Any, trace: Any, choices: Any, args: Any, **options: Any) -> Any:
    argdiffs = Diff.mark(args, unknown_change)
    _, (_, weight, trace, discard) = inner.update(key, trace, choices, argdiffs, **options)
    return weight, trace, discard


def regenerate_element(selection: Selection) -> Callable[..., Any]:
    def regenerate(inner: Any, key: Any, trace: Any, args: Any, **options: Any) -> Any:
        argdiffs = Diff.mark(args, unknown_change)
        _, (_, weight, trace) = inner.regenerate(key, trace, selection, argdiffs, **options)
        return weight, trace

    return regenerate


def constrain_element(inner: Any, unconstrained: Any, fixed: Any, args: Any) -> Any:
    return inner.constrain(unconstrained, args, fixed=fixed)


def with_options(function: Callable[..., Any], strict: bool, param_diff: Any = unknown_change) -> Callable[..., Any]:
    """The function with the options that differ from what every generative function assumes."""
    options = {} if strict else {"strict": False}
    if param_diff is not unknown_change:
        options["param_diff"] = param_diff
    return lambda *args: function(*args, **options)


def same_indices(one: Any, other: Any) -> bool:
    """Whether two arrays of indices are certainly the same."""
    if one is other:
        return True
    if isinstance(one, Tracer) or isinstance(other, Tracer):
        return False
    return np.array_equal(np.asarray(one), np.asarray(other))


def traced_indices(choices: ChoiceMap) -> Any:
    """The indices of choices of some elements, where they are not known while tracing; else None."""
    indices = choices.indices if isinstance(choices, VectorChoiceMap) else None
    return indices if isinstance(indices, Tracer) else None


def checked_weight(weight: Any, indices: Any, length: int) -> Any:
    """A weight, NaN where traced indices repeat, or one is none of an element: so it cannot be missed."""
    if not isinstance(indices, Tracer):
        return weight
    return nan_where_repeated(jnp.where(jnp.all(within(indices, length)), weight, jnp.nan), indices)


def masked_elements(given: ChoiceMap, indices: Any, length: int) -> ChoiceMap:
    """Choices of some elements as masked choices of all."""

    def spread(part: Any) -> Any:
        if not isinstance(part, VectorChoiceMap):
            return _spread(part, indices, length)
        which = part.indices
        if part.static_indices is None:
            # An element that is given nothing needs indices too, any that do not repeat.
            some = jnp.broadcast_to(jnp.arange(which.shape[-1], dtype=which.dtype), (length, which.shape[-1]))
            which = write_elements(some, which, indices)
        return vector(which, masked_elements(part.inner, indices, length))

    return jax.tree.map(spread, given, is_leaf=lambda part: isinstance(part, (Masked, VectorChoiceMap)))


def _spread(value: Any, indices: Any, length: int) -> Masked:
    here = value if isinstance(value, Masked) else Masked(value, jnp.ones(indices.shape, bool))

    def everywhere(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        zeros = jnp.zeros((length, *leaf.shape[1:]), leaf.dtype)
        return zeros.at[jnp.where(indices < 0, length, indices)].set(leaf, mode="drop")

    return Masked(jax.tree.map(everywhere, here.value), everywhere(here.flag))


def is_keyed(tree: Any) -> bool:
    """Whether there are random keys among the arrays."""
    return any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Note:
    """What one run of an element, as it was traced, says of all: which leaves it touched, and whether it drew."""

    touched: tuple[bool, ...]
    unchanged_retval: bool
    drew: bool

    def only_touched(self, part: Any) -> Any:
        """The elements' traces, with None for the leaves that were not touched."""
        leaves = jax.tree.leaves(part)
        return [leaf if touched else None for leaf, touched in zip(leaves, self.touched, strict=True)]


class _Notes(threading.local):
    def __init__(self) -> None:
        self.stack: list[list[Note]] = []


_notes = _Notes()


@contextlib.contextmanager
def notes() -> Iterator[list[Note]]:
    """Collect what `note` says inside: a lifted function can say it in no other way."""
    _notes.stack.append([])
    try:
        yield _notes.stack[-1]
    finally:
        _notes.stack.pop()


def note(old: Any, new: Any, retdiff: Any, drew: bool) -> None:
    """Say how an element's new trace came from its old one."""
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    touched = tuple(one is not other for one, other in pairs)
    _notes.stack[-1].append(Note(touched, Diff.is_unchanged(retdiff), drew))


class Elements:
    """The traces of all elements while some of them are run again, and what was written."""

    def __init__(self, inner: Trace, length: int):
        self.old = self.inner = inner
        self.length = length
        self.weights: list[Any] = []
        self._writes: list[tuple[Any, list[Any], list[Any]]] | None = []
        self._unchanged_retval = True

    def replace(self, weights: Any, inner: Trace, note: Note) -> None:
        """All elements were run."""
        self.weights.append(weights)
        self.inner = inner
        self._writes = None
        self._unchanged_retval = self._unchanged_retval and note.unchanged_retval

    def write(self, weights: Any, part: list[Any], old: list[Any], indices: Any, note: Note) -> None:
        """Some elements were run: their traces' leaves, None where they stay, and what stood there."""
        self.weights.append(weights)
        self.inner = self._written(self.inner, part, old, indices)
        if self._writes is not None:
            self._writes.append((indices, part, old))
        self._unchanged_retval = self._unchanged_retval and note.unchanged_retval

    def _written(self, inner: Trace, part: list[Any], old: list[Any], indices: Any) -> Trace:
        leaves, structure = jax.tree.flatten(inner)
        each = zip(leaves, part, old, strict=True)
        return structure.unflatten(
            [leaf if new is None else write_elements(leaf, new, indices, was) for leaf, new, was in each]
        )

    def retdiff(self) -> Any:
        """The return value with what is known of its change."""
        value = plain(self.inner.get_retval())
        if self._unchanged_retval:
            return no_change(value)
        if self._writes is None or len(self._writes) > 1:
            return unknown_change(value)
        indices, part, old = self._writes[0]
        structure = jax.tree.structure(self.inner)
        elements = [was if new is None else new for new, was in zip(part, old, strict=True)]
        return Diff.of_elements(value, indices, plain(structure.unflatten(elements).get_retval()))

    def chosen(self, accepted: Any, new: Trace) -> Trace:
        """The new traces where accepted, else the old ones; where elements were written only these are touched."""
        if self._writes is None:
            return leafwise(accepted, new, self.old)
        inner = self.old
        for position, (indices, part, old) in enumerate(self._writes):
            if position:
                # What stands there depends on whether the writes before were accepted.
                old = jax.tree.leaves(take_elements(inner, indices))
            kept = [
                None if new is None else lax.select(_beside(accepted, new), new, was)
                for new, was in zip(part, old, strict=True)
            ]
            inner = self._written(inner, kept, old, indices)
        return inner


def _beside(accepted: Any, value: Any) -> Any:
    return jnp.broadcast_to(accepted, value.shape)

"""`update` and `regenerate` of a `Map`: which elements run again, and how their traces are written.

An element runs again if it is given a choice, if its arguments changed, or if parameters may have. Where some run, their
traces are taken out, run, and written in place, behind a fence; so the cost is that of the elements, not of the map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gjflax.combinators.elements import (
    Elements,
    checked_weight,
    is_keyed,
    note,
    notes,
    same_indices,
    split_key,
    sum_elements,
)
from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap
from gjflax.core.diff import Change, Diff, elements_change, no_change, unknown_change
from gjflax.core.frozen import thawed
from gjflax.core.generative_function import is_same
from gjflax.core.in_place import fence, stored_leaves, take_elements
from gjflax.core.selection import Selection
from gjflax.core.trace import canonical, total
from gjflax.core.typing import Arguments, PRNGKey, Score


class ElementsChange:
    """One `update` or `regenerate`: the elements' traces while some or all of them are run again."""

    def __init__(self, owner: Any, trace: Any, argdiffs: Arguments, param_diff: Change, key: PRNGKey):
        self.owner, self.trace, self.key = owner, trace, key
        self.argdiffs, self.args = argdiffs, Diff.primal(argdiffs)
        self.elements = Elements(trace.inner, trace.length)
        self._unchanged = [Diff.is_unchanged(diff) for diff in argdiffs]
        moving = [diff for diff, unchanged in zip(argdiffs, self._unchanged, strict=True) if not unchanged]
        axes = owner._axes(self.args)
        by_element = [
            isinstance(diff, Diff) and diff.change is elements_change and axis == 0
            for diff, axis, unchanged in zip(argdiffs, axes, self._unchanged, strict=True)
            if not unchanged
        ]
        one_set = all(by_element) and all(same_indices(diff.indices, moving[0].indices) for diff in moving)
        parameters_changed = owner.inner.needs_variables and param_diff is not no_change
        same_program = is_same(trace.gen_fn, owner.as_unbound())
        self.everywhere = parameters_changed or not one_set or not same_program
        self.moved = moving[0].indices if moving and not self.everywhere else None

    def weight(self) -> Score:
        """The sum of the weights of what was run."""
        weight = total([sum_elements(weight) for weight in self.elements.weights])
        return checked_weight(weight, self.moved, self.trace.length)

    def stored_args(self) -> tuple[Any, list[Diff]]:
        """The new arguments as the trace stores them, and what is known of their leaves."""
        new = canonical(self.args)
        diffs = Diff.leaves(self.argdiffs)
        if len(diffs) != len(jax.tree.leaves(new)):
            diffs = [unknown_change(None)] * len(jax.tree.leaves(new))
        return stored_leaves(new, self.trace.args, diffs), diffs

    def update_all(self, given: ChoiceMap, *, strict: bool, param_diff: Change) -> ChoiceMap:
        """Update every element; the discard."""
        return self._all(_updating(self._marks(), strict, param_diff), given)

    def update_some(self, indices: Any, given: ChoiceMap, *, strict: bool, param_diff: Change) -> ChoiceMap:
        """Update some elements; the discard, with one entry for each."""
        return self._some(indices, _updating(self._marks(), strict, param_diff), given)

    def regenerate_all(self, selection: Selection, param_diff: Change) -> None:
        """Regenerate every element."""
        self._all(_regenerating(self._marks(), selection, param_diff), EmptyChoiceMap())

    def regenerate_some(self, positions: np.ndarray, selection: Selection, param_diff: Change) -> None:
        """Regenerate the elements at some positions."""
        # Each element belongs to one group, so this is its first pass.
        run = _regenerating(self._first_marks(), selection, param_diff)
        self._some(jnp.asarray(positions, jnp.int32), run, EmptyChoiceMap())

    def _has_own_variables(self) -> bool:
        return any(axis is not None for axis in (thawed(self.owner.variable_axes) or {}).values())

    def _marks(self) -> tuple[Change, ...]:
        # After the first pass over an element its arguments are the new ones.
        if self.elements.weights:
            return (no_change,) * len(self.args)
        return self._first_marks()

    def _first_marks(self) -> tuple[Change, ...]:
        return tuple(no_change if unchanged else unknown_change for unchanged in self._unchanged)

    def _all(self, function: Callable[..., Any], given: ChoiceMap) -> ChoiceMap:
        owner, elements, length = self.owner, self.elements, self.trace.length
        end, keys = split_key(self.key, length)
        lifted = owner._lifted(function, length, (0, 0, 0, owner._axes(self.args)))
        with notes() as noted:
            weights, inner, discard = lifted(owner.inner, keys, elements.inner, given, self.args)
        self.key = end if noted[-1].drew else self.key
        elements.replace(jnp.broadcast_to(weights, (length,)), inner, noted[-1])
        return discard

    def _some(self, indices: Any, function: Callable[..., Any], given: ChoiceMap) -> ChoiceMap:
        owner, elements = self.owner, self.elements
        count = indices.shape[0]
        old = take_elements(elements.inner, indices)
        args = self._args_at(indices)
        end, keys = split_key(self.key, count)
        axes = owner._axes(self.args)
        with notes() as noted:
            if count == 1 and not is_keyed(old) and not self._has_own_variables():
                one = [jax.tree.map(lambda leaf: leaf[0], part) for part in (old, given)]
                own_args = owner._first(args, axes)
                results = function(owner.inner, keys[0], *one, own_args)
                weights, part, discard = jax.tree.map(lambda leaf: leaf[None], results)
            else:
                weights, part, discard = owner._lifted(function, count, (0, 0, 0, axes), indices)(
                    owner.inner, keys, old, given, args
                )
        said = noted[-1]
        weights = jnp.broadcast_to(weights, (count,))
        part = said.only_touched(part)
        weights, part, discard = fence((weights, part, discard), indices if isinstance(indices, Tracer) else self.key)
        self.key = end if said.drew else self.key
        elements.write(weights, part, jax.tree.leaves(old), indices, said)
        return discard

    def _args_at(self, indices: Any) -> Arguments:
        """The arguments of some elements; those that came by element for these very indices are at hand."""
        taken = list(self.owner._take(self.args, indices))
        for position, diff in enumerate(self.argdiffs):
            if isinstance(diff, Diff) and diff.change is elements_change and same_indices(diff.indices, indices):
                taken[position] = diff.elements
        return tuple(taken)


def _options(strict: bool = True, param_diff: Change = unknown_change) -> dict[str, Any]:
    return ({} if strict else {"strict": False}) | ({} if param_diff is unknown_change else {"param_diff": param_diff})


def _updating(marks: tuple[Change, ...], strict: bool, param_diff: Change) -> Callable[..., Any]:
    options = _options(strict, param_diff)

    def update(inner: Any, key: Any, trace: Any, choices: Any, args: Any) -> Any:
        argdiffs = tuple(mark(arg) for mark, arg in zip(marks, args, strict=True))
        end, (retdiff, weight, new, discard) = inner.update(key, trace, choices, argdiffs, **options)
        note(trace, new, retdiff, drew=end is not key)
        return weight, new, discard

    return update


def _regenerating(marks: tuple[Change, ...], selection: Selection, param_diff: Change) -> Callable[..., Any]:
    options = _options(param_diff=param_diff)

    def regenerate(inner: Any, key: Any, trace: Any, choices: Any, args: Any) -> Any:
        argdiffs = tuple(mark(arg) for mark, arg in zip(marks, args, strict=True))
        end, (retdiff, weight, new) = inner.regenerate(key, trace, selection, argdiffs, **options)
        note(trace, new, retdiff, drew=end is not key)
        return weight, new, EmptyChoiceMap()

    return regenerate

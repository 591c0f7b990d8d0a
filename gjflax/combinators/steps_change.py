"""`update` and `regenerate` of a few steps of a chain, at a cost that does not grow with the chain.

A step that is given a choice runs again, and then those after it, until one hands on the state that it handed on before.
Of a kernel whose state is its own choices that is the very next one; of one that hands on a window of k states, the k-th.
What a kernel hands on is known while tracing, from what its own `update` says of its return value; a kernel in which a
change never ends is not for this file. The steps' traces are taken out, run, and written in place, behind a fence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gjflax.combinators.elements import Elements, Note, is_keyed
from gjflax.combinators.steps_given import StepsGiven
from gjflax.combinators.steps_plan import Plan
from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap, masked, vector
from gjflax.core.diff import Change, Diff, no_change, unknown_change
from gjflax.core.in_place import fence, remember, take_elements, within
from gjflax.core.indices import nan_where_repeated
from gjflax.core.masked import where
from gjflax.core.selection import Selection
from gjflax.core.trace import canonical, plain, total
from gjflax.core.typing import Arguments, PRNGKey, Score
from gjflax.language.handlers import call_options
from gjflax.language.incremental import canonical_diff

MAX_INDICES = 4
"""How many steps are changed one by one; where there are more, all steps run."""

MAX_STEPS = 16
"""How far a change is followed."""

Run = Callable[[PRNGKey, Any, Arguments], Any]
"""``run(key, old, argdiffs)``: what a kernel's `update` returns, for a step's old trace."""


def update_some(
    owner: Any,
    key: PRNGKey,
    trace: Any,
    plan: Plan,
    argdiffs: Arguments,
    given: StepsGiven,
    param_diff: Change,
    strict: bool,
) -> Any:
    """What `update` returns, where a few steps are given something and nothing else changed; else None."""
    if given.indices is None or given.indices.shape[0] > MAX_INDICES:
        return None
    if not owner._is_unchanged(trace, argdiffs, param_diff) or not _may_change(owner, trace):
        return None
    change = StepsChange(owner, trace, plan, Diff.primal(argdiffs), key)

    def update(choices: ChoiceMap) -> Any:
        options = call_options(strict, param_diff)
        return lambda key, old, diffs: owner.inner.update(key, old, choices, diffs, **options)

    for position, index in enumerate(given.one_by_one()):
        choices = jax.tree.map(lambda leaf, at=position: jnp.asarray(leaf)[at], given.choices)
        runs = ((update(choices), True), (update(EmptyChoiceMap()), False))
        if not change.change(index, lambda offset, at, runs=runs: runs[min(offset, 1)]):
            return None
    discard = jax.tree.map(lambda *leaves: jnp.stack(leaves), *change.discards)
    active = trace.counts(given.indices)
    discard = vector(given.index_field, discard if active is None else masked(discard, active))
    new = _changed(change, trace)
    weight = nan_where_repeated(change.weight(), given.traced)
    return change.key, (owner._retdiff(change, new), weight, new, discard)


def regenerate_some(
    owner: Any, key: PRNGKey, trace: Any, plan: Plan, argdiffs: Arguments, selection: Selection, param_diff: Change
) -> Any:
    """What `regenerate` returns, where a few steps are selected and nothing else changed; else None."""
    indices = sorted(selection.indices)
    if not 0 < len(indices) <= MAX_INDICES or not selection[indices[-1] + 1].is_empty:
        return None
    if not owner._is_unchanged(trace, argdiffs, param_diff) or not _may_change(owner, trace):
        return None
    change = StepsChange(owner, trace, plan, Diff.primal(argdiffs), key)

    def regenerate(chosen: Selection) -> Any:
        def run(key: PRNGKey, old: Any, diffs: Arguments) -> Any:
            options = call_options(param_diff=param_diff)
            key, (retdiff, weight, new) = owner.inner.regenerate(key, old, chosen, diffs, **options)
            return key, (retdiff, weight, new, EmptyChoiceMap())

        return run

    # In the order in which they run: a step that is redrawn weighs nothing, also where it follows one that is.
    for index in reversed(indices) if getattr(owner, "reverse", False) else indices:
        if index not in change.visited and not change.change(
            index, lambda offset, at: (regenerate(selection[at]), not selection[at].is_empty)
        ):
            return None
    new = _changed(change, trace)
    return change.key, (owner._retdiff(change, new), change.weight(), new)


def _changed(change: StepsChange, trace: Any) -> Any:
    """The trace with the steps that were run."""
    new = trace.with_steps(change.elements.inner, change.last)
    remember(new, trace, steps=change.elements)
    return new


@dataclasses.dataclass(frozen=True)
class _Step:
    """A step that was run again.

    Attributes:
      index: which one, an integer array of one element.
      counts: whether it is one that counts, where only running tells; else None.
      note: which leaves of its trace it touched.
    """

    index: Any
    counts: Any
    weight: Any
    old: Any
    new: Any
    discard: ChoiceMap
    state: Any
    state_changed: bool
    note: Note


class StepsChange:
    """The traces of all steps while some of them are run again.

    Attributes:
      key: the key to go on with.
      elements: the traces, and what was written.
      last: what the last step hands on, where the trace keeps it.
      discards: of each step that was changed.
      steps: all that were run, those of one change after another.
      visited: the indices of these, where they are known while tracing.
    """

    def __init__(self, owner: Any, trace: Any, plan: Plan, args: Arguments, key: PRNGKey):
        self._owner, self._trace, self._plan, self._args = owner, trace, plan, args
        self.key = key
        self.elements = Elements(trace.inner, trace.length)
        self.last = owner._last_of(trace)
        self.discards: list[ChoiceMap] = []
        self.steps: list[list[_Step]] = []
        self.visited: set[int] = set()
        self._weights: list[Any] = []

    def weight(self) -> Score:
        """The sum of the weights of the steps that were run."""
        return total(self._weights)

    def is_unchanged(self) -> bool:
        """Whether what the steps returned is certainly what it was."""
        return all(step.note.unchanged_retval for steps in self.steps for step in steps)

    def retdiff(self, retval: Any) -> Any:
        """The stacked return values with what is known of their change."""
        if self.is_unchanged():
            return no_change(retval)
        if len(self.steps) > 1 or not all(step.note.unchanged_retval for step in self.steps[0][1:]):
            return unknown_change(retval)
        index, part, old = self._first
        elements = [was if new is None else new for new, was in zip(part, old, strict=True)]
        inner = jax.tree.structure(self.elements.inner).unflatten(elements)
        return Diff.of_elements(retval, index, plain(inner.get_retval()))

    def change(self, index: Any, run_of: Callable[[int, Any], tuple[Run, bool]]) -> bool:
        """Change one step and follow what it hands on; False where that never ends, and then nothing was done.

        Args:
          index: which step, an int where it is known while tracing, else an integer array.
          run_of: ``run_of(offset, index)``: what to run so many steps after that one, and whether a step is given
            something of its own there; the index is None where it is not known.
        """
        known = isinstance(index, int)
        # Not an array of JAX, which inside of `jit` is not known any more.
        index = np.asarray(index, np.int32) if known else index.astype(jnp.int32)
        inside = None if known else within(index, self._trace.length)
        direction = -1 if getattr(self._owner, "reverse", False) else 1
        steps: list[_Step] = []
        key, at, state, diffs, ends = self.key, index, None, None, False
        for offset in range(MAX_STEPS):
            if known and not 0 <= int(at) < self._trace.length:
                ends = True
                break
            run, is_given = run_of(offset, int(at) if known else None)
            step, new_diffs = self._run(at, inside, run, state, diffs)
            steps.append(step)
            ends = not step.state_changed
            if ends or (not is_given and diffs is not None and _pattern(new_diffs) == _pattern(diffs)):
                break
            at, state, diffs = at + direction, step.state, new_diffs
        # What is gone downstream is discarded by those who see all steps.
        if not ends or not all(step.discard.is_empty() for step in steps[1:]):
            self.key = key
            return False
        self._write(steps, inside, self.key if known else index)
        if known:
            self.visited.update(int(step.index[0]) for step in steps)
        return True

    def _run(self, at: Any, inside: Any, run: Run, state: Any, diffs: Any) -> tuple[_Step, list[Diff]]:
        """One step; and what is known of the state that it hands on, leaf by leaf."""
        owner, trace = self._owner, self._trace
        index = at[None]
        old = jax.tree.map(lambda leaf: leaf[0], take_elements(self.elements.inner, index))
        x = jax.tree.map(lambda leaf: leaf[0], take_elements(self._plan.inputs, index))
        if diffs is None:
            state = canonical(owner._state_in(self._owner.inner._arguments_of(old)))
            diffs = [no_change(leaf) for leaf in jax.tree.leaves(state)]
        kernel_args = owner._arguments(self._args, plain(state), plain(x))
        argdiffs = owner._argdiffs(kernel_args, plain(Diff.tree(state, diffs)))
        end, (retdiff, weight, new, discard) = run(self.key, old, argdiffs)
        drew = end is not self.key
        self.key = end
        new_state = owner._checked(owner._next(Diff.primal(retdiff)), state)
        count = len(jax.tree.leaves(new_state))
        known = Diff.leaves(canonical_diff(retdiff))
        if len(known) < count:
            known = [unknown_change(None)] * count
        new_diffs = [
            dataclasses.replace(diff, value=leaf) for diff, leaf in zip(known, jax.tree.leaves(new_state), strict=False)
        ]
        counts = inside
        if inside is not None:
            counts = inside & within(at, trace.length)
        here = trace.counts(at)
        if here is not None:
            counts = here if counts is None else counts & here
        pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        touched = tuple(one is not other for one, other in pairs)
        note = Note(touched, Diff.is_unchanged(retdiff), drew)
        changed = not Diff.is_unchanged(tuple(new_diffs))
        step = _Step(index, counts, weight, old, new, discard, new_state, changed, note)
        return step, new_diffs

    def _write(self, steps: list[_Step], inside: Any, witness: Any) -> None:
        """Write what was computed, behind the fence."""
        length = self._trace.length
        end = 0 if getattr(self._owner, "reverse", False) else length - 1
        parts, weights, last = [], [], self.last
        for step in steps:
            leaves = step.note.only_touched(step.new)
            olds = jax.tree.leaves(step.old)
            if step.counts is not None:
                leaves = [
                    None if leaf is None else where(step.counts, leaf, was)
                    for leaf, was in zip(leaves, olds, strict=True)
                ]
            parts.append([None if leaf is None else leaf[None] for leaf in leaves])
            weights.append(step.weight if step.counts is None else jnp.where(step.counts, step.weight, 0))
            if last is not None and step.state_changed:
                is_last = (step.index[0] == end) if step.counts is None else (step.index[0] == end) & step.counts
                last = jax.tree.map(lambda a, b, flag=is_last: where(flag, a, b), step.state, last)
        weight = total(weights)
        if inside is not None:
            weight = jnp.where(inside, weight, jnp.nan)
        weight, parts, discard, self.last = fence((weight, parts, steps[0].discard, last), witness)
        # The steps downstream first: one that is out of range is written as the old last one, which may be the first.
        for step, part in reversed(list(zip(steps, parts, strict=True))):
            old = [leaf[None] for leaf in jax.tree.leaves(step.old)]
            self.elements.write(jnp.zeros(()), part, old, step.index, step.note)
        self._first = steps[0].index, parts[0], [leaf[None] for leaf in jax.tree.leaves(steps[0].old)]
        self._weights.append(weight)
        self.discards.append(discard)
        self.steps.append(steps)


def _may_change(owner: Any, trace: Any) -> bool:
    """Whether steps can be taken out and run alone: not where they have variables of their own, or write any."""
    scope = owner.inner.scope
    immutable = scope is None or scope.mutable is False or scope.mutable == () or scope.mutable == []
    own_variables = owner.inner.needs_variables and bool(owner.variable_axes and owner.variable_axes.items)
    return immutable and not own_variables and not is_keyed(trace.inner)


def _pattern(diffs: list[Diff]) -> list[bool]:
    return [diff.change is no_change for diff in diffs]

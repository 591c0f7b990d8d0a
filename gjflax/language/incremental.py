r"""`update` and `regenerate` of a body: callees that cannot have changed are neither run nor scored again.

The dependency analysis says for each leaf of a callee's arguments which inputs it depends on; what is known of these (the
arguments' and the earlier callees' changes, and whether parameters changed) says whether the leaf changed. An unchanged
leaf is taken from the old trace, so nothing that leads to it has to be computed. A callee without changed arguments,
parameters or constraints keeps its trace, score and all; so a change costs its Markov blanket, not the model.

Weights are sums over the callees that ran:

==========  ==========================================================================================
update      existing: its own weight;  new: its importance weight;  gone: minus its old score
regenerate  existing: its own weight;  new or gone: nothing, for the old and the new proposal cancel it
==========  ==========================================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap, choice_map
from gjflax.core.diff import Change, Diff, elements_change, no_change, unknown_change
from gjflax.core.generative_function import is_same
from gjflax.core.in_place import stored_leaves
from gjflax.core.pytree import static_field
from gjflax.core.selection import Selection
from gjflax.core.trace import Trace, canonical, plain, total
from gjflax.language.dependency import ARGUMENT, RETVAL, VARIABLE, Dependencies, Dependency, Source, dependencies_of
from gjflax.language.handlers import Handler, Path, call_options, check_visited, run_body


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Incremental(Handler):
    """What the two have in common: what is known of a callee's arguments."""

    key: Any
    traces: dict[Path, Trace]
    argdiffs: tuple[Diff, ...]
    param_diff: Change = static_field(default=unknown_change)
    dependencies: Dependencies | None = static_field(default=None)

    def begin(self) -> None:
        super().begin()
        object.__setattr__(self, "retdiffs", {})

    def leaf_diff(self, dependency: Dependency) -> Diff:
        """What is known of a leaf, without its value."""
        return leaf_diff(dependency, self._source)

    def _source(self, source: Any) -> Diff:
        if source.kind == RETVAL:
            return self._retdiffs[source.path][source.leaf]
        if source.kind == ARGUMENT:
            return self.argdiffs[source.leaf]
        if source.kind == VARIABLE:
            return self.param_diff(None)
        return unknown_change(None)

    def _argdiffs(self, address: Path, callee: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The callee's arguments with what is known of them; unchanged ones are those of the old trace."""
        known = None if self.dependencies is None else self.dependencies.arguments.get(address)
        if known is None or not self._is_same(address, callee):
            return Diff.mark(args, unknown_change)
        return diffs_of_arguments(args, arguments_of(self.traces[address]), list(map(self.leaf_diff, known)))

    def _is_same(self, address: Path, callee: Any) -> bool:
        """Whether the callee is the one of the old trace. One that the body makes may hold values that changed."""
        return is_same(self.traces[address].get_gen_fn(), callee.as_unbound())

    def _may_skip(self, address: Path, callee: Any, argdiffs: tuple[Any, ...]) -> bool:
        return callee.knows_no_change(self.traces[address], argdiffs, self.param_diff)

    def _note(self, address: Path, retdiff: Any) -> Any:
        """Keep what is known of a callee's return value, and give the value."""
        self._retdiffs[address] = Diff.leaves(canonical_diff(retdiff))
        return Diff.primal(retdiff)

    @property
    def _retdiffs(self) -> dict[Path, list[Diff]]:
        return self.retdiffs  # pyright: ignore[reportAttributeAccessIssue]

    def _end(self) -> Any:
        # A callee that drew nothing gave its key back, and then so does the body.
        return self.keys.end() if self._drew else self.key  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def _drew(self) -> bool:
        return any(record.drew for record in self._records.values())


@dataclasses.dataclass(frozen=True)
class _Record:
    """What one callee did."""

    trace: Trace
    weight: Any = None
    discard: ChoiceMap = dataclasses.field(default_factory=EmptyChoiceMap)
    drew: bool = True


def arguments_of(trace: Trace) -> tuple[Any, ...]:
    """The arguments with which a trace's generative function is called."""
    return trace.get_gen_fn()._arguments_of(trace)


def leaf_diff(dependency: Dependency, known: Callable[[Source], Diff]) -> Diff:
    """What is known of a leaf, without its value, from what is known of its sources."""
    if dependency.forwards is not None:
        return known(dependency.forwards)
    changed = any(known(source).change is not no_change for source in dependency.sources)
    return unknown_change(None) if changed else no_change(None)


def diffs_of_arguments(args: tuple[Any, ...], old_args: tuple[Any, ...], known: list[Diff]) -> tuple[Any, ...]:
    """Arguments with what is known of their leaves; unchanged leaves are the old ones.

    Args:
      args: the new arguments.
      old_args: those of the old trace.
      known: what is known of each leaf of ``canonical(args)``, without its value.
    """
    new, old = canonical(args), canonical(old_args)
    leaves, old_leaves = jax.tree.leaves(new), jax.tree.leaves(old)
    if jax.tree.structure(new) != jax.tree.structure(old) or len(leaves) != len(known):
        return Diff.mark(args, unknown_change)
    diffs = []
    for leaf, was, diff in zip(leaves, old_leaves, known, strict=True):
        same_type = leaf.shape == was.shape and leaf.dtype == was.dtype
        if diff.change is no_change and same_type:
            diffs.append(no_change(was))
        elif diff.change is elements_change and same_type:
            diffs.append(Diff(leaf, elements_change, diff.indices, diff.elements))
        else:
            diffs.append(unknown_change(leaf))
    result = []
    position = 0
    for one in new:
        count = len(jax.tree.leaves(one))
        own = diffs[position : position + count]
        position += count
        value = jax.tree.structure(one).unflatten([diff.value for diff in own])
        result.append(plain_diff(Diff.tree(value, own)))
    return tuple(result)


def diffs_of_retval(retval: Any, old_retval: Any, known: list[Diff] | None) -> tuple[Any, list[Diff], Any]:
    """A return value as the new trace stores it, what is known of its leaves, and both together as a caller gets them.

    Args:
      retval: the new one, canonical.
      old_retval: that of the old trace, canonical.
      known: what is known of each leaf, without its value; None where nothing is.
    """
    count = len(jax.tree.leaves(retval))
    if known is None or jax.tree.structure(retval) != jax.tree.structure(old_retval) or len(known) != count:
        known = [unknown_change(None)] * count
    stored = stored_leaves(retval, old_retval, known)
    diffs = [dataclasses.replace(diff, value=leaf) for diff, leaf in zip(known, jax.tree.leaves(stored), strict=True)]
    return stored, known, plain_diff(Diff.tree(stored, diffs))


def plain_diff(tree: Any) -> Any:
    """The values in Diffs as a body has them: structure becomes values again."""
    return jax.tree.map(
        lambda part: dataclasses.replace(part, value=plain(part.value)) if isinstance(part, Diff) else plain(part),
        tree,
        is_leaf=lambda part: isinstance(part, Diff),
    )


def canonical_diff(tree: Any) -> Any:
    """The values in Diffs as traces store them."""
    return jax.tree.map(
        lambda part: (
            dataclasses.replace(part, value=canonical(part.value)) if isinstance(part, Diff) else canonical(part)
        ),
        tree,
        is_leaf=lambda part: isinstance(part, Diff),
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Update(Incremental):
    """Callees that were there update, new ones run by importance, and the scores of those that are gone go."""

    choices: ChoiceMap = dataclasses.field(default_factory=EmptyChoiceMap)
    strict: bool = static_field(default=True)

    def call(self, address: Path, callee: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
        below, key = self.choices.get_subtree(address), self._key(address)
        if address not in self.traces:
            _, (weight, trace) = callee.importance(key, below, args, **call_options(self.strict))
            return self._note(address, unknown_change(trace.get_retval())), _Record(trace, weight)
        old = self.traces[address]
        argdiffs = self._argdiffs(address, callee, args)
        if below.is_empty() and self._may_skip(address, callee, argdiffs):
            return self._note(address, no_change(old.get_retval())), _Record(old, drew=False)
        options = call_options(self.strict, self.param_diff)
        end, (retdiff, weight, trace, discard) = callee.update(key, old, below, argdiffs, **options)
        return self._note(address, retdiff), _Record(trace, weight, discard, end is not key)

    def outcome(self) -> Any:
        check_visited(self.choices, self._records, self.strict)
        weights = [record.weight for record in self._records.values() if record.weight is not None]
        discard: ChoiceMap = EmptyChoiceMap()
        for address, record in self._records.items():
            discard = discard.merge(choice_map({address: record.discard}))
        for address, trace in self.traces.items():
            if address not in self._records:
                weights.append(-trace.get_score())
                discard = discard.merge(choice_map({address: trace.strip()}))
        traces = {address: record.trace for address, record in self._records.items()}
        return self._end(), total(weights), traces, discard, self._retdiffs


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Regenerate(Incremental):
    """Callees that were there regenerate their part of the selection; new ones are drawn, at no weight."""

    selection: Selection = static_field(default=None)

    def call(self, address: Path, callee: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
        key = self._key(address)
        if address not in self.traces:
            _, trace = callee.simulate(key, args)
            return self._note(address, unknown_change(trace.get_retval())), _Record(trace)
        old, below = self.traces[address], self.selection[address]
        argdiffs = self._argdiffs(address, callee, args)
        if below.is_empty and self._may_skip(address, callee, argdiffs):
            return self._note(address, no_change(old.get_retval())), _Record(old, drew=False)
        options = call_options(param_diff=self.param_diff)
        end, (retdiff, weight, trace) = callee.regenerate(key, old, below, argdiffs, **options)
        return self._note(address, retdiff), _Record(trace, weight, drew=end is not key)

    def outcome(self) -> Any:
        weights = [record.weight for record in self._records.values() if record.weight is not None]
        traces = {address: record.trace for address, record in self._records.items()}
        return self._end(), total(weights), traces, self._retdiffs


def run_incrementally(module: Any, handler_of: Any, trace: Any, argdiffs: tuple[Any, ...], param_diff: Change) -> Any:
    """Run a body under one of these handlers.

    Args:
      module: the body's module.
      handler_of: a function that makes the handler, of its common fields.
      trace: the old trace of the body.
      argdiffs: the new arguments.
      param_diff: whether parameters may have changed.

    Returns:
      The `Parts` of the new trace, the return value's change, and the handler's outcome.
    """
    args, changes = Diff.primal(argdiffs), Diff.leaves(canonical_diff(argdiffs))
    old_args, old_retval = trace.args, trace.retval
    traces = trace.by_path
    dependencies = None
    same_body = is_same(trace.gen_fn, module.as_unbound()) and are_alike(canonical(args), old_args)
    if same_body and not module.is_initializing() and types_are_known(argdiffs):
        retvals = {address: part.get_retval() for address, part in traces.items()}
        dependencies = dependencies_of(module, args, retvals)
        if dependencies is not None and dependencies.arguments.keys() != traces.keys():
            dependencies = None
    handler = handler_of(traces=traces, argdiffs=tuple(changes), param_diff=param_diff, dependencies=dependencies)
    retval, (*outcome, retdiffs) = run_body(module, handler, args)
    handler.begin()
    handler.retdiffs.update(retdiffs)
    new_args = canonical(args)
    known = None if dependencies is None else list(map(handler.leaf_diff, dependencies.retval))
    stored, known, retdiff = diffs_of_retval(retval, old_retval, known)
    parts = Parts(stored_leaves(new_args, old_args, changes), stored, changes, known)
    return parts, retdiff, outcome


@dataclasses.dataclass(frozen=True)
class Parts:
    """The arguments and the return value as the new trace stores them, and what is known of their leaves."""

    args: Any
    retval: Any
    argdiffs: list[Diff]
    retdiffs: list[Diff]


def are_alike(one: Any, other: Any) -> bool:
    """Whether two trees have the same structure, shapes and dtypes. A body may compute with a shape, too."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)


def types_are_known(argdiffs: tuple[Any, ...]) -> bool:
    """Whether what is structure for a body is what it was: integers of Python, which it may branch on, are unchanged."""
    marked = jax.tree.leaves(argdiffs, is_leaf=lambda part: isinstance(part, Diff))
    changed = [part.value if isinstance(part, Diff) else part for part in marked if not Diff.is_unchanged(part)]
    return not any(isinstance(leaf, (int, str)) or not _is_number(leaf) for leaf in jax.tree.leaves(changed))


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (float, complex)) or hasattr(leaf, "dtype")

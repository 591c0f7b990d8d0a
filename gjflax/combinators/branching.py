r"""What combinators have in common that run one of several generative functions: `Switch`, `Cond`, `OrElse`, `Mask`.

With branches p_k(t; x) and an index i, the density is that of the branch taken,

    p(t; i, x) = p_i(t; x),   retval f_i(t, x).

A trace has one part for each branch, zero where it was not taken: so its structure does not depend on the index. Its
choices are the union of those of the branches. An address that all have holds a value; one that only some have holds a
`Masked` value, which is there where one of these is taken.

When the index changes, choices at addresses that the old and the new branch share are kept, those of the old one alone
are gone, and those of the new one alone are drawn, or given. With s the old and s' the new score of a choice,

==========================  =====================  ====================
a choice                    in `update` adds       in `regenerate` adds
==========================  =====================  ====================
kept                        s' − s                 s' − s
constrained, old and new    s' − s
constrained, new            s'
redrawn                                            0
drawn, new                  0                      0
gone                        −s                     0
==========================  =====================  ====================

Both are an importance run of the new branch. Its constraints are the old choices that are kept, overwritten by the new
ones, each there where the old branch had it: its weight is Σ s' over what was given. From that is subtracted Σ s of the
old choices: in `update` of all, in `regenerate` of those that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gjflax.combinators.branch_addresses import check_visited, remembered_addresses
from gjflax.combinators.presence import (
    choose,
    either,
    fitted,
    flagged,
    given,
    negated,
    only,
    present,
    selected,
    types,
    union,
)
from gjflax.combinators.switch_trace import SwitchTrace
from gjflax.core.choice_map import (
    ChoiceMap,
    EmptyChoiceMap,
    choice_map,
)
from gjflax.core.context import current_address
from gjflax.core.diff import Change, Diff, no_change, unknown_change
from gjflax.core.errors import (
    BranchMismatchError,
    MissingChoiceError,
    show_address,
)
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.lifted_switch import switch, trace_each
from gjflax.core.masked import both, where
from gjflax.core.selection import Selection
from gjflax.core.trace import Trace, canonical, plain, total
from gjflax.core.typing import Arguments, PRNGKey, Score
from gjflax.core.watching import in_branch


class Branching(GenerativeFunction):
    """Base class of combinators that run one of several generative functions. A subclass says what its arguments mean."""

    trace_type = SwitchTrace

    # What a subclass says ---------------------------------------------------------------------------------------

    @property
    def alternatives(self) -> Mapping[str, Any]:
        """The branches by the names of their parameters."""
        raise NotImplementedError

    @property
    def number_of_alternatives(self) -> int:
        """How many there are: one more than branches where it may be that none is taken."""
        return len(self.alternatives)

    @nn.nowrap
    def stored(self, args: Arguments) -> Arguments:
        """The arguments, checked, as a trace keeps them."""
        raise NotImplementedError

    @nn.nowrap
    def index_of(self, stored: Any) -> Any:
        """Which branch stored arguments take."""
        raise NotImplementedError

    @nn.nowrap
    def arguments(self, args: Arguments) -> tuple[Arguments, ...]:
        """The arguments of each branch, of arguments or argdiffs."""
        raise NotImplementedError

    @nn.nowrap
    def static_index(self, args: Arguments) -> int | None:
        """Which branch is taken, where that is known from how the arguments were given."""
        return None

    @nn.nowrap
    def choose_retval(self, taken: Sequence[Any], retvals: Sequence[Any]) -> Any:
        """The return value of the branch that is taken."""
        return plain(choose(taken, canonical(list(retvals))))

    @property
    def needs_variables(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a branch does."""
        return any(branch.needs_variables for branch in self.alternatives.values())

    # The interface ----------------------------------------------------------------------------------------------

    def simulate(self, key: PRNGKey, args: Arguments) -> tuple[PRNGKey, SwitchTrace]:
        key, below = jax.random.split(key)

        def run(number: int, branch: Any, args: Arguments, key: PRNGKey, choices: ChoiceMap) -> Any:
            return (), branch.simulate(key, args)[1]

        traces = [trace for _, trace in self._switch(args, run, below)]
        return key, self._trace(args, traces)

    def importance(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Score, SwitchTrace]]:
        key, below = jax.random.split(key)
        weights, trace = self._importance(below, choices, args)
        if strict:
            self._check_visited(choices, [branch.strip().addresses() for branch in trace.branches], args)
        return key, (total(weights), trace)

    def assess(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Any, Score]]:
        if strict and not choices.is_empty() and not (self._is_lifted and self.is_initializing()):
            self._check_visited(choices, self._addresses(args), args)
        missing: dict[int, MissingChoiceError] = {}

        def run(number: int, branch: Any, args: Arguments, key: PRNGKey, choices: ChoiceMap) -> Any:
            try:
                _, (retval, score) = branch.assess(key, choices, args, strict=False)
            except MissingChoiceError as error:
                # Another branch may be taken. If this one is, its density is not known.
                missing[number] = error
                _, (_, trace) = branch.importance(key, choices, args, strict=False)
                retval, score = trace.get_retval(), jnp.full_like(trace.get_score(), jnp.nan)
            return (), (canonical(retval), score)

        results = [result for _, result in self._switch(args, run, key, choices)]
        known = self.static_index(args)
        if known in missing:
            raise missing[known]
        if len(missing) == self.number_of_alternatives:
            raise missing[0]
        retvals = [plain(retval) for retval, _ in results]
        self._check_retvals(retvals)
        return key, (self.choose_retval(self._taken(args), retvals), total([score for _, score in results]))

    def update(
        self,
        key: PRNGKey,
        trace: Any,
        choices: ChoiceMap,
        argdiffs: Arguments,
        *,
        param_diff: Change = unknown_change,
        strict: bool = True,
    ) -> tuple[PRNGKey, tuple[Any, Score, SwitchTrace, ChoiceMap]]:
        args = Diff.primal(argdiffs)
        addresses = [branch.strip().addresses() for branch in trace.branches]
        if strict:
            self._check_visited(choices, addresses, args)
        else:
            choices = only(choices, {address for part in addresses for address in part})
        if not Diff.is_unchanged(argdiffs[:1]):
            return self._update_any(key, trace, choices, args)
        if choices.is_empty() and self.knows_no_change(trace, argdiffs, param_diff):
            return key, (no_change(trace.get_retval()), jnp.zeros_like(trace.get_score()), trace, EmptyChoiceMap())
        return self._update_taken(key, trace, choices, argdiffs, param_diff)

    def regenerate(
        self,
        key: PRNGKey,
        trace: Any,
        selection: Selection,
        argdiffs: Arguments,
        *,
        param_diff: Change = unknown_change,
    ) -> tuple[PRNGKey, tuple[Any, Score, SwitchTrace]]:
        if not Diff.is_unchanged(argdiffs[:1]):
            return self._regenerate_any(key, trace, selection, Diff.primal(argdiffs))
        if self.knows_no_change(trace, argdiffs, param_diff) and trace.strip().filter(selection).is_empty():
            return key, (no_change(trace.get_retval()), jnp.zeros_like(trace.get_score()), trace)
        return self._regenerate_taken(key, trace, selection, argdiffs, param_diff)

    def constrain(
        self, unconstrained: ChoiceMap, args: Arguments, *, fixed: ChoiceMap | None = None
    ) -> tuple[ChoiceMap, Score]:
        held = choice_map(fixed)
        addresses = self._addresses(args)
        for choices in (unconstrained, held):
            self._check_visited(choices, addresses, args)

        def run(number: int, branch: Any, args: Arguments, held: ChoiceMap, unconstrained: ChoiceMap) -> Any:
            mapped, log_det = branch.constrain(
                only(unconstrained, addresses[number]), args, fixed=only(held, addresses[number])
            )
            return (), (mapped, log_det)

        results = [result for _, result in self._switch(args, run, held, unconstrained)]
        return self._union([choices for choices, _ in results], args), total([log_det for _, log_det in results])

    @nn.nowrap
    def variables_of(self, trace: Any) -> Mapping[str, Any]:
        """What a trace knows of the parameters: those of a branch that was not taken are NaN."""
        params = {}
        for (name, branch), part, taken in zip(self.alternatives.items(), trace.branches, trace.taken, strict=True):
            known = branch.variables_of(part).get("params")
            if known:
                params[name] = jax.tree.map(lambda leaf, taken=taken: where(taken, leaf, _unknown(leaf)), known)
        return {"params": params} if params else {}

    # Inside -----------------------------------------------------------------------------------------------------

    @nn.nowrap
    def _taken(self, args: Arguments) -> list[Any]:
        index = self.index_of(self.stored(args))
        return [index == number for number in range(self.number_of_alternatives)]

    @nn.nowrap
    def _union(self, parts: Sequence[ChoiceMap], args: Arguments) -> ChoiceMap:
        nothing = [EmptyChoiceMap()] * (self.number_of_alternatives - len(parts))
        return union([*parts, *nothing], self._taken(args))

    @nn.nowrap
    def _trace(self, args: Arguments, traces: Sequence[Trace]) -> SwitchTrace:
        """A new trace, with the branches' types checked."""
        self._check_retvals([trace.get_retval() for trace in traces])
        nothing = [EmptyChoiceMap()] * (self.number_of_alternatives - len(traces))
        union([*(trace.strip() for trace in traces), *nothing], None)
        return self.trace_type(self.as_unbound(), canonical(self.stored(args)), tuple(traces))

    @nn.nowrap
    def _check_retvals(self, retvals: Sequence[Any]) -> None:
        shown = [types(canonical(retval)) for retval in retvals]
        for number, other in enumerate(shown[1:], 1):
            if other != shown[0]:
                raise BranchMismatchError(
                    f"The branches of the {type(self).__name__} at {show_address(current_address())} return different "
                    f"things: branch 0 returns {shown[0]}, branch {number} {other}. Return the same structure, shapes "
                    "and dtypes from all."
                )

    @nn.nowrap
    def _check_visited(self, choices: ChoiceMap, addresses: Sequence[Sequence[Any]], args: Arguments) -> None:
        check_visited(choices, addresses, self.static_index(args), type(self).__name__)

    @nn.nowrap
    def _addresses(self, args: Arguments) -> list[list[Any]]:
        """The addresses of the branches' choices: known of a trace, else found by tracing `simulate`."""
        leaves, structure = jax.tree.flatten(args[1:])
        is_array = (jax.Array, np.ndarray)
        known = [(x.shape, x.dtype) if isinstance(x, is_array) else (type(x), x) for x in leaves]
        remembered = remembered_addresses(self.as_unbound(), structure, tuple(known))
        if not remembered:
            found: dict[int, list[Any]] = {}

            def run(number: int, branch: Any, args: Arguments, key: PRNGKey, choices: ChoiceMap) -> Any:
                found[number] = branch.simulate(key, args)[1].strip().addresses()
                return (), ()

            _, functions, inputs = self._prepared(args, run, jax.random.key(0), EmptyChoiceMap())
            trace_each(functions, self, inputs, self._is_lifted)
            remembered.extend(found[number] for number in range(len(functions)))
        return remembered

    @property
    def _is_lifted(self) -> bool:
        return self.needs_variables and self.scope is not None

    @nn.nowrap
    def _switch(
        self, args: Arguments, run: Run, operand: Any, choices: ChoiceMap | None = None, fills: Any = None
    ) -> list[tuple[Any, Any]]:
        """Run ``run(number, branch, its arguments, operand, choices)`` for the branch that is taken: two trees of each."""
        choices = EmptyChoiceMap() if choices is None else choices
        index, functions, inputs = self._prepared(args, run, operand, choices)
        nothing = [lambda module, inputs: ((), ())] * (self.number_of_alternatives - len(functions))
        fills = None if fills is None else [*fills, *[()] * len(nothing)]
        results = switch(index, [*functions, *nothing], self, inputs, fills, self._is_lifted)
        return results[: len(functions)]

    @nn.nowrap
    def _prepared(self, args: Arguments, run: Run, operand: Any, choices: ChoiceMap) -> tuple[Any, list[Any], Any]:
        index = self.index_of(self.stored(Diff.primal(args)))

        def of_branch(number: int, name: str) -> Callable[[Any, Any], Any]:
            def function(module: Any, inputs: Any) -> Any:
                operand, args, choices = inputs
                taken, own = index == number, module.arguments(args)[number]
                with in_branch(name):
                    return run(number, module.alternatives[name], _gated(taken, own), operand, _gated(taken, choices))

            return function

        functions = [of_branch(number, name) for number, name in enumerate(self.alternatives)]
        return index, functions, (operand, args, choices)

    @nn.nowrap
    def _importance(self, key: PRNGKey, choices: ChoiceMap, args: Arguments) -> tuple[list[Any], SwitchTrace]:
        """The branches' weights, and the trace."""

        def run(number: int, branch: Any, args: Arguments, key: PRNGKey, choices: ChoiceMap) -> Any:
            _, (weight, trace) = branch.importance(key, choices, args, strict=False)
            return (), (weight, trace)

        results = [result for _, result in self._switch(args, run, key, choices)]
        return [weight for weight, _ in results], self._trace(args, [trace for _, trace in results])

    # The index did not change: the branch that is taken changes as it does by itself.

    @nn.nowrap
    def _update_taken(
        self, key: PRNGKey, trace: Any, choices: ChoiceMap, argdiffs: Arguments, param_diff: Change
    ) -> tuple[PRNGKey, tuple[Any, Score, SwitchTrace, ChoiceMap]]:
        next_key, below = jax.random.split(key)
        notes: list[tuple[bool, bool]] = []

        def run(number: int, branch: Any, args: Arguments, operand: Any, choices: ChoiceMap) -> Any:
            key, traces = operand
            old = traces[number]
            options = _options(param_diff)
            end, (retdiff, weight, new, discard) = branch.update(key, old, choices, args, strict=False, **options)
            notes.append((Diff.is_unchanged(retdiff), end is key))
            return like(new, old), (weight, discard)

        results = self._switch(argdiffs, run, (below, trace.branches), choices, fills=trace.branches)
        args = Diff.primal(argdiffs)
        discard = self._union([discard for _, (_, discard) in results], args)
        weight = total([weight for _, (weight, _) in results])
        retdiff, new = self._changed(args, [new for new, _ in results], notes)
        return key if _drew_nothing(notes) else next_key, (retdiff, weight, new, discard)

    @nn.nowrap
    def _regenerate_taken(
        self, key: PRNGKey, trace: Any, selection: Selection, argdiffs: Arguments, param_diff: Change
    ) -> tuple[PRNGKey, tuple[Any, Score, SwitchTrace]]:
        next_key, below = jax.random.split(key)
        notes: list[tuple[bool, bool]] = []

        def run(number: int, branch: Any, args: Arguments, operand: Any, choices: ChoiceMap) -> Any:
            key, traces = operand
            old = traces[number]
            end, (retdiff, weight, new) = branch.regenerate(key, old, selection, args, **_options(param_diff))
            notes.append((Diff.is_unchanged(retdiff), end is key))
            return like(new, old), (weight,)

        results = self._switch(argdiffs, run, (below, trace.branches), fills=trace.branches)
        weight = total([weight for _, (weight,) in results])
        retdiff, new = self._changed(Diff.primal(argdiffs), [new for new, _ in results], notes)
        return key if _drew_nothing(notes) else next_key, (retdiff, weight, new)

    @nn.nowrap
    def _changed(
        self, args: Arguments, traces: Sequence[Trace], notes: list[tuple[bool, bool]]
    ) -> tuple[Any, SwitchTrace]:
        new = self.trace_type(self.as_unbound(), canonical(self.stored(args)), tuple(traces))
        same = all(unchanged for unchanged, _ in notes)
        return (no_change if same else unknown_change)(new.get_retval()), new

    # The index may have changed: see the text of this file.

    @nn.nowrap
    def _update_any(
        self, key: PRNGKey, trace: Any, choices: ChoiceMap, args: Arguments
    ) -> tuple[PRNGKey, tuple[Any, Score, SwitchTrace, ChoiceMap]]:
        key, below = jax.random.split(key)
        old = trace.strip()
        choices = fitted(choices, old)
        weights, new = self._importance(below, old.overwrite(choices), args)
        new = new.replace(branches=like(new.branches, trace.branches))
        before, after, overwritten = present(old), given(old, new.strip()), given(old, choices)
        gone_or_overwritten = {
            address: both(flag, either(overwritten[address], negated(after[address])))
            for address, flag in before.items()
        }
        weight = total([*weights, -trace.get_score()])
        return key, (unknown_change(new.get_retval()), weight, new, flagged(old, gone_or_overwritten))

    @nn.nowrap
    def _regenerate_any(
        self, key: PRNGKey, trace: Any, selection: Selection, args: Arguments
    ) -> tuple[PRNGKey, tuple[Any, Score, SwitchTrace]]:
        key, below = jax.random.split(key)
        old = trace.strip()
        redrawn = selected(old, selection)
        held = {address: both(flag, negated(redrawn[address])) for address, flag in present(old).items()}
        weights, new = self._importance(below, flagged(old, held), args)
        new = new.replace(branches=like(new.branches, trace.branches))
        after = given(old, new.strip())
        kept = {address: both(flag, after[address]) for address, flag in held.items()}
        weight = total([*weights, -trace.score_where(kept)])
        return key, (unknown_change(new.get_retval()), weight, new)


Run = Callable[[int, Any, Arguments, Any, ChoiceMap], tuple[Any, Any]]


def _gated(taken: Any, tree: Any) -> Any:
    """The tree, differentiable only where the branch is taken.

    Under ``jax.vmap`` branches run that are not taken, on arguments that may be none for them. A derivative there may be
    infinite, and zero times it NaN: it must not come back.
    """

    def gate(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.where(taken, leaf, lax.stop_gradient(leaf))
        return leaf

    def gate_diff(part: Any) -> Any:
        # What did not change stays the very array that the trace has.
        return part if isinstance(part, Diff) and part.change is no_change else jax.tree.map(gate, part)

    return jax.tree.map(gate_diff, tree, is_leaf=lambda part: isinstance(part, Diff))


def like(new: Any, old: Any) -> Any:
    """The new traces in the dtypes of the old ones, so that a trace keeps its types."""
    leaves, structure = jax.tree.flatten(new)
    # What is structure, such as an argument that is a name, may change with it.
    pairs = zip(leaves, jax.tree.leaves(old), strict=True)
    return structure.unflatten([leaf if leaf.dtype == was.dtype else leaf.astype(was.dtype) for leaf, was in pairs])


def _unknown(leaf: Any) -> Any:
    return jnp.full_like(leaf, jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.zeros_like(leaf)


def _options(param_diff: Change) -> dict[str, Any]:
    """The option where it differs from what every generative function assumes."""
    return {} if param_diff is unknown_change else {"param_diff": param_diff}


def _drew_nothing(notes: list[tuple[bool, bool]]) -> bool:
    return all(same_key for _, same_key in notes)

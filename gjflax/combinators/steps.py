r"""What combinators over steps have in common: `Unfold` and `Scan`.

A kernel runs step after step, and each step's arguments hold what the step before it returned. With kernel density
p(t; x) and x_i the arguments of step i, which the choices of the steps before it determine,

    p(t_1, …, t_n) = Π_i p(t_i; x_i),

so scores and weights are sums over the steps, and a choice that changes rescores every step downstream of it.

Where the number of steps is not known while tracing, all n are run and those at or beyond it do not count. They repeat
the last step that counts, with its inputs and its constraints: so their numbers are as finite as its own, and so are
the derivatives that they multiply by zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gjflax.combinators.elements import (
    by_selection,
    check_selection,
    given_elements,
    out_of_range,
    split_key,
    sum_elements,
)
from gjflax.combinators.steps_change import MAX_INDICES, StepsChange, may_change_some
from gjflax.core.choice_map import (
    ChoiceMap,
    EmptyChoiceMap,
    ValueChoiceMap,
    VectorChoiceMap,
    by_name,
    choice_map,
    masked,
    vector,
)
from gjflax.core.context import current_address
from gjflax.core.diff import Change, Diff, no_change, unknown_change
from gjflax.core.errors import ArgumentError, ChoiceMapError, SelectionError, show_address
from gjflax.core.frozen import hashable, thawed
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.in_place import remember
from gjflax.core.lifting import scan_module, share_inner_scope, written_where
from gjflax.core.masked import Masked, where
from gjflax.core.outline import STEPS, Group, Part
from gjflax.core.pytree import STATIC
from gjflax.core.selection import Selection
from gjflax.core.trace import CallTrace, Trace, canonical, leafwise, plain, total
from gjflax.core.typing import Arguments, PRNGKey, Score
from gjflax.language.handlers import call_options


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StepsTrace(CallTrace):
    """The traces of the steps, as one trace with a leading axis."""

    inner: Trace
    length: int = dataclasses.field(metadata=STATIC)

    @property
    def active(self) -> Any:
        """Which steps count, a flag for each; None where all do."""
        return None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.inner.batch_shape[:-1]

    def counts(self, index: Any) -> Any:
        """Whether the step at an index counts; None where every one does."""
        return None

    def get_score(self) -> Score:
        return sum_active(self.inner.get_score(), self.active)

    def project(self, selection: Selection) -> Score:
        if not selection.mentions_indices:
            return sum_active(self.inner.project(selection), self.active)
        parts = []
        for subselection, positions in by_selection(selection, self.length):
            scores = self.inner.project(subselection)
            if jnp.ndim(scores):
                active = None if self.active is None else self.active[..., positions]
                parts.append(sum_active(scores[..., positions], active))
        return total(parts)

    def strip(self) -> ChoiceMap:
        return self._vector(self.inner.strip())

    def leaves(self, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Trace]]:
        return self.inner.leaves(prefix)

    def outline(self, prefix: tuple[Any, ...] = ()) -> tuple[Part, ...]:
        return (Group(STEPS, prefix, type(self.gen_fn).__name__, self.inner.outline(prefix), self.length),)

    def unconstrain(self, selection: Selection) -> tuple[ChoiceMap, Score]:
        if selection.mentions_indices:
            raise SelectionError(
                f"`unconstrain` maps the choices of all steps; the selection at {show_address(current_address())} names "
                f"steps {sorted(selection.indices)}."
            )
        choices, log_det = jax.vmap(lambda inner: inner.unconstrain(selection))(self.inner)
        return self._vector(choices), sum_active(log_det, self.active)

    def get_subtree(self, address: Any) -> Any:
        return self.strip().get_subtree(address)

    def chosen(self, accepted: Any, old: Any) -> Trace:
        written = getattr(self, "written", None)
        if written is None or written["old"] is not old:
            return leafwise(accepted, self, old)
        return self.with_steps(written["steps"].chosen(accepted, self.inner), None)

    def with_steps(self, inner: Trace, last: Any) -> Any:
        """This trace with other traces of its steps, at the same arguments."""
        return self.replace(inner=inner)

    def _vector(self, choices: ChoiceMap) -> ChoiceMap:
        return vector_of_steps(choices, self.length, self.active)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps that arguments stand for.

    Attributes:
      initial: what the first step is given, as a trace stores it.
      inputs: what every step is given of its own: a pytree with a leading axis of `length`.
      length: the number of steps that are run.
      active: which of them count, a flag for each; None where all do.
      source: whose inputs each step takes, an index for each; None where these are its own.
      known: the number of steps that count, where it is known while tracing.
      changes: what is known of how the kernel's arguments changed.
      fits: whether these are as many steps as the trace has, where only running tells; weights are NaN otherwise.
    """

    initial: Any
    inputs: Any
    length: int
    active: Any = None
    source: Any = None
    known: int | None = None
    changes: tuple[Change, ...] = ()
    fits: Any = None

    def weight(self, weights: Any) -> Score:
        """The sum of the weights of the steps that count."""
        weight = sum_active(weights, self.active)
        return weight if self.fits is None else jnp.where(self.fits, weight, jnp.nan)


class Steps(GenerativeFunction):
    """Base class of combinators over steps. A subclass says what its arguments mean: see the methods at the end.

    Attributes:
      inner: the kernel.
      variable_axes: axes of Flax collections, as in ``nn.scan``: ``{"params": 0}`` gives every step parameters of its
        own.
      split_rngs: as in ``nn.scan``.
    """

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.inner, GenerativeFunction):
            raise ArgumentError(f"`{name}` takes a generative function; got {self.inner!r:.80}. Is @gen missing?")
        # Dicts do not hash, and a module that does not hash cannot be a static part of a trace.
        for field in ("variable_axes", "split_rngs"):
            object.__setattr__(self, field, hashable(getattr(self, field)))
        super().__post_init__()

    def setup(self) -> None:
        share_inner_scope(self)

    # The interface ----------------------------------------------------------------------------------------------

    def simulate(self, key: PRNGKey, args: Arguments) -> tuple[PRNGKey, StepsTrace]:
        plan = self._plan(args)

        def step(inner: Any, args: Arguments, x: Any) -> tuple[Any, Any]:
            trace = inner.simulate(x["key"], args)[1]
            return trace.get_retval(), trace

        key, keys = split_key(key, plan.length)
        last, inner = self._run(step, plan, args, {"key": keys})
        return key, self._trace(args, plan, inner, last)

    def importance(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Score, StepsTrace]]:
        plan = self._plan(args)
        given = _Given(choices, plan)

        def step(inner: Any, args: Arguments, x: Any) -> tuple[Any, Any]:
            _, (weight, trace) = inner.importance(x["key"], x["given"], args, **call_options(strict))
            return trace.get_retval(), (weight, trace)

        key, keys = split_key(key, plan.length)
        last, (weights, inner) = self._run(step, plan, args, {"key": keys, "given": given.of_steps})
        return key, (given.weight(sum_active(weights, plan.active)), self._trace(args, plan, inner, last))

    def assess(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Any, Score]]:
        plan = self._plan(args)
        given = _Given(choices, plan)
        given.require_all()

        def step(inner: Any, args: Arguments, x: Any) -> tuple[Any, Any]:
            _, (retval, score) = inner.assess(x["key"], x["given"], args, **call_options(strict))
            return retval, (canonical(retval), score)

        keys = jax.random.split(key, plan.length)
        last, (retvals, scores) = self._run(step, plan, args, {"key": keys, "given": given.of_steps})
        return key, (self._retval(plan, retvals, last), sum_active(scores, plan.active))

    def update(
        self,
        key: PRNGKey,
        trace: Any,
        choices: ChoiceMap,
        argdiffs: Arguments,
        *,
        param_diff: Any = unknown_change,
        strict: bool = True,
    ) -> tuple[PRNGKey, tuple[Any, Score, StepsTrace, ChoiceMap]]:
        plan = self._plan_of(argdiffs, trace)
        if choices.is_empty() and self._is_unchanged(trace, argdiffs, param_diff):
            return key, (no_change(trace.get_retval()), jnp.zeros_like(trace.get_score()), trace, EmptyChoiceMap())
        args = Diff.primal(argdiffs)
        given = _Given(choices, plan)
        some = self._update_some(key, trace, plan, argdiffs, given, param_diff, strict)
        if some is not None:
            return some
        flags = _Flags.of(trace, plan, argdiffs)
        drew = [flags.fresh is not None]

        def step(inner: Any, args: Arguments, x: Any) -> tuple[Any, Any]:
            def update() -> Any:
                diffs = _marked(args, plan.changes)
                end, (_, weight, new, discard) = inner.update(
                    x["key"], x["old"], x["given"], diffs, **call_options(strict, param_diff)
                )
                drew.append(end is not x["key"])
                return weight, new, discard

            if flags.fresh is None:
                weight, new, discard = update()
                return new.get_retval(), (weight, new, discard)
            weight, new, discard = written_where(inner, ~x["fresh"], update)
            fresh_weight, fresh = written_where(
                inner, x["fresh"], lambda: inner.importance(x["key"], x["given"], args, **call_options(strict))[1]
            )
            new = _either(x["fresh"], fresh, new)
            return new.get_retval(), (where(~x["fresh"], weight, fresh_weight), new, discard)

        end, keys = split_key(key, plan.length)
        xs = {"key": keys, "given": given.of_steps, "old": trace.inner, "fresh": flags.fresh}
        last, (weights, inner, discard) = self._run(step, plan, args, xs)
        key = end if any(drew) else key
        weight = given.weight(plan.weight(weights))
        if flags.gone is not None:
            weight = weight - sum_active(trace.inner.get_score(), flags.gone)
        new = self._trace(args, plan, inner, last)
        return key, (unknown_change(new.get_retval()), weight, new, _discarded(trace, given, flags, discard))

    def regenerate(
        self,
        key: PRNGKey,
        trace: Any,
        selection: Selection,
        argdiffs: Arguments,
        *,
        param_diff: Any = unknown_change,
    ) -> tuple[PRNGKey, tuple[Any, Score, StepsTrace]]:
        plan = self._plan_of(argdiffs, trace)
        check_selection(selection, plan.length)
        if selection.is_empty and self._is_unchanged(trace, argdiffs, param_diff):
            return key, (no_change(trace.get_retval()), jnp.zeros_like(trace.get_score()), trace)
        some = self._regenerate_some(key, trace, plan, argdiffs, selection, param_diff)
        if some is not None:
            return some
        args = Diff.primal(argdiffs)
        flags = _Flags.of(trace, plan, argdiffs)
        drew = [flags.fresh is not None]
        groups = by_selection(selection, plan.length) if selection.mentions_indices else [(selection, None)]
        which = np.zeros(plan.length, np.int32)
        for number, (_, positions) in enumerate(groups):
            which[positions] = number

        def step(inner: Any, args: Arguments, x: Any) -> tuple[Any, Any]:
            def regenerate(selection: Selection) -> tuple[Any, Any]:
                diffs = _marked(args, plan.changes)
                end, (_, weight, new) = inner.regenerate(
                    x["key"], x["old"], selection, diffs, **call_options(param_diff=param_diff)
                )
                drew.append(end is not x["key"])
                return weight, new

            if len(groups) == 1 and flags.fresh is None:
                weight, new = regenerate(groups[0][0])
                return new.get_retval(), (weight, new)
            # All that steps may do is done in each, and one outcome taken: `vmap` would make that of a branch too.
            weight, new = jnp.zeros(()), x["old"]
            for number, (subselection, _) in enumerate(groups):
                here = x["which"] == number
                here = here if flags.fresh is None else here & ~x["fresh"]
                outcome = written_where(inner, here, lambda chosen=subselection: regenerate(chosen))
                weight, new = where(here, outcome[0], weight), _either(here, outcome[1], new)
            if flags.fresh is not None:
                _, fresh = written_where(inner, x["fresh"], lambda: inner.simulate(x["key"], args))
                new = _either(x["fresh"], fresh, new)
            return new.get_retval(), (weight, new)

        end, keys = split_key(key, plan.length)
        xs = {"key": keys, "old": trace.inner, "fresh": flags.fresh, "which": which}
        last, (weights, inner) = self._run(step, plan, args, xs)
        key = end if any(drew) else key
        new = self._trace(args, plan, inner, last)
        return key, (unknown_change(new.get_retval()), plan.weight(weights), new)

    def constrain(
        self, unconstrained: ChoiceMap, args: Arguments, *, fixed: ChoiceMap | None = None
    ) -> tuple[ChoiceMap, Score]:
        plan = self._plan(args)
        given, held = _Given(unconstrained, plan), _Given(choice_map(fixed), plan)
        if given.indices is not None or held.indices is not None:
            raise ChoiceMapError(
                f"`constrain` maps the choices of all steps of {show_address(current_address())}; they were given by "
                "index."
            )

        def step(inner: Any, args: Arguments, x: Any) -> tuple[Any, Any]:
            choices, log_det = inner.constrain(x["given"], args, fixed=x["held"])
            # A step's arguments depend on the choices before it only, so the Jacobian is block triangular.
            _, (retval, _) = inner.assess(x["key"], choices, args)
            return retval, (choices, log_det)

        keys = jax.random.split(jax.random.key(0), plan.length)
        xs = {"key": keys, "given": given.of_steps, "held": held.of_steps}
        _, (choices, log_det) = self._run(step, plan, args, xs)
        return vector_of_steps(choices, plan.length, plan.active), sum_active(log_det, plan.active)

    @nn.nowrap
    def variables_of(self, trace: Any) -> Mapping[str, Any]:
        of_steps = self.inner.variables_of(trace.inner) if trace.length else {}
        axes = thawed(self.variable_axes) or {}
        shared = [name for name in of_steps if axes.get(name) is None]
        first = {name: jax.tree.map(lambda leaf: leaf[0], of_steps[name]) for name in shared}
        return {**of_steps, **first}

    @nn.nowrap
    def constraints_of_steps(self, choices: ChoiceMap, plan: Plan) -> ChoiceMap:
        """The constraints of all steps of a plan, with a leading axis of its length, for who runs the kernel step by step.

        Raises:
          ChoiceMapError: if a step is certainly given nothing where others are.
        """
        given = _Given(choices, plan)
        given.require_all()
        return given.of_steps

    # What a subclass says ---------------------------------------------------------------------------------------

    @nn.nowrap
    def _plan(self, args: Arguments) -> Plan:
        """The steps that the arguments stand for."""
        raise NotImplementedError

    @nn.nowrap
    def _plan_of(self, argdiffs: Arguments, trace: Any) -> Plan:
        """The steps that new arguments of a trace stand for, as many as it has."""
        raise NotImplementedError

    @nn.nowrap
    def _arguments(self, args: Arguments, state: Any, x: Any) -> Arguments:
        """The kernel's arguments in one step."""
        raise NotImplementedError

    @nn.nowrap
    def _next(self, retval: Any) -> Any:
        """What the kernel hands to the next step, of what it returned."""
        raise NotImplementedError

    @nn.nowrap
    def _last_of(self, trace: Any) -> Any:
        """What the last step handed on, where the trace keeps it."""
        return None

    @nn.nowrap
    def _trace(self, args: Arguments, plan: Plan, inner: Trace, last: Any) -> StepsTrace:
        """The trace of the steps' traces, and of what the last of them handed on."""
        raise NotImplementedError

    @nn.nowrap
    def _retval(self, plan: Plan, retvals: Any, last: Any) -> Any:
        """The return value, of the steps' return values and what the last of them handed on."""
        raise NotImplementedError

    @nn.nowrap
    def _state_in(self, args: Arguments) -> Any:
        """The state, of a kernel's arguments."""
        raise NotImplementedError

    @nn.nowrap
    def _argdiffs(self, args: Arguments, state: Any) -> Arguments:
        """A kernel's arguments, unchanged but for the state, of which it is said."""
        raise NotImplementedError

    @nn.nowrap
    def _retdiff(self, change: StepsChange, trace: Any) -> Any:
        """The return value after some steps were run, with what is known of its change."""
        return no_change(trace.get_retval()) if change.is_unchanged() else unknown_change(trace.get_retval())

    # Of some steps ----------------------------------------------------------------------------------------------

    @nn.nowrap
    def _update_some(
        self, key: PRNGKey, trace: Any, plan: Plan, argdiffs: Arguments, given: _Given, param_diff: Change, strict: bool
    ) -> Any:
        """What `update` returns, where a few steps are given something and nothing else changed; else None."""
        if given.indices is None or given.indices.shape[0] > MAX_INDICES:
            return None
        if not self._is_unchanged(trace, argdiffs, param_diff) or not may_change_some(self, trace):
            return None
        change = StepsChange(self, trace, plan, Diff.primal(argdiffs), key)

        def update(choices: ChoiceMap) -> Any:
            options = call_options(strict, param_diff)
            return lambda key, old, diffs: self.inner.update(key, old, choices, diffs, **options)

        for position, index in enumerate(given.one_by_one()):
            choices = jax.tree.map(lambda leaf, at=position: jnp.asarray(leaf)[at], given.choices)
            runs = ((update(choices), True), (update(EmptyChoiceMap()), False))
            if not change.change(index, lambda offset, at, runs=runs: runs[min(offset, 1)]):
                return None
        discard = jax.tree.map(lambda *leaves: jnp.stack(leaves), *change.discards)
        active = trace.counts(given.indices)
        discard = vector(given.index_field, discard if active is None else masked(discard, active))
        new = self._changed(change, trace)
        return change.key, (self._retdiff(change, new), change.weight(), new, discard)

    @nn.nowrap
    def _regenerate_some(
        self, key: PRNGKey, trace: Any, plan: Plan, argdiffs: Arguments, selection: Selection, param_diff: Change
    ) -> Any:
        """What `regenerate` returns, where a few steps are selected and nothing else changed; else None."""
        indices = sorted(selection.indices)
        if not 0 < len(indices) <= MAX_INDICES or not selection[indices[-1] + 1].is_empty:
            return None
        if not self._is_unchanged(trace, argdiffs, param_diff) or not may_change_some(self, trace):
            return None
        change = StepsChange(self, trace, plan, Diff.primal(argdiffs), key)

        def regenerate(chosen: Selection) -> Any:
            def run(key: PRNGKey, old: Any, diffs: Arguments) -> Any:
                options = call_options(param_diff=param_diff)
                key, (retdiff, weight, new) = self.inner.regenerate(key, old, chosen, diffs, **options)
                return key, (retdiff, weight, new, EmptyChoiceMap())

            return run

        # In the order in which they run: a step that is redrawn weighs nothing, also where it follows one that is.
        for index in reversed(indices) if getattr(self, "reverse", False) else indices:
            if index not in change.visited and not change.change(
                index, lambda offset, at: (regenerate(selection[at]), not selection[at].is_empty)
            ):
                return None
        new = self._changed(change, trace)
        return change.key, (self._retdiff(change, new), change.weight(), new)

    @nn.nowrap
    def _changed(self, change: StepsChange, trace: Any) -> Any:
        new = trace.with_steps(change.elements.inner, change.last)
        remember(new, trace, steps=change.elements)
        return new

    # Inside -----------------------------------------------------------------------------------------------------

    @nn.nowrap
    def _is_unchanged(self, trace: Any, argdiffs: Arguments, param_diff: Change) -> bool:
        return self.knows_no_change(trace, argdiffs, param_diff if self.inner.needs_variables else no_change)

    @nn.nowrap
    def _run(self, function: Callable[..., Any], plan: Plan, args: Arguments, xs: Mapping[str, Any]) -> tuple[Any, Any]:
        """What the last step handed on, and the second results of ``function(inner, args, x)``, stacked."""
        xs = {**xs, "inputs": plan.inputs}
        if plan.active is None:

            def step(inner: Any, state: Any, x: Any) -> tuple[Any, Any]:
                retval, out = function(inner, self._arguments(args, plain(state), plain(x["inputs"])), x)
                return self._checked(self._next(retval), state), out

            return self._lifted(step, plan.length)(self.inner, plan.initial, xs)

        def step_if(inner: Any, states: Any, xs: Any) -> tuple[Any, Any]:
            (before, after), (flag, x) = states, xs
            # A step that does not count is the last one again, from the state that it was given.
            state = jax.tree.map(lambda a, b: where(flag, b, a), before, after)
            kernel_args = self._arguments(args, plain(state), plain(x["inputs"]))
            retval, out = written_where(inner, flag, lambda: function(inner, kernel_args, x))
            new = self._checked(self._next(retval), state)
            return (state, jax.tree.map(lambda a, b: where(flag, b, a), after, new)), out

        xs = jax.tree.map(lambda leaf: jnp.asarray(leaf)[plan.source], xs)
        states = (plan.initial, plan.initial)
        (_, last), out = self._lifted(step_if, plan.length)(self.inner, states, (plan.active, xs))
        return last, out

    @nn.nowrap
    def _lifted(self, function: Callable[..., Any], length: int) -> Callable[..., Any]:
        reverse = getattr(self, "reverse", False)
        if not self.inner.needs_variables:
            return lambda inner, carry, xs: jax.lax.scan(
                lambda carry, x: function(inner, carry, x), carry, xs, length=length, reverse=reverse
            )
        return scan_module(function, length, reverse, thawed(self.variable_axes), thawed(self.split_rngs))

    @nn.nowrap
    def _checked(self, new: Any, old: Any) -> Any:
        """The state that the kernel returned, in the form in which it was given one.

        Raises:
          ArgumentError: if it has another structure, shape or dtype.
        """
        new = canonical(new)
        if _form(new) != _form(old):
            raise ArgumentError(
                f"The kernel of the {type(self).__name__} at {show_address(current_address())} was given the state "
                f"{_shown(old)} and returned {_shown(new)}. A state keeps its structure, shapes and dtypes from step to "
                "step: give an initial state like the one that the kernel returns."
            )
        return new


def sum_active(scores: Any, active: Any) -> Any:
    """The sum over the steps that count."""
    return sum_elements(scores if active is None or not jnp.ndim(scores) else jnp.where(active, scores, 0))


def vector_of_steps(choices: ChoiceMap, length: int, active: Any) -> ChoiceMap:
    """The choices of the steps, those of steps that do not count absent by flag."""
    return vector(range(length), choices if active is None else masked(choices, active))


class _Given:
    """Constraints of some or all steps, and how they are handed to each.

    Attributes:
      indices: the steps that are given something, None where all are, in order.
      index_field: these, as the choice map that gave them has them.
      choices: the constraints of these steps.
      of_steps: constraints of every step, `Masked` where not every one has them.
    """

    def __init__(self, choices: ChoiceMap, plan: Plan):
        self._plan = plan
        if isinstance(choices, VectorChoiceMap) and not choices.is_empty() and not choices.covers(plan.length):
            self._check_range(choices.static_indices)
        self.choices, self.indices = given_elements(choices, plan.length)
        self.index_field = choices.indices if isinstance(choices, VectorChoiceMap) else None
        self._static = choices.static_indices if isinstance(choices, VectorChoiceMap) else None

    @property
    def of_steps(self) -> ChoiceMap:
        if self.indices is None:
            return self.choices
        flags = self._spread(jnp.ones(self.indices.shape, bool))
        return masked(jax.tree.map(self._spread, self.choices), flags)

    def one_by_one(self) -> list[Any]:
        """The indices, as numbers where they are known while tracing."""
        return [self.indices[i] for i in range(len(self.indices))] if self._static is None else list(self._static)

    def weight(self, weight: Score) -> Score:
        """The weight, NaN where an index that is known only when running is none of a step."""
        if self.indices is None or self._static is not None:
            return weight
        return weight + out_of_range(self.indices, self._plan.length)

    def require_all(self) -> None:
        """An error where a step that counts is certainly given nothing."""
        if self.indices is None or (self._plan.active is not None and self._plan.known is None):
            return
        needed = self._plan.length if self._plan.known is None else self._plan.known
        if self._static is None or not set(range(needed)) <= set(self._static):
            raise ChoiceMapError(
                f"`assess` needs the choices of all {needed} steps of {show_address(current_address())}; the choice map "
                f"gives {self.indices.shape[0]}, by index."
            )

    def _check_range(self, indices: Any) -> None:
        known = self._plan.known
        if indices is not None and known is not None and max(indices) >= known:
            raise ChoiceMapError(
                f"The choice map gives step {max(indices)} of {show_address(current_address())}, which has {known} steps "
                "(counted from 0)."
            )

    def _spread(self, leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        length = self._plan.length
        # A negative index would count from the end.
        at = jnp.where(self.indices < 0, length, self.indices)
        return jnp.zeros((length, *leaf.shape[1:]), leaf.dtype).at[at].set(leaf, mode="drop")


@dataclasses.dataclass(frozen=True)
class _Flags:
    """Which steps count before and after an update; each None where nothing is to be told apart.

    Attributes:
      kept: those that count in both.
      fresh: those that count after it only.
      gone: those that counted before it only.
    """

    kept: Any = None
    fresh: Any = None
    gone: Any = None

    @classmethod
    def of(cls, trace: StepsTrace, plan: Plan, argdiffs: Arguments) -> _Flags:
        old, new = trace.active, plan.active
        if old is None or new is None or Diff.is_unchanged(argdiffs[0]):
            return cls(kept=new)
        return cls(old & new, new & ~old, old & ~new)


def _discarded(trace: StepsTrace, given: _Given, flags: _Flags, discard: ChoiceMap) -> ChoiceMap:
    """What an update overwrote, as the steps say it, and what is gone with a step."""
    overwritten = discard if flags.kept is None else masked(discard, flags.kept)
    old = trace.inner.strip()
    if flags.gone is not None:
        return vector_of_steps(old, trace.length, flags.gone).overwrite(vector(range(trace.length), overwritten))
    if given.indices is None or not _only_given(discard, old):
        return vector(range(trace.length), overwritten)
    taken = jax.tree.map(lambda leaf: leaf[given.indices], overwritten)
    return vector(given.index_field, _settled(taken, given.choices) if flags.kept is None else taken)


def _only_given(discard: ChoiceMap, old: ChoiceMap) -> bool:
    """Whether all that is discarded was overwritten by a constraint that not every step has.

    A choice that no flag makes absent is in every step before and after, so it cannot be gone.
    """

    def value(choices: ChoiceMap, address: Any) -> Any:
        return choices.get_subtree(address).get_value()

    return all(
        isinstance(value(discard, address), Masked) and not isinstance(value(old, address), Masked)
        for address in discard.addresses()
    )


def _settled(discard: ChoiceMap, given: ChoiceMap) -> ChoiceMap:
    """Values of steps that were given one: there, unless it was itself given by a flag."""
    if isinstance(discard, VectorChoiceMap):
        return vector(discard.indices, _settled(discard.inner, given))
    if isinstance(discard, ValueChoiceMap):
        kept = isinstance(given.get_value(), Masked) or not isinstance(discard.value, Masked)
        return discard if kept else ValueChoiceMap(discard.value.value)
    return by_name({name: _settled(discard.get_submap(name), given.get_submap(name)) for name in discard.names()})


def _either(flag: Any, then: Any, otherwise: Any) -> Any:
    """One of two traces: the program is that of the first, the dtypes are those of the second."""
    pairs = zip(jax.tree.leaves(then), jax.tree.leaves(otherwise), strict=True)
    return jax.tree.structure(then).unflatten([where(flag, a.astype(b.dtype), b) for a, b in pairs])


def _marked(args: Arguments, changes: tuple[Change, ...]) -> Arguments:
    return tuple(change(value) for change, value in zip(changes, args, strict=True))


def _form(tree: Any) -> Any:
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def _shown(tree: Any) -> str:
    return str(jax.tree.map(lambda leaf: _Word(f"{leaf.dtype}{list(leaf.shape)}"), tree))


class _Word(str):
    """A string that prints without quotes."""

    def __repr__(self) -> str:
        return str(self)

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

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gjflax.combinators.elements import by_selection, check_selection, split_key
from gjflax.combinators.presence import stored_types
from gjflax.combinators.steps_change import StepsChange, regenerate_some, update_some
from gjflax.combinators.steps_discard import StepsFlags, discarded
from gjflax.combinators.steps_given import StepsGiven
from gjflax.combinators.steps_plan import Plan
from gjflax.combinators.steps_trace import StepsTrace, sum_active, vector_of_steps
from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap, choice_map
from gjflax.core.context import current_address
from gjflax.core.diff import Change, Diff, no_change, unknown_change
from gjflax.core.errors import ArgumentError, ChoiceMapError, show_address
from gjflax.core.frozen import hashable, thawed
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.lifting import scan_module, share_inner_scope, written_where
from gjflax.core.masked import where
from gjflax.core.selection import Selection
from gjflax.core.trace import Trace, canonical, plain
from gjflax.core.typing import Arguments, PRNGKey, Score
from gjflax.language.handlers import call_options


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
        given = StepsGiven(choices, plan)

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
        given = StepsGiven(choices, plan)
        given.require_all()

        def step(inner: Any, args: Arguments, x: Any) -> tuple[Any, Any]:
            _, (retval, score) = inner.assess(x["key"], x["given"], args, **call_options(strict))
            return retval, (canonical(retval), score)

        keys = jax.random.split(key, plan.length)
        last, (retvals, scores) = self._run(step, plan, args, {"key": keys, "given": given.of_steps})
        return key, (self._retval(plan, retvals, last), given.weight(sum_active(scores, plan.active)))

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
        given = StepsGiven(choices, plan)
        some = update_some(self, key, trace, plan, argdiffs, given, param_diff, strict)
        if some is not None:
            return some
        flags = StepsFlags.of(trace, plan, argdiffs)
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
        return key, (unknown_change(new.get_retval()), weight, new, discarded(trace, given, flags, discard))

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
        some = regenerate_some(self, key, trace, plan, argdiffs, selection, param_diff)
        if some is not None:
            return some
        args = Diff.primal(argdiffs)
        flags = StepsFlags.of(trace, plan, argdiffs)
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
        given, held = StepsGiven(unconstrained, plan), StepsGiven(choice_map(fixed), plan)
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
        given = StepsGiven(choices, plan)
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
                f"{stored_types(old)} and returned {stored_types(new)}. A state keeps its structure, shapes and dtypes "
                "from step to step: give an initial state like the one that the kernel returns."
            )
        return new


def _either(flag: Any, then: Any, otherwise: Any) -> Any:
    """One of two traces: the program is that of the first, the dtypes are those of the second."""
    pairs = zip(jax.tree.leaves(then), jax.tree.leaves(otherwise), strict=True)
    return jax.tree.structure(then).unflatten([where(flag, a.astype(b.dtype), b) for a, b in pairs])


def _marked(args: Arguments, changes: tuple[Change, ...]) -> Arguments:
    return tuple(change(value) for change, value in zip(changes, args, strict=True))


def _form(tree: Any) -> Any:
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]

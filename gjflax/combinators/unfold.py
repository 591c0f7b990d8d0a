r"""`Unfold`: a generative function over time, each step of which is given the state that the one before it returned.

With kernel density p(t; i, s, x), which returns the next state f(t; i, s, x), and the initial state s_0,

    p(t_1, …, t_n; n, s_0, x) = Π_i p(t_i; i − 1, s_{i−1}, x),   s_i = f(t_i; i − 1, s_{i−1}, x),

and the return value is (s_1, …, s_n) stacked. Arrays have a leading axis of the maximal length N. The number of steps
n ≤ N need not be known while tracing: then choices at or beyond n are absent by flag, their scores are no part of
any sum, and the states there repeat the last one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gjflax.combinators.steps import Steps
from gjflax.combinators.steps_change import StepsChange
from gjflax.combinators.steps_plan import Plan
from gjflax.combinators.steps_trace import StepsTrace
from gjflax.core.context import current_address
from gjflax.core.diff import Diff, no_change, unknown_change
from gjflax.core.errors import ArgumentError, show_address
from gjflax.core.interface import is_tracer
from gjflax.core.masked import where
from gjflax.core.pytree import Const
from gjflax.core.trace import Trace, canonical, plain
from gjflax.core.typing import Arguments


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class UnfoldTrace(StepsTrace):
    """The traces of the steps, as one trace with a leading axis of the maximal length."""

    @property
    def active(self) -> Any:
        """Which steps count, a flag for each; None where all certainly do."""
        length = self.args[0]
        if isinstance(length, Const):
            return None
        time = jnp.arange(self.length, dtype=length.dtype).reshape((1,) * length.ndim + (-1,))
        return time < length[..., None]

    def counts(self, index: Any) -> Any:
        length = self.args[0]
        return None if isinstance(length, Const) else index < length

    def get_retval(self) -> Any:
        states = self.inner.get_retval()
        if self.active is None:
            return states
        repeat = _repeat_last
        for _ in range(jnp.ndim(self.args[0])):
            repeat = jax.vmap(repeat)
        return plain(repeat(canonical(states), self.args[1], self.active))


def _repeat_last(states: Any, initial: Any, active: Any) -> Any:
    """The states, from the last step that counts on the one that it returned; where there is none the initial one."""
    index = jnp.arange(active.shape[0])
    index = jnp.minimum(index, jnp.maximum(jnp.sum(active) - 1, 0))
    return jax.tree.map(lambda state, first: where(active[0], state[index], first[None]), states, initial)


class Unfold(Steps):
    """A generative function over time. See the text of this file.

    It is called with ``(length, state, *args)``: the number of steps, the initial state, and arguments of all steps.

    Attributes:
      inner: the kernel, called with ``(time, state, *args)``, where time counts from 0. It returns the next state, of
        the structure, shapes and dtypes of the one it was given. Its parameters are those of the unfolding.
      max_length: the leading axis of all arrays. Where the length given is this number itself, every choice is there.
        Another one, or an array (an int32 scalar, possibly traced), may change from update to update: choices at or
        beyond it are `Masked`. One that is out of range is an error where it is known, else the nearest in range.
      variable_axes: axes of Flax collections, as in ``nn.scan``: ``{"params": 0}`` gives every step parameters of its
        own. Collections that may be written, such as "batch_stats", are carried from step to step; others are shared.
      split_rngs: as in ``nn.scan``. By default all streams but "params" are split; where "params" has an axis
        it is split too.

    Raises:
      ArgumentError: if the length is not one, or the kernel returns another kind of state than it was given.

    >>> import gjflax, jax
    >>> @gjflax.gen(gjflax.Unfold, max_length=5)
    ... def walk(time, position, scale):
    ...     return gjflax.trace("position", gjflax.Normal)(position, scale)
    >>> key, tr = walk.simulate(jax.random.key(0), (5, 0.0, 0.1))
    >>> tr["position"].shape
    (5,)
    >>> key, tr = walk.simulate(jax.random.key(0), (jnp.int32(3), 0.0, 0.1))
    >>> tr["position"].flag.tolist()
    [True, True, True, False, False]
    """

    trace_type = UnfoldTrace

    inner: Any
    max_length: int
    variable_axes: Any = None
    split_rngs: Any = None

    def __post_init__(self) -> None:
        longest = self.max_length
        if not isinstance(longest, (int, np.integer)) or isinstance(longest, bool) or longest < 1:
            raise ArgumentError(f"`max_length` of `Unfold` is a positive integer; got {longest!r:.80}.")
        super().__post_init__()

    @nn.nowrap
    def argument_names(self) -> tuple[str, ...]:
        return ("length", "state", *self.inner.argument_names()[2:])

    @nn.nowrap
    def _plan(self, args: Arguments) -> Plan:
        return self._steps(args, self._length(args), resizable=False)

    @nn.nowrap
    def _plan_of(self, argdiffs: Arguments, trace: UnfoldTrace) -> Plan:
        args = Diff.primal(argdiffs)
        length = self._length(args)
        if trace.length != self.max_length:
            raise ArgumentError(
                f"The trace at {show_address(current_address())} has room for {trace.length} steps, and this Unfold for "
                f"{self.max_length}: the structure of a trace does not change. Make a new trace with `importance`."
            )
        changes = [no_change if Diff.is_unchanged(diff) else unknown_change for diff in argdiffs[2:]]
        if trace.active is not None:
            plan = self._steps(args, length, resizable=True)
            return dataclasses.replace(plan, changes=(no_change, unknown_change, *changes))
        plan = self._steps(args, self.max_length, resizable=False)
        plan = dataclasses.replace(plan, changes=(no_change, unknown_change, *changes))
        if is_tracer(length):
            return dataclasses.replace(plan, fits=length == self.max_length)
        if int(length) != self.max_length:
            raise ArgumentError(
                f"The trace at {show_address(current_address())} was made with the length {self.max_length}, a number that "
                f"is known while tracing and the maximal one, and its new length is {int(length)}. The structure of a "
                f"trace does not change: make one whose length may change with an array, `jnp.int32({self.max_length})`."
            )
        return plan

    @nn.nowrap
    def _steps(self, args: Arguments, length: Any, resizable: bool) -> Plan:
        longest = int(self.max_length)
        time = np.arange(longest, dtype=np.int32)
        known = length if isinstance(length, int) else None
        initial = canonical(args[1])
        if known == longest and not resizable:
            return Plan(initial, time, longest, known=known)
        last = jnp.maximum(jnp.asarray(length, jnp.int32) - 1, 0)
        return Plan(initial, time, longest, time < length, jnp.minimum(time, last), known)

    @nn.nowrap
    def _length(self, args: Arguments) -> Any:
        """The number of steps: an int where it was given as one, else an array."""
        at = show_address(current_address())
        if len(args) < 2:
            raise ArgumentError(
                f"The Unfold at {at} takes (length, state, *args): the number of steps, the initial state, and arguments "
                f"of the kernel; got {len(args)} arguments."
            )
        length = args[0]
        is_number = isinstance(length, (int, np.integer)) and not isinstance(length, bool)
        is_array = isinstance(length, (jax.Array, np.ndarray)) and not isinstance(length, np.generic)
        if not is_number and not (
            is_array and jnp.shape(length) == () and jnp.issubdtype(jnp.result_type(length), jnp.integer)
        ):
            raise ArgumentError(
                f"The first argument of the Unfold at {at} is its length, an integer or an integer scalar array; got "
                f"{length!r:.80}."
            )
        if not is_tracer(length) and not 0 <= int(length) <= self.max_length:
            raise ArgumentError(
                f"The length of the Unfold at {at} is {int(length)}; it is at least 0 and at most `max_length`, "
                f"{self.max_length}."
            )
        if is_number:
            return int(length)
        return jnp.clip(jnp.asarray(length).astype(jnp.int32), 0, self.max_length)

    @nn.nowrap
    def _arguments(self, args: Arguments, state: Any, x: Any) -> Arguments:
        return (x, state, *_indexable(args[2:]))

    @nn.nowrap
    def _state_in(self, args: Arguments) -> Any:
        return args[1]

    @nn.nowrap
    def _argdiffs(self, args: Arguments, state: Any) -> Arguments:
        return (no_change(args[0]), state, *Diff.mark(_indexable(args[2:]), no_change))

    @nn.nowrap
    def _retdiff(self, change: StepsChange, trace: UnfoldTrace) -> Any:
        # Of a length that is not known the last state is repeated, so it may change in many places.
        if trace.active is None:
            return change.retdiff(trace.get_retval())
        return super()._retdiff(change, trace)

    @nn.nowrap
    def _next(self, retval: Any) -> Any:
        return retval

    @nn.nowrap
    def _trace(self, args: Arguments, plan: Plan, inner: Trace, last: Any) -> UnfoldTrace:
        if plan.active is None:
            length: Any = Const(plan.length)
        else:
            length = canonical(jnp.asarray(self._length(args), jnp.int32))
        return UnfoldTrace(self.as_unbound(), (length, *canonical(args[1:])), inner, plan.length)

    @nn.nowrap
    def _retval(self, plan: Plan, retvals: Any, last: Any) -> Any:
        return plain(retvals if plan.active is None else _repeat_last(retvals, plan.initial, plan.active))


def _indexable(args: Arguments) -> Arguments:
    """Arguments that a kernel may index by the time, which is known to JAX alone, and not to NumPy."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, args)

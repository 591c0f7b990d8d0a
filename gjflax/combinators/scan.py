r"""`Scan`: a generative function over inputs, each step of which is given what the one before it carried on.

With kernel density p(t; c, x), which returns the next carry and an output, (g(t; c, x), f(t; c, x)), and the initial
carry c_0,

    p(t_1, …, t_n; c_0, x) = Π_i p(t_i; c_{i−1}, x_i),   c_i = g(t_i; c_{i−1}, x_i),

and the return value is c_n and the outputs stacked, as of ``jax.lax.scan``. Choices are those of the kernel, with a
leading axis of n.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from gjflax.combinators.steps import Steps
from gjflax.combinators.steps_plan import Plan
from gjflax.combinators.steps_trace import StepsTrace
from gjflax.core.context import current_address
from gjflax.core.diff import Diff, no_change, unknown_change
from gjflax.core.errors import ArgumentError, show_address
from gjflax.core.trace import Trace, canonical, leafwise, plain
from gjflax.core.typing import Arguments


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ScanTrace(StepsTrace):
    """The traces of the steps, as one trace with a leading axis, and the last carry."""

    carry: Any

    def with_steps(self, inner: Trace, last: Any) -> Any:
        return self.replace(inner=inner, carry=last)

    def chosen(self, accepted: Any, old: Any) -> Trace:
        new: Any = super().chosen(accepted, old)
        return new.replace(carry=leafwise(accepted, self.carry, old.carry))

    def get_retval(self) -> Any:
        _, outputs = self.inner.get_retval()
        return plain(self.carry), outputs


class Scan(Steps):
    """A generative function over inputs, with a carry. See the text of this file.

    It is called with ``(carry, xs)``, as ``jax.lax.scan`` is: the initial carry, and the inputs, a pytree of arrays
    with a leading axis, or None.

    Attributes:
      inner: the kernel, called with ``(carry, x)``. It returns ``(carry, y)``, a carry of the structure, shapes and
        dtypes of the one it was given. Its parameters are those of the scan.
      length: the number of steps, needed where there are no inputs.
      reverse: whether the steps run from the last input to the first.
      variable_axes: axes of Flax collections, as in ``nn.scan``: ``{"params": 0}`` gives every step parameters of its
        own. Collections that may be written, such as "batch_stats", are carried from step to step; others are shared.
      split_rngs: as in ``nn.scan``. By default all streams but "params" are split; where "params" has an axis
        it is split too.

    Raises:
      ArgumentError: if the inputs have different lengths, or the kernel returns another kind of carry than it was
        given.

    >>> import gjflax, jax, jax.numpy as jnp
    >>> @gjflax.gen(gjflax.Scan)
    ... def autoregression(level, x):
    ...     level = 0.5 * level + x
    ...     return level, gjflax.trace("y", gjflax.Normal)(level, 0.1)
    >>> key, tr = autoregression.simulate(jax.random.key(0), (1.0, jnp.arange(3.0)))
    >>> level, ys = tr.get_retval()
    >>> float(level), ys.shape, tr["y"].shape
    (2.625, (3,), (3,))
    """

    trace_type = ScanTrace

    inner: Any
    length: int | None = None
    reverse: bool = False
    variable_axes: Any = None
    split_rngs: Any = None

    def __post_init__(self) -> None:
        length = self.length
        if length is not None and (not isinstance(length, (int, np.integer)) or isinstance(length, bool) or length < 0):
            raise ArgumentError(f"`length` of `Scan` is an integer, at least 0; got {length!r:.80}.")
        if not isinstance(self.reverse, bool):
            raise ArgumentError(f"`reverse` of `Scan` is True or False; got {self.reverse!r:.80}.")
        super().__post_init__()

    @nn.nowrap
    def argument_names(self) -> tuple[str, ...]:
        return ("carry", "xs")

    @nn.nowrap
    def _plan(self, args: Arguments) -> Plan:
        if len(args) != 2:
            raise ArgumentError(
                f"The Scan at {show_address(current_address())} takes (carry, xs): the initial carry, and inputs with a "
                f"leading axis or None; got {len(args)} arguments."
            )
        carry, xs = canonical(args)
        return Plan(carry, xs, self._number_of_steps(xs))

    @nn.nowrap
    def _plan_of(self, argdiffs: Arguments, trace: ScanTrace) -> Plan:
        plan = self._plan(Diff.primal(argdiffs))
        if plan.length != trace.length:
            raise ArgumentError(
                f"The Scan's trace at {show_address(current_address())} has {trace.length} steps, and its new arguments "
                f"{plan.length}: the structure of a trace does not change. Make a new trace with `importance`."
            )
        inputs = no_change if Diff.is_unchanged(argdiffs[1]) else unknown_change
        return dataclasses.replace(plan, changes=(unknown_change, inputs))

    @nn.nowrap
    def _number_of_steps(self, xs: Any) -> int:
        at = show_address(current_address())
        lengths = {} if self.length is None else {"`length`": int(self.length)}
        for path, leaf in jax.tree_util.tree_flatten_with_path(xs)[0]:
            name = f"xs{jax.tree_util.keystr(path)}"
            if not leaf.ndim:
                raise ArgumentError(f"The inputs of the Scan at {at} have a leading axis, and {name} has shape ().")
            lengths[name] = leaf.shape[0]
        if not lengths:
            raise ArgumentError(f"The Scan at {at} has no inputs, so its length is unknown: give `length`.")
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
            raise ArgumentError(f"The inputs of the Scan at {at} have different lengths ({listed}).")
        return next(iter(lengths.values()))

    @nn.nowrap
    def _arguments(self, args: Arguments, state: Any, x: Any) -> Arguments:
        return state, x

    @nn.nowrap
    def _state_in(self, args: Arguments) -> Any:
        return args[0]

    @nn.nowrap
    def _argdiffs(self, args: Arguments, state: Any) -> Arguments:
        return state, no_change(args[1])

    @nn.nowrap
    def _last_of(self, trace: ScanTrace) -> Any:
        return trace.carry

    @nn.nowrap
    def _next(self, retval: Any) -> Any:
        if not isinstance(retval, tuple) or len(retval) != 2:
            raise ArgumentError(
                f"The kernel of the Scan at {show_address(current_address())} returns the next carry and an output, "
                f"(carry, y); got {type(retval).__name__}."
            )
        return retval[0]

    @nn.nowrap
    def _trace(self, args: Arguments, plan: Plan, inner: Trace, last: Any) -> ScanTrace:
        return ScanTrace(self.as_unbound(), canonical(args), inner, plan.length, last)

    @nn.nowrap
    def _retval(self, plan: Plan, retvals: Any, last: Any) -> Any:
        return plain((last, retvals[1]))

r"""The `Unfold` that a generative function is, or wraps: what a particle filter runs step by step.

A wrapper gives an `Unfold` its arguments: a `TrainCombinator` its parameters, a `Dimap` what its function computes, a body
with a single `trace` statement whatever networks make of the body's own arguments.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gjflax.combinators.dimap import Dimap
from gjflax.combinators.map import Map
from gjflax.combinators.train import TrainCombinator
from gjflax.combinators.unfold import Unfold
from gjflax.core.context import current_address
from gjflax.core.errors import ArgumentError, show_address
from gjflax.core.frozen import thawed
from gjflax.core.lifting import SOWN
from gjflax.core.pytree import static_field
from gjflax.core.trace import canonical
from gjflax.core.typing import Arguments, PRNGKey
from gjflax.language.gen import GenModule
from gjflax.language.handlers import Handler, run_body


@dataclasses.dataclass(frozen=True)
class Found:
    """What stands in a generative function, called with some arguments.

    Attributes:
      function: an `Unfold`, or a `Map` of what has one; bound to the scope in which it stands.
      args: the arguments that it is called with.
      address: where it stands, `()` at the root.
    """

    function: Any
    args: Arguments
    address: tuple[Any, ...] = ()


class Pair(nn.Module):
    """A model and a guide, side by side in a module, so that a lifted transformation has the scopes of both."""

    model: Any
    guide: Any


def find(side: str, function: Any, args: Arguments, key: PRNGKey) -> Found:
    """The `Unfold`, or the `Map` of one, that a generative function is or wraps.

    Args:
      side: what it is, for messages: "model" or "guide".
      function: a generative function, bound.
      args: its arguments.
      key: a random key.

    Raises:
      ArgumentError: if it is something else, or has choices beside those of the `Unfold`.
    """
    # Flax runs `setup`, which puts what is inside in its scope, when a method is called; here none is.
    function._try_setup()
    if isinstance(function, (Unfold, Map)):
        return Found(function, args)
    if isinstance(function, TrainCombinator):
        return find(side, function.inner, (*args, function._values()), key)
    if isinstance(function, Dimap):
        return find(side, function.inner, function._before(args), key)
    if isinstance(function, GenModule) and not type(function).body_is_lifted:
        callees: list[Found] = []
        run_body(function, _Find(key, side, callees), args)
        if callees:
            outer = callees[0]
            inner = find(side, outer.function, outer.args, key)
            return dataclasses.replace(inner, address=(*outer.address, *inner.address))
    raise ArgumentError(
        _not_unfold(
            side, f"it is a {_title(function)}" + (" without any choice" if isinstance(function, GenModule) else "")
        )
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Find(Handler):
    """Keeps the one callee of a body with its arguments, and runs nothing."""

    key: Any
    side: str = static_field()
    callees: list[Found] = static_field()

    def call(self, address: Any, callee: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
        inner: Any = callee
        while isinstance(inner, (TrainCombinator, Dimap, Map)):
            inner = inner.inner
        if not isinstance(inner, (Unfold, GenModule)):
            raise ArgumentError(
                _not_unfold(
                    self.side, f"its choice at {show_address(current_address())} is outside of one ({_title(callee)})"
                )
            )
        if self.callees:
            raise ArgumentError(
                _not_unfold(self.side, f"it has another part at {show_address(current_address())} ({_title(callee)})")
            )
        self.callees.append(Found(callee, args, address))
        return _no_states(callee, args), None

    def outcome(self) -> Any:
        return ()


def _no_states(callee: Any, args: Arguments) -> Any:
    """What the body is given for the states, on which no density depends: of their form, the initial ones."""
    if not isinstance(callee, Unfold) or len(args) < 2:
        return None
    length = int(callee.max_length)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (length, *leaf.shape)), canonical(args[1]))


def _not_unfold(side: str, cause: str) -> str:
    return (
        f"The {side} of an SMCObjective is an `Unfold`, whose steps its particles are resampled between, and {cause}. Give an "
        "`Unfold`; or one in a `Map` over independent sequences, a `TrainCombinator`, a `Dimap`, or a body with no other "
        "choice. For other programs use `ImportanceWeightedELBO`."
    )


def _title(function: Any) -> str:
    return getattr(function, "label", None) or getattr(
        getattr(function, "source", None), "__name__", type(function).__name__
    )


def at_step(unfold: Unfold, time: Any, run: Any) -> Any:
    """``run(kernel)``, of a kernel with the variables of a step: those of `variable_axes` have an axis of the steps."""
    unfold._try_setup()
    for name, axis in (thawed(unfold.variable_axes) or {}).items():
        if axis is not None and name not in SOWN:
            run = _with_step_of(run, name, axis, time, unfold)
    return run(unfold.inner)


def _with_step_of(run: Any, name: str, axis: int, time: Any, unfold: Unfold) -> Any:
    if unfold.inner.is_mutable_collection(name):
        raise ArgumentError(
            f"The Unfold at {show_address(current_address())} has an axis of its steps in the collection {name!r}, which may be "
            "written: an SMCObjective reads such variables only."
        )
    lift: Any = nn.map_variables
    return lift(run, name, trans_in_fn=lambda part: jax.tree.map(lambda leaf: jnp.take(leaf, time, axis=axis), part))

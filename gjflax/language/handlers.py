r"""What a `trace` statement does: one handler for each method of the interface.

A body runs under a handler. At each ``trace(address, callee)(*args)`` the handler calls the callee's own method of
the same name with what concerns it (its constraints, its old trace, its part of the selection), keeps the results
by address, and gives the callee's return value back to the body. When the body has ended, the scores and weights
are sums over its callees:

    log p(t; x) = Σ_address log p_callee(t[address]; args(address))

Handlers are pytrees and their results are returned, not stored: so a body may run inside a lifted transformation
(``nn.remat``), through which values pass only as arguments and results.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap, choice_map
from gjflax.core.context import current_address, running, shown
from gjflax.core.diff import Change, unknown_change
from gjflax.core.errors import (
    DuplicateAddressError,
    TraceTransformError,
    UnvisitedConstraintError,
    nearest,
    show_address,
)
from gjflax.core.keys import KeySource
from gjflax.core.pytree import Pytree, static_field
from gjflax.core.trace import canonical, total
from gjflax.core.typing import Arguments

Path = tuple[str, ...]


class Handler(Pytree):
    """Base class. A subclass says what happens at one callee, and what the body's run amounts to."""

    key: Any

    def begin(self) -> None:
        """Start a run: forget what an earlier one left."""
        object.__setattr__(self, "visited", {})
        object.__setattr__(self, "depth", 1)
        object.__setattr__(self, "keys", KeySource(self.key))

    def visit(self, address: Path, callee: Any, args: tuple[Any, ...]) -> Any:
        """One `trace` statement: the callee's return value."""
        visited = self._records
        if address in visited or self._overlaps(address):
            raise DuplicateAddressError(
                f"The address {show_address(current_address())} is used twice in one body (or one use is a prefix of another). "
                'Give each choice an address of its own, in a loop f"z{i}", or map the callee with `Map`.'
            )
        retval, visited[address] = self.call(address, callee, args)
        return retval

    def call(self, address: Path, callee: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
        """The callee's return value, and what is kept of it."""
        raise NotImplementedError

    def outcome(self) -> Any:
        """The results of the run, a pytree."""
        raise NotImplementedError

    def _overlaps(self, address: Path) -> bool:
        """Whether the address and one that was visited are prefixes of each other."""
        depth = max(self.depth, len(address))  # pyright: ignore[reportAttributeAccessIssue]
        object.__setattr__(self, "depth", depth)
        if depth == 1:
            return False
        return any(address[: len(other)] == other[: len(address)] for other in self._records)

    def _key(self, address: Path) -> Any:
        return self.keys.at(address)  # pyright: ignore[reportAttributeAccessIssue]

    def _end(self) -> Any:
        return self.keys.end()  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def _records(self) -> dict[Path, Any]:
        return self.visited  # pyright: ignore[reportAttributeAccessIssue]


def run_body(module: Any, handler: Handler, args: Arguments) -> tuple[Any, Any]:
    """Run a module's body under a handler: its return value, and the handler's outcome."""
    if type(module).body_is_mapped_by is not None:
        raise TraceTransformError(_mapped(type(module)))
    if type(module).body_is_lifted:
        # The transformation lets values through only as arguments and results; so goes the handler.
        # Outside of jit it gives constants back as NumPy-like arrays, which would be another type to `jax.jit`.
        return jax.tree.map(jnp.asarray, module(*args, handler))
    handler.begin()
    with running(module, handler):
        retval = module(*args)
        return canonical(retval), handler.outcome()


def _mapped(kind: Any) -> str:
    name, by = kind.__name__, kind.body_is_mapped_by
    combinator = "Map" if by == "nn.vmap" else "Scan"
    return (
        f"`{name}` at {show_address(current_address())} is a body under {by}: its choices would have an axis more than their "
        f"addresses say. Write `{combinator}(Model())`, which has the parameters of `Model()` and takes `variable_axes` and "
        f"`split_rngs`; or lift the methods of the interface, `{by}(Model, methods=['simulate', 'assess'], ...)`, with a key "
        f"for each element. As a layer, by `__call__`, `{name}` may be used as it is."
    )


def check_visited(choices: ChoiceMap, visited: dict[Path, Any], strict: bool) -> None:
    """An error for constraints that no callee of the running body was asked about."""
    if not strict or choices.is_empty():
        return
    if choices.is_value():
        raise UnvisitedConstraintError(
            f"A value was given for {show_address(shown(()))}, which is a generative function with choices of its own, "
            f"not a single choice. {nearest('', visited)}"
        )
    lengths = sorted({len(path) for path in visited})
    for address in choices.addresses():
        if not any(address[:length] in visited for length in lengths):
            near = nearest(shown(address[: max(lengths, default=0)]), map(shown, visited))
            raise UnvisitedConstraintError(
                f"A value was given for {show_address(shown(address))}, which is not a choice of this generative "
                f"function. {near} To ignore what is not used, pass strict=False."
            )


def call_options(strict: bool = True, param_diff: Change = unknown_change) -> dict[str, Any]:
    """The options that differ from what every generative function assumes."""
    return ({} if strict else {"strict": False}) | ({} if param_diff is unknown_change else {"param_diff": param_diff})


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Simulate(Handler):
    """Every callee simulates."""

    key: Any

    def call(self, address: Path, callee: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
        _, trace = callee.simulate(self._key(address), args)
        return trace.get_retval(), trace

    def outcome(self) -> Any:
        return self._end(), dict(self._records)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Importance(Handler):
    """Every callee runs by importance under its constraints; the weights add up."""

    key: Any
    choices: ChoiceMap
    strict: bool = static_field(default=True)

    def call(self, address: Path, callee: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
        below = self.choices.get_subtree(address)
        key = self._key(address)
        if below.is_empty():
            _, trace = callee.simulate(key, args)
            return trace.get_retval(), (None, trace)
        _, (weight, trace) = callee.importance(key, below, args, **call_options(self.strict))
        return trace.get_retval(), (weight, trace)

    def outcome(self) -> Any:
        check_visited(self.choices, self._records, self.strict)
        weight = total([weight for weight, _ in self._records.values() if weight is not None])
        return self._end(), weight, {address: trace for address, (_, trace) in self._records.items()}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Assess(Handler):
    """Every callee assesses its choices; the scores add up. Nothing is drawn."""

    key: Any
    choices: ChoiceMap
    strict: bool = static_field(default=True)

    def call(self, address: Path, callee: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
        key = self._key(address) if callee.needs_variables else self.key
        _, (retval, score) = callee.assess(key, self.choices.get_subtree(address), args, **call_options(self.strict))
        return retval, score

    def outcome(self) -> Any:
        check_visited(self.choices, self._records, self.strict)
        return self.key, total(list(self._records.values()))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Constrain(Handler):
    """Every callee maps its choices from R^n; the log determinants add up, for a callee's arguments depend only on
    choices before it, so the Jacobian is block triangular."""

    key: Any
    unconstrained: ChoiceMap
    fixed: ChoiceMap

    def call(self, address: Path, callee: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
        choices, log_det = callee.constrain(
            self.unconstrained.get_subtree(address), args, fixed=self.fixed.get_subtree(address)
        )
        _, (retval, _) = callee.assess(self._key(address), choices, args)
        return retval, (choices, log_det)

    def outcome(self) -> Any:
        for given in (self.unconstrained, self.fixed):
            check_visited(given, self._records, True)
        result: ChoiceMap = EmptyChoiceMap()
        for address, (choices, _) in self._records.items():
            result = result.merge(choice_map({address: choices}))
        return result, total([log_det for _, log_det in self._records.values()])

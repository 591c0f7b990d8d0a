r"""`CallAt`: a call of a generative function at an address that is computed.

With inner density p(t; x) and a key k,

    p(t at k; x, k) = p(t; x),   retval f(t, x):

the key says where the choices stand, and their density does not depend on it. A key is a name, which is part of the
program, or an integer, which may be traced. The choices at an integer are a vector of choices with one index.

When the key changes, the call at the old key is gone and there is a new one. With s the old score of the call, and s' the
new scores of its choices,

============  ============================================  ===========================
the key is    in `update` adds                              in `regenerate` adds
============  ============================================  ===========================
as before     what the inner function's `update` adds       what its `regenerate` adds
another one   Σ s' over what is given at the new key  − s   0
============  ============================================  ===========================

and everything at the old key is discarded. Nothing is carried over from one key to another: it is another call.

Whether an integer key changed is not known while tracing, so both happen in the branches of a conditional, and what is
discarded only if it did is masked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from gjflax.combinators.branching import like
from gjflax.combinators.elements import flag_each, traced_indices
from gjflax.combinators.presence import choose, either, flagged, given, present, types
from gjflax.core.choice_map import (
    BuiltinChoiceMap,
    ChoiceMap,
    EmptyChoiceMap,
    VectorChoiceMap,
    by_name,
    choice_map,
    masked,
    vector,
)
from gjflax.core.context import current_address
from gjflax.core.diff import Change, Diff, unknown_change
from gjflax.core.errors import ArgumentError, SelectionError, UnvisitedConstraintError, show_address
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.indices import nan_where_repeated
from gjflax.core.lifted_switch import switch
from gjflax.core.lifting import share_inner_scope
from gjflax.core.masked import both
from gjflax.core.outline import Part, Site
from gjflax.core.pytree import STATIC, Const
from gjflax.core.selection import Selection
from gjflax.core.trace import Trace, WrappedTrace, also_of_template, leafwise, total
from gjflax.core.typing import Address, Arguments, PRNGKey, Score
from gjflax.language.handlers import call_options


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CallAtTrace(WrappedTrace):
    """The trace of the call, and the key: a `Const` of a name, or an array with one index."""

    gen_fn: Any = dataclasses.field(metadata=STATIC)
    stored_key: Any
    inner: Trace

    @property
    def call_key(self) -> Any:
        """The key: a name, or an integer as an array."""
        return self.stored_key.value if isinstance(self.stored_key, Const) else self.stored_key[..., 0]

    def get_gen_fn(self) -> Any:
        return self.gen_fn

    def get_args(self) -> Arguments:
        # Those that the call takes: parameters that the inner function adds to its own are not among them.
        return (*self.inner.get_gen_fn()._arguments_of(self.inner), self.call_key)

    def project(self, selection: Selection) -> Score:
        below = _subselections(selection, self.call_key)
        parts = [self.inner.project(part) for part in below.parts]
        if len(parts) == 1:
            return parts[0]
        number = below.number(self.call_key)
        zero = jnp.zeros_like(self.get_score())
        return total([jnp.where(number == i, part, zero) for i, part in enumerate(parts)])

    @also_of_template
    def strip(self) -> ChoiceMap:
        return _at_key(self.inner.strip(), self.stored_key)

    def leaves(self, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Trace]]:
        if isinstance(self.stored_key, Const):
            return self.inner.leaves((*prefix, self.stored_key.value))
        # As in a map of one element: the traces have its axis, as the choices do.
        return _with_axis(self.inner, self.stored_key).leaves(prefix)

    def unconstrain(self, selection: Selection) -> tuple[ChoiceMap, Score]:
        below = _subselections(selection, self.call_key).parts
        if len(below) > 1:
            if isinstance(self.stored_key, Tracer) or self.stored_key.ndim > 1:
                raise SelectionError(
                    f"The selection names elements {sorted(selection.indices)} of {show_address(current_address())}, where "
                    "the key of a call is not known while tracing, so it is not known whether `unconstrain` maps its "
                    "choices. Select without an index."
                )
            below = [selection[int(self.call_key)]]
        choices, log_det = self.inner.unconstrain(below[0])
        return _at_key(choices, self.stored_key), log_det

    def outline(self, prefix: tuple[Any, ...] = ()) -> tuple[Part, ...]:
        if isinstance(self.stored_key, Const):
            return self.inner.outline((*prefix, self.stored_key.value))
        return tuple(Site(address, leaf) for address, leaf in self.leaves(prefix))

    def get_subtree(self, address: Address) -> Any:
        return self.strip().get_subtree(address)

    def chosen(self, accepted: Any, old: Any) -> Trace:
        stored_key = leafwise(accepted, self.stored_key, old.stored_key)
        return CallAtTrace(self.gen_fn, stored_key, self.inner.chosen(accepted, old.inner))


class CallAt(GenerativeFunction):
    """A call of a generative function at an address that is an argument: called with ``(*args, key)``.

    The key is a string, or an integer from 0, static or traced. The choices stand below it: ``tr["left", "x"]``, or
    ``tr[3, "x"]``, where a traced key is taken to be 3.

    Constraints are those at the key, ``{(3, "x"): 1.0}``. Where the key is a string or a Python integer, a constraint at
    another key is an error. Where it is an array it is not known while tracing: what is given at the index that it turns
    out to be counts, and the rest is ignored, so one can give ``{0: a, 1: b, 2: c}`` and let a choice decide. A selection
    by index picks the call where the key is that index.

    Attributes:
      inner: the generative function that is called. Its parameters are those of the whole.

    Raises:
      ArgumentError: if there is no key, or it is neither a string nor an integer scalar from 0.
      UnvisitedConstraintError: if a constraint certainly stands at another key.

    >>> import gjflax, jax, jax.numpy as jnp
    >>> @gjflax.gen
    ... def point(scale):
    ...     x = gjflax.trace("x", gjflax.Normal)(0.0, scale)
    ...     return gjflax.trace("y", gjflax.Normal)(x, scale)
    >>> call = gjflax.CallAt(point)
    >>> key, (weight, tr) = call.importance(jax.random.key(0), {(3, "x"): 1.5}, (1.0, 3))
    >>> tr[3, "x"]
    Array(1.5, dtype=float32)

    At another key it is another call, with choices of its own:

    >>> key, (_, weight, new, discard) = call.update(key, tr, {}, (1.0, 4))
    >>> bool(new[4, "x"] == 1.5), bool(weight == -tr.get_score()), discard[3, "x"].unmask(0.0)
    (False, True, Array(1.5, dtype=float32))
    """

    trace_type = CallAtTrace

    inner: Any

    def __post_init__(self) -> None:
        self._check_inner()
        super().__post_init__()

    def setup(self) -> None:
        share_inner_scope(self)

    @property
    def needs_variables(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the inner function does."""
        return self.inner.needs_variables

    @nn.nowrap
    def _check_inner(self) -> None:
        if not isinstance(self.inner, GenerativeFunction):
            raise ArgumentError(f"`CallAt` takes a generative function; got {self.inner!r:.80}. Is @gen missing?")

    # The interface ----------------------------------------------------------------------------------------------

    def simulate(self, key: PRNGKey, args: Arguments) -> tuple[PRNGKey, CallAtTrace]:
        stored = self._stored_key(args)
        key, inner = self.inner.simulate(key, args[:-1])
        return key, self._trace(stored, inner)

    def importance(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Score, CallAtTrace]]:
        stored = self._stored_key(args)
        below = masked(*self._given(choices, args, strict))
        key, (weight, inner) = self.inner.importance(key, below, args[:-1], **call_options(strict))
        return key, (nan_where_repeated(weight, traced_indices(choices)), self._trace(stored, inner))

    def assess(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Any, Score]]:
        self._stored_key(args)
        below, there = self._given(choices, args, strict)
        key, (retval, score) = self.inner.assess(key, below, args[:-1], **call_options(strict))
        return key, (retval, nan_where_repeated(_known_where(there, score), traced_indices(choices)))

    def update(
        self,
        key: PRNGKey,
        trace: Any,
        choices: ChoiceMap,
        argdiffs: Arguments,
        *,
        param_diff: Change = unknown_change,
        strict: bool = True,
    ) -> tuple[PRNGKey, tuple[Any, Score, CallAtTrace, ChoiceMap]]:
        args = Diff.primal(argdiffs)
        stored = self._stored_key(args)
        below = masked(*self._given(choices, args, strict))
        moved = _has_moved(trace.stored_key, stored, argdiffs[-1])
        if moved is False:
            options = call_options(strict, param_diff)
            key, (retdiff, weight, inner, discard) = self.inner.update(
                key, trace.inner, below, argdiffs[:-1], **options
            )
            new = self._trace(trace.stored_key, inner)
            weight = nan_where_repeated(weight, traced_indices(choices))
            return key, (retdiff, weight, new, _at_key(discard, trace.stored_key))
        key, once = jax.random.split(key)

        def stay(inner: Any, key: PRNGKey, old: Trace, below: ChoiceMap, argdiffs: Any) -> Any:
            _, (_, weight, new, discard) = inner.update(key, old, below, argdiffs, **call_options(strict, param_diff))
            return like(new, old), weight, discard

        def move(inner: Any, key: PRNGKey, old: Trace, below: ChoiceMap, argdiffs: Any) -> Any:
            args = Diff.primal(argdiffs)
            _, (weight, new) = inner.importance(key, below, args, **call_options(strict))
            return like(new, old), total([weight, -old.get_score()]), EmptyChoiceMap()

        operands = (once, trace.inner, below, argdiffs[:-1])
        old = trace.inner.strip()
        if moved is True:
            inner, weight, _ = move(self.inner, *operands)
            discard = old
        else:
            results = self._one_of([stay, move], moved.astype(np.int32), operands)
            inner, weight = choose([~moved, moved], [(new, weight) for new, weight, _ in results])
            there, overwritten = present(old), given(old, results[0][2])
            discard = flagged(old, {a: both(flag, either(moved, overwritten[a])) for a, flag in there.items()})
        new, weight = self._trace(stored, inner), nan_where_repeated(weight, traced_indices(choices))
        return key, (unknown_change(new.get_retval()), weight, new, _at_key(discard, trace.stored_key))

    def regenerate(
        self,
        key: PRNGKey,
        trace: Any,
        selection: Selection,
        argdiffs: Arguments,
        *,
        param_diff: Change = unknown_change,
    ) -> tuple[PRNGKey, tuple[Any, Score, CallAtTrace]]:
        args = Diff.primal(argdiffs)
        stored = self._stored_key(args)
        below = _subselections(selection, args[-1])
        moved = _has_moved(trace.stored_key, stored, argdiffs[-1])
        options = call_options(param_diff=param_diff)
        if moved is False and len(below.parts) == 1:
            key, (retdiff, weight, inner) = self.inner.regenerate(
                key, trace.inner, below.parts[0], argdiffs[:-1], **options
            )
            return key, (retdiff, weight, self._trace(trace.stored_key, inner))
        key, once = jax.random.split(key)

        def stay(part: Selection) -> Callable[..., Any]:
            def run(inner: Any, key: PRNGKey, old: Trace, argdiffs: Any) -> Any:
                _, (_, weight, new) = inner.regenerate(key, old, part, argdiffs, **options)
                return like(new, old), weight

            return run

        def move(inner: Any, key: PRNGKey, old: Trace, argdiffs: Any) -> Any:
            _, new = inner.simulate(key, Diff.primal(argdiffs))
            return like(new, old), jnp.zeros_like(old.get_score())

        operands = (once, trace.inner, argdiffs[:-1])
        if moved is True:
            _, inner = self.inner.simulate(once, args[:-1])
            weight = jnp.zeros_like(inner.get_score())
        else:
            functions = [stay(part) for part in below.parts]
            number = below.number(args[-1])
            if moved is not False:
                number = jnp.where(moved, np.int32(len(functions)), number)
                functions.append(move)
            results = self._one_of(functions, number, operands)
            inner, weight = choose([number == i for i in range(len(results))], results)
        new = self._trace(stored, inner)
        return key, (unknown_change(new.get_retval()), weight, new)

    def constrain(
        self, unconstrained: ChoiceMap, args: Arguments, *, fixed: ChoiceMap | None = None
    ) -> tuple[ChoiceMap, Score]:
        stored = self._stored_key(args)
        below, there = self._given(unconstrained, args)
        held, held_there = self._given(choice_map(fixed), args)
        choices, log_det = self.inner.constrain(below, args[:-1], fixed=held)
        return _at_key(choices, stored), _known_where(both(there, held_there), log_det)

    @nn.nowrap
    def variables_of(self, trace: Any) -> Mapping[str, Any]:
        return self.inner.variables_of(trace.inner)

    # Inside -----------------------------------------------------------------------------------------------------

    @nn.nowrap
    def _trace(self, stored: Any, inner: Trace) -> CallAtTrace:
        return CallAtTrace(self.as_unbound(), stored, inner)

    @nn.nowrap
    def _stored_key(self, args: Arguments) -> Any:
        """The key, checked, as a trace keeps it."""
        label, at = type(self).__name__, show_address(current_address())
        if not args:
            raise ArgumentError(f"The last argument of the {label} at {at} is the key; got no arguments.")
        given: Any = args[-1]
        if isinstance(given, str) and given and "/" not in given:
            return Const(given)
        is_array = isinstance(given, (np.ndarray, np.generic, jax.Array))
        if (isinstance(given, int) and not isinstance(given, bool)) or (
            is_array and given.shape == () and jnp.issubdtype(given.dtype, jnp.integer)
        ):
            if isinstance(given, jax.Array) or int(given) >= 0:
                return lax.convert_element_type(jnp.asarray(given), jnp.int32)[None]
        raise ArgumentError(
            f'The last argument of the {label} at {at} is the key, a string without "/" or one integer from 0; got '
            f"{types(given) if is_array and np.ndim(given) else format(repr(given), '.60')}. For a key for each element use "
            "`Map`."
        )

    @nn.nowrap
    def _given(self, choices: ChoiceMap, args: Arguments, strict: bool = True) -> tuple[ChoiceMap, Any]:
        """The choices at the key, and whether they are: true, or a flag where that is not known while tracing."""
        call_key = args[-1]
        if choices.is_empty():
            return choices, True
        if isinstance(call_key, str) != isinstance(choices, BuiltinChoiceMap):
            # Names where the key is an index, or the other way round, or a value beside the key.
            return self._elsewhere(choices, call_key, strict), True
        if isinstance(call_key, str):
            if choices.names() != (call_key,):
                self._elsewhere(choices, call_key, strict)
            return choices.get_submap(call_key), True
        if not isinstance(choices, VectorChoiceMap):
            return self._elsewhere(choices, call_key, strict), True
        indices = choices.static_indices
        if indices is not None and not isinstance(call_key, jax.Array):
            if tuple(indices) != (int(call_key),):
                self._elsewhere(choices, call_key, strict)
            inner = flag_each(choices.inner, len(choices))
            return vector(choices.indices, inner).get_submap(int(call_key)), True
        position, there = choices.find(call_key)
        inner = flag_each(choices.inner, len(choices))
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[position], inner), there

    @nn.nowrap
    def _elsewhere(self, choices: ChoiceMap, call_key: Any, strict: bool) -> ChoiceMap:
        """An error for constraints that certainly stand at another key; where they are ignored, no choices."""
        if strict:
            at = current_address()
            indices = choices.static_indices if isinstance(choices, VectorChoiceMap) else None
            first: list[Any] = [(name,) for name in choices.names()] if indices is None else [(i,) for i in indices]
            others = [(*at, *one) for one in first if one != (call_key,)] or [at]
            known = call_key if isinstance(call_key, str) or not isinstance(call_key, Tracer) else "<its index>"
            raise UnvisitedConstraintError(
                f"A value was given for {show_address(others[0])}, and the {type(self).__name__} at {show_address(at)} makes "
                f"its choices at its key, {show_address((*at, known))}. To ignore what is not used, pass strict=False."
            )
        return EmptyChoiceMap()

    @nn.nowrap
    def _one_of(self, functions: list[Callable[..., Any]], number: Any, operands: Any) -> list[Any]:
        """The results of functions of the inner function and the operands, of which one runs; zero for the others."""

        def entered(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
            return lambda module, operands: ((), function(module.inner, *operands))

        lifted = self.needs_variables and self.scope is not None
        results = switch(number, list(map(entered, functions)), self, operands, lifted=lifted)
        return [result for _, result in results]


@dataclasses.dataclass(frozen=True)
class _Subselections:
    """What may be selected below a key: one selection where that is known while tracing."""

    parts: list[Selection]
    by_index: Mapping[int, int] = dataclasses.field(default_factory=dict)
    otherwise: int = 0

    def number(self, call_key: Any) -> Any:
        """Which of them it is at a key."""
        number = jnp.int32(self.otherwise)
        for index, one in self.by_index.items():
            number = jnp.where(call_key == index, np.int32(one), number)
        return number


def _subselections(selection: Selection, call_key: Any) -> _Subselections:
    if isinstance(call_key, str):
        return _Subselections([selection[call_key]])
    if not isinstance(call_key, jax.Array):
        return _Subselections([selection[int(call_key)]])
    elsewhere = selection[max(selection.indices, default=-1) + 1]
    below = {index: selection[index] for index in sorted(selection.indices)}
    parts = list(dict.fromkeys([elsewhere, *below.values()]))
    return _Subselections(parts, {index: parts.index(part) for index, part in below.items()})


def _has_moved(old: Any, new: Any, keydiff: Any) -> Any:
    """Whether the key is another one: a flag where that is not known while tracing."""
    if Diff.is_unchanged(keydiff):
        return False
    if isinstance(old, Const) or isinstance(new, Const):
        return old != new
    return (old != new)[0]


def _at_key(choices: ChoiceMap, stored: Any) -> ChoiceMap:
    """Choices below the key."""
    if isinstance(stored, Const):
        return by_name({stored.value: choices})
    return vector(stored, _with_axis(choices, stored))


def _with_axis(tree: Any, stored: Any) -> Any:
    """A tree, or a batch of it, as that of the one element of a vector."""
    return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, jnp.ndim(stored) - 1), tree)


def _known_where(there: Any, score: Any) -> Any:
    """A score, NaN where the choices were not given, so that it cannot be missed."""
    return score if there is True else jnp.where(there, score, jnp.nan)

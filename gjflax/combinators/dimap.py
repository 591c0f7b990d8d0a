r"""`Dimap`: a generative function with arguments and return value in another form.

With inner density p(t; y) and return value f(t, y), and functions y = pre(x) of the arguments and post,

    p_Dimap(t; x) = p(t; pre(x)),   retval post(x, pre(x), f(t, pre(x))).

Choices, scores and weights are those of the inner function. What changes is known leaf by leaf: the functions are staged
out, so an inner argument that depends on unchanged arguments only is unchanged, and one that `pre` hands on is changed as
it was; likewise for the return value.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from gjflax.core.choice_map import ChoiceMap
from gjflax.core.context import current_address, naming
from gjflax.core.diff import Diff, no_change, unknown_change
from gjflax.core.errors import ArgumentError, show_address
from gjflax.core.generative_function import GenerativeFunction, is_same
from gjflax.core.in_place import chosen_leaves, remember, stored_leaves
from gjflax.core.lifting import share_inner_scope
from gjflax.core.selection import Selection
from gjflax.core.trace import CallTrace, Trace, WrappedTrace, canonical, leafwise, plain
from gjflax.core.typing import Arguments, PRNGKey, Score
from gjflax.language.dependency import dependencies_in
from gjflax.language.incremental import (
    are_alike,
    arguments_of,
    canonical_diff,
    diffs_of_arguments,
    diffs_of_retval,
    leaf_diff,
    types_are_known,
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DimapTrace(CallTrace, WrappedTrace):
    """The trace of the inner function, with the outer arguments and the outer return value."""

    retval: Any
    inner: Trace

    def get_retval(self) -> Any:
        return plain(self.retval)

    def chosen(self, accepted: Any, old: Any) -> Trace:
        written = getattr(self, "written", None)
        if written is None or written["old"] is not old:
            return leafwise(accepted, self, old)
        args = chosen_leaves(accepted, self.args, old.args, written["args"])
        retval = chosen_leaves(accepted, self.retval, old.retval, written["retval"])
        return DimapTrace(self.gen_fn, args, retval, self.inner.chosen(accepted, old.inner))


class Dimap(GenerativeFunction):
    """A generative function with arguments and return value in another form. See the text of this file.

    Attributes:
      inner: the generative function. Its parameters are those of the `Dimap`.
      pre: ``pre(*args)`` gives the inner function's arguments, a tuple. By default the arguments as they are.
      post: ``post(args, inner_args, retval)`` gives the return value: of the arguments, the inner arguments (both
        tuples) and the inner return value. By default the last. Where that is all it needs, write
        ``post=lambda args, inner_args, retval: f(retval)``, or use `Dimap.map_retval`.

    Both are pure functions of arrays, without choices and parameters: what has these is called in a body.

    Raises:
      ArgumentError: if `pre` or `post` are not functions, or `pre` does not return a tuple.

    >>> import gjflax, jax, jax.numpy as jnp
    >>> by_log = gjflax.Dimap(
    ...     gjflax.Normal, pre=lambda loc, log_scale: (loc, jnp.exp(log_scale)), post=lambda args, inner, x: jnp.exp(x)
    ... )
    >>> key, (retval, score) = by_log.assess(jax.random.key(0), 1.0, (1.0, 0.0))
    >>> round(float(retval), 3), round(float(score), 4)
    (2.718, -0.9189)
    """

    trace_type = DimapTrace

    inner: Any
    pre: Any = None
    post: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.inner, GenerativeFunction):
            raise ArgumentError(f"`Dimap` takes a generative function; got {self.inner!r:.80}. Is @gen missing?")
        for name in ("pre", "post"):
            _check_function(name, getattr(self, name))
        if _refuses(self.post, (None, None, None)):
            raise ArgumentError(
                "`post` of a `Dimap` is called with (args, inner_args, retval), and this one does not take three arguments. "
                "For a function of the return value alone use `Dimap.map_retval(inner, function)`."
            )
        super().__post_init__()

    @classmethod
    def map_retval(cls, inner: Any, function: Any) -> Dimap:
        """The generative function whose return value goes through a function of it alone.

        >>> import gjflax, jax
        >>> double = gjflax.Dimap.map_retval(gjflax.Normal, lambda x: 2.0 * x)
        >>> key, (retval, score) = double.assess(jax.random.key(0), 1.5, (0.0, 1.0))
        >>> float(retval)
        3.0
        """
        _check_function("function", function)
        return cls(inner, post=functools.partial(_of_retval, function))

    def setup(self) -> None:
        share_inner_scope(self)

    # The interface ----------------------------------------------------------------------------------------------

    def simulate(self, key: PRNGKey, args: Arguments) -> tuple[PRNGKey, DimapTrace]:
        inner_args = self._before(args)
        key, inner = self.inner.simulate(key, inner_args)
        return key, self._trace(args, inner_args, inner)

    def importance(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, **options: Any
    ) -> tuple[PRNGKey, tuple[Score, DimapTrace]]:
        inner_args = self._before(args)
        key, (weight, inner) = self.inner.importance(key, choices, inner_args, **options)
        return key, (weight, self._trace(args, inner_args, inner))

    def assess(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, **options: Any
    ) -> tuple[PRNGKey, tuple[Any, Score]]:
        inner_args = self._before(args)
        key, (retval, score) = self.inner.assess(key, choices, inner_args, **options)
        return key, (plain(canonical(self._after(args, inner_args, retval))), score)

    def update(
        self, key: PRNGKey, trace: Any, choices: ChoiceMap, argdiffs: Arguments, **options: Any
    ) -> tuple[PRNGKey, tuple[Any, Score, DimapTrace, ChoiceMap]]:
        inner_diffs = self._diffs_before(trace, argdiffs)
        key, (retdiff, weight, inner, discard) = self.inner.update(key, trace.inner, choices, inner_diffs, **options)
        retdiff, new = self._changed(trace, argdiffs, inner_diffs, retdiff, inner)
        return key, (retdiff, weight, new, discard)

    def regenerate(
        self, key: PRNGKey, trace: Any, selection: Selection, argdiffs: Arguments, **options: Any
    ) -> tuple[PRNGKey, tuple[Any, Score, DimapTrace]]:
        inner_diffs = self._diffs_before(trace, argdiffs)
        key, (retdiff, weight, inner) = self.inner.regenerate(key, trace.inner, selection, inner_diffs, **options)
        retdiff, new = self._changed(trace, argdiffs, inner_diffs, retdiff, inner)
        return key, (retdiff, weight, new)

    def constrain(
        self, unconstrained: ChoiceMap, args: Arguments, *, fixed: ChoiceMap | None = None
    ) -> tuple[ChoiceMap, Score]:
        return self.inner.constrain(unconstrained, self._before(args), fixed=fixed)

    @nn.nowrap
    def variables_of(self, trace: Any) -> Mapping[str, Any]:
        return self.inner.variables_of(trace.inner)

    @nn.nowrap
    def argument_names(self) -> tuple[str, ...]:
        if self.pre is None:
            return self.inner.argument_names()
        try:
            parameters = inspect.signature(self.pre).parameters.values()
        except ValueError:  # it has no signature that could be known
            return ()
        return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))

    # Inside -----------------------------------------------------------------------------------------------------

    @nn.nowrap
    def _before(self, args: Arguments) -> Arguments:
        """The inner function's arguments."""
        if self.pre is None:
            return args
        # So that a choice in it is an error, and not one of the body that this stands in.
        with naming(()):
            try:
                inner_args = self.pre(*args)
            except TypeError as error:
                if not _refuses(self.pre, args):
                    raise
                raise ArgumentError(
                    f"`pre` of the Dimap at {show_address(current_address())} does not take the {len(args)} arguments that "
                    f"it was called with: {error}."
                ) from error
        if not isinstance(inner_args, tuple):
            raise ArgumentError(
                f"`pre` of the Dimap at {show_address(current_address())} returned a {type(inner_args).__name__}: it returns "
                "the arguments of the inner function as a tuple, one argument x as (x,)."
            )
        return inner_args

    @nn.nowrap
    def _after(self, args: Arguments, inner_args: Arguments, retval: Any) -> Any:
        """The return value."""
        if self.post is None:
            return retval
        with naming(()):
            return self.post(args, inner_args, retval)

    @nn.nowrap
    def _trace(self, args: Arguments, inner_args: Arguments, inner: Trace) -> DimapTrace:
        retval = canonical(self._after(args, inner_args, inner.get_retval()))
        return DimapTrace(self.as_unbound(), canonical(args), retval, inner)

    @nn.nowrap
    def _diffs_before(self, trace: DimapTrace, argdiffs: Arguments) -> Arguments:
        """The inner arguments with what is known of them; unchanged ones are those of the old trace."""
        if self.pre is None:
            return argdiffs
        old = arguments_of(trace.inner)
        if Diff.is_unchanged(argdiffs) and is_same(trace.gen_fn, self.as_unbound()):
            return Diff.mark(old, no_change)
        args = Diff.primal(argdiffs)
        inner_args = self._before(args)
        known = self._known(trace, argdiffs, lambda *args: self._before(args), argdiffs)
        if known is None:
            return Diff.mark(inner_args, unknown_change)
        return diffs_of_arguments(inner_args, old, known)

    @nn.nowrap
    def _changed(
        self, trace: DimapTrace, argdiffs: Arguments, inner_diffs: Arguments, retdiff: Any, inner: Trace
    ) -> tuple[Any, DimapTrace]:
        """The return value with what is known of it, and the new trace."""
        diffs = (argdiffs, inner_diffs, retdiff)
        retval = canonical(self._after(*Diff.primal(diffs)))
        known = self._known(trace, argdiffs, self._after, diffs)
        stored, known, retdiff = diffs_of_retval(retval, trace.retval, known)
        changes = Diff.leaves(canonical_diff(argdiffs))
        args = stored_leaves(canonical(Diff.primal(argdiffs)), trace.args, changes)
        new = DimapTrace(self.as_unbound(), args, stored, inner)
        remember(new, trace, args=changes, retval=known)
        return retdiff, new

    @nn.nowrap
    def _known(
        self, trace: DimapTrace, argdiffs: Arguments, function: Callable[..., Any], diffs: Arguments
    ) -> list[Diff] | None:
        """What is known of the leaves of a function's result, from what is of its arguments; None where nothing is."""
        # Functions that are made in a body may hold values that have changed.
        same = is_same(trace.gen_fn, self.as_unbound()) and are_alike(canonical(Diff.primal(argdiffs)), trace.args)
        if not same or not types_are_known(diffs):
            return None
        dependencies = dependencies_in(function, *Diff.primal(diffs))
        if dependencies is None:
            return None
        leaves = Diff.leaves(canonical_diff(diffs))
        return [leaf_diff(dependency, lambda source: leaves[source.leaf]) for dependency in dependencies]


def _of_retval(function: Callable[[Any], Any], args: Arguments, inner_args: Arguments, retval: Any) -> Any:
    """A function of the return value alone in the form of `post`."""
    return function(retval)


def _check_function(name: str, function: Any) -> None:
    if isinstance(function, nn.Module) or (isinstance(function, type) and issubclass(function, nn.Module)):
        raise ArgumentError(
            f"`{name}` of a `Dimap` is a function without parameters; got the module {function!r:.80}: call it in a body."
        )
    if function is not None and not callable(function):
        raise ArgumentError(f"`{name}` of a `Dimap` is a function; got {function!r:.80}.")


def _refuses(function: Any, args: Arguments) -> bool:
    """Whether a function certainly does not take so many arguments."""
    try:
        inspect.signature(function).bind(*args)
    except TypeError:
        return callable(function)
    except ValueError:  # it has no signature that could be known
        return False
    return False

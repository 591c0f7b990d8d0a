"""Flax's lifted transformations as gjflax uses them: shared scopes, and functions over elements or samples."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import DenyList, intersect_filters, subtract_filters

from gjflax.core.masked import where

SOWN = ("intermediates", "diagnostics")
"""Collections in which every element or sample leaves values of its own."""


def is_lifted(function: Any) -> bool:
    """Whether this is a method that ``nn.remat``, ``nn.vmap`` or another transformation made of a class's own."""
    return getattr(function, "__globals__", {}).get("__name__") == nn.transforms.__name__


def mapping_of(function: Any) -> str | None:
    """By what of ``nn.vmap`` and ``nn.scan`` a method runs many times, also below another transformation; None if it does not.

    Flax keeps the transformation in the method's closure alone.
    """
    while is_lifted(function):
        transform = inspect.getclosurevars(function).nonlocals.get("transform")
        if getattr(transform, "__name__", None) in ("vmap", "scan"):
            return f"nn.{getattr(transform, '__name__', '')}"
        function = getattr(function, "__wrapped__", None)
    return None


def share_inner_scope(module: Any) -> None:
    """Give a combinator the scope of its field ``inner``, so that both have one parameter tree; called in ``setup``.

    An inner function that is part of another module keeps its scope, and the combinator takes it; otherwise it takes
    the combinator's. ``nn.share_scope`` alone leaves modules behind that are fields of the inner function, and inside a
    transformation of a module that holds the combinator it does not know the inner scope as one below.
    """
    scope, inner = module.scope, module.inner
    below = inner.scope
    if below is scope:
        return
    if below is None or below.root is not scope.root or below.path[: len(scope.path)] != scope.path:
        nn.share_scope(module, inner)
        return
    # Its name goes with it: else a combinator in a combinator would claim the name "inner" twice.
    scope.reservations.pop(below.name, None)
    _move(inner, below.path, scope)


def _move(module: nn.Module, old: tuple[str, ...], new: Any) -> None:
    """Let a module, and the modules in it, stand in another scope than the one with the path `old`."""
    below = {id(part): part for part in _modules_in(module, new.root) if part.scope.path[: len(old)] == old}
    for part in below.values():
        scope = new
        for name in part.scope.path[len(old) :]:
            scope = scope.push(name, reuse=True)
        object.__setattr__(part, "scope", scope)


def _modules_in(module: Any, root: Any) -> Iterator[Any]:
    """A bound module, and those that it holds, of the same variables; of any where `root` is None."""
    if module.scope is None or (root is not None and module.scope.root is not root):
        return
    yield module
    fields = [getattr(module, field.name) for field in dataclasses.fields(module) if field.name != "parent"]
    for part in (*module._state.children.values(), *jax.tree.leaves(fields)):
        if isinstance(part, nn.Module):
            yield from _modules_in(part, root)


class Streams:
    """How far the rng streams of a module and of those in it have come: a run after `rewind` draws what the first one drew.

    So a guide with dropout drops the same units where it draws a choice and where it scores it.

    Args:
      module: a bound module; one that is not bound has no streams.
    """

    def __init__(self, module: nn.Module):
        scopes = {id(part.scope.rng_counters): part.scope.rng_counters for part in _modules_in(module, None)}
        self._marks = [(counters, copy.deepcopy(counters)) for counters in scopes.values()]

    def rewind(self) -> None:
        """Let them begin where they were."""
        for counters, before in self._marks:
            _restore(counters, before)


def _restore(counters: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Write old numbers back. In place: scopes below hold parts of it, and what they counted first starts at 0."""
    for name, value in counters.items():
        if isinstance(value, dict):
            _restore(value, before.get(name, {}))
        else:
            counters[name] = before.get(name, 0)


def vmap_module(
    function: Callable[..., Any],
    in_axes: tuple[Any, ...],
    length: int,
    variable_axes: Mapping[str, Any] | None = None,
    split_rngs: Mapping[str, bool] | None = None,
    *,
    same_streams: bool = False,
) -> Callable[..., Any]:
    """``nn.vmap`` of a function of a module and arguments, with defaults for every collection and rng stream.

    Collections are shared, but those in `SOWN`, which are stacked, and those that `variable_axes` names. What the
    elements write to a shared collection (running statistics) is averaged over them. Streams are split, unless they are
    to be the `same_streams`, but "params" only where the parameters have an axis.
    """
    own_axes = dict(variable_axes or {})
    stacked = tuple(name for name in SOWN if name not in own_axes)
    own_splits = {"params": own_axes.get("params") is not None, **(split_rngs or {})}
    lift: Any = nn.vmap
    axis = object()
    return lift(
        _averaging(function, ("params", *own_axes, *stacked), axis),
        variable_axes={**own_axes, **dict.fromkeys(stacked, 0), DenyList((*own_axes, *stacked)): None},
        split_rngs={**own_splits, DenyList(tuple(own_splits)): not same_streams},
        in_axes=in_axes,
        axis_size=length,
        axis_name=axis,
    )


def _averaging(function: Callable[..., Any], apart: tuple[str, ...], axis: Any) -> Callable[..., Any]:
    """The function of one element, after which the collections that all elements share hold the mean of what each wrote."""

    def run(module: Any, *args: Any) -> Any:
        if module.scope is None or module.is_initializing():
            return function(module, *args)
        before = _mutable_variables(module)
        result = function(module, *args)
        for root, variables in before:
            for name, collection in root.mutable_variables().items():
                if name not in apart:
                    _average(collection, variables.get(name, {}), axis)
        return result

    return run


def scan_module(
    function: Callable[..., Any],
    length: int,
    reverse: bool = False,
    variable_axes: Mapping[str, Any] | None = None,
    split_rngs: Mapping[str, bool] | None = None,
) -> Callable[..., Any]:
    """``nn.scan`` of ``function(module, carry, x)``, with defaults for every collection and rng stream.

    Parameters are shared by the steps, and so are collections that may not be written; those that may are carried from
    step to step. Collections in `SOWN` are stacked, and those that `variable_axes` names have an axis. Streams are
    split, but "params" only where the parameters have an axis.
    """
    own_axes = dict(variable_axes or {})
    stacked = tuple(name for name in SOWN if name not in own_axes)
    own_splits = {"params": own_axes.get("params") is not None, **(split_rngs or {})}
    apart = (*own_axes, *stacked)
    lift: Any = nn.scan

    def run(module: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
        initializing = module.is_initializing()
        # What a carry holds must be there before the first step; `init` makes it once for all steps.
        carried = False if initializing else intersect_filters(module.scope.mutable, DenyList(("params", *apart)))
        scan = lift(
            function,
            variable_axes={**own_axes, **dict.fromkeys(stacked, 0)},
            variable_carry=carried,
            variable_broadcast=subtract_filters(DenyList(apart), carried),
            split_rngs={**own_splits, DenyList(tuple(own_splits)): True},
            length=length,
            reverse=reverse,
            # A second trace of the function, which only variables that are made here need.
            check_constancy_invariants=initializing,
        )
        return scan(module, carry, xs)

    return run


def written_where(module: Any, flag: Any, run: Callable[[], Any]) -> Any:
    """The result of a run that writes variables of the module only where the flag is true.

    What it sows is stacked with the rest.
    """
    if module.scope is None or module.is_initializing():
        return run()
    before = _mutable_variables(module)
    result = run()
    for root, variables in before:
        for name, collection in root.mutable_variables().items():
            if name not in SOWN:
                _choose(collection, variables.get(name, {}), flag)
    return result


def _mutable_variables(module: Any) -> list[tuple[Any, Any]]:
    """The roots of the scopes of a module and of those that it holds, each with its mutable variables as they are now."""
    roots = {id(part.scope.root): part.scope.root for part in _modules_in(module, None)}.values()
    return [(root, jax.tree.map(lambda leaf: leaf, root.mutable_variables())) for root in roots]


def _average(new: Any, old: Any, axis: Any) -> None:
    """Put the mean over the mapped axis where a collection was written to. In place, as in `_choose`.

    What is not floating point (a counter of calls) is the same for all elements, or Flax says that it is not.
    """

    def mean(leaf: Any, before: Any) -> Any:
        written = leaf is not before and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jax.lax.pmean(leaf, axis) if written else leaf

    for name, value in new.items():
        if isinstance(value, dict):
            _average(value, old.get(name, {}), axis)
        elif name in old:
            new[name] = jax.tree.map(mean, value, old[name])
        else:
            new[name] = jax.tree.map(lambda leaf: mean(leaf, None), value)


def _choose(new: Any, old: Any, flag: Any) -> None:
    """Put the old leaves of a collection back where the flag is false. In place: scopes below hold parts of it."""
    for name, value in new.items():
        if isinstance(value, dict):
            _choose(value, old.get(name, {}), flag)
        elif name in old:
            new[name] = jax.tree.map(lambda a, b: where(flag, a, b), value, old[name])

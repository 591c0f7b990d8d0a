"""Flax's lifted transformations as gjflax uses them: shared scopes, and functions over elements or samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core.scope import DenyList

SOWN = ("intermediates", "diagnostics")
"""Collections in which every element or sample leaves values of its own."""


def is_lifted(function: Any) -> bool:
    """Whether this is a method that ``nn.remat``, ``nn.vmap`` or another transformation made of a class's own."""
    return getattr(function, "__globals__", {}).get("__name__") == nn.transforms.__name__


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
    """A bound module, and those that it holds, of the same variables."""
    if module.scope is None or module.scope.root is not root:
        return
    yield module
    fields = [getattr(module, field.name) for field in dataclasses.fields(module) if field.name != "parent"]
    for part in (*module._state.children.values(), *jax.tree.leaves(fields)):
        if isinstance(part, nn.Module):
            yield from _modules_in(part, root)


def vmap_module(
    function: Callable[..., Any],
    in_axes: tuple[Any, ...],
    length: int,
    variable_axes: Mapping[str, Any] | None = None,
    split_rngs: Mapping[str, bool] | None = None,
) -> Callable[..., Any]:
    """``nn.vmap`` of a function of a module and arguments, with defaults for every collection and rng stream.

    Collections are shared, but those in `SOWN`, which are stacked, and those that `variable_axes` names. Streams are
    split, but "params" only where the parameters have an axis.
    """
    own_axes = dict(variable_axes or {})
    stacked = tuple(name for name in SOWN if name not in own_axes)
    own_splits = {"params": own_axes.get("params") is not None, **(split_rngs or {})}
    lift: Any = nn.vmap
    return lift(
        function,
        variable_axes={**own_axes, **dict.fromkeys(stacked, 0), DenyList((*own_axes, *stacked)): None},
        split_rngs={**own_splits, DenyList(tuple(own_splits)): True},
        in_axes=in_axes,
        axis_size=length,
    )

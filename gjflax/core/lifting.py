"""Flax's lifted transformations as gjflax uses them: shared scopes, and functions over elements or samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from flax.core.scope import DenyList

SOWN = ("intermediates", "diagnostics")
"""Collections in which every element or sample leaves values of its own."""


def is_lifted(function: Any) -> bool:
    """Whether this is a method that ``nn.remat``, ``nn.vmap`` or another transformation made of a class's own."""
    return getattr(function, "__globals__", {}).get("__name__") == nn.transforms.__name__


def share_inner_scope(module: Any) -> None:
    """Give a combinator the scope of its field ``inner``, so that both have one parameter tree; called in ``setup``."""
    scope, inner = module.scope, module.inner
    if inner.scope is not None and inner.scope.parent is scope:
        # The inner scope goes away, and with it its name: without this, a combinator in a combinator would
        # claim the name "inner" twice.
        scope.reservations.pop(inner.scope.name, None)
    nn.share_scope(module, inner)


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

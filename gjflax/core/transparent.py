"""Combinators with one inner function have its parameter tree: they share its Flax scope."""

from __future__ import annotations

from typing import Any

import flax.linen as nn


def share_inner_scope(module: Any) -> None:
    """Give a combinator the scope of its field ``inner``; called in ``setup``."""
    scope, inner = module.scope, module.inner
    if inner.scope is not None and inner.scope.parent is scope:
        # The inner scope goes away, and with it its name: without this, a combinator in a combinator would
        # claim the name "inner" twice.
        scope.reservations.pop(inner.scope.name, None)
    nn.share_scope(module, inner)

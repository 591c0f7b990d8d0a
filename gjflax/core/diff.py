"""`Diff`: an argument together with what is known of how it changed.

``update`` and ``regenerate`` take such arguments: ``Diff.no_change(x)`` says that x is what it was when the trace
was made, ``Diff.unknown_change(x)`` promises nothing. A plain value counts as an unknown change.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from gjflax.core.pytree import Pytree, static_field


class Change:
    """How a value changed. Calling it marks a value: ``no_change(x)`` is ``Diff(x, no_change)``."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, value: Any) -> Diff:
        return Diff(Diff.primal(value), self)

    def __repr__(self) -> str:
        return self._name


no_change = Change("no_change")
unknown_change = Change("unknown_change")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Diff(Pytree):
    """A value and how it changed.

    >>> Diff.no_change(1.0).change
    no_change
    >>> Diff.primal((Diff.unknown_change(2.0), 3.0))
    (2.0, 3.0)
    """

    value: Any
    change: Change = static_field(default=unknown_change)

    no_change: ClassVar[Change] = no_change
    unknown_change: ClassVar[Change] = unknown_change

    @staticmethod
    def primal(tree: Any) -> Any:
        """The tree with every `Diff` replaced by its value."""
        return jax.tree.map(
            lambda leaf: leaf.value if isinstance(leaf, Diff) else leaf,
            tree,
            is_leaf=lambda leaf: isinstance(leaf, Diff),
        )

    @staticmethod
    def is_unchanged(tree: Any) -> bool:
        """Whether everything in the tree is marked `no_change`. An empty tree is."""
        leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Diff))
        return all(isinstance(leaf, Diff) and leaf.change is no_change for leaf in leaves)

    @staticmethod
    def mark(tree: Any, change: Change) -> Any:
        """The tree's top-level elements marked with one change."""
        return tuple(change(value) for value in tree)

"""`Diff`: an argument together with what is known of how it changed.

``update`` and ``regenerate`` take such arguments: ``Diff.no_change(x)`` says that x is what it was when the trace
was made, ``Diff.unknown_change(x)`` promises nothing, and ``Diff.of_elements(x, indices)`` says that x changed in some
elements of its leading axis only. A plain value counts as an unknown change.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from gjflax.core.errors import ArgumentError
from gjflax.core.indices import certainly_outside, certainly_repeat
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
elements_change = Change("elements_change")


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
    indices: Any = None
    elements: Any = None

    no_change: ClassVar[Change] = no_change
    unknown_change: ClassVar[Change] = unknown_change

    @staticmethod
    def of_elements(value: Any, indices: Any, elements: Any = None) -> Diff:
        """A value that changed in some elements of its leading axis.

        Args:
          value: the new value, an array or a tree of arrays.
          indices: which elements, an integer array of one axis without repetitions. Where they are traced and repeat,
            the weight of an update with them is NaN.
          elements: the new value at these indices, where it is at hand.

        Raises:
          ArgumentError: if the indices are known, and repeat or are those of no element.
        """
        for leaf in jax.tree.leaves(value):
            if certainly_outside(indices, jnp.shape(leaf)[0]):
                raise ArgumentError(
                    "The indices of a `Diff.of_elements` are those of elements of the value, from 0 to "
                    f"{jnp.shape(leaf)[0] - 1}; got {indices!r:.80}."
                )
        if certainly_repeat(indices):
            raise ArgumentError(
                f"The indices of a `Diff.of_elements` must not repeat; got {indices!r:.80}. Name every element once."
            )
        if elements is None:
            elements = jax.tree.map(lambda leaf: jnp.asarray(leaf)[indices], value)
        return Diff(value, elements_change, indices, elements)

    @staticmethod
    def leaves(tree: Any) -> list[Diff]:
        """One `Diff` for every array in a tree of values and Diffs, in the order of its leaves."""
        result: list[Diff] = []
        for part in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Diff)):
            if not isinstance(part, Diff):
                result.append(unknown_change(part))
                continue
            values = jax.tree.leaves(part.value)
            if part.change is elements_change:
                elements = jax.tree.leaves(part.elements)
                result += [Diff(v, elements_change, part.indices, e) for v, e in zip(values, elements, strict=True)]
            else:
                result += [part.change(value) for value in values]
        return result

    @staticmethod
    def tree(value: Any, leaves: list[Diff]) -> Any:
        """A value with the changes of its leaves: one `Diff` where they are alike, else a tree of them."""
        first = leaves[0] if leaves else no_change(None)
        if all(leaf.change is first.change for leaf in leaves):
            if first.change is not elements_change:
                return first.change(value)
            if all(leaf.indices is first.indices for leaf in leaves):
                structure = jax.tree.structure(value)
                return Diff(value, elements_change, first.indices, structure.unflatten([d.elements for d in leaves]))
        return jax.tree.structure(value).unflatten(leaves)

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

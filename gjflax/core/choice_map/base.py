"""`ChoiceMap`: what every choice map can do; and those without vectors: none, one value, choice maps by name.

A choice map is a finite map from addresses to values. Those of an `EmptyChoiceMap` are none, of a `ValueChoiceMap` the one at
the root, and of a `BuiltinChoiceMap` those of its children, each below a name.

Reading nested dicts, combining, taking the difference, and bytes are for choice maps of all kinds, so they stand in files above
this one: the methods that lead there import them when they are called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gjflax.core.errors import MissingChoiceError, nearest, show_address
from gjflax.core.masked import Masked, is_masked
from gjflax.core.pytree import Pytree
from gjflax.core.selection import Selection
from gjflax.core.typing import Address, Component


class ChoiceMap(Pytree):
    """Values of choices by address. See `choice_map`."""

    def is_empty(self) -> bool:
        """Whether it holds no choice."""
        return False

    def is_value(self) -> bool:
        """Whether one choice stands at the root, not below names."""
        return False

    def get_value(self) -> Any:
        """The value of the choice at the root."""
        raise MissingChoiceError(
            f"There is no single choice here, but choices below names. {nearest('', self.names())}"
        )

    def names(self) -> tuple[str, ...]:
        """The first components of the addresses, where they are names."""
        return ()

    def get_submap(self, component: Component) -> ChoiceMap:
        """The choices below one component; empty where there are none."""
        return EmptyChoiceMap()

    def filter(self, selection: Selection) -> ChoiceMap:
        """The choices that are selected."""
        raise NotImplementedError

    def merge(self, other: Any) -> ChoiceMap:
        """The choices of both.

        Raises:
          ChoiceMapError: if both have a value for one address, or one is a prefix of another.

        >>> from gjflax import choice_map
        >>> choice_map({"a": 1.0}).merge({"b": 2.0}).to_dict()
        {'a': 1.0, 'b': 2.0}
        """
        from gjflax.core.choice_map.combining import combine

        return combine(self, ChoiceMap.from_dict(other), (), overwrite=False)

    def overwrite(self, other: Any) -> ChoiceMap:
        """The choices of both; where both have a value, the other's."""
        from gjflax.core.choice_map.combining import combine

        return combine(self, ChoiceMap.from_dict(other), (), overwrite=True)

    def __or__(self, other: Any) -> ChoiceMap:
        """The choices of both, as `merge` gives them."""
        return self.merge(other)

    def __ror__(self, other: Any) -> ChoiceMap:
        return ChoiceMap.from_dict(other).merge(self)

    def __sub__(self, other: Any) -> ChoiceMap:
        """The choices that a selection does not select, or another choice map does not have.

        A `Masked` choice of the other takes away what is there where its flag is true.

        Raises:
          ChoiceMapError: if one has a value where the other has names, or what is left of a vector of choices has other
            addresses at one index than at another, or indices are not known while tracing.

        >>> from gjflax import choice_map, select
        >>> chm = choice_map({"a": 1.0, "b": 2.0})
        >>> (chm - {"a": 0.0}).to_dict(), (chm - select("b")).to_dict()
        ({'b': 2.0}, {'a': 1.0})
        """
        from gjflax.core.difference import difference

        return self.filter(~other) if isinstance(other, Selection) else difference(self, ChoiceMap.from_dict(other))

    def to_dict(self, *, exact: bool = False) -> Any:
        """As a nested dict; the value itself where one choice stands at the root.

        Args:
          exact: whether a vector of all elements is told apart from arrays, by a key ``range(n)`` above them; or above
            a list of their dicts, where they have other indices each. Then `from_dict` gives an equal choice map back.
            The indices of a vector must be known while tracing.

        Raises:
          ChoiceMapError: if the indices of a vector are not known while tracing.
        """
        return self._to_exact_dict(0) if exact else self._to_dict()

    def _to_dict(self) -> Any:
        raise NotImplementedError

    def _to_exact_dict(self, axes: int) -> Any:
        """The dict that tells vectors apart from arrays. `axes` is how many the values have of the vectors around."""
        return self._to_dict()

    @classmethod
    def from_dict(cls, choices: Any) -> ChoiceMap:
        """The choice map of a nested dict, as `choice_map` makes it.

        >>> import jax.numpy as jnp
        >>> from gjflax import VectorChoiceMap
        >>> chm = VectorChoiceMap(range(2), {"x": jnp.array([1.0, 2.0])})
        >>> ChoiceMap.from_dict(chm.to_dict(exact=True)) == chm
        True
        """
        from gjflax.core.choice_map.nested_dicts import choice_map

        return choice_map(choices)

    def to_bytes(self) -> bytes:
        """The choices as bytes that `from_bytes` reads without a template, with indices, flags and random keys.

        Raises:
          ChoiceMapError: if a value is no array, number, random key, or `Masked` one of these.
        """
        from gjflax.core.saving import to_bytes

        return to_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> ChoiceMap:
        """The choice map that was written with `to_bytes`. Arrays come as NumPy arrays.

        Raises:
          ChoiceMapError: if the bytes are not those of a choice map.

        >>> import jax.numpy as jnp
        >>> from gjflax import choice_map
        >>> chm = choice_map({"a": 1.0, ("y", 3, "pos"): jnp.arange(2.0)})
        >>> ChoiceMap.from_bytes(chm.to_bytes()) == chm
        True
        """
        from gjflax.core.saving import from_bytes

        return from_bytes(data)

    def to_array(self, selection: Any = None) -> Any:
        """The selected choices as one vector of floats, in their order as leaves; of all by default.

        Its dtype is the one that holds them all. Flags of `Masked` choices and indices are not part of it.

        Raises:
          SelectionError: if nothing is selected.
          ChoiceDtypeError: if a selected choice is not floating point.

        >>> import jax.numpy as jnp
        >>> from gjflax import choice_map, select
        >>> chm = choice_map({"a": 1.0, "b": jnp.array([2.0, 3.0]), "n": 4})
        >>> vector = chm.to_array(~select("n"))
        >>> vector
        Array([1., 2., 3.], dtype=float32)
        >>> chm.from_array(2 * vector, ~select("n")).to_dict()
        {'a': Array(2., dtype=float32), 'b': Array([4., 6.], dtype=float32)}
        """
        from gjflax.core.flat import to_array

        return to_array(self, selection)

    def from_array(self, array: Any, selection: Any = None) -> ChoiceMap:
        """The selected choices with values from a vector, as `to_array` gives it; in their own shapes and dtypes.

        Raises:
          SelectionError: if nothing is selected.
          ChoiceDtypeError: if a selected choice is not floating point.
          ChoiceShapeError: if the array is no vector of that many numbers.
        """
        from gjflax.core.flat import from_array

        return from_array(self, array, selection)

    def strip(self) -> ChoiceMap:
        """The choices without what a trace knows of them: a choice map is stripped already."""
        return self

    def get_subtree(self, address: Address) -> ChoiceMap:
        """The choices below an address; empty where there are none."""
        submap: ChoiceMap = self
        for component in address if isinstance(address, tuple) else (address,):
            submap = submap.get_submap(component)
        return submap

    def has_subtree(self, address: Address) -> bool:
        """Whether there are choices at or below the address."""
        return not self.get_subtree(address).is_empty()

    def __contains__(self, address: Address) -> bool:
        return self.has_subtree(address)

    def __getitem__(self, address: Address) -> Any:
        """The value at an address, or the choice map below it.

        Raises:
          MissingChoiceError: if there is neither.
        """
        found = self.get_subtree(address)
        if found.is_empty():
            raise MissingChoiceError(f"No choice at {show_address(address)}. {nearest(address, self.addresses())}")
        return found.get_value() if found.is_value() else found

    def addresses(self) -> list[tuple[str, ...]]:
        """The addresses of all choices, by name (an index into a vector is no part of them)."""
        if self.is_value():
            return [()]
        return [(name, *rest) for name in self.names() for rest in self.get_submap(name).addresses()]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChoiceMap):
            return NotImplemented
        from gjflax.core.choice_map.index_forms import with_static_indices

        mine, theirs = with_static_indices(self), with_static_indices(other)
        if jax.tree.structure(mine) != jax.tree.structure(theirs):
            return False
        leaves, others = (jax.tree.leaves(choices, is_leaf=is_masked) for choices in (mine, theirs))
        return all(_same(a, b) for a, b in zip(leaves, others, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EmptyChoiceMap(ChoiceMap):
    """No choice."""

    def is_empty(self) -> bool:
        return True

    def filter(self, selection: Selection) -> ChoiceMap:
        return self

    def _to_dict(self) -> Any:
        return {}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ValueChoiceMap(ChoiceMap):
    """The value of one choice; a `Masked` one where it may be absent."""

    value: Any

    def is_value(self) -> bool:
        return True

    def get_value(self) -> Any:
        return self.value

    def filter(self, selection: Selection) -> ChoiceMap:
        return self if selection.includes_root else EmptyChoiceMap()

    def _to_dict(self) -> Any:
        return self.value


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BuiltinChoiceMap(ChoiceMap):
    """Choice maps by name. None of them is empty."""

    children: dict[str, ChoiceMap]

    def names(self) -> tuple[str, ...]:
        return tuple(self.children)

    def is_empty(self) -> bool:
        return not self.children

    def get_submap(self, component: Component) -> ChoiceMap:
        if isinstance(component, str):
            return self.children.get(component, EmptyChoiceMap())
        return EmptyChoiceMap()

    def filter(self, selection: Selection) -> ChoiceMap:
        return by_name({name: child.filter(selection[name]) for name, child in self.children.items()})

    def _to_dict(self) -> Any:
        return {name: child.to_dict() for name, child in self.children.items()}

    def _to_exact_dict(self, axes: int) -> Any:
        return {name: child._to_exact_dict(axes) for name, child in self.children.items()}

    def _tree_children(self) -> Iterator[tuple[str, Any]]:
        for name, child in self.children.items():
            yield name, child.value if isinstance(child, ValueChoiceMap) else child


def by_name(children: dict[str, ChoiceMap]) -> ChoiceMap:
    """The choice map of these children that are not empty."""
    kept = {name: child for name, child in children.items() if not child.is_empty()}
    return BuiltinChoiceMap(kept) if kept else EmptyChoiceMap()


def _same(a: Any, b: Any) -> bool:
    """Whether two values are equal: of masked ones what is there."""
    if not isinstance(a, Masked):
        return np.array_equal(np.asarray(a), np.asarray(b))
    if not np.array_equal(np.asarray(a.flag), np.asarray(b.flag)):
        return False
    pairs = zip(jax.tree.leaves(a.unmask(0)), jax.tree.leaves(b.unmask(0)), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)

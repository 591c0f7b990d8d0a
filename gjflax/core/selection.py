"""Selections: sets of addresses, by which choices are filtered, differentiated, redrawn or scored.

A selection is read from the root: ``selection["y"]`` is what it selects below ``"y"``, and `includes_root`
says whether the choice at the root itself is selected. Selections hash and compare, so they can be static.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gjflax.core.errors import InvalidAddressError
from gjflax.core.pytree import Pytree, static_field
from gjflax.core.typing import Address, Component


class Selection(Pytree):
    """A set of addresses. Made by `select`; combined with ``|``, ``&`` and ``~``."""

    def get_subselection(self, component: Component) -> Selection:
        """What is selected below one component of an address."""
        raise NotImplementedError

    @property
    def includes_root(self) -> bool:
        """Whether a choice that stands at this very place is selected."""
        raise NotImplementedError

    @property
    def is_empty(self) -> bool:
        """Whether it certainly selects nothing."""
        return False

    @property
    def indices(self) -> frozenset[int]:
        """The elements of a vector that are told apart here."""
        return frozenset()

    @property
    def mentions_indices(self) -> bool:
        """Whether elements of a vector are told apart here."""
        return bool(self.indices)

    @property
    def addresses(self) -> list[tuple[Component, ...]]:
        """The addresses that it names, whether it selects them or not."""
        return []

    def filter(self, choices: Any) -> tuple[Any, Any]:
        """The selected choices, and their share of the score.

        Args:
          choices: a trace, a choice map, or a nested dict.

        Returns:
          ``(choice_map, weight)``: the weight is the log density of the selected choices where `choices` is a
          trace (what ``project`` gives), and 0 for a choice map, which has no scores.

        >>> import gjflax
        >>> chm, _ = gjflax.select(["a"]).filter({"a": 1.0, "b": 2.0})
        >>> chm.to_dict()
        {'a': 1.0}
        """
        from gjflax.core.choice_map import choice_map
        from gjflax.core.trace import Trace

        weight = choices.project(self) if isinstance(choices, Trace) else 0.0
        return choice_map(choices).filter(self), weight

    def __getitem__(self, address: Address) -> Selection:
        selection = self
        for component in address if isinstance(address, tuple) else (address,):
            selection = selection.get_subselection(component)
        return selection

    def __contains__(self, address: Address) -> bool:
        return self[address].includes_root

    def __or__(self, other: Selection) -> Selection:
        if self.is_empty or isinstance(other, AllSelection):
            return other
        return self if other.is_empty or isinstance(self, AllSelection) or self == other else _Union(self, other)

    def __and__(self, other: Selection) -> Selection:
        if self.is_empty or isinstance(other, AllSelection):
            return self
        if other.is_empty or isinstance(self, AllSelection):
            return other
        return self if self == other else _Intersection(self, other)

    def __invert__(self) -> Selection:
        return _Complement(self)


@dataclasses.dataclass(frozen=True, repr=False)
class AllSelection(Selection):
    """Every address."""

    def get_subselection(self, component: Component) -> Selection:
        return self

    @property
    def includes_root(self) -> bool:
        return True

    def __invert__(self) -> Selection:
        return NoneSelection()


@dataclasses.dataclass(frozen=True, repr=False)
class NoneSelection(Selection):
    """No address."""

    def get_subselection(self, component: Component) -> Selection:
        return self

    @property
    def includes_root(self) -> bool:
        return False

    @property
    def is_empty(self) -> bool:
        return True

    def __invert__(self) -> Selection:
        return AllSelection()


@dataclasses.dataclass(frozen=True, repr=False)
class BuiltinSelection(Selection):
    """The addresses of a trie: ``children`` are pairs of a component and what is selected below it."""

    children: tuple[tuple[Component, Selection], ...] = static_field()

    def __eq__(self, other: object) -> bool:
        # A set: the order in which the addresses were named is for people.
        if not isinstance(other, BuiltinSelection):
            return NotImplemented
        return frozenset(self.children) == frozenset(other.children)

    def __hash__(self) -> int:
        return hash(frozenset(self.children))

    def get_subselection(self, component: Component) -> Selection:
        found = dict(self.children).get(component, NoneSelection())
        if isinstance(component, int):
            # Names that stand beside indices speak of every element.
            named = tuple((c, s) for c, s in self.children if isinstance(c, str))
            return found | BuiltinSelection(named) if named else found
        indexed = tuple((c, s[component]) for c, s in self.children if isinstance(c, int))
        indexed = tuple((c, s) for c, s in indexed if not s.is_empty)
        return found | BuiltinSelection(indexed) if indexed else found

    @property
    def includes_root(self) -> bool:
        return False

    @property
    def is_empty(self) -> bool:
        return not self.children

    @property
    def indices(self) -> frozenset[int]:
        return frozenset(component for component, _ in self.children if isinstance(component, int))

    @property
    def addresses(self) -> list[tuple[Component, ...]]:
        return [(component, *rest) for component, child in self.children for rest in child.addresses or [()]]

    def _tree_children(self) -> Iterable[tuple[str, Selection]]:
        return ((str(component), child) for component, child in self.children)


@dataclasses.dataclass(frozen=True, repr=False)
class _Pair(Selection):
    """What two selections say together."""

    left: Selection = static_field()
    right: Selection = static_field()

    @property
    def indices(self) -> frozenset[int]:
        return self.left.indices | self.right.indices

    @property
    def addresses(self) -> list[tuple[Component, ...]]:
        return [*self.left.addresses, *self.right.addresses]


@dataclasses.dataclass(frozen=True, repr=False)
class _Union(_Pair):
    def get_subselection(self, component: Component) -> Selection:
        return self.left.get_subselection(component) | self.right.get_subselection(component)

    @property
    def includes_root(self) -> bool:
        return self.left.includes_root or self.right.includes_root


@dataclasses.dataclass(frozen=True, repr=False)
class _Intersection(_Pair):
    def get_subselection(self, component: Component) -> Selection:
        return self.left.get_subselection(component) & self.right.get_subselection(component)

    @property
    def includes_root(self) -> bool:
        return self.left.includes_root and self.right.includes_root


@dataclasses.dataclass(frozen=True, repr=False)
class _Complement(Selection):
    inner: Selection = static_field()

    def get_subselection(self, component: Component) -> Selection:
        return ~self.inner.get_subselection(component)

    @property
    def includes_root(self) -> bool:
        return not self.inner.includes_root

    @property
    def indices(self) -> frozenset[int]:
        return self.inner.indices

    @property
    def addresses(self) -> list[tuple[Component, ...]]:
        return self.inner.addresses

    def __invert__(self) -> Selection:
        return self.inner


def select(*addresses: Any) -> Selection:
    """The selection of the given addresses, each with all that stands below it.

    Args:
      *addresses: addresses (``"x"``, ``("y", "pos")``, ``("y", 3)``), lists of addresses, nested dicts whose
        leaves are True or selections, or selections.

    Raises:
      InvalidAddressError: if something is none of these.

    >>> selection = select(["a", ("y", "pos")])
    >>> "a" in selection, ("y", "pos") in selection, "b" in selection
    (True, True, False)
    >>> ("y", "pos") in ~selection
    False
    """
    selection: Selection = NoneSelection()
    trie: dict[Component, Any] = {}
    for address in addresses:
        if isinstance(address, Selection):
            selection = selection | address
        elif isinstance(address, Mapping):
            parts = [(key, select(child) if child is not True else AllSelection()) for key, child in address.items()]
            selection = selection | BuiltinSelection(tuple(parts))
        elif isinstance(address, (list, set, frozenset)):
            for part in address:
                if isinstance(part, (Selection, Mapping, list)):
                    selection = selection | select(part)
                else:
                    _insert(trie, part)
        else:
            _insert(trie, address)
    return selection | _freeze(trie)


def _insert(trie: dict[Component, Any], address: Any) -> None:
    components = address if isinstance(address, tuple) else (address,)
    for component in components:
        if isinstance(component, bool) or not isinstance(component, (str, int, np.integer)):
            raise InvalidAddressError(
                f"An address is a string, an index, or a tuple of these; got {address!r} in a selection."
            )
        if not isinstance(component, str) and component < 0:
            raise InvalidAddressError(f"Indices count from 0; got {address!r} in a selection.")
    if not components:
        raise InvalidAddressError("The empty address selects nothing in particular: use AllSelection().")
    components = tuple(part if isinstance(part, str) else int(part) for part in components)
    for component in components[:-1]:
        below = trie.setdefault(component, {})
        if below is True:
            return
        trie = below
    trie[components[-1]] = True


def _freeze(trie: dict[Component, Any]) -> Selection:
    if not trie:
        return NoneSelection()
    return BuiltinSelection(
        tuple((c, AllSelection() if below is True else _freeze(below)) for c, below in trie.items())
    )

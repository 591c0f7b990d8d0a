"""Choice maps: values of choices by address.

========================  =====================================================================
`EmptyChoiceMap`          no choice
`ValueChoiceMap`          one choice, at the root
`BuiltinChoiceMap`        choice maps by name
`VectorChoiceMap`         choices of the elements of a vector: ``indices``, and an inner choice map whose values
                          have one more leading axis
========================  =====================================================================

`choice_map` makes them from nested dicts; plain nested dicts are accepted wherever a choice map is.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gjflax.core.errors import ChoiceMapError, MissingChoiceError, nearest, show_address
from gjflax.core.masked import Masked, static_flag, where
from gjflax.core.pytree import Const, Pytree
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

        >>> choice_map({"a": 1.0}).merge({"b": 2.0}).to_dict()
        {'a': 1.0, 'b': 2.0}
        """
        return _combine(self, choice_map(other), (), overwrite=False)

    def overwrite(self, other: Any) -> ChoiceMap:
        """The choices of both; where both have a value, the other's."""
        return _combine(self, choice_map(other), (), overwrite=True)

    def __or__(self, other: Any) -> ChoiceMap:
        """The choices of both, as `merge` gives them."""
        return self.merge(other)

    def __ror__(self, other: Any) -> ChoiceMap:
        return choice_map(other).merge(self)

    def __sub__(self, other: Any) -> ChoiceMap:
        """The choices that a selection does not select, or another choice map does not have.

        A `Masked` choice of the other takes away what is there where its flag is true.

        Raises:
          ChoiceMapError: if one has a value where the other has names, or what is left of a vector of choices has other
            addresses at one index than at another, or indices are not known while tracing.

        >>> from gjflax import select
        >>> chm = choice_map({"a": 1.0, "b": 2.0})
        >>> (chm - {"a": 0.0}).to_dict(), (chm - select("b")).to_dict()
        ({'b': 2.0}, {'a': 1.0})
        """
        from gjflax.core.difference import difference

        return self.filter(~other) if isinstance(other, Selection) else difference(self, choice_map(other))

    def to_dict(self, *, exact: bool = False) -> Any:
        """As a nested dict; the value itself where one choice stands at the root.

        Args:
          exact: whether a vector of all elements is told apart from arrays, by a key ``range(n)`` above them. Then
            `from_dict` gives an equal choice map back. The indices of a vector must be known while tracing.

        Raises:
          ChoiceMapError: if the indices of a vector are not known while tracing.
        """
        return _exact_dict(self, 0) if exact else self._to_dict()

    def _to_dict(self) -> Any:
        raise NotImplementedError

    @classmethod
    def from_dict(cls, choices: Any) -> ChoiceMap:
        """The choice map of a nested dict, as `choice_map` makes it.

        >>> chm = VectorChoiceMap(range(2), {"x": jnp.array([1.0, 2.0])})
        >>> ChoiceMap.from_dict(chm.to_dict(exact=True)) == chm
        True
        """
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

        >>> from gjflax import select
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
        if jax.tree.structure(self) != jax.tree.structure(other):
            return False
        leaves, others = (jax.tree.leaves(choices, is_leaf=_is_masked) for choices in (self, other))
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

    def _tree_children(self) -> Iterator[tuple[str, Any]]:
        for name, child in self.children.items():
            yield name, child.value if isinstance(child, ValueChoiceMap) else child


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class VectorChoiceMap(ChoiceMap):
    """Choices of the elements of a vector.

    Args:
      indices: which elements: a range, list, tuple or numpy array of integers, which are checked while tracing, or
        a JAX array of integers (possibly traced), which cannot be. Of a vector inside of another one the array has the
        axis of the outer one before its own.
      inner: a choice map, or nested dict, whose values have the axes of `indices` before their own.

    Raises:
      ChoiceMapError: if the indices repeat or are not integers, or a value has another leading axis.

    >>> chm = VectorChoiceMap([0, 3], {"pos": jnp.array([1.0, 2.0])})
    >>> float(chm[3, "pos"])
    2.0

    One element of a vector in a vector, at indices that may be traced:

    >>> i, j = jnp.array(1), jnp.array(2)
    >>> chm = VectorChoiceMap(i[None], VectorChoiceMap(j[None, None], jnp.array([[0.5]])))
    >>> chm.inner.indices.shape
    (1, 1)
    """

    indices: Any
    inner: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", choice_map(self.inner))
        object.__setattr__(self, "indices", _check_indices(self.indices))
        shape = (len(self),) if self.static_indices is not None else self.indices.shape
        for address in self.inner.addresses():
            value = self.inner.get_subtree(address).get_value()
            for leaf in jax.tree.leaves(value):
                if jnp.shape(leaf)[: len(shape)] != shape:
                    raise ChoiceMapError(
                        f"A VectorChoiceMap of {_counted(shape)} needs values with {_leading(shape)}; the value at "
                        f"{show_address(address)} has shape {jnp.shape(leaf)}."
                    )
        for inside in _vectors_in(self.inner):
            indices = inside.indices
            if inside.static_indices is None and indices.shape[:-1] != shape:
                raise ChoiceMapError(
                    f"Inside of a VectorChoiceMap of {_counted(shape)} a vector's indices have {_leading(shape)} too; got "
                    f"indices of shape {indices.shape}. For one element (i, j): "
                    "VectorChoiceMap(i[None], VectorChoiceMap(j[None, None], values[None, None]))."
                )

    def __len__(self) -> int:
        indices = self.static_indices
        # In a batch the indices have its axes too, before their own.
        return len(indices) if indices is not None else self.indices.shape[-1]

    @property
    def static_indices(self) -> range | tuple[int, ...] | None:
        """The indices where they are known while tracing, else None."""
        return self.indices.value if isinstance(self.indices, Const) else None

    @property
    def known_indices(self) -> range | tuple[int, ...] | None:
        """The indices where they are not being traced and not a batch of them, else None."""
        static = self.static_indices
        if static is not None or isinstance(self.indices, Tracer) or np.ndim(self.indices) != 1:
            return static
        return tuple(np.asarray(self.indices).tolist())

    def index_array(self) -> Any:
        """The indices as an integer array."""
        indices = self.static_indices
        return self.indices if indices is None else np.asarray(indices, np.int32)

    def find(self, indices: Any) -> tuple[Any, Any]:
        """The positions of some indices, and whether they are there; both shaped as these."""
        indices, own = jnp.asarray(indices)[..., None], jnp.asarray(self.index_array())
        alike = indices == jnp.expand_dims(own, tuple(range(indices.ndim - 1)))
        return jnp.argmax(alike, axis=-1), jnp.any(alike, axis=-1)

    def covers(self, length: int) -> bool:
        """Whether these are certainly all the elements of a vector of this length, in order."""
        indices = self.static_indices
        return indices is not None and len(indices) == length and tuple(indices) == tuple(range(length))

    def names(self) -> tuple[str, ...]:
        return self.inner.names()

    def is_empty(self) -> bool:
        return len(self) == 0 or self.inner.is_empty()

    def is_value(self) -> bool:
        return self.inner.is_value()

    def get_value(self) -> Any:
        return self.inner.get_value()

    def get_submap(self, component: Component) -> ChoiceMap:
        if isinstance(component, str):
            return vector(self.indices, self.inner.get_submap(component))
        return self._element(component)

    def _element(self, index: Any) -> ChoiceMap:
        indices = self.known_indices
        if isinstance(index, jax.Array) and not isinstance(index, Tracer):
            index = int(index)
        if isinstance(index, (int, np.integer)) and indices is not None:
            if index < 0 and isinstance(indices, range):
                index += len(indices)
            if index not in indices:
                return EmptyChoiceMap()
            position: Any = indices.index(int(index))
        elif isinstance(indices, range):
            position = index
        else:
            position = jnp.argmax(jnp.asarray(self.index_array()) == index)
        return jax.tree.map(lambda leaf: leaf[position], self.inner)

    def filter(self, selection: Selection) -> ChoiceMap:
        if not selection.mentions_indices:
            return vector(self.indices, self._each(lambda inner: inner.filter(selection)))
        indices = self.known_indices
        if indices is None:
            raise ChoiceMapError("A selection by index needs indices that are known while tracing.")
        filtered = {
            subselection: self._each(lambda inner, s=subselection: inner.filter(s))
            for subselection in {selection[index] for index in indices}
        }
        positions = [p for p, index in enumerate(indices) if not filtered[selection[index]].is_empty()]
        if not positions:
            return EmptyChoiceMap()
        parts = [filtered[selection[indices[p]]] for p in positions]
        if len({jax.tree.structure(part) for part in parts}) > 1:
            raise ChoiceMapError(
                "A selection of different addresses at different indices of one vector has no choice map. "
                "Select the same addresses at each index."
            )
        at = np.asarray(positions)
        return VectorChoiceMap(tuple(indices[p] for p in positions), jax.tree.map(lambda leaf: leaf[at], parts[0]))

    def _each(self, function: Callable[..., Any], *others: Any) -> Any:
        """A function of the inner choices of one element, at all of them."""
        # Vectors inside have the elements' axis before their own; where there are none it is of no concern.
        if any(map(has_vector, (self.inner, *others))):
            return jax.vmap(function)(self.inner, *others)
        return function(self.inner, *others)

    def _to_dict(self) -> Any:
        """The inner dict where all elements are there, else a dict by index."""
        indices = self.known_indices
        if isinstance(indices, range) and _is_full(self.inner):
            return self.inner.to_dict()
        if indices is None:
            raise ChoiceMapError(_NO_KEYS)
        return {index: self._element(index).to_dict() for index in indices}

    def _tree_children(self) -> Iterator[tuple[str, Any]]:
        indices = self.static_indices
        yield "indices", range(len(indices)) if indices is not None else self.indices
        if isinstance(self.inner, BuiltinChoiceMap):
            yield from self.inner._tree_children()
        else:
            yield "inner", self.inner.value if isinstance(self.inner, ValueChoiceMap) else self.inner


_NO_KEYS = "A vector with traced indices has no dict: its keys are not known."


def _exact_dict(choices: ChoiceMap, axes: int) -> Any:
    """The dict that tells vectors apart from arrays. `axes` is how many the values have of the vectors around."""
    if isinstance(choices, BuiltinChoiceMap):
        return {name: _exact_dict(child, axes) for name, child in choices.children.items()}
    if not isinstance(choices, VectorChoiceMap):
        return choices.to_dict()
    indices = choices.known_indices
    if indices is None:
        raise ChoiceMapError(_NO_KEYS)
    if isinstance(indices, range):
        return {indices: _exact_dict(choices.inner, axes + 1)}
    before = (slice(None),) * axes
    elements = [
        jax.tree.map(lambda leaf, at=position: leaf[(*before, at)], choices.inner) for position in range(len(indices))
    ]
    return {index: _exact_dict(element, axes) for index, element in zip(indices, elements, strict=True)}


def _check_indices(indices: Any) -> Any:
    if isinstance(indices, Const):
        return indices
    if isinstance(indices, range) and indices == range(len(indices)):
        # All elements. A range that leaves some out is one way to write a tuple.
        return Const(indices)
    if isinstance(indices, (range, list, tuple, np.ndarray)):
        array = np.asarray(indices)
        if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
            raise ChoiceMapError(f"Indices are integers in one dimension; got {indices!r}.")
        if len(set(array.tolist())) != array.size:
            raise ChoiceMapError(f"Indices must not repeat; got {array.tolist()}.")
        if array.size and array.min() < 0:
            raise ChoiceMapError(f"Indices count from 0; got {array.tolist()}.")
        return Const(tuple(array.tolist()))
    if isinstance(indices, jax.Array) and jnp.issubdtype(indices.dtype, jnp.integer) and indices.ndim >= 1:
        return indices
    raise ChoiceMapError(f"Indices are integers in one dimension; got {indices!r}.")


def _counted(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} indices" if len(shape) == 1 else f"indices of shape {shape}"


def _leading(shape: tuple[int, ...]) -> str:
    return f"a leading axis of {shape[0]}" if len(shape) == 1 else f"the leading axes {shape}"


def _vectors_in(choices: ChoiceMap) -> Iterator[VectorChoiceMap]:
    """The outermost vectors in these choices."""
    if isinstance(choices, VectorChoiceMap):
        yield choices
    else:
        for name in choices.names():
            yield from _vectors_in(choices.get_submap(name))


def has_vector(choices: ChoiceMap) -> bool:
    """Whether there is a vector in these choices."""
    return isinstance(choices, VectorChoiceMap) or any(has_vector(choices.get_submap(name)) for name in choices.names())


def _is_full(choices: ChoiceMap) -> bool:
    """Whether all vectors in these choices have all their elements."""
    if isinstance(choices, VectorChoiceMap):
        return isinstance(choices.static_indices, range) and _is_full(choices.inner)
    return all(_is_full(choices.get_submap(name)) for name in choices.names())


def vector(indices: Any, inner: ChoiceMap) -> ChoiceMap:
    """A `VectorChoiceMap` of values that are known to fit, or the empty map."""
    if inner.is_empty():
        return inner
    new = object.__new__(VectorChoiceMap)
    object.__setattr__(new, "indices", Const(indices) if isinstance(indices, range) else indices)
    object.__setattr__(new, "inner", inner)
    return new


def by_name(children: dict[str, ChoiceMap]) -> ChoiceMap:
    """The choice map of these children that are not empty."""
    kept = {name: child for name, child in children.items() if not child.is_empty()}
    return BuiltinChoiceMap(kept) if kept else EmptyChoiceMap()


def choice_map(choices: Any = None) -> ChoiceMap:
    """A choice map from a nested dict, a trace, a value, or a choice map.

    Keys are names, indices, or tuples of these; so ``{("y", 3, "pos"): v}`` is the choice ``"pos"`` of element 3
    of ``"y"``. A range is a key for several elements, whose values have one more leading axis. The key ``()`` is the root.

    Raises:
      ChoiceMapError: on keys that are not addresses, that contradict each other, or mix names and indices.

    >>> chm = choice_map({"a": 1.0, ("y", "pos"): 2.0})
    >>> chm["a"], chm["y", "pos"]
    (1.0, 2.0)
    >>> choice_map({("y", 3, "pos"): 2.0, ("y", 5, "pos"): 4.0})["y"]
    VectorChoiceMap
    ├── indices: i32[2]
    └── pos: f32[2]
    """
    if isinstance(choices, ChoiceMap):
        return choices
    if choices is None:
        return EmptyChoiceMap()
    strip = getattr(choices, "strip", None)
    if isinstance(choices, Pytree) and strip is not None:
        return strip()
    if isinstance(choices, Mapping):
        return _from_mapping(choices)
    if isinstance(choices, list):
        return ValueChoiceMap(_stacked(choices))
    if isinstance(choices, Masked):
        return _masked_value(choices)
    if isinstance(choices, (numbers.Number, np.ndarray, np.generic, jax.Array)):
        return ValueChoiceMap(choices)
    raise ChoiceMapError(
        f"Expected a choice map, a nested dict or a value, got {type(choices).__name__}: {choices!r:.80}"
    )


def _masked_value(choice: Masked) -> ChoiceMap:
    flag = choice.flag
    if static_flag(flag) is None and getattr(flag, "dtype", None) != jnp.bool_:
        raise ChoiceMapError(f"The flag of a Masked value is a boolean, or an array of booleans; got {flag!r:.80}.")
    return masked(choice_map(choice.value), flag)


def masked(choices: ChoiceMap, flag: Any) -> ChoiceMap:
    """The choices where a flag is true: each becomes `Masked`. A flag that is known now keeps or drops them.

    Args:
      choices: the choices, or a batch of them.
      flag: a boolean, or an array of them with the axes of the batch.

    Raises:
      ChoiceMapError: if the flag has axes that the values do not have.

    >>> masked(choice_map({"x": 1.0}), jnp.array(True))["x"].flag
    Array(True, dtype=bool)
    """
    known = static_flag(flag)
    if known is not None:
        return choices if known else EmptyChoiceMap()
    return _masked_below(choices, jnp.asarray(flag), ())


def _masked_below(choices: ChoiceMap, flag: Any, at: tuple[Any, ...]) -> ChoiceMap:
    if isinstance(choices, ValueChoiceMap):
        value, shape = choices.value, flag.shape
        if isinstance(value, Masked):
            value, flag = value.value, _both(value.flag, flag)
        for leaf in jax.tree.leaves(value):
            if jnp.shape(leaf)[: len(shape)] != shape:
                raise ChoiceMapError(
                    f"The flag given for {show_address(at)} has shape {shape}, and its value {jnp.shape(leaf)}: a flag "
                    "is one boolean, or has one for each element of a vector of choices."
                )
        return ValueChoiceMap(Masked(value, flag))
    if isinstance(choices, VectorChoiceMap):
        every = jnp.broadcast_to(flag[..., None], (*flag.shape, len(choices)))
        return vector(choices.indices, _masked_below(choices.inner, every, at))
    return by_name({name: _masked_below(choices.get_submap(name), flag, (*at, name)) for name in choices.names()})


def _both(*flags: Any) -> Any:
    """Whether both flags are true, of which one may lack the last axes of the other."""
    axes = max(map(jnp.ndim, flags))
    one, other = (jnp.reshape(flag, (*jnp.shape(flag), *[1] * (axes - jnp.ndim(flag)))) for flag in flags)
    return one & other


def _flagged_alike(*parts: ChoiceMap, axes: int = 0) -> list[ChoiceMap]:
    """The choice maps, with a flag for every choice that has one in any of them. `axes` is how many all values have."""
    flagged = {
        address
        for part in parts
        for address in part.addresses()
        if isinstance(part.get_subtree(address).get_value(), Masked)
    }

    def flag(choices: ChoiceMap, at: tuple[Any, ...], axes: int) -> ChoiceMap:
        if isinstance(choices, VectorChoiceMap):
            return vector(choices.indices, flag(choices.inner, at, axes + 1))
        if not isinstance(choices, ValueChoiceMap):
            return by_name({name: flag(choices.get_submap(name), (*at, name), axes) for name in choices.names()})
        if at not in flagged or isinstance(choices.value, Masked):
            return choices
        return ValueChoiceMap(Masked(choices.value, jnp.ones(jnp.shape(choices.value)[:axes], bool)))

    return [flag(part, (), axes) if flagged else part for part in parts]


def _is_masked(value: Any) -> bool:
    return isinstance(value, Masked)


def _same(a: Any, b: Any) -> bool:
    """Whether two values are equal: of masked ones what is there."""
    if not isinstance(a, Masked):
        return np.array_equal(np.asarray(a), np.asarray(b))
    if not np.array_equal(np.asarray(a.flag), np.asarray(b.flag)):
        return False
    pairs = zip(jax.tree.leaves(a.unmask(0)), jax.tree.leaves(b.unmask(0)), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def _over(below: Any, above: Any, at: tuple[Any, ...]) -> Any:
    """One value over another: where the upper one is absent the lower one stays."""
    if not isinstance(above, Masked):
        return above
    stays = below.value if isinstance(below, Masked) else below
    shapes, stays_shapes = (jax.tree.map(jnp.shape, value) for value in (above.value, stays))
    if shapes != stays_shapes:
        raise ChoiceMapError(
            f"The value for {show_address(at)} may be absent and has shape {shapes}; the one that would then stay has "
            f"shape {stays_shapes}."
        )
    value = jax.tree.map(lambda a, b: where(above.flag, a, b), above.value, stays)
    return Masked(value, above.flag | below.flag) if isinstance(below, Masked) else value


def _stacked(values: list[Any]) -> Any:
    try:
        return jnp.asarray(values)
    except (TypeError, ValueError) as error:
        raise ChoiceMapError(f"A list as a value stands for an array; this one is none: {values!r:.80}") from error


def _from_mapping(mapping: Mapping[Any, Any], lengths: tuple[int, ...] = ()) -> ChoiceMap:
    """The choices of a nested dict that stands below ranges of these lengths, which are the leading axes of its values."""
    result: ChoiceMap = EmptyChoiceMap()
    elements: dict[int, ChoiceMap] = {}
    for key, value in mapping.items():
        components = key if isinstance(key, tuple) else (key,)
        for component in components:
            if isinstance(component, bool) or not isinstance(component, (str, int, np.integer, range)):
                raise ChoiceMapError(
                    f"A key of a choice map is a name, an index, a range of indices, or a tuple of these; got {key!r}."
                )
        inside = (*lengths, *(len(component) for component in components if isinstance(component, range)))
        if isinstance(value, Mapping):
            below = _from_mapping(value, inside)
        else:
            below = _check_axes(choice_map(value), inside, key)
        axes = len(inside)
        for component in reversed(components[1:]):
            axes -= isinstance(component, range)
            below = _below(component, below, axes)
        if components and isinstance(components[0], (int, np.integer)):
            index = int(components[0])
            elements[index] = _combine(elements.get(index, EmptyChoiceMap()), below, (index,), overwrite=False)
        elif components:
            result = _combine(result, _below(components[0], below, len(lengths)), (), overwrite=False)
        else:
            result = _combine(result, below, (), overwrite=False)
    if not elements:
        return result
    return _combine(result, _stack(elements, len(lengths)), (), overwrite=False)


def _check_axes(choices: ChoiceMap, lengths: tuple[int, ...], key: Any) -> ChoiceMap:
    """The choices, with an error where values do not have the axes of the ranges around them."""
    for leaf in jax.tree.leaves(choices) if lengths else ():
        if jnp.shape(leaf)[: len(lengths)] != lengths:
            raise ChoiceMapError(
                f"The key {key!r} stands at or below ranges of indices, so its values need leading axes of {lengths}; got "
                f"the shape {jnp.shape(leaf)}."
            )
    return choices


def _below(component: Component | range, choices: ChoiceMap, axes: int) -> ChoiceMap:
    """The choices below one component, whose values have so many axes of ranges around them."""
    if choices.is_empty():
        return choices
    if isinstance(component, range):
        return vector(_check_indices(component), choices)
    if isinstance(component, str):
        return BuiltinChoiceMap({component: choices})
    return _stack({int(component): choices}, axes)


def _stack(elements: dict[int, ChoiceMap], axes: int = 0) -> ChoiceMap:
    parts = _flagged_alike(*elements.values(), axes=axes)
    if len({jax.tree.structure(part) for part in parts}) > 1:
        raise ChoiceMapError(
            f"The elements {sorted(elements)} of a vector have choices at different addresses. Give each the same; or values "
            "for all elements with flags of those that are there, `Masked(values, flags)`."
        )
    inner = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves], axes), *parts)
    return vector(_check_indices(tuple(elements)), inner)


def _combine(a: ChoiceMap, b: ChoiceMap, at: tuple[Any, ...], overwrite: bool) -> ChoiceMap:
    if a.is_empty() or b.is_empty():
        return b if a.is_empty() else a
    if isinstance(a, BuiltinChoiceMap) and isinstance(b, BuiltinChoiceMap):
        children = dict(a.children)
        for name, child in b.children.items():
            children[name] = _combine(children[name], child, (*at, name), overwrite) if name in children else child
        return BuiltinChoiceMap(children)
    if isinstance(a, VectorChoiceMap) and isinstance(b, VectorChoiceMap):
        return _combine_vectors(a, b, at, overwrite)
    if isinstance(a, VectorChoiceMap) and isinstance(b, BuiltinChoiceMap) and isinstance(a.static_indices, range):
        # Names with whole arrays below them speak of every element.
        return _combine(a, vector(a.indices, b), at, overwrite)
    if isinstance(b, VectorChoiceMap) and isinstance(a, BuiltinChoiceMap) and isinstance(b.static_indices, range):
        return _combine(vector(b.indices, a), b, at, overwrite)
    if overwrite and isinstance(a, ValueChoiceMap) and isinstance(b, ValueChoiceMap):
        return ValueChoiceMap(_over(a.value, b.value, at))
    if overwrite:
        return b
    raise ChoiceMapError(f"Two choice maps both speak of {show_address(at)}. Drop one of them, or use `overwrite`.")


def _combine_vectors(a: VectorChoiceMap, b: VectorChoiceMap, at: tuple[Any, ...], overwrite: bool) -> ChoiceMap:
    ours, theirs = a.static_indices, b.static_indices
    alike = ours is not None and theirs is not None and tuple(ours) == tuple(theirs)
    if alike or a.indices is b.indices:
        return vector(a.indices, a._each(lambda x, y: _combine(x, y, at, overwrite), b.inner))
    if overwrite and isinstance(ours, range):
        # Into a full vector the elements are written in place.
        return _scatter(a, b, (), at)
    below, above = _flagged_alike(a.inner, b.inner, axes=1)
    same_addresses = jax.tree.structure(below) == jax.tree.structure(above)
    if ours is not None and theirs is not None and same_addresses and (overwrite or not set(ours) & set(theirs)):
        kept = np.asarray([position for position, index in enumerate(ours) if index not in theirs], np.int32)
        shared = np.asarray([index in ours for index in theirs])
        under = np.asarray([ours.index(index) if index in ours else 0 for index in theirs], np.int32)
        inner = _joined(below, above, kept, shared, under, at)
        return VectorChoiceMap((*(ours[position] for position in kept), *theirs), inner)
    below, above = _flagged_alike(_padded(a.inner, b.inner, len(a)), _padded(b.inner, a.inner, len(b)), axes=1)
    if overwrite and jax.tree.structure(below) == jax.tree.structure(above):
        under, shared = a.find(b.index_array())
        inner = _joined(below, above, slice(None), shared, under, at)
        # What is written over stays in the array, at an index of none.
        kept = jnp.where(b.find(a.index_array())[1], np.int32(-1), jnp.asarray(a.index_array(), np.int32))
        return vector(jnp.concatenate([kept, jnp.asarray(b.index_array(), np.int32)]), inner)
    raise ChoiceMapError(
        f"Two vectors of choices at {show_address(at)} share elements, have different addresses, "
        "or have indices that are not known while tracing; they cannot be merged."
    )


def _padded(choices: ChoiceMap, like: ChoiceMap, length: int) -> ChoiceMap:
    """The choices of so many elements, with absent ones at the addresses that only the other has."""
    if choices.is_empty():
        absent = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape[1:]), leaf.dtype), like)
        return _masked_below(absent, jnp.zeros(length, bool), ())
    if not isinstance(choices, BuiltinChoiceMap) or not isinstance(like, BuiltinChoiceMap):
        return choices
    names = dict.fromkeys((*choices.names(), *like.names()))
    return by_name({name: _padded(choices.get_submap(name), like.get_submap(name), length) for name in names})


def _joined(below: ChoiceMap, above: ChoiceMap, kept: Any, shared: Any, under: Any, at: tuple[Any, ...]) -> ChoiceMap:
    """The elements of one vector that are `kept`, and then those of another.

    Of the other's elements, those that are `shared` stand at the positions `under` of the first: where one is absent, the
    first one's stays.
    """

    def join(x: Any, y: Any) -> Any:
        if isinstance(y, Masked):
            x_here = jax.tree.map(lambda leaf: jnp.asarray(leaf)[under], x)
            y = _over(Masked(x_here.value, _both(x_here.flag, shared)), y, at)
        with jax.numpy_dtype_promotion("standard"):
            return jax.tree.map(lambda x, y: jnp.concatenate([jnp.asarray(x)[kept], jnp.asarray(y)]), x, y)

    return jax.tree.map(join, below, above, is_leaf=_is_masked)


def _scatter(full: ChoiceMap, part: ChoiceMap, positions: tuple[Any, ...], at: tuple[Any, ...]) -> ChoiceMap:
    """The full vector's values with the part's written at the given positions, one array of them for each axis."""
    if isinstance(part, BuiltinChoiceMap) and isinstance(full, BuiltinChoiceMap):
        children = dict(full.children)
        for name, child in part.children.items():
            children[name] = _scatter(children.get(name, EmptyChoiceMap()), child, positions, (*at, name))
        return BuiltinChoiceMap(children)
    if isinstance(full, VectorChoiceMap) and isinstance(full.static_indices, range):
        if not isinstance(part, VectorChoiceMap):
            return vector(full.indices, _scatter(full.inner, part, positions, at))
        indices = part.static_indices
        if indices is not None and max(indices) >= len(full):
            raise ChoiceMapError(f"Element {max(indices)} of {show_address(at)} is given; it has {len(full)} elements.")
        return vector(full.indices, _scatter(full.inner, part.inner, (*positions, part.index_array()), at))
    if isinstance(full, ValueChoiceMap) and isinstance(part, ValueChoiceMap):
        return ValueChoiceMap(_write_over(full.value, part.value, jnp.ix_(*positions), at))
    if full.is_empty() or jax.tree.structure(full) != jax.tree.structure(part):
        raise ChoiceMapError(
            f"The elements of {show_address(at)} that are written have addresses that the vector does not have."
        )
    return jax.tree.map(lambda x, y: _written(x, jnp.ix_(*positions), y, at), full, part)


def _write_over(full: Any, part: Any, positions: Any, at: tuple[Any, ...]) -> Any:
    """A value with elements of it written over; where the part is absent, the full value stays."""
    if isinstance(full, Masked) or isinstance(part, Masked):
        old = jax.tree.map(lambda leaf: jnp.asarray(leaf)[positions], full)
        part = _over(old, part, at)
        if isinstance(full, Masked) and not isinstance(part, Masked):
            part = Masked(part, jnp.ones_like(old.flag))
    return jax.tree.map(lambda x, y: _written(x, positions, y, at), full, part)


def _written(full: Any, positions: Any, part: Any, at: tuple[Any, ...]) -> Any:
    """An array with a part of it written over, in the dtype that holds both."""
    full, part = jnp.asarray(full), jnp.asarray(part)
    shape = (*np.broadcast_shapes(*map(jnp.shape, positions)), *full.shape[len(positions) :])
    if part.shape != shape:
        raise ChoiceMapError(
            f"The elements of {show_address(at)} that are written have shape {part.shape}; those of the vector have {shape}."
        )
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(full, part)
        return full.astype(dtype).at[positions].set(part.astype(dtype))

"""`VectorChoiceMap`: choices of the elements of a vector.

The values of the choices of the elements i_1, …, i_n stand stacked, in one choice map whose values have one more leading
axis: value[k] is that of element i_k. The indices are ``range(n)`` where these are all elements in order, a tuple where they
are some that are known while tracing, and else an array, which may be traced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gjflax.core.choice_map.base import BuiltinChoiceMap, ChoiceMap, EmptyChoiceMap, ValueChoiceMap
from gjflax.core.errors import ChoiceMapError, show_address
from gjflax.core.indices import certainly_repeat
from gjflax.core.pytree import Const
from gjflax.core.selection import Selection
from gjflax.core.typing import Component

_NO_KEYS = "A vector with traced indices, or a batch of vectors with indices each, has no dict: its keys are not known."


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class VectorChoiceMap(ChoiceMap):
    """Choices of the elements of a vector.

    Args:
      indices: which elements: a range, list, tuple or numpy array of integers, which are static, or a JAX array of
        integers, possibly traced. Of a vector inside of another one the array has the axis of the outer one before its
        own. Indices must not repeat. Where they are traced and do, the choice map cannot say so: then the weight of
        what is given it is NaN, as it is where one is out of range.
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
        object.__setattr__(self, "inner", ChoiceMap.from_dict(self.inner))
        object.__setattr__(self, "indices", checked_indices(self.indices))
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
            return vector(self.indices, each_element(lambda inner: inner.filter(selection), self.inner))
        indices = self.known_indices
        if indices is None:
            raise ChoiceMapError("A selection by index needs indices that are known while tracing.")
        filtered = {
            subselection: each_element(lambda inner, s=subselection: inner.filter(s), self.inner)
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

    def _to_dict(self) -> Any:
        """The inner dict where all elements are there, else a dict by index."""
        indices = self.known_indices
        if isinstance(indices, range) and _is_full(self.inner):
            return self.inner.to_dict()
        if indices is None:
            raise ChoiceMapError(_NO_KEYS)
        return {index: self._element(index).to_dict() for index in indices}

    def _to_exact_dict(self, axes: int) -> Any:
        indices = self.known_indices
        if indices is None:
            raise ChoiceMapError(_NO_KEYS)
        own_indices = any(part.static_indices is None for part in all_vectors_in(self.inner))
        if isinstance(indices, range) and not own_indices:
            return {indices: self.inner._to_exact_dict(axes + 1)}
        before = (slice(None),) * axes
        elements = [
            jax.tree.map(lambda leaf, at=position: leaf[(*before, at)], self.inner) for position in range(len(indices))
        ]
        dicts = [element._to_exact_dict(axes) for element in elements]
        return {indices: dicts} if isinstance(indices, range) else dict(zip(indices, dicts, strict=True))

    def _tree_children(self) -> Iterator[tuple[str, Any]]:
        indices = self.static_indices
        yield "indices", range(len(indices)) if indices is not None else self.indices
        if isinstance(self.inner, BuiltinChoiceMap):
            yield from self.inner._tree_children()
        else:
            yield "inner", self.inner.value if isinstance(self.inner, ValueChoiceMap) else self.inner


def vector(indices: Any, inner: ChoiceMap) -> ChoiceMap:
    """A `VectorChoiceMap` of values that are known to fit, or the empty map."""
    if inner.is_empty():
        return inner
    new = object.__new__(VectorChoiceMap)
    object.__setattr__(new, "indices", Const(indices) if isinstance(indices, range) else indices)
    object.__setattr__(new, "inner", inner)
    return new


def has_vector(choices: ChoiceMap) -> bool:
    """Whether there is a vector in these choices."""
    return next(_vectors_in(choices), None) is not None


def each_element(function: Callable[..., Any], *inner: ChoiceMap) -> Any:
    """A function of the inner choices of one element, at all of them."""
    # Vectors inside have the elements' axis before their own; where there are none it is of no concern.
    return jax.vmap(function)(*inner) if any(map(has_vector, inner)) else function(*inner)


def checked_indices(indices: Any) -> Any:
    """The indices as a vector keeps them: a `Const` of a range or tuple where they are known while tracing.

    Raises:
      ChoiceMapError: if they are no integers in one dimension, repeat, or are negative.
    """
    if isinstance(indices, Const):
        return indices
    if isinstance(indices, range) and indices == range(len(indices)):
        # All elements. A range that leaves some out is one way to write a tuple.
        return Const(indices)
    if isinstance(indices, (range, list, tuple, np.ndarray)):
        array = np.asarray(indices)
        if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
            raise ChoiceMapError(f"Indices are integers in one dimension; got {indices!r}.")
        if certainly_repeat(array):
            raise ChoiceMapError(f"Indices must not repeat; got {array.tolist()}.")
        if array.size and array.min() < 0:
            raise ChoiceMapError(f"Indices count from 0; got {array.tolist()}.")
        return Const(tuple(array.tolist()))
    if isinstance(indices, jax.Array) and jnp.issubdtype(indices.dtype, jnp.integer) and indices.ndim >= 1:
        if certainly_repeat(indices):
            raise ChoiceMapError(f"Indices must not repeat; got {np.asarray(indices).tolist()}.")
        return indices
    raise ChoiceMapError(f"Indices are integers in one dimension; got {indices!r}.")


def _vectors_in(choices: ChoiceMap) -> Iterator[VectorChoiceMap]:
    """The outermost vectors in these choices."""
    if isinstance(choices, VectorChoiceMap):
        yield choices
    else:
        for name in choices.names():
            yield from _vectors_in(choices.get_submap(name))


def all_vectors_in(choices: ChoiceMap) -> Iterator[VectorChoiceMap]:
    """The vectors in these choices, and in one another."""
    for part in _vectors_in(choices):
        yield part
        yield from all_vectors_in(part.inner)


def _is_full(choices: ChoiceMap) -> bool:
    """Whether all vectors in these choices have all their elements."""
    if isinstance(choices, VectorChoiceMap):
        return isinstance(choices.static_indices, range) and _is_full(choices.inner)
    return all(_is_full(choices.get_submap(name)) for name in choices.names())


def _counted(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} indices" if len(shape) == 1 else f"indices of shape {shape}"


def _leading(shape: tuple[int, ...]) -> str:
    return f"a leading axis of {shape[0]}" if len(shape) == 1 else f"the leading axes {shape}"

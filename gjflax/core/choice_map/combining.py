"""The choices of two choice maps: `ChoiceMap.merge` and `ChoiceMap.overwrite`.

With A and B the addresses of a and b,

    merge(a, b)      has a on A and b on B, where no address of the one is, begins or extends one of the other;
    overwrite(a, b)  has b on B, and a on those of A that do not.

Here an index into a vector is part of an address. Names with whole arrays below them speak of every element of a vector that
has all. What b has by a flag overwrites where the flag is true; elsewhere the value of a stays.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gjflax.core.choice_map.base import BuiltinChoiceMap, ChoiceMap, EmptyChoiceMap, ValueChoiceMap, by_name
from gjflax.core.choice_map.index_forms import map_vectors, with_index_arrays
from gjflax.core.choice_map.masks import flagged_alike, masked_below
from gjflax.core.choice_map.vectors import VectorChoiceMap, each_element, vector
from gjflax.core.errors import ChoiceMapError, show_address
from gjflax.core.masked import Masked, both, is_masked, where


def combine(a: ChoiceMap, b: ChoiceMap, at: tuple[Any, ...], overwrite: bool) -> ChoiceMap:
    """The choices of both, which stand below the address `at`.

    Raises:
      ChoiceMapError: if both have a value for one address and neither overwrites, or two vectors have no common form.
    """
    if a.is_empty() or b.is_empty():
        return b if a.is_empty() else a
    if isinstance(a, BuiltinChoiceMap) and isinstance(b, BuiltinChoiceMap):
        children = dict(a.children)
        for name, child in b.children.items():
            children[name] = combine(children[name], child, (*at, name), overwrite) if name in children else child
        return BuiltinChoiceMap(children)
    if isinstance(a, VectorChoiceMap) and isinstance(b, VectorChoiceMap):
        return _combine_vectors(a, b, at, overwrite)
    if isinstance(a, VectorChoiceMap) and isinstance(b, BuiltinChoiceMap) and isinstance(a.static_indices, range):
        # Names with whole arrays below them speak of every element.
        return combine(a, vector(a.indices, b), at, overwrite)
    if isinstance(b, VectorChoiceMap) and isinstance(a, BuiltinChoiceMap) and isinstance(b.static_indices, range):
        return combine(vector(b.indices, a), b, at, overwrite)
    if overwrite and isinstance(a, ValueChoiceMap) and isinstance(b, ValueChoiceMap):
        return ValueChoiceMap(_over(a.value, b.value, at))
    if overwrite:
        return b
    raise ChoiceMapError(f"Two choice maps both speak of {show_address(at)}. Drop one of them, or use `overwrite`.")


def _combine_vectors(a: VectorChoiceMap, b: VectorChoiceMap, at: tuple[Any, ...], overwrite: bool) -> ChoiceMap:
    ours, theirs = a.static_indices, b.static_indices
    alike = ours is not None and theirs is not None and tuple(ours) == tuple(theirs)
    if alike or a.indices is b.indices:
        return vector(a.indices, each_element(lambda x, y: combine(x, y, at, overwrite), a.inner, b.inner))
    if overwrite and isinstance(ours, range):
        # Into a full vector the elements are written in place.
        return _scatter(a, b, (), at)
    below, above = flagged_alike(a.inner, b.inner, axes=1)
    if jax.tree.structure(below) != jax.tree.structure(above):
        # Vectors inside may have other indices in each element.
        arrays = [with_index_arrays(part, (len(vectors),)) for part, vectors in ((below, a), (above, b))]
        below, above = arrays if jax.tree.structure(arrays[0]) == jax.tree.structure(arrays[1]) else (below, above)
    same_addresses = jax.tree.structure(below) == jax.tree.structure(above)
    if ours is not None and theirs is not None and same_addresses and (overwrite or not set(ours) & set(theirs)):
        kept = np.asarray([position for position, index in enumerate(ours) if index not in theirs], np.int32)
        shared = np.asarray([index in ours for index in theirs])
        under = np.asarray([ours.index(index) if index in ours else 0 for index in theirs], np.int32)
        inner = _joined(below, above, kept, shared, under, at)
        return VectorChoiceMap((*(ours[position] for position in kept), *theirs), inner)
    below, above = flagged_alike(_padded(a.inner, b.inner, len(a)), _padded(b.inner, a.inner, len(b)), axes=1)
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
        return masked_below(_blank(like, length), jnp.zeros(length, bool), ())
    if not isinstance(choices, BuiltinChoiceMap) or not isinstance(like, BuiltinChoiceMap):
        return choices
    names = dict.fromkeys((*choices.names(), *like.names()))
    return by_name({name: _padded(choices.get_submap(name), like.get_submap(name), length) for name in names})


def _blank(like: ChoiceMap, length: int) -> ChoiceMap:
    """Zeros as choices of so many elements; indices of vectors inside are any that do not repeat."""

    def blank(part: VectorChoiceMap) -> ChoiceMap:
        indices = part.indices
        if part.static_indices is None:
            every = jnp.arange(len(part), dtype=indices.dtype)
            indices = jnp.broadcast_to(every, (length, *indices.shape[1:]))
        return vector(indices, _blank(part.inner, length))

    return map_vectors(blank, like, lambda leaf: jnp.zeros((length, *jnp.shape(leaf)[1:]), jnp.asarray(leaf).dtype))


def _joined(below: ChoiceMap, above: ChoiceMap, kept: Any, shared: Any, under: Any, at: tuple[Any, ...]) -> ChoiceMap:
    """The elements of one vector that are `kept`, and then those of another.

    Of the other's elements, those that are `shared` stand at the positions `under` of the first: where one is absent, the
    first one's stays.
    """

    def join(x: Any, y: Any) -> Any:
        if isinstance(y, Masked):
            x_here = jax.tree.map(lambda leaf: jnp.asarray(leaf)[under], x)
            y = _over(Masked(x_here.value, both(x_here.flag, shared)), y, at)
        with jax.numpy_dtype_promotion("standard"):
            return jax.tree.map(lambda x, y: jnp.concatenate([jnp.asarray(x)[kept], jnp.asarray(y)]), x, y)

    return jax.tree.map(join, below, above, is_leaf=is_masked)


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

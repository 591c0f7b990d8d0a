r"""Reading and writing a few elements of large arrays at a cost that does not grow with the arrays.

A loop that carries a trace and changes one element in each step should cost what one element costs. XLA writes into the
carry in place only if nobody wants the old value after the write, and it does not see by itself that all reading could be
done before: it copies. `fence` separates the two. What is read, computed and decided stands before it; what is written,
behind it. It is a conditional on a predicate that is never true, which the compiler cannot know: a barrier alone
(``jax.lax.optimization_barrier``) is dropped too early by some versions.

Under ``jax.vmap`` a conditional becomes a select, so the fence holds for one chain, not for a batch of them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from gjflax.core.diff import Diff, elements_change, no_change


def fence(values: Any, witness: Any) -> Any:
    """The values, computed before anything that uses them is written.

    Args:
      values: a tree of arrays.
      witness: an array of integers, or a random key, that the compiler does not know.
    """
    if not isinstance(witness, Tracer):
        return values
    if jnp.issubdtype(witness.dtype, jax.dtypes.prng_key):
        witness = jax.random.key_data(witness)
    # A square is 0 or 1 modulo 4, also where it wraps around.
    bits = witness.ravel()[0].astype(jnp.uint32)
    never = lax.bitwise_and(bits * bits, np.uint32(3)) == np.uint32(2)
    return lax.cond(never, lambda parts: jax.tree.map(_other, parts), lambda parts: parts, values)


def _other(value: Any) -> Any:
    """Some value of the same type, so that the two branches differ."""
    if value.dtype == jnp.bool_:
        return ~value
    return -value if jnp.issubdtype(value.dtype, jnp.number) else value


def within(indices: Any, length: int) -> Any:
    """Whether the indices are those of elements."""
    return (indices >= 0) & (indices < length)


def take_elements(tree: Any, indices: Any) -> Any:
    """The elements at some indices of the leading axis; what stands at an index out of range is arbitrary."""
    if indices.shape == (1,):
        return jax.tree.map(lambda leaf: _slice(leaf, _clamped(indices, leaf)), tree)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).at[indices].get(mode="clip"), tree)


def write_elements(full: Any, part: Any, indices: Any, old: Any = None) -> Any:
    """The full arrays with elements written over; nothing is written at an index out of range.

    Args:
      full: a tree of arrays.
      part: a tree of their new elements.
      indices: where these stand on the leading axis.
      old: what stands there, if it is at hand.
    """
    if indices.shape == (1,):
        old = take_elements(full, indices) if old is None else old
        return jax.tree.map(lambda leaf, new, was: _write_one(leaf, new, was, indices), full, part, old)

    def write(leaf: Any, new: Any) -> Any:
        # A negative index would count from the end.
        return jnp.asarray(leaf).at[jnp.where(indices < 0, leaf.shape[0], indices)].set(new, mode="drop")

    return jax.tree.map(write, full, part)


def _clamped(indices: Any, leaf: Any) -> Any:
    return lax.clamp(np.int32(0), jnp.asarray(indices, np.int32)[0], np.int32(leaf.shape[0] - 1))


def _slice(leaf: Any, index: Any) -> Any:
    zero = np.int32(0)
    start = (index, *(zero for _ in leaf.shape[1:]))
    return lax.dynamic_slice(leaf, start, (1, *leaf.shape[1:]), allow_negative_indices=False)


def _write_one(leaf: Any, new: Any, old: Any, indices: Any) -> Any:
    if isinstance(indices, Tracer):
        # An update slice is clamped into the array, so where the index is out of range the old value is written again.
        inside = within(indices, leaf.shape[0]).reshape((1,) * leaf.ndim)
        new = lax.select(jnp.broadcast_to(inside, new.shape), new, old)
    start = (_clamped(indices, leaf), *(np.int32(0) for _ in leaf.shape[1:]))
    return lax.dynamic_update_slice(leaf, new, start, allow_negative_indices=False)


def stored_leaves(new: Any, old: Any, diffs: list[Diff]) -> Any:
    """A tree as a trace stores it: unchanged leaves are the old ones, and elements are written into them."""
    leaves, old_leaves = jax.tree.leaves(new), jax.tree.leaves(old)
    if jax.tree.structure(new) != jax.tree.structure(old) or len(leaves) != len(diffs):
        return new
    result = []
    for leaf, was, diff in zip(leaves, old_leaves, diffs, strict=True):
        same_type = leaf.shape == was.shape and leaf.dtype == was.dtype
        if diff.change is no_change and same_type:
            result.append(was)
        elif diff.change is elements_change and same_type:
            result.append(write_elements(was, diff.elements, diff.indices))
        else:
            result.append(leaf)
    return jax.tree.structure(new).unflatten(result)


def remember(new: Any, old: Any, **parts: Any) -> None:
    """Note on a trace from which old one it was made, and how its parts were written. JAX transformations forget it."""
    object.__setattr__(new, "written", {"old": old, **parts})


def chosen_leaves(accepted: Any, new: Any, old: Any, diffs: list[Diff] | None) -> Any:
    """The new leaves where accepted, else the old ones; of those written by element only these are touched."""
    leaves, others = jax.tree.leaves(new), jax.tree.leaves(old)
    known = diffs if diffs is not None and len(diffs) == len(leaves) else [None] * len(leaves)
    result = []
    for leaf, was, diff in zip(leaves, others, known, strict=True):
        if leaf is was:
            result.append(was)
        elif diff is not None and diff.change is elements_change:
            part = jnp.where(accepted, diff.elements, take_elements(was, diff.indices))
            result.append(write_elements(was, part, diff.indices))
        else:
            result.append(jnp.where(accepted, leaf, was))
    return jax.tree.structure(new).unflatten(result)

"""`Masked`: a value that may be absent, by a flag that need not be known while tracing."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gjflax.core.pytree import Pytree


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Masked(Pytree):
    """A value that is there where `flag` is true; elsewhere it is an arbitrary value of the same type.

    As the value of a constraint it constrains the choice where the flag is true, and leaves it free elsewhere. As a
    choice of a trace it is one that a branch not taken, or a mask, may have left out.

    Args:
      value: an array, or a pytree of arrays.
      flag: a boolean; below a vector of choices one for each element, as the value has.

    >>> import jax.numpy as jnp
    >>> Masked(jnp.array([1.0, 2.0]), jnp.array([True, False])).unmask(0.0).tolist()
    [1.0, 0.0]
    """

    value: Any
    flag: Any

    def unmask(self, default: Any) -> Any:
        """The value where it is there, elsewhere the default (a number for all leaves, or a tree like the value).

        The result has the dtype that holds both: ``unmask(jnp.nan)`` of an integer is a float.
        """
        is_one = jax.tree_util.treedef_is_leaf(jax.tree.structure(default))
        defaults = jax.tree.map(lambda _: default, self.value) if is_one else default
        return jax.tree.map(lambda value, other: where(self.flag, value, other), self.value, defaults)


def where(flag: Any, then: Any, otherwise: Any) -> Any:
    """``jnp.where`` of arrays of which the flag has the leading axes only, in the dtype that holds both."""
    then = jnp.asarray(then)
    flag = with_axes(jnp.asarray(flag), then.ndim)
    # Strict promotion, where a user asks for it, would refuse an integer beside a float; either's dtype would cut the other.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.where(flag, then, otherwise)


def both(one: Any, other: Any) -> Any:
    """Whether both flags are true: each a bool, or an array of which the other may lack the last axes."""
    if isinstance(one, bool):
        return other if one else False
    if isinstance(other, bool):
        return one if other else False
    axes = max(np.ndim(one), np.ndim(other))
    return with_axes(one, axes) & with_axes(other, axes)


def with_axes(flag: Any, axes: int) -> Any:
    """An array of flags with so many axes, the last of them of length one."""
    return flag.reshape(flag.shape + (1,) * (axes - flag.ndim))


def static_flag(flag: Any) -> bool | None:
    """The flag where it is known while tracing and one for all, else None."""
    if isinstance(flag, (bool, np.bool_)):
        return bool(flag)
    return None


def is_masked(value: Any) -> bool:
    """Whether this is a `Masked` value: what is a leaf where flags and values are treated together."""
    return isinstance(value, Masked)


def has_masked(tree: Any) -> bool:
    """Whether there are `Masked` values in a tree."""
    return any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked)))

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
    flag = jnp.asarray(flag)
    flag = flag.reshape(flag.shape + (1,) * (then.ndim - flag.ndim))
    # Strict promotion, where a user asks for it, would refuse an integer beside a float; either's dtype would cut the other.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.where(flag, then, otherwise)


def static_flag(flag: Any) -> bool | None:
    """The flag where it is known while tracing and one for all, else None."""
    if isinstance(flag, (bool, np.bool_)):
        return bool(flag)
    return None


def has_masked(tree: Any) -> bool:
    """Whether there are `Masked` values in a tree."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda value: isinstance(value, Masked))
    return any(isinstance(leaf, Masked) for leaf in leaves)

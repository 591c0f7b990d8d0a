"""What a user gives to combinators that run one of several generative functions, checked: an index or a flag, the branches,
and their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gjflax.combinators.presence import types
from gjflax.core.context import current_address
from gjflax.core.diff import Diff, no_change, unknown_change
from gjflax.core.errors import ArgumentError, show_address
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.typing import Arguments


def branch_index(index: Any, count: int, owner: str) -> Any:
    """An index of a branch as an int32 scalar in range.

    Raises:
      ArgumentError: if it is not an integer scalar, or is known while tracing and out of range.
    """
    at = show_address(current_address())
    if isinstance(index, bool) or not isinstance(index, (int, np.integer, np.ndarray, jax.Array)):
        shown: Any = f"{index!r:.60}"
    elif np.shape(index) != () or not jnp.issubdtype(jnp.result_type(index), jnp.integer):
        shown = types(index)
    else:
        if not isinstance(index, jax.Array) and not 0 <= int(index) < count:
            raise ArgumentError(
                f"The index of the {owner} at {at} is {int(index)}, and it has {count} branches (0 to {count - 1})."
            )
        return lax.convert_element_type(jnp.clip(index, 0, count - 1), jnp.int32)
    raise ArgumentError(
        f"The index of the {owner} at {at} is one integer, static or traced; got {shown}. For a truth value use `Cond`; "
        "for one index per element use `Map`."
    )


def branch_flag(flag: Any, owner: str) -> Any:
    """A flag as an array.

    Raises:
      ArgumentError: if it is not a boolean scalar.
    """
    is_array = isinstance(flag, (np.ndarray, jax.Array))
    if isinstance(flag, (bool, np.bool_)) or (is_array and flag.shape == () and flag.dtype == jnp.bool_):
        return jnp.asarray(flag)
    raise ArgumentError(
        f"The first argument of the {owner} at {show_address(current_address())} is one boolean, static or traced; got "
        f"{types(flag) if is_array else format(repr(flag), '.60')}. Write a comparison (x > 0, index == 1); for one flag "
        "per element use `Map`."
    )


def own_arguments(args: Arguments, count: int, owner: str, part: str = "branch") -> tuple[Arguments, ...]:
    """One tuple of arguments for each branch, or other part, of arguments or argdiffs that are such tuples.

    Raises:
      ArgumentError: if they are not `count` tuples.
    """

    def of_branch(entry: Any) -> Arguments:
        value = Diff.primal(entry) if isinstance(entry, Diff) else entry
        if not isinstance(value, tuple):
            raise ArgumentError(
                f"The {owner} at {show_address(current_address())} takes one tuple of arguments for each {part}, such as "
                f"(x,) or (); got {type(value).__name__}."
            )
        if not isinstance(entry, Diff):
            return value
        return Diff.mark(value, no_change if Diff.is_unchanged(entry) else unknown_change)

    if len(args) != count:
        raise ArgumentError(
            f"The {owner} at {show_address(current_address())} takes one tuple of arguments for each {part}, "
            f"{count} in all; got {len(args)}."
        )
    return tuple(map(of_branch, args))


def check_branches(branches: Sequence[Any], owner: str) -> None:
    """An error unless all are generative functions."""
    for branch in branches:
        if not isinstance(branch, GenerativeFunction):
            raise ArgumentError(f"`{owner}` takes generative functions; got {branch!r:.80}. Is @gen missing?")

"""Arguments and values of distributions as arrays: dtypes, shapes, and the errors about them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gjflax.core.context import current_address
from gjflax.core.errors import ArgumentError, ChoiceShapeError, show_address


@contextlib.contextmanager
def free_promotion() -> Iterator[None]:
    """The rules under which TFP runs, whatever the user's are.

    It promotes dtypes and ranks by itself; it asks for float64 and takes what it gets, which is the user's choice and
    nothing to be warned of; and it calls what JAX has deprecated, which is its authors' concern.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Explicitly requested dtype", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def site(label: str) -> str:
    """How messages name the choice being visited: its address and its distribution."""
    return f"{show_address(current_address())} ({label})"


def is_number(value: Any) -> bool:
    """Whether this is a Python number: a constant without a dtype of its own."""
    return isinstance(value, (bool, int, float)) and not isinstance(value, np.generic)


def as_array(label: str, value: Any) -> Any:
    """A number as it is, anything else as an array of real numbers.

    Raises:
      ArgumentError: if it is neither.
    """
    if isinstance(value, jax.Array) or not is_number(value):
        if isinstance(value, (str, bytes)):
            raise ArgumentError(_not_real(label, value, type(value).__name__))
        try:
            array = value if isinstance(value, jax.Array) else jnp.asarray(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ArgumentError(_not_real(label, value, type(value).__name__)) from error
        kind = array.dtype
        if not (jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer) or kind == jnp.bool_):
            raise ArgumentError(_not_real(label, value, kind))
        return array
    return value


def _not_real(label: str, value: Any, kind: Any) -> str:
    return f"The distribution of {site(label)} takes arrays of real numbers; got {kind}: {value!r:.60}."


def wider(a: Any, b: Any) -> Any:
    """The more precise of two floating point dtypes. Not `jnp.promote_types`, which strict promotion forbids."""
    return a if a.itemsize >= b.itemsize else b


def float_dtype(*values: Any) -> Any:
    """The dtype to compute in: the most precise of the floating point arguments, single precision at least."""
    dtypes = [value.dtype for value in values if not is_number(value) and jnp.issubdtype(value.dtype, jnp.floating)]
    if not dtypes:
        return jax.dtypes.canonicalize_dtype(np.float64)
    widest = np.dtype(np.float32)
    for dtype in dtypes:
        widest = wider(widest, dtype)
    return widest


def with_dtype(dtype: Any, *values: Any) -> tuple[Any, ...]:
    """The arguments with the numbers among them as scalars of a dtype, which needs no operation in the program."""
    return tuple(np.dtype(dtype).type(value) if is_number(value) else value for value in values)


def common_shape(label: str, *values: Any) -> tuple[int, ...]:
    """The shape to which the arguments broadcast.

    Raises:
      ChoiceShapeError: if they do not.
    """
    shapes = [() if is_number(value) else value.shape for value in values]
    distinct = {shape for shape in shapes if shape}
    if len(distinct) < 2:
        return distinct.pop() if distinct else ()
    try:
        return jnp.broadcast_shapes(*shapes)
    except ValueError as error:
        raise ChoiceShapeError(
            f"The arguments of the distribution of {site(label)} have shapes that do not broadcast against each other: "
            f"{', '.join(map(str, shapes))}."
        ) from error


def aligned(argument: Any, value: Any, dtype: Any) -> Any:
    """An argument in a dtype, and with the axes of a value unless it is a scalar. Numbers stay numbers."""
    if not is_number(argument):
        argument = lax.convert_element_type(argument, dtype)
    rank = jnp.ndim(argument)
    return jnp.broadcast_to(argument, value.shape) if 0 < rank < value.ndim else argument

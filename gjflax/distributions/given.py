"""What is given for a single choice: whether it is there, and as an array of a shape and dtype that the distribution draws.

===============  ============================================================================================
drawn            what may be given
===============  ============================================================================================
floats           integers, which are converted, and floats; one that is more precise than the arguments stays so
integers         booleans, integers in range, and floats that are whole: any other has density 0
===============  ============================================================================================

An error says what does not fit as soon as it is known. Of a traced value it may be known when it runs only: then it is a flag.
"""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gjflax.core.choice_map import ChoiceMap, VectorChoiceMap
from gjflax.core.errors import ChoiceDtypeError, ChoiceShapeError, UnvisitedConstraintError, show_address
from gjflax.core.interface import is_tracer
from gjflax.core.masked import Masked
from gjflax.core.trace import strong
from gjflax.distributions.arguments import site, wider


def is_given(label: str, choices: ChoiceMap, strict: bool) -> bool:
    """Whether a choice map gives the choice, which stands at its root.

    Raises:
      UnvisitedConstraintError: if it gives values below the choice and is strict, or elements of its value.
    """
    if choices.is_empty() or (not choices.is_value() and not strict):
        return False
    if not choices.is_value():
        refuse_below(label, choices)
    if isinstance(choices, VectorChoiceMap) and not isinstance(choices.static_indices, range):
        raise UnvisitedConstraintError(
            f"The choice at {site(label)} is one value, so its elements cannot be given one by one. Give the "
            "whole array, or make the elements choices with `Map`."
        )
    return True


def refuse_below(label: str, choices: ChoiceMap) -> NoReturn:
    """The error of choices below a choice."""
    raise UnvisitedConstraintError(
        f"The choice at {site(label)} is a single value, and the choice map gives values below it, at "
        f"{', '.join(map(show_address, choices.addresses()[:3]))}."
    )


def flag_of(label: str, given: Masked) -> Any:
    """The flag of what is given, as one boolean.

    Raises:
      ChoiceShapeError: if there are several.
    """
    flag = jnp.asarray(given.flag)
    if flag.shape:
        raise ChoiceShapeError(
            f"The flag given for {site(label)} has shape {flag.shape}, and the choice is one value, which is "
            "there or not. Make its elements choices with `Map`, and give a flag for each."
        )
    return flag


def fitted(label: str, value: Any, template: jax.ShapeDtypeStruct, like: Any) -> tuple[Any, Any]:
    """The value as an array of a dtype that the distribution takes.

    Args:
      label: the distribution's name in messages.
      value: what is given.
      template: shape and dtype of what the distribution draws.
      like: an array whose dtype it takes, where there is one.

    Returns:
      The array. The second result says, of traced numbers given for a discrete choice, whether all are whole and in range;
      else None.

    Raises:
      ChoiceShapeError: if it has another shape.
      ChoiceDtypeError: if it is no array, or of a dtype that cannot stand for the drawn one.
    """
    given = _as_array(label, value, template)
    check_shape(label, given, template.shape)
    expected = template.dtype if like is None else like.dtype
    if given.dtype == expected:
        return strong(given), None
    if jnp.issubdtype(expected, jnp.floating):
        is_float = jnp.issubdtype(given.dtype, jnp.floating)
        if not (is_float or jnp.issubdtype(given.dtype, jnp.integer)):
            raise _dtype_error(label, value, given.dtype, template)
        if like is None and is_float and hasattr(value, "dtype"):
            # A value that is more precise than the arguments stays so: bfloat16 networks meet float32 data.
            expected = wider(given.dtype, expected)
        return strong(lax.convert_element_type(given, expected)), None
    if not (
        jnp.issubdtype(given.dtype, jnp.floating)
        or jnp.issubdtype(given.dtype, jnp.integer)
        or given.dtype == jnp.bool_
    ):
        raise _dtype_error(label, value, given.dtype, template)
    cast = lax.convert_element_type(given, expected)
    if given.dtype == jnp.bool_:
        return cast, None
    # What is whole and in range comes back from the cast as it was; anything else has density 0.
    whole = jnp.all(given == lax.convert_element_type(cast, given.dtype))
    if jnp.issubdtype(given.dtype, jnp.unsignedinteger):
        # A large one comes back too, by way of a negative number.
        whole = whole & jnp.all(cast >= 0)
    if is_tracer(whole):
        return cast, whole
    if not bool(whole):
        raise _dtype_error(label, value, given.dtype, template)
    return cast, None


def fitted_unconstrained(label: str, value: Any, shape: tuple[int, ...], template: jax.ShapeDtypeStruct) -> Any:
    """A point of R^n, checked: TFP would broadcast it against the arguments.

    Raises:
      ChoiceShapeError: if it has another shape.
      ChoiceDtypeError: if it is no array of real numbers.
    """
    point = _as_array(label, value, template)
    if point.shape != shape:
        raise ChoiceShapeError(
            f"The unconstrained value given for {site(label)} has shape {point.shape}; the map onto the "
            f"support takes {shape} at these arguments."
        )
    if not jnp.issubdtype(point.dtype, jnp.floating):
        if not jnp.issubdtype(point.dtype, jnp.integer):
            raise _dtype_error(label, value, point.dtype, template)
        return lax.convert_element_type(point, template.dtype)
    return strong(point)


def check_shape(label: str, value: Any, expected: tuple[int, ...]) -> None:
    """An error where a value has not the shape that the distribution draws."""
    if value.shape != expected:
        raise ChoiceShapeError(
            f"The value given for {site(label)} has shape {value.shape}; {label} draws {expected} at "
            "these arguments. Give a value of that shape, map the choice with `Map`, or a batch of calls with `jax.vmap`."
        )


def _as_array(label: str, value: Any, template: jax.ShapeDtypeStruct) -> Any:
    if isinstance(value, jax.Array):
        return value
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise _dtype_error(label, value, type(value).__name__, template) from error
    if isinstance(value, (np.ndarray, np.generic)) and jnp.issubdtype(array.dtype, jnp.integer):
        # JAX stores 64-bit integers in 32 bits, and what does not fit becomes another number.
        if not np.array_equal(np.asarray(value).astype(array.dtype), value):
            raise _dtype_error(label, value, value.dtype, template)
    return array


def _dtype_error(label: str, value: Any, dtype: Any, expected: jax.ShapeDtypeStruct) -> ChoiceDtypeError:
    return ChoiceDtypeError(
        f"The value given for {site(label)} has dtype {dtype} ({value!r:.60}); {label} draws "
        f"{expected.dtype}, and the one cannot stand for the other. Convert it first."
    )

"""Dtypes and shapes of arguments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gjflax
from gjflax.distributions.arguments import as_array, common_shape, float_dtype, free_promotion, wider, with_dtype


def test_numbers_stay_numbers_and_arrays_become_jax_s() -> None:
    assert as_array("Normal", 2) == 2 and isinstance(as_array("Normal", 2), int)
    assert isinstance(as_array("Normal", [1.0, 2.0]), jax.Array)
    assert as_array("Normal", np.float64(2)).dtype == jnp.float32
    assert as_array("Normal", True) is True


@pytest.mark.parametrize("value", [1j, None, "a", object(), jax.random.key(0), [[1.0], [1.0, 2.0]]])
def test_what_is_no_real_array_is_refused(value: Any) -> None:
    with pytest.raises(gjflax.ArgumentError, match="the root .Normal.*real numbers"):
        as_array("Normal", value)


@pytest.mark.parametrize(
    ("dtypes", "want"),
    [
        ([], "float32"),
        (["int32"], "float32"),
        (["bfloat16"], "float32"),
        (["float16", "bfloat16"], "float32"),
        (["float32", "bfloat16", "int8"], "float32"),
    ],
)
def test_the_dtype_to_compute_in_is_single_precision_at_least(dtypes: list[str], want: str) -> None:
    with jax.numpy_dtype_promotion("strict"):
        assert float_dtype(1.0, *(jnp.ones(2, dtype) for dtype in dtypes)) == np.dtype(want)


def test_double_precision_wins() -> None:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        assert float_dtype(jnp.ones(2, jnp.float32), jnp.ones(2, jnp.float64)) == np.float64
        assert float_dtype(1.0, jnp.ones(2, jnp.float32)) == np.float32
        assert float_dtype(1.0) == np.float64
    assert wider(np.dtype(np.float32), np.dtype(np.float64)) == np.float64


def test_numbers_take_a_dtype_without_an_operation() -> None:
    number, array = with_dtype(np.float32, 2.5, jnp.ones(2))
    assert isinstance(number, np.float32) and isinstance(array, jax.Array)


def test_shapes_broadcast_or_say_where_they_do_not() -> None:
    assert common_shape("Normal", 1.0, jnp.ones((2, 1)), jnp.ones(3)) == (2, 3)
    assert common_shape("Normal", 1.0, 2.0) == ()
    with pytest.raises(gjflax.ChoiceShapeError, match=r"Normal.*\(2,\), \(3,\)"):
        common_shape("Normal", jnp.ones(2), jnp.ones(3))


def test_the_user_s_rules_hold_again_afterwards() -> None:
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        with free_promotion():
            jnp.ones((2, 3)) + jnp.ones(3)
        with pytest.raises(ValueError, match="rank_promotion"):
            jnp.ones((2, 3)) + jnp.ones(3)

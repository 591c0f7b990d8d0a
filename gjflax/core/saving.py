"""Choice maps as bytes that say themselves what they are, in msgpack as Flax writes it.

A trace or a set of variables is restored into a template, which has what is program in them. A choice map is data alone:
names, indices, values and flags.
"""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from gjflax.core.choice_map import (
    BuiltinChoiceMap,
    ChoiceMap,
    EmptyChoiceMap,
    ValueChoiceMap,
    VectorChoiceMap,
    vector,
)
from gjflax.core.errors import ChoiceMapError, show_address
from gjflax.core.keys import is_typed_key
from gjflax.core.masked import Masked
from gjflax.core.pytree import Const

FORMAT = 1
"""The version of the format; a reader refuses a later one."""


def to_bytes(choices: ChoiceMap) -> bytes:
    """See ``ChoiceMap.to_bytes``."""
    # In place: what is packed is made here, and a copy would sort the names.
    return serialization.msgpack_serialize({"gjflax": FORMAT, "choices": _encode(choices, ())}, in_place=True)


def from_bytes(data: bytes) -> ChoiceMap:
    """See ``ChoiceMap.from_bytes``."""
    try:
        read = serialization.msgpack_restore(data)
        version, choices = read["gjflax"], read["choices"]
    except Exception as error:
        raise ChoiceMapError(
            "These bytes are not those of a choice map, as `ChoiceMap.to_bytes` writes it. What `flax.serialization.to_bytes` "
            "wrote is read with `flax.serialization.from_bytes` and a template."
        ) from error
    if version != FORMAT:
        raise ChoiceMapError(
            f"The choice map was written in format {version}, by a later gjflax; this one reads {FORMAT}."
        )
    return _decode(choices)


def _encode(choices: ChoiceMap, at: tuple[Any, ...]) -> dict[str, Any]:
    if isinstance(choices, ValueChoiceMap):
        return {"value": _encode_value(choices.value, at)}
    if isinstance(choices, VectorChoiceMap):
        static = choices.static_indices
        indices: Any = {"all": len(static)} if isinstance(static, range) else {"some": list(static or ())}
        if static is None:
            indices = {"array": _encode_value(choices.indices, at)}
        return {"indices": indices, "inner": _encode(choices.inner, at)}
    return {"names": {name: _encode(choices.get_submap(name), (*at, name)) for name in choices.names()}}


def _encode_value(value: Any, at: tuple[Any, ...]) -> Any:
    if isinstance(value, Masked):
        return {"masked": _encode_value(value.value, at), "flag": _encode_value(value.flag, at)}
    if is_typed_key(value):
        return {"key": np.asarray(jax.random.key_data(value)), "impl": str(jax.random.key_impl(value))}
    if isinstance(value, (jax.Array, np.ndarray)):
        return np.asarray(value)
    if isinstance(value, (bool, int, float, complex, np.generic)) or isinstance(value, numbers.Number):
        return value
    raise ChoiceMapError(f"The value of {show_address(at)} is a {type(value).__name__}, which is not written as bytes.")


def _decode(read: Any) -> ChoiceMap:
    if "value" in read:
        return ValueChoiceMap(_decode_value(read["value"]))
    if "indices" in read:
        indices, inner = read["indices"], _decode(read["inner"])
        if "all" in indices:
            return vector(range(indices["all"]), inner)
        return vector(Const(tuple(indices["some"])) if "some" in indices else jnp.asarray(indices["array"]), inner)
    children = {name: _decode(child) for name, child in read["names"].items()}
    return BuiltinChoiceMap(children) if children else EmptyChoiceMap()


def _decode_value(read: Any) -> Any:
    if not isinstance(read, dict):
        return read
    if "masked" in read:
        # A flag of NumPy's would be one that is known while tracing.
        return Masked(_decode_value(read["masked"]), jnp.asarray(_decode_value(read["flag"])))
    return jax.random.wrap_key_data(jnp.asarray(read["key"]), impl=read["impl"])

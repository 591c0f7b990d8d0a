"""Choices that may be absent: choice maps with a flag for every choice.

A flag f that is not known while tracing turns each value v into ``Masked(v, f)``; one that stands below another, g, into
``Masked(v, f ∧ g)``. Flags have the first axes of their values, those of the vectors around them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gjflax.core.choice_map.base import ChoiceMap, EmptyChoiceMap, ValueChoiceMap, by_name
from gjflax.core.choice_map.vectors import VectorChoiceMap, vector
from gjflax.core.errors import ChoiceMapError, show_address
from gjflax.core.masked import Masked, both, static_flag


def masked(choices: ChoiceMap, flag: Any) -> ChoiceMap:
    """The choices where a flag is true: each becomes `Masked`. A flag that is known now keeps or drops them.

    Args:
      choices: the choices, or a batch of them.
      flag: a boolean, or an array of them with the axes of the batch.

    Raises:
      ChoiceMapError: if the flag has axes that the values do not have.

    >>> from gjflax import choice_map
    >>> masked(choice_map({"x": 1.0}), jnp.array(True))["x"].flag
    Array(True, dtype=bool)
    """
    known = static_flag(flag)
    if known is not None:
        return choices if known else EmptyChoiceMap()
    return masked_below(choices, jnp.asarray(flag), ())


def masked_below(choices: ChoiceMap, flag: Any, at: tuple[Any, ...]) -> ChoiceMap:
    """The choices, which stand below the address `at`, each `Masked` by an array of flags."""
    if isinstance(choices, ValueChoiceMap):
        value, shape = choices.value, flag.shape
        if isinstance(value, Masked):
            value, flag = value.value, both(jnp.asarray(value.flag), flag)
        for leaf in jax.tree.leaves(value):
            if jnp.shape(leaf)[: len(shape)] != shape:
                raise ChoiceMapError(
                    f"The flag given for {show_address(at)} has shape {shape}, and its value {jnp.shape(leaf)}: a flag "
                    "is one boolean, or has one for each element of a vector of choices."
                )
        return ValueChoiceMap(Masked(value, flag))
    if isinstance(choices, VectorChoiceMap):
        every = jnp.broadcast_to(flag[..., None], (*flag.shape, len(choices)))
        return vector(choices.indices, masked_below(choices.inner, every, at))
    return by_name({name: masked_below(choices.get_submap(name), flag, (*at, name)) for name in choices.names()})


def flagged_alike(*parts: ChoiceMap, axes: int = 0) -> list[ChoiceMap]:
    """The choice maps, with a flag for every choice that has one in any of them. `axes` is how many all values have."""
    flagged = {
        address
        for part in parts
        for address in part.addresses()
        if isinstance(part.get_subtree(address).get_value(), Masked)
    }

    def flag(choices: ChoiceMap, at: tuple[Any, ...], axes: int) -> ChoiceMap:
        if isinstance(choices, VectorChoiceMap):
            return vector(choices.indices, flag(choices.inner, at, axes + 1))
        if not isinstance(choices, ValueChoiceMap):
            return by_name({name: flag(choices.get_submap(name), (*at, name), axes) for name in choices.names()})
        if at not in flagged or isinstance(choices.value, Masked):
            return choices
        return ValueChoiceMap(Masked(choices.value, jnp.ones(jnp.shape(choices.value)[:axes], bool)))

    return [flag(part, (), axes) if flagged else part for part in parts]

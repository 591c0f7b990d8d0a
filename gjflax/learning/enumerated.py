r"""Sums over the values of enumerated choices, for costs that are downstream of some of them.

With enumerated choices e_1, …, e_m, each with M_j joint values and probabilities q_j, every cost is known at every
combination (v_1, …, v_m): an array with one axis for each, beside those of its plates. A cost is summed over the choices
that it is downstream of, A(c),

    E[c] = Σ_{v_j : j ∈ A(c)} Π_{j ∈ A(c)} q_j(v_j | v_before) c(v),

and does not depend on the others: one of their values serves. Where e_j stands in plates and its costs meet it there element
by element, q_j has these plates as axes, and all elements are enumerated side by side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gjflax.core.errors import EnumerationError, show_address
from gjflax.learning.estimators.enumeration import values_of
from gjflax.learning.sites import Address, Site

MAX_COMBINATIONS = 4096
"""How many combinations of values are enumerated at most."""


@dataclasses.dataclass(frozen=True)
class Enumerated:
    """A choice that is enumerated.

    Attributes:
      address: its address.
      kept: on how many of its outermost plates the elements are enumerated side by side.
      values: its joint values: an array with their number first, then the axes of the choice, of length 1 on these plates.
      plates: how many plates it stands in.
      log_uniform: the log probability of a value if all were equally likely, in one element of all plates.
    """

    address: Address
    kept: int
    values: np.ndarray
    plates: int
    log_uniform: float

    @property
    def number(self) -> int:
        """How many joint values there are."""
        return len(self.values)

    def log_q(self, sites: Sequence[Site]) -> Any:
        """The log probabilities of the value, of the shape of the plates on which it is enumerated side by side.

        Where the choice is not there, in a branch that was not taken, all values count the same.
        """
        total = sum((site.log_density for site in sites[1:]), start=sites[0].log_density)
        if all(site.present is not None for site in sites):
            present = sites[0].present
            for site in sites[1:]:
                present = present | site.present
            total = jnp.where(present, total, self.log_uniform)
        return jnp.sum(total, axis=tuple(range(self.kept, self.plates)))


def enumerated(address: Address, site: Site, kept: int) -> Enumerated:
    """A choice with all its joint values.

    Raises:
      EnumerationError: if they are not known, or too many.
    """
    values = values_of(address, site.leaf)
    value = site.leaf.get_retval()
    event = values.shape[1:]
    plates, cell_shape = site.shape, value.shape[len(site.shape) : value.ndim - len(event)]
    shape = (*plates[kept:], *cell_shape)
    cells, count = math.prod(shape), len(values)
    if cells * math.log(count) > math.log(MAX_COMBINATIONS) + 1e-6:
        why = (
            f"it is a vector of {math.prod(cell_shape)} values"
            if math.prod(cell_shape) > 1
            else ("what depends on one element does not stay in it, so the elements cannot be enumerated side by side")
        )
        raise EnumerationError(
            f"The choice at {show_address(address)} ({site.distribution.label}) has {count}^{cells} joint values, and at most "
            f"{MAX_COMBINATIONS} are enumerated: {why}. Use REINFORCE there, or, for independent elements, a `Map` in both "
            "guide and model."
        )
    digits = (
        np.stack(np.unravel_index(np.arange(count**cells), (count,) * cells), axis=-1)
        if cells
        else np.zeros((1, 0), int)
    )
    joint = values[digits].reshape((count**cells,) + (1,) * kept + shape + event)
    log_uniform = -math.log(count) * math.prod(cell_shape)
    return Enumerated(address, kept, joint.astype(value.dtype), len(plates), log_uniform)


def combinations(choices: Sequence[Enumerated]) -> list[Any]:
    """The values of each choice at every combination.

    Raises:
      EnumerationError: if there are too many.
    """
    numbers = [choice.number for choice in choices]
    if math.prod(numbers) > MAX_COMBINATIONS:
        listed = ", ".join(f"{show_address(choice.address)}: {choice.number}" for choice in choices)
        raise EnumerationError(
            f"The enumerated choices have {math.prod(numbers)} joint values ({listed}), and at most {MAX_COMBINATIONS} are "
            "enumerated. Use REINFORCE for some of them."
        )
    which = np.indices(numbers).reshape(len(numbers), -1)
    return [jnp.asarray(choice.values[index]) for choice, index in zip(choices, which, strict=True)]


class Sums:
    """Sums over combinations, for arrays with `leading` axes, then one for each enumerated choice, then plates.

    Args:
      leading: see above.
      log_q: the log probabilities of each enumerated choice: such arrays.
      before: for each enumerated choice the numbers of those that it is downstream of, its own among them.
    """

    def __init__(self, leading: int, log_q: Sequence[Any], before: Sequence[frozenset[int]]):
        self._leading = leading
        self._number = len(log_q)
        restricted = [self.restrict(array, known) for array, known in zip(log_q, before, strict=True)]
        # A value that is never drawn counts for nothing, whatever its cost: which may be infinite, as its own is.
        self._possible = [array > -jnp.inf for array in restricted]
        self._weights = [
            jnp.where(there, jnp.exp(jnp.where(there, array, 0)), 0)
            for there, array in zip(self._possible, restricted, strict=True)
        ]

    @property
    def axes(self) -> int:
        """The number of axes before those of the plates."""
        return self._leading + self._number

    def restrict(self, array: Any, known: Iterable[int]) -> Any:
        """The array at one value of the choices that it does not depend on: axes of length 1."""
        known = set(known)
        slices = [slice(None) if number in known else slice(0, 1) for number in range(self._number)]
        return array[(slice(None),) * self._leading + tuple(slices)]

    def over(self, array: Any, choices: Iterable[int]) -> Any:
        """The expectation of an array over some choices: their axes have length 1 then."""
        choices = tuple(choices)
        for number in choices:
            weight, there = (
                part.reshape(part.shape + (1,) * (array.ndim - part.ndim))
                for part in (self._weights[number], self._possible[number])
            )
            array = jnp.where(there, array, 0) * weight
        return jnp.sum(array, axis=tuple(self._leading + number for number in choices), keepdims=True)

    def total(self, array: Any, choices: Iterable[int]) -> Any:
        """The expectation over some choices, on which alone the array depends, summed over plates."""
        array = self.over(array, choices)
        return jnp.sum(array, axis=tuple(range(self._leading, array.ndim)))

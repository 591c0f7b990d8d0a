"""`Plan`: which steps a chain runs, of its arguments."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from gjflax.combinators.steps_trace import sum_active
from gjflax.core.diff import Change
from gjflax.core.typing import Score


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps that arguments stand for.

    Attributes:
      initial: what the first step is given, as a trace stores it.
      inputs: what every step is given of its own: a pytree with a leading axis of `length`.
      length: the number of steps that are run.
      active: which of them count, a flag for each; None where all do.
      source: whose inputs each step takes, an index for each; None where these are its own.
      known: the number of steps that count, where it is known while tracing.
      changes: what is known of how the kernel's arguments changed.
      fits: whether these are as many steps as the trace has, where only running tells; weights are NaN otherwise.
    """

    initial: Any
    inputs: Any
    length: int
    active: Any = None
    source: Any = None
    known: int | None = None
    changes: tuple[Change, ...] = ()
    fits: Any = None

    def weight(self, weights: Any) -> Score:
        """The sum of the weights of the steps that count."""
        weight = sum_active(weights, self.active)
        return weight if self.fits is None else jnp.where(self.fits, weight, jnp.nan)

"""`StepsGiven`: constraints of some or all steps of a chain, and how each step gets its own.

Every step of a loop is the same program, so where some steps alone are given something, all are, with a flag.
"""

from __future__ import annotations

from typing import Any

from gjflax.combinators.elements import checked_weight, given_elements, masked_elements, traced_indices
from gjflax.combinators.steps_plan import Plan
from gjflax.core.choice_map import ChoiceMap, VectorChoiceMap
from gjflax.core.context import current_address
from gjflax.core.errors import ChoiceMapError, show_address
from gjflax.core.typing import Score


class StepsGiven:
    """Constraints of some or all steps, and how they are handed to each.

    Attributes:
      indices: the steps that are given something, None where all are, in order.
      index_field: these, as the choice map that gave them has them.
      traced: these, where they are not known while tracing; else None.
      choices: the constraints of these steps.
      of_steps: constraints of every step, `Masked` where not every one has them.
    """

    def __init__(self, choices: ChoiceMap, plan: Plan):
        self._plan, self.traced = plan, traced_indices(choices)
        if isinstance(choices, VectorChoiceMap) and not choices.is_empty() and not choices.covers(plan.length):
            self._check_range(choices.static_indices)
        self.choices, self.indices = given_elements(choices, plan.length)
        self.index_field = choices.indices if isinstance(choices, VectorChoiceMap) else None
        self._static = choices.static_indices if isinstance(choices, VectorChoiceMap) else None

    @property
    def of_steps(self) -> ChoiceMap:
        if self.indices is None:
            return self.choices
        return masked_elements(self.choices, self.indices, self._plan.length)

    def one_by_one(self) -> list[Any]:
        """The indices, as numbers where they are known while tracing."""
        return [self.indices[i] for i in range(len(self.indices))] if self._static is None else list(self._static)

    def weight(self, weight: Score) -> Score:
        """The weight, NaN where an index that is known only when running is none of a step, or repeats."""
        return checked_weight(weight, self.traced, self._plan.length)

    def require_all(self) -> None:
        """An error where a step that counts is certainly given nothing."""
        if self.indices is None or (self._plan.active is not None and self._plan.known is None):
            return
        needed = self._plan.length if self._plan.known is None else self._plan.known
        if self._static is None or not set(range(needed)) <= set(self._static):
            raise ChoiceMapError(
                f"`assess` needs the choices of all {needed} steps of {show_address(current_address())}; the choice map "
                f"gives {self.indices.shape[0]}, by index."
            )

    def _check_range(self, indices: Any) -> None:
        known = self._plan.known
        if indices is not None and known is not None and max(indices) >= known:
            raise ChoiceMapError(
                f"The choice map gives step {max(indices)} of {show_address(current_address())}, which has {known} steps "
                "(counted from 0)."
            )

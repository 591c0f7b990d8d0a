"""`StepsTrace`: the trace of a chain of steps, some of which may not count.

The score is the sum of the scores of the steps that count, and the choices of the others are absent by flag.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gjflax.combinators.elements import by_selection, sum_elements
from gjflax.core.choice_map import ChoiceMap, masked, vector
from gjflax.core.context import current_address
from gjflax.core.errors import SelectionError, show_address
from gjflax.core.outline import STEPS, Group, Part
from gjflax.core.pytree import STATIC
from gjflax.core.selection import Selection
from gjflax.core.trace import CallTrace, Trace, also_of_template, leafwise, total
from gjflax.core.typing import Score


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StepsTrace(CallTrace):
    """The traces of the steps, as one trace with a leading axis."""

    inner: Trace
    length: int = dataclasses.field(metadata=STATIC)

    @property
    def active(self) -> Any:
        """Which steps count, a flag for each; None where all do."""
        return None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.inner.batch_shape[:-1]

    def counts(self, index: Any) -> Any:
        """Whether the step at an index counts; None where every one does."""
        return None

    def get_score(self) -> Score:
        return sum_active(self.inner.get_score(), self.active)

    def project(self, selection: Selection) -> Score:
        if not selection.mentions_indices:
            return sum_active(self.inner.project(selection), self.active)
        parts = []
        for subselection, positions in by_selection(selection, self.length):
            scores = self.inner.project(subselection)
            if jnp.ndim(scores):
                active = None if self.active is None else self.active[..., positions]
                parts.append(sum_active(scores[..., positions], active))
        return total(parts)

    @also_of_template
    def strip(self) -> ChoiceMap:
        return self._vector(self.inner.strip())

    def leaves(self, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Trace]]:
        return self.inner.leaves(prefix)

    def outline(self, prefix: tuple[Any, ...] = ()) -> tuple[Part, ...]:
        return (Group(STEPS, prefix, type(self.gen_fn).__name__, self.inner.outline(prefix), self.length),)

    def unconstrain(self, selection: Selection) -> tuple[ChoiceMap, Score]:
        if selection.mentions_indices:
            raise SelectionError(
                f"`unconstrain` maps the choices of all steps; the selection at {show_address(current_address())} names "
                f"steps {sorted(selection.indices)}."
            )
        choices, log_det = jax.vmap(lambda inner: inner.unconstrain(selection))(self.inner)
        return self._vector(choices), sum_active(log_det, self.active)

    def get_subtree(self, address: Any) -> Any:
        return self.strip().get_subtree(address)

    def chosen(self, accepted: Any, old: Any) -> Trace:
        written = getattr(self, "written", None)
        if written is None or written["old"] is not old:
            return leafwise(accepted, self, old)
        return self.with_steps(written["steps"].chosen(accepted, self.inner), None)

    def with_steps(self, inner: Trace, last: Any) -> Any:
        """This trace with other traces of its steps, at the same arguments."""
        return self.replace(inner=inner)

    def _vector(self, choices: ChoiceMap) -> ChoiceMap:
        return vector_of_steps(choices, self.length, self.active)


def sum_active(scores: Any, active: Any) -> Any:
    """The sum over the steps that count."""
    return sum_elements(scores if active is None or not jnp.ndim(scores) else jnp.where(active, scores, 0))


def vector_of_steps(choices: ChoiceMap, length: int, active: Any) -> ChoiceMap:
    """The choices of the steps, those of steps that do not count absent by flag."""
    return vector(range(length), choices if active is None else masked(choices, active))

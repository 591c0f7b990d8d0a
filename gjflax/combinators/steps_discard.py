r"""What an update of a chain discards: choices that were overwritten, and those of steps that no longer count.

With C and C' the steps that count before and after it, those in C ∩ C' are updated, those in C' \ C are drawn or given anew,
and those in C \ C' are gone, with all their choices. Where nothing can be gone, the discard is that of the steps which were
given something, as the choice map that gave it has them: so it undoes the update.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from gjflax.combinators.steps_given import StepsGiven
from gjflax.combinators.steps_plan import Plan
from gjflax.combinators.steps_trace import StepsTrace, vector_of_steps
from gjflax.core.choice_map import ChoiceMap, ValueChoiceMap, VectorChoiceMap, by_name, masked, vector
from gjflax.core.diff import Diff
from gjflax.core.masked import Masked
from gjflax.core.typing import Arguments


@dataclasses.dataclass(frozen=True)
class StepsFlags:
    """Which steps count before and after an update; each None where nothing is to be told apart.

    Attributes:
      kept: those that count in both.
      fresh: those that count after it only.
      gone: those that counted before it only.
    """

    kept: Any = None
    fresh: Any = None
    gone: Any = None

    @classmethod
    def of(cls, trace: StepsTrace, plan: Plan, argdiffs: Arguments) -> StepsFlags:
        old, new = trace.active, plan.active
        if old is None or new is None or Diff.is_unchanged(argdiffs[0]):
            return cls(kept=new)
        return cls(old & new, new & ~old, old & ~new)


def discarded(trace: StepsTrace, given: StepsGiven, flags: StepsFlags, discard: ChoiceMap) -> ChoiceMap:
    """What an update overwrote, as the steps say it, and what is gone with a step."""
    overwritten = discard if flags.kept is None else masked(discard, flags.kept)
    old = trace.inner.strip()
    if flags.gone is not None:
        return vector_of_steps(old, trace.length, flags.gone).overwrite(vector(range(trace.length), overwritten))
    if given.indices is None or not _only_given(discard, old):
        return vector(range(trace.length), overwritten)
    taken = jax.tree.map(lambda leaf: leaf[given.indices], overwritten)
    return vector(given.index_field, _settled(taken, given.choices) if flags.kept is None else taken)


def _only_given(discard: ChoiceMap, old: ChoiceMap) -> bool:
    """Whether all that is discarded was overwritten by a constraint that not every step has.

    A choice that no flag makes absent is in every step before and after, so it cannot be gone.
    """

    def value(choices: ChoiceMap, address: Any) -> Any:
        return choices.get_subtree(address).get_value()

    return all(
        isinstance(value(discard, address), Masked) and not isinstance(value(old, address), Masked)
        for address in discard.addresses()
    )


def _settled(discard: ChoiceMap, given: ChoiceMap) -> ChoiceMap:
    """Values of steps that were given one: there, unless it was itself given by a flag."""
    if isinstance(discard, VectorChoiceMap):
        return vector(discard.indices, _settled(discard.inner, given))
    if isinstance(discard, ValueChoiceMap):
        kept = isinstance(given.get_value(), Masked) or not isinstance(discard.value, Masked)
        return discard if kept else ValueChoiceMap(discard.value.value)
    return by_name({name: _settled(discard.get_submap(name), given.get_submap(name)) for name in discard.names()})

"""`SwitchTrace`: what a run of one of several generative functions leaves behind.

It has one part for each branch, zero where it was not taken: so its structure does not depend on which one was. Its
choices are the union of those of the branches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gjflax.combinators.presence import union
from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap
from gjflax.core.context import current_address
from gjflax.core.errors import NotImplementedByGenerativeFunctionError, show_address
from gjflax.core.masked import where
from gjflax.core.outline import BRANCH, SWITCH, Group, Part
from gjflax.core.selection import Selection
from gjflax.core.trace import CallTrace, Trace, also_of_template, total
from gjflax.core.typing import Score


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SwitchTrace(CallTrace):
    """The traces of the branches; those of branches that were not taken are zero."""

    branches: tuple[Trace, ...]

    @property
    def index(self) -> Any:
        """Which branch was taken."""
        return self.gen_fn.index_of(self.args)

    @property
    def taken(self) -> list[Any]:
        """For each branch, whether it was taken."""
        return [self.index == number for number in range(len(self.branches))]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return jnp.shape(self.args[0])

    def get_retval(self) -> Any:
        return self.gen_fn.choose_retval(self.taken, [branch.get_retval() for branch in self.branches])

    def get_score(self) -> Score:
        return self._of_taken([branch.get_score() for branch in self.branches])

    def project(self, selection: Selection) -> Score:
        return self._of_taken([branch.project(selection) for branch in self.branches])

    @also_of_template
    def strip(self) -> ChoiceMap:
        return self._union([branch.strip() for branch in self.branches])

    def leaves(self, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Trace]]:
        """The traces of the single choices of all branches. Those of branches that were not taken are zero."""
        return [leaf for branch in self.branches for leaf in branch.leaves(prefix)]

    def outline(self, prefix: tuple[Any, ...] = ()) -> tuple[Part, ...]:
        named = zip(self.gen_fn.alternatives, self.branches, strict=True)
        branches = tuple(Group(BRANCH, prefix, name, branch.outline(prefix)) for name, branch in named)
        return (Group(SWITCH, prefix, type(self.gen_fn).__name__, branches, control=self.args[0]),)

    def unconstrain(self, selection: Selection) -> tuple[ChoiceMap, Score]:
        choices, log_dets = [], []
        for taken, branch in zip(self.taken, self.branches, strict=True):
            here, log_det = branch.unconstrain(selection)
            # What is not there is zero in R^n too, not the image of a zero that may be outside of the support.
            choices.append(jax.tree.map(lambda leaf, taken=taken: where(taken, leaf, jnp.zeros_like(leaf)), here))
            log_dets.append(log_det)
        return self._union(choices), self._of_taken(log_dets)

    def score_where(self, flags: Mapping[tuple[Any, ...], Any]) -> Score:
        """The score of those choices whose flags are true; see `presence`."""
        scores = []
        for branch in self.branches:
            leaves = branch.leaves()
            if {address for address, _ in leaves} != set(branch.strip().addresses()):
                raise NotImplementedByGenerativeFunctionError(
                    f"The trace of {type(branch.get_gen_fn()).__name__} at {show_address(current_address())} does not give "
                    "its single choices' traces by `leaves`, which `regenerate` needs where the branch may change."
                )
            parts = [(flags[address], leaf.get_score()) for address, leaf in leaves]
            scores.append(total([jnp.sum(where(flag, score, jnp.zeros_like(score))) for flag, score in parts]))
        return self._of_taken(scores)

    def _of_taken(self, scores: Sequence[Any]) -> Any:
        return total(
            [where(taken, score, jnp.zeros_like(score)) for taken, score in zip(self.taken, scores, strict=True)]
        )

    def _union(self, parts: Sequence[ChoiceMap]) -> ChoiceMap:
        alternatives = self.gen_fn.number_of_alternatives
        nothing = [EmptyChoiceMap()] * (alternatives - len(parts))
        return union([*parts, *nothing], [self.index == number for number in range(alternatives)])

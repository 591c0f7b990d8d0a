"""`DistributionTrace`: the trace of a single choice.

With the bijector f from R^n onto the support, `unconstrain` maps the value v to u = f⁻¹(v), and says log |det f'(u)|.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap, ValueChoiceMap
from gjflax.core.context import current_address
from gjflax.core.errors import SelectionError
from gjflax.core.selection import Selection
from gjflax.core.trace import CallTrace, Trace
from gjflax.core.typing import Arguments, Score
from gjflax.distributions.applied import Applied
from gjflax.distributions.arguments import free_promotion, site
from gjflax.distributions.packed import unpacked


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DistributionTrace(CallTrace):
    """A value drawn from, or given to, a distribution."""

    value: Any
    score: Any

    def get_args(self) -> Arguments:
        return unpacked(self.args)

    def get_retval(self) -> Any:
        return self.value

    def get_score(self) -> Score:
        return self.score

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return jnp.shape(self.score)

    def project(self, selection: Selection) -> Score:
        return self.score if is_selected(selection, self.gen_fn.label) else jnp.zeros(())

    def strip(self) -> ChoiceMap:
        return ValueChoiceMap(self.value)

    def leaves(self, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Trace]]:
        return [(prefix, self)]

    @property
    def is_discrete(self) -> bool:
        """Whether the value is one of a discrete distribution."""
        return not jnp.issubdtype(self.value.dtype, jnp.floating) or self._of_one(lambda here: here.is_discrete)

    @property
    def is_reparameterized(self) -> bool:
        """Whether the value, as drawn, is differentiable in the distribution's arguments."""
        return self._of_one(lambda here: here.reparameterized)

    def unconstrain(self, selection: Selection) -> tuple[ChoiceMap, Score]:
        if not is_selected(selection, self.gen_fn.label):
            return EmptyChoiceMap(), jnp.zeros(())

        def one(args: Any, value: Any) -> tuple[Any, Any]:
            bijector = self.gen_fn.require_bijector(unpacked(args))
            with free_promotion():
                unconstrained = bijector.inverse(value)
                return unconstrained, -log_det_jacobian(bijector, unconstrained)

        unconstrained, log_det = self._over_batch(one)(self.args, self.value)
        return ValueChoiceMap(unconstrained), log_det

    def _over_batch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of one trace's parts, for the batch of traces that this is: a trace has a scalar score."""
        for _ in range(jnp.ndim(self.score)):
            function = jax.vmap(function)
        return function

    def _of_one(self, ask: Callable[[Applied], bool]) -> bool:
        """What is so of the distribution at its arguments, or in a batch of traces at those of any."""
        answers = []

        def probe(args: Any, value: Any) -> Any:
            answers.append(ask(self.gen_fn.at(unpacked(args))))
            return value

        if jnp.ndim(self.score):
            jax.eval_shape(self._over_batch(probe), self.args, self.value)
        else:
            probe(self.args, self.value)
        return answers[0]


def is_selected(selection: Selection, label: str) -> bool:
    """Whether a choice is selected.

    Raises:
      SelectionError: if the selection names elements of its value.
    """
    if selection.indices:
        named = f"the choice {site(label)}" if current_address() else f"a choice of {label}"
        raise SelectionError(
            f"The selection names elements {sorted(selection.indices)} of {named}, which is one value. "
            'Make its elements choices with `Map`; where it stands in one, the index comes before the name: (0, "y").'
        )
    return selection.includes_root


def log_det_jacobian(bijector: Any, unconstrained: Any) -> Any:
    """The log |det| of the Jacobian of a bijector at a point of R^n, summed over all its elements."""
    event_ndims = max(jnp.ndim(unconstrained), bijector.forward_min_event_ndims)
    return jnp.sum(bijector.forward_log_det_jacobian(unconstrained, event_ndims=event_ndims))

r"""`MaximumLikelihood`: minus the log likelihood as a module.

*Complete data*: every choice is observed, and the loss is −log p(x), exactly.

*Incomplete data*: the choices z that are not observed are drawn by the model itself, given what came before, with the weights of
``importance``, w_k, for which E[w_k] = p(x). The loss is minus

    L_K = log (1/K Σ_k w_k),   E[L_K] ≤ log p(x),

the importance weighted bound with the model's own proposal. Its gradient is unbiased for that of E[L_K]: through draws that
are reparameterised, else by the score function, where sample k is credited with L_K minus the bound of the other samples.

A guide q that looks at the data makes the bound tighter: with one, w_k = p(x, z_k) / q(z_k), and the loss is that of
`ImportanceWeightedELBO`, for both.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap
from gjflax.core.errors import NotImplementedByGenerativeFunctionError, show_address
from gjflax.core.generative_function import CHOICE_STREAM, GenerativeFunction
from gjflax.core.masked import Masked
from gjflax.core.trace import total
from gjflax.core.typing import Arguments, FloatArray, PRNGKey
from gjflax.learning.estimators.estimator import PATHWISE
from gjflax.learning.objectives.base import Draws, Objective
from gjflax.learning.objectives.importance_weighted import importance_weighted_loss
from gjflax.learning.sites import Site, kinds_of, sites_of


class MaximumLikelihood(Objective):
    """Minus the log likelihood of the observed choices, a loss.

    Where choices are missing its randomness comes from the rng stream "choice"; with complete data it needs none.

    Attributes:
      model: the generative function.
      guide: what the missing choices are drawn from, all of them; by default the model.
      num_samples: how many samples of the missing choices.

    Where choices are missing the collection "diagnostics" gets ``log_weights``, of shape ``[num_samples]``, and their
    ``effective_sample_size``.

    Raises:
      UnvisitedConstraintError: if an observed choice is none of the model's.
      MissingChoiceError: if with a guide a choice of the model is neither the guide's nor observed.

    >>> import gjflax, jax
    >>> @gjflax.gen
    ... def model():
    ...     z = gjflax.trace("z", gjflax.Normal)(0.0, 1.0)
    ...     return gjflax.trace("x", gjflax.Normal)(z, 1.0)
    >>> objective = MaximumLikelihood(model)
    >>> loss = objective.apply({}, {"z": 0.0, "x": 1.0})
    >>> round(float(loss), 4)
    2.3379
    """

    guide: GenerativeFunction | None = None  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def sides(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return ("model",) if self.guide is None else ("model", "guide")

    def __call__(self, observed: Any, model_args: Arguments = (), guide_args: Arguments = ()) -> FloatArray:
        """The loss for observed choices, a scalar to minimise.

        Args:
          observed: the observed choices, a choice map or nested dict.
          model_args: the arguments of the model.
          guide_args: the arguments of the guide.
        """
        return super().__call__(observed, model_args, guide_args)

    def loss(self, key: PRNGKey, observed: ChoiceMap, model_args: Arguments, guide_args: Arguments) -> FloatArray:
        if self.guide is not None:
            return importance_weighted_loss(self, self.draw(key, observed, model_args, guide_args))
        fresh: list[bool] = []

        def one(objective: MaximumLikelihood, key: PRNGKey) -> tuple[Any, Any]:
            _, (weight, trace) = objective.model.importance(key, observed, model_args)
            sites = sites_of(trace)
            drawn = [
                (site, kind)
                for site, kind in zip(sites, kinds_of(sites), strict=True)
                if _is_drawn(site, kind, observed)
            ]
            fresh.append(bool(drawn))
            scored = [jnp.sum(site.log_density) for site, kind in drawn if kind != PATHWISE]
            return weight, total(scored)

        log_weights, log_q = self.over_samples(one, key)
        if not any(fresh):
            return -log_weights[0]
        super()._key()  # which raises where there is no stream
        return importance_weighted_loss(self, Draws(log_weights, log_q, EmptyChoiceMap()))

    def _key(self) -> PRNGKey:
        if self.guide is not None:
            return super()._key()
        scope: Any = self.scope
        has_stream = scope is None or scope.has_rng(CHOICE_STREAM) or self.is_initializing()
        # With complete data nothing is drawn, so no stream is asked for.
        return super()._key() if has_stream else jax.random.key(0)


def _is_drawn(site: Site, kind: str, observed: ChoiceMap) -> bool:
    """Whether a choice is drawn, not observed."""
    if not observed.has_subtree(site.address):
        return True
    value = observed[site.address]
    is_whole = not isinstance(value, Masked) and jnp.shape(value) == jnp.shape(site.leaf.get_retval())
    if kind != PATHWISE and not is_whole:
        raise NotImplementedByGenerativeFunctionError(
            f"Of the choice {show_address(site.address)} ({site.distribution.label}), which is not reparameterised, some "
            "elements are observed and some are not: the gradient of the missing ones is not known here. Give all or none, or "
            "use a guide for the missing ones."
        )
    return not is_whole

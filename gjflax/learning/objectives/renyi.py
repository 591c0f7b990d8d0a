r"""`Renyi`: the variational Rényi bound as a module.

With log weights log w_k = log p(x, z_k) − log q(z_k) of K samples and an order α ≠ 1,

    L_α = 1 / (1 − α) · log (1/K Σ_k w_k^(1−α)).

It falls as α grows: α = 0 is the importance weighted bound, α → 1 the ELBO, and with α < 0 it may exceed log p(x) (Li and
Turner, "Rényi divergence variational inference", NIPS 2016, section 4).

The gradient is that of E[L_α]: through draws that are reparameterised; for the others the score function, where sample k is
credited with L_α minus what L_α is without sample k, which does not depend on it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gjflax.core.choice_map import ChoiceMap
from gjflax.core.errors import ArgumentError
from gjflax.core.typing import Arguments, FloatArray, PRNGKey
from gjflax.learning.objectives.base import Objective


class Renyi(Objective):
    """Minus the variational Rényi bound, a loss. Its randomness comes from the rng stream "choice".

    Attributes:
      model: the joint density; its choices are those of the guide and the observed ones.
      guide: the variational family, over the choices that are not observed.
      num_samples: the number K of samples.
      alpha: the order α, not 1. At 0 it is the bound of `ImportanceWeightedELBO`.

    The collection "diagnostics" gets ``log_weights``, of shape ``[num_samples]``, and their ``effective_sample_size``.

    Raises:
      ArgumentError: if `alpha` is 1.
      MissingChoiceError, UnvisitedConstraintError: if model and guide do not have the same choices.

    >>> import gjflax, jax
    >>> @gjflax.gen
    ... def model():
    ...     z = gjflax.trace("z", gjflax.Normal)(0.0, 1.0)
    ...     return gjflax.trace("x", gjflax.Normal)(z, 1.0)
    >>> @gjflax.gen
    ... def guide():
    ...     gjflax.trace("z", gjflax.Normal)(0.5, 0.7)
    >>> objective = Renyi(model=model, guide=guide, num_samples=8, alpha=0.5)
    >>> objective.apply({}, {"x": 1.5}, rngs={"choice": jax.random.key(1)}).shape
    ()
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or self.alpha == 1:
            raise ArgumentError(
                f"`alpha` is a number other than 1, at which the bound is the ELBO: use `ELBO`. Got {self.alpha!r}."
            )
        super().__post_init__()

    def loss(self, key: PRNGKey, observed: ChoiceMap, model_args: Arguments, guide_args: Arguments) -> FloatArray:
        draws = self.draw(key, observed, model_args, guide_args)
        bound = renyi_bound(draws.log_weights, self.alpha)
        signals = bound - bounds_without_each(draws.log_weights, self.alpha)
        self.sow_diagnostics(log_weights=draws.log_weights, effective_sample_size=draws.effective_sample_size)
        return -draws.with_score_terms(bound, signals)


def renyi_bound(log_weights: FloatArray, alpha: float = 0.0) -> FloatArray:
    """1 / (1 − α) · log mean w^(1−α), over the last axis; for α = 0 the log mean of the weights."""
    power = 1.0 - alpha
    return (jax.nn.logsumexp(power * log_weights, axis=-1) - np.log(log_weights.shape[-1])) / power


def bounds_without_each(log_weights: FloatArray, alpha: float = 0.0) -> FloatArray:
    """For each sample the bound of the others; 0 where there are none."""
    count = log_weights.shape[0]
    if count == 1:
        return jnp.zeros_like(log_weights)
    others = np.array([[k for k in range(count) if k != j] for j in range(count)])
    return renyi_bound(log_weights[others], alpha)

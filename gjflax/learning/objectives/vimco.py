r"""`VIMCO`: the importance weighted bound with leave-one-out baselines for choices that have the score function.

With L_K = log (1/K Σ_k w_k) the gradient of E[L_K] for draws that are not reparameterised is

    E[Σ_k (L_K − b_k) ∇ log q(z_k) + ∇_direct L_K],

for any b_k that does not depend on z_k. The baseline is L_K with the weight of sample k replaced by a mean of the others:

    geometric    log ŵ_k = 1/(K−1) Σ_{j≠k} log w_j
    arithmetic   log ŵ_k = log (1/(K−1) Σ_{j≠k} w_j)

(Mnih and Rezende, "Variational inference for Monte Carlo objectives", ICML 2016, equations 9–11).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from gjflax.core.choice_map import ChoiceMap
from gjflax.core.errors import ArgumentError
from gjflax.core.typing import Arguments, FloatArray, PRNGKey
from gjflax.learning.objectives.base import Objective
from gjflax.learning.objectives.renyi import bounds_without_each, renyi_bound


class VIMCO(Objective):
    """Minus the importance weighted bound, with VIMCO's gradient. Its randomness comes from the rng stream "choice".

    Attributes:
      model: the joint density; its choices are those of the guide and the observed ones.
      guide: the variational family, over the choices that are not observed. Choices that are reparameterised are
        differentiated through.
      num_samples: the number K of samples, 2 or more.
      baseline: ``"geometric"`` or ``"arithmetic"``; see the text of this file.

    The collection "diagnostics" gets ``log_weights``, of shape ``[num_samples]``, and their ``effective_sample_size``.

    Raises:
      MissingChoiceError, UnvisitedConstraintError: if model and guide do not have the same choices.

    >>> import gjflax, jax
    >>> @gjflax.gen
    ... def model():
    ...     z = gjflax.trace("z", gjflax.Bernoulli)(logits=0.0)
    ...     return gjflax.trace("x", gjflax.Normal)(z * 2.0, 1.0)
    >>> @gjflax.gen
    ... def guide():
    ...     gjflax.trace("z", gjflax.Bernoulli)(logits=0.5)
    >>> objective = VIMCO(model=model, guide=guide, num_samples=4)
    >>> objective.apply({}, {"x": 1.5}, rngs={"choice": jax.random.key(1)}).shape
    ()
    """

    num_samples: int = 2
    baseline: str = "geometric"

    def __post_init__(self) -> None:
        if self.baseline not in ("geometric", "arithmetic"):
            raise ArgumentError(f'`baseline` is "geometric" or "arithmetic"; got {self.baseline!r:.80}.')
        if self.num_samples == 1:
            raise ArgumentError("`num_samples` of VIMCO is 2 or more: its baseline is made of the other samples.")
        super().__post_init__()

    def loss(self, key: PRNGKey, observed: ChoiceMap, model_args: Arguments, guide_args: Arguments) -> FloatArray:
        draws = self.draw(key, observed, model_args, guide_args)
        bound = renyi_bound(draws.log_weights)
        signals = bound - vimco_baselines(draws.log_weights, self.baseline)
        self.sow_diagnostics(log_weights=draws.log_weights, effective_sample_size=draws.effective_sample_size)
        return -draws.with_score_terms(bound, signals)


def vimco_baselines(log_weights: FloatArray, kind: str) -> FloatArray:
    """For each sample the bound with its weight replaced by a mean of the others' weights."""
    count = log_weights.shape[0]
    if kind == "arithmetic":
        # The mean of the weights with one of them replaced by the mean of the others is the mean of the others.
        return bounds_without_each(log_weights)
    means = (jnp.sum(log_weights) - log_weights) / (count - 1)
    replaced = jnp.where(np.eye(count, dtype=bool), means[:, None], log_weights[None, :])
    return renyi_bound(replaced)

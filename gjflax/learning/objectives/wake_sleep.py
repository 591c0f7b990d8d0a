r"""`WakeSleep`: reweighted wake-sleep as a module.

The guide draws K samples z_k ~ q(z | x), held fixed, with normalised weights w̃_k ∝ p(x, z_k) / q(z_k | x). Then

    model         maximise Σ_k w̃_k log p_θ(x, z_k),          the gradient of log (1/K Σ_k w_k) in θ
    guide, wake   maximise Σ_k w̃_k log q_φ(z_k | x),         which lowers KL(p(z | x) || q)
    guide, sleep  maximise log q_φ(z | x) at (z, x) ~ p_θ,   which lowers it on the average over p(x)

Nothing is differentiated through a draw, so discrete choices are as good as others. The model's and the guide's parts touch
only their own parameters (Bornschein and Bengio, "Reweighted wake-sleep", ICLR 2015; "wake-wake": Le et al., "Revisiting
reweighted wake-sleep", UAI 2019). At K samples both wake gradients are biased as estimates of those of log p(x) and of the
divergence, of order 1/K; the sleep gradient is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gjflax.core.choice_map import ChoiceMap
from gjflax.core.errors import ArgumentError
from gjflax.core.lifting import Streams
from gjflax.core.typing import Arguments, FloatArray, PRNGKey
from gjflax.learning import runs
from gjflax.learning.objectives.base import Objective, effective_sample_size
from gjflax.learning.objectives.forward_kl import check_inputs, dreamt
from gjflax.learning.objectives.renyi import renyi_bound


class WakeSleep(Objective):
    """Reweighted wake-sleep, a loss. Its randomness comes from the rng stream "choice".

    Its value is minus the importance weighted bound; its gradient is that of the parts above.

    Attributes:
      model: the joint density; its choices are those of the guide and the observed ones.
      guide: the variational family, over the choices that are not observed.
      num_samples: the number K of samples.
      guide_update: ``"wake"``, ``"sleep"``, or ``"both"``, of which the mean is taken.
      guide_inputs: for the sleep phase, ``guide_inputs(x)`` gives the guide's arguments for simulated observations; see
        `ForwardKL`.

    The collection "diagnostics" gets ``log_weights``, of shape ``[num_samples]``, their ``effective_sample_size``, and
    ``guide_loss``.

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
    >>> objective = WakeSleep(model, guide, num_samples=4)
    >>> objective.apply({}, {"x": 1.5}, rngs={"choice": jax.random.key(1)}).shape
    ()
    """

    num_samples: int = 2
    guide_update: str = "wake"
    guide_inputs: Callable[[ChoiceMap], Arguments] | None = None

    def __post_init__(self) -> None:
        if self.guide_update not in ("wake", "sleep", "both"):
            raise ArgumentError(f'`guide_update` is "wake", "sleep" or "both"; got {self.guide_update!r:.80}.')
        check_inputs(self.guide_inputs)
        super().__post_init__()

    def loss(self, key: PRNGKey, observed: ChoiceMap, model_args: Arguments, guide_args: Arguments) -> FloatArray:
        awake, asleep = jax.random.split(key)

        def one(objective: WakeSleep, key: PRNGKey) -> tuple[Any, Any]:
            model_key, guide_key = runs.split(key)
            streams = Streams(objective)
            _, trace = objective.guide.simulate(guide_key, guide_args)
            choices = jax.tree.map(lax.stop_gradient, trace.strip())
            streams.rewind()
            log_q = objective.guide.assess(guide_key, choices, guide_args)[1][1]
            return runs.assess(objective.model, model_key, runs.merged(choices, observed), model_args), log_q

        log_p, log_q = self.over_samples(one, awake)
        log_weights = lax.stop_gradient(log_p - log_q)
        normalised = jax.nn.softmax(log_weights)
        guide_parts = []
        if self.guide_update != "sleep":
            guide_parts.append(-jnp.sum(normalised * log_q))
        if self.guide_update != "wake":
            dreams = dreamt(self, asleep, observed, model_args, guide_args, self.guide_inputs)
            guide_parts.append(-jnp.mean(dreams))
        guide_loss = sum(guide_parts[1:], guide_parts[0]) / len(guide_parts)
        self.sow_diagnostics(
            log_weights=log_weights, effective_sample_size=effective_sample_size(log_weights), guide_loss=guide_loss
        )
        parts = -jnp.sum(normalised * log_p) + guide_loss
        return -renyi_bound(log_weights) + (parts - lax.stop_gradient(parts))

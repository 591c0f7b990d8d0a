r"""`ImportanceWeightedELBO`: the bound of the importance weighted autoencoder as a module.

With log weights log w_k = log p(x, z_k) − log q(z_k) of K samples,

    log p(x) ≥ E[L_K],   L_K = log (1/K Σ_k w_k),

which is the ELBO at K = 1, grows with K, and tends to the evidence (Burda, Grosse and Salakhutdinov, "Importance weighted
autoencoders", ICLR 2016). It is the Rényi bound of order 0, and so is its gradient; see `renyi`.

*Doubly reparameterised.* With normalised weights w̃_k the pathwise gradient in the guide's parameters φ is

    Σ_k w̃_k (∂ log w_k/∂z_k · ∂z_k/∂φ − ∂ log q_φ(z_k)/∂φ),

of which the last part grows in noise with K. Reparameterising it once more gives the same expectation as

    Σ_k w̃_k² ∂ log w_k/∂z_k · ∂z_k/∂φ

(Tucker, Lawson, Gu and Maddison, "Doubly reparameterized gradient estimators for Monte Carlo objectives", ICLR 2019, equation
8). The gradient in the model's parameters stays Σ_k w̃_k ∂ log p(x, z_k)/∂θ.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gjflax.core.choice_map import ChoiceMap
from gjflax.core.errors import ArgumentError, show_address
from gjflax.core.lifting import Streams, vmap_module
from gjflax.core.typing import Arguments, FloatArray, PRNGKey
from gjflax.learning import runs
from gjflax.learning.objectives.base import Draws, Objective, effective_sample_size, require_pathwise
from gjflax.learning.objectives.renyi import bounds_without_each, renyi_bound
from gjflax.learning.sites import Site, kinds_of, sites_of


class ImportanceWeightedELBO(Objective):
    """Minus the importance weighted bound, a loss. Its randomness comes from the rng stream "choice".

    Attributes:
      model: the joint density; its choices are those of the guide and the observed ones.
      guide: the variational family, over the choices that are not observed.
      num_samples: the number K of samples.
      doubly_reparameterized: whether the guide's gradient is the doubly reparameterised one; see the text of this file.
        Every choice of the guide must be reparameterised.

    The collection "diagnostics" gets ``log_weights``, of shape ``[num_samples]``, and their ``effective_sample_size``.

    Raises:
      NotReparameterizedError: with `doubly_reparameterized`, if a choice of the guide has no reparameterisation.
      ArgumentError: with `doubly_reparameterized`, if a choice of the guide stands in a batch of a population.
      MissingChoiceError, UnvisitedConstraintError: if model and guide do not have the same choices.

    >>> import gjflax, jax
    >>> @gjflax.gen
    ... def model():
    ...     z = gjflax.trace("z", gjflax.Normal)(0.0, 1.0)
    ...     return gjflax.trace("x", gjflax.Normal)(z, 1.0)
    >>> @gjflax.gen
    ... def guide():
    ...     gjflax.trace("z", gjflax.Normal)(0.75, 2**-0.5)
    >>> objective = ImportanceWeightedELBO(model=model, guide=guide, num_samples=4)
    >>> loss = objective.apply({}, {"x": 1.5}, rngs={"choice": jax.random.key(1)})
    >>> _, (_, log_evidence) = gjflax.Normal.assess(jax.random.key(0), 1.5, (0.0, 2**0.5))
    >>> bool(jnp.allclose(-loss, log_evidence, atol=1e-5))  # at the exact posterior all weights are the evidence
    True
    """

    doubly_reparameterized: Any = False

    def __post_init__(self) -> None:
        if not isinstance(self.doubly_reparameterized, bool):
            raise ArgumentError(f"`doubly_reparameterized` is True or False; got {self.doubly_reparameterized!r:.80}.")
        super().__post_init__()

    def loss(self, key: PRNGKey, observed: ChoiceMap, model_args: Arguments, guide_args: Arguments) -> FloatArray:
        if self.doubly_reparameterized and not self.is_initializing():
            return self._doubly(key, observed, model_args, guide_args)
        return importance_weighted_loss(self, self.draw(key, observed, model_args, guide_args))

    def _doubly(self, key: PRNGKey, observed: ChoiceMap, model_args: Arguments, guide_args: Arguments) -> FloatArray:
        keys = jax.random.split(key, self.num_samples)

        def log_weight(objective: ImportanceWeightedELBO, key: PRNGKey, factor: Any) -> Any:
            """log w, with the gradient through the draw times a factor, and log q held fixed as a function."""
            model_key, guide_key = runs.split(key)
            _, trace = objective.guide.simulate(guide_key, guide_args)
            sites = sites_of(trace)
            require_pathwise(sites, kinds_of(sites))
            _require_single_counts(sites)
            choices = jax.tree.map(lambda leaf: _scaled(leaf, factor), trace.strip())
            log_q = runs.score_of_stopped(objective.guide, guide_key, choices, guide_args)
            return runs.assess(objective.model, model_key, runs.merged(choices, observed), model_args) - log_q

        weigh = vmap_module(log_weight, (0, 0), self.num_samples)
        # The factor is the normalised weight, so the weights are computed twice; XLA makes one of the two.
        streams = Streams(self)
        before = lax.stop_gradient(weigh(self, keys, jnp.ones(self.num_samples)))
        normalised = jax.nn.softmax(before)
        streams.rewind()
        log_weights = weigh(self, keys, normalised)
        self.sow_diagnostics(log_weights=before, effective_sample_size=effective_sample_size(before))
        return -(renyi_bound(before) + jnp.sum(normalised * (log_weights - lax.stop_gradient(log_weights))))


def importance_weighted_loss(objective: Objective, draws: Draws) -> FloatArray:
    """−L_K of an objective's draws, whose log weights and effective sample size it sows."""
    bound = renyi_bound(draws.log_weights)
    signals = bound - bounds_without_each(draws.log_weights)
    objective.sow_diagnostics(log_weights=draws.log_weights, effective_sample_size=draws.effective_sample_size)
    return -draws.with_score_terms(bound, signals)


def _require_single_counts(sites: tuple[Site, ...]) -> None:
    """Raise where log q in the weight is not the log density of the draw, of which the doubly reparameterised gradient is.

    Raises:
      ArgumentError: if choices of the guide stand in a batch of a population.
    """
    for site in sites:
        if site.multiplicity != 1 or site.leaf.counts_for_others:
            raise ArgumentError(
                f"The guide's choices at {show_address(site.address)} stand in a `Map` with `total`, where a batch counts for "
                "its population. The doubly reparameterised gradient needs the density of what was drawn: leave `total` out, or "
                "use `doubly_reparameterized=False`."
            )


def _scaled(leaf: Any, factor: Any) -> Any:
    """The leaf, whose gradient is multiplied by a factor."""
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        return leaf
    factor = lax.stop_gradient(factor).astype(leaf.dtype)
    return lax.stop_gradient(leaf) + factor * (leaf - lax.stop_gradient(leaf))

r"""`Objective`: what objectives have in common, and how to write one.

An objective is a module with a model p(z, x) and a guide q(z), called ``objective(observed, model_args=(), guide_args=())``,
that returns a loss. A subclass implements `loss`, of samples that `draw` gives it. Its maths stands on top of its file.

**An objective of the log weights** log w_s = log p(z_s, x) − log q(z_s), s = 1 … S::

    class ImportanceWeightedELBO(Objective):
        def loss(self, key, observed, model_args, guide_args):
            draws = self.draw(key, observed, model_args, guide_args)
            bound = jax.nn.logsumexp(draws.log_weights) - jnp.log(float(self.num_samples))
            self.sow_diagnostics(log_weights=draws.log_weights)
            return -draws.with_score_terms(bound, signals=bound)

``draws.log_weights`` are differentiable through reparameterised choices. For choices with the score function (those
without a reparameterisation, or with `REINFORCE`, `ENUM`, `MeasureValued`) the objective gives the *signal* of each sample: what
its choices are credited with. `Draws.with_score_terms` adds

    Σ_s stop(signal_s) · Σ_sites (log q_s − stop(log q_s)),

which is 0 in value and has the gradient Σ_s signal_s ∇ log q(z_s). The signal of an unbiased gradient is the objective itself
minus anything that does not depend on sample s: a `VIMCO` is the above with ``signals=bound - bounds_without_each``.

**An objective that is a sum over choices**, as the ELBO, leaves all that to `surrogate`: downstream costs, baselines,
enumeration and measure-valued derivatives.

Everything that an objective samples goes through `over_samples`, a lifted vmap, so that parameters are shared and rng
streams are split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gjflax.core.choice_map import ChoiceMap, choice_map
from gjflax.core.errors import ArgumentError, NotReparameterizedError, show_address
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.lifting import vmap_module
from gjflax.core.trace import Trace, total
from gjflax.core.typing import Arguments, FloatArray, PRNGKey
from gjflax.learning import runs
from gjflax.learning.estimators.estimator import PATHWISE
from gjflax.learning.estimators.relaxed import RELAXED
from gjflax.learning.sites import Site, kinds_of, sites_of


@dataclasses.dataclass(frozen=True)
class Draws:
    """Samples of the guide, weighed by the model; the first axis of every array is that of the samples.

    Attributes:
      log_weights: log p(z_s, x) − log q(z_s). Differentiable in the parameters of both and through reparameterised choices.
      log_q: Σ log q of the choices that have the score function, for each sample; None where there are none.
      choices: the guide's choices, a choice map.
    """

    log_weights: Any
    log_q: Any
    choices: ChoiceMap

    def with_score_terms(self, value: Any, signals: Any) -> Any:
        """A value, to be maximised, with the gradient through choices that have the score function.

        Args:
          value: the objective, a scalar.
          signals: what each sample's choices are credited with: an array of the shape of the log weights, or a scalar.
        """
        if self.log_q is None:
            return value
        return value + jnp.sum(lax.stop_gradient(signals) * (self.log_q - lax.stop_gradient(self.log_q)))

    @property
    def effective_sample_size(self) -> Any:
        """(Σ w_s)² / Σ w_s²: between 1 and the number of samples."""
        return effective_sample_size(self.log_weights)


def effective_sample_size(log_weights: Any) -> Any:
    """(Σ w)² / Σ w² of log weights."""
    return jnp.exp(2 * jax.nn.logsumexp(log_weights) - jax.nn.logsumexp(2 * log_weights))


class Objective(nn.Module):
    """Base class of objectives of a model and a guide. See the text of this file.

    Attributes:
      model: the joint density; its choices are those of the guide and the observed ones.
      guide: the variational family, over the choices that are not observed.
      num_samples: how many samples of the guide are drawn.
    """

    model: GenerativeFunction
    guide: GenerativeFunction
    num_samples: int = 1

    sides = ("model", "guide")
    """The fields that are generative functions. The last gives the rng stream."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        for side in self.sides:
            if not isinstance(getattr(self, side), GenerativeFunction):
                raise ArgumentError(f"`{side}` of `{name}` is a generative function; got {getattr(self, side)!r:.80}.")
        if not isinstance(self.num_samples, int) or isinstance(self.num_samples, bool) or self.num_samples < 1:
            raise ArgumentError(f"`num_samples` is a positive integer; got {self.num_samples!r}.")
        super().__post_init__()

    def __call__(self, observed: Any, model_args: Arguments = (), guide_args: Arguments = ()) -> FloatArray:
        """The loss for observed choices, a scalar to minimise. Its randomness comes from the rng stream "choice".

        Args:
          observed: the observed choices, a choice map or nested dict.
          model_args: the arguments of the model.
          guide_args: the arguments of the guide.
        """
        return self.loss(self._key(), choice_map(observed), model_args, guide_args)

    # What a subclass says ---------------------------------------------------------------------------------------

    def loss(self, key: PRNGKey, observed: ChoiceMap, model_args: Arguments, guide_args: Arguments) -> FloatArray:
        """The loss."""
        raise NotImplementedError

    # What it is made of -----------------------------------------------------------------------------------------

    def draw(
        self,
        key: PRNGKey,
        observed: ChoiceMap,
        model_args: Arguments,
        guide_args: Arguments,
        *,
        stop_guide: bool = False,
    ) -> Draws:
        """`num_samples` samples of the guide, weighed by the model.

        Args:
          key: a random key.
          observed: the observed choices.
          model_args: the arguments of the model.
          guide_args: the arguments of the guide.
          stop_guide: whether log q in the weights is held fixed as a function: it is differentiable in the choices, and
            not in the guide's parameters and arguments ("sticking the landing", the doubly reparameterised gradient).

        Raises:
          NotReparameterizedError: with `stop_guide`, if a choice of the guide is not reparameterised.
          MissingChoiceError, UnvisitedConstraintError: if model and guide do not have the same choices.
        """
        drawn = self.over_samples(
            lambda objective, key: objective._one_draw(key, observed, model_args, guide_args, stop_guide), key
        )
        return Draws(*drawn)

    def over_samples(self, function: Callable[[Any, PRNGKey], Any], key: PRNGKey) -> Any:
        """``function(objective, key)`` for each sample, its results stacked on a first axis: by a lifted vmap."""
        keys = jax.random.split(key, self.num_samples)
        if self.num_samples == 1:
            return jax.tree.map(lambda leaf: leaf[None], function(self, keys[0]))
        return vmap_module(function, (0,), self.num_samples)(self, keys)

    def sow_diagnostics(self, **values: Any) -> None:
        """Leave values in the collection "diagnostics", where the caller asks for it."""
        if self.is_initializing():
            return  # else they would be among the variables, with the shapes that they have here
        for name, value in values.items():
            self.sow("diagnostics", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: jnp.zeros(()))

    @property
    def wants_diagnostics(self) -> bool:
        """Whether the caller asks for diagnostics."""
        return self.is_mutable_collection("diagnostics") and not self.is_initializing()

    def _key(self) -> PRNGKey:
        return getattr(self, self.sides[-1])._choice_key()

    def _one_draw(
        self, key: PRNGKey, observed: ChoiceMap, model_args: Arguments, guide_args: Arguments, stop_guide: bool
    ) -> tuple[Any, Any, ChoiceMap]:
        model_key, guide_key = runs.split(key)
        _, trace = self.guide.simulate(guide_key, guide_args)
        choices, sites = trace.strip(), sites_of(trace)
        kinds = kinds_of(sites)
        score = self._stopped_score(trace, guide_key, guide_args) if stop_guide else trace.get_score()
        log_p = self._log_p(model_key, runs.merged(choices, observed), model_args, sites, kinds)
        scored = [site.log_density for site, kind in zip(sites, kinds, strict=True) if kind not in (PATHWISE, RELAXED)]
        return log_p - score, total([jnp.sum(part) for part in scored]) if scored else None, choices

    def _stopped_score(self, trace: Trace, key: PRNGKey, args: Arguments) -> Any:
        """log q of what the guide drew, held fixed as a function."""
        sites = sites_of(trace)
        require_pathwise(sites, kinds_of(sites))
        # While initialising there are no variables yet, and no gradient.
        return (
            trace.get_score() if self.is_initializing() else runs.score_of_stopped(self.guide, key, trace.strip(), args)
        )

    def _log_p(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, sites: tuple[Site, ...], kinds: tuple[str, ...]
    ) -> Any:
        """log p of all choices."""
        return runs.density(self.model, key, choices, args, sites, kinds)[1]


def require_pathwise(sites: tuple[Site, ...], kinds: tuple[str, ...]) -> None:
    """Raise, naming the choice, where a guide has one through which no gradient flows."""
    for site, kind in zip(sites, kinds, strict=True):
        if kind not in (PATHWISE, RELAXED):
            raise NotReparameterizedError(
                f"The guide's choice at {show_address(site.address)} ({site.distribution.label}) is not reparameterised, and "
                "an objective that holds log q fixed (sticking the landing, the doubly reparameterised gradient) needs every "
                "gradient through the draws. Use a distribution that has one (Normal, Gamma, Beta, ...), or switch that off."
            )

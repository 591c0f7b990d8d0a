r"""`ELBO`: the evidence lower bound as a module.

With a model p(x, z), a guide q(z) and observed choices x,

    log p(x) ≥ E_q[log p(x, z) − log q(z)],

and the loss is minus the mean of the log weights log p(x, z_s) − log q(z_s) over samples z_s ~ q. Its gradient is an unbiased
estimate of the bound's, whatever the guide draws: choices that are reparameterised, z = g(ε; φ), are differentiated through
(Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014); the others have the score function, with the costs
downstream of each choice and a baseline (Ranganath, Gerrish and Blei, "Black box variational inference", AISTATS 2014), or
what their estimator says. See `gjflax.learning.surrogate`.

*Sticking the landing* leaves out ∇_φ log q_φ(z) at a fixed z, whose expectation is 0: at the exact posterior the gradient
then has no variance (Roeder, Wu and Duvenaud, NIPS 2017). An *analytic KL* replaces log p(z) − log q(z) of a choice by its
expectation −KL(q || p), given what was drawn before.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from gjflax.core.choice_map import ChoiceMap
from gjflax.core.errors import ArgumentError, show_address
from gjflax.core.lifting import Streams
from gjflax.core.selection import Selection
from gjflax.core.typing import Arguments, FloatArray, PRNGKey
from gjflax.learning import runs
from gjflax.learning.baselines import Baseline, LeaveOneOut
from gjflax.learning.estimators.estimator import PATHWISE
from gjflax.learning.estimators.relaxed import RELAXED
from gjflax.learning.objectives.base import Objective, effective_sample_size
from gjflax.learning.plan import DIVERGENCE, Plan
from gjflax.learning.sites import Address, kinds_of, sites_of
from gjflax.learning.surrogate import Problem, Surrogate, name_of, sample


class ELBO(Objective):
    """Minus the evidence lower bound, a loss. Its randomness comes from the rng stream "choice".

    Attributes:
      model: the joint density; its choices are those of the guide and the observed ones.
      guide: the variational family, over the choices that are not observed.
      num_samples: how many samples of the guide the bound is averaged over.
      baseline: what is subtracted from the signals of choices with the score function; None for nothing. `LeaveOneOut` does
        something where there are several samples.
      analytic_kl: whether a choice's part of the bound is a divergence in closed form, where TFP knows one and the model's
        distribution there does not depend on what the guide draws after it; other choices are sampled. A selection
        demands it for the choices that it selects.
      sticking_the_landing: see the text of this file. Every choice of the guide must be reparameterised.

    The collection "diagnostics" gets ``log_weights``, of shape ``[num_samples]``, their ``effective_sample_size``, and
    ``terms``: the mean of log p − log q of each choice, by its address.

    Raises:
      NotReparameterizedError: with `sticking_the_landing`, if a choice of the guide has no reparameterisation.
      EnumerationError: if choices with the estimator `ENUM` have too many values.
      MissingChoiceError, UnvisitedConstraintError: if model and guide do not have the same choices.

    >>> import gjflax, jax, flax.linen as nn, jax.numpy as jnp
    >>> @gjflax.gen
    ... def model():
    ...     z = gjflax.trace("z", gjflax.Normal)(0.0, 1.0)
    ...     return gjflax.trace("x", gjflax.Normal)(z, 1.0)
    >>> class Guide(gjflax.GenModule):
    ...     @nn.compact
    ...     def __call__(self):
    ...         loc = self.param("loc", nn.initializers.zeros, ())
    ...         return gjflax.trace("z", gjflax.Normal)(loc, 0.7)
    >>> objective = gjflax.ELBO(model=model, guide=Guide(), num_samples=8)
    >>> observed = {"x": 1.5}
    >>> variables = objective.init(jax.random.key(0), observed)
    >>> loss = objective.apply(variables, observed, rngs={"choice": jax.random.key(1)})
    >>> loss.shape
    ()
    """

    baseline: Any = LeaveOneOut()
    analytic_kl: Any = False
    sticking_the_landing: bool = False

    def __post_init__(self) -> None:
        if not (self.baseline is None or isinstance(self.baseline, Baseline)):
            raise ArgumentError(
                f"`baseline` is LeaveOneOut(), MovingAverage(), Predicted(network) or None; got {self.baseline!r:.80}."
            )
        if not isinstance(self.analytic_kl, (bool, Selection)):
            raise ArgumentError(
                f"`analytic_kl` is True, False, or a selection of choices, select(...); got {self.analytic_kl!r:.80}."
            )
        if self.analytic_kl and self.sticking_the_landing:
            raise ArgumentError(
                "`sticking_the_landing` and `analytic_kl` exclude each other: where the divergence is known, log q is not "
                "sampled."
            )
        super().__post_init__()

    def loss(self, key: PRNGKey, observed: ChoiceMap, model_args: Arguments, guide_args: Arguments) -> FloatArray:
        problem = Problem(observed, model_args, guide_args, self._wants_divergence)
        plans: list[Plan | None] = []

        def one(objective: ELBO, key: PRNGKey) -> Any:
            plan, arrays = objective._one_sample(key, problem)
            plans.append(plan)
            return arrays

        arrays = self.over_samples(one, key)
        plan, extra = plans[-1], jnp.zeros(())
        if plan is None:
            log_weights, signals = arrays
            if signals:
                # While initialising, so that the baselines' variables are made.
                self._baselines(signals, problem)
        else:
            self._require_demanded(plan)
            readings, landing = arrays
            surrogate = Surrogate(plan, readings)
            baselines, extra = self._baselines(surrogate.signals(), problem)
            log_weights = surrogate.log_weights(baselines) + landing
            if self.wants_diagnostics:
                terms = {name: jnp.mean(term) for name, term in surrogate.terms_by_address().items()}
                size = effective_sample_size(log_weights)
                self.sow_diagnostics(log_weights=log_weights, effective_sample_size=size, terms=terms)
        extra = jnp.asarray(extra, log_weights.dtype)
        return -jnp.mean(log_weights) + (extra - lax.stop_gradient(extra))

    def _one_sample(self, key: PRNGKey, problem: Problem) -> tuple[Plan | None, Any]:
        """The arrays of one sample, and the plan by which they make an estimate.

        Where nothing is asked for but the loss, and every choice is reparameterised, there is no plan: the array is the log
        weight. So it is while initialising.
        """
        model_key, guide_key = runs.split(key)
        streams = Streams(self)
        _, trace = self.guide.simulate(guide_key, problem.guide_args)
        sites = sites_of(trace)
        kinds = kinds_of(sites)
        is_plain = all(kind == PATHWISE for kind in kinds) and not self.analytic_kl and not self.wants_diagnostics
        score = trace.get_score()
        stopped = self._stopped_score(trace, guide_key, problem.guide_args) if self.sticking_the_landing else score
        if is_plain or self.is_initializing():
            choices = runs.merged(trace.strip(), problem.observed)
            log_p = self._log_p(model_key, choices, problem.model_args, sites, kinds)
            scored = zip(sites, kinds, strict=True)
            signals = {name_of(s.address): s.log_density for s, kind in scored if kind not in (PATHWISE, RELAXED)}
            return None, (log_p - stopped, signals)
        plan, readings = sample(self, model_key, guide_key, trace, streams, problem)
        return plan, (readings, score - stopped)

    def _baselines(self, signals: Any, problem: Problem) -> tuple[Any, Any]:
        if self.baseline is None or not signals:
            return {}, jnp.zeros(())
        return self.baseline(signals, problem.observed, problem.model_args, problem.guide_args)

    def _wants_divergence(self, address: Address) -> bool:
        return self.analytic_kl if isinstance(self.analytic_kl, bool) else address in self.analytic_kl

    def _require_demanded(self, plan: Plan) -> None:
        """Raise where a selected choice has no divergence in closed form."""
        if isinstance(self.analytic_kl, bool):
            return
        analytic = {term.address for term in plan.terms if term.kind == DIVERGENCE}
        for choice in plan.choices:
            if choice.address in self.analytic_kl and choice.address not in analytic:
                raise ArgumentError(
                    f"`analytic_kl` demands a divergence in closed form for {show_address(choice.address)}, and there is none: "
                    "TFP does not know that pair of distributions, they stand in different combinators, or the model's "
                    "distribution there depends on what the guide draws after it. Leave it out of the selection."
                )

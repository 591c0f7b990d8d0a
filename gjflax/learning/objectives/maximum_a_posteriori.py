r"""`MAP`: minus the log joint density at the guide's point, as a module.

With a point z = z(φ) that the guide holds, the loss is

    −log p(x, z(φ)),

and its minimum in φ is the maximum a posteriori of the choices that are not observed: of their density where they live, not of
their image in R^n. It is minus the log posterior of z up to log p(x).

The point of an `AutoDelta` is its own. That of a guide with a density on R^n, such as `AutoNormal`, is the image of the
density's location: what is trained by `MAP` is then a start for an `ELBO` of the same guide, with the same variables.
"""

from __future__ import annotations

import jax.numpy as jnp

from gjflax.core.choice_map import ChoiceMap
from gjflax.core.errors import ArgumentError, show_address
from gjflax.core.typing import Arguments, FloatArray, PRNGKey
from gjflax.distributions.families import Deterministic
from gjflax.learning import runs
from gjflax.learning.guides.base import AutoGuide
from gjflax.learning.objectives.base import Objective
from gjflax.learning.sites import Site, sites_of


class MAP(Objective):
    """Minus the log joint density of the observed choices and the guide's point, a loss.

    Attributes:
      model: the joint density; its choices are those of the guide and the observed ones.
      guide: a point for each choice that is not observed: a guide that is built from the model, such as `AutoDelta`, or one
        whose choices are all `Deterministic`, as those of a network that reads the point off the data.
      num_samples: how often the model is run, for the mean. It matters only where networks draw randomness, as dropout does.

    The collection "diagnostics" gets ``log_joint``, the mean of the log joint density.

    Raises:
      ArgumentError: if a choice of the guide is no point.
      MissingChoiceError, UnvisitedConstraintError: if model and guide do not have the same choices.

    >>> import gjflax, jax, optax
    >>> @gjflax.gen
    ... def model():
    ...     mu = gjflax.trace("mu", gjflax.Normal)(0.0, 1.0)
    ...     return gjflax.trace("x", gjflax.Normal)(mu, 1.0)
    >>> observed = {"x": 1.0}
    >>> objective = MAP(model, gjflax.AutoDelta(model, observed))
    >>> variables = objective.init(jax.random.key(0), observed)
    >>> loss = lambda variables: objective.apply(variables, observed, rngs={"choice": jax.random.key(1)})
    >>> for _ in range(20):
    ...     variables = jax.tree.map(lambda p, g: p - 0.5 * g, variables, jax.grad(loss)(variables))
    >>> round(float(variables["params"]["guide"]["loc"]["mu"]), 4)  # the posterior's mean
    0.5
    """

    def loss(self, key: PRNGKey, observed: ChoiceMap, model_args: Arguments, guide_args: Arguments) -> FloatArray:
        def one(objective: MAP, key: PRNGKey) -> FloatArray:
            model_key, guide_key = runs.split(key)
            choices = runs.merged(objective._point(guide_key, guide_args), observed)
            return jnp.asarray(runs.assess(objective.model, model_key, choices, model_args))

        log_p = jnp.mean(self.over_samples(one, key))
        self.sow_diagnostics(log_joint=log_p)
        return -log_p

    def _point(self, key: PRNGKey, args: Arguments) -> ChoiceMap:
        if isinstance(self.guide, AutoGuide):
            return self.guide.at_location(args)
        _, trace = self.guide.simulate(key, args)
        for site in sites_of(trace):
            if not _is_point(site):
                raise ArgumentError(
                    f"`guide` of `MAP` holds a point for each choice, and its choice at {show_address(site.address)} is drawn "
                    f"from {type(site.distribution).__name__}. Use `Deterministic` or `AutoDelta` there, also in `AutoGuides`; "
                    "or one guide that is built from the model; with a distribution as a guide use `ELBO`."
                )
        return trace.strip()


def _is_point(site: Site) -> bool:
    distribution = site.distribution
    return distribution == Deterministic or (isinstance(distribution, AutoGuide) and distribution.is_point)

r"""`MAP`: minus the log joint density at the guide's point, as a module.

With a point z = z(φ) that the guide holds, such as an `AutoDelta`, the loss is

    −log p(x, z(φ)),

and its minimum in φ is the maximum a posteriori of the choices that are not observed: of their density where they live, not of
their image in R^n. It is minus the log posterior of z up to log p(x).
"""

from __future__ import annotations

import jax.numpy as jnp

from gjflax.core.choice_map import ChoiceMap
from gjflax.core.errors import ArgumentError
from gjflax.core.typing import Arguments, FloatArray, PRNGKey
from gjflax.learning import runs
from gjflax.learning.guides.base import AutoGuide
from gjflax.learning.objectives.base import Objective


class MAP(Objective):
    """Minus the log joint density of the observed choices and the guide's point, a loss.

    Attributes:
      model: the joint density; its choices are those of the guide and the observed ones.
      guide: a point for each choice that is not observed: an `AutoDelta`.
      num_samples: 1, for a point is one.

    Raises:
      ArgumentError: if the guide is no point mass.
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

    def __post_init__(self) -> None:
        if not (isinstance(self.guide, AutoGuide) and self.guide.is_point):
            raise ArgumentError(
                f"`guide` of `MAP` holds a point for each choice, as `AutoDelta` does; got {self.guide!r:.80}. With a "
                "distribution as a guide use `ELBO`."
            )
        if self.num_samples != 1:
            raise ArgumentError(f"`num_samples` of `MAP` is 1, for a point is one; got {self.num_samples!r}.")
        super().__post_init__()

    def loss(self, key: PRNGKey, observed: ChoiceMap, model_args: Arguments, guide_args: Arguments) -> FloatArray:
        model_key, guide_key = runs.split(key)
        _, trace = self.guide.simulate(guide_key, guide_args)
        log_p = runs.assess(self.model, model_key, runs.merged(trace.strip(), observed), model_args)
        self.sow_diagnostics(log_joint=log_p)
        return -jnp.asarray(log_p)

r"""`AutoLaplace`: the normal distribution at the posterior's mode in R^n.

Training moves a point u to the maximum of the density in R^n,

    log p(x, b(u)) + log |det b'(u)|,

and `AutoLaplace.approximation` then takes the curvature there, H = −∇² of it: q(u) = Normal(u; û, H⁻¹).

After D. J. C. MacKay, "Information Theory, Inference, and Learning Algorithms", 2003, chapter 27.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve

from gjflax.core.choice_map import choice_map
from gjflax.core.errors import ArgumentError
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.interface import is_tracer
from gjflax.core.trace import total
from gjflax.core.typing import Arguments, FloatArray, PRNGKey
from gjflax.learning.guides.joint import JointGuide
from gjflax.learning.guides.multivariate_normal import AutoMultivariateNormal
from gjflax.learning.guides.normal import check_start


class AutoLaplace(JointGuide):
    """A point that is trained to the posterior's mode in R^n, and the normal approximation there; see `AutoGuide`.

    Its parameter is ``loc`` of shape ``[D]``. As a guide it is a point mass in R^n, with score −log |det b'(u)|, so that an
    `ELBO` is the density in R^n.

    Attributes:
      initial_spread: the standard deviation of the point that training starts from, about 0.

    >>> import gjflax, jax, optax
    >>> @gjflax.gen
    ... def model():
    ...     mu = gjflax.trace("mu", gjflax.Normal)(0.0, 1.0)
    ...     return gjflax.trace("y", gjflax.Normal)(mu, 1.0)
    >>> guide = AutoLaplace(model, observed={"y": 3.0})
    >>> normal, variables = guide.approximation({"params": {"loc": jnp.array([1.5])}}, model, {"y": 3.0})
    >>> normal.bind(variables).scale_tril
    Array([[0.70710677]], dtype=float32)
    """

    initial_spread: float = 0.1

    def __post_init__(self) -> None:
        check_start(1.0, self.initial_spread)
        super().__post_init__()

    def setup(self) -> None:
        self.loc = self.param("loc", nn.initializers.normal(self.initial_spread), (self.size,))

    @nn.nowrap
    def location_flat(self) -> FloatArray:
        return self.loc

    @nn.nowrap
    def draw_flat(self, key: PRNGKey) -> FloatArray:
        return self.loc

    @nn.nowrap
    def log_density_flat(self, point: FloatArray) -> FloatArray:
        here = jnp.all(jnp.isclose(point, self.loc, rtol=1e-4, atol=1e-5))
        return jnp.where(here, jnp.zeros((), self.loc.dtype), -jnp.inf)

    @nn.nowrap
    def approximation(
        self, variables: Mapping[str, Any], model: GenerativeFunction, observed: Any, model_args: Arguments = ()
    ) -> tuple[AutoMultivariateNormal, dict[str, Any]]:
        """The normal approximation at the point: a guide, and its variables.

        Args:
          variables: of this guide, trained.
          model: the model, bound where it has parameters.
          observed: the observed choices.
          model_args: the model's arguments.

        Raises:
          ArgumentError: if the curvature is not positive definite, so that the point is no maximum. Under ``jax.jit`` the
            result is NaN instead.
        """
        point = variables["params"]["loc"]
        observed = choice_map(observed)
        evaluate = model._evaluator(None, "refuse")
        args = model_args or None

        def log_density(point: FloatArray) -> FloatArray:
            values, log_dets = self.latents.constrain(self.split(point), args)
            choices = choice_map(dict(values)).merge(observed)
            _, score = evaluate(None, jax.random.key(0), choices, model_args)
            return total([jnp.asarray(score), *(jnp.sum(log_det) for log_det in log_dets.values())])

        curvature = -jax.hessian(log_density)(point)
        chol = jnp.linalg.cholesky(curvature)
        if not is_tracer(chol) and not bool(jnp.all(jnp.isfinite(chol))):
            raise ArgumentError(
                "The curvature of the log density at the guide's point is not positive definite, so the point is no maximum: "
                "train it further, or from another start."
            )
        covariance = cho_solve((chol, True), jnp.eye(point.size, dtype=point.dtype))
        guide = AutoMultivariateNormal(self.model, self.observed, self.model_args, self.selection)
        return guide, {"params": guide.params_of(point, jnp.linalg.cholesky(covariance))}

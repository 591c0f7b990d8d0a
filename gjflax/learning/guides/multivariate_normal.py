r"""`AutoMultivariateNormal`: one multivariate normal distribution, mapped to the supports of the model's choices.

    q(u) = Normal(u; loc, L Lᵀ),   u = loc + L ε,   z = b(u),

with L lower triangular ("full rank"; Kucukelbir et al., "Automatic differentiation variational inference", JMLR 2017, section
2.4). On a posterior that is normal in R^n it is exact.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from gjflax.core.typing import FloatArray, PRNGKey
from gjflax.learning.guides.joint import JointGuide
from gjflax.learning.guides.normal import check_start


class AutoMultivariateNormal(JointGuide):
    """A multivariate normal distribution on R^D, of all choices together; see `AutoGuide`.

    Its parameters are ``loc`` and ``log_scale`` of shape ``[D]``, and ``lower`` of shape ``[D, D]``, of which what is below the
    diagonal counts: L = diag(exp(log_scale)) (I + lower).

    Attributes:
      initial_scale: the scale that training starts from, in R^n.
      initial_spread: the standard deviation of the locations that training starts from, about 0.

    >>> import gjflax, jax
    >>> @gjflax.gen
    ... def model():
    ...     mu = gjflax.trace("mu", gjflax.Normal)(0.0, 1.0)
    ...     scale = gjflax.trace("scale", gjflax.Gamma)(2.0, 1.0)
    ...     return gjflax.trace("y", gjflax.Normal)(mu, scale)
    >>> guide = AutoMultivariateNormal(model, observed={"y": 1.5})
    >>> variables = guide.init(jax.random.key(0))
    >>> key, tr = guide.bind(variables).simulate(jax.random.key(1), ())
    >>> sorted(tr.strip().to_dict())
    ['mu', 'scale']
    """

    initial_scale: float = 0.1
    initial_spread: float = 0.1

    def __post_init__(self) -> None:
        check_start(self.initial_scale, self.initial_spread)
        super().__post_init__()

    def setup(self) -> None:
        size = self.size
        self.loc = self.param("loc", nn.initializers.normal(self.initial_spread), (size,))
        self.log_scale = self.param("log_scale", nn.initializers.constant(math.log(self.initial_scale)), (size,))
        self.lower = self.param("lower", nn.initializers.zeros, (size, size))

    @property
    def scale_tril(self) -> FloatArray:
        """L, of shape ``[D, D]``."""
        unit = jnp.tril(self.lower, -1) + jnp.eye(self.lower.shape[-1], dtype=self.lower.dtype)
        return jnp.exp(self.log_scale)[:, None] * unit

    @nn.nowrap
    def location_flat(self) -> FloatArray:
        return self.loc

    @nn.nowrap
    def draw_flat(self, key: PRNGKey) -> FloatArray:
        noise = jax.random.normal(key, self.loc.shape, self.loc.dtype)
        return self.loc + self.scale_tril @ noise

    @nn.nowrap
    def log_density_flat(self, point: FloatArray) -> FloatArray:
        noise = solve_triangular(self.scale_tril, point - self.loc, lower=True)
        return -0.5 * jnp.sum(noise**2) - jnp.sum(self.log_scale) - 0.5 * noise.size * math.log(2 * math.pi)

    @staticmethod
    def params_of(loc: Any, scale_tril: Any) -> dict[str, FloatArray]:
        """The parameters of a guide with this location and Cholesky factor."""
        diagonal = jnp.diagonal(scale_tril)
        lower = jnp.tril(scale_tril / diagonal[:, None], -1)
        return {"loc": jnp.asarray(loc), "log_scale": jnp.log(diagonal), "lower": lower}

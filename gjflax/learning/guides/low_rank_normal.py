r"""`AutoLowRankNormal`: a multivariate normal distribution whose covariance is diagonal plus low rank.

    q(u) = Normal(u; loc, diag(s²) + F Fᵀ),   u = loc + s ε₁ + F ε₂,   z = b(u),

with F of shape [D, r]: D (r + 2) parameters, where a full covariance has D (D + 3) / 2. By the lemmas of Woodbury and of
determinants, with V = F / s and the r × r matrix C = I + Vᵀ V,

    log |diag(s²) + F Fᵀ| = 2 Σ log s + log |C|,   (u − loc)ᵀ (…)⁻¹ (u − loc) = |w|² − |chol(C)⁻¹ Vᵀ w|²,   w = (u − loc) / s.

After V. M.-H. Ong, D. J. Nott, M. S. Smith, "Gaussian variational approximation with a factor covariance structure", JCGS 2018.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from gjflax.core.errors import ArgumentError
from gjflax.core.typing import FloatArray, PRNGKey
from gjflax.learning.guides.joint import JointGuide
from gjflax.learning.guides.normal import check_start


class AutoLowRankNormal(JointGuide):
    """A normal distribution on R^D with a covariance of low rank beside its diagonal; see `AutoGuide`.

    Its parameters are ``loc`` and ``log_scale`` of shape ``[D]``, and ``factor`` of shape ``[D, rank]``.

    Attributes:
      rank: the rank r of the factor.
      initial_scale: the scale that training starts from, in R^n.
      initial_spread: the standard deviation of the locations that training starts from, about 0.

    >>> import gjflax, jax
    >>> @gjflax.gen
    ... def model():
    ...     w = gjflax.trace("w", gjflax.Normal)(jnp.zeros(50), 1.0)
    ...     return gjflax.trace("y", gjflax.Normal)(w.sum(), 1.0)
    >>> guide = AutoLowRankNormal(model, observed={"y": 1.5}, rank=2)
    >>> jax.tree.map(jnp.shape, guide.init(jax.random.key(0))["params"])
    {'factor': (50, 2), 'loc': (50,), 'log_scale': (50,)}
    """

    rank: int = 1
    initial_scale: float = 0.1
    initial_spread: float = 0.1

    def __post_init__(self) -> None:
        check_start(self.initial_scale, self.initial_spread)
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ArgumentError(f"`rank` is a positive integer; got {self.rank!r}.")
        super().__post_init__()

    def setup(self) -> None:
        size = self.size
        self.loc = self.param("loc", nn.initializers.normal(self.initial_spread), (size,))
        self.log_scale = self.param("log_scale", nn.initializers.constant(math.log(self.initial_scale)), (size,))
        # Of a column of zeros the gradient is zero, for its sign is free.
        spread = 0.1 * self.initial_scale / math.sqrt(self.rank)
        self.factor = self.param("factor", nn.initializers.normal(spread), (size, self.rank))

    @nn.nowrap
    def location_flat(self) -> FloatArray:
        return self.loc

    @nn.nowrap
    def draw_flat(self, key: PRNGKey) -> FloatArray:
        own, shared = jax.random.split(key)
        each = jnp.exp(self.log_scale) * jax.random.normal(own, self.loc.shape, self.loc.dtype)
        together = self.factor @ jax.random.normal(shared, (self.rank,), self.loc.dtype)
        return self.loc + each + together

    @nn.nowrap
    def log_density_flat(self, point: FloatArray) -> FloatArray:
        scale = jnp.exp(self.log_scale)
        w, v = (point - self.loc) / scale, self.factor / scale[:, None]
        chol = jnp.linalg.cholesky(jnp.eye(self.rank, dtype=v.dtype) + v.T @ v)
        explained = solve_triangular(chol, v.T @ w, lower=True)
        log_det = 2 * jnp.sum(self.log_scale) + 2 * jnp.sum(jnp.log(jnp.diagonal(chol)))
        return -0.5 * (jnp.sum(w**2) - jnp.sum(explained**2) + log_det + w.size * math.log(2 * math.pi))

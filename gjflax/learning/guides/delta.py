r"""`AutoDelta`: a point for every choice of the model.

    q(z) = δ(z − b(u)),   log q = 0 by convention,

so an `ELBO` with it is log p(x, z) at the point, and training finds the maximum a posteriori: of the density of z, not of
that of u, for no Jacobian enters. (`AutoLaplace` starts from the maximum in R^n.)
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gjflax.core.typing import PRNGKey
from gjflax.learning.guides.base import AutoGuide, Rows
from gjflax.learning.guides.latents import Address, Points
from gjflax.learning.guides.normal import check_start


class AutoDelta(AutoGuide):
    """A point for every choice; see `AutoGuide`. Its parameter is ``loc``, a tree by address in R^n.

    Its score is 0 at the point, and −∞ elsewhere.

    Attributes:
      initial_spread: the standard deviation of the points that training starts from, about 0 in R^n.

    >>> import gjflax, jax
    >>> @gjflax.gen
    ... def model():
    ...     p = gjflax.trace("p", gjflax.Beta)(2.0, 2.0)
    ...     return gjflax.trace("heads", gjflax.Binomial)(10.0, probs=p)
    >>> guide = AutoDelta(model, observed={"heads": 7}, initial_spread=0.0)
    >>> variables = guide.init(jax.random.key(0))
    >>> key, tr = guide.bind(variables).simulate(jax.random.key(1), ())
    >>> float(tr["p"]), float(tr.get_score())
    (0.5, 0.0)
    """

    initial_spread: float = 0.1

    is_point = True

    def __post_init__(self) -> None:
        check_start(1.0, self.initial_spread)
        super().__post_init__()

    def setup(self) -> None:
        self.loc = self.parameters_by_choice("loc", nn.initializers.normal(self.initial_spread))

    @nn.nowrap
    def location(self, rows: Rows) -> Points:
        return {latent.address: rows.take(latent, self.loc[latent.address]) for latent in self.latents.each}

    @nn.nowrap
    def draw(self, key: PRNGKey, rows: Rows) -> Points:
        return self.location(rows)

    @nn.nowrap
    def log_density(self, points: Points, rows: Rows) -> dict[Address, Any]:
        scores = {}
        for latent in self.latents.each:
            loc = rows.take(latent, self.loc[latent.address])
            axes = tuple(range(len(latent.plates), loc.ndim))
            # A value that went to its support and back is not the same to the last digit.
            here = jnp.all(jnp.isclose(points[latent.address], loc, rtol=1e-4, atol=1e-5), axis=axes)
            scores[latent.address] = jnp.where(here, jnp.zeros((), loc.dtype), -jnp.inf)
        return scores

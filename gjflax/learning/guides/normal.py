r"""`AutoNormal`: independent normal distributions, mapped to the supports of the model's choices.

    q(u) = Π_a Normal(u_a; loc_a, scale_a),   z = b(u),

with a location and a scale for every coordinate of every choice ("mean field"; Kucukelbir et al., "Automatic differentiation
variational inference", JMLR 2017, section 2.4).
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gjflax.core.errors import ArgumentError
from gjflax.core.keys import KeySource, typed_key
from gjflax.core.typing import PRNGKey
from gjflax.learning.guides.base import AutoGuide, Rows
from gjflax.learning.guides.latents import Address, Points


class AutoNormal(AutoGuide):
    """Independent normal distributions on R^n, one for each coordinate of each choice; see `AutoGuide`.

    Its parameters are ``loc`` and ``log_scale``, trees by address in R^n. Where the model has a batch of a population
    (``Map(..., total=N)``), the choices in it have N rows, and a batch of any size is asked for by indices.

    Attributes:
      initial_scale: the scale that training starts from, in R^n.
      initial_spread: the standard deviation of the locations that training starts from, about 0.

    >>> import gjflax, jax
    >>> @gjflax.gen
    ... def model():
    ...     scale = gjflax.trace("scale", gjflax.Gamma)(2.0, 1.0)
    ...     return gjflax.trace("y", gjflax.Normal)(0.0, scale)
    >>> guide = AutoNormal(model, observed={"y": 1.5})
    >>> variables = guide.init(jax.random.key(0))
    >>> jax.tree.map(jnp.shape, variables["params"])
    {'loc': {'scale': ()}, 'log_scale': {'scale': ()}}
    >>> key, tr = guide.bind(variables).simulate(jax.random.key(1), ())
    >>> tr["scale"] > 0
    Array(True, dtype=bool)
    """

    initial_scale: float = 0.1
    initial_spread: float = 0.1

    def __post_init__(self) -> None:
        check_start(self.initial_scale, self.initial_spread)
        super().__post_init__()

    def setup(self) -> None:
        self.loc = self.parameters_by_choice("loc", nn.initializers.normal(self.initial_spread))
        self.log_scale = self.parameters_by_choice("log_scale", nn.initializers.constant(math.log(self.initial_scale)))

    @nn.nowrap
    def location(self, rows: Rows) -> Points:
        return {latent.address: self._at(latent, rows)[0] for latent in self.latents.each}

    @nn.nowrap
    def normals(self, rows: Rows) -> dict[Address, tuple[Any, Any]]:
        pairs = {latent.address: self._at(latent, rows) for latent in self.latents.each}
        return {address: (loc, jnp.exp(log_scale)) for address, (loc, log_scale) in pairs.items()}

    @nn.nowrap
    def draw(self, key: PRNGKey, rows: Rows) -> Points:
        keys, points = KeySource(typed_key(key)), {}
        for latent in self.latents.each:
            loc, log_scale = self._at(latent, rows)
            noise = jax.random.normal(keys.at(latent.address), loc.shape, loc.dtype)
            points[latent.address] = loc + jnp.exp(log_scale) * noise
        return points

    @nn.nowrap
    def log_density(self, points: Points, rows: Rows) -> dict[Address, Any]:
        scores = {}
        for latent in self.latents.each:
            loc, log_scale = self._at(latent, rows)
            scores[latent.address] = normal_log_density(points[latent.address], loc, log_scale, len(latent.plates))
        return scores

    @nn.nowrap
    def _at(self, latent: Any, rows: Rows) -> tuple[Any, Any]:
        return rows.take(latent, self.loc[latent.address]), rows.take(latent, self.log_scale[latent.address])


def normal_log_density(point: Any, loc: Any, log_scale: Any, axes: int) -> Any:
    """The log density of a point, summed over all but the first axes, which are those of elements."""
    noise = (point - loc) / jnp.exp(log_scale)
    terms = -0.5 * noise**2 - log_scale - 0.5 * math.log(2 * math.pi)
    return jnp.sum(terms, axis=tuple(range(axes, terms.ndim)))


def check_start(scale: float, spread: float) -> None:
    """An error unless these are numbers that training can start from."""
    if not isinstance(scale, (int, float)) or not scale > 0:
        raise ArgumentError(f"`initial_scale` is a positive number; got {scale!r}.")
    if not isinstance(spread, (int, float)) or not spread >= 0:
        raise ArgumentError(f"`initial_spread` is a number of 0 or more; got {spread!r}.")

r"""Guides whose density on R^n is one of all coordinates together, as a flat vector u in R^D."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gjflax.core.context import current_address
from gjflax.core.errors import NotImplementedByGenerativeFunctionError, show_address
from gjflax.core.typing import FloatArray, PRNGKey
from gjflax.learning.guides.base import AutoGuide, Rows
from gjflax.learning.guides.latents import Address, Points


class JointGuide(AutoGuide):
    """Base class of these: a subclass writes `draw_flat`, `log_density_flat` and `location_flat`. See `AutoGuide`.

    Constraints are all of its choices or none.
    """

    is_joint = True

    @nn.nowrap
    def draw_flat(self, key: PRNGKey) -> FloatArray:
        """A point u, drawn with reparameterisation: shape ``[D]``."""
        raise NotImplementedError

    @nn.nowrap
    def log_density_flat(self, point: FloatArray) -> FloatArray:
        """log q(u), a scalar."""
        raise NotImplementedError

    @nn.nowrap
    def location_flat(self) -> FloatArray:
        """The point that stands for the density: shape ``[D]``."""
        raise NotImplementedError

    @nn.nowrap
    def location(self, rows: Rows) -> Points:
        return self.split(self.location_flat())

    @nn.nowrap
    def draw(self, key: PRNGKey, rows: Rows) -> Points:
        return self.split(self.draw_flat(key))

    @nn.nowrap
    def log_density(self, points: Points, rows: Rows) -> dict[Address, Any]:
        return {(): self.log_density_flat(self.joined(points))}

    @property
    def size(self) -> int:
        """D, the number of coordinates.

        Raises:
          NotImplementedByGenerativeFunctionError: if some choices stand in a batch of a population.
        """
        latents = self.latents
        if latents.has_population:
            local = next(latent.address for latent in latents.each if latent.is_local)
            raise NotImplementedByGenerativeFunctionError(
                f"`{type(self).__name__}` at {show_address(current_address())} has a joint density of all choices, and "
                f"{show_address(local)} stands in a batch of a population, which comes in part. Give the choices in the batch an "
                "`AutoNormal` or an amortised guide, and combine the two by `AutoGuides`."
            )
        return latents.size

    @nn.nowrap
    def split(self, flat: FloatArray) -> Points:
        """The points of a flat vector."""
        points, start = {}, 0
        for latent in self.latents.each:
            part = flat[start : start + latent.size]
            points[latent.address] = part.reshape(*latent.rows, *latent.point).astype(latent.dtype)
            start += latent.size
        return points

    @nn.nowrap
    def joined(self, points: Points) -> FloatArray:
        """The flat vector of points."""
        if not self.latents.each:
            return jnp.zeros(0)
        return jnp.concatenate([jnp.ravel(points[latent.address]) for latent in self.latents.each])

r"""The maps from R^n onto supports: of the families that are built without TFP, and where TFP's need a correction.

Each has the methods of a TFP bijector that `constrain` and `unconstrain` call. Those of families without TFP are
the ones that TFP chooses: so whether a family is built with TFP or without, its values in R^n are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gjflax.distributions.arguments import aligned
from gjflax.distributions.softplus import softplus


class Bijector:
    """A map f from R to an interval, elementwise, with log |f'|."""

    forward_min_event_ndims = 0

    def forward(self, x: Any) -> Any:
        """f(x)."""
        raise NotImplementedError

    def inverse(self, y: Any) -> Any:
        """The x with f(x) = y."""
        raise NotImplementedError

    def log_slope(self, x: Any) -> Any:
        """log |f'(x)|, elementwise."""
        raise NotImplementedError

    def forward_log_det_jacobian(self, x: Any, event_ndims: int = 0) -> Any:
        """log |f'(x)|, summed over the last `event_ndims` axes."""
        return jnp.sum(self.log_slope(x), axis=tuple(range(-event_ndims, 0)))

    def inverse_log_det_jacobian(self, y: Any, event_ndims: int = 0) -> Any:
        """The same of the inverse."""
        return -self.forward_log_det_jacobian(self.inverse(y), event_ndims)

    def forward_event_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of f(x) for x of this shape."""
        return tuple(shape)

    def inverse_event_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of x for f(x) of this shape."""
        return tuple(shape)


class Identity(Bijector):
    """f(x) = x, onto R."""

    def forward(self, x: Any) -> Any:
        return x

    def inverse(self, y: Any) -> Any:
        return y

    def log_slope(self, x: Any) -> Any:
        return jnp.zeros_like(x)


class Exp(Bijector):
    """f(x) = exp x, onto the positive numbers."""

    def forward(self, x: Any) -> Any:
        return jnp.exp(x)

    def inverse(self, y: Any) -> Any:
        return jnp.log(y)

    def log_slope(self, x: Any) -> Any:
        return x


class Softplus(Bijector):
    """f(x) = log(1 + exp x), onto the positive numbers."""

    def forward(self, x: Any) -> Any:
        return softplus(x)

    def inverse(self, y: Any) -> Any:
        # log(exp y − 1), without the overflow of a large y and the cancellation of a small one.
        return y + jnp.log(-jnp.expm1(-y))

    def log_slope(self, x: Any) -> Any:
        return -softplus(-x)


class Sigmoid(Bijector):
    """f(x) = low + (high − low) / (1 + exp(−x)), onto an interval."""

    def __init__(self, low: Any, high: Any):
        self.low, self.high = low, high

    def _bounds(self, like: Any) -> tuple[Any, Any]:
        return aligned(self.low, like, like.dtype), aligned(self.high, like, like.dtype)

    def forward(self, x: Any) -> Any:
        low, high = self._bounds(x)
        # Rounding may not carry a value out of the interval.
        return jnp.clip(low + (high - low) * jax.nn.sigmoid(x), low, high)

    def inverse(self, y: Any) -> Any:
        low, high = self._bounds(y)
        return jnp.log(y - low) - jnp.log(high - y)

    def log_slope(self, x: Any) -> Any:
        low, high = self._bounds(x)
        return jnp.log(jnp.asarray(high - low, x.dtype)) - softplus(-x) - softplus(x)


class Measured:
    """A TFP bijector with its log determinant taken in the coordinates in which the family's density is one.

    On a surface, such as the simplex, TFP takes the determinant of an area, or that of a map between other sets. A
    density in R^n needs the measure that the density on the surface is for, else it does not integrate to 1.

    Args:
      inner: the TFP bijector.
      excess: ``excess(y)``, by how much its log determinant is too large at f(x) = y, one number for each event.
    """

    def __init__(self, inner: Any, excess: Callable[[Any], Any]):
        self.inner, self.excess = inner, excess
        self.forward_min_event_ndims = inner.forward_min_event_ndims

    def forward(self, x: Any) -> Any:
        """f(x)."""
        return self.inner.forward(x)

    def inverse(self, y: Any) -> Any:
        """The x with f(x) = y."""
        return self.inner.inverse(y)

    def forward_log_det_jacobian(self, x: Any, event_ndims: int) -> Any:
        """The log determinant, summed over the last `event_ndims` axes."""
        excess = self.excess(self.inner.forward(x))
        extra = tuple(range(self.forward_min_event_ndims - event_ndims, 0))
        return self.inner.forward_log_det_jacobian(x, event_ndims=event_ndims) - jnp.sum(excess, extra)

    def inverse_log_det_jacobian(self, y: Any, event_ndims: int) -> Any:
        """The same of the inverse, for `event_ndims` axes of f(x)."""
        axes = event_ndims - self.inner.inverse_min_event_ndims + self.forward_min_event_ndims
        return -self.forward_log_det_jacobian(self.inverse(y), axes)

    def forward_event_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of f(x) for x of this shape."""
        return tuple(self.inner.forward_event_shape(shape))

    def inverse_event_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of x for f(x) of this shape."""
        return tuple(self.inner.inverse_event_shape(shape))


def simplex_excess(y: Any) -> Any:
    """TFP has the area on the simplex of K numbers; its densities are in the first K − 1 of them: a factor of √K."""
    return jnp.full(y.shape[:-1], 0.5 * math.log(y.shape[-1]), y.dtype)


def correlation_excess(y: Any) -> Any:
    """TFP has the map L ↦ L Lᵀ of all lower triangles L; on those of correlations it is smaller by 2^K |det L|."""
    return 0.5 * jnp.linalg.slogdet(y)[1] + y.shape[-1] * math.log(2)

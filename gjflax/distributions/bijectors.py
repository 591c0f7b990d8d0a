r"""The maps from R onto the supports of the families that are built without TFP.

Each has the methods of a TFP bijector that `constrain` and `unconstrain` call, elementwise, and is the one that
TFP chooses for the family: so whether a family is built with TFP or without, its values in R^n are the same.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gjflax.distributions.arguments import aligned


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
        return jax.nn.softplus(x)

    def inverse(self, y: Any) -> Any:
        # log(exp y − 1), without the overflow of a large y and the cancellation of a small one.
        return y + jnp.log(-jnp.expm1(-y))

    def log_slope(self, x: Any) -> Any:
        return -jax.nn.softplus(-x)


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
        return jnp.log(jnp.asarray(high - low, x.dtype)) - jax.nn.softplus(-x) - jax.nn.softplus(x)

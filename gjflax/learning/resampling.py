r"""Resampling: which particle each of the next ones descends from.

K particles have weights w_k, normalised W_k = w_k / Σ_j w_j. Every scheme draws K ancestors such that particle k has K W_k
descendants on the average; the schemes differ in how much their numbers vary around that.

=============  ====================================================================================
multinomial    K independent draws with probabilities W
stratified     the particles at (i + u_i) / K of the cumulative weights, u_0, …, u_{K−1} uniform
systematic     the particles at (i + u) / K, one uniform u for all
residual       ⌊K W_k⌋ descendants for certain, and independent draws for what is left over
=============  ====================================================================================

After R. Douc, O. Cappé and E. Moulines, "Comparison of resampling schemes for particle filtering", ISPA 2005.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gjflax.core.typing import PRNGKey


def draw_ancestors(key: PRNGKey, log_weights: Any, scheme: str) -> Any:
    """The ancestors of the next particles: int32, of the shape of the log weights, `[K]`.

    Where all weights are 0 they are taken as equal.

    Args:
      key: a random key.
      log_weights: log w, of any sum.
      scheme: a name in `SCHEMES`.

    >>> log_weights = jnp.log(jnp.array([0.0, 0.5, 0.0, 0.5]))
    >>> draw_ancestors(jax.random.key(0), log_weights, "systematic").tolist()
    [1, 1, 3, 3]
    """
    is_lost = jnp.max(log_weights) == -jnp.inf
    weights = jax.nn.softmax(jnp.where(is_lost, 0.0, log_weights))
    return SCHEMES[scheme](key, weights).astype(jnp.int32)


def _multinomial(key: PRNGKey, weights: Any) -> Any:
    return jax.random.categorical(key, jnp.log(weights), shape=weights.shape)


def _stratified(key: PRNGKey, weights: Any) -> Any:
    return _at(weights, jax.random.uniform(key, weights.shape, weights.dtype))


def _systematic(key: PRNGKey, weights: Any) -> Any:
    return _at(weights, jax.random.uniform(key, (1,), weights.dtype))


def _residual(key: PRNGKey, weights: Any) -> Any:
    count = weights.shape[0]
    expected = count * weights
    # A product that is an integer but for rounding is that integer.
    certain = jnp.floor(expected + count * jnp.finfo(weights.dtype).eps)
    index = jnp.arange(count).astype(weights.dtype)
    copies = jnp.searchsorted(jnp.cumsum(certain), index, side="right")
    drawn = jax.random.categorical(key, jnp.log(jnp.maximum(expected - certain, 0)), shape=weights.shape)
    return jnp.where(index < jnp.sum(certain), copies, drawn)


def _at(weights: Any, offsets: Any) -> Any:
    """The particles at (i + offset_i) / K of the cumulative weights."""
    count = weights.shape[0]
    cumulative = jnp.cumsum(weights)
    positions = (jnp.arange(count).astype(weights.dtype) + offsets) / count * cumulative[-1]
    # A position that is rounded up to the sum belongs to the last particle with a weight.
    last = jnp.searchsorted(cumulative, cumulative[-1], side="left")
    return jnp.minimum(jnp.searchsorted(cumulative, positions, side="right"), last)


SCHEMES: dict[str, Callable[[PRNGKey, Any], Any]] = {
    "multinomial": _multinomial,
    "stratified": _stratified,
    "systematic": _systematic,
    "residual": _residual,
}
"""The schemes by name."""

"""`distribution`: a distribution of a sampler and a log density, without a class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from gjflax.core.typing import PRNGKey
from gjflax.distributions.distribution import Distribution


def distribution(
    sample: Callable[..., Any],
    logpdf: Callable[..., Any],
    *,
    name: str | None = None,
    discrete: bool = False,
    reparameterized: bool = False,
    bijector: Callable[..., Any] | None = None,
) -> Distribution:
    """A distribution of a sampler and a log density.

    Args:
      sample: ``sample(key, *args)`` draws a value with a typed key.
      logpdf: ``logpdf(value, *args)`` is its log density, elementwise or summed, −inf outside the support.
      name: its name in messages; by default that of `logpdf`.
      discrete: whether its values are integers.
      reparameterized: whether `sample` may be differentiated in the arguments for a pathwise gradient. Say so only
        where that derivative is right; nothing can check it.
      bijector: ``bijector(*args)`` gives a bijector from R^n onto the support: one of TFP, or with its methods.

    >>> import gjflax, jax, jax.numpy as jnp
    >>> def sample(key, rate):
    ...     return jax.random.exponential(key, jnp.shape(rate)) / rate
    >>> def logpdf(value, rate):
    ...     return jnp.where(value < 0, -jnp.inf, jnp.log(rate) - rate * value)
    >>> waiting = gjflax.distribution(sample, logpdf, name="waiting", reparameterized=True)
    >>> _, (_, score) = waiting.assess(jax.random.key(0), 1.0, (2.0,))
    >>> round(float(score), 4)
    -1.3069
    """
    return _FunctionDistribution(
        sample,
        logpdf,
        name or getattr(logpdf, "__name__", "distribution"),
        discrete,
        reparameterized,
        bijector,
        parent=None,
    )


class _FunctionDistribution(Distribution):
    """A distribution of two functions. Made by `distribution`."""

    sampler: Callable[..., Any]
    density: Callable[..., Any]
    title: str = "distribution"
    is_discrete: bool = False  # pyright: ignore[reportIncompatibleVariableOverride]
    is_reparameterized: bool = False  # pyright: ignore[reportIncompatibleVariableOverride]
    make_bijector: Callable[..., Any] | None = None

    @property
    def label(self) -> str:
        return self.title

    @nn.nowrap
    def sample(self, key: PRNGKey, *args: Any) -> Any:
        return self.sampler(key, *args)

    @nn.nowrap
    def logpdf(self, value: Any, *args: Any) -> Any:
        return self.density(value, *args)

    @nn.nowrap
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.density)

    @nn.nowrap
    def bijector(self, *args: Any) -> Any:
        return None if self.make_bijector is None else self.make_bijector(*args)

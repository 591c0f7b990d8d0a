r"""`Shaped`: a distribution whose value has a given shape and dtype, as the prior of an array that is there already.

With a distribution whose own value v has the density p(v; x), and an array of a longer shape (n_1, …, n_k, \*v.shape), the
value is a stack of independent copies:

    log p(array; x) = Σ_i log p(array[i]; x),   i over n_1 × … × n_k.

So ``Normal`` with scalar arguments is a prior of independent elements, and a multivariate normal one of independent rows.
Where the shapes do not fit so, arguments are broadcast to the array's shape, as NumPy would.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gjflax.core.errors import ChoiceShapeError
from gjflax.core.typing import Arguments, PRNGKey, Score
from gjflax.distributions.applied import Applied
from gjflax.distributions.arguments import site, wider
from gjflax.distributions.distribution import Distribution


class _Copies(Applied):
    """A distribution at its arguments, in copies along leading axes, in another dtype."""

    def __init__(self, one: Applied, copies: tuple[int, ...], dtype: Any):
        self._one, self._copies = one, copies
        self._own = one.template
        self.is_discrete = one.is_discrete
        # The values of a discrete distribution stay what they are.
        self._dtype = dtype if jnp.issubdtype(self._own.dtype, jnp.floating) else self._own.dtype

    @property
    def reparameterized(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._one.reparameterized

    @property
    def template(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*self._copies, *self._own.shape), self._dtype)

    def sample(self, key: PRNGKey) -> Any:
        if not self._copies:
            return lax.convert_element_type(self._one.sample(key), self._dtype)
        keys = jax.random.split(key, math.prod(self._copies))
        values = jax.vmap(self._one.sample)(keys).reshape(self.template.shape)
        return lax.convert_element_type(values, self._dtype)

    def logpdf(self, value: Any) -> Any:
        if jnp.issubdtype(value.dtype, jnp.floating):
            # In half precision the distribution's own arithmetic would be half precision too.
            value = lax.convert_element_type(value, wider(value.dtype, np.dtype(np.float32)))
        if not self._copies:
            return self._one.logpdf(value)
        flat = value.reshape((math.prod(self._copies), *value.shape[len(self._copies) :]))
        return jnp.sum(jax.vmap(lambda one: jnp.sum(self._one.logpdf(one)))(flat))

    def bijector(self) -> Any:
        bijector = self._one.bijector()
        return bijector if bijector is None or not self._copies else _CopiedBijector(bijector, self._copies)


class _CopiedBijector:
    """A bijector of one copy, at each of them."""

    def __init__(self, one: Any, copies: tuple[int, ...]):
        self._one, self._copies = one, copies
        self.forward_min_event_ndims = len(copies) + one.forward_min_event_ndims

    def forward(self, x: Any) -> Any:
        return self._each(self._one.forward)(x)

    def inverse(self, y: Any) -> Any:
        return self._each(self._one.inverse)(y)

    def forward_log_det_jacobian(self, x: Any, event_ndims: int) -> Any:
        below = event_ndims - len(self._copies)
        each = self._each(lambda one: self._one.forward_log_det_jacobian(one, event_ndims=below))
        return jnp.sum(jnp.broadcast_to(each(x), self._copies))

    def inverse_event_shape(self, shape: Any) -> tuple[int, ...]:
        shape = tuple(shape)
        return (*self._copies, *self._one.inverse_event_shape(shape[len(self._copies) :]))

    def _each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        for _ in self._copies:
            function = jax.vmap(function)
        return function


class Shaped(Distribution):
    """A distribution whose value has a given shape and dtype. See the text of this file.

    Attributes:
      inner: the distribution.
      shape: the shape of the value.
      dtype: its dtype, where the distribution is one of floats.
    """

    inner: Any
    shape: tuple[int, ...]
    dtype: Any

    @property
    def label(self) -> str:
        return self.inner.label

    @nn.nowrap
    def at(self, args: Arguments) -> Applied:
        one = self.inner.at(args)
        own = one.template.shape
        lead = len(self.shape) - len(own)
        if lead >= 0 and self.shape[lead:] == own:
            return _Copies(one, self.shape[:lead], self.dtype)
        one = self._broadcast(args)
        if one is None:
            raise ChoiceShapeError(
                f"The prior of {site(self.label)} draws the shape {own} at its arguments, and the value has the shape "
                f"{self.shape}: neither is it made of copies of the one, nor do the arguments broadcast to it."
            )
        return _Copies(one, (), self.dtype)

    @nn.nowrap
    def _broadcast(self, args: Arguments) -> Applied | None:
        """The distribution with its array arguments broadcast to the shape; None where they are not its shape then."""
        arrays = [position for position, arg in enumerate(args) if isinstance(arg, (jax.Array, np.ndarray))]
        try:
            spread = {position: jnp.broadcast_to(args[position], self.shape) for position in arrays}
            one = self.inner.at(tuple(spread.get(position, arg) for position, arg in enumerate(args)))
            return one if one.template.shape == self.shape else None
        except (ValueError, TypeError):
            return None

    @nn.nowrap
    def stored(self, args: Arguments) -> Any:
        return self.inner.stored(args)

    @nn.nowrap
    def _score_given(self, value: Any, here: Applied, like: Any = None) -> tuple[Any, Score]:
        # A given value takes the dtype of the array, even where it is more precise.
        return super()._score_given(value, here, like=here.template if like is None else like)


@functools.lru_cache(maxsize=1024)
def shaped(distribution: Distribution, shape: tuple[int, ...], dtype: Any) -> Shaped:
    """The distribution with values of a shape and dtype; made once for each."""
    return Shaped(distribution, shape, np.dtype(dtype), parent=None)

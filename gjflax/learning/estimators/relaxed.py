r"""`StraightThrough` and `GumbelSoftmax`: draws of a discrete distribution as floats that can be differentiated.

Both are biased, so neither is ever chosen for you. The density of such a choice is the linear extension of the log
density to floats v in [0, 1],

    Bernoulli:            log q(v) = v log p + (1 − v) log(1 − p)
    OneHotCategorical:    log q(v) = Σ_k v_k log π_k,

which at hard values is the log density. The model's choice at the same address must take floats too: give it the same
estimator. With an integer choice there the gradient would vanish, and objectives refuse.

After Y. Bengio, N. Léonard and A. Courville, "Estimating or propagating gradients through stochastic neurons", 2013; E. Jang,
S. Gu and B. Poole, "Categorical reparameterization with Gumbel-softmax", ICLR 2017; C. Maddison, A. Mnih and Y. W. Teh, "The
concrete distribution", ICLR 2017.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gjflax.core.errors import ArgumentError
from gjflax.core.typing import Arguments, PRNGKey
from gjflax.distributions.applied import Applied
from gjflax.distributions.arguments import aligned, float_dtype, is_number
from gjflax.distributions.tfp import TFPDistribution
from gjflax.learning.estimators.estimator import GradientEstimator, named_arguments

RELAXED = "relaxed"


class _Relaxed(Applied):
    """A Bernoulli or one-hot choice with float values, at its arguments."""

    reparameterized = True

    def __init__(self, estimator: Any, args: Arguments):
        self._estimator = estimator
        self._hard = estimator.inner.at(args)
        named = named_arguments(estimator.inner, args)
        self._is_one_hot = estimator.inner.label == "OneHotCategorical"
        (name, parameter), *_ = named.items()
        self._dtype = float_dtype(parameter)
        if is_number(parameter):
            parameter = jnp.asarray(parameter, self._dtype)
        parameter = lax.convert_element_type(parameter, self._dtype)
        if self._is_one_hot:
            logits = jnp.log(parameter) if name == "probs" else parameter
            self._log_probs = jax.nn.log_softmax(logits, axis=-1)
        elif name == "probs":
            self._log_probs, self._log_others = jnp.log(parameter), jnp.log1p(-parameter)
        else:
            self._log_probs, self._log_others = jax.nn.log_sigmoid(parameter), jax.nn.log_sigmoid(-parameter)

    @property
    def template(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self._hard.template.shape, self._dtype)

    def logpdf(self, value: Any) -> Any:
        value = lax.convert_element_type(value, self._dtype)
        inside = (value >= 0) & (value <= 1)
        # A value of 0 does not count, also where its log density is −inf.
        terms = _times(value, aligned(self._log_probs, value, self._dtype))
        if not self._is_one_hot:
            terms = terms + _times(1 - value, aligned(self._log_others, value, self._dtype))
        return jnp.where(inside, terms, -jnp.inf)

    def sample(self, key: PRNGKey) -> Any:
        return self._estimator.draw(key, self)

    def hard(self, key: PRNGKey) -> Any:
        """A draw of the distribution itself, as floats."""
        return lax.stop_gradient(lax.convert_element_type(self._hard.sample(key), self._dtype))

    def mean(self) -> Any:
        """The probabilities."""
        return jnp.exp(self._log_probs)

    def soft(self, key: PRNGKey, temperature: float) -> Any:
        """A draw with Gumbel noise, on the simplex or between 0 and 1."""
        shape = self.template.shape
        if self._is_one_hot:
            noise = jax.random.gumbel(key, shape, self._dtype)
            return jax.nn.softmax((aligned(self._log_probs, noise, self._dtype) + noise) / temperature, axis=-1)
        noise = jax.random.logistic(key, shape, self._dtype)
        return jax.nn.sigmoid((aligned(self._log_probs - self._log_others, noise, self._dtype) + noise) / temperature)


def _times(value: Any, log_probability: Any) -> Any:
    return jnp.where(
        value == 0, value * jnp.maximum(log_probability, jnp.finfo(value.dtype).min), value * log_probability
    )


class RelaxedEstimator(GradientEstimator):
    """Base class of estimators with float draws: they take a `Bernoulli` or a `OneHotCategorical`."""

    kind: ClassVar[str] = RELAXED

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not isinstance(self.inner, TFPDistribution) or self.inner.label not in ("Bernoulli", "OneHotCategorical"):
            raise ArgumentError(
                f"`{name}` takes Bernoulli or OneHotCategorical, whose values extend to floats; got {self.inner.label}."
            )

    @nn.nowrap
    def at(self, args: Arguments) -> Applied:
        return _Relaxed(self, args)

    @nn.nowrap
    def draw(self, key: PRNGKey, here: _Relaxed) -> Any:
        """A draw, differentiable."""
        raise NotImplementedError


class StraightThrough(RelaxedEstimator):
    """A hard draw, exactly, with the derivative of its mean. Biased. See the text of this file.

    >>> import gjflax, jax, jax.numpy as jnp
    >>> draw = lambda p: gjflax.StraightThrough(gjflax.Bernoulli.by_keyword("probs")).simulate(
    ...     jax.random.key(0), (p,))[1].get_retval()
    >>> float(draw(0.3)) in (0.0, 1.0), round(float(jax.grad(draw)(0.3)), 4)
    (True, 1.0)
    """

    @nn.nowrap
    def draw(self, key: PRNGKey, here: _Relaxed) -> Any:
        hard, mean = here.hard(key), here.mean()
        # The difference is exactly 0, so the value is exactly the hard one.
        return hard + aligned(mean - lax.stop_gradient(mean), hard, hard.dtype)


class GumbelSoftmax(RelaxedEstimator):
    """A soft draw: softmax((log π + Gumbel noise) / temperature). Biased. See the text of this file.

    Attributes:
      inner: a `Bernoulli` or a `OneHotCategorical`.
      temperature: how soft. Towards 0 the draws become hard, the bias vanishes and the variance grows.
      hard: whether the draw is rounded to a hard one, exactly, and keeps the derivative of the soft one.

    >>> import gjflax, jax, jax.numpy as jnp
    >>> soft = gjflax.GumbelSoftmax(gjflax.OneHotCategorical, temperature=0.5)
    >>> _, tr = soft.simulate(jax.random.key(0), (jnp.zeros(3),))
    >>> round(float(tr.get_retval().sum()), 4)
    1.0
    """

    temperature: float = 1.0
    hard: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.temperature) or isinstance(self.temperature, bool) or self.temperature <= 0:
            raise ArgumentError(f"`temperature` of GumbelSoftmax is a positive number; got {self.temperature!r:.80}.")

    @nn.nowrap
    def draw(self, key: PRNGKey, here: _Relaxed) -> Any:
        soft = here.soft(key, self.temperature)
        if not self.hard:
            return soft
        if soft.ndim and self.inner.label == "OneHotCategorical":
            hard = jax.nn.one_hot(jnp.argmax(soft, axis=-1), soft.shape[-1], dtype=soft.dtype)
        else:
            hard = (soft > 0.5).astype(soft.dtype)
        return hard + (soft - lax.stop_gradient(soft))

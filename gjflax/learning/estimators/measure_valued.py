r"""`MeasureValued`: the gradient of an expectation as a difference of two expectations,

    ∂ E_q[f(z)] / ∂θ = c (E[f(z⁺)] − E[f(z⁻)]),

for each parameter θ of the distribution. It asks nothing of f, and its variance does not grow with f's values.

=============  ===============  ==================  ============================================================
distribution   parameter        c                   z⁺, z⁻
=============  ===============  ==================  ============================================================
Bernoulli      probability p    1                   1, 0
Poisson        rate λ           1                   z + 1, z
Normal         mean μ           1 / (σ √(2π))       μ + σ W, μ − σ W,  W ~ Weibull(scale √2, shape 2)
Normal         scale σ          1 / σ               μ + σ M, μ + σ M U,  M ~ Maxwell with a sign,  U ~ Uniform(0, 1)
=============  ===============  ==================  ============================================================

M U is standard normal, so both draws of the scale share their randomness. After S. Mohamed, M. Rosca, M. Figurnov and
A. Mnih, "Monte Carlo gradient estimation in machine learning", JMLR 21, 2020, section 6.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gjflax.core.errors import ArgumentError
from gjflax.core.typing import PRNGKey
from gjflax.distributions.arguments import free_promotion
from gjflax.distributions.tfp import TFPDistribution
from gjflax.learning.estimators.estimator import GradientEstimator, named_arguments

MEASURE_VALUED = "measure-valued"


class MeasureValued(GradientEstimator):
    """A difference of two draws for each parameter. See the text of this file.

    The objective runs guide and model twice for each parameter: four times for a `Normal`. The elements of a vector are
    changed one after the other, those of a `Map` side by side where what depends on an element stays in it.

    Attributes:
      inner: a `Bernoulli`, `Poisson` or `Normal`.

    Raises:
      ArgumentError: if it is another distribution.

    >>> import gjflax, jax
    >>> _, tr = gjflax.MeasureValued(gjflax.Poisson).simulate(jax.random.key(0), (3.0,))
    >>> tr.get_gen_fn().label
    'MeasureValued(Poisson)'
    """

    kind: ClassVar[str] = MEASURE_VALUED

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.inner, TFPDistribution) or self.inner.label not in _PAIRS:
            raise ArgumentError(
                f"`MeasureValued` knows {', '.join(_PAIRS)}; got {self.inner.label}. Use REINFORCE, which serves every "
                "distribution."
            )


class Pair(NamedTuple):
    """The two draws for one parameter, of the shape of the value, and the parameter itself.

    Attributes:
      parameter: θ, differentiable.
      constant: c.
      plus: z⁺.
      minus: z⁻.
    """

    parameter: Any
    constant: Any
    plus: Any
    minus: Any


def pairs_of(leaf: Any, key: PRNGKey) -> list[Pair]:
    """The pairs of draws for each parameter of a choice. The value that it has is one of the draws where it can be."""
    estimator = leaf.get_gen_fn()
    value, axes = leaf.get_retval(), jnp.ndim(leaf.get_score())

    def beside(argument: Any) -> Any:
        """An argument with the axes of the value: the plates lead, and what is left broadcasts."""
        argument = jnp.asarray(argument)
        missing = value.ndim - argument.ndim
        shape = (*argument.shape[:axes], *(1,) * missing, *argument.shape[axes:])
        return jnp.broadcast_to(argument.reshape(shape), value.shape)

    named = named_arguments(estimator.inner, leaf.get_args())
    with free_promotion():
        parameters = {name: beside(argument) for name, argument in named.items()}
        return [Pair(*pair) for pair in _PAIRS[estimator.inner.label](parameters, value, key)]


def _bernoulli(parameters: dict[str, Any], value: Any, key: PRNGKey) -> list[Any]:
    probs = parameters["probs"] if "probs" in parameters else jax.nn.sigmoid(parameters["logits"])
    return [(probs, jnp.ones_like(probs), jnp.ones_like(value), jnp.zeros_like(value))]


def _poisson(parameters: dict[str, Any], value: Any, key: PRNGKey) -> list[Any]:
    rate = parameters["rate"] if "rate" in parameters else jnp.exp(parameters["log_rate"])
    return [(rate, jnp.ones_like(rate), value + 1, value)]


def _normal(parameters: dict[str, Any], value: Any, key: PRNGKey) -> list[Any]:
    loc, scale = parameters["loc"], parameters["scale"]
    shape, dtype = value.shape, value.dtype
    for_loc, for_maxwell, for_uniform = jax.random.split(key, 3)
    weibull = jnp.sqrt(2 * jax.random.exponential(for_loc, shape, dtype))
    # The length of a normal vector of three numbers, with the sign of one of them.
    normals = jax.random.normal(for_maxwell, (*shape, 3), dtype)
    maxwell = jnp.sign(normals[..., 0]) * jnp.linalg.norm(normals, axis=-1)
    uniform = jax.random.uniform(for_uniform, shape, dtype)
    mean, deviation = lax.stop_gradient(loc), lax.stop_gradient(scale)
    of_loc = (loc, 1 / (deviation * math.sqrt(2 * math.pi)), mean + deviation * weibull, mean - deviation * weibull)
    of_scale = (scale, 1 / deviation, mean + deviation * maxwell, mean + deviation * maxwell * uniform)
    return [of_loc, of_scale]


_PAIRS = {"Bernoulli": _bernoulli, "Poisson": _poisson, "Normal": _normal}

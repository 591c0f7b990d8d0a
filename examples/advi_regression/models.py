r"""The models, each written once; guides and objectives are made of them.

**Eight schools**, centred and not:

    μ ~ Normal(0, 5),   τ ~ HalfCauchy(0, 5),   y_j ~ Normal(θ_j, σ_j),
    θ_j ~ Normal(μ, τ)        or        z_j ~ Normal(0, 1),  θ_j = μ + τ z_j.

The two have the same posterior of (μ, τ, θ), in different coordinates: θ given a small τ is narrow, a funnel, and z is not.

**Linear regression** with a known noise: w ~ Normal(0, I), y_i ~ Normal(x_i · w, σ). The rows come in a `Map` with a total,
so a batch of them stands for all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import input_pipeline
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import gjflax
from gjflax import HalfCauchy, Map, Normal, trace


@gjflax.gen
def centred(standard_errors: Float[Array, " schools"]) -> Float[Array, " schools"]:
    """The schools' effects θ, as choices."""
    mu = trace("mu", Normal)(0.0, 5.0)
    tau = trace("tau", HalfCauchy)(0.0, 5.0)
    theta = trace("theta", Normal)(mu * jnp.ones_like(standard_errors), tau)
    trace("y", Normal)(theta, standard_errors)
    return theta


@gjflax.gen
def non_centred(standard_errors: Float[Array, " schools"]) -> Float[Array, " schools"]:
    """The schools' effects θ, made of standard normal choices."""
    mu = trace("mu", Normal)(0.0, 5.0)
    tau = trace("tau", HalfCauchy)(0.0, 5.0)
    theta = mu + tau * trace("z", Normal)(jnp.zeros_like(standard_errors), 1.0)
    trace("y", Normal)(theta, standard_errors)
    return theta


class LinearRegression(gjflax.GenModule):
    """The weights' choices and the response's; returns the weights, the intercept's first.

    Attributes:
      noise: the standard deviation of the response about its mean.
      total: how many rows there are, of which the design matrix may be a batch.
    """

    noise: float
    total: int

    @nn.compact
    def __call__(self, design: Float[Array, "batch weights"]) -> Float[Array, " weights"]:
        weights = trace("weights", Normal)(jnp.zeros(design.shape[1]), 1.0)
        trace("y", Map(Normal, in_axes=(0, None), total=self.total))(design @ weights, self.noise)
        return weights


class Problem(NamedTuple):
    """A model with its data.

    Attributes:
      model: the joint density. Its return value is what is reported on.
      data: a pytree of arrays.
      inputs: from the data, or a batch of them, to the observed choices and the model's arguments.
    """

    model: gjflax.GenerativeFunction
    data: Any
    inputs: Callable[[Any], tuple[Any, tuple[Any, ...]]]


def schools(model: gjflax.GenerativeFunction, data: input_pipeline.Schools) -> Problem:
    """The eight schools in one of the two forms."""
    return Problem(model, data, lambda batch: ({"y": batch.effects}, (batch.standard_errors,)))


def regression(data: input_pipeline.Regression, noise: float) -> Problem:
    """The regression, with a column of ones for the intercept."""
    total = len(data.response)
    design = np.concatenate([np.ones((total, 1), np.float32), data.inputs], axis=1)
    return Problem(
        LinearRegression(noise, total), (design, data.response), lambda batch: ({"y": batch[1]}, (batch[0],))
    )

r"""A Flax network whose parameters are learned, fitted by their posterior's mode, or random: by one selection.

    θ_s ~ Normal(0, scale_s)        for each parameter s that the selection picks,
    y_i ~ Normal(f(x_i; θ), σ),

with the parameters that are not selected as ordinary parameters, and the noise σ given or a parameter too.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

import gjflax
from gjflax import Normal, RandomParams, select, trace

KERNEL_SCALE = 2.0
"""Of the prior of a kernel, times the square root of the number of its inputs."""


class MLP(nn.Module):
    """A plain Flax network with one hidden layer; nothing in it knows of gjflax."""

    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch inputs"]) -> Float[Array, " batch"]:
        return nn.Dense(1, name="last")(nn.tanh(nn.Dense(self.hidden, name="first")(x)))[:, 0]


def prior(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[gjflax.Distribution, tuple[float, float]]:
    """The prior of a parameter: of a kernel, such that the layer's outputs are of one size whatever its width."""
    return Normal, (0.0, prior_scale(path, shape))


def prior_scale(path: tuple[str, ...], shape: tuple[int, ...]) -> float:
    """The standard deviation of the prior of a parameter."""
    return KERNEL_SCALE / shape[0] ** 0.5 if path[-1] == "kernel" else 1.0


class Regression(gjflax.GenModule):
    """The network's random parameters below ``"net"``, and the response ``"y"``; returns the response's mean.

    Attributes:
      hidden: the number of hidden units.
      random: which parameters of the network are choices.
      noise: the standard deviation of the response; None for a parameter.
    """

    hidden: int
    random: gjflax.Selection
    noise: float | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch inputs"]) -> Float[Array, " batch"]:
        mean = trace("net", RandomParams(MLP(self.hidden), prior, self.random))(x)
        trace("y", Normal)(mean, self.noise_scale())
        return mean

    def noise_scale(self) -> Float[Array, ""]:
        """The standard deviation of the response."""
        if self.noise is not None:
            return jnp.asarray(self.noise, jnp.float32)
        return jnp.exp(self.param("log_noise", nn.initializers.zeros, ()))


class Treatment(NamedTuple):
    """What is done about the network's parameters.

    Attributes:
      random: which of them are choices.
      guide: what their posterior is fitted with; None where there are no choices.
    """

    random: gjflax.Selection
    guide: type[gjflax.GenerativeFunction] | None


TREATMENTS = {
    "maximum likelihood": Treatment(select(), None),
    "maximum a posteriori": Treatment(gjflax.AllSelection(), gjflax.AutoDelta),
    "variational": Treatment(gjflax.AllSelection(), gjflax.AutoNormal),
    "variational, last layer": Treatment(select("last"), gjflax.AutoMultivariateNormal),
}


def create_objective(
    model: Regression, treatment: Treatment, x: Float[Array, "n inputs"], y: Float[Array, " n"], num_samples: int
) -> gjflax.Objective:
    """The loss of a treatment: of what is not random the likelihood, of a point the joint density, else the ELBO."""
    if treatment.guide is None:
        return gjflax.MaximumLikelihood(model)
    guide = treatment.guide(model, {"y": y}, (x,))
    if treatment.guide is gjflax.AutoDelta:
        return gjflax.MAP(model, guide)
    return gjflax.ELBO(model, guide, num_samples=num_samples, sticking_the_landing=True)

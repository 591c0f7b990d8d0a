"""State-space models as `Unfold`s, with their evidence in closed form in float64: what the tests of `SMCObjective` share."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gjflax import Bernoulli, GenModule, Mask, Normal, Unfold, gen, trace

# A linear Gaussian model: z_t = A z_{t−1} + SHIFT + Q ε, x_t = C z_t + R ε, z_0 = START -----------------------------------

A, SHIFT, Q, C, R, START = 0.9, 0.2, 0.7, 1.3, 0.5, -0.4


@gen
def linear(time, z):
    z = trace("z", Normal)(A * z + SHIFT, Q)
    trace("x", Normal)(C * z, R)
    return z


@gen
def linear_with_gaps(time, z, seen):
    """The model, of which only some x are seen."""
    z = trace("z", Normal)(A * z + SHIFT, Q)
    trace("x", Mask(Normal))(seen[time], C * z, R)
    return z


@gen
def drifting(time, z, xs):
    """A guide that is not the posterior: it weighs the prior's mean and the observation, with too wide a scale."""
    return trace("z", Normal)(0.5 * (A * z + SHIFT) + 0.4 * xs[time], 0.8)


@gen
def locally_optimal(time, z, xs):
    """p(z_t | z_{t−1}, x_t)."""
    precision = 1 / Q**2 + C**2 / R**2
    mean = ((A * z + SHIFT) / Q**2 + C * xs[time] / R**2) / precision
    return trace("z", Normal)(mean, precision**-0.5)


def simulated(length: int, seed: int = 0) -> jax.Array:
    """Observations of the linear model."""
    rng = np.random.default_rng(seed)
    z, xs = START, []
    for _ in range(length):
        z = A * z + SHIFT + Q * rng.normal()
        xs.append(C * z + R * rng.normal())
    return jnp.asarray(np.asarray(xs, np.float32))


def kalman_log_evidence(xs: Any, seen: Any = None) -> float:
    """log p(x) of the linear model, by the Kalman filter; of the x that are seen."""
    mean, variance, result = START, 0.0, 0.0
    for x, is_seen in zip(np.asarray(xs, np.float64), np.ones(len(xs), bool) if seen is None else seen, strict=True):
        mean, variance = A * mean + SHIFT, A**2 * variance + Q**2
        if not is_seen:
            continue
        spread, error = C**2 * variance + R**2, x - C * mean
        result += -0.5 * (np.log(2 * np.pi * spread) + error**2 / spread)
        gain = variance * C / spread
        mean, variance = mean + gain * error, (1 - gain * C) * variance
    return result


# A chain of coins, with learned parameters ---------------------------------------------------------------------------------

COIN_PARAMS = {
    "model": {"stay": 1.4, "bias": -0.3, "loc": 1.1, "log_scale": -0.2},
    "guide": {"pull": 0.8, "bias": 0.2, "stay": 0.5},
}
COIN_XS = jnp.array([0.9, -0.4, 1.7], jnp.float32)


class Coin(GenModule):
    """z_t ~ Bernoulli(logits bias + stay (2 z_{t−1} − 1)), x_t ~ Normal(loc z_t, scale)."""

    @nn.compact
    def __call__(self, time, state):
        stay, bias, loc, log_scale = (self.param(name, nn.initializers.zeros, ()) for name in COIN_PARAMS["model"])
        z = trace("z", Bernoulli)(logits=bias + stay * state)
        z = z.astype(loc.dtype)
        trace("x", Normal)(loc * z, jnp.exp(log_scale))
        return 2 * z - 1


class CoinGuide(GenModule):
    """z_t ~ Bernoulli(logits bias + pull x_t + stay (z_{t−1} − 1/2))."""

    @nn.compact
    def __call__(self, time, state, xs):
        pull, bias, stay = (self.param(name, nn.initializers.zeros, ()) for name in COIN_PARAMS["guide"])
        z = trace("z", Bernoulli)(logits=bias + pull * xs[time] + stay * state)
        return z.astype(stay.dtype) - 0.5


def coins(length: int) -> tuple[Any, Any]:
    """The model and the guide of coins; the states start at 0."""
    return Unfold(Coin(), max_length=length), Unfold(CoinGuide(), max_length=length)


def coins_log_evidence(params: Any, xs: Any) -> float:
    """log p(x) by the forward algorithm."""
    p = params["model"]
    sigmoid = lambda value: 1 / (1 + np.exp(-value))
    log_alpha = None
    for x in np.asarray(xs, np.float64):
        scale = np.exp(p["log_scale"])
        emission = np.array(
            [-0.5 * ((x - p["loc"] * z) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi) for z in (0, 1)]
        )
        states = [0.0] if log_alpha is None else [-1.0, 1.0]
        heads = np.array([sigmoid(p["bias"] + p["stay"] * state) for state in states])
        transition = np.log(np.stack([1 - heads, heads], axis=1))
        before = np.zeros(1) if log_alpha is None else log_alpha
        log_alpha = np.logaddexp.reduce(before[:, None] + transition, axis=0) + emission
    return float(np.logaddexp.reduce(log_alpha))

r"""Sequences of a swinging spring with noise, of which the position is seen and the velocity is not.

    z_t = A z_{t−1} + Q ε_t       in R², A a rotation by 1/8 of a turn that shrinks by 5 %
    x_t = C z_t + R ε'_t          in R

The model is linear and Gaussian, so what there is to learn is known exactly: see `reference.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

STEPS = 40
"""The length of a sequence."""

Sequence = Float[Array, "steps 1"]
Sequences = Float[Array, "batch steps 1"]


class Spring(NamedTuple):
    """The parameters of the process; the state before the first step is 0."""

    transition: Float[np.ndarray, "2 2"]
    transition_scale: float
    emission: Float[np.ndarray, "1 2"]
    emission_scale: float


def spring() -> Spring:
    """The process that the data come from."""
    angle = 2 * np.pi / 8
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return Spring(0.95 * rotation, 0.5, np.array([[1.5, 0.0]]), 0.5)


def simulate(key: Key[Array, ""], number: int) -> Sequences:
    """So many sequences of the process."""
    process = spring()
    transition, emission = jnp.asarray(process.transition, jnp.float32), jnp.asarray(process.emission, jnp.float32)

    def step(
        z: Float[Array, "batch 2"], key: Key[Array, ""]
    ) -> tuple[Float[Array, "batch 2"], Float[Array, "batch 1"]]:
        noise = jax.random.normal(key, (number, 3))
        z = z @ transition.T + process.transition_scale * noise[:, :2]
        return z, z @ emission.T + process.emission_scale * noise[:, 2:]

    _, xs = jax.lax.scan(step, jnp.zeros((number, 2)), jax.random.split(key, STEPS))
    return jnp.swapaxes(xs, 0, 1)


def load_datasets(key: Key[Array, ""], number: int, held_out: int) -> tuple[Sequences, Sequences]:
    """Sequences to train on, and others."""
    xs = simulate(key, number + held_out)
    return xs[:number], xs[number:]

"""Draws the pictures of `docs/models.md`: run it from anywhere after a change of how models are drawn."""

from __future__ import annotations

import pathlib

import flax.linen as nn
import jax.numpy as jnp

import gjflax
from gjflax import Categorical, Dirichlet, Map, Normal, Unfold, gen, trace

HERE = pathlib.Path(__file__).parent


class Decoder(gjflax.GenModule):
    @nn.compact
    def __call__(self):
        z = trace("z", Normal)(jnp.zeros(20), 1.0)
        h = nn.relu(nn.Dense(64)(z))
        log_scale = self.param("log_scale", nn.initializers.zeros, ())
        return trace("x", Normal)(nn.Dense(784)(h), jnp.exp(log_scale))


@gen
def step(time, state, transition, means):
    state = trace("state", Categorical)(jnp.log(transition[state]))
    trace("y", Normal)(means[state], 1.0)
    return state


@gen
def hidden_markov_model():
    transition = trace("transition", Map(Dirichlet, repeats=3))(jnp.ones(3))
    means = trace("means", Normal)(jnp.zeros(3), 5.0)
    return trace("chain", Unfold(step, 50))(50, jnp.int32(0), transition, means)


if __name__ == "__main__":
    decoder = gjflax.render_model(Map(Decoder(), repeats=128), observed="x")
    decoder.save(HERE / "decoder.png", resolution=110)
    hidden = gjflax.render_model(hidden_markov_model, observed=("chain", "y"))
    hidden.save(HERE / "hidden_markov_model.png", resolution=110)

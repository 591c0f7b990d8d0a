"""A network with random weights, and its density by hand: what the tests of `RandomParams` share."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from gjflax import (
    Exponential,
    Laplace,
    Normal,
    RandomParams,
    gen,
    select,
    trace,
)

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 8)


def f64(value: Any) -> Any:
    return np.asarray(value, np.float64)


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=rtol, atol=atol)


def shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


def types(tree: Any) -> Any:
    leaves = [(leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), leaves


def minimise(loss: Any, start: Any, steps: int = 3000) -> Any:
    """The minimum by Adam, with a step that falls to 0."""
    optimiser = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    @jax.numpy_dtype_promotion("standard")
    def step(state: Any, _: Any) -> Any:
        point, moments = state
        updates, moments = optimiser.update(jax.grad(loss)(point), moments)
        return (optax.apply_updates(point, updates), moments), None

    (point, _), _ = jax.jit(lambda at: jax.lax.scan(step, (at, optimiser.init(at)), None, steps))(start)
    return point


class MLP(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Dense(3, param_dtype=self.dtype)(x))
        return nn.Dense(2, param_dtype=self.dtype, name="out")(h)


MLP_PRIOR = {
    "Dense_0": (Normal, lambda scale: (0.1, scale)),
    ("out", "kernel"): (Laplace, (0.0, 0.7)),
    "out": {"bias": lambda path, shape: (Normal, lambda scale: (float(len(path)), scale * shape[0]))},
}


@gen
def deep(x):
    scale = trace("scale", Exponential)(1.5)
    net = RandomParams(MLP(x.dtype), MLP_PRIOR, ~select(("Dense_0", "bias")), num_hyperparameters=1)
    return trace("y", Normal)(trace("net", net)(scale, x), 0.4)


X = jnp.array([[0.5, -1.0, 2.0], [1.5, 0.2, -0.3]])


def deep_log_density(choices: Any, params: Any, x: Any = X) -> float:
    c = {address: f64(choices[address]) for address in choices.addresses()}
    scale, first = c["scale",], c["net", "Dense_0", "kernel"]
    kernel, bias = c["net", "out", "kernel"], c["net", "out", "bias"]
    h = np.tanh(f64(x) @ first + f64(params["MLP_0"]["Dense_0"]["bias"]))
    return (
        stats.expon.logpdf(scale, scale=1 / 1.5)
        + stats.norm.logpdf(first, 0.1, scale).sum()
        + stats.laplace.logpdf(kernel, 0.0, 0.7).sum()
        + stats.norm.logpdf(bias, 2.0, 2 * scale).sum()
        + stats.norm.logpdf(c["y",], h @ kernel + bias, 0.4).sum()
    )

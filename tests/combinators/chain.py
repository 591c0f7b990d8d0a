"""A chain of vectors and coins, and its density by hand in float64: what the tests of `Unfold` share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from gjflax import Bernoulli, Masked, Normal, Unfold, choice_map, gen, trace

KEY, DRAW, OTHER = jax.random.split(jax.random.key(0), 3)
N = 4


@gen
def kernel(time, state, gain, noise):
    """A chain with a vector of observations at each step, and a discrete choice that the next step feels."""
    x = trace("x", Normal)(gain * state["x"] + 0.1 * time.astype(jnp.float32), noise)
    coin = trace("coin", Bernoulli)(logits=x)
    trace("y", Normal)(jnp.stack([x, -2.0 * x]), 0.5)
    return {"x": x + 0.5 * coin.astype(jnp.float32), "steps": state["steps"] + 1}


chain = Unfold(kernel, N)
STATE = {"x": 0.7, "steps": 0}
ARGS = (STATE, jnp.float32(0.9), jnp.float32(0.5))
OTHER_ARGS = ({"x": -1.0, "steps": 3}, jnp.float32(-0.4), jnp.float32(1.5))
NAMES = ("x", "coin", "y")


def norm(value: Any, mean: Any, scale: Any) -> np.ndarray:
    return stats.norm.logpdf(np.float64(value), np.float64(mean), np.float64(scale))


def plain(value: Any) -> Any:
    """The values of a choice, those that are absent too."""
    return np.asarray(value.value if isinstance(value, Masked) else value)


def terms(choices: Any, args: Any = ARGS, length: int = N) -> dict[str, np.ndarray]:
    """The log densities of the choices of every step, by hand in float64."""
    state, gain, noise = jax.tree.map(np.float64, args)
    x, coin, y = (np.float64(plain(choices[name])) for name in NAMES)
    result: dict[str, list[Any]] = {name: [] for name in NAMES}
    before = state["x"]
    for time in range(length):
        result["x"].append(norm(x[time], gain * before + 0.1 * time, noise))
        result["coin"].append(-np.logaddexp(0.0, -x[time] if coin[time] else x[time]))
        result["y"].append(norm(y[time], [x[time], -2.0 * x[time]], 0.5).sum())
        before = x[time] + 0.5 * coin[time]
    return {name: np.array(values) for name, values in result.items()}


def total(choices: Any, args: Any = ARGS, length: int = N, of: Any = NAMES) -> float:
    return float(sum(values.sum() for name, values in terms(choices, args, length).items() if name in of))


def states(choices: Any, args: Any = ARGS, length: int = N) -> Any:
    """The return value by hand: beyond the length the last state."""
    values = [args[0]]
    for time in range(N):
        if time < length:
            x = plain(choices["x"])[time] + 0.5 * plain(choices["coin"])[time]
            values.append({"x": x, "steps": values[-1]["steps"] + 1})
        else:
            values.append(values[-1])
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *values[1:])


def close(got: Any, want: Any, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


def types(tree: Any) -> Any:
    leaves = [(leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), leaves


def subsets(names: Any = NAMES) -> list[tuple[str, ...]]:
    return [part for size in range(len(names) + 1) for part in itertools.combinations(names, size)]


def only(choices: Any, names: Any) -> Any:
    return choice_map({name: choices[name] for name in names})


def twice(function: Callable[[Any], Any], indices: list[int]) -> list[Any]:
    """The results with indices that are known while tracing, and with traced ones."""
    return [jax.jit(lambda: function(indices))(), jax.jit(function)(jnp.array(indices))]


def central(function: Any, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """The gradient of a function of a float64 array by central differences."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        shift = np.zeros(x.shape)
        shift[index] = step
        gradient[index] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient

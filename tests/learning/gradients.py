"""Gradients of bounds, exactly and by estimate, and whether the two agree.

The exact bound E_q[log p(x, z) − log q(z)] is a sum over all values of the guide's choices, or a quadrature, in float64.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gjflax import ELBO, choice_map

DRAWS = 10_000


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model and a guide at parameters of both, and the values that the guide's choices have.

    Attributes:
      model: the model.
      guide: the guide, of the estimators under test.
      params: the parameters, as the objective has them.
      values: every value of the guide's choices, a choice map as nested dict, with a first axis.
      weights: of each value in the sum over all, by default 1.
      observed: what is observed.
      model_args: the arguments of the model.
      guide_args: the arguments of the guide.
    """

    model: Any
    guide: Any
    params: Any
    values: Any
    observed: Any
    weights: Any = None
    model_args: tuple[Any, ...] = ()
    guide_args: tuple[Any, ...] = ()


def product_of(choices: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    """All combinations of the values of some choices."""
    rows = list(itertools.product(*choices.values()))
    return {name: np.stack([np.asarray(row[i]) for row in rows]) for i, name in enumerate(choices)}


def vectors_of(values: Sequence[Any], length: int) -> list[np.ndarray]:
    """All vectors of some values."""
    return [np.asarray(row) for row in itertools.product(values, repeat=length)]


def grid(low: float, high: float, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre points and weights on an interval."""
    points, weights = np.polynomial.legendre.leggauss(number)
    return (points + 1) / 2 * (high - low) + low, weights * (high - low) / 2


def exact(problem: Problem) -> tuple[Any, Any]:
    """The loss and its gradient, in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(_wide, dataclasses.astuple(_Data.of(problem)))
        params, values, weights, observed, model_args, guide_args = wide
        key = jax.random.key(0)

        def log_density(module: Any, params: Any, choices: Any, args: Any) -> Any:
            return module.apply({"params": params}, key, choices, args, method="assess")[1][1]

        def loss(params: Any) -> Any:
            def term(choices: Any, weight: Any) -> Any:
                log_q = log_density(problem.guide, params.get("guide", {}), choices, guide_args)
                log_p = log_density(
                    problem.model, params.get("model", {}), choice_map(choices).merge(observed), model_args
                )
                # A value that the guide never draws counts for nothing.
                never = log_q == -jnp.inf
                log_q, log_p = jnp.where(never, 0.0, log_q), jnp.where(never, 0.0, log_p)
                return jnp.where(never, 0.0, weight * jnp.exp(log_q) * (log_p - log_q))

            return -jnp.sum(jax.vmap(term)(values, weights))

        result = jax.jit(jax.value_and_grad(loss))(params)
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(result))
        return jax.tree.map(np.asarray, result)


@dataclasses.dataclass(frozen=True)
class _Data:
    params: Any
    values: Any
    weights: Any
    observed: Any
    model_args: Any
    guide_args: Any

    @classmethod
    def of(cls, problem: Problem) -> _Data:
        number = len(jax.tree.leaves(problem.values)[0])
        weights = np.ones(number) if problem.weights is None else problem.weights
        return cls(problem.params, problem.values, weights, problem.observed, problem.model_args, problem.guide_args)


def _wide(leaf: Any) -> Any:
    array = np.asarray(leaf)
    return jnp.asarray(array, jnp.float64) if array.dtype.kind == "f" else leaf


def estimates(problem: Problem, draws: int = DRAWS, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """Draws of the loss and of its gradient, by the ELBO with these options."""
    objective = ELBO(problem.model, problem.guide, **options)

    def loss(params: Any, key: Any) -> Any:
        args = (problem.observed, problem.model_args, problem.guide_args)
        return objective.apply({"params": params}, *args, rngs={"choice": key})

    keys = jax.random.split(jax.random.key(seed), draws)
    return jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))(problem.params, keys)


def narrow(values: Any) -> Any:
    """The leaves as float64 arrays of NumPy."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), values)


def assert_unbiased(drawn: Any, wanted: Any, rounding: float = 2e-5) -> None:
    """The mean of draws is what is wanted, within 4 standard errors, leaf by leaf."""

    def check(path: Any, samples: Any, value: Any) -> None:
        samples = np.asarray(samples, np.float64)
        error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
        scale = np.maximum(np.abs(value), 1.0)
        gap = np.abs(samples.mean(axis=0) - value)
        assert np.all(gap <= 4 * error + rounding * scale), f"{jax.tree_util.keystr(path)}: {gap} of {error}"

    jax.tree_util.tree_map_with_path(check, drawn, wanted)


def variance(gradients: Any) -> float:
    """The sum of the variances of all entries of a gradient."""
    return float(sum(np.var(np.asarray(leaf, np.float64), axis=0).sum() for leaf in jax.tree.leaves(gradients)))


Estimator = Callable[[Any], Any]

"""Training and evaluation: the same model and guide by either objective."""

import functools
import itertools
import time
from pathlib import Path
from typing import NamedTuple

import figures
import input_pipeline
import jax
import jax.numpy as jnp
import ml_collections
import models
import numpy as np
import optax
import reference
from jaxtyping import Array, Float, Key, PyTree

import gjflax


class Trained(NamedTuple):
    """A training by one objective.

    Attributes:
      params: the parameters.
      steps: the training steps at which there was a report.
      curve: the held-out bound there, in nats per step of a sequence.
      bound: the held-out bound at the end.
      log_evidence: log p of every held-out sequence, by a filter of many particles, in nats per step.
    """

    params: PyTree
    steps: np.ndarray
    curve: np.ndarray
    bound: float
    log_evidence: Float[np.ndarray, " held_out"]


class Result(NamedTuple):
    """All trainings, by the guide's direction and the objective, and in nats per step of every held-out sequence what they are
    measured against.
    """

    trained: dict[tuple[str, str], Trained]
    exact: Float[np.ndarray, " held_out"]
    independent: Float[np.ndarray, " held_out"]


def train(
    config: ml_collections.ConfigDict,
    name: str,
    direction: str,
    train_set: input_pipeline.Sequences,
    held_out: input_pipeline.Sequences,
    key: Key[Array, ""],
) -> Trained:
    """Train by an objective with a guide that reads in a direction, and evaluate on sequences that are held out."""
    fit_key, evidence_key = jax.random.split(key)
    number = config.num_epochs * (len(train_set) // config.batch_size)
    objective = models.create_objective(config, name, direction, config.batch_size)
    result = gjflax.fit(
        objective,
        create_optimizer(config.learning_rate, number, config.clip_norm),
        train_set,
        key=fit_key,
        num_epochs=config.num_epochs,
        batch_size=config.batch_size,
        inputs=models.objective_args,
        held_out=held_out,
        progress=False,
    )
    per_step = config.batch_size * input_pipeline.STEPS
    curve = -result.column("held_out_loss") / per_step
    log_evidence = evaluate(config, direction, result.state.params, held_out, evidence_key)
    return Trained(result.state.params, result.column("step"), curve, float(curve[-1]), log_evidence)


@functools.cache
def create_optimizer(learning_rate: float, steps: int, clip_norm: float) -> optax.GradientTransformation:
    """Adam with clipped gradients, and a learning rate that falls to zero. One object for equal arguments."""
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adam(schedule))


def evaluate(
    config: ml_collections.ConfigDict,
    direction: str,
    params: PyTree,
    xs: input_pipeline.Sequences,
    key: Key[Array, ""],
) -> Float[np.ndarray, " batch"]:
    """log p of every sequence by a filter of many particles, in nats per step: too low on the average, by its noise."""
    weights = log_weights(models.evidence_objective(config, direction, len(xs)), params, xs, key)
    return np.asarray(jax.nn.logsumexp(weights, axis=1) - jnp.log(weights.shape[1])) / input_pipeline.STEPS


@functools.partial(jax.jit, static_argnames="objective")
def log_weights(
    objective: gjflax.SMCObjective, params: PyTree, xs: input_pipeline.Sequences, key: Key[Array, ""]
) -> Float[Array, "batch particles"]:
    """The log weights of every sequence's filter, of which the log mean is its estimate of log p."""
    call = models.objective_args(xs)
    _, sown = objective.apply({"params": params}, *call, rngs={"choice": key}, mutable=["diagnostics"])
    return sown["diagnostics"]["log_weights"]


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> Result:
    """Train by every objective, print a table and draw.

    Args:
      config: the hyperparameters.
      workdir: where the table and the figures are written.

    Returns:
      The trainings, and what they are measured against.
    """
    directory = Path(workdir).expanduser().resolve()
    directory.mkdir(parents=True, exist_ok=True)
    data_key, train_key, draw_key = jax.random.split(jax.random.key(config.seed), 3)
    train_set, held_out = input_pipeline.load_datasets(data_key, config.num_sequences, config.num_held_out)
    trained = {}
    for direction, name in itertools.product(config.guides, config.objectives):
        started = time.perf_counter()
        trained[direction, name] = train(config, name, direction, train_set, held_out, train_key)
        print(f"{direction} guide, {name}: {time.perf_counter() - started:.0f} s, with compilation", flush=True)
    exact = reference.log_evidence(held_out) / input_pipeline.STEPS
    independent = reference.independent_log_likelihood(train_set, held_out) / input_pipeline.STEPS
    result = Result(trained, exact, independent)
    table = as_table(result)
    (directory / "evidence.md").write_text(table)
    print(table)
    for path in figures.draw_all(directory, config, result, held_out, draw_key):
        print(f"Wrote {path}")
    return result


def as_table(result: Result) -> str:
    """The held-out numbers in nats per step; differences with the standard error over sequences."""
    lines = ["| | held-out bound | held-out log p(x) | below the truth |", "|---|---|---|---|"]
    rows = {
        f"{direction} guide, {name}": (f"{one.bound:.4f}", one.log_evidence)
        for (direction, name), one in result.trained.items()
    }
    rows["normal distribution, no time"] = ("", result.independent)
    for name, (bound, values) in rows.items():
        gap = result.exact - values
        lines.append(f"| {name} | {bound} | {np.mean(values):.4f} | {np.mean(gap):.4f} ± {standard_error(gap):.4f} |")
    lines.append(f"| the process itself, Kalman filter | | {np.mean(result.exact):.4f} | 0 |")
    return "\n".join(lines) + "\n"


def standard_error(values: Float[np.ndarray, " n"]) -> float:
    """The standard error of the mean."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))

"""Training and evaluation."""

import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import figures
import input_pipeline
import jax
import ml_collections
import models
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

import gjflax


class Trained(NamedTuple):
    """A trained model.

    Attributes:
      params: those of the objective.
      history: a row for each epoch.
      accuracies: after each epoch, the share of held-out images in which the guide counts right.
    """

    params: PyTree
    history: list[dict[str, Any]]
    accuracies: list[float]


def fit(
    config: ml_collections.ConfigDict, train_set: input_pipeline.Scenes, held_out: input_pipeline.Scenes
) -> Trained:
    """Train, and count the digits of the held-out images after every epoch."""
    attention = models.create_attention(config)
    fit_key, count_key = jax.random.split(jax.random.key(config.seed))
    accuracies = []

    def evaluate(state: gjflax.TrainState, row: dict[str, Any]) -> None:
        counts = count(attention, state.params["guide"], held_out.images, count_key)
        accuracies.append(float(np.mean(counts == held_out.counts)))

    steps = config.num_epochs * (len(train_set.images) // config.batch_size)
    result = gjflax.fit(
        models.create_objective(config),
        optax.adam(optax.cosine_decay_schedule(config.learning_rate, steps)),
        train_set.images,
        key=fit_key,
        batch_size=config.batch_size,
        num_epochs=config.num_epochs,
        inputs=models.objective_args,
        held_out=held_out.images,
        callbacks=[evaluate],
    )
    return Trained(result.state.params, result.history, accuracies)


def count(
    attention: models.Attention, params: PyTree, images: models.Images, key: Key[Array, ""]
) -> Int[np.ndarray, " batch"]:
    """How many objects the guide sees in each image: one draw."""
    return np.asarray(_count(attention, params, images, key))


@functools.partial(jax.jit, static_argnums=0)
def _count(attention: models.Attention, params: PyTree, images: models.Images, key: Key[Array, ""]) -> Array:
    _, drawn = gjflax.Map(attention).bind({"params": params}).simulate(key, (images,))
    return drawn.get_retval()


def count_by_ink(train_set: input_pipeline.Scenes, images: models.Images) -> Int[np.ndarray, " batch"]:
    """The counts by a straight line in the sum of an image's grey levels: it is fitted to true counts."""
    line = np.polyfit(_ink(train_set.images), train_set.counts, 1)
    return np.clip(np.rint(np.polyval(line, _ink(images))), 0, train_set.counts.max()).astype(int)


def _ink(images: Float[np.ndarray, "batch canvas canvas"]) -> Float[np.ndarray, " batch"]:
    return np.sum(images, axis=(1, 2), dtype=np.float64)


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> Trained:
    """Train, report and draw.

    Args:
      config: the hyperparameters.
      workdir: where the figures are written.

    Returns:
      What was trained.
    """
    directory = Path(workdir).expanduser().resolve()
    directory.mkdir(parents=True, exist_ok=True)
    train_set, held_out = input_pipeline.load_datasets(
        config.train_images, config.held_out_images, config.max_digits, jax.random.key(config.seed)
    )
    started = time.perf_counter()
    trained = fit(config, train_set, held_out)
    print(f"Trained for {time.perf_counter() - started:.0f} s, with compilation.")

    key = jax.random.key(config.seed + 1)
    counts = count(models.create_attention(config), trained.params["guide"], held_out.images, key)
    answers = {
        "attend, infer, repeat": counts,
        "a line in the ink, fitted to counts": count_by_ink(train_set, held_out.images),
        "always the most frequent count": np.full_like(counts, np.bincount(train_set.counts).argmax()),
    }
    for name, answer in answers.items():
        share = np.mean(answer == held_out.counts)
        error = np.sqrt(share * (1 - share) / len(answer))
        print(f"Held-out images counted right: {share:.1%} ± {error:.1%}, {name}")
    print(f"Held-out ELBO {-trained.history[-1]['held_out_loss'] / config.batch_size:.1f} nats per image.")
    print("True count (rows), inferred (columns):")
    print(confusion(held_out.counts, counts, config.num_steps))
    for path in figures.draw_all(directory, config, trained, held_out):
        print(f"Wrote {path}")
    return trained


def confusion(true: Int[np.ndarray, " n"], inferred: Int[np.ndarray, " n"], largest: int) -> Int[np.ndarray, "i j"]:
    """How many images of each true count have each inferred one."""
    table = np.zeros((true.max() + 1, largest + 1), int)
    np.add.at(table, (true, inferred), 1)
    return table

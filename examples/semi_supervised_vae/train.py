"""Training and evaluation: for every number of labels and every seed, M2 and the classifier alone."""

import functools
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
from jaxtyping import Array, Float, Int, Key, PyTree

import gjflax


class Accuracies(NamedTuple):
    """Shares of held-out images that are classified rightly."""

    label_counts: tuple[int, ...]
    semi_supervised: Float[np.ndarray, "label_counts seeds"]
    supervised: Float[np.ndarray, "label_counts seeds"]


def train_semi_supervised(
    config: ml_collections.ConfigDict, partly: input_pipeline.Partly, key: Key[Array, ""]
) -> gjflax.FitResult:
    """M2, on images with and without labels."""
    sizes = input_pipeline.sizes_of(partly, config.labelled_batch, config.unlabelled_batch)
    fit_key, batch_key = jax.random.split(key)
    return gjflax.fit(
        models.create_objective(config, sizes),
        create_optimizer(config.learning_rate, number_of_steps(config, partly)),
        input_pipeline.batches(partly, sizes, batch_key),
        key=fit_key,
        num_epochs=config.num_epochs,
        inputs=models.objective_args,
        progress=False,
    )


def train_supervised(
    config: ml_collections.ConfigDict, partly: input_pipeline.Partly, key: Key[Array, ""]
) -> gjflax.FitResult:
    """The classifier alone, on the images with labels: with the same optimiser, for as many steps."""
    steps = number_of_steps(config, partly)
    return gjflax.fit(
        models.Supervised(models.Classifier(tuple(config.hidden))),
        create_optimizer(config.learning_rate, steps),
        tuple(partly.labelled),
        key=key,
        num_steps=steps,
        batch_size=min(config.labelled_batch, len(partly.labelled.labels)),
        progress=False,
    )


def number_of_steps(config: ml_collections.ConfigDict, partly: input_pipeline.Partly) -> int:
    """The number of steps of a training."""
    sizes = input_pipeline.sizes_of(partly, config.labelled_batch, config.unlabelled_batch)
    return config.num_epochs * (sizes.unlabelled // sizes.unlabelled_batch)


@functools.cache
def create_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Adam, with a learning rate that falls to zero. One object for equal arguments, so that a step compiles once."""
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


@functools.partial(jax.jit, static_argnums=0)
def predict(classifier: models.Classifier, params: PyTree, images: models.Images) -> Int[Array, " batch"]:
    """The most probable class of each image."""
    return jnp.argmax(classifier.apply({"params": params}, images), axis=-1)


def accuracy(config: ml_collections.ConfigDict, params: PyTree, digits: input_pipeline.Digits) -> float:
    """The share of images that are classified rightly."""
    classifier = models.Classifier(tuple(config.hidden))
    return float(np.mean(np.asarray(predict(classifier, params, digits.images)) == digits.labels))


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> Accuracies:
    """Train all, print a table and draw.

    Args:
      config: the hyperparameters.
      workdir: where the table and the figures are written.

    Returns:
      The accuracies.
    """
    directory = Path(workdir).expanduser().resolve()
    directory.mkdir(parents=True, exist_ok=True)
    train_set, held_out = input_pipeline.load_datasets()
    started, drawn = time.perf_counter(), None
    found = np.zeros((2, len(config.label_counts), len(config.seeds)))
    for row, number in enumerate(config.label_counts):
        for column, seed in enumerate(config.seeds):
            label_key, *keys = jax.random.split(jax.random.key(seed), 3)
            partly = input_pipeline.keep_labels(train_set, number, label_key)
            ours = train_semi_supervised(config, partly, keys[0]).state.params
            alone = train_supervised(config, partly, keys[1]).state.params
            params = ours["guide"]["classifier"], alone["classifier"]
            found[:, row, column] = [accuracy(config, one, held_out) for one in params]
            said = f"M2 {found[0, row, column]:.1%}, supervised {found[1, row, column]:.1%}"
            print(f"{number:>4} labels, seed {seed}: {said}", flush=True)
            drawn = ours if number == config.drawn_labels and column == 0 else drawn
    accuracies = Accuracies(tuple(config.label_counts), *found)
    table = as_table(accuracies)
    (directory / "accuracy.md").write_text(table)
    print(f"Trained for {time.perf_counter() - started:.0f} s, with compilation.\n\n{table}")
    for path in figures.draw_all(directory, config, accuracies, drawn, held_out):
        print(f"Wrote {path}")
    return accuracies


def as_table(accuracies: Accuracies) -> str:
    """The accuracies over the seeds as a table: the mean ± its standard error."""
    lines = ["| labels | M2 | supervised | difference |", "|---|---|---|---|"]
    for row, number in enumerate(accuracies.label_counts):
        ours, alone = 100 * accuracies.semi_supervised[row], 100 * accuracies.supervised[row]
        cells = [
            f"{np.mean(values):{sign}.1f} ± {standard_error(values):.1f} %"
            for values, sign in ((ours, ""), (alone, ""), (ours - alone, "+"))
        ]
        lines.append(f"| {number} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def standard_error(values: Float[np.ndarray, "... seeds"]) -> Float[np.ndarray, "..."]:
    """The standard error of the mean over the last axis; NaN for one seed, which says nothing of it."""
    if values.shape[-1] == 1:
        return np.full(values.shape[:-1], np.nan)
    return np.std(values, axis=-1, ddof=1) / np.sqrt(values.shape[-1])

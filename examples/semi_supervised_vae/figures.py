"""The figures: accuracy by the number of labels, and analogies."""

import functools
from pathlib import Path
from typing import Any

import input_pipeline
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import ml_collections
import models
import numpy as np
import seaborn as sns
import train
from jaxtyping import Array, Float, PyTree
from matplotlib.figure import Figure

INK = "#1b1b1b"
ACCENT = "#c44e52"


def draw_all(
    directory: Path,
    config: ml_collections.ConfigDict,
    accuracies: Any,
    params: PyTree,
    held_out: input_pipeline.Digits,
) -> list[Path]:
    """Draw every figure, and return the files."""
    drawn = {
        "accuracy": functools.partial(accuracy_by_labels, accuracies),
        "analogies": functools.partial(analogies, config, params, held_out),
    }
    paths = []
    style = sns.axes_style("ticks") | sns.plotting_context("notebook", font_scale=0.95)
    with matplotlib.rc_context({**style, "axes.titlesize": 12, "axes.titlepad": 8, "figure.titlesize": 13}):
        for name, make in drawn.items():
            figure = make()
            paths.append(directory / f"{name}.png")
            figure.savefig(paths[-1], dpi=150)
            plt.close(figure)
    return paths


def accuracy_by_labels(accuracies: Any) -> Figure:
    """The mean accuracy over the seeds, with bars of one standard error, and the single seeds as points."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    series = {
        "M2, with all images": (accuracies.semi_supervised, ACCENT, 0.97),
        "classifier alone, with the labelled images": (accuracies.supervised, INK, 1.03),
    }
    for label, (values, color, shift) in series.items():
        at = shift * np.asarray(accuracies.label_counts)
        percent = 100 * values
        error = train.standard_error(percent)
        axes.errorbar(at, percent.mean(-1), error, color=color, marker="o", capsize=4, linewidth=1.8, label=label)
        axes.plot(np.repeat(at, percent.shape[-1]), percent.reshape(-1), ".", color=color, alpha=0.4, markersize=6)
    seeds = accuracies.supervised.shape[-1]
    axes.set_xscale("log")
    axes.set_xticks(accuracies.label_counts, [str(number) for number in accuracies.label_counts])
    axes.minorticks_off()
    axes.set(
        xlabel=f"labelled images among {input_pipeline.TRAINING:,}",
        ylabel="held-out accuracy (%)",
        title=f"Mean of {seeds} seeds ± one standard error; dots are single seeds",
    )
    axes.grid(axis="y", alpha=0.4)
    axes.legend(loc="lower right", edgecolor="none", framealpha=1.0)
    sns.despine(figure)
    return figure


def analogies(config: ml_collections.ConfigDict, params: PyTree, held_out: input_pipeline.Digits) -> Figure:
    """One held-out image of each class, and its style in every class."""
    chosen = np.asarray([np.flatnonzero(held_out.labels == label)[0] for label in range(models.CLASSES)])
    images = held_out.images[chosen]
    decoded = in_every_class(config, params, jnp.asarray(images))
    figure, axes = plt.subplots(figsize=(6.4, 6.2), layout="constrained")
    rows = np.concatenate([images[:, None], np.full_like(images[:, None], np.nan, float), decoded], axis=1)
    padded = np.pad(rows, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    axes.imshow(np.block([list(row) for row in padded]), cmap="gray_r", vmin=0, vmax=models.LEVELS)
    centres = (models.SIDE + 2) * (np.arange(models.CLASSES + 2) + 0.5) - 0.5
    axes.set_xticks([centres[0], *centres[2:]], ["image", *map(str, range(models.CLASSES))])
    axes.set_yticks(centres[: models.CLASSES], [str(label) for label in range(models.CLASSES)])
    axes.tick_params(length=0)
    axes.set(xlabel="class given to the decoder", ylabel="class of the image")
    axes.set_title(f"Style of the image on the left, in every class ({config.drawn_labels} labels)")
    sns.despine(ax=axes, left=True, bottom=True)
    return figure


def in_every_class(
    config: ml_collections.ConfigDict, params: PyTree, images: models.Images
) -> Float[Array, "batch classes height width"]:
    """Expected grey levels at the mean style of each image, for all classes. The style is read by the guessed class."""
    hidden = tuple(config.hidden)
    style = models.Style(config.latents, hidden).bind({"params": params["guide"]["style"]})
    digit = models.Digit(config.latents, hidden).bind({"params": params["model"]["digit"]})
    guessed = train.predict(models.Classifier(hidden), params["guide"]["classifier"], images)
    key = jax.random.key(0)  # Return values only are looked at: they depend on constraints, not on what is drawn.

    def decode(image: models.Image, guess: Array) -> Float[Array, "classes height width"]:
        z = style.simulate(key, (image, guess))[1].get_retval()
        return jax.vmap(lambda y: digit.importance(key, {"y": y, "z": z}, ())[1][1].get_retval())(
            jnp.arange(models.CLASSES)
        )

    return jax.jit(jax.vmap(decode))(images, guessed)

"""The figures: the loss curve with the counting accuracy, and reconstructions with the inferred boxes."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import input_pipeline
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import ml_collections
import models
import numpy as np
import seaborn as sns
from jaxtyping import Array, Bool, Float, PyTree
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

INK = "#1b1b1b"
ACCENT = "#c44e52"

SEED = 2
"""Of the guide's draws in the figure of reconstructions."""


def draw_all(
    directory: Path, config: ml_collections.ConfigDict, trained: Any, held_out: input_pipeline.Scenes
) -> list[Path]:
    """Draw every figure, and return the files."""
    drawn = {
        "loss_curve": functools.partial(loss_curve, config, trained),
        "reconstructions": functools.partial(reconstructions, config, trained.params, held_out),
    }
    paths = []
    style = sns.axes_style("ticks") | sns.plotting_context("notebook", font_scale=0.95)
    with matplotlib.rc_context({**style, "axes.titlesize": 12, "axes.titlepad": 8, "figure.titlesize": 13}):
        for name, make in drawn.items():
            figure = make()
            paths.append(directory / f"{name}.png")
            figure.savefig(paths[-1], dpi=130)
            plt.close(figure)
    return paths


def loss_curve(config: ml_collections.ConfigDict, trained: Any) -> Figure:
    """Minus the evidence lower bound, and the share of held-out images that are counted right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    steps = [row["step"] for row in trained.history]
    curves = {
        "training": ("loss", INK),
        "held out": ("held_out_loss", ACCENT),
    }
    for label, (name, color) in curves.items():
        losses = [row[name] / config.batch_size for row in trained.history]
        left.plot(steps, losses, color=color, linewidth=1.8, label=f"{label}: {_signed(losses[-1])} at the end")
    left.set(xlabel="step", ylabel="−ELBO (nats per image)", title="Loss")
    left.legend(loc="upper right", edgecolor="none", framealpha=1.0)
    right.plot(steps, 100 * np.asarray(trained.accuracies), color=ACCENT, linewidth=1.8)
    right.axhline(100 / (config.max_digits + 1), color=INK, linestyle=":", label="chance")
    right.set(xlabel="step", ylabel="held-out images (%)", title="Number of digits is right", ylim=(0, 102))
    right.legend(loc="lower right", edgecolor="none", framealpha=1.0)
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.4)
    sns.despine(figure)
    return figure


def _signed(number: float) -> str:
    return f"{number:.1f}".replace("-", "−")


class Seen(NamedTuple):
    """What a draw of the guide makes of an image.

    Attributes:
      image: the expected image under the model.
      widths: of the boxes, in pixels.
      centres: of the boxes, downwards and to the right, in pixels.
      present: which of them there are.
    """

    image: models.Image
    widths: Float[Array, " steps"]
    centres: Float[Array, "steps 2"]
    present: Bool[Array, " steps"]


def see(config: ml_collections.ConfigDict, params: PyTree, images: models.Images) -> Seen:
    """What the guide draws for each image, and the model makes of that."""
    attention = models.create_attention(config).bind({"params": params["guide"]})
    scene = models.create_scene(config).bind({"params": params["model"]})

    def of_one(key: Array, image: models.Image) -> Seen:
        key, guessed = attention.simulate(key, (image,))
        choices = guessed.strip()
        _, (_, rendered) = scene.importance(key, choices.merge({"x": image}), ())
        present = choices["steps", "present"].unmask(0) == 1
        where = choices["steps", "object", "where"].unmask(0.0)
        return Seen(rendered.get_retval(), *jax.vmap(models.box)(where), present)

    return jax.jit(jax.vmap(of_one))(jax.random.split(jax.random.key(SEED), len(images)), jnp.asarray(images))


def reconstructions(config: ml_collections.ConfigDict, params: PyTree, held_out: input_pipeline.Scenes) -> Figure:
    """The first held-out images of each count with the boxes that the guide draws, above what the model makes of these."""
    # There is little to see where nothing is.
    wanted = [1] + [4] * config.max_digits
    chosen = np.concatenate([np.flatnonzero(held_out.counts == n)[:some] for n, some in enumerate(wanted)])
    images = held_out.images[chosen]
    seen = see(config, params, jnp.asarray(images))
    figure, grid = plt.subplots(2, len(chosen), figsize=(1.15 * len(chosen), 3.4), layout="constrained")
    colors = sns.color_palette("tab10", config.num_steps)
    for column, image in enumerate(images):
        for axes, shown in zip(grid[:, column], (image, seen.image[column]), strict=True):
            axes.imshow(shown, cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        for step in np.flatnonzero(seen.present[column]):
            width = seen.widths[column, step]
            # The centre of the first pixel is at 0 on the axes.
            down, right = seen.centres[column, step] - width / 2 - 0.5
            grid[0, column].add_patch(Rectangle((right, down), width, width, fill=False, color=colors[step], lw=1.5))
    grid[0, 0].set_ylabel("held out")
    grid[1, 0].set_ylabel("reconstruction")
    lines = [Line2D([], [], color=color) for color in colors]
    labels = [f"box of step {step + 1}" for step in range(config.num_steps)]
    figure.legend(lines, labels, loc="outside lower center", ncols=config.num_steps, frameon=False)
    figure.suptitle("Held-out images with the inferred boxes, and their reconstructions")
    return figure

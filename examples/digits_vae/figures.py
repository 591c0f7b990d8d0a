"""The figures of a trained VAE: loss curve, reconstructions, prior samples, latent plane."""

import functools
from collections.abc import Callable
from pathlib import Path

import input_pipeline
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import models
import numpy as np
import queries
import seaborn as sns
from jaxtyping import Array, ArrayLike, Float, Key, Num, PyTree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Codes = Float[Array, "batch latents"]
GreyImages = Float[Array, "batch height width"]

SEED = 1
"""Of the prior samples in their figure."""

GAP = 1
"""White pixels between images."""

INK = "#1b1b1b"
ACCENT = "#c44e52"


def draw_all(
    directory: Path,
    model: models.Model,
    params: PyTree,
    held_out: input_pipeline.Digits,
    history: list[dict[str, float]],
) -> list[Path]:
    """Draw every figure, and return the files."""
    draw: dict[str, Callable[[], Figure]] = {
        "loss_curve": lambda: loss_curve(history),
        "reconstructions": lambda: reconstructions(model, params, held_out),
        "prior_samples": lambda: prior_samples(model, params),
        "latent_plane": lambda: latent_plane(model, params, held_out),
    }
    paths = []
    style = sns.axes_style("ticks") | sns.plotting_context("notebook", font_scale=0.95)
    with matplotlib.rc_context({**style, "axes.titlesize": 12, "axes.titlepad": 8, "figure.titlesize": 13}):
        for name, make in draw.items():
            figure = make()
            paths.append(directory / f"{name}.png")
            figure.savefig(paths[-1], dpi=150)
            plt.close(figure)
    return paths


def loss_curve(history: list[dict[str, float]]) -> Figure:
    """Minus the evidence lower bound, on the images trained on and on those held out."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    epochs = [entry["epoch"] for entry in history]
    curves = {
        "training, mean over the epoch": ([entry["loss"] for entry in history], INK),
        "held out, after the epoch": ([-entry["held_out_elbo"] for entry in history], ACCENT),
    }
    for label, (losses, color) in curves.items():
        axes.plot(epochs, losses, color=color, linewidth=1.8, label=f"{label}: {losses[-1]:.1f} at the end")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set(xlabel="epoch", ylabel="−ELBO (nats per image)", title="Loss of the VAE on scikit-learn's digits")
    axes.grid(axis="y", alpha=0.4)
    axes.legend(loc="upper right", edgecolor="none", framealpha=1.0)
    sns.despine(figure)
    return figure


def reconstructions(model: models.Model, params: PyTree, held_out: input_pipeline.Digits) -> Figure:
    """Held-out images, two of every digit, above what the decoder makes of their mean latent codes."""
    chosen = np.stack([np.flatnonzero(held_out.labels == digit)[:2] for digit in range(10)], axis=1)
    figure, pairs = plt.subplots(2, 1, figsize=(9, 4.4), layout="constrained")
    figure.suptitle("Held-out digits, two of each, and their reconstructions")
    for axes, indices in zip(pairs, chosen, strict=True):
        originals = held_out.images[indices]
        both = np.concatenate([originals, _decode(model, params, _encode(model, params, jnp.asarray(originals)))])
        _show(axes, both, columns=10)
        tile = models.SIDE + GAP
        axes.set_yticks([models.SIDE / 2, tile + models.SIDE / 2], ["original", "reconstruction"])
        axes.set_xticks(np.arange(10) * tile + models.SIDE / 2, [str(digit) for digit in range(10)])
        axes.tick_params(length=0)
    return figure


def prior_samples(model: models.Model, params: PyTree) -> Figure:
    """Images drawn from the prior, beside the expected grey levels at the same latent codes."""
    drawn, expected = _draw(model, params, jax.random.split(jax.random.key(SEED), 100))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.9), layout="constrained")
    figure.suptitle("100 samples from the prior")
    _show(left, expected, columns=10)
    left.set_title("expected grey levels, $16\\,\\sigma(\\mathrm{logits}(z))$")
    _show(right, drawn, columns=10)
    right.set_title("drawn images, $x \\sim p(x \\mid z)$")
    return figure


def latent_plane(model: models.Model, params: PyTree, held_out: input_pipeline.Digits) -> Figure:
    """The mean latent codes of held-out images, coloured by digit, beside what the decoder makes of the plane."""
    codes = np.asarray(_encode(model, params, jnp.asarray(held_out.images)))
    basis, names = _plane(codes)
    coordinates = codes @ basis
    # Tiles of equal size fill the plane as far as there are codes; each shows what stands at its centre.
    reach = float(np.ceil(2 * np.abs(coordinates).max()) / 2)
    side = 17
    centres = reach * (2 * np.arange(side, dtype=np.float32) + 1 - side) / side
    grid = np.stack(np.meshgrid(centres, centres[::-1]), axis=-1).reshape(-1, 2)
    decoded = _montage(_decode(model, params, jnp.asarray(grid @ basis.T)), columns=side)

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.6), layout="constrained")
    palette = sns.color_palette("tab10", 10)
    for digit in range(10):
        points = coordinates[held_out.labels == digit]
        left.scatter(*points.T, s=26, color=palette[digit], edgecolor="white", linewidth=0.4, label=str(digit))
    left.legend(title="digit", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handletextpad=0.2)
    left.set(title="Mean codes of the 360 held-out digits", xlabel=names[0], ylabel=names[1])
    left.grid(alpha=0.3)
    right.imshow(decoded, cmap="gray_r", vmin=0, vmax=models.LEVELS, extent=(-reach, reach, -reach, reach))
    right.set(title="The plane decoded (expected grey levels)", xlabel=names[0], ylabel=names[1])
    for axes in (left, right):
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    return figure


@functools.partial(jax.jit, static_argnames="model")
def _draw(model: models.Model, params: PyTree, keys: Key[Array, " batch"]) -> tuple[models.Images, GreyImages]:
    return jax.vmap(functools.partial(queries.draw, queries.bind(model, params).decoder))(keys)


@functools.partial(jax.jit, static_argnames="model")
def _encode(model: models.Model, params: PyTree, images: models.Images) -> Codes:
    return jax.vmap(functools.partial(queries.encode, queries.bind(model, params).encoder))(images)


@functools.partial(jax.jit, static_argnames="model")
def _decode(model: models.Model, params: PyTree, codes: Codes) -> GreyImages:
    return jax.vmap(functools.partial(queries.decode, queries.bind(model, params).decoder))(codes)


def _plane(codes: Float[np.ndarray, "batch latents"]) -> tuple[Float[np.ndarray, "latents 2"], tuple[str, str]]:
    """An orthonormal basis of the plane that is shown, and the names of its axes."""
    latents = codes.shape[1]
    if latents == 2:
        return np.eye(2, dtype=codes.dtype), ("$z_1$", "$z_2$")
    _, _, directions = np.linalg.svd(codes - codes.mean(axis=0), full_matrices=False)
    return directions[:2].T, ("first principal axis of z", "second principal axis of z")


def _montage(images: Num[ArrayLike, "batch height width"], columns: int) -> Float[np.ndarray, "rows columns"]:
    """Images in rows, with white to the right of and below each."""
    tiles = np.pad(np.asarray(images, np.float32), ((0, 0), (0, GAP), (0, GAP)))
    count, height, width = tiles.shape
    rows = tiles.reshape(count // columns, columns, height, width)
    return rows.transpose(0, 2, 1, 3).reshape(-1, columns * width)


def _show(axes: Axes, images: Num[ArrayLike, "batch height width"], columns: int) -> None:
    """Draw images in rows, black ink on white."""
    axes.imshow(_montage(images, columns), cmap="gray_r", vmin=0, vmax=models.LEVELS)
    axes.set(xticks=[], yticks=[])
    sns.despine(ax=axes, left=True, bottom=True)

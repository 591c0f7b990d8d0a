"""The figures: the held-out bounds while training, and forecasts of held-out sequences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import input_pipeline
import jax
import matplotlib
import matplotlib.pyplot as plt
import ml_collections
import numpy as np
import queries
import reference
import seaborn as sns
from jaxtyping import Array, Key
from matplotlib.figure import Figure
from scipy.special import ndtri

if TYPE_CHECKING:
    from train import Result

SEEN = 25
"""How many steps of a sequence are seen before the forecast."""

DRAWS = 2000
"""Of every forecast."""

INK = "#1b1b1b"
COLORS = dict(zip(("ELBO", "SMCObjective"), sns.color_palette("colorblind", 2), strict=True))


def draw_all(
    directory: Path,
    config: ml_collections.ConfigDict,
    result: Result,
    held_out: input_pipeline.Sequences,
    key: Key[Array, ""],
) -> list[Path]:
    """Draw every figure, and return the files."""
    draw: dict[str, Callable[[], Figure]] = {
        "bounds": lambda: bounds(result),
        "forecasts": lambda: forecasts(config, result, held_out, key),
    }
    paths = []
    style = sns.axes_style("ticks") | sns.plotting_context("notebook", font_scale=0.9)
    with matplotlib.rc_context({**style, "axes.titlesize": 12, "figure.titlesize": 13}):
        for name, make in draw.items():
            figure = make()
            paths.append(directory / f"{name}.png")
            figure.savefig(paths[-1], dpi=90, pil_kwargs={"optimize": True})
            plt.close(figure)
    return paths


def bounds(result: Result) -> Figure:
    """The held-out bounds in nats per step, for either guide, and what no model exceeds on the average."""
    exact, independent = np.mean(result.exact), np.mean(result.independent)
    directions = dict.fromkeys(direction for direction, _ in result.trained)
    figure, panels = plt.subplots(
        1, len(directions), figsize=(10, 4.8), layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for axes, direction in zip(panels[0], directions, strict=True):
        axes.axhline(exact, color=INK, linestyle="--", linewidth=1.2, label="log p(x) of the process itself")
        for name, color in COLORS.items():
            one = result.trained.get((direction, name))
            if one is not None:
                axes.plot(one.steps, one.curve, color=color, label=f"bound, {name}")
                axes.plot(one.steps[-1:], [np.mean(one.log_evidence)], "o", color=color, label=f"log p(x), {name}")
        axes.axhline(independent, color="0.5", linestyle=":", linewidth=1.2, label="normal distribution, no time")
        axes.set(title=f"A guide that reads {direction}", xlabel="training step")
    height = exact - independent
    panels[0, 0].set(
        ylabel="nats per step of a held-out sequence", ylim=(independent - 0.1 * height, exact + 0.08 * height)
    )
    panels[0, -1].legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.08))
    sns.despine(figure)
    return figure


def forecasts(
    config: ml_collections.ConfigDict, result: Result, held_out: input_pipeline.Sequences, key: Key[Array, ""]
) -> Figure:
    """What comes after the first steps of held-out sequences: central 90 % by the trained model, and exactly."""
    (direction, name), trained = list(result.trained.items())[-1]
    frozen = ml_collections.FrozenConfigDict(config)
    ahead = input_pipeline.STEPS - SEEN
    shown = np.asarray(held_out[:3])
    means, variances = reference.forecasts(shown[:, :SEEN], ahead)
    half = ndtri(0.95) * np.sqrt(variances)
    future, every = np.arange(SEEN, input_pipeline.STEPS), np.arange(input_pipeline.STEPS)
    figure, panels = plt.subplots(3, 1, figsize=(9, 7), layout="constrained", sharex=True, sharey=True)
    figure.suptitle(f"Forecasts of held-out sequences after {SEEN} steps: median and central 90 %")
    for axes, sequence, mean, one_key in zip(panels, shown, means, jax.random.split(key, 3), strict=True):
        draws = queries.forecast(frozen, direction, trained.params, sequence[:SEEN], ahead, DRAWS, one_key)
        low, middle, high = np.quantile(np.asarray(draws), [0.05, 0.5, 0.95], axis=0)
        color = COLORS[name]
        axes.fill_between(future, low, high, color=color, alpha=0.25, linewidth=0, label=f"deep Markov model ({name})")
        axes.plot(future, middle, color=color, linewidth=1.6)
        axes.plot(future, mean, color=INK, linestyle="--", linewidth=1.1, label="exact, Kalman filter")
        for bound in (mean - half, mean + half):
            axes.plot(future, bound, color=INK, linestyle="--", linewidth=0.8)
        axes.plot(every[:SEEN], sequence[:SEEN, 0], ".-", color="0.4", linewidth=0.8, label="x, seen")
        axes.plot(
            future, sequence[SEEN:, 0], "o", color="0.4", markerfacecolor="white", markersize=5, label="x, not seen"
        )
        axes.set(ylabel="x")
    panels[-1].set(xlabel="step")
    panels[0].legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    sns.despine(figure)
    return figure

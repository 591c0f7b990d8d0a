"""The figures: predictive bands on the simulated curve, and calibration on the diabetes data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import input_pipeline
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from train import Calibration

INK = "#1b1b1b"
COLORS = sns.color_palette("colorblind")[:4]


def draw_all(
    directory: Path,
    data: input_pipeline.Regression,
    grid: np.ndarray,
    bands: Mapping[str, tuple[np.ndarray, float]],
    calibrations: Mapping[str, Calibration],
) -> list[Path]:
    """Draw every figure, and return the files."""
    draw: dict[str, Callable[[], Figure]] = {
        "bands": lambda: predictive_bands(data, grid, bands),
        "calibration": lambda: calibration_curves(calibrations),
    }
    paths = []
    style = sns.axes_style("ticks") | sns.plotting_context("notebook", font_scale=0.9)
    with matplotlib.rc_context({**style, "axes.titlesize": 12, "figure.titlesize": 13}):
        for name, make in draw.items():
            figure = make()
            paths.append(directory / f"{name}.png")
            figure.savefig(paths[-1], dpi=90)
            plt.close(figure)
    return paths


def predictive_bands(
    data: input_pipeline.Regression, grid: np.ndarray, bands: Mapping[str, tuple[np.ndarray, float]]
) -> Figure:
    """The predictive mean with 2 standard deviations of it, and of a new response."""
    figure, panels = plt.subplots(1, len(bands), figsize=(14, 4.4), layout="constrained", sharex=True, sharey=True)
    figure.suptitle("The same network in four treatments, with no data between −0.6 and 0.8 and beyond ±2")
    truth = input_pipeline.curve(grid)
    for axes, color, (name, (means, noise)) in zip(panels, COLORS, bands.items(), strict=True):
        mean, sd = means.mean(axis=0), means.std(axis=0)
        wide = np.hypot(sd, noise)
        axes.axvspan(*input_pipeline.GAP, color="0.95", linewidth=0)
        axes.fill_between(
            grid,
            mean - 2 * wide,
            mean + 2 * wide,
            color=color,
            alpha=0.2,
            linewidth=0,
            label="± 2 sd of a new response",
        )
        axes.fill_between(
            grid, mean - 2 * sd, mean + 2 * sd, color=color, alpha=0.4, linewidth=0, label="± 2 sd of the mean"
        )
        axes.plot(grid, mean, color=color, linewidth=1.8, label="predictive mean")
        axes.plot(grid, truth, color=INK, linewidth=1.0, linestyle="--", label="truth")
        axes.plot(data.x[:, 0], data.y, ".", color=INK, markersize=4, label="data")
        axes.set(title=name, xlabel="x", xlim=(-3, 3), ylim=(-3.2, 3.2))
    panels[0].set_ylabel("y")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    sns.despine(figure)
    return figure


def calibration_curves(calibrations: Mapping[str, Calibration]) -> Figure:
    """Coverage against level, with the binomial error of calibrated predictions; and held-out log densities."""
    levels = np.linspace(0.01, 0.99, 99)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    count = len(next(iter(calibrations.values())).position)
    for color, (name, calibration) in zip(COLORS, calibrations.items(), strict=True):
        coverage, errors = calibration.coverage(levels)
        left.plot(100 * levels, 100 * coverage, color=color, linewidth=1.8, label=name)
    left.plot([0, 100], [0, 100], color=INK, linewidth=1.0, linestyle="--")
    left.fill_between(
        100 * levels,
        100 * (levels - 2 * errors),
        100 * (levels + 2 * errors),
        color="0.88",
        linewidth=0,
        zorder=0,
        label="calibrated, ± 2 standard errors",
    )
    left.set(
        title=f"Coverage of {count} held-out patients",
        xlabel="central predictive interval (%)",
        ylabel="held-out responses inside (%)",
        xlim=(0, 100),
        ylim=(0, 100),
    )
    left.legend(loc="upper left", frameon=False, fontsize=9)
    for row, (color, calibration) in enumerate(zip(COLORS, calibrations.values(), strict=True)):
        density = calibration.log_density
        error = 2 * density.std() / np.sqrt(len(density))
        right.errorbar(density.mean(), row, xerr=error, fmt="o", color=color, capsize=4)
    right.set_yticks(range(len(calibrations)), calibrations)
    right.set_ylim(len(calibrations) - 0.5, -0.5)
    right.set(title="Held-out log density (± 2 standard errors)", xlabel="nats per patient")
    right.grid(axis="x", alpha=0.4)
    sns.despine(figure)
    return figure

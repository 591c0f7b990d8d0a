"""The figures: intervals beside the exact ones, curves of the ELBO, and the funnel of the eight schools."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import input_pipeline
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import reference
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import ndtri

if TYPE_CHECKING:
    from train import Fit

    Schools = Mapping[str, Mapping[str, Fit]]

LEVELS = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
"""Of the quantiles that are shown: the median, the central 50 % and the central 90 %."""

INK = "#1b1b1b"
COLORS = dict(
    zip(
        ("AutoNormal", "AutoLowRankNormal", "AutoMultivariateNormal", "AutoLaplace", "AutoFlow"),
        sns.color_palette("colorblind", 5),
        strict=True,
    )
)
COLORS["AutoMultivariateNormal, batches"] = sns.color_palette("colorblind")[5]


def draw_all(
    directory: Path,
    schools: Schools,
    exact_schools: reference.EightSchools,
    regression: Mapping[str, Fit],
    exact_regression: reference.LinearRegression,
    names: tuple[str, ...],
) -> list[Path]:
    """Draw every figure, and return the files."""
    draw: dict[str, Callable[[], Figure]] = {
        "schools_intervals": lambda: schools_intervals(schools, exact_schools),
        "elbo_curves": lambda: elbo_curves(schools, exact_schools, regression, exact_regression),
        "funnel": lambda: funnel(schools, exact_schools),
        "regression_intervals": lambda: regression_intervals(regression, exact_regression, names),
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


def schools_intervals(schools: Schools, exact: reference.EightSchools) -> Figure:
    """Medians and central intervals of μ, τ and θ in both forms."""
    effects = input_pipeline.load_schools().effects
    labels = ["μ", "τ", *(f"θ{j} (y = {effect:.0f})" for j, effect in enumerate(effects, 1))]
    keep = [0, 1, *range(3, 11)]  # log τ says what τ says.
    figure, panels = plt.subplots(1, 2, figsize=(11, 7.5), layout="constrained", sharey=True, sharex=True)
    figure.suptitle("Eight schools: median, central 50 % (thick) and 90 % (thin)")
    for axes, (form, fits) in zip(panels, schools.items(), strict=True):
        rows = {"exact": exact.quantiles(LEVELS)[keep]}
        for name, fitted in fits.items():
            if name != "AutoLaplace":  # Its intervals would fill the page.
                draws = [fitted.choices["mu"], fitted.choices["tau"], *fitted.values.T]
                rows[name] = np.quantile(draws, LEVELS, axis=1).T
        _intervals(axes, rows, labels)
        axes.set(title=form, xlabel="points of the test")
    _legend(figure, panels[0])
    sns.despine(figure)
    return figure


def regression_intervals(
    regression: Mapping[str, Fit], exact: reference.LinearRegression, names: tuple[str, ...]
) -> Figure:
    """Medians and central intervals of the weights."""
    sd = np.sqrt(np.diag(exact.covariance))
    rows = {"exact": exact.mean[:, None] + sd[:, None] * ndtri(LEVELS)}
    rows.update({name: np.quantile(fitted.values, LEVELS, axis=0).T for name, fitted in regression.items()})
    figure, axes = plt.subplots(figsize=(9, 8), layout="constrained")
    _intervals(axes, rows, ["intercept", *names])
    axes.set(
        title="Diabetes regression: median, central 50 % (thick) and 90 % (thin)",
        xlabel="weight (standard deviations of the response per standard deviation of the input)",
    )
    _legend(figure, axes)
    sns.despine(figure)
    return figure


def _intervals(axes: Axes, rows: Mapping[str, np.ndarray], labels: list[str]) -> None:
    """Of every label a group of intervals, one below the other; the exact ones are shaded behind their group."""
    step = 0.8 / len(rows)
    for offset, (name, quantiles) in enumerate(rows.items()):
        y = np.arange(len(labels)) + step * (offset - (len(rows) - 1) / 2)
        color = COLORS.get(name, INK)
        axes.hlines(y, quantiles[:, 0], quantiles[:, 4], color=color, linewidth=1.1)
        axes.hlines(y, quantiles[:, 1], quantiles[:, 3], color=color, linewidth=3.2)
        axes.plot(quantiles[:, 2], y, "o", color=color, markersize=4.5, label=name)
        if name == "exact":
            for row, group in zip(quantiles, range(len(labels)), strict=True):
                axes.fill_betweenx([group - 0.42, group + 0.42], row[0], row[4], color="0.92", linewidth=0)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.axvline(0.0, color="0.6", linewidth=0.8, zorder=0)


def elbo_curves(
    schools: Schools,
    exact_schools: reference.EightSchools,
    regression: Mapping[str, Fit],
    exact_regression: reference.LinearRegression,
) -> Figure:
    """log p(y) − ELBO over the steps; a Laplace approximation has no ELBO while it is trained."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.6), layout="constrained")
    figure.suptitle("The ELBO while training (dashed: log p(y); dotted: best product of normals)")
    problems = [(f"eight schools, {form}", fits, exact_schools.log_evidence, 3.0) for form, fits in schools.items()]
    problems.append(("diabetes regression", regression, exact_regression.log_evidence, 7.0))
    for axes, (title, fits, log_evidence, depth) in zip(panels, problems, strict=True):
        axes.axhline(log_evidence, color=INK, linewidth=1.2, linestyle="--")
        for name, fitted in fits.items():
            if name != "AutoLaplace":
                axes.plot(fitted.steps, fitted.curve, color=COLORS[name], linewidth=1.5, label=name)
        axes.set(title=title, xlabel="step", ylim=(log_evidence - depth, log_evidence + 0.15 * depth))
    panels[0].set_ylabel("ELBO (nats)")
    best = exact_regression.log_evidence - exact_regression.mean_field_gap
    panels[-1].axhline(best, color=INK, linewidth=1.2, linestyle=":", zorder=3)
    # The first and the last panel have all guides between them.
    _legend(figure, panels[0], panels[-1])
    sns.despine(figure)
    return figure


def funnel(schools: Schools, exact: reference.EightSchools) -> Figure:
    """Draws of (log τ, θ_1) of every guide, over the exact density."""
    names = [name for name in ("AutoNormal", "AutoMultivariateNormal", "AutoFlow") if name in schools["centred"]]
    log_tau, theta = np.linspace(-4.5, 4.0, 120), np.linspace(-14.0, 30.0, 140)
    density = exact.density(log_tau, theta)
    # Lines of the density that hold 50, 80 and 95 % of the posterior.
    falling = np.sort(density, axis=None)[::-1]
    inside = np.cumsum(falling) / falling.sum()
    levels = [falling[np.searchsorted(inside, share)] for share in (0.95, 0.8, 0.5)]

    figure, panels = plt.subplots(
        2, len(names), figsize=(11, 6.8), layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    figure.suptitle("600 draws of each guide over the exact posterior (shaded: its densest 50, 80 and 95 %)")
    for row, (form, fits) in zip(panels, schools.items(), strict=True):
        for axes, name in zip(row, names, strict=True):
            axes.contourf(log_tau, theta, density.T, levels=[*levels, falling[0]], colors=["0.93", "0.86", "0.78"])
            fitted = fits[name]
            shown = slice(0, 600)
            axes.scatter(
                np.log(fitted.choices["tau"][shown]),
                fitted.values[shown, 0],
                s=6,
                alpha=0.7,
                linewidth=0,
                color=COLORS[name],
            )
            axes.set(title=f"{name}, {form}", xlim=(-4.5, 4.0), ylim=(-14, 30))
        row[0].set_ylabel("θ1 (points)")
    for axes in panels[-1]:
        axes.set_xlabel("log τ (τ in points)")
    sns.despine(figure)
    return figure


def _legend(figure: Figure, *panels: Axes) -> None:
    """One legend below the panels."""
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=3, frameon=False)

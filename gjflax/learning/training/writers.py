"""Where the metrics of a run go: clu's metric writers where TensorFlow is installed, else lines of JSON and a plot.

A writer has the methods of ``clu.metric_writers.MetricWriter`` that a loop calls: ``write_scalars(step, scalars)``,
``flush()``, ``close()``.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gjflax.learning.training.optional import require


@runtime_checkable
class Writer(Protocol):
    """What `fit` asks of a writer; those of clu have it."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write the numbers of a step."""

    def flush(self) -> None:
        """Let what was written be on disk."""

    def close(self) -> None:
        """Finish."""


def create_writer(directory: str | Path) -> Writer:
    """Clu's default writer where TensorFlow and TensorBoard are installed, else a `JsonLinesWriter`.

    Args:
      directory: where the files are written; it is made if it is not there.
    """
    directory = Path(directory).expanduser().resolve()
    if all(importlib.util.find_spec(name) for name in ("tensorflow", "tensorboard")):
        from clu import metric_writers

        return metric_writers.create_default_writer(str(directory))
    return JsonLinesWriter(directory)


class JsonLinesWriter:
    """Writes a line of JSON for every step that it is given, and at the end a plot of them.

    A run that goes on from a checkpoint writes on: lines of its own and later steps are written anew.

    Args:
      directory: where ``metrics.jsonl`` and ``metrics.png`` are written; the plot only if matplotlib is installed.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> writer = JsonLinesWriter(directory)
    >>> writer.write_scalars(10, {"loss": 0.5})
    >>> writer.close()
    >>> read_rows(writer.path)
    [{'step': 10, 'loss': 0.5}]
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).expanduser().resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.path = self.directory / "metrics.jsonl"
        self._last = max((row["step"] for row in read_rows(self.path)), default=-1)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Append a line."""
        if step <= self._last:
            kept = [row for row in read_rows(self.path) if row["step"] < step]
            self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **{name: float(value) for name, value in scalars.items()}}) + "\n")
        self._last = step

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Draw the plot, where matplotlib is installed."""
        rows = read_rows(self.path)
        if rows and importlib.util.find_spec("matplotlib"):
            plot_history(rows, self.directory / "metrics.png")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that a `JsonLinesWriter` wrote; one that was cut off in the middle is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def plot_history(history: Iterable[Mapping[str, Any]], path: str | Path | None = None) -> Any:
    """The metrics of a run against its steps, one panel for each; losses share one.

    Args:
      history: rows with the entry "step", as ``fit(...).history``.
      path: where the figure is written; by default nowhere.

    Returns:
      The matplotlib figure.

    Raises:
      MissingDependencyError: if matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "`plot_history`", "matplotlib")
    rows = list(history)
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("step", "epoch")]
    losses = [name for name in names if name.endswith("loss")]
    panels = ([losses] if losses else []) + [[name] for name in names if name not in losses]
    figure = figures.Figure(figsize=(5.0 * max(len(panels), 1), 3.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=False):
        for name in panel:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), marker=None if len(points) > 1 else "o")
        axes.set_xlabel("step")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure

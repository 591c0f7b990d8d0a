"""What a run shows while it trains: a line for every report and, on a terminal, a progress bar below them."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressReporter:
    """Shows the progress of a run; a context around its steps.

    Where the output is no terminal (a file, a log), only the lines are written.

    Args:
      num_steps: how many steps the run has; None where that is not known.
      done: how many of them were done before.
      console: where to print; by default standard output. Without effect where `shown` is false.
      shown: whether anything is shown.
    """

    def __init__(self, num_steps: int | None, done: int = 0, *, console: Console | None = None, shown: bool = True):
        self._console = console or Console(highlight=False, soft_wrap=True, quiet=not shown)
        self._num_steps, self._shown = num_steps, shown
        self._progress = Progress(
            TextColumn("step"),
            TextColumn("{task.completed:.0f}" + ("" if num_steps is None else "/{task.total:.0f}")),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            # Where lines are kept a bar would only repeat them.
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._progress.add_task("train", total=num_steps, completed=done, loss="compiling")

    def __enter__(self) -> ProgressReporter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, loss: Any) -> None:
        """Advance by a step, whose loss is known."""
        if not self._progress.disable:
            self._progress.update(self._task, advance=1, loss=f"loss {float(loss):.5g}")

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(line, markup=False)

    def report(self, row: Mapping[str, Any]) -> None:
        """Print the numbers of a report."""
        if not self._shown:
            return
        width = len(str(self._num_steps or ""))
        whole = "" if self._num_steps is None else f"/{self._num_steps}"
        numbers = [
            f"{name.replace('_', ' ')} {value:<10.5g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.items()
            if name != "step" and not (name == "skipped" and value == 0)
        ]
        self.say(f"step {row['step']:>{width}}{whole}   " + "   ".join(numbers).rstrip())

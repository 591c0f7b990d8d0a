"""What a run shows while it trains: a line for every epoch and, on a terminal, a progress bar below them."""

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """Shows the progress of a run; a context around its epochs.

    Args:
      num_epochs: how many epochs the run has.
      done: how many of them were trained before.
      console: where to print; by default standard output.
    """

    def __init__(self, num_epochs: int, done: int, console: Console | None = None):
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._width = len(str(num_epochs))
        self._num_epochs = num_epochs
        self._progress = Progress(
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[elbo]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            # Where lines are kept, in a file or a log, a bar would only repeat them.
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=num_epochs, completed=done, elbo="compiling")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def report(self, entry: dict[str, Any]) -> None:
        """Show the numbers of one epoch, in nats per image."""
        self._console.print(
            f"epoch {entry['epoch']:>{self._width}}/{self._num_epochs}   training loss {entry['loss']:8.2f}   "
            f"held-out ELBO {entry['held_out_elbo']:8.2f}   nats per image"
        )
        self._progress.update(self._task, advance=1, elbo=f"held-out ELBO {entry['held_out_elbo']:.2f}")

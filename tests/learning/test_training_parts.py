"""What a run shows and writes: the progress bar, lines of JSON, plots; and the packages that these need."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gjflax import JsonLinesWriter, MissingDependencyError, create_writer, plot_history
from gjflax.learning.training.progress import ProgressReporter
from gjflax.learning.training.writers import read_rows

ROW = {"step": 5, "epoch": 1, "loss": 1.23456789, "skipped": 0}


def shown(terminal: bool, *, show: bool = True, num_steps: int | None = 10) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, highlight=False, soft_wrap=True, width=100, quiet=not show)
    with ProgressReporter(num_steps, console=console, shown=show) as progress:
        for _ in range(5):
            progress.step(1.5)
        progress.report(ROW)
        progress.report({**ROW, "step": 10, "skipped": 2})
    return file.getvalue()


def test_a_file_gets_lines_alone():
    lines = shown(terminal=False).splitlines()
    assert lines == [
        "step  5/10   epoch 1   loss 1.2346",
        "step 10/10   epoch 1   loss 1.2346       skipped 2",
    ]
    assert shown(terminal=False, num_steps=None).splitlines()[0] == "step 5   epoch 1   loss 1.2346"
    assert shown(terminal=False, show=False) == "" == shown(terminal=True, show=False)


def test_a_terminal_gets_a_bar_below_the_lines():
    output = shown(terminal=True)
    assert "epoch 1   loss 1.2346" in output and "━" in output and "5/10" in output
    # It is gone at the end: the cursor goes up and the line is cleared.
    assert output.rstrip().endswith("\x1b[1A\x1b[2K")


def test_lines_of_json_go_on_where_a_run_goes_on(tmp_path: Path):
    writer = JsonLinesWriter(tmp_path / "run")
    for step in (10, 20, 30):
        writer.write_scalars(step, {"loss": 1 / step})
    with writer.path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed while it wrote
    again = JsonLinesWriter(tmp_path / "run")
    again.write_scalars(20, {"loss": 5})
    again.write_scalars(30, {"loss": float("nan")})
    rows = read_rows(writer.path)
    assert [row["step"] for row in rows] == [10, 20, 30] and rows[0]["loss"] == 0.1 and rows[1]["loss"] == 5.0
    assert all(json.loads(line) for line in writer.path.read_text().splitlines())
    again.close()
    assert (tmp_path / "run" / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_has_a_panel_for_each_metric_and_one_for_losses(tmp_path: Path):
    history = [{"step": i, "epoch": 1, "loss": i, "held_out_loss": 2 * i, "grad_norm": 1.0} for i in range(3)]
    figure = plot_history(history, tmp_path / "curves.png")
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]
    assert figure.axes[0].lines[1].get_ydata().tolist() == [0, 2, 4] and (tmp_path / "curves.png").exists()


def test_without_tensorflow_the_writer_is_one_of_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find(name))
    assert isinstance(create_writer(tmp_path), JsonLinesWriter)


def test_without_matplotlib_there_is_no_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        MissingDependencyError, match="`plot_history` needs `matplotlib.figure`.*pip install matplotlib"
    ):
        plot_history([ROW])
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    writer = JsonLinesWriter(tmp_path)
    writer.write_scalars(1, {"loss": 1.0})
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.slow
def test_what_is_optional_is_not_imported_with_gjflax():
    program = "import sys, gjflax; print([m for m in ('orbax', 'matplotlib', 'tensorflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

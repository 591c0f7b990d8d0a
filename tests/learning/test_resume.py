"""A run that was interrupted and called again ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from learning import resume_program

import gjflax
from gjflax import CheckpointError, Checkpoints, MissingDependencyError
from gjflax.learning.training.writers import read_rows

# All alike, or the bits would differ between what is run before a test begins and in it.
pytestmark = pytest.mark.optimized


class Interrupted(Exception):
    pass


def interrupting(reports: int) -> Any:
    """A callback that fails at that report."""
    left = [reports]

    def interrupt(state: Any, row: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise Interrupted

    return interrupt


@pytest.fixture(autouse=True)
def _as_users_run_it() -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


EPOCHS = 5


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("uninterrupted")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return resume_program.bits(resume_program.train(directory, EPOCHS)), directory


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(uninterrupted: Any, tmp_path: Path):
    """Interrupted before a checkpoint was written, and after, in the middle of an epoch."""
    want, elsewhere = uninterrupted
    assert len(want["history"]) == 7 and want["history"][-1]["step"] == 20
    for reports in (1, 4):
        with pytest.raises(Interrupted):
            resume_program.train(tmp_path, EPOCHS, callbacks=[interrupting(reports)])
    got = resume_program.train(tmp_path, EPOCHS)
    assert resume_program.bits(got) == want
    # Lines that were written twice stand there once.
    assert read_rows(tmp_path / "metrics.jsonl") == read_rows(elsewhere / "metrics.jsonl")
    # It is through: nothing is left to do.
    again = resume_program.train(tmp_path, EPOCHS, callbacks=[interrupting(1)])
    assert resume_program.bits(again) == want
    # And it may go on.
    assert resume_program.train(tmp_path, EPOCHS + 1).history[: len(want["history"]) - 1] == want["history"][:-1]


@pytest.mark.slow
def test_an_interrupted_run_of_scanned_steps_ends_with_the_same_bits(tmp_path: Path):
    options = {"scanned_steps": 2}
    want = resume_program.bits(resume_program.train(tmp_path / "uninterrupted", EPOCHS, **options))
    with pytest.raises(Interrupted):
        resume_program.train(tmp_path / "interrupted", EPOCHS, callbacks=[interrupting(4)], **options)
    assert resume_program.bits(resume_program.train(tmp_path / "interrupted", EPOCHS, **options)) == want


def test_a_run_that_stopped_early_stays_so(tmp_path: Path):
    stopped = resume_program.train(tmp_path, EPOCHS, callbacks=[lambda state, row: row["step"] >= 9])
    again = resume_program.train(tmp_path, EPOCHS)
    assert again.stopped_early and resume_program.bits(again) == resume_program.bits(stopped)


def test_a_checkpoint_of_another_run_is_refused(uninterrupted: Any):
    _, directory = uninterrupted
    options = {"num_epochs": 9, "batch_size": 4, "progress": False, "checkpoints": directory / "checkpoints"}
    run = (resume_program.Objective(), resume_program.optimizer())
    key = jax.random.key(7)
    with pytest.raises(CheckpointError, match="another run.*key was"):
        gjflax.fit(*run, resume_program.DATA, key=jax.random.key(8), **options)
    with pytest.raises(CheckpointError, match="data/elements was 14 and is 9"):
        gjflax.fit(*run, resume_program.DATA[:9], key=key, **options)
    with pytest.raises(CheckpointError, match="data/checksum was"):
        gjflax.fit(*run, resume_program.DATA + 1, key=key, **options)
    with pytest.raises(CheckpointError, match=r"arrays/.state.opt_state.*was"):
        gjflax.fit(run[0], optax.sgd(0.1), resume_program.DATA, key=key, **options)


def test_few_checkpoints_are_kept(tmp_path: Path):
    resume_program.train(tmp_path, EPOCHS)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [18, 20]
    with pytest.raises(gjflax.ArgumentError, match="`keep` of `Checkpoints` is a positive integer; got 0"):
        Checkpoints(tmp_path, keep=0)


def test_without_orbax_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for module in ("orbax", "orbax.checkpoint"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MissingDependencyError, match="Checkpoints needs `orbax.checkpoint`.*pip install orbax-checkpoint"
    ):
        resume_program.train(tmp_path, 1)


@pytest.mark.slow
def test_killed_at_a_random_step_it_ends_with_the_same_bits(tmp_path: Path):
    """Killed without notice, three times, each time at another moment; then called until it is through."""
    program, epochs = Path(resume_program.__file__), 12

    def start(directory: Path, pause: float) -> subprocess.Popen[bytes]:
        directory.mkdir(exist_ok=True)
        command = [sys.executable, str(program), str(directory), str(epochs), str(pause)]
        return subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"})

    whole = start(tmp_path / "whole", 0.02)
    draw, killed_at = random.Random(0), []
    directory = tmp_path / "killed"
    for _ in range(3):
        process = start(directory, 0.02)
        lines = len(read_rows(directory / "metrics.jsonl")) + draw.randint(2, 4)
        deadline = time.monotonic() + 300
        while len(read_rows(directory / "metrics.jsonl")) < lines and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was through before it was killed"
        killed_at.append(read_rows(directory / "metrics.jsonl")[-1]["step"])
    assert any(path.name.isdigit() for path in (directory / "checkpoints").iterdir()), "nothing to go on from"
    assert start(directory, 0.02).wait() == 0 and whole.wait() == 0
    got, want = (json.loads((path / "result.json").read_text()) for path in (directory, tmp_path / "whole"))
    assert got == want, killed_at
    assert want["history"][-1]["step"] == 4 * epochs
    assert read_rows(directory / "metrics.jsonl") == read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert np.all(np.isfinite([row["loss"] for row in want["history"]]))

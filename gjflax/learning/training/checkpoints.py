"""Checkpoints of a run, by orbax: its state, what was reported so far, and where it stands in its data."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import jax
import numpy as np

from gjflax.core.errors import ArgumentError, CheckpointError
from gjflax.learning.training.optional import require
from gjflax.learning.training.state import copied


class Checkpoints:
    """Where and how often `fit` writes checkpoints.

    Args:
      directory: where they are; it is made if it is not there.
      every: a checkpoint is written at every so many reports, and at the end.
      keep: how many of the last ones are kept.

    Raises:
      MissingDependencyError: if orbax is not installed.
    """

    def __init__(self, directory: str | Path, *, every: int = 1, keep: int = 2):
        for name, value in (("every", every), ("keep", keep)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(f"`{name}` of `Checkpoints` is a positive integer; got {value!r}.")
        self._orbax: ModuleType = require("orbax.checkpoint", "Checkpoints", "orbax-checkpoint")
        self.directory = Path(directory).expanduser().resolve()
        self.every, self.keep = every, keep
        self._manager: Any = None

    def __enter__(self) -> Checkpoints:
        options = self._orbax.CheckpointManagerOptions(max_to_keep=self.keep)
        self._manager = self._orbax.CheckpointManager(self.directory, options=options)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, step: int, run: Any, record: dict[str, Any], identity: dict[str, Any]) -> None:
        """Write a checkpoint.

        Args:
          step: the number of steps done.
          run: a pytree of arrays.
          record: what else is needed to go on, as JSON.
          identity: what makes this run another one than others, as JSON.
        """
        if step in self._manager.all_steps():
            return
        # The steps that follow write over the run's arrays while the files are being written.
        kept = copied(run)
        args = self._orbax.args
        self._manager.save(
            step,
            args=args.Composite(
                run=args.StandardSave(kept),
                record=args.JsonSave({**record, "identity": identity | {"arrays": _described(run)}}),
            ),
        )

    def restore(self, run: Any, identity: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """The last checkpoint's run and record; None if there is no checkpoint.

        Args:
          run: a run of the same structure.
          identity: what was given to `save`.

        Raises:
          CheckpointError: if the checkpoint is of another run.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        args = self._orbax.args
        record = self._manager.restore(step, args=args.Composite(record=args.JsonRestore())).record
        require_same(record.pop("identity"), identity | {"arrays": _described(run)}, self.directory)
        target = jax.tree.map(self._orbax.utils.to_shape_dtype_struct, run)
        restored = self._manager.restore(step, args=args.Composite(run=args.StandardRestore(target))).run
        return restored, record


def key_identity(key: Any) -> list[int]:
    """The numbers of a random key."""
    return np.asarray(jax.random.key_data(key)).ravel().tolist()


def require_same(saved: dict[str, Any], wanted: dict[str, Any], directory: Any) -> None:
    """Raise where a checkpoint is of another run, and say in what."""
    flat = [{"/".join(map(str, path)): value for path, value in _flat(tree)} for tree in (saved, wanted)]
    differing = [name for name in sorted({*flat[0], *flat[1]}) if flat[0].get(name) != flat[1].get(name)]
    if differing:
        listed = "; ".join(f"{name} was {flat[0].get(name)} and is {flat[1].get(name)}" for name in differing[:3])
        raise CheckpointError(
            f"The checkpoint in {directory} is of another run ({listed}{'; ...' if len(differing) > 3 else ''}). Use another "
            "directory, or remove this one to begin anew."
        )


def _flat(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    if isinstance(tree, dict):
        return [entry for name, part in tree.items() for entry in _flat(part, (*path, name))]
    return [(path, tree)]


def _described(run: Any) -> dict[str, str]:
    """The arrays of a run: their paths, dtypes and shapes."""
    leaves = jax.tree_util.tree_flatten_with_path(run)[0]
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}

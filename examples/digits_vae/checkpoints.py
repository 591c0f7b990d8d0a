"""Checkpoints of a run: the state, what was reported so far, and the hyperparameters they belong to."""

from pathlib import Path
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from flax.training import train_state

History = list[dict[str, Any]]


def open_manager(directory: Path) -> ocp.CheckpointManager:
    """A manager that keeps the last two checkpoints; use it as a context, at whose end all are written."""
    return ocp.CheckpointManager(directory.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=2))


def save(
    manager: ocp.CheckpointManager, config: ml_collections.ConfigDict, state: train_state.TrainState, history: History
) -> None:
    """Write a checkpoint of this epoch."""
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        history=ocp.args.JsonSave(history),
        config=ocp.args.JsonSave(_plain(config)),
    )
    manager.save(len(history), args=args)


def restore(
    manager: ocp.CheckpointManager, config: ml_collections.ConfigDict, state: train_state.TrainState
) -> tuple[train_state.TrainState, History]:
    """The state and the history of the last checkpoint.

    Args:
      manager: the manager of a directory that holds a checkpoint.
      config: the hyperparameters of the run that is to go on.
      state: a state of the same structure.

    Raises:
      ValueError: if the checkpoint was made with other hyperparameters.
    """
    saved = manager.restore(manager.latest_step(), args=ocp.args.Composite(config=ocp.args.JsonRestore())).config
    wanted = _plain(config)
    changed = [name for name in sorted({*saved, *wanted}) if saved.get(name) != wanted.get(name)]
    if changed:
        listed = ", ".join(f"{name} was {saved.get(name)} and is {wanted.get(name)}" for name in changed)
        raise ValueError(f"The checkpoint in {manager.directory} is of another run ({listed}): use another workdir.")
    args = ocp.args.Composite(
        state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state)),
        history=ocp.args.JsonRestore(),
    )
    restored = manager.restore(manager.latest_step(), args=args)
    return restored.state, restored.history


def _plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The hyperparameters as JSON gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.to_dict().items()}

"""A run that may be killed at any step: trains a small network with dropout and running statistics, with checkpoints.

    python resume_program.py DIRECTORY NUM_EPOCHS SECONDS_PER_STEP

When it is through it writes the bits of the state and the history to DIRECTORY/result.json.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training.early_stopping import EarlyStopping

import gjflax

BATCH = 4
DATA = np.random.default_rng(0).normal(size=(14, 3)).astype(np.float32)


class Objective(nn.Module):
    """A regression of the first entry on all, with all that a run has to keep."""

    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(use_running_average=False)(nn.tanh(nn.Dense(4)(x)))
        h = nn.Dropout(0.5, deterministic=False)(h)
        noise = jax.random.normal(self.make_rng("choice"), (len(x),))
        return ((nn.Dense(1)(h)[:, 0] + 0.1 * noise - x[:, 0]) ** 2).mean()


@functools.cache  # one object, so that runs in one process share a compiled step
def optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, 100)))


def train(directory: Path, num_epochs: int, **options: Any) -> gjflax.FitResult:
    """The run, reported on every third step, so that a checkpoint may stand in the middle of an epoch."""
    return gjflax.fit(
        Objective(),
        optimizer(),
        DATA,
        key=jax.random.key(7),
        num_epochs=num_epochs,
        batch_size=BATCH,
        report_every=3,
        held_out=DATA[:5],
        early_stopping=EarlyStopping(patience=10_000),
        checkpoints=gjflax.Checkpoints(directory / "checkpoints", every=2),
        writer=gjflax.JsonLinesWriter(directory),
        progress=False,
        **options,
    )


def bits(result: gjflax.FitResult) -> dict[str, Any]:
    """All that training ends with, so that equal means equal to the bit."""
    arrays = jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf,
        result.state,
    )
    paths = jax.tree_util.tree_flatten_with_path(arrays)[0]
    return {
        "state": {jax.tree_util.keystr(path): np.asarray(leaf).tobytes().hex() for path, leaf in paths},
        "history": result.history,
    }


def main() -> None:
    directory, num_epochs, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    jax.config.update("jax_platforms", "cpu")

    def slowly(batch: Any) -> Any:
        jax.debug.callback(lambda: time.sleep(pause), ordered=True)
        return (batch,)

    result = train(directory, num_epochs, inputs=slowly if pause else lambda batch: (batch,))
    (directory / "result.json").write_text(json.dumps(bits(result)))


if __name__ == "__main__":
    main()

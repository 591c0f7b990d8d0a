"""Trains M2 on scikit-learn's digits, with few labels and with more.

This file is intentionally short: all else is in modules that can be imported and tested.
"""

from collections.abc import Sequence
from pathlib import Path

import train
from absl import app, flags, logging
from ml_collections import config_flags

WORKDIR = flags.DEFINE_string("workdir", None, "Directory for the table and the figures.", required=True)
CONFIG = config_flags.DEFINE_config_file(
    "config",
    # Absolute, so that the script runs from any directory.
    str(Path(__file__).resolve().parent / "configs" / "default.py"),
    "File with the hyperparameters; --config.name=value overrides one of them.",
    lock_config=True,
)


def main(argv: Sequence[str]) -> None:
    """Train, with the hyperparameters and the work directory of the flags."""
    if len(argv) > 1:
        raise app.UsageError("Too many command-line arguments.")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # The libraries' messages would run through the progress bar.
    train.train_and_evaluate(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    app.run(main)

"""Hyperparameters for a run of seconds, which tests that everything runs."""

import importlib.util
from pathlib import Path

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The default hyperparameters, with few steps and draws."""
    spec = importlib.util.spec_from_file_location("default", Path(__file__).with_name("default.py"))
    default = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(default)
    config = default.get_config()
    config.num_draws = 50
    for part in (config.curve, config.diabetes):
        part.hidden, part.num_samples, part.num_steps = 4, 2, 30
    return config

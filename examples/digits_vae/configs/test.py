"""Hyperparameters for a run of seconds, which tests that everything runs."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The hyperparameters."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.latents = 2
    config.hidden = (32,)
    config.batch_size = 64
    config.num_epochs = 6
    config.learning_rate = 1e-2
    config.clip_norm = 100.0
    config.eval_samples = 8
    config.evidence_samples = 4
    config.checkpoint_every_epochs = 1
    return config

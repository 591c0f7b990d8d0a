"""Hyperparameters for a run of seconds, which tests that everything runs."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The hyperparameters."""
    config = ml_collections.ConfigDict()
    config.seeds = (0, 1)
    config.label_counts = (20,)
    config.drawn_labels = 20
    config.latents = 2
    config.hidden = (16,)
    config.label_weight = 100.0
    config.labelled_batch = 10
    config.unlabelled_batch = 200
    config.num_epochs = 2
    config.learning_rate = 3e-3
    return config

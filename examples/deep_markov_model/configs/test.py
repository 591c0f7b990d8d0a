"""Hyperparameters for a run of seconds, which tests that everything runs."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The hyperparameters."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.guides = ("backward", "forward")
    config.objectives = ("ELBO", "SMCObjective")
    config.num_particles = 2
    config.latents = 2
    config.hidden = 4
    config.num_sequences = 40
    config.num_held_out = 20
    config.batch_size = 10
    config.num_epochs = 2
    config.learning_rate = 1e-2
    config.clip_norm = 200.0
    config.evidence_particles = 8
    return config

"""The default hyperparameters: four trainings, in less than two minutes on two cores."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The hyperparameters."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.guides = ("backward", "forward")
    config.objectives = ("ELBO", "SMCObjective")
    config.num_particles = 8
    config.latents = 2
    config.hidden = 24
    config.num_sequences = 1000
    config.num_held_out = 200
    config.batch_size = 50
    config.num_epochs = 25
    config.learning_rate = 1e-2
    config.clip_norm = 200.0
    config.evidence_particles = 128
    return config

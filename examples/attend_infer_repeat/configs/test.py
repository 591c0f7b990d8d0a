"""Hyperparameters for a run of seconds, which tests that everything runs."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The hyperparameters."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.train_images = 128
    config.held_out_images = 64
    config.max_digits = 2
    config.num_steps = 2
    config.latents = 3
    config.hidden = (8,)
    config.memory = 4
    config.prior_logit = -2.0
    config.noise = 0.3
    config.estimator = "reinforce"
    config.num_samples = 2
    config.erases = True
    config.batch_size = 32
    config.num_epochs = 2
    config.learning_rate = 2e-3
    return config

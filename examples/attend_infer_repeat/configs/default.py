"""The default hyperparameters: some two minutes of processor time, with compilation."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The hyperparameters."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.train_images = 4096
    config.held_out_images = 1024
    config.max_digits = 2
    config.num_steps = 3
    config.latents = 8
    config.hidden = (64,)
    config.memory = 32
    config.prior_logit = -2.0
    config.noise = 0.3
    config.estimator = "reinforce"
    config.num_samples = 2
    config.erases = True
    config.batch_size = 64
    config.num_epochs = 20
    config.learning_rate = 2e-3
    return config

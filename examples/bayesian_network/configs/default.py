"""The default hyperparameters: about a minute on two cores."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The hyperparameters."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.num_draws = 1000

    config.curve = ml_collections.ConfigDict()
    config.curve.hidden = 16
    config.curve.noise = 0.15  # As it was simulated.
    config.curve.num_samples = 32
    config.curve.num_steps = 3000
    config.curve.learning_rate = 2e-2

    config.diabetes = ml_collections.ConfigDict()
    config.diabetes.hidden = 8
    config.diabetes.noise = None  # Learned.
    config.diabetes.num_samples = 8
    config.diabetes.num_steps = 2000
    config.diabetes.learning_rate = 2e-2
    return config

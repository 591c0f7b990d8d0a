"""The default hyperparameters: about a minute and a half on two cores."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The hyperparameters."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.guides = ("AutoNormal", "AutoLowRankNormal", "AutoMultivariateNormal", "AutoLaplace", "AutoFlow")

    config.schools = ml_collections.ConfigDict()
    config.schools.num_steps = 3000
    config.schools.num_samples = 64
    config.schools.learning_rate = 3e-2
    config.schools.report_every = 50
    config.schools.num_draws = 50_000

    config.regression = ml_collections.ConfigDict()
    config.regression.noise = 0.7
    config.regression.batch_size = 34
    config.regression.num_steps = 3000
    config.regression.num_samples = 64
    config.regression.learning_rate = 5e-2
    config.regression.report_every = 50
    config.regression.num_draws = 50_000
    return config

"""The default hyperparameters: twelve trainings of M2 and of the classifier alone."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The hyperparameters."""
    config = ml_collections.ConfigDict()
    config.seeds = (0, 1, 2)
    config.label_counts = (10, 50, 100, 500)
    config.drawn_labels = 100
    config.latents = 4
    config.hidden = (128, 128)
    config.label_weight = 100.0
    config.labelled_batch = 50
    config.unlabelled_batch = 64
    config.num_epochs = 24
    config.learning_rate = 3e-3
    return config

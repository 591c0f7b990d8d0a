"""The default hyperparameters: about a minute of training on two cores."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The hyperparameters."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.latents = 2
    config.hidden = (256, 256, 256)
    config.batch_size = 32
    config.num_epochs = 60
    config.learning_rate = 4e-3
    config.clip_norm = 100.0
    config.eval_samples = 32
    config.evidence_samples = 512
    config.checkpoint_every_epochs = 10
    return config

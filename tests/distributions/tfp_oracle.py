"""TFP itself, as an oracle: its import looks up names that JAX has deprecated."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from tensorflow_probability.python.internal.backend import jax as tf  # noqa: F401 - re-exported
    from tensorflow_probability.substrates import jax as _tfp

    tfd, tfb, kernels = _tfp.distributions, _tfp.bijectors, _tfp.math.psd_kernels

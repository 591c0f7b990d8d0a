"""What a trained VAE is asked, one image at a time, through the generative function interface.

The decoder and encoder here are bound to their parameters; `bind` makes them of the parameters that were trained on
batches. Map these functions over keys, codes or images with ``jax.vmap``.
"""

import jax
import jax.numpy as jnp
import models
from jaxtyping import Array, Float, Key, PyTree

import gjflax


def bind(model: models.Model, params: PyTree) -> models.Model:
    """The decoder and encoder with the parameters of the objective."""
    decoder, encoder = model
    return models.Model(decoder.bind({"params": params["model"]}), encoder.bind({"params": params["guide"]}))


def draw(decoder: models.Decoder, key: Key[Array, ""]) -> tuple[models.Image, models.GreyImage]:
    """An image from the prior, and its expected grey levels."""
    _, drawn = decoder.simulate(key, ())
    return drawn["x"], drawn.get_retval()


def decode(decoder: models.Decoder, z: Float[Array, " latents"]) -> models.GreyImage:
    """The expected grey levels at a latent code."""
    # The code is a constraint; the pixels that the key draws are not looked at.
    _, (_, decoded) = decoder.importance(jax.random.key(0), {"z": z}, ())
    return decoded.get_retval()


def encode(encoder: models.Encoder, image: models.Image) -> Float[Array, " latents"]:
    """The mean latent code of an image."""
    _, encoded = encoder.simulate(jax.random.key(0), (image,))
    return encoded.get_retval()


def log_evidence(
    decoder: models.Decoder, encoder: models.Encoder, image: models.Image, key: Key[Array, ""], num_samples: int
) -> Float[Array, ""]:
    r"""An importance sampling estimate of log p(x), with the encoder as proposal.

    With weights w_s = p(x, z_s) / q(z_s | x), it is the logarithm of their mean, whose expectation lies between the
    ELBO and log p(x) and rises with the number of samples (Burda, Grosse and Salakhutdinov, "Importance weighted
    autoencoders", ICLR 2016).
    """

    def log_weight(key: Key[Array, ""]) -> gjflax.FloatArray:
        key, proposed = encoder.simulate(key, (image,))
        _, (_, score) = decoder.assess(key, proposed.strip().merge({"x": image}), ())
        return score - proposed.get_score()

    log_weights = jax.vmap(log_weight)(jax.random.split(key, num_samples))
    return jax.nn.logsumexp(log_weights) - jnp.log(float(num_samples))

r"""The VAE as two generative functions of one image.

The decoder is the joint density p(z) p(x | z) of a latent code z and an image x, the encoder a guide q(z | x) over the
same address ``"z"``:

    z ~ Normal(0, 1)                          in R^latents
    x ~ Binomial(16, sigmoid(MLP(z)))         for each of the 8 × 8 pixels
    q(z | x) = Normal(mean(x), scale(x))      with (mean, softplus⁻¹ scale) = MLP(x)

Both describe a single image. A batch is `gjflax.Map` of them, which leaves the parameters as they are: what is trained
on batches is used on one image.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, Int

import gjflax
from gjflax import Binomial, Map, Normal, trace

LEVELS = 16
"""The grey levels of scikit-learn's digits are counts: how many of 4 × 4 pixels of the scan are ink."""

SIDE = 8
"""The height and width of an image."""

Image = Int[Array, "height width"]
Images = Int[Array, "batch height width"]
GreyImage = Float[Array, "height width"]


class MLP(nn.Module):
    """Dense layers with SiLU between them."""

    features: Sequence[int]

    @nn.compact
    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        for width in self.features[:-1]:
            x = nn.silu(nn.Dense(width)(x))
        return nn.Dense(self.features[-1])(x)


class Decoder(gjflax.GenModule):
    """The joint density of a latent code ``"z"`` and an image ``"x"``; returns the image's expected grey levels."""

    latents: int
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self) -> GreyImage:
        z = trace("z", Normal)(jnp.zeros(self.latents), 1.0)
        logits = MLP((*self.hidden, SIDE * SIDE))(z).reshape(SIDE, SIDE)
        trace("x", Binomial)(LEVELS, logits)
        return LEVELS * nn.sigmoid(logits)


class Encoder(gjflax.GenModule):
    """The guide: a density of the latent code ``"z"`` given an image; returns its mean."""

    latents: int
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, image: Image) -> Float[Array, " latents"]:
        grey = image.astype(jnp.float32).reshape(-1) / LEVELS
        mean, raw_scale = jnp.split(MLP((*self.hidden, 2 * self.latents))(grey), 2)
        trace("z", Normal)(mean, nn.softplus(raw_scale))
        return mean


class Model(NamedTuple):
    """What is trained: the decoder and the encoder of one image."""

    decoder: Decoder
    encoder: Encoder


def create_model(config: ml_collections.ConfigDict) -> Model:
    """The decoder and the encoder, without parameters."""
    hidden = tuple(config.hidden)
    return Model(Decoder(config.latents, hidden), Encoder(config.latents, hidden))


@functools.cache
def create_objective(model: Model, batch_size: int) -> gjflax.ELBO:
    """Minus the evidence lower bound of a batch: the sum over its images.

    The same object for equal arguments: its `apply` is a static part of the training state, and methods of different
    objects are different, so that a training step would be compiled again.
    """
    return gjflax.ELBO(model=Map(model.decoder, repeats=batch_size), guide=Map(model.encoder))


def objective_args(images: Images) -> tuple[gjflax.ChoiceMap, tuple[()], tuple[Images]]:
    """What the objective is called with: the observed choices, and the arguments of decoder and encoder."""
    return gjflax.VectorChoiceMap(range(len(images)), {"x": images}), (), (images,)

r"""The same VAE without gjflax: what its objective is measured against, in value and in time.

Networks, initial values, optimiser and batches are those of `models` and `train`. The densities are written by hand,
and so is the estimator: one sample of every code, with log q at that sample in place of the closed form of the KL
divergence, for that is what an ELBO of arbitrary generative functions can do. The two then have the same
distribution, not just the same mean.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
import train
from jax.scipy.special import gammaln
from jaxtyping import Array, Float, Int, Key, PyTree

LEVELS = 16
PIXELS = 64


class Encoder(nn.Module):
    """Mean and scale of q(z | x)."""

    latents: int
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(
        self, images: Int[Array, "batch 8 8"]
    ) -> tuple[Float[Array, "batch latents"], Float[Array, "batch latents"]]:
        x = images.reshape(-1, PIXELS).astype(jnp.float32) / LEVELS
        for width in self.hidden:
            x = nn.silu(nn.Dense(width)(x))
        mean, raw_scale = jnp.split(nn.Dense(2 * self.latents)(x), 2, axis=-1)
        return mean, nn.softplus(raw_scale)


class Decoder(nn.Module):
    """Logits of p(x | z)."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, z: Float[Array, "batch latents"]) -> Float[Array, "batch 8 8"]:
        for width in self.hidden:
            z = nn.silu(nn.Dense(width)(z))
        return nn.Dense(PIXELS)(z).reshape(-1, 8, 8)


class VAE(nn.Module):
    """Encoder, decoder, and the bound on log p(x) that they give."""

    latents: int
    hidden: tuple[int, ...]

    def setup(self) -> None:
        self.encoder = Encoder(self.latents, self.hidden)
        self.decoder = Decoder(self.hidden)

    def __call__(self, images: Int[Array, "batch 8 8"], key: Key[Array, ""]) -> Float[Array, " batch"]:
        """log p(x, z) − log q(z | x) of every image, at a reparameterised sample z of q."""
        mean, scale = self.encoder(images)
        z = mean + scale * jax.random.normal(key, mean.shape)
        return self.log_weights(images, z, mean, scale)

    def log_weights(
        self,
        images: Int[Array, "batch 8 8"],
        z: Float[Array, "batch latents"],
        mean: Float[Array, "batch latents"],
        scale: Float[Array, "batch latents"],
    ) -> Float[Array, " batch"]:
        """log p(x, z) − log q(z | x) of every image, at given codes."""
        log_prior = jnp.sum(normal_logpdf(z, 0.0, 1.0), axis=-1)
        log_likelihood = jnp.sum(binomial_logpmf(images, self.decoder(z)), axis=(-2, -1))
        log_guide = jnp.sum(normal_logpdf(z, mean, scale), axis=-1)
        return log_prior + log_likelihood - log_guide


def normal_logpdf(
    x: Float[Array, "*shape"], mean: Float[Array, "*shape"] | float, scale: Float[Array, "*shape"] | float
) -> Float[Array, "*shape"]:
    """The log density of a normal distribution."""
    return -0.5 * ((x - mean) / scale) ** 2 - jnp.log(scale) - 0.5 * jnp.log(2 * jnp.pi)


def binomial_logpmf(x: Int[Array, "*shape"], logits: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The log probability of x successes in 16 trials."""
    count = x.astype(jnp.float32)
    log_ways = gammaln(LEVELS + 1.0) - gammaln(count + 1.0) - gammaln(LEVELS - count + 1.0)
    return log_ways + count * logits - LEVELS * nn.softplus(logits)


def create_train_state(config: ml_collections.ConfigDict, key: Key[Array, ""]) -> train.TrainState:
    """The state before the first step."""
    vae = VAE(config.latents, tuple(config.hidden))
    init_key, run_key = jax.random.split(key)
    images = jnp.zeros((config.batch_size, 8, 8), jnp.int32)
    state = train.TrainState.create(
        apply_fn=vae.apply,
        params=jax.jit(vae.init)(init_key, images, run_key)["params"],
        tx=train.create_optimizer(config),
        key=run_key,
        metrics=train.TrainMetrics.empty(),
    )
    return train.placed(state)


def train_step(state: train.TrainState, images: Int[Array, "batch 8 8"]) -> train.TrainState:
    """One step of gradient descent on minus the evidence lower bound, in nats per image."""
    key, _ = state.step_keys()

    def loss_fn(params: PyTree) -> Float[Array, ""]:
        return -jnp.mean(state.apply_fn({"params": params}, images, key))

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    state = state.apply_gradients(grads=grads)
    update = train.TrainMetrics.single_from_model_output(loss=loss, grad_norm=optax.tree.norm(grads))
    return state.replace(metrics=state.metrics.merge(update))


@functools.partial(jax.jit, static_argnames=("vae", "num_samples"))
def evaluate(
    vae: VAE, params: PyTree, images: Int[Array, "batch 8 8"], key: Key[Array, ""], num_samples: int
) -> Float[Array, ""]:
    """The evidence lower bound, in nats per image, averaged over samples of every image's code."""
    keys = jax.random.split(key, num_samples)
    return jnp.mean(jax.vmap(lambda key: vae.apply({"params": params}, images, key))(keys))

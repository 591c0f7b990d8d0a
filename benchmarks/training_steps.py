"""The time of a training step, beside the step in hand-written Flax and optax, and NumPyro's where it is installed.

Two workloads: mean-field variational inference of a logistic regression (54 weights, 10,000 data points, 1 and 10 samples),
and a variational autoencoder of the size of Flax's example (784-400-20-400-784, batches of 128). Losses and gradients of
gjflax and of the hand-written step are compared before they are timed, at the same noise.

    JAX_PLATFORMS=cpu python benchmarks/training_steps.py
"""

from __future__ import annotations

import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from timing import interleaved, ratio

import gjflax
from gjflax import Bernoulli, GenModule, Map, Normal, trace

KEY = jax.random.key(0)
HAS_NUMPYRO = importlib.util.find_spec("numpyro") is not None


def time_of(name, steps, repeats):
    """Print the ratios of steps, each a pair of a compiled function and its first state."""

    def runner(step, state):
        def run():
            current = state
            for _ in range(repeats):
                current, loss = step(current)
            jax.block_until_ready((current, loss))

        return run

    times = interleaved({label: runner(*pair) for label, pair in steps.items()}, rounds=21)
    hand = sorted(times["hand"])[len(times["hand"]) // 2] / repeats * 1e6
    ratios = "   ".join(f"{label} / hand {ratio(times, label, 'hand'):.2f}" for label in steps if label != "hand")
    print(f"{name:38} hand {hand:10.1f} us   {ratios}", flush=True)


def optimised(loss, params, tx, *data):
    """A compiled step of a `TrainState` and its first state; the state carries the step's key."""

    @jax.jit
    def step(carry, *data):
        state, key = carry
        key, own = jax.random.split(key)
        value, grads = jax.value_and_grad(loss)(state.params, own, *data)
        return (state.apply_gradients(grads=grads), key), value

    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    return lambda carry: step(carry, *data), (state, KEY)


def log_normal(value, loc, scale):
    return -0.5 * ((value - loc) / scale) ** 2 - jnp.log(scale) - 0.5 * jnp.log(2 * jnp.pi)


# Logistic regression -------------------------------------------------------------------------------------------------

FEATURES, POINTS = 54, 10_000


@gjflax.gen
def regression(x):
    w = trace("w", Normal)(jnp.zeros(FEATURES), 1.0)
    trace("y", Map(Bernoulli))(x @ w)


class MeanField(GenModule):
    @nn.compact
    def __call__(self):
        loc = self.param("loc", nn.initializers.zeros, (FEATURES,))
        log_scale = self.param("log_scale", nn.initializers.constant(np.log(0.1)), (FEATURES,))
        trace("w", Normal)(loc, jnp.exp(log_scale))


def regression_data():
    keys = jax.random.split(KEY, 3)
    x = jax.random.normal(keys[0], (POINTS, FEATURES))
    w = 0.5 * jax.random.normal(keys[1], (FEATURES,))
    return x, jax.random.bernoulli(keys[2], jax.nn.sigmoid(x @ w)).astype(jnp.int32)


def variational_regression(samples):
    x, y = regression_data()
    tx = optax.adam(1e-2)
    objective = gjflax.ELBO(regression, MeanField(), num_samples=samples)
    params = objective.init(KEY, {"y": y}, (x,))["params"]

    def ours(params, key, x, y):
        return objective.apply({"params": params}, {"y": y}, (x,), rngs={"choice": key})

    def by_hand(params, key, x, y):
        q = params["guide"]
        w = q["loc"] + jnp.exp(q["log_scale"]) * jax.random.normal(key, (samples, FEATURES))

        def log_p(w):
            logits = x @ w
            return jnp.sum(log_normal(w, 0.0, 1.0)) + jnp.sum(y * logits - jax.nn.softplus(logits))

        log_q = jnp.sum(log_normal(w, q["loc"], jnp.exp(q["log_scale"])), -1)
        return -jnp.mean(jax.vmap(log_p)(w) - log_q)

    check_in_mean(ours, by_hand, params, x, y)
    steps = {"hand": optimised(by_hand, params, tx, x, y), "gjflax": optimised(ours, params, tx, x, y)}
    if HAS_NUMPYRO:
        steps["numpyro"] = regression_in_numpyro(samples, x, y, tx)
    time_of(f"logistic regression, {samples} samples", steps, repeats=5 if samples > 1 else 20)


def regression_in_numpyro(samples, x, y, tx):
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal
    from numpyro.infer.initialization import init_to_value

    def model(x, y):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([FEATURES]).to_event(1))
        with numpyro.plate("n", len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    start = init_to_value(values={"w": jnp.zeros(FEATURES)})
    svi = SVI(model, AutoNormal(model, init_scale=0.1, init_loc_fn=start), tx, Trace_ELBO(num_particles=samples))
    step = jax.jit(svi.update)
    return lambda state: step(state, x, y), svi.init(KEY, x, y)


def check_in_mean(ours, by_hand, params, *data, draws=200):
    """The two estimates of one number: their means over keys, within 4 standard errors of the difference."""
    keys = jax.random.split(KEY, draws)
    a, b = (np.asarray(jax.lax.map(lambda key, f=f: f(params, key, *data), keys)) for f in (jax.jit(ours), by_hand))
    error = np.sqrt((a.var() + b.var()) / draws)
    assert abs(a.mean() - b.mean()) < 4 * error + 1e-3 * abs(b.mean()), (a.mean(), b.mean(), error)


# Variational autoencoder ---------------------------------------------------------------------------------------------

BATCH, HIDDEN, LATENT, PIXELS = 128, 400, 20, 784


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(HIDDEN)(x))
        return nn.Dense(LATENT)(h), nn.Dense(LATENT)(h)


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        return nn.Dense(PIXELS)(nn.relu(nn.Dense(HIDDEN)(z)))


class Model(GenModule):
    @nn.compact
    def __call__(self, x):
        z = trace("z", Normal)(jnp.zeros((len(x), LATENT)), 1.0)
        trace("x", Bernoulli)(Decoder(name="decoder")(z))


class Guide(GenModule):
    @nn.compact
    def __call__(self, x):
        loc, log_variance = Encoder(name="encoder")(x)
        trace("z", Normal)(loc, jnp.exp(0.5 * log_variance))


def autoencoder(analytic_kl):
    x = (jax.random.uniform(KEY, (BATCH, PIXELS)) < 0.3).astype(jnp.float32)
    tx = optax.adam(1e-3)
    objective = gjflax.ELBO(Model(), Guide(), analytic_kl=analytic_kl)
    params = objective.init(KEY, {"x": x.astype(jnp.int32)}, (x,), (x,))["params"]

    def ours(params, key, x):
        return objective.apply({"params": params}, {"x": x.astype(jnp.int32)}, (x,), (x,), rngs={"choice": key})

    def by_hand(params, key, x):
        loc, log_variance = Encoder().apply({"params": params["guide"]["encoder"]}, x)
        scale = jnp.exp(0.5 * log_variance)
        z = loc + scale * jax.random.normal(key, loc.shape)
        logits = Decoder().apply({"params": params["model"]["decoder"]}, z)
        reconstruction = jnp.sum(x * logits - jax.nn.softplus(logits))
        if analytic_kl:
            return -(reconstruction + 0.5 * jnp.sum(1 + log_variance - loc**2 - jnp.exp(log_variance)))
        return -(reconstruction + jnp.sum(log_normal(z, 0.0, 1.0) - log_normal(z, loc, scale)))

    check_in_mean(ours, by_hand, params, x)
    steps = {"hand": optimised(by_hand, params, tx, x), "gjflax": optimised(ours, params, tx, x)}
    if HAS_NUMPYRO:
        steps["numpyro"] = autoencoder_in_numpyro(analytic_kl, x, tx)
    time_of(f"autoencoder, {'analytic' if analytic_kl else 'sampled'} divergence", steps, repeats=10)


def autoencoder_in_numpyro(analytic_kl, x, tx):
    import numpyro
    import numpyro.distributions as dist
    from numpyro.contrib.module import flax_module
    from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

    def model(x):
        decoder = flax_module("decoder", Decoder(), input_shape=(BATCH, LATENT))
        with numpyro.plate("batch", BATCH):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([LATENT]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        loc, log_variance = flax_module("encoder", Encoder(), input_shape=(BATCH, PIXELS))(x)
        with numpyro.plate("batch", BATCH):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(0.5 * log_variance)).to_event(1))

    svi = SVI(model, guide, tx, TraceMeanField_ELBO() if analytic_kl else Trace_ELBO())
    step = jax.jit(svi.update)
    return lambda state: step(state, x), svi.init(KEY, x)


if __name__ == "__main__":
    variational_regression(1)
    variational_regression(10)
    autoencoder(analytic_kl=False)
    autoencoder(analytic_kl=True)

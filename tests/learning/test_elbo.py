"""The ELBO against formulas written by hand: its value, its gradient, and its optimum."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import gjflax
from gjflax import ELBO, Normal, trace

KEY = jax.random.key(8)
X = np.array([1.5, -0.4, 2.2], np.float32)
PRIOR, NOISE = 1.3, 0.7


@gjflax.gen
def model():
    z = trace("z", Normal)(jnp.zeros(3), PRIOR)
    return trace("x", Normal)(z, NOISE)


class Guide(gjflax.GenModule):
    @nn.compact
    def __call__(self):
        loc = self.param("loc", nn.initializers.zeros, (3,))
        log_scale = self.param("log_scale", nn.initializers.zeros, (3,))
        return trace("z", Normal)(loc, jnp.exp(log_scale))


POSTERIOR_VARIANCE = 1 / (1 / PRIOR**2 + 1 / NOISE**2)
POSTERIOR_MEAN = POSTERIOR_VARIANCE * X / NOISE**2
EVIDENCE = stats.norm.logpdf(X, 0.0, np.hypot(PRIOR, NOISE)).sum()


def exact_bound(params):
    """E_q[log p(x, z) − log q(z)] in closed form, for Gaussians."""
    loc, scale = params["loc"], jnp.exp(params["log_scale"])
    prior = -0.5 * (loc**2 + scale**2) / PRIOR**2 - jnp.log(PRIOR)
    likelihood = -0.5 * ((X - loc) ** 2 + scale**2) / NOISE**2 - jnp.log(NOISE)
    return jnp.sum(prior + likelihood - 0.5 * jnp.log(2 * jnp.pi) + jnp.log(scale) + 0.5)


PARAMS = {"loc": jnp.array([0.3, -0.2, 1.0]), "log_scale": jnp.array([-0.1, 0.4, -0.8])}


def losses(params, samples):
    """The loss of one sample each, for many keys."""
    objective = ELBO(model=model, guide=Guide())
    keys = jax.random.split(KEY, samples)
    return jax.vmap(lambda key: objective.apply({"params": {"guide": params}}, {"x": X}, rngs={"choice": key}))(keys)


def test_value_and_gradient_are_unbiased():
    """20,000 samples, a bound of 4 standard errors."""
    samples = 20_000

    def one(key):
        objective = ELBO(model=model, guide=Guide())
        return jax.value_and_grad(lambda p: objective.apply({"params": {"guide": p}}, {"x": X}, rngs={"choice": key}))(
            PARAMS
        )

    values, grads = jax.jit(jax.vmap(one))(jax.random.split(KEY, samples))
    want = jax.value_and_grad(lambda p: -exact_bound(p))(PARAMS)
    for got, exact in zip(jax.tree.leaves((values, grads)), jax.tree.leaves(want), strict=True):
        error = 4 * np.std(got, axis=0) / np.sqrt(samples)
        assert np.all(np.abs(np.mean(got, axis=0) - exact) <= error)


def test_at_the_posterior_every_log_weight_is_the_evidence():
    optimum = {"loc": jnp.asarray(POSTERIOR_MEAN), "log_scale": jnp.full(3, 0.5 * np.log(POSTERIOR_VARIANCE))}
    np.testing.assert_allclose(losses(optimum, 50), -EVIDENCE, rtol=1e-5)


def test_samples_are_averaged_and_their_weights_are_sown():
    objective = ELBO(model=model, guide=Guide(), num_samples=7)
    loss, state = objective.apply(
        {"params": {"guide": PARAMS}}, {"x": X}, rngs={"choice": KEY}, mutable=["diagnostics"]
    )
    weights = state["diagnostics"]["log_weights"]
    assert weights.shape == (7,) and len(np.unique(weights)) == 7
    np.testing.assert_allclose(loss, -np.mean(weights), rtol=1e-6)

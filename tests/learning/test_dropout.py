"""Dropout in guides that run several times for one sample: the mean loss and gradient over masks, by enumeration.

20,000 independent losses each, and bounds of 4 standard errors.
"""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learning.gradients import assert_unbiased

import gjflax
from gjflax import ELBO, ENUM, REINFORCE, Bernoulli, GenModule, MeasureValued, Normal, WakeSleep, gen, trace

KEY = jax.random.key(0)
OBSERVED = {"x": 0.7}
WEIGHTS = jnp.array([1.2, 0.7])


@gen
def model():
    a, b = (trace(name, Bernoulli)(logit).astype(jnp.float32) for name, logit in (("a", 0.2), ("b", -0.4)))
    trace("x", Normal)(a - 2.0 * b + 3.0 * a * b, 1.0)


class Guide(GenModule):
    estimator: Any

    @nn.compact
    def __call__(self):
        weights = self.param("weights", lambda key: WEIGHTS)
        logit = jnp.sum(weights * nn.Dropout(0.5, deterministic=False)(jnp.ones(2))) - 1.0
        trace("a", self.estimator(Bernoulli))(logit)
        trace("b", self.estimator(Bernoulli))(-logit)


def log_bernoulli(value: int, logit: Any) -> Any:
    return jax.nn.log_sigmoid(logit if value else -logit)


def runs(weights: Any) -> Any:
    """For every mask and all choices: log p, log q, and the probability of the mask."""
    for mask in itertools.product((0.0, 2.0), repeat=2):
        logit = jnp.sum(weights * jnp.array(mask)) - 1.0
        for a, b in itertools.product((0, 1), repeat=2):
            log_p = log_bernoulli(a, 0.2) + log_bernoulli(b, -0.4)
            log_p += jax.scipy.stats.norm.logpdf(0.7, a - 2.0 * b + 3.0 * a * b, 1.0)
            yield log_p, log_bernoulli(a, logit) + log_bernoulli(b, -logit), 0.25


def gradients(objective: Any) -> Any:
    params = objective.init({"params": KEY, "choice": KEY, "dropout": KEY}, OBSERVED)["params"]

    def loss(params: Any, key: Any) -> Any:
        rngs = {name: jax.random.fold_in(key, number) for number, name in enumerate(("choice", "dropout"))}
        return objective.apply({"params": params}, OBSERVED, rngs=rngs)

    keys = jax.random.split(KEY, 20_000)
    values, grads = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))(params, keys)
    return values, grads["guide"]["weights"]


@pytest.mark.parametrize("estimator", [ENUM, MeasureValued, pytest.param(REINFORCE, marks=pytest.mark.slow)])
def test_every_run_of_a_sample_has_one_mask(estimator: Any):
    def exact(weights: Any) -> Any:
        return sum(-mass * jnp.exp(log_q) * (log_p - log_q) for log_p, log_q, mass in runs(weights))

    assert_unbiased(
        gradients(ELBO(model, Guide(estimator))), jax.tree.map(np.asarray, jax.value_and_grad(exact)(WEIGHTS))
    )


def test_log_q_awake_is_that_of_the_draw():
    """With one sample its gradient is that of log q at what was drawn, whose mean is 0; the value is the bound of one sample."""
    bound = sum(mass * jnp.exp(log_q) * (log_p - log_q) for log_p, log_q, mass in runs(WEIGHTS))
    exact = (np.asarray(-bound), np.zeros(2, np.float32))
    assert_unbiased(gradients(WakeSleep(model, Guide(REINFORCE), num_samples=1)), exact)


def test_the_model_has_one_mask_in_both_passes_of_the_doubly_reparameterised_gradient():
    """Its gradient in the guide, at one mask and one draw, by hand."""

    class Dropped(GenModule):
        @nn.compact
        def __call__(self):
            z = trace("z", Normal)(jnp.zeros(2), 1.0)
            trace("x", Normal)(jnp.sum(nn.Dropout(0.5, deterministic=False)(z)), 0.3)

    class OfZ(GenModule):
        @nn.compact
        def __call__(self):
            trace("z", Normal)(self.param("loc", lambda key: jnp.array([0.4, -0.3])), 0.1)

    objective = gjflax.ImportanceWeightedELBO(Dropped(), OfZ(), num_samples=3, doubly_reparameterized=True)
    params = {"guide": {"loc": jnp.array([0.4, -0.3])}}

    def loss(params: Any, key: Any) -> Any:
        rngs = {name: jax.random.fold_in(key, number) for number, name in enumerate(("choice", "dropout"))}
        return objective.apply({"params": params}, OBSERVED, rngs=rngs)

    # E over draws of Σ w̃² ∂ log w/∂z, by masks: the plain pathwise gradient of the same bound has the same mean.
    plain = gjflax.ImportanceWeightedELBO(Dropped(), OfZ(), num_samples=3)

    def plain_loss(params: Any, key: Any) -> Any:
        rngs = {name: jax.random.fold_in(key, number) for number, name in enumerate(("choice", "dropout"))}
        return plain.apply({"params": params}, OBSERVED, rngs=rngs)

    keys = jax.random.split(KEY, 20_000)
    here, there = (
        jax.jit(jax.vmap(jax.grad(f), in_axes=(None, 0)))(params, keys)["guide"]["loc"] for f in (loss, plain_loss)
    )
    error = 4 * np.sqrt((here.var(0) + there.var(0)) / len(keys))
    assert np.all(abs(here.mean(0) - there.mean(0)) < error), (here.mean(0), there.mean(0), error)

"""What objectives are written with: an objective of the log weights, as the documentation writes it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learning.gradients import assert_unbiased

import gjflax
from gjflax import ENUM, REINFORCE, Bernoulli, GenModule, Normal, Objective, StraightThrough, gen, trace

KEY = jax.random.key(0)


class LogMeanWeight(Objective):
    """log (1/S) Σ w_s, with the score function where it is needed."""

    leave_out: bool = False

    def loss(self, key: Any, observed: Any, model_args: Any, guide_args: Any):
        draws = self.draw(key, observed, model_args, guide_args)
        bound = jax.nn.logsumexp(draws.log_weights) - np.log(self.num_samples)
        self.sow_diagnostics(log_weights=draws.log_weights, effective_sample_size=draws.effective_sample_size)
        signals = bound
        if self.leave_out:
            count = self.num_samples
            without = jnp.stack([jax.nn.logsumexp(jnp.delete(draws.log_weights, s)) for s in range(count)])
            signals = bound - (without - np.log(count - 1))
        return -draws.with_score_terms(bound, signals=signals)


@gen
def model():
    z = trace("z", Bernoulli)(probs=0.3)
    return trace("x", Normal)(2.0 * z.astype(jnp.result_type(float)), 0.9)


def guide_of(estimator: Any) -> GenModule:
    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            trace("z", estimator(Bernoulli))(self.param("logit", nn.initializers.zeros, ()))

    return Guide()


def exact(logit: Any) -> Any:
    """Minus E log (w_1 + w_2) / 2, over the four pairs of values."""
    log_q = jnp.stack([jax.nn.log_sigmoid(-logit), jax.nn.log_sigmoid(logit)])
    log_p = jnp.log(jnp.array([0.7, 0.3])) + jax.scipy.stats.norm.logpdf(1.2, jnp.array([0.0, 2.0]), 0.9)
    weights = log_p - log_q
    pairs = jnp.logaddexp(weights[:, None], weights[None, :]) - jnp.log(2.0)
    return -jnp.sum(jnp.exp(log_q[:, None] + log_q[None, :]) * pairs)


@pytest.mark.parametrize("leave_out", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("estimator", [lambda d: d, pytest.param(ENUM, marks=pytest.mark.slow)])
def test_an_objective_of_the_log_weights_is_unbiased(estimator: Any, leave_out: bool):
    """4 standard errors of 20,000 draws. `ENUM` has the score function here."""
    objective = LogMeanWeight(model, guide_of(estimator), num_samples=2, leave_out=leave_out)

    def loss(logit: Any, key: Any) -> Any:
        return objective.apply({"params": {"guide": {"logit": logit}}}, {"x": 1.2}, rngs={"choice": key})

    drawn = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))(0.4, jax.random.split(KEY, 20_000))
    assert_unbiased(drawn, jax.tree.map(np.asarray, jax.value_and_grad(exact)(0.4)))


def test_draws_by_hand():
    guide = gen(lambda: trace("z", REINFORCE(Normal))(0.5, 0.8))
    normal = gen(lambda: trace("x", Normal)(trace("z", Normal)(0.0, 1.0), 1.0))

    class Looking(Objective):
        def loss(self, key: Any, observed: Any, model_args: Any, guide_args: Any):
            draws = self.draw(key, observed, model_args, guide_args)
            self.sow_diagnostics(draws=(draws.log_weights, draws.log_q, draws.choices["z"]))
            return jnp.zeros(())

    _, state = Looking(normal, guide, num_samples=5).apply(
        {}, {"x": 1.0}, rngs={"choice": KEY}, mutable=["diagnostics"]
    )
    log_weights, log_q, z = state["diagnostics"]["draws"]
    norm = jax.scipy.stats.norm.logpdf
    np.testing.assert_allclose(log_q, norm(z, 0.5, 0.8), rtol=1e-5)
    np.testing.assert_allclose(log_weights, norm(z) + norm(1.0, z) - log_q, rtol=1e-4, atol=1e-5)
    assert len(np.unique(z)) == 5


def test_a_held_guide_is_differentiated_through_its_draws_alone():
    """∇ log q(z; φ) at fixed z is left out: by hand, for z = φ + ε."""
    normal = gen(lambda: trace("z", Normal)(0.0, 2.0))

    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            return trace("z", Normal)(self.param("loc", nn.initializers.zeros, ()), 1.0)

    class Held(Objective):
        def loss(self, key: Any, observed: Any, model_args: Any, guide_args: Any):
            draws = self.draw(key, observed, model_args, guide_args, stop_guide=True)
            self.sow_diagnostics(z=draws.choices["z"])
            return -draws.log_weights[0]

    def loss(loc: Any) -> Any:
        return Held(normal, Guide()).apply(
            {"params": {"guide": {"loc": loc}}}, {}, rngs={"choice": KEY}, mutable=["diagnostics"]
        )

    slope, state = jax.grad(loss, has_aux=True)(0.7)
    z = state["diagnostics"]["z"][0]
    # −d/dz (log p − log q) = z / 4 − (z − φ).
    np.testing.assert_allclose(slope, z / 4 - (z - 0.7), rtol=1e-5)


def test_a_relaxed_choice_is_refused_by_every_objective():
    with pytest.raises(gjflax.DiscreteGradientError, match='"z" is relaxed'):
        LogMeanWeight(model, guide_of(StraightThrough)).init(KEY, {"x": 1.0})


@pytest.mark.parametrize(
    ("fields", "match"),
    [({"guide": Bernoulli, "num_samples": 0}, "positive integer; got 0"), ({"guide": None}, "`guide` of `LogMean")],
)
def test_fields_of_another_form_are_refused(fields: Any, match: str):
    with pytest.raises(gjflax.ArgumentError, match=match):
        LogMeanWeight(model=model, **fields)

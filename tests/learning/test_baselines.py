"""Baselines by themselves: their numbers by hand, their variables, and what they refuse."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gjflax
from gjflax import ELBO, Bernoulli, GenModule, LeaveOneOut, Map, MovingAverage, Normal, Predicted, gen, trace

KEY = jax.random.key(0)


def test_leave_one_out_by_hand():
    signals = {"z": jnp.arange(12.0).reshape(4, 3)}
    baselines, loss = LeaveOneOut().apply({}, signals, None, (), ())
    for s in range(4):
        others = np.delete(np.asarray(signals["z"]), s, axis=0)
        np.testing.assert_allclose(baselines["z"][s], others.mean(axis=0), rtol=1e-6)
    assert loss == 0
    np.testing.assert_array_equal(
        LeaveOneOut().apply({}, {"z": jnp.ones((1, 3))}, None, (), ())[0]["z"], np.zeros((1, 3))
    )


def test_a_moving_average_by_hand():
    """Of the steps before, weighted by their age, and undisturbed by where it starts."""
    average, means = MovingAverage(0.8), []
    variables = average.init(KEY, {"z": jnp.zeros((2, 3))}, None, (), ())
    for step in range(5):
        signals = {"z": jnp.full((2, 3), 1.0 + step) + jnp.array([[-1.0], [1.0]])}
        (baselines, _), variables = average.apply(variables, signals, None, (), (), mutable=["baselines"])
        ages = 0.8 ** np.arange(len(means))[::-1]
        want = np.dot(ages, means) / ages.sum() if means else 0.0
        np.testing.assert_allclose(baselines["z"], np.full((1, 1), want), rtol=1e-5)
        means.append(float(jnp.mean(signals["z"])))


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


@gen
def point():
    z = trace("z", Bernoulli)(probs=0.3)
    return trace("x", Normal)(3.0 * z.astype(jnp.float32), 1.0)


class Guide(GenModule):
    @nn.compact
    def __call__(self, x):
        trace("points", Map(gen(lambda logit: trace("z", Bernoulli)(logit))))(nn.Dense(3)(x))


@gen
def model():
    trace("points", Map(point, repeats=3))()


OBSERVED = {"points": {"x": jnp.array([0.2, 2.8, 1.0])}}


class Constant(nn.Module):
    @nn.compact
    def __call__(self, *inputs: Any):
        return self.param("value", nn.initializers.constant(0.7), ())


def test_a_network_is_trained_by_the_squared_error_alone():
    """By hand, for one coin: with signal f and prediction b the loss has the gradients 2 (b − f) and −(f − b − 1) ∇ log q."""

    @gen
    def guide(logit):
        trace("z", Bernoulli)(logit)

    def run(params: Any, logit: Any, baseline: Any) -> Any:
        objective = ELBO(point, guide, baseline=baseline)
        loss, state = objective.apply(
            {"params": params}, {"x": 1.0}, (), (logit,), rngs={"choice": KEY}, mutable=["diagnostics"]
        )
        return loss, state["diagnostics"]["log_weights"][0]

    params = {"baseline": {"network": {"value": jnp.float32(0.7)}}}
    predicted = Predicted(Constant())
    grads, f = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True), static_argnums=2)(params, 0.4, predicted)
    np.testing.assert_allclose(grads[0]["baseline"]["network"]["value"], 2 * (0.7 - f), rtol=1e-5)
    z = 1.0 if np.isclose(f, _log_weight(1.0), rtol=1e-5) else 0.0
    np.testing.assert_allclose(f, _log_weight(z), rtol=1e-5)
    np.testing.assert_allclose(grads[1], -(f - 0.7 - 1) * (z - jax.nn.sigmoid(0.4)), rtol=1e-5)
    # The value is that without a baseline.
    np.testing.assert_allclose(run(params, 0.4, predicted)[0], run({}, 0.4, None)[0], rtol=1e-6)


def _log_weight(z: float) -> float:
    q = 1 / (1 + np.exp(-0.4))
    log_p = np.log(0.3 if z else 0.7) - 0.5 * (1.0 - 3.0 * z) ** 2 - 0.5 * np.log(2 * np.pi)
    return float(log_p - np.log(q if z else 1 - q))


def test_a_network_sees_what_is_named():
    seen = []
    predicted = Predicted(Network(), inputs=lambda observed, model_args, guide_args: observed["points", "x"])

    class Watching(nn.Module):
        @nn.compact
        def __call__(self, x):
            seen.append(x.shape)
            return 0.0

    for baseline in (predicted, Predicted(Watching())):
        objective = ELBO(model, Guide(), baseline=baseline)
        jax.eval_shape(lambda objective=objective: objective.init(KEY, OBSERVED, (), (jnp.ones(2),)))
    assert seen == [(2,)]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MovingAverage(1.5), "decay.*1.5"),
        (lambda: Predicted(lambda x: x), "network.*Flax module"),
        (
            lambda: ELBO(model, Guide(), baseline=Predicted(nn.Dense(2))).init(KEY, OBSERVED, (), (jnp.ones(2),)),
            r"\(2,\)|\(1, 2\)",
        ),
    ],
)
def test_what_is_no_baseline_is_refused(make: Any, match: str):
    with pytest.raises((gjflax.ArgumentError, TypeError), match=match):
        make()

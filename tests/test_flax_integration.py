"""Generative functions in the hands of Flax: NNX, mutable collections, partitioned and half-precision parameters."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gjflax
from gjflax import Normal, trace

KEY = jax.random.key(3)
X = jnp.arange(12.0).reshape(4, 3)


class Head(gjflax.GenModule):
    @nn.compact
    def __call__(self, x):
        return trace("y", Normal)(nn.Dense(2)(x), 0.5)


def test_nnx_uses_a_generative_function_through_the_bridge():
    layer = nnx.bridge.ToNNX(Head(), rngs=nnx.Rngs(0, choice=1)).lazy_init(X)
    assert layer(X).shape == (4, 2)
    _, drawn = layer(KEY, (X,), method="simulate")
    choices = drawn.strip()

    def loss(layer):
        _, (_, score) = layer(KEY, choices, (X,), method="assess")
        return -score

    optimizer = nnx.Optimizer(layer, optax.sgd(1e-5), wrt=nnx.Param)
    before, grads = nnx.value_and_grad(loss)(layer)
    optimizer.update(layer, grads)
    np.testing.assert_allclose(before, -drawn.get_score(), rtol=1e-5)
    assert loss(layer) < before


def test_batch_statistics_move_through_every_method():
    class Normalised(gjflax.GenModule):
        @nn.compact
        def __call__(self, x):
            return trace("y", Normal)(nn.BatchNorm(use_running_average=False, momentum=0.5)(x), 1.0)

    model = Normalised()
    variables = model.init(KEY, X)
    choices = {"y": jnp.zeros((4, 3))}
    for method, args in (("simulate", (KEY, (X,))), ("assess", (KEY, choices, (X,)))):
        _, moved = model.apply(variables, *args, method=method, mutable=["batch_stats"])
        np.testing.assert_allclose(moved["batch_stats"]["BatchNorm_0"]["mean"], 0.5 * X.mean(0), rtol=1e-6)


def test_partitioned_parameters_are_read_as_flax_reads_them():
    class Partitioned(gjflax.GenModule):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return trace("y", Normal)(nn.Dense(2, kernel_init=init)(x), 1.0)

    variables = Partitioned().init(KEY, X)
    assert isinstance(variables["params"]["Dense_0"]["kernel"], nn.Partitioned)
    _, boxed = Partitioned().bind(variables).simulate(KEY, (X,))
    _, plain = Partitioned().bind(nn.meta.unbox(variables)).simulate(KEY, (X,))
    np.testing.assert_array_equal(boxed["y"], plain["y"])


def test_half_precision_networks_meet_single_precision_data():
    class Half(gjflax.GenModule):
        @nn.compact
        def __call__(self, x):
            mean = nn.Dense(2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(x)
            return trace("y", Normal)(mean, 0.5)

    variables = Half().init(KEY, X)
    data = jnp.full((4, 2), 0.123456789)
    _, (_, score) = Half().bind(variables).assess(KEY, {"y": data}, (X,))
    mean = nn.Dense(2, dtype=jnp.bfloat16).apply({"params": variables["params"]["Dense_0"]}, X).astype(jnp.float32)
    assert score.dtype == jnp.float32
    np.testing.assert_allclose(score, jax.scipy.stats.norm.logpdf(data, mean, 0.5).sum(), rtol=1e-5)


def test_one_side_of_an_objective_is_frozen_by_name():
    class Guide(gjflax.GenModule):
        @nn.compact
        def __call__(self):
            return trace("z", Normal)(self.param("loc", nn.initializers.zeros, ()), 1.0)

    class Model(gjflax.GenModule):
        @nn.compact
        def __call__(self):
            z = trace("z", Normal)(self.param("loc", nn.initializers.zeros, ()), 1.0)
            return trace("x", Normal)(z, 1.0)

    objective = gjflax.ELBO(model=Model(), guide=Guide())
    params = objective.init(KEY, {"x": 2.0})["params"]
    chosen = {"model": "frozen", "guide": "trained"}
    tx = optax.multi_transform({"trained": optax.sgd(0.1), "frozen": optax.set_to_zero()}, chosen)
    grads = jax.grad(lambda p: objective.apply({"params": p}, {"x": 2.0}, rngs={"choice": KEY}))(params)
    assert grads["model"]["loc"] != 0 and grads["guide"]["loc"] != 0
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["model"]["loc"] == 0 and updates["guide"]["loc"] != 0

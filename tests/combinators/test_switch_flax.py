"""`Switch` and Flax: parameters of all branches, mutable collections, shared modules, `nn.remat`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.branches import KEY, X, close, norm

import gjflax
from gjflax import AllSelection, GenModule, Normal, Switch, gen, select, trace


class Net(GenModule):
    width: int = 3
    noise: float = 0.5

    @nn.compact
    def __call__(self, x):
        return trace("y", Normal)(nn.Dense(2)(nn.tanh(nn.Dense(self.width)(x))), self.noise)


class Normed(GenModule):
    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(use_running_average=False, axis_name=None)(x[None])[0]
        self.sow("intermediates", "h", h)
        count = self.variable("count", "calls", lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing():
            count.value = count.value + 1
        return trace("y", Normal)(nn.Dense(2)(h), 1.5)


nets = Switch([Net(), Normed()])


def test_init_makes_the_parameters_of_all_branches_whatever_the_index(no_leaks: Any):
    made = [jax.jit(nets.init)(KEY, index, X) for index in (0, 1)]
    for variables in made:
        assert variables["params"].keys() == {"branches_0", "branches_1"}
        assert variables["params"]["branches_0"]["Dense_1"]["kernel"].shape == (3, 3)
        assert variables["batch_stats"].keys() == {"branches_1"}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), variables, made[0])
    _, tr = nets.bind(made[0], mutable=["batch_stats", "count"]).simulate(KEY, (0, X))
    for method, args in {
        "__call__": (0, X),
        "simulate": (KEY, (1, X)),
        "importance": (KEY, tr.strip(), (0, X)),
        "assess": (KEY, tr.strip(), (0, X)),
        "update": (KEY, tr, tr.strip(), (1, X)),
        "regenerate": (KEY, tr, AllSelection(), (1, X)),
    }.items():
        init = lambda m=method, a=args: jax.eval_shape(lambda: nets.init(KEY, *a, method=m))
        shapes = no_leaks(lambda init=init: jax.tree.map(jnp.shape, init()))
        assert shapes == jax.tree.map(jnp.shape, made[0]), method


@pytest.mark.parametrize("compiled", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_a_branch_not_taken_would_write_stays(compiled: bool):
    variables = nets.init(KEY, 0, X)

    def run(index):
        return nets.apply(
            variables, KEY, (index, X), method="simulate", mutable=["batch_stats", "count", "intermediates"]
        )[1]

    run = jax.jit(run) if compiled else run
    untaken, taken = run(jnp.int32(0)), run(jnp.int32(1))
    for collection in ("batch_stats", "count"):
        jax.tree.map(np.testing.assert_array_equal, untaken[collection], variables[collection])
    assert taken["count"]["branches_1"]["calls"] == 1
    mean = taken["batch_stats"]["branches_1"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.01 * X, rtol=1e-4)
    # What is sown is made by the branch: it is zero where that is not taken.
    assert np.all(untaken["intermediates"]["branches_1"]["h"][0] == 0)
    assert taken["intermediates"]["branches_1"]["h"][0].shape == (3,)


class Sharing(GenModule):
    """One network in two branches, and used outside of the switch too."""

    def setup(self):
        self.net = Net(2, 0.7)
        self.switch = Switch((self.net, Net(2, 0.1), self.net))

    def __call__(self, index, x):
        y = trace("here", self.net)(x)
        return trace("there", self.switch)(index, jnp.concatenate([y, x[:1]]))


@pytest.mark.slow
def test_branches_that_share_a_module_share_its_parameters(no_leaks: Any):
    sharing = Sharing()
    variables = no_leaks(lambda: sharing.init(KEY, 0, X))
    assert variables["params"].keys() == {"net", "switch"}
    assert variables["params"]["switch"].keys() == {"branches_1"}
    bound = sharing.bind(variables)
    _, tr = jax.jit(lambda i: sharing.apply(variables, KEY, (i, X), method="simulate"))(0)
    _, (_, weight, new, _) = bound.update(KEY, tr, {}, (2, X))
    close(weight, 0.0)
    _, (_, weight, new, _) = bound.update(KEY, tr, {}, (1, X))
    assert abs(weight) > 1e-2


RematSharing = nn.remat(Sharing)


@pytest.mark.slow
def test_inside_remat():
    variables = Sharing().init(KEY, 0, X)
    plain, remat = Sharing().bind(variables), RematSharing().bind(variables)
    for index in (0, 1):
        results = [m.simulate(KEY, (index, X))[1].strip() for m in (plain, remat)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *results)
        moved = [m.update(KEY, plain.simulate(KEY, (index, X))[1], {}, (1, X))[1][1] for m in (plain, remat)]
        close(moved[0], moved[1])


@gen(gjflax.TrainCombinator, params={"mu": 0.4})
def learned(x, params):
    return trace("y", Normal)(params["mu"] * x, 0.8)


@gen(gjflax.TrainCombinator, params={"nu": -0.7})
def learned_too(x, params):
    return trace("y", Normal)(params["nu"] + x, 0.3)


def test_learned_branches():
    switch = Switch((learned, learned_too))
    _, tr = switch.simulate(KEY, (0, 2.0))
    close(tr.get_score(), norm(tr["y"], 0.8, 0.8))
    # Unbound, the trace knows the parameters of the branch that was taken.
    _, gradient = switch.choice_grad(KEY, tr, select("y"))
    close(gradient["y"], -(tr["y"] - 0.8) / 0.64)
    variables = {"params": {"branches_0": {"mu": jnp.float32(0.5)}, "branches_1": {"nu": jnp.float32(1.5)}}}
    bound = switch.bind(variables)
    _, (_, weight, new, _) = bound.update(KEY, tr, {}, (1, 2.0))
    close(weight, norm(tr["y"], 3.5, 0.3) - norm(tr["y"], 0.8, 0.8))
    _, grads = switch.param_grad(KEY, new, variables["params"])
    close(grads["branches_1"]["nu"], (tr["y"] - 3.5) / 0.09, 1e-2)
    assert grads["branches_0"]["mu"] == 0.0

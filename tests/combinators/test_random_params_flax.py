"""`RandomParams` and Flax: what stays a parameter, generative functions with parameters, other modules, transformations."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.networks import KEY, KEYS, MLP, X, close, deep, deep_log_density, f64, same, shapes
from flax.traverse_util import flatten_dict
from scipy import stats

import gjflax
from gjflax import (
    FlaxModule,
    GenModule,
    Laplace,
    Map,
    Normal,
    RandomParams,
    TrainCombinator,
    gen,
    select,
    trace,
)


@pytest.fixture(scope="module")
def deep_variables() -> Any:
    return jax.jit(deep.init)(KEY, X)


# What stays a parameter -----------------------------------------------------------------------------------------------


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        h = nn.BatchNorm(use_running_average=not train, momentum=0.8)(nn.Dense(2)(x))
        return nn.Dense(1)(h)


@pytest.mark.parametrize("selection", [select("Dense_0"), select(("BatchNorm_0", "scale")), None])
def test_init_gives_the_rest_as_the_network_does(no_leaks, selection):
    alone = jax.jit(Normed().init)(KEY, X)
    net = RandomParams(Normed(), (Normal, (0.0, 1.0)), selection)
    # Looking for leaks is slow, and once is enough.
    init = (lambda: net.init(KEY, X)) if selection == select("Dense_0") else (lambda: jax.jit(net.init)(KEY, X))
    variables = no_leaks(init) if selection == select("Dense_0") else init()
    chosen = gjflax.AllSelection() if selection is None else selection
    rest = {path: leaf for path, leaf in flatten_dict(alone["params"]).items() if path not in chosen}
    same(flatten_dict(variables.get("params", {})), rest)
    same(variables["batch_stats"], alone["batch_stats"])
    assert not (selection is None and variables.get("params"))


def test_batch_statistics_keep_working():
    net = RandomParams(Normed(), (Normal, (0.3, 1.5)), select("Dense_0", ("BatchNorm_0", "scale")))
    variables = net.init(KEY, X)
    (_, tr), new = net.apply(variables, KEY, (X,), method="simulate", mutable=["batch_stats"])
    h = f64(X) @ f64(tr["Dense_0", "kernel"]) + f64(tr["Dense_0", "bias"])
    close(new["batch_stats"]["BatchNorm_0"]["mean"], 0.2 * h.mean(0))
    close(new["batch_stats"]["BatchNorm_0"]["var"], 0.8 + 0.2 * h.var(0))
    scaled = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) * f64(tr["BatchNorm_0", "scale"])
    dense = jax.tree.map(f64, variables["params"]["Dense_1"])
    close(tr.get_retval(), scaled @ dense["kernel"] + dense["bias"], rtol=1e-4)
    # The moved statistics are read where the network is told to.
    frozen = RandomParams(FlaxModule(Normed(), kwargs={"train": False}), net.prior, net.selection)
    _, (retval, _) = frozen.bind({**variables, **new}).assess(KEY, tr.strip(), (X,))
    stored = jax.tree.map(np.float64, new["batch_stats"]["BatchNorm_0"])
    scaled = (h - stored["mean"]) / np.sqrt(stored["var"] + 1e-5) * f64(tr["BatchNorm_0", "scale"])
    close(retval, scaled @ dense["kernel"] + dense["bias"], rtol=1e-4)
    # The methods that differentiate read them too, and write nothing.
    model = net.bind(variables, mutable=["batch_stats"])
    _, gradient = model.choice_grad(KEY, tr, select("Dense_0"))
    assert np.any(np.asarray(gradient["Dense_0", "kernel"]) != 0.0)


def test_parameters_of_a_choice_that_are_there_already_are_neither_read_nor_written():
    """So the variables of a network that was learned serve the same network as it is sampled."""
    learned = Normed().init(KEY, X)
    net = RandomParams(Normed(), (Normal, (0.0, 1.0)), select("Dense_0"))
    (_, tr), new = net.apply(learned, KEY, (X,), method="simulate", mutable=True)
    same(new["params"], learned["params"])
    rest = {**learned, "params": {name: learned["params"][name] for name in ("BatchNorm_0", "Dense_1")}}
    (_, again), _ = net.apply(rest, KEY, (X,), method="simulate", mutable=["batch_stats"])
    same(again, tr)


def test_dropout_is_untraced_randomness():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(nn.Dense(2)(x))

    net = RandomParams(Dropped(), (Normal, (0.0, 1.0)))
    (_, tr) = net.apply({}, KEY, (X,), method="simulate", rngs={"dropout": KEY})
    assert 0 < np.sum(np.asarray(tr.get_retval()) == 0.0) < 4
    with pytest.raises(gjflax.UntracedRandomnessError, match="dropout"):
        net.bind({}, rngs={"dropout": KEY}).choice_grad(KEY, tr, select("Dense_0"))


def test_partitioned_parameters():
    partitioned = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    net = RandomParams(nn.Dense(2, kernel_init=partitioned), (Normal, (0.0, 1.0)), select("kernel"))
    variables = net.init(KEY, X)
    assert shapes(variables["params"]) == {"bias": (2,)}
    _, tr = net.bind(variables).simulate(KEY, (X,))
    close(tr.get_retval(), X @ tr["kernel"])


# Generative functions with parameters ---------------------------------------------------------------------------------


class Likelihood(GenModule):
    @nn.compact
    def __call__(self, x):
        scale = jnp.exp(self.param("log_scale", nn.initializers.zeros, ()))
        return trace("y", Normal)(nn.Dense(1)(x), scale)


def test_the_parameters_of_a_generative_function(no_leaks):
    model = RandomParams(Map(Likelihood(), in_axes=0), (Normal, (0.0, 0.8)), ~select("log_scale"))
    variables = no_leaks(lambda: jax.jit(model.init)(KEY, X))
    assert shapes(variables) == {"params": {"log_scale": ()}}
    variables = {"params": {"log_scale": jnp.float32(-0.7)}}
    bound = model.bind(variables)
    _, tr = jax.jit(bound.simulate)(KEY, (X,))
    assert {address: tr[address].shape for address in tr.strip().addresses()} == {
        ("Dense_0", "bias"): (1,),
        ("Dense_0", "kernel"): (3, 1),
        ("y",): (2, 1),
    }

    def log_density(choices: Any) -> float:
        kernel, bias = f64(choices["Dense_0", "kernel"]), f64(choices["Dense_0", "bias"])
        prior = stats.norm.logpdf(kernel, 0.0, 0.8).sum() + stats.norm.logpdf(bias, 0.0, 0.8).sum()
        return prior + stats.norm.logpdf(f64(choices["y"]), f64(X) @ kernel + bias, np.exp(-0.7)).sum()

    close(tr.get_score(), log_density(tr.strip()))
    # Choices of one element, and of the network.
    some = {("y", 1): jnp.array([3.0]), ("Dense_0", "bias"): jnp.array([0.2])}
    _, (_, weight, new, discard) = bound.update(KEY, tr, some, (X,))
    close(weight, log_density(new.strip()) - log_density(tr.strip()), atol=1e-4)
    assert float(discard["y", 1][0]) == float(tr["y", 1][0]) and discard["Dense_0", "bias"] == tr["Dense_0", "bias"]
    assert float(new["y", 0][0]) == float(tr["y", 0][0])
    _, (weight, constrained) = bound.importance(KEY, {"y": jnp.ones((2, 1))}, (X,))
    mean = f64(X) @ f64(constrained["Dense_0", "kernel"]) + f64(constrained["Dense_0", "bias"])
    close(weight, stats.norm.logpdf(1.0, mean, np.exp(-0.7)).sum())
    assert tr.get_subtree(("Dense_0", "kernel")).get_retval() is tr.params["Dense_0/kernel"].value
    assert tr.get_subtree("Dense_0").addresses() == [("bias",), ("kernel",)]
    assert [address for address, _ in tr.leaves()] == [("Dense_0", "bias"), ("Dense_0", "kernel"), ("y",)]


def test_a_learned_argument_becomes_a_choice():
    @gen(TrainCombinator, params={"mu": 0.5, "log_scale": -1.0})
    def normal(params):
        return trace("x", Normal)(params["mu"], jnp.exp(params["log_scale"]))

    model = RandomParams(normal, (Normal, (1.0, 3.0)), select("mu"))
    variables = model.init(KEY)
    same(variables, {"params": {"log_scale": jnp.float32(-1.0)}})
    _, tr = model.bind(variables).simulate(KEY, ())
    mu, x = f64(tr["mu"]), f64(tr["x"])
    close(tr.get_score(), stats.norm.logpdf(mu, 1.0, 3.0) + stats.norm.logpdf(x, mu, np.exp(-1.0)))
    _, (_, weight, new, _) = model.bind(variables).update(KEY, tr, {"mu": 0.0}, ())
    close(weight, stats.norm.logpdf(0.0, 1.0, 3.0) + stats.norm.logpdf(x, 0.0, np.exp(-1.0)) - tr.get_score())


def test_an_address_that_is_a_path_too_is_refused():
    class Collides(GenModule):
        @nn.compact
        def __call__(self, x):
            return trace("w", Normal)(self.param("w", nn.initializers.zeros, ()), x)

    model = RandomParams(Collides(), (Normal, (0.0, 1.0)))
    with pytest.raises(gjflax.DuplicateAddressError, match='"w"'):
        model.simulate(KEY, (1.0,))


# In bodies, combinators and transformations ---------------------------------------------------------------------------


def test_a_network_that_is_part_of_another_module(no_leaks):
    """Its parameters stand where Flax has them, its choices at the paths of the network alone."""

    class Outer(GenModule):
        def setup(self):
            self.head = nn.Dense(2)

        @nn.compact
        def __call__(self, x):
            layers = [nn.Dense(3), nn.tanh, self.head]
            net = RandomParams(nn.Sequential(layers), (Normal, (0.0, 0.5)), select(("layers_0", "kernel"), "layers_2"))
            return trace("net", net)(x) + trace("again", net)(x) + nn.Dense(2)(x)

    variables = no_leaks(lambda: Outer().init(KEY, X))
    assert shapes(variables["params"]) == {"Dense_0": {"bias": (3,)}, "Dense_1": {"kernel": (3, 2), "bias": (2,)}}
    params = jax.tree.map(lambda leaf: f64(leaf) + 0.1, variables["params"])
    model = Outer().bind({"params": jax.tree.map(jnp.float32, params)})
    _, tr = model.simulate(KEY, (X,))
    assert tr["net"].addresses() == [("layers_0", "kernel"), ("layers_2", "bias"), ("layers_2", "kernel")]
    want = f64(X) @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    for name in ("net", "again"):
        h = np.tanh(f64(X) @ f64(tr[name, "layers_0", "kernel"]) + params["Dense_0"]["bias"])
        want = want + h @ f64(tr[name, "layers_2", "kernel"]) + f64(tr[name, "layers_2", "bias"])
    close(tr.get_retval(), want)
    assert np.any(tr["net", "layers_2", "bias"] != tr["again", "layers_2", "bias"])


@pytest.mark.parametrize(
    "own",
    [pytest.param(False, id="shared rest", marks=pytest.mark.slow), pytest.param(True, id="a rest for each")],
)
def test_mapped_every_element_has_weights_of_its_own(no_leaks, own):
    net = RandomParams(MLP(), (Normal, (0.0, 0.6)), select("out"))
    ensemble = Map(net, in_axes=(None,), repeats=4, variable_axes={"params": 0} if own else None)
    variables = no_leaks(lambda: jax.jit(ensemble.init)(KEY, X))
    lead = (4,) if own else ()
    assert shapes(variables["params"]) == {"Dense_0": {"kernel": (*lead, 3, 3), "bias": (*lead, 3)}}
    _, tr = jax.jit(ensemble.bind(variables).simulate)(KEY, (X,))
    assert tr["out", "kernel"].shape == (4, 3, 2) and np.unique(tr["out", "kernel"]).size == 24
    out = tr["out"]
    close(tr.get_score(), sum(stats.norm.logpdf(f64(out[n]), 0.0, 0.6).sum() for n in ("kernel", "bias")))
    dense = jax.tree.map(np.float64, variables["params"]["Dense_0"])
    h = np.tanh(f64(X) @ dense["kernel"] + dense["bias"][..., None, :])
    close(tr.get_retval(), h @ f64(out["kernel"]) + f64(out["bias"])[:, None])
    update = jax.jit(lambda tr: ensemble.bind(variables).update(KEY, tr, {(2, "out", "bias"): jnp.ones(2)}, (X,))[1])
    _, weight, _, _ = update(tr)
    old = f64(tr[2, "out", "bias"])
    close(weight, 2 * stats.norm.logpdf(1.0, 0.0, 0.6) - stats.norm.logpdf(old, 0.0, 0.6).sum(), atol=1e-4)


def test_under_vmap_and_scan(deep_variables):
    model = deep.bind(deep_variables)
    traces = jax.jit(jax.vmap(lambda key: model.simulate(key, (X,))[1]))(KEYS[:3])
    each = [jax.tree.map(lambda leaf, at=i: leaf[at], traces.strip()) for i in range(3)]
    scores = [deep_log_density(choices, deep_variables["params"]) for choices in each]
    close(traces.get_score(), scores)

    def step(tr: Any, key: Any) -> Any:
        _, (_, weight, tr) = model.regenerate(key, tr, select("net"), (X,))
        return tr, weight

    first = jax.tree.map(lambda leaf: leaf[0], traces)
    last, _ = jax.jit(lambda tr: jax.lax.scan(step, tr, KEYS))(first)
    close(last.get_score(), deep_log_density(last.strip(), deep_variables["params"]))


@pytest.mark.slow
def test_rematerialised_it_is_the_same():
    class Body(GenModule):
        @nn.compact
        def __call__(self, x):
            net = RandomParams(MLP(), (Normal, (0.0, 0.6)), select("out"))
            return trace("y", Normal)(trace("net", net)(x), 0.3)

    variables = jax.jit(Body().init)(KEY, X)
    results = []
    for body in (Body(), nn.remat(Body)()):
        same(jax.jit(body.init)(KEY, X), variables)
        _, tr = jax.jit(body.bind(variables).simulate)(KEY, (X,))
        _, by_params = jax.jit(body.param_grad)(KEY, tr, variables["params"])
        _, by_choices = jax.jit(body.bind(variables).choice_grad, static_argnums=2)(KEY, tr, select("net"))
        results.append((tr.strip().to_dict(), by_params, by_choices.to_dict()))
    jax.tree.map(lambda a, b: close(a, b), *results)


@pytest.mark.slow
def test_nested():
    """A network with random weights in a body whose other parameters are made random by a second one."""

    class Body(GenModule):
        @nn.compact
        def __call__(self, x):
            net = RandomParams(MLP(), (Normal, (0.0, 0.6)), select("out"))
            return trace("net", net)(x) + self.param("offset", nn.initializers.zeros, (1, 2))

    model = RandomParams(Body(), (Laplace, (0.0, 1.3)), select("offset", ("MLP_0", "Dense_0", "bias")))
    variables = model.init(KEY, X)
    assert shapes(variables["params"]) == {"MLP_0": {"Dense_0": {"kernel": (3, 3)}}}
    _, tr = model.bind(variables).simulate(KEY, (X,))
    c = {address: f64(tr[address]) for address in tr.strip().addresses()}
    h = np.tanh(f64(X) @ f64(variables["params"]["MLP_0"]["Dense_0"]["kernel"]) + c["MLP_0", "Dense_0", "bias"])
    close(tr.get_retval(), h @ c["net", "out", "kernel"] + c["net", "out", "bias"] + c["offset",])
    outer = sum(stats.laplace.logpdf(c[a], 0.0, 1.3).sum() for a in (("MLP_0", "Dense_0", "bias"), ("offset",)))
    inner = sum(stats.norm.logpdf(c[a], 0.0, 0.6).sum() for a in (("net", "out", "kernel"), ("net", "out", "bias")))
    close(tr.get_score(), outer + inner)

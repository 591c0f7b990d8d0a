"""`FlaxModule`: a Flax module as a generative function without choices."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import gjflax
from gjflax import Diff, FlaxModule, GenModule, Map, Normal, gen, select, trace

KEY = jax.random.key(0)
X = jnp.linspace(-1.0, 2.0, 12).reshape(4, 3)


class Net(nn.Module):
    """A network with batch statistics and dropout."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, x, train: bool = False):
        h = nn.Dense(5)(x)
        h = nn.BatchNorm(use_running_average=not train, momentum=0.9)(h)
        h = nn.Dropout(self.rate, deterministic=not train)(nn.tanh(h))
        return nn.Dense(2)(h)

    def features(self, x):
        return 2.0 * x


@functools.cache
def initial() -> Any:
    return jax.jit(Net().init)(KEY, X)


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_its_variables_and_its_output_are_those_of_the_module(no_leaks):
    variables = initial()
    same(no_leaks(lambda: FlaxModule(Net()).init(KEY, X)), variables)
    same(no_leaks(lambda: FlaxModule(Net()).init(KEY, KEY, (X,), method="simulate")), variables)
    bound = FlaxModule(Net()).bind(variables)
    key, tr = bound.simulate(KEY, (X,))
    same(tr.get_retval(), Net().apply(variables, X))
    same(bound(X), tr.get_retval())
    assert key is KEY, "no randomness is used"


def test_it_has_no_choices_and_the_density_one():
    network = FlaxModule(Net()).bind(initial())
    _, tr = network.simulate(KEY, (X,))
    assert tr.strip().is_empty() and tr.leaves() == []
    assert tr.get_score() == 0.0 and tr.project(gjflax.AllSelection()) == 0.0
    _, (weight, constrained) = network.importance(KEY, {}, (X,))
    assert weight == 0.0
    same(constrained, tr)
    _, (retval, score) = network.assess(KEY, {}, (X,))
    assert score == 0.0
    same(retval, tr.get_retval())
    _, (choices, score, retval) = network.propose(KEY, (X,))
    assert choices.is_empty() and score == 0.0
    choices, log_det = network.constrain({}, (X,))
    assert choices.is_empty() and log_det == 0.0


def test_update_runs_again_unless_nothing_changed():
    variables = initial()
    network = FlaxModule(Net()).bind(variables)
    _, tr = network.simulate(KEY, (X,))
    for name in ("update", "regenerate"):
        what = {} if name == "update" else select("x")
        _, (retdiff, weight, new, *_) = getattr(network, name)(KEY, tr, what, (X + 1.0,))
        assert weight == 0.0 and not Diff.is_unchanged(retdiff)
        same(new.get_retval(), Net().apply(variables, X + 1.0))
        same(new.get_args(), (X + 1.0,))
        same(jax.tree.map(jnp.shape, new), jax.tree.map(jnp.shape, tr))

        unchanged = (Diff.no_change(X),)
        _, (retdiff, weight, new, *_) = getattr(network, name)(KEY, tr, what, unchanged, param_diff=Diff.no_change)
        assert new is tr and Diff.is_unchanged(retdiff)

        moved = jax.tree.map(lambda leaf: leaf + 0.1, variables)
        other = FlaxModule(Net()).bind(moved)
        _, (retdiff, _, new, *_) = getattr(other, name)(KEY, tr, what, unchanged)
        assert not Diff.is_unchanged(retdiff), "the parameters may be others"
        same(new.get_retval(), Net().apply(moved, X))


def test_constraints_are_refused():
    network = FlaxModule(nn.Dense(2))
    variables = network.init(KEY, X)
    bound = network.bind(variables)
    _, tr = bound.simulate(KEY, (X,))
    calls = [
        lambda: bound.importance(KEY, {"z": 1.0}, (X,)),
        lambda: bound.assess(KEY, {"z": 1.0}, (X,)),
        lambda: bound.update(KEY, tr, {"z": 1.0}, (X,)),
        lambda: bound.constrain({"z": 1.0}, (X,)),
    ]
    for call in calls:
        with pytest.raises(
            gjflax.UnvisitedConstraintError, match=r'"z", and the network Dense at the root has no choices'
        ):
            call()
    bound.importance(KEY, {"z": 1.0}, (X,), strict=False)
    bound.update(KEY, tr, {"z": 1.0}, (X,), strict=False)

    @gen
    def model(x):
        return trace("net", network)(x)

    with pytest.raises(gjflax.UnvisitedConstraintError, match=r'\("net", "z"\)'):
        model.bind(model.init(KEY, X)).importance(KEY, {("net", "z"): 1.0}, (X,))


# In bodies and combinators -------------------------------------------------------------------------------------------


class Model(GenModule):
    """The same module used directly and as a callee, one of its own, and a free one."""

    def setup(self):
        self.shared = nn.Dense(3)
        self.own = FlaxModule(nn.Dense(3))

    @nn.compact
    def __call__(self, x):
        a = trace("a", FlaxModule(self.shared))(x)
        b = trace("b", self.own)(x)
        c = trace("c", FlaxModule(nn.Dense(3)))(x)
        return trace("y", Normal)(a + b + c - self.shared(x), 0.5)


def test_in_a_body_the_parameter_tree_is_that_of_the_modules(no_leaks):
    x = X[0]
    variables = no_leaks(lambda: Model().init(KEY, x))
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        name: {"kernel": (3, 3), "bias": (3,)} for name in ("shared", "own", "Dense_0")
    }
    _, tr = Model().bind(variables).simulate(KEY, (x,))
    params = jax.tree.map(np.float64, variables["params"])
    mean = sum(np.float64(x) @ params[name]["kernel"] + params[name]["bias"] for name in ("own", "Dense_0"))
    np.testing.assert_allclose(tr.get_score(), stats.norm.logpdf(np.float64(tr["y"]), mean, 0.5).sum(), rtol=1e-5)
    same(tr.get_subtree("b").get_retval(), nn.Dense(3).apply({"params": variables["params"]["own"]}, x))
    assert tr.strip().addresses() == [("y",)]


def test_rematerialised_it_is_the_same():
    x = X[0]
    variables = Model().init(KEY, x)
    rematerialised = nn.remat(Model)()
    same(rematerialised.init(KEY, x), variables)
    _, tr = Model().bind(variables).simulate(KEY, (x,))
    _, again = rematerialised.bind(variables).simulate(KEY, (x,))
    same(again.strip(), tr.strip())
    grads = [jax.jit(model.param_grad)(KEY, tr, variables["params"])[1] for model in (Model(), rematerialised)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *grads)
    inside = FlaxModule(nn.remat(nn.Dense)(2)).bind(nn.Dense(2).init(KEY, X))
    same(inside.simulate(KEY, (X,))[1].get_retval(), inside(X))


def test_mapped_it_shares_its_parameters_or_has_one_set_each():
    variables = nn.Dense(2).init(KEY, X[0])
    mapped = Map(FlaxModule(nn.Dense(2)), in_axes=0)
    same(mapped.init(KEY, X), variables)
    _, tr = mapped.bind(variables).simulate(KEY, (X,))
    np.testing.assert_allclose(tr.get_retval(), nn.Dense(2).apply(variables, X), rtol=1e-6)
    assert tr.get_score() == 0.0

    each = Map(FlaxModule(nn.Dense(2)), in_axes=0, variable_axes={"params": 0})
    own = each.init(KEY, X)
    assert own["params"]["kernel"].shape == (4, 3, 2)
    _, tr = each.bind(own).simulate(KEY, (X,))
    want = np.einsum("ni,nio->no", X, own["params"]["kernel"])
    np.testing.assert_allclose(tr.get_retval(), want, rtol=1e-5, atol=1e-6)


def test_under_vmap_and_jit():
    network = FlaxModule(Net()).bind(initial())
    keys = jax.random.split(KEY, 3)
    traces = jax.jit(jax.vmap(lambda key, x: network.simulate(key, (x,))[1]))(keys, X[:3, None])
    assert traces.get_retval().shape == (3, 1, 2)
    weights = jax.vmap(lambda key, x: network.importance(key, {}, (x,))[1][0])(keys, X[:3, None])
    assert weights.shape == (3,)


def test_a_forward_sample_needs_no_stream_of_choices():
    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            return FlaxModule(nn.Dense(2))(x)

    variables = Layers().init(KEY, X)
    same(Layers().apply(variables, X), nn.Dense(2).apply({"params": variables["params"]["Dense_0"]}, X))


# What Flax's modules do ----------------------------------------------------------------------------------------------


def test_batch_statistics_move_as_in_flax():
    variables = initial()
    rngs = {"dropout": jax.random.key(5)}
    want, changed = Net().apply(variables, X, train=True, rngs=rngs, mutable=["batch_stats"])
    network = FlaxModule(Net(), kwargs={"train": True})
    options = {"rngs": rngs, "mutable": ["batch_stats"]}
    (_, tr), new = network.apply(variables, KEY, (X,), method="simulate", **options)
    same(new, changed)
    same(tr.get_retval(), want)
    (_, (_, _, tr, _)), new = network.apply(changed | variables, KEY, tr, {}, (X,), method="update", **options)
    same(new, changed)
    # Read only, they stay.
    _, tr = FlaxModule(Net()).bind(variables).simulate(KEY, (X,))
    same(tr.get_retval(), Net().apply(variables, X))


def test_intermediates_are_sown():
    class Sows(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "h", 2.0 * x)
            return x

    _, state = FlaxModule(Sows()).apply({}, KEY, (X,), method="simulate", mutable=["intermediates"])
    same(state["intermediates"]["h"][0], 2.0 * X)


@gen
def noisy(x):
    h = trace("h", FlaxModule(Net(), kwargs={"train": True}))(x)
    return trace("y", Normal)(h, 1.0)


def test_dropout_is_untraced_randomness():
    variables = jax.jit(noisy.init)(KEY, X)
    bound = noisy.bind(variables, rngs={"dropout": KEY}, mutable=["batch_stats"])
    _, tr = noisy.apply(variables, KEY, (X,), method="simulate", rngs={"dropout": KEY}, mutable=["batch_stats"])[0]
    calls = [
        lambda **options: bound.unzip(KEY, {}, **options)[1](tr.strip(), X),
        lambda **options: bound.choice_grad(KEY, tr, select("y"), **options),
        lambda **options: bound.arg_grad(KEY, tr, 0, **options),
        lambda **options: bound.score_params(KEY, tr, variables["params"], **options),
        lambda **options: bound.param_grad(KEY, tr, variables["params"], **options),
    ]
    for call in calls:
        with pytest.raises(gjflax.UntracedRandomnessError, match="dropout"):
            jax.eval_shape(call)
        jax.eval_shape(lambda call=call: call(untraced="allow"))


def test_the_dropped_units_are_those_of_the_stream():
    variables = initial()
    network = FlaxModule(Net(rate=0.5), kwargs={"train": True})
    outputs = []
    for seed in (1, 1, 2):
        rngs = {"dropout": jax.random.key(seed)}
        (_, tr), _ = network.apply(variables, KEY, (X,), method="simulate", rngs=rngs, mutable=["batch_stats"])
        outputs.append(np.asarray(tr.get_retval()))
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.any(outputs[0] != outputs[2])


def test_keywords_of_a_call():
    variables = jax.jit(noisy.init)(KEY, X)

    @gen
    def by_keyword(x):
        return trace("h", FlaxModule(Net()))(x, train=True)

    @gen
    def by_position(x):
        return trace("h", FlaxModule(Net()))(x, True)

    options = {"method": "simulate", "rngs": {"dropout": KEY}, "mutable": ["batch_stats"]}
    for model in (by_keyword, by_position):
        (_, tr), new = model.apply(variables, KEY, (X,), **options)
        assert np.any(new["batch_stats"]["Net_0"]["BatchNorm_0"]["mean"] != 0.0)
        (_, (_, weight, again, _)), _ = model.apply(variables, KEY, tr, {}, (X,), **{**options, "method": "update"})
        assert jax.tree.structure(again) == jax.tree.structure(tr)
    with pytest.raises(gjflax.ArgumentError, match="trian"):
        gen(lambda x: trace("h", FlaxModule(Net()))(x, trian=True)).init(KEY, X)

    class KeywordOnly(nn.Module):
        def __call__(self, x, *, scale=1.0):
            return scale * x

    with pytest.raises(gjflax.ArgumentError, match=r"kwargs=\{'scale': ...\}"):
        gen(lambda x: trace("h", FlaxModule(KeywordOnly()))(x, scale=2.0)).simulate(KEY, (X,))
    _, tr = FlaxModule(KeywordOnly(), kwargs={"scale": 2.0}).simulate(KEY, (X,))
    same(tr.get_retval(), 2.0 * X)


def test_another_method():
    network = FlaxModule(Net(), method="features")
    assert network.init(KEY, X) == {}
    _, tr = network.simulate(KEY, (X,))
    same(tr.get_retval(), 2.0 * X)
    with pytest.raises(gjflax.ArgumentError, match="no method `nothing`"):
        FlaxModule(Net(), method="nothing")


def test_what_is_no_module_is_refused():
    for wrong in (Net, lambda x: x, 3.0):
        with pytest.raises(gjflax.ArgumentError, match="takes a Flax module"):
            FlaxModule(wrong)
    with pytest.raises(gjflax.ArgumentError, match="generative function already"):
        FlaxModule(Normal)
    with pytest.raises(gjflax.ArgumentError, match="must hash"):
        FlaxModule(Net(), kwargs={"mask": jnp.ones(3)})
    with pytest.raises(gjflax.ArgumentError, match="dict of keyword arguments"):
        FlaxModule(Net(), True)
    with pytest.raises(gjflax.UnboundParametersError):
        FlaxModule(Net()).simulate(KEY, (X,))


def test_equal_modules_make_equal_traces():
    variables = initial()
    structures = {
        jax.tree.structure(FlaxModule(Net(), kwargs={"train": False}).bind(variables).simulate(KEY, (X,))[1])
        for _ in range(2)
    }
    assert len(structures) == 1


def test_outputs_of_any_structure():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return {"mean": nn.Dense(1)(x), "kind": "gaussian"}, None

    network = FlaxModule(Two())
    _, tr = jax.jit(network.bind(network.init(KEY, X)).simulate)(KEY, (X,))
    output, nothing = tr.get_retval()
    assert output["kind"] == "gaussian" and output["mean"].shape == (4, 1) and nothing is None

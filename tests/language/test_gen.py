"""Bodies: addresses, arguments, return values, modules inside, and how they nest."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gjflax
from gjflax import Diff, GenModule, Map, Normal, gen, select, trace

KEY = jax.random.key(0)
X = jnp.array([0.5, -1.0, 2.0])


def norm(value: Any, mean: Any, scale: Any = 1.0) -> Any:
    return np.sum(jax.scipy.stats.norm.logpdf(value, mean, scale))


def shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


def run(model: Any, *args: Any) -> tuple[Any, Any]:
    """The variables of a model, and a trace under them."""
    variables = model.init(KEY, *args)
    return variables, model.bind(variables).simulate(KEY, args)[1]


# Addresses and arguments ---------------------------------------------------------------------------------------------


@gen
def line(x, slope=2.0, scale=0.5):
    return trace("y", Normal)(slope * x, scale)


def test_addresses_may_be_tuples():
    @gen
    def model():
        trace(("a", "b"), Normal)(0.0, 1.0)
        trace(("a", "c", "d"), line)(1.0)
        return trace("e", Normal)(0.0, 1.0)

    _, tr = model.simulate(KEY, ())
    assert tr.strip().addresses() == [("a", "b"), ("a", "c", "d", "y"), ("e",)]
    _, (weight, again) = model.importance(KEY, {"a": {"b": 0.5, ("c", "d", "y"): 1.0}}, ())
    np.testing.assert_allclose(weight, norm(0.5, 0.0) + norm(1.0, 2.0, 0.5), rtol=1e-5)
    _, (_, weight, _, discard) = model.update(KEY, again, {("a", "c"): {("d", "y"): 0.0}}, ())
    np.testing.assert_allclose(weight, norm(0.0, 2.0, 0.5) - norm(1.0, 2.0, 0.5), rtol=1e-5)
    assert discard.to_dict() == {"a": {"c": {"d": {"y": 1.0}}}}
    _, share = model.project(KEY, again, select(("a", "c")))
    np.testing.assert_allclose(share, norm(1.0, 2.0, 0.5), rtol=1e-5)


@pytest.mark.parametrize(
    "call, mean, scale",
    [
        (lambda: trace("v", line)(1.0), 2.0, 0.5),
        (lambda: trace("v", line)(1.0, 3.0), 3.0, 0.5),
        (lambda: trace("v", line)(x=1.0), 2.0, 0.5),
        (lambda: trace("v", line)(1.0, scale=4.0), 2.0, 4.0),
        (lambda: trace("v", line)(slope=5.0, x=1.0), 5.0, 0.5),
        (lambda: trace("v", line)(scale=4.0, slope=5.0, x=1.0), 5.0, 4.0),
    ],
)
def test_keywords_and_defaults_follow_the_signature(call: Any, mean: float, scale: float):
    @gen
    def model():
        return call()

    _, (_, score) = model.assess(KEY, {"v": {"y": 1.5}}, ())
    np.testing.assert_allclose(score, norm(1.5, mean, scale), rtol=1e-5)


def test_keywords_of_a_module_and_a_distribution():
    class Affine(GenModule):
        features: int

        @nn.compact
        def __call__(self, x, scale=1.0):
            return trace("y", Normal)(nn.Dense(self.features)(x), scale=scale)

    class Model(GenModule):
        @nn.compact
        def __call__(self, x):
            return trace("v", Affine(2))(scale=3.0, x=x)

    variables, tr = run(Model(), X)
    mean = X @ variables["params"]["Affine_0"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(tr.get_score(), norm(tr["v", "y"], mean, 3.0), rtol=1e-5)


def test_a_direct_call_gives_arguments_by_position_only_where_they_are_given():
    key, tr = line.simulate(KEY, (1.0,))
    assert len(tr.get_args()) == 1
    np.testing.assert_allclose(tr.get_score(), norm(tr["y"], 2.0, 0.5), rtol=1e-5)
    # Arguments that are left out are reset to their defaults, not kept.
    _, full = line.simulate(key, (1.0, 7.0, 0.1))
    _, (_, weight, new, _) = line.update(key, full, {}, (1.0,))
    np.testing.assert_allclose(weight, norm(full["y"], 2.0, 0.5) - full.get_score(), rtol=1e-4)
    assert len(new.get_args()) == 1


def test_any_number_of_arguments():
    @gen
    def mean_of(*xs):
        return trace("y", Normal)(sum(xs), 1.0)

    @gen
    def model():
        return trace("v", mean_of)(1.0, 2.0, 3.0)

    _, (_, score) = model.assess(KEY, {"v": {"y": 0.0}}, ())
    np.testing.assert_allclose(score, norm(0.0, 6.0), rtol=1e-6)


@pytest.mark.parametrize(
    "retval",
    [None, {"a": jnp.arange(2.0), "b": None}, (1.0, "text"), [jnp.ones(())], "text", 3, True, jnp.tanh],
    ids=lambda value: type(value).__name__,
)
def test_a_body_may_return_anything(retval: Any):
    @gen
    def model():
        trace("x", Normal)(0.0, 1.0)
        return retval

    key, tr = model.simulate(KEY, ())
    _, compiled = jax.eval_shape(lambda key: model.simulate(key, ()), KEY)
    assert jax.tree.structure(compiled) == jax.tree.structure(tr)
    assert jax.tree.structure(tr.get_retval()) == jax.tree.structure(retval)
    jax.tree.map(lambda a, b: a is b or np.testing.assert_array_equal(a, b), tr.get_retval(), retval)
    _, (again, _) = model.assess(key, tr.strip(), ())
    assert jax.tree.structure(again) == jax.tree.structure(retval)
    _, (retdiff, _, new, _) = model.update(key, tr, {}, ())
    assert jax.tree.structure(Diff.primal(retdiff)) == jax.tree.structure(retval)
    assert jax.tree.structure(new) == jax.tree.structure(tr)


def test_a_body_without_choices():
    @gen
    def model(x):
        return 2 * x

    key, tr = model.simulate(KEY, (3.0,))
    assert tr.get_score() == 0.0 and tr.strip().is_empty() and tr.get_retval() == 6.0
    _, (weight, _) = model.importance(key, {}, (3.0,))
    _, (retval, score) = model.assess(key, {}, (4.0,))
    assert weight == 0.0 and score == 0.0 and retval == 8.0
    _, (_, weight, new, discard) = model.update(key, tr, {}, (5.0,))
    assert weight == 0.0 and discard.is_empty() and new.get_retval() == 10.0
    _, (_, weight, _) = model.regenerate(key, tr, gjflax.AllSelection(), (3.0,))
    assert weight == 0.0
    with pytest.raises(gjflax.UnvisitedConstraintError, match='"x".*No address'):
        model.importance(key, {"x": 1.0}, (3.0,))

    @gen
    def outer():
        return trace("inner", model)(trace("x", Normal)(0.0, 1.0))

    _, tr = outer.simulate(key, ())
    assert tr.strip().addresses() == [("x",)]
    np.testing.assert_allclose(tr.get_retval(), 2 * tr["x"])


def test_a_body_may_close_over_values():
    def make(scale, shift):
        @gen
        def model():
            return trace("x", Normal)(shift, scale)

        return model

    one, two = make(1.0, jnp.float32(0.5)), make(2.0, jnp.float32(0.5))
    assert one != two
    for model, scale in ((one, 1.0), (two, 2.0)):
        _, tr = model.simulate(KEY, ())
        np.testing.assert_allclose(tr.get_score(), norm(tr["x"], 0.5, scale), rtol=1e-5)
    # What is closed over may be traced, as in a loss: its gradient is there.
    grad = jax.grad(lambda shift: make(1.0, shift).assess(KEY, {"x": 2.0}, ())[1][1])(0.5)
    np.testing.assert_allclose(grad, 1.5, rtol=1e-6)


def test_inference_inside_a_body():
    """Another model is run by hand, with a key of its own; its choices are none of this body's."""

    @gen
    def prior():
        return trace("q", Normal)(0.0, 1.0)

    @gen
    def model(keys):
        _, traces = jax.vmap(lambda key: prior.simulate(key, ()))(keys)
        _, (weight, _) = prior.importance(keys[0], {"q": 1.0}, ())
        return trace("x", Normal)(jnp.mean(traces["q"]) + weight, 1.0)

    @jax.jit
    def both(key, keys):
        _, traces = jax.vmap(lambda key: prior.simulate(key, ()))(keys)
        return model.simulate(key, (keys,))[1], jnp.mean(traces["q"]) + jax.scipy.stats.norm.logpdf(1.0)

    tr, mean = both(KEY, jax.random.split(KEY, 7))
    assert tr.strip().addresses() == [("x",)]
    np.testing.assert_allclose(tr.get_score(), norm(tr["x"], mean), rtol=1e-4)
    mapped = jax.eval_shape(lambda key: Map(model, in_axes=0).simulate(key, (jax.random.split(key, (3, 2)),))[1], KEY)
    assert mapped["x"].shape == (3,)


def test_a_body_may_use_transformations_around_what_has_no_choice():
    @gen
    def model(x):
        slope = trace("slope", Normal)(0.0, 1.0)
        grad = jax.grad(lambda v: jnp.sin(slope * v))(x)
        total, _ = jax.lax.scan(lambda c, v: (c + slope * v, None), 0.0, jnp.arange(3.0))
        return trace("y", Normal)(grad + total, 1.0)

    _, tr = model.simulate(KEY, (0.4,))
    mean = tr["slope"] * np.cos(tr["slope"] * 0.4) + 3 * tr["slope"]
    np.testing.assert_allclose(tr.get_score(), norm(tr["slope"], 0.0) + norm(tr["y"], mean), rtol=1e-4)


def test_gen_of_gen_is_itself():
    assert gen(line) is line


def test_gen_takes_a_combinator():
    @gen(Map, in_axes=(0, None))
    def lines(x, slope):
        return trace("y", Normal)(slope * x, 1.0)

    assert isinstance(lines, Map)
    _, tr = lines.simulate(KEY, (X, 2.0))
    np.testing.assert_allclose(tr.get_score(), norm(tr["y"], 2 * X), rtol=1e-5)


# Modules -------------------------------------------------------------------------------------------------------------


class Setup(GenModule):
    """The setup style, with fields."""

    features: int
    scale: float = 0.5

    def setup(self):
        self.hidden = nn.Dense(4)
        self.out = nn.Dense(self.features)

    def __call__(self, x):
        z = trace("z", Normal)(self.hidden(x), 1.0)
        return self.emit(z)

    def emit(self, z):
        return trace("y", Normal)(self.out(nn.tanh(z)), self.scale)


class Compact(GenModule):
    """The same as one compact method."""

    features: int
    scale: float = 0.5

    @nn.compact
    def __call__(self, x):
        z = trace("z", Normal)(nn.Dense(4, name="hidden")(x), 1.0)
        return trace("y", Normal)(nn.Dense(self.features, name="out")(nn.tanh(z)), self.scale)


def test_setup_and_compact_are_the_same_model():
    variables, tr = run(Setup(2), X)
    assert shapes(variables) == shapes(Compact(2).init(KEY, X))
    for model in (Setup(2), Compact(2)):
        _, (_, score) = model.bind(variables).assess(KEY, tr.strip(), (X,))
        p = variables["params"]
        mean_z = X @ p["hidden"]["kernel"] + p["hidden"]["bias"]
        mean_y = jnp.tanh(tr["z"]) @ p["out"]["kernel"] + p["out"]["bias"]
        np.testing.assert_allclose(score, norm(tr["z"], mean_z) + norm(tr["y"], mean_y, 0.5), rtol=1e-5)


def test_fields_tell_models_apart():
    assert Setup(2) == Setup(2) and hash(Setup(2)) == hash(Setup(2))
    assert Setup(2) != Setup(3) and Setup(2, 0.1) != Setup(2)
    assert run(Setup(2), X)[1].get_gen_fn() == Setup(2)


class Deeper(Compact):
    """Calls the body of the class above: its choices and parameters are this body's own."""

    @nn.compact
    def __call__(self, x, gain=1.0):
        y = super().__call__(x)
        return trace("more", Normal)(gain * nn.Dense(1, name="last")(y), 1.0)


class Evenmore(Deeper):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x, 2.0) + trace("most", Normal)(0.0, 1.0)


def test_super_calls_the_body_of_the_class_above():
    variables, tr = run(Evenmore(2), X)
    assert set(variables["params"]) == {"hidden", "out", "last"}
    assert set(tr.strip().names()) == {"z", "y", "more", "most"}
    above = {name: variables["params"][name] for name in ("hidden", "out")}
    _, (_, score) = Compact(2).bind({"params": above}).assess(KEY, tr.strip().filter(select("z", "y")), (X,))
    mean = 2 * (tr["y"] @ variables["params"]["last"]["kernel"])
    np.testing.assert_allclose(tr.get_score(), score + norm(tr["more"], mean) + norm(tr["most"], 0.0), rtol=1e-5)
    _, (_, weight, _, _) = Evenmore(2).bind(variables).update(KEY, tr, {"z": jnp.zeros(4)}, (X,))
    assert jnp.isfinite(weight)


class Layer(nn.Module):
    """A plain Flax module with choices in it, which are those of the body that calls it."""

    features: int

    @nn.compact
    def __call__(self, x):
        noise = trace("noise", Normal)(jnp.zeros(self.features), 0.1)
        return nn.Dense(self.features)(x) + noise + trace("net", network)(x)


network = Compact(2)


def test_a_plain_module_may_trace_inside_a_body():
    class Model(GenModule):
        @nn.compact
        def __call__(self, x):
            return trace("y", Normal)(Layer(2, name="layer")(x), 1.0)

    variables, tr = run(Model(), X)
    assert set(tr.strip().names()) == {"noise", "net", "y"}
    # The free callee is a submodule of the module whose method called it.
    assert set(variables["params"]["layer"]) == {"Dense_0", "net"}
    p = variables["params"]["layer"]
    mean = X @ p["Dense_0"]["kernel"] + tr["noise"] + tr["net", "y"]
    _, (_, inner) = network.bind({"params": p["net"]}).assess(KEY, tr.strip()["net"], (X,))
    want = norm(tr["noise"], 0.0, 0.1) + inner + norm(tr["y"], mean)
    np.testing.assert_allclose(tr.get_score(), want, rtol=1e-5)
    with pytest.raises(gjflax.TraceContextError, match="noise"):
        Layer(2).init(KEY, X)


def test_submodules_of_all_kinds_are_callees():
    """From setup, from a list of setup, from a field, made inline, and global."""

    class Model(GenModule):
        field: Any

        def setup(self):
            self.own = Compact(2)
            self.several = [Compact(1), Compact(1)]

        @nn.compact
        def __call__(self, x):
            y = trace("own", self.own)(x)
            y = y + sum(trace(f"several{i}", module)(x) for i, module in enumerate(self.several))
            y = y + trace("field", self.field)(x)
            y = y + trace("inline", Compact(2, name="named"))(x)
            return y + trace("global", network)(x)

    model = Model(field=Compact(2))
    variables, tr = run(model, X)
    assert set(variables["params"]) == {"own", "several_0", "several_1", "field", "named", "global"}
    assert set(tr.strip().names()) == {"own", "several0", "several1", "field", "inline", "global"}
    names = {
        "own": "own",
        "several0": "several_0",
        "several1": "several_1",
        "field": "field",
        "inline": "named",
        "global": "global",
    }
    want = 0.0
    for address, name in names.items():
        callee = Compact(1 if "several" in address else 2)
        want += callee.bind({"params": variables["params"][name]}).assess(KEY, tr.strip()[address], (X,))[1][1]
    np.testing.assert_allclose(tr.get_score(), want, rtol=1e-5)


def test_a_tuple_address_names_its_submodule():
    @gen
    def model(x):
        return trace(("a", "b"), network)(x)

    assert set(model.init(KEY, X)["params"]) == {"a_b"}


# Parameters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True], ids=["direct", "nested"])
def test_a_trace_made_under_old_parameters_gets_the_right_weight(wrapped: bool):
    @gen
    def outer(x):
        return trace("inner", network)(x)

    model = outer if wrapped else network
    variables, tr = run(model, X)
    moved = jax.tree.map(lambda p: p + 0.1, variables)
    bound = model.bind(moved)
    _, (_, new_score) = bound.assess(KEY, tr.strip(), (X,))
    unchanged = (Diff.no_change(X),)
    _, (_, weight, new, _) = bound.update(KEY, tr, {}, unchanged)
    np.testing.assert_allclose(weight, new_score - tr.get_score(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new.get_score(), new_score, rtol=1e-5)
    _, (_, weight, new) = bound.regenerate(KEY, tr, select(), unchanged)
    np.testing.assert_allclose(weight, new_score - tr.get_score(), rtol=1e-4, atol=1e-5)
    # A kernel says that its parameters stay: then they do, and the weight is that of the choices.
    _, (_, weight, _, _) = model.bind(variables).update(KEY, tr, {}, unchanged, param_diff=Diff.no_change)
    np.testing.assert_allclose(weight, 0.0, atol=1e-5)
    _, (_, weight, _) = model.bind(variables).regenerate(KEY, tr, select(), unchanged, param_diff=Diff.no_change)
    np.testing.assert_allclose(weight, 0.0, atol=1e-5)


def test_parameters_of_an_update_may_be_differentiated():
    """The weight of an update, as a function of the new parameters, has the gradient of their score."""
    variables, tr = run(network, X)

    def weight(params):
        return network.apply({"params": params}, KEY, tr, {}, (X,), method="update")[1][1]

    grads = jax.grad(weight)(variables["params"])
    _, want = network.param_grad(KEY, tr, variables["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, want)

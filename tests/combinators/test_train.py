"""`TrainCombinator`: a generative function whose last argument is learned."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from flax.training.train_state import TrainState

from gjflax import Diff, GenModule, Map, Normal, TrainCombinator, gen, select, trace

KEY = jax.random.key(0)


@gen(TrainCombinator, params={"slope": 0.5, "noise": {"log": np.float32(-0.5)}})
def line(x, params):
    return trace("y", Normal)(params["slope"] * x, jnp.exp(params["noise"]["log"]))


INITIAL = {"slope": jnp.float32(0.5), "noise": {"log": jnp.float32(-0.5)}}
TRAINED = {"slope": jnp.float32(3.0), "noise": {"log": jnp.float32(0.2)}}


def density(y: Any, x: Any, params: Any) -> Any:
    return jnp.sum(jax.scipy.stats.norm.logpdf(y, params["slope"] * x, jnp.exp(params["noise"]["log"])))


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_parameters_are_in_the_collection_under_their_names():
    for variables in (line.init(KEY, 1.0), line.init(KEY, KEY, (1.0,), method="simulate")):
        assert set(variables) == {"params"}
        jax.tree.map(np.testing.assert_array_equal, variables["params"], INITIAL)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(variables)), "an optimiser would change its type"


def test_unbound_it_starts_from_its_initial_values():
    key, tr = line.simulate(KEY, (2.0,))
    close(tr.get_score(), density(tr["y"], 2.0, INITIAL))
    jax.tree.map(np.testing.assert_array_equal, tr.get_args(), (jnp.float32(2.0), INITIAL))
    _, (_, score) = line.assess(key, {"y": 1.0}, (2.0,))
    close(score, density(1.0, 2.0, INITIAL))
    _, (weight, _) = line.importance(key, {"y": 1.0}, (2.0,))
    close(weight, score)


def test_bound_it_runs_under_the_parameters_in_scope():
    bound = line.bind({"params": TRAINED})
    key, tr = bound.simulate(KEY, (2.0,))
    close(tr.get_score(), density(tr["y"], 2.0, TRAINED))
    jax.tree.map(np.testing.assert_array_equal, tr.get_args()[-1], TRAINED)
    _, logpdf = line.score_params(key, tr, INITIAL)
    close(logpdf, density(tr["y"], 2.0, INITIAL))
    _, grads = line.param_grad(key, tr, TRAINED)
    jax.tree.map(close, grads, jax.grad(lambda p: density(tr["y"], 2.0, p))(TRAINED))


def nested(model: Any) -> tuple[Any, Any, Any, Any]:
    """A model that contains `line`, with its variables by those of `line`, and arguments."""

    @gen
    def caller(x):
        return trace("inner", model)(x)

    return caller, lambda params: {"inner": params}, ("inner", "y"), (2.0,)


CASES = {
    "alone": (line, lambda params: params, "y", (2.0,)),
    "called": nested(line),
    "mapped": (Map(line, in_axes=0), lambda params: params, "y", (jnp.array([2.0, -1.0, 0.5]),)),
    "a mapped caller": (Map(nested(line)[0], in_axes=0), lambda p: {"inner": p}, ("inner", "y"), (jnp.arange(3.0),)),
    "a map that is called": (
        nested(Map(line, in_axes=0))[0],
        lambda p: {"inner": p},
        ("inner", "y"),
        (jnp.arange(3.0),),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_trace_brings_its_parameters_along(name: str):
    """Unbound, given a trace, a model runs with the parameters that the trace was made with, wherever they stand."""
    model, tree, address, args = CASES[name]
    key, tr = model.bind({"params": tree(TRAINED)}).simulate(KEY, args)
    y = tr[address]
    close(tr.get_score(), density(y, args[0], TRAINED))
    other = jax.tree.map(lambda x: x + 1.0, args)

    @jax.jit
    def unbound(tr):
        return (
            model.update(key, tr, {}, args)[1][1],
            model.update(key, tr, {}, other)[1][1],
            model.regenerate(key, tr, select(), other)[1][1],
            model.choice_grad(key, tr, select(address))[1][address],
            model.arg_grad(key, tr)[1],
        )

    same, moved, kept, in_choice, in_argument = unbound(tr)
    close(same, 0.0)
    want = density(y, other[0], TRAINED) - density(y, args[0], TRAINED)
    close(moved, want)
    close(kept, want)
    close(in_choice, jax.grad(density)(y, args[0], TRAINED))
    close(in_argument, jax.grad(density, argnums=1)(y, args[0], TRAINED))


def test_update_weighs_a_change_of_parameters():
    key, tr = line.bind({"params": TRAINED}).simulate(KEY, (2.0,))
    now = {"slope": jnp.float32(-1.0), "noise": {"log": jnp.float32(0.7)}}
    bound = line.bind({"params": now})
    want = density(tr["y"], 2.0, now) - tr.get_score()
    for argdiffs in ((2.0,), (Diff.no_change(2.0),), (2.0, now)):
        _, (_, weight, new, _) = bound.update(key, tr, {}, argdiffs)
        close(weight, want)
        jax.tree.map(np.testing.assert_array_equal, new.get_args()[-1], now)
        _, (_, weight, _) = bound.regenerate(key, tr, select(), argdiffs)
        close(weight, want)


def test_kernels_keep_the_parameters():
    """They pass ``trace.get_args()``, or say that parameters did not change."""
    key, tr = line.bind({"params": TRAINED}).simulate(KEY, (2.0,))
    bound = line.bind({"params": INITIAL})
    _, (_, weight, new, _) = bound.update(key, tr, {"y": 1.0}, tuple(map(Diff.no_change, tr.get_args())))
    close(weight, density(1.0, 2.0, TRAINED) - tr.get_score())
    _, (_, weight, again, _) = bound.update(key, tr, {"y": 1.0}, (2.0,), param_diff=Diff.no_change)
    close(weight, density(1.0, 2.0, TRAINED) - tr.get_score())
    jax.tree.map(np.testing.assert_array_equal, new, again)


@pytest.mark.parametrize(
    "params",
    [
        freeze({"n": {"mu": 0.5}}),
        {"n": freeze({"mu": 0.5})},
        {"n": {"mu": jnp.float32(0.5)}},
        {"n": {"mu": np.float64(0.5)}},
    ],
    ids=["frozen", "frozen inside", "jax", "numpy"],
)
def test_initial_values_of_all_kinds(params: Any):
    model = TrainCombinator(gen(lambda p: trace("x", Normal)(p["n"]["mu"], 1.0)), params=params)
    variables = model.init(KEY)
    assert isinstance(variables["params"]["n"], dict) and variables["params"]["n"]["mu"] == 0.5
    _, tr = model.bind(variables).simulate(KEY, ())
    close(tr.get_score(), jax.scipy.stats.norm.logpdf(tr["x"], 0.5))


def test_initial_values_may_be_lists():
    model = TrainCombinator(gen(lambda p: trace("x", Normal)(p["w"][0] + p["w"][1], 1.0)), params={"w": [0.5, 1.0]})
    _, (_, score) = model.bind({"params": {"w": [1.0, 2.0]}}).assess(KEY, {"x": 0.0}, ())
    close(score, jax.scipy.stats.norm.logpdf(0.0, 3.0))


def test_it_hashes_and_compares_by_its_initial_values():
    def make(value):
        return TrainCombinator(inner, params={"w": np.array(value, np.float32)})

    inner = gen(lambda p: trace("x", Normal)(p["w"], 1.0))
    assert make([1.0, 2.0]) == make([1.0, 2.0]) and hash(make([1.0, 2.0])) == hash(make([1.0, 2.0]))
    assert make([1.0, 2.0]) != make([1.0, 3.0])
    assert make([1.0, 2.0]) != TrainCombinator(inner, params={"v": np.array([1.0, 2.0], np.float32)})
    assert make([1.0, 2.0]).simulate(KEY, ())[1].get_gen_fn() == make([1.0, 2.0])


class Network(GenModule):
    @nn.compact
    def __call__(self, x, outer, params):
        return trace("y", Normal)(nn.Dense(2)(x) + params["shift"] + outer["shift"], jnp.exp(outer["log_scale"]))


def test_parameters_of_the_inner_function_are_in_the_same_tree():
    model = TrainCombinator(
        TrainCombinator(Network(), params={"shift": np.zeros(2, np.float32)}),
        params={"log_scale": 0.1, "shift": 1.0},
    )
    with pytest.raises(Exception, match="shift"):
        model.init(KEY, jnp.ones(3))
    model = TrainCombinator(TrainCombinator(Scaled(), params={"shift": 1.0}), params={"log_scale": 0.1})
    x = jnp.ones(3)
    variables = model.init(KEY, x)
    assert set(variables["params"]) == {"Dense_0", "shift", "log_scale"}
    _, tr = model.bind(variables).simulate(KEY, (x,))
    p = variables["params"]
    mean = x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"] + 1.0
    close(tr.get_score(), jax.scipy.stats.norm.logpdf(tr["y"], mean, np.exp(0.1)).sum())


class Scaled(GenModule):
    @nn.compact
    def __call__(self, x, outer, inner):
        return trace("y", Normal)(nn.Dense(2)(x) + inner["shift"], jnp.exp(outer["log_scale"]))


def test_maximum_likelihood_in_a_train_state():
    """The optimum is least squares, and the residual's standard deviation."""
    rng = np.random.default_rng(0)
    xs = jnp.asarray(rng.normal(size=40), jnp.float32)
    ys = 1.7 * xs + 0.6 * jnp.asarray(rng.normal(size=40), jnp.float32)
    mapped = Map(line, in_axes=0)
    state = TrainState.create(apply_fn=mapped.apply, params=mapped.init(KEY, xs)["params"], tx=optax.sgd(5e-3))

    @jax.jit
    def train(state):
        def step(state, _):
            def loss(params):
                _, (_, score) = state.apply_fn({"params": params}, KEY, {"y": ys}, (xs,), method="assess")
                return -score

            value, grads = jax.value_and_grad(loss)(state.params)
            return state.apply_gradients(grads=grads), value

        return jax.lax.scan(step, state, length=300)

    state, losses = train(state)
    slope = np.sum(xs * ys) / np.sum(xs**2)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(state.params["slope"], slope, rtol=1e-3)
    np.testing.assert_allclose(
        np.exp(state.params["noise"]["log"]), np.sqrt(np.mean((ys - slope * xs) ** 2)), rtol=1e-3
    )


def test_traced_parameters_go_by_bind():
    """A gradient through `bind` is that of `score_params`."""
    key, tr = line.simulate(KEY, (2.0,))
    by_bind = jax.grad(lambda p: line.bind({"params": p}).assess(key, tr.strip(), (2.0,))[1][1])(TRAINED)
    jax.tree.map(close, by_bind, line.param_grad(key, tr, TRAINED)[1])

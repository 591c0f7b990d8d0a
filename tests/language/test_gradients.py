"""Gradients against central finite differences in double precision, at every choice, argument and parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import gjflax
from gjflax import (
    Bernoulli,
    Exponential,
    Gamma,
    GenModule,
    Map,
    Normal,
    TrainCombinator,
    choice_map,
    gen,
    select,
    trace,
)

STEP = 1e-5


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def by_differences(function: Callable[[Any], Any], at: Any) -> Any:
    """The gradient of a function of a tree, by central differences; integers are held, and come back as they are.

    With all leaves one vector, the function is evaluated at each of its points in one compiled call.
    """
    is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(at)]
    point, to_leaves = ravel_pytree([leaf for leaf, here in zip(jax.tree.leaves(at), is_float, strict=True) if here])

    def unravel(point: Any) -> Any:
        parts = iter(to_leaves(point))
        leaves = [next(parts) if here else leaf for leaf, here in zip(jax.tree.leaves(at), is_float, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(at), leaves)

    steps = STEP * jnp.eye(point.size)
    values = jax.jit(jax.vmap(lambda shift: function(unravel(point + shift))))(jnp.concatenate([steps, -steps]))
    return unravel((values[: point.size] - values[point.size :]) / (2 * STEP))


def close(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), got, want)


def dense(features: int) -> Any:
    return nn.Dense(features, param_dtype=jnp.float64)


class Network(GenModule):
    @nn.compact
    def __call__(self, x, scale):
        z = trace("z", Normal)(jnp.zeros(2), scale)
        coin = trace("coin", Bernoulli)(logits=z[0])
        h = nn.tanh(dense(3)(jnp.concatenate([z, x])))
        return trace("y", Normal)(dense(2)(h) + coin.astype(x.dtype), 0.5)


@gen
def inner(rate):
    scale = trace("scale", Gamma)(2.0, rate)
    return trace(("out", "v"), Normal)(jnp.sin(rate) * jnp.ones(2), scale)


@gen(TrainCombinator, params={"mu": np.float64(0.4), "net": {"w": np.array([0.5, -1.5])}})
def learned(x, params):
    h = trace("h", Normal)(params["mu"], 0.8)
    return trace("y", Normal)(params["net"]["w"] @ x + h**2, jnp.exp(params["mu"]))


class Everything(GenModule):
    """A mapped network, a learned function, supports and discrete choices in one model."""

    @nn.compact
    def __call__(self, x):
        rate = trace("rate", Exponential)(1.0 + jnp.sum(x["a"] ** 2))
        first = trace("first", inner)(rate + x["b"])
        many = trace("many", Map(Network(), in_axes=(0, None)))(jnp.outer(x["a"], first), rate)
        return trace("learned", learned)(many[1])


ARGS = ({"a": np.array([0.3, -0.2]), "b": np.array(0.7)},)
SELECTIONS = (
    select("rate", ("first", "scale"), ("many", "z"), ("learned", "h")),
    select(("many", 1, "z")),
    ~select(("many", "coin")),
)


def network_args() -> tuple[Any, ...]:
    return jnp.array([0.5, -1.0, 2.0]), jnp.array(1.5)


def numbers(like: Any, seed: int) -> Any:
    """Positive numbers for what is floating point, ones for the rest: inside every support."""
    rng = np.random.default_rng(seed)

    def fill(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.ones(leaf.shape, leaf.dtype)
        return jnp.asarray(0.2 + rng.uniform(size=leaf.shape), leaf.dtype)

    return jax.tree.map(fill, like)


def setting(model: Any, args: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Parameters, the bound model, and a trace. Values are given: to draw them compiles slowly."""
    key = jax.random.key(3)
    variables = numbers(jax.eval_shape(lambda: model.init(key, *args)), 1)
    model = model.bind(variables)
    choices = numbers(jax.eval_shape(lambda: model.simulate(key, args)[1].strip()), 2)
    tr = jax.jit(lambda choices: model.importance(key, choices, args)[1][1])(choices)
    return variables["params"], model, tr


def test_gradients_in_choices_arguments_and_parameters():
    args = jax.tree.map(jnp.asarray, ARGS)
    params, model, tr = setting(Everything(), args)
    moved = jax.tree.map(lambda p: p + 0.1, params)
    key, choices = jax.random.key(0), tr.strip()

    def density(choices, args, params):
        return Everything().apply({"params": params}, key, choices, args, method="assess")[1][1]

    @jax.jit
    def gradients(tr, moved):
        return (
            [model.choice_grad(key, tr, selection)[1] for selection in SELECTIONS],
            model.arg_grad(key, tr, (0,))[1],
            Everything().param_grad(key, tr, moved)[1],
            jax.value_and_grad(lambda params: model.score_params(key, tr, params)[1])(moved),
        )

    in_choices, in_args, in_params, (logpdf, by_score) = gradients(tr, moved)
    want = by_differences(lambda at: density(at[0], at[1], params), (choices, args))
    for selection, got in zip(SELECTIONS, in_choices, strict=True):
        assert got.addresses() == choices.filter(selection).addresses(), "a gradient outside of the selection"
        close(got, want[0].filter(selection))
    close(in_args, want[1])
    want = by_differences(lambda params: density(choices, args, params), moved)
    close(in_params, want)
    close(by_score, want)
    np.testing.assert_allclose(logpdf, density(choices, args, moved), rtol=1e-10)


def test_the_first_argument_is_the_one_by_default():
    args = network_args()
    _, model, tr = setting(Network(), args)
    key = jax.random.key(0)
    jax.tree.map(np.testing.assert_array_equal, model.arg_grad(key, tr)[1], model.arg_grad(key, tr, 0)[1])
    _, (in_scale,) = model.arg_grad(key, tr, (-1,))
    np.testing.assert_allclose(in_scale, np.sum(tr["z"] ** 2) / 1.5**3 - 2 / 1.5, rtol=1e-10)


def test_choices_that_are_held_have_no_gradient():
    _, model, tr = setting(Network(), network_args())
    _, grads = model.choice_grad(jax.random.key(0), tr, select("z"))
    assert grads.addresses() == [("z",)]
    _, score, _ = model.unzip(jax.random.key(0), tr.strip().filter(~select("z")))
    with pytest.raises(gjflax.ChoiceMapError, match='"y"'):
        score({"z": tr["z"], "y": tr["y"]}, *tr.get_args())


def test_unzip_composes_with_every_order_of_differentiation():
    """Hessians forward over reverse and reverse over forward, mixed with the arguments; a third derivative."""
    args = network_args()
    _, model, tr = setting(Network(), args)
    _, score, retval = model.unzip(jax.random.key(0), tr.strip().filter(~select("z")))

    def at(z, scale):
        return score({"z": z}, args[0], scale)

    @jax.jit
    def derivatives(z, scale):
        shifts = STEP * jnp.eye(z.size)
        differences = jax.vmap(lambda e: (jax.grad(at)(z + e, scale) - jax.grad(at)(z - e, scale)) / (2 * STEP))(shifts)
        hessians = jax.jacfwd(jax.grad(at))(z, scale), jax.jacrev(jax.jacfwd(at))(z, scale)
        mixed = jax.grad(lambda scale: jnp.sum(jax.grad(at)(z, scale)))(scale)
        third = jax.grad(jax.grad(jax.grad(at, argnums=1), argnums=1), argnums=1)(z, scale)
        return at(z, scale), differences, hessians, mixed, third

    z, scale = tr["z"], args[1]
    value, differences, hessians, mixed, third = derivatives(z, scale)
    for hessian in hessians:
        np.testing.assert_allclose(hessian, differences, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(mixed, np.sum(2 * z / scale**3), rtol=1e-8)
    np.testing.assert_allclose(third, -2 * 2 / scale**3 + 12 * np.sum(z**2) / scale**5, rtol=1e-8)
    np.testing.assert_allclose(value, tr.get_score(), rtol=1e-10)
    np.testing.assert_array_equal(retval({"z": z}, *args), tr["y"])


@gen
def growing(time, state, rate):
    noise = trace("noise", Normal)(0.1 * state, rate)
    return state + noise**2


@pytest.mark.parametrize(
    "model, args, held",
    [
        (inner, (np.array(0.7),), select("scale")),
        pytest.param(Map(inner), (np.array([0.7, 1.3, 0.4]),), select(), marks=pytest.mark.slow),
        (gjflax.Unfold(growing, max_length=4), (4, np.array(0.5), np.array(0.8)), select()),
    ],
    ids=["function", "map", "unfold"],
)
def test_the_gradient_of_what_is_returned_adds_up_with_that_of_the_score(model: Any, args: Any, held: Any):
    """∇ (log p + ⟨g, return value⟩) in choices and arguments, for g a gradient that comes back from outside."""
    key = jax.random.key(0)
    args = tuple(jnp.asarray(arg) if isinstance(arg, np.ndarray) else arg for arg in args)
    _, tr = model.simulate(key, args)
    _, score, retval = model.unzip(key, tr.strip().filter(held))
    static, floating = args[:-1], args[-1]
    weights = numbers(jax.eval_shape(lambda: tr.get_retval()), 4)

    def objective(choices, floating):
        at = (choices, *static, floating)
        return score(*at) + sum(
            jnp.vdot(g, r) for g, r in zip(*map(jax.tree.leaves, (weights, retval(*at))), strict=True)
        )

    free = tr.strip().filter(~held)
    close(
        jax.jit(jax.grad(objective, argnums=(0, 1)))(free, floating),
        by_differences(lambda at: objective(*at), (free, floating)),
    )
    got = jax.grad(objective)(free, floating)
    of_score = jax.grad(lambda choices: score(choices, *static, floating))(free)
    assert any(np.any(np.abs(a - b) > 1e-3) for a, b in zip(*map(jax.tree.leaves, (got, of_score)), strict=True))


def test_unzip_splits_a_vector_of_choices():
    """Some elements of a Map are held and the others free, in any order."""
    points = Map(Normal, in_axes=(0, None))
    args = (jnp.arange(4.0), jnp.array(2.0))
    _, score, _ = points.unzip(jax.random.key(0), choice_map({3: jnp.array(1.0), 1: jnp.array(2.0)}))

    def at(values):
        return score({0: values[0], 2: values[1]}, *args)

    values = jnp.array([0.5, -0.5])
    np.testing.assert_allclose(jax.grad(at)(values), -(values - jnp.array([0.0, 2.0])) / 4, rtol=1e-10)
    want = jax.scipy.stats.norm.logpdf(jnp.array([0.5, 2.0, -0.5, 1.0]), jnp.arange(4.0), 2.0).sum()
    np.testing.assert_allclose(at(values), want, rtol=1e-10)


def test_scores_differentiate_through_traces():
    """`update`, `importance` and `simulate` are differentiable in values and arguments, as a learner needs."""

    def weight(loc, value):
        _, (w, tr) = Normal.importance(jax.random.key(0), value, (loc, jnp.array(2.0)))
        _, (_, v, new, _) = Normal.update(jax.random.key(0), tr, 2 * value, (loc, jnp.array(2.0)))
        return w + v - new.get_score()

    np.testing.assert_allclose(jax.grad(weight, argnums=(0, 1))(jnp.array(0.3), jnp.array(1.0)), (0.0, 0.0), atol=1e-12)
    draw = jax.grad(lambda loc: Normal.simulate(jax.random.key(0), (loc, jnp.array(2.0)))[1].get_retval())
    np.testing.assert_allclose(draw(jnp.array(0.3)), 1.0)

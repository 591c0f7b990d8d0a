"""Gradients against central finite differences in double precision, at every choice, argument and parameter."""

from __future__ import annotations

import dataclasses
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
    Selection,
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
    """The gradient of a function of a tree, by central differences."""
    point, unravel = ravel_pytree(at)
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
def _inner(rate):
    scale = trace("scale", Gamma)(2.0, rate)
    return trace(("out", "v"), Normal)(jnp.sin(rate) * jnp.ones(2), scale)


class Nested(GenModule):
    @nn.compact
    def __call__(self, x):
        rate = trace("rate", Exponential)(1.0 + jnp.sum(x["a"] ** 2))
        first = trace("first", _inner)(rate + x["b"])
        return trace("many", Map(Network(), in_axes=(0, None)))(jnp.outer(x["a"], first), rate)


@gen(TrainCombinator, params={"mu": np.float64(0.4), "net": {"w": np.array([0.5, -1.5])}})
def learned(x, params):
    h = trace("h", Normal)(params["mu"], 0.8)
    return trace("y", Normal)(params["net"]["w"] @ x + h**2, jnp.exp(params["mu"]))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with arguments, and the selections in whose choices it is differentiated."""

    name: str
    model: Any
    args: Callable[[], tuple[Any, ...]]
    selections: tuple[Selection, ...]


X = [0.5, -1.0, 2.0]

CASES = [
    Case(
        "network",
        Network(),
        lambda: (jnp.array(X), jnp.array(1.5)),
        (select("z"), ~select("coin")),
    ),
    Case(
        "mapped network",
        Map(Network(), in_axes=(0, None)),
        lambda: (jnp.outer(jnp.arange(3.0), jnp.array(X)), jnp.array(1.5)),
        (select((0, "z"), (2, "z")), ~select("coin")),
    ),
    Case(
        "nested",
        Nested(),
        lambda: ({"a": jnp.array([0.3, -0.2]), "b": jnp.array(0.7)},),
        (select("rate", ("first", "scale"), ("many", "z")), select(("first", "out"))),
    ),
    Case("learned", learned, lambda: (jnp.array(X[:2]),), (select("h"), select("h", "y"))),
]

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def setting(case: Case) -> tuple[Any, Any, Any, Any]:
    """Variables, a bound model, its arguments, and a trace."""
    args = case.args()
    key = jax.random.key(3)

    @jax.jit
    def make(key):
        variables = case.model.init(key, *args)
        return variables, case.model.bind(variables).simulate(key, args)[1]

    variables, tr = make(key)
    return variables, case.model.bind(variables), args, tr


@each_case
def test_choice_grad(case: Case):
    variables, model, args, tr = setting(case)
    for selection in case.selections:
        _, grads = jax.jit(lambda tr, s=selection: model.choice_grad(jax.random.key(0), tr, s))(tr)
        selected = tr.strip().filter(selection)
        assert grads.addresses() == selected.addresses(), "a gradient outside of the selection"

        def score(values):
            return model.assess(jax.random.key(0), tr.strip().overwrite(values), args)[1][1]

        close(grads, by_differences(score, selected))


@each_case
def test_arg_grad(case: Case):
    _, model, args, tr = setting(case)
    argnums = tuple(range(len(args)))
    _, grads = jax.jit(lambda tr: model.arg_grad(jax.random.key(0), tr, argnums))(tr)
    close(grads, by_differences(lambda args: model.assess(jax.random.key(0), tr.strip(), args)[1][1], args))
    _, first = model.arg_grad(jax.random.key(0), tr)
    close(first, grads[0])


@each_case
def test_param_grad_and_score_params(case: Case):
    variables, model, args, tr = setting(case)
    params = jax.tree.map(lambda p: p + 0.1, variables["params"])

    def score(params):
        return case.model.apply({"params": params}, jax.random.key(0), tr.strip(), args, method="assess")[1][1]

    want = by_differences(score, params)
    for subject in (case.model, model):
        _, logpdf = subject.score_params(jax.random.key(0), tr, params)
        np.testing.assert_allclose(logpdf, score(params), rtol=1e-10)
    _, grads = jax.jit(lambda tr, params: case.model.param_grad(jax.random.key(0), tr, params))(tr, params)
    close(grads, want)
    close(jax.jit(jax.grad(lambda params: model.score_params(jax.random.key(0), tr, params)[1]))(params), want)


def test_choices_that_are_held_have_no_gradient():
    _, model, _, tr = setting(CASES[0])
    _, grads = model.choice_grad(jax.random.key(0), tr, select("z"))
    assert grads.addresses() == [("z",)]
    _, score, _ = model.unzip(jax.random.key(0), tr.strip().filter(~select("z")))
    with pytest.raises(gjflax.ChoiceMapError, match='"y"'):
        score({"z": tr["z"], "y": tr["y"]}, *tr.get_args())


def test_unzip_composes_with_every_order_of_differentiation():
    """Hessians forward over reverse, reverse over forward, and mixed with the arguments; a third derivative."""
    _, model, args, tr = setting(CASES[0])
    _, score, retval = model.unzip(jax.random.key(0), tr.strip().filter(~select("z")))

    def at(z, scale):
        return score({"z": z}, args[0], scale)

    z, scale = tr["z"], args[1]
    want = jax.vmap(lambda row: row, in_axes=1)(by_differences_of_gradient(at, z, scale))
    for nested in (
        jax.jacfwd(jax.grad(at)),
        jax.jacrev(jax.jacfwd(at)),
        jax.hessian(at),
        jax.jit(jax.jacrev(jax.grad(at))),
    ):
        np.testing.assert_allclose(nested(z, scale), want, rtol=1e-5, atol=1e-7)
    mixed = jax.grad(lambda scale: jnp.sum(jax.grad(at)(z, scale)))(scale)
    np.testing.assert_allclose(mixed, np.sum(2 * z / scale**3), rtol=1e-8)
    third = jax.grad(jax.grad(jax.grad(at, argnums=1), argnums=1), argnums=1)(z, scale)
    np.testing.assert_allclose(third, -2 * 2 / scale**3 + 12 * np.sum(z**2) / scale**5, rtol=1e-8)
    np.testing.assert_array_equal(retval({"z": z}, *args), tr["y"])
    np.testing.assert_allclose(at(z, scale), tr.get_score(), rtol=1e-10)


def by_differences_of_gradient(function: Any, z: Any, scale: Any) -> Any:
    shifts = STEP * jnp.eye(z.size)
    grads = jax.jit(jax.vmap(lambda shift: jax.grad(function)(z + shift, scale)))(jnp.concatenate([shifts, -shifts]))
    return (grads[: z.size] - grads[z.size :]) / (2 * STEP)


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

"""Models and guides whose exact bound is a sum or a quadrature, by the combinators that they are made of.

Each is a function of estimators, one for each discrete choice of the guide in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from learning.gradients import Problem, grid, product_of, vectors_of

from gjflax import (
    AddressMap,
    Bernoulli,
    Categorical,
    Dimap,
    Enumerate,
    GenModule,
    Map,
    Marginal,
    Normal,
    Scan,
    Switch,
    Unfold,
    gen,
    trace,
)

Wrap = Callable[[Any], Any]


def plain(distribution: Any) -> Any:
    """No estimator."""
    return distribution


def real(value: Any) -> Any:
    """An integer as a float of the precision in force."""
    return value.astype(jnp.result_type(float))


def learned(module: Any, name: str, shape: tuple[int, ...] = ()) -> Any:
    return module.param(name, nn.initializers.zeros, shape)


COINS = [0, 1]


# A body ----------------------------------------------------------------------------------------------------------------


@gen
def _chain_model():
    a = trace("a", Bernoulli)(probs=0.3)
    b = trace("b", Categorical)(jnp.stack([0.5 * real(a), 0.2 + 0 * real(a), -real(a)]))
    trace("x", Normal)(real(a) - real(b), 0.8)
    return trace("y", Normal)(2.0 * real(a), 0.6)


def chain(first: Wrap, second: Wrap) -> Problem:
    """Two choices, the second of which depends on the first, in guide and model."""

    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            logit, logits = learned(self, "logit"), learned(self, "logits", (2, 3))
            a = trace("a", first(Bernoulli))(logit)
            trace("b", second(Categorical))(logits[a])

    params = {"guide": {"logit": jnp.array(0.4), "logits": jnp.array([[0.1, -0.5, 0.8], [1.0, 0.2, -0.4]])}}
    values = product_of({"a": COINS, "b": [0, 1, 2]})
    return Problem(_chain_model, Guide(), params, values, {"x": 0.3, "y": 1.1})


@gen
def _relay_model():
    trace("a", Bernoulli)(probs=0.5)
    b = trace("b", Bernoulli)(probs=0.5)
    return trace("x", Normal)(3.0 * real(b), 0.8)


def relay(first: Wrap, second: Wrap) -> Problem:
    """What the first choice costs shows in the second alone, which the guide draws from it."""

    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            a = trace("a", first(Bernoulli))(learned(self, "logit"))
            trace("b", second(Bernoulli))(learned(self, "other") + 2.0 * real(a))

    params = {"guide": {"logit": jnp.array(0.4), "other": jnp.array(-1.0)}}
    return Problem(_relay_model, Guide(), params, product_of({"a": COINS, "b": COINS}), {"x": 0.3})


@gen
def _mixed_model():
    w = trace("w", Normal)(0.5, 1.2)
    a = trace("a", Bernoulli)(probs=0.3)
    b = trace("b", Bernoulli)(w * real(a))
    return trace("x", Normal)(w + real(a) - real(b), 0.7)


def mixed(first: Wrap, second: Wrap, normal: Wrap = plain) -> Problem:
    """A coin, a Normal that depends on it, and a coin that depends on the Normal."""

    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            a = trace("a", first(Bernoulli))(learned(self, "logit"))
            w = trace("w", normal(Normal))(learned(self, "loc") + 0.6 * real(a), jnp.exp(learned(self, "log_scale")))
            trace("b", second(Bernoulli))(learned(self, "slope") * w)

    params = {"logit": jnp.array(0.3), "loc": jnp.array(-0.2), "log_scale": jnp.array(-0.4), "slope": jnp.array(0.8)}
    points, weights = grid(-7.0, 7.0, 120)
    values = product_of({"a": COINS, "w": points, "b": COINS})
    each = product_of({"a": COINS, "w": weights, "b": COINS})["w"]
    return Problem(_mixed_model, Guide(), {"guide": params}, values, {"x": 0.9}, each)


@gen
def _vector_model():
    z = trace("z", Bernoulli)(probs=np.array([0.3, 0.6, 0.5]))
    return trace("x", Normal)(jnp.sum(real(z)) + real(z)[0], 0.8)


def vector(estimator: Wrap) -> Problem:
    """One choice that is a vector, all elements of which are seen together."""

    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            trace("z", estimator(Bernoulli))(learned(self, "logits", (3,)))

    params = {"guide": {"logits": jnp.array([0.4, -0.3, 0.7])}}
    return Problem(_vector_model, Guide(), params, {"z": np.stack(vectors_of(COINS, 3))}, {"x": 1.4})


# Map -------------------------------------------------------------------------------------------------------------------


@gen
def _point(shift):
    z = trace("z", Bernoulli)(shift)
    return trace("x", Normal)(2.0 * real(z) - 1.0 + shift, 0.8)


@gen
def _points_model():
    w = trace("w", Normal)(0.3, 0.9)
    return trace("points", Map(_point, in_axes=None, repeats=3))(w)


def points(estimator: Wrap) -> Problem:
    """A Normal of all elements, and a coin of each, whose logit depends on it."""

    @gen
    def coin(logit, w):
        trace("z", estimator(Bernoulli))(logit + 0.5 * w)

    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            w = trace("w", Normal)(learned(self, "loc"), 0.6)
            trace("points", Map(coin, in_axes=(0, None)))(learned(self, "logits", (3,)), w)

    params = {"guide": {"loc": jnp.array(-0.2), "logits": jnp.array([0.4, -0.3, 1.0])}}
    where, each = grid(-6.0, 6.0, 80)
    all_coins = vectors_of(COINS, 3)
    values = product_of({"w": where, "z": all_coins})
    weights = product_of({"w": each, "z": all_coins})["w"]
    choices = {"w": values["w"], "points": {"z": values["z"]}}
    return Problem(_points_model, Guide(), params, choices, {"points": {"x": jnp.array([0.5, -1.0, 2.0])}}, weights)


@gen
def _coin_of(p):
    return trace("z", Bernoulli)(p)


@gen
def _leaving_model():
    zs = trace("points", Map(_coin_of))(np.array([0.2, -0.3, 0.5]))
    late = trace("late", Bernoulli)(jnp.sum(real(zs)) - 1.0)
    return trace("x", Normal)(real(zs)[0] - real(late), 0.7)


def leaving(estimator: Wrap, late: Wrap) -> Problem:
    """Coins of the elements of a `Map`, and what depends on all of them."""

    @gen
    def coin(logit):
        return trace("z", estimator(Bernoulli))(logit)

    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            zs = trace("points", Map(coin))(learned(self, "logits", (3,)))
            trace("late", late(Bernoulli))(learned(self, "slope") * jnp.sum(real(zs)))

    params = {"guide": {"logits": jnp.array([0.4, -0.3, 0.7]), "slope": jnp.array(0.5)}}
    values = product_of({"z": vectors_of(COINS, 3), "late": COINS})
    choices = {"points": {"z": values["z"]}, "late": values["late"]}
    return Problem(_leaving_model, Guide(), params, choices, {"x": 0.4})


def amortised(estimator: Wrap) -> Problem:
    """Coins in a `Map`, their logits by a network of the data; the model's network is learned too."""

    class Point(GenModule):
        @nn.compact
        def __call__(self):
            z = trace("z", Bernoulli)(probs=0.4)
            return trace("x", Normal)(nn.Dense(1)(jnp.stack([real(z), 1 - real(z)]))[0], 0.7)

    class Encoder(GenModule):
        @nn.compact
        def __call__(self, x):
            hidden = nn.tanh(nn.Dense(2)(x[None]))
            trace("z", estimator(Bernoulli))(nn.Dense(1)(hidden)[0])

    xs = jnp.array([0.5, -1.0])
    params = {
        "model": {"Dense_0": {"kernel": jnp.array([[0.8], [-0.6]]), "bias": jnp.array([0.1])}},
        "guide": {
            "Dense_0": {"kernel": jnp.array([[0.7, -0.4]]), "bias": jnp.array([0.1, 0.2])},
            "Dense_1": {"kernel": jnp.array([[0.9], [0.5]]), "bias": jnp.array([-0.2])},
        },
    }
    values = {"z": np.stack(vectors_of(COINS, 2))}
    return Problem(Map(Point(), repeats=2), Map(Encoder()), params, values, {"x": xs}, guide_args=(xs,))


def nested_maps(estimator: Wrap) -> Problem:
    """A `Map` in a `Map`, with a coin on each level."""

    @gen
    def leaf(parent):
        z = trace("z", Bernoulli)(0.5 * parent)
        return trace("x", Normal)(real(z) + parent, 0.7)

    @gen
    def group():
        parent = trace("parent", Bernoulli)(probs=0.4)
        trace("leaves", Map(leaf, in_axes=None, repeats=2))(real(parent))

    @gen
    def coin(logit, parent):
        trace("z", estimator(Bernoulli))(logit - 0.5 * parent)

    @gen
    def coins(logit, logits):
        parent = trace("parent", estimator(Bernoulli))(logit)
        trace("leaves", Map(coin, in_axes=(0, None)))(logits, real(parent))

    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            trace("groups", Map(coins))(learned(self, "logit", (2,)), learned(self, "logits", (2, 2)))

    class Model(GenModule):
        @nn.compact
        def __call__(self):
            trace("groups", Map(group, repeats=2))()

    params = {"logit": jnp.array([0.2, -0.5]), "logits": jnp.array([[0.3, -0.4], [0.8, 0.1]])}
    values = product_of({"parent": vectors_of(COINS, 2), "z": [v.reshape(2, 2) for v in vectors_of(COINS, 4)]})
    choices = {"groups": {"parent": values["parent"], "leaves": {"z": values["z"]}}}
    observed = {"groups": {"leaves": {"x": jnp.array([[0.5, -1.0], [2.0, 0.3]])}}}
    return Problem(Model(), Guide(), {"guide": params}, choices, observed)


# Steps -----------------------------------------------------------------------------------------------------------------


@gen
def _step(time, state):
    z = trace("z", Bernoulli)(state - 0.3)
    trace("x", Normal)(real(z), 0.7)
    return 0.8 * real(z)


@gen
def _steps_model():
    trace("steps", Unfold(_step, max_length=3))(3, 0.5)


XS = jnp.array([0.5, -0.4, 1.3])


def unfold(estimator: Wrap) -> Problem:
    """A chain of coins, forwards in guide and model."""

    @gen
    def step(time, state, logits):
        z = trace("z", estimator(Bernoulli))(logits[time] + state)
        return 0.6 * real(z)

    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            trace("steps", Unfold(step, max_length=3))(3, 0.1, learned(self, "logits", (3,)))

    params = {"guide": {"logits": jnp.array([0.4, -0.3, 0.7])}}
    choices = {"steps": {"z": np.stack(vectors_of(COINS, 3))}}
    return Problem(_steps_model, Guide(), params, choices, {"steps": {"x": XS}})


def backwards(estimator: Wrap) -> Problem:
    """The guide's chain runs from the last step to the first."""

    @gen
    def step(state, logit):
        z = trace("z", estimator(Bernoulli))(logit + state)
        return 0.6 * real(z), z

    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            trace("steps", Scan(step, reverse=True))(0.1, learned(self, "logits", (3,)))

    problem = unfold(estimator)
    return Problem(_steps_model, Guide(), problem.params, problem.values, problem.observed)


def both_backwards(estimator: Wrap) -> Problem:
    """Guide and model run from the last step to the first."""

    @gen
    def step(state, x):
        z = trace("z", Bernoulli)(state - 0.3)
        trace("x", Normal)(real(z), 0.7)
        return 0.8 * real(z), z

    @gen
    def model():
        trace("steps", Scan(step, reverse=True))(0.5, np.zeros(3, np.float32))

    problem = backwards(estimator)
    return Problem(model, problem.guide, problem.params, problem.values, problem.observed)


def uncertain_length(estimator: Wrap) -> Problem:
    """The number of steps that count is not known while tracing: two of three."""
    problem = unfold(estimator)

    @gen
    def model(length):
        trace("steps", Unfold(_step, max_length=3))(length, 0.5)

    @gen
    def step(time, state, logits):
        z = trace("z", estimator(Bernoulli))(logits[time] + state)
        return 0.6 * real(z)

    class Guide(GenModule):
        @nn.compact
        def __call__(self, length):
            trace("steps", Unfold(step, max_length=3))(length, 0.1, learned(self, "logits", (3,)))

    values = {"steps": {"z": np.stack([[*row, 0] for row in vectors_of(COINS, 2)])}}
    length = (jnp.asarray(2),)
    return Problem(model, Guide(), problem.params, values, problem.observed, model_args=length, guide_args=length)


def map_of_unfolds(estimator: Wrap) -> Problem:
    """Chains side by side."""

    @gen
    def step(time, state, logits):
        z = trace("z", estimator(Bernoulli))(logits[time] + state)
        return 0.6 * real(z)

    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            unfolds = Map(Unfold(step, max_length=2), in_axes=(None, None, 0))
            trace("chains", unfolds)(2, 0.1, learned(self, "logits", (2, 2)))

    @gen
    def model():
        trace("chains", Map(Unfold(_step, max_length=2), in_axes=None, repeats=2))(2, 0.5)

    values = {"chains": {"z": np.stack([v.reshape(2, 2) for v in vectors_of(COINS, 4)])}}
    params = {"guide": {"logits": jnp.array([[0.4, -0.3], [0.7, 0.2]])}}
    return Problem(model, Guide(), params, values, {"chains": {"x": jnp.array([[0.5, -0.4], [1.3, 0.2]])}})


def unfold_of_maps(estimator: Wrap) -> Problem:
    """A chain whose state mixes the elements of a `Map`."""

    @gen
    def model_step(time, state):
        zs = trace("points", Map(_coin_of))(state - 0.3)
        trace("x", Normal)(jnp.sum(real(zs)), 0.7)
        return 0.8 * real(zs)[::-1]

    @gen
    def coin(logit):
        return trace("z", estimator(Bernoulli))(logit)

    @gen
    def step(time, state, logits):
        zs = trace("points", Map(coin))(logits[time] + state)
        return 0.6 * real(zs)[::-1]

    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            logits = learned(self, "logits", (2, 2))
            trace("steps", Unfold(step, max_length=2))(2, 0 * logits[0], logits)

    @gen
    def model():
        trace("steps", Unfold(model_step, max_length=2))(2, jnp.array([0.2, -0.1], jnp.result_type(float)))

    values = {"steps": {"points": {"z": np.stack([v.reshape(2, 2) for v in vectors_of(COINS, 4)])}}}
    params = {"guide": {"logits": jnp.array([[0.4, -0.3], [0.7, 0.2]])}}
    return Problem(model, Guide(), params, values, {"steps": {"x": jnp.array([0.5, 1.2])}})


# Switch ----------------------------------------------------------------------------------------------------------------


@gen
def _two():
    trace("a", Bernoulli)(probs=0.3)
    return real(trace("b", Bernoulli)(probs=0.6))


@gen
def _one():
    return -real(trace("a", Bernoulli)(probs=0.7))


@gen
def _switch_model():
    k = trace("k", Categorical)(probs=np.array([0.45, 0.55]))
    value = trace("value", Switch((_two, _one)))(k)
    return trace("x", Normal)(value, 0.7)


def switch(which: Wrap, inside: Wrap) -> Problem:
    """The guide draws a branch, and other choices in each; one address is in both."""

    @gen
    def two(logits):
        trace("a", inside(Bernoulli))(logits[0])
        trace("b", inside(Bernoulli))(logits[1])
        return 0

    @gen
    def one(logits):
        trace("a", inside(Bernoulli))(logits[2])
        return 0

    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            k = trace("k", which(Categorical))(learned(self, "logits_of_k", (2,)))
            trace("value", Switch((two, one)))(k, learned(self, "logits", (3,)))

    params = {"logits_of_k": jnp.array([0.2, -0.3]), "logits": jnp.array([0.4, -0.3, 0.7])}
    rows = [(0, a, b) for a in COINS for b in COINS] + [(1, a, 0) for a in COINS]
    k, a, b = (np.asarray(column) for column in zip(*rows, strict=True))
    return Problem(_switch_model, Guide(), {"guide": params}, {"k": k, "value": {"a": a, "b": b}}, {"x": 0.4})


# Others ----------------------------------------------------------------------------------------------------------------


@gen
def _others_model():
    a = trace("a", Bernoulli)(probs=0.3)
    u = trace("summed", Marginal(_hidden, "u", Enumerate()))(0.4 * real(a), -0.2)
    v = trace("renamed", Map(_coin_of))(jnp.stack([real(u), -real(a)]))
    return trace("x", Normal)(real(a) + real(u) - real(v)[0], 0.7)


@gen
def _hidden(first, second):
    r = trace("r", Bernoulli)(first)
    return trace("u", Bernoulli)(second + real(r))


def others(estimator: Wrap) -> Problem:
    """Combinators whose traces are of other kinds: `Dimap`, `Marginal` and `AddressMap`."""

    @gen
    def coin(logit):
        return trace("w", estimator(Bernoulli))(logit)

    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            logits = learned(self, "logits", (5,))
            a = trace("a", Dimap.map_retval(estimator(Bernoulli), real))(logits[0])
            u = trace("summed", Marginal(_hidden, "u", Enumerate()))(logits[1] + a, logits[2])
            trace("renamed", AddressMap(Map(coin), {"z": "w"}))(logits[3:] + 0.5 * real(u))

    params = {"guide": {"logits": jnp.array([0.4, -0.3, 0.7, 0.2, -0.6])}}
    values = product_of({"a": COINS, "u": COINS, "z": vectors_of(COINS, 2)})
    choices = {"a": values["a"], "summed": {"u": values["u"]}, "renamed": {"z": values["z"]}}
    return Problem(_others_model, Guide(), params, choices, {"x": 0.4})

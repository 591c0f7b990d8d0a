"""Batches that stand for a population: over all batches of a small data set, means are exactly those of all data."""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gjflax
from gjflax import ELBO, ArgumentError, GenModule, LogNormal, Map, Normal, Repeat, distribution, gen, select, trace
from gjflax.combinators.map import multiplicity

KEY = jax.random.key(0)
SIZE = 5
RNG = np.random.default_rng(0)
DATA = {name: RNG.normal(size=SIZE).astype(np.float32) for name in ("x", "y", "noise")}
SHARED_NOISE = np.float32(0.7)
PRIOR, LOCAL, NOISE = 1.5, 0.8, 0.6


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


# Unbiased objectives -------------------------------------------------------------------------------------------------

# A normal distribution whose noise is an argument: that of a data point goes with it into every batch.
Given = distribution(
    lambda key, loc, scale, noise: loc + scale * noise,
    lambda value, loc, scale, noise: jax.scipy.stats.norm.logpdf(value, loc, scale),
    name="given",
    reparameterized=True,
)


class Point(GenModule):
    """z ~ N(mean, LOCAL²), y | z ~ N(slope · z + x, NOISE²): a choice of each point, and a parameter of all."""

    @nn.compact
    def __call__(self, mean, x):
        slope = self.param("slope", nn.initializers.zeros, ())
        z = trace("z", Normal)(mean, LOCAL)
        return trace("y", Normal)(slope * z + x, NOISE)


class Model(GenModule):
    total: int | None

    @nn.compact
    def __call__(self, x):
        mean = trace("mean", Normal)(0.0, PRIOR)
        return trace("points", Map(Point(name="point"), in_axes=(None, 0), total=self.total))(mean, x)


class PointGuide(GenModule):
    @nn.compact
    def __call__(self, x, noise):
        weight = self.param("weight", nn.initializers.zeros, ())
        return trace("z", Given)(weight * x, jnp.exp(self.param("log_scale", nn.initializers.zeros, ())), noise)


class Guide(GenModule):
    total: int | None

    @nn.compact
    def __call__(self, x, noise):
        loc = self.param("loc", nn.initializers.zeros, ())
        trace("mean", Given)(loc, 0.4, SHARED_NOISE)
        trace("points", Map(PointGuide(name="point"), total=self.total))(x, noise)


PARAMS = {
    "model": {"point": {"slope": jnp.float32(1.3)}},
    "guide": {"loc": jnp.float32(0.2), "point": {"weight": jnp.float32(-0.5), "log_scale": jnp.float32(-0.6)}},
}


def loss(total: int | None, params: Any, which: Any) -> Any:
    x, y, noise = (jnp.asarray(DATA[name])[which] for name in ("x", "y", "noise"))
    objective = ELBO(Model(total), Guide(total))
    return objective.apply({"params": params}, {"points": {"y": y}}, (x,), (x, noise), rngs={"choice": KEY})


def log_normal(value: Any, loc: Any, scale: Any) -> Any:
    return -0.5 * ((value - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)


def loss_by_hand(params: Any) -> float:
    """Minus the ELBO of all data at the given noise, in NumPy."""
    slope, guide = float(params["model"]["point"]["slope"]), jax.tree.map(float, params["guide"])
    x, y, noise = (DATA[name].astype(np.float64) for name in ("x", "y", "noise"))
    scale = np.exp(guide["point"]["log_scale"])
    mean, z = guide["loc"] + 0.4 * float(SHARED_NOISE), guide["point"]["weight"] * x + scale * noise
    shared = log_normal(mean, 0.0, PRIOR) - log_normal(mean, guide["loc"], 0.4)
    each = log_normal(z, mean, LOCAL) + log_normal(y, slope * z + x, NOISE)
    return -(shared + np.sum(each - log_normal(z, guide["point"]["weight"] * x, scale)))


def gradient_by_hand(params: Any, step: float = 1e-5) -> Any:
    """By central differences of `loss_by_hand`, in double precision."""
    leaves, structure = jax.tree.flatten(jax.tree.map(np.float64, params))

    def at(position: int, move: float) -> float:
        moved = [leaf + move * (index == position) for index, leaf in enumerate(leaves)]
        return loss_by_hand(structure.unflatten(moved))

    return structure.unflatten([(at(i, step) - at(i, -step)) / (2 * step) for i in range(len(leaves))])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_over_all_batches_the_elbo_and_its_gradient_average_to_those_of_all_data(size: int):
    every = jnp.array(list(itertools.combinations(range(SIZE), size)))
    run = jax.jit(jax.vmap(jax.value_and_grad(lambda params, which: loss(SIZE, params, which)), in_axes=(None, 0)))
    values, grads = run(PARAMS, every)
    assert np.std(values) > 0.1
    close(np.mean(values), loss_by_hand(PARAMS))
    jax.tree.map(lambda got, want: close(np.mean(got), want), grads, gradient_by_hand(PARAMS))


def test_a_batch_of_all_is_the_whole():
    everyone = np.arange(SIZE)
    traced = [jax.make_jaxpr(lambda params, t=total: loss(t, params, everyone))(PARAMS) for total in (SIZE, None)]
    assert str(traced[0]) == str(traced[1]), "it costs something"


# The interface -------------------------------------------------------------------------------------------------------


@gen
def point(loc, scale):
    x = trace("x", LogNormal)(loc, 1.0)
    return trace("y", Normal)(2.0 * x, scale)


TOTAL, FACTOR = 12, 4.0
alone = Map(point, in_axes=(0, None))
batch = Map(point, in_axes=(0, None), total=TOTAL)
ARGS, OTHER_ARGS = (jnp.array([0.0, 1.0, -1.0]), 0.5), (jnp.array([0.5, 1.0, 2.0]), 1.5)


def everything(mapped: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is scaled, and what is not, of all methods under one key."""
    key, tr = mapped.simulate(KEY, ARGS)
    _, (weight, some) = mapped.importance(KEY, {("y"): jnp.ones(3)}, ARGS)
    _, (by_index_weight, by_index) = mapped.importance(KEY, {(1, "y"): 2.0}, ARGS)
    _, (retval, score) = mapped.assess(KEY, tr.strip(), OTHER_ARGS)
    _, (_, once_weight, once, discard) = mapped.update(KEY, tr, {(2, "x"): 3.0}, ARGS)
    _, (_, twice_weight, twice, _) = mapped.update(KEY, once, {"y": jnp.zeros(3)}, OTHER_ARGS)
    _, (_, thrice_weight, thrice, _) = mapped.update(KEY, twice, {(0, "y"): 1.0}, OTHER_ARGS)
    _, (_, redrawn_weight, redrawn) = mapped.regenerate(KEY, tr, select("x"), OTHER_ARGS)
    _, (_, one_weight, one) = mapped.regenerate(KEY, tr, select((1, "y")), ARGS)
    unconstrained, log_det = mapped.unconstrain(tr, select("x"))
    back, back_log_det = mapped.constrain(unconstrained, ARGS, fixed=tr.strip().filter(select("y")))
    _, grads = mapped.choice_grad(KEY, tr, select("x"))
    scaled = {
        "score": tr.get_score(),
        "scores of updates": [once.get_score(), twice.get_score(), thrice.get_score()],
        "importance": [weight, by_index_weight],
        "assess": score,
        "update": [once_weight, twice_weight, thrice_weight],
        "regenerate": [redrawn_weight, one_weight],
        "project": [
            tr.project(select("x")),
            tr.project(select((1, "y"))),
            mapped.project(KEY, tr, select((0, "x")))[1],
        ],
        "propose": mapped.propose(KEY, ARGS)[1][1],
        "log det": [log_det, back_log_det],
        "gradients": jax.tree.leaves(grads),
    }
    traces = [tr, some, by_index, once, twice, thrice, redrawn, one]
    plain = {
        "choices": [jax.tree.leaves(trace.strip()) for trace in traces],
        "retval": retval,
        "discard": jax.tree.leaves(discard),
        "leaves": [leaf.get_score() for _, leaf in tr.leaves()],
        "constrain": [jax.tree.leaves(unconstrained), jax.tree.leaves(back)],
    }
    return scaled, plain


def test_every_weight_counts_for_the_population():
    compiled = jax.jit(everything, static_argnums=0)
    (scaled, plain), (scaled_alone, plain_alone) = compiled(batch), compiled(alone)
    jax.tree.map(lambda got, want: close(got, FACTOR * want), scaled, scaled_alone)
    jax.tree.map(np.testing.assert_array_equal, plain, plain_alone)
    # Updates lead from score to score.
    scores = np.asarray([scaled["score"], *scaled["scores of updates"]])
    close(np.diff(scores), scaled["update"])


def test_scores_by_hand():
    tr = jax.jit(lambda key: batch.simulate(key, ARGS)[1])(KEY)
    x, y, loc = (np.asarray(value, np.float64) for value in (tr["x"], tr["y"], ARGS[0]))
    terms = {"x": log_normal(np.log(x), loc, 1.0) - np.log(x), "y": log_normal(y, 2 * x, 0.5)}
    close(tr.get_score(), FACTOR * (terms["x"].sum() + terms["y"].sum()))
    close(tr.project(select("y")), FACTOR * terms["y"].sum())
    for address, leaf in tr.leaves():
        close(leaf.get_score(), terms[address[0]])
        assert multiplicity(leaf) == FACTOR


def test_batches_of_batches_multiply():
    nested = Map(Map(Normal, in_axes=(0, None), total=6), in_axes=(0, None), total=20)
    _, tr = nested.simulate(KEY, (jnp.zeros((4, 2)), 1.0))
    close(tr.get_score(), 5.0 * 3.0 * log_normal(np.asarray(tr.get_retval()), 0.0, 1.0).sum())
    assert [multiplicity(leaf) for _, leaf in tr.leaves()] == [15.0]


def test_a_batch_in_a_body():
    @gen
    def model(x):
        mean = trace("mean", Normal)(0.0, 1.0)
        return trace("points", Map(point, in_axes=(0, None), total=TOTAL))(x, jnp.exp(mean))

    _, tr = jax.jit(model.simulate)(KEY, (ARGS[0],))
    prior = log_normal(np.asarray(tr["mean"]), 0.0, 1.0)
    of_points = alone.assess(KEY, tr["points"], (ARGS[0], jnp.exp(tr["mean"])))[1][1]
    close(tr.get_score(), prior + FACTOR * of_points)
    _, (_, weight, new, _) = jax.jit(lambda tr: model.update(KEY, tr, {("points", 1, "y"): 0.3}, (ARGS[0],)))(tr)
    close(weight, new.get_score() - tr.get_score())
    assert [multiplicity(leaf) for _, leaf in tr.leaves()] == [1.0, FACTOR, FACTOR]


def test_a_batch_of_traces_too():
    # The axis of the batch is as long as that of the elements.
    keys = jax.random.split(KEY, 3)
    traces = jax.jit(jax.vmap(lambda key: batch.simulate(key, ARGS)[1]))(keys)
    for index in range(3):
        close(traces.get_score()[index], jax.tree.map(lambda leaf, i=index: leaf[i], traces).get_score())
    assert traces.project(select("y")).shape == (3,)


def test_runs_that_are_a_sample_of_all():
    few, all_of_few = Repeat(Normal, 3, total=12), Repeat(Normal, 3)
    _, tr = few.simulate(KEY, (0.0, 2.0))
    _, (_, score) = all_of_few.assess(KEY, tr.strip(), (0.0, 2.0))
    close(tr.get_score(), 4.0 * score)


def test_a_population_is_not_smaller_than_a_batch():
    with pytest.raises(ArgumentError, match="3 elements, more than the population.*`total` is 2"):
        Map(point, in_axes=(0, None), total=2).simulate(KEY, ARGS)
    for bad in (0, -3, True):
        with pytest.raises(ArgumentError, match="`total` is the size of the population"):
            Map(point, total=bad)


def test_variables_are_not_touched(no_leaks: Any):
    x, noise = jnp.zeros(2), jnp.zeros(2)
    objective = ELBO(Model(SIZE), Guide(SIZE))
    init = jax.jit(lambda key: objective.init(key, {"points": {"y": x}}, (x,), (x, noise)))
    variables = no_leaks(lambda: init(KEY))
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(PARAMS)
    assert gjflax.Map(point, total=5) == gjflax.Map(point, total=5) != gjflax.Map(point)

"""`Marginal` against enumeration: a discrete model whose densities are tables of float64.

All statistical bounds are 4 standard errors; the sample sizes stand with the tests.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy import special, stats

import gjflax
from gjflax import (
    AllSelection,
    ArgumentError,
    Bernoulli,
    Categorical,
    CustomImportance,
    DefaultImportance,
    Diff,
    Enumerate,
    EnumerationError,
    GenModule,
    LogNormal,
    Map,
    Marginal,
    MissingChoiceError,
    Normal,
    NotImplementedByGenerativeFunctionError,
    Poisson,
    SelectionError,
    Switch,
    TrainCombinator,
    UntracedRandomnessError,
    UnvisitedConstraintError,
    VectorChoiceMap,
    choice_map,
    gen,
    select,
    trace,
)

KEY = jax.random.key(0)

# A model of single, vector-valued and mapped choices ------------------------------------------------------------------
#
# Kept are "a", "b" and the vector "y"; hidden is the map "h", between "a" and the others.

PH = np.array([[0.2, 0.7], [0.6, 0.35]], np.float32)
PB = np.array([[0.8, 0.25, 0.4], [0.35, 0.6, 0.1]], np.float32)
PY = np.array([0.15, 0.7], np.float32)
each = Map(Bernoulli, in_axes=(None, 0))


@gen
def model(p):
    a = trace("a", Bernoulli)(probs=p)
    h = trace("h", each)(None, jnp.asarray(PH)[a])
    b = trace("b", Bernoulli)(probs=jnp.asarray(PB)[a, jnp.sum(h)])
    y = trace("y", Bernoulli)(probs=jnp.asarray(PY)[h])
    return y + b


@gen
def proposal(kept, p):
    trace("h", each)(None, 0.3 + 0.4 * kept["y"].astype(jnp.float32) - 0.1 * kept["b"].astype(jnp.float32))


KEPT = select("a", "b", "y")
ALGORITHMS = {
    "prior": DefaultImportance(),
    "prior of 3": DefaultImportance(3),
    "proposal of 2": CustomImportance(proposal, 2),
}
each_algorithm = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "proposal of 2" else pytest.mark.slow) for name in ALGORITHMS]
)
STATES = list(itertools.product(range(2), repeat=4))
"""(a, b, y_0, y_1)"""


def bernoulli(value: int, p: Any) -> float:
    return float(p) if value else 1 - float(p)


def joint(p: float) -> np.ndarray:
    """p(a, b, y_0, y_1, h_0, h_1)."""
    table = np.zeros((2,) * 6)
    for a, b, y0, y1, h0, h1 in np.ndindex(table.shape):
        hidden = bernoulli(h0, PH[a, 0]) * bernoulli(h1, PH[a, 1])
        rest = bernoulli(b, PB[a, h0 + h1]) * bernoulli(y0, PY[h0]) * bernoulli(y1, PY[h1])
        table[a, b, y0, y1, h0, h1] = bernoulli(a, p) * hidden * rest
    return table


def density(p: float) -> np.ndarray:
    """p(a, b, y_0, y_1)."""
    return joint(p).sum((4, 5))


P, OTHER_P = 0.3, 0.8
TABLE = density(P)
assert np.isclose(TABLE.sum(), 1)


def marginal(name: str) -> Any:
    return Marginal(model, KEPT, ALGORITHMS[name])


def as_choices(state: Any) -> Any:
    """The choice map of a state, an integer array of 4."""
    return choice_map({"a": state[0], "b": state[1], "y": state[2:]})


def state_of(choices: Any) -> Any:
    """The number of a state: its index in STATES."""
    return 8 * choices["a"] + 4 * choices["b"] + 2 * choices["y"][..., 0] + choices["y"][..., 1]


def within(samples: Any, expected: Any, what: str = "") -> None:
    """The mean over the first axis is what is expected, by 4 standard errors."""
    samples = np.asarray(samples, np.float64)
    error = 4 * samples.std(0) / np.sqrt(len(samples)) + 1e-6
    assert np.all(np.abs(samples.mean(0) - expected) <= error), (what, samples.mean(0), expected, error / 4)


def one_hot(states: Any, values: Any = 1.0) -> np.ndarray:
    """Values in the column of the state, 0 in the others."""
    return np.eye(16)[np.asarray(states)] * np.asarray(values, np.float64)[..., None]


def same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def close(got: Any, want: Any, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol, atol=atol)


def simulate(program: Any, *args: Any) -> Any:
    """A trace, compiled: step by step it takes ten times as long."""
    return jax.jit(lambda key: program.simulate(key, args)[1])(KEY)


def while_tracing(function: Any, *args: Any) -> Any:
    """Types alone: an error comes while tracing."""
    return jax.eval_shape(function, *args)


def types(tree: Any) -> Any:
    leaves = [(leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), leaves


# Everything that is drawn, at once: most of the time goes into compiling ------------------------------------------------

GIVEN = np.array([1, 0, 1, 1])
PARTS = {"b": [1], "a and y": [0, 2, 3]}
SIZE = 10000
NEXT = Diff.mark((P,), Diff.no_change)


def flip(m: Any, key: Any, tr: Any) -> Any:
    """Flip "a", "b" or an element of "y"."""
    choosing, moving = jax.random.split(key)
    state = jnp.concatenate([jnp.stack([tr["a"], tr["b"]]), tr["y"]])
    state = jnp.where(jnp.arange(4) == jax.random.randint(choosing, (), 0, 4), 1 - state, state)
    _, (_, weight, new, _) = m.update(moving, tr, as_choices(state), NEXT)
    return weight, new


def redraw(*addresses: str) -> Any:
    def move(m: Any, key: Any, tr: Any) -> Any:
        _, (_, weight, new) = m.regenerate(key, tr, select(*addresses), NEXT)
        return weight, new

    return move


MOVES = {"flip": flip, "redraw b": redraw("b"), "redraw a": redraw("a", "h")}


def moved(m: Any, move: Any, key: Any, tr: Any) -> Any:
    """A step of Metropolis-Hastings."""
    moving, accepting = jax.random.split(key)
    weight, new = move(m, moving, tr)
    return gjflax.choose(jnp.log(jax.random.uniform(accepting)) < weight, new, tr)


@functools.cache
def drawn(name: str) -> Any:
    """10000 runs of every method."""
    m = marginal(name)

    def run(key: Any) -> Any:
        keys = iter(jax.random.split(key, 10))
        _, tr = m.simulate(next(keys), (P,))
        state = jax.random.randint(next(keys), (4,), 0, 2)
        _, (retval, score) = m.assess(next(keys), as_choices(state), (P,))
        parts = {}
        for part in PARTS:
            given = as_choices(jnp.array(GIVEN)).filter(select(*part.split(" and ")))
            weight, of_part = m.importance(next(keys), given, (P,))[1]
            parts[part] = (weight, state_of(of_part.strip()), of_part.get_score())
        moves = {}
        for title, move in MOVES.items():
            after = moved(m, move, next(keys), tr)
            moves[title] = (state_of(after.strip()), after.get_score())
        return tr, (state, retval, score), parts, moves

    return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(1), SIZE))


@pytest.mark.slow
@each_algorithm
def test_assess_is_unbiased(name: str):
    # 10000 samples over the 16 states.
    state, _, score = drawn(name)[1]
    number = np.asarray(state) @ [8, 4, 2, 1]
    within(16 * one_hot(number, np.exp(np.float64(score))), TABLE.ravel(), "E[ξ] = p(u)")


@pytest.mark.slow
@each_algorithm
def test_simulate_draws_from_the_density_with_a_score_whose_inverse_is_unbiased(name: str):
    traces = drawn(name)[0]
    states = state_of(traces.strip())
    within(one_hot(states), TABLE.ravel(), "u ~ p")
    # E[1/ξ | u] = 1/p(u), times p(u).
    within(one_hot(states, np.exp(-np.float64(traces.get_score()))), np.ones(16), "E[1/ξ | u] = 1/p(u)")
    # The hidden choices in the trace are those of the joint density.
    index = 4 * states + 2 * traces.inner["h"][:, 0] + traces.inner["h"][:, 1]
    within(np.eye(64)[np.asarray(index)], joint(P).ravel(), "(u, r) ~ p")


@pytest.mark.parametrize("part", PARTS)
@each_algorithm
def test_importance_is_properly_weighted(name: str, part: str):
    weights, states, scores = drawn(name)[2][part]
    agrees = np.array([all(state[i] == GIVEN[i] for i in PARTS[part]) for state in STATES])
    exp_w = np.exp(np.float64(weights))
    within(exp_w, TABLE.ravel()[agrees].sum(), "E[exp w] = p(v)")
    within(one_hot(states, exp_w), np.where(agrees, TABLE.ravel(), 0), "E[exp w · 1{u}] = p(u)")
    # With the score: the sample (u, e) is properly weighted for π, under which E[1{u} / ξ] = 1.
    within(one_hot(states, exp_w * np.exp(-np.float64(scores))), agrees * 1.0, "E[exp w · 1{u} / ξ] = 1")


@pytest.mark.parametrize("move", MOVES)
@each_algorithm
def test_metropolis_hastings_leaves_the_density_stationary(name: str, move: str):
    # 10000 chains that start in the stationary distribution: after a step they must be in it.
    states, scores = drawn(name)[3][move]
    assert np.mean(np.asarray(states) != np.asarray(state_of(drawn(name)[0].strip()))) > 0.1, "the move moves"
    within(one_hot(states), TABLE.ravel(), "u ~ p")
    within(one_hot(states, np.exp(-np.float64(scores))), np.ones(16), "(u, e) ~ π")


@pytest.mark.slow
@each_algorithm
def test_a_long_chain_finds_the_density(name: str):
    # 64 chains of 2000 rounds from one state, without the first 100; the error is that between chains.
    m = marginal(name)
    _, (_, start) = m.importance(KEY, as_choices(jnp.array([1, 1, 1, 1])), (P,))

    def round_of(tr: Any, key: Any) -> Any:
        for number, move in enumerate(MOVES.values()):
            tr = moved(m, move, jax.random.fold_in(key, number), tr)
        return tr, state_of(tr.strip())

    run = jax.jit(jax.vmap(lambda key: jax.lax.scan(round_of, start, jax.random.split(key, 2000))[1]))
    states = run(jax.random.split(jax.random.key(8), 64))
    within(np.eye(16)[np.asarray(states)[:, 100:]].mean(1), TABLE.ravel())


@pytest.mark.slow
def test_importance_of_nothing_is_simulate_and_of_everything_the_estimate():
    def run(key: Any) -> Any:
        nothing, everything = ({}, {"y": 0.4})
        importance = lambda choices: estimated.importance(key, choices, (0.3,))[1]
        return importance(nothing), importance(everything), estimated.simulate(key, (0.3,))[1]

    (weight, tr), (weight_of_all, of_all), simulated = jax.jit(run)(KEY)
    same(tr, simulated)
    assert weight == 0
    assert weight_of_all == of_all.get_score()


@pytest.mark.slow
def test_more_particles_have_less_variance():
    # 4000 samples of each; the variance of a mean of 20 is 1/20 of that of one, by enumeration.
    keys, given = jax.random.split(jax.random.key(4), 4000), as_choices(jnp.array(GIVEN))
    a, b, y0, y1 = GIVEN
    exact, variance = TABLE[a, b, y0, y1], 0.0
    for h0, h1 in np.ndindex(2, 2):
        q = bernoulli(h0, PH[a, 0]) * bernoulli(h1, PH[a, 1])
        variance += q * (joint(P)[a, b, y0, y1, h0, h1] / q - exact) ** 2
    for count in (1, 20):
        many = Marginal(model, KEPT, DefaultImportance(count))
        scores = jax.jit(jax.vmap(lambda key, m=many: m.assess(key, given, (P,))[1][1]))(keys)
        within((np.exp(np.float64(scores)) - exact) ** 2, variance / count, f"variance with {count}")


# Updates ----------------------------------------------------------------------------------------------------------------


@gen
def noisy(x):
    r = trace("r", Normal)(x, 1.3)
    return trace("y", Normal)(r, 0.6)


@gen
def noisy_guide(kept, x):
    trace("r", Normal)(0.8 * kept["y"] + 0.2 * x, 0.7)


@gen
def group(x):
    """A vector, a map and a single number, with a hidden map between them."""
    s = trace("s", Normal)(x, jnp.array([1.0, 2.0]))
    r = trace("r", Map(Normal, in_axes=(None, 0)))(jnp.sum(s), jnp.array([1.3, 0.4, 0.9]))
    y = trace("y", Map(Normal, in_axes=(0, None)))(r, 0.6)
    return trace("w", Normal)(jnp.sum(y), 0.3)


estimated = Marginal(noisy, "y", DefaultImportance(2))
grouped = Marginal(group, ["s", "y", "w"], DefaultImportance(2))


@functools.cache
def group_trace() -> Any:
    return simulate(grouped, jnp.float32(0.3))


def test_an_update_of_nothing_is_nothing():
    tr = group_trace()
    for diffs in ((Diff.no_change(0.3),), Diff.mark(tr.get_args(), Diff.no_change)):
        key, (retdiff, weight, new, discard) = grouped.update(KEY, tr, {}, diffs)
        same(new, tr)
        assert weight == 0 and discard.is_empty() and Diff.is_unchanged(retdiff) and key is KEY
        for selection in (select("r"), select()):
            key, (retdiff, weight, new) = grouped.regenerate(KEY, tr, selection, diffs)
            same(new, tr)
            assert weight == 0 and key is KEY


def test_updates_take_the_old_estimate_from_the_trace():
    update = jax.jit(lambda key, tr, choices, x: grouped.update(key, tr, choices, (x,))[1])
    tr = group_trace()
    kinds, values = types(tr), {name: np.asarray(tr[name]) for name in ("s", "w")}
    changes = [
        ({"w": 0.7, "s": [0.1, 2.0]}, 0.3),
        ({"w": 0.9, "s": [0.5, 1.0]}, 1.2),
        ({"w": 0.7, "s": [0.5, 1.0]}, 1.2),
    ]
    estimates = []
    for step, (choices, x) in enumerate(changes):
        choices = {name: jnp.asarray(value, jnp.float32) for name, value in choices.items()}
        _, weight, new, discard = update(jax.random.key(step), tr, choices, jnp.float32(x))
        assert weight == new.get_score() - tr.get_score()
        same(discard.to_dict(), {name: values[name] for name in choices})
        values = {name: np.asarray(value) for name, value in choices.items()}
        same({name: np.asarray(new[name]) for name in values}, values)
        same(new["y"], tr["y"])
        assert new.get_args()[0] == np.float32(x) and types(new) == kinds
        assert new.get_retval() == values["w"]
        tr = new
        estimates.append(float(tr.get_score()))
    assert update._cache_size() == 1 and len(set(estimates)) == 3


@pytest.mark.slow
def test_an_update_is_as_good_an_estimate_as_any():
    # 4000 samples: the score after a change of choices and arguments is unbiased, at any old trace.
    m = marginal("prior of 3")
    tr = simulate(m, P)
    keys, new = jax.random.split(jax.random.key(6), 4000), as_choices(jnp.array([0, 1, 0, 1]))
    weights = jax.jit(jax.vmap(lambda key: m.update(key, tr, new, (OTHER_P,))[1][1]))(keys)
    within(np.exp(np.float64(weights) + float(tr.get_score())), density(OTHER_P)[0, 1, 0, 1])
    # Arguments alone change the estimate too.
    weights = jax.jit(jax.vmap(lambda key: m.regenerate(key, tr, select("h"), (OTHER_P,))[1][1]))(keys)
    within(np.exp(np.float64(weights) + float(tr.get_score())), density(OTHER_P).ravel()[int(state_of(tr.strip()))])


@pytest.mark.slow
def test_an_update_by_a_flag_and_by_index():
    tr = group_trace()

    def run(key: Any, flag: Any) -> Any:
        given = {"w": gjflax.Masked(jnp.float32(5.0), flag), ("y", 1): 7.0}
        return grouped.update(key, tr, given, (0.3,))[1][1:]

    run = jax.jit(run)
    for flag in (True, False):
        weight, new, discard = run(KEY, jnp.array(flag))
        assert new["w"] == (5.0 if flag else tr["w"])
        assert bool(discard["w"].flag) is flag and discard["w"].value == tr["w"]
        assert new["y"][1] == 7.0 and new["y"][0] == tr["y"][0]
        changed = discard.get_subtree("y")
        assert changed.static_indices == (1,) and changed.get_value()[0] == tr["y"][1]
        assert weight == new.get_score() - tr.get_score()


@pytest.mark.slow
def test_regenerate_of_everything_is_a_new_run():
    tr = group_trace()
    run = jax.jit(
        lambda key: (grouped.regenerate(key, tr, AllSelection(), (1.3,))[1], grouped.simulate(key, (1.3,))[1])
    )
    (_, weight, new), simulated = run(jax.random.key(9))
    assert weight == 0
    same(new, simulated)


# The exact sum ----------------------------------------------------------------------------------------------------------


def test_enumerate_is_the_sum():
    exact = Marginal(model, KEPT, Enumerate())

    def run(key: Any, state: Any) -> Any:
        _, tr = exact.simulate(key, (P,))
        _, (_, score) = exact.assess(key, as_choices(state), (P,))
        _, (_, weight, new, discard) = exact.update(key, tr, {"a": 1 - tr["a"]}, (OTHER_P,))
        _, (_, back, restored, _) = exact.update(key, new, discard, (P,))
        return tr, score, weight, new, back, restored

    # 16 · 500 runs.
    keys = jax.random.split(jax.random.key(10), 16 * 500).reshape(16, 500)
    tr, score, weight, new, back, restored = jax.jit(jax.vmap(jax.vmap(run, (0, None))))(keys, jnp.array(STATES))
    close(np.exp(np.float64(score[:, 0])), TABLE.ravel(), rtol=1e-4)
    states, new_states = (np.asarray(state_of(one.strip())) for one in (tr, new))
    close(np.exp(np.float64(tr.get_score())), TABLE.ravel()[states], rtol=1e-4)
    # Every weight is exact, and an update can be taken back.
    close(weight, np.log(density(OTHER_P).ravel()[new_states] / TABLE.ravel()[states]), rtol=1e-4, atol=1e-4)
    close(back, -weight, atol=1e-4)
    same(restored.strip(), tr.strip())
    # An update draws the hidden choices from their posterior.
    given_u = joint(OTHER_P).reshape(16, 4) / density(OTHER_P).reshape(16, 1)
    index = np.asarray(2 * new.inner["h"][..., 0] + new.inner["h"][..., 1]).ravel()
    within(np.eye(4)[index] - given_u[new_states.ravel()], np.zeros(4))


class Mixture(GenModule):
    """A mixture of normals with a learned network, whose components are hidden."""

    @nn.compact
    def __call__(self, x):
        locs = trace("locs", Normal)(jnp.array([-1.0, 2.0, 0.5]), 1.5)
        scale = trace("scale", LogNormal)(0.1, 0.4)
        z = trace("z", Map(Categorical))(nn.Dense(3)(x))
        return trace("y", Map(Normal, in_axes=(0, None)))(locs[z], scale)


INPUTS = jnp.array([[0.5, -1.0], [1.5, 0.2], [-0.7, 2.0], [0.1, 0.4]])
exact_mixture = Marginal(Mixture(), ["locs", "scale", "y"], Enumerate())


def mixture_by_hand(locs: Any, scale: Any, y: Any, x: Any, params: Any) -> float:
    locs, scale, y = (np.asarray(value, np.float64) for value in (locs, scale, y))
    logits = np.asarray(x, np.float64) @ np.float64(params["Dense_0"]["kernel"]) + np.float64(params["Dense_0"]["bias"])
    terms = special.log_softmax(logits, -1) + stats.norm.logpdf(y[:, None], locs[None], scale)
    prior = stats.norm.logpdf(locs, [-1.0, 2.0, 0.5], 1.5).sum() + stats.lognorm.logpdf(scale, 0.4, scale=np.exp(0.1))
    return float(prior + special.logsumexp(terms, -1).sum())


def difference(function: Any, tree: Any, step: float = 1e-5) -> Any:
    """The gradient by central differences in float64."""
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree))
    gradients = [np.zeros_like(leaf) for leaf in leaves]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        for position in np.ndindex(leaf.shape):
            old, values = leaf[position], []
            for sign in (1, -1):
                leaf[position] = old + sign * step
                values.append(function(structure.unflatten(leaves)))
            leaf[position] = old
            gradient[position] = (values[0] - values[1]) / (2 * step)
    return structure.unflatten(gradients)


def test_exact_gradients_are_those_of_the_sum():
    variables = jax.jit(exact_mixture.init)(KEY, INPUTS)
    params = variables["params"]
    assert jax.tree.map(jnp.shape, params) == {"Dense_0": {"kernel": (2, 3), "bias": (3,)}}
    jax.tree.map(close, variables, jax.jit(Mixture().init)(KEY, INPUTS))
    bound = exact_mixture.bind(variables)
    tr = simulate(bound, INPUTS)
    values = {address: tr[address] for address in ("locs", "scale", "y")}
    close(tr.get_score(), mixture_by_hand(*values.values(), INPUTS, params))

    gradient = jax.jit(lambda tr: bound.choice_grad(KEY, tr, select("locs", "scale", "y"))[1])(tr)
    expected = difference(lambda v: mixture_by_hand(v["locs"], v["scale"], v["y"], INPUTS, params), values)
    for address in values:
        close(gradient[address], expected[address], rtol=1e-3, atol=1e-4)
    gradient = jax.jit(lambda tr: bound.arg_grad(KEY, tr, 0)[1])(tr)
    close(gradient, difference(lambda x: mixture_by_hand(*values.values(), x, params), INPUTS), rtol=1e-3, atol=1e-4)
    gradient = jax.jit(lambda tr, params: exact_mixture.param_grad(KEY, tr, params)[1])(tr, params)
    expected = difference(lambda p: mixture_by_hand(*values.values(), INPUTS, p), params)
    jax.tree.map(lambda one, other: close(one, other, rtol=1e-3, atol=1e-4), gradient, expected)
    _, score, _ = bound.unzip(KEY, {"y": tr["y"]})
    close(jax.jit(score)({"locs": tr["locs"], "scale": tr["scale"]}, INPUTS), tr.get_score())


def test_kept_choices_map_to_the_reals_and_back():
    variables = jax.jit(exact_mixture.init)(KEY, INPUTS)
    bound = exact_mixture.bind(variables)
    tr = simulate(bound, INPUTS)
    unconstrained, log_det = jax.jit(lambda tr: bound.unconstrain(tr, select("locs", "scale")))(tr)
    close(unconstrained["scale"], np.log(tr["scale"]))
    run = jax.jit(lambda unconstrained: bound.constrain(unconstrained, (INPUTS,), fixed={"y": tr["y"]}))
    choices, back = run(unconstrained)
    assert sorted(choices.addresses()) == [("locs",), ("scale",), ("y",)]
    close(choices["scale"], tr["scale"])
    close(back, -log_det)
    close(back, np.log(tr["scale"]))
    with pytest.raises(
        NotImplementedByGenerativeFunctionError, match='support of a kept choice .* at "m" depends on a h'
    ):
        in_body = gen(lambda: trace("m", Marginal(bounded, "x", DefaultImportance()))())
        while_tracing(lambda: in_body.constrain(in_body.unconstrain(in_body.simulate(KEY, ())[1], select("m"))[0], ()))


@gen
def bounded():
    width = trace("width", LogNormal)(0.0, 1.0)
    trace("x", gjflax.Uniform)(0.0, width)


def test_values_can_be_named():
    @gen
    def counts(rate):
        n = trace("n", Poisson)(rate)
        trace("y", Normal)(n.astype(jnp.float32), 0.5)

    exact = Marginal(counts, "y", Enumerate({"n": range(30)}))
    score = jax.jit(lambda key: exact.assess(key, {"y": 2.2}, (3.0,))[1][1])(KEY)
    terms = stats.poisson.logpmf(np.arange(30), 3.0) + stats.norm.logpdf(2.2, np.arange(30), 0.5)
    close(score, special.logsumexp(terms))
    assert hash(exact) == hash(Marginal(counts, "y", Enumerate({"n": list(range(30))})))
    with pytest.raises(EnumerationError, match='The choice "n" is to be summed out, and its values are not known'):
        while_tracing(lambda: Marginal(counts, "y", Enumerate()).simulate(KEY, (3.0,)))
    with pytest.raises(ArgumentError, match='names "m", which is no choice that is integrated out. Known here: "n"'):
        while_tracing(lambda: Marginal(counts, "y", Enumerate({"m": range(30)})).simulate(KEY, (3.0,)))
    with pytest.raises(EnumerationError, match="sums over 4 combinations .* `max_terms` of its Enumerate is 3"):
        while_tracing(lambda: Marginal(model, KEPT, Enumerate(max_terms=3)).simulate(KEY, (P,)))
    for values in ({"n": 3}, {"n": []}, "n"):
        with pytest.raises(ArgumentError, match="`values` of an Enumerate"):
            Enumerate(values)


def test_hidden_choices_that_a_branch_may_leave_out():
    @gen
    def coin():
        trace("c", Bernoulli)(probs=0.3)
        return jnp.float32(1.0)

    @gen
    def none():
        return jnp.float32(-1.0)

    @gen
    def branching(i):
        loc = trace("branch", Switch((coin, none)))(i)
        trace("y", Normal)(loc, 1.0)

    for algorithm in (DefaultImportance(3), Enumerate()):
        one = Marginal(branching, "y", algorithm)
        run = jax.jit(lambda index, one=one: one.assess(KEY, {"y": 0.3}, (index,))[1][1])
        for index in (0, 1):
            close(run(index), stats.norm.logpdf(0.3, 1.0 - 2 * index))
            close(one.assess(KEY, {"y": 0.3}, (index,))[1][1], stats.norm.logpdf(0.3, 1.0 - 2 * index))


# Untraced randomness is refused ---------------------------------------------------------------------------------------


def in_a_body() -> Any:
    return gen(lambda x: trace("m", estimated)(x)), (0.3,), '"m"'


def in_a_body_in_a_body() -> Any:
    return gen(lambda x: trace("outer", in_a_body()[0])(x)), (0.3,), r'\("outer", "m"\)'


def in_a_map() -> Any:
    return gen(lambda x: trace("ms", Map(estimated))(x)), (jnp.arange(3.0),), '"ms"'


def in_a_switch() -> Any:
    return gen(lambda x: trace("s", Switch((estimated, noisy)))(0, x)), (0.3,), '"s"'


def in_a_marginal() -> Any:
    return gen(lambda x: trace("o", Marginal(in_a_body()[0], "m", DefaultImportance()))(x)), (0.3,), '"o"'


def alone() -> Any:
    return estimated, (0.3,), "the root"


@pytest.mark.parametrize(
    "place",
    [
        in_a_map,
        in_a_switch,
        *(
            pytest.param(place, marks=pytest.mark.slow)
            for place in (alone, in_a_body, in_a_body_in_a_body, in_a_marginal)
        ),
    ],
)
def test_gradients_of_an_estimate_are_refused(place: Any):
    program, args, at = place()
    tr = simulate(program, *args)

    def unzipped(**options: Any) -> Any:
        return program.unzip(KEY, {}, **options)[1](tr.strip(), *args)

    calls = {
        "choice_grad": lambda **options: program.choice_grad(KEY, tr, AllSelection(), **options)[1],
        "arg_grad": lambda **options: program.arg_grad(KEY, tr, 0, **options)[1],
        "score_params": lambda **options: program.score_params(KEY, tr, {}, **options)[1],
        "param_grad": lambda **options: program.param_grad(KEY, tr, {}, **options)[1],
        "unzip": unzipped,
    }
    for call in calls.values():
        with pytest.raises(UntracedRandomnessError, match=f"density at {at} is an estimate: importance sampling with"):
            while_tracing(call)
        while_tracing(functools.partial(call, untraced="allow"))


def test_an_exact_density_is_refused_where_the_return_value_is_random():
    @gen
    def which(p):
        z = trace("z", Bernoulli)(probs=p)
        trace("y", Normal)(z.astype(jnp.float32), 1.0)
        return z

    program = gen(
        lambda p: trace("x", Normal)(trace("m", Marginal(which, "y", Enumerate()))(p).astype(jnp.float32), 1.0)
    )
    _, tr = program.simulate(KEY, (0.3,))
    with pytest.raises(
        UntracedRandomnessError, match='density at "m" is an estimate: the return value depends on choices'
    ):
        while_tracing(lambda: program.choice_grad(KEY, tr, select("x")))
    # 4000 samples: the density of all is that of the sum over both coins, in the mean.
    keys = jax.random.split(KEY, 4000)
    scores = jax.jit(jax.vmap(lambda key: program.assess(key, {"m": {"y": 0.4}, "x": 1.2}, (0.3,))[1][1]))(keys)
    expected = sum(bernoulli(z, 0.3) * stats.norm.pdf(0.4, z, 1.0) * stats.norm.pdf(1.2, z, 1.0) for z in range(2))
    within(np.exp(np.float64(scores)), expected)


@pytest.mark.slow
def test_an_estimate_uses_its_key_wherever_it_stands():
    for place in (in_a_body, in_a_map):
        program, args, _ = place()
        tr = simulate(program, *args)
        run = jax.jit(lambda key, program=program, tr=tr, args=args: program.assess(key, tr.strip(), args))
        key, (_, first) = run(KEY)
        assert first == run(KEY)[1][1] and first != run(key)[1][1]
    legacy = jax.random.PRNGKey(0)
    after = jax.jit(lambda key: estimated.assess(key, {"y": 0.3}, (0.3,))[0])(legacy)
    assert after.dtype == legacy.dtype and not np.array_equal(after, legacy)
    key, _ = Normal.assess(KEY, 0.3, (0.0, 1.0))
    assert key is KEY


# In other programs ------------------------------------------------------------------------------------------------------


def log_normal(value: Any, loc: Any, scale: Any) -> Any:
    return stats.norm.logpdf(np.float64(value), np.float64(loc), scale)


def test_in_a_body_the_estimate_is_a_part_of_the_score():
    @gen
    def body(x):
        mu = trace("mu", Normal)(x, 2.0)
        y = trace("m", estimated)(mu)
        trace("after", Normal)(y, 0.1)

    tr = simulate(body, 0.3)
    own = log_normal(tr["mu"], 0.3, 2.0) + log_normal(tr["after"], tr["m", "y"], 0.1)
    close(tr.get_score(), own + float(tr.get_subtree("m").get_score()), atol=1e-4)
    update = jax.jit(lambda choices: body.update(KEY, tr, choices, Diff.mark((0.3,), Diff.no_change))[1][1:3])
    # What does not concern it leaves the estimate as it is.
    weight, new = update({"after": 1.5})
    close(weight, log_normal(1.5, tr["m", "y"], 0.1) - log_normal(tr["after"], tr["m", "y"], 0.1), atol=1e-3)
    assert new.get_subtree("m").get_score() == tr.get_subtree("m").get_score()
    # What does concern it makes a new one.
    weight, new = update({"mu": 1.5})
    assert new.get_subtree("m").get_score() != tr.get_subtree("m").get_score()
    close(weight, new.get_score() - tr.get_score(), atol=1e-4)
    _, weight = body.project(KEY, tr, select("m"))
    assert weight == tr.get_subtree("m").get_score()


@pytest.mark.slow
def test_mapped_it_estimates_every_element():
    xs, ys = jnp.array([0.3, -1.0, 2.0, 0.7]), jnp.array([0.5, 0.0, 1.0, 3.0])
    mapped = Map(estimated)
    some, diffs = np.array([0, 3]), Diff.mark((xs,), Diff.no_change)

    def run(key: Any) -> Any:
        _, tr = mapped.simulate(key, (xs,))
        _, (_, score) = mapped.assess(key, {"y": ys}, (xs,))
        _, of_some = mapped.importance(key, VectorChoiceMap(some, {"y": ys[some]}), (xs,))
        _, (_, weight, new, _) = mapped.update(key, tr, {(2, "y"): 1.0}, diffs)
        return tr, score, of_some, weight, new

    # 4000 samples of the product of four densities, and of two, to which the others, that are not given, add nothing.
    tr, score, (weights, of_some), weight, new = jax.jit(jax.vmap(run))(jax.random.split(KEY, 4000))
    assert len(np.unique(tr.inner.score)) > 15900
    densities = stats.norm.pdf(ys, xs, np.hypot(1.3, 0.6))
    within(np.exp(np.float64(score)), densities.prod())
    within(np.exp(np.float64(weights)), densities[some].prod())
    close(weights, np.asarray(of_some.inner.score)[:, some].sum(1), atol=1e-4)
    assert np.all((new.inner.score != tr.inner.score) == np.array([[False, False, True, False]]))
    close(weight, new.get_score() - tr.get_score(), atol=1e-4)


@pytest.mark.slow
def test_in_a_branch():
    both = Switch((estimated, gen(lambda x: trace("y", Normal)(x, 2.0))))
    _, (_, tr) = both.importance(KEY, {"y": 0.9}, (1, 0.3))
    close(tr.get_score(), log_normal(0.9, 0.3, 2.0))

    def run(key: Any) -> Any:
        """Into the branch, and out of it by two ways."""
        _, (_, weight, inside, _) = both.update(key, tr, {}, (0, 0.3))
        _, (_, out, _, _) = both.update(key, inside, {}, (1, 0.3))
        _, (_, also_out, _) = both.regenerate(key, inside, select(), (1, 0.3))
        return weight, inside.get_score(), out, also_out

    # 4000 samples.
    weight, score, out, also_out = jax.jit(jax.vmap(run))(jax.random.split(KEY, 4000))
    expected = stats.norm.pdf(0.9, 0.3, np.hypot(1.3, 0.6))
    within(np.exp(np.float64(weight) + float(tr.get_score())), expected)
    for back in (out, also_out):
        close(back, log_normal(0.9, 0.3, 2.0) - np.asarray(score), atol=1e-4)
    two = Switch((grouped, group))
    tr = simulate(two, 0, 0.3)
    with pytest.raises(
        NotImplementedByGenerativeFunctionError, match="has no parts: one of them was asked for by itself"
    ):
        while_tracing(lambda: two.regenerate(KEY, tr, select("w"), (1, 0.3)))


def test_a_marginal_of_a_marginal():
    # 10000 samples: first "h" is integrated out, then "a".
    inner = Marginal(model, KEPT, DefaultImportance(2))
    outer = Marginal(inner, ["b", "y"], Enumerate())
    keys, given = jax.random.split(KEY, 10000), {"b": 0, "y": jnp.array([1, 1])}
    scores = jax.jit(jax.vmap(lambda key: outer.assess(key, given, (P,))[1][1]))(keys)
    within(np.exp(np.float64(scores)), TABLE.sum(0)[0, 1, 1])
    with pytest.raises(UntracedRandomnessError, match="importance sampling with 2 particles"):
        while_tracing(lambda: outer.score_params(KEY, outer.simulate(KEY, (P,))[1], {}))


@pytest.mark.slow
def test_compiled_vmapped_and_looped_it_is_the_same_and_is_traced_once():
    guided = Marginal(noisy, "y", CustomImportance(noisy_guide, 2))

    def run(key: Any, y: Any, x: Any) -> Any:
        key, tr = guided.simulate(key, (x,))
        key, (_, weight, tr, discard) = guided.update(key, tr, {"y": y}, (x,))
        return weight, tr, discard

    compiled, keys, ys = jax.jit(run), jax.random.split(KEY, 3), jnp.array([0.3, -1.0, 2.0])
    results = [compiled(key, y, jnp.float32(0.3)) for key, y in zip(keys, ys, strict=True)]
    assert compiled._cache_size() == 1
    plain = run(keys[0], ys[0], jnp.float32(0.3))
    assert jax.tree.structure(plain) == jax.tree.structure(results[0])
    jax.tree.map(close, plain, results[0])
    batched = jax.jit(jax.vmap(run, in_axes=(0, 0, None)))(keys, ys, jnp.float32(0.3))
    jax.tree.map(close, batched, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results))


# Parameters -------------------------------------------------------------------------------------------------------------


class Encoder(GenModule):
    """An amortised proposal."""

    @nn.compact
    def __call__(self, kept, x):
        h = nn.tanh(nn.Dense(4)(jnp.concatenate([kept["y"], x])))
        loc, log_scale = jnp.split(nn.Dense(4)(h), 2)
        trace("r", Normal)(loc, jnp.exp(0.3 * log_scale))


class Decoder(GenModule):
    """A factor model: y given r is normal with a learned linear map, so its density is known."""

    @nn.compact
    def __call__(self, x):
        r = trace("r", Normal)(jnp.zeros(2), 1.0)
        return trace("y", Normal)(nn.Dense(3)(r) + x[:1], 0.5)


X = jnp.array([0.4, -0.3])
Y = jnp.array([0.5, -1.0, 0.8])
factors = Marginal(Decoder(), "y", CustomImportance(Encoder(), 4))


def factor_density(params: Any) -> float:
    kernel, bias = (np.float64(params["Dense_0"][name]) for name in ("kernel", "bias"))
    return stats.multivariate_normal.logpdf(Y, bias + float(X[0]), kernel.T @ kernel + 0.25 * np.eye(3))


SHAPES = {
    "inner": {"Dense_0": {"kernel": (2, 3), "bias": (3,)}},
    "algorithm": {
        "proposal": {"Dense_0": {"kernel": (5, 4), "bias": (4,)}, "Dense_1": {"kernel": (4, 4), "bias": (4,)}}
    },
}


@functools.cache
def factor_params() -> Any:
    return jax.jit(factors.init)(KEY, X)["params"]


@pytest.mark.slow
def test_parameters_of_inner_function_and_proposal(no_leaks: Any):
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(factor_params()) == SHAPES
    for method, args in (("importance", (KEY, {"y": Y}, (X,))), ("assess", (KEY, {"y": Y}, (X,)))):
        run = functools.partial(factors.init, KEY, *args, method=method)
        assert shapes(no_leaks(lambda run=run: jax.eval_shape(run))["params"]) == SHAPES
    # Without a proposal they are those of the inner function.
    plain = Marginal(Decoder(), "y", DefaultImportance(3))
    same(no_leaks(lambda: plain.init(KEY, X)), Decoder().init(KEY, X))
    assert shapes(jax.eval_shape(Map(plain).init, KEY, X[None])["params"]) == SHAPES["inner"]
    in_a_body = jax.eval_shape(body_of(factors).init, KEY, X)
    assert shapes(in_a_body["params"]) == {"m": SHAPES}
    with pytest.raises(gjflax.UnboundParametersError, match="use `model.bind"):
        while_tracing(lambda: factors.simulate(KEY, (X,)))


@pytest.mark.slow
def test_init_of_a_proposal_leaks_nothing(no_leaks: Any):
    for args, method in (((X,), None), ((KEY, (X,)), "simulate"), ((KEY, {"y": Y}, (X,)), "assess")):
        variables = no_leaks(lambda args=args, method=method: factors.init(KEY, *args, method=method))
        assert jax.tree.map(jnp.shape, variables["params"]) == SHAPES


def test_with_a_proposal_that_has_parameters_the_estimate_is_unbiased():
    # 10000 samples.
    bound = factors.bind({"params": factor_params()})
    keys = jax.random.split(KEY, 10000)
    scores = jax.jit(jax.vmap(lambda key: bound.assess(key, {"y": Y}, (X,))[1][1]))(keys)
    within(np.exp(np.float64(scores)), np.exp(factor_density(factor_params()["inner"])))


@pytest.mark.slow
def test_gradients_of_an_estimate_where_they_are_allowed():
    params = factor_params()
    _, tr = jax.jit(lambda key: factors.bind({"params": params}).importance(key, {"y": Y}, (X,))[1])(KEY)
    with pytest.raises(UntracedRandomnessError, match="importance sampling with 4 particles"):
        while_tracing(lambda: factors.param_grad(KEY, tr, params))
    gradient = jax.jit(lambda params: factors.param_grad(KEY, tr, params, untraced="allow")[1])(params)
    assert jax.tree.map(jnp.shape, gradient) == SHAPES
    flat, unravel = ravel_pytree(params)
    directions = jax.random.normal(jax.random.key(11), (3, flat.size))

    @jax.jit
    @jax.vmap
    def score(flat: Any) -> Any:
        return factors.score_params(KEY, tr, unravel(flat), untraced="allow")[1]

    # The key is fixed, so it is the gradient of one function.
    along = (score(flat[None] + 1e-2 * directions) - score(flat[None] - 1e-2 * directions)) / 2e-2
    close(directions @ ravel_pytree(gradient)[0], along, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_training_a_proposal_tightens_the_estimate():
    # The mean of log ξ is a lower bound of log p, which training the proposal alone raises; 2000 samples.
    params = factor_params()
    optimiser = optax.adam(0.02)

    def loss(proposal: Any, key: Any) -> Any:
        bound = factors.bind({"params": {**params, "algorithm": proposal}})
        keys = jax.random.split(key, 16)
        return -jnp.mean(jax.vmap(lambda key: bound.assess(key, {"y": Y}, (X,))[1][1])(keys))

    @jax.jit
    @jax.numpy_dtype_promotion("standard")
    def step(state: Any, key: Any) -> Any:
        proposal, moments = state
        updates, moments = optimiser.update(jax.grad(loss)(proposal, key), moments)
        return (optax.apply_updates(proposal, updates), moments), None

    start = params["algorithm"]
    (end, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), jax.random.split(KEY, 400))
    gaps = []
    for proposal_params in (start, end):
        bound = factors.bind({"params": {**params, "algorithm": proposal_params}})
        keys = jax.random.split(jax.random.key(12), 2000)
        scores = jax.jit(jax.vmap(lambda key, bound=bound: bound.assess(key, {"y": Y}, (X,))[1][1]))(keys)
        within(np.exp(np.float64(scores)), np.exp(factor_density(params["inner"])))
        gaps.append(factor_density(params["inner"]) - np.mean(np.float64(scores)))
    assert 0 < gaps[1] < gaps[0] / 3


@pytest.mark.slow
def test_a_parameter_that_changes_is_seen_by_update():
    plain = Marginal(Decoder(), "y", DefaultImportance(2))
    variables = {"params": factor_params()["inner"]}
    tr = simulate(plain.bind(variables), X)
    other = jax.tree.map(lambda leaf: leaf + 0.3, variables)
    unchanged = Diff.mark((X,), Diff.no_change)
    run = jax.jit(lambda variables: plain.bind(variables).update(KEY, tr, {}, unchanged)[1][1:3])
    weight, new = run(other)
    assert weight == new.get_score() - tr.get_score() and weight != 0
    _, (_, weight, new, _) = plain.bind(other).update(KEY, tr, {}, unchanged, param_diff=Diff.no_change)
    assert weight == 0
    same(new, tr)


@pytest.mark.slow
def test_learned_arguments_in_the_inner_function():
    @gen(TrainCombinator, params={"loc": 0.5})
    def learned(params):
        r = trace("r", Normal)(params["loc"], 1.3)
        trace("y", Normal)(r, 0.6)

    program = Marginal(learned, "y", DefaultImportance(2))
    assert jax.eval_shape(program.init, KEY)["params"].keys() == {"loc"}
    tr = simulate(program)
    assert tr.get_args() == ()
    weight, new = jax.jit(lambda tr: program.update(KEY, tr, {"y": 0.3}, tr.get_args())[1][1:3])(tr)
    assert weight == new.get_score() - tr.get_score()
    gradient = while_tracing(lambda: program.param_grad(KEY, tr, {"loc": jnp.float32(0.5)}, untraced="allow")[1])
    assert gradient["loc"].shape == ()


def test_a_guide_with_auxiliary_choices_is_reparameterised():
    @gen
    def target():
        y = trace("y", Normal)(0.0, 1.0)
        trace("x", Normal)(y, 0.5)

    guide = gen(lambda: noisy.source(0.3))
    for algorithm in (DefaultImportance(3), CustomImportance(gen(lambda kept: noisy_guide.source(kept, 0.3)))):
        loss = gjflax.ELBO(target, Marginal(guide, "y", algorithm))
        assert while_tracing(lambda loss=loss: loss.apply({}, {"x": 0.3}, rngs={"choice": KEY})).shape == ()
    tr = simulate(marginal("prior of 3"), P)
    assert not any(leaf.is_reparameterized for _, leaf in tr.leaves())
    assert all(leaf.is_discrete for _, leaf in tr.leaves())


# What is not so ---------------------------------------------------------------------------------------------------------


def body_of(callee: Any) -> Any:
    return gen(lambda *args: trace("m", callee)(*args))


def test_hidden_choices_have_no_values():
    body = body_of(marginal("prior"))
    for call in (
        lambda choices: body.importance(KEY, choices, (P,)),
        lambda choices: body.assess(KEY, choices, (P,)),
        lambda choices: body.update(KEY, body.simulate(KEY, (P,))[1], choices, (P,)),
    ):
        with pytest.raises(UnvisitedConstraintError, match=r'for \("m", "h"\), which is not among the kept choices'):
            while_tracing(call, {"m": {"a": 1, "b": 0, "y": jnp.array([0, 1]), "h": jnp.array([0, 1])}})
    with pytest.raises(UnvisitedConstraintError, match=r'Did you mean \("m", "a"\)'):
        body.importance(KEY, {"m": {"aa": 1}}, (P,))
    _, (weight, tr) = marginal("prior").importance(KEY, {"a": 1, "h": jnp.array([0, 1])}, (P,), strict=False)
    assert int(tr["a"]) == 1 and "h" not in tr.strip()
    close(weight, np.log(P))


def test_a_kept_choice_that_is_missing():
    for name in (*ALGORITHMS, "exact"):
        algorithm = ALGORITHMS.get(name, Enumerate())
        with pytest.raises(MissingChoiceError, match=r'\("m", "b"\)|"b"'):
            body = body_of(Marginal(model, KEPT, algorithm))
            while_tracing(lambda body=body: body.assess(KEY, {"m": {"a": 1, "y": jnp.array([0, 1])}}, (P,)))


def test_project_is_all_or_nothing():
    m = marginal("prior of 3")
    tr = simulate(m, P)
    assert m.project(KEY, tr, AllSelection())[1] == tr.get_score() == m.project(KEY, tr, KEPT)[1]
    assert m.project(KEY, tr, select("h"))[1] == 0
    with pytest.raises(
        NotImplementedByGenerativeFunctionError, match='kept choices .*"a", "b", "y".* has no parts: `project`'
    ):
        m.project(KEY, tr, select("a"))


def test_the_selection_must_fit():
    with pytest.raises(
        SelectionError, match='Marginal at "m" names "yy", and its inner function has no choice there. Did'
    ):
        while_tracing(lambda: body_of(Marginal(noisy, ["y", "yy"])).simulate(KEY, (0.3,)))
    with pytest.raises(SelectionError, match="keeps no choice of its inner function"):
        while_tracing(lambda: Marginal(noisy, ~select("y", "r")).simulate(KEY, (0.3,)))
    with pytest.raises(SelectionError, match="names an element of a vector"):
        Marginal(group, ("y", 1))


def test_what_is_no_algorithm():
    with pytest.raises(ArgumentError, match="`algorithm` of a Marginal is DefaultImportance"):
        Marginal(noisy, "y", 3)
    with pytest.raises(ArgumentError, match="takes a generative function; got"):
        Marginal(lambda x: x, "y")
    with pytest.raises(ArgumentError, match="`proposal` of a CustomImportance is a generative function"):
        CustomImportance(lambda u: u)
    for count in (0, -2, True):
        for algorithm in (DefaultImportance, lambda count: CustomImportance(proposal, count)):
            with pytest.raises(ArgumentError, match="`num_particles` is a positive integer"):
                algorithm(count)


def test_a_proposal_of_other_choices():
    @gen
    def more(kept, p):
        proposal.source(kept, p)
        trace("more", Normal)(0.0, 1.0)

    @gen
    def fewer(kept, p):
        pass

    @gen
    def kept_too(kept, p):
        proposal.source(kept, p)
        trace("a", Bernoulli)(probs=0.5)

    given = as_choices(jnp.array([1, 0, 1, 1]))
    for other, error in (
        (more, UnvisitedConstraintError),
        (fewer, MissingChoiceError),
        (kept_too, gjflax.ChoiceMapError),
    ):
        program = Marginal(model, KEPT, CustomImportance(other))
        with pytest.raises(error) as caught:
            while_tracing(lambda program=program: program.assess(KEY, given, (P,)))
        assert "those that it integrates out" in "".join(caught.value.__notes__)
    for other, error in ((more, MissingChoiceError), (fewer, UnvisitedConstraintError)):
        with pytest.raises(error) as caught:
            while_tracing(lambda other=other: Marginal(model, KEPT, CustomImportance(other)).simulate(KEY, (P,)))
        assert "those that it integrates out" in "".join(caught.value.__notes__)

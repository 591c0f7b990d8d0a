"""Weights mean what they say: identities of expectation, on models whose sums can be written out.

A statistical bound is four standard errors of the estimate; the keys are fixed, so a test passes always or never.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gjflax import Bernoulli, Categorical, Map, Normal, VectorChoiceMap, choice_map, gen, select, trace

KEY = jax.random.key(11)
SAMPLES = 20_000


def number(value: Any) -> Any:
    return value.astype(jnp.float32)


@gen
def bits():
    """Three bits, each with a probability that depends on those before."""
    a = trace("a", Bernoulli)(probs=0.3)
    b = trace("b", Bernoulli)(probs=0.2 + 0.5 * number(a))
    return trace("c", Bernoulli)(probs=0.1 + 0.3 * number(a) + 0.4 * number(b))


STATES = [dict(zip("abc", state, strict=True)) for state in itertools.product((0, 1), repeat=3)]


def conditionals(t: dict[str, int]) -> dict[str, float]:
    """The probability of each bit given those before it."""
    ones = {"a": 0.3, "b": 0.2 + 0.5 * t["a"], "c": 0.1 + 0.3 * t["a"] + 0.4 * t["b"]}
    return {name: ones[name] if t[name] else 1 - ones[name] for name in "abc"}


def joint(t: dict[str, int]) -> float:
    return float(np.prod(list(conditionals(t).values())))


def assert_within_four_errors(samples: Any, want: Any) -> None:
    samples = np.asarray(samples, np.float64)
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(axis=0) - want) <= 4 * error + 1e-7), (samples.mean(axis=0), want, error)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("given", [{"c": 1}, {"a": 0, "b": 1, "c": 1}, slow({"b": 0}), slow({"a": 1, "c": 0})], ids=str)
def test_the_expected_weight_of_importance_is_the_probability_of_the_constraints(given: dict[str, int]):
    want = sum(joint(t) for t in STATES if given.items() <= t.items())
    weigh = jax.jit(jax.vmap(lambda key: bits.importance(key, given, ())[1][0]))
    assert_within_four_errors(jnp.exp(weigh(jax.random.split(KEY, SAMPLES))), want)


@pytest.mark.slow
def test_weighted_choices_of_importance_are_distributed_as_the_posterior():
    given = {"c": 1}
    evidence = sum(joint(t) for t in STATES if t["c"] == 1)
    want = sum(joint(t) for t in STATES if t["c"] == 1 and t["a"] == 1) / evidence

    def weighted(key):
        _, (weight, tr) = bits.importance(key, given, ())
        return jnp.exp(weight) * (number(tr["a"]) - want)

    assert_within_four_errors(jax.jit(jax.vmap(weighted))(jax.random.split(KEY, SAMPLES)), 0.0)


@pytest.mark.parametrize("traced", [True, slow(False)])
def test_the_expected_weight_under_a_constraint_of_some_elements(traced: bool):
    """The elements of a Map are independent, so the probabilities of their constraints multiply."""
    many = Map(bits, repeats=3)
    want = sum(joint(t) for t in STATES if t["c"] == 1) * sum(joint(t) for t in STATES if t["c"] == 0)

    def weigh(key, indices):
        given = VectorChoiceMap(indices if traced else [2, 0], {"c": jnp.array([1, 0])})
        _, (weight, tr) = many.importance(key, given, ())
        return jnp.exp(weight), tr["c"]

    weights, values = jax.jit(jax.vmap(weigh, in_axes=(0, None)))(jax.random.split(KEY, SAMPLES), jnp.array([2, 0]))
    assert_within_four_errors(weights, want)
    assert np.all(values[:, 2] == 1) and np.all(values[:, 0] == 0)
    # The element that is not constrained is drawn from the prior.
    assert_within_four_errors(values[:, 1], sum(joint(t) for t in STATES if t["c"] == 1))


def test_simulate_draws_from_the_density_that_it_scores():
    _, traces = jax.jit(jax.vmap(lambda key: bits.simulate(key, ())))(jax.random.split(KEY, SAMPLES))
    for t in STATES:
        here = np.all([np.asarray(traces[name]) == t[name] for name in "abc"], axis=0)
        assert_within_four_errors(here.astype(float), joint(t))
        np.testing.assert_allclose(np.exp(np.asarray(traces.get_score())[here]), joint(t), rtol=1e-5)


@pytest.mark.parametrize(
    "selected", [("a",), ("a", "b"), slow(("b",)), slow(("a", "c")), slow(("a", "b", "c"))], ids=str
)
def test_regenerate_is_in_detailed_balance(selected: tuple[str, ...]):
    """The Metropolis-Hastings move that proposes by `regenerate` and accepts by its weight, written out.

    For states t, t' that agree off the selection, the proposal is q(t → t') = Π p(t'_i | before) over the selection.
    The weights are those of `regenerate`; it draws each t' with a frequency that is checked against q.
    """
    selection = select(*selected)

    def move(key, t):
        _, (_, tr) = bits.importance(key, t, ())
        _, (_, weight, new) = bits.regenerate(key, tr, selection, ())
        return weight, {name: new[name] for name in "abc"}

    moves = jax.jit(jax.vmap(move, in_axes=(0, None)))
    draws = 3000
    weights: dict[tuple[int, int], float] = {}
    proposals: dict[tuple[int, int], float] = {}
    for i, t in enumerate(STATES):
        weight, new = jax.tree.map(np.asarray, moves(jax.random.split(jax.random.fold_in(KEY, i), draws), t))
        for j, s in enumerate(STATES):
            here = np.all([new[name] == s[name] for name in "abc"], axis=0)
            if any(t[name] != s[name] for name in "abc" if name not in selected):
                assert not here.any(), "a choice that is not selected was redrawn"
                continue
            proposals[i, j] = float(np.prod([conditionals(s)[name] for name in selected]))
            assert_within_four_errors(here.astype(float), proposals[i, j])
            assert here.any()
            assert np.ptp(weight[here]) < 1e-6, "the weight is a function of the two states"
            weights[i, j] = float(weight[here][0])
    for (i, j), weight in weights.items():
        np.testing.assert_allclose(weight, -weights[j, i], atol=1e-5)
        there = joint(STATES[i]) * proposals[i, j] * min(1.0, np.exp(weight))
        back = joint(STATES[j]) * proposals[j, i] * min(1.0, np.exp(weights[j, i]))
        np.testing.assert_allclose(there, back, rtol=1e-4)


@gen
def mixture():
    z = trace("z", Categorical)(probs=jnp.array([0.2, 0.5, 0.3]))
    return trace("y", Normal)(jnp.array([-2.0, 0.5, 1.5])[z], jnp.array([0.5, 1.0, 2.0])[z])


def test_metropolis_hastings_by_update_finds_the_posterior_of_an_indicator():
    y = 1.2
    likelihood = jax.scipy.stats.norm.pdf(y, jnp.array([-2.0, 0.5, 1.5]), jnp.array([0.5, 1.0, 2.0]))
    posterior = np.array([0.2, 0.5, 0.3]) * np.asarray(likelihood)
    posterior /= posterior.sum()

    def step(carry, key):
        tr = carry
        propose, accept = jax.random.split(key)
        proposal = (tr["z"] + jax.random.randint(propose, (), 1, 3)) % 3
        _, (_, weight, new, _) = mixture.update(key, tr, {"z": proposal}, ())
        taken = jnp.log(jax.random.uniform(accept)) < weight
        return jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, tr), None

    def chain(key):
        start, run = jax.random.split(key)
        _, (_, tr) = mixture.importance(start, {"z": 0, "y": y}, ())
        last, _ = jax.lax.scan(step, tr, jax.random.split(run, 60))
        return jax.nn.one_hot(last["z"], 3)

    last = jax.jit(jax.vmap(chain))(jax.random.split(KEY, 8000))
    assert_within_four_errors(last, posterior)


@pytest.mark.slow
def test_a_long_chain_of_regenerate_keeps_the_distribution():
    """From exact draws of the joint, moves that leave it invariant end in draws of the joint."""

    def run(key):
        start, chain = jax.random.split(key)
        _, tr = bits.simulate(start, ())

        def step(tr, key):
            for i, selection in enumerate((select("a"), select("b", "c"))):
                move, accept = jax.random.split(jax.random.fold_in(key, i))
                _, (_, weight, new) = bits.regenerate(move, tr, selection, ())
                taken = jnp.log(jax.random.uniform(accept)) < weight
                tr = jax.tree.map(lambda a, b, taken=taken: jnp.where(taken, a, b), new, tr)
            return tr, None

        last, _ = jax.lax.scan(step, tr, jax.random.split(chain, 20))
        return jnp.stack([last[name] for name in "abc"])

    last = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(KEY, SAMPLES)))
    for t in STATES:
        assert_within_four_errors(np.all(last == [t[name] for name in "abc"], axis=1).astype(float), joint(t))


def test_update_weights_of_a_cycle_add_up_to_nothing():
    """The weight is a difference of scores where nothing is drawn, so around a cycle it cancels."""
    _, (_, tr) = bits.importance(KEY, {"a": 0, "b": 0, "c": 0}, ())
    total = 0.0
    for change in ({"a": 1}, {"b": 1, "c": 1}, {"a": 0}, {"c": 0}, {"b": 0}):
        _, (_, weight, tr, _) = bits.update(KEY, tr, change, ())
        total += float(weight)
    np.testing.assert_allclose(total, 0.0, atol=1e-5)
    assert tr.strip() == choice_map({"a": jnp.int32(0), "b": jnp.int32(0), "c": jnp.int32(0)})

"""`Marginal` of choices that may be absent, against enumeration in float64.

All statistical bounds are 4 standard errors, of 10000 samples.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

import gjflax
from gjflax import (
    Bernoulli,
    Categorical,
    CustomImportance,
    DefaultImportance,
    Diff,
    Enumerate,
    EnumerationError,
    Map,
    Marginal,
    Mask,
    Masked,
    MissingChoiceError,
    Normal,
    NotImplementedByGenerativeFunctionError,
    Switch,
    Unfold,
    VectorChoiceMap,
    gen,
    select,
    trace,
)

KEY = jax.random.key(0)
SIZE = 10000


def within(samples: Any, expected: Any, what: str = "") -> None:
    """The mean over the first axis is what is expected, by 4 standard errors."""
    samples = np.asarray(samples, np.float64)
    error = 4 * samples.std(0) / np.sqrt(len(samples)) + 1e-6
    assert np.all(np.abs(samples.mean(0) - expected) <= error), (what, samples.mean(0), expected, error / 4)


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-5, atol=1e-5)


def one_hot(numbers: Any, count: int, values: Any = 1.0) -> np.ndarray:
    return np.eye(count)[np.asarray(numbers)] * np.asarray(values, np.float64)[..., None]


def bernoulli(value: int, p: float) -> float:
    return p if value else 1 - p


def real(value: Any) -> Any:
    return value.astype(jnp.float32)


# A hidden Markov model of a length that is not known ---------------------------------------------------------------------

STAY = np.array([0.3, 0.8])
Y = np.array([0.5, 1.5, -0.3, 2.2], np.float32)


@gen
def noisy(time, state):
    state = trace("s", Bernoulli)(probs=jnp.where(state == 1, 0.8, 0.3))
    trace("y", Normal)(2.0 * real(state), 1.0)
    return state


def forward(y: Any) -> float:
    """log p(y_1, …, y_n), by the forward algorithm."""
    p = np.array([1.0, 0.0])
    for one in y:
        p = np.array([p @ (1 - STAY), p @ STAY]) * stats.norm.pdf(one, [0.0, 2.0])
    return np.log(p.sum())


def test_a_hidden_markov_model_is_summed_out_at_every_length():
    exact = Marginal(Unfold(noisy, 4), "y", Enumerate())

    @jax.jit
    def run(n):
        args = (n, jnp.int32(0))
        _, (weight, tr) = exact.importance(KEY, {"y": Y}, args)
        return weight, tr, exact.assess(KEY, {"y": Y}, args)[1][1], exact.assess(KEY, tr.strip(), args)[1][1]

    for n in range(5):
        weight, tr, *scores = run(jnp.int32(n))
        for got in (weight, tr.get_score(), *scores):
            close(got, forward(Y[:n]))
        assert tr["y"].flag.tolist() == [time < n for time in range(4)]
    # What is there in full is given by index; what is not makes the density unknown.
    by_index = jax.jit(
        lambda n: exact.assess(KEY, VectorChoiceMap([0, 1], {"y": jnp.asarray(Y[:2])}), (n, jnp.int32(0)))[1][1]
    )
    close(by_index(1), forward(Y[:1]))
    close(by_index(2), forward(Y[:2]))
    assert np.isnan(by_index(3))
    flags = jnp.array([True, False, True, True])
    flagged = jax.jit(lambda n: exact.assess(KEY, {"y": Masked(jnp.asarray(Y), flags)}, (n, jnp.int32(0)))[1][1])
    close(flagged(1), forward(Y[:1]))
    assert np.isnan(flagged(2))
    with pytest.raises(MissingChoiceError, match='"y"'):
        exact.assess(KEY, {}, (4, jnp.int32(0)))


@gen
def coin_flipped():
    z = trace("z", Bernoulli)(probs=0.3)
    trace("y", Normal)(2.0 * z.astype(jnp.float32), 1.0)


def test_elements_that_are_given_by_a_jax_array_of_indices():
    marginal, y = Marginal(Map(coin_flipped, in_axes=None, repeats=3), "y", Enumerate()), jnp.array([0.4, -1.0, 2.0])
    terms = [np.log(0.7) + stats.norm.logpdf(y), np.log(0.3) + stats.norm.logpdf(y, 2.0)]
    by_hand = np.sum(special.logsumexp(terms, axis=0))
    for indices in (range(3), np.arange(3), jnp.arange(3), jnp.array([2, 0, 1])):
        given = VectorChoiceMap(indices, {"y": y[np.asarray(indices)]})
        np.testing.assert_allclose(marginal.assess(KEY, given, ())[1][1], by_hand, rtol=1e-5)
        np.testing.assert_allclose(marginal.importance(KEY, given, ())[1][0], by_hand, rtol=1e-5)


def test_updates_of_a_hidden_markov_model_are_differences_of_the_forward_algorithm():
    exact = Marginal(Unfold(noisy, 4), "y", Enumerate())

    @jax.jit
    def run(n, m, new):
        _, (_, tr) = exact.importance(KEY, {"y": Y}, (n, jnp.int32(0)))
        return exact.update(KEY, tr, {"y": new}, (m, jnp.int32(0)))[1][1:]

    for n, m in [(2, 4), (4, 1), (3, 3), (0, 2)]:
        here = np.arange(4) == 1
        weight, after, discard = run(n, m, Masked(jnp.full(4, 0.25), jnp.asarray(here | (np.arange(4) >= n))))
        kept = np.where(here | (np.arange(4) >= n), 0.25, Y)
        close(weight, forward(kept[:m]) - forward(Y[:n]))
        close(after.get_score(), forward(kept[:m]))
        gone = (np.arange(4) < n) & (here | (np.arange(4) >= m))
        assert discard["y"].flag.tolist() == gone.tolist()
        close(np.asarray(discard["y"].value)[gone], Y[gone])


# Choices that branches and flags leave out -------------------------------------------------------------------------------


@gen
def coin(h):
    g = trace("g", Bernoulli)(probs=jnp.where(h == 1, 0.9, 0.4))
    return 1.5 * real(g)


@gen
def none(h):
    return 0.5 * real(h)


@gen
def everything(i, flag):
    """A hidden choice in one branch, one behind a flag that is an argument, and one behind a hidden choice."""
    h = trace("h", Bernoulli)(probs=0.3)
    loc = trace("branch", Switch((coin, none)))(i, h)
    first = trace("first", Mask(Categorical))(flag, jnp.log(jnp.array([0.2, 0.5, 0.3]))).unmask(0)
    second = trace("second", Mask(Categorical))(h == 1, jnp.log(jnp.array([0.6, 0.1, 0.3]))).unmask(0)
    return trace("y", Normal)(loc + real(first) - 2.0 * real(second), 1.0)


def by_hand(y: float, i: int, flag: bool) -> float:
    total = 0.0
    for h in range(2):
        for g in range(2) if i == 0 else [0]:
            for first, second in itertools.product(range(3) if flag else [0], range(3) if h else [0]):
                p = bernoulli(h, 0.3)
                p *= bernoulli(g, 0.9 if h else 0.4) if i == 0 else 1.0
                p *= [0.2, 0.5, 0.3][first] if flag else 1.0
                p *= [0.6, 0.1, 0.3][second] if h else 1.0
                total += p * stats.norm.pdf(y, (1.5 * g if i == 0 else 0.5 * h) + first - 2.0 * second)
    return np.log(total)


def test_what_is_absent_is_summed_over_once():
    exact = Marginal(everything, "y", Enumerate())

    @jax.jit
    def run(i, flag):
        return exact.assess(KEY, {"y": 0.7}, (i, flag))[1][1], exact.simulate(KEY, (i, flag))[1]

    for i, flag in itertools.product(range(2), (False, True)):
        score, tr = run(i, flag)
        close(score, by_hand(0.7, i, flag))
        close(tr.get_score(), by_hand(float(tr["y"]), i, flag))


def test_the_hidden_choices_that_are_found_are_those_of_the_posterior():
    exact = Marginal(everything, "y", Enumerate())
    run = jax.jit(jax.vmap(lambda key: exact.importance(key, {"y": 0.7}, (1, True))[1][1].inner))
    inner = run(jax.random.split(KEY, SIZE))
    logits = np.array(
        [
            [
                np.log(bernoulli(h, 0.3) * [0.2, 0.5, 0.3][first])
                + special.logsumexp(
                    [
                        np.log([0.6, 0.1, 0.3][second] if h else 1.0)
                        + stats.norm.logpdf(0.7, 0.5 * h + first - 2.0 * second)
                        for second in (range(3) if h else [0])
                    ]
                )
                for first in range(3)
            ]
            for h in range(2)
        ]
    ).ravel()
    within(one_hot(3 * np.asarray(inner["h"]) + np.asarray(inner["first"].value), 6), special.softmax(logits))


def test_branches_that_share_an_address_have_the_same_values():
    @gen
    def three():
        return trace("c", Categorical)(jnp.zeros(3)).astype(jnp.float32)

    @gen
    def two():
        return trace("c", Categorical)(jnp.zeros(2)).astype(jnp.float32)

    def model_of(*branches):
        @gen
        def model(i):
            trace("y", Normal)(trace("branch", Switch(branches))(i), 1.0)

        return Marginal(model, "y", Enumerate())

    score = jax.jit(lambda i: model_of(three, three).assess(KEY, {"y": 0.5}, (i,))[1][1])(0)
    close(score, special.logsumexp(stats.norm.logpdf(0.5, np.arange(3.0))) - np.log(3))
    with pytest.raises(EnumerationError, match=r'"c"\) .* other values in one branch than in another'):
        model_of(three, two).assess(KEY, {"y": 0.5}, (0,))


# Kept choices that may be absent, with an estimate ------------------------------------------------------------------------
#
# Kept are "c" and that of "a" and "b" which it takes; hidden are "h", and "g" beside "a".

PC, PH = 0.35, [0.3, 0.8]
PG, PA, PB = [0.25, 0.7], [0.2, 0.9], [0.6, 0.15]


@gen
def left(h):
    g = trace("g", Bernoulli)(probs=jnp.array(PG)[h])
    return trace("a", Bernoulli)(probs=jnp.array(PA)[g])


@gen
def right(h):
    return trace("b", Bernoulli)(probs=jnp.array(PB)[h])


@gen
def branching(p):
    c = trace("c", Bernoulli)(probs=p)
    h = trace("h", Bernoulli)(probs=jnp.array(PH)[c])
    return trace("branch", Switch((left, right)))(c, h)


@gen
def coin_of_left(h):
    trace("g", Bernoulli)(probs=0.5)


@gen
def nothing(h):
    return None


@gen
def proposal(kept, p):
    h = trace("h", Bernoulli)(probs=0.4)
    trace("branch", Switch((coin_of_left, nothing)))(kept["c"], h)


def density(p: float) -> np.ndarray:
    """p(c, a or b)."""
    table = np.zeros((2, 2))
    for c, h, g, x in itertools.product(range(2), repeat=4):
        joint = bernoulli(c, p) * bernoulli(h, PH[c]) * bernoulli(g, PG[h])
        table[c, x] += joint * bernoulli(x, PB[h] if c else PA[g])
    return table


TABLE = density(PC)
assert np.isclose(TABLE.sum(), 1)
KEPT = select("c", ("branch", "a"), ("branch", "b"))
ALGORITHMS = {
    "prior": DefaultImportance(),
    "prior of 3": DefaultImportance(3),
    "proposal of 2": CustomImportance(proposal, 2),
    "sum": Enumerate(),
}
MOVES = {
    "c": ("c",),
    "b": (("branch", "b"),),
    "c and a": ("c", ("branch", "a")),
}


def number(choices: Any) -> Any:
    """The number of a state, 2c + x."""
    return 2 * choices["c"] + jnp.where(choices["c"] == 1, choices["branch", "b"].value, choices["branch", "a"].value)


@functools.cache
def drawn(name: str) -> Any:
    """10000 runs of every method."""
    m = Marginal(branching, KEPT, ALGORITHMS[name])

    def run(key: Any) -> Any:
        keys = iter(jax.random.split(key, 12))
        _, tr = m.simulate(next(keys), (PC,))
        state = jax.random.randint(next(keys), (2,), 0, 2)
        given = {"c": state[0], ("branch", "a"): state[1], ("branch", "b"): state[1]}
        score = m.assess(next(keys), given, (PC,))[1][1]
        weight, part = m.importance(next(keys), {"c": 1}, (PC,))[1]
        _, (_, of_update, changed, discard) = m.update(next(keys), tr, {"c": 1}, (PC,))
        moves = {}
        for title, addresses in MOVES.items():
            _, (_, of_move, new) = m.regenerate(next(keys), tr, select(*addresses), Diff.mark((PC,), Diff.no_change))
            accepted = jnp.log(jax.random.uniform(next(keys))) < of_move
            moved = gjflax.choose(accepted, new, tr)
            moves[title] = (number(moved.strip()), moved.get_score(), number(new.strip()))
        parts = (weight, number(part.strip()), part.get_score())
        updated = (of_update, number(changed.strip()), changed.get_score(), discard["branch", "a"].flag)
        return (number(tr.strip()), tr.get_score()), (2 * state[0] + state[1], score), parts, updated, moves

    return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(1), SIZE))


each_algorithm = pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS])


@each_algorithm
def test_every_method_is_that_of_the_density(name: str):
    (states, scores), (given, assessed), (weights, parts, of_parts), updated, moves = drawn(name)
    p, inverse = TABLE.ravel(), lambda score: np.exp(-np.float64(score))
    within(one_hot(states, 4), p, "simulate: u ~ p")
    within(one_hot(states, 4, inverse(scores)), np.ones(4), "simulate: E[1/ξ | u] = 1/p(u)")
    within(4 * one_hot(given, 4, np.exp(np.float64(assessed))), p, "assess: E[ξ] = p(u)")
    # Given c = 1, "b" is drawn.
    weights = np.exp(np.float64(weights))
    agrees = np.array([0, 0, 1, 1])
    within(one_hot(parts, 4, weights), p * agrees, "importance: E[exp w · 1{u}] = p(u)")
    within(one_hot(parts, 4, weights * inverse(of_parts)), agrees, "importance: E[exp w · 1{u} / ξ] = 1")
    # From c = 0, whose two values of "a" are gone, "b" is drawn; from c = 1 it stays.
    weights, states_after, scores_after, gone = updated
    weights = np.exp(np.float64(weights))
    within(one_hot(states_after, 4, weights), 3 * p * agrees, "update: Σ_u E[exp w · 1{u'} | u] p(u)")
    within(one_hot(states_after, 4, weights * inverse(scores_after)), 3 * agrees, "update: the same with 1/ξ'")
    np.testing.assert_array_equal(gone, np.asarray(states) < 2)
    for title, (after, scores_after, proposed) in moves.items():
        assert np.mean(np.asarray(proposed) != np.asarray(states)) > 0.1, "the move moves"
        within(one_hot(after, 4), p, f"regenerate {title}: u ~ p")
        within(one_hot(after, 4, inverse(scores_after)), np.ones(4), f"regenerate {title}: (u, e) ~ π")


@pytest.mark.slow
def test_a_chain_that_grows_is_properly_weighted():
    """New kept steps are drawn, and those that are gone are discarded; kept are Bernoulli."""

    @gen
    def step(time, state):
        state = trace("s", Bernoulli)(probs=jnp.where(state == 1, 0.8, 0.3))
        trace("y", Bernoulli)(probs=jnp.where(state == 1, 0.9, 0.4))
        return state

    def table(n: int) -> np.ndarray:
        result = np.zeros((2,) * n)
        for y in np.ndindex(result.shape):
            p = np.array([1.0, 0.0])
            for one in y:
                p = np.array([p @ (1 - STAY), p @ STAY]) * [bernoulli(one, 0.4), bernoulli(one, 0.9)]
            result[y] = p.sum()
        return result.ravel()

    m = Marginal(Unfold(step, 3), "y", DefaultImportance(2))

    def run(key, n, k):
        first, second, third, fourth = jax.random.split(key, 4)
        _, tr = m.simulate(first, (n, jnp.int32(0)))
        _, (_, weight, new, _) = m.update(second, tr, {}, (k, jnp.int32(0)))
        nothing = Diff.mark((n, jnp.int32(0)), Diff.no_change)
        _, (_, of_move, moved) = m.regenerate(third, tr, select(("y", 1)), nothing)
        accepted = jnp.log(jax.random.uniform(fourth)) < of_move
        return weight, new["y"].value, gjflax.choose(accepted, moved, tr)["y"].value

    runs = jax.jit(jax.vmap(run, in_axes=(0, None, None)))

    def number_of(y, n):
        return np.asarray(y)[:, :n] @ (2 ** np.arange(n)[::-1])

    for n, k in ((1, 3), (3, 1), (2, 2)):
        weights, y, moved = runs(jax.random.split(jax.random.key(2), SIZE), jnp.int32(n), jnp.int32(k))
        # A value that is gone counts for each that it may have had.
        want = table(k) * 2 ** max(n - k, 0)
        within(one_hot(number_of(y, k), 2**k, np.exp(np.float64(weights))), want)
        within(one_hot(number_of(moved, n), 2**n), table(n), "a move is stationary")


# What is refused ---------------------------------------------------------------------------------------------------------


def test_hidden_choices_that_decide_what_is_kept_are_refused():
    decides = Marginal(branching, [("branch", "a"), ("branch", "b")], DefaultImportance())
    with pytest.raises(
        NotImplementedByGenerativeFunctionError,
        match=r'\("branch", "a"\) is there depends on a hidden choice .* Keep the',
    ):
        jax.eval_shape(lambda: decides.simulate(KEY, (PC,)))
    behind = Marginal(Unfold(masked_by_state, 3), "y", DefaultImportance())
    for length in (3, jnp.int32(2)):
        with pytest.raises(NotImplementedByGenerativeFunctionError, match='"y" is there depends on a hidden choice'):
            jax.eval_shape(lambda length=length: behind.simulate(KEY, (length, jnp.int32(0))))
    # A flag that the time says depends on no choice.
    jax.eval_shape(lambda: Marginal(Unfold(masked_by_time, 3), "y").simulate(KEY, (jnp.int32(2), jnp.int32(0))))


@gen
def masked_by_state(time, state):
    state = trace("s", Bernoulli)(probs=0.5)
    trace("y", Mask(Normal))(state == 1, 0.0, 1.0)
    return state


@gen
def masked_by_time(time, state):
    state = trace("s", Bernoulli)(probs=0.5)
    trace("y", Mask(Normal))(time > 0, 2.0 * real(state), 1.0)
    return state


def test_a_proposal_of_choices_that_are_absent_is_no_proposal():
    @gen
    def too_many(kept, n, state):
        trace("s", Map(Bernoulli, repeats=3))(0.5)

    m = Marginal(Unfold(noisy, 3), "y", CustomImportance(too_many))
    run = jax.jit(lambda n: m.assess(KEY, {"y": Y[:3]}, (n, jnp.int32(0)))[1][1])
    assert np.isfinite(run(3)) and np.isnan(run(2))

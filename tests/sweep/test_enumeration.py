"""Programs whose choices are finite, against the list of all that they may choose."""

from __future__ import annotations

import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sweep import expressions as ex
from sweep.choices import filled, flat
from sweep.families import FINITE
from sweep.generate import Writer
from sweep.interpreter import Staged, interpreted
from sweep.laws import Session
from sweep.programs import MissingChoice, Values, World
from sweep.writers import default_dialect

import gjflax
from gjflax import Bernoulli, Categorical, Cond, Diff, Mix, Normal, choice_map, choose, gen, select, trace

DIALECT = default_dialect(families=FINITE, networks=False, vectors=False, sites=3, depth=2)
DRAWS = 2000


def all_runs(session: Session, values: Values | None = None) -> list[tuple[Values, float, Any]]:
    """Every run of a program: its choices, their log density, and what it returns."""
    values = values or {}
    world = World(values)
    try:
        retval = session.node.run(world, (), ex.to_float64(session.args), {})
    except MissingChoice as missing:
        return [run for value in missing.values for run in all_runs(session, {**values, missing.address: value})]
    return [(values, sum(site.log_density for site in world.sites.values()), retval)]


def finite_programs(count: int, first: int) -> list[Session]:
    """Programs with at least two runs, and few enough to list."""
    found: list[Session] = []
    seed = first
    while len(found) < count:
        decide = random.Random(seed).randrange
        writer = Writer(decide, DIALECT)
        node = writer.program()
        leaves = [part for part in node.walk() if hasattr(part, "family")]
        # Elements and steps multiply.
        if leaves and not node.has_parameters and 3 ** _draws(node) <= 3000:
            session = Session(node, writer)
            if len(all_runs(session)) > 1:
                found.append(session)
        seed += 1
    return found


def _draws(node: Any) -> int:
    """How many choices of a program there are at most."""
    own = 1 if hasattr(node, "family") or type(node).__name__ == "Mix" else 0
    return (own + sum(map(_draws, node.children))) * getattr(node, "length", 1)


def check_density(session: Session) -> None:
    """The densities of all runs add up to 1, and `assess` gives each, with the return value."""
    runs = all_runs(session)
    assert sum(np.exp(log_density) for _, log_density, _ in runs) == pytest.approx(1, abs=1e-9)
    like = session.need_state().choice_map
    args = ex.to_jax(session.args)
    run = lambda choices: session.module.assess(jax.random.key(0), choices, args)[1]
    assess = Staged(run, like)
    for values, log_density, expected in runs[:60]:
        retval, score = assess(filled(like, values))
        session.equal_numbers(f"assess of {values}", score, log_density, [log_density])
        session.equal_values(f"assess of {values}", retval, expected)


def check_importance(session: Session, decide: Any) -> bool:
    """E[exp w] = p(constraints), where a constraint of a choice that a run does not make says nothing.

    Where the draws show every run, the expectation is the sum over the runs of q(run) exp w, with q = exp(score − w); else
    it is the draws' mean, with a bound of 4 standard errors. The result says whether it was the sum.
    """
    runs = all_runs(session)
    like = session.need_state().choice_map
    named, _, _ = runs[decide(len(runs))]
    constraints = filled(like, named)
    picked = [address for address in like.addresses() if decide(2)]
    constraints = constraints.filter(select(picked)) if () not in picked else constraints
    given = flat(constraints)
    agree = lambda values: all(values[address] == value for address, value in given.items() if address in values)
    agreeing = [log_density for values, log_density, _ in runs if agree(values)]
    expected = np.sum(np.exp(agreeing))
    args = ex.to_jax(session.args)

    def draw(words: Any, constraints: Any) -> Any:
        def run(word: Any) -> Any:
            _, (weight, tr) = session.module.importance(jax.random.wrap_key_data(word), constraints, args)
            return weight, tr.get_score(), tr.strip()

        return jax.vmap(run)(words)

    words = np.random.default_rng(0).integers(0, 2**32, (DRAWS, 2), np.uint32)
    weights, scores, choices = interpreted(draw, words, constraints)[0]
    rows = np.concatenate([np.reshape(leaf, (DRAWS, -1)).astype(np.float64) for leaf in jax.tree.leaves(choices)], 1)
    _, distinct = np.unique(rows, axis=0, return_index=True)
    found = f"importance {given}: p = {expected}"
    if len(distinct) == len(agreeing):
        log_q = np.asarray(scores, np.float64)[distinct] - weights[distinct]
        session.require(abs(np.sum(np.exp(log_q)) - 1) < 1e-4, f"{found}, Σ q = {np.sum(np.exp(log_q))}")
        mean = np.sum(np.exp(log_q + weights[distinct]))
        session.require(abs(mean - expected) <= 1e-4 * expected, f"{found}, E[exp w] = {mean}")
        return True
    drawn = np.exp(np.asarray(weights, np.float64))
    error = drawn.std() / np.sqrt(DRAWS)
    session.require(abs(drawn.mean() - expected) <= 4 * error + 1e-5, f"{found}, E[exp w] = {drawn.mean()}")
    return False


def check(count: int, first: int) -> None:
    summed = 0
    for session in finite_programs(count, first):
        session.simulate()
        check_density(session)
        summed += check_importance(session, session.decide)
    assert summed >= count // 2, "the expectation was seldom found by enumeration"


def test_finite_programs_are_what_enumeration_says():
    check(8, 0)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(4))
def test_many_finite_programs_are_what_enumeration_says(shard: int):
    check(60, 10_000 * (1 + shard))


# The indicator of a mixture ------------------------------------------------------------------------------------------

CHAINS, STEPS = 3000, 30


@gen
def near(loc):
    return trace("y", Normal)(loc, 0.5)


@gen
def far(loc):
    """The same address, and one of its own."""
    shift = trace("shift", Normal)(3.0, 1.0)
    return trace("y", Normal)(loc + shift, 0.8)


@gen
def jumping(loc):
    z = trace("z", Bernoulli)(probs=0.3)
    return trace("branch", Cond(far, near))(z == 1, loc)


def frequencies(kernel: Any, first: Any) -> Any:
    """The last states of many chains."""

    def chain(words: Any) -> Any:
        keys = jax.random.split(jax.random.wrap_key_data(words), STEPS + 1)
        last, _ = jax.lax.scan(lambda state, key: (kernel(key, state), None), first(keys[0]), keys[1:])
        return last

    words = np.random.default_rng(1).integers(0, 2**32, (CHAINS, 2), np.uint32)
    return interpreted(jax.vmap(chain), words)[0]


def close(drawn: Any, expected: float) -> None:
    bound = 4 * np.sqrt(expected * (1 - expected) / CHAINS)
    assert abs(np.mean(drawn) - expected) <= bound, (np.mean(drawn), expected)


def test_regenerating_the_indicator_recovers_its_posterior():
    """Branches with a choice that both have and one that only one has: a move between dimensions."""
    loc, y = jnp.float32(0.2), 1.4

    def first(key: Any) -> Any:
        return jumping.importance(key, {"branch": {"y": jnp.float32(y)}}, (loc,))[1][1]

    def kernel(key: Any, old: Any) -> Any:
        key, (_, weight, new) = jumping.regenerate(key, old, select("z"), (Diff.no_change(loc),))
        return choose(jnp.log(jax.random.uniform(key)) < weight, new, old)

    last = frequencies(lambda key, tr: kernel(key, tr), first)
    weights = np.array([0.7 * stats.norm.pdf(y, 0.2, 0.5), 0.3 * stats.norm.pdf(y, 3.2, np.hypot(1.0, 0.8))])
    close(np.asarray(last.choices["z"].value) == 1, weights[1] / weights.sum())


def test_updating_the_indicator_recovers_its_posterior():
    """A proposal of another component; the weight of `update` is the log ratio of the densities."""
    model = Mix((Normal, Normal, gjflax.Laplace))
    logits = jnp.log(jnp.array([0.2, 0.5, 0.3]))
    args = (logits, (0.0, 0.5), (1.0, 2.0), (2.0, 1.0))
    y = 0.9

    def first(key: Any) -> Any:
        return model.importance(key, choice_map({"value": jnp.float32(y)}), args)[1][1]

    def kernel(key: Any, old: Any) -> Any:
        step, accept, key = jax.random.split(key, 3)
        other = (old["component"] + jax.random.randint(step, (), 1, 3)) % 3
        _, (_, weight, new, _) = model.update(
            key, old, choice_map({"component": other}), Diff.mark(args, Diff.no_change)
        )
        return choose(jnp.log(jax.random.uniform(accept)) < weight, new, old)

    last = frequencies(kernel, first)
    densities = [stats.norm.pdf(y, 0.0, 0.5), stats.norm.pdf(y, 1.0, 2.0), stats.laplace.pdf(y, 2.0, 1.0)]
    weights = np.array([0.2, 0.5, 0.3]) * densities
    for number, expected in enumerate(weights / weights.sum()):
        close(np.asarray(last.strip()["component"]) == number, expected)
    # The library sums the indicator out by itself.
    _, log_posterior = model.log_posterior(jax.random.key(0), y, args)
    np.testing.assert_allclose(np.exp(log_posterior), weights / weights.sum(), rtol=1e-5)


def test_a_program_of_two_bits_is_in_balance_under_regenerate():
    """π(t) q(t → t') min(1, e^w) is symmetric, for all pairs of the states of two bits."""

    @gen
    def bits():
        a = trace("a", Bernoulli)(probs=0.3)
        return trace("b", Categorical)(
            jnp.where(a == 1, jnp.log(jnp.array([0.2, 0.8])), jnp.log(jnp.array([0.6, 0.4])))
        )

    p_a, p_b = [0.7, 0.3], [[0.6, 0.4], [0.2, 0.8]]

    def move(words: Any, a: Any) -> Any:
        key = jax.random.wrap_key_data(words)
        _, (_, tr) = bits.importance(key, {"a": a, "b": jnp.int32(1)}, ())
        _, (_, weight, new) = bits.regenerate(key, tr, select("a"), ())
        return new["a"], weight

    moves = Staged(move, np.zeros(2, np.uint32), np.int32(0))
    flow = np.zeros((2, 2))
    for a in (0, 1):
        for seed in range(30):
            to, weight = moves(np.array([0, seed], np.uint32), np.int32(a))
            assert weight == pytest.approx(np.log(p_b[int(to)][1] / p_b[a][1]), abs=1e-5)
            flow[a, int(to)] = p_a[a] * p_b[a][1] * p_a[int(to)] * min(1.0, np.exp(weight))
    assert np.all(flow > 0)
    np.testing.assert_allclose(flow, flow.T, rtol=1e-5)

"""`Unfold` with a length that is not known while tracing: what counts, what changes, and what never compiles twice."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.chain import (
    ARGS,
    DRAW,
    KEY,
    NAMES,
    OTHER_ARGS,
    N,
    chain,
    close,
    only,
    plain,
    states,
    terms,
    total,
    types,
)

from gjflax import (
    Diff,
    Exponential,
    Unfold,
    VectorChoiceMap,
    gen,
    select,
    trace,
)


@pytest.fixture(scope="module")
def tr() -> Any:
    return jax.jit(lambda key: chain.simulate(key, (N, *ARGS))[1])(DRAW)


@pytest.fixture(scope="module")
def short() -> Any:
    """Traces of every length, all of one structure: a length that is an array, or below the maximal one."""
    simulate = jax.jit(lambda key, n: chain.simulate(key, (n, *ARGS))[1])
    return [simulate(jax.random.fold_in(DRAW, n), n) for n in range(N + 1)]


# A length that is not known --------------------------------------------------------------------------------------------


def test_beyond_the_length_nothing_counts(short: Any):
    for length, one in enumerate(short):
        close(one.get_score(), total(one, length=length))
        close(one.get_retval(), states(one, length=length))
        for name in NAMES:
            np.testing.assert_array_equal(one[name].flag, np.arange(N) < length)
        close(one.project(select("x")), total(one, length=length, of=["x"]))
        close(one.project(select((1, "x"))), terms(one, length=length)["x"][1:2].sum())
        close(one.project(~select((1, "x"))), total(one, length=length) - terms(one, length=length)["x"][1:2].sum())


@pytest.mark.slow
def test_a_shorter_length_is_like_an_array(short: Any):
    """One that is known but not the maximal one, so that it may change from update to update."""
    for length in range(N):
        known = jax.jit(lambda key, n=length: chain.simulate(key, (n, *ARGS))[1])(jax.random.fold_in(DRAW, length))
        assert types(known) == types(short[length])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), known, short[length])
    for length in (np.int32(2), np.array(2), jnp.uint8(2)):
        _, one = chain.simulate(KEY, (length, *ARGS))
        assert one.get_args()[0] == 2 and one.get_args()[0].dtype == jnp.int32


def test_a_length_compiles_once():
    calls = {
        "simulate": jax.jit(lambda n: chain.simulate(KEY, (n, *ARGS))[1]),
        "importance": jax.jit(lambda n: chain.importance(KEY, {(0, "x"): 1.0}, (n, *ARGS))[1]),
    }
    for call in calls.values():
        for n in range(N + 1):
            call(n)
        assert call._cache_size() == 1


def test_steps_do_not_depend_on_how_many_follow(short: Any):
    """Each step has a key of its own, split beforehand."""
    simulate = jax.jit(lambda n: chain.simulate(KEY, (n, *ARGS))[1])
    full = chain.simulate(KEY, (N, *ARGS))[1]
    for n in range(1, N + 1):
        for name in NAMES:
            np.testing.assert_allclose(plain(simulate(n)[name])[:n], full[name][:n], rtol=1e-5)


def test_assess_of_a_length(tr: Any, short: Any):
    assess = jax.jit(lambda choices, n: chain.assess(KEY, choices, (n, *ARGS))[1])
    for n in range(N + 1):
        retval, score = assess(tr.strip(), n)
        close(score, total(tr, length=n))
        close(retval, states(tr, length=n))
        # Choices of a trace of that length, and those of some of the steps.
        close(assess(short[n].strip(), n)[1], short[n].get_score())
        some = VectorChoiceMap(range(2), jax.tree.map(lambda leaf: leaf[:2], tr.strip().inner))
        score = assess(some, n)[1]
        assert np.isnan(score) if n > 2 else np.allclose(score, total(tr, length=n), atol=1e-4)
    assert np.isnan(assess(short[2].strip(), 3)[1]), "a choice that is absent has no density"
    close(assess(short[3].strip(), 2)[1], total(short[3], length=2))


@pytest.mark.parametrize("names", [("x", "y"), pytest.param(NAMES, marks=pytest.mark.slow)])
def test_importance_of_a_length(tr: Any, names: Any):
    run = jax.jit(lambda n: chain.importance(KEY, only(tr, names), (n, *ARGS))[1])
    for n in range(N + 1):
        weight, new = run(n)
        close(weight, total(new, length=n, of=names))
        close(new.get_score(), total(new, length=n))
        close(new.get_retval(), states(new, length=n))


def test_every_change_of_length(tr: Any, short: Any):
    """Growing draws or takes up the new steps, shrinking drops the last ones, and one program does both."""
    at = jnp.array([1, 3])

    @jax.jit
    def run(old, n, values, args):
        given = VectorChoiceMap(at, {"x": values})
        key, (retdiff, weight, new, discard) = chain.update(KEY, old, given, (n, *args))
        _, (_, back_weight, back, _) = chain.update(key, new, discard, old.get_args())
        return Diff.primal(retdiff), weight, new, discard, back_weight, back

    values = jnp.array([3.0, -2.0])
    for (before, old), after in itertools.product(enumerate(short), range(N + 1)):
        for args in (ARGS, OTHER_ARGS):
            retval, weight, new, discard, back_weight, back = run(old, after, values, args)
            kept = min(before, after)
            for name in NAMES:
                want = plain(old[name])[:kept].copy()
                for index, value in zip((1, 3), (3.0, -2.0), strict=True):
                    if name == "x" and index < kept:
                        want[index] = value
                np.testing.assert_array_equal(plain(new[name])[:kept], want)
                np.testing.assert_array_equal(new[name].flag, np.arange(N) < after)
                # What was overwritten or is gone, and nothing else.
                gone = (np.arange(N) >= after) & (np.arange(N) < before)
                if name == "x":
                    gone |= np.isin(np.arange(N), [1, 3]) & (np.arange(N) < kept)
                np.testing.assert_array_equal(discard[name].flag, gone)
                np.testing.assert_array_equal(plain(discard[name])[gone], plain(old[name])[gone])
            for index, value in zip((1, 3), (3.0, -2.0), strict=True):
                assert index >= after or plain(new["x"])[index] == value
            here = terms(new, args, after)
            fresh = sum(here[name][kept:].sum() for name in NAMES)
            fresh -= sum(here["x"][index] for index in (1, 3) if kept <= index < after)
            close(weight, total(new, args, after) - total(old, length=before) - fresh)
            close(new.get_score(), total(new, args, after))
            close(retval, states(new, args, after))
            assert types(new) == types(old)
            close(back_weight, old.get_score() - new.get_score())
            if after <= before:
                close(back_weight, -weight)
            for name in NAMES:
                np.testing.assert_array_equal(plain(back[name])[:before], plain(old[name])[:before])
            close(back.get_score(), old.get_score())
    assert run._cache_size() == 1


def test_regenerate_changes_the_length(short: Any):
    run = jax.jit(lambda old, n: chain.regenerate(KEY, old, select("x"), (n, *OTHER_ARGS))[1])
    some = jax.jit(lambda old, n: chain.regenerate(KEY, old, select((0, "x"), (2, "y")), (n, *OTHER_ARGS))[1])
    for (before, old), after in itertools.product(enumerate(short), range(N + 1)):
        kept = min(before, after)
        retdiff, weight, new = run(old, after)
        here, there = terms(new, OTHER_ARGS, after), terms(old, length=before)
        close(weight, sum((here[name][:kept] - there[name][:kept]).sum() for name in ("coin", "y")))
        close(new.get_score(), total(new, OTHER_ARGS, after))
        close(Diff.primal(retdiff), states(new, OTHER_ARGS, after))
        assert types(new) == types(old)
        _, weight, new = some(old, after)
        here = terms(new, OTHER_ARGS, after)
        difference = {name: here[name][:kept] - there[name][:kept] for name in NAMES}
        redrawn = difference["x"][:1].sum() + difference["y"][2:3].sum()
        close(weight, sum(part.sum() for part in difference.values()) - redrawn)
        close(new.get_score(), total(new, OTHER_ARGS, after))


def test_a_length_that_stays_discards_only_what_is_overwritten(short: Any):
    old = short[3]
    diffs = (Diff.no_change(old.get_args()[0]), *map(Diff.unknown_change, OTHER_ARGS))
    _, (_, weight, new, discard) = chain.update(KEY, old, {(3, "x"): 9.0, (1, "x"): 3.0}, diffs)
    assert discard.addresses() == [("x",)] and discard.index_array().tolist() == [3, 1]
    np.testing.assert_array_equal(discard.inner["x"].flag, [False, True])
    assert discard.inner["x"].value[1] == plain(old["x"])[1]
    close(weight, total(new, OTHER_ARGS, 3) - total(old, length=3))
    _, (_, _, _, discard) = chain.update(KEY, old, {}, diffs)
    assert discard.is_empty()


@pytest.mark.slow
def test_lengths_of_a_batch(short: Any):
    lengths = jnp.arange(N + 1)
    keys = jax.random.split(KEY, N + 1)

    def move(key, n):
        key, one = chain.simulate(key, (n, *ARGS))
        _, (_, weight, new, discard) = chain.update(key, one, {(1, "x"): 3.0}, ((n + 2) % (N + 1), *ARGS))
        return one, weight, new, discard

    batched = jax.vmap(move)(keys, lengths)
    for n in range(N + 1):
        alone = jax.jit(move)(keys[n], lengths[n])
        one = jax.tree.map(lambda leaf, n=n: leaf[n], batched)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, alone)
        close(batched[0].get_score()[n], alone[0].get_score())
        close(jax.tree.map(lambda leaf, n=n: leaf[n], batched[2].get_retval()), alone[2].get_retval())
        close(batched[0].project(select((0, "x")))[n], alone[0].project(select((0, "x"))))
    np.testing.assert_array_equal(batched[0]["x"].flag, np.arange(N)[None] < np.arange(N + 1)[:, None])


@gen
def waits(time, rate):
    """A choice whose density has no derivative outside of its support."""
    x = trace("x", Exponential)(rate)
    return 0.5 + jnp.sqrt(x)


@pytest.mark.parametrize("padding", [np.nan, pytest.param(0.0, marks=pytest.mark.slow)])
def test_derivatives_are_finite_whatever_stands_beyond_the_length(padding: float):
    """Padding may be anything: zero times an infinite derivative would be no number."""
    x = jnp.array([0.5, 2.0, padding, padding])

    def score(x, rate, n):
        return Unfold(waits, N).assess(KEY, {"x": x}, (n, rate))[1][1]

    gradient = jax.grad(score, argnums=(0, 1))
    # d/dx of log r0 - r0 x0 + log r1 - r1 x1 with r1 = 1/2 + sqrt(x0).
    rate, slope = 0.5 + np.sqrt(0.5), 0.5 / np.sqrt(0.5)
    want = [-1.5 + slope * (1 / rate - 2.0), -rate, 0.0, 0.0], 1 / 1.5 - 0.5
    batched = jax.vmap(gradient, (None, None, 0))(x, 1.5, jnp.array([2, 1]))
    for got in (gradient(x, 1.5, 2), jax.jit(gradient)(x, 1.5, 2), jax.tree.map(lambda leaf: leaf[0], batched)):
        close(got, want)
    close(jax.tree.map(lambda leaf: leaf[1], batched), ([-1.5, 0.0, 0.0, 0.0], 1 / 1.5 - 0.5))


@pytest.mark.slow
def test_jit_changes_nothing(tr: Any, short: Any):
    calls = [
        lambda tr: chain.simulate(KEY, tr.get_args()),
        lambda tr: chain.importance(KEY, {(1, "x"): 3.0}, tr.get_args()),
        lambda tr: chain.assess(KEY, tr.strip(), tr.get_args()),
        lambda tr: chain.update(KEY, tr, {(1, "x"): 3.0}, tr.get_args()),
        lambda tr: chain.regenerate(KEY, tr, select((1, "x")), tr.get_args()),
    ]
    for one in (tr, short[2]):
        for call in calls:
            eager, compiled = call(one), jax.jit(call)(one)
            assert types(eager) == types(compiled)
            for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
                if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

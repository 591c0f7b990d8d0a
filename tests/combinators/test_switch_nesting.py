"""`Switch`: which branch runs, and how it stands in other combinators."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.branches import (
    KEY,
    KEYS,
    args_of,
    close,
    either,
    either_terms,
    leaf_types,
    minus,
    model,
    plus,
    ring,
    same,
    simulate,
    values,
)

from gjflax import (
    AllSelection,
    Bernoulli,
    Diff,
    Map,
    Masked,
    Normal,
    Switch,
    VectorChoiceMap,
    choice_map,
    gen,
    select,
    trace,
)


def counting(counts: dict[int, int], number: int) -> Any:
    def count() -> None:
        counts[number] += 1

    @gen
    def branch(x):
        jax.debug.callback(count)
        return trace("y", Normal)(x, 1.0 + number)

    return branch


METHODS = {
    "simulate": lambda m, tr, index: m.simulate(KEY, (index, 0.5)),
    "importance": lambda m, tr, index: m.importance(KEY, {"y": 0.1}, (index, 0.5)),
    "assess": lambda m, tr, index: m.assess(KEY, {"y": 0.1}, (index, 0.5)),
    "update": lambda m, tr, index: m.update(KEY, tr, {}, (index, 1.5)),
    "update the branch": lambda m, tr, index: m.update(KEY, tr, {"y": 0.1}, (Diff.no_change(index), 1.5)),
    "regenerate": lambda m, tr, index: m.regenerate(KEY, tr, AllSelection(), (index, 1.5)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compiled", [pytest.param(False, marks=pytest.mark.slow), True])
def test_only_the_branch_taken_runs(method: str, compiled: bool):
    counts = {0: 0, 1: 0, 2: 0}
    counted = Switch(tuple(counting(counts, number) for number in range(3)))
    trs = [counted.simulate(KEY, (index, 0.5))[1] for index in range(3)]
    call = lambda tr, index: METHODS[method](counted, tr, index)
    run = jax.jit(call) if compiled else call
    for index in range(3):
        counts.update({0: 0, 1: 0, 2: 0})
        jax.block_until_ready(jax.tree.leaves(run(trs[index], jnp.int32(index))))
        jax.effects_barrier()
        assert {number for number, count in counts.items() if count} == {index}


@pytest.mark.slow
def test_under_vmap_every_branch_runs_and_one_is_selected():
    indices, xs, js = jnp.array([0, 1, 1]), jnp.array([0.5, -1.0, 2.0]), jnp.array([0, 1, 0])
    keys = jax.random.split(KEY, 3)

    def run(key, index, x, j):
        _, tr = model.simulate(key, (index, x, j))
        _, (_, w, new, discard) = model.update(key, tr, {"a": jnp.stack([x, x])}, (1 - index, x + 1.0, j))
        _, (_, r, newer) = model.regenerate(key, new, select("sub"), (index, x, 1 - j))
        return tr, w, new, r, newer, discard

    batched = jax.jit(jax.vmap(run))(keys, indices, xs, js)
    one_by_one = jax.jit(run)
    for i in range(3):
        looped = one_by_one(keys[i], indices[i], xs[i], js[i])
        of_batch = jax.tree.map(lambda leaf, i=i: leaf[i], batched)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), of_batch, looped)
    # A batch of traces answers as the traces do, one by one.
    traces = batched[0]
    alone = [jax.tree.map(lambda leaf, i=i: leaf[i], traces) for i in range(3)]
    np.testing.assert_allclose(traces.get_score(), [tr.get_score() for tr in alone], rtol=1e-5)
    np.testing.assert_allclose(traces.project(select("m")), [tr.project(select("m")) for tr in alone], rtol=1e-5)
    for i, tr in enumerate(alone):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), traces.get_retval(), tr.get_retval())
        same(
            values(jax.tree.map(lambda leaf, i=i: leaf[i], traces.strip(), is_leaf=None)),
            values(tr.strip()),
        )


def test_a_second_index_does_not_trace_again():
    run = jax.jit(lambda key, tr, index: ring.update(key, tr, {"p": 1.0}, (index, jnp.float32(0.2)))[1])
    _, tr = ring.simulate(KEY, (0, jnp.float32(0.7)))
    for index in (0, 1, 2):
        _, _, tr, _ = run(KEY, tr, jnp.int32(index))
    assert run._cache_size() == 1


def test_a_static_index_gives_the_trace_of_a_traced_one():
    for index in range(2):
        static = model.simulate(KEY, (index, jnp.float32(0.7), 1))[1]
        traced = simulate(KEY, *args_of(index, 0.7, 1))
        assert leaf_types(static) == leaf_types(traced)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), static, traced)
        numpy_index = model.simulate(KEY, (np.int64(index), jnp.float32(0.7), 1))[1]
        assert leaf_types(numpy_index) == leaf_types(traced)


def test_a_traced_index_is_clamped():
    for index, want in ((-3, 0), (7, 1)):
        tr = simulate(KEY, *args_of(index, 0.7, 1))
        assert tr.index == want and tr.get_args()[0] == want
        same(values(tr.strip()), values(simulate(KEY, *args_of(want, 0.7, 1)).strip()))
    wide = jax.jit(lambda index: ring.simulate(KEY, (index, 0.7))[1].index)
    assert wide(jnp.uint32(4_000_000_000)) == 2


# Inside of others ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_mapped_over_indices():
    each = Map(either, in_axes=0)
    indices, xs = jnp.array([0, 1, 0, 1]), jnp.array([0.5, 1.0, -2.0, 3.0])
    _, tr = each.simulate(KEY, (indices, xs))
    np.testing.assert_array_equal(tr["only"].flag, indices == 0)
    y, only = either_terms(tr, indices, xs)
    close(tr.get_score(), (y + only).sum())
    close(tr.project(select("only")), only.sum())

    flipped, moved = jnp.array([1, 1, 0, 0]), xs + 0.25
    given = {(3, "only"): 0.8, (3, "y"): 9.0}
    _, (_, weight, new, discard) = each.update(KEYS[1], tr, given, (flipped, moved))
    new_y, new_only = either_terms(new, flipped, moved)
    close(weight, (new_y + new_only).sum() - (y + only).sum())
    close(new.get_score(), (new_y + new_only).sum())
    assert new["only"].value[3] == np.float32(0.8) and new["y"][3] == 9.0
    _, (_, back_weight, back, _) = each.update(KEYS[2], new, discard, (indices, xs))
    close(back_weight, -np.float64(weight))
    np.testing.assert_array_equal(back["y"], tr["y"])
    np.testing.assert_array_equal(back["only"].unmask(0.0), tr["only"].unmask(0.0))

    _, (_, weight, new) = each.regenerate(KEYS[1], tr, select((0, "y"), (3, "y")), (flipped, moved))
    new_y, new_only = either_terms(new, flipped, moved)
    kept_only = np.asarray((indices == 0) & (flipped == 0))
    close(weight, (new_y - y)[1:3].sum() + (new_only - only)[kept_only].sum())
    np.testing.assert_array_equal(new["y"][1:3], tr["y"][1:3])
    assert not np.any(new["y"][np.array([0, 3])] == tr["y"][np.array([0, 3])])


def test_one_index_for_all_elements_stays_a_conditional():
    each = Map(either, in_axes=(None, 0))
    text = str(jax.make_jaxpr(lambda index, xs: each.simulate(KEY, (index, xs))[1].get_score())(0, jnp.ones(3)))
    assert "cond[" in text


wide_plus, wide_minus = Map(plus, repeats=3), Map(minus, repeats=3)
of_maps = Switch((wide_plus, wide_minus))


def test_switch_of_maps_with_choices_of_some_elements():
    _, tr = of_maps.simulate(KEY, (0, 0.5))
    y, only = either_terms(tr, np.zeros(3), np.full(3, 0.5))
    constraints = VectorChoiceMap([2, 0], {"y": jnp.array([5.0, 6.0])})
    _, (_, weight, new, discard) = of_maps.update(KEYS[1], tr, constraints, (1, 1.5))
    np.testing.assert_array_equal(new["y"], [6.0, tr["y"][1], 5.0])
    new_y, _ = either_terms(new, np.ones(3), np.full(3, 1.5))
    close(weight, new_y.sum() - (y + only).sum())
    np.testing.assert_array_equal(discard["y"].flag, [True, False, True])
    assert np.all(discard["only"].flag)
    _, (_, back_weight, back, _) = of_maps.update(KEYS[2], new, discard, (0, 0.5))
    close(back_weight, -np.float64(weight))
    np.testing.assert_array_equal(back["y"], tr["y"])
    np.testing.assert_array_equal(back["only"].value, tr["only"].value)

    # The elements' choices that are selected are redrawn, of the others those that both branches have are kept.
    _, (_, weight, new) = of_maps.regenerate(KEYS[1], tr, select((1, "y"), (0, "only")), (1, 1.5))
    new_y, _ = either_terms(new, np.ones(3), np.full(3, 1.5))
    kept = np.array([0, 2])
    np.testing.assert_array_equal(new["y"][kept], tr["y"][kept])
    assert new["y"][1] != tr["y"][1]
    close(weight, (new_y - y)[kept].sum())

    # Where the index stays, only the element that is given is discarded.
    diffs = (Diff.no_change(jnp.int32(0)), Diff.no_change(jnp.float32(0.5)))
    _, (_, weight, new, discard) = of_maps.update(KEYS[1], tr, constraints, diffs)
    new_y, new_only = either_terms(new, np.zeros(3), np.full(3, 0.5))
    close(weight, (new_y + new_only).sum() - (y + only).sum())
    assert discard["y"].shape == (2,)
    traced = jax.jit(lambda i: of_maps.update(KEYS[1], tr, VectorChoiceMap(i, {"y": jnp.array([5.0, 6.0])}), diffs)[1])
    _, traced_weight, _, traced_discard = traced(jnp.array([2, 0]))
    close(traced_weight, weight)
    np.testing.assert_array_equal(traced_discard.index_array(), [2, 0])
    np.testing.assert_array_equal(traced_discard["y"], tr["y"][np.array([2, 0])])


def test_masked_constraints_pass_through():
    """Constraints that may be absent, with a mask of missing data."""
    observed = choice_map({"y": Masked(jnp.array([1.0, 2.0, 3.0]), jnp.array([True, False, True]))})
    for index, terms_of in ((0, np.zeros(3)), (1, np.ones(3))):
        _, (weight, tr) = of_maps.importance(KEY, observed, (jnp.int32(index), 0.5))
        np.testing.assert_array_equal(tr["y"][np.array([0, 2])], [1.0, 3.0])
        y, _ = either_terms(tr, terms_of, np.full(3, 0.5))
        close(weight, y[[0, 2]].sum())
        _, (_, weight, new, discard) = of_maps.update(KEY, tr, observed, (1 - index, 0.5))
        np.testing.assert_array_equal(new["y"], tr["y"])
        np.testing.assert_array_equal(discard["y"].flag, [True, False, True])
    flag = jnp.array(False)
    _, (weight, tr) = either.importance(KEY, {"y": Masked(1.0, flag), "only": Masked(2.0, ~flag)}, (jnp.int32(0), 0.5))
    y, only = either_terms(tr, 0, 0.5)
    close(weight, only)
    assert tr["only"].value == 2.0 and tr["y"] != 1.0


@gen
def shared_choice(x):
    index = trace("index", Bernoulli)(logits=x)
    return trace("y", Switch((Bernoulli, Bernoulli)))(index, x + 1.0)


@gen
def coin_of(p):
    return trace("y", Bernoulli)(probs=p)


@pytest.mark.slow
def test_the_weight_of_importance_has_the_density_of_the_constraints_as_mean():
    """E[exp w] = p(constraints), by a sum over everything that may be drawn: no statistics."""
    coins = Switch((coin_of, coin_of), own_arguments=True)

    @gen
    def two():
        kind = trace("kind", Bernoulli)(probs=0.3)
        trace("first", coins)(kind, (0.2,), (0.9,))
        return trace("second", coins)(1 - kind, (0.6,), (0.5,))

    constraints = {"first": {"y": 1}, "second": {"y": 0}}
    expectation = 0.0
    for kind in (0, 1):
        # Given the constraints, only the kind is drawn, from its prior.
        _, (weight, _) = two.importance(KEY, {"kind": kind, **constraints}, ())
        prior = 0.3 if kind else 0.7
        expectation += prior * np.exp(float(weight) - np.log(prior))
    exact = 0.7 * 0.2 * (1 - 0.5) + 0.3 * 0.9 * (1 - 0.6)
    np.testing.assert_allclose(expectation, exact, rtol=1e-5)
    # And by draws: 20,000, within 4 standard errors.
    _, (weights, _) = jax.jit(jax.vmap(lambda key: two.importance(key, constraints, ())))(jax.random.split(KEY, 20000))
    sample = np.exp(np.float64(weights))
    assert abs(sample.mean() - exact) < 4 * sample.std() / np.sqrt(sample.size)

"""`Switch` against densities written by hand in NumPy: which choices there are, and what each adds to a weight."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.branches import (
    ALL,
    FLIPS,
    KEY,
    KEYS,
    NAMES,
    STATES,
    args_of,
    assess,
    close,
    leaf_types,
    minus,
    model,
    norm,
    plus,
    ring,
    ring_terms,
    same,
    simulate,
    terms,
    there,
    total,
    update,
    values,
)

import gjflax
from gjflax import AllSelection, Bernoulli, Diff, Map, Masked, Normal, Switch, choice_map, gen, select, trace


@pytest.mark.parametrize("index, j", STATES)
def test_a_trace_has_the_choices_of_the_branch_taken(index: int, j: int):
    tr = simulate(KEYS[0], *args_of(index, 0.7, j))
    here = values(tr.strip())
    assert here.keys() == there(index, j)
    parts = terms(here, index, 0.7, j)
    close(tr.get_score(), total(parts))
    for address in ALL:
        close(tr.project(select(address)), total(parts, of=[address]))
    assert not isinstance(tr["a"], Masked) and not isinstance(tr["m"], Masked)
    for part, taken in zip(tr.branches, tr.taken, strict=True):
        assert taken or all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(part))
    retval, score = assess(tr.strip(), *tr.get_args())
    close(score, total(parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), retval, tr.get_retval())
    np.testing.assert_array_equal(tr.get_args()[0], index)
    assert leaf_types(tr) == leaf_types(simulate(KEYS[1], *args_of(0, 0.1, 0)))
    assert tr.get_gen_fn() == model and tr.batch_shape == ()
    assert {address for address, _ in tr.leaves()} == set(ALL)
    assert tr["sub", "u"] == here["sub", "u"] and tr.has_subtree(("sub", "t")) and ("sub", "z") not in tr


def masked_values(index: int, j: int, given: Any) -> Any:
    """Choices of all addresses, of which some are given: one structure for all subsets."""
    drawn = {address: np.asarray(value) for address, value in OTHER.items()}
    masked = {}
    for address, value in drawn.items():
        flag = jnp.array(address in given)
        masked[address] = Masked(jnp.asarray(value), jnp.full(3, flag) if address == ("m",) else flag)
    return choice_map(masked)


OTHER = {
    ("rate",): np.float32(0.8),
    ("a",): np.float32([0.5, -1.5]),
    ("m",): np.float32([0.1, 0.9, -0.4]),
    ("pair",): np.float32([2.0, 1.0]),
    ("sub", "u"): np.float32(1.25),
    ("sub", "t"): np.float32(0.4),
}
GIVEN = [[], [("a",), ("rate",), ("sub", "u")], [("m",), ("pair",), ("sub", "t")], ALL]


def check_update(before: Any, old: Any, new: Any, constraints: Any, given: Any) -> None:
    """Kept choices add s' − s, given ones s' (− s), gone ones −s, drawn ones nothing; discard is what was lost."""
    retval, weight, after, discard, after_retval, after_score, after_choices = update(
        KEYS[2], before, constraints, *args_of(new[0], -1.1, new[1])
    )
    was, now = values(before.strip()), values(after_choices)
    assert now.keys() == there(*new)
    drawn = now.keys() - was.keys() - set(given)
    for address in now.keys() - drawn:
        np.testing.assert_array_equal(now[address], OTHER[address] if address in given else was[address])
    for address in drawn:
        assert not np.any(now[address] == OTHER[address])
    old_terms, new_terms = terms(was, old[0], 0.7, old[1]), terms(now, new[0], -1.1, new[1])
    close(after_score, total(new_terms))
    close(weight, total(new_terms) - total(new_terms, of=drawn) - total(old_terms))
    same(values(discard), {k: value for k, value in was.items() if k not in now or k in given})
    assert leaf_types(after) == leaf_types(before)
    again, _ = assess(after_choices, *after.get_args())
    jax.tree.map(np.testing.assert_array_equal, retval, after_retval)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), again, retval)

    _, back_weight, back, _, _, back_score, back_choices = update(
        KEYS[3], after, discard, *args_of(old[0], 0.7, old[1])
    )
    same(values(back_choices), was)
    close(back_weight, total(old_terms) - total(new_terms))
    close(back_score, before.get_score())
    if not drawn:
        close(back_weight, -np.float64(weight))


@pytest.mark.parametrize("old, new", FLIPS)
def test_update_across_branches(old: Any, new: Any):
    before = simulate(KEYS[0], *args_of(old[0], 0.7, old[1]))
    for given in GIVEN:
        check_update(before, old, new, masked_values(*old, given), given)


@pytest.mark.parametrize("given", GIVEN[:2], ids=str)
def test_update_with_plain_constraints(given: Any):
    for old, new in FLIPS:
        before = simulate(KEYS[0], *args_of(old[0], 0.7, old[1]))
        check_update(before, old, new, choice_map({address: OTHER[address] for address in given}), given)


REDRAWN = [[], [("a",)], [("sub",), ("rate",), ("m",)]]


@pytest.mark.slow
@pytest.mark.parametrize("addresses", REDRAWN, ids=str)
def test_regenerate_across_branches(addresses: Any):
    """Kept choices add s' − s; redrawn, drawn and gone ones nothing."""
    selection = select(addresses)
    move = jax.jit(lambda key, tr, *args: model.regenerate(key, tr, selection, args)[1])
    for old, new in FLIPS:
        before = simulate(KEYS[0], *args_of(old[0], 0.7, old[1]))
        _, weight, after = move(KEYS[2], before, *args_of(new[0], -1.1, new[1]))
        was, now = values(before.strip()), values(after.strip())
        assert now.keys() == there(*new)
        kept = {address for address in was.keys() & now.keys() if address not in selection}
        for address in kept:
            np.testing.assert_array_equal(now[address], was[address])
        for address in was.keys() & now.keys() - kept:
            assert not np.any(now[address] == was[address])
        old_terms, new_terms = terms(was, old[0], 0.7, old[1]), terms(now, new[0], -1.1, new[1])
        close(weight, total(new_terms, of=kept) - total(old_terms, of=kept))
        close(after.get_score(), total(new_terms))
        assert leaf_types(after) == leaf_types(before)


def test_an_index_that_did_not_change_leaves_the_branch_to_update_itself():
    def move(tr, constraints, x):
        index, _, j = tr.get_args()
        diffs = (Diff.no_change(index), Diff.unknown_change(x), Diff.no_change(j))
        _, (_, weight, new, discard) = model.update(KEYS[2], tr, constraints, diffs)
        _, (_, redrawn_weight, redrawn) = model.regenerate(KEYS[2], tr, select("m", "sub"), diffs)
        return weight, new, discard, redrawn_weight, redrawn

    move = jax.jit(move)
    for index, j in STATES:
        before = simulate(KEYS[0], *args_of(index, 0.7, j))
        given = [("a",), ("m",)]
        constraints = choice_map({address: OTHER[address] for address in given})
        weight, after, discard, redrawn_weight, redrawn = move(before, constraints, jnp.float32(-1.1))
        was, now = values(before.strip()), values(after.strip())
        old_terms = terms(was, index, 0.7, j)
        same(now, was | {address: OTHER[address] for address in given})
        same(values(discard), {address: was[address] for address in given})
        new_terms = terms(now, index, -1.1, j)
        close(weight, total(new_terms) - total(old_terms))
        close(after.get_score(), total(new_terms))
        assert leaf_types(after) == leaf_types(before) == leaf_types(redrawn)

        now = values(redrawn.strip())
        kept = now.keys() - {("m",), ("sub", "u"), ("sub", "t")}
        close(redrawn_weight, total(terms(now, index, -1.1, j), of=kept) - total(old_terms, of=kept))
        assert now["sub", "u"] != was["sub", "u"] and not np.any(now["m",] == was["m",])


def test_addresses_that_some_branches_share():
    def move(key, tr, index):
        return ring.update(key, tr, {"r": 0.3}, (index, 1.5))[1], ring.regenerate(key, tr, select("q"), (index, 1.5))[1]

    move = jax.jit(move)
    for old, new in itertools.product(range(3), range(3)):
        _, before = ring.simulate(KEYS[0], (old, 0.5))
        was = values(before.strip())
        assert was.keys() == {(name,) for name in NAMES[old]}
        (_, weight, after, discard), (_, redrawn_weight, redrawn) = move(KEYS[1], before, jnp.int32(new))
        now = values(after.strip())
        assert now.keys() == {(name,) for name in NAMES[new]}
        drawn = now.keys() - was.keys() - {("r",)}
        new_terms, old_terms = ring_terms(now, new, 1.5), ring_terms(was, old, 0.5)
        close(weight, total(new_terms) - total(new_terms, of=drawn) - total(old_terms))
        close(after.get_score(), total(new_terms))
        same(values(discard), {k: v for k, v in was.items() if k not in now or k == ("r",)})
        now = values(redrawn.strip())
        kept = (now.keys() & was.keys()) - {("q",)}
        close(redrawn_weight, total(ring_terms(now, new, 1.5), of=kept) - total(old_terms, of=kept))


def test_what_is_not_touched_stays_the_same_array():
    tr = model.simulate(KEYS[0], args_of(0, 0.7, 1))[1]
    nothing = tuple(map(Diff.no_change, tr.get_args()))
    key, (retdiff, weight, new, discard) = model.update(KEY, tr, {}, nothing, param_diff=Diff.no_change)
    assert retdiff.change is Diff.no_change and weight == 0.0 and new is tr and discard.is_empty() and key is KEY
    key, (retdiff, weight, new) = model.regenerate(KEY, tr, select(), nothing, param_diff=Diff.no_change)
    assert retdiff.change is Diff.no_change and weight == 0.0 and new is tr and key is KEY

    leaves = Switch((Normal, gjflax.Laplace))
    _, tr = leaves.simulate(KEY, (0, 1.0, 2.0))
    _, (retdiff, weight, new, _) = jax.jit(
        lambda tr: leaves.update(KEY, tr, {}, tuple(map(Diff.no_change, tr.get_args())))
    )(tr)
    assert retdiff.change is Diff.no_change and weight == 0.0
    diffs = (Diff.no_change(jnp.int32(0)), Diff.unknown_change(jnp.float32(3.0)), Diff.no_change(jnp.float32(2.0)))
    key, (retdiff, weight, _, _) = leaves.update(KEY, tr, {}, diffs)
    assert retdiff.change is Diff.no_change, "a value that was kept did not change"
    assert key is KEY, "nothing was drawn"
    close(weight, norm(tr.get_retval(), 3.0, 2.0) - norm(tr.get_retval(), 1.0, 2.0))


def test_what_is_certainly_kept_is_no_part_of_the_discard():
    """Not even by a flag that is false."""
    leaves, maps = Switch((Normal, gjflax.Laplace)), Switch((Map(Normal, repeats=3), Map(gjflax.Laplace, repeats=3)))
    for switch, value in ((leaves, 2.0), (maps, jnp.arange(3.0))):
        _, tr = switch.simulate(KEY, (0, 0.5, 1.5))
        for given, index in itertools.product((False, True), (0, 1)):
            _, (_, _, _, discard) = switch.update(KEY, tr, value if given else {}, (index, 0.5, 1.5))
            assert discard.is_empty() != given
            if given:
                np.testing.assert_array_equal(discard.get_value(), tr.get_retval())


def test_updates_in_a_row_add_up():
    """The scores that updates leave behind are those that the next ones start from, over many flips in a scan."""

    def step(carry, inputs):
        key, tr, weights = carry
        index, p = inputs
        # Every choice that may be new is given, so nothing is drawn.
        given = {"p": p, "q": 0.2, "r": -0.1, "s": p + 1.0}
        key, (_, weight, tr, _) = ring.update(key, tr, given, (index, p * 2.0))
        return (key, tr, weights + weight), None

    _, tr = ring.simulate(KEY, (0, jnp.float32(0.5)))
    indices, ps = jax.random.randint(KEYS[1], (40,), 0, 3), jax.random.normal(KEYS[2], (40,))
    (_, last, weights), _ = jax.jit(lambda tr: jax.lax.scan(step, (KEY, tr, 0.0), (indices, ps)))(tr)
    score = total(ring_terms(values(last.strip()), int(indices[-1]), float(ps[-1]) * 2))
    close(last.get_score(), score)
    close(weights, score - np.float64(tr.get_score()), 1e-3)


# The worked example of Gen's documentation --------------------------------------------------------------------------


@gen
def with_c():
    return trace("c", Bernoulli)(probs=0.6)


@gen
def with_d():
    return trace("d", Bernoulli)(probs=0.1)


@gen
def bar():
    trace("a", Bernoulli)(probs=0.3)
    b = trace("b", Bernoulli)(probs=0.4)
    trace("then", Switch((with_d, with_c)))(b)
    trace("e", Bernoulli)(probs=0.7)


def bar_trace() -> Any:
    _, (weight, tr) = bar.importance(KEY, {"a": 0, "b": 1, "then": {"c": 0}, "e": 1}, ())
    close(weight, np.log(0.7 * 0.4 * 0.4 * 0.7), 1e-6)
    close(tr.get_score(), np.log(0.0784), 1e-6)
    return tr


def test_worked_example_update_with_every_choice_given():
    tr = bar_trace()
    _, (_, weight, new, discard) = bar.update(KEY, tr, {"b": 0, "then": {"d": 1}}, ())
    close(weight, np.log(0.375), 1e-6)
    close(new.get_score(), np.log(0.0294), 1e-6)
    same(values(discard), {("b",): np.int32(1), ("then", "c"): np.int32(0)})
    same(values(new.strip()), {("a",): 0, ("b",): 0, ("then", "d"): 1, ("e",): 1})
    _, (_, back_weight, back, _) = bar.update(KEY, new, discard, ())
    close(back_weight, -np.log(0.375), 1e-6)
    same(values(back.strip()), values(tr.strip()))


def test_worked_example_update_that_draws_a_choice():
    tr = bar_trace()
    move = jax.jit(jax.vmap(lambda key: bar.update(key, tr, {"b": 0}, ())[1]))
    _, weight, new, discard = move(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(weight, np.log(3.75), rtol=1e-5)
    drawn = new["then", "d"]
    assert np.all(drawn.flag) and not np.any(new["then", "c"].flag)
    assert np.all(discard["then", "c"].flag) and not np.any(discard["then", "d"].flag)
    assert np.all(discard["b"] == 1) and ("e",) not in discard.addresses()
    # 4000 draws of a coin of 0.1: 4 standard errors are 0.019.
    assert abs(np.mean(drawn.value) - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 4000)


def test_worked_example_regenerate():
    tr = bar_trace()
    move = jax.jit(jax.vmap(lambda key: bar.regenerate(key, tr, select("a", "b"), ())[1]))
    _, weight, new = move(jax.random.split(KEY, 1000))
    np.testing.assert_allclose(weight, 0.0, atol=1e-6)
    same_branch = np.asarray(new["b"] == 1)
    assert 0 < same_branch.sum() < 1000
    assert np.all(new["then", "c"].flag == same_branch) and np.all(new["then", "c"].value[same_branch] == 0)
    assert abs(np.mean(same_branch) - 0.4) < 4 * np.sqrt(0.4 * 0.6 / 1000)


# Small things ----------------------------------------------------------------------------------------------------


def test_fields_hash_and_compare():
    assert Switch([plus, minus]) == Switch((plus, minus))
    assert hash(Switch([plus, minus])) == hash(Switch((plus, minus)))
    assert Switch((plus, minus)) != Switch((minus, plus))


def test_one_branch_is_that_branch():
    alone = Switch((plus,))
    _, tr = alone.simulate(KEY, (0, 0.5))
    assert not isinstance(tr["only"], Masked)
    _, (_, weight, new, discard) = alone.update(KEY, tr, {"y": 0.25}, (0, 0.75))
    want = norm(0.25, 0.75 + tr["only"], 0.5) - norm(tr["y"], 0.5 + tr["only"], 0.5)
    close(weight, want)
    same(values(discard), {("y",): tr["y"]})


def test_arguments_that_are_no_arrays_reach_the_branches():
    @gen
    def named(kind, x):
        return trace("y", Normal)(x, 1.0 if kind == "narrow" else 5.0)

    switch = Switch((named, named))
    _, (weight, tr) = switch.importance(KEY, {"y": 1.0}, (0, "narrow", 0.0))
    close(weight, norm(1.0, 0.0, 1.0))
    assert tr.get_args()[1] == "narrow"
    _, (_, weight, _, _) = switch.update(KEY, tr, {}, (1, "wide", 0.0))
    close(weight, norm(1.0, 0.0, 5.0) - norm(1.0, 0.0, 1.0))


def test_half_precision_traces_keep_their_types():
    low = Switch((Normal, gjflax.Laplace))
    args = (0, jnp.bfloat16(0.5), jnp.bfloat16(1.0))
    _, tr = low.simulate(KEY, args)
    _, (_, _, new, _) = low.update(KEY, tr, jnp.float32(1.25), (1, *args[1:]))
    assert leaf_types(new) == leaf_types(tr)
    assert new.get_retval() == 1.25
    _, (_, _, new) = low.regenerate(KEY, tr, AllSelection(), (1, *args[1:]))
    assert leaf_types(new) == leaf_types(tr)

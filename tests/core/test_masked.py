"""Values that may be absent by a flag: their algebra, and what they mean as constraints.

The oracle of the algebra is Python's: a choice map whose flags are known is a dict without what is absent.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import gjflax
from gjflax import (
    Bernoulli,
    ChoiceMapError,
    ChoiceShapeError,
    Exponential,
    GenerativeFunction,
    Map,
    Masked,
    Normal,
    Trace,
    ValueChoiceMap,
    VectorChoiceMap,
    choice_map,
    gen,
    select,
    trace,
)
from gjflax.core.choice_map import masked
from gjflax.core.masked import where

KEY = jax.random.key(0)
YES, NO = jnp.array(True), jnp.array(False)


def present(choices: Any) -> dict[Any, Any]:
    """What is there, by address and element: the oracle's form of a choice map."""
    result = {}
    for address in choices.addresses():
        below = choices.get_subtree(address)
        value = below.get_value()
        here, flag = (value.value, value.flag) if isinstance(value, Masked) else (value, True)
        here = np.asarray(here)
        flag = np.broadcast_to(np.reshape(flag, np.shape(flag) + (1,) * (here.ndim - np.ndim(flag))), here.shape)
        vector = isinstance(below, VectorChoiceMap)
        labels = below.index_array() if vector else range(len(here) if here.ndim else 0)
        for position in np.ndindex(here.shape):
            if flag[position]:
                label = (int(labels[position[0]]), *position[1:]) if vector else position
                result[(*address, *label)] = here[position].item()
    return result


# The value ----------------------------------------------------------------------------------------------------------


def test_unmask_puts_a_default_where_nothing_is():
    values, flags = jnp.array([1.5, 2.5]), jnp.array([True, False])
    np.testing.assert_array_equal(Masked(values, flags).unmask(-1.0), [1.5, -1.0])
    np.testing.assert_array_equal(Masked(values, flags).unmask(jnp.array([7.0, 8.0])), [1.5, 8.0])
    # A flag for each element of a vector, each of which is a vector.
    rows = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(Masked(rows, flags).unmask(0.0), [[0, 1, 2], [0, 0, 0]])
    tree = Masked({"a": values, "b": rows}, flags).unmask({"a": jnp.zeros(2), "b": jnp.full((2, 3), 9.0)})
    np.testing.assert_array_equal(tree["a"], [1.5, 0.0])
    np.testing.assert_array_equal(tree["b"], [[0, 1, 2], [9, 9, 9]])


def test_what_is_chosen_is_never_cut_off():
    """Neither an integer's dtype nor a float's is forced on the other, whatever the user's rules of promotion."""
    assert np.isnan(Masked(jnp.array([3, 4]), jnp.array([True, False])).unmask(jnp.nan)[1])
    np.testing.assert_array_equal(where(jnp.array([True, False]), jnp.array([2, 2]), jnp.array([0.5, 0.5])), [2.0, 0.5])
    np.testing.assert_array_equal(where(NO, 2, 0.5), 0.5)
    assert where(YES, jnp.int32(2), 3).dtype == jnp.int32
    assert where(YES, jnp.bfloat16(2), 3.0).dtype == jnp.bfloat16


def test_it_is_a_pytree_whose_flag_is_a_leaf():
    one = Masked(jnp.array([1.0, 2.0]), YES)
    assert len(jax.tree.leaves(one)) == 2
    doubled = jax.jit(lambda m: Masked(2 * m.value, ~m.flag))(one)
    np.testing.assert_array_equal(doubled.value, [2.0, 4.0])
    assert not doubled.flag
    batch = jax.vmap(lambda x: Masked(x, x > 1.5))(jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(batch.flag, [False, True])


# Making choice maps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bool, np.bool_])
def test_a_flag_that_is_known_keeps_or_drops(kind: Any):
    assert choice_map({"a": Masked(1.0, kind(True)), "b": 2.0}) == choice_map({"a": 1.0, "b": 2.0})
    assert choice_map({"a": Masked(1.0, kind(False)), "b": 2.0}) == choice_map({"b": 2.0})
    assert choice_map({"a": {"b": Masked(1.0, kind(False))}}).is_empty()
    chm = choice_map({"a": 1.0})
    assert masked(chm, kind(True)) is chm and masked(chm, kind(False)).is_empty()


@pytest.mark.parametrize("flag", [YES, NO, np.array(True)], ids=repr)
def test_a_flag_that_may_be_traced_stays(flag: Any):
    chm = choice_map({"a": {"b": Masked(1.5, flag)}, "c": 2.0})
    assert isinstance(chm["a", "b"], Masked)
    assert chm.addresses() == [("a", "b"), ("c",)]
    assert present(chm) == ({("a", "b"): 1.5} if flag else {}) | {("c",): 2.0}


def test_nested_dicts_and_choice_maps_may_be_absent_as_a_whole():
    below = {"a": 1.0, "b": {"c": 2.0}}
    for whole in (below, choice_map(below)):
        chm = choice_map({"x": Masked(whole, YES), "y": Masked(whole, NO)})
        assert present(chm) == {("x", "a"): 1.0, ("x", "b", "c"): 2.0}
        assert chm["y"] == masked(choice_map(below), NO)


def test_flags_of_flags_must_all_be_true():
    for outer, inner in itertools.product([True, False, YES, NO], repeat=2):
        want = {("a",): 1.0} if outer and inner else {}
        assert present(choice_map({"a": Masked(Masked(1.0, inner), outer)})) == want
        assert present(masked(choice_map({"a": Masked(1.0, inner)}), jnp.asarray(outer))) == want
        assert present(masked(ValueChoiceMap(Masked(1.0, inner)), jnp.asarray(outer))) == ({(): 1.0} if want else {})


def test_a_flag_over_a_vector_is_one_for_each_element():
    rows = jax.vmap(lambda row: VectorChoiceMap(range(3), row))(jnp.ones((2, 3)))
    vector = VectorChoiceMap([4, 1], {"a": jnp.arange(2.0), "b": rows})
    chm = masked(choice_map({"x": vector}), YES)
    np.testing.assert_array_equal(chm["x"].inner["a"].flag, [True, True])
    assert chm["x", "b"].flag.shape == (2, 3)
    # Elements of which each has its flag, below a flag for all of them.
    flags = jnp.array([True, False])
    some = choice_map(VectorChoiceMap([4, 1], Masked(jnp.array([5.0, 6.0]), flags)))
    assert present(some) == present(masked(some, YES)) == {(4,): 5.0}
    assert present(masked(some, NO)) == {}
    both = jax.vmap(masked)(jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), some), jnp.array([True, False]))
    np.testing.assert_array_equal(both.inner.get_value().flag, [[True, False], [False, False]])


def test_a_batch_of_flags_is_that_of_the_values():
    chm = choice_map({"a": jnp.arange(3.0), "b": jnp.ones((3, 2))})
    flags = jnp.array([True, False, True])
    together, one_by_one = masked(chm, flags), jax.vmap(masked)(chm, flags)
    assert together == one_by_one
    assert jax.tree.map(jnp.shape, together) == jax.tree.map(jnp.shape, one_by_one)


@pytest.mark.parametrize("flag", [None, 1, 0.5, "yes", jnp.array(1), np.array([1.0])], ids=repr)
def test_a_flag_is_a_boolean(flag: Any):
    with pytest.raises(ChoiceMapError, match="flag of a Masked value is a boolean"):
        choice_map({"a": Masked(1.0, flag)})


@pytest.mark.parametrize(
    ("value", "flags"), [(1.0, 3), (jnp.zeros(2), 3), (jnp.zeros((2, 3)), 3)], ids=["scalar", "vector", "last axis"]
)
def test_a_flag_has_the_leading_axes_of_its_value(value: Any, flags: int):
    with pytest.raises(ChoiceMapError, match=rf'"b".*\({flags},\).*one for each element'):
        choice_map({"a": Masked({"b": value}, jnp.ones(flags, bool))})
    with pytest.raises(ChoiceMapError, match=rf'\("a", "b"\).*\({flags},\)'):
        masked(choice_map({("a", "b"): value}), jnp.ones(flags, bool))


# The algebra --------------------------------------------------------------------------------------------------------

LAYERS = [1.0, Masked(1.0, YES), Masked(1.0, NO), None]


def layer(value: Any, number: float) -> Any:
    """The value, told apart from those of other layers."""
    if isinstance(value, Masked):
        return choice_map({"x": Masked(number, value.flag)})
    return choice_map({} if value is None else {"x": number})


def test_overwrite_lets_what_is_there_win():
    """Three layers, each there, absent by a flag, or not named: as updates of a dict."""
    for stack in itertools.product(LAYERS, repeat=3):
        maps = [layer(value, number + 0.5) for number, value in enumerate(stack)]
        want: dict[Any, Any] = {}
        for chm in maps:
            want |= present(chm)
        assert present(maps[0].overwrite(maps[1]).overwrite(maps[2])) == want
        assert present(maps[0].overwrite(maps[1].overwrite(maps[2]))) == want


def test_overwrite_keeps_the_precision_of_what_stays():
    chm = choice_map({"x": 1.5}).overwrite({"x": Masked(2, NO)})
    assert present(chm) == {("x",): 1.5}
    vector = choice_map({"y": VectorChoiceMap(range(3), np.array([1, 2, 3]))})
    assert present(vector.overwrite({("y", 1): 0.5})) == {("y", 0): 1.0, ("y", 1): 0.5, ("y", 2): 3.0}
    assert present(vector.overwrite({("y", 1): Masked(0.5, NO)})) == present(vector)


def test_overwrite_refuses_a_value_of_another_shape():
    with pytest.raises(ChoiceMapError, match=r'\("a", "b"\).*\(\).*\(3,\)'):
        choice_map({("a", "b"): jnp.zeros(3)}).overwrite({("a", "b"): Masked(1.0, YES)})
    rows = choice_map({"y": VectorChoiceMap(range(3), jnp.zeros((3, 2)))})
    for value in (1.0, Masked(1.0, YES)):
        with pytest.raises(ChoiceMapError, match=r'"y".*\(1,\).*\(1, 2\)|"y".*shape \(1,\)'):
            rows.overwrite({("y", 1): value})


FULL = {(i,): float(i) for i in range(4)}


def vector_of(elements: dict[int, Any], whole: bool = False) -> Any:
    """A vector of these elements, each a number or a `Masked` one."""
    if whole:
        values = [value.value if isinstance(value, Masked) else value for value in elements.values()]
        flags = [value.flag if isinstance(value, Masked) else YES for value in elements.values()]
        if any(isinstance(value, Masked) for value in elements.values()):
            return choice_map(VectorChoiceMap(range(len(elements)), Masked(jnp.asarray(values), jnp.stack(flags))))
        return choice_map(VectorChoiceMap(range(len(elements)), jnp.asarray(values)))
    return choice_map(elements)


BELOW = {
    "full": vector_of({0: 0.5, 1: 1.5, 2: 2.5, 3: 3.5}, whole=True),
    "full, some absent": vector_of({0: 0.5, 1: Masked(1.5, NO), 2: Masked(2.5, YES), 3: Masked(3.5, NO)}, whole=True),
    "part": vector_of({0: 0.5, 2: 2.5}),
    "part, some absent": vector_of({0: Masked(0.5, YES), 2: Masked(2.5, NO), 3: 3.5}),
}
ABOVE = {
    "one": vector_of({2: 12.5}),
    "one that is absent": vector_of({2: Masked(12.5, NO)}),
    "there and absent": vector_of({3: Masked(13.5, YES), 0: Masked(10.5, NO), 2: 12.5}),
    "full": vector_of({0: Masked(10.5, NO), 1: Masked(11.5, YES), 2: 12.5, 3: Masked(13.5, NO)}, whole=True),
}


@pytest.mark.parametrize("below", BELOW)
@pytest.mark.parametrize("above", ABOVE)
def test_overwrite_of_elements_lets_what_is_there_win(below: str, above: str):
    want = present(BELOW[below]) | present(ABOVE[above])
    if above == "full" and not below.startswith("full"):
        # A part has fewer elements than the whole that is written over it.
        assert present(BELOW[below].overwrite(ABOVE[above])) == want
        return
    assert present(BELOW[below].overwrite(ABOVE[above])) == want
    nested = choice_map({"y": BELOW[below]}).overwrite({"y": ABOVE[above]})
    assert present(nested) == {("y", *address): value for address, value in want.items()}


def test_overwrite_of_a_traced_element():
    full = BELOW["full, some absent"]

    @jax.jit
    def write(index, flag):
        return full.overwrite(VectorChoiceMap(index[None], Masked(jnp.array([9.5]), flag[None])))

    for index, flag in itertools.product(range(4), (True, False)):
        want = present(full) | ({(index,): 9.5} if flag else {})
        assert present(write(jnp.array(index), jnp.array(flag))) == want
    assert write._cache_size() == 1


def test_overwrite_of_elements_of_elements():
    grid = choice_map({(i, j): 3.0 * i + j for i in range(2) for j in range(3)})
    grid = VectorChoiceMap(range(2), jax.vmap(lambda row: VectorChoiceMap(range(3), row))(grid.get_value()))
    part = choice_map({(1, 2): Masked(7.0, YES), (1, 0): Masked(8.0, NO)})
    both = grid.overwrite(part)
    np.testing.assert_array_equal(both.get_value(), [[0, 1, 2], [3, 4, 7]])
    flagged = masked(grid, NO).overwrite(part).get_value()
    np.testing.assert_array_equal(flagged.flag, [[False] * 3, [False, False, True]])


def test_merge_of_what_may_be_absent_is_a_conflict_all_the_same():
    """Whether both are there is not known, so neither may be dropped silently."""
    for ours, theirs in itertools.product([1.0, Masked(1.0, YES), Masked(1.0, NO)], repeat=2):
        with pytest.raises(ChoiceMapError, match=r'\("a", "b"\).*overwrite'):
            choice_map({"a": {"b": ours}}).merge({"a": {"b": theirs}})
    with pytest.raises(ChoiceMapError, match='"a"'):
        choice_map({"a": Masked(1.0, YES)}).merge({("a", "b"): 1.0})
    joined = choice_map({"a": Masked(1.0, NO)}).merge({"b": Masked(2.0, YES)})
    assert present(joined) == {("b",): 2.0}
    # What is known to be absent is no conflict.
    assert present(choice_map({"a": 1.0}).merge({"a": Masked(2.0, False)})) == {("a",): 1.0}


def test_merge_of_elements_flags_those_that_are_there():
    plain, flagged = choice_map({0: {"a": 1.0}, 2: {"a": 3.0}}), choice_map({1: {"a": Masked(2.0, NO)}})
    for joined in (plain.merge(flagged), flagged.merge(plain)):
        assert present(joined) == {("a", 0): 1.0, ("a", 2): 3.0}
        assert set(joined.index_array().tolist()) == {0, 1, 2}
    with pytest.raises(ChoiceMapError, match="share elements"):
        plain.merge({2: {"a": Masked(2.0, NO)}})


def test_equality_is_of_what_is_there():
    one = choice_map({"a": Masked(1.0, YES), "b": Masked(2.0, NO)})
    assert one == choice_map({"a": Masked(1.0, YES), "b": Masked(9.0, NO)})
    assert one != choice_map({"a": Masked(9.0, YES), "b": Masked(2.0, NO)})
    assert one != choice_map({"a": Masked(1.0, NO), "b": Masked(2.0, NO)})
    assert one != choice_map({"a": 1.0, "b": Masked(2.0, NO)})
    assert one != choice_map({"a": Masked(1.0, YES)})
    rows, flags = jnp.arange(4.0).reshape(2, 2), jnp.array([True, False])
    assert choice_map(Masked(rows, flags)) == choice_map(Masked(rows.at[1].set(7.0), flags))
    assert choice_map(Masked(rows, flags)) != choice_map(Masked(rows.at[0].set(7.0), flags))


def test_to_dict_and_back():
    chm = choice_map({"a": Masked(1.0, YES), "b": {"c": Masked(jnp.arange(2.0), NO), "d": 2.0}})
    assert chm.to_dict()["b"]["d"] == 2.0 and isinstance(chm.to_dict()["b"]["c"], Masked)
    assert choice_map(chm.to_dict()) == chm
    part = choice_map({("y", 3, "a"): Masked(1.0, YES), ("y", 0, "a"): Masked(2.0, NO)})
    assert choice_map(part.to_dict()) == part
    assert present(part) == {("y", "a", 3): 1.0}
    mixed = choice_map({("y", 3): Masked(1.0, NO), ("y", 0): 2.0})
    assert present(mixed) == {("y", 0): 2.0}
    assert present(choice_map(mixed.to_dict())) == present(mixed)


def test_filter_and_elements_keep_their_flags():
    flags = jnp.array([True, False, True])
    chm = choice_map({"x": Masked(0.5, NO), "y": VectorChoiceMap(range(3), {"a": Masked(jnp.arange(3.0), flags)})})
    assert present(chm.filter(select("y"))) == {("y", "a", 0): 0.0, ("y", "a", 2): 2.0}
    assert present(chm.filter(select(("y", 0), ("y", 1)))) == {("y", "a", 0): 0.0}
    assert present(chm.filter(~select("y"))) == {}
    for index in range(3):
        assert bool(chm["y", index, "a"].flag) == bool(flags[index])
        assert chm["y", index, "a"].value == index
    assert bool(jax.jit(lambda i: chm["y", i, "a"].flag)(2))
    assert "└── x: Masked" in str(chm) or "├── x: Masked" in str(chm)


def test_a_vector_needs_a_flag_for_each_element():
    with pytest.raises(ChoiceMapError, match=r'leading axis of 2; the value at "a" has shape \(\)'):
        VectorChoiceMap([0, 1], {"a": Masked(jnp.zeros(2), YES)})


# As constraints -----------------------------------------------------------------------------------------------------

LOC, SCALE = np.array([0.5, -1.0, 2.0], np.float32), 0.3
GIVEN = np.array([1.5, 0.25, -0.75], np.float32)


def density(value: Any, loc: Any = LOC, scale: float = SCALE) -> np.ndarray:
    return stats.norm.logpdf(np.asarray(value, np.float64), loc, scale)


def types(tree: Any) -> Any:
    leaves = [(leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), leaves


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_distribution_is_constrained_where_the_flag_is_true(flag: bool, compiled: bool):
    """A vector-valued choice, which is there as a whole or not at all."""
    transform = jax.jit if compiled else lambda function: function
    given = {"x": Masked(jnp.asarray(GIVEN), jnp.array(flag))}

    @gen
    def model(loc):
        return trace("x", Normal)(loc, SCALE)

    _, drawn = model.simulate(KEY, (LOC,))
    _, (weight, new) = transform(lambda c: model.importance(KEY, c, (LOC,)))(choice_map(given))
    np.testing.assert_array_equal(new["x"], GIVEN if flag else drawn["x"])
    np.testing.assert_allclose(new.get_score(), density(new["x"]).sum(), rtol=1e-5)
    np.testing.assert_allclose(weight, density(GIVEN).sum() if flag else 0.0, rtol=1e-5)

    other = LOC[::-1].copy()
    _, (_, weight, newer, discard) = transform(lambda c: model.update(KEY, drawn, c, (other,)))(choice_map(given))
    want = GIVEN if flag else np.asarray(drawn["x"])
    np.testing.assert_array_equal(newer["x"], want)
    np.testing.assert_allclose(weight, density(want, other).sum() - density(drawn["x"]).sum(), rtol=1e-4)
    np.testing.assert_allclose(newer.get_score(), density(want, other).sum(), rtol=1e-5)
    assert types(newer) == types(drawn)
    assert discard == choice_map({"x": Masked(drawn["x"], jnp.array(flag))})
    _, (_, back, again, _) = model.update(KEY, newer, discard, (LOC,))
    np.testing.assert_allclose(back, -weight, rtol=1e-5)
    np.testing.assert_array_equal(again["x"], drawn["x"])

    _, (retval, score) = transform(lambda c: model.assess(KEY, c, (LOC,)))(choice_map(given))
    np.testing.assert_array_equal(retval, GIVEN)
    np.testing.assert_allclose(score, density(GIVEN).sum() if flag else np.nan, rtol=1e-5)


def test_the_expected_weight_is_the_probability_of_the_constraint_whatever_the_flag():
    """A flag for every lane of a vmap; where it is false the choice is a draw from the prior: 4 standard errors."""
    count = 20_000
    flags = jnp.arange(count) % 2 == 0

    @gen
    def model():
        x = trace("x", Normal)(0.0, 2.0)
        return trace("y", Normal)(x, 0.5)

    @jax.jit
    @jax.vmap
    def run(key, flag):
        return model.importance(key, {"y": Masked(1.0, flag)}, ())[1]

    weights, traces = run(jax.random.split(KEY, count), flags)
    np.testing.assert_array_equal(weights[~flags], 0.0)
    assert np.all(traces["y"][flags] == 1.0)
    estimates = np.exp(np.asarray(weights[flags], np.float64))
    error = estimates.std(ddof=1) / np.sqrt(len(estimates))
    assert abs(estimates.mean() - stats.norm.pdf(1.0, 0.0, np.sqrt(4.25))) < 4 * error
    free = np.asarray(traces["y"][~flags])
    assert abs(free.mean()) < 4 * np.sqrt(4.25 / len(free))
    assert abs(free.var() / 4.25 - 1) < 4 * np.sqrt(2 / len(free))


def test_elements_of_a_map_are_constrained_one_by_one():
    flags = np.array([True, False, True])
    points = Map(Normal, in_axes=(0, None))
    given = Masked(jnp.asarray(GIVEN), jnp.asarray(flags))
    _, drawn = points.simulate(KEY, (LOC, SCALE))
    _, (weight, new) = points.importance(KEY, given, (LOC, SCALE))
    np.testing.assert_array_equal(new[()], np.where(flags, GIVEN, drawn[()]))
    np.testing.assert_allclose(weight, density(GIVEN)[flags].sum(), rtol=1e-5)
    np.testing.assert_allclose(new.get_score(), density(new[()]).sum(), rtol=1e-5)
    _, (_, weight, new, discard) = points.update(KEY, drawn, given, (LOC, SCALE))
    np.testing.assert_allclose(weight, (density(GIVEN) - density(drawn[()]))[flags].sum(), rtol=1e-4)
    assert present(discard) == {(i,): float(drawn[i]) for i in (0, 2)}
    _, (_, back, again, _) = points.update(KEY, new, discard, (LOC, SCALE))
    np.testing.assert_allclose(back, -weight, rtol=1e-5)
    np.testing.assert_array_equal(again[()], drawn[()])
    # One flag for all, and flags for some elements by index.
    for flag in (True, False):
        _, (weight, _) = points.importance(KEY, Masked(jnp.asarray(GIVEN), jnp.array(flag)), (LOC, SCALE))
        np.testing.assert_allclose(weight, density(GIVEN).sum() if flag else 0.0, rtol=1e-5)
    some = {2: Masked(GIVEN[2], YES), 0: Masked(GIVEN[0], NO)}
    _, (weight, new) = points.importance(KEY, some, (LOC, SCALE))
    np.testing.assert_allclose(weight, density(GIVEN)[2], rtol=1e-5)
    assert new[2] == GIVEN[2] and new[0] != GIVEN[0]
    _, (_, weight, _, discard) = points.update(KEY, drawn, some, (LOC, SCALE))
    np.testing.assert_allclose(weight, (density(GIVEN) - density(drawn[()]))[2], rtol=1e-4)
    assert present(discard) == {(2,): float(drawn[2])}


def test_a_later_choice_sees_the_value_that_was_kept():
    """The weight of an update with an absent constraint carries on to what depends on it."""

    @gen
    def model():
        x = trace("x", Normal)(0.0, 1.0)
        return trace("y", Normal)(3.0 * x, 0.5)

    _, drawn = model.simulate(KEY, ())
    for flag in (YES, NO):
        _, (_, weight, new, _) = model.update(KEY, drawn, {"x": Masked(0.7, flag)}, ())
        x = 0.7 if flag else float(drawn["x"])

        def log_joint(x):
            return density(x, 0.0, 1.0) + density(drawn["y"], 3.0 * x, 0.5)

        np.testing.assert_allclose(weight, log_joint(x) - log_joint(np.float64(drawn["x"])), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(new.get_score(), log_joint(x), rtol=1e-5)


def test_a_discrete_choice_and_one_of_another_dtype():
    for value, flag in itertools.product((1, 1.0, True), (YES, NO)):
        _, (weight, new) = Bernoulli.importance(KEY, Masked(value, flag), (jnp.log(3.0),))
        assert new[()].dtype == jnp.int32
        np.testing.assert_allclose(weight, np.log(0.75) if flag else 0.0, rtol=1e-5)
    # A fraction is no value of the choice, but that counts only where it is there.
    weights = jax.jit(jax.vmap(lambda f: Bernoulli.importance(KEY, Masked(jnp.float32(0.5), f), (0.0,))[1][0]))
    np.testing.assert_array_equal(weights(jnp.array([True, False])), [-np.inf, 0.0])


def test_gradients_pass_where_the_value_is_absent():
    """What is absent may be anything, also what has no density; nothing of it reaches a gradient."""

    def weight(rate, value, flag):
        return Exponential.importance(KEY, Masked(value, flag), (rate,))[1][0]

    for value in (-1.0, jnp.nan, jnp.inf):
        grads = jax.grad(weight, argnums=(0, 1))(2.0, value, NO)
        np.testing.assert_array_equal(grads, [0.0, 0.0])
    np.testing.assert_allclose(jax.grad(weight, argnums=(0, 1))(2.0, 0.75, YES), [0.5 - 0.75, -2.0], rtol=1e-6)


def test_constrain_counts_only_what_is_there():
    unconstrained = jnp.float32(-0.4)
    for flag in (YES, NO):
        chm, log_det = Exponential.constrain(Masked(unconstrained, flag), (2.0,))
        plain, want = Exponential.constrain(unconstrained, (2.0,))
        assert chm == choice_map(Masked(plain[()], flag))
        np.testing.assert_allclose(log_det, want if flag else 0.0)


def test_a_flag_for_each_element_of_one_choice_is_refused():
    flags = Masked(jnp.asarray(GIVEN), jnp.ones(3, bool))

    @gen
    def model():
        return trace("x", Normal)(LOC, SCALE)

    _, tr = model.simulate(KEY, ())
    calls = {
        "importance": lambda: model.importance(KEY, {"x": flags}, ()),
        "assess": lambda: model.assess(KEY, {"x": flags}, ()),
        "update": lambda: model.update(KEY, tr, {"x": flags}, ()),
        "constrain": lambda: model.constrain({"x": flags}, ()),
    }
    for call in calls.values():
        with pytest.raises(ChoiceShapeError, match=r'"x" \(Normal\) has shape \(3,\).*Map'):
            jax.eval_shape(call)


# As choices of a trace ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MaybeTrace(Trace):
    gen_fn: Any = gjflax.static_field()
    flag: Any
    inner: Trace

    def get_gen_fn(self):
        return self.gen_fn

    def get_args(self):
        return (self.flag, *self.inner.get_args())

    def get_retval(self):
        return Masked(self.inner.get_retval(), self.flag)

    def project(self, selection):
        return jnp.where(self.flag, self.inner.project(selection), 0.0)

    def strip(self):
        return masked(self.inner.strip(), self.flag)

    def leaves(self, prefix=()):
        return self.inner.leaves(prefix)


class Maybe(GenerativeFunction):
    """The smallest generative function whose choices may be absent: its first argument says whether they are there."""

    inner: Any

    def simulate(self, key, args):
        key, inner = self.inner.simulate(key, args[1:])
        return key, MaybeTrace(self.as_unbound(), jnp.asarray(args[0]), inner)

    def assess(self, key, choices, args, **options):
        values = jax.tree.map(
            lambda leaf: leaf.value if isinstance(leaf, Masked) else leaf,
            choices,
            is_leaf=lambda leaf: isinstance(leaf, Masked),
        )
        key, (retval, score) = self.inner.assess(key, values, args[1:], **options)
        return key, (Masked(retval, args[0]), jnp.where(args[0], score, 0.0))


@gen
def _pair(loc):
    x = trace("x", Normal)(loc, SCALE)
    trace("coin", Bernoulli)(0.3)
    return trace("y", Normal)(2.0 * x[0], 1.5)


@pytest.mark.parametrize("flag", [True, False])
def test_gradients_in_choices_that_may_be_absent(flag: bool):
    maybe = Maybe(_pair)
    _, tr = jax.jit(lambda key, flag: maybe.simulate(key, (flag, LOC)))(KEY, flag)
    selection = select("x", "y")
    selected, weight = selection.filter(tr)
    _, grads = jax.jit(lambda tr: maybe.choice_grad(KEY, tr, selection))(tr)
    assert jax.tree.structure(grads) == jax.tree.structure(selected.strip())
    x, y = np.asarray(tr["x"].value, np.float64), float(tr["y"].value)
    slope = -(x - LOC) / SCALE**2
    slope[0] += 2.0 * (y - 2.0 * x[0]) / 1.5**2
    np.testing.assert_allclose(grads["x"].value, slope if flag else np.zeros(3), rtol=1e-4)
    np.testing.assert_allclose(grads["y"].value, -(y - 2.0 * x[0]) / 1.5**2 if flag else 0.0, rtol=1e-4)
    assert bool(grads["x"].flag) == bool(grads["y"].flag) == flag
    want = density(x).sum() + density(y, 2.0 * x[0], 1.5)
    np.testing.assert_allclose(weight, want if flag else 0.0, rtol=1e-5)
    # A step along the gradient is a choice map again, that overwrites the trace's choices where they are there.
    moved = jax.tree.map(lambda v, g: v + 0.1 * g if v.dtype != bool else v, selected.strip(), grads)
    np.testing.assert_allclose(
        tr.strip().overwrite(moved)["x"].value, x + 0.1 * slope if flag else x, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(gjflax.DiscreteGradientError, match='"coin"'):
        maybe.choice_grad(KEY, tr, select("coin"))
    _, grad = maybe.arg_grad(KEY, tr, 1)
    np.testing.assert_allclose(grad, (x - LOC) / SCALE**2 if flag else np.zeros(3), rtol=1e-4)

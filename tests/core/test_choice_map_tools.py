"""What is done with whole choice maps: union and difference, dicts that say all, bytes, and vectors of floats."""

from __future__ import annotations

from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import gjflax
from gjflax import (
    ChoiceMap,
    ChoiceMapError,
    EmptyChoiceMap,
    Map,
    Masked,
    Normal,
    ValueChoiceMap,
    VectorChoiceMap,
    choice_map,
    gen,
    select,
    trace,
)

FLAGS = jnp.array([True, False, True])
X = jnp.array([1.0, 2.0, 3.0])

KINDS: dict[str, ChoiceMap] = {
    "empty": choice_map({}),
    "root": choice_map(1.5),
    "names": choice_map({"b": {"c": 2.0, "d": 3}, "a": jnp.arange(3)}),
    "all elements": choice_map({"y": VectorChoiceMap(range(3), {"x": X})}),
    "some elements": choice_map({("y", 3, "x"): 1.0, ("y", 1, "x"): 2.0}),
    "nested": choice_map({range(2): {4: {"x": jnp.arange(2.0)}, 2: {"x": jnp.ones(2)}, 5: {"x": jnp.zeros(2)}}}),
    "nested ranges": choice_map({(range(2), "y", range(3), "x"): jnp.arange(6.0).reshape(2, 3)}),
    "range in elements": choice_map({(4, range(2), "x"): jnp.arange(2.0), (1, range(2), "x"): jnp.ones(2)}),
    "masked": choice_map({"a": Masked(jnp.float32(1.0), jnp.array(False))}),
    "masked elements": VectorChoiceMap(range(3), {"x": Masked(X, FLAGS)}),
}

each_kind = pytest.mark.parametrize("kind", list(KINDS))


def plain(choices: ChoiceMap) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), choices.to_dict())


# Union and difference --------------------------------------------------------------------------------------------------


def test_union_is_merge():
    one, other = choice_map({"a": 1.0, "b": {"c": 2.0}}), choice_map({"b": {"d": 3.0}})
    assert one | other == one.merge(other)
    assert one | {"z": 4.0} == one.merge({"z": 4.0})
    assert {"z": 4.0} | one == choice_map({"z": 4.0}).merge(one)
    with pytest.raises(ChoiceMapError, match='both speak of "a"'):
        one | {"a": 2.0}


def test_difference_by_a_selection():
    chm = choice_map({"a": 1.0, "b": {"c": 2.0, "d": 3.0}})
    assert plain(chm - select("a")) == {"b": {"c": 2.0, "d": 3.0}}
    assert plain(chm - select(("b", "c"))) == {"a": 1.0, "b": {"d": 3.0}}
    assert (chm - select("a", "b")).is_empty()
    points = VectorChoiceMap(range(3), {"x": X})
    assert plain(points - select(1)) == {0: {"x": 1.0}, 2: {"x": 3.0}}


def test_difference_by_another_choice_map():
    chm = choice_map({"a": 1.0, "b": {"c": 2.0, "d": 3.0}})
    assert plain(chm - {"a": 9.0, ("b", "d"): 9.0, "z": 9.0}) == {"b": {"c": 2.0}}
    assert chm - {} == chm and (chm - chm).is_empty()
    assert chm - choice_map({"z": 1.0}) == chm
    assert choice_map(1.0) - choice_map(2.0) == EmptyChoiceMap()


@each_kind
def test_union_takes_back_what_difference_took_away(kind: str):
    chm = KINDS[kind]
    assert (chm - EmptyChoiceMap()) | EmptyChoiceMap() == chm
    if "masked" not in kind:
        assert (chm - chm).is_empty()
    rest = choice_map({"more": 1.0})
    if chm.is_empty() or (chm.names() and not isinstance(chm, VectorChoiceMap)):
        assert (chm | rest) - rest == chm


def test_difference_of_vectors():
    points = VectorChoiceMap(range(3), {"x": X, "y": 10 * X})
    assert plain(points - VectorChoiceMap([1], {"x": jnp.zeros(1), "y": jnp.zeros(1)})) == {
        0: {"x": 1.0, "y": 10.0},
        2: {"x": 3.0, "y": 30.0},
    }
    assert plain(points - {"x": jnp.zeros(3)}) == {"y": [10.0, 20.0, 30.0]}
    assert plain(points - VectorChoiceMap(range(3), {"x": jnp.zeros(3)})) == {"y": [10.0, 20.0, 30.0]}
    assert points - VectorChoiceMap([7], {"x": jnp.zeros(1)}) == points
    assert points - VectorChoiceMap([1], {"z": jnp.zeros(1)}) == points
    shuffled = VectorChoiceMap([2, 0, 1], {"x": jnp.zeros(3)})
    assert plain(points - shuffled) == {"y": [10.0, 20.0, 30.0]}
    whole = choice_map({"x": X, "y": X})
    assert plain(whole - VectorChoiceMap(range(3), {"y": X})) == {"x": [1.0, 2.0, 3.0]}
    array_indices = VectorChoiceMap(jnp.array([0, 2]), {"x": jnp.zeros(2), "y": jnp.zeros(2)})
    assert plain(points - array_indices) == {1: {"x": 2.0, "y": 20.0}}


def test_difference_of_vectors_in_vectors():
    inner = jnp.arange(6.0).reshape(2, 3)
    chm = choice_map({(range(2), range(3)): {"x": inner, "y": -inner}})
    left = chm - choice_map({(range(2), range(1, 2)): {"x": jnp.zeros((2, 1)), "y": jnp.zeros((2, 1))}})
    assert plain(left) == {i: {j: {"x": 3.0 * i + j, "y": -3.0 * i - j} for j in (0, 2)} for i in (0, 1)}
    assert plain(chm - choice_map({(range(2), range(3)): {"x": inner}})) == {"y": (-inner).tolist()}
    assert plain(chm - VectorChoiceMap(range(2), {"x": inner})) == {"y": (-inner).tolist()}


def test_difference_by_a_choice_that_may_be_absent():
    left = choice_map({"a": 1.0}) - {"a": Masked(0.0, jnp.array(True))}
    assert left["a"].flag.tolist() is False
    left = VectorChoiceMap(range(3), {"x": X}) - {"x": Masked(jnp.zeros(3), FLAGS)}
    assert left["x"].flag.tolist() == [False, True, False]
    left = VectorChoiceMap(range(3), {"x": Masked(X, jnp.array([True, True, False]))}) - {"x": Masked(X, FLAGS)}
    assert left["x"].flag.tolist() == [False, True, False]
    assert (choice_map({"a": Masked(1.0, jnp.array(True))}) - {"a": 0.0}).is_empty()


def test_differences_that_have_no_choice_map():
    points = VectorChoiceMap(range(3), {"x": X, "y": X})
    with pytest.raises(ChoiceMapError, match=r"other addresses at the elements \[1\] than at \[0, 2\]"):
        points - VectorChoiceMap([1], {"x": jnp.zeros(1)})
    with pytest.raises(ChoiceMapError, match='single choice or whole arrays at "a"'):
        choice_map({"a": {"b": 1.0}}) - {"a": 1.0}
    with pytest.raises(ChoiceMapError, match="whole arrays at the root"):
        choice_map({"x": X}) - VectorChoiceMap([1], {"x": jnp.zeros(1)})
    with pytest.raises(ChoiceMapError, match="not known while tracing"):
        jax.eval_shape(lambda i: points - VectorChoiceMap(i, {"x": jnp.zeros(2), "y": jnp.zeros(2)}), jnp.array([0, 2]))


# Dicts -----------------------------------------------------------------------------------------------------------------


@each_kind
def test_exact_dicts_go_there_and_back(kind: str):
    chm = KINDS[kind]
    assert ChoiceMap.from_dict(chm.to_dict(exact=True)) == chm


def test_a_trace_goes_through_a_dict():
    _, tr = Map(Map(Normal, in_axes=(0, None)), in_axes=(0, None)).simulate(jax.random.key(0), (jnp.ones((2, 3)), 1.0))
    exact = tr.strip().to_dict(exact=True)
    assert list(exact) == [range(2)] and list(exact[range(2)]) == [range(3)]
    assert ChoiceMap.from_dict(exact) == tr.strip()
    np.testing.assert_array_equal(tr.strip().to_dict(), tr.get_retval())


def test_calls_at_computed_keys_go_through_a_dict():
    """A key that is an array names the element that the same number as a key of the dict does."""

    def there_and_back(tr: Any) -> Any:
        exact = tr.strip().to_dict(exact=True)
        back = ChoiceMap.from_dict(exact)
        assert back == tr.strip() and back.addresses() == tr.strip().addresses()
        model, args = tr.get_gen_fn(), tr.get_args()
        np.testing.assert_allclose(model.assess(jax.random.key(1), back, args)[1][1], tr.get_score(), rtol=1e-6)
        return exact

    one = gjflax.ChoiceAt(Normal)
    _, tr = one.simulate(jax.random.key(0), (0.0, 1.0, jnp.int32(3)))
    assert there_and_back(tr) == {3: tr.get_retval()}
    assert tr.strip() != choice_map({4: tr.get_retval()}) and tr.strip() != choice_map({3: 7.0})
    each = Map(one, in_axes=(0, None, 0))
    _, tr = each.simulate(jax.random.key(0), (jnp.zeros(3), 1.0, jnp.array([3, 5, 3])))
    values = list(tr.get_retval())
    assert there_and_back(tr) == {range(3): [{3: values[0]}, {5: values[1]}, {3: values[2]}]}
    assert tr.strip() != choice_map({range(3): [{3: values[0]}, {4: values[1]}, {3: values[2]}]})
    _, alike = each.simulate(jax.random.key(0), (jnp.zeros(3), 1.0, jnp.array([5, 5, 5])))
    there_and_back(alike)
    grid = Map(each, in_axes=(0, None, 0))
    _, tr = grid.simulate(jax.random.key(0), (jnp.zeros((2, 3)), 1.0, jnp.array([[3, 5, 3], [1, 0, 2]])))
    there_and_back(tr)
    # By index, where some elements are there.
    assert plain(choice_map({4: {1: 0.5}, 2: {3: 1.5}})) == {4: {1: 0.5}, 2: {3: 1.5}}
    with pytest.raises(ChoiceMapError, match="different addresses"):
        choice_map({4: {1: 0.5}, 2: {3: 1.5, 1: 2.5}})
    with pytest.raises(ChoiceMapError, match="one by one, and stands below a range of as many"):
        choice_map({range(3): [{3: 1.0}, {5: 2.0}]})
    batch = jax.vmap(lambda key: one.simulate(key, (0.0, 1.0, jnp.int32(3)))[1])(jax.random.split(jax.random.key(0), 2))
    with pytest.raises(ChoiceMapError, match="a batch of vectors"):
        batch.strip().to_dict()


def test_a_range_is_a_key():
    by_range = choice_map({("y", range(3), "x"): X})
    assert by_range == choice_map({"y": VectorChoiceMap(range(3), {"x": X})}) == choice_map({"y": {range(3): {"x": X}}})
    nested = choice_map({range(2): {(4, "x"): jnp.array([1.0, 2.0]), (2, "x"): jnp.array([3.0, 4.0])}})
    assert {at: float(nested[(*at, "x")]) for at in [(0, 4), (1, 4), (0, 2), (1, 2)]} == {
        (0, 4): 1.0,
        (1, 4): 2.0,
        (0, 2): 3.0,
        (1, 2): 4.0,
    }
    assert nested.to_dict(exact=True)[range(2)][2]["x"].tolist() == [3.0, 4.0]
    assert choice_map({range(1, 3): {"x": X[:2]}}) == VectorChoiceMap([1, 2], {"x": X[:2]})
    with pytest.raises(ChoiceMapError, match=r"need leading axes of \(4,\); got the shape \(3,\)"):
        choice_map({range(4): {"x": X}})
    with pytest.raises(ChoiceMapError, match=r"need leading axes of \(3, 2\); got the shape \(2, 3\)"):
        choice_map({range(3): {range(2): {"x": jnp.zeros((2, 3))}}})
    with pytest.raises(ChoiceMapError, match="a range of indices"):
        choice_map({1.5: X})


def test_a_range_that_does_not_start_at_zero_is_some_elements():
    some = VectorChoiceMap(range(2, 4), {"x": jnp.array([1.0, 2.0])})
    assert plain(some) == {2: {"x": 1.0}, 3: {"x": 2.0}}
    assert some == VectorChoiceMap([2, 3], {"x": jnp.array([1.0, 2.0])})
    assert float(jax.jit(lambda i: some[i, "x"])(jnp.int32(3))) == 2.0
    with pytest.raises(ChoiceMapError, match="count from 0"):
        VectorChoiceMap(range(-1, 1), {"x": jnp.zeros(2)})


# Bytes -----------------------------------------------------------------------------------------------------------------


@each_kind
def test_bytes_go_there_and_back(kind: str):
    chm = KINDS[kind]
    restored = ChoiceMap.from_bytes(chm.to_bytes())
    assert restored == chm and restored.names() == chm.names(), "the order of names is kept"
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(chm), strict=True):
        assert np.asarray(one).dtype == np.asarray(other).dtype


@pytest.mark.parametrize(
    "value",
    [True, 3, 2.5, 1 + 2j, np.int8(3), np.float64(0.1), jnp.bfloat16(1.5), jnp.zeros((0, 3)), np.array(True)],
    ids=repr,
)
def test_bytes_keep_values_of_all_kinds(value: Any):
    restored = ChoiceMap.from_bytes(choice_map({"a": value}).to_bytes())["a"]
    np.testing.assert_array_equal(restored, value)
    assert np.asarray(restored).dtype == np.asarray(value).dtype


def test_bytes_keep_random_keys_and_array_indices():
    key = jax.random.key(3, impl="rbg")
    assert ChoiceMap.from_bytes(ValueChoiceMap(key).to_bytes()).get_value() == key
    chm = VectorChoiceMap(jnp.array([4, 1]), {"x": jnp.zeros(2)})
    assert ChoiceMap.from_bytes(chm.to_bytes()) == chm


def test_what_is_restored_constrains_a_model():
    @gen
    def model():
        flags = trace("flags", Map(gjflax.Bernoulli, repeats=3))(0.5)
        return trace("x", Map(gjflax.Mask(Normal), in_axes=(0, None, None)))(flags == 1, 0.0, 1.0)

    _, tr = model.simulate(jax.random.key(1), ())
    restored = ChoiceMap.from_bytes(tr.strip().to_bytes())
    _, (_, score) = model.assess(jax.random.key(0), restored, ())
    np.testing.assert_allclose(score, tr.get_score(), rtol=1e-6)


def test_bytes_that_are_no_choice_map():
    for data in (b"", b"nothing", serialization.to_bytes({"a": 1.0}), serialization.msgpack_serialize([1])):
        with pytest.raises(ChoiceMapError, match="not those of a choice map"):
            ChoiceMap.from_bytes(data)
    with pytest.raises(ChoiceMapError, match="by a later gjflax"):
        ChoiceMap.from_bytes(serialization.msgpack_serialize({"gjflax": 99, "choices": {}}))
    with pytest.raises(ChoiceMapError, match='value of "a" is a object'):
        choice_map({"a": ValueChoiceMap(object())}).to_bytes()


# Vectors ---------------------------------------------------------------------------------------------------------------


def test_a_vector_has_the_choices_in_order():
    chm = choice_map({"b": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "a": 5.0, "v": VectorChoiceMap([7, 2], {"x": X[:2]})})
    array = chm.to_array()
    np.testing.assert_array_equal(array, [5.0, 1.0, 2.0, 3.0, 4.0, 1.0, 2.0])
    leaves, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.asarray, chm))
    np.testing.assert_array_equal(array, leaves)
    doubled = chm.from_array(2 * array)
    assert doubled == unravel(2 * leaves)
    assert doubled["v", 7, "x"] == 2.0


def test_a_selection_chooses_what_is_in_the_vector():
    chm = choice_map({"a": 1.0, "b": X, "n": 3})
    for selection in (select("b"), "b", ~select("a", "n")):
        np.testing.assert_array_equal(chm.to_array(selection), X)
        assert chm.from_array(X + 1, selection) == choice_map({"b": X + 1})
    assert chm.overwrite(chm.from_array(X + 1, "b")) == choice_map({"a": 1.0, "b": X + 1, "n": 3})


def test_flags_and_array_indices_are_kept():
    chm = choice_map({"m": Masked(X, FLAGS), "v": VectorChoiceMap(jnp.array([4, 1]), {"x": jnp.ones(2)})})
    np.testing.assert_array_equal(chm.to_array(), [1.0, 2.0, 3.0, 1.0, 1.0])
    new = chm.from_array(jnp.arange(5.0))
    assert new == choice_map(
        {"m": Masked(jnp.arange(3.0), FLAGS), "v": VectorChoiceMap(jnp.array([4, 1]), {"x": jnp.array([3.0, 4.0])})}
    )


def test_dtypes_are_those_of_the_choices():
    half, brain = jnp.float16(1.5), jnp.bfloat16(2.5)
    chm = choice_map({"a": half, "b": brain, "c": jnp.float32(3.25)})
    array = chm.to_array()
    assert array.dtype == jnp.float32 and array.tolist() == [1.5, 2.5, 3.25]
    back = chm.from_array(array)
    assert back == chm and [back[name].dtype for name in "abc"] == [jnp.float16, jnp.bfloat16, jnp.float32]
    assert choice_map({"a": half, "b": brain}).to_array().dtype == jnp.float32, "neither holds the other"
    assert choice_map({"a": half}).to_array().dtype == jnp.float16


def test_vectors_under_transformations():
    chm = choice_map({"a": jnp.float32(1.0), "b": X})

    def value(array: Any) -> Any:
        here = chm.from_array(array)
        return jnp.sin(here["a"]) + jnp.sum(here["b"] ** 2)

    array = chm.to_array()
    expected = np.concatenate([[np.cos(1.0)], 2 * np.asarray(X)])
    np.testing.assert_allclose(jax.jit(jax.grad(value))(array), expected, rtol=1e-6)
    batch = jax.vmap(chm.from_array)(jnp.stack([array, 2 * array]))
    np.testing.assert_array_equal(batch["b"], jnp.stack([X, 2 * X]))
    np.testing.assert_array_equal(jax.vmap(lambda c: c.to_array())(batch), jnp.stack([array, 2 * array]))


def test_what_has_no_vector():
    chm = choice_map({"a": 1.0, "k": jnp.arange(2), "z": {"flag": True}})
    with pytest.raises(gjflax.ChoiceDtypeError, match=r'choice "k" has the dtype int32.*selection & ~select\("k"\)'):
        chm.to_array()
    with pytest.raises(gjflax.ChoiceDtypeError, match=r'choice \("z", "flag"\) has the dtype bool'):
        chm.from_array(jnp.zeros(1), "z")
    with pytest.raises(gjflax.SelectionError, match='no choice to make a vector of. .*"a"'):
        chm.to_array("b")
    with pytest.raises(gjflax.ChoiceShapeError, match=r"are 1 numbers; got an array of shape \(2,\)"):
        chm.from_array(jnp.zeros(2), "a")

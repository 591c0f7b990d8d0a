"""Choice maps: values by address."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gjflax
from gjflax import (
    BuiltinChoiceMap,
    EmptyChoiceMap,
    Map,
    MissingChoiceError,
    Normal,
    ValueChoiceMap,
    VectorChoiceMap,
    choice_map,
    gen,
    select,
    trace,
)

NESTED = {"a": 1.0, "b": {"c": 2.0, "d": {"e": 3.0}}}


def plain(choices: Any) -> Any:
    """A choice map as nested dicts of lists."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), choices.to_dict())


# Making them ---------------------------------------------------------------------------------------------------------


def test_nested_dicts_and_back():
    chm = choice_map(NESTED)
    assert isinstance(chm, BuiltinChoiceMap)
    assert chm.to_dict() == NESTED
    assert choice_map(chm.to_dict()) == chm
    assert choice_map(chm) is chm


def test_tuple_keys_are_nested_dicts():
    assert choice_map({"a": 1.0, ("b", "c"): 2.0, ("b", "d", "e"): 3.0}) == choice_map(NESTED)
    assert choice_map({("b",): {"c": 2.0}, ("b", "d"): {"e": 3.0}, "a": 1.0}) == choice_map(NESTED)


def test_the_root():
    assert isinstance(choice_map(1.5), ValueChoiceMap)
    assert choice_map({(): 1.5}).get_value() == 1.5
    assert choice_map({(): {"a": 1.0}, "b": 2.0}).to_dict() == {"a": 1.0, "b": 2.0}
    assert choice_map(1.5)[()] == 1.5
    assert choice_map(1.5).to_dict() == 1.5
    assert choice_map(1.5).addresses() == [()]


@pytest.mark.parametrize("nothing", [None, {}, {"a": {}}, {"a": {"b": {}}}, {("a", 0): {}}, EmptyChoiceMap()], ids=repr)
def test_nothing_is_the_empty_map(nothing: Any):
    chm = choice_map(nothing)
    assert chm.is_empty() and chm.addresses() == [] and chm.to_dict() == {} and chm == EmptyChoiceMap()
    assert not jax.tree.leaves(chm)


@pytest.mark.parametrize(
    "value",
    [1, 2.5, True, np.float64(0.5), np.arange(3), jnp.arange(3.0), [1.0, 2.0], [[1, 2], [3, 4]]],
    ids=lambda value: type(value).__name__,
)
def test_values_of_all_kinds(value: Any):
    np.testing.assert_array_equal(choice_map({"a": value})["a"], np.asarray(value))


def test_a_list_is_an_array_also_below_a_map():
    points = Map(Normal, in_axes=(0, None))
    _, (retval, _) = points.assess(jax.random.key(0), [1.0, 2.0, 3.0], (jnp.arange(3.0), 1.0))
    np.testing.assert_array_equal(retval, [1.0, 2.0, 3.0])


def test_integer_keys_are_elements():
    by_tuple = choice_map({("y", 3, "pos"): 2.0, ("y", 5, "pos"): 4.0})
    by_dict = choice_map({"y": {3: {"pos": 2.0}, 5: {"pos": 4.0}}})
    by_vector = choice_map({"y": VectorChoiceMap([3, 5], {"pos": jnp.array([2.0, 4.0])})})
    assert by_tuple == by_dict == by_vector
    assert plain(by_tuple) == {"y": {3: {"pos": 2.0}, 5: {"pos": 4.0}}}
    assert choice_map(by_tuple.to_dict()) == by_tuple
    assert by_tuple.addresses() == [("y", "pos")]


def test_integers_of_numpy_are_integers():
    keys = np.array([4, 1])
    chm = choice_map({("y", keys[0]): 1.0, ("y", keys[1]): 2.0})
    assert chm["y", 4] == 1.0
    assert chm["y", keys[1]] == 2.0
    assert plain(chm) == {"y": {4: 1.0, 1: 2.0}}


def test_parts_of_one_element_meet():
    chm = choice_map({("y", 2, "a"): 1.0, ("y", 2, "b"): 2.0})
    assert chm["y", 2, "a"] == 1.0 and chm["y", 2, "b"] == 2.0
    with pytest.raises(gjflax.ChoiceMapError, match='"a"'):
        choice_map({2: {"a": 1.0}, (np.int32(2), "a"): 2.0})


def test_a_trace_is_a_choice_map():
    @gen
    def model():
        return trace("x", Normal)(0.0, 1.0)

    _, tr = model.simulate(jax.random.key(0), ())
    assert choice_map(tr) == tr.strip() == tr.get_choices()
    assert choice_map({"inner": tr})["inner", "x"] == tr["x"]


# Reading them --------------------------------------------------------------------------------------------------------


def test_getitem_gives_a_value_or_the_map_below():
    chm = choice_map(NESTED)
    assert chm["a"] == 1.0
    assert chm["b", "d", "e"] == 3.0
    assert chm["b"].to_dict() == NESTED["b"]
    assert chm["b"]["d"]["e"] == chm["b", "d"]["e"]
    assert "a" in chm and ("b", "d") in chm and ("b", "x") not in chm and ("a", "x") not in chm
    assert chm.has_subtree("b") and not chm.has_subtree("z")
    assert chm.get_subtree("z").is_empty()
    assert chm.addresses() == [("a",), ("b", "c"), ("b", "d", "e")]
    with pytest.raises(MissingChoiceError, match=r'\("b", "cc"\).*Did you mean \("b", "c"\)\?'):
        chm["b", "cc"]


def vectors() -> Any:
    @gen
    def point(x):
        pos = trace("pos", Normal)(x, 1.0)
        return trace("w", Normal)(jnp.stack([pos, -pos]), 1.0)

    @gen
    def model():
        return trace("y", Map(point, in_axes=(0,)))(jnp.arange(5.0))

    return model.simulate(jax.random.key(0), ())[1].strip()


def test_elements_of_a_full_vector():
    chm = vectors()
    whole = chm["y", "pos"]
    assert whole.shape == (5,)
    for index in (0, 3, -1, np.int64(2)):
        assert chm["y", index, "pos"] == whole[index]
        assert chm["y", "pos", index] == whole[index]
        np.testing.assert_array_equal(chm["y", index].to_dict()["w"], chm["y", "w"][index])
    assert chm["y", jnp.int32(3), "pos"] == whole[3]
    assert jax.jit(lambda i: chm["y", i, "pos"])(3) == whole[3]
    assert ("y", 5) not in chm
    assert sorted(chm.addresses()) == [("y", "pos"), ("y", "w")]
    with pytest.raises(MissingChoiceError, match=r'\("y", 5, "pos"\)'):
        chm["y", 5, "pos"]


def test_elements_of_a_part_of_a_vector():
    chm = VectorChoiceMap([4, 1], {"pos": jnp.array([40.0, 10.0])})
    assert len(chm) == 2 and chm.static_indices == (4, 1)
    assert chm[4, "pos"] == 40.0 and chm[1, "pos"] == 10.0 and chm["pos", 1] == 10.0
    assert chm[jnp.int32(1), "pos"] == 10.0
    assert jax.jit(lambda i: chm[i, "pos"])(4) == 40.0
    for missing in (0, -1, 2, jnp.int32(2)):
        assert missing not in chm
        with pytest.raises(MissingChoiceError):
            chm[missing, "pos"]


def test_elements_of_a_vector_with_traced_indices():
    def read(indices, values):
        chm = VectorChoiceMap(indices, {"pos": values})
        assert chm.static_indices is None and len(chm) == 2
        assert chm.addresses() == [("pos",)] and not chm.covers(2)
        return chm[4, "pos"]

    assert jax.jit(read)(jnp.array([1, 4]), jnp.array([10.0, 40.0])) == 40.0


def test_a_vector_of_no_elements_is_empty():
    chm = VectorChoiceMap([], {"pos": jnp.zeros((0,))})
    assert chm.is_empty() and not choice_map({"y": chm}).has_subtree(("y", 0))
    assert choice_map({"a": 1.0}).merge(chm).to_dict() == {"a": 1.0}


def test_covers_says_whether_all_elements_are_there_in_order():
    values = jnp.arange(3.0)
    assert VectorChoiceMap(range(3), values).covers(3)
    assert VectorChoiceMap([0, 1, 2], values).covers(3)
    assert not VectorChoiceMap([0, 2, 1], values).covers(3)
    assert not VectorChoiceMap([0, 1, 2], values).covers(4)


# Combining them ------------------------------------------------------------------------------------------------------


def test_merge_is_a_disjoint_union():
    a, b = choice_map({"a": 1.0, "b": {"c": 2.0}}), {"b": {"d": 3.0}, "e": 4.0}
    want = {"a": 1.0, "b": {"c": 2.0, "d": 3.0}, "e": 4.0}
    assert a.merge(b).to_dict() == want
    assert choice_map(b).merge(a) == a.merge(b)
    assert a.merge({}).to_dict() == a.to_dict() == choice_map({}).merge(a).to_dict()
    assert a.to_dict() == {"a": 1.0, "b": {"c": 2.0}}, "merge changed its argument"


@pytest.mark.parametrize(
    "clash",
    [{"a": 5.0}, {"b": 5.0}, {"b": {"c": 5.0}}, {"b": {"c": {"x": 5.0}}}, {"a": {"x": 5.0}}, 5.0],
    ids=repr,
)
def test_merge_refuses_what_overwrite_resolves(clash: Any):
    chm = choice_map({"a": 1.0, "b": {"c": 2.0}})
    with pytest.raises(gjflax.ChoiceMapError, match="overwrite"):
        chm.merge(clash)
    with pytest.raises(gjflax.ChoiceMapError, match="overwrite"):
        choice_map(clash).merge(chm)
    result = chm.overwrite(clash)
    for address in choice_map(clash).addresses():
        assert result[address] == 5.0
    assert chm.overwrite({}) == chm


def test_overwrite_keeps_the_rest():
    assert choice_map(NESTED).overwrite({"b": {"d": {"e": 9.0}}, "f": 1.0}).to_dict() == {
        "a": 1.0,
        "b": {"c": 2.0, "d": {"e": 9.0}},
        "f": 1.0,
    }


@pytest.mark.parametrize("traced", [False, True])
def test_overwrite_writes_elements_of_a_vector(traced: bool):
    chm = vectors()

    def write(indices):
        return chm.overwrite({"y": VectorChoiceMap(indices, {"pos": jnp.array([40.0, 10.0])})})

    new = jax.jit(write)(jnp.array([4, 1])) if traced else write([4, 1])
    want = np.asarray(chm["y", "pos"]).copy()
    want[[4, 1]] = [40.0, 10.0]
    np.testing.assert_array_equal(new["y", "pos"], want)
    np.testing.assert_array_equal(new["y", "w"], chm["y", "w"])
    assert jax.tree.structure(new) == jax.tree.structure(chm)


def test_a_full_vector_and_arrays_by_name_speak_of_the_same_elements():
    chm = vectors()
    new = chm.overwrite({"y": {"pos": jnp.zeros(5)}})
    np.testing.assert_array_equal(new["y", "pos"], np.zeros(5))
    assert jax.tree.structure(new) == jax.tree.structure(chm)
    part = select(("y", "w")).filter(chm)[0]
    for merged in (
        part.merge({"y": {"pos": chm["y", "pos"]}}),
        choice_map({"y": {"pos": chm["y", "pos"]}}).merge(part),
    ):
        assert sorted(merged.addresses()) == sorted(chm.addresses())
        assert merged["y", 3, "pos"] == chm["y", 3, "pos"]


def test_parts_of_a_vector():
    low, high = choice_map({("y", 0): 1.0, ("y", 3): 2.0}), choice_map({("y", 1): 3.0})
    assert plain(low.merge(high)) == {"y": {0: 1.0, 3: 2.0, 1: 3.0}}
    with pytest.raises(gjflax.ChoiceMapError, match="share elements"):
        low.merge(choice_map({("y", 3): 5.0}))
    assert plain(low.overwrite({("y", 3): 5.0})) == {"y": {0: 1.0, 3: 5.0}}
    assert plain(low.overwrite({("y", 3): 5.0, ("y", 7): 6.0})) == {"y": {0: 1.0, 3: 5.0, 7: 6.0}}
    same = low.merge({"z": 0.0}).overwrite(low)
    assert plain(same) == {"y": {0: 1.0, 3: 2.0}, "z": 0.0}


def test_filter_by_name():
    chm = choice_map(NESTED)
    assert chm.filter(select("b")).to_dict() == {"b": NESTED["b"]}
    assert chm.filter(select(("b", "d"), "a")).to_dict() == {"a": 1.0, "b": {"d": {"e": 3.0}}}
    assert chm.filter(~select(("b", "d"))).to_dict() == {"a": 1.0, "b": {"c": 2.0}}
    assert chm.filter(select("z")).is_empty()
    assert chm.filter(gjflax.AllSelection()) == chm
    choices, weight = select("a").filter(NESTED)
    assert choices.to_dict() == {"a": 1.0} and weight == 0.0
    assert choice_map(1.0).filter(select("a")).is_empty()
    assert choice_map({}).filter(gjflax.AllSelection()).is_empty()


def test_filter_by_index():
    chm = vectors()
    part = chm.filter(select(("y", 1), ("y", 4)))
    assert part["y"].static_indices == (1, 4)
    np.testing.assert_array_equal(part["y"].inner["pos"], chm["y", "pos"][np.array([1, 4])])
    one = chm.filter(select(("y", 2, "pos")))
    assert one.addresses() == [("y", "pos")] and one["y", 2, "pos"] == chm["y", 2, "pos"]
    rest = chm.filter(~select(("y", 2)))
    assert rest["y"].static_indices == (0, 1, 3, 4)
    np.testing.assert_array_equal(rest.overwrite(chm.filter(select(("y", 2))))["y"].inner["w"].shape, (5, 2))
    # The same addresses, named in another order at each index, are the same.
    both = chm.filter(select(("y", 0, "pos"), ("y", 0, "w"), ("y", 1, "w"), ("y", 1, "pos")))
    assert both == chm.filter(select(("y", 0), ("y", 1)))
    assert chm.filter(select(("y", 17))).is_empty()


def test_filters_split_a_choice_map():
    chm = vectors().merge(NESTED)
    for selection in (select("a"), select("b", ("y", "pos")), select(("y", "w")), select("z")):
        chosen, rest = chm.filter(selection), chm.filter(~selection)
        merged = chosen.merge(rest)
        assert sorted(merged.addresses()) == sorted(chm.addresses())
        for address in chm.addresses():
            np.testing.assert_array_equal(merged[address], chm[address])


# Comparing and transforming them -------------------------------------------------------------------------------------


def test_equality_is_of_addresses_and_values():
    assert choice_map({"a": 1.0, "b": 2.0}) == choice_map({"b": 2.0, "a": 1.0})
    assert choice_map({"a": 1.0}) != choice_map({"a": 2.0})
    assert choice_map({"a": 1.0}) != choice_map({"b": 1.0})
    assert choice_map({"a": 1.0}) != choice_map({})
    assert choice_map({"a": jnp.arange(2.0)}) == choice_map({"a": np.arange(2.0, dtype=np.float32)})
    assert choice_map({"a": jnp.zeros(2)}) != choice_map({"a": jnp.zeros(3)})
    assert VectorChoiceMap([0, 2], jnp.zeros(2)) != VectorChoiceMap([0, 1], jnp.zeros(2))
    assert choice_map({"a": 1.0}) != {"a": 1.0}
    with pytest.raises(TypeError, match="unhashable"):
        hash(choice_map({"a": 1.0}))


def test_choice_maps_are_pytrees():
    chm = vectors().merge({"a": jnp.float32(1.0)})
    doubled = jax.jit(lambda c: jax.tree.map(lambda leaf: 2 * leaf, c))(chm)
    assert doubled["y", 3, "pos"] == 2 * chm["y", 3, "pos"]
    assert jax.tree.structure(doubled) == jax.tree.structure(chm)
    stacked = jax.vmap(lambda x: choice_map({"a": x, ("b", "c"): 2 * x}))(jnp.arange(3.0))
    np.testing.assert_array_equal(stacked["b", "c"], [0.0, 2.0, 4.0])
    grads = jax.grad(lambda c: c["a"] ** 2 + jnp.sum(c["y", "pos"]))(chm)
    assert grads["a"] == 2.0 and grads["y", 1, "pos"] == 1.0
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(choice_map({"a": {"b": 1.0}}))[0]
    ]
    assert paths == [".children['a'].children['b'].value"]


def test_indices_are_structure_where_they_are_known_and_a_leaf_where_traced():
    static = VectorChoiceMap([0, 2], jnp.zeros(2))
    assert len(jax.tree.leaves(static)) == 1
    traced = VectorChoiceMap(jnp.array([0, 2]), jnp.zeros(2))
    assert len(jax.tree.leaves(traced)) == 2
    assert jax.tree.map(lambda leaf: leaf, traced)[2] == 0.0


def test_a_choice_map_is_stripped_already():
    chm = choice_map(NESTED)
    assert chm.strip() is chm


# Vectors in vectors --------------------------------------------------------------------------------------------------


def rows() -> Any:
    """Two elements, each with a row of three: directly, and below a name."""

    def one(start):
        row = VectorChoiceMap(range(3), {"x": start + jnp.arange(3.0), "w": -(start + jnp.arange(3.0))})
        return choice_map({"row": row})

    return VectorChoiceMap(range(2), jax.vmap(one)(jnp.array([0.0, 10.0])))


def test_elements_of_elements():
    chm = rows()
    assert chm[1, "row", 2, "x"] == 12.0 and chm[1]["row", 0, "w"] == -10.0
    np.testing.assert_array_equal(chm["row", "x"], [[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]])
    np.testing.assert_array_equal(chm[1, "row", "x"], [10.0, 11.0, 12.0])
    assert plain(chm) == {"row": {"x": chm["row", "x"].tolist(), "w": chm["row", "w"].tolist()}}


def test_filter_by_the_index_of_an_inner_vector():
    part = rows().filter(select(("row", 2, "x")))
    assert plain(part) == {0: {"row": {2: {"x": 2.0}}}, 1: {"row": {2: {"x": 12.0}}}}
    assert choice_map(part.to_dict())[1, "row", 2, "x"] == 12.0
    part = rows().filter(select((1, "row", 2, "x"), (1, "row", 0, "x")))
    assert plain(part) == {1: {"row": {0: {"x": 10.0}, 2: {"x": 12.0}}}}
    part = rows().filter(~select((1, "row", 2), (0, "row", 2), (0, "row", "w"), (1, "row", "w")))
    assert plain(part) == {i: {"row": {j: {"x": 10.0 * i + j} for j in (0, 1)}} for i in (0, 1)}


def test_elements_of_elements_are_written_and_merged():
    low, high = choice_map({(1, "row", 2, "x"): 5.0}), choice_map({(1, "row", 0, "x"): 7.0})
    assert plain(low.merge(high)) == {1: {"row": {2: {"x": 5.0}, 0: {"x": 7.0}}}}
    assert plain(low.overwrite({(1, "row", 2, "x"): 6.0})) == {1: {"row": {2: {"x": 6.0}}}}
    with pytest.raises(gjflax.ChoiceMapError, match='"x"'):
        low.merge(low)
    for written in (rows().overwrite(low.merge(high)), rows().overwrite(low).overwrite(high)):
        np.testing.assert_array_equal(written["row", "x"], [[0.0, 1.0, 2.0], [7.0, 11.0, 5.0]])
        np.testing.assert_array_equal(written["row", "w"], rows()["row", "w"])
        assert jax.tree.structure(written) == jax.tree.structure(rows())
    whole = rows().overwrite({"row": {"x": jnp.zeros((2, 3))}})
    np.testing.assert_array_equal(whole["row", "x"], np.zeros((2, 3)))
    one = rows().overwrite({1: {"row": {"x": jnp.ones(3)}}})
    np.testing.assert_array_equal(one["row", "x"], [[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    with pytest.raises(gjflax.ChoiceMapError, match="Element 3 of"):
        rows().overwrite({(1, "row", 3, "x"): 5.0})
    with pytest.raises(gjflax.ChoiceMapError, match="does not have"):
        rows().overwrite({(1, "row", 0, "z"): 5.0})

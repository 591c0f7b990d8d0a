"""`Map`: constraints, selections and gradients of some elements, against sums written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gjflax
from gjflax import (
    AllSelection,
    Diff,
    GenModule,
    Map,
    MissingChoiceError,
    Normal,
    VectorChoiceMap,
    choice_map,
    gen,
    select,
    trace,
)

KEY, DRAW = jax.random.key(0), jax.random.key(1)


@gen
def point(loc, scale):
    x = trace("x", Normal)(loc, 1.0)
    return trace("y", Normal)(2.0 * x, scale)


points = Map(point, in_axes=(0, None))
ARGS = (jnp.array([0.0, 1.0, -1.0, 3.0]), jnp.float32(0.5))
OTHER_ARGS = (jnp.array([0.5, 1.0, 2.0, -3.0]), jnp.float32(1.5))
INDICES = [3, 1]
"""Not in order."""


def norm(value: Any, mean: Any, scale: Any) -> np.ndarray:
    return np.asarray(jax.scipy.stats.norm.logpdf(np.asarray(value), np.asarray(mean), np.asarray(scale)), np.float64)


def terms(tr: Any, args: Any = ARGS) -> dict[str, np.ndarray]:
    """The log densities of the choices of every element."""
    return {"x": norm(tr["x"], args[0], 1.0), "y": norm(tr["y"], 2.0 * tr["x"], args[1])}


def total(tr: Any, args: Any = ARGS) -> float:
    return float(sum(np.sum(part) for part in terms(tr, args).values()))


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def given(indices: Any, **values: Any) -> VectorChoiceMap:
    return VectorChoiceMap(indices, {name: jnp.array(value) for name, value in values.items()})


def twice(function: Callable[[Any], Any]) -> list[Any]:
    """The results with indices that are known while tracing, and with traced ones."""
    return [jax.jit(lambda: function(INDICES))(), jax.jit(function)(jnp.array(INDICES))]


@pytest.fixture(scope="module")
def tr() -> Any:
    return jax.jit(lambda key: points.simulate(key, ARGS)[1])(DRAW)


# Constraints of some elements ----------------------------------------------------------------------------------------


def test_importance_weighs_the_given_elements():
    def run(indices):
        return points.importance(KEY, given(indices, y=[30.0, 10.0]), ARGS)[1]

    for weight, new in twice(run):
        np.testing.assert_array_equal(new["y"][np.array(INDICES)], [30.0, 10.0])
        close(weight, terms(new)["y"][INDICES].sum())
        close(new.get_score(), total(new))
        assert len(np.unique(new["x"])) == 4, "elements share their randomness"


def test_update_changes_the_given_elements_and_rescores_all(tr: Any):
    def run(indices):
        values = given(indices, x=[30.0, 10.0])
        key, (retdiff, weight, new, discard) = points.update(KEY, tr, values, OTHER_ARGS)
        _, (_, back_weight, back, _) = points.update(key, new, discard, ARGS)
        return Diff.primal(retdiff), weight, new, discard, back_weight, back

    for retval, weight, new, discard, back_weight, back in twice(run):
        want = np.asarray(tr["x"]).copy()
        want[INDICES] = [30.0, 10.0]
        np.testing.assert_array_equal(new["x"], want)
        np.testing.assert_array_equal(new["y"], tr["y"])
        np.testing.assert_array_equal(retval, tr["y"])
        close(weight, total(new, OTHER_ARGS) - total(tr))
        close(new.get_score(), total(new, OTHER_ARGS))
        assert discard.addresses() == [("x",)]
        np.testing.assert_array_equal(discard.inner["x"], tr["x"][np.array(INDICES)])
        np.testing.assert_array_equal(discard.index_array(), INDICES)
        close(back_weight, -weight)
        assert back.strip() == tr.strip()
        jax.tree.map(np.testing.assert_array_equal, back.get_args(), tr.get_args())


def test_a_broadcast_argument_that_changes_rescores_every_element(tr: Any):
    args = (ARGS[0], jnp.float32(2.0))
    diffs = (Diff.no_change(ARGS[0]), Diff.unknown_change(args[1]))
    for values in ({}, given([2], y=[0.25])):
        _, (_, weight, new, _) = points.update(KEY, tr, values, diffs)
        close(weight, total(new, args) - total(tr))
        assert new.get_args()[1] == 2.0


def test_all_elements_may_be_given_in_any_order(tr: Any):
    order = [2, 0, 3, 1]
    values = given(order, x=tr["x"][np.array(order)], y=tr["y"][np.array(order)])
    _, (retval, score) = points.assess(KEY, values, ARGS)
    close(score, tr.get_score())
    np.testing.assert_array_equal(retval, tr["y"])
    _, (weight, new) = points.importance(KEY, values, ARGS)
    close(weight, tr.get_score())
    assert new.strip() == tr.strip()
    chm, log_det = points.constrain(values, ARGS)
    assert chm == tr.strip() and log_det == 0.0


def test_elements_by_tuple_keys(tr: Any):
    by_keys = choice_map({(3, "x"): 30.0, (1, "x"): 10.0})
    _, (_, weight, new, discard) = points.update(KEY, tr, by_keys, ARGS)
    assert new["x"][3] == 30.0 and new["x"][1] == 10.0
    assert set(discard.to_dict()) == {3, 1}
    close(weight, total(new) - total(tr))


def test_no_elements_are_no_constraint(tr: Any):
    nothing = VectorChoiceMap([], {"x": jnp.zeros((0,))})
    _, (_, weight, new, discard) = points.update(KEY, tr, nothing, ARGS)
    close(weight, 0.0)
    assert discard.is_empty() and new.strip() == tr.strip()


def test_the_last_of_many_updates_wins_in_a_scan(tr: Any):
    """Single elements, one after another by traced index, leave what a whole update does."""
    target = jnp.array([5.0, 6.0, 7.0, 8.0])

    @jax.jit
    def run(tr):
        def step(tr, index):
            values = VectorChoiceMap(index[None], {"x": target[index][None]})
            _, (_, weight, tr, _) = points.update(KEY, tr, values, ARGS)
            return tr, weight

        return jax.lax.scan(step, tr, jnp.arange(4))

    new, weights = run(tr)
    np.testing.assert_array_equal(new["x"], target)
    close(weights.sum(), total(new) - total(tr))
    close(new.get_score(), total(new))


# Selections of some elements -----------------------------------------------------------------------------------------


def test_regenerate_redraws_the_selected_elements(tr: Any):
    selection = select((3, "x"), (1, "x"))
    _, (_, weight, new) = points.regenerate(KEY, tr, selection, OTHER_ARGS)
    changed = np.asarray(new["x"] != tr["x"])
    np.testing.assert_array_equal(changed, [False, True, False, True])
    np.testing.assert_array_equal(new["y"], tr["y"])
    after, before = terms(new, OTHER_ARGS), terms(tr)
    want = np.sum(after["y"] - before["y"]) + np.sum((after["x"] - before["x"])[[0, 2]])
    close(weight, want)
    close(new.get_score(), total(new, OTHER_ARGS))
    np.testing.assert_array_equal(new.get_retval(), new["y"])


def test_regenerate_different_addresses_of_different_elements(tr: Any):
    selection = select((3, "x"), (1, "y"), (0, "x"), (0, "y"))
    _, (_, weight, new) = jax.jit(lambda tr: points.regenerate(KEY, tr, selection, ARGS))(tr)
    np.testing.assert_array_equal(new["x"] != tr["x"], [True, False, False, True])
    np.testing.assert_array_equal(new["y"] != tr["y"], [True, True, False, False])
    after, before = terms(new), terms(tr)
    close(weight, (after["y"] - before["y"])[[2, 3]].sum())


def test_project_and_filter_by_index(tr: Any):
    parts = terms(tr)
    for selection, want in [
        (select((3, "x"), (1, "y")), parts["x"][3] + parts["y"][1]),
        (select(2), parts["x"][2] + parts["y"][2]),
        (~select(2), total(tr) - parts["x"][2] - parts["y"][2]),
        (select((0, "x")) | select("y"), parts["x"][0] + parts["y"].sum()),
        (select((0, "x")) & select("y"), 0.0),
        (select(), 0.0),
    ]:
        _, weight = points.project(KEY, tr, selection)
        close(weight, want)
    choices, weight = select((3, "x"), (1, "x")).filter(tr)
    assert choices == VectorChoiceMap([1, 3], {"x": tr["x"][np.array([1, 3])]})
    close(weight, parts["x"][[1, 3]].sum())


def test_gradients_in_some_elements(tr: Any):
    selection = select((3, "x"), (1, "x"))
    _, grads = points.choice_grad(KEY, tr, selection)
    assert jax.tree.structure(grads) == jax.tree.structure(selection.filter(tr)[0])
    slope = -(tr["x"] - ARGS[0]) + 2.0 * (tr["y"] - 2.0 * tr["x"]) / ARGS[1] ** 2
    close(grads.inner["x"], slope[np.array([1, 3])])
    # A step of gradient ascent in these elements.
    moved = jax.tree.map(lambda value, grad: value + 0.01 * grad, selection.filter(tr)[0], grads)
    _, (_, weight, new, _) = points.update(KEY, tr, moved, ARGS)
    assert weight > 0
    np.testing.assert_array_equal(new["x"] != tr["x"], [False, True, False, True])


# Maps in maps --------------------------------------------------------------------------------------------------------


rows = Map(points, in_axes=(0, None))
GRID = (jnp.arange(8.0).reshape(2, 4), jnp.float32(0.5))


def test_an_element_of_an_element():
    @jax.jit
    def run(key):
        key, old = rows.simulate(key, GRID)
        _, (_, weight, new, discard) = rows.update(key, old, {(1, 2, "x"): 9.0, (1, 0, "x"): 7.0}, GRID)
        _, (_, back_weight, back, _) = rows.update(key, new, discard, GRID)
        return old, weight, new, discard, back_weight, back

    old, weight, new, discard, back_weight, back = run(KEY)
    want = np.asarray(old["x"]).copy()
    want[1, 2], want[1, 0] = 9.0, 7.0
    np.testing.assert_array_equal(new["x"], want)
    close(weight, total(new, GRID) - total(old, GRID))
    assert discard[1, 2, "x"] == old["x"][1, 2] and discard[1, 0, "x"] == old["x"][1, 0]
    close(back_weight, -weight)
    np.testing.assert_array_equal(back["x"], old["x"])


@pytest.mark.slow
def test_selections_of_an_element_of_an_element():
    _, old = jax.jit(lambda key: rows.simulate(key, GRID))(DRAW)
    _, (_, weight, new) = jax.jit(lambda tr: rows.regenerate(KEY, tr, select((1, 2, "x")), GRID))(old)
    changed = np.asarray(new["x"] != old["x"])
    assert changed[1, 2] and changed.sum() == 1
    after, before = terms(new, GRID)["y"], terms(old, GRID)["y"]
    close(weight, after[1, 2] - before[1, 2])
    close(old.project(select((0, 3), (1, "y"))), sum(terms(old, GRID)[n][0, 3] for n in "xy") + before[1].sum())
    _, grads = rows.choice_grad(KEY, old, select((1, 2, "x")))
    slope = -(old["x"] - GRID[0]) + 2.0 * (old["y"] - 2.0 * old["x"]) / 0.25
    close(grads[1, 2, "x"], slope[1, 2])


@pytest.mark.slow
def test_every_element_of_an_element_at_a_traced_index():
    """The whole inner vector is given, of an outer element whose index is known only when running."""
    inner = gjflax.VectorChoiceMap(range(4), {"x": jnp.zeros((4,))})

    @jax.jit
    def run(key, index):
        row = jax.tree.map(lambda leaf: leaf[None], inner)
        given = gjflax.core.choice_map.vector(index[None], row)
        _, (weight, tr) = rows.importance(key, given, GRID)
        _, (_, gain, new, discard) = rows.update(key, rows.simulate(key, GRID)[1], given, GRID)
        return weight, tr, gain, new, discard

    weight, tr, gain, new, discard = run(KEY, jnp.array(1))
    np.testing.assert_array_equal(tr["x"][1], jnp.zeros(4))
    assert np.all(tr["x"][0] != 0.0)
    close(weight, terms(tr, GRID)["x"][1].sum())
    close(gain, total(new, GRID) - total(rows.simulate(KEY, GRID)[1], GRID))
    assert discard.inner["x"].shape == (1, 4)


def test_elements_of_an_element_by_traced_indices():
    """Also where everything runs again, as under other arguments."""
    _, old = jax.jit(lambda key: rows.simulate(key, GRID))(DRAW)
    moved = (GRID[0] + 1.0, GRID[1])

    @jax.jit
    def run(outer, inner):
        row = VectorChoiceMap(inner[None], {"x": jnp.array([[9.0, 7.0]])})
        given = VectorChoiceMap(outer[None], row)
        return rows.update(KEY, old, given, moved)[1], rows.importance(KEY, given, moved)[1]

    (_, weight, new, discard), (density, drawn) = run(jnp.array(1), jnp.array([2, 0]))
    want = np.asarray(old["x"]).copy()
    want[1, 2], want[1, 0] = 9.0, 7.0
    np.testing.assert_array_equal(new["x"], want)
    close(weight, total(new, moved) - total(old, GRID))
    np.testing.assert_array_equal(discard.inner.inner["x"], np.asarray(old["x"])[None, 1, [2, 0]])
    close(density, terms(drawn, moved)["x"][1, [2, 0]].sum())
    assert drawn["x"][1, 2] == 9.0 and drawn["x"][1, 0] == 7.0
    with pytest.raises(gjflax.ChoiceMapError, match=r"indices of shape \(1,\). For one element"):
        VectorChoiceMap(jnp.array([1]), VectorChoiceMap(jnp.array([2]), jnp.array([[9.0]])))
    with pytest.raises(
        gjflax.ChoiceMapError, match=r"the leading axes \(1, 2\); the value at \"x\" has shape \(1, 3\)"
    ):
        VectorChoiceMap(jnp.array([[2, 0]]), {"x": jnp.zeros((1, 3))})


@pytest.mark.parametrize("indices", [[0, 2], jnp.array([0, 2])])
def test_an_update_never_passes_through_a_state_of_density_0(indices: Any):
    """Under the new arguments the old values are impossible, and the new ones, which some elements are given, are not."""
    bounded = Map(gjflax.Uniform, repeats=3)
    _, tr = bounded.simulate(KEY, (0.0, 1.0))
    args = (2.0, 4.0)
    given = gjflax.VectorChoiceMap(indices, jnp.array([2.5, 3.0]))
    _, (_, weight, new, _) = bounded.update(KEY, tr, given, args)
    assert weight == -jnp.inf and new.get_score() == -jnp.inf
    _, (_, _, middle, _) = bounded.update(KEY, tr, {1: 0.5}, (0.0, 8.0))
    given = gjflax.VectorChoiceMap(jnp.array([0, 1, 2]), jnp.array([2.5, 2.1, 3.0]))
    _, (_, weight, new, discard) = bounded.update(KEY, middle, given, args)
    close(weight, -3 * np.log(2.0) + 3 * np.log(8.0))
    np.testing.assert_array_equal(discard.inner.get_value(), middle.strip().inner.get_value())


@pytest.mark.parametrize("index", [3, -1])
def test_an_index_of_no_element_is_an_error_or_makes_the_weight_nan(index: int):
    bounded = Map(gjflax.Uniform, repeats=3)
    _, tr = bounded.simulate(KEY, (0.0, 1.0))

    def weights(index):
        given = gjflax.VectorChoiceMap(index[None], jnp.full(1, 0.5))
        alone = bounded.update(KEY, tr, given, tuple(map(gjflax.Diff.no_change, (0.0, 1.0))))[1][1]
        return alone, bounded.update(KEY, tr, given, (0.0, 2.0))[1][1], bounded.importance(KEY, given, (0.0, 1.0))[1][0]

    assert np.all(np.isnan(jax.jit(weights)(jnp.array(index))))
    assert np.all(np.isfinite(jax.jit(weights)(jnp.array(1))))
    with pytest.raises(gjflax.ChoiceMapError, match="0 to 2"):
        weights(jnp.array(index))


def test_a_map_of_a_leaf_has_its_choice_at_the_root():
    leaf = Map(Normal, in_axes=(0, None))
    key, old = leaf.simulate(KEY, ARGS)
    _, (_, weight, new, discard) = leaf.update(key, old, {2: 5.0}, ARGS)
    assert new.get_retval()[2] == 5.0 and discard[2] == old.get_retval()[2]
    close(weight, (norm(5.0, -1.0, 0.5) - norm(old.get_retval()[2], -1.0, 0.5)).sum())
    _, (_, _, new) = leaf.regenerate(key, old, select(0, 3), ARGS)
    np.testing.assert_array_equal(new.get_retval() != old.get_retval(), [True, False, False, True])
    _, grads = leaf.choice_grad(key, old, AllSelection())
    close(grads.inner.get_value(), -(old.get_retval() - ARGS[0]) / 0.25)


# Axes ----------------------------------------------------------------------------------------------------------------


@gen
def any_axes(inputs, matrix, scale):
    return trace("y", Normal)(inputs["a"] + inputs["b"] + jnp.sum(matrix), scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    "in_axes, inputs, matrix, scale",
    [
        (0, {"a": jnp.arange(3.0), "b": jnp.ones(3)}, jnp.arange(6.0).reshape(3, 2), jnp.arange(1.0, 4.0)),
        ((0, None, None), {"a": jnp.arange(3.0), "b": jnp.ones(3)}, jnp.ones((2, 2)), 2.0),
        (({"a": 0, "b": None}, 1, None), {"a": jnp.arange(3.0), "b": 1.0}, jnp.arange(6.0).reshape(2, 3), 2.0),
        (({"a": None, "b": None}, -1, None), {"a": 0.5, "b": 1.0}, jnp.arange(6.0).reshape(2, 3), 2.0),
        (({"a": -1, "b": None}, None, None), {"a": jnp.arange(3.0), "b": 1.0}, jnp.ones((2, 2)), 2.0),
    ],
    ids=["int", "tuple", "tree", "negative", "negative in a tree"],
)
def test_axes_are_those_of_vmap(in_axes: Any, inputs: Any, matrix: Any, scale: Any):
    args = (inputs, matrix, scale)
    mapped = Map(any_axes, in_axes=in_axes)
    value = jnp.array([0.1, -0.2, 0.3])
    _, (_, score) = mapped.assess(KEY, {"y": value}, args)

    def one(value, *args):
        return any_axes.assess(KEY, {"y": value}, args)[1][1]

    axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * 3
    close(score, jax.vmap(one, in_axes=(0, *axes))(value, *args).sum())
    # Some elements take their own slices of the arguments.
    _, (weight, _) = mapped.importance(KEY, {(2, "y"): 0.3, (0, "y"): 0.1}, args)
    scores = jax.vmap(one, in_axes=(0, *axes))(value, *args)
    close(weight, scores[0] + scores[2])


@pytest.mark.parametrize("length", [0, 1, 3])
def test_repeats_and_lengths(length: int):
    if length:
        _, tr = Map(point, repeats=length).simulate(KEY, (1.0, 0.5))
        assert tr["x"].shape == (length,) and len(np.unique(tr["x"])) == length
    leaf = Map(Normal, in_axes=(0, None))
    key, tr = leaf.simulate(KEY, (jnp.zeros(length), 1.0))
    _, (_, score) = leaf.assess(key, jnp.zeros(length), (jnp.zeros(length), 1.0))
    close(score, length * norm(0.0, 0.0, 1.0))
    _, (_, weight, _, _) = leaf.update(key, tr, {}, (jnp.zeros(length), 2.0))
    close(weight, np.sum(norm(tr.get_retval(), 0.0, 2.0) - norm(tr.get_retval(), 0.0, 1.0)))


def test_repeats_beside_a_mapped_argument():
    _, tr = Map(point, in_axes=(0, None), repeats=4).simulate(KEY, ARGS)
    assert tr["x"].shape == (4,)


def test_axes_may_be_dicts_and_lists_and_the_map_still_hashes():
    one, two = (Map(any_axes, in_axes=({"a": 0, "b": None}, 1, None)) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    assert one != Map(any_axes, in_axes=({"a": 0, "b": 0}, 1, None))


def test_what_is_no_array_is_the_same_in_every_element():
    @gen
    def styled(x, mode):
        return {"y": trace("y", Normal)(x if mode == "plain" else 2 * x, 1.0), "mode": mode, "none": None}

    mapped = Map(styled, in_axes=(0, None))
    key, tr = mapped.simulate(KEY, (jnp.arange(3.0), "double"))
    assert tr.get_retval()["mode"] == "double" and tr.get_retval()["none"] is None
    close(tr.get_score(), norm(tr["y"], 2 * jnp.arange(3.0), 1.0).sum())
    _, (retval, _) = mapped.assess(key, tr.strip(), (jnp.arange(3.0), "plain"))
    assert retval["mode"] == "plain" and retval["y"].shape == (3,)


# Flax ----------------------------------------------------------------------------------------------------------------


class Network(GenModule):
    @nn.compact
    def __call__(self, x):
        return trace("y", Normal)(nn.Dense(2)(x), 1.0)


def test_elements_may_have_parameters_of_their_own():
    mapped = Map(Network(), in_axes=0, variable_axes={"params": 0})
    xs = jnp.arange(6.0).reshape(3, 2)
    variables = mapped.init(KEY, xs)
    kernel = variables["params"]["Dense_0"]["kernel"]
    assert kernel.shape == (3, 2, 2) and len(np.unique(kernel)) == 12
    key, tr = mapped.bind(variables).simulate(KEY, (xs,))
    mean = np.einsum("ni,nij->nj", xs, kernel) + variables["params"]["Dense_0"]["bias"]
    close(tr.get_score(), norm(tr["y"], mean, 1.0).sum())
    _, (_, weight, new, _) = mapped.bind(variables).update(key, tr, {"y": jnp.zeros((3, 2))}, (xs,))
    close(weight, new.get_score() - tr.get_score())


@pytest.mark.slow
def test_an_element_that_runs_alone_has_its_own_parameters():
    mapped = Map(Network(), in_axes=0, variable_axes={"params": 0})
    xs = jnp.arange(6.0).reshape(3, 2)
    variables = mapped.init(KEY, xs)
    model = mapped.bind(variables)
    dense = variables["params"]["Dense_0"]
    means = np.einsum("ni,nij->nj", xs, dense["kernel"]) + dense["bias"]
    key, tr = model.simulate(KEY, (xs,))
    for index in (2, jnp.array(2)):
        given = gjflax.VectorChoiceMap(jnp.asarray([index]), {"y": jnp.ones((1, 2))})
        _, (_, weight, new, _) = model.update(key, tr, given, (xs,))
        close(new.get_score(), norm(new["y"], means, 1.0).sum())
        close(weight, norm(1.0, means[2], 1.0).sum() - norm(tr["y"][2], means[2], 1.0).sum())
        _, (weight, drawn) = model.importance(key, given, (xs,))
        close(drawn.get_score(), norm(drawn["y"], means, 1.0).sum())
        close(weight, norm(1.0, means[2], 1.0).sum())
    _, (_, weight, new) = model.regenerate(key, tr, select((1, "y")), (xs,))
    close(new.get_score(), norm(new["y"], means, 1.0).sum())
    close(weight, 0.0)


def test_elements_may_share_initial_parameters_but_not_storage():
    mapped = Map(Network(), in_axes=0, variable_axes={"params": 0}, split_rngs={"params": False})
    kernel = mapped.init(KEY, jnp.ones((3, 2)))["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(kernel[0], kernel[2])
    assert kernel.shape == (3, 2, 2)


def test_untraced_randomness_is_split_over_the_elements():
    class Noisy(GenModule):
        @nn.compact
        def __call__(self, x):
            noise = jax.random.normal(self.make_rng("noise"))
            trace("y", Normal)(x, 1.0)
            return noise

    _, tr = Map(Noisy(), in_axes=0).apply({}, KEY, (jnp.zeros(4),), method="simulate", rngs={"noise": KEY})
    assert len(np.unique(tr.get_retval())) == 4


def test_batch_statistics_of_every_element():
    class Normalised(GenModule):
        @nn.compact
        def __call__(self, x):
            return trace("y", Normal)(nn.BatchNorm(use_running_average=False, momentum=0.5)(x), 1.0)

    mapped = Map(Normalised(), in_axes=0, variable_axes={"batch_stats": 0})
    xs = jnp.arange(24.0).reshape(3, 4, 2)
    variables = mapped.init(KEY, xs)
    (_, tr), updates = mapped.apply(variables, KEY, (xs,), method="simulate", mutable=["batch_stats"])
    close(updates["batch_stats"]["BatchNorm_0"]["mean"], 0.5 * xs.mean(axis=1))
    assert tr["y"].shape == xs.shape


def test_a_missing_choice_of_the_elements_is_named():
    with pytest.raises(MissingChoiceError, match=r'"y" \(Normal\)'):
        points.assess(KEY, {"x": jnp.zeros(4)}, ARGS)
    assert isinstance(points, gjflax.GenerativeFunction)


def test_a_map_in_the_body_of_a_map_of_another_length():
    """The choices of the inner one have the outer axis first."""

    @gen
    def row(x):
        return trace("y", Map(Normal, in_axes=(0, None)))(jnp.arange(3.0) + x, 1.0)

    _, tr = Map(row, repeats=2).simulate(jax.random.key(0), (0.5,))
    assert tr["y"].shape == (2, 3)
    assert float(tr[1, "y", 2]) == float(tr.get_retval()[1, 2])

"""`Unfold`: constraints and selections of all and of some steps, against densities by hand; and what is refused."""

from __future__ import annotations

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
    OTHER,
    OTHER_ARGS,
    N,
    chain,
    close,
    kernel,
    only,
    states,
    subsets,
    terms,
    total,
    twice,
    types,
)
from scipy import stats

from gjflax import (
    AllSelection,
    ArgumentError,
    ChoiceMapError,
    ChoiceShapeError,
    Diff,
    MissingChoiceError,
    NoneSelection,
    Normal,
    SelectionError,
    Unfold,
    UnvisitedConstraintError,
    VectorChoiceMap,
    choice_map,
    gen,
    select,
    trace,
)

each_subset = pytest.mark.parametrize(
    "names",
    [pytest.param(part, marks=() if part in [("x",), ("coin", "y")] else pytest.mark.slow) for part in subsets()],
)
"""Some choices of all steps; a few by default."""


@pytest.fixture(scope="module")
def tr() -> Any:
    return jax.jit(lambda key: chain.simulate(key, (N, *ARGS))[1])(DRAW)


@pytest.fixture(scope="module")
def other() -> Any:
    return jax.jit(lambda key: chain.simulate(key, (N, *ARGS))[1])(OTHER)


# A length that is known: every choice is there -------------------------------------------------------------------------


def test_simulate_scores_the_chain(tr: Any):
    close(tr.get_score(), total(tr))
    close(tr.get_retval(), states(tr))
    assert tr.get_retval()["steps"].dtype == jnp.int32
    assert len(np.unique(tr["x"])) == N and len(np.unique(tr["y"])) == 2 * N
    assert tr.get_args()[0] == N and isinstance(tr.get_args()[0], int)
    assert tr.get_gen_fn() == chain and not any(getattr(leaf, "weak_type", False) for leaf in jax.tree.leaves(tr))


@pytest.mark.parametrize("args", [ARGS, OTHER_ARGS])
def test_assess_is_the_density_and_says_the_states(tr: Any, args: Any):
    for choices in (tr.strip(), tr.strip().to_dict()):
        _, (retval, score) = chain.assess(KEY, choices, (N, *args))
        close(score, total(tr, args))
        close(retval, states(tr, args))


@each_subset
def test_importance_weighs_what_is_given(tr: Any, names: Any):
    weight, new = jax.jit(lambda given: chain.importance(KEY, given, (N, *ARGS))[1])(only(tr, names))
    close(weight, total(new, of=names))
    close(new.get_score(), total(new))
    close(new.get_retval(), states(new))
    for name in names:
        np.testing.assert_array_equal(new[name], tr[name])


def test_importance_of_some_steps(tr: Any):
    def run(indices):
        given = VectorChoiceMap(indices, {"x": jnp.array([3.0, -2.0]), "y": jnp.ones((2, 2))})
        return chain.importance(KEY, given, (N, *ARGS))[1]

    for weight, new in twice(run, [3, 1]):
        np.testing.assert_array_equal(new["x"][jnp.array([3, 1])], [3.0, -2.0])
        np.testing.assert_array_equal(new["y"][jnp.array([3, 1])], np.ones((2, 2)))
        here = terms(new)
        close(weight, here["x"][[3, 1]].sum() + here["y"][[3, 1]].sum())
        close(new.get_score(), total(new))
        close(new.get_retval(), states(new))


@each_subset
def test_update_rescores_what_is_downstream(tr: Any, other: Any, names: Any):
    @jax.jit
    def run(tr, given, args):
        key, (retdiff, weight, new, discard) = chain.update(KEY, tr, given, (N, *args))
        _, (_, back_weight, back, again) = chain.update(key, new, discard, (N, *ARGS))
        return Diff.primal(retdiff), weight, new, discard, back_weight, back, again

    for args in (ARGS, OTHER_ARGS):
        retval, weight, new, discard, back_weight, back, again = run(tr, only(other, names), args)
        want = tr.strip().overwrite(only(other, names))
        assert new.strip() == want
        close(weight, total(want, args) - total(tr))
        close(new.get_score(), total(want, args))
        close(retval, states(want, args))
        close(new.get_retval(), states(want, args))
        assert discard == (VectorChoiceMap(range(N), only(tr, names)) if names else choice_map({}))
        assert types(new) == types(tr)
        close(back_weight, -weight)
        assert back.strip() == tr.strip()
        close(back.get_score(), tr.get_score())
        assert sorted(again.addresses()) == sorted((name,) for name in names)


def test_update_of_some_steps(tr: Any):
    def run(indices):
        given = VectorChoiceMap(indices, {"x": jnp.array([3.0, -2.0])})
        key, (retdiff, weight, new, discard) = chain.update(KEY, tr, given, (N, *OTHER_ARGS))
        _, (_, back_weight, back, _) = chain.update(key, new, discard, (N, *ARGS))
        return Diff.primal(retdiff), weight, new, discard, back_weight, back

    for retval, weight, new, discard, back_weight, back in twice(run, [2, 0]):
        want = np.asarray(tr["x"]).copy()
        want[[2, 0]] = [3.0, -2.0]
        np.testing.assert_array_equal(new["x"], want)
        np.testing.assert_array_equal(new["y"], tr["y"])
        close(retval, states(new, OTHER_ARGS))
        close(weight, total(new, OTHER_ARGS) - total(tr))
        np.testing.assert_array_equal(discard.index_array(), [2, 0])
        np.testing.assert_array_equal(discard.inner["x"], tr["x"][jnp.array([2, 0])])
        assert discard.addresses() == [("x",)]
        close(back_weight, -weight)
        assert back.strip() == tr.strip()


def test_steps_by_tuple_keys(tr: Any):
    _, (_, weight, new, discard) = chain.update(KEY, tr, {(2, "x"): 3.0, (0, "x"): -2.0}, (N, *ARGS))
    assert (float(new["x"][2]), float(new["x"][0])) == (3.0, -2.0)
    assert discard == VectorChoiceMap([2, 0], {"x": tr["x"][jnp.array([2, 0])]})
    close(weight, total(new) - total(tr))


def test_one_step_reaches_the_next_and_no_further(tr: Any):
    """The state is a function of the step's own choices, so the terms that change are the step's and the next's."""
    _, (_, weight, new, _) = chain.update(KEY, tr, {(1, "x"): 2.0}, (N, *ARGS))
    before, after = terms(tr), terms(new)
    close(weight, sum((after[name] - before[name])[1:3].sum() for name in NAMES))
    changed = np.flatnonzero(np.asarray(new.inner.get_score() != tr.inner.get_score()))
    np.testing.assert_array_equal(changed, [1, 2])


@pytest.mark.parametrize("at", [0, 1, 3])
def test_three_updates_in_a_row(tr: Any, other: Any, at: int):
    update = jax.jit(lambda tr, given: chain.update(KEY, tr, given, (N, *ARGS))[1][1:3])
    current, weights = tr, 0.0
    for value in (other["x"][at], 5.0, tr["x"][at]):
        weight, current = update(current, choice_map({(at, "x"): jnp.float32(value)}))
        weights += np.float64(weight)
        close(current.get_score(), total(current))
    close(weights, 0.0)
    assert current.strip() == tr.strip()


def test_a_trace_is_a_carry_of_a_scan(tr: Any, other: Any):
    @jax.jit
    def run(tr):
        def step(tr, index):
            given = VectorChoiceMap(index[None], {"x": other["x"][index][None]})
            _, (_, weight, tr, _) = chain.update(KEY, tr, given, tr.get_args())
            return tr, weight

        return jax.lax.scan(step, tr, jnp.arange(N))

    new, weights = run(tr)
    np.testing.assert_array_equal(new["x"], other["x"])
    close(weights.sum(), total(new) - total(tr))
    close(new.get_score(), total(new))


@each_subset
def test_regenerate_weighs_what_is_kept(tr: Any, names: Any):
    run = jax.jit(lambda tr, args: chain.regenerate(KEY, tr, select(list(names)), (N, *args))[1])
    kept = [name for name in NAMES if name not in names]
    for args in (ARGS, OTHER_ARGS):
        retdiff, weight, new = run(tr, args)
        for name in kept:
            np.testing.assert_array_equal(new[name], tr[name])
        for name in set(names) - {"coin"}:
            assert not np.any(np.asarray(new[name] == tr[name]))
            assert len(np.unique(new[name])) == new[name].size, "two steps share their randomness"
        close(weight, total(new, args, of=kept) - total(tr, of=kept))
        close(new.get_score(), total(new, args))
        close(Diff.primal(retdiff), states(new, args))
        assert types(new) == types(tr)


def test_regenerate_some_steps(tr: Any):
    selection = select((1, "x"), (3, "x"), (3, "y"))
    retdiff, weight, new = jax.jit(lambda tr: chain.regenerate(KEY, tr, selection, (N, *OTHER_ARGS))[1])(tr)
    np.testing.assert_array_equal(np.asarray(new["x"] != tr["x"]), [False, True, False, True])
    np.testing.assert_array_equal(np.asarray(new["y"] != tr["y"]).all(-1), [False, False, False, True])
    after, before = terms(new, OTHER_ARGS), terms(tr)
    kept = {"x": [0, 2], "coin": [0, 1, 2, 3], "y": [0, 1, 2]}
    close(weight, sum((after[name] - before[name])[at].sum() for name, at in kept.items()))
    close(new.get_score(), total(new, OTHER_ARGS))
    close(new.get_retval(), states(new, OTHER_ARGS))


def test_project_and_filter(tr: Any):
    parts = terms(tr)
    for selection, want in [
        (select("x"), parts["x"].sum()),
        (select("x", "y"), parts["x"].sum() + parts["y"].sum()),
        (select((3, "x"), (1, "y")), parts["x"][3] + parts["y"][1]),
        (select(2), sum(parts[name][2] for name in NAMES)),
        (~select(2), total(tr) - sum(parts[name][2] for name in NAMES)),
        (select((0, "x")) | select("y"), parts["x"][0] + parts["y"].sum()),
        (select(), 0.0),
        (AllSelection(), total(tr)),
    ]:
        close(chain.project(KEY, tr, selection)[1], want)
    choices, weight = select((3, "x"), (1, "x")).filter(tr)
    assert choices == VectorChoiceMap([1, 3], {"x": tr["x"][jnp.array([1, 3])]})
    close(weight, parts["x"][[1, 3]].sum())
    np.testing.assert_array_equal(tr.get_subtree((2, "y")).get_value(), tr["y"][2])
    assert (
        tr[1, "x"] == tr["x"][1]
        and (1, "z") not in tr
        and {address for address, _ in tr.leaves()} == {(name,) for name in NAMES}
    )


def test_nothing_changed_is_known(tr: Any):
    for one in (tr, jax.jit(lambda: chain.simulate(KEY, (3, *ARGS))[1])()):
        diffs = tuple(map(Diff.no_change, one.get_args()))
        _, (retdiff, weight, new, discard) = chain.update(KEY, one, {}, diffs, param_diff=Diff.no_change)
        assert Diff.is_unchanged((retdiff,)) and weight == 0.0 and discard.is_empty() and new is one
        _, (retdiff, weight, new) = chain.regenerate(KEY, one, select(), diffs, param_diff=Diff.no_change)
        assert Diff.is_unchanged((retdiff,)) and weight == 0.0 and new is one
        # What changed by name only is computed again, to the same.
        _, (retdiff, weight, new, discard) = chain.update(KEY, one, {}, (diffs[0], *one.get_args()[1:]))
        assert not Diff.is_unchanged((retdiff,)) and discard.is_empty()
        close(weight, 0.0)
        jax.tree.map(np.testing.assert_array_equal, new, one)


@pytest.mark.slow
def test_vmap_is_a_loop(tr: Any):
    keys = jax.random.split(KEY, 3)

    def move(key):
        key, one = chain.simulate(key, (N, *ARGS))
        key, (_, w, new, discard) = chain.update(key, one, {(2, "x"): 3.0}, (N, *OTHER_ARGS))
        key, (_, v, newer) = chain.regenerate(key, new, select((1, "y"), "coin"), (N, *ARGS))
        return one, w, new, discard, v, newer

    batched, one_by_one = jax.vmap(move)(keys), [jax.jit(move)(key) for key in keys]
    looped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), batched, looped)
    close(batched[0].get_score(), [one[0].get_score() for one in one_by_one])
    close(batched[0].project(select((2, "x"))), [one[0].project(select((2, "x"))) for one in one_by_one])
    np.testing.assert_array_equal(
        batched[0].get_retval()["x"], np.stack([one[0].get_retval()["x"] for one in one_by_one])
    )


# What is refused -------------------------------------------------------------------------------------------------------


def refused(error: type[Exception], call: Any, *words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


@gen
def wrong_state(time, state):
    trace("x", Normal)(0.0, 1.0)
    return {"a": state["a"].astype(jnp.float32), "b": jnp.zeros(2)}


def test_bad_arguments_are_refused(tr: Any):
    for length in (-1, N + 1, np.int32(N + 1), jnp.int32(N + 1)):
        refused(ArgumentError, lambda n=length: chain.simulate(KEY, (n, *ARGS)), str(int(length)), "max_length", str(N))
    for length in (True, 2.0, jnp.float32(2.0), jnp.array([2]), "2", None):
        refused(ArgumentError, lambda n=length: chain.simulate(KEY, (n, *ARGS)), "length", "integer")
    refused(ArgumentError, lambda: chain.simulate(KEY, (3,)), "(length, state, *args)", "got 1")
    for longest in (0, -1, True):
        refused(ArgumentError, lambda n=longest: Unfold(kernel, n), "max_length", "positive integer")
    refused(ArgumentError, lambda: Unfold(lambda t, s: s, 3), "generative function")
    refused(ArgumentError, lambda: Unfold(kernel, 5).update(KEY, tr, {}, (5, *ARGS)), "room for 4", "5")


def test_a_state_that_changes_its_form_is_refused():
    model = Unfold(wrong_state, 3)

    def run(state):
        return lambda: gen(lambda: trace("chain", model)(3, state)).simulate(KEY, ())

    run({"a": 0.0, "b": jnp.ones(2)})()
    refused(ArgumentError, run({"a": 0, "b": jnp.ones(2)}), '"chain"', "int32[]", "float32[]", "float32[2]")
    refused(ArgumentError, run({"a": 0.0, "b": 0.0}), "'b': float32[]", "'b': float32[2]")
    refused(ArgumentError, run({"a": 0.0}), "{'a': float32[]}", "'b': float32[2]")


def test_a_python_number_is_a_state():
    """Its weak type would change in the first step, and so would an integer's."""

    @gen(Unfold, max_length=3)
    def weak(time, state, inside):
        trace("x", Normal)(0.0, 1.0)
        return {"f": state["f"] * 2.0 + inside, "i": state["i"] + 1, "b": ~state["b"]}

    key, tr = weak.simulate(KEY, (3, {"f": 0.5, "i": 1, "b": True}, 1.0))
    close(tr.get_retval(), {"f": [2.0, 5.0, 11.0], "i": [2, 3, 4], "b": [False, True, False]})
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(tr))


def test_constraints_that_do_not_fit_are_refused(tr: Any):
    shapes = [{"x": jnp.zeros(3)}, {"x": 0.0}, {"y": jnp.zeros((2, 4))}]
    for given in shapes:
        refused(ChoiceShapeError, lambda g=given: chain.update(KEY, tr, g, (N, *ARGS)), "leading axis of 4")
        refused(ChoiceShapeError, lambda g=given: chain.importance(KEY, g, (2, *ARGS)), "leading axis of 4")
    for method in (
        lambda given, n: chain.importance(KEY, given, (n, *ARGS)),
        lambda given, n: chain.update(KEY, tr, given, (n, *ARGS)),
    ):
        refused(ChoiceMapError, lambda m=method: m({(N, "x"): 1.0}, N), "step 4", "4 steps")
        refused(UnvisitedConstraintError, lambda m=method: m({"z": jnp.zeros(N)}, N), '"z"')
        refused(UnvisitedConstraintError, lambda m=method: m({(1, "z"): 0.0}, N), '"z"')
    refused(ChoiceMapError, lambda: chain.importance(KEY, {(2, "x"): 1.0}, (2, *ARGS)), "step 2", "2 steps")
    refused(MissingChoiceError, lambda: chain.assess(KEY, {"x": jnp.zeros(N), "coin": jnp.zeros(N)}, (N, *ARGS)), '"y"')
    part = VectorChoiceMap([0, 2], jax.tree.map(lambda leaf: leaf[:2], tr.strip().inner))
    refused(ChoiceMapError, lambda: chain.assess(KEY, part, (N, *ARGS)), "all 4 steps", "gives 2")
    refused(ChoiceMapError, lambda: chain.assess(KEY, part, (2, *ARGS)), "step 2")
    refused(ChoiceMapError, lambda: chain.constrain({(0, "x"): 0.0}, (N, *ARGS)), "by index")
    refused(SelectionError, lambda: chain.regenerate(KEY, tr, select((4, "x")), (N, *ARGS)), "4", "0 to 3")
    refused(SelectionError, lambda: chain.unconstrain(tr, select((1, "x"))), "[1]")
    # What is not used may be ignored.
    _, (weight, _) = chain.importance(KEY, {"z": jnp.zeros(N)}, (N, *ARGS), strict=False)
    assert weight == 0.0


def test_a_known_length_stays(tr: Any):
    """Of a trace in which every choice is there: an array that says the same is welcome, another number is not."""
    for length in (3, np.int32(3), jnp.int32(3)):
        refused(ArgumentError, lambda n=length: chain.update(KEY, tr, {}, (n, *ARGS)), "length 4", "jnp.int32")
    update = jax.jit(lambda n: chain.update(KEY, tr, {(1, "x"): 2.0}, (n, *ARGS))[1][1:3])
    weight, new = update(N)
    close(weight, total(new) - total(tr))
    assert types(new) == types(tr)
    assert np.isnan(update(3)[0])
    regenerate = jax.jit(lambda n: chain.regenerate(KEY, tr, NoneSelection(), (n, *ARGS))[1][1])
    close(regenerate(N), 0.0)
    assert np.isnan(regenerate(3))


def test_a_numpy_array_may_be_indexed_by_time():
    inputs = np.array([0.5, -1.0, 2.0], np.float32)
    driven = Unfold(gen(lambda time, state, inputs: trace("x", Normal)(state + inputs[time], 0.4)), 3)
    args = (3, jnp.float32(0.1), inputs)
    tr = driven.simulate(KEY, args)[1]
    states = np.concatenate([[0.1], np.asarray(tr["x"])[:-1]])
    close(tr.get_score(), np.sum(stats.norm.logpdf(np.asarray(tr["x"]), states + inputs, 0.4)))
    unchanged = (3, Diff.no_change(args[1]), Diff.no_change(inputs))
    for index in (1, jnp.int32(1)):
        moved = VectorChoiceMap([index], {"x": jnp.array([0.3])})
        _, (_, weight, new, _) = jax.jit(lambda tr, moved=moved: driven.update(KEY, tr, moved, unchanged))(tr)
        close(weight, driven.assess(KEY, new.strip(), args)[1][1] - tr.get_score())

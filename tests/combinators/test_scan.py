"""`Scan`: inputs, carries and outputs as of ``jax.lax.scan``, against densities by hand; and what is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.chain import central, close, norm, twice, types

import gjflax
from gjflax import (
    ArgumentError,
    Categorical,
    ChoiceMapError,
    ChoiceShapeError,
    Diff,
    Normal,
    Scan,
    SelectionError,
    Unfold,
    UnvisitedConstraintError,
    VectorChoiceMap,
    choice_map,
    gen,
    select,
    trace,
)

KEY, DRAW, OTHER = jax.random.split(jax.random.key(0), 3)
N = 4


@gen
def kernel(level, x):
    """A level that decays towards its inputs, seen with noise, and a count that the next step feels."""
    mean = 0.8 * level["mean"] + x["pull"]
    y = trace("y", Normal)(mean * x["gain"], 0.5)
    count = trace("count", Categorical)(mean * jnp.arange(4.0))
    return {"mean": mean + 0.1 * count.astype(jnp.float32), "steps": level["steps"] + 1}, (y, mean)


START = {"mean": 0.7, "steps": 0}
XS = {"pull": jnp.array([0.5, -1.0, 0.0, 1.5]), "gain": jnp.array([[1.0, 2.0], [0.5, -1.0], [3.0, 1.0], [-1.0, 0.2]])}
ARGS = (START, XS)
OTHER_ARGS = ({"mean": -0.5, "steps": 7}, {"pull": XS["pull"] + 0.3, "gain": -XS["gain"]})
NAMES = ("y", "count")
forwards, backwards = Scan(kernel), Scan(kernel, reverse=True)
each_way = pytest.mark.parametrize("model", [forwards, pytest.param(backwards, id="reverse")])


def by_hand(choices: Any, args: Any = ARGS, reverse: bool = False) -> tuple[dict[str, np.ndarray], Any]:
    """The log densities of the choices of every step, and the return value."""
    carry, xs = jax.tree.map(np.float64, args)
    mean, steps = carry["mean"], carry["steps"]
    terms, means = {name: np.zeros(N) for name in NAMES}, np.zeros(N)
    for i in reversed(range(N)) if reverse else range(N):
        means[i] = 0.8 * mean + xs["pull"][i]
        y, count = np.float64(choices["y"][i]), np.float64(choices["count"][i])
        terms["y"][i] = norm(y, means[i] * xs["gain"][i], 0.5).sum()
        logits = means[i] * np.arange(4)
        terms["count"][i] = logits[int(count)] - np.logaddexp.reduce(logits)
        mean, steps = means[i] + 0.1 * count, steps + 1
    return terms, ({"mean": mean, "steps": steps}, (np.asarray(choices["y"]), means))


def total(choices: Any, args: Any = ARGS, reverse: bool = False, of: Any = NAMES) -> float:
    return float(sum(by_hand(choices, args, reverse)[0][name].sum() for name in of))


@pytest.fixture(scope="module")
def traces() -> Any:
    """Two traces each way."""
    draw = jax.jit(lambda key, reverse: Scan(kernel, reverse=reverse).simulate(key, ARGS)[1], static_argnums=1)
    return {reverse: (draw(DRAW, reverse), draw(OTHER, reverse)) for reverse in (False, True)}


# The interface ---------------------------------------------------------------------------------------------------------


@each_way
def test_simulate_and_assess(model: Any, traces: Any):
    tr, _ = traces[model.reverse]
    terms, retval = by_hand(tr, reverse=model.reverse)
    close(tr.get_score(), total(tr, reverse=model.reverse))
    close(tr.get_retval(), retval)
    assert tr.get_retval()[0]["steps"].dtype == jnp.int32 and len(np.unique(tr["y"])) == 2 * N
    _, (got, score) = jax.jit(lambda tr: model.assess(KEY, tr.strip(), OTHER_ARGS))(tr)
    close(score, total(tr, OTHER_ARGS, model.reverse))
    close(got, by_hand(tr, OTHER_ARGS, model.reverse)[1])
    assert tr.get_gen_fn() == model and not any(getattr(leaf, "weak_type", False) for leaf in jax.tree.leaves(tr))


@each_way
def test_importance(model: Any, traces: Any):
    _, other = traces[model.reverse]
    run = jax.jit(lambda given: model.importance(KEY, given, ARGS)[1])
    for given, of, at in [
        (choice_map({"count": other["count"]}), ("count",), slice(None)),
        (VectorChoiceMap([2, 0], {"y": other["y"][jnp.array([2, 0])]}), ("y",), [2, 0]),
    ]:
        weight, new = run(given)
        close(weight, sum(by_hand(new, reverse=model.reverse)[0][name][at].sum() for name in of))
        close(new.get_score(), total(new, reverse=model.reverse))
        close(new.get_retval(), by_hand(new, reverse=model.reverse)[1])
        for name in of:
            np.testing.assert_array_equal(np.asarray(new[name])[at], np.asarray(other[name])[at])


@each_way
def test_update_and_its_inverse(model: Any, traces: Any):
    tr, other = traces[model.reverse]

    @jax.jit
    def run(tr, given, args):
        key, (retdiff, weight, new, discard) = model.update(KEY, tr, given, args)
        _, (_, back_weight, back, _) = model.update(key, new, discard, ARGS)
        return Diff.primal(retdiff), weight, new, discard, back_weight, back

    givens = [
        choice_map({}),
        choice_map({"count": other["count"]}),
        VectorChoiceMap([2, 0], {"y": other["y"][jnp.array([2, 0])], "count": jnp.array([3, 1])}),
    ]
    for given in givens:
        for args in (ARGS, OTHER_ARGS):
            retval, weight, new, discard, back_weight, back = run(tr, given, args)
            assert new.strip() == tr.strip().overwrite(given)
            close(weight, total(new, args, model.reverse) - total(tr, reverse=model.reverse))
            close(new.get_score(), total(new, args, model.reverse))
            close(retval, by_hand(new, args, model.reverse)[1])
            close(new.get_retval(), by_hand(new, args, model.reverse)[1])
            assert types(new) == types(tr)
            close(back_weight, -weight)
            assert back.strip() == tr.strip()
            close(back.get_retval(), tr.get_retval())
            assert sorted(discard.addresses()) == sorted(given.addresses())
            if ("y",) in given.addresses():
                assert discard == VectorChoiceMap(
                    [2, 0], jax.tree.map(lambda leaf: leaf[jnp.array([2, 0])], tr.strip().inner)
                )


def test_update_by_traced_indices(traces: Any):
    tr, other = traces[False]

    def run(indices):
        given = VectorChoiceMap(indices, {"count": jnp.array([3, 1])})
        return forwards.update(KEY, tr, given, ARGS)[1][1:]

    for weight, new, discard in twice(run, [3, 1]):
        want = np.asarray(tr["count"]).copy()
        want[[3, 1]] = [3, 1]
        np.testing.assert_array_equal(new["count"], want)
        close(weight, total(new) - total(tr))
        np.testing.assert_array_equal(discard.index_array(), [3, 1])
        np.testing.assert_array_equal(discard.inner["count"], tr["count"][jnp.array([3, 1])])


def test_missing_data_by_flag(traces: Any):
    """Values that are there where a flag is true constrain, and overwrite, these only."""
    tr, other = traces[False]
    flag = jnp.array([True, False, False, True])
    given = choice_map({"y": gjflax.Masked(other["y"], flag)})
    weight, new = jax.jit(lambda given: forwards.importance(KEY, given, ARGS)[1])(given)
    close(weight, by_hand(new)[0]["y"][[0, 3]].sum())
    weight, new, discard = jax.jit(lambda tr, given: forwards.update(KEY, tr, given, ARGS)[1][1:])(tr, given)
    np.testing.assert_array_equal(new["y"], np.where(flag[:, None], other["y"], tr["y"]))
    close(weight, total(new) - total(tr))
    np.testing.assert_array_equal(discard["y"].flag, flag)
    np.testing.assert_array_equal(discard["y"].value, tr["y"])


@each_way
def test_regenerate(model: Any, traces: Any):
    tr, _ = traces[model.reverse]
    for selection, redrawn in [
        (select("y"), {"y": [0, 1, 2, 3], "count": []}),
        (select((1, "count"), (2, "y"), (2, "count")), {"y": [2], "count": [1, 2]}),
    ]:
        retdiff, weight, new = jax.jit(lambda tr, s=selection: model.regenerate(KEY, tr, s, OTHER_ARGS)[1])(tr)
        after, before = (by_hand(*pair, model.reverse)[0] for pair in ((new, OTHER_ARGS), (tr, ARGS)))
        want = 0.0
        for name in NAMES:
            kept = [i for i in range(N) if i not in redrawn[name]]
            np.testing.assert_array_equal(np.asarray(new[name])[kept], np.asarray(tr[name])[kept])
            want += (after[name] - before[name])[kept].sum()
        changed = np.asarray(new["y"] != tr["y"]).all(axis=-1)
        np.testing.assert_array_equal(np.flatnonzero(changed), redrawn["y"])
        close(weight, want)
        close(new.get_score(), total(new, OTHER_ARGS, model.reverse))
        close(Diff.primal(retdiff), by_hand(new, OTHER_ARGS, model.reverse)[1])
        assert types(new) == types(tr)


def test_project_by_name_and_step(traces: Any):
    tr, _ = traces[True]
    terms, _ = by_hand(tr, reverse=True)
    close(tr.project(select("y")), terms["y"].sum())
    close(tr.project(select((1, "y"), (3, "count"))), terms["y"][1] + terms["count"][3])
    assert tr[2, "count"] == tr["count"][2]


def test_three_updates_in_a_row_and_in_a_scan(traces: Any):
    tr, other = traces[False]

    @jax.jit
    def run(tr):
        def step(tr, index):
            given = VectorChoiceMap(index[None], {"count": other["count"][index][None]})
            _, (_, weight, tr, _) = forwards.update(KEY, tr, given, tr.get_args())
            return tr, (weight, tr.get_score())

        return jax.lax.scan(step, tr, jnp.array([1, 3, 0, 2, 1]))

    new, (weights, scores) = run(tr)
    np.testing.assert_array_equal(new["count"], other["count"])
    np.testing.assert_array_equal(new["y"], tr["y"])
    close(weights.sum(), total(new) - total(tr))
    close(scores[-1], total(new))
    close(new.get_retval(), by_hand(new)[1])


@pytest.mark.slow
def test_vmap_is_a_loop():
    def move(key):
        key, one = forwards.simulate(key, ARGS)
        key, (_, w, new, discard) = forwards.update(key, one, {(2, "count"): 3}, OTHER_ARGS)
        key, (_, v, newer) = forwards.regenerate(key, new, select((1, "y"), "count"), ARGS)
        return one, w, new, discard, v, newer

    keys = jax.random.split(KEY, 3)
    batched, alone = jax.vmap(move)(keys), [jax.jit(move)(key) for key in keys]
    looped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), batched, looped)
    close(batched[0].get_score(), [one[0].get_score() for one in alone])
    retvals = jax.tree.map(lambda *leaves: np.stack(leaves), *[one[0].get_retval() for one in alone])
    close(batched[0].get_retval(), retvals)


def test_nothing_changed_is_known(traces: Any):
    tr, _ = traces[False]
    diffs = tuple(map(Diff.no_change, ARGS))
    _, (retdiff, weight, new, discard) = forwards.update(KEY, tr, {}, diffs, param_diff=Diff.no_change)
    assert Diff.is_unchanged((retdiff,)) and weight == 0.0 and new is tr and discard.is_empty()


def test_gradients_against_central_differences(traces: Any):
    tr, _ = traces[True]
    values = {name: np.float64(tr[name]) for name in NAMES}
    want = central(lambda v: total({**values, "y": v}, reverse=True), values["y"])
    _, grads = jax.jit(lambda tr: backwards.choice_grad(KEY, tr, select("y")))(tr)
    close(grads.inner["y"], want, rtol=2e-3, atol=2e-3)
    floats = ({"mean": jnp.float32(0.7), "steps": jnp.float32(0.0)}, XS)
    gradient = jax.jit(jax.grad(lambda args: backwards.assess(KEY, tr.strip(), args)[1][1]))(floats)
    want = central(lambda pull: total(values, (START, {**XS, "pull": pull}), True), np.float64(XS["pull"]))
    close(gradient[1]["pull"], want, rtol=2e-3, atol=2e-3)
    want = central(lambda mean: total(values, ({**START, "mean": mean}, XS), True), np.float64(0.7))
    close(gradient[0]["mean"], want, rtol=2e-3, atol=2e-3)


# Inputs ----------------------------------------------------------------------------------------------------------------


@gen
def walk(state, x):
    state = trace("x", Normal)(state, 1.0)
    return state, None


def test_a_length_in_place_of_inputs():
    model = Scan(walk, length=3)
    key, tr = model.simulate(KEY, (0.5, None))
    x = np.float64(tr["x"])
    close(tr.get_score(), norm(x, [0.5, x[0], x[1]], 1.0).sum())
    assert tr.get_retval() == (tr["x"][-1], None)
    assert Scan(walk, length=3).simulate(KEY, (0.5, jnp.zeros(3)))[1]["x"].shape == (3,)
    # As an unfolding of the same kernel.
    _, unfolded = Unfold(gen(lambda time, state: trace("x", Normal)(state, 1.0)), 3).simulate(KEY, (3, 0.5))
    close(unfolded["x"], tr["x"])


def test_no_steps_are_no_choices():
    key, tr = Scan(walk).simulate(KEY, (0.5, jnp.zeros(0)))
    assert tr.get_score() == 0.0 and tr.inner["x"].shape == (0,) and tr.get_retval()[0] == 0.5
    _, (_, weight, new, _) = Scan(walk).update(key, tr, {}, (1.5, jnp.zeros(0)))
    assert weight == 0.0 and new.get_retval()[0] == 1.5


def test_each_step_has_a_key_of_its_own():
    """So what a step draws does not depend on how many there are."""
    three, five = (Scan(walk, length=n).simulate(KEY, (0.0, None))[1]["x"] for n in (3, 5))
    assert len(np.unique(five)) == 5
    np.testing.assert_allclose(five[:3], three, rtol=1e-6)


def test_a_kernel_without_variables():
    """A distribution of one's own as a kernel: its value is the next state."""

    class Step(gjflax.Distribution):
        def sample(self, key, time, state):
            return state + jax.random.normal(key)

        def logpdf(self, value, time, state):
            return -0.5 * (value - state) ** 2 - 0.5 * jnp.log(2 * jnp.pi)

    model = Unfold(Step(), 3)
    key, tr = model.simulate(KEY, (3, 1.0))
    x = np.float64(tr.get_retval())
    close(tr.get_score(), norm(x, [1.0, x[0], x[1]], 1.0).sum())
    _, (_, weight, new, discard) = model.update(key, tr, {1: 5.0}, (3, 1.0))
    y = np.float64(new.get_retval())
    close(weight, norm(y, [1.0, y[0], y[1]], 1.0).sum() - tr.get_score())
    assert y[1] == 5.0 and discard[1] == tr.get_retval()[1]
    _, (_, weight, new) = model.regenerate(key, tr, select(1), (jnp.int32(3), 1.0))
    np.testing.assert_array_equal(np.asarray(new.get_retval() != tr.get_retval()), [False, True, False])
    z = np.float64(new.get_retval())
    close(weight, norm(z[2], z[1], 1.0) - norm(x[2], x[1], 1.0))
    # No variables are needed, so what is known not to have changed is not run again.
    _, (retdiff, _, same, _) = model.update(key, tr, {}, tuple(map(Diff.no_change, (3, 1.0))))
    assert same is tr and Diff.is_unchanged((retdiff,))


# What is refused -------------------------------------------------------------------------------------------------------


def refused(error: type[Exception], call: Any, *words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_bad_arguments_are_refused(traces: Any):
    tr, _ = traces[False]
    refused(ArgumentError, lambda: Scan(walk).simulate(KEY, (0.5,)), "(carry, xs)", "got 1")
    refused(ArgumentError, lambda: Scan(walk).simulate(KEY, (0.5, None)), "`length`")
    refused(ArgumentError, lambda: Scan(walk).simulate(KEY, (0.5, jnp.float32(1.0))), "leading axis", "shape ()")
    xs = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    refused(ArgumentError, lambda: Scan(walk).simulate(KEY, (0.5, xs)), "xs['a']: 2", "xs['b']: 3")
    refused(ArgumentError, lambda: Scan(walk, length=4).simulate(KEY, (0.5, jnp.zeros(3))), "`length`: 4", "xs: 3")
    refused(ArgumentError, lambda: Scan(walk, length=-1), "`length`", "-1")
    refused(ArgumentError, lambda: Scan(walk, length=True), "`length`")
    refused(ArgumentError, lambda: Scan(lambda c, x: c), "generative function")
    shorter = jax.tree.map(lambda leaf: leaf[:3], XS)
    refused(ArgumentError, lambda: forwards.update(KEY, tr, {}, (START, shorter)), "4 steps", "3")


def test_a_kernel_that_returns_something_else_is_refused():
    alone = gen(lambda carry, x: trace("x", Normal)(carry, 1.0))
    refused(ArgumentError, lambda: Scan(alone, length=2).simulate(KEY, (0.0, None)), "(carry, y)")
    other = gen(lambda carry, x: (jnp.stack([carry, carry]), x))
    refused(
        ArgumentError, lambda: Scan(other, length=2).simulate(KEY, (0.0, None)), "float32[]", "float32[2]", "dtypes"
    )
    words = gen(lambda carry, x: ("b" if carry == "a" else "a", x))
    refused(ArgumentError, lambda: Scan(words, length=2).simulate(KEY, ("a", None)), "'a'", "'b'")


def test_constraints_that_do_not_fit_are_refused(traces: Any):
    tr, _ = traces[False]
    refused(ChoiceShapeError, lambda: forwards.importance(KEY, {"y": jnp.zeros((3, 2))}, ARGS), "leading axis of 4")
    for method in (
        lambda given: forwards.importance(KEY, given, ARGS),
        lambda given: forwards.update(KEY, tr, given, ARGS),
    ):
        refused(ChoiceMapError, lambda m=method: m({(4, "count"): 1}), "element 4", "4 elements")
        refused(UnvisitedConstraintError, lambda m=method: m({(1, "cuont"): 1}), '"cuont"', "count")
    part = VectorChoiceMap([0, 2], jax.tree.map(lambda leaf: leaf[:2], tr.strip().inner))
    refused(ChoiceMapError, lambda: forwards.assess(KEY, part, ARGS), "all 4 steps", "gives 2")
    refused(SelectionError, lambda: forwards.regenerate(KEY, tr, select((4, "y")), ARGS), "4", "0 to 3")

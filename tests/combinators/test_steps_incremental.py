"""`Unfold` and `Scan`: updates of a few steps, against updates of all; what they run, and what they touch."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.chain import ARGS, DRAW, KEY, N, chain, close, terms, total, types

from gjflax import (
    Diff,
    Distribution,
    GenModule,
    Map,
    Normal,
    Scan,
    Unfold,
    VectorChoiceMap,
    choice_map,
    choose,
    gen,
    select,
    trace,
)

scored: list[str] = []


class Counted(Distribution):
    """A Normal that says whenever it is scored."""

    title: str

    def sample(self, key: Any, loc: Any, scale: Any) -> Any:
        return loc + scale * jax.random.normal(key, jnp.broadcast_shapes(jnp.shape(loc), jnp.shape(scale)))

    def logpdf(self, value: Any, loc: Any, scale: Any) -> Any:
        scored.append(self.title)
        return jax.scipy.stats.norm.logpdf(value, loc, scale)


@gen
def walk(time, state, scale):
    x = trace("x", Counted("x"))(0.9 * state, scale)
    trace("y", Counted("y"))(jnp.stack([x, 2.0 * x]), 0.5)
    return x


@gen
def window(time, state, scale):
    """The last two values: a change reaches the step after the next."""
    before, last = state
    x = trace("x", Counted("x"))(0.5 * before + 0.4 * last, scale)
    return last, x


@gen
def everything(time, state, scale):
    """A state that never forgets."""
    x = trace("x", Counted("x"))(0.9 * state, scale)
    return 0.5 * state + x


@gen
def scanned(carry, x):
    y = trace("y", Counted("y"))(0.8 * carry["y"] + x, 0.5)
    return {"y": y, "sign": -carry["sign"]}, 2.0 * y


XS = jnp.linspace(-1.0, 1.0, N)
MODELS = {
    "unfold": (chain, (N, *ARGS), "x"),
    "shorter": (chain, (jnp.int32(3), *ARGS), "x"),
    "window": (Unfold(window, N), (N, (0.3, -0.4), 0.7), "x"),
    "never ends": (Unfold(everything, N), (N, 0.3, 0.7), "x"),
    "scan": (Scan(scanned), ({"y": 0.2, "sign": 1.0}, XS), "y"),
    "reverse": (Scan(scanned, reverse=True), ({"y": 0.2, "sign": 1.0}, XS), "y"),
}


def unchanged(tr: Any) -> Any:
    return tuple(map(Diff.no_change, tr.get_args()))


def in_part(tr: Any) -> Any:
    """Arguments of which the first did not change: that is the length of an unfolding."""
    return (Diff.no_change(tr.get_args()[0]), *tr.get_args()[1:])


def same(got: Any, want: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def beyond(tr: Any) -> Any:
    """A trace without what stands beyond its length."""
    flag = tr.active
    return tr if flag is None else [leaf[np.asarray(flag)] for leaf in jax.tree.leaves(tr.inner)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("shorter", "reverse") else pytest.mark.slow) for name in MODELS]
)
def test_a_few_steps_weigh_what_all_say(name: str):
    model, args, address = MODELS[name]
    tr = jax.jit(lambda: model.simulate(DRAW, args)[1])()

    def run(tr, given, diffs):
        _, (retdiff, weight, new, discard) = model.update(KEY, tr, given, diffs)
        picks = [choose(jnp.array(accepted), new, tr) for accepted in (True, False)]
        return Diff.primal(retdiff), weight, new, discard, picks

    few = jax.jit(lambda tr, indices, values: run(tr, VectorChoiceMap(indices, {address: values}), unchanged(tr)))
    full = jax.jit(lambda tr, indices, values: run(tr, VectorChoiceMap(indices, {address: values}), in_part(tr)))
    for indices in ([0], [1], [N - 1], [2, 1], [1, 2], [N - 1, 0]):
        values = jnp.array([3.0, -2.0])[: len(indices)]
        want = full(tr, jnp.array(indices), values)
        known = jax.jit(lambda tr, v, i=indices: run(tr, VectorChoiceMap(i, {address: v}), unchanged(tr)))(tr, values)
        for retval, weight, new, discard, (taken, left) in (few(tr, jnp.array(indices), values), known):
            close(weight, want[1])
            same(beyond(new), beyond(want[2]))
            same(retval, want[0])
            same(new.get_retval(), want[0])
            same(discard.inner, want[3].inner)
            same(beyond(taken), beyond(new))
            same(left, tr)
            assert types(new) == types(tr) == types(taken)


@pytest.mark.parametrize(
    "name", ["window", *(pytest.param(name, marks=pytest.mark.slow) for name in ("unfold", "shorter", "reverse"))]
)
def test_regenerate_of_a_few_steps(name: str):
    """Against the density of the whole: what is kept weighs its change."""
    model, args, address = MODELS[name]
    tr = jax.jit(lambda: model.simulate(DRAW, args)[1])()

    @jax.jit
    def run(tr):
        _, (retdiff, weight, new) = model.regenerate(KEY, tr, select((1, address), (2, address)), unchanged(tr))
        share = [one.project(select((1, address), (2, address))) for one in (new, tr)]
        _, (retval, score) = model.assess(KEY, new.strip(), args)
        return Diff.primal(retdiff), retval, weight, new, score, share

    got, retval, weight, new, score, (after, before) = run(tr)
    value = new.strip()[address]
    changed = np.flatnonzero(np.asarray(getattr(value, "value", value) != tr.inner[address]))
    np.testing.assert_array_equal(changed, [1, 2])
    close(new.get_score(), score)
    close(weight, (score - after) - (tr.get_score() - before))
    same(got, retval)
    assert types(new) == types(tr)


def test_a_step_and_the_next_are_scored():
    model = Unfold(walk, 50)
    _, tr = jax.jit(lambda: model.simulate(DRAW, (50, 0.5, 0.7)))()
    for given, want in [
        ({(7, "x"): 1.0}, ["x", "y", "x"]),
        ({(49, "x"): 1.0}, ["x", "y"]),
        ({(7, "y"): jnp.ones(2)}, ["y"]),
        ({(7, "x"): 1.0, (9, "x"): 2.0}, ["x", "y", "x"] * 2),
    ]:
        scored.clear()
        model.update(KEY, tr, given, unchanged(tr))
        assert scored == want, given
    scored.clear()
    model.regenerate(KEY, tr, select((7, "x")), unchanged(tr))
    assert scored == ["x", "y", "x"]
    # Of a window of two, the two after it.
    _, (_, tr) = Unfold(window, 50).importance(DRAW, {}, (50, (0.3, -0.4), 0.7))
    scored.clear()
    Unfold(window, 50).update(KEY, tr, {(7, "x"): 1.0}, unchanged(tr))
    assert scored == ["x", "x", "x"]


def test_a_wrong_score_stays_wrong_where_nothing_changed():
    """So that the tests above cannot pass by scoring everything again."""
    model = Unfold(walk, 10)
    _, tr = jax.jit(lambda: model.simulate(DRAW, (10, 0.5, 0.7)))()
    leaf = tr.inner.choices["x"]
    broken = tr.replace(
        inner=tr.inner.replace(choices={**tr.inner.choices, "x": leaf.replace(score=leaf.score + 100.0)})
    )
    _, (_, weight, new, _) = model.update(KEY, broken, {(4, "x"): 1.0}, unchanged(tr))
    wrong = np.asarray(new.inner.choices["x"].score > 50)
    np.testing.assert_array_equal(np.flatnonzero(~wrong), [4, 5])


def sizes(jaxpr: Any, least: int) -> set[str]:
    """The primitives that give arrays of at least so many elements, also in the jaxprs that equations call."""
    found = set()
    for equation in jaxpr.eqns:
        inner = [
            part for value in equation.params.values() for part in (value if isinstance(value, tuple) else (value,))
        ]
        for part in inner:
            below = getattr(part, "jaxpr", part)
            if hasattr(below, "eqns"):
                found |= sizes(below, least)
        if any(getattr(out.aval, "size", 0) >= least for out in equation.outvars):
            found.add(equation.primitive.name)
    return found


@pytest.mark.parametrize("kind", ["unfold", "scan"])
def test_only_the_steps_are_touched(kind: str):
    count = 1000
    if kind == "unfold":
        model, args, address = Unfold(walk, count), (count, 0.5, 0.7), "x"
    else:
        model, args, address = Scan(scanned), ({"y": 0.2, "sign": 1.0}, jnp.zeros(count)), "y"
    tr = jax.eval_shape(lambda: model.simulate(DRAW, args)[1])

    def step(tr, index, value):
        _, (_, weight, new, _) = model.update(KEY, tr, VectorChoiceMap(index, {address: value}), unchanged(tr))
        return weight, choose(weight > 0, new, tr)

    closed = jax.make_jaxpr(step)(tr, jnp.array([4]), jnp.array([0.5]))
    assert sizes(closed.jaxpr, count) <= {"dynamic_update_slice", "pjit", "jit"}


@pytest.mark.parametrize("index", [-1, N, pytest.param(1000, marks=pytest.mark.slow)])
def test_an_index_out_of_range(index: int):
    """What cannot be refused cannot be missed either."""
    _, tr = jax.jit(lambda: chain.simulate(DRAW, (N, *ARGS)))()

    @jax.jit
    def run(indices):
        given = VectorChoiceMap(indices, {"x": jnp.full(indices.shape, 0.7)})
        _, (_, few, new, _) = chain.update(KEY, tr, given, unchanged(tr))
        _, (_, full, other, _) = chain.update(KEY, tr, given, tr.get_args())
        _, (weight, _) = chain.importance(KEY, given, tr.get_args())
        return few, full, weight, new, other

    few, full, weight, new, other = run(jnp.array([index]))
    assert np.isnan(few) and np.isnan(full) and np.isnan(weight)
    np.testing.assert_array_equal(new["x"], tr["x"])
    np.testing.assert_array_equal(other["x"], tr["x"])


def test_a_step_beyond_the_length_is_not_touched():
    _, tr = jax.jit(lambda: chain.simulate(DRAW, (jnp.int32(2), *ARGS)))()
    for index in (2, 3):
        _, (_, weight, new, discard) = chain.update(KEY, tr, {(index, "x"): 9.0}, unchanged(tr))
        assert weight == 0.0 and not discard.inner["x"].flag[0]
        same(new, tr)
    _, (_, weight, new, discard) = chain.update(KEY, tr, {(1, "x"): 9.0}, unchanged(tr))
    close(weight, total(new, length=2) - total(tr, length=2))
    assert discard.inner["x"].flag[0] and discard.inner["x"].value[0] == tr["x"].value[1]
    close(new.get_retval()["x"][2:], new.get_retval()["x"][1:2].repeat(2))


def test_states_pass_on_by_element():
    """What reads the states of a chain runs again where they changed."""

    @gen
    def model():
        states = trace("states", Unfold(walk, 20))(20, 0.5, 0.7)
        return trace("seen", Map(Counted("seen"), in_axes=(0, None)))(states, 0.3)

    _, tr = jax.jit(lambda: model.simulate(DRAW, ()))()
    scored.clear()
    _, (retdiff, weight, new, _) = model.update(KEY, tr, {("states", 7, "x"): 1.0}, ())
    assert scored == ["x", "y", "x", "seen"] and Diff.is_unchanged((retdiff,))
    before, after = (model.assess(KEY, one.strip(), ())[1][1] for one in (tr, new))
    close(weight, after - before)
    changed = new.get_subtree("seen").inner.get_score() != tr.get_subtree("seen").inner.get_score()
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(changed)), [7])
    # Nothing is drawn, so the key comes back, and what does not depend on the chain is not run.
    key, (retdiff, *_) = model.update(KEY, tr, {("states", 7, "y"): jnp.ones(2)}, ())
    assert key is KEY and Diff.is_unchanged((retdiff,))


@pytest.mark.slow
def test_scores_do_not_drift():
    """After 20,000 single-site moves in float32 the score is that of a fresh assessment."""
    model = Unfold(walk, 20)
    _, tr = jax.jit(lambda: model.simulate(DRAW, (20, 0.5, 0.7)))()

    @jax.jit
    def moves(tr):
        def step(tr, key):
            where, how_far, accept = jax.random.split(key, 3)
            index = jax.random.randint(where, (1,), 0, 20)
            value = tr["x"][index] + jax.random.normal(how_far, (1,))
            _, (_, weight, new, _) = model.update(key, tr, VectorChoiceMap(index, {"x": value}), unchanged(tr))
            accepted = jnp.log(jax.random.uniform(accept)) < weight
            return choose(accepted, new, tr), accepted

        return jax.lax.scan(step, tr, jax.random.split(KEY, 20_000))

    end, accepted = moves(tr)
    assert 0.1 < accepted.mean() < 0.9
    _, (_, fresh) = model.assess(KEY, end.strip(), (20, 0.5, 0.7))
    np.testing.assert_allclose(end.get_score(), fresh, rtol=1e-6)


@pytest.mark.slow
def test_single_site_moves_reach_the_posterior():
    """x | y of a linear Gaussian chain: means and covariance within 4 standard errors, over 4,000 chains of 100 moves."""
    count, scale, seen = 3, 0.8, jnp.array([[1.0, 1.5], [-0.5, 0.2], [2.0, 3.0]])
    model, args = Unfold(walk, count), (count, 0.5, scale)

    def run(key):
        key, (_, tr) = model.importance(key, {"y": seen}, args)

        def step(tr, key):
            where, how_far, accept = jax.random.split(key, 3)
            index = jax.random.randint(where, (1,), 0, count)
            value = tr["x"][index] + 0.4 * jax.random.normal(how_far, (1,))
            _, (_, weight, new, _) = model.update(key, tr, VectorChoiceMap(index, {"x": value}), unchanged(tr))
            return choose(jnp.log(jax.random.uniform(accept)) < weight, new, tr), None

        return jax.lax.scan(step, tr, jax.random.split(key, 100))[0]["x"]

    draws = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(KEY, 4_000)), np.float64)
    # x' = 0.9 x + 0.8 e; y = (x, 2x) + 0.5 e'.
    difference = np.eye(count) - 0.9 * np.eye(count, k=-1)
    precision = difference.T @ difference / scale**2 + np.eye(count) * 5.0 / 0.25
    start = np.array([0.9 * 0.5, 0.0, 0.0])
    mean = np.linalg.solve(precision, difference.T @ start / scale**2 + np.float64(seen) @ [1.0, 2.0] / 0.25)
    covariance = np.linalg.inv(precision)
    errors = np.sqrt(np.diag(covariance) / len(draws))
    assert np.all(np.abs(draws.mean(0) - mean) < 4 * errors)
    products = (draws - mean)[:, :, None] * (draws - mean)[:, None, :]
    assert np.all(np.abs(products.mean(0) - covariance) < 4 * products.std(0) / np.sqrt(len(draws)))


@pytest.mark.slow
def test_a_batch_of_traces_is_a_loop():
    keys = jax.random.split(KEY, 3)
    traces = jax.vmap(lambda key: chain.simulate(key, (N, *ARGS))[1])(keys)
    indices = jnp.array([[1], [3], [0]])

    def step(tr, index):
        given = VectorChoiceMap(index, {"x": jnp.array([0.7])})
        _, (_, weight, new, _) = chain.update(KEY, tr, given, unchanged(tr))
        return weight, choose(weight > 0, new, tr)

    weights, chosen = jax.vmap(step)(traces, indices)
    alone = jax.jit(step)
    for row in range(3):
        weight, one = alone(jax.tree.map(lambda leaf, row=row: leaf[row], traces), indices[row])
        close(weights[row], weight)
        same(jax.tree.map(lambda leaf, row=row: leaf[row], chosen), one)


# Where all steps run -----------------------------------------------------------------------------------------------------


class Cell(GenModule):
    @nn.compact
    def __call__(self, time, state):
        y = trace("y", Normal)(nn.Dense(2)(state), 0.5)
        nn.BatchNorm(use_running_average=False, momentum=0.5)(y[None])
        return y


def test_parameters_that_may_have_changed_and_those_of_each_step():
    for options in ({}, {"variable_axes": {"params": 0}}):
        model = Unfold(Cell(), N, **options)
        variables = model.init(KEY, N, jnp.ones(2))
        bound = model.bind(variables, mutable=["batch_stats"])
        _, tr = bound.simulate(DRAW, (N, jnp.ones(2)))
        moved = {**variables, "params": jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])}
        given = choice_map({(1, "y"): jnp.array([0.3, -0.4])})
        for one, param_diff in ((variables, Diff.no_change), (moved, Diff.unknown_change)):

            def run(method, *arguments, one=one, model=model, **said):
                return model.apply(one, KEY, *arguments, method=method, mutable=["batch_stats"], **said)

            result, wrote = run("update", tr, given, unchanged(tr), param_diff=param_diff)
            weight, new = result[1][1:3]
            score = run("assess", new.strip(), (N, jnp.ones(2)))[0][1][1]
            close(weight, score - tr.get_score())
            # Every step writes what it writes.
            want = run("assess", new.strip(), (N, jnp.ones(2)))[1]
            close(wrote["batch_stats"], want["batch_stats"])


def test_parameters_that_did_not_change():
    """Without anything to write, the step and the next are run, with the parameters that all share."""

    class Net(GenModule):
        @nn.compact
        def __call__(self, time, state):
            return trace("y", Counted("y"))(nn.Dense(2)(state), 0.5)

    model = Unfold(Net(), N)
    bound = model.bind(model.init(KEY, N, jnp.ones(2)))
    _, tr = bound.simulate(DRAW, (N, jnp.ones(2)))
    scored.clear()
    given = {(1, "y"): jnp.array([0.3, -0.4])}
    _, (_, weight, new, _) = bound.update(KEY, tr, given, unchanged(tr), param_diff=Diff.no_change)
    assert scored == ["y", "y"]
    close(weight, bound.assess(KEY, new.strip(), (N, jnp.ones(2)))[1][1] - tr.get_score())
    close(new.get_score(), bound.assess(KEY, new.strip(), (N, jnp.ones(2)))[1][1])


def test_terms_by_hand_after_a_single_step():
    """The weight is that of the step's terms and of the next one's mean, in float64."""
    _, tr = jax.jit(lambda: chain.simulate(DRAW, (N, *ARGS)))()
    for index in range(N):
        _, (_, weight, new, _) = chain.update(KEY, tr, {(index, "x"): 2.0}, unchanged(tr))
        close(weight, total(new) - total(tr))
        before, after = terms(tr), terms(new)
        changed = {i for name in before for i in np.flatnonzero(before[name] != after[name])}
        assert changed == {index, index + 1} & set(range(N))

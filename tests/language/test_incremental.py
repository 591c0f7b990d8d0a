"""Incremental updates: what runs again, what is touched, and that every weight is the one of a full re-scoring."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gjflax
from gjflax import (
    ChoiceMapError,
    Diff,
    Distribution,
    GenModule,
    Map,
    Normal,
    VectorChoiceMap,
    choose,
    gen,
    select,
    trace,
)

KEY = jax.random.key(3)
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
def network(offset):
    a = trace("a", Counted("a"))(0.5, 2.0)
    b = trace("b", Counted("b"))(a, 0.7)
    c = trace("c", Counted("c"))(jnp.sin(b) + offset, 1.5)
    d = trace("d", Counted("d"))(offset, 0.4)
    return {"sum": c + d, "b": b, "offset": offset}


def by_assess(model: Any, new: Any, old: Any) -> Any:
    """The difference of two full scores."""
    scores = [model.assess(KEY, tr.strip(), tr.get_args())[1][1] for tr in (new, old)]
    return scores[0] - scores[1]


def run(model: Any, tr: Any, choices: Any, argdiffs: Any, **options: Any) -> Any:
    scored.clear()
    _, (retdiff, weight, new, _) = model.update(KEY, tr, choices, argdiffs, **options)
    visited = list(scored)
    np.testing.assert_allclose(weight, by_assess(model, new, tr), rtol=1e-4, atol=1e-5)
    return visited, retdiff, new


OFFSET = jnp.float32(0.3)


@pytest.mark.parametrize(
    "choices, argdiffs, visited",
    [
        ({"a": 1.0}, (Diff.no_change(OFFSET),), ["a", "b"]),
        ({"b": 1.0}, (Diff.no_change(OFFSET),), ["b", "c"]),
        ({"c": 1.0}, (Diff.no_change(OFFSET),), ["c"]),
        ({"a": 0.1, "d": 2.0}, (Diff.no_change(OFFSET),), ["a", "b", "d"]),
        ({}, (Diff.unknown_change(jnp.float32(-1.0)),), ["c", "d"]),
        ({}, (Diff.no_change(OFFSET),), []),
    ],
)
def test_a_change_costs_its_markov_blanket(choices: Any, argdiffs: Any, visited: list[str]):
    _, tr = network.simulate(KEY, (OFFSET,))
    assert run(network, tr, choices, argdiffs)[0] == visited


def test_what_is_returned_is_known_leaf_by_leaf():
    _, tr = network.simulate(KEY, (OFFSET,))
    unchanged = (Diff.no_change(OFFSET),)
    _, retdiff, _ = run(network, tr, {"c": 1.0}, unchanged)
    assert retdiff["b"].change is Diff.no_change
    assert retdiff["offset"].change is Diff.no_change
    assert retdiff["sum"].change is Diff.unknown_change
    _, retdiff, new = run(network, tr, {"a": 1.0}, unchanged)
    assert retdiff.change is Diff.no_change and Diff.primal(retdiff)["sum"] == new.get_retval()["sum"]
    _, retdiff, new = run(network, tr, {"b": 1.0}, unchanged)
    np.testing.assert_allclose(Diff.primal(retdiff)["b"], 1.0)


def test_untouched_parts_are_the_old_ones():
    _, tr = network.simulate(KEY, (OFFSET,))
    _, _, new = run(network, tr, {"c": 1.0}, (Diff.no_change(OFFSET),))
    for address in ("a", "b", "d"):
        assert new.get_subtree(address) is tr.get_subtree(address)


def test_a_wrong_score_in_the_old_trace_stays_wrong_where_nothing_changed():
    """So that the tests above cannot pass by scoring everything again."""
    _, tr = network.simulate(KEY, (OFFSET,))
    part = tr.get_subtree("d")
    broken = tr.replace(choices={**tr.choices, "d": part.replace(score=part.score + 100.0)})
    _, (_, weight, new, _) = network.update(KEY, broken, {"c": 1.0}, (Diff.no_change(OFFSET),))
    assert weight < 50 and new.get_subtree("d").get_score() == part.score + 100.0


def test_regenerate_runs_the_blanket_too():
    _, tr = network.simulate(KEY, (OFFSET,))
    scored.clear()
    _, (_, weight, new) = network.regenerate(KEY, tr, select("b"), (Diff.no_change(OFFSET),))
    assert scored == ["b", "c"]
    kept = new.get_subtree("c").get_score() - tr.get_subtree("c").get_score()
    np.testing.assert_allclose(weight, kept, rtol=1e-5)


class Learned(GenModule):
    @nn.compact
    def __call__(self, x):
        z = trace("z", Counted("z"))(jnp.zeros(2), 1.0)
        y = trace("y", Counted("y"))(nn.Dense(3)(jnp.concatenate([z, x])), 0.5)
        return trace("w", Counted("w"))(jnp.sum(x), 2.0) + y


X = jnp.array([0.2, -1.0])


def test_parameters_count_as_changed_unless_it_is_said_that_they_are_not():
    variables = Learned().init(KEY, X)
    model = Learned().bind(variables)
    _, tr = model.simulate(KEY, (X,))
    unchanged = (Diff.no_change(X),)
    assert run(model, tr, {}, unchanged)[0] == ["y"], "only what depends on parameters"
    assert run(model, tr, {}, unchanged, param_diff=Diff.no_change)[0] == []
    assert run(model, tr, {"z": jnp.ones(2)}, unchanged, param_diff=Diff.no_change)[0] == ["z", "y"]
    other = Learned().bind(jax.tree.map(lambda leaf: leaf + 0.5, variables))
    scored.clear()
    _, (_, weight, new, _) = other.update(KEY, tr, {}, unchanged)
    assert scored == ["y"]
    full = [m.assess(KEY, tr.strip(), (X,))[1][1] for m in (other, model)]
    np.testing.assert_allclose(weight, full[0] - full[1], rtol=1e-4)


def test_another_module_is_another_body():
    class Scaled(GenModule):
        scale: float

        @nn.compact
        def __call__(self):
            return trace("x", Normal)(0.0, self.scale)

    _, tr = Scaled(1.0).simulate(KEY, ())
    _, (_, weight, new, _) = Scaled(3.0).update(KEY, tr, {}, ())
    _, (_, score) = Scaled(3.0).assess(KEY, tr.strip(), ())
    np.testing.assert_allclose(weight, score - tr.get_score(), rtol=1e-5)
    np.testing.assert_allclose(new.get_score(), score, rtol=1e-5)


def test_integers_of_python_may_change_the_structure():
    @gen
    def model(count):
        return sum(trace(f"x{i}", Normal)(0.0, 1.0 + i) for i in range(count))

    _, tr = model.simulate(KEY, (2,))
    _, (_, weight, new, _) = model.update(KEY, tr, {"x2": 1.5}, (3,))
    np.testing.assert_allclose(weight, new.get_score() - tr.get_score(), rtol=1e-5)
    _, (_, back, again, discard) = model.update(KEY, new, {}, (2,))
    np.testing.assert_allclose(back, -weight, rtol=1e-5)
    assert discard.to_dict() == {"x2": 1.5} and again.strip() == tr.strip()


def test_a_number_before_an_array_is_not_taken_for_it():
    """Integers are structure when a body is staged out, and leaves of its arguments all the same."""

    @gen
    def body(count, flag, loc):
        return trace("y", Normal)(loc, 1.0 + float(count) if flag else 1.0)

    _, tr = body.simulate(KEY, (2, True, jnp.float32(1.0)))
    for argdiffs in (
        (Diff.no_change(2), Diff.no_change(True), Diff.unknown_change(jnp.float32(5.0))),
        (Diff.no_change(2), Diff.unknown_change(False), Diff.no_change(jnp.float32(1.0))),
    ):
        _, flag, loc = Diff.primal(argdiffs)
        _, (_, weight, _, _) = body.update(KEY, tr, {}, argdiffs)
        want = [jax.scipy.stats.norm.logpdf(tr["y"], *args) for args in ((loc, 3.0 if flag else 1.0), (1.0, 3.0))]
        np.testing.assert_allclose(weight, want[0] - want[1], rtol=1e-5)


def test_a_shape_that_a_body_computes_with_may_change():
    @gen
    def body(xs):
        return trace("y", Normal)(0.0, jnp.float32(xs.shape[0]))

    _, tr = body.simulate(KEY, (jnp.zeros(2),))
    _, (_, weight, _, _) = body.update(KEY, tr, {}, (jnp.zeros(5),))
    want = [jax.scipy.stats.norm.logpdf(tr["y"], 0.0, scale) for scale in (5.0, 2.0)]
    np.testing.assert_allclose(weight, want[0] - want[1], rtol=1e-5)


def test_a_callee_that_the_body_makes_may_hold_what_changed():
    """Its arguments are unchanged, and it is another one."""

    @gen
    def body():
        scale = trace("scale", Normal)(2.0, 0.1)
        of_gen = trace("of_gen", gen(lambda: trace("z", Normal)(0.5, scale)))()
        density = lambda value, loc: jax.scipy.stats.norm.logpdf(value, loc, scale)
        of_functions = gjflax.distribution(lambda key, loc: loc + jax.random.normal(key), density)
        return of_gen + trace("of_functions", of_functions)(0.5)

    _, tr = body.simulate(KEY, ())
    for update in (body.update, jax.jit(body.update)):
        _, (_, weight, new, _) = update(KEY, tr, {"scale": 3.0}, ())
        np.testing.assert_allclose(weight, by_assess(body, new, tr), rtol=1e-5)
    _, (_, weight, new) = body.regenerate(KEY, tr, select("scale"), ())
    of_scale = [jax.scipy.stats.norm.logpdf(one["scale"], 2.0, 0.1) for one in (new, tr)]
    np.testing.assert_allclose(weight, by_assess(body, new, tr) - (of_scale[0] - of_scale[1]), rtol=1e-4)


def _of_functions(scale: Any) -> Any:
    """A distribution without arguments, which holds a value of the body."""
    density = lambda value: jax.scipy.stats.norm.logpdf(value, 0.5, scale)
    return gjflax.distribution(lambda key: scale * jax.random.normal(key), density, reparameterized=True)


class _Held(GenModule):
    """A module without parameters, which holds a value of the body."""

    scale: Any

    @nn.compact
    def __call__(self):
        return trace("z", Normal)(0.5, self.scale)


_HOLDERS: dict[str, Any] = {
    "distribution": lambda scale: (_of_functions(scale), ()),
    "map": lambda scale: (Map(_of_functions(scale), repeats=3), ()),
    "map of a map": lambda scale: (Map(Map(_of_functions(scale), repeats=2), repeats=3), ()),
    "repeat": lambda scale: (gjflax.Repeat(_Held(scale), 3), ()),
    "unfold": lambda scale: (
        gjflax.Unfold(gen(lambda time, state: trace("z", Normal)(state, scale)), max_length=3),
        (jnp.int32(3), jnp.float32(0.5)),
    ),
    "scan": lambda scale: (
        gjflax.Scan(gen(lambda carry, x: (trace("z", Normal)(carry + x, scale), x))),
        (jnp.float32(0.5), jnp.arange(3.0)),
    ),
    "switch": lambda scale: (gjflax.Switch((_of_functions(scale), _of_functions(2 * scale))), (jnp.int32(1),)),
    "cond": lambda scale: (gjflax.Cond(_of_functions(scale), _of_functions(2 * scale)), (jnp.array(True),)),
    "or else": lambda scale: (
        gjflax.OrElse(_of_functions(scale), _of_functions(2 * scale)),
        (jnp.array(True), (), ()),
    ),
    "mask": lambda scale: (gjflax.Mask(_of_functions(scale)), (jnp.array(True),)),
    "mix": lambda scale: (
        gjflax.Mix((_of_functions(scale), _of_functions(2 * scale))),
        (jnp.array([0.1, 0.2]), (), ()),
    ),
    "product": lambda scale: (gjflax.Product({"a": _of_functions(scale), "b": _Held(scale)}), ((), ())),
    "dimap": lambda scale: (gjflax.Dimap.map_retval(_of_functions(scale), lambda retval: retval * scale), ()),
    "dimap, arguments": lambda scale: (gjflax.Dimap(Normal, pre=lambda loc: (loc, scale)), (jnp.float32(0.2),)),
    "address map": lambda scale: (gjflax.AddressMap(_Held(scale), {"w": "z"}), ()),
    "inline": lambda scale: (
        gjflax.Inline(gen(lambda: trace(("part", "z"), Normal)(0.5, scale)), "part"),
        (),
    ),
    "choice at": lambda scale: (gjflax.ChoiceAt(_of_functions(scale)), (jnp.int32(3),)),
    "call at": lambda scale: (gjflax.CallAt(_Held(scale)), (jnp.int32(3),)),
    "marginal": lambda scale: (
        gjflax.Marginal(
            gen(
                lambda: trace("z", Normal)(jnp.where(trace("coin", gjflax.Bernoulli)(probs=0.4) == 1, 3.0, -1.0), scale)
            ),
            "z",
            gjflax.Enumerate(),
        ),
        (),
    ),
}


@pytest.mark.parametrize(
    "name",
    [name if number % 3 == 0 else pytest.param(name, marks=pytest.mark.slow) for number, name in enumerate(_HOLDERS)],
)
def test_a_combinator_that_the_body_makes_may_hold_what_changed(name: str):
    """No argument of it changed: those that it has are constants of the body."""

    @gen
    def body():
        scale = trace("scale", Normal)(2.0, 0.1)
        holder, args = _HOLDERS[name](scale)
        trace("held", holder)(*args)

    _, tr = body.simulate(KEY, ())
    _, (_, weight, new, _) = body.update(KEY, tr, {"scale": 3.0}, ())
    want = by_assess(body, new, tr)
    np.testing.assert_allclose(weight, want, rtol=1e-5)
    held = new.get_score() - jax.scipy.stats.norm.logpdf(3.0, 2.0, 0.1)
    assert abs(held - (tr.get_score() - jax.scipy.stats.norm.logpdf(tr["scale"], 2.0, 0.1))) > 1e-3
    _, (_, weight, new) = body.regenerate(KEY, tr, select("scale"), ())
    of_scale = [jax.scipy.stats.norm.logpdf(one["scale"], 2.0, 0.1) for one in (new, tr)]
    np.testing.assert_allclose(weight, by_assess(body, new, tr) - (of_scale[0] - of_scale[1]), rtol=1e-4, atol=1e-6)


def test_what_was_defined_once_more_is_the_same():
    """As where a cell of a notebook runs again: a function is its code and what it closes over."""

    def make(scale: float) -> Any:
        density = lambda value: jax.scipy.stats.norm.logpdf(value, 0.5, scale)
        return gjflax.distribution(lambda key: jax.random.normal(key), density)

    _, tr = make(0.4).simulate(KEY, ())
    _, (_, weight, new, _) = make(0.4).update(KEY, tr, {}, ())
    assert weight == 0.0 and new is tr
    _, (_, weight, new, _) = make(0.9).update(KEY, tr, {}, ())
    want = [jax.scipy.stats.norm.logpdf(tr.get_retval(), 0.5, scale) for scale in (0.9, 0.4)]
    np.testing.assert_allclose(weight, want[0] - want[1], rtol=1e-5)


def test_untraced_randomness_counts_as_changed():
    class Dropped(GenModule):
        @nn.compact
        def __call__(self, x):
            return trace("y", Counted("y"))(nn.Dropout(0.5, deterministic=False)(x), 1.0)

    model = Dropped().bind({}, rngs={"dropout": jax.random.key(1)})
    _, tr = model.simulate(KEY, (jnp.ones(20),))
    model = Dropped().bind({}, rngs={"dropout": jax.random.key(2)})
    scored.clear()
    _, (_, weight, _, _) = model.update(KEY, tr, {}, (Diff.no_change(jnp.ones(20)),))
    assert scored == ["y"] and weight != 0.0


# Elements ------------------------------------------------------------------------------------------------------------

COUNT = 7
SCALES = jnp.linspace(0.5, 2.0, COUNT)


@gen
def _local(mu, scale):
    z = trace("z", Normal)(mu, scale)
    return trace("pair", Normal)(jnp.stack([z, 2 * z]), 0.3)


@gen
def grouped():
    mu = trace("mu", Normal)(0.0, 3.0)
    pairs = trace("groups", Map(_local, in_axes=(None, 0)))(mu, SCALES)
    return pairs


@gen
def linked():
    z = trace("z", Map(Normal, in_axes=(None, 0)))(1.0, SCALES)
    x = trace("x", Map(Normal, in_axes=(0, None)))(z, 0.3)
    return x, z


def at(indices: Any, **values: Any) -> VectorChoiceMap:
    return VectorChoiceMap(indices, values)


MOVES = {
    "one": (grouped, lambda i: {"groups": at(i[:1], z=jnp.array([3.0]))}),
    "some": (grouped, lambda i: {"groups": at(i, z=jnp.array([3.0, -1.0, 0.5]))}),
    "part of an element": (grouped, lambda i: {"groups": at(i[:1], pair=jnp.array([[3.0, 1.0]]))}),
    "elements and what they depend on": (
        grouped,
        lambda i: {"mu": jnp.float32(0.4), "groups": at(i[:1], z=jnp.array([3.0]))},
    ),
    "passed on by element": (linked, lambda i: {"z": VectorChoiceMap(i[:1], jnp.array([3.0]))}),
    "passed on and given": (
        linked,
        lambda i: {"z": VectorChoiceMap(i[:1], jnp.array([3.0])), "x": VectorChoiceMap(i, jnp.array([1.0, 2.0, 0.1]))},
    ),
    "passed on and given at the same": (
        linked,
        lambda i: {
            "z": VectorChoiceMap(i, jnp.array([3.0, 0.2, 0.3])),
            "x": VectorChoiceMap(i, jnp.array([1.0, 2.0, 0.1])),
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("known", [True, False], ids=["static", "traced"])
def test_elements_weigh_what_a_full_scoring_says(move: str, known: bool):
    model, choices_at = MOVES[move]
    _, tr = model.simulate(KEY, ())
    indices = np.array([4, 0, 6])

    def change(tr: Any, indices: Any) -> Any:
        _, (retdiff, weight, new, discard) = model.update(KEY, tr, choices_at(indices), ())
        _, (_, back, old, _) = model.update(KEY, new, discard, ())
        picks = [choose(accepted, new, tr) for accepted in (jnp.array(True), jnp.array(False))]
        return Diff.primal(retdiff), weight, new, discard, back, old, picks

    outcome = change(tr, indices) if known else jax.jit(change)(tr, jnp.asarray(indices))
    retval, weight, new, _, back, old, (taken, left) = outcome
    assert new.strip() == tr.strip().overwrite(choices_at(indices))
    np.testing.assert_allclose(weight, by_assess(model, new, tr), rtol=1e-4)
    np.testing.assert_allclose(new.get_score(), model.assess(KEY, new.strip(), ())[1][1], rtol=1e-4)
    np.testing.assert_allclose(back, -weight, rtol=1e-4)
    assert old.strip() == tr.strip()
    for got, want in ((taken, new), (left, tr), (old, tr)):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    expected, _ = model.assess(KEY, new.strip(), ())[1]
    for got in (retval, new.get_retval()):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


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


@pytest.mark.parametrize(
    "move", ["one", "passed on by element", "passed on and given at the same", "part of an element"]
)
def test_only_the_elements_are_touched(move: str):
    model, choices_at = MOVES[move]
    _, tr = model.simulate(KEY, ())

    def step(tr: Any, indices: Any) -> Any:
        _, (_, weight, new, _) = model.update(KEY, tr, choices_at(indices), ())
        return weight, choose(weight > 0, new, tr)

    closed = jax.make_jaxpr(step)(tr, jnp.array([4, 0, 6]))
    allowed = {"dynamic_update_slice", "scatter", "pjit", "jit"}
    assert sizes(closed.jaxpr, COUNT) <= allowed, "nothing else is as long as the model"


def test_a_batch_of_traces_is_a_loop():
    keys = jax.random.split(KEY, 3)
    traces = jax.vmap(lambda key: grouped.simulate(key, ())[1])(keys)
    indices = jnp.array([[1], [6], [3]])

    def step(tr: Any, index: Any) -> Any:
        _, (_, weight, new, _) = grouped.update(KEY, tr, {"groups": at(index, z=jnp.array([0.7]))}, ())
        return weight, choose(weight > 0, new, tr)

    weights, chosen = jax.vmap(step)(traces, indices)
    for row in range(3):
        weight, alone = step(jax.tree.map(lambda leaf, row=row: leaf[row], traces), indices[row])
        np.testing.assert_allclose(weights[row], weight, rtol=1e-4)
        for a, b in zip(jax.tree.leaves(chosen), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[row], b, rtol=1e-5)


@pytest.mark.parametrize("index", [-1, COUNT, 1000])
def test_an_index_out_of_range(index: int):
    _, tr = grouped.simulate(KEY, ())
    with pytest.raises(ChoiceMapError, match="element|count from 0"):
        grouped.update(KEY, tr, {"groups": at([index], z=jnp.array([0.7]))}, ())

    @jax.jit
    def traced(tr: Any, indices: Any) -> Any:
        choices = {"groups": VectorChoiceMap(indices, {"z": jnp.full(indices.shape, 0.7)})}
        _, (_, weight, new, _) = grouped.update(KEY, tr, choices, ())
        _, (importance, _) = grouped.importance(KEY, choices, ())
        return weight, new, importance

    for indices in (jnp.array([index]), jnp.array([index, 2])):
        weight, new, importance = traced(tr, indices)
        assert np.isnan(weight) and np.isnan(importance), "what cannot be refused cannot be missed either"
        untouched = np.asarray(tr["groups", "z"]).copy()
        if len(indices) > 1:
            untouched[2] = 0.7
        np.testing.assert_allclose(new["groups", "z"], untouched)


def test_scores_do_not_drift():
    """After 100,000 single-site updates in float32 the score is that of a fresh assessment, as after a full scoring."""
    _, tr = grouped.simulate(KEY, ())

    @jax.jit
    def walk(tr: Any) -> Any:
        def step(tr: Any, key: Any) -> Any:
            where, how_far, accept = jax.random.split(key, 3)
            index = jax.random.randint(where, (1,), 0, COUNT)
            value = tr["groups", "z"][index] + jax.random.normal(how_far, (1,))
            _, (_, weight, new, _) = grouped.update(key, tr, {"groups": at(index, z=value)}, ())
            return choose(jnp.log(jax.random.uniform(accept)) < weight, new, tr), None

        return jax.lax.scan(step, tr, jax.random.split(KEY, 100_000))[0]

    end = walk(tr)
    assert end.strip() != tr.strip()
    _, (_, fresh) = grouped.assess(KEY, end.strip(), ())
    np.testing.assert_allclose(end.get_score(), fresh, rtol=2e-6)


def test_single_site_moves_reach_the_posterior():
    """z_i | y_i by Metropolis moves of one element: mean and variance of the conjugate posterior, 4 standard errors.

    2,000 chains of 60 moves; the draws of different chains are independent.
    """
    observed = jnp.array([1.0, -0.5, 2.0])

    @gen
    def model():
        z = trace("z", Map(Normal, repeats=3))(0.5, 2.0)
        return trace("y", Map(Normal, in_axes=(0, None)))(z, 0.8)

    def chain(key: Any) -> Any:
        key, (_, tr) = model.importance(key, {"y": observed}, ())

        def step(tr: Any, key: Any) -> Any:
            where, how_far, accept = jax.random.split(key, 3)
            index = jax.random.randint(where, (1,), 0, 3)
            value = tr["z"][index] + 1.2 * jax.random.normal(how_far, (1,))
            _, (_, weight, new, _) = model.update(key, tr, {"z": VectorChoiceMap(index, value)}, ())
            return choose(jnp.log(jax.random.uniform(accept)) < weight, new, tr), None

        return jax.lax.scan(step, tr, jax.random.split(key, 60))[0]["z"]

    draws = np.asarray(jax.jit(jax.vmap(chain))(jax.random.split(KEY, 2_000)), np.float64)
    variance = 1 / (1 / 2.0**2 + 1 / 0.8**2)
    mean = variance * (0.5 / 2.0**2 + np.asarray(observed) / 0.8**2)
    assert np.all(np.abs(draws.mean(0) - mean) < 4 * np.sqrt(variance / 2_000))
    assert np.all(np.abs(draws.var(0) - variance) < 4 * variance * np.sqrt(2 / 2_000))


def test_choose_refuses_what_does_not_belong_together():
    _, one = grouped.simulate(KEY, ())
    _, other = linked.simulate(KEY, ())
    with pytest.raises(gjflax.ArgumentError, match="two traces of one structure"):
        choose(jnp.array(True), one, other)
    with pytest.raises(gjflax.ArgumentError, match="boolean scalar"):
        choose(1.0, one, one)

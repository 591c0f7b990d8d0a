"""`inline`: a callee's choices at its caller's own level, against densities written by hand in NumPy."""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import gjflax
from gjflax import (
    AddressMap,
    CalleeError,
    Diff,
    Distribution,
    DuplicateAddressError,
    Exponential,
    GenModule,
    Map,
    MissingChoiceError,
    Normal,
    Switch,
    TraceContextError,
    TraceTransformError,
    UnboundParametersError,
    UnvisitedConstraintError,
    choice_map,
    gen,
    inline,
    select,
    trace,
)

KEY = jax.random.key(0)
OTHER = jax.random.key(5)
X = jnp.float32(0.4)
scored: list[str] = []


def norm(value: Any, loc: Any, scale: Any) -> np.ndarray:
    return stats.norm.logpdf(np.float64(value), np.float64(loc), np.float64(scale))


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-4, atol=1e-4)


class Counted(Distribution):
    """A Normal that says whenever it is scored."""

    title: str

    def sample(self, key: Any, loc: Any, scale: Any) -> Any:
        return loc + scale * jax.random.normal(key, jnp.broadcast_shapes(jnp.shape(loc), jnp.shape(scale)))

    def logpdf(self, value: Any, loc: Any, scale: Any) -> Any:
        scored.append(self.title)
        return jax.scipy.stats.norm.logpdf(value, loc, scale)


@gen
def deepest(x):
    return trace(("d", "e"), Counted("e"))(x, jnp.array([0.5, 1.5]))


@gen
def middle(x, scale=2.0):
    m = trace("m", Counted("m"))(x, scale)
    return jnp.sum(inline(deepest)(m))


@gen
def model(x):
    first = trace("first", Counted("first"))(0.0, 1.0)
    below = inline(middle)(first, scale=0.8)
    points = trace("points", Map(Normal, in_axes=(0, None)))(jnp.arange(3.0) * below, 0.7)
    return trace("last", Counted("last"))(jnp.sum(points) + x, 0.3)


FIRST, M, E, POINTS, LAST = ("first",), ("m",), ("d", "e"), ("points",), ("last",)
ALL = [FIRST, M, E, POINTS, LAST]


def terms(choices: Any, x: Any) -> dict[Any, np.ndarray]:
    first, m, e, points, last = (np.asarray(choices[address], np.float64) for address in ALL)
    return {
        FIRST: norm(first, 0.0, 1.0),
        M: norm(m, first, 0.8),
        E: norm(e, m, [0.5, 1.5]),
        POINTS: norm(points, np.arange(3) * e.sum(), 0.7),
        LAST: norm(last, points.sum() + np.float64(x), 0.3),
    }


def total(parts: dict[Any, np.ndarray], of: Any = None) -> float:
    return float(sum(np.sum(value) for address, value in parts.items() if of is None or address in of))


def simulate(seed: int = 0) -> Any:
    return model.simulate(jax.random.key(seed), (X,))[1]


def only(tr: Any, addresses: Any) -> Any:
    return choice_map({address: tr.strip().get_subtree(address) for address in addresses})


def test_a_trace_is_that_of_the_body_written_out():
    @gen
    def written_out(x):
        first = trace("first", Counted("first"))(0.0, 1.0)
        m = trace("m", Counted("m"))(first, 0.8)
        below = jnp.sum(trace(("d", "e"), Counted("e"))(m, jnp.array([0.5, 1.5])))
        points = trace("points", Map(Normal, in_axes=(0, None)))(jnp.arange(3.0) * below, 0.7)
        return trace("last", Counted("last"))(jnp.sum(points) + x, 0.3)

    tr, (_, want) = simulate(), written_out.simulate(jax.random.key(0), (X,))
    assert tr.choices.keys() == want.choices.keys()
    jax.tree.map(np.testing.assert_array_equal, tr.strip(), want.strip())
    jax.tree.map(np.testing.assert_array_equal, tr.get_retval(), want.get_retval())
    close(tr.get_score(), total(terms(tr, X)))
    for address in ALL:
        close(tr.project(select(address)), np.sum(terms(tr, X)[address]))
    assert [address for address, _ in tr.leaves()] == ALL


def test_constraints_are_those_of_the_whole_body():
    drawn = simulate(3)
    for given in ([], [M], [E, FIRST], [LAST, POINTS, M], ALL):
        _, (weight, tr) = model.importance(KEY, only(drawn, given), (X,))
        close(weight, total(terms(tr, X), of=given))
        for address in given:
            np.testing.assert_array_equal(tr[address], drawn[address])
    _, (retval, score) = model.assess(KEY, drawn.strip(), (2.0,))
    close(score, total(terms(drawn, 2.0)))
    close(retval, drawn[LAST])


def test_updates_in_a_row_and_back():
    first, second, third = map(simulate, (0, 1, 2))
    current, x = first, X
    for source, given, new_x in ((second, [M], X), (third, [E, LAST], X + 1.0), (second, [M, FIRST], X)):
        _, (retdiff, weight, new, discard) = model.update(KEY, current, only(source, given), (new_x,))
        before, after = total(terms(current, x)), total(terms(new, new_x))
        close(weight, after - before)
        close(new.get_score(), after)
        assert sorted(discard.addresses()) == sorted(given)
        np.testing.assert_array_equal(Diff.primal(retdiff), new[LAST])
        assert jax.tree.structure(new) == jax.tree.structure(current)
        _, (_, back_weight, back, _) = model.update(KEY, new, discard, (x,))
        close(back_weight, before - after)
        jax.tree.map(np.testing.assert_array_equal, back.strip(), current.strip())
        current, x = new, new_x


@pytest.mark.parametrize(
    "given, argdiff, visited",
    [
        ([M], Diff.no_change(X), ["m", "e"]),
        ([E], Diff.no_change(X), ["e"]),
        ([FIRST], Diff.no_change(X), ["first", "m"]),
        ([], Diff.unknown_change(X + 1.0), ["last"]),
        ([], Diff.no_change(X), []),
    ],
)
def test_a_change_costs_its_markov_blanket(given: Any, argdiff: Any, visited: list[str]):
    """Through what is inlined, too. The map keeps its values, so "last" has unchanged arguments where "e" changes."""
    tr, choices = simulate(), only(simulate(1), given)
    scored.clear()
    _, (_, weight, new, _) = model.update(KEY, tr, choices, (argdiff,))
    assert scored == visited
    close(weight, total(terms(new, argdiff.value)) - total(terms(tr, X)))


def test_regenerate_by_address():
    tr = simulate()
    before = terms(tr, X)
    for redrawn in ([M], [E], [FIRST, LAST], ALL, []):
        _, (_, weight, new) = model.regenerate(OTHER, tr, select(*redrawn), (X + 0.5,))
        for address in ALL:
            assert np.array_equal(new[address], tr[address]) is (address not in redrawn)
        kept = [address for address in ALL if address not in redrawn]
        close(weight, total(terms(new, X + 0.5), of=kept) - total(before, of=kept))


def test_gradients_and_the_reals():
    tr = simulate()
    first, m, e, _, _ = (np.asarray(tr[address], np.float64) for address in ALL)
    _, grads = model.choice_grad(KEY, tr, select("m"))
    close(grads["m"], -(m - first) / 0.8**2 + np.sum((e - m) / np.array([0.5, 1.5]) ** 2))


@pytest.mark.slow
def test_maps_to_the_reals():
    @gen
    def waiting(x):
        return trace("z", Exponential)(inline(gen(lambda x: trace(("w", "w"), Exponential)(x)))(x))

    _, tr = waiting.simulate(KEY, (1.5,))
    unconstrained, log_det = waiting.unconstrain(tr, gjflax.AllSelection())
    choices, back = waiting.constrain(unconstrained, (1.5,))
    for address in (("w", "w"), "z"):
        close(choices[address], tr[address])
    close(back, -np.float64(log_det))


@pytest.mark.slow
def test_it_compiles_once_and_maps():
    counted = 0

    @jax.jit
    def step(key, tr, m):
        nonlocal counted
        counted += 1
        return model.update(key, tr, {"m": m}, (X,))[1][1:3]

    tr = simulate()
    weight, new = step(KEY, tr, jnp.float32(0.3))
    close(weight, total(terms(new, X)) - total(terms(tr, X)))
    step(KEY, new, jnp.float32(0.7))
    assert counted == 1
    mapped = Map(model, in_axes=0)
    _, traces = mapped.simulate(KEY, (jnp.array([X, X + 1.0]),))
    parts = [terms(jax.tree.map(lambda leaf, i=i: leaf[i], traces.inner), X + i) for i in range(2)]
    close(traces.get_score(), sum(map(total, parts)))
    _, (_, weight, new, _) = mapped.update(KEY, traces, {(1, "m"): 0.1}, tuple(map(Diff.no_change, traces.get_args())))
    after = terms(jax.tree.map(lambda leaf: leaf[1], new.inner), X + 1)
    close(weight, total(after) - total(parts[1]))


@pytest.mark.slow
def test_a_branch_may_be_inlined_or_not():
    """A body whose choices depend on a number that is known while tracing."""

    @gen
    def either(deep, x):
        z = inline(middle)(x) if deep else trace("m", Counted("m"))(x, 3.0)
        return trace("y", Normal)(z, 1.0)

    _, tr = either.simulate(KEY, (False, X))
    _, (_, weight, new, discard) = either.update(KEY, tr, {"d": {"e": jnp.zeros(2)}}, (True, X))
    want = norm(new["m"], X, 2.0) + np.sum(norm(0.0, new["m"], [0.5, 1.5])) + norm(tr["y"], 0.0, 1.0)
    close(weight, want - norm(tr["m"], X, 3.0) - norm(tr["y"], tr["m"], 1.0))
    assert discard.is_empty() and new["m"] == tr["m"]
    _, (_, back_weight, _, discard) = either.update(KEY, new, {}, (False, X))
    close(back_weight, -np.float64(weight))
    assert discard.addresses() == [("d", "e")]


# Parameters ------------------------------------------------------------------------------------------------------------


class Encoder(GenModule):
    @nn.compact
    def __call__(self, x):
        return trace("code", Normal)(nn.Dense(2)(x), 0.5)


@gen
def head(name, x):
    return trace(name, Normal)(nn.Dense(1)(x), 0.2)


free = Encoder()


class Net(GenModule):
    """A module's own callee, free ones of one name, and one that is made here."""

    def setup(self):
        self.encoder = Encoder()

    @nn.compact
    def __call__(self, x):
        code = inline(self.encoder)(x)
        again = trace("again", self.encoder)(x)
        left = inline(head)("left", code)
        right = inline(head)("right", again)
        return trace("y", Normal)(nn.Dense(1)(left + right), 0.1)


@pytest.mark.slow
def test_parameters_are_named_as_flax_names_modules(no_leaks):
    xs = jnp.arange(3.0)
    variables = no_leaks(lambda: jax.jit(Net().init)(KEY, xs))
    assert set(variables["params"]) == {"encoder", "head_0", "head_1", "Dense_0"}
    lifted = nn.remat(Net)()
    assert jax.tree.structure(no_leaks(lambda: lifted.init(KEY, KEY, (xs,), method="simulate"))) == jax.tree.structure(
        variables
    )
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])

    def dense(layer: Any, value: Any) -> np.ndarray:
        return np.asarray(value, np.float64) @ layer["kernel"] + layer["bias"]

    for net in (Net(), lifted):
        _, tr = net.bind(variables).simulate(KEY, (xs,))

        def score(tr: Any, shift: float = 0.0) -> float:
            q = jax.tree.map(lambda leaf: leaf + shift, p)
            encode = q["encoder"]["Dense_0"]
            parts = [
                norm(tr["code"], dense(encode, xs), 0.5),
                norm(tr["again", "code"], dense(encode, xs), 0.5),
                norm(tr["left"], dense(q["head_0"]["Dense_0"], tr["code"]), 0.2),
                norm(tr["right"], dense(q["head_1"]["Dense_0"], tr["again", "code"]), 0.2),
                norm(tr["y"], dense(q["Dense_0"], tr["left"] + tr["right"]), 0.1),
            ]
            return float(sum(map(np.sum, parts)))

        close(tr.get_score(), score(tr))
        moved = net.bind(jax.tree.map(lambda leaf: leaf + 0.1, variables))
        _, (_, weight, new, _) = moved.update(KEY, tr, {"left": jnp.ones(1)}, (Diff.no_change(xs),))
        np.testing.assert_allclose(weight, score(new, 0.1) - score(tr), rtol=1e-3)
        other = jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])
        np.testing.assert_allclose(net.score_params(KEY, tr, other)[1], score(tr, 0.1), rtol=1e-3)


def test_a_free_class_is_named_by_flax():
    @gen
    def body(x):
        return inline(free)(x)

    assert set(body.init(KEY, jnp.ones(3))["params"]) == {"Encoder_0"}
    assert set(gen(lambda x: inline(gen(lambda x: inline(free)(x)))(x)).init(KEY, jnp.ones(3))["params"]) == {
        "BuiltinGenerativeFunction_0"
    }


class NotCompact(GenModule):
    inner: Any

    def setup(self):
        self.own = Encoder()

    def __call__(self, x):
        return inline(self.inner)(x)


def test_a_body_that_is_not_compact_inlines_what_has_no_parameters():
    _, tr = NotCompact(deepest).bind({}).simulate(KEY, (X,))
    assert tr.strip().addresses() == [E]
    close(tr.get_score(), np.sum(norm(tr[E], X, [0.5, 1.5])))


@pytest.mark.slow
def test_a_forward_sample_inlines_too():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Net(name="net")(x)

    variables = jax.jit(Layer().init)(KEY, jnp.ones(3))
    assert Layer().apply(variables, jnp.ones(3), rngs={"choice": KEY}).shape == (1,)


# Errors ----------------------------------------------------------------------------------------------------------------


def has(*parts: str) -> str:
    return "(?s)" + ".*".join(map(re.escape, parts))


def body(function: Any) -> Any:
    """At an address of another, so that messages must say the whole address."""
    return gen(lambda: trace("outer", gen(function))())


@pytest.mark.parametrize(
    "function, error, match",
    [
        (
            lambda: inline(deepest)(X) + trace("d", Normal)(0.0, 1.0),
            DuplicateAddressError,
            has('("outer", "d")', "prefix"),
        ),
        (lambda: (inline(middle)(X), inline(middle)(X)), DuplicateAddressError, has('("outer", "m")', "twice")),
        (
            lambda: inline(deepest),
            CalleeError,
            has('inline(deepest) at "outer"', "never called", "inline(deepest)(*args)"),
        ),
        (lambda: inline(gen(lambda: trace("z", Normal)))(), CalleeError, has('trace(("outer", "z")', "never called")),
        (
            lambda: inline(Normal)(0.0, 1.0),
            CalleeError,
            has("inline(Normal)", "no body", 'trace("part", Normal)', "Inline("),
        ),
        (
            lambda: inline(Switch((middle, middle)))(0, X),
            CalleeError,
            has("inline(Switch)", "no body", "Inline(caller"),
        ),
        (lambda: inline(nn.remat(Encoder)())(X), CalleeError, has("lifted transformation", "Inline(caller")),
        (lambda: inline(lambda: 0.0)(), CalleeError, has("inline(...)", "@gen")),
        (
            lambda: jax.vmap(inline(deepest))(jnp.ones(3)),
            TraceTransformError,
            has('inline(deepest) at "outer"', "`Map`"),
        ),
        (
            lambda: inline(gen(lambda: jax.jit(trace("z", Normal))(0.0, 1.0)))(),
            TraceTransformError,
            has('trace(("outer", "z")'),
        ),
    ],
)
def test_mistakes_are_named(function: Any, error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        body(function).simulate(KEY, ())


def test_mistakes_in_constraints_are_named():
    for given, match in (
        ({"mm": 1.0}, has('"mm"', 'Did you mean "m"?')),
        ({"d": {"f": 1.0}}, has('("d", "f")', 'Did you mean ("d", "e")?')),
        ({"m": {"x": 1.0}}, has('"m"', "single value")),
    ):
        with pytest.raises(UnvisitedConstraintError, match=match):
            model.importance(KEY, given, (X,))
        with pytest.raises(UnvisitedConstraintError, match=match):
            model.update(KEY, simulate(), given, (X,))
    with pytest.raises(MissingChoiceError, match=re.escape('("at", "m")')):
        gen(lambda: trace("at", model)(X)).assess(KEY, {"at": simulate().strip().filter(~select("m"))}, ())
    renamed = AddressMap(model, {("p", "q"): "m"})
    with pytest.raises(MissingChoiceError, match=re.escape('("p", "q")')):
        renamed.assess(KEY, simulate().strip().filter(~select("m")), (X,))


def test_outside_of_a_body():
    with pytest.raises(TraceContextError, match=r"inline\(deepest\)"):
        inline(deepest)(X)


class OfGlobals(GenModule):
    """Not compact, so it cannot make a submodule of the free callee."""

    def __call__(self, x):
        return inline(free)(x)


def test_a_free_callee_with_parameters_needs_a_compact_body():
    with pytest.raises(
        UnboundParametersError, match=r"`Encoder` has parameters, and is free.*OfGlobals is not compact"
    ):
        OfGlobals().bind({"params": {}}).simulate(KEY, (jnp.ones(3),))

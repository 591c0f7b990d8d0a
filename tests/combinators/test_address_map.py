"""`AddressMap` and `Inline`: choices under other names, in every method, and errors that speak of these names."""

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
    ArgumentError,
    Bernoulli,
    ChoiceShapeError,
    Cond,
    Diff,
    DuplicateAddressError,
    Exponential,
    GenModule,
    Inline,
    InvalidAddressError,
    Map,
    MissingChoiceError,
    Normal,
    TrainCombinator,
    UnvisitedConstraintError,
    choice_map,
    choose,
    gen,
    select,
    trace,
)

KEY = jax.random.key(0)
OTHER = jax.random.key(7)


def norm(value: Any, loc: Any, scale: Any) -> np.ndarray:
    return stats.norm.logpdf(np.float64(value), np.float64(loc), np.float64(scale))


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-4, atol=1e-4)


@gen
def part(x):
    a = trace("a", Exponential)(1.0 + x**2)
    return trace(("b", "c"), Normal)(a * jnp.array([1.0, -0.5]), 0.6)


@gen
def model(x):
    u = trace("u", part)(x)
    m = trace("m", Map(Normal, repeats=3))(u[0], 1.5)
    return trace("y", Normal)(jnp.sum(m) * u, 0.4)


X = jnp.float32(0.7)
NAMES = {"v": ("u", "a"), ("q", "r"): "y", "y": "m", ("u", "a"): ("u", "b")}
"""Names that are swapped, that move up and down, and a new name below an old one."""
renamed = AddressMap(model, NAMES)
A, C, M, Y = ("v",), ("u", "a", "c"), ("y",), ("q", "r")


def terms(choices: Any, x: Any) -> dict[Any, np.ndarray]:
    """The log densities by new address."""
    x = np.float64(x)
    a, c, m, y = (np.asarray(choices[address], np.float64) for address in (A, C, M, Y))
    return {
        A: stats.expon.logpdf(a, scale=1 / (1 + x**2)),
        C: norm(c, a * np.array([1.0, -0.5]), 0.6),
        M: norm(m, c[0], 1.5),
        Y: norm(y, m.sum() * c, 0.4),
    }


def total(parts: dict[Any, np.ndarray], of: Any = None) -> float:
    return float(sum(np.sum(value) for address, value in parts.items() if of is None or address in of))


def simulate(seed: int = 0) -> Any:
    return renamed.simulate(jax.random.key(seed), (X,))[1]


def test_choices_stand_at_the_new_addresses():
    tr = simulate()
    assert sorted(tr.strip().addresses()) == sorted([A, C, M, Y])
    close(tr.get_score(), total(terms(tr, X)))
    np.testing.assert_array_equal(tr.get_subtree(Y).get_retval(), tr[Y])
    np.testing.assert_array_equal(tr.get_subtree("q")["r"], tr[Y])
    np.testing.assert_array_equal(tr["y", 1], tr["y"][1])
    np.testing.assert_array_equal(tr.get_subtree("u")["a", "c"], tr[C])
    assert {address for address, _ in tr.leaves(("at",))} == {("at", *address) for address in (A, C, M, Y)}
    assert "m" not in tr and ("u", "b") not in tr and ("u", "a") in tr
    with pytest.raises(MissingChoiceError, match=r'"m"'):
        tr["m"]
    parts = terms(tr, X)
    for address in (A, C, M, Y):
        close(tr.project(select(address)), np.sum(parts[address]))
        close(renamed.project(KEY, tr, ~select(address))[1], total(parts) - np.sum(parts[address]))
    close(tr.project(select(A, Y) & ~select("q") | select("u")), total(parts, of=(A, C)))
    close(tr.project(select(("y", 1))), parts[M][1])
    assert tr.get_gen_fn() == renamed and isinstance(tr, gjflax.RenamedTrace)
    assert [site.address for site in _sites(tr.outline())] == [address for address, _ in tr.leaves()]


def _sites(parts: Any) -> list[Any]:
    return [site for one in parts for site in (_sites(one.parts) if hasattr(one, "parts") else [one])]


def test_constraints_are_read_under_the_new_addresses():
    drawn = simulate(3)
    for given in ([], [A], [C, Y], [M], [A, C, M, Y]):
        constraints = choice_map({address: drawn.strip().get_subtree(address) for address in given})
        _, (weight, tr) = renamed.importance(KEY, constraints, (X,))
        close(weight, total(terms(tr, X), of=given))
        for address in given:
            np.testing.assert_array_equal(tr[address], drawn[address])
    _, (retval, score) = renamed.assess(KEY, drawn.strip(), (0.2,))
    close(score, total(terms(drawn, 0.2)))
    np.testing.assert_array_equal(retval, drawn[Y])
    _, (weight, tr) = renamed.importance(KEY, {("y", 2): 4.0}, (X,))
    close(weight, terms(tr, X)[M][2])
    assert float(tr["y", 2]) == 4.0


def test_updates_in_a_row_and_back():
    first, second, third = map(simulate, (0, 1, 2))
    current, weights, args = first, 0.0, (X,)
    for source, given, new_args in (
        (second, [A, M], (X,)),
        (third, [C], (X - 1.0,)),
        (second, [Y, C], (X - 1.0,)),
    ):
        constraints = choice_map({address: source.strip().get_subtree(address) for address in given})
        _, (_, weight, new, discard) = renamed.update(KEY, current, constraints, new_args)
        before, after = total(terms(current, args[0])), total(terms(new, new_args[0]))
        close(weight, after - before)
        close(new.get_score(), after)
        assert sorted(discard.addresses()) == sorted(given)
        _, (_, back_weight, back, _) = renamed.update(KEY, new, discard, args)
        close(back_weight, before - after)
        for address in (A, C, M, Y):
            np.testing.assert_array_equal(back[address], current[address])
        current, args, weights = new, new_args, weights + float(weight)
    close(weights, total(terms(current, args[0])) - total(terms(first, X)))


def test_regenerate_redraws_what_is_selected_by_its_new_address():
    tr = simulate()
    before = terms(tr, X)
    for selection, redrawn in (
        (select(A), [A]),
        (~select(A), [C, M, Y]),
        (select("u") | select("q"), [C, Y]),
        (select("q", "y") & ~select("y"), [Y]),
        (select("m") & ~select(A), []),
    ):
        _, (_, weight, new) = renamed.regenerate(OTHER, tr, selection, (X + 0.5,))
        kept = [address for address in (A, C, M, Y) if address not in redrawn]
        for address in (A, C, M, Y):
            same = np.array_equal(new[address], tr[address])
            assert same is (address in kept), address
        close(weight, total(terms(new, X + 0.5), of=kept) - total(before, of=kept))
    # An address that the inner function alone knows is none here.
    with pytest.raises(gjflax.SelectionError, match='"m".*Known here: .*"y"'):
        renamed.regenerate(OTHER, tr, select("m"), (X,))
    _, (_, weight, new) = renamed.regenerate(OTHER, tr, select(("y", 1)), (Diff.no_change(X),))
    np.testing.assert_array_equal(new["y"] == tr["y"], [True, False, True])
    close(weight, np.sum(terms(new, X)[Y]) - np.sum(before[Y]))


def test_only_the_markov_blanket_runs_again():
    tr = simulate()
    _, (_, _, new, _) = renamed.update(KEY, tr, {"q": {"r": jnp.zeros(2)}}, (Diff.no_change(X),))
    assert new.inner.get_subtree("u") is tr.inner.get_subtree("u")
    accepted = choose(jnp.array(True), new, tr)
    jax.tree.map(np.testing.assert_array_equal, accepted, new)


@pytest.mark.slow
def test_gradients_and_maps_to_the_reals():
    tr = simulate()
    _, grads = renamed.choice_grad(KEY, tr, select(A, Y))
    a, c, m, y = (np.asarray(tr[address], np.float64) for address in (A, C, M, Y))
    close(grads[Y], -(y - m.sum() * c) / 0.4**2)
    close(grads[A], -(1 + 0.7**2) + np.sum((c - a * np.array([1.0, -0.5])) * np.array([1.0, -0.5])) / 0.6**2)
    _, grad = renamed.arg_grad(KEY, tr)
    close(grad, 2 * 0.7 / (1 + 0.7**2) - 2 * 0.7 * a)
    _, score, _ = renamed.unzip(KEY, tr.strip().filter(~select(Y)))
    close(score({Y: tr[Y]}, X), total(terms(tr, X)))
    selection = select(A, M)
    unconstrained, log_det = renamed.unconstrain(tr, selection)
    assert sorted(unconstrained.addresses()) == sorted([A, M])
    choices, back = renamed.constrain(unconstrained, (X,), fixed=tr.strip().filter(~selection))
    close(choices[A], a)
    close(choices[M], m)
    close(back, -np.float64(log_det))


@pytest.mark.slow
def test_it_compiles_once_and_maps():
    counted = 0

    @jax.jit
    def step(key, tr, value):
        nonlocal counted
        counted += 1
        key, (_, weight, new, _) = renamed.update(key, tr, {("q", "r"): value}, (X,))
        return new, weight

    tr = simulate()
    plain = renamed.update(KEY, tr, {("q", "r"): jnp.ones(2)}, (X,))[1]
    new, weight = step(KEY, tr, jnp.ones(2))
    close(weight, plain[1])
    step(KEY, new, jnp.zeros(2))
    assert counted == 1
    traces = jax.vmap(lambda key: renamed.simulate(key, (X,))[1])(jax.random.split(KEY, 3))
    assert traces.batch_shape == (3,) and traces[M].shape == (3, 3)
    one = jax.tree.map(lambda leaf: leaf[1], traces)
    close(traces.get_score()[1], total(terms(one, X)))


# Maps ------------------------------------------------------------------------------------------------------------------


@gen
def element(x):
    a = trace("a", Normal)(x, 1.5)
    return trace("b", Normal)(a, 0.5)


XS = jnp.array([0.5, -1.0, 2.0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "mapped", [AddressMap(Map(element), {"b": "a", "a": "b"}), Map(AddressMap(element, {"b": "a", "a": "b"}))]
)
def test_elements_of_a_map_keep_their_indices(mapped: Any):
    def by_hand(tr: Any) -> tuple[np.ndarray, np.ndarray]:
        return norm(tr["b"], XS, 1.5), norm(tr["a"], tr["b"], 0.5)

    _, tr = mapped.simulate(KEY, (XS,))
    close(tr.get_score(), sum(map(np.sum, by_hand(tr))))
    _, (weight, new) = mapped.importance(KEY, {(1, "b"): 3.0}, (XS,))
    close(weight, norm(3.0, -1.0, 1.5))
    _, (_, weight, new, discard) = mapped.update(KEY, tr, {(1, "b"): 3.0}, (Diff.no_change(XS),))
    close(weight, sum(np.sum(b - a) for a, b in zip(by_hand(tr), by_hand(new), strict=True)))
    np.testing.assert_array_equal(discard[1, "b"], tr[1, "b"])
    assert discard.addresses() == [("b",)] and float(new[1, "b"]) == 3.0
    _, (_, weight, new) = mapped.regenerate(OTHER, tr, select((2, "b")), (Diff.no_change(XS),))
    np.testing.assert_array_equal(new["b"] == tr["b"], [True, True, False])
    np.testing.assert_array_equal(new["a"], tr["a"])
    close(weight, np.sum(by_hand(new)[1] - by_hand(tr)[1]))
    close(tr.project(select((2, "b"))), by_hand(tr)[0][2])


@gen
def with_map(x):
    m = trace("m", Map(element))(x)
    return trace("y", Normal)(jnp.sum(m), 0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moved",
    [Inline(with_map, "m"), AddressMap(with_map, {"a": ("m", "a"), "b": ("m", "b")})],
    ids=["Inline", "AddressMap"],
)
def test_what_leaves_a_map_is_a_vector_below_its_name(moved: Any):
    def by_hand(tr: Any) -> list[np.ndarray]:
        return [norm(tr["a"], XS, 1.5), norm(tr["b"], tr["a"], 0.5), norm(tr["y"], np.sum(tr["b"]), 0.3)]

    _, tr = moved.simulate(KEY, (XS,))
    assert sorted(tr.strip().addresses()) == [("a",), ("b",), ("y",)]
    close(tr.get_score(), sum(map(np.sum, by_hand(tr))))
    np.testing.assert_array_equal(tr["a", 1], tr["a"][1])
    _, (_, weight, new, discard) = moved.update(KEY, tr, {("b", 1): 3.0}, (Diff.no_change(XS),))
    close(weight, sum(map(np.sum, by_hand(new))) - sum(map(np.sum, by_hand(tr))))
    np.testing.assert_array_equal(discard["b", 1], tr["b", 1])
    _, (weight, new) = moved.importance(KEY, {("a", 2): 1.0}, (XS,))
    close(weight, by_hand(new)[0][2])
    close(moved.assess(KEY, tr.strip(), (XS,))[1][1], tr.get_score())
    _, (_, weight, new) = moved.regenerate(OTHER, tr, select(("b", 1)), (Diff.no_change(XS),))
    np.testing.assert_array_equal(new["b"] == tr["b"], [True, False, True])
    np.testing.assert_array_equal(new["a"], tr["a"])
    close(weight, by_hand(new)[2] - by_hand(tr)[2])
    close(tr.project(select(("b", 1))), by_hand(tr)[1][1])


# Inline ----------------------------------------------------------------------------------------------------------------


@gen
def low(x):
    return trace("low", Normal)(x, 0.5)


@gen
def high(x):
    return trace("high", Normal)(10.0 + x, 2.0)


@gen
def branches(x):
    z = trace(("deep", "branch"), Cond(low, high))(x > 0.0, x)
    return trace("y", Normal)(z, 0.1)


@pytest.mark.slow
def test_a_switch_moves_up():
    flat = Inline(branches, ("deep", "branch"))
    _, tr = flat.simulate(KEY, (jnp.float32(2.0),))
    assert sorted(tr.strip().addresses()) == [("high",), ("low",), ("y",)]
    low_value = tr["low"].unmask(np.nan)
    close(tr.get_score(), norm(low_value, 2.0, 0.5) + norm(tr["y"], low_value, 0.1))
    _, (_, weight, new, discard) = flat.update(KEY, tr, {"high": 8.0}, (jnp.float32(-1.0),))
    close(weight, norm(8.0, 9.0, 2.0) + norm(tr["y"], 8.0, 0.1) - float(tr.get_score()))
    close(discard["low"].unmask(np.nan), low_value)


@pytest.mark.slow
def test_levels_go_one_by_one():
    @gen
    def outer(x):
        return trace("first", renamed)(x) + trace("second", model)(x)

    flat = Inline(Inline(outer, "first"), "second")
    with pytest.raises(DuplicateAddressError, match=r'moves .*"second".*choice at \("u", "a", "c"\)'):
        flat.simulate(KEY, (X,))
    one = Inline(outer, "first")
    _, tr = one.simulate(KEY, (X,))
    second = {address: tr.get_subtree("second").strip().get_subtree(address) for address in ("u", "m", "y")}
    close(
        tr.get_score(),
        total(terms(tr, X)) + float(model.assess(KEY, second, (X,))[1][1]),
    )


# Parameters ------------------------------------------------------------------------------------------------------------


class Net(GenModule):
    @nn.compact
    def __call__(self, x):
        z = trace("z", Normal)(0.0, 1.0)
        return trace(("out", "y"), Normal)(nn.Dense(2)(x) * z, 0.5)


@pytest.mark.slow
def test_parameters_are_those_of_the_inner_function(no_leaks):
    x = jnp.arange(3.0)
    alone = Net().init(KEY, x)
    for wrapped in (AddressMap(Net(), {"w": "z"}), Inline(Net(), "out"), nn.remat(Net)()):
        wrapped = Inline(wrapped, "out") if not isinstance(wrapped, (AddressMap, Inline)) else wrapped
        made = no_leaks(lambda wrapped=wrapped: jax.jit(wrapped.init)(KEY, x))
        assert jax.tree.structure(made) == jax.tree.structure(alone)
        bound = wrapped.bind(made)
        _, tr = bound.simulate(KEY, (x,))
        moved = wrapped.bind(jax.tree.map(lambda leaf: leaf + 0.1, made))
        _, (_, weight, new, _) = moved.update(KEY, tr, {}, (Diff.no_change(x),))
        _, (_, score) = moved.assess(KEY, tr.strip(), (x,))
        z, y = np.float64(tr["w" if "w" in tr else "z"]), tr["y"] if "y" in tr else tr["out", "y"]
        net = jax.tree.map(lambda leaf: np.float64(leaf) + 0.1, made["params"]["Dense_0"])
        want = norm(z, 0.0, 1.0) + np.sum(norm(y, (np.arange(3) @ net["kernel"] + net["bias"]) * z, 0.5))
        close(score, want)
        close(weight, want - float(tr.get_score()))
        close(wrapped.score_params(KEY, tr, jax.tree.map(lambda leaf: leaf + 0.1, made["params"]))[1], want)


@pytest.mark.slow
def test_a_learned_function_brings_its_parameters_along():
    @gen(TrainCombinator, params={"mu": 0.5})
    def learned(x, params):
        return trace("y", Normal)(x + params["mu"], 1.0)

    other = AddressMap(learned, {"w": "y"})
    _, tr = other.bind({"params": {"mu": jnp.float32(3.0)}}).simulate(KEY, (1.0,))
    _, (_, weight, new, _) = other.update(KEY, tr, {"w": 1.5}, (2.0,))
    close(weight, norm(1.5, 5.0, 1.0) - norm(tr["w"], 4.0, 1.0))
    with pytest.raises(gjflax.SelectionError, match='Known here: "w"'):
        other.regenerate(KEY, tr, select("y"), tr.get_args())
    close(other.choice_grad(KEY, tr, select("w"))[1]["w"], 4.0 - float(tr["w"]))


# Errors ----------------------------------------------------------------------------------------------------------------


def has(*parts: str) -> str:
    return "(?s)" + ".*".join(map(re.escape, parts))


def at_m(function: Any) -> Any:
    """The same below the address "at" of another body."""
    return gen(lambda: trace("at", function)(X))


@pytest.mark.parametrize(
    "choices, error, match",
    [
        ({"vv": 1.0}, UnvisitedConstraintError, has('("at", "vv")', 'Did you mean ("at", "v")?', "strict=False")),
        ({"q": {"s": 1.0}}, UnvisitedConstraintError, has('("at", "q", "s")', 'Did you mean ("at", "q", "r")?')),
        ({"m": jnp.ones(3)}, UnvisitedConstraintError, has('("at", "m")', 'it is called ("at", "y")')),
        (
            {"u": {"b": {"c": jnp.ones(2)}}},
            UnvisitedConstraintError,
            has('("at", "u", "b", "c")', '("at", "u", "a", "c")'),
        ),
        ({"v": {"x": 1.0}}, UnvisitedConstraintError, has('("at", "v")', "single value", '"x"')),
        ({"v": jnp.ones(2)}, ChoiceShapeError, has('("at", "v")', "(2,)")),
        ({"y": jnp.ones(4)}, ChoiceShapeError, has('("at", "y")', "(4,)", "leading axis of 3")),
        ({"q": {"r": jnp.ones(3)}}, ChoiceShapeError, has('("at", "q", "r")', "(3,)")),
    ],
)
def test_errors_from_inside_name_the_new_addresses(choices: Any, error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        at_m(renamed).importance(KEY, {"at": choices}, ())
    tr = at_m(renamed).simulate(KEY, ())[1]
    with pytest.raises(error, match=match):
        at_m(renamed).update(KEY, tr, {"at": choices}, ())


def test_a_missing_choice_is_named_by_its_new_address():
    given = simulate().strip()
    for address, shown in ((A, '"v"'), (Y, '("q", "r")'), (M, '"y"')):
        with pytest.raises(MissingChoiceError, match=re.escape(shown)):
            renamed.assess(KEY, given.filter(~select(address)), (X,))
    flat = Inline(model, "u")
    with pytest.raises(MissingChoiceError, match=re.escape('("at", "b", "c")')):
        at_m(flat).assess(KEY, {"at": {"a": 1.0, "m": jnp.ones(3), "y": jnp.ones(2)}}, ())


def test_what_is_not_used_may_be_ignored():
    given = {"v": 1.0, "m": jnp.ones(3), "nothing": 2.0}
    _, (weight, tr) = renamed.importance(KEY, given, (X,), strict=False)
    close(weight, terms(tr, X)[A])
    _, (_, _, new, discard) = renamed.update(KEY, tr, given, (X,), strict=False)
    assert discard.addresses() == [A] and np.array_equal(new["y"], tr["y"])


@pytest.mark.parametrize(
    "mapping, error, match",
    [
        ({"w": ("u", "aa")}, ArgumentError, has('("u", "aa") to "w"', 'Did you mean ("u", "a")?')),
        ({"w": "zz"}, ArgumentError, has("no choice at or below", '"zz"', "Known here: ")),
        ({"y": "u"}, DuplicateAddressError, has('"u" to "y"', 'a choice at "y", which stays')),
        ({"u": "y"}, DuplicateAddressError, has('"y" to "u"', 'a choice at ("u", "a")')),
        ({("y", "z"): "u"}, DuplicateAddressError, has('a choice at "y"')),
    ],
)
def test_addresses_that_do_not_fit_are_found_while_tracing(mapping: Any, error: type[Exception], match: str):
    wrong = AddressMap(model, mapping)
    calls = (
        lambda: wrong.simulate(KEY, (X,)),
        lambda: wrong.importance(KEY, {"m": jnp.ones(3)}, (X,)),
        lambda: wrong.assess(KEY, {"m": jnp.ones(3)}, (X,)),
        lambda: wrong.constrain({"m": jnp.ones(3)}, (X,)),
    )
    for call in calls:
        with pytest.raises(error, match=match):
            jax.eval_shape(call)


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda: AddressMap(lambda: None, {}), ArgumentError, "@gen"),
        (lambda: AddressMap(model, ["a", "b"]), ArgumentError, "`mapping` is a dict"),
        (lambda: AddressMap(model, {"a": 3}), InvalidAddressError, "got 3"),
        (lambda: AddressMap(model, {(): "u"}), InvalidAddressError, re.escape("got ()")),
        (lambda: AddressMap(model, {"a/b": "u"}), InvalidAddressError, "a/b"),
        (lambda: AddressMap(model, {"a": "u", "b": "u"}), DuplicateAddressError, 'old addresses "u" and "u" overlap'),
        (
            lambda: AddressMap(model, {"a": "u", ("a", "b"): "m"}),
            DuplicateAddressError,
            re.escape('new addresses "a" and ("a", "b") overlap'),
        ),
        (lambda: Inline(model, 3), InvalidAddressError, "got 3"),
        (lambda: Inline(lambda: None, "u"), ArgumentError, "@gen"),
        (lambda: Inline(model, "w").simulate(KEY, (X,)), ArgumentError, has('below "w"', 'Known here: "u"')),
        (lambda: Inline(model, "y").simulate(KEY, (X,)), ArgumentError, has('below "y"', 'Known here: "u"')),
        (
            lambda: AddressMap(with_map, {("m", "z"): "y"}).simulate(KEY, (XS,)),
            ArgumentError,
            has('"y" to ("m", "z")', "vector"),
        ),
    ],
)
def test_fields_are_checked(make: Any, error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        make()


def test_discrete_choices_are_named_by_their_new_addresses():
    coin = AddressMap(gen(lambda: trace("coin", Bernoulli)(probs=0.3)), {"c": "coin"})
    _, tr = coin.simulate(KEY, ())
    with pytest.raises(gjflax.DiscreteGradientError, match='"c" is discrete'):
        coin.choice_grad(KEY, tr, select("c"))
    with pytest.raises(gjflax.DiscreteGradientError, match='"c"'):
        coin.unconstrain(tr, select("c"))
    with pytest.raises(gjflax.SelectionError, match='"coin".*Known here|"coin".*Did you mean'):
        coin.choice_grad(KEY, tr, select("coin"))

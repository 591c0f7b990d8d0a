"""`CallAt` and `ChoiceAt` against densities written by hand in NumPy: where the choices stand, and what a key costs."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import gjflax
from gjflax import (
    AllSelection,
    ArgumentError,
    Bernoulli,
    CallAt,
    Categorical,
    ChoiceAt,
    ChoiceMapError,
    Diff,
    Exponential,
    GenModule,
    Map,
    Mask,
    Masked,
    MissingChoiceError,
    NoneSelection,
    Normal,
    SelectionError,
    Switch,
    TrainCombinator,
    Unfold,
    UnvisitedConstraintError,
    VectorChoiceMap,
    choice_map,
    gen,
    select,
    trace,
)

KEYS = jax.random.split(jax.random.key(3), 8)


def norm(value: Any, loc: Any, scale: Any) -> Any:
    return stats.norm.logpdf(np.float64(value), np.float64(loc), np.float64(scale))


class Body(GenModule):
    """A network, a vector, a mapped choice, and a choice with a bounded support."""

    @nn.compact
    def __call__(self, x):
        a = trace("a", Normal)(nn.Dense(2)(x), 0.7)
        m = trace("m", Map(Normal, in_axes=(0, None)))(a, 1.3)
        return {"sum": jnp.sum(m), "r": trace("r", Exponential)(1.0 + a[0] ** 2)}


call = CallAt(Body())
X, OTHER_X = jnp.array([0.5, -1.0, 2.0]), jnp.array([1.5, 0.25, -0.75])
VARIABLES = call.init(jax.random.key(0), X, 3)
OTHER_VARIABLES = jax.tree.map(lambda leaf: 1.5 * leaf + 0.1, VARIABLES)
ADDRESSES = [("a",), ("m",), ("r",)]
SUBSETS = [list(part) for count in range(4) for part in itertools.combinations(ADDRESSES, count)]
GIVEN = {("a",): jnp.array([0.3, -0.8]), ("m",): jnp.array([1.1, 0.2]), ("r",): jnp.float32(0.9)}


def terms(choices: Any, x: Any, variables: Any = VARIABLES) -> dict[Any, Any]:
    dense = variables["params"]["Dense_0"]
    c = {address: np.float64(choices[address]) for address in ADDRESSES}
    loc = np.float64(x) @ np.float64(dense["kernel"]) + np.float64(dense["bias"])
    return {
        ("a",): norm(c["a",], loc, 0.7).sum(),
        ("m",): norm(c["m",], c["a",], 1.3).sum(),
        ("r",): stats.expon.logpdf(c["r",], scale=1 / (1 + c["a",][0] ** 2)),
    }


def total(parts: dict[Any, Any], of: Any = ADDRESSES) -> float:
    return float(sum(part for address, part in parts.items() if address in of))


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2e-5, atol=2e-4)


def values(choices: Any, key: Any) -> dict[Any, Any]:
    """The choices below the key that are there; there must be none below another one."""
    if choices.is_empty():
        return {}
    if isinstance(key, str):
        assert choices.names() == (key,)
    else:
        assert choices.index_array().tolist() == [int(key)]
    below = choices.get_subtree(key)
    found = {address: below.get_subtree(address).get_value() for address in below.addresses()}
    flags = {address: np.all(value.flag) if isinstance(value, Masked) else True for address, value in found.items()}
    plain = {address: value.value if isinstance(value, Masked) else value for address, value in found.items()}
    return {address: np.asarray(plain[address]) for address, flag in flags.items() if flag}


def same(one: dict[Any, Any], other: dict[Any, Any]) -> None:
    assert one.keys() == other.keys()
    for address, value in one.items():
        np.testing.assert_array_equal(value, other[address])


def types(tree: Any) -> Any:
    leaves = [(leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), leaves


def given(addresses: Any, key: Any) -> Any:
    """Values at some addresses; at the others a flag says that there is none, so that one program does for all."""
    return choice_map({(key, *a): Masked(GIVEN[a], jnp.array(a in addresses)) for a in ADDRESSES})


# Keys as they come: a traced integer, one that is known, a name. Methods are compiled once for each kind. -----------------

KINDS = {"traced": (jnp.int32, 3, 5), "known": (int, 3, 5), "name": (str, "left", "right")}
slow = pytest.mark.slow
kinds = pytest.mark.parametrize("kind", ["traced", pytest.param("known", marks=slow), pytest.param("name", marks=slow)])


def at(kind: str) -> tuple[Any, Any, Any]:
    """Old and new key as users write them, and how they are given."""
    as_given, old, new = KINDS[kind]
    return old, new, as_given


@functools.cache
def compiled(method: str, is_static: bool) -> Any:
    def function(variables: Any, k: Any, x: Any, *args: Any) -> Any:
        return getattr(call.bind(variables), method)(*args, (x, k))[1]

    return jax.jit(function, static_argnums=(1,) if is_static else ())


def run(kind: str, method: str, *args: Any, variables: Any = VARIABLES) -> Any:
    """A method, compiled; of the arguments the key is an argument or part of the program."""
    *first, (x, k) = args
    return compiled(method, kind != "traced")(variables, k, x, *first)


@functools.cache
def start(kind: str) -> Any:
    old, _, as_given = at(kind)
    return run(kind, "simulate", KEYS[0], (X, as_given(old)))


@kinds
def test_choices_stand_below_the_key(kind: str):
    old, new, _ = at(kind)
    before = start(kind)
    assert before.get_gen_fn() == call and before.get_args()[1] == old
    c = values(before.strip(), old)
    close(before.get_score(), total(terms(c, X)))
    assert (old, "m") in before and (new, "m") not in before and new not in before
    np.testing.assert_array_equal(before[old, "m"], c["m",])
    with pytest.raises(MissingChoiceError):
        before[new, "a"]
    np.testing.assert_array_equal(before.strip().to_dict()[old]["a"], c["a",])
    retval = before.get_retval()
    close(retval["sum"], c["m",].sum())
    assert retval["r"] == c["r",]
    assert sorted(address[-1] for address, _ in before.leaves()) == ["a", "m", "r"]


@kinds
def test_project_takes_the_share_below_the_key(kind: str):
    old, new, _ = at(kind)
    before = start(kind)
    parts = terms(values(before.strip(), old), X)
    shares = [
        (AllSelection(), ADDRESSES),
        (NoneSelection(), []),
        (select((old, "m")), [("m",)]),
        (select((new, "m"), (old, "r")), [("r",)]),
        (select(new), []),
        (~select((old, "a"), new), [("m",), ("r",)]),
    ]
    for selection, of in shares:
        close(before.project(selection), total(parts, of))
        close(call.project(KEYS[1], before, selection)[1], total(parts, of))
    if kind != "name":
        close(before.project(select("m")), parts["m",])


@kinds
def test_importance_weighs_what_is_given(kind: str):
    old, new, as_given = at(kind)
    for addresses in SUBSETS:
        weight, after = run(kind, "importance", KEYS[1], given(addresses, old), (X, as_given(old)))
        c = values(after.strip(), old)
        assert sorted(c) == ADDRESSES
        for address in ADDRESSES:
            assert np.array_equal(c[address], GIVEN[address]) == (address in addresses)
        parts = terms(c, X)
        close(weight, total(parts, addresses))
        close(after.get_score(), total(parts))


@kinds
def test_assess_needs_all_at_the_key(kind: str):
    old, new, as_given = at(kind)
    everything = choice_map({(old, *address): GIVEN[address] for address in ADDRESSES})
    retval, score = run(kind, "assess", KEYS[1], everything, (X, as_given(old)))
    close(score, total(terms(GIVEN, X)))
    assert retval["r"] == GIVEN["r",]
    again = run(kind, "assess", KEYS[1], start(kind).strip(), (X, as_given(old)))
    close(again[1], start(kind).get_score())
    with pytest.raises(MissingChoiceError, match="assess"):
        run(kind, "assess", KEYS[1], choice_map({(old, "a"): GIVEN["a",]}), (X, as_given(old)))


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("moves", [False, True])
def test_update_of_key_choices_and_arguments(kind: str, moves: bool):
    """At the same key: new minus old. At another one: everything is gone, and what is given there counts."""
    old, new, as_given = at(kind)
    target = new if moves else old
    before = start(kind)
    was = values(before.strip(), old)
    for addresses in SUBSETS:
        constraints = given(addresses, target)
        retdiff, weight, after, discard = run(kind, "update", KEYS[1], before, constraints, (OTHER_X, as_given(target)))
        now = values(after.strip(), target)
        for address in ADDRESSES:
            if address in addresses:
                np.testing.assert_array_equal(now[address], GIVEN[address])
            else:
                assert np.array_equal(now[address], was[address]) != moves
        parts, old_parts = terms(now, OTHER_X), terms(was, X)
        counted = addresses if moves else ADDRESSES
        close(weight, total(parts, counted) - total(old_parts))
        close(after.get_score(), total(parts))
        same(values(discard, old), {a: v for a, v in was.items() if moves or a in addresses})
        close(Diff.primal(retdiff)["sum"], now["m",].sum())
        if kind != "name":
            assert types(after) == types(before)
        # The discard undoes it.
        _, back_weight, back, back_discard = run(kind, "update", KEYS[2], after, discard, (X, as_given(old)))
        same(values(back.strip(), old), was)
        close(back_weight, total(old_parts) - total(parts))
        same(values(back_discard, target), {a: v for a, v in now.items() if moves or a in addresses})


@kinds
def test_three_updates_in_a_row(kind: str):
    old, new, as_given = at(kind)
    current, key, choices = start(kind), old, values(start(kind).strip(), old)
    score = total(terms(choices, X))
    for step, (target, addresses, x) in enumerate(
        [(new, ADDRESSES[:2], OTHER_X), (new, ADDRESSES[2:], OTHER_X), (old, ADDRESSES, X), (old, [], OTHER_X)]
    ):
        constraints = given(addresses, target)
        _, weight, current, discard = run(kind, "update", KEYS[step], current, constraints, (x, as_given(target)))
        now = values(current.strip(), target)
        parts = terms(now, x)
        close(weight, total(parts, ADDRESSES if target == key else addresses) - score)
        same(values(discard, key), {a: v for a, v in choices.items() if target != key or a in addresses})
        key, choices, score = target, now, total(parts)


@kinds
def test_a_key_that_is_unchanged_leaves_what_is_unchanged(kind: str):
    old, _, as_given = at(kind)
    before = start(kind)
    model = call.bind(VARIABLES)
    key, (retdiff, weight, after, discard) = model.update(
        KEYS[1], before, {}, Diff.mark(before.get_args(), Diff.no_change), param_diff=Diff.no_change
    )
    assert key == KEYS[1] and weight == 0.0 and discard.is_empty() and Diff.is_unchanged(retdiff)
    assert all(one is other for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True))
    argdiffs = (Diff.no_change(X), Diff.no_change(as_given(old)))
    constraints = choice_map({(old, "m"): GIVEN["m",]})
    _, (_, weight, after, discard) = model.update(KEYS[1], before, constraints, argdiffs)
    was, now = values(before.strip(), old), values(after.strip(), old)
    close(weight, total(terms(now, X)) - total(terms(was, X)))
    same(values(discard, old), {("m",): was["m",]})


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("moves", [False, pytest.param(True, marks=slow)])
def test_regenerate(kind: str, moves: bool):
    old, new, as_given = at(kind)
    target = new if moves else old
    before = start(kind)
    was = values(before.strip(), old)
    selections = [
        (NoneSelection(), []),
        (AllSelection(), ADDRESSES),
        (select((target, "m")), [("m",)]),
        (select(7 if kind != "name" else "other"), []),
    ]
    if kind == "traced":
        selections.append((select((target, "a"), (8, "r"), (9, "m")), [("a",)]))
    for selection, redrawn in selections:
        retdiff, weight, after = run(kind, "regenerate", KEYS[1], before, selection, (OTHER_X, as_given(target)))
        now = values(after.strip(), target)
        for address in ADDRESSES:
            assert np.array_equal(now[address], was[address]) == (not moves and address not in redrawn)
        parts, old_parts = terms(now, OTHER_X), terms(was, X)
        kept = [] if moves else [address for address in ADDRESSES if address not in redrawn]
        close(weight, total(parts, kept) - total(old_parts, kept))
        close(after.get_score(), total(parts))
        if kind != "name":
            assert types(after) == types(before)
        close(Diff.primal(retdiff)["sum"], now["m",].sum())


@kinds
def test_parameters_are_one_more_argument(kind: str):
    old, new, as_given = at(kind)
    before = start(kind)
    was = values(before.strip(), old)
    for target in (old, new):
        _, weight, after, _ = run(
            kind, "update", KEYS[1], before, given([("m",)], target), (X, as_given(target)), variables=OTHER_VARIABLES
        )
        parts = terms(values(after.strip(), target), X, OTHER_VARIABLES)
        close(weight, total(parts, ADDRESSES if target == old else [("m",)]) - total(terms(was, X)))
        close(after.get_score(), total(parts))
    _, logpdf = call.score_params(KEYS[1], before, OTHER_VARIABLES["params"])
    close(logpdf, total(terms(was, X, OTHER_VARIABLES)))


def test_one_compiled_function_for_all_keys():
    @jax.jit
    def step(before: Any, constraints: Any, k: Any) -> Any:
        model = call.bind(VARIABLES)
        _, (_, weight, middle, discard) = model.update(KEYS[1], before, constraints, (X, k))
        _, (_, ratio, after) = model.regenerate(KEYS[2], middle, select("m"), (X, k + 1))
        return weight, discard, ratio, after

    current = start("traced")
    for k in (3, 5, 5, 0):
        constraints = VectorChoiceMap(jnp.array([k]), {"r": jnp.array([0.5])})
        step(current, constraints, jnp.int32(k))
        current = step(current, constraints, jnp.int32(k))[-1]
    assert step._cache_size() == 1


@slow
def test_compiled_is_as_it_stands():
    before = start("traced")
    for k in (3, 4):
        for addresses in ([], [("a",)], ADDRESSES):
            args = (KEYS[1], before, given(addresses, k), (OTHER_X, jnp.int32(k)))
            one = run("traced", "update", *args)
            _, other = call.bind(VARIABLES).update(*args)
            assert jax.tree.structure(one) == jax.tree.structure(other)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), one, other)


# What is given elsewhere ---------------------------------------------------------------------------------------------


@slow
def test_what_is_given_at_other_indices_of_a_traced_key_is_ignored():
    table = choice_map({(index, "r"): jnp.float32(0.5 + index) for index in range(4)})
    for k in (0, 2, 6):
        weight, after = run("traced", "importance", KEYS[1], table, (X, jnp.int32(k)))
        now = values(after.strip(), k)
        close(weight, terms(now, X)["r",] if k < 4 else 0.0)
        assert (now["r",] == 0.5 + k) == (k < 4)
    whole = choice_map(
        {(index, *address): GIVEN[address] + np.float32(index) for index in range(3) for address in ADDRESSES}
    )
    for k in (1, 2, 6):
        _, score = run("traced", "assess", KEYS[1], whole, (X, jnp.int32(k)))
        if k == 6:
            assert np.isnan(score)
        else:
            close(score, total(terms({a: GIVEN[a] + np.float32(k) for a in ADDRESSES}, X)))
    before = start("traced")
    was = values(before.strip(), 3)
    table = choice_map({(index, "r"): jnp.float32(0.5 + index) for index in (1, 5)})
    for k in (1, 3, 5, 6):
        _, weight, after, discard = run("traced", "update", KEYS[1], before, table, (X, jnp.int32(k)))
        now = values(after.strip(), k)
        counted = ADDRESSES if k == 3 else [("r",)] if k in (1, 5) else []
        close(weight, total(terms(now, X), counted) - total(terms(was, X)))
        same(values(discard, 3), {} if k == 3 else was)


@slow
def test_a_choice_decides_which_of_the_observations_counts():
    """The weight's expectation is the density of what was given, which sums over the key."""
    observed = np.array([0.3, -1.2, 2.0])
    logits = np.log([0.2, 0.5, 0.3])

    @gen
    def model():
        k = trace("k", Categorical)(jnp.asarray(logits, jnp.float32))
        return trace("y", ChoiceAt(Normal))(k.astype(jnp.float32), 0.8, k)

    constraints = choice_map({("y", index): np.float32(value) for index, value in enumerate(observed)})
    for k in range(3):
        _, (weight, tr) = model.importance(KEYS[0], constraints.merge({"k": k}), ())
        close(weight, logits[k] + norm(observed[k], k, 0.8))
        assert tr["y", k] == np.float32(observed[k])
        _, (_, score) = model.assess(KEYS[0], constraints.merge({"k": k}), ())
        close(score, weight)
    keys = jax.random.split(KEYS[1], 4000)
    weights = np.exp(jax.vmap(lambda key: model.importance(key, constraints, ())[1][0])(keys))
    want = np.sum(np.exp(logits + norm(observed, np.arange(3), 0.8)))
    assert abs(weights.mean() - want) < 4 * weights.std() / np.sqrt(len(weights))
    # The key is updated where it is drawn.
    _, (_, before) = model.importance(KEYS[0], choice_map({"k": 1, ("y", 1): 0.25}), ())
    _, (_, weight, after, discard) = model.update(KEYS[1], before, {"k": 2, ("y", 2): 1.5}, ())
    close(weight, logits[2] + norm(1.5, 2, 0.8) - logits[1] - norm(0.25, 1, 0.8))
    assert after["y", 2] == 1.5 and discard["k"] == 1 and discard["y", 1].unmask(0.0) == 0.25
    _, (_, weight, back, _) = model.update(KEYS[1], after, discard, ())
    close(weight, logits[1] + norm(0.25, 1, 0.8) - logits[2] - norm(1.5, 2, 0.8))
    assert back["y", 1] == 0.25 and back["k"] == 1


@pytest.mark.parametrize(
    "key, constraints, match",
    [
        (3, {4: 1.0}, r"given for 4, and the ChoiceAt at the root makes its choices at its key, 3"),
        (3, {3: 1.0, 4: 2.0}, "given for 4"),
        (np.int64(3), {4: 1.0}, "given for 4"),
        (3, {"x": 1.0}, 'given for "x"'),
        (3, 1.0, "given for the root"),
        (jnp.int32(3), {"x": 1.0}, 'given for "x"'),
        (jnp.int32(3), 1.0, "given for the root"),
        ("x", {"y": 1.0}, 'given for "y".* its key, "x"'),
        ("x", {"x": 0.0, "y": 1.0}, 'given for "y"'),
        ("x", {3: 1.0}, "given for 3"),
        ("x", 1.0, "given for the root"),
        ("x", {("x", "y"): 1.0}, "single value"),
    ],
)
def test_what_is_certainly_given_elsewhere_is_an_error(key: Any, constraints: Any, match: str):
    choice, args = ChoiceAt(Normal), (0.0, 1.0, key)
    _, tr = choice.simulate(KEYS[0], args)
    for call_it in (
        lambda **options: choice.importance(KEYS[0], constraints, args, **options),
        lambda **options: choice.update(KEYS[0], tr, constraints, args, **options),
    ):
        with pytest.raises(UnvisitedConstraintError, match=match):
            call_it()
        call_it(strict=False)
    with pytest.raises(UnvisitedConstraintError, match=match):
        choice.assess(KEYS[0], constraints, args)


def test_errors_name_the_address():
    @gen
    def model(k):
        return trace("point", CallAt(ChoiceAt(Normal)))(0.0, 1.0, "inner", k)

    with pytest.raises(UnvisitedConstraintError, match=r'\("point", 4\).*CallAt at "point".*\("point", 3\)'):
        model.importance(KEYS[0], {("point", 4, "inner"): 1.0}, (3,))
    with pytest.raises(UnvisitedConstraintError, match=r'"inned"'):
        model.importance(KEYS[0], {("point", 3, "inned"): 1.0}, (3,))
    _, tr = model.simulate(KEYS[0], (3,))
    assert tr["point", 3, "inner"].shape == ()
    for key in (True, 1.0, -1, jnp.array([1, 2]), jnp.float32(1), None, "", "a/b", ("a", 1)):
        with pytest.raises(ArgumentError, match=r'key, a string without "/" or one integer from 0'):
            ChoiceAt(Normal).simulate(KEYS[0], (0.0, 1.0, key))
    with pytest.raises(ArgumentError, match="key; got no arguments"):
        ChoiceAt(Normal).simulate(KEYS[0], ())
    with pytest.raises(ArgumentError, match="`ChoiceAt` makes one choice of a distribution"):
        ChoiceAt(model)
    with pytest.raises(ArgumentError, match="`CallAt` takes a generative function"):
        CallAt(lambda: None)


# Gradients and R^n ---------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str):
    old, _, _ = at(kind)
    before = start(kind)
    model = call.bind(VARIABLES)
    c = values(before.strip(), old)
    selected = select((old, "m"))
    _, gradient = model.choice_grad(KEYS[1], before, selected)
    assert jax.tree.structure(gradient) == jax.tree.structure(selected.filter(before)[0].strip())
    close(gradient[old, "m"], -(np.float64(c["m",]) - c["a",]) / 1.3**2)
    _, gradient = model.choice_grad(KEYS[1], before, AllSelection())
    close(gradient[old, "r"], -(1 + np.float64(c["a",][0]) ** 2))
    _, by_x = model.arg_grad(KEYS[1], before, 0)
    dense = VARIABLES["params"]["Dense_0"]
    error = c["a",] - (np.float64(X) @ np.float64(dense["kernel"]) + np.float64(dense["bias"]))
    close(by_x, np.float64(dense["kernel"]) @ error / 0.7**2)
    _, by_params = call.param_grad(KEYS[1], before, VARIABLES["params"])
    close(by_params["Dense_0"]["bias"], error / 0.7**2)
    if kind != "name":
        with pytest.raises(ArgumentError, match="Argument 1 is not floating point"):
            model.arg_grad(KEYS[1], before, 1)


@slow
def test_gradients_where_the_key_is_traced():
    @jax.jit
    def gradients(before: Any) -> Any:
        model = call.bind(VARIABLES)
        by_choice = model.choice_grad(KEYS[1], before, select("m"))[1]
        return by_choice, model.arg_grad(KEYS[1], before, 0)[1]

    before = start("traced")
    by_choice, by_x = gradients(before)
    c = values(before.strip(), 3)
    close(by_choice[3, "m"], -(np.float64(c["m",]) - c["a",]) / 1.3**2)
    close(by_x, call.bind(VARIABLES).arg_grad(KEYS[1], before, 0)[1])


@kinds
def test_to_the_reals_and_back(kind: str):
    old, new, as_given = at(kind)
    before = start(kind)
    c = values(before.strip(), old)
    model = call.bind(VARIABLES)
    free, log_det = model.unconstrain(before, AllSelection())
    softplus_inverse = np.log(np.expm1(np.float64(c["r",])))
    close(free[old, "r"], softplus_inverse)
    # The derivative of the inverse of softplus.
    want = -np.log(-np.expm1(-np.float64(c["r",])))
    close(log_det, want)
    choices, back = model.constrain(free, (X, as_given(old)))
    close(back, -want)
    for address, value in values(choices, old).items():
        close(value, c[address])
    part, log_det = model.unconstrain(before, select((old, "r")))
    assert part.get_subtree(old).addresses() == [("r",)]
    fixed = before.strip().filter(select((old, "a"), (old, "m")))
    choices, back = model.constrain(part, (X, as_given(old)), fixed=fixed)
    close(back, -log_det)
    close(choices[old, "r"], c["r",])
    if kind == "traced":
        compiled = jax.jit(lambda free, k: model.constrain(free, (X, k)))
        close(compiled(free, jnp.int32(3))[1], -want)
        assert np.isnan(compiled(free, jnp.int32(4))[1])
        with pytest.raises(SelectionError, match="not known while tracing"):
            jax.jit(lambda tr: tr.unconstrain(select((3, "r"))))(before)


# In other combinators ------------------------------------------------------------------------------------------------


@slow
def test_mapped_with_a_key_for_each():
    points = Map(ChoiceAt(Normal), in_axes=(0, None, 0))
    locs, keys = jnp.array([0.5, -1.0, 2.0]), jnp.array([4, 0, 4])
    args = (locs, 0.7, keys)
    _, before = points.simulate(KEYS[0], args)
    was = np.asarray(before.get_retval())
    close(before.get_score(), norm(was, locs, 0.7).sum())
    assert before[1, 0] == was[1] and before[2, 4] == was[2]
    # By element and key, and one array for all elements.
    _, (weight, tr) = points.importance(KEYS[1], {(1, 0): 0.25}, args)
    assert tr.get_retval()[1] == 0.25
    close(weight, norm(0.25, -1.0, 0.7))
    _, (weight, tr) = points.importance(KEYS[1], before.strip(), args)
    close(weight, before.get_score())
    np.testing.assert_array_equal(tr.get_retval(), was)
    # Two of three keys change.
    new_keys = jnp.array([4, 1, 5])
    _, (_, weight, after, discard) = points.update(KEYS[2], before, {}, (locs + 1.0, 0.7, new_keys))
    now = np.asarray(after.get_retval())
    assert (now == was).tolist() == [True, False, False]
    close(weight, norm(was[0], 1.5, 0.7) - norm(was, locs, 0.7).sum())
    flags = discard.get_value().flag
    np.testing.assert_array_equal(flags[:, 0], [False, True, True])
    _, (_, weight, back, _) = points.update(KEYS[2], after, discard, args)
    np.testing.assert_array_equal(back.get_retval(), was)
    close(weight, norm(was, locs, 0.7).sum() - norm(now, locs + 1.0, 0.7).sum())
    _, (_, ratio, after) = points.regenerate(KEYS[2], before, select(0), (locs, 0.7, new_keys))
    assert (np.asarray(after.get_retval()) == was).tolist() == [False, False, False]
    close(ratio, 0.0)
    _, (_, ratio, after) = points.regenerate(KEYS[2], before, NoneSelection(), (locs + 1.0, 0.7, new_keys))
    close(ratio, norm(was[0], 1.5, 0.7) - norm(was[0], 0.5, 0.7))


@slow
def test_a_map_at_a_key():
    call = CallAt(Map(Normal, in_axes=(0, None)))
    locs = jnp.array([0.5, -1.0, 2.0])
    _, before = call.simulate(KEYS[0], (locs, 0.7, 2))
    was = np.asarray(before.get_retval())
    for k in (2, jnp.int32(2)):
        _, (_, weight, after, discard) = call.update(KEYS[1], before, {(2, 1): 0.25}, (locs, 0.7, k))
        now = np.where(np.arange(3) == 1, 0.25, was)
        np.testing.assert_array_equal(after.get_retval(), now)
        close(weight, norm(now, locs, 0.7).sum() - norm(was, locs, 0.7).sum())
        np.testing.assert_array_equal(discard[2].flag, [False, True, False])
        _, (_, back_weight, back, _) = call.update(KEYS[1], after, discard, (locs, 0.7, k))
        np.testing.assert_array_equal(back.get_retval(), was)
        close(back_weight, -np.float64(weight))
    _, (_, weight, after, discard) = call.update(KEYS[1], before, {(5, 1): 0.25}, (locs, 0.7, 5))
    close(weight, norm(0.25, -1.0, 0.7) - norm(was, locs, 0.7).sum())
    np.testing.assert_array_equal(discard[2].flag, [True] * 3)
    np.testing.assert_array_equal(discard[2].value, was)
    _, (_, ratio, after) = call.regenerate(KEYS[1], before, select((2, 0)), (locs, 0.7, jnp.int32(2)))
    assert (np.asarray(after.get_retval()) == was).tolist() == [False, True, True]


@slow
def test_a_call_at_a_key_of_a_call_at_a_key():
    call = CallAt(ChoiceAt(Normal))
    _, before = call.simulate(KEYS[0], (0.0, 1.0, 3, 7))
    was = before[7, 3]
    for inner, outer in itertools.product((3, 4), (7, 8)):
        args = (0.0, 1.0, jnp.int32(inner), jnp.int32(outer))
        _, (_, weight, after, discard) = call.update(KEYS[1], before, {(outer, inner): 0.25}, args)
        close(weight, norm(0.25, 0, 1) - norm(was, 0, 1))
        assert after[outer, inner] == 0.25
        gone = discard[7, 3]
        assert gone.unmask(jnp.nan) == was
        _, (_, weight, after, discard) = call.update(KEYS[1], before, {}, args)
        stays = (inner, outer) == (3, 7)
        close(weight, 0.0 if stays else -norm(was, 0, 1))
        assert bool(after[outer, inner] == was) == stays
        assert np.isnan(discard[7, 3].unmask(jnp.nan)) == stays


@slow
def test_in_a_branch():
    """Also where the index, the key and the value change at once."""

    @gen
    def near(k):
        return trace("p", ChoiceAt(Normal))(0.0, 1.0, k)

    @gen
    def far(k):
        return trace("q", Normal)(3.0, 0.5)

    model = Switch((near, far))
    update = jax.jit(lambda tr, chm, i, k: model.update(KEYS[1], tr, chm, (i, k))[1])
    starts = {
        0: model.importance(KEYS[0], choice_map({("p", 2): 0.25}), (0, jnp.int32(2)))[1][1],
        1: model.importance(KEYS[0], choice_map({"q": 2.5}), (1, jnp.int32(2)))[1][1],
    }
    scores = {0: norm(0.25, 0, 1), 1: norm(2.5, 3, 0.5)}
    for old, new, k, g in itertools.product(range(2), range(2), (2, 4), (None, 2, 4)):
        constraints = choice_map({("p", g): 0.75, "q": 2.75} if g is not None else {"q": 2.75})
        _, weight, after, discard = update(starts[old], constraints, jnp.int32(new), jnp.int32(k))
        if new == 1:
            want = norm(2.75, 3, 0.5)
        elif g == k:
            want = norm(0.75, 0, 1)
            assert after["p", k].unmask(0.0) == 0.75
        else:
            # Kept where the branch and the key are as before, else drawn.
            kept = old == 0 and k == 2
            want = norm(0.25, 0, 1) if kept else 0.0
            assert bool(after["p", k].unmask(0.0) == 0.25) == kept
        close(weight, want - scores[old])
        lost = old == 0 and not (new == 0 and k == 2 and g != 2)
        shown = discard.get_subtree(("p", 2))
        assert bool(not shown.is_empty() and shown.get_value().flag) == lost
        assert bool("q" in discard and discard["q"].flag) == (old == 1)


@slow
@pytest.mark.parametrize("moved", [False, True])
def test_calls_of_the_steps_of_a_scan_in_a_branch(moved: bool):
    """Each step has a key of its own, which is not known while tracing: a branch left gives all of them up."""

    @gen
    def step(carry: Any, key: Any):
        return carry + trace("call", ChoiceAt(Normal))(carry, 1.0, key), ()

    chain = gen(lambda keys: trace("steps", gjflax.Scan(step))(0.5, keys)[0])
    model = gjflax.Cond(chain, gen(lambda keys: trace("other", Normal)(0.0, 2.0)))
    keys, values = jnp.array([4, 0, 7]), np.array([0.2, -0.4, 1.5])
    given = choice_map({("steps", i, "call", int(k)): v for i, (k, v) in enumerate(zip(keys, values, strict=True))})
    _, (_, old) = model.importance(KEYS[0], given, (True, keys))
    score = norm(values, 0.5 + np.cumsum(values) - values, 1.0).sum()
    np.testing.assert_allclose(old.get_score(), score, rtol=1e-5)

    new_args = (jnp.array(not moved), keys)
    _, (_, weight, new, discard) = jax.jit(
        lambda tr: model.update(KEYS[1], tr, {"other": 0.3} if moved else {}, new_args)
    )(old)
    np.testing.assert_allclose(weight, norm(0.3, 0.0, 2.0) - score if moved else 0.0, rtol=1e-5, atol=1e-6)
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        gone = discard["steps", i, "call", int(key)]
        assert bool(gone.flag) == moved
        np.testing.assert_allclose(gone.value, value, rtol=1e-6)
    _, (_, back, again, _) = model.update(KEYS[2], new, discard, (True, keys))
    np.testing.assert_allclose(back, -weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(again.get_score(), score, rtol=1e-5)


def test_behind_a_mask():
    model = Mask(ChoiceAt(Normal))
    _, before = model.simulate(KEYS[0], (True, 0.0, 1.0, jnp.int32(3)))
    was = before[3].value
    for flag, k in itertools.product((True, False), (3, 4)):
        _, (_, weight, after, discard) = model.update(
            KEYS[1], before, {4: 0.25}, (jnp.array(flag), 0.0, 1.0, jnp.int32(k))
        )
        want = 0.0 if not flag else norm(0.25, 0, 1) if k == 4 else norm(was, 0, 1)
        close(weight, want - norm(was, 0, 1))
        assert bool(discard[3].flag) == (not flag or k == 4)


@slow
def test_in_a_chain():
    """Every step writes at a key that the state says."""

    @gen
    def step(t, state, scale):
        x, k = state
        x = trace("x", ChoiceAt(Normal))(x, scale, k)
        return x, (k + 1) % 3

    chain = Unfold(step, 4)
    args = (4, (jnp.float32(0.5), jnp.int32(1)), 0.8)
    _, before = chain.simulate(KEYS[0], args)
    states = np.float64(before.get_retval()[0])
    close(before.get_score(), norm(states, [0.5, *states[:-1]], 0.8).sum())
    assert before[2, "x", 0] == np.float32(states[2])
    new_args = (4, (jnp.float32(0.5), jnp.int32(2)), 0.8)
    _, (_, weight, after, _) = chain.update(KEYS[1], before, {}, new_args)
    close(weight, -norm(states, [0.5, *states[:-1]], 0.8).sum())
    assert not np.any(np.float64(after.get_retval()[0]) == states)
    _, (_, weight, after, _) = chain.update(KEYS[1], before, {(2, "x", 0): 0.25}, args)
    now = np.where(np.arange(4) == 2, 0.25, states)
    close(weight, norm(now, [0.5, *now[:-1]], 0.8).sum() - norm(states, [0.5, *states[:-1]], 0.8).sum())


@slow
def test_batches_of_traces():
    keys = jnp.array([3, 5, 3])
    batch = jax.vmap(lambda key, k: call.bind(VARIABLES).simulate(key, (X, k))[1])(KEYS[:3], keys)
    assert batch.batch_shape == (3,) and batch.get_args()[1].tolist() == [3, 5, 3]
    choices = batch.strip().inner
    rows = [{a: choices[a][i, 0] for a in ADDRESSES} for i in range(3)]
    parts = [terms(row, X) for row in rows]
    close(batch.get_score(), [total(part) for part in parts])
    close(batch.project(select((3, "m"))), [parts[0]["m",], 0.0, parts[2]["m",]])

    def update(key: Any, tr: Any, k: Any) -> Any:
        return call.bind(VARIABLES).update(key, tr, given([("r",)], 5), (OTHER_X, k))[1][1:]

    new_keys = jnp.array([3, 5, 5])
    together = jax.vmap(update)(KEYS[3:6], batch, new_keys)
    for i in range(3):
        one = update(KEYS[3 + i], jax.tree.map(lambda leaf, i=i: leaf[i], batch), new_keys[i])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            jax.tree.map(lambda a, i=i: a[i], together),
            one,
        )


@slow
def test_gradients_of_a_weight_through_a_key_that_moves():
    """Under `jax.vmap` both branches run; the one that does not count must not spoil the gradient."""
    choice = ChoiceAt(Exponential)

    def weight(rate: Any, k: Any) -> Any:
        _, (_, before) = choice.importance(KEYS[0], {3: 0.5}, (2.0, 3))
        return choice.update(KEYS[1], before, VectorChoiceMap(jnp.array([4]), jnp.array([0.25])), (rate, k))[1][1]

    gradients = jax.vmap(jax.grad(weight), (None, 0))(jnp.float32(1.5), jnp.array([3, 4]))
    close(gradients, [1 / 1.5 - 0.5, 1 / 1.5 - 0.25])


# Flax ----------------------------------------------------------------------------------------------------------------


class Model(GenModule):
    """Two calls of one network at keys of their own, and a free one."""

    def setup(self):
        self.body = Body()

    @nn.compact
    def __call__(self, x, k):
        a = trace("a", CallAt(self.body))(x, k)
        b = trace("b", CallAt(self.body))(2.0 * x, "here")
        return a["sum"] + b["sum"] + trace("c", CallAt(Body()))(x, k + 1)["sum"]


@pytest.mark.slow
def test_parameters_have_the_paths_of_the_inner_function(no_leaks: Any):
    variables = no_leaks(lambda: call.init(jax.random.key(0), X, jnp.int32(3)))
    shapes = jax.tree.map(jnp.shape, variables)
    assert shapes == {"params": {"Dense_0": {"bias": (2,), "kernel": (3, 2)}}}
    assert shapes == jax.tree.map(jnp.shape, Body().init(jax.random.key(0), X))
    by_method = no_leaks(lambda: call.init(jax.random.key(0), KEYS[0], (X, 3), method="simulate"))
    assert jax.tree.map(jnp.shape, by_method) == shapes
    mapped = Map(CallAt(Body()), in_axes=(0, 0))
    assert jax.tree.map(jnp.shape, mapped.init(jax.random.key(0), X[None], jnp.array([3]))) == shapes


@slow
def test_calls_that_share_parameters(no_leaks: Any):
    variables = no_leaks(lambda: Model().init(jax.random.key(0), X, jnp.int32(3)))
    assert sorted(variables["params"]) == ["Body_0", "body"]
    model = Model().bind(variables)
    _, tr = model.simulate(KEYS[0], (X, jnp.int32(3)))
    assert tr["a", 3, "m"].shape == tr["b", "here", "m"].shape == tr["c", 4, "m"].shape == (2,)
    _, (_, weight, after, discard) = model.update(KEYS[1], tr, {("b", "here", "r"): 0.5}, (X, jnp.int32(4)))
    assert after["c", 5, "m"].shape == (2,) and discard["b", "here", "r"] == tr["b", "here", "r"]
    b = {a: tr["b", "here", *a] for a in ADDRESSES}
    body = {"params": variables["params"]["body"]}
    old = after["b"].filter(AllSelection())
    others = tr.project(select("a", "c"))
    close(weight, total(terms({**b, ("r",): 0.5}, 2 * X, body)) - total(terms(b, 2 * X, body)) - np.float64(others))
    assert not old.is_empty()


def test_a_layer_by_itself():
    value = call.apply(VARIABLES, X, 3, rngs={"choice": KEYS[0]})
    assert value["sum"].shape == ()
    _, (choices, score, _) = call.bind(VARIABLES).propose(KEYS[0], (X, 3))
    close(score, total(terms(values(choices, 3), X)))


@slow
def test_with_remat_inside_and_outside():
    for model in (CallAt(nn.remat(Body)()), nn.remat(CallAt)(Body())):
        variables = model.init(jax.random.key(0), X, 3)
        assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, VARIABLES)
        bound = model.bind(VARIABLES)
        _, before = bound.simulate(KEYS[0], (X, jnp.int32(3)))
        was = values(before.strip(), 3)
        close(before.get_score(), total(terms(was, X)))
        for k in (3, 4):
            _, (_, weight, after, _) = bound.update(KEYS[1], before, given([("m",)], k), (OTHER_X, jnp.int32(k)))
            parts = terms(values(after.strip(), k), OTHER_X)
            close(weight, total(parts, ADDRESSES if k == 3 else [("m",)]) - total(terms(was, X)))


def test_parameters_that_are_arguments_of_the_inner_function():
    @gen
    def inner(x, params):
        return trace("y", Normal)(params["slope"] * x, 0.5)

    model = CallAt(TrainCombinator(inner, {"slope": 2.0}))
    _, before = model.simulate(KEYS[0], (1.5, 3))
    y = before[3, "y"]
    for argdiffs in (before.get_args(), (1.5, jnp.int32(3))):
        _, (_, weight, after, _) = model.update(KEYS[1], before, {(3, "y"): 0.25}, argdiffs)
        close(weight, norm(0.25, 3.0, 0.5) - norm(y, 3.0, 0.5))
    _, gradient = model.choice_grad(KEYS[1], before, select((3, "y")))
    close(gradient[3, "y"], -(np.float64(y) - 3.0) / 0.25)


def test_discrete_choices_and_what_a_kernel_needs():
    choice = ChoiceAt(Bernoulli)
    _, (weight, before) = choice.importance(KEYS[0], {3: True}, (0.3, 3))
    close(weight, -np.logaddexp(0, -0.3))
    with pytest.raises(gjflax.DiscreteGradientError, match="discrete"):
        choice.choice_grad(KEYS[0], before, AllSelection())
    _, (_, _, after, _) = choice.update(KEYS[1], before, {5: False}, (0.3, 5))
    for accepted in (True, False):
        kept = gjflax.choose(jnp.array(accepted), after, before)
        assert bool(kept[5 if accepted else 3]) == (not accepted)


def test_vectors_with_indices_that_are_not_known():
    """A later value stays in its place where it is absent, and nothing else does."""

    @jax.jit
    def overwrite(ours: Any, theirs: Any, flag: Any) -> Any:
        one = VectorChoiceMap(ours, {"x": jnp.array([1.0, 2.0]), "y": jnp.array([3.0, 4.0])})
        return one.overwrite(VectorChoiceMap(theirs, {"x": Masked(jnp.array([5.0]), flag[None])}))

    for index, flag in itertools.product((0, 4, 6), (True, False)):
        both = overwrite(jnp.array([0, 4]), jnp.array([index]), jnp.array(flag))
        want = {(0, "x"): 1.0, (4, "x"): 2.0, (0, "y"): 3.0, (4, "y"): 4.0}
        want |= {(index, "x"): 5.0} if flag else {}
        for address, value in want.items():
            found = both[address]
            assert bool(found.flag) and found.value == value
        if index == 6:
            assert not both[6, "y"].flag and bool(both[6, "x"].flag) == flag
    known = VectorChoiceMap(jnp.array([4]), jnp.array([1.0]))
    assert 4 in known and 3 not in known and known.to_dict() == {4: 1.0}
    with pytest.raises(ChoiceMapError, match="not known while tracing"):
        jax.jit(lambda i: VectorChoiceMap(i, jnp.array([1.0])).merge(VectorChoiceMap([3], jnp.array([2.0]))))(
            jnp.array([4])
        )

"""`Dimap` against densities written by hand in NumPy, and what it knows of changes."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import gjflax
from gjflax import (
    ArgumentError,
    Diff,
    Dimap,
    Distribution,
    Exponential,
    GenModule,
    Map,
    Normal,
    TraceContextError,
    TrainCombinator,
    VectorChoiceMap,
    choose,
    gen,
    select,
    trace,
)

KEY = jax.random.key(0)
scored: list[str] = []


def norm(value: Any, loc: Any, scale: Any) -> float:
    return float(np.sum(stats.norm.logpdf(np.float64(value), np.float64(loc), np.float64(scale))))


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-5, atol=1e-5)


class Counted(Distribution):
    """A Normal that says whenever it is scored."""

    title: str

    def sample(self, key: Any, loc: Any, scale: Any) -> Any:
        return loc + scale * jax.random.normal(key, jnp.broadcast_shapes(jnp.shape(loc), jnp.shape(scale)))

    def logpdf(self, value: Any, loc: Any, scale: Any) -> Any:
        scored.append(self.title)
        return jax.scipy.stats.norm.logpdf(value, loc, scale)


@gen
def inner(locs, scale):
    a = trace("a", Counted("a"))(locs, 0.7)
    b = trace("b", Counted("b"))(0.2, scale)
    return {"a": a, "b": b}


def pre(shift, scale, flag):
    return (jnp.array([1.0, -2.0]) + shift, scale) if flag else (jnp.zeros(2), scale)


def post(args, inner_args, retval):
    return {"sum": retval["a"] * args[1], "b": retval["b"], "locs": inner_args[0]}


model = Dimap(inner, pre=pre, post=post)
ARGS = (jnp.float32(0.5), jnp.float32(1.5), True)


def density(choices: Any, args: Any) -> float:
    shift, scale, _ = args
    return norm(choices["a"], np.array([1.0, -2.0]) + np.float64(shift), 0.7) + norm(choices["b"], 0.2, scale)


def test_density_and_return_value_are_those_by_hand():
    _, tr = model.simulate(KEY, ARGS)
    close(tr.get_score(), density(tr, ARGS))
    assert tr.get_args()[:2] == ARGS[:2]
    retval = tr.get_retval()
    close(retval["sum"], tr["a"] * 1.5)
    close(retval["locs"], [1.5, -1.5])
    close(tr.project(select("b")), norm(tr["b"], 0.2, 1.5))
    choices = {"a": jnp.array([0.3, -1.0]), "b": 2.0}
    _, (again, score) = model.assess(KEY, choices, ARGS)
    close(score, density(choices, ARGS))
    close(again["sum"], [0.45, -1.5])
    _, (weight, tr) = model.importance(KEY, {"b": 2.0}, ARGS)
    close(weight, norm(2.0, 0.2, 1.5))
    assert isinstance(tr, gjflax.DimapTrace) and tr.get_gen_fn() == model
    assert model.argument_names() == ("shift", "scale", "flag")


@pytest.mark.parametrize(
    "choices, shift, scale, visited",
    [
        ({}, Diff.no_change(ARGS[0]), Diff.no_change(ARGS[1]), []),
        ({}, Diff.unknown_change(jnp.float32(2.0)), Diff.no_change(ARGS[1]), ["a"]),
        ({}, Diff.no_change(ARGS[0]), Diff.unknown_change(jnp.float32(0.6)), ["b"]),
        ({"b": 1.0}, Diff.no_change(ARGS[0]), Diff.no_change(ARGS[1]), ["b"]),
        ({"a": jnp.ones(2)}, Diff.no_change(ARGS[0]), Diff.unknown_change(jnp.float32(0.6)), ["a", "b"]),
    ],
)
def test_what_does_not_change_is_not_scored_again(choices: Any, shift: Any, scale: Any, visited: list[str]):
    """`pre` is staged out: an argument that it hands on, or computes of unchanged ones, is unchanged."""
    _, tr = model.simulate(KEY, ARGS)
    argdiffs = (shift, scale, Diff.no_change(True))
    scored.clear()
    _, (retdiff, weight, new, discard) = model.update(KEY, tr, choices, argdiffs)
    assert scored == visited
    args = Diff.primal(argdiffs)
    close(weight, density(new, args) - density(tr, ARGS))
    close(new.get_score(), density(new, args))
    assert sorted(discard.to_dict()) == sorted(choices)
    jax.tree.map(np.testing.assert_array_equal, new.get_args()[:2], args[:2])

    known = {name: Diff.is_unchanged(part) for name, part in retdiff.items()} if isinstance(retdiff, dict) else {}
    changed = {"a": "a" in choices, "b": "b" in choices, "shift": shift.change, "scale": scale.change}
    if known:
        assert known["b"] is (not changed["b"])
        assert known["locs"] is (shift.change is Diff.no_change)
        assert known["sum"] is (not changed["a"] and scale.change is Diff.no_change)
    else:
        assert visited == [] and Diff.is_unchanged(retdiff)
    jax.tree.map(np.testing.assert_array_equal, Diff.primal(retdiff), new.get_retval())

    _, (_, back_weight, back, _) = model.update(KEY, new, discard, ARGS)
    close(back_weight, -np.float64(weight))
    jax.tree.map(np.testing.assert_array_equal, back.strip(), tr.strip())
    close(back.get_score(), tr.get_score())


def test_a_flag_that_pre_branches_on_may_change():
    _, tr = model.simulate(KEY, ARGS)
    other = (*map(Diff.no_change, ARGS[:2]), Diff.unknown_change(False))
    _, (_, weight, new, _) = model.update(KEY, tr, {}, other)
    close(weight, norm(tr["a"], 0.0, 0.7) - norm(tr["a"], [1.5, -1.5], 0.7))
    _, (_, weight, _) = model.regenerate(KEY, tr, select("b"), other)
    close(weight, norm(tr["a"], 0.0, 0.7) - norm(tr["a"], [1.5, -1.5], 0.7))


def test_a_number_before_an_array_is_not_taken_for_it():
    """Integers are structure when `pre` is staged out, and leaves of the arguments all the same."""
    counted = Dimap(Normal, pre=lambda count, loc: (loc, 1.0 + count), post=lambda args, inner_args, x: x * args[0])
    _, tr = counted.simulate(KEY, (3, jnp.float32(1.0)))
    argdiffs = (Diff.no_change(3), Diff.unknown_change(jnp.float32(5.0)))
    _, (_, weight, new, _) = counted.update(KEY, tr, {}, argdiffs)
    close(weight, norm(tr.strip().get_value(), 5.0, 4.0) - norm(tr.strip().get_value(), 1.0, 4.0))
    _, (retdiff, weight, _, _) = counted.update(KEY, new, 2.0, tuple(map(Diff.no_change, (3, jnp.float32(5.0)))))
    close(weight, norm(2.0, 5.0, 4.0) - norm(tr.strip().get_value(), 5.0, 4.0))
    close(Diff.primal(retdiff), 6.0)


def test_a_shape_that_pre_computes_with_may_change():
    by_length = Dimap(Normal, pre=lambda xs: (0.0, jnp.float32(xs.shape[0])))
    _, tr = by_length.simulate(KEY, (jnp.zeros(2),))
    _, (_, weight, _, _) = by_length.update(KEY, tr, {}, (jnp.zeros(5),))
    value = tr.strip().get_value()
    close(weight, norm(value, 0.0, 5.0) - norm(value, 0.0, 2.0))


def test_functions_that_a_body_makes_may_hold_what_changed():
    @gen
    def body(x):
        scale = trace("scale", Exponential)(1.0)
        return trace("y", Dimap(Normal, pre=lambda x: (x, scale), post=lambda args, inner_args, y: y / scale))(x)

    x = jnp.float32(0.3)
    _, tr = body.simulate(KEY, (x,))
    for update in (body.update, jax.jit(body.update)):
        _, (retdiff, weight, new, _) = update(KEY, tr, {"scale": 2.0}, (Diff.no_change(x),))
        close(
            weight,
            stats.expon.logpdf(2.0)
            - stats.expon.logpdf(tr["scale"])
            + norm(tr["y"], x, 2.0)
            - norm(tr["y"], x, tr["scale"]),
        )
        close(Diff.primal(retdiff), tr["y"] / 2.0)
    _, (_, weight, new) = body.regenerate(KEY, tr, select("scale"), (Diff.no_change(x),))
    close(weight, norm(tr["y"], x, new["scale"]) - norm(tr["y"], x, tr["scale"]))


@pytest.mark.slow
def test_elements_that_change_are_known_through_it():
    points = Dimap(
        Map(Counted("x"), in_axes=(0, None)), pre=lambda locs, scale: (locs, scale), post=lambda args, inner_args, x: x
    )
    locs = jnp.arange(4.0)
    args = (locs, jnp.float32(0.5))
    _, tr = points.simulate(KEY, args)
    moved = Diff.of_elements(locs.at[2].set(9.0), jnp.array([2]))
    argdiffs = (moved, Diff.no_change(args[1]))
    chosen = VectorChoiceMap([2], jnp.array([8.5]))
    _, (retdiff, weight, new, discard) = points.update(KEY, tr, chosen, argdiffs)
    assert retdiff.indices is not None and float(new.get_retval()[2]) == 8.5
    values = np.asarray(tr.strip().get_value())
    close(weight, norm(8.5, 9.0, 0.5) - norm(values[2], 2.0, 0.5))
    close(new.get_score(), norm(np.where(np.arange(4) == 2, 8.5, values), [0, 1, 9, 3], 0.5))
    accepted = choose(jnp.array(True), new, tr)
    jax.tree.map(np.testing.assert_array_equal, accepted, new)
    jax.tree.map(np.testing.assert_array_equal, choose(jnp.array(False), new, tr), tr)


@pytest.mark.slow
def test_updates_in_a_loop_keep_the_type_and_the_score():
    _, tr = model.simulate(KEY, ARGS)
    traces = 0

    @jax.jit
    def step(key, tr, b, shift):
        nonlocal traces
        traces += 1
        key, (_, weight, new, _) = model.update(
            key, tr, {"b": b}, (shift, Diff.no_change(ARGS[1]), Diff.no_change(True))
        )
        key, (_, _, newer) = model.regenerate(
            key, new, select("a"), tuple(map(Diff.no_change, new.get_args()[:2])) + (True,)
        )
        return key, weight, new, choose(weight > 0, newer, new)

    key, current, shift = KEY, tr, ARGS[0]
    for b, new_shift in ((1.0, 0.3), (2.0, -0.4), (-1.0, 1.0)):
        key, weight, new, after = step(key, current, jnp.float32(b), jnp.float32(new_shift))
        close(weight, density(new, (new_shift, 1.5, True)) - density(current, (shift, 1.5, True)))
        close(after.get_score(), density(after, (new_shift, 1.5, True)))
        current, shift = after, new_shift
    assert traces == 1


@pytest.mark.slow
def test_gradients_go_through_pre():
    _, tr = model.simulate(KEY, ARGS)
    a, b = np.asarray(tr["a"], np.float64), float(tr["b"])
    _, (of_shift, of_scale) = model.arg_grad(KEY, tr, (0, 1))
    close(of_shift, np.sum((a - [1.5, -1.5]) / 0.7**2))
    close(of_scale, ((b - 0.2) ** 2 / 1.5**2 - 1) / 1.5)
    _, grads = model.choice_grad(KEY, tr, select("a"))
    close(grads["a"], -(a - [1.5, -1.5]) / 0.7**2)
    _, score, retval = model.unzip(KEY, {"a": tr["a"]})
    close(jax.grad(score)({"b": jnp.float32(b)}, *ARGS)["b"], -(b - 0.2) / 1.5**2)
    close(jax.jacobian(lambda scale: retval({"b": 1.0}, ARGS[0], scale, True)["sum"])(ARGS[1]), a)


def test_constrain_goes_by_the_inner_arguments():
    waiting = Dimap(Exponential, pre=lambda log_rate: (jnp.exp(log_rate),))
    _, tr = waiting.simulate(KEY, (0.3,))
    unconstrained, log_det = waiting.unconstrain(tr, gjflax.AllSelection())
    choices, back = waiting.constrain(unconstrained, (0.3,))
    close(choices.get_value(), tr.get_retval())
    close(back, -np.float64(log_det))


class Net(GenModule):
    @nn.compact
    def __call__(self, x):
        return trace("y", Normal)(nn.Dense(2)(x), 0.5)


@pytest.mark.slow
def test_a_network_has_the_parameters_that_it_has_alone(no_leaks):
    x = jnp.arange(3.0)
    shifted = Dimap(Net(), pre=lambda x, shift: (x + shift,))
    alone = Net().init(KEY, x)
    made = no_leaks(lambda: shifted.init(KEY, x, 1.0))
    jax.tree.map(np.testing.assert_array_equal, made, alone)
    _, tr = shifted.bind(made).simulate(KEY, (x, 1.0))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), alone["params"]["Dense_0"])

    def mean(inputs: Any, params: Any) -> Any:
        return inputs @ params["kernel"] + params["bias"]

    close(tr.get_score(), norm(tr["y"], mean(np.arange(3) + 1.0, params), 0.5))
    moved = jax.tree.map(lambda leaf: leaf + 0.1, made)
    other = shifted.bind(moved)
    _, (_, weight, _, _) = other.update(KEY, tr, {}, tuple(map(Diff.no_change, (x, 1.0))))
    want = norm(tr["y"], mean(np.arange(3) + 1.0, jax.tree.map(lambda p: p + 0.1, params)), 0.5) - float(tr.get_score())
    close(weight, want)
    close(Map(shifted, in_axes=(0, None)).init(KEY, x[None], 1.0)["params"]["Dense_0"]["kernel"], params["kernel"])


@pytest.mark.slow
def test_a_learned_inner_function_keeps_its_parameters():
    """A trace brings them along, also where the arguments go through `pre`."""

    @gen(TrainCombinator, params={"mu": 0.5})
    def learned(x, params):
        return trace("y", Normal)(x + params["mu"], 1.0)

    doubled = Dimap(learned, pre=lambda x: (2.0 * x,))
    bound = doubled.bind({"params": {"mu": jnp.float32(3.0)}})
    _, tr = bound.simulate(KEY, (1.0,))
    close(tr.get_score(), norm(tr["y"], 5.0, 1.0))
    for diffs in ((Diff.no_change(1.0),), (Diff.unknown_change(2.0),)):
        _, (_, weight, _, _) = doubled.update(KEY, tr, {}, diffs)
        loc = 2.0 * Diff.primal(diffs)[0] + 3.0
        close(weight, norm(tr["y"], loc, 1.0) - norm(tr["y"], 5.0, 1.0))
    _, logpdf = doubled.score_params(KEY, tr, {"mu": jnp.float32(1.0)})
    close(logpdf, norm(tr["y"], 3.0, 1.0))


def test_one_program_is_one_type_of_trace():
    def made() -> Any:
        return gen(lambda: trace("y", Dimap.map_retval(Normal, lambda y: 2.0 * y))(0.0, 1.0))

    body = made()
    _, first = body.simulate(KEY, ())
    _, second = body.simulate(KEY, ())
    assert jax.tree.structure(first) == jax.tree.structure(second)
    close(first.get_retval(), 2.0 * first["y"])


def test_map_retval_and_defaults():
    double = Dimap.map_retval(Normal, lambda x: 2.0 * x)
    _, (retval, score) = double.assess(KEY, 1.5, (0.5, 2.0))
    close(retval, 3.0)
    close(score, norm(1.5, 0.5, 2.0))
    _, (retval, score) = Dimap(Normal).assess(KEY, 1.5, (0.5, 2.0))
    close(retval, 1.5)
    assert double.argument_names() == Normal.argument_names()
    partly = Dimap(Normal, pre=functools.partial(lambda scale, loc: (loc, scale), 2.0))
    close(partly.assess(KEY, 1.5, (0.5,))[1][1], score)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: Dimap(lambda x: x), "generative function.*@gen"),
        (lambda: Dimap(Normal, pre=3), "`pre` of a `Dimap` is a function; got 3"),
        (lambda: Dimap(Normal, post=nn.Dense(3)), "`post`.*without parameters.*Dense"),
        (lambda: Dimap(Normal, pre=nn.Dense), "`pre`.*without parameters"),
        (lambda: Dimap(Normal, post=lambda retval: retval), "three arguments.*map_retval"),
        (lambda: Dimap.map_retval(Normal, 2.0), "`function` of a `Dimap` is a function; got 2.0"),
    ],
)
def test_fields_are_checked(make: Any, match: str):
    with pytest.raises(ArgumentError, match=match):
        make()


def test_errors_name_the_address():
    def run(dimap: Any) -> Any:
        return gen(lambda: trace("d", dimap)(1.0)).simulate(KEY, ())

    with pytest.raises(ArgumentError, match=r'`pre` of the Dimap at "d" returned a Array.*\(x,\)'):
        run(Dimap(Normal, pre=lambda x: jnp.asarray(x)))
    with pytest.raises(ArgumentError, match=r'`pre` of the Dimap at "d" does not take the 1 arguments'):
        run(Dimap(Normal, pre=lambda x, y: (x, y)))
    with pytest.raises(TypeError, match="unsupported operand"):
        run(Dimap(Normal, pre=lambda x: (x + "a", 1.0)))
    with pytest.raises(TraceContextError, match='trace."z", .*where no generative function is running'):
        run(Dimap(Normal, pre=lambda x: (trace("z", Normal)(x, 1.0), 1.0)))

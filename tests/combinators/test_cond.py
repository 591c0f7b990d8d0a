"""`Cond` and `OrElse` against densities by hand. What they share with `Switch` stands in its tests."""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.branches import KEY, KEYS, X, close, leaf_types, norm, same, total, values
from scipy import stats

from gjflax import (
    AllSelection,
    ArgumentError,
    BranchMismatchError,
    Cond,
    Diff,
    Exponential,
    GenModule,
    Laplace,
    Map,
    Normal,
    OrElse,
    Switch,
    UnvisitedConstraintError,
    choose,
    gen,
    select,
    trace,
)


@gen
def spread(loc):
    scale = trace("scale", Exponential)(1.5)
    return trace("y", Normal)(loc + jnp.array([0.0, 2.0]), 0.4 + scale)


@gen
def tight(loc):
    return trace("y", Normal)(-loc * jnp.ones(2), 0.7) + trace("tail", Laplace)(loc, 1.3)


@gen
def tight_at(loc, scale):
    return trace("y", Normal)(-loc * jnp.ones(2), scale) + trace("tail", Laplace)(loc, 1.3)


cond, or_else = Cond(spread, tight), OrElse(spread, tight_at)
GIVEN = {"y": jnp.array([0.3, -0.8])}
FLIPS = list(itertools.product([True, False], [True, False]))
# For each combinator the arguments after the flag, and what they mean: the location of each branch, the second's scale.
CASES = {
    "Cond": (cond, ((0.5,), (-1.2,)), lambda loc: (loc, loc, 0.7)),
    "OrElse": (or_else, (((0.5,), (0.9, 2.0)), ((-1.2,), (0.2, 0.6))), lambda one, other: (one[0], *other)),
}


def terms(c: dict[Any, Any], flag: bool, first: float, second: float, scale: float) -> dict[Any, np.ndarray]:
    y = np.float64(c["y",])
    if flag:
        width = np.float64(c["scale",])
        return {
            ("scale",): stats.expon.logpdf(width, scale=1 / 1.5),
            ("y",): norm(y, first + np.array([0.0, 2.0]), 0.4 + width),
        }
    return {
        ("y",): norm(y, -second, scale),
        ("tail",): stats.laplace.logpdf(np.float64(c["tail",]), second, 1.3),
    }


@pytest.mark.parametrize("name", [pytest.param("Cond", marks=pytest.mark.slow), "OrElse"])
def test_density_update_and_regenerate(name: str):
    """Every flip of the flag: what is shared is kept, what is of one branch comes and goes."""
    model, (args, other), meaning = CASES[name]

    @jax.jit
    def run(flag, flipped):
        _, tr = model.simulate(KEYS[0], (flag, *args))
        _, (_, score) = model.assess(KEY, tr.strip(), (flag, *args))
        _, (_, weight, new, discard) = model.update(KEYS[1], tr, {}, (flipped, *other))
        _, (_, back_weight, back, _) = model.update(KEYS[1], new, discard, (flag, *args))
        _, (_, given_weight, given, _) = model.update(KEYS[1], tr, GIVEN, (flipped, *other))
        _, (_, redrawn_weight, redrawn) = model.regenerate(KEYS[1], tr, select("y"), (flipped, *other))
        return (
            (tr, score),
            (weight, new, discard),
            (back_weight, back),
            (given_weight, given),
            (redrawn_weight, redrawn),
        )

    names = {True: {("scale",), ("y",)}, False: {("tail",), ("y",)}}
    for old, new in FLIPS:
        (tr, score), (weight, moved, discard), (back_weight, back), (given_weight, given), redrawn = run(old, new)
        was, now = values(tr.strip()), values(moved.strip())
        assert was.keys() == names[old] and now.keys() == names[new]
        before = terms(was, old, *meaning(*args))
        after = terms(now, new, *meaning(*other))
        close(tr.get_score(), total(before))
        close(score, total(before))
        shared = now.keys() & was.keys()
        same({a: now[a] for a in shared}, {a: was[a] for a in shared})
        close(weight, total(after, of=shared) - total(before))
        close(moved.get_score(), total(after))
        same(values(discard), {a: value for a, value in was.items() if a not in now})
        same(values(back.strip()), was)
        close(back_weight, total(before) - total(after))
        close(back.get_score(), total(before))

        now = values(given.strip())
        np.testing.assert_array_equal(now["y",], GIVEN["y"])
        close(given_weight, total(terms(now, new, *meaning(*other)), of=shared | {("y",)}) - total(before))

        now = values(redrawn[1].strip())
        assert not np.any(now["y",] == was["y",])
        kept = shared - {("y",)}
        close(redrawn[0], total(terms(now, new, *meaning(*other)), of=kept) - total(before, of=kept))
        assert leaf_types(tr) == leaf_types(moved) == leaf_types(given) == leaf_types(redrawn[1])


def test_a_cond_is_a_switch():
    switch = Switch((tight, spread))
    for flag in (True, False):
        _, one = cond.importance(KEYS[0], GIVEN, (jnp.array(flag), 0.5))
        _, other = switch.importance(KEYS[0], GIVEN, (jnp.int32(flag), 0.5))
        close(one[0], np.float64(other[0]))
        same(values(one[1].strip()), values(other[1].strip()))


def test_one_argument_of_a_branch_that_did_not_change():
    _, tr = or_else.simulate(KEY, (True, (0.5,), (0.9, 2.0)))
    flag, first, second = tr.get_args()
    unchanged = Diff.no_change(flag), Diff.no_change(first), Diff.no_change(second)
    _, (retdiff, weight, new, _) = or_else.update(KEY, tr, {}, unchanged)
    assert new is tr and weight == 0.0 and retdiff.change is Diff.no_change
    _, (_, weight, new, _) = or_else.update(KEY, tr, {}, (*unchanged[:2], (Diff.unknown_change(1.5), 0.5)))
    # The arguments of the branch that is not taken.
    close(weight, 0.0)
    assert new.get_args()[2] == (1.5, 0.5)


@pytest.mark.slow
def test_mh_on_the_predicate_samples_its_posterior():
    @gen
    def model():
        kind = trace("kind", Normal)(0.0, 1.0)
        return trace("y", Cond(Normal, Laplace))(kind > 0.4, 1.0, 0.8)

    y = -1.5
    _, (_, tr) = model.importance(KEY, {"y": y, "kind": 1.0}, ())

    def chain(key):
        def step(tr, key):
            one, two = jax.random.split(key)
            _, (_, weight, new) = model.regenerate(one, tr, select("kind"), ())
            return choose(jnp.log(jax.random.uniform(two)) < weight, new, tr), None

        return jax.lax.scan(step, tr, jax.random.split(key, 25))[0]["kind"]

    kinds = jax.jit(jax.vmap(chain))(jax.random.split(KEYS[1], 2000))
    prior = stats.norm.sf(0.4)
    joint = np.array([1 - prior, prior]) * np.exp([stats.laplace.logpdf(y, 1.0, 0.8), stats.norm.logpdf(y, 1.0, 0.8)])
    exact = joint[1] / joint.sum()
    # The last states of 2000 independent chains, within 4 standard errors.
    assert abs(np.mean(np.asarray(kinds) > 0.4) - exact) < 4 * np.sqrt(exact * (1 - exact) / 2000)


@pytest.mark.slow
def test_a_flag_for_each_element():
    each = Map(OrElse(Normal, Laplace), in_axes=(0, (0, None), (None, 0)))
    flags, xs, scales = jnp.array([True, False, True]), jnp.array([0.0, 1.0, 2.0]), jnp.array([0.5, 1.0, 1.5])
    args = (flags, (xs, 0.8), (-1.0, scales))
    _, tr = each.simulate(KEY, args)
    y = np.float64(tr.get_retval())

    def densities(flags):
        return np.where(flags, norm(y, xs, 0.8), stats.laplace.logpdf(y, -1.0, np.float64(scales)))

    close(tr.get_score(), densities(np.asarray(flags)).sum())
    _, (_, weight, new, discard) = each.update(KEY, tr, {}, (~flags, *args[1:]))
    np.testing.assert_array_equal(new.get_retval(), tr.get_retval())
    close(weight, (densities(~np.asarray(flags)) - densities(np.asarray(flags))).sum())
    assert not values(discard)


class Net(GenModule):
    width: int

    @nn.compact
    def __call__(self, x):
        return trace("y", Normal)(nn.Dense(2)(nn.tanh(nn.Dense(self.width)(x))), 0.5)


def test_the_parameters_of_both_branches(no_leaks: Any):
    def shapes(model, *args):
        return no_leaks(lambda: jax.tree.map(jnp.shape, jax.eval_shape(lambda: model.init(KEY, *args))))

    for model, args, names in (
        (Cond(Net(2), Net(3)), (X,), ("then", "otherwise")),
        (OrElse(Net(2), Net(3)), ((X,), (X,)), ("first", "second")),
    ):
        params = shapes(model, True, *args)["params"]
        assert params == shapes(model, jnp.array(False), *args)["params"]
        assert params.keys() == set(names)
        assert [params[name]["Dense_1"]["kernel"] for name in names] == [(3, 2), (3, 3)]


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [0, 1.0, None, jnp.array(1), jnp.array([True])], ids=str)
def test_a_wrong_flag(flag: Any):
    for model, args, name in ((cond, (0.5,), "Cond"), (or_else, ((0.5,), (0.5, 1.0)), "OrElse")):
        with pytest.raises(ArgumentError, match=f'{name} at "c" is one boolean'):
            jax.eval_shape(lambda m=model, a=args: gen(lambda: trace("c", m)(flag, *a)).simulate(KEY, ()))


def test_other_bad_input():
    with pytest.raises(ArgumentError, match="`Cond` takes generative functions.*Is @gen missing"):
        Cond(spread, abs)
    with pytest.raises(ArgumentError, match="`OrElse` takes generative functions"):
        OrElse(None, spread)
    with pytest.raises(ArgumentError, match="takes a boolean as its first argument"):
        cond.simulate(KEY, ())
    with pytest.raises(ArgumentError, match="one tuple of arguments for each branch, 2 in all; got 1"):
        or_else.simulate(KEY, (True, (0.5,)))
    with pytest.raises(ArgumentError, match="one tuple of arguments for each branch.*got float"):
        or_else.simulate(KEY, (True, 0.5, 0.5))
    with pytest.raises(BranchMismatchError, match=r"Cond at the root return different things"):
        Cond(gen(lambda x: x), spread).simulate(KEY, (True, 0.5))
    _, tr = cond.simulate(KEY, (True, 0.5))
    with pytest.raises(UnvisitedConstraintError, match='"tail".*not a choice of branch 0.*that one is taken'):
        cond.update(KEY, tr, {"tail": 0.0}, (True, 0.5))
    with pytest.raises(UnvisitedConstraintError, match='"tial".*Did you mean "tail"'):
        or_else.importance(KEY, {"tial": 0.0}, (jnp.array(True), (0.5,), (0.5, 1.0)))
    assert Cond(spread, tight) == cond and Cond(tight, spread) != cond
    assert leaf_types(cond.regenerate(KEY, tr, AllSelection(), (False, 0.5))[1][2]) == leaf_types(tr)

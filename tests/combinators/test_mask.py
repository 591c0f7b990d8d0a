"""`Mask` against densities by hand: what is there, what each change of the flag adds to a weight, and what runs."""

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
    Diff,
    Exponential,
    GenModule,
    Map,
    Mask,
    Masked,
    MissingChoiceError,
    Normal,
    UnvisitedConstraintError,
    choice_map,
    gen,
    select,
    trace,
)


@gen
def inner(x):
    scale = trace("scale", Exponential)(2.0)
    y = trace("y", Normal)(x, 0.3 + scale)
    trace("each", Map(Normal, in_axes=(0, None)))(y, 0.8)
    return {"sum": jnp.sum(y), "scale": scale}


mask = Mask(inner)
LOC, OTHER_LOC = jnp.array([0.5, -1.0]), jnp.array([2.0, 0.3])
ADDRESSES = [("scale",), ("y",), ("each",)]
GIVEN = {"scale": jnp.float32(0.6), "y": jnp.array([0.1, 1.4]), "each": jnp.array([-0.3, 0.9])}
FLAGS = list(itertools.product([True, False], [True, False]))


def terms(c: dict[Any, Any], x: Any) -> dict[Any, np.ndarray]:
    """Of what is there: nothing where the flag is false."""
    if not c:
        return {}
    scale, y, each = (np.float64(c[address]) for address in ADDRESSES)
    return {
        ("scale",): stats.expon.logpdf(scale, scale=0.5),
        ("y",): norm(y, x, 0.3 + scale),
        ("each",): norm(each, y, 0.8),
    }


@jax.jit
def simulate(key: Any, flag: Any, x: Any) -> Any:
    return mask.simulate(key, (flag, x))[1]


@jax.jit
def update(key: Any, tr: Any, choices: Any, flag: Any, x: Any) -> Any:
    _, (retdiff, weight, new, discard) = mask.update(key, tr, choices, (flag, x))
    return Diff.primal(retdiff), weight, new, discard


@pytest.mark.parametrize("flag", [True, False])
def test_the_choices_are_there_where_the_flag_is_true(flag: bool):
    tr = simulate(KEYS[0], flag, LOC)
    here = values(tr.strip())
    assert here.keys() == (set(ADDRESSES) if flag else set())
    parts = terms(here, LOC)
    close(tr.get_score(), total(parts))
    for address in ADDRESSES:
        close(tr.project(select(address)), total(parts, of=[address]))
        assert isinstance(tr.strip().get_subtree(address).get_value(), Masked)
    retval = tr.get_retval()
    assert isinstance(retval, Masked) and retval.flag == flag
    if flag:
        close(retval.value["sum"], here["y",].sum())
    _, (again, score) = mask.assess(KEY, tr.strip(), tr.get_args())
    close(score, total(parts))
    assert again.flag == flag
    static = mask.simulate(KEYS[0], (flag, LOC))[1]
    assert leaf_types(static) == leaf_types(tr), "a static flag gives the trace of a traced one"
    assert leaf_types(simulate(KEYS[0], not flag, LOC)) == leaf_types(tr)


def test_constraints_weigh_where_the_flag_is_true():
    run = jax.jit(lambda flag, choices: mask.importance(KEY, choices, (flag, LOC))[1])
    weight, tr = run(jnp.array(True), {"y": GIVEN["y"]})
    here = values(tr.strip())
    close(weight, terms(here, LOC)["y",].sum())
    np.testing.assert_array_equal(here["y",], GIVEN["y"])
    weight, tr = run(jnp.array(False), {"y": GIVEN["y"]})
    assert weight == 0.0 and tr.get_score() == 0.0 and not values(tr.strip())


@pytest.mark.parametrize("old, new", FLAGS)
@pytest.mark.parametrize("names", [(), pytest.param(("y",), marks=pytest.mark.slow), ("scale", "y", "each")], ids=str)
def test_update_of_flag_and_choices(old: bool, new: bool, names: tuple[str, ...]):
    """Choices that appear add what is given, those that go their old score; and back it is minus that."""
    before = simulate(KEYS[0], old, LOC)
    given = choice_map({name: GIVEN[name] for name in names})
    retval, weight, after, discard = update(KEYS[1], before, given, new, OTHER_LOC)
    was, now = values(before.strip()), values(after.strip())
    old_terms, new_terms = terms(was, LOC), terms(now, OTHER_LOC)
    drawn = now.keys() - was.keys() - {(name,) for name in names}
    close(weight, total(new_terms) - total(new_terms, of=drawn) - total(old_terms))
    close(after.get_score(), total(new_terms))
    same(values(discard), {a: v for a, v in was.items() if a not in now or a[0] in names})
    assert leaf_types(after) == leaf_types(before)
    assert retval.flag == new

    _, back_weight, back, _ = update(KEYS[2], after, discard, old, LOC)
    same(values(back.strip()), was)
    close(back_weight, total(old_terms) - total(new_terms))
    close(back.get_score(), before.get_score())


@pytest.mark.parametrize("old, new", FLAGS)
def test_regenerate_adds_what_is_kept(old: bool, new: bool):
    before = simulate(KEYS[0], old, LOC)
    run = jax.jit(lambda tr, flag: mask.regenerate(KEYS[1], tr, select("y"), (flag, OTHER_LOC))[1][1:])
    weight, after = run(before, new)
    was, now = values(before.strip()), values(after.strip())
    kept = {("scale",), ("each",)} if old and new else set()
    close(weight, total(terms(now, OTHER_LOC), of=kept) - total(terms(was, LOC), of=kept))
    close(after.get_score(), total(terms(now, OTHER_LOC)))
    same({a: now[a] for a in kept}, {a: was[a] for a in kept})
    if old and new:
        assert not np.any(now["y",] == was["y",])


def test_flags_in_a_row_add_up():
    """The scores that updates leave behind are those that the next ones start from."""

    def step(carry, inputs):
        tr, weights = carry
        flag, shift = inputs
        given = {name: value + shift if name != "scale" else value for name, value in GIVEN.items()}
        _, (_, weight, tr, _) = mask.update(KEY, tr, given, (flag, LOC * shift))
        return (tr, weights + weight), weight

    tr = simulate(KEYS[0], True, LOC)
    flags = jnp.array([False, True, True, False, False, True])
    shifts = jnp.linspace(-1.0, 1.0, 6)
    (last, weights), each = jax.jit(lambda tr: jax.lax.scan(step, (tr, 0.0), (flags, shifts)))(tr)
    here = values(last.strip())
    np.testing.assert_allclose(here["y",], GIVEN["y"] + 1.0, rtol=1e-6)
    close(last.get_score(), total(terms(here, LOC)))
    close(weights, total(terms(here, LOC)) - np.float64(tr.get_score()))
    assert each[4] == 0.0


def test_what_is_kept_is_not_run_again():
    tr = simulate(KEYS[0], True, LOC)
    flag, x = tr.get_args()
    key, (retdiff, weight, new, discard) = mask.update(KEY, tr, {}, (Diff.no_change(flag), Diff.no_change(x)))
    assert new is tr and weight == 0.0 and discard.is_empty() and key is KEY
    assert retdiff.change is Diff.no_change
    _, (_, weight, new, discard) = mask.update(KEY, tr, {"y": GIVEN["y"]}, (Diff.no_change(flag), Diff.no_change(x)))
    was, now = values(tr.strip()), values(new.strip())
    close(weight, total(terms(now, LOC)) - total(terms(was, LOC)))
    same(values(discard), {("y",): was["y",]})


@pytest.mark.parametrize("compiled", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_inner_function_runs_only_where_the_flag_is_true(compiled: bool):
    runs = []

    @gen
    def counted(x):
        jax.debug.callback(lambda: runs.append(1))
        return trace("y", Normal)(x, 1.0)

    maybe = Mask(counted)
    simulate = lambda flag: maybe.simulate(KEY, (flag, 0.5))[1]
    run = jax.jit(simulate) if compiled else simulate
    for flag in (False, True):
        runs.clear()
        jax.block_until_ready(run(jnp.array(flag)).get_score())
        jax.effects_barrier()
        assert bool(runs) == flag


# Inside of others ----------------------------------------------------------------------------------------------------


def test_mapped_it_is_missing_data():
    each = Map(Mask(Normal), in_axes=(0, 0, None))
    flags, xs = jnp.array([True, False, True, False]), jnp.array([0.5, 1.0, -2.0, 3.0])
    _, tr = jax.jit(lambda key: each.simulate(key, (flags, xs, 1.7)))(KEY)
    y = tr.strip().get_value()
    np.testing.assert_array_equal(y.flag, flags)
    densities = norm(y.value, xs, 1.7)
    close(tr.get_score(), densities[[0, 2]].sum())
    flipped = ~flags.at[0].set(False)
    run = jax.jit(lambda tr, given: each.update(KEYS[1], tr, given, (flipped, xs, 0.6))[1][1:])
    weight, new, discard = run(tr, jnp.arange(4.0))
    np.testing.assert_array_equal(new.strip().get_value().value[flipped], np.arange(4.0)[flipped])
    close(weight, norm(np.arange(4.0), xs, 0.6)[np.asarray(flipped)].sum() - densities[[0, 2]].sum())
    np.testing.assert_array_equal(discard.get_value().flag, flags)
    back_weight, back, _ = jax.jit(lambda tr, given: each.update(KEYS[1], tr, given, (flags, xs, 1.7))[1][1:])(
        new, discard
    )
    close(back_weight, -np.float64(weight))
    np.testing.assert_array_equal(back.strip().get_value().unmask(0.0), y.unmask(0.0))


def test_one_mask_in_another():
    twice = Mask(Mask(Normal))
    for outer, inner_flag in FLAGS:
        _, tr = twice.simulate(KEY, (outer, inner_flag, 0.5, 1.7))
        choice, retval = tr.strip().get_value(), tr.get_retval()
        there = outer and inner_flag
        assert choice.flag == there
        assert retval.flag == outer and (not outer or retval.value.flag == inner_flag)
        close(tr.get_score(), norm(choice.value, 0.5, 1.7) if there else 0.0)


def test_a_batch_of_flags():
    flags = jnp.array([True, False, True])
    keys = jax.random.split(KEY, 3)

    def run(key, flag):
        _, tr = mask.simulate(key, (flag, LOC))
        _, (_, weight, new, _) = mask.update(key, tr, {"y": GIVEN["y"]}, (~flag, OTHER_LOC))
        return tr.get_score(), weight, new.get_score(), new.strip()

    batched = jax.jit(jax.vmap(run))(keys, flags)
    alone = jax.jit(run)
    for i in range(3):
        pairs = jax.tree.map(lambda leaf, i=i: leaf[i], batched), alone(keys[i], flags[i])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *pairs)


class Net(GenModule):
    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(use_running_average=False)(nn.Dense(2)(x)[None])[0]
        return trace("y", Normal)(h, 0.5)


def test_the_parameters_are_those_of_the_inner_function_whatever_the_flag(no_leaks: Any):
    maybe = Mask(Net())
    shapes = [
        no_leaks(lambda f=f: jax.tree.map(jnp.shape, jax.eval_shape(lambda: maybe.init(KEY, f, X))))
        for f in (False, True)
    ]
    assert shapes[0] == shapes[1] == jax.tree.map(jnp.shape, jax.eval_shape(lambda: Net().init(KEY, X)))
    variables = jax.jit(lambda: maybe.init(KEY, False, X))()
    run = jax.jit(lambda flag: maybe.apply(variables, KEY, (flag, X), method="simulate", mutable=["batch_stats"]))
    for flag in (True, False):
        (_, tr), written = run(flag)
        moved = jax.tree.map(lambda a, b: np.any(a != b), written["batch_stats"], variables["batch_stats"])
        assert any(jax.tree.leaves(moved)) == flag, "what is left out writes nothing"
        assert bool(tr.get_score() != 0.0) == flag
    remat = nn.remat(Mask)(Net())
    _, other = remat.bind(variables, mutable=["batch_stats"]).simulate(KEY, (True, X))
    _, tr = maybe.bind(variables, mutable=["batch_stats"]).simulate(KEY, (True, X))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), tr.strip(), other.strip())


@pytest.mark.parametrize("flag", [True, False])
def test_gradients(flag: bool):
    tr = simulate(KEYS[0], flag, LOC)
    here = values(tr.strip())
    grads = jax.jit(lambda tr: mask.choice_grad(KEY, tr, select("y"))[1])(tr)["y"]
    assert np.all(grads.flag == flag)
    _, in_x = jax.jit(lambda tr: mask.arg_grad(KEY, tr, 1))(tr)
    if not flag:
        assert np.all(grads.value == 0.0) and np.all(in_x == 0.0)
        return
    scale, y, each = (np.float64(here[address]) for address in ADDRESSES)
    pull = (y - np.float64(LOC)) / (0.3 + scale) ** 2
    np.testing.assert_allclose(grads.value, -pull + (each - y) / 0.64, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(in_x, pull, rtol=1e-3, atol=1e-4)
    free, log_det = mask.unconstrain(tr, AllSelection())
    choices, back = mask.constrain(free, tr.get_args())
    close(back, -np.float64(log_det))
    for address, value in values(choices).items():
        np.testing.assert_allclose(value, here[address], rtol=1e-4)


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag, match",
    [
        (1, "got 1"),
        (1.0, "got 1.0"),
        (None, "got None"),
        ("yes", "got 'yes'"),
        (jnp.array(1), r"got int32\[\]"),
        (jnp.array([True, False]), r"got bool\[2\].*use `Map`"),
    ],
)
def test_a_wrong_flag(flag: Any, match: str):
    maybe = Mask(Normal)
    with pytest.raises(ArgumentError, match=r'Mask at "m" is one boolean.*' + match):
        jax.eval_shape(lambda: gen(lambda: trace("m", maybe)(flag, 0.0, 1.0)).simulate(KEY, ()))
    _, tr = maybe.simulate(KEY, (True, 0.0, 1.0))
    for call in (
        lambda: maybe.importance(KEY, {}, (flag, 0.0, 1.0)),
        lambda: maybe.assess(KEY, 1.0, (flag, 0.0, 1.0)),
        lambda: maybe.update(KEY, tr, {}, (flag, 0.0, 1.0)),
        lambda: maybe.regenerate(KEY, tr, AllSelection(), (flag, 0.0, 1.0)),
    ):
        with pytest.raises(ArgumentError, match="one boolean"):
            call()


def test_other_bad_input():
    with pytest.raises(ArgumentError, match="Is @gen missing"):
        Mask(lambda x: x)
    with pytest.raises(ArgumentError, match="takes the flag as its first argument"):
        mask.simulate(KEY, ())
    with pytest.raises(UnvisitedConstraintError, match='"yy".*Did you mean "y"'):
        mask.importance(KEY, {"yy": GIVEN["y"]}, (False, LOC))
    with pytest.raises(MissingChoiceError, match='"scale"'):
        mask.assess(KEY, {"y": GIVEN["y"], "each": GIVEN["each"]}, (True, LOC))
    _, (_, score) = mask.assess(KEY, {}, (False, LOC))
    assert score == 0.0
    # A flag that is known only when running: without the choices the density is not known.
    run = jax.jit(lambda flag: mask.assess(KEY, {}, (flag, LOC))[1][1])
    assert run(False) == 0.0 and np.isnan(run(True))

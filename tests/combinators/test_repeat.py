"""`Repeat`: independent runs at the same arguments, against sums and products by hand."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.chain import close, norm, types

import gjflax
from gjflax import ArgumentError, Bernoulli, Diff, GenModule, Map, Normal, Repeat, gen, select, trace

KEY = jax.random.key(0)


@gen
def pair(loc, scale):
    x = trace("x", Normal)(loc, scale)
    return trace("y", Normal)(x * jnp.ones(2), 0.5)


model = Repeat(pair, 3)
ARGS, OTHER_ARGS = (0.5, 2.0), (-1.0, 0.7)


def terms(tr: Any, args: Any = ARGS) -> dict[str, np.ndarray]:
    x, y = np.float64(tr["x"]), np.float64(tr["y"])
    return {"x": norm(x, *args), "y": norm(y, x[:, None], 0.5).sum(axis=1)}


def total(tr: Any, args: Any = ARGS) -> float:
    return float(sum(part.sum() for part in terms(tr, args).values()))


@pytest.fixture(scope="module")
def tr() -> Any:
    return jax.jit(lambda: model.simulate(KEY, ARGS)[1])()


def test_runs_are_independent_and_their_scores_add_up(tr: Any):
    assert tr["x"].shape == (3,) and tr["y"].shape == (3, 2) and len(np.unique(tr["x"])) == 3
    close(tr.get_score(), total(tr))
    np.testing.assert_array_equal(tr.get_retval(), tr["y"])
    close(model.assess(KEY, tr.strip(), OTHER_ARGS)[1][1], total(tr, OTHER_ARGS))
    close(tr.project(select((1, "x"), "y")), terms(tr)["x"][1] + terms(tr)["y"].sum())
    assert tr.get_gen_fn() == model and isinstance(tr.get_gen_fn(), Repeat)
    assert tr.get_args() == ARGS


def test_importance_of_some_runs():
    weight, new = jax.jit(lambda: model.importance(KEY, {(2, "x"): 3.0, (0, "x"): 1.0}, ARGS)[1])()
    close(weight, terms(new)["x"][[2, 0]].sum())
    close(new.get_score(), total(new))
    assert new["x"][2] == 3.0 and new["x"][0] == 1.0


def test_update_and_its_inverse(tr: Any):
    @jax.jit
    def run(tr, given, args):
        key, (_, weight, new, discard) = model.update(KEY, tr, given, args)
        _, (_, back_weight, back, _) = model.update(key, new, discard, ARGS)
        return weight, new, discard, back_weight, back

    for given in ({}, {"x": jnp.arange(3.0)}, {(1, "x"): 4.0}):
        for args in (ARGS, OTHER_ARGS):
            weight, new, discard, back_weight, back = run(tr, gjflax.choice_map(given), args)
            assert new.strip() == tr.strip().overwrite(gjflax.choice_map(given))
            close(weight, total(new, args) - total(tr))
            close(back_weight, -weight)
            assert back.strip() == tr.strip() and types(new) == types(tr)
            assert discard.addresses() == ([("x",)] if given else [])


def test_regenerate_some_runs(tr: Any):
    _, weight, new = jax.jit(lambda tr: model.regenerate(KEY, tr, select((1, "x")), OTHER_ARGS)[1])(tr)
    np.testing.assert_array_equal(np.asarray(new["x"] != tr["x"]), [False, True, False])
    after, before = terms(new, OTHER_ARGS), terms(tr)
    close(weight, (after["y"] - before["y"]).sum() + (after["x"] - before["x"])[[0, 2]].sum())
    close(new.get_score(), total(new, OTHER_ARGS))


def test_exchangeable_coins_by_enumeration():
    """Coins that share a rate: the density of every outcome, and a count's is binomial."""
    coins = Repeat(Bernoulli, 3)
    outcomes = np.array([[i >> k & 1 for k in range(3)] for i in range(8)])
    logit = np.log(0.3 / 0.7)
    scores = jax.vmap(lambda v: coins.assess(KEY, v, (logit,))[1][1])(jnp.asarray(outcomes))
    close(np.exp(scores), 0.3 ** outcomes.sum(axis=1) * 0.7 ** (3 - outcomes.sum(axis=1)))
    assert coins.simulate(KEY, (logit,))[1].get_retval().shape == (3,)


def test_it_is_a_map_of_nothing(tr: Any):
    """Its fields are its own: a function, and how often."""
    mapped = Map(pair, repeats=3)
    other = jax.jit(lambda: mapped.simulate(KEY, ARGS)[1])()
    assert other.strip() == tr.strip()
    assert Repeat(pair, 3) == model and hash(Repeat(pair, 3)) == hash(model) and Repeat(pair, 4) != model
    assert isinstance(model, Map) and model.in_axes is None

    @gen(Repeat, repeats=2)
    def decorated(loc):
        return trace("x", Normal)(loc, 1.0)

    assert decorated.simulate(KEY, (0.0,))[1]["x"].shape == (2,)
    assert "repeats" in repr(model) and "in_axes" not in repr(model)


def test_bad_counts_are_refused():
    for repeats in (0, -1, True):
        with pytest.raises(ArgumentError, match="positive integer"):
            Repeat(pair, repeats)
    with pytest.raises(ArgumentError, match="generative function"):
        Repeat(lambda x: x, 3)
    with pytest.raises(ArgumentError, match="how often"):
        Repeat(pair)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError):
        Repeat(pair, 3, in_axes=0)  # pyright: ignore[reportCallIssue]


class Network(GenModule):
    @nn.compact
    def __call__(self, x):
        return trace("y", Normal)(nn.Dense(2)(x), 0.5)


@pytest.mark.slow
def test_parameters_are_shared_or_one_set_for_each_run(no_leaks: Any):
    x = jnp.array([0.5, -1.0])
    for options, shape in (({}, (2, 2)), ({"variable_axes": {"params": 0}}, (3, 2, 2))):
        repeated = Repeat(Network(), 3, **options)
        variables = no_leaks(lambda r=repeated: r.init(KEY, x))
        kernel = np.float64(variables["params"]["Dense_0"]["kernel"])
        assert kernel.shape == shape and len(np.unique(kernel)) == kernel.size
        key, tr = repeated.bind(variables).simulate(KEY, (x,))
        close(tr.get_score(), norm(tr["y"], np.einsum("i,...ij->...j", np.float64(x), kernel), 0.5).sum())
        assert tr["y"].shape == (3, 2)
        _, (_, weight, new, _) = repeated.bind(variables).update(key, tr, {(1, "y"): x}, (Diff.no_change(x),))
        close(weight, new.get_score() - tr.get_score())


def test_in_itself():
    nested = Repeat(Repeat(pair, 2), 3)
    key, tr = nested.simulate(KEY, ARGS)
    assert tr["x"].shape == (3, 2) and len(np.unique(tr["x"])) == 6
    flat = {name: np.asarray(tr[name]).reshape(6, *tr[name].shape[2:]) for name in ("x", "y")}
    close(tr.get_score(), total(flat))
    _, (_, weight, new, discard) = nested.update(key, tr, {(2, 1, "x"): 9.0}, ARGS)
    assert new["x"][2, 1] == 9.0 and discard[2, 1, "x"] == tr["x"][2, 1]
    close(weight, new.get_score() - tr.get_score())

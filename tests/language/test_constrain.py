"""`constrain` and `unconstrain`: choices to and from R^n, site by site."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import gjflax
from gjflax import (
    AllSelection,
    Bernoulli,
    Beta,
    Gamma,
    HalfNormal,
    Map,
    Normal,
    Selection,
    TrainCombinator,
    Uniform,
    gen,
    select,
    trace,
)

KEY = jax.random.key(2)


@gen
def dependent():
    """The support of the second choice is given by the first, and so on."""
    width = trace("width", Gamma)(3.0, 1.0)
    inside = trace("inside", Uniform)(-width, 2.0 * width)
    share = trace("share", Beta)(2.0, 3.0 + width)
    return trace("y", Normal)(inside * share, 0.3)


@gen
def with_a_coin():
    coin = trace("coin", Bernoulli)(probs=0.4)
    scale = trace("scale", HalfNormal)(1.0 + coin.astype(jnp.float32))
    return trace("y", Uniform)(-scale, scale)


@gen
def nested(x):
    top = trace("top", HalfNormal)(x)
    trace(("deep", "left"), with_a_coin)()
    return trace("many", Map(Uniform, in_axes=(None, 0)))(0.0, top + jnp.arange(1.0, 4.0))


@gen
def vectors():
    scales = trace("scales", HalfNormal)(jnp.array([1.0, 3.0]))
    return trace("box", Uniform)(jnp.zeros(2), scales)


@gen(TrainCombinator, params={"width": 2.0})
def learned(x, params):
    z = trace("z", Uniform)(0.0, params["width"])
    return trace("y", Gamma)(1.0 + z, x)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with arguments and values inside all supports (given, for to draw them compiles slowly)."""

    name: str
    model: Any
    values: Any
    args: tuple[Any, ...] = ()
    discrete: Selection = dataclasses.field(default_factory=select)

    def trace(self) -> Any:
        return self.model.importance(KEY, self.values, self.args)[1][1]


_dependent = {"width": 1.7, "inside": -0.6, "share": 0.35, "y": 0.2}
_coins = {"coin": [1, 0, 1], "scale": [0.4, 1.3, 2.0], "y": [-0.1, 0.9, 1.7]}

CASES = [
    Case("dependent", dependent, _dependent),
    Case("coin", with_a_coin, {"coin": 1, "scale": 0.8, "y": -0.3}, (), select("coin")),
    Case(
        "nested",
        nested,
        {"top": 0.4, ("deep", "left"): {"coin": 0, "scale": 0.8, "y": 0.3}, "many": [0.3, 2.1, 1.1]},
        (1.5,),
        select(("deep", "left", "coin")),
    ),
    Case("vectors", vectors, {"scales": [0.7, 2.0], "box": [0.6, 0.1]}),
    Case("map", Map(with_a_coin, repeats=3), _coins, (), select("coin")),
    Case(
        "map of map",
        Map(Map(Uniform, in_axes=(None, 0)), in_axes=(0, None)),
        [[0.5, 1.5, 2.5], [3.5, 4.5, 5.5]],
        (jnp.arange(2.0), jnp.arange(4.0, 7.0)),
    ),
    Case("learned", learned, {"z": 1.3, "y": 0.6}, (0.7,)),
    Case("mapped learned", Map(learned, in_axes=0), {"z": [1.3, 0.2], "y": [0.6, 3.0]}, (jnp.array([0.7, 2.0]),)),
]

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_case
def test_round_trip_and_determinant(case: Case):
    """The log determinants against that of the whole map's Jacobian, by forward differentiation."""
    free_ones = ~case.discrete

    @jax.jit
    def run():
        tr = case.trace()
        free, log_det = case.model.unconstrain(tr, free_ones)
        fixed = tr.strip().filter(case.discrete)
        constrained, back = case.model.constrain(free, case.args, fixed=fixed)
        point, unravel = ravel_pytree(free)

        def forward(point):
            chm, _ = case.model.constrain(unravel(point), case.args, fixed=fixed)
            return ravel_pytree(chm.filter(free_ones))[0]

        # The two trees have the same addresses, so their vectors are in the same order.
        sign, want = jnp.linalg.slogdet(jax.jacfwd(forward)(point))
        return tr, free, constrained, log_det, back, want, sign, point

    tr, free, constrained, log_det, back, want, sign, point = run()
    assert sorted(constrained.addresses()) == sorted(tr.strip().addresses())
    for address in tr.strip().addresses():
        np.testing.assert_allclose(constrained[address], tr[address], rtol=2e-5, atol=1e-6)
    assert sorted(free.addresses()) == sorted(tr.strip().filter(free_ones).addresses())
    assert np.all(np.isfinite(point))
    np.testing.assert_allclose(back, want, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(log_det, -want, rtol=1e-3, atol=1e-3)
    assert abs(sign) == 1.0


@each_case
def test_every_point_of_r_n_has_a_density(case: Case):
    """Wherever it starts, `constrain` ends inside the support."""

    @jax.jit
    def run(points):
        tr = case.trace()
        free, _ = case.model.unconstrain(tr, ~case.discrete)
        point, unravel = ravel_pytree(free)
        fixed = tr.strip().filter(case.discrete)

        def density(point):
            chm, log_det = case.model.constrain(unravel(point), case.args, fixed=fixed)
            return case.model.assess(KEY, chm, case.args)[1][1] + log_det

        return jax.vmap(jax.value_and_grad(density))(points[:, : point.size])

    values, grads = run(3.0 * np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32))
    assert np.all(np.isfinite(values)) and np.all(np.isfinite(grads))


def test_the_densities_in_r_n_and_on_the_support_are_one():
    """By change of variables the density in R^n integrates to 1: a sum over a grid."""

    @gen
    def model():
        return trace("x", Beta)(2.0, 3.0)

    def density(point):
        chm, log_det = model.constrain({"x": point}, ())
        return jnp.exp(model.assess(KEY, chm, ())[1][1] + log_det)

    grid = jnp.linspace(-12.0, 12.0, 2001)
    total = jnp.sum(jax.jit(jax.vmap(density))(grid)) * (grid[1] - grid[0])
    np.testing.assert_allclose(total, 1.0, rtol=1e-4)


def test_a_part_may_be_mapped_and_the_rest_held():
    tr = CASES[0].trace()
    chosen = select("width", "share")
    free, log_det = dependent.unconstrain(tr, chosen)
    assert free.addresses() == [("width",), ("share",)]
    fixed = tr.strip().filter(~chosen)
    chm, back = dependent.constrain(free, (), fixed=fixed)
    for address in tr.strip().addresses():
        np.testing.assert_allclose(chm[address], tr[address], rtol=1e-5)
    np.testing.assert_allclose(back, -log_det, rtol=1e-4)


def test_constrain_takes_plain_dicts_and_names_what_it_needs():
    chm, _ = with_a_coin.constrain({"scale": 0.0, "y": 0.0}, (), fixed={"coin": 1})
    assert chm["coin"] == 1 and chm["scale"] > 0 and chm["y"] == 0.0
    with pytest.raises(gjflax.MissingChoiceError, match='"y"'):
        with_a_coin.constrain({"scale": 0.0}, (), fixed={"coin": 1})
    with pytest.raises(gjflax.UnvisitedConstraintError, match='"z"'):
        with_a_coin.constrain({"scale": 0.0, "y": 0.0, "z": 0.0}, (), fixed={"coin": 1})
    with pytest.raises(gjflax.UnvisitedConstraintError, match='"con"'):
        with_a_coin.constrain({"scale": 0.0, "y": 0.0}, (), fixed={"con": 1, "coin": 1})
    with pytest.raises(gjflax.ChoiceShapeError, match='"y"'):
        with_a_coin.constrain({"scale": 0.0, "y": jnp.zeros(2)}, (), fixed={"coin": 1})


def test_constrain_under_other_parameters():
    chm, _ = learned.bind({"params": {"width": jnp.float32(10.0)}}).constrain({"z": 0.0, "y": 0.0}, (0.7,))
    np.testing.assert_allclose(chm["z"], 5.0, rtol=1e-6)
    chm, _ = learned.constrain({"z": 0.0, "y": 0.0}, (0.7,))
    np.testing.assert_allclose(chm["z"], 1.0, rtol=1e-6)


def test_every_choice_of_a_continuous_model_is_mapped():
    tr = CASES[0].trace()
    free, _ = dependent.unconstrain(tr, AllSelection())
    assert free.addresses() == tr.strip().addresses()

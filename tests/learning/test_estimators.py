"""Estimators as distributions: their densities, draws and derivatives, and what they refuse."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gjflax
from gjflax import (
    ELBO,
    ENUM,
    REINFORCE,
    Bernoulli,
    Categorical,
    GenModule,
    GumbelSoftmax,
    Map,
    MeasureValued,
    Normal,
    OneHotCategorical,
    Poisson,
    Reparameterized,
    StraightThrough,
    gen,
    trace,
)

KEY = jax.random.key(0)
WRAPPED = [
    (REINFORCE(Normal), Normal, (0.4, 1.3)),
    (Reparameterized(Normal), Normal, (np.array([0.4, 1.0], np.float32), 1.3)),
    (REINFORCE(gjflax.Gamma), gjflax.Gamma, (2.0, 1.3)),
    (ENUM(Categorical), Categorical, (np.array([0.4, 1.0, -1.0], np.float32),)),
    (MeasureValued(Poisson), Poisson, (1.5,)),
]


@pytest.mark.parametrize("row", WRAPPED, ids=lambda row: row[0].label)
def test_it_has_the_density_draws_and_support_of_the_distribution(row: Any):
    wrapped, inner, args = row
    _, tr = wrapped.simulate(KEY, args)
    _, of_inner = inner.simulate(KEY, args)
    np.testing.assert_array_equal(tr.get_retval(), of_inner.get_retval())
    np.testing.assert_array_equal(tr.get_score(), of_inner.get_score())
    _, (_, score) = wrapped.assess(KEY, tr.strip(), args)
    np.testing.assert_array_equal(score, of_inner.get_score())
    assert tr.is_discrete == of_inner.is_discrete
    assert tr.get_gen_fn() == wrapped and hash(wrapped) == hash(type(wrapped)(inner))
    if not tr.is_discrete:
        there = wrapped.unconstrain(tr, gjflax.AllSelection())[0]
        np.testing.assert_allclose(wrapped.constrain(there, args)[0].get_value(), tr.get_retval(), rtol=1e-5)


def test_arguments_by_keyword():
    _, tr = gen(lambda: trace("z", ENUM(Bernoulli))(probs=0.25)).simulate(KEY, ())
    z = int(tr["z"])
    np.testing.assert_allclose(tr.get_score(), np.log([0.75, 0.25][z]), rtol=1e-6)
    assert tr.get_subtree("z").get_gen_fn().label == "ENUM(Bernoulli)"
    _, tr = gen(lambda: trace("z", REINFORCE(Normal))(scale=2.0, loc=1.0)).simulate(KEY, ())
    np.testing.assert_allclose(tr.get_score(), jax.scipy.stats.norm.logpdf(tr["z"], 1.0, 2.0), rtol=1e-6)


def test_it_is_no_submodule_of_the_body_that_it_is_written_in():
    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            loc = nn.Dense(1)(jnp.ones(2))[0]
            return trace("z", REINFORCE(Normal))(loc, 1.0)

    variables = Guide().init(KEY)
    assert set(variables["params"]) == {"Dense_0"}
    _, one = Guide().bind(variables).simulate(KEY, ())
    _, other = Guide().bind(variables).simulate(KEY, ())
    assert jax.tree.structure(one) == jax.tree.structure(other)


@pytest.mark.parametrize(
    ("distribution", "slopes"),
    [(REINFORCE(Normal), (0.0, 0.0)), (Reparameterized(Normal), (1.0, None))],
    ids=lambda value: getattr(value, "label", ""),
)
def test_how_its_draw_is_differentiated(distribution: Any, slopes: Any):
    found = jax.grad(lambda a, b: distribution.simulate(KEY, (a, b))[1].get_retval(), argnums=(0, 1))(1.5, 1.2)
    for got, want in zip(found, slopes, strict=True):
        assert got == want if want is not None else got != 0


def test_a_demanded_reparameterisation_that_is_none():
    @gen
    def outer():
        return trace("points", Map(gen(lambda: trace("coin", Reparameterized(Bernoulli))(0.0)), repeats=2))()

    with pytest.raises(gjflax.NotReparameterizedError, match=r'"points", "coin"\).*Bernoulli has no reparam'):
        jax.eval_shape(lambda: outer.simulate(KEY, ()))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: REINFORCE(gen(lambda: None)), "REINFORCE` takes a distribution"),
        (lambda: REINFORCE(ENUM(Bernoulli)), r"without an estimator; got ENUM\(Bernoulli\)"),
        (lambda: MeasureValued(gjflax.Gamma), "knows Bernoulli, Poisson, Normal; got Gamma"),
        (lambda: StraightThrough(Categorical), "takes Bernoulli or OneHotCategorical.*got Categorical"),
        (lambda: GumbelSoftmax(Bernoulli, temperature=0.0), "temperature.*positive"),
        (lambda: ENUM(Poisson, values=(1, 1)), "distinct numbers"),
    ],
)
def test_what_is_no_estimator_is_refused(make: Any, match: str):
    with pytest.raises(gjflax.ArgumentError, match=match):
        make()


# Implicit reparameterisation -------------------------------------------------------------------------------------------


def test_the_derivative_of_a_gamma_draw_is_that_of_its_quantile():
    """dz/da = −(∂F/∂a) / p at the draw, by central differences of scipy's distribution function in float64."""
    scipy_stats = pytest.importorskip("scipy.stats")
    shapes = jnp.repeat(jnp.array([0.3, 1.0, 4.5]), 8)
    draw = jax.value_and_grad(lambda a, key: gjflax.Gamma.simulate(key, (a, 1.0))[1].get_retval())
    draws, slopes = jax.vmap(draw)(shapes, jax.random.split(KEY, 24))
    z, a, step = np.asarray(draws, np.float64), np.asarray(shapes, np.float64), 1e-5
    slope_of_cdf = (scipy_stats.gamma.cdf(z, a + step) - scipy_stats.gamma.cdf(z, a - step)) / (2 * step)
    np.testing.assert_allclose(slopes, -slope_of_cdf / scipy_stats.gamma.pdf(z, a), rtol=2e-3, atol=1e-6)


# Relaxations -----------------------------------------------------------------------------------------------------------


def test_straight_through_values_are_exactly_hard():
    logits = jnp.linspace(-3.0, 3.0, 50)
    _, tr = StraightThrough(Bernoulli).simulate(KEY, (logits,))
    value = tr.get_retval()
    assert value.dtype == jnp.float32 and set(np.unique(value)) == {0.0, 1.0}
    _, hard = Bernoulli.simulate(KEY, (logits,))
    np.testing.assert_array_equal(value, hard.get_retval().astype(jnp.float32))
    np.testing.assert_allclose(tr.get_score(), hard.get_score(), rtol=1e-6)
    slope = jax.grad(lambda logit: StraightThrough(Bernoulli).simulate(KEY, (logit,))[1].get_retval())(0.3)
    np.testing.assert_allclose(slope, jax.nn.sigmoid(0.3) * jax.nn.sigmoid(-0.3), rtol=1e-6)


@pytest.mark.parametrize(
    "relaxed",
    [
        pytest.param(StraightThrough(OneHotCategorical), marks=pytest.mark.slow),
        GumbelSoftmax(OneHotCategorical, 0.5, True),
    ],
    ids=lambda relaxed: relaxed.label,
)
def test_hard_one_hot_values(relaxed: Any):
    logits = jnp.array([0.3, -0.5, 1.0])
    values = jax.vmap(lambda key: relaxed.simulate(key, (logits,))[1].get_retval())(jax.random.split(KEY, 4000))
    assert set(np.unique(values)) == {0.0, 1.0} and np.all(np.sum(values, axis=1) == 1)
    probs = np.asarray(jax.nn.softmax(logits))
    assert np.all(np.abs(values.mean(axis=0) - probs) <= 4 * np.sqrt(probs * (1 - probs) / 4000))
    slopes = jax.jacobian(lambda logits: relaxed.simulate(KEY, (logits,))[1].get_retval())(logits)
    assert np.all(np.asarray(slopes) != 0)


def test_gumbel_softmax_is_soft_and_has_the_right_argmax():
    logits = jnp.array([0.3, -0.5, 1.0])
    soft = GumbelSoftmax(OneHotCategorical, temperature=0.7)
    values = jax.vmap(lambda key: soft.simulate(key, (logits,))[1].get_retval())(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(values.sum(axis=1), np.ones(4000), rtol=1e-5)
    assert np.all((values > 0) & (values < 1))
    probs = np.asarray(jax.nn.softmax(logits))
    frequency = np.bincount(np.argmax(values, axis=1), minlength=3) / 4000
    assert np.all(np.abs(frequency - probs) <= 4 * np.sqrt(probs * (1 - probs) / 4000))


def test_the_density_of_a_soft_value_is_linear_between_hard_ones():
    args, soft = (jnp.array([0.3, -0.5, 1.0]),), GumbelSoftmax(OneHotCategorical)
    value = np.array([0.2, 0.5, 0.3], np.float32)
    at_hard = [soft.assess(KEY, np.eye(3, dtype=np.float32)[k], args)[1][1] for k in range(3)]
    np.testing.assert_allclose(at_hard, jax.nn.log_softmax(args[0]), rtol=1e-6)
    np.testing.assert_allclose(soft.assess(KEY, value, args)[1][1], value @ np.stack(at_hard), rtol=1e-6)
    assert soft.assess(KEY, np.array([1.2, -0.2, 0.0], np.float32), args)[1][1] == -np.inf
    _, (_, score) = StraightThrough(Bernoulli).assess(KEY, 0.25, (None, 0.4))
    np.testing.assert_allclose(score, 0.25 * np.log(0.4) + 0.75 * np.log(0.6), rtol=1e-6)


def relaxed_objective(in_model: Any, in_guide: Any) -> ELBO:
    @gen
    def model():
        z = trace("z", in_model)(0.2)
        return trace("x", Normal)(2.0 * z.astype(jnp.float32), 1.0)

    @gen
    def guide(logit):
        return trace("z", in_guide)(logit)

    return ELBO(model, guide)


def test_a_relaxed_choice_that_the_model_takes_as_an_integer_is_refused():
    objective = relaxed_objective(Bernoulli, StraightThrough(Bernoulli))
    with pytest.raises(gjflax.DiscreteGradientError, match=r'"z" is relaxed.*StraightThrough\(Bernoulli\)'):
        jax.eval_shape(lambda: objective.apply({}, {"x": 1.0}, (), (0.3,), rngs={"choice": KEY}))


def test_a_relaxed_choice_in_both_has_a_gradient():
    """By hand: the straight-through derivative of log p(x | z) + log p(z) − log q(z), at the value that was drawn."""
    objective = relaxed_objective(StraightThrough(Bernoulli), StraightThrough(Bernoulli))

    def loss(logit: Any) -> Any:
        return objective.apply({}, {"x": 1.0}, (), (logit,), rngs={"choice": KEY})

    value, slope = jax.jit(jax.value_and_grad(loss))(0.3)
    sigmoid = jax.nn.sigmoid

    def by_hand(logit: Any, z: float) -> Any:
        soft = z + sigmoid(logit) - jax.lax.stop_gradient(sigmoid(logit))
        prior = soft * jax.nn.log_sigmoid(0.2) + (1 - soft) * jax.nn.log_sigmoid(-0.2)
        guide = soft * jax.nn.log_sigmoid(logit) + (1 - soft) * jax.nn.log_sigmoid(-logit)
        return -(prior + jax.scipy.stats.norm.logpdf(1.0, 2.0 * soft, 1.0) - guide)

    matches = [jax.value_and_grad(by_hand)(0.3, z) for z in (0.0, 1.0)]
    assert any(np.allclose(value, v, rtol=1e-5) and np.allclose(slope, g, rtol=1e-5) for v, g in matches)


# Enumeration that is too large -----------------------------------------------------------------------------------------


def enumerated(guide: Any, model: Any) -> Any:
    return jax.eval_shape(lambda: ELBO(model, guide).apply({}, {}, rngs={"choice": KEY}))


def test_too_many_values_are_refused():
    many = gen(lambda: trace("z", ENUM(Bernoulli))(jnp.zeros(20)))
    with pytest.raises(
        gjflax.EnumerationError, match=r'"z" \(ENUM\(Bernoulli\)\) has 2\^20 joint values.*a vector of 20'
    ):
        enumerated(many, gen(lambda: trace("z", Bernoulli)(jnp.zeros(20))))

    coin = gen(lambda: trace("z", ENUM(Bernoulli))(0.0))

    @gen
    def together():
        zs = trace("points", Map(gen(lambda: trace("z", Bernoulli)(0.0)), repeats=20))()
        return trace("sum", Normal)(jnp.sum(zs).astype(jnp.float32), 1.0)

    @gen
    def guide():
        trace("points", Map(coin, repeats=20))()
        return trace("sum", Normal)(0.0, 1.0)

    with pytest.raises(gjflax.EnumerationError, match=r'"points", "z"\).*2\^20.*does not stay in it'):
        enumerated(guide, together)

    @gen
    def several():
        for i in range(8):
            trace(f"z{i}", ENUM(Categorical))(jnp.zeros(3))

    @gen
    def several_in_model():
        for i in range(8):
            trace(f"z{i}", Categorical)(jnp.zeros(3))

    with pytest.raises(gjflax.EnumerationError, match=r'6561 joint values \("z0": 3, "z1": 3'):
        enumerated(several, several_in_model)


def test_values_that_are_not_known_are_refused():
    with pytest.raises(gjflax.EnumerationError, match=r"Poisson\).*values are not known.*ENUM\(Poisson, values="):
        enumerated(gen(lambda: trace("z", ENUM(Poisson))(1.0)), gen(lambda: trace("z", Poisson)(2.0)))


def test_twenty_elements_side_by_side_are_two_runs():
    """Where nothing leaves an element, a `Map` of 20 coins is enumerated by 2 values: and exactly."""
    coins = Map(ENUM(Bernoulli))
    prior = Map(Bernoulli, in_axes=None, repeats=20)
    logits = jnp.linspace(-2.0, 2.0, 20)

    def loss(logits: Any) -> Any:
        return ELBO(prior, coins).apply({}, {}, (0.5,), (logits,), rngs={"choice": KEY})

    def divergence(logits: Any) -> Any:
        p = jax.nn.sigmoid(0.5)
        q = jax.nn.sigmoid(logits)
        return jnp.sum(q * jnp.log(q / p) + (1 - q) * jnp.log((1 - q) / (1 - p)))

    value, slope = jax.jit(jax.value_and_grad(loss))(logits)
    want, want_slope = jax.value_and_grad(divergence)(logits)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(slope, want_slope, rtol=1e-4, atol=1e-6)

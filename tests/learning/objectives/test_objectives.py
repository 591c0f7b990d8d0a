"""Objectives against exact values and gradients: by enumeration of what the guide may draw, or in closed form.

The statistical tests use 20,000 independent losses, and bounds of 4 standard errors.
"""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import gjflax
from gjflax import (
    ELBO,
    VIMCO,
    AutoDelta,
    AutoNormal,
    Bernoulli,
    ForwardKL,
    GenModule,
    ImportanceWeightedELBO,
    MaximumLikelihood,
    Normal,
    Renyi,
    WakeSleep,
    gen,
    trace,
)

KEY = jax.random.key(0)
DRAWS = 20_000


class Model(GenModule):
    @nn.compact
    def __call__(self):
        a, b, c = (self.param(name, nn.initializers.zeros, ()) for name in "abc")
        z = trace("z", Bernoulli)(logits=a)
        return trace("x", Bernoulli)(logits=b + c * z.astype(c.dtype))


class Guide(GenModule):
    @nn.compact
    def __call__(self):
        trace("z", Bernoulli)(logits=self.param("d", nn.initializers.zeros, ()))


PARAMS = {"model": {"a": 0.4, "b": -0.7, "c": 1.9}, "guide": {"d": -0.6}}
OBSERVED = {"x": 1}


def log_bernoulli(value, logits):
    return value * jax.nn.log_sigmoid(logits) + (1 - value) * jax.nn.log_sigmoid(-logits)


def log_p(params, z, x):
    p = params["model"]
    return log_bernoulli(z, p["a"]) + log_bernoulli(x, p["b"] + p["c"] * z)


def log_q(params, z):
    return log_bernoulli(z, params["guide"]["d"])


def expectation(params, count, of_sample):
    """Σ over all draws of `count` samples of their probability times ``of_sample(log_p, log_q, probability)``."""
    result = 0.0
    for zs in itertools.product((0.0, 1.0), repeat=count):
        z = jnp.array(zs)
        result += jnp.exp(jnp.sum(log_q(params, z))) * of_sample(log_p(params, z, 1.0), log_q(params, z))
    return result


def bound(alpha):
    def value(log_p, log_q):
        weights = (1 - alpha) * (log_p - log_q)
        return (jax.nn.logsumexp(weights) - np.log(len(weights))) / (1 - alpha)

    return value


def check_mean(
    objective, exact_value, exact_grads, observed=OBSERVED, params=PARAMS, sides=("model", "guide"), **kwargs
):
    """The mean of losses and gradients within 4 standard errors of minus the exact ones."""
    params = {side: jax.tree.map(jnp.float32, params[side]) for side in sides}

    def loss(params, key):
        return objective.apply({"params": params}, observed, rngs={"choice": key}, **kwargs)

    one = jax.value_and_grad(loss)
    values, grads = jax.jit(jax.vmap(one, in_axes=(None, 0)))(params, jax.random.split(KEY, DRAWS))
    within(values, -exact_value)
    for side in sides:
        for name, exact in exact_grads[side].items():
            within(grads[side][name], -exact, name)
    return values, grads


def within(draws, exact, name="value"):
    draws = np.asarray(draws, np.float64)
    error = 4 * draws.std() / np.sqrt(len(draws)) + 1e-5
    assert abs(draws.mean() - exact) < error, (name, draws.mean(), exact, error)


def exact_bound(alpha, count):
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.float64, PARAMS)
        value, grads = jax.value_and_grad(lambda params: expectation(params, count, bound(alpha)))(params)
        return float(value), jax.tree.map(float, grads)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [ImportanceWeightedELBO, MaximumLikelihood])
@pytest.mark.parametrize("count", [1, 3])
def test_importance_weighted(objective, count):
    check_mean(objective(Model(), Guide(), num_samples=count), *exact_bound(0.0, count))


@pytest.mark.parametrize("baseline", ["geometric", pytest.param("arithmetic", marks=pytest.mark.slow)])
def test_vimco(baseline):
    values, grads = check_mean(VIMCO(Model(), Guide(), num_samples=3, baseline=baseline), *exact_bound(0.0, 3))


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.5, 2.0, -1.0])
def test_renyi(alpha):
    check_mean(Renyi(Model(), Guide(), num_samples=3, alpha=alpha), *exact_bound(alpha, 3))


@pytest.mark.slow
def test_baselines_of_vimco_lower_the_variance():
    def variance(objective):
        params = {side: jax.tree.map(jnp.float32, PARAMS[side]) for side in PARAMS}
        loss = lambda d, key: objective.apply({"params": {**params, "guide": {"d": d}}}, OBSERVED, rngs={"choice": key})
        grads = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(jnp.float32(-0.6), jax.random.split(KEY, DRAWS))
        return np.var(np.asarray(grads))

    plain = np.var(np.asarray(_plain_score_function_gradients(5)))
    for baseline in ("geometric", "arithmetic"):
        assert variance(VIMCO(Model(), Guide(), num_samples=5, baseline=baseline)) < 0.2 * plain


def _plain_score_function_gradients(count):
    """By hand: the bound times the sum of the score functions."""

    def one(key):
        z = jax.random.bernoulli(key, jax.nn.sigmoid(-0.6), (count,)).astype(jnp.float32)
        value = bound(0.0)(log_p(PARAMS, z, 1.0), log_q(PARAMS, z))
        score = jax.grad(lambda d: jnp.sum(log_bernoulli(z, d)))(-0.6)
        return value * score

    return jax.jit(jax.vmap(one))(jax.random.split(KEY, DRAWS))


def test_wake_sleep_in_expectation():
    """Each part by enumeration; the value is the importance weighted bound."""

    def parts(params, log_p, log_q):
        weights = jax.nn.softmax(jax.lax.stop_gradient(log_p - log_q))
        return jnp.sum(weights * log_p) + jnp.sum(weights * log_q)

    with jax.enable_x64(True):
        params = jax.tree.map(jnp.float64, PARAMS)

        def expected(params):
            held = jax.lax.stop_gradient(params)
            total = 0.0
            for zs in itertools.product((0.0, 1.0), repeat=2):
                z = jnp.array(zs)
                probability = jnp.exp(jnp.sum(log_q(held, z)))
                total += probability * parts(params, log_p(params, z, 1.0), log_q(params, z))
            return total

        grads = jax.tree.map(float, jax.grad(expected)(params))
        value = float(expectation(params, 2, bound(0.0)))
    check_mean(WakeSleep(Model(), Guide(), num_samples=2), value, grads)


class Recognition(GenModule):
    @nn.compact
    def __call__(self, x):
        d, e = (self.param(name, nn.initializers.zeros, ()) for name in "de")
        trace("z", Bernoulli)(logits=d + e * x)


def test_sleep_and_forward_kl():
    """E_p(z, x) log q(z | x), by enumeration; the model gets no gradient from it."""
    params = {"model": PARAMS["model"], "guide": {"d": -0.6, "e": 0.9}}

    def expected(guide, model):
        held = {"model": jax.lax.stop_gradient(model)}
        pairs = itertools.product((0.0, 1.0), repeat=2)
        return sum(jnp.exp(log_p(held, z, x)) * log_bernoulli(z, guide["d"] + guide["e"] * x) for z, x in pairs)

    with jax.enable_x64(True):
        guide, model = (jax.tree.map(jnp.float64, params[side]) for side in ("guide", "model"))
        value, grads = jax.value_and_grad(expected)(guide, model)
    inputs = lambda choices: (choices["x"].astype(jnp.float32),)
    objective = ForwardKL(Model(), Recognition(), guide_inputs=inputs)
    exact = {"guide": jax.tree.map(float, grads), "model": dict.fromkeys("abc", 0.0)}
    check_mean(objective, float(value), exact, params=params)

    asleep = WakeSleep(Model(), Recognition(), num_samples=2, guide_update="sleep", guide_inputs=inputs)
    floats = {side: jax.tree.map(jnp.float32, params[side]) for side in params}
    keys = jax.random.split(KEY, DRAWS)
    loss = lambda params, key: asleep.apply({"params": params}, OBSERVED, (), (1.0,), rngs={"choice": key})
    got = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(floats, keys)["guide"]
    for name in "de":
        within(got[name], -exact["guide"][name], name)


def test_complete_data():
    objective = MaximumLikelihood(Model())
    params = {"model": jax.tree.map(jnp.float32, PARAMS["model"])}
    loss, grads = jax.value_and_grad(lambda p: objective.apply({"params": p}, {"z": 1, "x": 0}))(params)
    exact, exact_grads = jax.value_and_grad(log_p)(params, 1.0, 0.0)
    np.testing.assert_allclose(-loss, exact, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(-a, b, rtol=1e-4, atol=1e-6), grads, exact_grads)
    with pytest.raises(gjflax.MissingStreamError, match='"choice"'):
        objective.apply({"params": params}, {"x": 0})


@pytest.mark.parametrize("count", [2])
def test_incomplete_data(count):
    """The model is its own guide: the bound with q = p(z)."""

    def expected(model):
        params = {"model": model, "guide": {"d": model["a"]}}
        return expectation(params, count, bound(0.0))

    with jax.enable_x64(True):
        value, grads = jax.value_and_grad(expected)(jax.tree.map(jnp.float64, PARAMS["model"]))
    exact = {"model": jax.tree.map(float, grads)}
    check_mean(MaximumLikelihood(Model(), num_samples=count), float(value), exact, sides=("model",))


# Reparameterised choices ------------------------------------------------------------------------------------------------


@gen
def normal_model(scale):
    z = trace("z", Normal)(jnp.zeros(3), 1.0)
    return trace("x", Normal)(z * scale, 0.5)


class NormalGuide(GenModule):
    @nn.compact
    def __call__(self):
        loc = self.param("loc", nn.initializers.zeros, (3,))
        log_scale = self.param("log_scale", nn.initializers.zeros, (3,))
        trace("z", Normal)(loc, jnp.exp(log_scale))


X = jnp.array([0.4, -1.0, 1.7])
SCALE = jnp.array([1.0, 0.6, 1.4])
EVIDENCE = float(np.sum(jax.scipy.stats.norm.logpdf(X, 0.0, jnp.sqrt(SCALE**2 + 0.25))))


def posterior():
    precision = 1 + SCALE**2 / 0.25
    return {"loc": SCALE * X / 0.25 / precision, "log_scale": -0.5 * jnp.log(precision)}


@pytest.mark.slow
@pytest.mark.parametrize("doubly", [False, True])
def test_at_the_posterior_every_bound_is_the_evidence(doubly):
    objective = ImportanceWeightedELBO(normal_model, NormalGuide(), num_samples=4, doubly_reparameterized=doubly)

    def loss(guide):
        return objective.apply({"params": {"guide": guide}}, {"x": X}, (SCALE,), rngs={"choice": KEY})

    value, grads = jax.value_and_grad(loss)(posterior())
    np.testing.assert_allclose(-value, EVIDENCE, rtol=1e-5)
    if doubly:  # without variance there
        jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, 0.0, atol=1e-4), grads)
    renyi = Renyi(normal_model, NormalGuide(), num_samples=4, alpha=0.3)
    got = renyi.apply({"params": {"guide": posterior()}}, {"x": X}, (SCALE,), rngs={"choice": KEY})
    np.testing.assert_allclose(-got, EVIDENCE, rtol=1e-5)


def _gradients(objective, guide, draws=DRAWS):
    def loss(guide, key):
        return objective.apply({"params": {"guide": guide}}, {"x": X}, (SCALE,), rngs={"choice": key})

    return jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))(guide, jax.random.split(KEY, draws))


@pytest.mark.slow
def test_the_doubly_reparameterised_gradient_has_the_same_mean_and_less_variance():
    guide = jax.tree.map(lambda leaf: leaf + 0.3, posterior())
    _, plain = _gradients(ImportanceWeightedELBO(normal_model, NormalGuide(), num_samples=16), guide)
    objective = ImportanceWeightedELBO(normal_model, NormalGuide(), num_samples=16, doubly_reparameterized=True)
    _, doubly = _gradients(objective, guide)
    for name in guide:
        a, b = np.asarray(plain[name], np.float64), np.asarray(doubly[name], np.float64)
        error = 4 * np.sqrt((a.var(0) + b.var(0)) / DRAWS)
        assert np.all(np.abs(a.mean(0) - b.mean(0)) < error), (name, a.mean(0), b.mean(0), error)
        assert np.all(b.var(0) < 0.7 * a.var(0))


@pytest.mark.slow
def test_the_doubly_reparameterised_gradient_of_the_model():
    """The model's gradient is the plain one, draw by draw."""

    class Scaled(GenModule):
        @nn.compact
        def __call__(self):
            scale = self.param("scale", nn.initializers.ones, (3,))
            z = trace("z", Normal)(jnp.zeros(3), 1.0)
            return trace("x", Normal)(z * scale, 0.5)

    params = {"model": {"scale": SCALE}, "guide": jax.tree.map(lambda leaf: leaf + 0.3, posterior())}

    def gradient(doubly):
        objective = ImportanceWeightedELBO(Scaled(), NormalGuide(), num_samples=4, doubly_reparameterized=doubly)
        loss = lambda params: objective.apply({"params": params}, {"x": X}, rngs={"choice": KEY})
        return jax.grad(loss)(params)["model"]["scale"]

    np.testing.assert_allclose(gradient(True), gradient(False), rtol=1e-4)


@pytest.mark.slow
def test_the_bound_grows_with_samples_and_meets_the_evidence():
    guide = jax.tree.map(lambda leaf: leaf + 0.4, posterior())
    bounds, errors = [], []
    for count in (1, 4, 32, 512):
        values, _ = _gradients(ImportanceWeightedELBO(normal_model, NormalGuide(), num_samples=count), guide, 2_000)
        bounds.append(-np.asarray(values, np.float64).mean())
        errors.append(4 * np.asarray(values).std() / np.sqrt(2_000))
    assert all(a < b for a, b in zip(bounds, bounds[1:], strict=False)), bounds
    assert all(one < EVIDENCE + error for one, error in zip(bounds, errors, strict=True))
    assert abs(bounds[-1] - EVIDENCE) < errors[-1] + 0.01
    elbo, _ = _gradients(ELBO(normal_model, NormalGuide()), guide, 2_000)
    assert abs(-elbo.mean() - bounds[0]) < 2 * errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("make", [ELBO, AutoDelta])
def test_objectives_are_called_alike(make):
    """Swapping the objective is one word, with the same variables; where the guide is a point, all but two are its density."""
    guide = (
        AutoNormal(normal_model, {"x": X}, (SCALE,)) if make is ELBO else AutoDelta(normal_model, {"x": X}, (SCALE,))
    )
    variables = ELBO(normal_model, guide).init(KEY, {"x": X}, (SCALE,))
    z = np.asarray(variables["params"]["guide"]["loc"]["z"], np.float64)
    log_joint = np.sum(stats.norm.logpdf(z)) + np.sum(stats.norm.logpdf(X, z * np.asarray(SCALE), 0.5))
    for kind in (ELBO, ImportanceWeightedELBO, Renyi, VIMCO, WakeSleep, ForwardKL, MaximumLikelihood, gjflax.MAP):
        objective = kind(normal_model, guide, num_samples=2)
        loss, noted = objective.apply(variables, {"x": X}, (SCALE,), rngs={"choice": KEY}, mutable=["diagnostics"])
        assert loss.shape == () and noted["diagnostics"], kind
        if kind is gjflax.MAP or (make is AutoDelta and kind is not ForwardKL):
            np.testing.assert_allclose(loss, -log_joint, rtol=1e-5, err_msg=kind.__name__)
        else:
            assert make is AutoDelta or (np.isfinite(loss) and abs(loss + log_joint) > 1e-3), kind


@pytest.mark.parametrize("count", [1, 4])
def test_map_of_guides_that_hold_points(count):
    """By a network that reads the point off the data, and by several guides at once: −log p by hand."""

    class Reads(GenModule):
        @nn.compact
        def __call__(self):
            trace("z", gjflax.Deterministic)(nn.Dense(3, kernel_init=nn.initializers.ones)(X) / 4)

    @gen
    def with_scale():
        scale = trace("scale", gjflax.Gamma)(2.0, 3.0)
        z = trace("z", Normal)(jnp.zeros(3), scale)
        trace("x", Normal)(z, 0.5)

    observed = {"x": X}
    parts = [AutoDelta(with_scale, observed, selection=gjflax.select("scale")), Reads()]
    objective = gjflax.MAP(with_scale, gjflax.AutoGuides(*parts), num_samples=count)
    variables = objective.init(KEY, observed)
    got, grads = jax.value_and_grad(lambda v: objective.apply(v, observed, rngs={"choice": KEY}))(variables)
    (raw,) = (leaf for leaf in jax.tree.leaves(variables) if leaf.ndim == 0)
    z = np.full(3, np.sum(X) / 4, np.float64)

    def by_hand(raw):
        scale = np.logaddexp(raw, 0.0)
        prior = stats.gamma(2.0, scale=1 / 3).logpdf(scale) + np.sum(stats.norm(0, scale).logpdf(z))
        return -prior - np.sum(stats.norm(z, 0.5).logpdf(X))

    raw = np.float64(raw)
    np.testing.assert_allclose(got, by_hand(raw), rtol=1e-5)
    (slope,) = (leaf for leaf in jax.tree.leaves(grads) if leaf.ndim == 0)
    np.testing.assert_allclose(slope, (by_hand(raw + 1e-5) - by_hand(raw - 1e-5)) / 2e-5, rtol=1e-4)


def test_mistakes():
    guide = NormalGuide()
    with pytest.raises(gjflax.ArgumentError, match="other than 1"):
        Renyi(normal_model, guide, alpha=1.0)
    with pytest.raises(gjflax.ArgumentError, match='"geometric" or "arithmetic"'):
        VIMCO(normal_model, guide, baseline="mean")
    with pytest.raises(gjflax.ArgumentError, match="2 or more"):
        VIMCO(normal_model, guide, num_samples=1)
    with pytest.raises(gjflax.ArgumentError, match='"wake", "sleep" or "both"'):
        WakeSleep(normal_model, guide, guide_update="dream")
    with pytest.raises(gjflax.ArgumentError, match="`guide_inputs` is a function"):
        ForwardKL(normal_model, guide, guide_inputs=3)
    with pytest.raises(gjflax.ArgumentError, match="True or False"):
        ImportanceWeightedELBO(normal_model, guide, doubly_reparameterized="yes")
    with pytest.raises(gjflax.MissingStreamError, match='"choice"'):
        MaximumLikelihood(normal_model, guide).apply({}, {"x": X}, (SCALE,))
    with pytest.raises(gjflax.ArgumentError, match='holds a point for each choice, and its choice at "z" is drawn'):
        gjflax.MAP(normal_model, guide).init(KEY, {"x": X}, (SCALE,))
    with pytest.raises(gjflax.SelectionError, match="not a choice of the model"):
        ForwardKL(normal_model, guide).init(KEY, {"xx": X}, (SCALE,))
    objective = ImportanceWeightedELBO(Model(), Guide(), num_samples=2, doubly_reparameterized=True)
    with pytest.raises(gjflax.NotReparameterizedError, match='"z"'):
        objective.apply({"params": PARAMS}, OBSERVED, rngs={"choice": KEY})

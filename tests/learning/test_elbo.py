"""The ELBO: its value by hand, its gradient against the exact bound's, and what it does to a user's variables."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learning.gradients import assert_unbiased, variance

import gjflax
from gjflax import ELBO, Bernoulli, Exponential, GenModule, Map, Normal, distribution, gen, trace

KEY = jax.random.key(0)
NOISE = np.array([0.5, 0.8, 2.0], np.float32)
SCALE = np.array([1.5, 0.7, 1.0], np.float32)
OBSERVED = {"x": jnp.array([0.3, -1.2, 2.0])}


class Model(GenModule):
    """z ~ N(mean, SCALE²), x | z ~ N(z, NOISE²), elementwise; the mean is learned."""

    @nn.compact
    def __call__(self):
        mean = self.param("mean", nn.initializers.constant(0.4), (3,))
        z = trace("z", Normal)(mean, SCALE)
        return trace("x", Normal)(z, NOISE)


class Guide(GenModule):
    @nn.compact
    def __call__(self):
        loc = self.param("loc", nn.initializers.zeros, (3,))
        log_scale = self.param("log_scale", nn.initializers.constant(-0.3), (3,))
        return trace("z", Normal)(loc, jnp.exp(log_scale))


def norm(value: Any, mean: Any, scale: Any) -> Any:
    return jnp.sum(jax.scipy.stats.norm.logpdf(value, mean, scale))


PARAMS = {
    "model": {"mean": jnp.array([0.4, -0.2, 1.0])},
    "guide": {"loc": jnp.array([0.1, -0.6, 0.9]), "log_scale": jnp.array([-0.3, 0.2, 0.0])},
}


def log_weight(params: Any, z: Any) -> Any:
    prior = norm(z, params["model"]["mean"], SCALE)
    guide = params["guide"]
    return prior + norm(OBSERVED["x"], z, NOISE) - norm(z, guide["loc"], jnp.exp(guide["log_scale"]))


def exact_bound(params: Any) -> Any:
    """E_q[log p(x, z) − log q(z)] in closed form, for Gaussians elementwise."""
    mean, loc = params["model"]["mean"], params["guide"]["loc"]
    variance = jnp.exp(2 * params["guide"]["log_scale"])
    prior = norm(loc, mean, SCALE) - jnp.sum(variance / (2 * SCALE**2))
    likelihood = norm(OBSERVED["x"], loc, NOISE) - jnp.sum(variance / (2 * NOISE**2))
    entropy = jnp.sum(0.5 * jnp.log(2 * jnp.pi * jnp.e * variance))
    return prior + likelihood + entropy


def exact_posterior(mean: Any) -> Any:
    precision = 1 / SCALE**2 + 1 / NOISE**2
    loc = (mean / SCALE**2 + OBSERVED["x"] / NOISE**2) / precision
    return {"loc": loc, "log_scale": jnp.asarray(-0.5 * np.log(precision))}


def evidence(mean: Any) -> Any:
    return norm(OBSERVED["x"], mean, np.sqrt(SCALE**2 + NOISE**2))


@functools.partial(jax.jit, static_argnums=0)
def run(num_samples: int, params: Any = PARAMS, key: Any = KEY) -> Any:
    """The loss, and the log weights that it leaves in its diagnostics."""
    objective = ELBO(Model(), Guide(), num_samples=num_samples)
    loss, state = objective.apply({"params": params}, OBSERVED, rngs={"choice": key}, mutable=["diagnostics"])
    return loss, state["diagnostics"]["log_weights"]


def test_its_variables_are_those_of_model_and_guide():
    variables = ELBO(Model(), Guide(), num_samples=3).init(KEY, OBSERVED)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, {"params": PARAMS})
    # So they serve another number of samples as well.
    assert ELBO(Model(), Guide(), num_samples=5).apply(variables, OBSERVED, rngs={"choice": KEY}).shape == ()


@pytest.mark.parametrize("num_samples", [1, 4])
def test_the_loss_is_minus_the_mean_log_weight_of_its_samples(num_samples: int):
    """The guide's samples are drawn again by the keys that the objective gives it, and weighed by hand."""
    drawn = []

    class Listening(Guide):
        @nn.compact
        def __call__(self):
            z = super().__call__()
            self.sow("intermediates", "z", z)
            return z

    objective = ELBO(Model(), Listening(), num_samples=num_samples)
    loss, state = objective.apply(
        {"params": PARAMS}, OBSERVED, rngs={"choice": KEY}, mutable=["diagnostics", "intermediates"]
    )
    drawn = state["intermediates"]["guide"]["z"][0].reshape(num_samples, 3)
    weights = [log_weight(PARAMS, z) for z in drawn]
    np.testing.assert_allclose(state["diagnostics"]["log_weights"], weights, rtol=1e-5)
    np.testing.assert_allclose(loss, -np.mean(weights), rtol=1e-5)
    assert len(np.unique(drawn)) == drawn.size, "samples share their randomness"


def test_the_loss_depends_on_the_stream_alone():
    one, two, three = (run(2, key=jax.random.key(seed))[0] for seed in (1, 1, 2))
    assert one == two != three


def test_samples_average_over_distinct_draws():
    """The variance of the mean of n log weights is 1/n of that of one."""
    many = jax.jit(jax.vmap(lambda key: run(8, key=key)[1]))(jax.random.split(KEY, 4000))
    ones, means = many[:, 0], many.mean(axis=1)
    ratio = means.var() / ones.var()
    # Of a ratio of two variances, each with a relative error of about sqrt(2 / n) for weights near a Gaussian.
    assert abs(ratio * 8 - 1) < 4 * np.sqrt(4 / 4000) * 1.5
    assert np.all(np.std(many, axis=1) > 0)


def test_value_and_gradient_are_unbiased():
    """Against the closed form, at parameters that are not optimal: 4 standard errors of 10,000 draws."""

    @jax.jit
    @jax.vmap
    def estimate(key):
        return jax.value_and_grad(lambda params: run(1, params, key)[0])(PARAMS)

    values, grads = estimate(jax.random.split(KEY, 10_000))
    want, want_grads = jax.value_and_grad(lambda params: -exact_bound(params))(PARAMS)

    def check(samples, expected):
        samples = np.asarray(samples, np.float64)
        error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
        assert np.all(np.abs(samples.mean(axis=0) - expected) <= 4 * error + 1e-5)
        assert np.all(error < 0.1), "the bound says nothing"

    check(values, want)
    jax.tree.map(check, grads, want_grads)


def test_at_the_exact_posterior_every_log_weight_is_the_evidence():
    mean = PARAMS["model"]["mean"]
    params = {"model": {"mean": mean}, "guide": exact_posterior(mean)}
    loss, weights = run(16, params)
    np.testing.assert_allclose(weights, np.full(16, evidence(mean)), rtol=1e-5)
    np.testing.assert_allclose(loss, -evidence(mean), rtol=1e-5)
    # There the bound is tight, so its gradient in the model is that of the evidence.
    grads = jax.grad(lambda params: run(16, params)[0])(params)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(grads["model"]))


def test_both_sides_get_gradients_and_may_be_held():
    grads = jax.grad(lambda params: run(1, params)[0])(PARAMS)
    for leaf in jax.tree.leaves(grads):
        assert np.all(np.isfinite(leaf)) and np.all(leaf != 0)

    def held(model):
        return run(1, {"model": model, "guide": jax.lax.stop_gradient(PARAMS["guide"])})[0]

    np.testing.assert_allclose(jax.grad(held)(PARAMS["model"])["mean"], grads["model"]["mean"], rtol=1e-5)


def test_diagnostics_are_sown_only_where_they_are_asked_for():
    objective = ELBO(Model(), Guide(), num_samples=3)
    assert objective.apply({"params": PARAMS}, OBSERVED, rngs={"choice": KEY}).shape == ()
    loss, weights = run(3)
    assert weights.shape == (3,)
    np.testing.assert_allclose(loss, -weights.mean(), rtol=1e-6)
    assert run(1)[1].shape == (1,)


def test_arguments_go_to_model_and_guide():
    @gen
    def model(scale):
        z = trace("z", Normal)(0.0, scale)
        return trace("x", Normal)(z, 1.0)

    @gen
    def guide(x, shift):
        return trace("z", Normal)(x + shift, 0.5)

    objective = ELBO(model, guide, num_samples=2)

    def loss(scale, x, shift):
        return objective.apply({}, {"x": x}, (scale,), (x, shift), rngs={"choice": KEY})

    grads = jax.grad(loss, argnums=(0, 1, 2))(2.0, 0.5, 0.1)
    assert all(np.isfinite(grad) and grad != 0 for grad in grads)
    np.testing.assert_allclose(loss(2.0, 0.5, 0.1), loss(jnp.float32(2.0), 0.5, 0.1))


def test_an_amortised_model_of_many_points():
    """Model and guide are maps over data, with shared parameters, and the bound is a sum over the points."""

    class Point(GenModule):
        @nn.compact
        def __call__(self, x):
            z = trace("z", Normal)(0.0, 1.0)
            return trace("y", Normal)(nn.Dense(1)(x)[0] + z, 0.5)

    class Encoder(GenModule):
        @nn.compact
        def __call__(self, x, y):
            loc = nn.Dense(1)(jnp.append(x, y))[0]
            return trace("z", Normal)(loc, 0.7)

    objective = ELBO(Map(Point(), in_axes=0), Map(Encoder(), in_axes=0), num_samples=2)
    xs, ys = jnp.arange(6.0).reshape(3, 2), jnp.array([0.5, -1.0, 2.0])
    variables = jax.jit(objective.init)(KEY, {"y": ys}, (xs,), (xs, ys))
    assert variables["params"]["model"]["Dense_0"]["kernel"].shape == (2, 1)

    def loss(params):
        return objective.apply({"params": params}, {"y": ys}, (xs,), (xs, ys), rngs={"choice": KEY})

    value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"])
    assert np.isfinite(value)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(grads))


def test_supports_of_guides_are_not_only_real_numbers():
    """Exponential choices have a pathwise gradient too: z ~ Exp(1) under q = Exp(rate), log weights by hand."""

    @gen
    def model():
        return trace("z", Exponential)(1.0)

    @gen
    def guide(rate):
        return trace("z", Exponential)(rate)

    def bound(key, rate):
        return -ELBO(model, guide, num_samples=1).apply({}, {}, (), (rate,), rngs={"choice": key})

    estimates = jax.jit(jax.vmap(jax.value_and_grad(bound, argnums=1), in_axes=(0, None)))
    values, grads = estimates(jax.random.split(KEY, 10_000), 2.0)
    # E[−z − log 2 + 2 z] with E z = 1/2; in general −1/rate − log rate + 1, with slope 1/rate² − 1/rate.
    for samples, want in ((values, 0.5 - np.log(2.0)), (grads, -0.25)):
        error = np.std(samples) / 100.0
        assert abs(np.mean(samples) - want) <= 4 * error + 1e-6


@gen
def coins():
    return trace(("deep", "coin"), Bernoulli)(probs=0.5)


def test_sticking_the_landing_refuses_a_choice_without_reparameterisation_wherever_it_stands():
    @gen
    def nested():
        return trace("outer", Map(coins, repeats=2))()

    objective = ELBO(nested, nested, sticking_the_landing=True)
    with pytest.raises(gjflax.NotReparameterizedError, match=r'"outer", "deep", "coin"\) \(Bernoulli'):
        jax.eval_shape(lambda: objective.init(KEY, {}))


def test_a_distribution_of_ones_own_says_whether_it_is_reparameterised():
    def sample(key, loc):
        return loc + jax.random.normal(key)

    def logpdf(value, loc):
        return jax.scipy.stats.norm.logpdf(value, loc)

    for declared in (True, False):
        own = distribution(sample, logpdf, reparameterized=declared)
        guide = gen(lambda loc, own=own: trace("z", own)(loc))

        def loss(loc, guide=guide):
            model = gen(lambda: trace("z", Normal)(0.0, 1.0))
            return ELBO(model, guide).apply({}, {}, (), (loc,), rngs={"choice": KEY})

        if declared:
            # With scale 1 on both sides the loss is (z² − ε²) / 2 at z = loc + ε, so its slope is z.
            drawn = loss(1.5)
            epsilon = (2 * drawn - 1.5**2) / 3.0
            np.testing.assert_allclose(jax.grad(loss)(1.5), 1.5 + epsilon, rtol=1e-4)
        else:
            # Else it has the score function, z − loc, times the cost: (ε² − z²) / 2 for the loss, and ∇ log q itself.
            drawn = loss(1.5)
            epsilon = (2 * drawn - 1.5**2) / 3.0
            np.testing.assert_allclose(jax.grad(loss)(1.5), epsilon * drawn + epsilon, rtol=1e-4)


def test_untraced_randomness_of_a_guide_differs_between_samples():
    class Noisy(GenModule):
        @nn.compact
        def __call__(self):
            shift = jax.random.normal(self.make_rng("noise"))
            self.sow("intermediates", "shift", shift)
            return trace("z", Normal)(shift, 1.0)

    objective = ELBO(gen(lambda: trace("z", Normal)(0.0, 1.0)), Noisy(), num_samples=4)
    streams = {"choice": KEY, "noise": KEY}
    _, state = objective.apply({}, {}, rngs=streams, mutable=["intermediates"])
    assert len(np.unique(state["intermediates"]["guide"]["shift"][0])) == 4


# Its options -----------------------------------------------------------------------------------------------------------


def gradients(num_draws: int, params: Any = PARAMS, **options: Any) -> Any:
    """Draws of the loss and its gradient."""
    objective = ELBO(Model(), Guide(), **options)

    def loss(params: Any, key: Any) -> Any:
        return objective.apply({"params": params}, OBSERVED, rngs={"choice": key})

    keys = jax.random.split(KEY, num_draws)
    return jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))(params, keys)


def test_sticking_the_landing_has_no_variance_at_the_posterior():
    mean = PARAMS["model"]["mean"]
    params = {"model": {"mean": mean}, "guide": exact_posterior(mean)}
    _, grads = gradients(8, params, sticking_the_landing=True)
    for leaf in jax.tree.leaves(grads["guide"]):
        np.testing.assert_allclose(leaf, np.zeros_like(leaf), atol=2e-5)
    _, others = gradients(8, params)
    assert np.std(others["guide"]["log_scale"]) > 0.1


def test_sticking_the_landing_is_unbiased_and_keeps_the_value():
    """4 standard errors of 10,000 draws, at parameters that are not optimal."""
    _, grads = gradients(10_000, sticking_the_landing=True)
    want = jax.grad(lambda params: -exact_bound(params))(PARAMS)
    assert_unbiased(grads, jax.tree.map(np.asarray, want))
    np.testing.assert_allclose(
        ELBO(Model(), Guide(), sticking_the_landing=True).apply({"params": PARAMS}, OBSERVED, rngs={"choice": KEY}),
        run(1)[0],
        rtol=1e-5,
    )


def test_an_analytic_divergence_by_hand():
    """log p(x | z) is sampled, and KL(q || p) of Gaussians is a formula."""
    params = PARAMS["guide"]
    mean, scale = params["loc"], jnp.exp(params["log_scale"])
    prior = PARAMS["model"]["mean"]
    kl = jnp.sum(jnp.log(SCALE / scale) + (scale**2 + (mean - prior) ** 2) / (2 * SCALE**2) - 0.5)
    objective = ELBO(Model(), Guide(), num_samples=4, analytic_kl=True)
    loss, state = objective.apply({"params": PARAMS}, OBSERVED, rngs={"choice": KEY}, mutable=["diagnostics"])
    terms = state["diagnostics"]["terms"]
    np.testing.assert_allclose(terms["z"], -kl, rtol=1e-5)
    np.testing.assert_allclose(-loss, terms["z"] + terms["x"], rtol=1e-5)


def test_an_analytic_divergence_is_unbiased_and_varies_less():
    """4 standard errors of 10,000 draws."""
    values, grads = gradients(10_000, analytic_kl=True)
    want = jax.value_and_grad(lambda params: -exact_bound(params))(PARAMS)
    assert_unbiased((values, grads), jax.tree.map(np.asarray, want))
    assert variance(grads["model"]) < 1e-10, "the prior's gradient is known"


@gen
def backward_model():
    a = trace("a", Normal)(0.0, 1.0)
    return trace("b", Normal)(a, 1.0)


@gen
def backward_guide():
    b = trace("b", Normal)(0.3, 1.0)
    return trace("a", Normal)(0.5 * b, 0.7)


def test_an_analytic_divergence_waits_for_what_comes_after():
    """The model's b depends on a, which the guide draws after b: log p(b | a) − log q(b) has to be sampled; a need not."""
    objective = ELBO(backward_model, backward_guide, analytic_kl=True)

    def estimate(key: Any) -> Any:
        return objective.apply({}, {}, rngs={"choice": key}, mutable=["diagnostics"])

    losses, state = jax.jit(jax.vmap(estimate))(jax.random.split(KEY, 10_000))
    terms = state["diagnostics"]["terms"]
    # E log p(a, b) − log q(a, b), by the moments of the guide: a = 0.5 b + 0.7 ε.
    a_square, difference = 0.25 * (0.09 + 1) + 0.49, 0.25 * (0.09 + 1) + 0.49
    exact = -0.5 * a_square - 0.5 * difference + 1 + np.log(0.7)
    assert abs(np.mean(losses) + exact) <= 4 * np.std(losses) / 100
    assert np.std(terms["b"]) > 0.1
    with pytest.raises(gjflax.ArgumentError, match='demands.*"b".*draws after it'):
        ELBO(backward_model, backward_guide, analytic_kl=gjflax.select("b")).apply({}, {}, rngs={"choice": KEY})
    ELBO(backward_model, backward_guide, analytic_kl=gjflax.select("a")).apply({}, {}, rngs={"choice": KEY})


def test_an_analytic_divergence_in_a_map_and_with_the_score_function():
    @gen
    def point():
        z = trace("z", Bernoulli)(probs=0.3)
        return trace("x", Normal)(z.astype(jnp.float32), 1.0)

    @gen
    def coin(logit):
        return trace("z", Bernoulli)(logit)

    logits = jnp.array([0.3, -0.8, 1.2])
    objective = ELBO(Map(point, repeats=3), Map(coin), analytic_kl=True)
    x = jnp.array([0.2, 1.0, -0.4])

    def loss(logits: Any, key: Any) -> Any:
        return objective.apply({}, {"x": x}, (), (logits,), rngs={"choice": key})

    def exact(logits: Any) -> Any:
        q = jax.nn.sigmoid(logits)
        likelihood = q * jax.scipy.stats.norm.logpdf(x, 1.0, 1.0) + (1 - q) * jax.scipy.stats.norm.logpdf(x)
        return jnp.sum(q * jnp.log(q / 0.3) + (1 - q) * jnp.log((1 - q) / 0.7) - likelihood)

    drawn = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))(logits, jax.random.split(KEY, 10_000))
    assert_unbiased(drawn, jax.tree.map(np.asarray, jax.value_and_grad(exact)(logits)))


@pytest.mark.parametrize("estimator", [None, gjflax.REINFORCE])
def test_an_analytic_divergence_along_a_chain(estimator: Any):
    """KL(q(z_t | z_{t−1}) || p(z_t | z_{t−1})) at each step, whose mean is known by the moments of the guide's chain."""
    drawn_from = Normal if estimator is None else estimator(Normal)

    @gen(gjflax.Unfold, max_length=3)
    def model(t, state):
        return trace("z", Normal)(0.9 * state + 0.2, 1.3)

    @gen(gjflax.Unfold, max_length=3)
    def guide(t, state, slope, scale):
        return trace("z", drawn_from)(slope * state, scale)

    objective = ELBO(model, guide, analytic_kl=gjflax.select("z"))

    def loss(params: Any, key: Any) -> Any:
        return objective.apply({}, {}, (3, 0.5), (3, 0.5, *params), rngs={"choice": key})

    def exact(params: Any) -> Any:
        slope, scale = params
        mean, variance, result = 0.5, 0.0, 0.0
        for _ in range(3):
            apart, spread = (slope - 0.9) * mean - 0.2, (slope - 0.9) ** 2 * variance
            result += jnp.log(1.3 / scale) + (scale**2 + apart**2 + spread) / (2 * 1.3**2) - 0.5
            mean, variance = slope * mean, slope**2 * variance + scale**2
        return result

    params = (jnp.float32(0.4), jnp.float32(0.8))
    drawn = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))(params, jax.random.split(KEY, 10_000))
    assert_unbiased(drawn, jax.tree.map(np.asarray, jax.value_and_grad(exact)(params)))


def test_an_analytic_divergence_of_a_chain_waits_for_what_the_guide_draws_later_in_a_step():
    @gen(gjflax.Unfold, max_length=2)
    def model(t, state):
        w = trace("w", Normal)(state, 1.0)
        return trace("z", Normal)(w, 1.0)

    @gen(gjflax.Unfold, max_length=2)
    def guide(t, state):
        z = trace("z", Normal)(state, 1.0)
        trace("w", Normal)(z, 1.0)
        return z

    objective = ELBO(model, guide, analytic_kl=gjflax.select("z"))
    with pytest.raises(gjflax.ArgumentError, match='demands.*"z".*draws after it'):
        objective.apply({}, {}, (2, 0.0), (2, 0.0), rngs={"choice": KEY})


def test_guides_side_by_side_in_an_elbo():
    """One enumerates, one is built from the model: the mean loss and gradient of both are the exact ones."""

    @gen
    def model():
        k = trace("k", Bernoulli)(0.3).astype(jnp.float32)
        mu = trace("mu", Normal)(0.0, 1.0)
        return trace("y", Normal)(mu + 2.0 * k, 1.0)

    class OfK(GenModule):
        @nn.compact
        def __call__(self):
            trace("k", gjflax.ENUM(Bernoulli))(logits=self.param("logits", nn.initializers.zeros, ()))

    for rest in (gjflax.AutoNormal, gjflax.AutoMultivariateNormal):
        guide = gjflax.AutoGuides(OfK(), rest(model, {"y": 1.0}, selection=gjflax.select("mu"), initial_scale=0.5))
        objective = ELBO(model, guide)
        variables = objective.init(KEY, {"y": 1.0})

        def loss(variables: Any, key: Any, objective: Any = objective) -> Any:
            return objective.apply(variables, {"y": 1.0}, rngs={"choice": key})

        flat, structure = jax.tree.flatten(variables)

        def exact(flat: Any, structure: Any = structure, kind: Any = rest) -> Any:
            logits = structure.unflatten(flat)["params"]["guide"]["guides_0"]["logits"]
            own = structure.unflatten(flat)["params"]["guide"]["guides_1"]
            loc, log_scale = (jnp.ravel(jnp.stack(jax.tree.leaves(own[name])))[0] for name in ("loc", "log_scale"))
            q, p, square = jax.nn.sigmoid(logits), jax.nn.sigmoid(0.3), jnp.exp(2 * log_scale)
            of_k = q * jnp.log(q / p) + (1 - q) * jnp.log((1 - q) / (1 - p))
            of_mu = 0.5 * (square + loc**2 - 1) - log_scale
            fit = [0.5 * jnp.log(2 * jnp.pi) + 0.5 * ((1.0 - loc - 2.0 * k) ** 2 + square) for k in (0, 1)]
            return of_k + of_mu + (1 - q) * fit[0] + q * fit[1]

        keys = jax.random.split(KEY, 10_000)
        values, grads = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))(variables, keys)
        value, slopes = jax.value_and_grad(exact)(flat)
        assert_unbiased((values, jax.tree.leaves(grads)), (np.asarray(value), jax.tree.map(np.asarray, slopes)))


def test_what_an_inlined_guide_enumerates_stays_side_by_side():
    """20 assignments of a mixture, below an address that is moved up: two runs, not 2²⁰, and the same loss."""

    @gen
    def point(mu):
        k = trace("k", Bernoulli)(probs=0.3)
        return trace("x", Normal)(jnp.where(k == 1, mu, -mu), 1.0)

    @gen
    def model():
        mu = trace("mu", Normal)(0.0, 1.0)
        return trace("points", Map(point, in_axes=None, repeats=20))(mu)

    @gen
    def coin(logit):
        trace("k", gjflax.ENUM(Bernoulli))(logit)

    @gen
    def of_k(logits):
        trace("points", Map(coin))(logits)

    @gen
    def guide(logits):
        trace("sub", of_k)(logits)
        trace("mu", gjflax.Deterministic)(0.5)

    x, logits = jnp.linspace(-2.0, 2.0, 20), jnp.linspace(-1.0, 1.5, 20)
    objective = ELBO(model, gjflax.Inline(guide, "sub"))
    loss = objective.apply({}, {"points": {"x": x}}, (), (logits,), rngs={"choice": KEY})
    q, density = jax.nn.sigmoid(logits), jax.scipy.stats.norm.logpdf
    each = q * (jnp.log(0.3 / q) + density(x, 0.5)) + (1 - q) * (jnp.log(0.7 / (1 - q)) + density(x, -0.5))
    np.testing.assert_allclose(-loss, density(0.5) + each.sum(), rtol=1e-5)


def test_diagnostics_have_terms_by_address_and_an_effective_sample_size():
    objective = ELBO(Model(), Guide(), num_samples=4)
    loss, state = objective.apply({"params": PARAMS}, OBSERVED, rngs={"choice": KEY}, mutable=["diagnostics"])
    found = state["diagnostics"]
    weights = np.exp(np.asarray(found["log_weights"], np.float64))
    np.testing.assert_allclose(found["effective_sample_size"], weights.sum() ** 2 / (weights**2).sum(), rtol=1e-4)
    assert set(found["terms"]) == {"z", "x"}
    np.testing.assert_allclose(found["terms"]["z"] + found["terms"]["x"], -loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"analytic_kl": "z"}, "analytic_kl.*select"),
        ({"analytic_kl": True, "sticking_the_landing": True}, "exclude each other"),
        ({"baseline": "mean"}, "LeaveOneOut"),
    ],
)
def test_options_of_another_form_are_refused(options: Any, match: str):
    with pytest.raises(gjflax.ArgumentError, match=match):
        ELBO(Model(), Guide(), **options)


def test_a_choice_that_neither_draws_is_missing_with_the_score_function_too():
    model = gen(lambda: (trace("z", Bernoulli)(0.0), trace("y", Normal)(0.0, 1.0)))
    guide = gen(lambda: trace("z", Bernoulli)(0.0))
    with pytest.raises(gjflax.MissingChoiceError, match='"y" is neither observed nor drawn'):
        ELBO(model, guide).apply({}, {}, rngs={"choice": KEY})
    with pytest.raises(gjflax.UnvisitedConstraintError, match='"yy"'):
        ELBO(model, guide).apply({}, {"yy": 0.0}, rngs={"choice": KEY})


@pytest.mark.slow
def test_a_discrete_guide_initialises_compiles_and_leaves_no_tracers(no_leaks: Any):
    class Discrete(GenModule):
        @nn.compact
        def __call__(self):
            trace("z", Bernoulli)(self.param("logit", nn.initializers.zeros, ()))

    @gen
    def model():
        z = trace("z", Bernoulli)(probs=0.3)
        return trace("x", Normal)(z.astype(jnp.float32), 1.0)

    objective = ELBO(model, Discrete(), num_samples=2, baseline=gjflax.MovingAverage())
    variables = no_leaks(lambda: objective.init(KEY, {"x": 0.5}))
    assert set(variables) == {"params", "baselines"} and set(variables["params"]) == {"guide"}

    def step(variables: Any) -> Any:
        return objective.apply(variables, {"x": 0.5}, rngs={"choice": KEY}, mutable=["baselines"])

    (plain_loss, plain_state), (loss, state) = step(variables), jax.jit(step)(variables)
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, plain_state)
    assert float(jax.tree.leaves(state["baselines"])[0]) != 0

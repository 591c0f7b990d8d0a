"""Guides for the choices of a population, of which the model has a batch."""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learning.guides import models

import gjflax
from gjflax import (
    AmortizedNormal,
    AutoDelta,
    AutoGuides,
    AutoMultivariateNormal,
    AutoNormal,
    Map,
    Normal,
    gen,
    select,
    trace,
)

KEY = jax.random.key(0)
N = 4
X = jnp.array([0.5, -1.0, 2.0, 1.5])
Y = jnp.array([1.0, -0.3, 2.2, 0.7])


@gen
def model(x):
    mu = trace("mu", Normal)(0.0, 2.0)
    return trace("data", Map(models.element, in_axes=(0, None), total=N))(x, mu)


def moved(variables):
    return jax.tree.map(lambda leaf: leaf + 0.3 * jnp.arange(1.0, leaf.size + 1).reshape(leaf.shape), variables)


def test_rows_by_index():
    guide = AutoNormal(model, {("data", "y"): Y[:2]}, (X[:2],))
    indices = jnp.array([3, 1])
    variables = moved(guide.init(KEY, indices))
    assert jax.tree.map(jnp.shape, variables["params"]["loc"]) == {"data": {"z": (N,)}, "mu": ()}
    _, tr = guide.bind(variables).simulate(KEY, (indices,))
    loc, scale = (variables["params"][name]["data"]["z"][indices] for name in ("loc", "log_scale"))
    z, terms = tr["data", "z"], dict(tr.leaves())
    want = jax.scipy.stats.norm.logpdf(z, loc, jnp.exp(scale))
    np.testing.assert_allclose(terms["data", "z"].get_score(), want, rtol=1e-4)
    np.testing.assert_allclose(
        tr.get_score(), N / 2 * want.sum() + terms["mu",].get_score(), rtol=1e-4, err_msg="an element counts N/n times"
    )


@pytest.mark.slow
def test_batches_of_any_size_are_unbiased():
    """The mean over all batches of a size, of value and gradient, is that of all data: for points, which have no noise."""
    full = gjflax.ELBO(model, AutoDelta(model, {("data", "y"): Y}, (X,)))
    variables = moved(full.init(KEY, {("data", "y"): Y}, (X,), (jnp.arange(N),)))

    def value_and_grad(indices):
        def loss(variables):
            return full.apply(variables, {("data", "y"): Y[indices]}, (X[indices],), (indices,), rngs={"choice": KEY})

        return jax.value_and_grad(loss)(variables)

    whole = value_and_grad(jnp.arange(N))
    for size in (1, 3):
        batches = jnp.array(list(itertools.combinations(range(N), size)))
        means = jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(value_and_grad)(batches))
        np.testing.assert_allclose(means[0], whole[0], rtol=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), means[1], whole[1])


def test_what_a_population_needs():
    guide = AutoNormal(model, {("data", "y"): Y[:2]}, (X[:2],))
    variables = guide.init(KEY, jnp.arange(2))
    with pytest.raises(gjflax.ArgumentError, match="a vector of integers; got no argument"):
        guide.bind(variables).simulate(KEY, ())
    with pytest.raises(gjflax.ArgumentError, match="a vector of integers; got float32"):
        guide.bind(variables).simulate(KEY, (X[:2],))
    with pytest.raises(gjflax.NotImplementedByGenerativeFunctionError, match="batch of a population"):
        AutoMultivariateNormal(model, {("data", "y"): Y[:2]}, (X[:2],)).init(KEY)


@gen
def bounded(high, x):
    z = trace("z", gjflax.Uniform)(0.0, high)
    return trace("y", Normal)(z * x, 0.5)


@gen
def of_dependent_supports(x):
    return trace("data", Map(bounded, in_axes=(None, 0), total=N))(trace("high", gjflax.Gamma)(2.0, 1.0), x)


@pytest.mark.slow
def test_supports_that_depend_on_a_choice_in_batches_of_another_size():
    guide = AutoNormal(of_dependent_supports, {("data", "y"): Y[:2]}, (X[:2],))
    indices = jnp.arange(3)
    variables = moved(guide.init(KEY, indices[:2]))
    _, tr = guide.bind(variables).simulate(KEY, (indices[:2],))
    with pytest.raises(
        gjflax.ArgumentError, match=r"a batch of 2 elements, and is called with 3.*\(indices, \*model_args\)"
    ):
        guide.bind(variables).simulate(KEY, (indices,))
    _, tr = guide.bind(variables).simulate(KEY, (indices, X[:3]))
    high, z = tr["high"], tr["data", "z"]
    assert z.shape == (3,) and bool(jnp.all((z > 0) & (z < high)))
    # By the change of variables z = high · sigmoid(u), and high by the softplus of TFP.
    loc, scale = (variables["params"][name]["data"]["z"][:3] for name in ("loc", "log_scale"))
    u = jnp.log(z / high) - jnp.log1p(-z / high)
    want = jax.scipy.stats.norm.logpdf(u, loc, jnp.exp(scale)) - jnp.log(z) - jnp.log1p(-z / high)
    np.testing.assert_allclose(dict(tr.leaves())["data", "z"].get_score(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_batch_of_a_population_has_no_doubly_reparameterised_gradient():
    """log q in the weight would not be the log density of the draw."""
    observed, indices = {("data", "y"): Y[:2]}, jnp.arange(2)

    @gen
    def by_hand(x, indices):
        trace("mu", Normal)(0.0, 1.0)
        trace("data", Map(gen(lambda x: trace("z", Normal)(x, 1.0)), total=N))(x)

    for guide, args in ((AutoNormal(model, observed, (X[:2],)), (indices,)), (by_hand, (X[:2], indices))):
        objective = gjflax.ImportanceWeightedELBO(model, guide, num_samples=2, doubly_reparameterized=True)
        variables = objective.init(KEY, observed, (X[:2],), args)
        with pytest.raises(gjflax.ArgumentError, match="`total`.*doubly_reparameterized=False"):
            objective.apply(variables, observed, (X[:2],), args, rngs={"choice": KEY})


@pytest.mark.slow
def test_amortised_guide_of_the_elements_beside_one_of_the_rest():
    """Batches of any size; and the density by hand."""
    observed = {("data", "y"): Y[:2]}
    encoder = nn.Sequential([nn.Dense(4), nn.tanh])
    local = AmortizedNormal(model, observed, (X[:2],), select(("data", "z")), encoder=encoder)
    shared = AutoNormal(model, observed, (X[:2],), select("mu"))
    guide = AutoGuides(local, shared, own_arguments=True)
    objective = gjflax.ELBO(model, guide, num_samples=2)
    inputs = jnp.stack([X, Y], axis=1)
    variables = objective.init(KEY, observed, (X[:2],), ((inputs[:2],), ()))

    @jax.jit
    def loss(variables, x, y):
        inputs = jnp.stack([x, y], axis=1)
        return objective.apply(variables, {("data", "y"): y}, (x,), ((inputs,), ()), rngs={"choice": KEY})

    for size in (2, 3):
        assert np.isfinite(loss(variables, X[:size], Y[:size]))
    grads = jax.grad(loss)(variables, X, Y)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_amortised_density_by_hand():
    @gen
    def single(x):
        z = trace("z", Normal)(jnp.zeros(2), 1.0)
        return trace("y", Normal)(z.sum() * x, 1.0)

    guide = AmortizedNormal(Map(single), {"y": Y}, (X,), encoder=nn.Dense(3))
    variables = guide.init(KEY, Y[:, None])
    params = variables["params"]
    _, tr = guide.bind(variables).simulate(KEY, (Y[:, None],))

    def dense(x, name):
        return np.asarray(x) @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])

    h = dense(Y[:, None], "encoder")
    loc, log_scale = dense(h, "loc_z"), dense(h, "log_scale_z")
    want = jax.scipy.stats.norm.logpdf(tr["z"], loc, jnp.exp(log_scale)).sum()
    np.testing.assert_allclose(tr.get_score(), want, rtol=1e-4)
    np.testing.assert_allclose(guide.bind(variables).assess(KEY, tr.strip(), (Y[:, None],))[1][1], want, rtol=1e-4)
    with pytest.raises(gjflax.ArgumentError, match="inputs of its encoder"):
        guide.bind(variables).simulate(KEY, ())


@pytest.mark.parametrize("amortised", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_terms_and_divergences_of_each_choice(amortised):
    """KL(q || p) of normal choices by its formula, for the population's elements N/n times; and log p − log q by choice."""
    observed, batch, indices = {("data", "y"): Y[:2]}, X[:2], jnp.array([3, 1])

    @gen
    def one(x, mu):
        z = trace("z", Normal)(0.5, 1.3)
        return trace("y", Normal)(z * x + mu, 0.6)

    @gen
    def model(x):
        mu = trace("mu", Normal)(0.0, 2.0)
        return trace("data", Map(one, in_axes=(0, None), total=N))(x, mu)

    of_mu = AutoNormal(model, observed, (batch,), selection=select("mu"))
    if amortised:
        encoder = nn.Sequential([nn.Dense(4), nn.tanh])
        of_z = AmortizedNormal(model, observed, (batch,), selection=select(("data", "z")), encoder=encoder)
        guide, guide_args = AutoGuides(of_mu, of_z, own_arguments=True), ((), (Y[:2, None],))
    else:
        guide, guide_args = AutoNormal(model, observed, (batch,)), (indices,)

    objective = gjflax.ELBO(model, guide, analytic_kl=select("mu", ("data", "z")))
    variables = moved(objective.init(KEY, observed, (batch,), guide_args))
    run = lambda objective: objective.apply(
        variables, observed, (batch,), guide_args, rngs={"choice": KEY}, mutable=["diagnostics"]
    )
    _, noted = run(objective)
    _, sampled = run(gjflax.ELBO(model, guide))
    bound = guide.bind({"params": variables["params"]["guide"]})
    normals = {}
    for address, leaf in bound.simulate(KEY, guide_args)[1].leaves():
        assert leaf.get_gen_fn() == Normal, address
        normals[address] = [np.asarray(arg, np.float64) for arg in leaf.get_args()]
        want = jax.scipy.stats.norm.logpdf(leaf.get_retval(), *leaf.get_args())
        np.testing.assert_allclose(leaf.get_score(), want, rtol=1e-4, err_msg="not what the value was drawn from")
    for address, mean, prior_scale, factor in ((("mu",), 0.0, 2.0, 1.0), (("data", "z"), 0.5, 1.3, N / 2)):
        loc, scale = normals[address]
        name = "/".join(address)
        exact = factor * np.sum(
            np.log(prior_scale / scale) + (scale**2 + (loc - mean) ** 2) / (2 * prior_scale**2) - 0.5
        )
        np.testing.assert_allclose(-noted["diagnostics"]["terms"][name], exact, rtol=1e-4)
        assert name in sampled["diagnostics"]["terms"]
    np.testing.assert_allclose(
        sum(sampled["diagnostics"]["terms"].values()), sampled["diagnostics"]["log_weights"][0], rtol=1e-5
    )


def test_an_encoder_runs_once_in_every_method():
    """With dropout, the scores are those of the draws: of a narrow normal a point of another mask has a density of about 0."""

    @gen
    def pair():
        a = trace("a", Normal)(0.0, 1.0)
        b = trace("b", Normal)(0.0, 1.0)
        trace("y", Normal)(a + b, 1.0)

    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls = self.variable("batch_stats", "calls", lambda: jnp.zeros((), jnp.int32))
            calls.value += 1
            return nn.Dropout(0.5, deterministic=False)(x)

    x = jnp.arange(1.0, 9.0)
    guide = AmortizedNormal(pair, {"y": 1.0}, encoder=Encoder(), initial_scale=1e-3)
    rngs = {name: jax.random.fold_in(KEY, number) for number, name in enumerate(("choice", "dropout"))}
    variables = guide.init({"params": KEY, **rngs}, x)

    def run(method, *args):
        (_, result), written = guide.apply(variables, KEY, *args, method=method, rngs=rngs, mutable=["batch_stats"])
        before = variables["batch_stats"]["encoder"]["calls"]
        assert written["batch_stats"]["encoder"]["calls"] == before + 1, method
        return result

    tr = run("simulate", (x,))
    _, given = run("importance", {"a": tr["a"]}, (x,))
    _, _, redrawn = run("regenerate", tr, select("b"), (x,))
    for one in (tr, given, redrawn):
        assert all(leaf.get_score() > 0 for _, leaf in one.leaves()), (
            "log densities at 4 standard deviations are above 0 here"
        )

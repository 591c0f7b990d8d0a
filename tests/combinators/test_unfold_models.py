"""`Unfold`: models with closed forms, and derivatives against them and against central differences."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.chain import ARGS, DRAW, KEY, NAMES, STATE, N, central, chain, close, plain, total
from scipy import stats

from gjflax import (
    AllSelection,
    Categorical,
    Diff,
    Exponential,
    Masked,
    Normal,
    Unfold,
    Uniform,
    VectorChoiceMap,
    choice_map,
    gen,
    select,
    trace,
)


@pytest.fixture(scope="module")
def tr() -> Any:
    return jax.jit(lambda key: chain.simulate(key, (N, *ARGS))[1])(DRAW)


# Models with closed forms ----------------------------------------------------------------------------------------------

A, B, Q, C, R, T = 0.8, 0.3, 0.6, 1.5, 0.7, 5
"""A linear Gaussian state space: x' = A x + B + Q e, y = C x + R e'."""


@gen(Unfold, max_length=T)
def linear(time, x):
    x = trace("x", Normal)(A * x + B, Q)
    trace("y", Normal)(C * x, R)
    return x


def joint(start: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of (x_1, ..., x_T, y_1, ..., y_T)."""
    mean, x = [], start
    for _ in range(T):
        x = A * x + B
        mean.append(x)
    # x - E x = L e, with L of powers of A.
    steps = np.subtract.outer(np.arange(T), np.arange(T))
    lower = np.where(steps >= 0, Q * A ** np.maximum(steps, 0).astype(float), 0.0)
    of_x = lower @ lower.T
    noise = R**2 * np.eye(T)
    covariance = np.block([[of_x, C * of_x], [C * of_x, C**2 * of_x + noise]])
    return np.concatenate([mean, C * np.array(mean)]), covariance


def test_a_linear_gaussian_chain_is_a_multivariate_normal():
    values = np.random.default_rng(0).normal(size=(2, T)).astype(np.float32)
    mean, covariance = joint(0.4)
    _, (_, score) = linear.assess(KEY, {"x": values[0], "y": values[1]}, (T, 0.4))
    close(score, stats.multivariate_normal.logpdf(np.concatenate(values), mean, covariance))
    # A prefix of the chain is one of the distribution.
    _, (_, score) = linear.assess(KEY, {"x": values[0], "y": values[1]}, (3, 0.4))
    at = np.array([0, 1, 2, T, T + 1, T + 2])
    close(score, stats.multivariate_normal.logpdf(values[:, :3].ravel(), mean[at], covariance[np.ix_(at, at)]))


def within_four_errors(samples: Any, want: float) -> None:
    samples = np.asarray(samples, np.float64)
    error = samples.std() / np.sqrt(samples.size)
    assert abs(samples.mean() - want) < 4 * error, (samples.mean(), want, error)


def test_weights_estimate_the_marginal_likelihood():
    """20,000 samples; the estimate is of p(y), and of p(y_2, y_4) where only these are given."""
    y = jnp.array([0.5, 1.0, -0.5, 2.0, 1.0])
    mean, covariance = joint(0.4)

    def estimate(given):
        keys = jax.random.split(KEY, 20_000)
        return jax.jit(jax.vmap(lambda key: linear.importance(key, given, (T, 0.4))[1][0]))(keys)

    for given, at in [
        (choice_map({"y": y}), np.arange(T)),
        (VectorChoiceMap([3, 1], {"y": y[jnp.array([3, 1])]}), np.array([3, 1])),
    ]:
        want = stats.multivariate_normal.pdf(np.asarray(y)[at], mean[T + at], covariance[np.ix_(T + at, T + at)])
        within_four_errors(np.exp(np.float64(estimate(given))), want)


@pytest.mark.slow
def test_draws_have_the_joint_distribution():
    """20,000 draws: every mean and covariance within 4 standard errors."""
    keys = jax.random.split(KEY, 20_000)
    draws = jax.jit(jax.vmap(lambda key: linear.simulate(key, (T, 0.4))[1].strip()))(keys)
    values = np.concatenate([np.float64(draws["x"]), np.float64(draws["y"])], axis=1)
    mean, covariance = joint(0.4)
    centred = values - mean
    errors = np.sqrt(np.diag(covariance) / len(values))
    assert np.all(np.abs(centred.mean(axis=0)) < 4 * errors)
    products = centred[:, :, None] * centred[:, None, :]
    errors = products.std(axis=0) / np.sqrt(len(values))
    assert np.all(np.abs(products.mean(axis=0) - covariance) < 4 * errors)


TRANSITION = np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.1, 0.6, 0.3]])
EMISSION = np.array([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]])
SEEN = np.array([1, 0, 0, 1])


@gen
def hidden(time, z, log_transition, log_emission):
    z = trace("z", Categorical)(log_transition[z])
    trace("y", Categorical)(log_emission[z])
    return z


markov = Unfold(hidden, 4)
MARKOV_ARGS = (jnp.int32(0), jnp.log(TRANSITION.astype(np.float32)), jnp.log(EMISSION.astype(np.float32)))


def path_probabilities() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All paths, their prior probabilities, and those of what was seen given each."""
    paths = np.array(list(itertools.product(range(3), repeat=4)))
    before = np.concatenate([np.zeros((81, 1), int), paths[:, :-1]], axis=1)
    return paths, TRANSITION[before, paths].prod(axis=1), EMISSION[paths, SEEN].prod(axis=1)


def test_a_hidden_markov_model_by_enumeration():
    paths, prior, likelihood = path_probabilities()

    def score(path):
        return markov.assess(KEY, {"z": path, "y": SEEN}, (4, *MARKOV_ARGS))[1][1]

    scores = jax.jit(jax.vmap(score))(jnp.asarray(paths, jnp.int32))
    close(np.exp(scores), prior * likelihood)
    # The sum over all paths is the forward algorithm.
    alpha = np.eye(3)[0]
    for seen in SEEN:
        alpha = (alpha @ TRANSITION) * EMISSION[:, seen]
    close(np.exp(np.float64(scores)).sum(), alpha.sum())


def test_the_expected_weight_is_the_likelihood_by_enumeration():
    """Given what was seen, a path comes with its prior probability and weighs what was seen: E[exp w] = p(y), exactly.

    And 20,000 samples: every path about as often as it should come, and the mean weight.
    """
    paths, prior, likelihood = path_probabilities()
    keys = jax.random.split(KEY, 20_000)
    weights, drawn = jax.jit(jax.vmap(lambda key: _weight_and_path(key)))(keys)
    number = np.asarray(drawn) @ np.array([27, 9, 3, 1])
    close(np.exp(weights), likelihood[number])
    counts = np.bincount(number, minlength=81)
    assert np.all(np.abs(counts - 20_000 * prior) < 4 * np.sqrt(20_000 * prior * (1 - prior)) + 1)
    within_four_errors(np.exp(np.float64(weights)), float(prior @ likelihood))


def _weight_and_path(key: Any) -> Any:
    _, (weight, new) = markov.importance(key, {"y": jnp.asarray(SEEN)}, (4, *MARKOV_ARGS))
    return weight, new["z"]


def test_growing_step_by_step_estimates_the_likelihood():
    """A particle filter's moves: the length grows in a scan, each new step is seen, and the weights multiply."""
    _, prior, likelihood = path_probabilities()

    def run(key):
        key, tr = markov.simulate(key, (jnp.int32(0), *MARKOV_ARGS))

        def step(carry, time):
            key, tr = carry
            seen = VectorChoiceMap(time[None], {"y": jnp.asarray(SEEN)[time][None]})
            diffs = (Diff.unknown_change(time + 1), *map(Diff.no_change, tr.get_args()[1:]))
            key, (_, weight, tr, discard) = markov.update(key, tr, seen, diffs)
            overwritten = sum(jnp.sum(discard[name].flag) for name in ("z", "y"))
            return (key, tr), (weight, overwritten)

        (_, tr), (weights, overwritten) = jax.lax.scan(step, (key, tr), jnp.arange(4, dtype=jnp.int32))
        return weights, overwritten, tr["z"].value, tr["y"].value

    weights, overwritten, z, y = jax.jit(jax.vmap(run))(jax.random.split(KEY, 20_000))
    assert not np.any(overwritten)
    np.testing.assert_array_equal(y, np.broadcast_to(SEEN, y.shape))
    close(np.exp(weights), EMISSION[np.asarray(z), SEEN])
    within_four_errors(np.exp(np.float64(weights).sum(axis=1)), float(prior @ likelihood))


@pytest.mark.slow
def test_metropolis_hastings_has_the_posterior_of_a_hidden_state():
    """Each state redrawn in turn from its prior and accepted by the weight: 4,000 chains of 24 sweeps."""
    paths, prior, likelihood = path_probabilities()
    posterior = prior * likelihood / (prior @ likelihood)
    want = [posterior[paths[:, 1] == state].sum() for state in range(3)]
    args = (4, *MARKOV_ARGS)

    def run(key):
        key, (_, tr) = markov.importance(key, {"y": jnp.asarray(SEEN)}, args)

        def sweep(carry, _):
            key, tr = carry
            for time in range(4):
                key, (_, weight, new) = markov.regenerate(key, tr, select((time, "z")), args)
                key, sub_key = jax.random.split(key)
                accept = jnp.log(jax.random.uniform(sub_key)) < weight
                tr = jax.tree.map(lambda a, b, accept=accept: jnp.where(accept, a, b), new, tr)
            return (key, tr), None

        (_, tr), _ = jax.lax.scan(sweep, (key, tr), None, length=24)
        return tr["z"][1]

    states = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(KEY, 4_000)))
    for state in range(3):
        within_four_errors(states == state, want[state])


# Derivatives -----------------------------------------------------------------------------------------------------------


def test_gradients_in_choices_follow_the_recursion():
    """d/dx_t is of the step's own terms and of the next step's mean: analytically."""
    _, tr = linear.simulate(DRAW, (T, 0.4))
    x, y = np.float64(tr["x"]), np.float64(tr["y"])
    residual = x - A * np.concatenate([[0.4], x[:-1]]) - B
    want = -residual / Q**2 + C * (y - C * x) / R**2
    want[:-1] += A * residual[1:] / Q**2
    _, grads = jax.jit(lambda tr: linear.choice_grad(KEY, tr, select("x")))(tr)
    close(grads.inner["x"], want, atol=1e-3)
    _, grads = linear.choice_grad(KEY, tr, select((3, "x"), (0, "x")))
    close(grads.inner["x"], want[[0, 3]], atol=1e-3)
    _, grads = linear.arg_grad(KEY, tr, 1)
    close(grads, A * residual[0] / Q**2, atol=1e-3)


def test_gradients_against_central_differences(tr: Any):
    values = {name: np.float64(tr[name]) for name in NAMES}
    for name in ("x", "y"):
        want = central(lambda v, name=name: total({**values, name: v}), values[name])
        _, grads = chain.choice_grad(KEY, tr, select(name))
        close(grads.inner[name], want, rtol=2e-3, atol=2e-3)
    _, grads = chain.arg_grad(KEY, tr, (2, 3))
    close(grads[0], central(lambda g: total(values, (STATE, g, ARGS[2])), np.float64(ARGS[1])), rtol=2e-3, atol=2e-3)
    close(grads[1], central(lambda q: total(values, (STATE, ARGS[1], q)), np.float64(ARGS[2])), rtol=2e-3, atol=2e-3)


def test_a_chain_without_choices_doubles():
    """Ten deterministic steps: f(s) = 2^10 s, with that derivative, and no density."""

    @gen
    def double(time, state):
        return 2.0 * state

    doubling = Unfold(double, 10)
    key, tr = doubling.simulate(KEY, (10, 1.5))
    assert tr.get_retval()[-1] == 1.5 * 2**10 and tr.get_score() == 0.0 and tr.strip().is_empty()
    _, score, retval = doubling.unzip(KEY, {})
    assert jax.grad(lambda s: retval({}, 10, s)[-1])(1.5) == 2**10
    assert jax.grad(lambda s: retval({}, jnp.int32(7), s)[-1])(1.5) == 2**7
    assert score({}, 10, 1.5) == 0.0
    _, (_, weight, new, discard) = doubling.update(key, tr, {}, (10, -1.0))
    assert weight == 0.0 and new.get_retval()[3] == -16.0 and discard.is_empty()
    assert doubling.regenerate(key, tr, AllSelection(), (10, -1.0))[1][1] == 0.0


@gen
def bounded(time, state):
    """Supports that depend on the choices before."""
    width = trace("width", Exponential)(1.0 / state)
    y = trace("y", Uniform)(-width, jnp.stack([width, 2.0 * width]))
    return 0.1 + jnp.abs(y[0])


@pytest.mark.parametrize(
    "length",
    [
        pytest.param(3, id="known"),
        pytest.param(np.array(3), id="all", marks=pytest.mark.slow),
        pytest.param(np.array(2), id="some", marks=pytest.mark.slow),
    ],
)
def test_choices_map_to_the_plane_and_back(length: Any):
    model, args = Unfold(bounded, 3), (length, 0.5)
    _, tr = model.simulate(KEY, args)
    plane, log_det = model.unconstrain(tr, AllSelection())
    back, back_det = model.constrain(plane, args)
    count = int(length)
    for name in ("width", "y"):
        np.testing.assert_allclose(plain(back[name])[:count], plain(tr[name])[:count], rtol=1e-4)
    close(log_det, -back_det)
    assert jax.tree.structure(back) == jax.tree.structure(tr.strip())

    def flat(values):
        choices, _ = model.constrain({"width": values[:, 0], "y": values[:, 1:]}, args)
        return jnp.concatenate([plain_jax(choices["width"])[:count], plain_jax(choices["y"])[:count].ravel()])

    point = jnp.concatenate([plain_jax(plane["width"])[:, None], plain_jax(plane["y"])], axis=1)
    jacobian = np.asarray(jax.jacfwd(flat)(point), np.float64)[:, :count].reshape(3 * count, 3 * count)
    close(np.linalg.slogdet(jacobian)[1], back_det, atol=1e-3)
    # The step in the middle is held.
    if count == 3:
        some, some_det = model.constrain({"width": plain_jax(plane["width"])}, args, fixed={"y": plain_jax(tr["y"])})
        np.testing.assert_allclose(plain(some["width"]), plain(tr["width"]), rtol=1e-4)
        np.testing.assert_array_equal(plain(some["y"]), plain(tr["y"]))


def plain_jax(value: Any) -> Any:
    return value.value if isinstance(value, Masked) else value

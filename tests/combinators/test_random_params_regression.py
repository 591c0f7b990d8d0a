"""`RandomParams` in Bayesian linear regression: every number in closed form."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.networks import KEY, KEYS, close, f64, minimise, shapes
from jax.flatten_util import ravel_pytree
from scipy import stats

from gjflax import (
    GenModule,
    Normal,
    RandomParams,
    select,
    trace,
)

NOISE, SLOPE_SCALE, BIAS_LOC, BIAS_SCALE = 0.3, 2.0, 1.0, 0.5
INPUTS = np.array([[0.5, -1.0], [1.5, 0.2], [-0.7, 2.0], [2.2, 1.0], [-1.1, -0.4]], np.float32)
TARGETS = np.array([[0.4], [2.1], [-0.9], [2.5], [-0.2]], np.float32)
PRIOR = {"kernel": (Normal, (0.0, SLOPE_SCALE)), "bias": (Normal, (BIAS_LOC, BIAS_SCALE))}


class Regression(GenModule):
    """The one program of this part: what is learned and what is random is the selection."""

    selection: Any = None

    def setup(self):
        self.net = RandomParams(nn.Dense(1), PRIOR, self.selection)

    def __call__(self, x):
        mean = trace("net", self.net)(x)
        return trace("y", Normal)(mean, NOISE)


DESIGN = np.concatenate([INPUTS, np.ones((5, 1))], 1).astype(np.float64)
PRIOR_MEAN = np.array([0.0, 0.0, BIAS_LOC])
PRIOR_PRECISION = np.diag([SLOPE_SCALE**-2, SLOPE_SCALE**-2, BIAS_SCALE**-2])
POSTERIOR_PRECISION = PRIOR_PRECISION + DESIGN.T @ DESIGN / NOISE**2
POSTERIOR_MEAN = np.linalg.solve(
    POSTERIOR_PRECISION, PRIOR_PRECISION @ PRIOR_MEAN + DESIGN.T @ TARGETS[:, 0].astype(np.float64) / NOISE**2
)


def log_joint(kernel: Any, bias: Any, y: Any) -> float:
    kernel, bias = f64(kernel), f64(bias)
    prior = stats.norm.logpdf(kernel, 0.0, SLOPE_SCALE).sum() + stats.norm.logpdf(bias, BIAS_LOC, BIAS_SCALE).sum()
    return prior + stats.norm.logpdf(f64(y), INPUTS @ kernel + bias, NOISE).sum()


def test_the_density_is_that_of_the_closed_form():
    model = Regression()
    assert model.init(KEY, INPUTS) == {}, "nothing is left to learn"
    _, tr = model.simulate(KEY, (INPUTS,))
    assert sorted(tr.strip().addresses()) == [("net", "bias"), ("net", "kernel"), ("y",)]
    close(tr.get_score(), log_joint(tr["net", "kernel"], tr["net", "bias"], tr["y"]))
    close(tr.get_subtree("net").get_retval(), INPUTS @ f64(tr["net", "kernel"]) + f64(tr["net", "bias"]))
    close(tr.project(select(("net", "kernel"))), stats.norm.logpdf(tr["net", "kernel"], 0.0, SLOPE_SCALE).sum())
    given = {"net": {"kernel": jnp.array([[0.3], [-2.0]]), "bias": jnp.array([0.8])}, "y": TARGETS}
    _, (_, score) = model.assess(KEY, given, (INPUTS,))
    close(score, log_joint([[0.3], [-2.0]], [0.8], TARGETS))


def test_the_posterior_mode_by_gradient_ascent_is_the_closed_form():
    model = Regression()
    _, (_, tr) = model.importance(KEY, {"y": TARGETS}, (INPUTS,))
    _, score, _ = model.unzip(KEY, {"y": TARGETS})
    chosen, _ = select("net").filter(tr)
    mode = minimise(lambda choices: -score(choices, INPUTS), chosen)
    close(np.concatenate([mode["net", "kernel"][:, 0], mode["net", "bias"]]), POSTERIOR_MEAN, atol=1e-4)
    # At the mode the gradient is 0, and its derivative the posterior precision.
    _, (_, tr) = model.importance(KEY, mode.merge({"y": TARGETS}), (INPUTS,))
    _, gradient = model.choice_grad(KEY, tr, select("net"))
    close(np.concatenate([gradient["net", "kernel"][:, 0], gradient["net", "bias"]]), np.zeros(3), atol=2e-3)
    flat, unravel = ravel_pytree({"b_bias": mode["net", "bias"], "a_kernel": mode["net", "kernel"]})

    def at(flat: Any) -> Any:
        values = unravel(flat)
        return score({"net": {"kernel": values["a_kernel"], "bias": values["b_bias"]}}, INPUTS)

    close(-jax.hessian(at)(flat), POSTERIOR_PRECISION, rtol=1e-4)


def test_with_nothing_selected_it_is_maximum_likelihood():
    model = Regression(select())
    variables = model.init(KEY, INPUTS)
    assert shapes(variables["params"]) == {"net": {"kernel": (2, 1), "bias": (1,)}}
    _, (_, tr) = model.bind(variables).importance(KEY, {"y": TARGETS}, (INPUTS,))
    assert tr.strip().addresses() == [("y",)]
    learned = minimise(lambda params: -model.score_params(KEY, tr, params)[1], variables["params"])["net"]
    least_squares = np.linalg.lstsq(DESIGN, TARGETS[:, 0].astype(np.float64), rcond=None)[0]
    close(np.concatenate([learned["kernel"][:, 0], learned["bias"]]), least_squares, atol=1e-4)


def test_a_part_is_fitted_by_its_prior_and_a_part_is_learned():
    """The kernel is random and the bias learned: ridge regression, in which the bias is not punished."""
    model = Regression(select("kernel"))
    variables = model.init(KEY, INPUTS)
    assert shapes(variables["params"]) == {"net": {"bias": (1,)}}
    _, (_, tr) = model.bind(variables).importance(KEY, {"y": TARGETS}, (INPUTS,))
    start = {"params": variables["params"], "choices": select("net").filter(tr)[0]}

    def loss(point: Any) -> Any:
        choices = point["choices"].merge({"y": TARGETS})
        _, (_, score) = model.apply({"params": point["params"]}, KEY, choices, (INPUTS,), method="assess")
        return -score

    best = minimise(loss, start)
    precision = np.diag([SLOPE_SCALE**-2, SLOPE_SCALE**-2, 0.0]) + DESIGN.T @ DESIGN / NOISE**2
    want = np.linalg.solve(precision, DESIGN.T @ TARGETS[:, 0].astype(np.float64) / NOISE**2)
    got = np.concatenate([best["choices"]["net", "kernel"][:, 0], best["params"]["net"]["bias"]])
    close(got, want, atol=1e-4)


def test_the_weights_average_to_the_marginal_likelihood():
    """E[exp w] = p(y), here of two of the targets. 40000 samples; the bound is 4 standard errors."""
    x, y = INPUTS[:2], np.array([[0.4], [1.1]], np.float32)
    model = Regression()
    sample = jax.jit(jax.vmap(lambda key: model.importance(key, {"y": y}, (x,))[1][0]))
    weights = np.exp(np.asarray(sample(jax.random.split(KEY, 40_000)), np.float64))
    design = DESIGN[:2]
    covariance = design @ np.linalg.inv(PRIOR_PRECISION) @ design.T + NOISE**2 * np.eye(2)
    want = stats.multivariate_normal.pdf(y[:, 0], design @ PRIOR_MEAN, covariance)
    error = weights.std() / np.sqrt(weights.size)
    assert error < 0.05 * want
    assert abs(weights.mean() - want) < 4 * error


@pytest.mark.slow
def test_metropolis_hastings_samples_the_posterior():
    """Random-walk steps in `update` visit the posterior. 64 chains of 400 steps after 100; 4 standard errors."""
    model = Regression()
    _, (_, start) = model.importance(KEY, {"y": TARGETS}, (INPUTS,))
    factor = np.linalg.cholesky(np.linalg.inv(POSTERIOR_PRECISION)).astype(np.float32)

    def step(carry: Any, _: Any) -> Any:
        key, tr = carry
        key, noise_key, accept_key = jax.random.split(key, 3)
        move = factor @ jax.random.normal(noise_key, (3,))
        proposed = {"net": {"kernel": tr["net", "kernel"] + move[:2, None], "bias": tr["net", "bias"] + move[2:]}}
        _, (_, weight, new, _) = model.update(key, tr, proposed, (INPUTS,))
        accept = jnp.log(jax.random.uniform(accept_key)) < weight
        tr = jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, tr)
        return (key, tr), jnp.concatenate([tr["net", "kernel"][:, 0], tr["net", "bias"]])

    def chain(key: Any) -> Any:
        mean = jnp.asarray(POSTERIOR_MEAN, jnp.float32)
        at_mean = {"net": {"kernel": mean[:2, None], "bias": mean[2:]}}
        _, (_, _, tr, _) = model.update(key, start, at_mean, (INPUTS,))
        return jax.lax.scan(step, (key, tr), None, 500)[1][100:]

    draws = np.asarray(jax.jit(jax.vmap(chain))(jax.random.split(KEYS[1], 64)), np.float64)
    means = draws.mean(1)
    error = means.std(0, ddof=1) / np.sqrt(64)
    assert np.all(np.abs(means.mean(0) - POSTERIOR_MEAN) < 4 * error)
    variances = ((draws - POSTERIOR_MEAN) ** 2).mean(1)
    error = variances.std(0, ddof=1) / np.sqrt(64)
    assert np.all(np.abs(variances.mean(0) - np.diag(np.linalg.inv(POSTERIOR_PRECISION))) < 4 * error)

"""Guides against exact posteriors: the eight schools by quadrature, a linear regression in closed form."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import scipy.stats

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "advi_regression"
MODULES = ("figures", "input_pipeline", "models", "reference", "train")

# Means of θ_1 … θ_8, μ, τ and their Monte Carlo standard errors, for the same data and priors: posteriordb
# (https://github.com/stan-dev/posteriordb), reference_posteriors/summary_statistics/mean_value/mean_value/
# eight_schools-eight_schools_noncentered.json, from 10,000 draws of Stan.
POSTERIORDB = {
    "theta": [6.15050229, 4.93958114, 3.90590609, 4.79601675, 3.61443632, 4.05114758, 6.31716976, 4.88399694],
    "theta_error": [0.05573753, 0.04622938, 0.05423137, 0.04749358, 0.04614506, 0.04851954, 0.04987668, 0.05425116],
    "mu": [4.41051834, 0.03303747],
    "tau": [3.60205952, 0.03186151],
}


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    """The example's modules, by their bare names, which are forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(str(EXAMPLE)):
                del sys.modules[name]


@pytest.fixture
def optax_promotes() -> Iterator[None]:
    """Optax's Adam raises a float to an integer power, which strict promotion of dtypes forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def schools(example: SimpleNamespace) -> tuple[np.ndarray, np.ndarray]:
    data = example.input_pipeline.load_schools()
    return data.effects.astype(np.float64), data.standard_errors.astype(np.float64)


@pytest.fixture
def exact_schools(example: SimpleNamespace) -> Any:
    return example.reference.eight_schools(*example.input_pipeline.load_schools())


@pytest.fixture
def exact_regression(example: SimpleNamespace) -> Any:
    data = example.input_pipeline.load_regression()
    return example.reference.linear_regression(data.inputs, data.response, 0.7)


def load_config(name: str) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(f"advi_regression_{name}", EXAMPLE / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


# The references ----------------------------------------------------------------------------------------------------


def test_the_quadrature_has_the_means_of_posteriordb(exact_schools: Any) -> None:
    """Within 4 of their Monte Carlo standard errors."""
    means, _ = exact_schools.moments()
    assert abs(means[0] - POSTERIORDB["mu"][0]) < 4 * POSTERIORDB["mu"][1]
    assert abs(means[1] - POSTERIORDB["tau"][0]) < 4 * POSTERIORDB["tau"][1]
    assert np.all(np.abs(means[3:] - POSTERIORDB["theta"]) < 4 * np.array(POSTERIORDB["theta_error"]))


def test_the_quadrature_is_that_of_the_joint_density(exact_schools: Any, schools: tuple[np.ndarray, ...]) -> None:
    """A grid of (μ, log τ) with SciPy's densities, of which only the θ_j are integrated out by hand."""
    y, sigma = schools
    mu, log_tau = np.meshgrid(np.linspace(-25.0, 35.0, 601), np.linspace(-14.0, 6.0, 1001), indexing="ij")
    tau = np.exp(log_tau)
    log_p = scipy.stats.norm.logpdf(mu, 0, 5) + scipy.stats.halfcauchy.logpdf(tau, 0, 5) + log_tau
    log_p += sum(scipy.stats.norm.logpdf(y[j], mu, np.hypot(sigma[j], tau)) for j in range(8))
    weights = np.exp(log_p) * (mu[1, 0] - mu[0, 0]) * (log_tau[0, 1] - log_tau[0, 0])
    evidence = weights.sum()
    np.testing.assert_allclose(exact_schools.log_evidence, np.log(evidence), atol=1e-6)

    weights /= evidence
    expectation = lambda values: (weights * values).sum()
    b = tau**2 / (sigma[0] ** 2 + tau**2)
    theta = b * y[0] + (1 - b) * mu
    moments = [(expectation(v), expectation(v**2)) for v in (mu, tau, log_tau)]
    moments.append((expectation(theta), expectation(theta**2 + b * sigma[0] ** 2)))
    means, sds = (values[:4] for values in exact_schools.moments())
    np.testing.assert_allclose(means, [first for first, _ in moments], atol=2e-4)
    np.testing.assert_allclose(sds, [np.sqrt(second - first**2) for first, second in moments], atol=2e-3)

    levels = np.array([0.05, 0.5, 0.95])
    quantiles = exact_schools.quantiles(levels)
    at_most = lambda values, limit: expectation(values < limit)
    for row, values in enumerate((mu, tau, log_tau)):
        # One column of the grid holds up to 1.3 %, and half of it or so is counted.
        np.testing.assert_allclose([at_most(values, limit) for limit in quantiles[row]], levels, atol=0.01)
    for limit, level in zip(quantiles[3], levels, strict=True):
        below = expectation(scipy.stats.norm.cdf(limit, theta, np.sqrt(b) * sigma[0]))
        np.testing.assert_allclose(below, level, atol=1e-4)


def test_the_density_of_the_funnel_is_normalised(exact_schools: Any) -> None:
    log_tau, theta = np.linspace(-12.0, 8.0, 801), np.linspace(-120.0, 160.0, 1401)
    density = exact_schools.density(log_tau, theta) * (log_tau[1] - log_tau[0]) * (theta[1] - theta[0])
    np.testing.assert_allclose(density.sum(), 1.0, atol=1e-3)
    means, _ = exact_schools.moments()
    np.testing.assert_allclose([log_tau @ density.sum(1), density.sum(0) @ theta], means[[2, 3]], atol=5e-3)


def test_the_regression_is_ridge_regression(example: SimpleNamespace, exact_regression: Any) -> None:
    """The mean against scikit-learn, the evidence against the density of y as one normal vector."""
    data = example.input_pipeline.load_regression()
    design = np.concatenate([np.ones((442, 1)), data.inputs], axis=1).astype(np.float64)
    y = data.response.astype(np.float64)
    np.testing.assert_allclose([*design[:, 1:].mean(0), *(design[:, 1:].std(0) - 1)], 0.0, atol=1e-5)
    ridge = importlib.import_module("sklearn.linear_model").Ridge(alpha=0.7**2, fit_intercept=False)
    np.testing.assert_allclose(exact_regression.mean, ridge.fit(design, y).coef_, rtol=1e-8)
    marginal = scipy.stats.multivariate_normal(np.zeros(442), 0.7**2 * np.eye(442) + design @ design.T)
    np.testing.assert_allclose(exact_regression.log_evidence, marginal.logpdf(y), rtol=1e-10)


def test_the_nearest_product_of_normals(exact_regression: Any) -> None:
    """KL by SciPy's entropy and densities; and no other product of normals near it is nearer."""
    mean, sd = exact_regression.mean, exact_regression.mean_field_sd
    divergence = exact_regression.divergence_from
    posterior = scipy.stats.multivariate_normal(mean, exact_regression.covariance)
    # E_q[log p] of a quadratic is its value at the mean and the trace of its curvature.
    expected = posterior.logpdf(mean) - 0.5 * np.trace(exact_regression.precision @ np.diag(sd**2))
    by_hand = -scipy.stats.norm(mean, sd).entropy().sum() - expected
    np.testing.assert_allclose(exact_regression.mean_field_gap, by_hand, rtol=1e-8)
    np.testing.assert_allclose(divergence(mean, np.diag(sd**2)), by_hand, rtol=1e-8)
    for index in range(len(mean)):
        for factor in (0.99, 1.01):
            other = sd * np.where(np.arange(len(sd)) == index, factor, 1.0)
            assert divergence(mean, np.diag(other**2)) > by_hand
            assert divergence(mean + other - sd, np.diag(sd**2)) > by_hand


# The models --------------------------------------------------------------------------------------------------------


def test_the_forms_have_the_densities_of_scipy(example: SimpleNamespace, schools: tuple[np.ndarray, ...]) -> None:
    y, sigma = schools
    norm, mu, tau = scipy.stats.norm, 3.5, 2.25
    z = np.linspace(-2.0, 2.0, 8)
    theta = mu + tau * z
    shared = norm.logpdf(mu, 0, 5) + scipy.stats.halfcauchy.logpdf(tau, 0, 5) + norm.logpdf(y, theta, sigma).sum()
    as_float = lambda values: jnp.asarray(values, jnp.float32)
    hyper = {"mu": as_float(mu), "tau": as_float(tau), "y": as_float(y)}
    for model, name, value, density in (
        (example.models.centred, "theta", theta, norm.logpdf(theta, mu, tau)),
        (example.models.non_centred, "z", z, norm.logpdf(z)),
    ):
        choices = {**hyper, name: as_float(value)}
        _, (retval, score) = model.assess(jax.random.key(0), choices, (as_float(sigma),))
        np.testing.assert_allclose(score, shared + density.sum(), rtol=1e-5)
        np.testing.assert_allclose(retval, theta, rtol=1e-5)


def test_the_centred_form_has_no_mode(example: SimpleNamespace, schools: tuple[np.ndarray, ...]) -> None:
    """At θ_j = μ and τ → 0, in the coordinate log τ: 8 terms −log τ, and log τ of the Jacobian."""
    args = (jnp.asarray(schools[1], jnp.float32),)
    taus = np.array([1e-2, 1e-4, 1e-6])
    scores = []
    for tau in taus:
        point = {
            "mu": 4.0,
            "tau": jnp.float32(tau),
            "theta": jnp.full(8, 4.0),
            "y": jnp.asarray(schools[0], jnp.float32),
        }
        scores.append(example.models.centred.assess(jax.random.key(0), point, args)[1][1] + np.log(tau))
    np.testing.assert_allclose(np.diff(scores), 7 * np.log(100.0), rtol=1e-4)


def test_a_batch_stands_for_all_rows(example: SimpleNamespace) -> None:
    """The mean of the log densities of 13 batches of 34 is that of all 442."""
    problem = example.models.regression(example.input_pipeline.load_regression(), 0.7)
    design, response = problem.data
    weights = jnp.linspace(-0.3, 0.3, 11)

    def log_density(rows: slice) -> Any:
        observed, args = problem.inputs((jnp.asarray(design[rows]), jnp.asarray(response[rows])))
        return problem.model.assess(jax.random.key(0), {"weights": weights, **observed}, args)[1][1]

    w = np.asarray(weights, np.float64)
    want = scipy.stats.norm.logpdf(w).sum() + scipy.stats.norm.logpdf(response, design @ w, 0.7).sum()
    batches = [log_density(slice(start, start + 34)) for start in range(0, 442, 34)]
    np.testing.assert_allclose(log_density(slice(None)), want, rtol=1e-5)
    np.testing.assert_allclose(np.mean(batches), want, rtol=1e-5)
    assert np.std(batches) > 1.0


# The guides --------------------------------------------------------------------------------------------------------


def moments_of(fitted: Any) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the covariance of a guide of the regression, from its parameters."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(fitted.variables["params"]))
    if "lower" in params:
        scale_tril = np.asarray(fitted.guide.bind(fitted.variables).scale_tril, np.float64)
        return params["loc"], scale_tril @ scale_tril.T
    return params["loc"]["weights"], np.diag(np.exp(2 * params["log_scale"]["weights"]))


def check_draws(example: SimpleNamespace, fitted: Any, mean: np.ndarray, sd: np.ndarray, slack: float = 0.0) -> None:
    """Means and standard deviations of S draws: errors of 1/√S and 1/√(2S) standard deviations, 4 of them each."""
    errors, ratios = example.train.compare(fitted.values, mean, sd)
    size = len(fitted.values)
    assert np.abs(errors).max() < 4 / np.sqrt(size) + slack
    assert np.abs(ratios - 1).max() < 4 / np.sqrt(2 * size) + slack


@pytest.mark.optimized
def test_at_the_exact_posterior_every_log_weight_is_the_evidence(
    example: SimpleNamespace, exact_regression: Any
) -> None:
    """Up to float32: a sum of about 500 with 453 terms."""
    problem = example.models.regression(example.input_pipeline.load_regression(), 0.7)
    observed, args = problem.inputs(problem.data)
    guide = example.train.GUIDES["AutoMultivariateNormal"](problem.model, observed, args)
    chol = np.linalg.cholesky(exact_regression.covariance)
    as_float = lambda values: jnp.asarray(values, jnp.float32)
    variables = {"params": guide.params_of(as_float(exact_regression.mean), as_float(chol))}
    keys = jax.random.split(jax.random.key(0), 20_000)
    log_weights, choices, values = example.train.draw(problem.model, guide, variables, observed, args, keys)
    np.testing.assert_allclose(log_weights, exact_regression.log_evidence, atol=2e-3)
    np.testing.assert_array_equal(choices["weights"], values)
    fitted = SimpleNamespace(values=np.asarray(values, np.float64))
    check_draws(example, fitted, exact_regression.mean, np.sqrt(np.diag(exact_regression.covariance)))


@pytest.mark.slow
@pytest.mark.optimized
def test_the_full_covariance_meets_the_exact_posterior(
    example: SimpleNamespace, exact_regression: Any, optax_promotes: None
) -> None:
    """KL(q ‖ p) < 0.005 in closed form, by which no mean is off by more than √(2 KL) = 0.1 standard deviations."""
    problem = example.models.regression(example.input_pipeline.load_regression(), 0.7)
    guide = example.train.GUIDES["AutoMultivariateNormal"](problem.model, *problem.inputs(problem.data))
    options = load_config("default").regression
    options.num_steps, options.num_samples, options.num_draws = 1500, 16, 20_000
    fitted = example.train.fit(problem, guide, options, jax.random.key(1))
    divergence = exact_regression.divergence_from(*moments_of(fitted))
    print(f"KL {divergence:.6f}, log p(y) − ELBO {exact_regression.log_evidence - fitted.elbo:.6f}")
    assert 0 <= divergence < 0.005
    gap = exact_regression.log_evidence - fitted.elbo
    assert abs(gap - divergence) < 4 * fitted.elbo_error + 2e-3
    check_draws(example, fitted, exact_regression.mean, np.sqrt(np.diag(exact_regression.covariance)), slack=0.02)
    assert len(fitted.steps) == 30 and fitted.curve[-1] > fitted.curve[0]


@pytest.mark.slow
def test_the_regression_of_the_readme(example: SimpleNamespace, exact_regression: Any, optax_promotes: None) -> None:
    config = load_config("default")
    config.guides = ("AutoNormal", "AutoMultivariateNormal", "AutoLaplace")
    fits = example.train.fit_regression(config, jax.random.key(1))
    mean, sd = exact_regression.mean, np.sqrt(np.diag(exact_regression.covariance))
    divergences = {name: exact_regression.divergence_from(*moments_of(fitted)) for name, fitted in fits.items()}
    print(divergences)
    # The gap that is estimated from draws is the KL in closed form.
    for name, fitted in fits.items():
        gap = exact_regression.log_evidence - fitted.elbo
        assert abs(gap - divergences[name]) < 4 * fitted.elbo_error + 2e-3, name
    # Exact families: nothing is left but the draws.
    for name in ("AutoMultivariateNormal", "AutoLaplace"):
        assert divergences[name] < 1e-4, name
        check_draws(example, fits[name], mean, sd)
    # Batches of 34 leave noise in the gradient, and 3,000 steps 0.02 nats of it.
    assert divergences["AutoMultivariateNormal, batches"] < 0.06
    # Mean field: what is theoretically the best, and far too narrow.
    assert divergences["AutoNormal"] - exact_regression.mean_field_gap < 0.02
    loc, covariance = moments_of(fits["AutoNormal"])
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), exact_regression.mean_field_sd, rtol=0.03)
    assert np.abs((loc - mean) / sd).max() < 0.05
    assert (exact_regression.mean_field_sd / sd).min() < 0.15


@pytest.mark.slow
def test_the_schools_of_the_readme(example: SimpleNamespace, exact_schools: Any, optax_promotes: None) -> None:
    """Mean field fails on the funnel; the non-centred form or a flow mends that, and both together do best."""
    config = load_config("default")
    config.guides = ("AutoNormal", "AutoFlow")
    fits = example.train.fit_schools(config, jax.random.key(1))
    mean, sd = (np.delete(moments, 1) for moments in exact_schools.moments())
    gaps, errors, scale_ratios = {}, {}, {}
    for form, fitted in ((form, fits[form]) for form in fits):
        for name, one in fitted.items():
            gaps[form, name] = exact_schools.log_evidence - one.elbo
            errors[form, name] = one.elbo_error
            comparison = example.train.compare(example.train.school_draws(one), mean, sd)
            scale_ratios[form, name] = comparison.sd_ratios[1]
            print(form, name, gaps[form, name], comparison)
            if (form, name) == ("non-centred", "AutoFlow"):
                # 4 errors of the draws, and 0.1 for the 0.02 nats that the flow lacks.
                assert np.abs(comparison.mean_errors).max() < 4 / np.sqrt(50_000) + 0.1
                assert np.abs(comparison.sd_ratios - 1).max() < 4 / np.sqrt(100_000) + 0.15
    order = [
        ("non-centred", "AutoFlow"),
        ("non-centred", "AutoNormal"),
        ("centred", "AutoNormal"),
    ]
    for better, worse in zip(order, order[1:], strict=False):
        assert gaps[worse] - gaps[better] > 4 * np.hypot(errors[worse], errors[better])
    # The bound is a bound.
    assert all(gap > -4 * errors[key] for key, gap in gaps.items())
    assert gaps["centred", "AutoNormal"] - gaps["centred", "AutoFlow"] > 1.0
    assert scale_ratios["centred", "AutoNormal"] < 0.3 < scale_ratios["centred", "AutoFlow"]
    assert scale_ratios["non-centred", "AutoNormal"] > 0.5


@pytest.mark.slow
def test_the_script_runs_from_any_directory(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE / "main.py"), "--workdir=out", f"--config={EXAMPLE / 'configs' / 'test.py'}"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Eight schools, non-centred: log p(y) = -31.311" in done.stdout
    for name in ("schools_intervals", "elbo_curves", "funnel", "regression_intervals"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000

"""One network in four treatments: its densities, its last layer against the conjugate posterior, its calibration."""

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
import optax
import pytest
import scipy.stats

import gjflax

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "bayesian_network"
MODULES = ("exact", "figures", "input_pipeline", "models", "train")

LAST_LAYER = "variational, last layer"


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


def load_config(name: str) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(f"bayesian_network_{name}", EXAMPLE / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def parameters(seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Parameters of a network of 6 units with one input."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {"first": {"kernel": draw(1, 6), "bias": draw(6)}, "last": {"kernel": draw(6, 1), "bias": draw(1)}}


def network_by_hand(x: np.ndarray, params: Any) -> np.ndarray:
    hidden = np.tanh(x.astype(np.float64) @ params["first"]["kernel"] + params["first"]["bias"])
    return (hidden @ params["last"]["kernel"] + params["last"]["bias"])[:, 0]


# The pieces --------------------------------------------------------------------------------------------------------


def test_the_halves_are_whole_and_standardised(example: SimpleNamespace) -> None:
    target = importlib.import_module("sklearn.datasets").load_diabetes().target
    held_out = []
    for train, rest in example.input_pipeline.diabetes_halves():
        assert train.x.shape == rest.x.shape == (221, 10)
        np.testing.assert_allclose([train.y.mean(), train.y.std() - 1], 0.0, atol=1e-5)
        np.testing.assert_allclose(np.concatenate([train.x.mean(0), train.x.std(0) - 1]), 0.0, atol=1e-5)
        # An affine map of the targets, in some order: their gaps have one ratio.
        both = np.sort(np.concatenate([train.y, rest.y]))
        np.testing.assert_allclose(
            (both - both[0]) / (both[-1] - both[0]), (np.sort(target) - 25.0) / (346.0 - 25.0), atol=1e-5
        )
        held_out.append(rest)
    data = example.input_pipeline.simulated_curve()
    assert not np.any((data.x > -0.6) & (data.x < 0.8))
    assert len(held_out) == 2 and not np.array_equal(held_out[0].x, held_out[1].x)


@pytest.mark.parametrize("random", ["nothing", "last", "everything"])
def test_a_selection_moves_parameters_between_prior_and_likelihood(example: SimpleNamespace, random: str) -> None:
    """The density by hand: the same likelihood, and the prior of what is selected."""
    data, params, norm = example.input_pipeline.simulated_curve(), parameters(), scipy.stats.norm
    selection = {"nothing": gjflax.select(), "last": gjflax.select("last"), "everything": gjflax.AllSelection()}[random]
    layers = {"nothing": (), "last": ("last",), "everything": ("first", "last")}[random]
    model = example.models.Regression(6, selection, noise=None)
    kept = {layer: values for layer, values in params.items() if layer not in layers}
    variables = {"params": {"MLP_0": kept, "log_noise": jnp.float32(-0.7)}}
    chosen = {layer: params[layer] for layer in layers}
    choices = {"y": data.y, **({"net": chosen} if chosen else {})}
    _, (mean, score) = model.bind(variables).assess(jax.random.key(0), choices, (jnp.asarray(data.x),))

    by_hand = network_by_hand(data.x, params)
    np.testing.assert_allclose(mean, by_hand, rtol=1e-4, atol=1e-5)
    want = norm.logpdf(data.y, by_hand, np.exp(-0.7)).sum()
    inputs = {"first": 1, "last": 6}
    for layer in layers:
        want += norm.logpdf(params[layer]["kernel"], 0, 2 / np.sqrt(inputs[layer])).sum()
        want += norm.logpdf(params[layer]["bias"]).sum()
    np.testing.assert_allclose(score, want, rtol=1e-5)


def test_the_closed_form_is_that_of_a_normal_vector(example: SimpleNamespace) -> None:
    """The mean and covariance of w given y, by conditioning the joint normal of (w, y)."""
    rng = np.random.default_rng(1)
    phi, y, scales = rng.normal(size=(9, 4)), rng.normal(size=9), np.array([0.5, 1.0, 2.0, 1.5])
    posterior = example.exact.last_layer(phi, y, scales, 0.3)
    prior = np.diag(scales**2)
    gain = prior @ phi.T @ np.linalg.inv(phi @ prior @ phi.T + 0.3**2 * np.eye(9))
    np.testing.assert_allclose(posterior.mean, gain @ y, rtol=1e-8)
    np.testing.assert_allclose(posterior.covariance, prior - gain @ phi @ prior, rtol=1e-6, atol=1e-10)
    assert abs(posterior.divergence_from(posterior.mean, posterior.covariance)) < 1e-10
    shift = np.linalg.cholesky(posterior.covariance)[:, 0]
    np.testing.assert_allclose(posterior.divergence_from(posterior.mean + shift, posterior.covariance), 0.5)
    # KL(N(m, 4C) ‖ N(m, C)) = (4·4 − 4 − 4 log 4) / 2.
    wider = posterior.divergence_from(posterior.mean, 4 * posterior.covariance)
    np.testing.assert_allclose(wider, 0.5 * (16 - 4 - 4 * np.log(4)))


def test_calibration_is_that_of_the_mixture(example: SimpleNamespace) -> None:
    """Against draws from the mixture: quantiles of 200,000 of them, by position to 4 standard errors."""
    rng = np.random.default_rng(2)
    means, y = rng.normal(size=(50, 5)), np.array([-2.0, -0.5, 0.0, 1.0, 3.0])
    got = example.train.calibration(means, 0.4, y)
    np.testing.assert_allclose(np.exp(got.log_density), scipy.stats.norm.pdf(y, means, 0.4).mean(axis=0))
    draws = means[rng.integers(50, size=200_000)] + 0.4 * rng.normal(size=(200_000, 5))
    error = np.sqrt(got.position * (1 - got.position) / 200_000)
    assert np.all(np.abs((draws < y).mean(axis=0) - got.position) < 4 * error + 1e-12)
    inside = np.quantile(draws, [0.25, 0.75], axis=0)
    coverage, errors = got.coverage(np.array([0.5, 0.95]))
    assert coverage[0] == np.mean((inside[0] <= y) & (y <= inside[1]))
    np.testing.assert_allclose(errors, [np.sqrt(0.25 / 5), np.sqrt(0.95 * 0.05 / 5)])


# The known answer --------------------------------------------------------------------------------------------------


def test_the_last_layer_given_the_first_is_conjugate(example: SimpleNamespace) -> None:
    """Its log density is a quadratic: the curvature gives the covariance, and one Newton step from anywhere the mean.

    Closed form in float64; here float32, and a condition number of some hundreds.
    """
    data, params = example.input_pipeline.simulated_curve(), parameters()
    model = example.models.Regression(6, gjflax.select("last"), 0.5)
    kept = {"MLP_0": {"first": params["first"]}}
    bound = model.bind({"params": kept})
    exact = example.train.exact_last_layer(example.train.Fitted(model, None, {"model": kept}), data)

    def log_density(weights: Any) -> Any:
        last = {"kernel": weights[:6, None], "bias": weights[6:]}
        choices = {"net": {"last": last}, "y": data.y}
        return bound.assess(jax.random.key(0), choices, (jnp.asarray(data.x),))[1][1]

    start = jnp.linspace(-0.5, 0.5, 7)
    gradient, curvature = jax.jit(lambda w: (jax.grad(log_density)(w), jax.hessian(log_density)(w)))(start)
    np.testing.assert_allclose(-curvature, exact.precision, rtol=1e-4, atol=1e-5 * np.abs(exact.precision).max())
    mean = start + np.linalg.solve(-np.asarray(curvature, np.float64), np.asarray(gradient, np.float64))
    sd = np.sqrt(np.diag(exact.covariance))
    assert np.abs((mean - exact.mean) / sd).max() < 0.02
    assert np.abs((start - exact.mean) / sd).max() > 1.0


@pytest.mark.slow
def test_the_guide_of_the_last_layer_meets_the_conjugate_posterior(
    example: SimpleNamespace, optax_promotes: None
) -> None:
    """KL < 0.002 with the first layer held, by which no mean is off by more than √(2 KL) = 0.06 standard deviations.

    Then the draws: of 4,000, means to 4/√4000 and standard deviations to 4/√8000, beside that.
    """
    data = example.input_pipeline.simulated_curve()
    treatment = example.models.TREATMENTS[LAST_LAYER]
    model = example.models.Regression(6, treatment.random, 0.5)
    objective = example.models.create_objective(model, treatment, data.x, data.y, 64)
    labels = gjflax.label_parameters({"held": "model"}, default="trained")
    adam = optax.adam(optax.cosine_decay_schedule(5e-2, 3000))
    optimizer = optax.multi_transform({"held": optax.set_to_zero(), "trained": adam}, labels)
    key = jax.random.key(0)
    result = gjflax.fit(
        objective, optimizer, data, key=key, num_steps=3000, inputs=example.train.inputs, progress=False
    )
    fitted = example.train.Fitted(model, objective.guide, result.state.params)
    exact = example.train.exact_last_layer(fitted, data)
    divergence = exact.divergence_from(*example.train.last_layer_of(fitted))
    print(f"KL {divergence:.5f}")
    assert 0 <= divergence < 0.002

    # The Laplace approximation has the exact covariance at any point, up to float32 and the condition number.
    observed, args = example.train.inputs(data)
    laplace = gjflax.AutoLaplace(model, observed, args)
    bound = model.bind({"params": fitted.params["model"]})
    normal, variables = laplace.approximation({"params": {"loc": jnp.zeros(7)}}, bound, observed, args)
    _, covariance = example.train.last_layer_of(fitted._replace(guide=normal, params={"guide": variables["params"]}))
    np.testing.assert_allclose(covariance, exact.covariance, rtol=5e-3, atol=5e-4 * np.abs(exact.covariance).max())

    x = np.linspace(-2.0, 2.0, 9, dtype=np.float32)[:, None]
    means = example.train.predict(fitted, x, jax.random.key(1), 4000)
    first = fitted.params["model"]["MLP_0"]["first"]
    phi = example.exact.features(x, first["kernel"], first["bias"])
    sd = np.sqrt(np.einsum("ni,ij,nj->n", phi, exact.covariance, phi))
    assert np.abs((means.mean(axis=0) - phi @ exact.mean) / sd).max() < 4 / np.sqrt(4000) + 0.07
    assert np.abs(means.std(axis=0) / sd - 1).max() < 4 / np.sqrt(8000) + 0.07


# The whole ---------------------------------------------------------------------------------------------------------


def test_each_parameter_is_learned_or_has_a_guide(example: SimpleNamespace) -> None:
    """10 · 4 + 4 and 4 + 1 weights and the noise; of a guide a location, or locations, scales and a square."""
    data = example.input_pipeline.diabetes_halves()[0][0]
    sizes = {}
    for name, treatment in example.models.TREATMENTS.items():
        model = example.models.Regression(4, treatment.random)
        objective = example.models.create_objective(model, treatment, data.x, data.y, 2)
        params = jax.eval_shape(objective.init, jax.random.key(0), *example.train.inputs(data))["params"]
        sizes[name] = {side: sum(leaf.size for leaf in jax.tree.leaves(part)) for side, part in params.items()}
    assert sizes == {
        "maximum likelihood": {"model": 50},
        "maximum a posteriori": {"model": 1, "guide": 49},
        "variational": {"model": 1, "guide": 98},
        LAST_LAYER: {"model": 45, "guide": 35},
    }


@pytest.mark.slow
def test_the_variational_network_is_calibrated_and_the_learned_one_is_not(
    example: SimpleNamespace, optax_promotes: None
) -> None:
    """Coverage of 442 held-out patients, to 4 binomial standard errors; log densities, to 4 paired ones."""
    config = load_config("default")
    calibrations = {}
    for name in ("maximum likelihood", "variational"):
        parts = []
        for train, held_out in example.input_pipeline.diabetes_halves():
            fitted = example.train.fit(name, train, config.diabetes, jax.random.key(1))
            means = example.train.predict(fitted, held_out.x, jax.random.key(2), config.num_draws)
            parts.append(example.train.calibration(means, fitted.noise, held_out.y))
        calibrations[name] = example.train.Calibration(*(np.concatenate(c) for c in zip(*parts, strict=True)))
    levels = example.train.LEVELS
    coverage, errors = calibrations["variational"].coverage(levels)
    print(coverage, calibrations["maximum likelihood"].coverage(levels)[0])
    assert np.all(np.abs(coverage - levels) < 4 * errors)
    learned, errors = calibrations["maximum likelihood"].coverage(levels)
    assert np.all(levels - learned > 4 * errors)
    difference = calibrations["variational"].log_density - calibrations["maximum likelihood"].log_density
    assert difference.mean() > 4 * difference.std() / np.sqrt(len(difference))
    # Without the inputs, Normal(0, 1) for every patient has about −½ log 2π − ½.
    assert calibrations["variational"].log_density.mean() > -0.5 * np.log(2 * np.pi) - 0.5 + 0.2


@pytest.mark.slow
def test_the_script_runs_from_any_directory(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE / "main.py"), "--workdir=out", f"--config={EXAMPLE / 'configs' / 'test.py'}"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "variational, last layer" in done.stdout
    for name in ("bands", "calibration"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000

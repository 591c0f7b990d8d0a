"""The deep Markov model: its reference, its densities and its trainings against what is known exactly."""

from __future__ import annotations

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

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "deep_markov_model"
MODULES = ("figures", "input_pipeline", "models", "queries", "reference", "train")


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    """The example's modules, which import each other as the script's folder has them: by bare names.

    Another example may have modules of the same names, so these are forgotten afterwards.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(str(EXAMPLE)):
                del sys.modules[name]


def load_config(name: str) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(f"deep_markov_model_{name}", EXAMPLE / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.fixture
def optax_promotes() -> Iterator[None]:
    """Optax's Adam raises a float to an integer power, which strict promotion of dtypes forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def joint(example: SimpleNamespace) -> tuple[np.ndarray, np.ndarray]:
    """The mean and covariance of a whole sequence, as one normal distribution: by the process's equations, at once."""
    process, steps = example.input_pipeline.spring(), example.input_pipeline.STEPS
    # z = G ε with G[t, s] = A^(t − s), so x = (I ⊗ C) G ε + noise.
    powers = [np.linalg.matrix_power(process.transition, power) for power in range(steps)]
    gains = np.zeros((steps, 1, steps, 2))
    for t in range(steps):
        for s in range(t + 1):
            gains[t, :, s] = process.emission @ powers[t - s]
    gains = gains.reshape(steps, 2 * steps)
    covariance = process.transition_scale**2 * gains @ gains.T + process.emission_scale**2 * np.eye(steps)
    return np.zeros(steps), covariance


def test_the_kalman_filter_is_that_of_the_joint_distribution(example: SimpleNamespace) -> None:
    """Evidence and forecasts against one normal distribution of the whole sequence, and its conditionals."""
    xs = np.asarray(example.input_pipeline.simulate(jax.random.key(0), 5), np.float64)
    mean, covariance = joint(example)
    want = scipy.stats.multivariate_normal(mean, covariance).logpdf(xs[:, :, 0])
    np.testing.assert_allclose(example.reference.log_evidence(xs), want, rtol=1e-9)
    seen = example.figures.SEEN
    gain = np.linalg.solve(covariance[:seen, :seen], covariance[:seen, seen:]).T
    means, variances = example.reference.forecasts(xs[:, :seen], len(mean) - seen)
    np.testing.assert_allclose(means, xs[:, :seen, 0] @ gain.T, rtol=1e-8, atol=1e-10)
    conditional = covariance[seen:, seen:] - gain @ covariance[:seen, seen:]
    np.testing.assert_allclose(variances, np.diag(conditional), rtol=1e-9)


def test_simulated_sequences_are_of_the_process(example: SimpleNamespace) -> None:
    """20,000 sequences: every covariance of two steps within 5 standard errors (820 are tested)."""
    xs = np.asarray(example.input_pipeline.simulate(jax.random.key(1), 20_000), np.float64)[:, :, 0]
    _, covariance = joint(example)
    # Of a normal distribution the variance of x_i x_j is c_ii c_jj + c_ij².
    variances = np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2
    assert np.all(np.abs(xs.T @ xs / len(xs) - covariance) < 5 * np.sqrt(variances / len(xs)))


def linear_params(example: SimpleNamespace, config: ml_collections.ConfigDict) -> Any:
    """Parameters at which the model is the process itself, without gate and network, and the guide is a wide normal."""
    process = example.input_pipeline.spring()
    call = example.models.objective_args(jnp.zeros((1, example.input_pipeline.STEPS, 1)))
    objective = example.models.create_objective(config, "ELBO", "forward", 1)
    shapes = jax.eval_shape(lambda key: objective.init(key, *call)["params"], jax.random.key(2))
    model, guide = (jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes[side]) for side in ("model", "guide"))
    softplus_inverse = lambda scale: np.log(np.expm1(scale))
    transition, emitter = model["step"]["GatedTransition_0"], model["step"]["Emitter_0"]
    transition["Dense_0"]["bias"] -= 40.0  # the gate is 0
    transition["Dense_4"]["kernel"] += jnp.float32(process.transition.T)
    transition["Dense_5"]["bias"] += softplus_inverse(process.transition_scale)
    emitter["Dense_2"]["kernel"] += jnp.float32(process.emission.T)
    emitter["raw_scale"] += softplus_inverse(process.emission_scale)
    guide["GuideStep_0"]["Dense_2"]["bias"] += softplus_inverse(1.3)
    return {"model": model, "guide": guide}


def test_at_the_parameters_of_the_process_the_evidence_is_the_kalman_filters(example: SimpleNamespace) -> None:
    """E[p̂(x)] = p(x) of the process: by 1,000 filters of 64 particles for each of 4 sequences of 6 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.input_pipeline, "STEPS", 6)
        config = load_config("test")
        config.evidence_particles = 64
        xs = example.input_pipeline.simulate(jax.random.key(3), 4)
        params = linear_params(example, config)
        repeated = jnp.tile(xs, (1_000, 1, 1))
        estimates = 6 * example.train.evaluate(config, "forward", params, repeated, jax.random.key(4)).reshape(1_000, 4)
        ratios = np.exp(np.asarray(estimates, np.float64) - example.reference.log_evidence(np.asarray(xs)))
        error = ratios.std(axis=0, ddof=1) / np.sqrt(len(ratios))
        assert np.all(np.abs(ratios.mean(axis=0) - 1) < 4 * error) and np.all(error < 0.1)


def test_forecasts_are_those_of_the_model(example: SimpleNamespace) -> None:
    """At the process's parameters, from the state that the guide draws: x has the mean C A^k E[z], by 4,000 draws."""
    config = load_config("test")
    params = linear_params(example, config)
    seen = example.input_pipeline.simulate(jax.random.key(5), 1)[0, :8]
    frozen = ml_collections.FrozenConfigDict(config)
    draws = np.asarray(
        example.queries.forecast(frozen, "forward", params, seen, 5, 4_000, jax.random.key(6)), np.float64
    )
    guide = example.models.Guide(config.latents, config.hidden, "forward").bind({"params": params["guide"]})
    last = jax.vmap(lambda key: guide.simulate(key, (seen,))[1].get_retval()[-1])
    states = np.asarray(jax.jit(last)(jax.random.split(jax.random.key(7), 4_000)), np.float64)
    process = example.input_pipeline.spring()
    for ahead in range(5):
        gain = process.emission @ np.linalg.matrix_power(process.transition, ahead + 1)
        want = states @ gain[0]
        error = np.sqrt(draws[:, ahead].var() / 4_000 + want.var() / 4_000)
        assert abs(draws[:, ahead].mean() - want.mean()) < 4 * error


@pytest.mark.slow
def test_training_comes_to_the_process(
    example: SimpleNamespace, optax_promotes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the guide that reads forward; 200 held-out sequences, 4 standard errors of the mean over them.

    No model is above the process. The filter's bound comes to a twentieth of what a model without time is below it, and
    nearer than the ELBO, which holds the model to what that guide can follow.
    """
    monkeypatch.setattr(example.figures, "draw_all", lambda *args: [])
    config = load_config("default")
    config.guides = ("forward",)
    result = example.train.train_and_evaluate(config, str(tmp_path))
    error = example.train.standard_error
    gaps = {name: result.exact - one.log_evidence for (_, name), one in result.trained.items()}
    for (_, name), one in result.trained.items():
        assert gaps[name].mean() > -4 * error(gaps[name])
        assert one.bound < one.log_evidence.mean()
    share = gaps["SMCObjective"] - (result.exact - result.independent) / 20
    assert share.mean() < -4 * error(share)
    difference = gaps["ELBO"] - gaps["SMCObjective"]
    assert difference.mean() > 4 * error(difference)


@pytest.mark.slow
def test_a_small_run_writes_its_table_and_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE / "main.py"), "--workdir=out", f"--config={EXAMPLE / 'configs' / 'test.py'}"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "evidence.md").read_text() in done.stdout
    for name in ("bounds", "forecasts"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000

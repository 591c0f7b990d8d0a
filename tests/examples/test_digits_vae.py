"""The digits VAE: its densities and its training against plain Flax, and its checkpoints."""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
EXAMPLE = ROOT / "examples" / "digits_vae"
MODULES = ("checkpoints", "figures", "input_pipeline", "models", "plain_flax", "progress", "queries", "train")


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
    spec = importlib.util.spec_from_file_location(f"digits_vae_{name}", EXAMPLE / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.fixture
def config() -> ml_collections.ConfigDict:
    return load_config("test")


@pytest.fixture
def optax_promotes() -> Iterator[None]:
    """Optax's Adam raises a float to an integer power, which strict promotion of dtypes forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def images(example: SimpleNamespace) -> jax.Array:
    return jnp.asarray(example.input_pipeline.load_datasets()[1].images[:16])


@pytest.fixture(scope="module")
def params(example: SimpleNamespace) -> Any:
    # As in the tests that train, so that it is compiled once.
    with jax.numpy_dtype_promotion("standard"):
        return example.train.create_train_state(load_config("test"), jax.random.key(0)).params


def as_plain(params: Any) -> Any:
    """The same parameters under the names that plain Flax gives."""
    return {"encoder": params["guide"]["MLP_0"], "decoder": params["model"]["MLP_0"]}


def plain_vae(example: SimpleNamespace, config: ml_collections.ConfigDict) -> Any:
    return example.plain_flax.VAE(config.latents, tuple(config.hidden))


def test_the_split_is_whole_and_stratified(example: SimpleNamespace) -> None:
    train, held_out = example.input_pipeline.load_datasets()
    assert train.images.shape == (1437, 8, 8) and held_out.images.shape == (360, 8, 8)
    assert train.images.dtype == np.int32 and train.images.min() == 0 and train.images.max() == 16
    shares = [np.bincount(part.labels) / len(part.labels) for part in (train, held_out)]
    np.testing.assert_allclose(*shares, atol=1 / 360)
    rows = np.concatenate([train.images, held_out.images]).reshape(1797, 64)
    everything = importlib.import_module("sklearn.datasets").load_digits().data
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], everything[np.lexsort(everything.T)])


def test_batches_are_a_permutation_of_the_images(example: SimpleNamespace) -> None:
    images = jnp.arange(10)[:, None, None] + jnp.zeros((10, 8, 8), jnp.int32)
    batches = example.input_pipeline.shuffled_batches(images, jax.random.key(0), 3)
    assert batches.shape == (3, 3, 8, 8)
    assert len(set(batches[:, :, 0, 0].reshape(-1).tolist())) == 9


def test_the_densities_by_hand_are_those_of_scipy(example: SimpleNamespace) -> None:
    x, logits = np.arange(17), np.linspace(-3.0, 3.0, 17, dtype=np.float32)
    got = example.plain_flax.binomial_logpmf(jnp.asarray(x, jnp.int32), jnp.asarray(logits))
    want = scipy.stats.binom.logpmf(x, 16, scipy.special.expit(logits.astype(np.float64)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    got = example.plain_flax.normal_logpdf(jnp.asarray(logits), 0.5, 2.0)
    np.testing.assert_allclose(got, scipy.stats.norm.logpdf(logits, 0.5, 2.0), rtol=1e-5)


def test_decoder_and_encoder_are_the_densities_by_hand(
    example: SimpleNamespace, config: ml_collections.ConfigDict, params: Any, images: jax.Array
) -> None:
    """At given codes and images: no randomness, so the two agree to rounding."""
    z = 0.5 * jax.random.normal(jax.random.key(1), (len(images), config.latents))
    decoder, encoder = example.queries.bind(example.models.create_model(config), params)
    key = jax.random.key(2)
    joint = jax.jit(jax.vmap(lambda z, x: decoder.assess(key, {"z": z, "x": x}, ())[1][1]))(z, images)
    guide = jax.jit(jax.vmap(lambda z, x: encoder.assess(key, {"z": z}, (x,))[1][1]))(z, images)

    vae, variables = plain_vae(example, config), {"params": as_plain(params)}
    mean, scale = vae.apply(variables, images, method=lambda vae, x: vae.encoder(x))
    want = vae.apply(variables, images, z, mean, scale, method="log_weights")
    np.testing.assert_allclose(joint - guide, want, rtol=1e-5)
    np.testing.assert_allclose(guide, example.plain_flax.normal_logpdf(z, mean, scale).sum(-1), rtol=1e-5, atol=1e-5)


def test_the_loss_has_the_distribution_of_the_one_by_hand(
    example: SimpleNamespace, config: ml_collections.ConfigDict, params: Any, images: jax.Array
) -> None:
    """Means over 1,000 keys each, to within 4 standard errors of their difference; variances to within 25 %."""
    keys = jax.random.split(jax.random.key(3), 1000)
    objective, vae = (
        example.models.create_objective(example.models.create_model(config), len(images)),
        plain_vae(example, config),
    )
    args = example.models.objective_args(images)
    losses = jax.jit(jax.vmap(lambda key: objective.apply({"params": params}, *args, rngs={"choice": key})))(keys)
    by_hand = jax.jit(jax.vmap(lambda key: -vae.apply({"params": as_plain(params)}, images, key).sum()))(keys)
    error = np.sqrt((losses.var() + by_hand.var()) / len(keys))
    assert abs(losses.mean() - by_hand.mean()) < 4 * error
    np.testing.assert_allclose(losses.var(), by_hand.var(), rtol=0.25)


def test_networks_and_initial_values_are_those_of_plain_flax(
    example: SimpleNamespace, config: ml_collections.ConfigDict, params: Any
) -> None:
    plain = example.plain_flax.create_train_state(config, jax.random.key(4)).params
    assert jax.tree.map(jnp.shape, as_plain(params)) == jax.tree.map(jnp.shape, plain)
    for ours, theirs in zip(jax.tree.leaves(as_plain(params)), jax.tree.leaves(plain), strict=True):
        # A kernel here has at least 32 entries, so their spread is known to about 4 × 1/√64 of itself.
        np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.5)


@pytest.mark.parametrize(
    ("name", "runs"),
    [pytest.param("test", 3, id="short"), pytest.param("default", 2, id="full", marks=pytest.mark.slow)],
)
def test_trains_to_the_held_out_bound_of_plain_flax(
    example: SimpleNamespace, optax_promotes: None, name: str, runs: int
) -> None:
    """Three seeds, with some runs of each: the mean difference is within 4 of its standard errors.

    A pair of runs has the same initial values and the same batches; the codes are drawn independently. The standard
    error is that of the mean of all paired differences: 9 of them in the short version, 6 in the full one.
    """
    config = load_config(name)
    train_set, held_out = example.input_pipeline.load_datasets()
    images, held_out_images = jnp.asarray(train_set.images), jnp.asarray(held_out.images)
    objective = example.models.create_objective(example.models.create_model(config), len(held_out_images))
    vae = plain_vae(example, config)
    key = jax.random.key(5)

    def fit(step: Callable[..., Any], state: Any) -> Any:
        for _ in range(config.num_epochs):
            state = example.train.train_epoch(step, state, images, config.batch_size)
        return state.params

    plain = example.plain_flax.create_train_state(config, jax.random.key(0))
    pairs = []
    for seed in range(3):
        ours = example.train.create_train_state(config, jax.random.key(seed))
        plain = plain.replace(params=as_plain(ours.params))
        for run in range(runs):
            run_key = jax.random.key(100 * seed + run)
            fitted = fit(example.train.train_step, example.train.placed(ours.replace(key=run_key)))
            by_hand = fit(example.plain_flax.train_step, example.train.placed(plain.replace(key=run_key)))
            pairs.append(
                (
                    float(example.train.evaluate(objective, fitted, held_out_images, key, config.eval_samples)),
                    float(example.plain_flax.evaluate(vae, by_hand, held_out_images, key, config.eval_samples)),
                )
            )
    pairs = np.asarray(pairs)
    differences = pairs[:, 0] - pairs[:, 1]
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    print(f"held-out ELBO: gjflax {pairs[:, 0].mean():.2f}, plain Flax {pairs[:, 1].mean():.2f} nats per image")
    print(f"difference {differences.mean():.2f} ± {error:.2f}; pairs {pairs.round(2).tolist()}")
    assert pairs.min() > -250, "a run did not train"
    assert abs(differences.mean()) < 4 * error


@pytest.mark.slow
@pytest.mark.timing
def test_a_step_takes_as_long_as_one_of_plain_flax(example: SimpleNamespace, optax_promotes: None) -> None:
    """At most 1.05 times as long, and 0.05 for the noise of the measurement: see the README for a quiet machine.

    Rounds of 20 steps, in turn and in changing order, so that whatever else the machine does hits both alike; the
    figure is the median of the rounds' ratios.
    """
    config = load_config("default")
    images = jnp.asarray(example.input_pipeline.load_datasets()[0].images[: config.batch_size])

    def timed(module: Any) -> Callable[[], float]:
        step = jax.jit(module.train_step)
        state = jax.block_until_ready(step(module.create_train_state(config, jax.random.key(0)), images))

        def measure() -> float:
            started, current = time.perf_counter(), state
            for _ in range(20):
                current = step(current, images)
            jax.block_until_ready(current)
            return time.perf_counter() - started

        return measure

    ours, plain = timed(example.train), timed(example.plain_flax)
    ratios = []
    for index in range(201):
        if index % 2:
            first = ours()
            ratios.append(first / plain())
        else:
            first = plain()
            ratios.append(ours() / first)
    ratio = statistics.median(ratios)
    print(f"a step takes {ratio:.3f} times as long as in plain Flax")
    assert ratio <= 1.05 + 0.05


class Killed(Exception):
    """Stands for whatever ends a run early."""


def kill_at(epoch: int, report: Callable[..., None]) -> Callable[..., None]:
    def killing(self: Any, entry: dict[str, Any]) -> None:
        if entry["epoch"] == epoch:
            raise Killed
        report(self, entry)

    return killing


def leaves(state: Any) -> list[np.ndarray]:
    state = state.replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    example: SimpleNamespace,
    optax_promotes: None,
    config: ml_collections.ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bit for bit, with the epoch in which it was killed trained again."""
    config.checkpoint_every_epochs = 2
    monkeypatch.setattr(example.figures, "draw_all", lambda *args: [])
    whole = example.train.train_and_evaluate(config, str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        reporter = example.progress.Reporter
        patch.setattr(reporter, "report", kill_at(4, reporter.report))
        with pytest.raises(Killed):
            example.train.train_and_evaluate(config, str(tmp_path / "killed"))
    capsys.readouterr()
    resumed = example.train.train_and_evaluate(config, str(tmp_path / "killed"))
    assert "Resuming after epoch 2." in capsys.readouterr().out
    for one, two in zip(leaves(whole), leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, two)

    histories = []
    for name in ("whole", "killed"):
        with example.checkpoints.open_manager(tmp_path / name / "checkpoints") as manager:
            histories.append(example.checkpoints.restore(manager, config, whole)[1])
    assert histories[0] == histories[1] and len(histories[0]) == config.num_epochs


def test_a_small_run_writes_its_figures_and_can_be_looked_at_again(
    example: SimpleNamespace,
    optax_promotes: None,
    config: ml_collections.ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    state = example.train.train_and_evaluate(config, "relative")
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == config.num_epochs and all("held-out ELBO" in line for line in lines)
    assert int(state.step) == config.num_epochs * (1437 // config.batch_size)
    for name in ("loss_curve", "reconstructions", "prior_samples", "latent_plane"):
        figure = tmp_path / "relative" / f"{name}.png"
        assert figure.stat().st_size > 10_000
        figure.unlink()
    assert (tmp_path / "relative" / "checkpoints" / str(config.num_epochs)).is_dir()

    again = example.train.train_and_evaluate(config, "relative")
    said = capsys.readouterr().out
    assert "Training is complete." in said and "epoch " not in said
    last = next(line for line in out.splitlines() if line.startswith("Held-out ELBO"))
    assert last in said.splitlines()
    assert (tmp_path / "relative" / "latent_plane.png").exists()
    for one, two in zip(leaves(state), leaves(again), strict=True):
        np.testing.assert_array_equal(one, two)

    config.learning_rate = 0.5
    with pytest.raises(ValueError, match=r"learning_rate was 0\.01 and is 0\.5"):
        example.train.train_and_evaluate(config, "relative")


def test_more_than_two_latents_are_drawn_in_a_plane(
    example: SimpleNamespace, config: ml_collections.ConfigDict, images: jax.Array
) -> None:
    codes = np.asarray(jax.random.normal(jax.random.key(6), (50, 5))) * np.array([1, 9, 1, 4, 1], np.float32)
    basis, _ = example.figures._plane(codes)
    np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-5)
    np.testing.assert_allclose(np.abs(basis[[1, 3]]), np.eye(2), atol=0.2)


def test_importance_sampling_tightens_the_bound(
    example: SimpleNamespace, config: ml_collections.ConfigDict, params: Any, images: jax.Array
) -> None:
    """Against log p(x) by quadrature over the two latents, to within 4 standard errors of 20 estimates."""
    decoder, encoder = example.queries.bind(example.models.create_model(config), params)
    image = images[0]
    estimate = jax.vmap(lambda key: example.queries.log_evidence(decoder, encoder, image, key, 500))
    estimates = jax.jit(estimate)(jax.random.split(jax.random.key(7), 20))
    ticks = jnp.linspace(-6.0, 6.0, 241)
    grid = jnp.stack(jnp.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    scores = jax.lax.map(
        lambda z: decoder.assess(jax.random.key(0), {"z": z, "x": image}, ())[1][1], grid, batch_size=1000
    )
    evidence = jax.nn.logsumexp(scores) + 2 * jnp.log(ticks[1] - ticks[0])
    # The logarithm of a mean is biased downwards by half its variance.
    bias = 0.5 * estimates.var()
    assert abs(estimates.mean() + bias - evidence) < 4 * estimates.std() / np.sqrt(20) + 1e-3


@pytest.mark.slow
def test_the_script_runs_from_any_directory(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE / "main.py"), "--workdir=out", f"--config={EXAMPLE / 'configs' / 'test.py'}"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "epoch 6/6" in done.stdout
    assert (tmp_path / "out" / "latent_plane.png").exists()

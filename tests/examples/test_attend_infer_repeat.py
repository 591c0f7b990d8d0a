"""Attend, infer, repeat: its density and its bound against sums over the presences by hand, its data, its counts."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import scipy.ndimage
import scipy.special
from scipy.stats import norm

import gjflax

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "attend_infer_repeat"
MODULES = ("figures", "input_pipeline", "models", "train")

PRIOR_LOGIT, NOISE, STEPS, LATENTS = -0.5, 0.3, 2, 3


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    """The example's modules, which import each other by bare names; they are forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(str(EXAMPLE)):
                del sys.modules[name]


def load_config(name: str) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(f"attend_infer_repeat_{name}", EXAMPLE / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def small_config() -> ml_collections.ConfigDict:
    config = load_config("test")
    config.update(prior_logit=PRIOR_LOGIT, noise=NOISE, num_steps=STEPS, latents=LATENTS)
    return config


def box(where: np.ndarray) -> tuple[float, np.ndarray]:
    """The width of a box, 8 pixels at 0 and a tenth more at 1, and its centre, 5 pixels off the middle at 1."""
    return 8.0 * np.exp(0.1 * where[0]), 12.0 + 5.0 * where[1:]


def place(patch: np.ndarray, where: np.ndarray) -> np.ndarray:
    """A patch in its box on the canvas, by SciPy's interpolation. Its pixels are numbered by their centres."""
    width, centre = box(where)
    in_patch = [(np.arange(24) + 0.5 - middle) * 8 / width + 4 - 0.5 for middle in centre]
    return scipy.ndimage.map_coordinates(patch, np.meshgrid(*in_patch, indexing="ij"), order=1, mode="grid-constant")


def glimpse(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The pixels in a box, by SciPy's interpolation."""
    width, centre = box(where)
    in_canvas = [middle + (np.arange(8) + 0.5 - 4) * width / 8 - 0.5 for middle in centre]
    return scipy.ndimage.map_coordinates(image, np.meshgrid(*in_canvas, indexing="ij"), order=1, mode="grid-constant")


def decode(params: Any, what: np.ndarray) -> np.ndarray:
    """The patch of an appearance, in double precision."""
    first, second = (params["model"]["object"]["MLP_0"][f"Dense_{i}"] for i in range(2))
    hidden = what @ np.asarray(first["kernel"], np.float64) + np.asarray(first["bias"], np.float64)
    hidden = hidden * scipy.special.expit(hidden)
    outputs = hidden @ np.asarray(second["kernel"], np.float64) + np.asarray(second["bias"], np.float64)
    return scipy.special.expit(outputs - 3.0).reshape(8, 8)


def log_presence(logit: float, count: int) -> float:
    """The log probability of so many objects: as many heads, and a tail if there was a step left."""
    return count * np.log(scipy.special.expit(logit)) + (count < STEPS) * np.log(scipy.special.expit(-logit))


def log_joint(params: Any, count: int, where: np.ndarray, what: np.ndarray, image: np.ndarray) -> float:
    """log p of the first `count` of the objects, and of an image."""
    expected = sum((place(decode(params, what[t]), where[t]) for t in range(count)), np.zeros((24, 24)))
    objects = norm.logpdf(where[:count]).sum() + norm.logpdf(what[:count]).sum()
    return log_presence(PRIOR_LOGIT, count) + objects + norm.logpdf(image, expected, NOISE).sum()


@pytest.fixture(scope="module")
def small(example: SimpleNamespace) -> SimpleNamespace:
    """A small model, its parameters, an image, and a guide that draws all objects from one normal distribution each.

    Its parameters are drawn, and the last kernels are 0: what a step draws does not depend on the steps before. So the
    objects of a key are the same ones in every combination of presences, and are seen where all are present.
    """
    config = small_config()
    image = example.input_pipeline.load_datasets(8, 1, 2, jax.random.key(0))[0].images[0]
    objectives, args = {}, ({"x": image}, (), (image,))
    for name in ("enum", "reinforce", "measure_valued"):
        config.estimator = name
        scene, attention = example.models.create_scene(config), example.models.create_attention(config)
        objectives[name] = gjflax.ELBO(scene, attention, num_samples=2 if name == "reinforce" else 1)
    # Drawn here: initial values are small, and to compile them takes longer than the rest.
    shapes = jax.eval_shape(objectives["enum"].init, jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)
    step = params["guide"]["AttentionStep_0"]
    for last in (step["Dense_2"], step["Look_0"]["Dense_0"], step["Look_0"]["MLP_0"]["Dense_1"]):
        last["kernel"] = jnp.zeros_like(last["kernel"])
    return SimpleNamespace(objectives=objectives, args=args, params=params, image=image, scene=scene)


def presence(params: Any) -> Any:
    """The layer whose bias is the logit of every presence in the guide."""
    return params["guide"]["AttentionStep_0"]["Dense_2"]


def with_parts(params: Any, bias: Any, model: Any = None) -> Any:
    """The parameters with another logit of presence, and with another model."""
    params = jax.tree.map(lambda leaf: leaf, params)
    presence(params)["bias"] = bias
    return params if model is None else {**params, "model": model}


def moments(outputs: Any) -> tuple[np.ndarray, np.ndarray]:
    mean, raw_scale = np.split(np.asarray(outputs, np.float64), 2)
    return mean, np.logaddexp(0.0, raw_scale) + 1e-3


def bound_by_hand(params: Any, where: np.ndarray, what: np.ndarray, image: np.ndarray) -> float:
    """Σ_n q(n) (log p(n, objects, x) − log q(n, objects)), over the possible numbers n of objects."""
    step = params["guide"]["AttentionStep_0"]
    logit = float(presence(params)["bias"][0])
    of_where, of_what = moments(step["Look_0"]["Dense_0"]["bias"]), moments(step["Look_0"]["MLP_0"]["Dense_1"]["bias"])
    total = 0.0
    for count in range(STEPS + 1):
        log_q = log_presence(logit, count)
        objects = norm.logpdf(where[:count], *of_where).sum() + norm.logpdf(what[:count], *of_what).sum()
        total += np.exp(log_q) * (log_joint(params, count, where, what, image) - log_q - objects)
    return total


class Draws(gjflax.ELBO):
    """The objects that the guide of an ELBO draws with the same key."""

    def loss(self, key: Any, observed: Any, model_args: Any, guide_args: Any) -> Any:
        return self.draw(key, observed, model_args, guide_args).choices


def along(function: Callable[[Any], float], params: Any, direction: Any) -> float:
    """The derivative along a direction, by central differences in double precision."""

    def at(step: float) -> float:
        return function(jax.tree.map(lambda leaf, d: np.asarray(leaf, np.float64) + step * d, params, direction))

    return (at(1e-5) - at(-1e-5)) / 2e-5


def test_patches_are_placed_and_seen_as_by_scipy(example: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    for where in rng.normal(size=(5, 3)):
        patch, image = rng.uniform(size=(8, 8)), rng.uniform(size=(24, 24))
        got = example.models.place(jnp.asarray(patch, jnp.float32), jnp.asarray(where, jnp.float32))
        np.testing.assert_allclose(got, place(patch, where), atol=2e-5)
        got = example.models.glimpse(jnp.asarray(image, jnp.float32), jnp.asarray(where, jnp.float32))
        np.testing.assert_allclose(got, glimpse(image, where), atol=2e-5)


def test_the_density_of_a_scene_is_that_by_hand(small: SimpleNamespace) -> None:
    scene = small.scene.bind({"params": small.params["model"]})
    _, traces = jax.jit(jax.vmap(lambda key: scene.simulate(key, ())))(jax.random.split(jax.random.key(3), 16))
    counts = set()
    for index, score in enumerate(traces.get_score()):
        choices = jax.tree.map(lambda leaf, index=index: leaf[index], traces.strip())
        present = choices["steps", "present"].unmask(0)
        where, what = (choices["steps", "object", name].unmask(0.0) for name in ("where", "what"))
        counts.add(int(present.sum()))
        want = log_joint(
            small.params, int(present.sum()), *(np.asarray(a, np.float64) for a in (where, what, choices["x"]))
        )
        np.testing.assert_allclose(score, want, rtol=1e-4)
    assert counts == {0, 1, 2}


def test_the_enumerated_bound_is_the_sum_over_presences_by_hand(small: SimpleNamespace) -> None:
    """In value, and in its derivatives in the logit of presence and in the decoder: at given objects both are exact."""
    objective, rngs = small.objectives["enum"], {"choice": jax.random.key(4)}
    draws = Draws(objective.model, objective.guide)
    everywhere = with_parts(small.params, bias=jnp.array([40.0]))
    choices = jax.jit(lambda params: draws.apply({"params": params}, *small.args, rngs=rngs))(everywhere)
    assert choices["steps", "present"].unmask(0).tolist() == [[1] * STEPS]
    drawn = [np.asarray(choices["steps", "object", name].unmask(0.0)[0], np.float64) for name in ("where", "what")]

    def loss(parts: Any) -> Any:
        return objective.apply({"params": with_parts(small.params, **parts)}, *small.args, rngs=rngs)

    def by_hand(parts: Any) -> float:
        return bound_by_hand(with_parts(small.params, **parts), *drawn, small.image)

    parts = {"bias": presence(small.params)["bias"], "model": small.params["model"]}
    value, grads = jax.jit(jax.value_and_grad(loss))(parts)
    np.testing.assert_allclose(-value, by_hand(parts), rtol=1e-5)
    rng = np.random.default_rng(0)
    zero, drawn_direction = (
        jax.tree.map(lambda leaf, scale=scale: scale * rng.normal(size=leaf.shape), parts) for scale in (0.0, 1.0)
    )
    for direction in ({**zero, "bias": np.ones(1)}, {**zero, "model": drawn_direction["model"]}):
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
        got = -sum(np.sum(np.asarray(grad, np.float64) * d) for grad, d in pairs)
        np.testing.assert_allclose(got, along(by_hand, parts, direction), rtol=1e-4)


@pytest.mark.slow
def test_the_estimators_have_the_same_mean(small: SimpleNamespace) -> None:
    """The derivative in the logit of presence over 4,000 keys each, to within 4 standard errors of the difference."""

    def moments_of_slope(objective: Any) -> tuple[float, float]:
        def slope(key: Any) -> Any:
            def loss(bias: Any) -> Any:
                params = with_parts(small.params, bias=bias)
                return objective.apply({"params": params}, *small.args, rngs={"choice": key})

            return jax.grad(loss)(presence(small.params)["bias"])[0]

        keys = jax.random.split(jax.random.key(5), 4000)
        slopes = np.asarray(jax.jit(lambda keys: jax.lax.map(slope, keys, batch_size=500))(keys), np.float64)
        return slopes.mean(), slopes.std(ddof=1) / np.sqrt(len(keys))

    found = {name: moments_of_slope(objective) for name, objective in small.objectives.items()}
    print("; ".join(f"{name}: {mean:.3f} ± {error:.3f}" for name, (mean, error) in found.items()))
    exact, exact_error = found.pop("enum")
    for mean, error in found.values():
        assert abs(mean - exact) < 4 * np.hypot(error, exact_error)
        assert error < 0.1 * abs(exact), "the comparison says nothing"


def test_scenes_have_as_many_digits_as_they_say(example: SimpleNamespace) -> None:
    """With digits that are full squares: were two of them to overlap, there would be less ink."""
    scenes = example.input_pipeline.make_scenes(np.ones((1, 8, 8), np.float32), 300, 3, jax.random.key(6))
    np.testing.assert_array_equal(scenes.images.sum(axis=(1, 2)), 64 * scenes.counts)
    # 300 × 1/4, with a standard deviation of 7.5.
    assert np.all(np.abs(np.bincount(scenes.counts, minlength=4) - 75) < 30)


def test_training_and_held_out_scenes_share_no_digit(example: SimpleNamespace) -> None:
    train, held_out = example.input_pipeline.load_datasets(200, 200, 1, jax.random.key(7))

    def digits(scenes: Any) -> set[bytes]:
        crops = (image[np.ix_(image.any(1), image.any(0))] for image in scenes.images[scenes.counts == 1])
        return {crop.tobytes() for crop in crops}

    assert len(digits(train)) > 80 and digits(train).isdisjoint(digits(held_out))


def test_counts_are_compared_right(example: SimpleNamespace) -> None:
    table = example.train.confusion(np.array([0, 1, 1, 2]), np.array([0, 1, 3, 2]), 3)
    assert table.tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]]
    # The ink is the count plus 10, but for the last image, which lies beyond what a line is trusted with.
    ink = np.zeros((5, 24, 24), np.float32)
    ink[:, 0, 0] = [10, 11, 12, 11.4, 30]
    scenes = example.input_pipeline.Scenes(ink[:3], np.array([0, 1, 2]))
    assert example.train.count_by_ink(scenes, ink).tolist() == [0, 1, 2, 1, 2]


@pytest.mark.slow
def test_a_short_training_counts_and_draws(
    example: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After 6 of 20 epochs: more than 85 % of 1,024 held-out images, by more than 4 binomial standard errors."""
    config = load_config("default")
    config.num_epochs = 6
    with jax.numpy_dtype_promotion("standard"):
        trained = example.train.train_and_evaluate(config, str(tmp_path))
    assert f"step {config.num_epochs * 64}/{config.num_epochs * 64}" in capsys.readouterr().out
    share = trained.accuracies[-1]
    error = np.sqrt(share * (1 - share) / config.held_out_images)
    print(f"counted right: {share:.3f} ± {error:.3f}; {[round(one, 3) for one in trained.accuracies]}")
    assert share - 4 * error > 0.85
    for name in ("loss_curve", "reconstructions"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000

"""The semi-supervised VAE: its bound against a sum over the classes by hand, its data, its figures and its accuracy."""

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
import scipy.special
import scipy.stats

import gjflax

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "semi_supervised_vae"
MODULES = ("figures", "input_pipeline", "models", "train")


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
    spec = importlib.util.spec_from_file_location(f"semi_supervised_vae_{name}", EXAMPLE / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def drawn_params(objective: Any, args: Any) -> Any:
    """Parameters larger than they begin, so that classes and styles matter, and without compiling `init`."""
    shapes = jax.eval_shape(objective.init, jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def mlp(params: Any, x: np.ndarray) -> np.ndarray:
    """The networks, in NumPy and double precision."""
    layers = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params[f"Dense_{i}"]) for i in range(len(params))]
    for layer in layers[:-1]:
        x = x @ layer["kernel"] + layer["bias"]
        x = x * scipy.special.expit(x)
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def log_q_of_classes(params: Any, image: np.ndarray) -> np.ndarray:
    """log q(y | x) of all classes."""
    return scipy.special.log_softmax(mlp(params["guide"]["classifier"]["MLP_0"], image.reshape(-1) / 16.0))


def bound_given_class(params: Any, image: np.ndarray, y: int, noise: np.ndarray) -> float:
    """log p(x, y, z) − log q(z | x, y) at z = mean + scale × noise, with SciPy's densities."""
    one_hot = np.eye(10)[y]
    outputs = mlp(params["guide"]["style"]["MLP_0"], np.concatenate([image.reshape(-1) / 16.0, one_hot]))
    mean, scale = outputs[: len(noise)], np.logaddexp(0.0, outputs[len(noise) :])
    z = mean + scale * noise
    probs = scipy.special.expit(mlp(params["model"]["digit"]["MLP_0"], np.concatenate([one_hot, z])))
    log_p = (
        np.log(0.1) + scipy.stats.norm.logpdf(z).sum() + scipy.stats.binom.logpmf(image.reshape(-1), 16, probs).sum()
    )
    return log_p - scipy.stats.norm.logpdf(z, mean, scale).sum()


def bound_by_hand(params: Any, image: np.ndarray, noise: np.ndarray) -> float:
    """Σ_y q(y | x) (L(x, y) − log q(y | x)), the sum written out."""
    log_q = log_q_of_classes(params, image)
    return sum(np.exp(log_q[y]) * (bound_given_class(params, image, y, noise) - log_q[y]) for y in range(10))


def along(function: Callable[[Any], float], params: Any, direction: Any) -> float:
    """The derivative along a direction, by central differences in double precision."""

    def at(step: float) -> float:
        return function(jax.tree.map(lambda leaf, d: np.asarray(leaf, np.float64) + step * d, params, direction))

    return (at(1e-5) - at(-1e-5)) / 2e-5


@pytest.fixture(scope="module")
def one_image(example: SimpleNamespace) -> SimpleNamespace:
    """The ELBO of one unlabelled image, parameters under the names of the whole, the image, and the noise of z.

    With the style's network at mean 0 and scale 1, z is the noise. Under a decoder that does not look at z the bound's
    derivative in the bias of the mean is then minus z, whatever the class: so the noise is read off the public interface.
    """
    models, latents = example.models, 3
    guide = models.ClassAndStyle(models.Classifier((12,)), models.Style(latents, (12,)))
    objective = gjflax.ELBO(models.Digit(latents, (12,)), guide)
    image = example.input_pipeline.load_datasets()[1].images[0]
    args = {"x": image}, (), (image,)
    params = drawn_params(objective, args)
    step = jax.jit(
        jax.value_and_grad(
            lambda params: objective.apply({"params": params}, *args, rngs={"choice": jax.random.key(1)})
        )
    )

    def named(params: Any) -> Any:
        return {"guide": params["guide"], "model": {"digit": params["model"]}}

    blank = jax.tree.map(jnp.zeros_like, params)
    blank["guide"]["style"]["MLP_0"]["Dense_1"]["bias"] = jnp.asarray(
        np.concatenate([np.zeros(latents), np.full(latents, np.log(np.expm1(1.0)))]), jnp.float32
    )
    slope = step(blank)[1]["guide"]["style"]["MLP_0"]["Dense_1"]["bias"][:latents]
    return SimpleNamespace(step=step, params=params, named=named, image=image, noise=np.asarray(slope, np.float64))


def test_the_enumerated_bound_is_the_sum_over_classes_by_hand(one_image: SimpleNamespace) -> None:
    """At the same noise the value is the same, to rounding, and so is the derivative in any direction.

    Nothing of y is drawn: the derivative by hand is that of the sum, by central differences in double precision.
    """

    def by_hand(params: Any) -> float:
        return bound_by_hand(one_image.named(params), one_image.image, one_image.noise)

    loss, grads = one_image.step(one_image.params)
    assert np.abs(one_image.noise).min() > 0.01
    np.testing.assert_allclose(-loss, by_hand(one_image.params), rtol=1e-5)
    length = np.sqrt(sum(np.sum(np.asarray(grad, np.float64) ** 2) for grad in jax.tree.leaves(grads)))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = jax.tree.map(lambda leaf, rng=rng: rng.normal(size=leaf.shape), one_image.params)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
        got = -sum(np.sum(np.asarray(grad, np.float64) * d) for grad, d in pairs)
        assert abs(got - along(by_hand, one_image.params, direction)) < 1e-4 * length


def test_the_gradient_has_no_variance_from_the_class(example: SimpleNamespace) -> None:
    """Where the style says nothing (q(z | x, y) = p(z), and the decoder does not look at z) no randomness is left.

    So the loss of batches is an exact number: labelled and unlabelled images, each batch standing for its population, and
    the labels' cross-entropy, all with SciPy's densities. Its gradient is the same for every key. Were y drawn, both would
    differ from key to key.
    """
    models, latents = example.models, 2
    config = load_config("test")
    config.label_weight = 3.0
    sizes = models.Sizes(labelled=20, unlabelled=90, labelled_batch=4, unlabelled_batch=3)
    objective = models.create_objective(config, sizes)
    digits = example.input_pipeline.load_datasets()[0]
    batch = digits.images[:4], digits.labels[:4], digits.images[4:7]
    args = models.objective_args(batch)
    params = drawn_params(objective, args)
    last = params["guide"]["style"]["MLP_0"]["Dense_1"]
    last["kernel"] = jnp.zeros_like(last["kernel"])
    last["bias"] = jnp.asarray([0.0] * latents + [np.log(np.expm1(1.0))] * latents, jnp.float32)
    first = params["model"]["digit"]["MLP_0"]["Dense_0"]
    first["kernel"] = first["kernel"].at[10:].set(0.0)

    noise = np.zeros(latents)
    labelled = [bound_given_class(params, x, y, noise) for x, y in zip(batch[0], batch[1], strict=True)]
    unlabelled = [bound_by_hand(params, x, noise) for x in batch[2]]
    log_q = [log_q_of_classes(params, x)[y] for x, y in zip(batch[0], batch[1], strict=True)]
    want = 20 * np.mean(labelled) + 90 * np.mean(unlabelled) + 3.0 * 110 * np.mean(log_q)

    @jax.jit
    @jax.value_and_grad
    def step(classifier: Any, key: Any) -> Any:
        changed = {**params, "guide": {**params["guide"], "classifier": classifier}}
        return objective.apply({"params": changed}, *args, rngs={"choice": key})

    classifier = params["guide"]["classifier"]
    losses, grads = zip(*(step(classifier, jax.random.key(seed)) for seed in range(4)), strict=True)
    np.testing.assert_allclose(-np.asarray(losses), want, rtol=1e-5)
    grads = [np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grad)]) for grad in grads]
    for other in grads[1:]:
        assert np.abs(other - grads[0]).max() < 1e-5 * np.abs(grads[0]).max()


def test_labels_are_balanced_and_batches_keep_them_with_their_images(example: SimpleNamespace) -> None:
    pipeline = example.input_pipeline
    digits, _ = pipeline.load_datasets()
    by_image = {image.tobytes(): label for image, label in zip(*digits, strict=True)}
    partly = pipeline.keep_labels(digits, 50, jax.random.key(3))
    assert np.bincount(partly.labelled.labels).tolist() == [5] * 10
    assert len(partly.unlabelled) == 1437 - 50
    kept = {image.tobytes() for image in partly.labelled.images}
    assert len(kept) == 50 and kept.isdisjoint(image.tobytes() for image in partly.unlabelled)
    other = pipeline.keep_labels(digits, 50, jax.random.key(4)).labelled
    assert {image.tobytes() for image in other.images} != kept

    sizes = pipeline.sizes_of(partly, 20, 64)
    epoch = pipeline.batches(partly, sizes, jax.random.key(5))
    labelled, labels, unlabelled = zip(*epoch(0), strict=True)
    assert len(labels) == (1437 - 50) // 64
    for image, label in zip(np.concatenate(labelled), np.concatenate(labels), strict=True):
        assert by_image[image.tobytes()] == label and image.tobytes() in kept
    assert len({image.tobytes() for image in np.concatenate(unlabelled)}) == 64 * len(labels)
    # Two batches of 20 are a pass through most of the 50; the next pass has another order.
    assert len({image.tobytes() for image in np.concatenate(labelled[:2])}) == 40
    again = [batch[1] for batch in epoch(0)]
    np.testing.assert_array_equal(again, labels)
    assert any(not np.array_equal(a, b) for a, b in zip(again, (batch[1] for batch in epoch(1)), strict=True))


def test_the_table_has_means_and_standard_errors(example: SimpleNamespace) -> None:
    found = example.train.Accuracies((10,), np.array([[0.5, 0.7, 0.9]]), np.array([[0.4, 0.6, 0.5]]))
    # The standard deviations are 0.2, 0.1 and √3 / 10.
    assert "| 10 | 70.0 ± 11.5 % | 50.0 ± 5.8 % | +20.0 ± 10.0 % |" in example.train.as_table(found)


@pytest.mark.slow
def test_a_training_with_few_labels_classifies_and_draws(example: SimpleNamespace, tmp_path: Path) -> None:
    """With 100 labels, one seed: more than 85 % of 360 held-out images, by more than 4 binomial standard errors."""
    config = load_config("default")
    config.update(label_counts=(100,), seeds=(0,))
    with jax.numpy_dtype_promotion("standard"):
        found = example.train.train_and_evaluate(config, str(tmp_path))
    (share,) = found.semi_supervised[0]
    error = np.sqrt(share * (1 - share) / 360)
    print(f"right: {share:.3f} ± {error:.3f}; supervised {found.supervised[0, 0]:.3f}")
    assert share - 4 * error > 0.85
    assert (tmp_path / "accuracy.md").read_text().startswith("| labels |")
    for name in ("accuracy", "analogies"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000

"""The notebook on differentiable programming: it runs, its checks happen, and its checks can fail."""

from __future__ import annotations

import collections
import pathlib
import runpy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import jupytext
import matplotlib
import numpy as np
import pytest
import scipy.stats

import gjflax
from gjflax import Normal, trace

FOLDER = pathlib.Path(__file__).parents[2] / "examples"
SCRIPT = FOLDER / "differentiable_programming.py"
NOTEBOOK = FOLDER / "differentiable_programming.ipynb"

pytestmark = [
    pytest.mark.optimized,
    # TFP's import asks JAX for a name that JAX has deprecated.
    pytest.mark.filterwarnings("ignore:jax.core.pytype_aval_mappings is deprecated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The script's names after one run, and the folder that it wrote to as ``folder``."""
    folder = tmp_path_factory.mktemp("figures")
    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context():
        matplotlib.use("Agg")
        patch.setattr("sys.argv", [str(SCRIPT), "--out", str(folder)])
        with jax.numpy_dtype_promotion("standard"):  # optax promotes dtypes by itself
            names = runpy.run_path(str(SCRIPT))
        yield SimpleNamespace(**names, folder=folder)


@pytest.mark.slow
def test_every_part_is_compared_with_exact_values(example: SimpleNamespace) -> None:
    parts = collections.Counter(check["name"].split(":")[0] for check in example.CHECKS)
    assert parts == {
        "curvature": 6,
        "MAP": 3,
        "MALA, centre": 9,
        "MALA, edge": 9,
        "score_params": 1,
        "param_grad": 3,
        "MLE": 4,
        "ADVI": 7,
    }
    for check in example.CHECKS:
        assert check["passed"] and 0 < check["tolerance"] < 0.1


@pytest.mark.slow
def test_the_exact_values_are_those_of_scipy(example: SimpleNamespace) -> None:
    by_name = {check["name"]: check for check in example.CHECKS}
    x, y = (np.asarray(example.data["centre"][name, "pos"], np.float64) for name in "xy")
    line = scipy.stats.linregress(x, y)
    for part in ("MAP", "MLE"):
        np.testing.assert_allclose(by_name[f"{part}: a"]["want"], line.slope, rtol=1e-6)
        np.testing.assert_allclose(by_name[f"{part}: b"]["want"], line.intercept, rtol=1e-6)
        np.testing.assert_allclose(by_name[f"{part}: x_mu"]["want"], x.mean(), rtol=1e-6)


def test_truncated_moments_in_one_dimension(example: SimpleNamespace) -> None:
    mean, covariance = example.truncated_moments(np.array([1.0]), np.array([[4.0]]), [(0.8, 1.9)])
    want = scipy.stats.truncnorm((0.8 - 1.0) / 0.5, (1.9 - 1.0) / 0.5, loc=1.0, scale=0.5)
    np.testing.assert_allclose(mean, want.mean(), rtol=1e-8)
    np.testing.assert_allclose(covariance, want.var(), rtol=1e-8)


def test_truncated_moments_in_two_dimensions(example: SimpleNamespace) -> None:
    """Against a fine sum over a grid."""
    centre, precision = np.array([0.2, -0.1]), np.array([[3.0, 1.0], [1.0, 2.0]])
    mean, covariance = example.truncated_moments(centre, precision, [(-0.5, 0.3), (0.0, 9.0)])
    first, second = (np.arange(0.5, 1000) / 1000 * width + low for low, width in ((-0.5, 0.8), (0.0, 6.0)))
    points = np.stack(np.meshgrid(first, second, indexing="ij"), axis=-1).reshape(-1, 2)
    offsets = points - centre
    mass = np.exp(-0.5 * ((offsets @ precision) * offsets).sum(axis=1))
    np.testing.assert_allclose(mean, np.average(points, axis=0, weights=mass), atol=2e-5)
    np.testing.assert_allclose(covariance, np.cov(points.T, aweights=mass, ddof=0), atol=2e-5)


def test_the_edge_data_is_truncated(example: SimpleNamespace) -> None:
    posterior = example.exact["edge"]
    gaussian = np.linalg.inv(posterior.precision)
    assert posterior.covariance[1, 1] < 0.5 * gaussian[1, 1]
    assert example.posterior_draws["edge"][..., 1].max() <= 4.0


@pytest.mark.parametrize(("got", "fails"), [(1.0, False), (1.11, True), (0.89, True), (np.nan, True)])
def test_a_check_can_fail(example: SimpleNamespace, got: float, fails: bool) -> None:
    if not fails:
        return example.check_close("name", got, 1.0, 0.1)
    with pytest.raises(AssertionError, match="name"):
        example.check_close("name", got, 1.0, 0.1)


def shared_noise(self: Any, key: Any, mean: Any) -> Any:
    """One draw of noise for all coordinates."""
    noise = jnp.sqrt(2.0 * self.tau) * jax.random.normal(key)
    return jax.tree.map(lambda leaf: leaf + noise, mean)


def short_noise(self: Any, key: Any, mean: Any) -> Any:
    """Noise of variance tau, with a proposal density that says 2 tau."""
    leaves, structure = jax.tree.flatten(mean)
    keys = jax.random.split(key, len(leaves))
    noisy = [m + jnp.sqrt(self.tau) * jax.random.normal(k, m.shape) for k, m in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def no_correction(self: Any, values: Any, mean: Any) -> Any:
    """As if the proposal were symmetric."""
    return jnp.zeros(())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mistake"),
    [("perturb", shared_noise), ("perturb", short_noise), ("log_q", no_correction)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_moments_expose_a_wrong_sampler(example: SimpleNamespace, method: str, mistake: Callable[..., Any]) -> None:
    wrong = type("Wrong", (example.MALA,), {method: mistake})
    tau = example.STEP["centre"] / np.linalg.eigvalsh(example.hessians["centre"])[-1]
    move = wrong(example.latents, float(tau))
    draws, _ = example.sample_posterior(move, jax.random.key(1), example.data["centre"])
    with pytest.raises(AssertionError, match="wrong: "):
        example.check_moments("wrong", draws, example.exact["centre"])


def test_mala_on_choices_of_any_shape(example: SimpleNamespace) -> None:
    """A vector, a matrix and a scalar, all standard normal: the covariance of all eight elements is the identity."""

    @gjflax.gen
    def model() -> None:
        trace("vector", Normal)(jnp.zeros(3), 1.0)
        trace("matrix", Normal)(jnp.zeros((2, 2)), 1.0)
        trace("scalar", Normal)(0.0, 1.0)

    chains, moves = 300, 400
    move = example.MALA(gjflax.select("vector", "matrix", "scalar"), 0.5)
    start_keys, keys = jax.random.split(jax.random.key(2), (2, chains))

    def run(start_key: Any, key: Any) -> Any:
        _, start = model.simulate(start_key, ())
        last, history, accepted = example.run_chain(move, key, start, length=moves)
        _, (_, score) = model.assess(key, last.strip(), ())
        return history, accepted, last.get_score(), score

    history, accepted, kept_score, score = jax.jit(jax.vmap(run))(start_keys, keys)
    assert 0.4 < accepted.mean() < 0.95
    np.testing.assert_allclose(kept_score, score, rtol=1e-5)
    draws = np.concatenate([np.asarray(leaf).reshape(chains, moves, -1) for leaf in jax.tree.leaves(history)], axis=-1)
    assert draws.shape[-1] == 8
    products = np.einsum("cmi,cmj->cij", draws, draws) / moves
    error = products.std(axis=0, ddof=1) / np.sqrt(chains)
    assert np.all(np.abs(products.mean(axis=0) - np.eye(8)) < 5 * error)
    assert error.max() < 0.03


def test_figures_are_written(example: SimpleNamespace) -> None:
    sizes = {path.name: path.stat().st_size for path in example.folder.iterdir()}
    assert set(sizes) == {"prior.png", "map.png", "mala.png", "mle.png", "advi.png"}
    assert min(sizes.values()) > 10_000


def test_the_notebook_is_the_script() -> None:
    script, notebook = jupytext.read(SCRIPT), jupytext.read(NOTEBOOK)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ]
    assert len(script.cells) > 30
    assert notebook.metadata["jupytext"]["formats"] == "ipynb,py:percent"
    assert not any(cell.get("outputs") for cell in notebook.cells)

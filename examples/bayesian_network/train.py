"""Fitting the network in each treatment, and what it predicts."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import exact
import figures
import input_pipeline
import jax
import jax.numpy as jnp
import ml_collections
import models
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree
from scipy.special import logsumexp
from scipy.stats import norm

import gjflax

LEVELS = np.array([0.5, 0.8, 0.95])
"""Of the central predictive intervals whose coverage is reported."""


class Fitted(NamedTuple):
    """A network in one of the treatments.

    Attributes:
      model: the model, without parameters.
      guide: the guide, without parameters; None where nothing is random.
      params: of both, under "model" and "guide".
    """

    model: models.Regression
    guide: gjflax.GenerativeFunction | None
    params: PyTree

    @property
    def noise(self) -> float:
        """The standard deviation of the response."""
        bound = self.model.bind({"params": self.params.get("model", {})})
        return float(bound.noise_scale() if self.model.noise else jnp.exp(self.params["model"]["log_noise"]))


@functools.cache
def create_optimizer(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Adam, with a learning rate that falls to zero. One object for equal arguments, so that steps are compiled once."""
    return optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))


def inputs(batch: input_pipeline.Regression) -> tuple[Any, tuple[Any, ...]]:
    """What the objectives are called with: the observed response, and the model's arguments."""
    return {"y": batch.y}, (batch.x,)


def fit(
    name: str,
    data: input_pipeline.Regression,
    options: ml_collections.ConfigDict,
    key: Key[Array, ""],
) -> Fitted:
    """Fit the network in a treatment."""
    treatment = models.TREATMENTS[name]
    model = models.Regression(options.hidden, treatment.random, options.noise)
    objective = models.create_objective(model, treatment, data.x, data.y, options.num_samples)
    optimizer = create_optimizer(options.learning_rate, options.num_steps)
    result = gjflax.fit(objective, optimizer, data, key=key, num_steps=options.num_steps, inputs=inputs, progress=False)
    return Fitted(model, objective.guide, result.state.params)


def predict(
    fitted: Fitted, x: Float[np.ndarray, "n inputs"], key: Key[Array, ""], num_draws: int
) -> Float[np.ndarray, "draws n"]:
    """The response's mean at inputs, for draws of what is random."""
    return np.asarray(_predict(fitted.model, fitted.guide, fitted.params, x, jax.random.split(key, num_draws)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predict(model: Any, guide: Any, params: PyTree, x: Array, keys: Array) -> Array:
    bound = model.bind({"params": params.get("model", {})})

    def one(key: Key[Array, ""]) -> Float[Array, " n"]:
        choices: Any = {}
        if guide is not None:
            key, drawn = guide.bind({"params": params["guide"]}).simulate(key, ())
            choices = drawn.strip()
        _, (_, predicted) = bound.importance(key, choices, (x,))
        return predicted.get_retval()

    return jax.vmap(one)(keys)


class Calibration(NamedTuple):
    """The predictive density of held-out data, a mixture of Normal(mean_s, noise) over draws s, at the responses.

    Attributes:
      log_density: of each response.
      position: the predictive distribution function at each response; uniform where the predictions are calibrated.
    """

    log_density: np.ndarray
    position: np.ndarray

    def coverage(self, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The share of responses in the central intervals, and its binomial standard error if the level were right."""
        inside = np.abs(self.position[:, None] - 0.5) <= levels / 2
        return inside.mean(axis=0), np.sqrt(levels * (1 - levels) / len(self.position))


def calibration(means: np.ndarray, noise: float, y: np.ndarray) -> Calibration:
    """The calibration of a mixture of normals with these means, a row for each draw."""
    means, y = np.asarray(means, np.float64), np.asarray(y, np.float64)
    log_density = logsumexp(norm.logpdf(y, means, noise), axis=0) - np.log(len(means))
    return Calibration(log_density, norm.cdf(y, means, noise).mean(axis=0))


def last_layer_of(fitted: Fitted) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the guide of the last layer: of its kernel and, at the end, its bias."""
    bound = fitted.guide.bind({"params": fitted.params["guide"]})
    places = bound.split(jnp.arange(bound.size))
    order = np.concatenate([np.ravel(places["net", "last", part]) for part in ("kernel", "bias")]).astype(int)
    scale_tril = np.asarray(bound.scale_tril, np.float64)
    return np.asarray(bound.loc, np.float64)[order], (scale_tril @ scale_tril.T)[np.ix_(order, order)]


def exact_last_layer(fitted: Fitted, data: input_pipeline.Regression) -> exact.Posterior:
    """The exact posterior of the last layer, given the first layer and the noise that were learned with it."""
    first = fitted.params["model"]["MLP_0"]["first"]
    phi = exact.features(data.x, first["kernel"], first["bias"])
    scale = models.prior_scale(("last", "kernel"), (fitted.model.hidden, 1))
    scales = np.append(np.full(fitted.model.hidden, scale), models.prior_scale(("last", "bias"), (1,)))
    return exact.last_layer(phi, data.y, scales, fitted.noise)


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Fit, report and draw.

    Args:
      config: the hyperparameters.
      workdir: where the figures are written.
    """
    directory = Path(workdir).expanduser().resolve()
    directory.mkdir(parents=True, exist_ok=True)
    fit_key, draw_key = jax.random.split(jax.random.key(config.seed))

    data = input_pipeline.simulated_curve()
    grid = np.linspace(-3.0, 3.0, 201, dtype=np.float32)
    print(
        "Simulated curve: predictive standard deviation of the mean at x = 0.1, in the gap, and at x = 1.5, among data"
    )
    bands = {}
    for name in models.TREATMENTS:
        fitted = fit(name, data, config.curve, fit_key)
        means = predict(fitted, grid[:, None], draw_key, config.num_draws)
        bands[name] = (means, fitted.noise)
        gap, inside = (means[:, np.abs(grid - x).argmin()].std() for x in (0.1, 1.5))
        print(f"  {name:24s} {gap:.3f}  {inside:.3f}")
        if name == "variational, last layer":
            divergence = exact_last_layer(fitted, data).divergence_from(*last_layer_of(fitted))
            print(f"    KL(guide ‖ exact posterior of the last layer, given the first) = {divergence:.4f} nats")

    print("\nDiabetes, each half held out in turn: log density and coverage of central intervals, 442 patients")
    calibrations = {}
    for name in models.TREATMENTS:
        parts, noises = [], []
        for train, held_out in input_pipeline.diabetes_halves():
            fitted = fit(name, train, config.diabetes, fit_key)
            noises.append(fitted.noise)
            parts.append(calibration(predict(fitted, held_out.x, draw_key, config.num_draws), fitted.noise, held_out.y))
        whole = Calibration(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        calibrations[name] = whole
        density = whole.log_density
        coverage, errors = whole.coverage(LEVELS)
        print(
            f"  {name:24s} log density {density.mean():6.3f} ± {density.std() / np.sqrt(len(density)):.3f}"
            f"   coverage {'  '.join(f'{100 * value:.1f}' for value in coverage)} %"
            f"   noise {noises[0]:.2f}, {noises[1]:.2f}"
        )
    print(
        f"  {'nominal':24s} {'':29s} {'  '.join(f'{100 * v:.0f} ± {100 * e:.1f}' for v, e in zip(LEVELS, errors, strict=True))} %"
    )

    for path in figures.draw_all(directory, data, grid, bands, calibrations):
        print(f"Wrote {path}")

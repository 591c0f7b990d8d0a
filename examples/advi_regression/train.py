"""Fitting guides, and comparing them with the exact posteriors."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import figures
import input_pipeline
import jax
import ml_collections
import models
import numpy as np
import optax
import reference
from jaxtyping import Array, Float, Key, PyTree

import gjflax

GUIDES: dict[str, Callable[..., gjflax.GenerativeFunction]] = {
    "AutoNormal": gjflax.AutoNormal,
    "AutoLowRankNormal": functools.partial(gjflax.AutoLowRankNormal, rank=3),
    "AutoMultivariateNormal": gjflax.AutoMultivariateNormal,
    "AutoLaplace": gjflax.AutoLaplace,
    "AutoFlow": gjflax.AutoFlow,
}


class Fit(NamedTuple):
    """A fitted guide, and what its draws say.

    Attributes:
      guide, variables: the guide. Of an `AutoLaplace`, the normal distribution that it found.
      steps, curve: the steps of the reports, and minus the loss there: the mean since the report before or, of a guide that is
        trained on batches, the loss on all data.
      elbo, elbo_error: the evidence lower bound from the draws, and its standard error.
      choices, values: draws of the guide, and the model's return values there.
    """

    guide: gjflax.GenerativeFunction
    variables: PyTree
    steps: np.ndarray
    curve: np.ndarray
    elbo: float
    elbo_error: float
    choices: dict[str, np.ndarray]
    values: np.ndarray


def fit(
    problem: models.Problem,
    guide: gjflax.GenerativeFunction,
    options: ml_collections.ConfigDict,
    key: Key[Array, ""],
    batch_size: int | None = None,
) -> Fit:
    """Fit a guide by stochastic gradients of the ELBO, and draw from it."""
    observed, model_args = problem.inputs(problem.data)
    is_point = isinstance(guide, gjflax.AutoLaplace)
    objective = gjflax.ELBO(
        model=problem.model,
        guide=guide,
        num_samples=1 if is_point else options.num_samples,
        # It scores the draws a second time: for an inverse autoregressive flow a pass for every coordinate.
        sticking_the_landing=not isinstance(guide, gjflax.AutoFlow),
    )
    fit_key, draw_key = jax.random.split(key)
    result = gjflax.fit(
        objective,
        optax.adam(optax.cosine_decay_schedule(options.learning_rate, options.num_steps)),
        problem.data,
        key=fit_key,
        num_steps=options.num_steps,
        batch_size=batch_size,
        inputs=problem.inputs,
        report_every=options.report_every,
        # A batch's loss is a rough estimate of that of all data, which is looked at apart.
        held_out=None if batch_size is None else gjflax.batches(problem.data),
        progress=False,
    )
    variables = {"params": result.state.params["guide"]}
    if is_point:
        guide, variables = guide.approximation(variables, problem.model, observed, model_args)
    log_weights, choices, values = draw(
        problem.model, guide, variables, observed, model_args, jax.random.split(draw_key, options.num_draws)
    )
    log_weights = np.asarray(log_weights, np.float64)
    return Fit(
        guide,
        variables,
        result.column("step"),
        -result.column("loss" if batch_size is None else "held_out_loss"),
        float(log_weights.mean()),
        float(log_weights.std() / np.sqrt(len(log_weights))),
        jax.tree.map(np.asarray, choices),
        np.asarray(values, np.float64),
    )


@functools.partial(jax.jit, static_argnames=("model", "guide"))
def draw(
    model: gjflax.GenerativeFunction,
    guide: gjflax.GenerativeFunction,
    variables: PyTree,
    observed: Any,
    model_args: tuple[Any, ...],
    keys: Key[Array, " draws"],
) -> tuple[Float[Array, " draws"], dict[str, Array], Array]:
    """Draws of a guide: their log weights log p(y, z) − log q(z), the choices z, and the model's return values."""
    bound = guide.bind(variables)

    def one(key: Key[Array, ""]) -> tuple[Array, dict[str, Array], Array]:
        key, drawn = bound.simulate(key, ())
        choices = drawn.strip()
        _, (value, score) = model.assess(key, choices.merge(observed), model_args)
        return score - drawn.get_score(), choices.to_dict(), value

    return jax.vmap(one)(keys)


class Comparison(NamedTuple):
    """Draws against the exact posterior, coordinate by coordinate.

    Attributes:
      mean_errors: (mean − exact mean) / exact standard deviation.
      sd_ratios: standard deviation / exact standard deviation.
    """

    mean_errors: np.ndarray
    sd_ratios: np.ndarray


def compare(draws: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> Comparison:
    """The draws' means and standard deviations against the exact ones."""
    return Comparison((draws.mean(axis=0) - mean) / sd, draws.std(axis=0) / sd)


def school_draws(fitted: Fit) -> np.ndarray:
    """μ, log τ, θ_1 … θ_8: a row for each draw."""
    scales = np.stack([fitted.choices["mu"], np.log(fitted.choices["tau"])], axis=1)
    return np.concatenate([scales, fitted.values], axis=1)


def fit_schools(config: ml_collections.ConfigDict, key: Key[Array, ""]) -> dict[str, dict[str, Fit]]:
    """The guides on the centred and the non-centred form."""
    data = input_pipeline.load_schools()
    fits: dict[str, dict[str, Fit]] = {"centred": {}, "non-centred": {}}
    for form, model in (("centred", models.centred), ("non-centred", models.non_centred)):
        problem = models.schools(model, data)
        for name in config.guides:
            # In the centred form the density grows without bound where τ → 0 and all θ_j = μ: there is no mode.
            if (form, name) != ("centred", "AutoLaplace"):
                guide = GUIDES[name](model, *problem.inputs(problem.data))
                fits[form][name] = fit(problem, guide, config.schools, key)
    return fits


def fit_regression(config: ml_collections.ConfigDict, key: Key[Array, ""]) -> dict[str, Fit]:
    """The guides but the flow on all rows, and the full covariance on batches of them too."""
    problem = models.regression(input_pipeline.load_regression(), config.regression.noise)
    fits = {}
    for name in config.guides:
        if name == "AutoFlow":
            continue
        guide = GUIDES[name](problem.model, *problem.inputs(problem.data))
        fits[name] = fit(problem, guide, config.regression, key)
        if name == "AutoMultivariateNormal":
            fits[f"{name}, batches"] = fit(problem, guide, config.regression, key, config.regression.batch_size)
    return fits


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Fit, report and draw.

    Args:
      config: the hyperparameters.
      workdir: where the figures are written.
    """
    directory = Path(workdir).expanduser().resolve()
    directory.mkdir(parents=True, exist_ok=True)
    schools_key, regression_key = jax.random.split(jax.random.key(config.seed))

    exact_schools = reference.eight_schools(*input_pipeline.load_schools())
    schools = fit_schools(config, schools_key)
    mean, sd = (np.delete(moments, 1) for moments in exact_schools.moments())
    for form, fits in schools.items():
        print(f"\nEight schools, {form}: log p(y) = {exact_schools.log_evidence:.3f}")
        print(f"{'':32s}   gap           mean error: μ  log τ  θ (worst)    sd ratio: μ  log τ  θ (range)")
        for name, fitted in fits.items():
            errors, ratios = compare(school_draws(fitted), mean, sd)
            worst = errors[2:][np.abs(errors[2:]).argmax()]
            print(
                f"{_line(name, fitted, exact_schools.log_evidence)}     {errors[0]:+10.2f} {errors[1]:+6.2f} {worst:+6.2f}"
                f"          {ratios[0]:10.2f} {ratios[1]:6.2f}   {ratios[2:].min():.2f} to {ratios[2:].max():.2f}"
            )

    data = input_pipeline.load_regression()
    exact_regression = reference.linear_regression(data.inputs, data.response, config.regression.noise)
    regression = fit_regression(config, regression_key)
    sd = np.sqrt(np.diag(exact_regression.covariance))
    print(
        f"\nDiabetes: log p(y) = {exact_regression.log_evidence:.3f}; the best product of normals has a gap of "
        f"{exact_regression.mean_field_gap:.3f} and sd ratios from {(exact_regression.mean_field_sd / sd).min():.2f}"
    )
    for name, fitted in regression.items():
        errors, ratios = compare(fitted.values, exact_regression.mean, sd)
        print(
            f"{_line(name, fitted, exact_regression.log_evidence)}     worst mean error {np.abs(errors).max():.3f}"
            f"     sd ratio {ratios.min():.3f} to {ratios.max():.3f}"
        )

    for path in figures.draw_all(directory, schools, exact_schools, regression, exact_regression, data.names):
        print(f"Wrote {path}")


def _line(name: str, fitted: Fit, log_evidence: float) -> str:
    return f"{name:32s} {log_evidence - fitted.elbo:7.3f} ± {fitted.elbo_error:.3f}"

"""What is known exactly of the process: the Kalman filter's evidence and forecasts, in float64; and a baseline."""

import input_pipeline
import numpy as np
from jaxtyping import Float


def log_evidence(xs: Float[np.ndarray, "batch steps 1"]) -> Float[np.ndarray, " batch"]:
    """log p(x_1, …, x_T) of every sequence under the process that made it."""
    return sum(
        -0.5 * (np.log(2 * np.pi * variance) + (x - mean) ** 2 / variance)
        for x, (mean, variance) in zip(_steps(xs), one_step_forecasts(xs), strict=True)
    )


def one_step_forecasts(xs: Float[np.ndarray, "batch steps 1"]) -> list[tuple[Float[np.ndarray, " batch"], float]]:
    """The mean and the variance of x_t given those before it."""
    forecasts, state = [], _start(len(xs))
    for x in _steps(xs):
        state = _moved(*state)
        forecasts.append(_seen(*state))
        state = _updated(*state, x)
    return forecasts


def forecasts(xs: Float[np.ndarray, "batch steps 1"], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The means, `[batch, steps]`, and variances, `[steps]`, of the x that come after those given."""
    state = _start(len(xs))
    for x in _steps(xs):
        state = _updated(*_moved(*state), x)
    means, variances = [], []
    for _ in range(steps):
        state = _moved(*state)
        mean, variance = _seen(*state)
        means.append(mean)
        variances.append(variance)
    return np.stack(means, axis=1), np.asarray(variances)


def independent_log_likelihood(
    train: Float[np.ndarray, "batch steps 1"], xs: Float[np.ndarray, "batch steps 1"]
) -> Float[np.ndarray, " batch"]:
    """log p of every sequence, by a normal distribution of all x, fitted to those trained on: what ignores time."""
    train, xs = np.asarray(train, np.float64), np.asarray(xs, np.float64)
    mean, variance = np.mean(train), np.var(train)
    return np.sum(-0.5 * (np.log(2 * np.pi * variance) + (xs - mean) ** 2 / variance), axis=(1, 2))


def _steps(xs: np.ndarray) -> list[np.ndarray]:
    return list(np.asarray(xs, np.float64)[:, :, 0].T)


def _start(number: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((number, 2)), np.zeros((2, 2))


def _moved(mean: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    process = input_pipeline.spring()
    a = process.transition
    return mean @ a.T, a @ covariance @ a.T + process.transition_scale**2 * np.eye(2)


def _seen(mean: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, float]:
    process = input_pipeline.spring()
    c = process.emission[0]
    return mean @ c, float(c @ covariance @ c) + process.emission_scale**2


def _updated(mean: np.ndarray, covariance: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    expected, variance = _seen(mean, covariance)
    gain = covariance @ input_pipeline.spring().emission[0] / variance
    return mean + (x - expected)[:, None] * gain, covariance - variance * np.outer(gain, gain)

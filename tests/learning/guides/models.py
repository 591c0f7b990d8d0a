"""Models with known posteriors, for the tests of guides and objectives."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from scipy import stats

from gjflax import Bernoulli, Beta, Binomial, Gamma, Map, Normal, Uniform, gen, trace

X = np.array([[1.0, -0.5], [0.3, 0.8], [-1.2, 0.4], [0.7, 1.5], [-0.6, -0.9]], np.float32)
Y = np.array([0.9, 0.4, -1.1, 1.6, -1.3], np.float32)
NOISE = 0.6
OBSERVED = {"y": Y}


@gen
def regression(x):
    """Weights of variance 4 and noise of standard deviation 0.6: the posterior is normal."""
    w = trace("w", Normal)(jnp.zeros(2), 2.0)
    return trace("y", Normal)(x @ w, NOISE)


def regression_posterior():
    """Mean, covariance, and log evidence, in float64."""
    x, y = X.astype(np.float64), Y.astype(np.float64)
    precision = x.T @ x / NOISE**2 + np.eye(2) / 4.0
    covariance = np.linalg.inv(precision)
    evidence = stats.multivariate_normal(np.zeros(5), 4.0 * x @ x.T + NOISE**2 * np.eye(5)).logpdf(y)
    return covariance @ (x.T @ y / NOISE**2), covariance, evidence


@gen
def supports(x):
    """Choices on several supports, one of which depends on another choice, and some in a map."""
    rate = trace("rate", Gamma)(2.0, 1.5)
    p = trace("p", Beta)(2.0, 3.0)
    high = trace("high", Uniform)(0.5, 3.0)
    trace("below", Uniform)(0.0, high)
    return trace("points", Map(point, in_axes=(0, None)))(x, rate * p)


@gen
def constant_supports(x):
    """Choices on several supports that depend on nothing."""
    rate = trace("rate", Gamma)(2.0, 1.5)
    p = trace("p", Beta)(2.0, 3.0)
    trace("high", Uniform)(0.5, 3.0)
    return trace("points", Map(point, in_axes=(0, None)))(x, rate * p)


@gen
def point(x, mean):
    z = trace("z", Gamma)(2.0, jnp.array([1.0, 0.5]))
    return trace("y", Normal)(x * mean + z.sum(), 0.7)


@gen
def coin():
    p = trace("p", Beta)(2.0, 3.0)
    return trace("heads", Binomial)(10.0, probs=p)


@gen
def switched():
    k = trace("k", Bernoulli)(probs=0.3)
    mu = trace("mu", Normal)(0.5, 1.5)
    return trace("y", Normal)(3.0 * k.astype(jnp.float32), 0.8), mu


@gen
def element(x, mu):
    z = trace("z", Normal)(mu, 1.3)
    return trace("y", Normal)(z * x, 0.6)

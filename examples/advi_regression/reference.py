r"""The exact posteriors, in NumPy's float64 and without gjflax.

**Eight schools.** With y_j ~ Normal(θ_j, σ_j), θ_j ~ Normal(μ, τ), μ ~ Normal(0, 5), τ ~ HalfCauchy(0, 5), all but τ
integrates out. Let v_j = σ_j² + τ². Given τ,

    y ~ Normal(0, diag(v) + 5² 11ᵀ),
    μ | y ~ Normal(m, V),            V⁻¹ = 1/5² + Σ_j 1/v_j,   m = V Σ_j y_j / v_j,
    θ_j | μ, y ~ Normal(b_j y_j + (1 − b_j) μ, b_j σ_j²),      b_j = τ² / v_j,

so that log p(y) and the posterior of τ are integrals over one variable: by the trapezoidal rule on a grid of log τ,
where the integrand falls off exponentially on both sides and the rule converges faster than any power of the spacing. The
posteriors of μ and θ_j are mixtures of the normals above over that grid.

**Linear regression.** With y ~ Normal(Xw, σ²I), w ~ Normal(0, I), the posterior is Normal(Λ⁻¹Xᵀy/σ², Λ⁻¹) with the precision
Λ = I + XᵀX/σ². Of all products of normals, the one nearest in KL(q ‖ p) has the same mean, the variances 1/Λ_ii, and

    log p(y) − ELBO = KL = ½ (Σ_i log Λ_ii − log |Λ|)

(C. M. Bishop, "Pattern Recognition and Machine Learning", 2006, sections 3.3 and 10.1.2).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp, ndtr
from scipy.stats import norm

PRIOR_SCALE = 5.0
"""Of μ and of τ, in points."""

Vector = Float[np.ndarray, " n"]
Matrix = Float[np.ndarray, "n m"]


class EightSchools(NamedTuple):
    """The posterior as a mixture over a grid of log τ. The rows of `mean` and `sd` are μ, then θ_1 … θ_8.

    Attributes:
      log_evidence: log p(y).
      tau: the grid.
      weights: of the grid's points; their sum is 1.
      mean, sd: of μ and θ_j given τ.
    """

    log_evidence: float
    tau: Vector
    weights: Vector
    mean: Matrix
    sd: Matrix

    def moments(self) -> tuple[Vector, Vector]:
        """Means and standard deviations of μ, τ, log τ, θ_1 … θ_8."""
        mean = self.mean @ self.weights
        variance = (self.sd**2 + self.mean**2) @ self.weights - mean**2
        scales = np.stack([self.tau, np.log(self.tau)])
        scale_means = scales @ self.weights
        scale_variances = scales**2 @ self.weights - scale_means**2
        means = np.concatenate([mean[:1], scale_means, mean[1:]])
        return means, np.sqrt(np.concatenate([variance[:1], scale_variances, variance[1:]]))

    def quantiles(self, levels: Vector) -> Matrix:
        """Quantiles of μ, τ, log τ, θ_1 … θ_8: a row for each, by bisection and, for τ, along the grid."""
        tau = np.interp(levels, np.cumsum(self.weights) - 0.5 * self.weights, self.tau)
        low, high = (np.full((len(self.mean), len(levels)), end) for end in (-200.0, 200.0))
        for _ in range(50):
            middle = 0.5 * (low + high)
            standard = (middle[..., None] - self.mean[:, None]) / self.sd[:, None]
            below = ndtr(standard) @ self.weights < levels
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return np.stack([low[0], tau, np.log(tau), *low[1:]])

    def density(self, log_tau: Vector, theta: Vector) -> Matrix:
        """The joint density of log τ and θ_1, with a row for each of log τ and a column for each of θ_1."""
        grid = np.log(self.tau)
        marginal = self.weights / (grid[1] - grid[0])
        at = lambda values: np.interp(log_tau, grid, values)[:, None]
        return at(marginal) * norm.pdf(theta, at(self.mean[1]), at(self.sd[1]))


def eight_schools(effects: Vector, standard_errors: Vector, size: int = 2001) -> EightSchools:
    """The posterior of the eight schools, with `size` points of log τ from −12 to 8."""
    y, sigma = (np.asarray(values, np.float64)[:, None] for values in (effects, standard_errors))
    log_tau = np.linspace(-12.0, 8.0, size)
    tau = np.exp(log_tau)
    v = sigma**2 + tau**2
    precision = 1 / PRIOR_SCALE**2 + (1 / v).sum(axis=0)
    mu = (y / v).sum(axis=0) / precision

    # log Normal(y; 0, diag(v) + 5² 11ᵀ), by the lemmas of Woodbury and of determinants.
    log_det = np.log(v).sum(axis=0) + np.log(PRIOR_SCALE**2 * precision)
    distance = (y**2 / v).sum(axis=0) - mu**2 * precision
    log_likelihood = -0.5 * (distance + log_det + len(y) * np.log(2 * np.pi))
    log_prior = np.log(2 / (np.pi * PRIOR_SCALE)) - np.log1p((tau / PRIOR_SCALE) ** 2) + log_tau
    log_weights = log_likelihood + log_prior + np.log(log_tau[1] - log_tau[0])
    log_weights[[0, -1]] -= np.log(2)
    log_evidence = float(logsumexp(log_weights))

    b = tau**2 / v
    mean = np.concatenate([mu[None], b * y + (1 - b) * mu])
    variance = np.concatenate([1 / precision[None], b * sigma**2 + (1 - b) ** 2 / precision])
    return EightSchools(log_evidence, tau, np.exp(log_weights - log_evidence), mean, np.sqrt(variance))


class LinearRegression(NamedTuple):
    """The posterior of the weights, the intercept's first."""

    log_evidence: float
    mean: Vector
    precision: Matrix

    @property
    def covariance(self) -> Matrix:
        """Λ⁻¹."""
        return np.linalg.inv(self.precision)

    @property
    def mean_field_sd(self) -> Vector:
        """The standard deviations of the nearest product of normals."""
        return np.diag(self.precision) ** -0.5

    @property
    def mean_field_gap(self) -> float:
        """log p(y) minus the ELBO of the nearest product of normals."""
        return 0.5 * float(np.log(np.diag(self.precision)).sum() - np.linalg.slogdet(self.precision)[1])

    def divergence_from(self, mean: Vector, covariance: Matrix) -> float:
        """KL(Normal(mean, covariance) ‖ posterior), which is log p(y) − ELBO."""
        difference = mean - self.mean
        product = self.precision @ covariance
        quadratic = difference @ self.precision @ difference
        return 0.5 * float(np.trace(product) - len(mean) - np.linalg.slogdet(product)[1] + quadratic)


def linear_regression(inputs: Matrix, response: Vector, noise: float) -> LinearRegression:
    """The posterior of the intercept and the slopes."""
    x = np.concatenate([np.ones((len(inputs), 1)), np.asarray(inputs, np.float64)], axis=1)
    y = np.asarray(response, np.float64)
    precision = np.eye(x.shape[1]) + x.T @ x / noise**2
    mean = np.linalg.solve(precision, x.T @ y / noise**2)
    # log p(y) = log p(y, w) − log p(w | y) at any w, here the mean.
    joint = norm.logpdf(y, x @ mean, noise).sum() + norm.logpdf(mean).sum()
    posterior = 0.5 * (np.linalg.slogdet(precision)[1] - len(mean) * np.log(2 * np.pi))
    return LinearRegression(float(joint - posterior), mean, precision)

r"""The posterior of the last layer given all else, in NumPy's float64 and without gjflax.

With features φ_i (the hidden units at x_i, and a 1 for the bias), weights w ~ Normal(0, diag(s²)) and y ~ Normal(Φw, σ²I), the
posterior of w is Normal(m, Λ⁻¹) with

    Λ = diag(s⁻²) + ΦᵀΦ/σ²,   m = Λ⁻¹ Φᵀy/σ²

(C. M. Bishop, "Pattern Recognition and Machine Learning", 2006, section 3.3).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Vector = Float[np.ndarray, " n"]
Matrix = Float[np.ndarray, "n m"]


class Posterior(NamedTuple):
    """A normal distribution of the last layer's kernel and, at the end, its bias."""

    mean: Vector
    precision: Matrix

    @property
    def covariance(self) -> Matrix:
        """Λ⁻¹."""
        return np.linalg.inv(self.precision)

    def divergence_from(self, mean: Vector, covariance: Matrix) -> float:
        """KL(Normal(mean, covariance) ‖ this)."""
        difference = mean - self.mean
        product = self.precision @ covariance
        quadratic = difference @ self.precision @ difference
        return 0.5 * float(np.trace(product) - len(mean) - np.linalg.slogdet(product)[1] + quadratic)


def features(x: Matrix, kernel: Matrix, bias: Vector) -> Matrix:
    """The hidden units, and a column of ones."""
    x, kernel, bias = (np.asarray(values, np.float64) for values in (x, kernel, bias))
    return np.concatenate([np.tanh(x @ kernel + bias), np.ones((len(x), 1))], axis=1)


def last_layer(phi: Matrix, y: Vector, prior_scales: Vector, noise: float) -> Posterior:
    """The posterior of the last layer's kernel and bias."""
    precision = np.diag(np.asarray(prior_scales, np.float64) ** -2.0) + phi.T @ phi / noise**2
    return Posterior(np.linalg.solve(precision, phi.T @ np.asarray(y, np.float64) / noise**2), precision)

"""The two data sets: the eight schools, written out here, and scikit-learn's diabetes data, which come with the package."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from sklearn.datasets import load_diabetes


class Schools(NamedTuple):
    """Effects of coaching on test scores, one school each, and the standard errors of these estimates, in points."""

    effects: Float[np.ndarray, " schools"]
    standard_errors: Float[np.ndarray, " schools"]


class Regression(NamedTuple):
    """Inputs and a response, each of mean 0 and standard deviation 1."""

    inputs: Float[np.ndarray, "n inputs"]
    response: Float[np.ndarray, " n"]
    names: tuple[str, ...]


def load_schools() -> Schools:
    """The eight schools.

    D. B. Rubin, "Estimation in parallel randomized experiments", Journal of Educational Statistics 6(4), 1981, table 1.
    """
    effects = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], np.float32)
    return Schools(effects, np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], np.float32))


def load_regression() -> Regression:
    """442 patients: ten measurements, and how far diabetes had progressed a year later; standardised.

    B. Efron, T. Hastie, I. Johnstone, R. Tibshirani, "Least angle regression", Annals of Statistics 32(2), 2004.
    """
    data = load_diabetes()
    inputs, response = (
        ((values - values.mean(axis=0)) / values.std(axis=0)).astype(np.float32) for values in (data.data, data.target)
    )
    return Regression(inputs, response, tuple(data.feature_names))

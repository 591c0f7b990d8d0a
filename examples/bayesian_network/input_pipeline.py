"""The two data sets: a simulated curve with a gap in its inputs, and scikit-learn's diabetes data, in two halves."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from sklearn.datasets import load_diabetes
from sklearn.model_selection import KFold

CURVE_SEED, SPLIT_SEED = 0, 0

NOISE = 0.15
"""The standard deviation of the simulated response about the curve."""

GAP = (-0.6, 0.8)
"""Where the simulated data have no inputs."""


class Regression(NamedTuple):
    """Inputs and a response."""

    x: Float[np.ndarray, "n inputs"]
    y: Float[np.ndarray, " n"]


def curve(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The truth behind the simulated data."""
    return np.sin(2.5 * x) + 0.4 * x


def simulated_curve() -> Regression:
    """30 points on either side of the gap, between −2 and 2."""
    rng = np.random.default_rng(CURVE_SEED)
    x = np.concatenate([rng.uniform(-2.0, GAP[0], 30), rng.uniform(GAP[1], 2.0, 30)])
    y = curve(x) + NOISE * rng.normal(size=60)
    return Regression(x[:, None].astype(np.float32), y.astype(np.float32))


def diabetes_halves() -> list[tuple[Regression, Regression]]:
    """442 patients, ten measurements, and how far diabetes had progressed a year later: each half to train, the other held out.

    B. Efron, T. Hastie, I. Johnstone, R. Tibshirani, "Least angle regression", Annals of Statistics 32(2), 2004. Inputs and
    response are standardised by the half that is trained on.
    """
    data = load_diabetes()
    halves = []
    for train, held_out in KFold(2, shuffle=True, random_state=SPLIT_SEED).split(data.data):
        standard = lambda values, rows, train=train: (
            (values[rows] - values[train].mean(axis=0)) / values[train].std(axis=0)
        ).astype(np.float32)
        halves.append(
            tuple(Regression(standard(data.data, rows), standard(data.target, rows)) for rows in (train, held_out))
        )
    return halves

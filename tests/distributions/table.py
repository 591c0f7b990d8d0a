"""The named families of numbers, each with its density and its distribution function by SciPy or by hand.

Everything here is NumPy in float64, and knows nothing of gjflax or of TFP's formulas. Every parameter has three
settings, none of them a unit scale: the first is used for scalar arguments, all three for vectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import special, stats

INF = np.inf
Oracle = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of distributions of a number.

    Attributes:
      name: as gjflax exports it.
      parameters: three settings of each, by TFP's names and in TFP's order.
      logpdf: ``logpdf(value, **parameters)``.
      cdf: ``cdf(value, **parameters)``; of a discrete family it is not needed.
      inside: values inside the supports of all three settings.
      outside: values outside of all three.
      by_keyword: the parameters that must be given by name, because another one stands first.
      discrete: whether the values are whole numbers.
    """

    name: str
    parameters: Mapping[str, tuple[float, float, float]]
    logpdf: Oracle
    cdf: Oracle | None
    inside: tuple[float, ...]
    outside: tuple[float, ...] = ()
    by_keyword: tuple[str, ...] = ()
    discrete: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parameters)

    def settings(self, index: int | None = None) -> list[Any]:
        """One setting of each parameter, or a vector of all three."""
        chosen = [np.float32(values) for values in self.parameters.values()]
        return [values if index is None else values[index] for values in chosen]

    def oracle(self, value: Any, args: list[Any]) -> np.ndarray:
        """The log density in float64, elementwise, at what the floats given really are."""
        doubles = [np.asarray(arg, np.float64) for arg in args]
        with np.errstate(all="ignore"):
            return np.asarray(self.logpdf(np.asarray(value, np.float64), **dict(zip(self.names, doubles, strict=True))))


def frozen(make: Callable[..., Any]) -> tuple[Oracle, Oracle]:
    """The density and the distribution function of a SciPy distribution, made of our parameters."""

    def logpdf(value: Any, **parameters: Any) -> Any:
        made = make(**parameters)
        return made.logpdf(value) if hasattr(made.dist, "logpdf") else made.logpmf(value)

    return logpdf, lambda value, **parameters: make(**parameters).cdf(value)


def kumaraswamy(value: Any, concentration1: Any, concentration0: Any) -> Any:
    a, b = concentration1, concentration0
    density = np.log(a * b) + (a - 1) * np.log(value) + (b - 1) * np.log1p(-(value**a))
    return np.where((value > 0) & (value < 1), density, -INF)


def kumaraswamy_cdf(value: Any, concentration1: Any, concentration0: Any) -> Any:
    return 1 - (1 - np.clip(value, 0, 1) ** concentration1) ** concentration0


def truncated_normal(loc: Any, scale: Any, low: Any, high: Any) -> Any:
    return stats.truncnorm((low - loc) / scale, (high - loc) / scale, loc, scale)


def softmax_pick(value: Any, logits: Any) -> Any:
    shifted = logits - special.logsumexp(logits, axis=-1, keepdims=True)
    inside = (value >= 0) & (value < logits.shape[-1])
    index = np.where(inside, value, 0).astype(int)[..., None]
    return np.where(inside, np.take_along_axis(shifted, index, -1)[..., 0], -INF)


REAL = (-7.5, -0.3, 0.4, 2.0, 30.0)
POSITIVE = (0.02, 0.7, 3.0, 40.0)
UNIT = (0.03, 0.4, 0.95)
COUNTS = (0, 1, 2, 4)
NOT_COUNTS = (-1, -7)

FAMILIES = (
    Family(
        "Normal",
        {"loc": (-1.0, 0.5, 3.0), "scale": (0.5, 2.0, 0.1)},
        *frozen(lambda loc, scale: stats.norm(loc, scale)),
        REAL,
        (-INF, INF),
    ),
    Family(
        "LogNormal",
        {"loc": (-1.0, 0.5, 2.0), "scale": (0.5, 2.0, 0.8)},
        *frozen(lambda loc, scale: stats.lognorm(scale, scale=np.exp(loc))),
        POSITIVE,
        (-2.0, -1e-3, 0.0, -INF, INF),
    ),
    Family(
        "HalfNormal",
        {"scale": (0.5, 2.0, 7.0)},
        *frozen(lambda scale: stats.halfnorm(scale=scale)),
        POSITIVE,
        (-2.0, -1e-3, -INF, INF),
    ),
    Family(
        "TruncatedNormal",
        {"loc": (0.0, 0.5, -3.0), "scale": (0.5, 2.0, 1.5), "low": (-0.7, -1.0, -2.0), "high": (1.2, 3.0, 1.0)},
        *frozen(truncated_normal),
        (-0.5, 0.1, 0.9),
        (-2.5, 3.5, -INF, INF),
    ),
    Family(
        "StudentT",
        {"df": (3.0, 0.8, 20.0), "loc": (-1.0, 0.5, 3.0), "scale": (0.5, 2.0, 0.1)},
        *frozen(lambda df, loc, scale: stats.t(df, loc, scale)),
        REAL,
        (-INF, INF),
    ),
    Family(
        "Cauchy",
        {"loc": (-1.0, 0.5, 3.0), "scale": (0.5, 2.0, 0.1)},
        *frozen(lambda loc, scale: stats.cauchy(loc, scale)),
        REAL,
        (-INF, INF),
    ),
    Family(
        "HalfCauchy",
        {"loc": (-1.0, 0.0, -0.5), "scale": (0.5, 2.0, 7.0)},
        *frozen(lambda loc, scale: stats.halfcauchy(loc, scale)),
        (0.2, 0.9, 30.0),
        (-1.1, -9.0, -INF, INF),
    ),
    Family(
        "Laplace",
        {"loc": (-1.0, 0.5, 3.0), "scale": (0.5, 2.0, 0.1)},
        *frozen(lambda loc, scale: stats.laplace(loc, scale)),
        REAL,
        (-INF, INF),
    ),
    Family(
        "Logistic",
        {"loc": (-1.0, 0.5, 3.0), "scale": (0.5, 2.0, 0.4)},
        *frozen(lambda loc, scale: stats.logistic(loc, scale)),
        REAL,
        (-INF, INF),
    ),
    Family(
        "Gumbel",
        {"loc": (-1.0, 0.5, 3.0), "scale": (2.5, 2.0, 4.0)},
        *frozen(lambda loc, scale: stats.gumbel_r(loc, scale)),
        REAL,
        (-INF, INF),
    ),
    Family(
        "Uniform",
        {"low": (-1.0, -3.0, 0.0), "high": (2.0, 0.9, 7.0)},
        *frozen(lambda low, high: stats.uniform(low, high - low)),
        (0.1, 0.5, 0.8),
        (-3.5, 7.5, -INF, INF),
    ),
    Family(
        "Exponential",
        {"rate": (0.5, 2.0, 7.0)},
        *frozen(lambda rate: stats.expon(scale=1 / rate)),
        POSITIVE,
        (-2.0, -1e-3, -INF, INF),
    ),
    Family(
        "Gamma",
        {"concentration": (2.5, 0.6, 9.0), "rate": (0.5, 2.0, 7.0)},
        *frozen(lambda concentration, rate: stats.gamma(concentration, scale=1 / rate)),
        POSITIVE,
        (-2.0, -1e-3, -INF, INF),
    ),
    Family(
        "InverseGamma",
        {"concentration": (2.5, 0.6, 9.0), "scale": (0.5, 2.0, 7.0)},
        *frozen(lambda concentration, scale: stats.invgamma(concentration, scale=scale)),
        POSITIVE,
        (-2.0, -1e-3, 0.0, -INF, INF),
    ),
    Family(
        "Chi2",
        {"df": (3.0, 0.7, 12.0)},
        *frozen(lambda df: stats.chi2(df)),
        POSITIVE,
        (-2.0, -1e-3, -INF, INF),
    ),
    Family(
        "Beta",
        {"concentration1": (2.5, 0.6, 9.0), "concentration0": (1.5, 0.4, 3.0)},
        *frozen(lambda concentration1, concentration0: stats.beta(concentration1, concentration0)),
        UNIT,
        (-0.5, 1.5, -INF, INF),
    ),
    Family(
        "Kumaraswamy",
        {"concentration1": (2.5, 0.6, 4.0), "concentration0": (1.5, 0.4, 3.0)},
        kumaraswamy,
        kumaraswamy_cdf,
        UNIT,
        (-0.5, 1.5, -INF, INF),
    ),
    Family(
        "Weibull",
        {"concentration": (2.5, 0.6, 1.2), "scale": (9.0, 2.0, 7.0)},
        *frozen(lambda concentration, scale: stats.weibull_min(concentration, scale=scale)),
        (0.02, 0.7, 3.0, 20.0),
        (-2.0, -1e-3, -INF, INF),
    ),
    Family(
        "Pareto",
        {"concentration": (2.5, 0.6, 9.0), "scale": (0.5, 2.0, 1.5)},
        *frozen(lambda concentration, scale: stats.pareto(concentration, scale=scale)),
        (2.1, 5.0, 40.0),
        (0.4, 0.0, -3.0, -INF, INF),
    ),
    Family(
        "VonMises",
        {"loc": (-1.0, 0.5, 2.0), "concentration": (0.5, 4.0, 9.0)},
        lambda value, loc, concentration: stats.vonmises(concentration, loc).logpdf(value),
        lambda value, loc, concentration: np.subtract(
            *stats.vonmises(concentration, loc).cdf([value, 0 * value - np.pi])
        ),
        (-3.0, -0.3, 0.4, 2.0),
        (-INF, INF),
    ),
    Family(
        "Bernoulli",
        {"probs": (0.2, 0.7, 0.95)},
        *frozen(lambda probs: stats.bernoulli(probs)),
        (0, 1),
        (-1, 2, 9),
        ("probs",),
        True,
    ),
    Family(
        "Binomial",
        {"total_count": (5.0, 9.0, 20.0), "probs": (0.2, 0.7, 0.95)},
        *frozen(lambda total_count, probs: stats.binom(total_count, probs)),
        (*COUNTS, 5),
        (*NOT_COUNTS, 21, 100),
        ("probs",),
        True,
    ),
    Family(
        "Poisson",
        {"rate": (0.5, 3.0, 8.0)},
        *frozen(lambda rate: stats.poisson(rate)),
        (*COUNTS, 30),
        NOT_COUNTS,
        (),
        True,
    ),
    Family(
        "NegativeBinomial",
        {"total_count": (2.5, 5.0, 1.0), "probs": (0.2, 0.6, 0.5)},
        *frozen(lambda total_count, probs: stats.nbinom(total_count, 1 - probs)),
        (*COUNTS, 30),
        NOT_COUNTS,
        ("probs",),
        True,
    ),
    Family(
        "Geometric",
        {"probs": (0.2, 0.7, 0.4)},
        *frozen(lambda probs: stats.geom(probs, loc=-1)),
        (*COUNTS, 10),
        NOT_COUNTS,
        ("probs",),
        True,
    ),
)

BY_LOGITS = (
    Family(
        "Bernoulli",
        {"logits": (-3.0, 0.4, 2.0)},
        *frozen(lambda logits: stats.bernoulli(special.expit(logits))),
        (0, 1),
        (-1, 2),
        (),
        True,
    ),
    Family(
        "Binomial",
        {"total_count": (5.0, 9.0, 20.0), "logits": (-3.0, 0.4, 2.0)},
        *frozen(lambda total_count, logits: stats.binom(total_count, special.expit(logits))),
        (*COUNTS, 5),
        (*NOT_COUNTS, 21),
        (),
        True,
    ),
    Family(
        "Poisson",
        {"log_rate": (-1.0, 0.4, 2.0)},
        *frozen(lambda log_rate: stats.poisson(np.exp(log_rate))),
        (*COUNTS, 30),
        NOT_COUNTS,
        ("log_rate",),
        True,
    ),
    Family(
        "NegativeBinomial",
        {"total_count": (2.5, 5.0, 1.0), "logits": (-1.0, 0.4, 0.1)},
        *frozen(lambda total_count, logits: stats.nbinom(total_count, special.expit(-logits))),
        (*COUNTS, 30),
        NOT_COUNTS,
        (),
        True,
    ),
    Family(
        "Geometric",
        {"logits": (-1.0, 0.4, 2.0)},
        *frozen(lambda logits: stats.geom(special.expit(logits), loc=-1)),
        COUNTS,
        NOT_COUNTS,
        (),
        True,
    ),
    Family(
        "Gamma",
        {"concentration": (2.5, 0.6, 9.0), "log_rate": (-0.5, 0.4, 2.0)},
        *frozen(lambda concentration, log_rate: stats.gamma(concentration, scale=np.exp(-log_rate))),
        POSITIVE,
        (-2.0, -INF, INF),
        ("log_rate",),
    ),
)
"""Second parametrisations."""


def differences(function: Callable[[np.ndarray], Any], at: Any) -> np.ndarray:
    """The gradient of a scalar function of an array, by central differences in float64."""
    point = np.asarray(at, np.float64)
    gradient = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        step = 1e-5 * max(1.0, abs(point[index]))
        for sign in (1, -1):
            moved = point.copy()
            moved[index] += sign * step
            gradient[index] += sign * float(np.sum(function(moved))) / (2 * step)
    return gradient

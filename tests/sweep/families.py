"""The distributions of the sweep, each by its formula in NumPy: density, distribution function, and map from R^n."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import special, stats
from sweep.expressions import Array

import gjflax

HALF_LOG_TWO_PI = 0.5 * np.log(2 * np.pi)


@dataclasses.dataclass(frozen=True)
class Map:
    """A map from R onto a support, elementwise: ``inverse(value, *args)``, and ``log_slope(z, *args)`` of the map."""

    inverse: Callable[..., Any]
    log_slope: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of distributions.

    Attributes:
      name: as gjflax exports it.
      domains: of its arguments, by position.
      log_density: ``log_density(value, *args)``, elementwise, or for a whole event.
      domain: of its values.
      cdf: ``cdf(value, *args)``, elementwise; None where its draws are not looked at.
      mapping: its map from R^n; None for a discrete family, or where the map is left out here.
      event: the shapes of the arguments, the value and its size, where the family is not elementwise.
      size: the number of values of an index.
      whiten: for an event, what has independent elements that `cdf` knows.
    """

    name: str
    domains: tuple[str, ...]
    log_density: Callable[..., Any]
    domain: str = "real"
    cdf: Callable[..., Any] | None = None
    mapping: Map | None = None
    event: tuple[tuple[tuple[int, ...], ...], tuple[int, ...]] | None = None
    size: int = 0
    whiten: Callable[..., Any] | None = None

    @property
    def is_discrete(self) -> bool:
        return self.value_type(()).is_discrete

    @property
    def distribution(self) -> Any:
        return getattr(gjflax, self.name)

    def value_type(self, shape: tuple[int, ...]) -> Array:
        return Array(self.event[1] if self.event else shape, self.domain, self.size)

    def argument_types(self, shape: tuple[int, ...], scalars: tuple[bool, ...]) -> tuple[Array, ...]:
        """The types of the arguments for a value of this shape, where some are scalars that broadcast."""
        if self.event:
            shapes = self.event[0]
        else:
            shapes = tuple(() if scalar else shape for scalar in scalars)
        return tuple(Array(shape, domain) for shape, domain in zip(shapes, self.domains, strict=True))

    def support(self, args: tuple[Any, ...]) -> list[Any]:
        """The values of a finite family, of one element."""
        return list(range(np.shape(args[0])[-1] if self.event else self.size))

    def uniforms(self, value: Any, args: tuple[Any, ...], noise: Any) -> Any:
        """Numbers that are independent and uniform on (0, 1) where the value is drawn from the family.

        Of a discrete family ``noise`` chooses, between the distribution function below and at the value.
        """
        if self.cdf is None:
            return None
        if self.whiten is not None:
            value, args = self.whiten(value, *args), ()
        upper = np.asarray(self.cdf(value, *args), np.float64)
        if not self.is_discrete:
            return upper
        lower = np.asarray(self.cdf(np.asarray(value) - 1, *args), np.float64)
        return lower + noise * (upper - lower)


IDENTITY = Map(lambda v, *a: v, lambda z, *a: np.zeros_like(z))
EXP = Map(lambda v, *a: np.log(v), lambda z, *a: z)
SOFTPLUS = Map(lambda v, *a: v + np.log(-np.expm1(-v)), lambda z, *a: -np.logaddexp(0.0, -z))
RECIPROCAL = Map(
    lambda v, *a: SOFTPLUS.inverse(1 / v),
    lambda z, *a: SOFTPLUS.log_slope(z) - 2 * np.log(np.logaddexp(0.0, z)),
)
SHIFTED_EXP = Map(lambda v, *a: np.log(v - a[0]), lambda z, *a: z)
ABOVE_SCALE = Map(lambda v, *a: SOFTPLUS.inverse(v - a[1]), lambda z, *a: SOFTPLUS.log_slope(z))


def _between(low: Any, high: Any, v: Any) -> Any:
    return np.log(v - low) - np.log(high - v)


def _slope_between(low: Any, high: Any, z: Any) -> Any:
    return np.log(high - low) - np.logaddexp(0.0, z) - np.logaddexp(0.0, -z)


UNIT = Map(lambda v, *a: _between(0.0, 1.0, v), lambda z, *a: _slope_between(0.0, 1.0, z))
INTERVAL = Map(lambda v, *a: _between(a[-2], a[-1], v), lambda z, *a: _slope_between(a[-2], a[-1], z))


def _where(inside: Any, density: Any) -> Any:
    return np.where(inside, density, -np.inf)


def _normal(v: Any, loc: Any, scale: Any) -> Any:
    return -0.5 * ((v - loc) / scale) ** 2 - np.log(scale) - HALF_LOG_TWO_PI


def _normal_cdf(v: Any, loc: Any = 0.0, scale: Any = 1.0) -> Any:
    return special.ndtr((v - loc) / scale)


def _log_normal(v: Any, loc: Any, scale: Any) -> Any:
    return _where(v > 0, _normal(np.log(v), loc, scale) - np.log(v))


def _truncated_normal(v: Any, loc: Any, scale: Any, low: Any, high: Any) -> Any:
    mass = special.ndtr((high - loc) / scale) - special.ndtr((low - loc) / scale)
    return _where((v >= low) & (v <= high), _normal(v, loc, scale) - np.log(mass))


def _truncated_normal_cdf(v: Any, loc: Any, scale: Any, low: Any, high: Any) -> Any:
    a, b = special.ndtr((low - loc) / scale), special.ndtr((high - loc) / scale)
    return (special.ndtr((v - loc) / scale) - a) / (b - a)


def _inverse_gamma(v: Any, concentration: Any, scale: Any) -> Any:
    return concentration * np.log(scale) - special.gammaln(concentration) - (concentration + 1) * np.log(v) - scale / v


def _gamma(v: Any, concentration: Any, rate: Any) -> Any:
    log_norm = concentration * np.log(rate) - special.gammaln(concentration)
    return log_norm + (concentration - 1) * np.log(v) - rate * v


def _beta(v: Any, a: Any, b: Any) -> Any:
    return (a - 1) * np.log(v) + (b - 1) * np.log1p(-v) - special.betaln(a, b)


def _kumaraswamy(v: Any, a: Any, b: Any) -> Any:
    return np.log(a * b) + (a - 1) * np.log(v) + (b - 1) * np.log1p(-(v**a))


def _student(v: Any, df: Any, loc: Any, scale: Any) -> Any:
    return stats.t.logpdf(v, df, loc, scale)


def _logistic(v: Any, loc: Any, scale: Any) -> Any:
    z = (v - loc) / scale
    return -np.logaddexp(0.0, z) - np.logaddexp(0.0, -z) - np.log(scale)


def _gumbel(v: Any, loc: Any, scale: Any) -> Any:
    z = (v - loc) / scale
    return -z - np.exp(-z) - np.log(scale)


def _weibull(v: Any, concentration: Any, scale: Any) -> Any:
    z = v / scale
    return np.log(concentration / scale) + (concentration - 1) * np.log(z) - z**concentration


def _pareto(v: Any, concentration: Any, scale: Any) -> Any:
    density = np.log(concentration) + concentration * np.log(scale) - (concentration + 1) * np.log(v)
    return _where(v >= scale, density)


def _von_mises(v: Any, loc: Any, concentration: Any) -> Any:
    return concentration * np.cos(v - loc) - np.log(2 * np.pi * special.i0(concentration))


def _bernoulli(v: Any, logits: Any) -> Any:
    return -np.logaddexp(0.0, np.where(v == 1, -1.0, 1.0) * logits)


def _bernoulli_cdf(v: Any, logits: Any) -> Any:
    return np.where(v < 0, 0.0, np.where(v >= 1, 1.0, special.expit(-logits)))


def _log_softmax(logits: Any) -> Any:
    return logits - special.logsumexp(logits, axis=-1, keepdims=True)


def _categorical(v: Any, logits: Any) -> Any:
    logits = np.broadcast_to(_log_softmax(logits), (*np.shape(v), np.shape(logits)[-1]))
    return np.take_along_axis(logits, np.asarray(v, np.int64)[..., None], -1)[..., 0]


def _categorical_cdf(v: Any, logits: Any) -> Any:
    below = np.arange(np.shape(logits)[-1]) <= np.asarray(v)[..., None]
    return np.sum(np.where(below, np.exp(_log_softmax(logits)), 0.0), -1)


def _binomial(v: Any, count: Any, logits: Any) -> Any:
    choose = special.gammaln(count + 1) - special.gammaln(v + 1) - special.gammaln(count - v + 1)
    return choose - v * np.logaddexp(0.0, -logits) - (count - v) * np.logaddexp(0.0, logits)


def _poisson(v: Any, rate: Any) -> Any:
    return v * np.log(rate) - rate - special.gammaln(np.asarray(v, np.float64) + 1)


def _negative_binomial(v: Any, count: Any, logits: Any) -> Any:
    choose = special.gammaln(count + v) - special.gammaln(v + 1.0) - special.gammaln(count)
    return choose - count * np.logaddexp(0.0, logits) - v * np.logaddexp(0.0, -logits)


def _geometric(v: Any, logits: Any) -> Any:
    return -np.logaddexp(0.0, -logits) - v * np.logaddexp(0.0, logits)


def _multivariate(v: Any, loc: Any, factor: Any) -> Any:
    return np.sum(_normal(_whitened(v, loc, factor), 0.0, 1.0)) - np.sum(np.log(np.diagonal(factor)))


def _whitened(v: Any, loc: Any, factor: Any) -> Any:
    return np.linalg.solve(np.tril(factor), v - loc)


def _factor(covariance: Any) -> Any:
    return np.linalg.cholesky((covariance + covariance.T) / 2)


def _dirichlet(v: Any, concentration: Any) -> Any:
    log_norm = special.gammaln(np.sum(concentration)) - np.sum(special.gammaln(concentration))
    return log_norm + np.sum((concentration - 1) * np.log(v))


def _one_hot(v: Any, logits: Any) -> Any:
    return np.sum(v * _log_softmax(logits))


def _multinomial(v: Any, count: Any, logits: Any) -> Any:
    choose = special.gammaln(count + 1) - np.sum(special.gammaln(v + 1.0))
    return choose + np.sum(v * _log_softmax(logits))


COMMON = (
    Family("Normal", ("real", "positive"), _normal, "real", _normal_cdf, IDENTITY),
    Family(
        "Laplace",
        ("real", "positive"),
        lambda v, loc, scale: -np.abs(v - loc) / scale - np.log(2 * scale),
        "real",
        lambda v, loc, scale: stats.laplace.cdf(v, loc, scale),
        IDENTITY,
    ),
    Family(
        "Exponential",
        ("positive",),
        lambda v, rate: _where(v >= 0, np.log(rate) - rate * v),
        "real",
        lambda v, rate: -np.expm1(-rate * v),
        SOFTPLUS,
    ),
    Family(
        "LogNormal",
        ("real", "positive"),
        _log_normal,
        "wild",
        lambda v, loc, scale: _normal_cdf(np.log(v), loc, scale),
        EXP,
    ),
    Family(
        "Uniform",
        ("low", "high"),
        lambda v, low, high: _where((v >= low) & (v <= high), -np.log(high - low)),
        "real",
        lambda v, low, high: (v - low) / (high - low),
        INTERVAL,
    ),
    Family("Bernoulli", ("real",), _bernoulli, "index", _bernoulli_cdf, size=2),
    Family("Poisson", ("positive",), _poisson, "whole", lambda v, rate: stats.poisson.cdf(v, rate)),
    Family("Categorical", ("real",), _categorical, "index", _categorical_cdf, event=(((3,),), ()), size=3),
    Family(
        "MultivariateNormalTriL",
        ("real", "lower"),
        _multivariate,
        "real",
        _normal_cdf,
        IDENTITY,
        event=(((2,), (2, 2)), (2,)),
        whiten=_whitened,
    ),
)
"""The families of the default sweep. They are most of those that gjflax computes without TFP."""

RARE = (
    Family(
        "HalfNormal",
        ("positive",),
        lambda v, scale: _where(v >= 0, np.log(2) + _normal(v, 0.0, scale)),
        "real",
        lambda v, scale: 2 * _normal_cdf(v, 0.0, scale) - 1,
        SOFTPLUS,
    ),
    Family(
        "TruncatedNormal",
        ("real", "positive", "low", "high"),
        _truncated_normal,
        "real",
        _truncated_normal_cdf,
        INTERVAL,
    ),
    Family("StudentT", ("shape", "real", "positive"), _student, "wild", stats.t.cdf, IDENTITY),
    Family(
        "Cauchy",
        ("real", "positive"),
        lambda v, loc, scale: -np.log(np.pi * scale * (1 + ((v - loc) / scale) ** 2)),
        "wild",
        lambda v, loc, scale: stats.cauchy.cdf(v, loc, scale),
        IDENTITY,
    ),
    Family(
        "HalfCauchy",
        ("real", "positive"),
        lambda v, loc, scale: _where(v >= loc, np.log(2) - np.log(np.pi * scale * (1 + ((v - loc) / scale) ** 2))),
        "wild",
        lambda v, loc, scale: stats.halfcauchy.cdf(v, loc, scale),
        SHIFTED_EXP,
    ),
    Family("Logistic", ("real", "positive"), _logistic, "real", lambda v, a, b: special.expit((v - a) / b), IDENTITY),
    Family(
        "Gumbel",
        ("real", "positive"),
        _gumbel,
        "real",
        lambda v, loc, scale: np.exp(-np.exp(-(v - loc) / scale)),
        IDENTITY,
    ),
    Family(
        "Gamma",
        ("shape", "positive"),
        _gamma,
        "real",
        lambda v, concentration, rate: special.gammainc(concentration, rate * v),
        SOFTPLUS,
    ),
    Family(
        "InverseGamma",
        ("shape", "positive"),
        _inverse_gamma,
        "wild",
        lambda v, concentration, scale: special.gammaincc(concentration, scale / v),
        RECIPROCAL,
    ),
    Family("Chi2", ("shape",), lambda v, df: _gamma(v, df / 2, 0.5), "real", stats.chi2.cdf, SOFTPLUS),
    Family("Beta", ("shape", "shape"), _beta, "real", lambda v, a, b: special.betainc(a, b, v), UNIT),
    Family("Kumaraswamy", ("shape", "shape"), _kumaraswamy, "real", lambda v, a, b: 1 - (1 - v**a) ** b, UNIT),
    Family(
        "Weibull",
        ("shape", "positive"),
        _weibull,
        "real",
        lambda v, concentration, scale: -np.expm1(-((v / scale) ** concentration)),
        SOFTPLUS,
    ),
    Family(
        "Pareto",
        ("shape", "positive"),
        _pareto,
        "wild",
        lambda v, concentration, scale: 1 - (scale / v) ** concentration,
        ABOVE_SCALE,
    ),
    Family("VonMises", ("real", "positive"), _von_mises),
    Family("Binomial", ("count", "real"), _binomial, "whole", lambda v, n, x: stats.binom.cdf(v, n, special.expit(x))),
    Family(
        "NegativeBinomial",
        ("shape", "real"),
        _negative_binomial,
        "whole",
        lambda v, n, x: stats.nbinom.cdf(v, n, special.expit(-x)),
    ),
    Family("Geometric", ("real",), _geometric, "whole", lambda v, x: stats.geom.cdf(v + 1, special.expit(x))),
    Family("OneHotCategorical", ("real",), _one_hot, "whole", event=(((3,),), (3,))),
    Family("Multinomial", ("count", "real"), _multinomial, "whole", event=(((), (3,)), (3,))),
    Family("Dirichlet", ("shape",), _dirichlet, "real", event=(((3,),), (3,))),
    Family(
        "MultivariateNormalDiag",
        ("real", "positive"),
        lambda v, loc, scale: _multivariate(v, loc, np.diag(scale)),
        "real",
        _normal_cdf,
        IDENTITY,
        event=(((2,), (2,)), (2,)),
        whiten=lambda v, loc, scale: (v - loc) / scale,
    ),
    Family(
        "MultivariateNormalFullCovariance",
        ("real", "covariance"),
        lambda v, loc, covariance: _multivariate(v, loc, _factor(covariance)),
        "real",
        _normal_cdf,
        IDENTITY,
        event=(((2,), (2, 2)), (2,)),
        whiten=lambda v, loc, covariance: _whitened(v, loc, _factor(covariance)),
    ),
)
"""The families that the long sweep has besides."""

FAMILIES: Mapping[str, Family] = {family.name: family for family in (*COMMON, *RARE)}

FINITE = ("Bernoulli", "Categorical")
"""The families of programs that are enumerated."""


@functools.cache
def by_name(name: str) -> Family:
    return FAMILIES[name]

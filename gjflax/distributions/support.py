r"""Supports: where a TFP family's density is not 0.

TFP computes its densities by formulas that hold inside the support, and outside of it returns NaN, or a finite
number, unless it is asked to validate its arguments, which it does by raising. A sampler that proposes such a value
needs −inf. A `Support` says which values are inside, and gives a value that is, so that neither the density nor its
gradient is ever computed outside. An infinite value is outside of every support.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Support:
    """The support of a family of TFP distributions. Both functions take a value and the distribution.

    Attributes:
      contains: whether each event of the value is inside: a boolean array without the axes of an event.
      interior: a value inside, of the shape of the given one.
    """

    contains: Callable[[Any, Any], Any]
    interior: Callable[[Any, Any], Any]

    def guard(self, logpdf: Callable[[Any], Any], value: Any, distribution: Any) -> Any:
        """``logpdf(value)`` inside the support and −inf outside, with a gradient that is finite in both."""
        inside = self.contains(value, distribution)
        event = inside.reshape(inside.shape + (1,) * (value.ndim - inside.ndim))
        safe = jnp.where(event, value, jnp.asarray(self.interior(value, distribution), value.dtype))
        return jnp.where(inside, logpdf(safe), -jnp.inf)


def _constant(number: float) -> Callable[[Any, Any], Any]:
    return lambda value, _: jnp.full(value.shape, number, value.dtype)


def _scalars(contains: Callable[[Any], Any], inside: float) -> Support:
    """A support in R that does not depend on the arguments."""
    return Support(lambda value, _: contains(value), _constant(inside))


def _from(bound: Callable[[Any], Any], strictly: bool = False) -> Support:
    """The numbers from a bound on, which an argument gives."""

    def contains(value: Any, distribution: Any) -> Any:
        low = bound(distribution)
        return ((value > low) if strictly else (value >= low)) & (value < jnp.inf)

    return Support(contains, lambda value, distribution: jnp.broadcast_to(bound(distribution) + 1.0, value.shape))


def _between(low: Callable[[Any], Any], high: Callable[[Any], Any]) -> Support:
    """The numbers between two bounds, which the arguments give and which may be infinite."""

    def interior(value: Any, distribution: Any) -> Any:
        bounds = low(distribution), high(distribution)
        from_below, from_above = bounds[0] + 1.0, bounds[1] - 1.0
        middle = jnp.where(jnp.isinf(bounds[1]), from_below, 0.5 * (bounds[0] + bounds[1]))
        one_sided = jnp.where(jnp.isinf(bounds[0]), jnp.where(jnp.isinf(bounds[1]), 0.0, from_above), middle)
        return jnp.broadcast_to(one_sided, value.shape)

    return Support(lambda v, d: (v >= low(d)) & (v <= high(d)) & jnp.isfinite(v), interior)


def _whole(value: Any) -> Any:
    return (value == jnp.floor(value)) & (jnp.abs(value) < jnp.inf)


def _tolerance(value: Any) -> float:
    """How far a sum of floats may be from what it should be."""
    return float(jnp.finfo(value.dtype).eps) ** 0.5


def _in_simplex(value: Any, _: Any) -> Any:
    return jnp.all(value >= 0, -1) & (jnp.abs(jnp.sum(value, -1) - 1) <= _tolerance(value))


def _is_one_hot(value: Any, _: Any) -> Any:
    return jnp.all((value == 0) | (value == 1), -1) & (jnp.sum(value, -1) == 1)


def _first_axis(value: Any, _: Any) -> Any:
    return jnp.zeros_like(value).at[..., 0].set(1)


def _adds_up(value: Any, distribution: Any) -> Any:
    return jnp.all((value >= 0) & _whole(value), -1) & (jnp.sum(value, -1) == distribution.total_count)


def _all_in_first(value: Any, distribution: Any) -> Any:
    return _first_axis(value, None) * jnp.asarray(distribution.total_count)[..., None]


def _is_symmetric(value: Any) -> Any:
    transposed = jnp.swapaxes(value, -1, -2)
    return jnp.all(jnp.abs(value - transposed) <= _tolerance(value) * (1 + jnp.abs(value)), (-1, -2))


def _is_positive_definite(value: Any, distribution: Any) -> Any:
    if getattr(distribution, "input_output_cholesky", False):
        return _is_cholesky(value)
    # Eigenvalues and not a Cholesky factor, which reads one triangle only and so takes asymmetric matrices.
    finite = jnp.all(jnp.isfinite(value), (-1, -2))
    safe = jnp.where(finite[..., None, None], value, _identity(value, None))
    smallest = jnp.linalg.eigvalsh((safe + jnp.swapaxes(safe, -1, -2)) / 2)[..., 0]
    return finite & _is_symmetric(safe) & (smallest > 0)


def _is_cholesky(value: Any) -> Any:
    lower = jnp.all(jnp.triu(value, 1) == 0, (-1, -2)) & jnp.all(jnp.isfinite(value), (-1, -2))
    return lower & jnp.all(jnp.diagonal(value, axis1=-2, axis2=-1) > 0, -1)


def _is_correlation_cholesky(value: Any, _: Any) -> Any:
    return _is_cholesky(value) & jnp.all(jnp.abs(jnp.sum(value**2, -1) - 1) <= 4 * _tolerance(value), -1)


def _is_correlation(value: Any, distribution: Any) -> Any:
    if distribution.input_output_cholesky:
        return _is_correlation_cholesky(value, distribution)
    diagonal = jnp.diagonal(value, axis1=-2, axis2=-1)
    return _is_positive_definite(value, None) & jnp.all(jnp.abs(diagonal - 1) <= 4 * _tolerance(value), -1)


def _identity(value: Any, _: Any) -> Any:
    return jnp.broadcast_to(jnp.eye(value.shape[-1], dtype=value.dtype), value.shape)


def _is_finite(value: Any, distribution: Any) -> Any:
    return jnp.all(jnp.isfinite(value), tuple(range(-len(distribution.event_shape), 0)))


real = Support(_is_finite, _constant(0.0))
positive = _scalars(lambda v: (v > 0) & (v < jnp.inf), 1.0)
nonnegative = _scalars(lambda v: (v >= 0) & (v < jnp.inf), 1.0)
unit_interval = _scalars(lambda v: (v >= 0) & (v <= 1), 0.5)
open_unit_interval = _scalars(lambda v: (v > 0) & (v < 1), 0.5)
binary = _scalars(lambda v: (v == 0) | (v == 1), 0.0)
whole = _scalars(_whole, 0.0)
counts = _scalars(lambda v: (v >= 0) & _whole(v), 0.0)
counts_from_one = _scalars(lambda v: (v >= 1) & _whole(v), 1.0)
bounded_counts = Support(lambda v, d: (v >= 0) & (v <= d.total_count) & _whole(v), _constant(0.0))
simplex = Support(_in_simplex, lambda v, _: jnp.full(v.shape, 1 / v.shape[-1], v.dtype))
one_hot = Support(_is_one_hot, _first_axis)
fixed_total = Support(_adds_up, _all_in_first)
positive_definite = Support(_is_positive_definite, _identity)
correlation = Support(_is_correlation, _identity)
correlation_cholesky = Support(_is_correlation_cholesky, _identity)


def _categories(distribution: Any) -> Any:
    return (distribution.logits if distribution.probs is None else distribution.probs).shape[-1]


categories = Support(lambda v, d: (v >= 0) & (v < _categories(d)) & _whole(v), _constant(0.0))
interval = _between(lambda d: d.low, lambda d: d.high)

SUPPORTS: Mapping[str, Support] = {
    "Normal": real,
    "LogNormal": positive,
    "HalfNormal": nonnegative,
    "TruncatedNormal": interval,
    "TruncatedCauchy": interval,
    "Triangular": interval,
    "PERT": interval,
    "StudentT": real,
    "HalfStudentT": _from(lambda d: d.loc),
    "Cauchy": real,
    "HalfCauchy": _from(lambda d: d.loc),
    "Laplace": real,
    "Logistic": real,
    "LogLogistic": positive,
    "LogitNormal": open_unit_interval,
    "Gumbel": real,
    "Moyal": real,
    "Uniform": interval,
    "Exponential": nonnegative,
    "Gamma": nonnegative,
    "GammaGamma": nonnegative,
    "InverseGamma": positive,
    "InverseGaussian": positive,
    "Chi": nonnegative,
    "Chi2": nonnegative,
    "NoncentralChi2": nonnegative,
    "Beta": unit_interval,
    "Kumaraswamy": unit_interval,
    "ContinuousBernoulli": unit_interval,
    "RelaxedBernoulli": open_unit_interval,
    "Weibull": nonnegative,
    "Pareto": _from(lambda d: d.scale),
    # The density of an angle, which has a period of 2π: so of every number, not of those in (−π, π) alone.
    "VonMises": real,
    "Dirichlet": simplex,
    "RelaxedOneHotCategorical": simplex,
    "MultivariateNormalDiag": real,
    "MultivariateNormalTriL": real,
    "MultivariateNormalFullCovariance": real,
    "MultivariateNormalLinearOperator": real,
    "MultivariateStudentTLinearOperator": real,
    "GaussianProcess": real,
    "LinearGaussianStateSpaceModel": real,
    "WishartTriL": positive_definite,
    "WishartLinearOperator": positive_definite,
    "LKJ": correlation,
    "CholeskyLKJ": correlation_cholesky,
    "Bernoulli": binary,
    "ProbitBernoulli": binary,
    "Binomial": bounded_counts,
    "BetaBinomial": bounded_counts,
    "Categorical": categories,
    "OneHotCategorical": one_hot,
    "Multinomial": fixed_total,
    "DirichletMultinomial": fixed_total,
    "Poisson": counts,
    "PoissonLogNormalQuadratureCompound": counts,
    "NegativeBinomial": counts,
    "Geometric": counts,
    "Skellam": whole,
    "Zipf": counts_from_one,
}
"""By the names of TFP's classes."""

DISCRETE = frozenset(
    {"Bernoulli", "ProbitBernoulli", "Binomial", "BetaBinomial", "Categorical", "OneHotCategorical", "Multinomial"}
    | {"DirichletMultinomial", "Poisson", "PoissonLogNormalQuadratureCompound", "NegativeBinomial", "Geometric"}
    | {"Skellam", "Zipf", "OrderedLogistic", "StoppingRatioLogistic", "PlackettLuce"}
)
"""TFP's classes whose values are whole numbers, also where TFP makes floats of them."""

_ATOMS = frozenset({"Empirical", "FiniteDiscrete", "QuantizedDistribution"})
"""TFP's classes whose values are single numbers, whole or not."""


def name_of(distribution: Any) -> str:
    """The name of a distribution's class if it is one of TFP's own, else the empty string."""
    kind = type(distribution)
    return kind.__name__ if kind.__module__.startswith("tensorflow_probability.") else ""


_PART: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("Independent", "Sample", "BatchReshape", "BatchBroadcast", "Masked"), lambda d: d.distribution),
    "MixtureSameFamily": lambda d: d.components_distribution,
    "Mixture": lambda d: d.components[0],
    "HiddenMarkovModel": lambda d: d.observation_distribution,
}


def name_of_events(distribution: Any) -> str:
    """The name of the family of a distribution's events: of a composite that of its parts."""
    name = name_of(distribution)
    return name_of_events(_PART[name](distribution)) if name in _PART else name


def is_whole(distribution: Any) -> bool:
    """Whether a distribution's values are whole numbers."""
    return name_of_events(distribution) in DISCRETE


def is_discrete(distribution: Any) -> bool:
    """Whether a distribution's values are single numbers, so that its density has no gradient in them."""
    if name_of(distribution) == "TransformedDistribution":
        return is_discrete(distribution.distribution)
    return is_whole(distribution) or name_of_events(distribution) in _ATOMS


def bijector_of(distribution: Any) -> Any:
    """TFP's bijector from R^n onto the support, or None where it has none or none that fits the value."""
    if name_of(distribution) not in ("MixtureSameFamily", "HiddenMarkovModel"):
        try:
            return distribution.experimental_default_event_space_bijector()
        except NotImplementedError:
            return None
    # One for all the parts, unless their supports differ.
    bijector = bijector_of(_PART[name_of(distribution)](distribution))
    return bijector if bijector is not None and tuple(bijector.experimental_batch_shape()) == () else None


def support_of(distribution: Any) -> Support | None:
    """The support of a distribution, that of a composite from its parts; None where it is not known."""
    name = name_of(distribution)
    if name == "Independent":
        return _of_independent(support_of(distribution.distribution))
    if name == "MixtureSameFamily":
        return _of_elements(distribution.components_distribution, len(distribution.event_shape))
    if name == "HiddenMarkovModel" and distribution.mask is None:
        return _of_chain(distribution.observation_distribution)
    if name == "TransformedDistribution":
        return _of_transformed(support_of(distribution.distribution) or real)
    return SUPPORTS.get(name)


def _of_independent(inner: Support | None) -> Support | None:
    if inner is None:
        return None

    def contains(value: Any, distribution: Any) -> Any:
        return _all_but(len(distribution.batch_shape), inner.contains(value, distribution.distribution))

    return Support(contains, lambda value, distribution: inner.interior(value, distribution.distribution))


def _all_but(kept: int, inside: Any) -> Any:
    """Whether all are inside, over the axes that are not those of the batch."""
    return jnp.all(inside, tuple(range(kept, inside.ndim)))


def _of_elements(elements: Any, event_ndims: int) -> Support | None:
    """The union of the supports of a batch of distributions, whose last batch axis the value does not have."""
    inner = support_of(elements)
    if inner is None:
        return None

    def spread(value: Any) -> Any:
        batch = value.ndim - event_ndims
        shape = (*value.shape[:batch], elements.batch_shape[-1], *value.shape[batch:])
        return jnp.broadcast_to(jnp.expand_dims(value, batch), shape)

    def interior(value: Any, _: Any) -> Any:
        return jnp.take(inner.interior(spread(value), elements), 0, axis=-1 - event_ndims)

    return Support(lambda value, _: jnp.any(inner.contains(spread(value), elements), -1), interior)


def _of_chain(observation: Any) -> Support | None:
    """The union over the states, at every step."""
    union = _of_elements(observation, len(observation.event_shape))
    if union is None:
        return None
    return Support(lambda value, distribution: jnp.all(union.contains(value, distribution), -1), union.interior)


def _of_transformed(base: Support) -> Support:
    """The image of a support. A value that has no inverse has NaN for one, or an infinite one."""

    def contains(value: Any, distribution: Any) -> Any:
        inverse = distribution.bijector.inverse(value)
        kept = len(distribution.batch_shape)
        inside = base.contains(inverse, distribution.distribution)
        return _all_but(kept, inside) & _all_but(kept, jnp.isfinite(inverse))

    def interior(value: Any, distribution: Any) -> Any:
        bijector = distribution.bijector
        return bijector.forward(base.interior(bijector.inverse(value), distribution.distribution))

    return Support(contains, interior)


_WORDS: Mapping[Support, str] = {
    real: "real",
    positive: "> 0",
    nonnegative: "≥ 0",
    unit_interval: "[0, 1]",
    open_unit_interval: "(0, 1)",
    interval: "[low, high]",
    binary: "{0, 1}",
    whole: "integers",
    counts: "0, 1, 2, …",
    counts_from_one: "1, 2, 3, …",
    bounded_counts: "0, …, n",
    categories: "0, …, k − 1",
    one_hot: "one-hot",
    fixed_total: "counts of n",
    simplex: "simplex",
    positive_definite: "positive definite",
    correlation: "correlation matrix",
    correlation_cholesky: "correlation factor",
}


def describe(family: str) -> str | None:
    """The support of a family of TFP in words, None where it is not known.

    >>> describe("LogNormal"), describe("Bernoulli"), describe("Pareto")
    ('> 0', '{0, 1}', '≥ a bound')
    """
    known = SUPPORTS.get(family)
    return None if known is None else _WORDS.get(known, "≥ a bound")

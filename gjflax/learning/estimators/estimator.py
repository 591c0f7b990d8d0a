r"""`GradientEstimator`: a distribution that says how the expectation of what depends on its draw is differentiated.

For a choice z ~ q(z; φ) and a cost f(z), the estimators of ∇ E[f(z)] differ:

==================  =================================================================================
`Reparameterized`   ∇ f(g(ε; φ)) with z = g(ε; φ): through the draw
`REINFORCE`         (f(z) − b) ∇ log q(z; φ): the score function, for any distribution
`ENUM`              ∇ Σ_v q(v; φ) f(v): exact, for finitely many values
`MeasureValued`     c (f(z⁺) − f(z⁻)): two draws, for Bernoulli, Poisson, Normal
`StraightThrough`   biased: a hard draw with the derivative of a soft one
`GumbelSoftmax`     biased: a soft draw
==================  =================================================================================

An estimator is a distribution around another, with the same density: it may stand wherever that may. What it does to the
gradient is up to the objective that reads it off the trace. A choice without one is reparameterised where its
distribution is, else it has the score function: both unbiased.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
from flax.core import Scope
from jax import lax

from gjflax.core.errors import ArgumentError, NotReparameterizedError
from gjflax.core.typing import Arguments, PRNGKey
from gjflax.distributions.applied import Applied
from gjflax.distributions.arguments import site
from gjflax.distributions.distribution import Distribution
from gjflax.distributions.tfp import NATIVE, TFPDistribution

PATHWISE, SCORE_FUNCTION = "pathwise", "score function"


class AppliedEstimator(Applied):
    """A distribution at its arguments, with another way to differentiate its draws."""

    def __init__(self, inner: Applied, reparameterized: bool):
        self.inner = inner
        self.reparameterized = reparameterized

    @property
    def is_discrete(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.is_discrete

    @property
    def template(self) -> jax.ShapeDtypeStruct:
        return self.inner.template

    def sample(self, key: PRNGKey) -> Any:
        value = self.inner.sample(key)
        return value if self.reparameterized else lax.stop_gradient(value)

    def logpdf(self, value: Any) -> Any:
        return self.inner.logpdf(value)

    def bijector(self) -> Any:
        return self.inner.bijector()


class GradientEstimator(Distribution):
    """Base class of estimators. See the text of this file.

    Attributes:
      inner: the distribution.

    Raises:
      ArgumentError: if it is not a distribution, or an estimator itself.
    """

    inner: Any

    kind: ClassVar[str] = SCORE_FUNCTION
    """What an objective does for a choice of this estimator, where it can."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.inner, Distribution):
            raise ArgumentError(f"`{name}` takes a distribution; got {self.inner!r:.80}. Write {name}(Normal).")
        if isinstance(self.inner, GradientEstimator):
            raise ArgumentError(f"`{name}` takes a distribution without an estimator; got {self.inner.label}.")
        if not isinstance(self.parent, (nn.Module, Scope)):
            # It owns no variables: no part of the module in whose body it may be written.
            object.__setattr__(self, "parent", None)
        object.__setattr__(self, "inner", self.inner.as_unbound())
        super().__post_init__()

    @property
    def label(self) -> str:
        return f"{type(self).__name__}({self.inner.label})"

    @nn.nowrap
    def at(self, args: Arguments) -> Applied:
        return AppliedEstimator(self.inner.at(args), reparameterized=False)

    @nn.nowrap
    def positional(self, args: Arguments, kwargs: Mapping[str, Any]) -> tuple[Any, Arguments]:
        if not kwargs:
            return self, args
        inner, args = self.inner.positional(args, kwargs)
        return (self if inner is self.inner else self.clone(inner=inner)), args

    @nn.nowrap
    def stored(self, args: Arguments) -> Any:
        return self.inner.stored(args)


class REINFORCE(GradientEstimator):
    """The score function: (f(z) − b) ∇ log q(z), f being the costs downstream of the choice.

    It is for any distribution whose support does not depend on what is learned: of a `Uniform` with learned bounds there is
    no such gradient. The baseline b is the objective's. After R. J. Williams, "Simple statistical gradient-following
    algorithms for connectionist reinforcement learning", Machine Learning 8, 1992.

    >>> import gjflax, jax
    >>> score = lambda loc: gjflax.REINFORCE(gjflax.Normal).simulate(jax.random.key(0), (loc, 1.0))[1].get_retval()
    >>> float(jax.grad(score)(0.5))
    0.0
    """


class Reparameterized(GradientEstimator):
    """The derivative of the draw: what a distribution that has a reparameterisation does anyway, demanded.

    Raises:
      NotReparameterizedError: if the distribution has none.

    >>> import gjflax, jax
    >>> draw = lambda loc: gjflax.Reparameterized(gjflax.Normal).simulate(jax.random.key(0), (loc, 1.0))[1].get_retval()
    >>> float(jax.grad(draw)(0.5))
    1.0
    """

    kind: ClassVar[str] = PATHWISE

    @nn.nowrap
    def at(self, args: Arguments) -> Applied:
        here = self.inner.at(args)
        if not here.reparameterized:
            raise NotReparameterizedError(
                f"The choice at {site(self.label)} demands a pathwise gradient, and {self.inner.label} has no "
                "reparameterisation. Use REINFORCE, or ENUM where it has few values; for a distribution of your own whose "
                "sampler is differentiable, declare `reparameterized=True`."
            )
        return AppliedEstimator(here, reparameterized=True)


def kind_of(distribution: Any, is_reparameterized: bool) -> str:
    """How an objective differentiates the choice of a distribution."""
    if isinstance(distribution, GradientEstimator):
        return distribution.kind
    return PATHWISE if is_reparameterized else SCORE_FUNCTION


def without_estimator(distribution: Any) -> Any:
    """The distribution in an estimator, or itself."""
    return distribution.inner if isinstance(distribution, GradientEstimator) else distribution


def named_arguments(distribution: TFPDistribution, args: Arguments) -> dict[str, Any]:
    """The arguments of a family by name, those that are None left out."""
    make = NATIVE.get(distribution.family) if isinstance(distribution.family, str) else None
    names = distribution._names(make or distribution._class(), len(args))
    return {name: value for name, value in zip(names, args, strict=True) if value is not None}

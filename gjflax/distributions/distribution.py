r"""`Distribution`: a generative function with a single choice, at its root.

With a sampler and an elementwise log density ℓ(v; x), the score of a value v is the sum of ℓ over its elements:
arguments broadcast, and a `Normal` with a vector of means is one choice, a vector. Every interface method is two
lines of arithmetic on that score:

===========  ==========================================================
importance   constrained: w = s(v; x); free: drawn, w = 0
update       w = s(v'; x') − s(v; x), the old score taken from the trace
regenerate   selected: redrawn, w = 0; kept: w = s(v; x') − s(v; x)
===========  ==========================================================

A distribution owns no Flax variables, so its methods need no scope and bypass linen: tracing one costs little.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap, ValueChoiceMap
from gjflax.core.diff import Diff, no_change, unknown_change
from gjflax.core.errors import (
    ArgumentError,
    ChoiceShapeError,
    DiscreteGradientError,
    MissingChoiceError,
    NotImplementedByGenerativeFunctionError,
)
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.masked import Masked
from gjflax.core.selection import Selection
from gjflax.core.trace import Trace, canonical, strong
from gjflax.core.typing import Arguments, PRNGKey, Score
from gjflax.core.watching import watched
from gjflax.distributions.applied import Applied
from gjflax.distributions.arguments import free_promotion, site
from gjflax.distributions.distribution_trace import DistributionTrace, is_selected, log_det_jacobian
from gjflax.distributions.given import check_shape, fitted, fitted_unconstrained, flag_of, is_given, refuse_below


@functools.cache
def _key_like() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(jax.random.key, 0)


class _AppliedSubclass(Applied):
    """The methods of a user's subclass of `Distribution`, at its arguments."""

    def __init__(self, distribution: Distribution, args: Arguments):
        self._distribution, self._args = distribution, args
        self.is_discrete = distribution.is_discrete
        self.reparameterized = distribution.is_reparameterized

    @property
    def template(self) -> jax.ShapeDtypeStruct:
        return jax.eval_shape(self.sample, _key_like())

    def sample(self, key: PRNGKey) -> Any:
        value = self._distribution.sample(key, *self._args)
        if not jax.tree_util.treedef_is_leaf(jax.tree.structure(value)):
            raise ChoiceShapeError(
                f"`sample` of {site(self._distribution.label)} returned a {type(value).__name__}, and a choice is one "
                "array. Write a generative function with one choice for each part."
            )
        # The derivative of a draw counts only where it is declared to be that of the choice.
        return strong(value) if self.reparameterized else lax.stop_gradient(strong(value))

    def logpdf(self, value: Any) -> Any:
        logpdf = jnp.asarray(self._distribution.logpdf(value, *self._args))
        if logpdf.shape != value.shape[: logpdf.ndim]:
            # Two shapes that broadcast by accident would be summed over all pairs of elements.
            raise ChoiceShapeError(
                f"`logpdf` of {site(self._distribution.label)} returned shape {logpdf.shape} for a value of shape "
                f"{value.shape}. It is elementwise (of the value's shape, or its leading axes where the last are one "
                "event) or summed (a scalar)."
            )
        return logpdf

    def bijector(self) -> Any:
        return self._distribution.bijector(*self._args)


class _OfFunctions(type):
    """Lets the base class be called with a sampler and a log density: a shorter way to write `distribution`."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if not args or cls is not Distribution:
            return super().__call__(*args, **options)
        # It is made of the class that is being defined here.
        from gjflax.distributions.of_functions import distribution

        return distribution(*args, **options)


class Distribution(GenerativeFunction, metaclass=_OfFunctions):
    """Base class of distributions. Subclass it with `sample` and `logpdf`; ``Distribution(sample, logpdf)`` is that of
    two functions, as `distribution` makes it.

    Attributes:
      is_discrete: whether its values are discrete (integers). They have no gradient.
      is_reparameterized: whether `sample` may be differentiated in the arguments for a pathwise gradient. Say so
        only where that derivative is right; nothing can check it.

    >>> import gjflax, jax
    >>> class Laplacian(gjflax.Distribution):
    ...     def sample(self, key, scale):
    ...         return scale * jax.random.laplace(key, jnp.shape(scale))
    ...     def logpdf(self, value, scale):
    ...         return -jnp.abs(value) / scale - jnp.log(2 * scale)
    >>> _, (_, score) = Laplacian().assess(jax.random.key(0), 0.0, (0.5,))
    >>> float(score) == 0.0
    True
    """

    needs_variables = False
    is_discrete = False
    is_reparameterized = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        for name in ("sample", "logpdf", "bijector"):
            if inspect.isfunction(cls.__dict__.get(name)):
                nn.nowrap(cls.__dict__[name])
        super().__init_subclass__(**kwargs)

    # What a subclass says ---------------------------------------------------------------------------------------

    @nn.nowrap
    def sample(self, key: PRNGKey, *args: Any) -> Any:
        """A value, drawn with a typed key."""
        raise NotImplementedByGenerativeFunctionError(f"`{self.label}` has no `sample`.")

    @nn.nowrap
    def logpdf(self, value: Any, *args: Any) -> Any:
        """The log density of a value, elementwise or summed; −inf outside the support."""
        raise NotImplementedByGenerativeFunctionError(f"`{self.label}` has no `logpdf`.")

    @nn.nowrap
    def bijector(self, *args: Any) -> Any:
        """A bijector from R^n onto the support, with the methods of a TFP bijector; or None."""
        return None

    @property
    def label(self) -> str:
        """Its name in messages."""
        return type(self).__name__

    @nn.nowrap
    def at(self, args: Arguments) -> Applied:
        """The distribution at its arguments."""
        return _AppliedSubclass(self, args)

    @nn.nowrap
    def positional(self, args: Arguments, kwargs: Mapping[str, Any]) -> tuple[Any, Arguments]:
        if not kwargs:
            return self, args
        signature = self._signature()
        parameters = list(signature.parameters.values())[1:]
        try:
            bound = signature.replace(parameters=parameters).bind(*args, **kwargs)
        except TypeError as error:
            unknown = [name for name in kwargs if name not in signature.parameters]
            problem = f"it has no argument `{unknown[0]}`" if unknown else str(error)
            shown = ", ".join(map(str, parameters))
            raise ArgumentError(
                f"The distribution of {site(self.label)} does not take these arguments: {problem}. It takes ({shown})."
            ) from error
        if bound.kwargs:
            raise ArgumentError(
                f"The distribution of {site(self.label)} has the keyword-only arguments {', '.join(bound.kwargs)}, "
                "which a trace cannot hold: the arguments of a generative function are a tuple. Make them positional."
            )
        return self, bound.args

    @nn.nowrap
    def _signature(self) -> inspect.Signature:
        """The signature of the log density: the value, and the arguments."""
        return inspect.signature(self.logpdf)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward sample, drawn from the rng stream "choice": a stochastic layer."""
        callee, args = self.positional(args, kwargs)
        _, trace = callee.simulate(self._choice_key(), args)
        return trace.get_retval()

    # The interface ----------------------------------------------------------------------------------------------

    @nn.nowrap
    def simulate(self, key: PRNGKey, args: Arguments) -> tuple[PRNGKey, DistributionTrace]:
        return watched(lambda args: self._draw(key, args, self.at(args)), args)

    @nn.nowrap
    def importance(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Score, DistributionTrace]]:
        here = self.at(args)
        if not is_given(self.label, choices, strict):
            key, trace = self._draw(key, args, here)
            return key, (jnp.zeros_like(trace.score), trace)
        given = choices.get_value()
        if isinstance(given, Masked):
            key, drawn = self._draw(key, args, here)
            value, score = self._score_masked(given, drawn.value, here)
            return key, (jnp.where(given.flag, score, 0), self._trace(args, value, score))
        value, score = self._score_given(given, here)
        return key, (score, self._trace(args, value, score))

    @nn.nowrap
    def assess(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Any, Score]]:
        if not is_given(self.label, choices, strict):
            raise MissingChoiceError(
                f"`assess` needs a value for every choice, and none was given for "
                f"{site(self.label)}. Give one, or use `importance`, which draws it."
            )
        given = choices.get_value()
        if isinstance(given, Masked):
            value, score = self._score_given(given.value, self.at(args))
            # Whether the choice is there is not known now; where it is not, there is no density to give.
            return key, (value, jnp.where(flag_of(self.label, given), score, jnp.nan))
        return key, self._score_given(given, self.at(args))

    @nn.nowrap
    def update(
        self,
        key: PRNGKey,
        trace: DistributionTrace,
        choices: ChoiceMap,
        argdiffs: Arguments,
        *,
        param_diff: Any = unknown_change,
        strict: bool = True,
    ) -> tuple[PRNGKey, tuple[Any, Score, DistributionTrace, ChoiceMap]]:
        args = Diff.primal(argdiffs)
        old = trace.value
        if is_given(self.label, choices, strict):
            given = choices.get_value()
            if isinstance(given, Masked):
                value, score = self._score_masked(given, old, self.at(args))
                discard: ChoiceMap = ValueChoiceMap(Masked(old, given.flag))
            else:
                value, score = self._score_given(given, self.at(args), like=old)
                discard = ValueChoiceMap(old)
            retdiff = unknown_change(value)
        elif self.knows_no_change(trace, argdiffs, param_diff):
            return key, (no_change(old), jnp.zeros_like(trace.score), trace, EmptyChoiceMap())
        else:
            # The old value is checked against the new arguments, whose shape may be another.
            value, score = self._score_given(old, self.at(args), like=old)
            retdiff, discard = no_change(old), EmptyChoiceMap()
        score = score.astype(trace.score.dtype)
        return key, (retdiff, score - trace.score, self._trace(args, value, score), discard)

    @nn.nowrap
    def regenerate(
        self,
        key: PRNGKey,
        trace: DistributionTrace,
        selection: Selection,
        argdiffs: Arguments,
        *,
        param_diff: Any = unknown_change,
    ) -> tuple[PRNGKey, tuple[Any, Score, DistributionTrace]]:
        if not is_selected(selection, self.label):
            key, (retdiff, weight, trace, _) = self.update(
                key, trace, EmptyChoiceMap(), argdiffs, param_diff=param_diff
            )
            return key, (retdiff, weight, trace)
        args = Diff.primal(argdiffs)
        key, new = self._draw(key, args, self.at(args), like=trace)
        return key, (unknown_change(new.value), jnp.zeros_like(new.score), new)

    @nn.nowrap
    def constrain(
        self, unconstrained: ChoiceMap, args: Arguments, *, fixed: ChoiceMap | None = None
    ) -> tuple[ChoiceMap, Score]:
        if unconstrained.is_empty():
            if fixed is None or fixed.is_empty():
                raise MissingChoiceError(f"`constrain` needs {site(self.label)}, either unconstrained or `fixed`.")
            return fixed, jnp.zeros(())
        here = self.at(args)
        bijector = self.require_bijector(args, here)
        if not unconstrained.is_value():
            refuse_below(self.label, unconstrained)
        template = here.template
        given = unconstrained.get_value()
        with free_promotion():
            shape = tuple(bijector.inverse_event_shape(template.shape))
            point = given.value if isinstance(given, Masked) else given
            value = fitted_unconstrained(self.label, point, shape, template)
            constrained, log_det = strong(bijector.forward(value)), log_det_jacobian(bijector, value)
        if isinstance(given, Masked):
            return ValueChoiceMap(Masked(constrained, given.flag)), jnp.where(flag_of(self.label, given), log_det, 0)
        return ValueChoiceMap(constrained), log_det

    @nn.nowrap
    def require_bijector(self, args: Arguments, here: Applied | None = None) -> Any:
        """The bijector from R^n onto the support.

        Raises:
          DiscreteGradientError: if the distribution is discrete.
          NotImplementedByGenerativeFunctionError: if it names no bijector.
        """
        where = site(self.label)
        here = self.at(args) if here is None else here
        if here.is_discrete:
            raise DiscreteGradientError(f"The choice {where} is discrete: there is no map between it and R^n.")
        bijector = here.bijector()
        if bijector is None:
            raise NotImplementedByGenerativeFunctionError(
                f"The distribution of {where} names no bijector from R^n onto its support: give it `bijector`."
            )
        return bijector

    # Inside -----------------------------------------------------------------------------------------------------

    @nn.nowrap
    def stored(self, args: Arguments) -> Any:
        """The arguments as a trace keeps them."""
        return canonical(args)

    @nn.nowrap
    def _trace(self, args: Arguments, value: Any, score: Any) -> DistributionTrace:
        return DistributionTrace(self.as_unbound(), self.stored(args), value, score)

    @nn.nowrap
    def _draw(
        self, key: PRNGKey, args: Arguments, here: Applied, like: DistributionTrace | None = None
    ) -> tuple[PRNGKey, DistributionTrace]:
        """A fresh trace, in the dtypes of `like`."""
        key, sample_key = jax.random.split(key)
        value = strong(here.sample(sample_key))
        score = _sum(here.logpdf(value))
        if like is not None:
            check_shape(self.label, value, like.value.shape)
            value, score = value.astype(like.value.dtype), score.astype(like.score.dtype)
        return key, self._trace(args, value, score)

    @nn.nowrap
    def _score_given(self, value: Any, here: Applied, like: Any = None) -> tuple[Any, Score]:
        """The given value, checked and converted, and its score."""
        value, whole = fitted(self.label, value, here.template, like)
        score = _sum(here.logpdf(value))
        return value, score if whole is None else jnp.where(whole, score, -jnp.inf)

    @nn.nowrap
    def _score_masked(self, given: Masked, otherwise: Any, here: Applied) -> tuple[Any, Score]:
        """The given value where it is there, else the other; and the score of what results."""
        value, whole = fitted(self.label, given.value, here.template, otherwise)
        flag = flag_of(self.label, given)
        value = jnp.where(flag, value, otherwise)
        score = _sum(here.logpdf(value))
        return value, score if whole is None else jnp.where(whole | ~flag, score, -jnp.inf)

    @nn.nowrap
    def _evaluator(
        self, trace: Trace | None, untraced: str, others: Any = None
    ) -> Callable[[Any, PRNGKey, ChoiceMap, Arguments], tuple[Any, Score]]:
        return lambda params, key, choices, args: self.assess(key, choices, args)[1]


def _sum(logpdf: Any) -> Any:
    """The score of one choice, in single precision at least."""
    logpdf = logpdf if isinstance(logpdf, jax.Array) else jnp.asarray(logpdf)
    if not jnp.issubdtype(logpdf.dtype, jnp.floating) or logpdf.dtype.itemsize < 4:
        # Before the sum, which would round in half precision.
        logpdf = logpdf.astype(jnp.float32)
    return strong(jnp.sum(logpdf) if logpdf.ndim else logpdf)

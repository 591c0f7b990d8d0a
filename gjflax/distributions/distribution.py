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

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap, ValueChoiceMap, VectorChoiceMap
from gjflax.core.context import current_address
from gjflax.core.diff import Diff, no_change, unknown_change
from gjflax.core.errors import (
    ChoiceDtypeError,
    ChoiceShapeError,
    DiscreteGradientError,
    MissingChoiceError,
    NotImplementedByGenerativeFunctionError,
    UnvisitedConstraintError,
    show_address,
)
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.interface import is_tracer
from gjflax.core.pytree import static_field
from gjflax.core.selection import Selection
from gjflax.core.trace import Trace, canonical, plain, strong
from gjflax.core.typing import Arguments, PRNGKey, Score


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DistributionTrace(Trace):
    """A value drawn from, or given to, a distribution."""

    gen_fn: Any = static_field()
    args: Any
    value: Any
    score: Any

    def get_gen_fn(self) -> Any:
        return self.gen_fn

    def get_args(self) -> Arguments:
        return plain(self.args)

    def get_retval(self) -> Any:
        return self.value

    def get_score(self) -> Score:
        return self.score

    def project(self, selection: Selection) -> Score:
        return self.score if selection.includes_root else jnp.zeros(())

    def strip(self) -> ChoiceMap:
        return ValueChoiceMap(self.value)

    def leaves(self, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Trace]]:
        return [(prefix, self)]

    @property
    def is_discrete(self) -> bool:
        """Whether the value is one of a discrete distribution."""
        return not jnp.issubdtype(self.value.dtype, jnp.floating) or self.gen_fn.at(self.get_args()).is_discrete

    @property
    def is_reparameterized(self) -> bool:
        """Whether the value, as drawn, is differentiable in the distribution's arguments."""
        return self.gen_fn.at(self.get_args()).reparameterized

    def unconstrain(self, selection: Selection) -> tuple[ChoiceMap, Score]:
        if not selection.includes_root:
            return EmptyChoiceMap(), jnp.zeros(())
        bijector = self.gen_fn.require_bijector(self.get_args())
        unconstrained = bijector.inverse(self.value)
        return ValueChoiceMap(unconstrained), -_log_det(bijector, unconstrained)


class Applied:
    """A distribution at its arguments: what the interface's arithmetic needs of it."""

    is_discrete: bool = False
    reparameterized: bool = False

    @property
    def template(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a value."""
        raise NotImplementedError

    def sample(self, key: PRNGKey) -> Any:
        """A value, drawn with a typed key."""
        raise NotImplementedError

    def logpdf(self, value: Any) -> Any:
        """The log density of a value, elementwise or summed."""
        raise NotImplementedError

    def bijector(self) -> Any:
        """A TFP bijector from R^n onto the support, or None."""
        return None


class _AppliedSubclass(Applied):
    """The methods of a user's subclass of `Distribution`, at its arguments."""

    def __init__(self, distribution: Distribution, args: Arguments):
        self._distribution, self._args = distribution, args
        self.is_discrete = distribution.is_discrete
        self.reparameterized = distribution.is_reparameterized

    @property
    def template(self) -> jax.ShapeDtypeStruct:
        return jax.eval_shape(self.sample, jax.random.key(0))

    def sample(self, key: PRNGKey) -> Any:
        return self._distribution.sample(key, *self._args)

    def logpdf(self, value: Any) -> Any:
        return self._distribution.logpdf(value, *self._args)

    def bijector(self) -> Any:
        return self._distribution.bijector(*self._args)


class Distribution(GenerativeFunction):
    """Base class of distributions. Subclass it with `sample` and `logpdf`, or use `distribution`.

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
    >>> float(score)
    0.0
    """

    needs_variables = False
    is_discrete = False
    is_reparameterized = False

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
        """A TFP bijector from R^n onto the support, or None."""
        return None

    @property
    def label(self) -> str:
        """Its name in messages."""
        return type(self).__name__

    @nn.nowrap
    def at(self, args: Arguments) -> Applied:
        """The distribution at its arguments."""
        return _AppliedSubclass(self, args)

    # The interface ----------------------------------------------------------------------------------------------

    @nn.nowrap
    def simulate(self, key: PRNGKey, args: Arguments) -> tuple[PRNGKey, DistributionTrace]:
        return self._draw(key, args, self.at(args))

    @nn.nowrap
    def importance(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Score, DistributionTrace]]:
        here = self.at(args)
        if not self._is_given(choices, strict):
            key, trace = self._draw(key, args, here)
            return key, (jnp.zeros_like(trace.score), trace)
        value, score = self._score_given(choices.get_value(), here)
        return key, (score, self._trace(args, value, score))

    @nn.nowrap
    def assess(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Any, Score]]:
        if not self._is_given(choices, strict):
            raise MissingChoiceError(
                f"`assess` needs a value for every choice, and none was given for "
                f"{show_address(current_address())} ({self.label}). Give one, or use `importance`, which draws it."
            )
        return key, self._score_given(choices.get_value(), self.at(args))

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
        if self._is_given(choices, strict):
            value, score = self._score_given(choices.get_value(), self.at(args), like=old)
            retdiff, discard = unknown_change(value), ValueChoiceMap(old)
        elif Diff.is_unchanged(argdiffs):
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
        if not selection.includes_root:
            key, (retdiff, weight, trace, _) = self.update(key, trace, EmptyChoiceMap(), argdiffs)
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
                raise MissingChoiceError(
                    f"`constrain` needs {show_address(current_address())} ({self.label}), either unconstrained or `fixed`."
                )
            return fixed, jnp.zeros(())
        bijector = self.require_bijector(args)
        value = strong(unconstrained.get_value())
        return ValueChoiceMap(bijector.forward(value)), _log_det(bijector, value)

    @nn.nowrap
    def require_bijector(self, args: Arguments) -> Any:
        """The bijector from R^n onto the support.

        Raises:
          DiscreteGradientError: if the distribution is discrete.
          NotImplementedByGenerativeFunctionError: if it names no bijector.
        """
        where = f"{show_address(current_address())} ({self.label})"
        here = self.at(args)
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
            self._check_shape(value, like.value.shape)
            value, score = value.astype(like.value.dtype), score.astype(like.score.dtype)
        return key, self._trace(args, value, score)

    @nn.nowrap
    def _score_given(self, value: Any, here: Applied, like: Any = None) -> tuple[Any, Score]:
        """The given value, checked and converted, and its score."""
        value, whole = self._fit(value, here.template, like)
        score = _sum(here.logpdf(value))
        return value, score if whole is None else jnp.where(whole, score, -jnp.inf)

    @nn.nowrap
    def _is_given(self, choices: ChoiceMap, strict: bool) -> bool:
        if choices.is_empty() or (not choices.is_value() and not strict):
            return False
        if not choices.is_value():
            raise UnvisitedConstraintError(
                f"The choice at {show_address(current_address())} ({self.label}) is a single value, and the choice "
                f"map gives values below it, at {', '.join(map(show_address, choices.addresses()[:3]))}."
            )
        if isinstance(choices, VectorChoiceMap) and not isinstance(choices.static_indices, range):
            raise UnvisitedConstraintError(
                f"The choice at {show_address(current_address())} ({self.label}) is one value, so its elements cannot "
                "be given one by one. Give the whole array, or make the elements choices with `Map`."
            )
        return True

    @nn.nowrap
    def _check_shape(self, value: Any, expected: tuple[int, ...]) -> None:
        if value.shape != expected:
            raise ChoiceShapeError(
                f"The value given for {show_address(current_address())} has shape {value.shape}; {self.label} draws "
                f"{expected} at these arguments. Give a value of that shape, or map the choice with `Map`."
            )

    @nn.nowrap
    def _fit(self, value: Any, template: jax.ShapeDtypeStruct, like: Any) -> tuple[Any, Any]:
        """The value as an array of a dtype that the distribution takes.

        The second result says, of traced floats given for a discrete choice, whether all are whole; else None.
        """
        try:
            given = jnp.asarray(value)
        except (TypeError, ValueError) as error:
            raise self._dtype_error(value, type(value).__name__, template) from error
        self._check_shape(given, template.shape)
        expected = template.dtype if like is None else like.dtype
        if jnp.issubdtype(expected, jnp.floating):
            if not (jnp.issubdtype(given.dtype, jnp.floating) or jnp.issubdtype(given.dtype, jnp.integer)):
                raise self._dtype_error(value, given.dtype, template)
            if like is None and jnp.issubdtype(given.dtype, jnp.floating) and hasattr(value, "dtype"):
                # A value that is more precise than the arguments stays so: bfloat16 networks meet float32 data.
                expected = jnp.promote_types(given.dtype, expected)
        elif jnp.issubdtype(given.dtype, jnp.complexfloating):
            raise self._dtype_error(value, given.dtype, template)
        cast = lax.convert_element_type(given, expected)
        if jnp.issubdtype(expected, jnp.floating) or not jnp.issubdtype(given.dtype, jnp.floating):
            return cast, None
        # Floats for a discrete choice are exact where they are whole; where they are not their density is 0.
        whole = jnp.all(given == lax.convert_element_type(cast, given.dtype))
        if is_tracer(whole):
            return cast, whole
        if not bool(whole):
            raise self._dtype_error(value, given.dtype, template)
        return cast, None

    @nn.nowrap
    def _dtype_error(self, value: Any, dtype: Any, expected: jax.ShapeDtypeStruct) -> ChoiceDtypeError:
        return ChoiceDtypeError(
            f"The value given for {show_address(current_address())} has dtype {dtype} ({value!r:.60}); {self.label} "
            f"draws {expected.dtype}, and the one cannot stand for the other. Convert it first."
        )

    @nn.nowrap
    def _evaluator(
        self, trace: Trace | None, untraced: str, others: Any = None
    ) -> Callable[[Any, PRNGKey, ChoiceMap, Arguments], tuple[Any, Score]]:
        return lambda params, key, choices, args: self.assess(key, choices, args)[1]


def _sum(logpdf: Any) -> Any:
    """The score of one choice, in single precision at least."""
    score = jnp.sum(logpdf) if jnp.ndim(logpdf) else jnp.asarray(logpdf)
    return strong(score.astype(jnp.float32) if score.dtype in (jnp.bfloat16, jnp.float16) else score)


def _log_det(bijector: Any, unconstrained: Any) -> Any:
    event_ndims = max(jnp.ndim(unconstrained), bijector.forward_min_event_ndims)
    return jnp.sum(bijector.forward_log_det_jacobian(unconstrained, event_ndims=event_ndims))


class _FunctionDistribution(Distribution):
    """A distribution of two functions. Made by `distribution`."""

    sampler: Callable[..., Any]
    density: Callable[..., Any]
    title: str = "distribution"
    is_discrete: bool = False  # pyright: ignore[reportIncompatibleVariableOverride]
    is_reparameterized: bool = False  # pyright: ignore[reportIncompatibleVariableOverride]
    make_bijector: Callable[..., Any] | None = None

    @property
    def label(self) -> str:
        return self.title

    @nn.nowrap
    def sample(self, key: PRNGKey, *args: Any) -> Any:
        return self.sampler(key, *args)

    @nn.nowrap
    def logpdf(self, value: Any, *args: Any) -> Any:
        return self.density(value, *args)

    @nn.nowrap
    def bijector(self, *args: Any) -> Any:
        return None if self.make_bijector is None else self.make_bijector(*args)


def distribution(
    sample: Callable[..., Any],
    logpdf: Callable[..., Any],
    *,
    name: str | None = None,
    discrete: bool = False,
    reparameterized: bool = False,
    bijector: Callable[..., Any] | None = None,
) -> Distribution:
    """A distribution of a sampler and a log density.

    Args:
      sample: ``sample(key, *args)`` draws a value with a typed key.
      logpdf: ``logpdf(value, *args)`` is its log density, elementwise or summed, −inf outside the support.
      name: its name in messages; by default that of `logpdf`.
      discrete: whether its values are integers.
      reparameterized: whether `sample` may be differentiated in the arguments for a pathwise gradient. Say so only
        where that derivative is right; nothing can check it.
      bijector: ``bijector(*args)`` gives a TFP bijector from R^n onto the support.

    >>> import jax, gjflax
    >>> def sample(key, rate):
    ...     return jax.random.exponential(key, jnp.shape(rate)) / rate
    >>> def logpdf(value, rate):
    ...     return jnp.where(value < 0, -jnp.inf, jnp.log(rate) - rate * value)
    >>> waiting = gjflax.distribution(sample, logpdf, name="waiting", reparameterized=True)
    >>> _, (_, score) = waiting.assess(jax.random.key(0), 1.0, (2.0,))
    >>> round(float(score), 4)
    -1.3069
    """
    return _FunctionDistribution(
        sample,
        logpdf,
        name or getattr(logpdf, "__name__", "distribution"),
        discrete,
        reparameterized,
        bijector,
        parent=None,
    )

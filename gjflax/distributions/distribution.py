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
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap, ValueChoiceMap, VectorChoiceMap
from gjflax.core.context import current_address
from gjflax.core.diff import Diff, no_change, unknown_change
from gjflax.core.errors import (
    ArgumentError,
    ChoiceDtypeError,
    ChoiceShapeError,
    DiscreteGradientError,
    MissingChoiceError,
    NotImplementedByGenerativeFunctionError,
    SelectionError,
    UnvisitedConstraintError,
    show_address,
)
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.interface import is_tracer
from gjflax.core.masked import Masked
from gjflax.core.pytree import STATIC, Pytree
from gjflax.core.selection import Selection
from gjflax.core.trace import CallTrace, Trace, canonical, plain, strong
from gjflax.core.typing import Arguments, PRNGKey, Score
from gjflax.core.watching import watched
from gjflax.distributions.arguments import free_promotion, site, wider


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Packed(Pytree):
    """An argument that is itself a pytree, by its leaves.

    A TFP distribution looks at the shapes of its parameters whenever it is put together again, which it is at the end
    of a `jax.vmap`, where they have one more axis.
    """

    parts: tuple[Any, ...]
    structure: Any = dataclasses.field(metadata=STATIC)

    @classmethod
    def of(cls, value: Any) -> Packed:
        """The argument, packed."""
        parts, structure = jax.tree.flatten(value)
        return cls(tuple(canonical(part) for part in parts), structure)

    def value(self) -> Any:
        """The argument."""
        with free_promotion():
            return jax.tree.unflatten(self.structure, plain(self.parts))


def _unpacked(args: Any) -> Arguments:
    return tuple(arg.value() if isinstance(arg, Packed) else plain(arg) for arg in args)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DistributionTrace(CallTrace):
    """A value drawn from, or given to, a distribution."""

    value: Any
    score: Any

    def get_args(self) -> Arguments:
        return _unpacked(self.args)

    def get_retval(self) -> Any:
        return self.value

    def get_score(self) -> Score:
        return self.score

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return jnp.shape(self.score)

    def project(self, selection: Selection) -> Score:
        return self.score if _is_selected(selection, self.gen_fn.label) else jnp.zeros(())

    def strip(self) -> ChoiceMap:
        return ValueChoiceMap(self.value)

    def leaves(self, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Trace]]:
        return [(prefix, self)]

    @property
    def is_discrete(self) -> bool:
        """Whether the value is one of a discrete distribution."""
        return not jnp.issubdtype(self.value.dtype, jnp.floating) or self._of_one(lambda here: here.is_discrete)

    @property
    def is_reparameterized(self) -> bool:
        """Whether the value, as drawn, is differentiable in the distribution's arguments."""
        return self._of_one(lambda here: here.reparameterized)

    def unconstrain(self, selection: Selection) -> tuple[ChoiceMap, Score]:
        if not _is_selected(selection, self.gen_fn.label):
            return EmptyChoiceMap(), jnp.zeros(())

        def one(args: Any, value: Any) -> tuple[Any, Any]:
            bijector = self.gen_fn.require_bijector(_unpacked(args))
            with free_promotion():
                unconstrained = bijector.inverse(value)
                return unconstrained, -_log_det(bijector, unconstrained)

        unconstrained, log_det = self._over_batch(one)(self.args, self.value)
        return ValueChoiceMap(unconstrained), log_det

    def _over_batch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of one trace's parts, for the batch of traces that this is: a trace has a scalar score."""
        for _ in range(jnp.ndim(self.score)):
            function = jax.vmap(function)
        return function

    def _of_one(self, ask: Callable[[Applied], bool]) -> bool:
        """What is so of the distribution at its arguments, or in a batch of traces at those of any."""
        answers = []

        def probe(args: Any, value: Any) -> Any:
            answers.append(ask(self.gen_fn.at(_unpacked(args))))
            return value

        if jnp.ndim(self.score):
            jax.eval_shape(self._over_batch(probe), self.args, self.value)
        else:
            probe(self.args, self.value)
        return answers[0]


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
        """A bijector from R^n onto the support, with the methods of a TFP bijector; or None."""
        return None


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
        return distribution(*args, **options) if args and cls is Distribution else super().__call__(*args, **options)


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
        if not self._is_given(choices, strict):
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
        if not self._is_given(choices, strict):
            raise MissingChoiceError(
                f"`assess` needs a value for every choice, and none was given for "
                f"{site(self.label)}. Give one, or use `importance`, which draws it."
            )
        given = choices.get_value()
        if isinstance(given, Masked):
            value, score = self._score_given(given.value, self.at(args))
            # Whether the choice is there is not known now; where it is not, there is no density to give.
            return key, (value, jnp.where(self._flag(given), score, jnp.nan))
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
        if self._is_given(choices, strict):
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
        if not _is_selected(selection, self.label):
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
            self._refuse_below(unconstrained)
        template = here.template
        given = unconstrained.get_value()
        with free_promotion():
            shape = tuple(bijector.inverse_event_shape(template.shape))
            point = given.value if isinstance(given, Masked) else given
            value = self._fit_unconstrained(point, shape, template)
            constrained, log_det = strong(bijector.forward(value)), _log_det(bijector, value)
        if isinstance(given, Masked):
            return ValueChoiceMap(Masked(constrained, given.flag)), jnp.where(self._flag(given), log_det, 0)
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
    def _score_masked(self, given: Masked, otherwise: Any, here: Applied) -> tuple[Any, Score]:
        """The given value where it is there, else the other; and the score of what results."""
        value, whole = self._fit(given.value, here.template, otherwise)
        flag = self._flag(given)
        value = jnp.where(flag, value, otherwise)
        score = _sum(here.logpdf(value))
        return value, score if whole is None else jnp.where(whole | ~flag, score, -jnp.inf)

    @nn.nowrap
    def _flag(self, given: Masked) -> Any:
        flag = jnp.asarray(given.flag)
        if flag.shape:
            raise ChoiceShapeError(
                f"The flag given for {site(self.label)} has shape {flag.shape}, and the choice is one value, which is "
                "there or not. Make its elements choices with `Map`, and give a flag for each."
            )
        return flag

    @nn.nowrap
    def _is_given(self, choices: ChoiceMap, strict: bool) -> bool:
        if choices.is_empty() or (not choices.is_value() and not strict):
            return False
        if not choices.is_value():
            self._refuse_below(choices)
        if isinstance(choices, VectorChoiceMap) and not isinstance(choices.static_indices, range):
            raise UnvisitedConstraintError(
                f"The choice at {site(self.label)} is one value, so its elements cannot be given one by one. Give the "
                "whole array, or make the elements choices with `Map`."
            )
        return True

    @nn.nowrap
    def _refuse_below(self, choices: ChoiceMap) -> NoReturn:
        raise UnvisitedConstraintError(
            f"The choice at {site(self.label)} is a single value, and the choice map gives values below it, at "
            f"{', '.join(map(show_address, choices.addresses()[:3]))}."
        )

    @nn.nowrap
    def _check_shape(self, value: Any, expected: tuple[int, ...]) -> None:
        if value.shape != expected:
            raise ChoiceShapeError(
                f"The value given for {site(self.label)} has shape {value.shape}; {self.label} draws {expected} at "
                "these arguments. Give a value of that shape, map the choice with `Map`, or a batch of calls with `jax.vmap`."
            )

    @nn.nowrap
    def _fit_unconstrained(self, value: Any, shape: tuple[int, ...], template: jax.ShapeDtypeStruct) -> Any:
        """A point of R^n, checked: TFP would broadcast it against the arguments."""
        point = self._as_array(value, template)
        if point.shape != shape:
            raise ChoiceShapeError(
                f"The unconstrained value given for {site(self.label)} has shape {point.shape}; the map onto the "
                f"support takes {shape} at these arguments."
            )
        if not jnp.issubdtype(point.dtype, jnp.floating):
            if not jnp.issubdtype(point.dtype, jnp.integer):
                raise self._dtype_error(value, point.dtype, template)
            return lax.convert_element_type(point, template.dtype)
        return strong(point)

    @nn.nowrap
    def _as_array(self, value: Any, template: jax.ShapeDtypeStruct) -> Any:
        if isinstance(value, jax.Array):
            return value
        try:
            array = jnp.asarray(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise self._dtype_error(value, type(value).__name__, template) from error
        if isinstance(value, (np.ndarray, np.generic)) and jnp.issubdtype(array.dtype, jnp.integer):
            # JAX stores 64-bit integers in 32 bits, and what does not fit becomes another number.
            if not np.array_equal(np.asarray(value).astype(array.dtype), value):
                raise self._dtype_error(value, value.dtype, template)
        return array

    @nn.nowrap
    def _fit(self, value: Any, template: jax.ShapeDtypeStruct, like: Any) -> tuple[Any, Any]:
        """The value as an array of a dtype that the distribution takes.

        The second result says, of traced floats given for a discrete choice, whether all are whole; else None.
        """
        given = self._as_array(value, template)
        self._check_shape(given, template.shape)
        expected = template.dtype if like is None else like.dtype
        if given.dtype == expected:
            return strong(given), None
        if jnp.issubdtype(expected, jnp.floating):
            is_float = jnp.issubdtype(given.dtype, jnp.floating)
            if not (is_float or jnp.issubdtype(given.dtype, jnp.integer)):
                raise self._dtype_error(value, given.dtype, template)
            if like is None and is_float and hasattr(value, "dtype"):
                # A value that is more precise than the arguments stays so: bfloat16 networks meet float32 data.
                expected = wider(given.dtype, expected)
            return strong(lax.convert_element_type(given, expected)), None
        if not (
            jnp.issubdtype(given.dtype, jnp.floating)
            or jnp.issubdtype(given.dtype, jnp.integer)
            or given.dtype == jnp.bool_
        ):
            raise self._dtype_error(value, given.dtype, template)
        cast = lax.convert_element_type(given, expected)
        if given.dtype == jnp.bool_:
            return cast, None
        # What is whole and in range comes back from the cast as it was; anything else has density 0.
        whole = jnp.all(given == lax.convert_element_type(cast, given.dtype))
        if jnp.issubdtype(given.dtype, jnp.unsignedinteger):
            # A large one comes back too, by way of a negative number.
            whole = whole & jnp.all(cast >= 0)
        if is_tracer(whole):
            return cast, whole
        if not bool(whole):
            raise self._dtype_error(value, given.dtype, template)
        return cast, None

    @nn.nowrap
    def _dtype_error(self, value: Any, dtype: Any, expected: jax.ShapeDtypeStruct) -> ChoiceDtypeError:
        return ChoiceDtypeError(
            f"The value given for {site(self.label)} has dtype {dtype} ({value!r:.60}); {self.label} draws "
            f"{expected.dtype}, and the one cannot stand for the other. Convert it first."
        )

    @nn.nowrap
    def _evaluator(
        self, trace: Trace | None, untraced: str, others: Any = None
    ) -> Callable[[Any, PRNGKey, ChoiceMap, Arguments], tuple[Any, Score]]:
        return lambda params, key, choices, args: self.assess(key, choices, args)[1]


def _is_selected(selection: Selection, label: str) -> bool:
    """Whether a choice is selected.

    Raises:
      SelectionError: if the selection names elements of its value.
    """
    if selection.indices:
        named = f"the choice {site(label)}" if current_address() else f"a choice of {label}"
        raise SelectionError(
            f"The selection names elements {sorted(selection.indices)} of {named}, which is one value. "
            'Make its elements choices with `Map`; where it stands in one, the index comes before the name: (0, "y").'
        )
    return selection.includes_root


def _sum(logpdf: Any) -> Any:
    """The score of one choice, in single precision at least."""
    logpdf = logpdf if isinstance(logpdf, jax.Array) else jnp.asarray(logpdf)
    if not jnp.issubdtype(logpdf.dtype, jnp.floating) or logpdf.dtype.itemsize < 4:
        # Before the sum, which would round in half precision.
        logpdf = logpdf.astype(jnp.float32)
    return strong(jnp.sum(logpdf) if logpdf.ndim else logpdf)


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
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.density)

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
      bijector: ``bijector(*args)`` gives a bijector from R^n onto the support: one of TFP, or with its methods.

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

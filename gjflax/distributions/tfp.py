"""`TFPDistribution`: any family of TFP's JAX substrate as a generative function, TFP loaded when first needed."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gjflax.core.errors import ArgumentError, ChoiceShapeError
from gjflax.core.pytree import Const
from gjflax.core.trace import canonical
from gjflax.core.typing import Arguments, PRNGKey
from gjflax.distributions import native, support
from gjflax.distributions.arguments import as_array, float_dtype, free_promotion, is_number, site
from gjflax.distributions.distribution import Applied, Distribution

_NOT_ARRAYS = frozenset(
    {"num_steps", "num_timesteps", "dimension", "reinterpreted_batch_ndims", "initial_step", "event_ndims", "axis"}
    | {"sample_shape", "batch_shape", "with_shape", "to_shape", "concentration_shape", "sample_maximum_iterations"}
    | {"quadrature_size", "num_probit_terms_approx", "gauss_hermite_degree", "name", "dtype", "dtype_override"}
)
"""Parameters of TFP families that shape the computation, so must be known while tracing."""

_AS_GIVEN = frozenset({"samples", "outcomes"})
"""Parameters of TFP families whose dtype is that of the values, so integers stay integers."""


def _wishart(df: Any, scale: Any = None, scale_tril: Any = None) -> Any:
    """TFP's JAX substrate has the Wishart by its Cholesky factor only."""
    native.one_of("Wishart", scale, scale_tril, "`scale` or `scale_tril`")
    factor = jnp.linalg.cholesky(scale) if scale_tril is None else scale_tril
    return _tfd().WishartTriL(df, scale_tril=factor)


_BUILT_HERE: Mapping[str, Callable[..., Any]] = {"Wishart": _wishart}
"""Families that TFP's JAX substrate has not by this name."""

NATIVE: Mapping[str, Callable[..., Applied]] = {
    "Normal": native.Normal,
    "LogNormal": native.LogNormal,
    "HalfNormal": native.HalfNormal,
    "Laplace": native.Laplace,
    "Exponential": native.Exponential,
    "Uniform": native.Uniform,
    "Deterministic": native.Deterministic,
    "Bernoulli": native.Bernoulli,
    "Categorical": native.Categorical,
    "Binomial": native.Binomial,
}
"""Families that are built without TFP."""


def _tfd() -> Any:
    from tensorflow_probability.substrates import jax as tfp

    return tfp.distributions


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a TFP class, without the arguments that are arrays: ``build`` makes the distribution of those.

    Attributes:
      make: the class.
      keywords: the names of the last arguments; the others are by position.
      fixed: the other arguments by their place, which are part of the program.
      count: how many arguments there are.
    """

    make: Callable[..., Any]
    keywords: tuple[str, ...]
    fixed: tuple[tuple[int, Any], ...]
    count: int

    def build(self, values: Arguments) -> Any:
        """The TFP distribution. To be called where promotion is free."""
        fixed, rest = dict(self.fixed), iter(values)
        args = [fixed[place] if place in fixed else next(rest) for place in range(self.count)]
        split = self.count - len(self.keywords)
        return self.make(*args[:split], **dict(zip(self.keywords, args[split:], strict=True)))


def _shape_and_dtype(distribution: Any) -> jax.ShapeDtypeStruct:
    shape = tuple(distribution.batch_shape) + tuple(distribution.event_shape)
    return jax.ShapeDtypeStruct(shape, jnp.int32 if support.is_discrete(distribution) else distribution.dtype)


def _sample(distribution: Any, key: PRNGKey) -> Any:
    value = distribution.sample(seed=key)
    return lax.convert_element_type(value, jnp.int32 if support.is_discrete(distribution) else value.dtype)


def _logpdf(distribution: Any, value: Any) -> Any:
    if jnp.issubdtype(distribution.dtype, jnp.floating):
        value = lax.convert_element_type(value, jnp.promote_types(distribution.dtype, value.dtype))
    known = support.support_of(distribution)
    return distribution.log_prob(value) if known is None else known.guard(distribution.log_prob, value, distribution)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _sample_inline(call: _Call, key: PRNGKey, *values: Any) -> Any:
    with free_promotion():
        return _sample(call.build(values), key)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _logpdf_inline(call: _Call, value: Any, *values: Any) -> Any:
    with free_promotion():
        return _logpdf(call.build(values), value)


@functools.lru_cache(maxsize=4096)
def _template(call: _Call, shapes: tuple[Any, ...], default: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a value, for arrays of these shapes and dtypes and this default dtype of numbers."""
    found = []

    def probe(*values: Any) -> None:
        with free_promotion():
            found.append(_shape_and_dtype(call.build(values)))

    jax.eval_shape(probe, *(jnp.zeros((), default) if like is None else like for like in shapes))
    return found[0]


class _AppliedTFP(Applied):
    """A TFP distribution.

    Where its arguments are arrays, what is asked of it is traced once for each combination of their shapes and
    dtypes, and the distribution object is not built again; where an argument is itself a distribution, a bijector
    or a kernel, the object is built here.
    """

    def __init__(self, label: str, call: _Call, values: Arguments):
        self._label, self._call, self._values = label, call, values
        self._of_arrays = all(is_number(value) or isinstance(value, jax.Array) for value in values)

    @functools.cached_property
    def _distribution(self) -> Any:
        try:
            with free_promotion():
                distribution = self._call.build(self._values)
                _shape_and_dtype(distribution)
                return distribution
        except (ValueError, TypeError) as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> Exception:
        """The error that TFP raised while it was given its arguments, as one that says where."""
        if isinstance(error, ArgumentError | ChoiceShapeError):
            return error
        shapes = ", ".join(str(jnp.shape(value)) for value in self._values if hasattr(value, "shape"))
        text = f"The distribution of {site(self._label)} does not take these arguments, of shapes {shapes}: {error}"
        return (ChoiceShapeError if "shape" in str(error).lower() else ArgumentError)(text)

    @property
    def is_discrete(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        if not jnp.issubdtype(self.template.dtype, jnp.floating):
            return True
        # TFP has no bijector for a support that is no interval of R^n: finitely many numbers, say.
        return self.bijector() is None

    @property
    def reparameterized(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._distribution.reparameterization_type == _tfd().FULLY_REPARAMETERIZED

    @functools.cached_property
    def template(self) -> jax.ShapeDtypeStruct:  # pyright: ignore[reportIncompatibleVariableOverride]
        if not self._of_arrays:
            return _shape_and_dtype(self._distribution)
        shapes = tuple(None if is_number(v) else jax.ShapeDtypeStruct(v.shape, v.dtype) for v in self._values)
        try:
            return _template(self._call, shapes, float_dtype())
        except (ValueError, TypeError) as error:
            raise self._explained(error) from error

    def sample(self, key: PRNGKey) -> Any:
        if self._of_arrays:
            self.template  # noqa: B018 - says what is wrong with the arguments
            return _sample_inline(self._call, key, *self._values)
        with free_promotion():
            return _sample(self._distribution, key)

    def logpdf(self, value: Any) -> Any:
        if self._of_arrays:
            return _logpdf_inline(self._call, value, *self._values)
        with free_promotion():
            return _logpdf(self._distribution, value)

    def bijector(self) -> Any:
        with free_promotion():
            return self._distribution.experimental_default_event_space_bijector()


def _is_fixed(name: str, value: Any) -> bool:
    """Whether an argument is part of the program, not one of its values."""
    if name in _NOT_ARRAYS or value is None or isinstance(value, (bool, str, type, np.dtype)):
        return True
    return callable(value) and not jax.tree.leaves(value, is_leaf=lambda leaf: leaf is not value)[0] is not value


def _is_array(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_array, value))
    return isinstance(value, (jax.Array, np.ndarray, np.generic, numbers.Number)) and not isinstance(value, bool)


class TFPDistribution(Distribution):
    """A family of TFP's JAX substrate.

    Args:
      family: a class of ``tensorflow_probability.substrates.jax.distributions``, or the name of one.
      keywords: the names of the last arguments; the others are by position, in the order of the class.

    Arguments broadcast; half precision is computed in single precision. Values of discrete families are int32.
    Outside the support the score is −inf, for the families that gjflax exports by name and most others; where TFP has
    no bound on its values it is what TFP gives.

    >>> import jax, gjflax
    >>> from tensorflow_probability.substrates import jax as tfp
    >>> moyal = gjflax.TFPDistribution(tfp.distributions.Moyal)
    >>> _, (_, score) = moyal.assess(jax.random.key(0), 1.0, (0.5, 2.0))
    >>> round(float(score), 3)
    -2.126
    """

    family: Any
    keywords: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.family, str):
            if not (isinstance(self.family, type) and hasattr(self.family, "log_prob")):
                raise ArgumentError(f"`TFPDistribution` takes a TFP distribution class or its name; got {self.family!r}.")
            # A family of TFP is known by its name, so that two ways of naming it are equal and compile once.
            if getattr(_tfd(), self.family.__name__, None) is self.family:
                object.__setattr__(self, "family", self.family.__name__)
        super().__post_init__()

    @property
    def label(self) -> str:
        return self.family if isinstance(self.family, str) else self.family.__name__

    @nn.nowrap
    def by_keyword(self, *names: str) -> TFPDistribution:
        """The family with its last arguments given by name.

        >>> import jax, gjflax
        >>> coin = gjflax.Bernoulli.by_keyword("probs")
        >>> _, (_, score) = coin.assess(jax.random.key(0), 1, (0.25,))
        >>> round(float(jnp.exp(score)), 4)
        0.25
        """
        return TFPDistribution(self.family, names, parent=None)

    @nn.nowrap
    def positional(self, args: Arguments, kwargs: Mapping[str, Any]) -> tuple[Any, Arguments]:
        if not kwargs:
            return self, args
        # What was to be given by keyword already, and is not here, is by position still, after the others.
        kept = tuple(name for name in self.keywords if name not in kwargs)
        return self.by_keyword(*kept, *kwargs), (*args, *kwargs.values())

    @nn.nowrap
    def at(self, args: Arguments) -> Applied:
        split = len(args) - len(self.keywords)
        builder = NATIVE.get(self.family) if isinstance(self.family, str) else None
        if split >= 0 and builder is not None:
            try:
                return builder(*args[:split], **dict(zip(self.keywords, args[split:], strict=True)))
            except TypeError as error:
                self._check_signature(builder, args)
                raise error
        make = self._class()
        self._check_signature(make, args)
        return self._of_tfp(make, args)

    @nn.nowrap
    def stored(self, args: Arguments) -> Any:
        if isinstance(self.family, str) and self.family in NATIVE:
            return canonical(args)
        return tuple(
            Const(value) if _is_fixed(name, value) else canonical(value)
            for name, value in zip(self._names(args), args, strict=True)
        )

    @nn.nowrap
    def _of_tfp(self, make: Callable[..., Any], args: Arguments) -> Applied:
        names = self._names(args)
        fixed = {place: args[place] for place, name in enumerate(names) if _is_fixed(name, args[place])}
        floats = {}
        for place, name in enumerate(names):
            if place not in fixed and _is_array(args[place]):
                floats[place] = as_array(self.label, args[place])
        ...

    @nn.nowrap
    def _class(self) -> Any:
        if not isinstance(self.family, str):
            return self.family
        family = _BUILT_HERE.get(self.family) or getattr(_tfd(), self.family, None)
        if family is None:
            raise ArgumentError(f"TFP's JAX substrate has no distribution `{self.family}`.")
        return family

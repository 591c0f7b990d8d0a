"""`TFPDistribution`: any family of TFP's JAX substrate as a generative function, TFP loaded when first needed."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from gjflax.core.errors import ArgumentError, ChoiceShapeError, GJFlaxError
from gjflax.core.interface import is_tracer
from gjflax.core.pytree import Const
from gjflax.core.trace import canonical
from gjflax.core.typing import Arguments, PRNGKey
from gjflax.distributions import bijectors, discrete, native, support
from gjflax.distributions.applied import Applied
from gjflax.distributions.arguments import as_array, float_dtype, free_promotion, is_number, site
from gjflax.distributions.distribution import Distribution
from gjflax.distributions.packed import Packed

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
    discrete.one_of("Wishart", scale, scale_tril, "`scale` or `scale_tril`")
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
    "Bernoulli": discrete.Bernoulli,
    "Categorical": discrete.Categorical,
    "Binomial": discrete.Binomial,
    "Poisson": discrete.Poisson,
}
"""Families that are built without TFP."""


_EXCESS: Mapping[str, Callable[[Any], Any]] = {
    "Dirichlet": bijectors.simplex_excess,
    "FlatDirichlet": bijectors.simplex_excess,
    "RelaxedOneHotCategorical": bijectors.simplex_excess,
    "LKJ": bijectors.correlation_excess,
}
"""Families for which TFP's log determinant is for another measure than its density."""


@functools.cache
def _tfd() -> Any:
    with warnings.catch_warnings():
        # It looks up names that JAX has deprecated, which is its authors' concern.
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorflow_probability.substrates import jax as tfp

        return tfp.distributions


@functools.cache
def _signature(make: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(make.__init__ if isinstance(make, type) else make)
    return signature.replace(parameters=[p for p in signature.parameters.values() if p.name != "self"])


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a TFP class, without the arguments that are values: `build` makes the distribution of those.

    Attributes:
      make: the class.
      keywords: the names of the last arguments; the others are by position.
      fixed: the arguments that are part of the program, by their place.
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


def _template_of(distribution: Any) -> jax.ShapeDtypeStruct:
    dtype = distribution.dtype
    if isinstance(dtype, (list, tuple, dict)):
        raise ValueError("it draws several arrays, and a choice is one. Write a generative function with several.")
    shape = tuple(distribution.batch_shape) + tuple(distribution.event_shape)
    if support.is_whole(distribution):
        dtype = jnp.int32
    elif dtype is None:
        dtype = jax.eval_shape(lambda key: distribution.sample(seed=key), jax.random.key(0)).dtype
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _sample(distribution: Any, key: PRNGKey) -> Any:
    value = distribution.sample(seed=key)
    return lax.convert_element_type(value, jnp.int32) if support.is_whole(distribution) else value


def _logpdf(distribution: Any, value: Any) -> Any:
    if distribution.dtype is not None and jnp.issubdtype(distribution.dtype, jnp.floating):
        value = lax.convert_element_type(value, jnp.promote_types(distribution.dtype, value.dtype))
    known = support.support_of(distribution)
    return distribution.log_prob(value) if known is None else known.guard(distribution.log_prob, value, distribution)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile ``function(call, structure, *operands)``, and its derivative, under the rules of TFP.

    JAX takes the derivative of what is compiled later, under the rules of whoever asks for it, and TFP's functions of
    two arguments do not pass where ranks must agree. So it is taken here, and only in the operands that vary.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
    def primal(call: _Call, structure: Any, *operands: Any) -> Any:
        with free_promotion():
            return function(call, structure, *operands)

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def pushforward(call: _Call, structure: Any, varying: tuple[int, ...], operands: Any, tangents: Any) -> Any:
        def of_varying(*values: Any) -> Any:
            replaced = dict(zip(varying, values, strict=True))
            return function(call, structure, *(replaced.get(i, operand) for i, operand in enumerate(operands)))

        with free_promotion():
            return jax.jvp(of_varying, tuple(operands[i] for i in varying), tangents)

    @functools.partial(primal.defjvp, symbolic_zeros=True)
    def rule(call: _Call, structure: Any, operands: Any, tangents: Any) -> Any:
        varying = tuple(i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero))
        return pushforward(call, structure, varying, operands, tuple(tangents[i] for i in varying))

    return jax.jit(primal, static_argnums=(0, 1))


@_compiled
def _compiled_sample(call: _Call, structure: Any, key: PRNGKey, *leaves: Any) -> Any:
    return _sample(call.build(jax.tree.unflatten(structure, leaves)), key)


@_compiled
def _compiled_logpdf(call: _Call, structure: Any, value: Any, *leaves: Any) -> Any:
    return _logpdf(call.build(jax.tree.unflatten(structure, leaves)), value)


def _is_reparameterized(distribution: Any) -> bool:
    return distribution.reparameterization_type == _tfd().FULLY_REPARAMETERIZED


@functools.lru_cache(maxsize=4096)
def _cached_type(
    call: _Call, structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]
) -> tuple[jax.ShapeDtypeStruct, bool]:
    """The template, and whether draws are reparameterised, for values of this structure with leaves of these types."""
    found = []

    def probe(*leaves: Any) -> None:
        with free_promotion():
            distribution = call.build(jax.tree.unflatten(structure, leaves))
            found.append((_template_of(distribution), _is_reparameterized(distribution)))

    jax.eval_shape(probe, *shapes)
    return found[0]


def _may_be_traced(value: Any) -> bool:
    """Whether nothing in an argument has to be known while tracing: integers in a distribution may be shapes."""
    if isinstance(value, (jax.Array, np.ndarray)):
        return True
    leaves = jax.tree.leaves(value)
    return all(isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)


class _AppliedTFP(Applied):
    """A TFP distribution.

    Where its arguments are arrays, or distributions and kernels of arrays, what is asked of it is traced once for each
    combination of their shapes and dtypes, and the distribution object is not built again; else it is built here.
    """

    def __init__(self, label: str, call: _Call, values: Arguments):
        self._label, self._call, self._values = label, call, values
        self._compiles = all(map(_may_be_traced, values))
        self._leaves, self._structure = jax.tree.flatten(values)

    @functools.cached_property
    def _distribution(self) -> Any:
        try:
            with free_promotion():
                distribution = self._call.build(self._values)
                _template_of(distribution)
                return distribution
        except (ValueError, TypeError) as error:
            raise self._explained(error) from error

    @property
    def template(self) -> jax.ShapeDtypeStruct:
        if not self._compiles:
            with free_promotion():
                return _template_of(self._distribution)
        return self._type[0]

    @property
    def _type(self) -> tuple[jax.ShapeDtypeStruct, bool]:
        shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in self._leaves)
        try:
            return _cached_type(self._call, self._structure, shapes)
        except (ValueError, TypeError) as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> Exception:
        """What TFP raised when it was given the arguments, as an error that says where."""
        if isinstance(error, GJFlaxError):
            return error
        shapes = ", ".join(str(value.shape) for value in self._values if hasattr(value, "shape"))
        text = f"The distribution of {site(self._label)} cannot be made of these arguments (shapes {shapes}): {error}"
        return ChoiceShapeError(text) if "shape" in str(error).lower() else ArgumentError(text)

    @property
    def is_discrete(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not jnp.issubdtype(self.template.dtype, jnp.floating) or support.is_discrete(self._distribution)

    @property
    def reparameterized(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        if not self._compiles:
            return _is_reparameterized(self._distribution)
        return self._type[1]

    def sample(self, key: PRNGKey) -> Any:
        # A draw without a reparameterisation may have a derivative all the same, that of a part of it: a mixture's
        # component, say. It is not the derivative of the choice.
        if self._compiles:
            leaves = self._leaves if self.reparameterized else map(lax.stop_gradient, self._leaves)
            return _compiled_sample(self._call, self._structure, key, *leaves)
        with free_promotion():
            value = _sample(self._distribution, key)
            return value if self.reparameterized else lax.stop_gradient(value)

    def logpdf(self, value: Any) -> Any:
        if self._compiles:
            return _compiled_logpdf(self._call, self._structure, value, *self._of_one_rank())
        with free_promotion():
            return _logpdf(self._distribution, value)

    def _of_one_rank(self) -> list[Any]:
        """Arguments that broadcast against each other with equally many axes, so that any derivative finds them so."""
        shape = self.template.shape
        if all(leaf.ndim in (0, len(shape)) for leaf in self._leaves):
            return self._leaves
        try:
            if jnp.broadcast_shapes(*(leaf.shape for leaf in self._leaves)) != shape:
                return self._leaves
        except ValueError:
            return self._leaves
        return [lax.expand_dims(x, range(len(shape) - x.ndim)) if x.ndim else x for x in self._leaves]

    def bijector(self) -> Any:
        with free_promotion():
            bijector = support.bijector_of(self._distribution)
        excess = _EXCESS.get(support.name_of_events(self._distribution))
        return bijector if bijector is None or excess is None else bijectors.Measured(bijector, excess)


def _is_fixed(name: str, value: Any) -> bool:
    """Whether an argument is part of the program, not one of its values."""
    if name in _NOT_ARRAYS or value is None or isinstance(value, (bool, str, type, np.dtype)):
        return True
    # A function, but not a bijector, which can be called and is a pytree.
    return callable(value) and jax.tree_util.treedef_is_leaf(jax.tree.structure(value))


def _is_array(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_array, value))
    return isinstance(value, (jax.Array, np.ndarray, np.generic, int, float, complex)) and not isinstance(value, bool)


def _stored(value: Any) -> Any:
    return canonical(value) if _is_array(value) else Packed.of(value)


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
                raise ArgumentError(f"`TFPDistribution` takes a class of TFP or its name; got {self.family!r:.80}.")
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
        known = NATIVE.get(self.family) if isinstance(self.family, str) else None
        make = known or self._class()
        split = len(args) - len(self.keywords)
        if split < 0:
            raise self._unbound(make, f"{', '.join(self.keywords)} come by keyword, and there are {len(args)} values")
        try:
            if known is not None:
                return known(*args[:split], **dict(zip(self.keywords, args[split:], strict=True)))
            applied = self._of_tfp(make, args)
            _ = applied.template
            return applied
        except (TypeError, ValueError) as error:
            parameters = _signature(make).parameters
            unknown = [name for name in self.keywords if name not in parameters]
            if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                raise self._unbound(make, f"it has no argument `{unknown[0]}`") from error
            try:
                _signature(make).bind(*args[:split], **dict(zip(self.keywords, args[split:], strict=True)))
            except TypeError as unbound:
                raise self._unbound(make, str(unbound)) from error
            raise

    @nn.nowrap
    def stored(self, args: Arguments) -> Any:
        if isinstance(self.family, str) and self.family in NATIVE:
            return canonical(args)
        return tuple(
            Const(self._constant(name, value)) if _is_fixed(name, value) else _stored(value)
            for name, value in zip(self._names(self._class(), len(args)), args, strict=True)
        )

    @nn.nowrap
    def _of_tfp(self, make: Callable[..., Any], args: Arguments) -> _AppliedTFP:
        names = self._names(make, len(args))
        fixed = {i: self._constant(name, args[i]) for i, name in enumerate(names) if _is_fixed(name, args[i])}
        free = [i for i in range(len(args)) if i not in fixed]
        values = {i: as_array(self.label, args[i]) if _is_array(args[i]) else args[i] for i in free}
        numbers = {i for i, value in values.items() if is_number(value)}
        arrays = {i for i, value in values.items() if i not in numbers and _is_array(args[i])}
        floats = {i for i in arrays if names[i] not in _AS_GIVEN and values[i].dtype != jnp.bool_}
        # Numbers, and arrays, take the dtype of the distributions and kernels beside them.
        parts = jax.tree.leaves([values[i] for i in free if i not in arrays | numbers])
        dtype = float_dtype(*(values[i] for i in floats), *(part for part in parts if isinstance(part, jax.Array)))
        values.update({i: lax.convert_element_type(values[i], dtype) for i in floats})
        values.update({i: np.asarray(values[i], dtype) for i in numbers})
        call = _Call(make, self.keywords, tuple(fixed.items()), len(args))
        return _AppliedTFP(self.label, call, tuple(values[i] for i in free))

    @nn.nowrap
    def _constant(self, name: str, value: Any) -> Any:
        """An argument that is part of the program in a form that hashes."""
        if is_tracer(value):
            raise ArgumentError(
                f"The argument `{name}` of {site(self.label)} shapes the computation, so it must be known while "
                "tracing, and it is a traced value. Close over it instead of passing it through jit or vmap."
            )
        if isinstance(value, (jax.Array, np.ndarray)):
            value = value.tolist()
        return tuple(value) if isinstance(value, list) else value

    @nn.nowrap
    def _class(self) -> Callable[..., Any]:
        if not isinstance(self.family, str):
            return self.family
        family = _BUILT_HERE.get(self.family) or getattr(_tfd(), self.family, None)
        if family is None:
            raise ArgumentError(f"TFP's JAX substrate has no distribution `{self.family}`.")
        return family

    @nn.nowrap
    def _names(self, make: Callable[..., Any], count: int) -> tuple[str, ...]:
        """The names of the arguments, as the class calls them."""
        names = tuple(_signature(make).parameters)
        split = count - len(self.keywords)
        return (*names[:split], *("",) * max(0, split - len(names)), *self.keywords)

    @nn.nowrap
    def _unbound(self, make: Callable[..., Any], problem: str) -> ArgumentError:
        hidden = ("validate_args", "allow_nan_stats", "name")
        shown = [p.replace(annotation=p.empty) for p in _signature(make).parameters.values() if p.name not in hidden]
        return ArgumentError(
            f"The distribution of {site(self.label)} does not take these arguments: {problem}. "
            f"It takes ({', '.join(map(str, shown))})."
        )

"""`TFPDistribution`: any family of TFP's JAX substrate as a generative function, TFP loaded when first needed."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gjflax.core.errors import ArgumentError
from gjflax.core.pytree import Const
from gjflax.core.trace import canonical
from gjflax.core.typing import Arguments, PRNGKey
from gjflax.distributions import native, support
from gjflax.distributions.distribution import Applied, Distribution

_NOT_ARRAYS = frozenset(
    {"num_steps", "num_timesteps", "dimension", "reinterpreted_batch_ndims", "initial_step", "feature_ndims"}
    | {"validate_args", "allow_nan_stats", "name", "dtype", "force_probs_to_zero_outside_support"}
)
"""Parameters of TFP families that shape the computation, so must be known while tracing."""


def _wishart(df: Any, scale: Any = None, scale_tril: Any = None) -> Any:
    """TFP's JAX substrate has the Wishart by its Cholesky factor only."""
    native._one_of("Wishart", scale, scale_tril)
    factor = jnp.linalg.cholesky(scale) if scale_tril is None else scale_tril
    return _tfd().WishartTriL(df, scale_tril=factor)


@dataclasses.dataclass(frozen=True)
class Family:
    """What gjflax knows of a named family beyond TFP.

    Attributes:
      build: what makes the TFP distribution, where that is not the class of the family's name.
      native: an implementation without TFP.
      support: where the density is not 0, where TFP does not say so itself.
      is_discrete: whether values are integers.
    """

    build: Callable[..., Any] | None = None
    native: Callable[..., Applied] | None = None
    support: support.Support | None = None
    is_discrete: bool = False


FAMILIES: Mapping[str, Family] = {
    "Normal": Family(native=native.Normal),
    "LogNormal": Family(native=native.LogNormal),
    "HalfNormal": Family(native=native.HalfNormal),
    "Laplace": Family(native=native.Laplace),
    "Exponential": Family(native=native.Exponential),
    "Uniform": Family(native=native.Uniform),
    "Deterministic": Family(native=native.Deterministic),
    "Bernoulli": Family(native=native.Bernoulli, is_discrete=True),
    "Categorical": Family(native=native.Categorical, is_discrete=True),
    "Binomial": Family(native=native.Binomial, is_discrete=True),
    "HalfCauchy": Family(support=support.nonnegative),
    "Gamma": Family(support=support.nonnegative),
    "InverseGamma": Family(support=support.positive),
    "Chi2": Family(support=support.nonnegative),
    "Weibull": Family(support=support.nonnegative),
    "Beta": Family(support=support.unit_interval),
    "Kumaraswamy": Family(support=support.unit_interval),
    "Dirichlet": Family(support=support.simplex),
    "Wishart": Family(build=_wishart, support=support.positive_definite),
    "WishartTriL": Family(support=support.positive_definite),
    "CholeskyLKJ": Family(support=support.correlation_cholesky),
    "Poisson": Family(support=support.counts, is_discrete=True),
    "Geometric": Family(support=support.counts, is_discrete=True),
    "NegativeBinomial": Family(support=support.counts, is_discrete=True),
    "OneHotCategorical": Family(support=support.one_hot, is_discrete=True),
    "Multinomial": Family(support=support.fixed_total, is_discrete=True),
}


def _tfd() -> Any:
    from tensorflow_probability.substrates import jax as tfp

    return tfp.distributions


class _AppliedTFP(Applied):
    """A TFP distribution object, with what gjflax knows of its family."""

    def __init__(self, family: Family, build: Callable[[], Any]):
        with _promotion():
            self._distribution = build()
            self._shape = tuple(self._distribution.batch_shape) + tuple(self._distribution.event_shape)
        self._family = family
        self._dtype = jnp.dtype(self._distribution.dtype)

    @property
    def is_discrete(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self._family.is_discrete or not jnp.issubdtype(self._dtype, jnp.floating):
            return True
        # A mixture of Poissons, say, has floats for values; TFP says by the lack of a bijector that they are whole.
        return self.bijector() is None

    @property
    def reparameterized(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._distribution.reparameterization_type == _tfd().FULLY_REPARAMETERIZED

    @property
    def template(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self._shape, jnp.int32 if self._family.is_discrete else self._dtype)

    def sample(self, key: PRNGKey) -> Any:
        with _promotion():
            value = self._distribution.sample(seed=key)
        return lax.convert_element_type(value, self.template.dtype)

    def logpdf(self, value: Any) -> Any:
        with _promotion():
            value = lax.convert_element_type(value, jnp.promote_types(self._dtype, value.dtype))
            if self._family.support is None:
                return self._distribution.log_prob(value)
            return self._family.support.guard(self._distribution.log_prob, value, self._distribution)

    def bijector(self) -> Any:
        with _promotion():
            return self._distribution.experimental_default_event_space_bijector()


@contextlib.contextmanager
def _promotion() -> Iterator[None]:
    """TFP promotes dtypes and ranks by itself, which a user may have forbidden."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _one_dtype(names: tuple[str, ...], args: Arguments) -> Arguments:
    """The arguments that are arrays in one floating point dtype, single precision at least; the others as they are."""
    is_array = [
        name not in _NOT_ARRAYS and (isinstance(value, (int, float, list)) or hasattr(value, "dtype"))
        and not hasattr(value, "log_prob")
        for name, value in zip(names, args, strict=True)
    ]
    arrays = native.as_floats(*(jnp.asarray(v) for v, chosen in zip(args, is_array, strict=True) if chosen))
    converted = iter(arrays)
    return tuple(next(converted) if chosen else value for value, chosen in zip(args, is_array, strict=True))


class TFPDistribution(Distribution):
    """A family of TFP's JAX substrate.

    Args:
      family: a class of ``tensorflow_probability.substrates.jax.distributions``, or the name of one.
      keywords: the names of the last arguments; the others are by position, in the order of the class.

    Arguments broadcast; half precision is computed in single precision. Values of discrete families are int32. Outside
    the support the score is −inf, for the families that gjflax exports by name.

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
            # A family is known by its name, so that two ways of naming it are equal and compile once.
            if self.family.__name__ in FAMILIES and FAMILIES[self.family.__name__].build is None:
                object.__setattr__(self, "family", self.family.__name__)
        super().__post_init__()

    @property
    def label(self) -> str:
        return self.family if isinstance(self.family, str) else self.family.__name__

    @property
    def _known(self) -> Family:
        return FAMILIES.get(self.family, Family()) if isinstance(self.family, str) else Family()

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
        return self.by_keyword(*kwargs), (*args, *kwargs.values())

    @nn.nowrap
    def at(self, args: Arguments) -> Applied:
        split = len(args) - len(self.keywords)
        if split < 0:
            raise ArgumentError(f"`{self.label}` by keyword takes {', '.join(self.keywords)}; got {len(args)} arguments.")
        known = self._known
        try:
            if known.native is not None:
                return known.native(*args[:split], **dict(zip(self.keywords, args[split:], strict=True)))
            build = known.build or self._class()
            values = _one_dtype(self._names(len(args)), args)
            named = dict(zip(self.keywords, values[split:], strict=True))
            return _AppliedTFP(known, lambda: build(*values[:split], **named))
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise ArgumentError(f"`{self.label}` does not take these arguments: {error}.") from error

    @nn.nowrap
    def stored(self, args: Arguments) -> Any:
        names = self._names(len(args)) if self._known.native is None else (None,) * len(args)
        return tuple(
            Const(value) if name in _NOT_ARRAYS else canonical(value)
            for name, value in zip(names, args, strict=True)
        )

    @nn.nowrap
    def _class(self) -> Any:
        if not isinstance(self.family, str):
            return self.family
        family = getattr(_tfd(), self.family, None)
        if family is None:
            raise ArgumentError(f"TFP's JAX substrate has no distribution `{self.family}`.")
        return family

    @nn.nowrap
    def _names(self, count: int) -> tuple[str, ...]:
        """The names of the arguments, as the class calls them."""
        builder = self._known.build or self._class().__init__
        names = [name for name in inspect.signature(builder).parameters if name != "self"]
        split = count - len(self.keywords)
        return (*names[:split], *("",) * max(0, split - len(names)), *self.keywords)

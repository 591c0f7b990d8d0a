"""A model run on shapes alone: nothing is computed, and parameters need no values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import errors as flax_errors
from flax.core.scope import DenyList
from jax.tree_util import DictKey

from gjflax.core.context import top_frame
from gjflax.core.errors import ArgumentError, CalleeError, UnboundParametersError
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.masked import Masked
from gjflax.core.outline import PLATE, STEPS, Group, Site, sites
from gjflax.core.trace import Trace
from gjflax.core.watching import watching
from gjflax.language.dependency import as_given, staged_args

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class AbstractModel:
    """A model with the shapes of its variables and arguments.

    Attributes:
      module: the model, unbound.
      variables: the Flax variables, as shapes and dtypes.
      args: the arguments, as shapes and dtypes; integers, flags and what is no array are structure, as they are given.
    """

    module: GenerativeFunction
    variables: Any
    args: Any

    def simulate(self, variables: Any, key: Any, args: Any) -> Trace:
        """A trace of the model, to be called while JAX is tracing, with values of the shapes above."""
        # Rng streams that a body asks for, such as "dropout", fall back on "params".
        run = {"rngs": {"params": key}, "mutable": DenyList("params"), "method": "simulate"}
        try:
            (_, trace), _ = self.module.apply(variables, key, as_given(args), **run)
        except (flax_errors.ScopeParamNotFoundError, flax_errors.ScopeCollectionNotFound) as error:
            raise UnboundParametersError(
                f"`variables` lacks what `{type(self.module).__name__}` reads: give all collections, as `init` makes them, "
                f"or leave `variables` away. {str(error).split(' (https:')[0]}"
            ) from error
        return trace

    def named_variables(self) -> list[tuple[Path, jax.ShapeDtypeStruct]]:
        """The leaves of the variables with their paths: the collection, the modules, the name."""
        return [(_names(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(self.variables)[0]]


def abstract_model(model: Any, args: Any, variables: Mapping[str, Any] | None = None) -> AbstractModel:
    """A model with the shapes of its variables: those given, those that it is bound to, or those that `init` would make.

    Raises:
      CalleeError: if it is not a generative function.
      ArgumentError: if the arguments are not a tuple.
    """
    if not isinstance(model, GenerativeFunction):
        raise CalleeError(f"Expected a generative function, got {model!r:.80}.")
    if not isinstance(args, tuple):
        raise ArgumentError(f"`args` is a tuple, with one entry for each argument; got {type(args).__name__}.")
    module = model.as_unbound()
    staged = jax.eval_shape(lambda args: args, staged_args(args))
    if variables is None and model.scope is not None:
        variables = model.variables
    if variables is None:
        known = jax.eval_shape(lambda key, args: module.init(key, *as_given(args)), abstract_key(), staged)
    else:
        known = jax.eval_shape(lambda variables: variables, dict(variables))
    return AbstractModel(module, known, staged)


@dataclasses.dataclass(frozen=True, eq=False)
class SingleChoice:
    """What is known of a single choice.

    Attributes:
      address: where it stands.
      around: the plates, steps, switches and branches that it stands in, the outermost first.
      distribution: what its distribution is called.
      shape: the shape of its value, with the axes of the plates and steps.
      axes: how many of these there are.
      dtype: the dtype of its value.
      discrete: whether its values are.
    """

    address: tuple[Any, ...]
    around: tuple[Group, ...]
    distribution: str
    shape: tuple[int, ...]
    axes: int
    dtype: Any
    discrete: bool

    @classmethod
    def of(cls, site: Site, around: tuple[Group, ...]) -> SingleChoice:
        gen_fn, value = site.trace.get_gen_fn(), value_of(site)
        label = getattr(gen_fn, "label", type(gen_fn).__name__)
        axes = sum(group.kind in (PLATE, STEPS) for group in around)
        return cls(site.address, around, label, tuple(value.shape), axes, value.dtype, site.trace.is_discrete)


def choices_of(model: AbstractModel) -> list[SingleChoice]:
    """The single choices of a model, in the order in which they are drawn."""
    found: list[SingleChoice] = []
    drawn: dict[tuple[Any, ...], int] = {}

    def watch(draw: Any, args: Any) -> Any:
        drawn.setdefault(here(), len(drawn))
        return draw(args)

    def run(variables: Any, key: Any, args: Any) -> None:
        with watching(watch):
            parts = model.simulate(variables, key, args).outline()
        found[:] = [SingleChoice.of(site, around) for site, around in sites(parts)]

    jax.eval_shape(run, model.variables, abstract_key(), model.args)
    return sorted(found, key=lambda choice: drawn.get(choice.address, len(drawn)))


def here() -> tuple[Any, ...]:
    """The address of what is running: of a body's callee, or of the body itself."""
    frame = top_frame()
    return () if frame is None else (*frame.prefix, *(frame.visiting or ()))


def value_of(site: Site) -> Any:
    """The value of a single choice, an array."""
    value = site.trace.strip().get_value()
    return jax.tree.leaves(value.value if isinstance(value, Masked) else value)[0]


def abstract_key() -> jax.ShapeDtypeStruct:
    """A typed random key, as a shape and a dtype."""
    return jax.eval_shape(jax.random.key, 0)


def _names(path: Any) -> Path:
    """The names of a path. What is no key of a dict is a box around a variable, such as ``nn.Partitioned``."""
    return tuple(str(part.key) for part in path if isinstance(part, DictKey))

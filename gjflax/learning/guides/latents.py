r"""The choices of a model that a guide is about, and the maps between their supports and R^n.

A guide that is built from a model has the model's own addresses. What it must know of each choice is its shape, the plates
that it stands in, and the map from R^n onto its support. All of that is found by running the model once on placeholders,
without data and without parameters. Where no support depends on the arguments or on another choice, which is the rule, the
maps are then constants, and the guide never runs the model again: it samples and scores without any data. Otherwise the maps
are those of ``model.constrain``, at the arguments that the guide is called with.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import DenyList

from gjflax.core.choice_map import ChoiceMap, choice_map
from gjflax.core.context import current_address
from gjflax.core.errors import (
    ArgumentError,
    DiscreteGradientError,
    NotImplementedByGenerativeFunctionError,
    SelectionError,
    show_address,
)
from gjflax.core.outline import BRANCH, SWITCH, sites
from gjflax.core.selection import AllSelection, Selection, select
from gjflax.language.dependency import Dependency, Source, walk

Address = tuple[str, ...]
Points = dict[Address, Any]
"""Arrays by address: points of R^n, or values."""


@dataclasses.dataclass(frozen=True)
class Plate:
    """Elements that a choice stands in: where, how many there were, and of how many in all (None: these are all)."""

    address: Address
    length: int
    population: int | None


@dataclasses.dataclass(frozen=True)
class Latent:
    """A choice of the model, without the axes of its plates.

    Attributes:
      address: where it stands.
      plates: the elements around it, the outermost first: the leading axes of its value.
      shape: of the value of one element.
      point: the shape of the point of R^n that stands for the value of one element.
      dtype: of the point.
    """

    address: Address
    plates: tuple[Plate, ...]
    shape: tuple[int, ...]
    point: tuple[int, ...]
    dtype: Any

    @property
    def is_local(self) -> bool:
        """Whether it stands in a batch of a population."""
        return any(plate.population is not None for plate in self.plates)

    @property
    def rows(self) -> tuple[int, ...]:
        """The lengths of its plates, those of populations whole."""
        return tuple(plate.length if plate.population is None else plate.population for plate in self.plates)

    @property
    def size(self) -> int:
        """The number of coordinates of all elements."""
        return math.prod((*self.rows, *self.point))

    def multiplicity(self, axes: Sequence[int]) -> float:
        """How often an element's density counts where the plates have these lengths."""
        pairs = zip(self.plates, axes, strict=True)
        return math.prod(
            (plate.population / length for plate, length in pairs if plate.population is not None), start=1.0
        )


class Placeholder:
    """The types of arguments or choices as a value that hashes; what is no array is kept as it is."""

    def __init__(self, tree: Any):
        if isinstance(tree, Placeholder):
            leaves, self._structure = list(tree._leaves), tree._structure
        else:
            leaves, self._structure = jax.tree.flatten(tree)
            leaves = [_typed(leaf) for leaf in leaves]
        self._leaves: tuple[Hashable, ...] = tuple(leaves)

    def zeros(self) -> Any:
        """The tree with zeros for its arrays."""
        values = [np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, _Type) else leaf for leaf in self._leaves]
        return self._structure.unflatten(values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placeholder):
            return NotImplemented
        return (self._leaves, self._structure) == (other._leaves, other._structure)

    def __hash__(self) -> int:
        return hash((self._leaves, self._structure))

    def __repr__(self) -> str:
        return repr(self._structure.unflatten([_Shown(leaf) for leaf in self._leaves]))


@dataclasses.dataclass(frozen=True)
class _Type:
    shape: tuple[int, ...]
    dtype: Any


class _Shown:
    def __init__(self, leaf: Any):
        self._text = f"{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, _Type) else repr(leaf)

    def __repr__(self) -> str:
        return self._text


def _typed(leaf: Any) -> Any:
    if isinstance(leaf, float):
        return _Type((), jnp.dtype(jax.dtypes.canonicalize_dtype(float)))
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return _Type(tuple(leaf.shape), jnp.dtype(jax.dtypes.canonicalize_dtype(leaf.dtype)))
    return leaf


class Program:
    """A model as a field of a guide that is no submodule of it: the guide has no parameters of the model."""

    def __init__(self, model: Any):
        self.model: Any = model.model if isinstance(model, Program) else model.as_unbound()
        self._hash = hash(self.model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.model == other.model

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return repr(self.model)


@dataclasses.dataclass(frozen=True, eq=False)
class Support:
    """The constant map from R^n onto the support of a choice: of one element, or of each.

    Attributes:
      leaf: a trace of the choice, which knows its distribution and arguments; of one element, if `is_one`.
      is_one: whether the map is the same for all elements.
      is_identity: whether the support is R^n itself.
    """

    leaf: Any
    is_one: bool
    is_identity: bool = False

    def forward(self, point: Any, axes: int) -> tuple[Any, Any]:
        """The value, and log |det J| of each element."""

        def one(leaf: Any, point: Any) -> tuple[Any, Any]:
            bijector = bijector_of(leaf)
            event_ndims = max(point.ndim, bijector.forward_min_event_ndims)
            return bijector.forward(point), jnp.sum(bijector.forward_log_det_jacobian(point, event_ndims=event_ndims))

        return self._each(one, axes)(self.leaf, point)

    def inverse(self, value: Any, axes: int) -> Any:
        """The point."""
        return self._each(lambda leaf, value: bijector_of(leaf).inverse(value), axes)(self.leaf, value)

    def _each(self, function: Any, axes: int) -> Any:
        for _ in range(axes):
            function = jax.vmap(function, in_axes=(None if self.is_one else 0, 0))
        return function


def bijector_of(leaf: Any) -> Any:
    """The bijector from R^n onto the support of a choice, of the trace of one element."""
    return leaf.get_gen_fn().require_bijector(leaf.get_args())


@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """The choices that a guide is about.

    Attributes:
      model: the model, unbound.
      each: the choices, in the order of the model.
      supports: by address, where no support depends on anything; else None.
      variables: placeholders of the model's variables.
      args: placeholders of its arguments.
      depends_on_args: whether a support depends on the arguments.
    """

    model: Any
    each: tuple[Latent, ...]
    supports: Mapping[Address, Support] | None
    variables: Any
    args: Any
    depends_on_args: bool

    @property
    def size(self) -> int:
        """The number of coordinates of all choices."""
        return sum(latent.size for latent in self.each)

    @property
    def has_population(self) -> bool:
        """Whether some choices stand in a batch of a population."""
        return any(latent.is_local for latent in self.each)

    def is_unconstrained(self, address: Address) -> bool:
        """Whether the support of a choice is R^n itself."""
        return self.supports is not None and self.supports[address].is_identity

    def constrain(self, points: Points, args: Any | None) -> tuple[Points, Points]:
        """The values of points, and by address log |det J| of each element's map: with the axes of the plates."""
        if self.supports is None:
            return self._constrain_by_model(points, args)
        values, log_dets = {}, {}
        for latent in self.each:
            forward = self.supports[latent.address].forward
            values[latent.address], log_dets[latent.address] = forward(points[latent.address], len(latent.plates))
        return values, log_dets

    def unconstrain(self, values: Points, args: Any | None) -> Points:
        """The points of values."""
        if self.supports is None:
            choices, _ = self._model_trace(values, self._given(args)).unconstrain(self._selection)
            return {latent.address: choices[latent.address] for latent in self.each}
        return {
            latent.address: self.supports[latent.address].inverse(values[latent.address], len(latent.plates))
            for latent in self.each
        }

    # Supports that depend on arguments or on other choices ----------------------------------------------------------

    @property
    def _selection(self) -> Selection:
        return select([latent.address for latent in self.each])

    def _given(self, args: Any | None) -> Any:
        if args is None and self.depends_on_args:
            raise ArgumentError(
                f"The guide at {show_address(current_address())} was called without the model's arguments, on which the "
                "supports of its choices depend: call it with these (`guide_args=model_args`)."
            )
        return self.args if args is None else args

    def _model_trace(self, values: Points, args: Any) -> Any:
        """The model's trace at values; its other choices are arbitrary."""
        choices = choice_map(dict(values))
        return _run(self.model, self.variables, "importance", jax.random.key(0), choices, args)[1][1]

    def _constrain_by_model(self, points: Points, args: Any | None) -> tuple[Points, Points]:
        args = self._given(args)
        key = jax.random.key(0)
        drawn = jax.eval_shape(lambda: _run(self.model, self.variables, "simulate", key, args)[1].strip())
        fixed = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), drawn).filter(~self._selection)
        choices, _ = _run(self.model, self.variables, "constrain", choice_map(dict(points)), args, fixed=fixed)
        values = {latent.address: choices[latent.address] for latent in self.each}
        leaves = dict(self._model_trace(values, args).leaves())
        # By element, which the sum that `constrain` gives does not tell.
        log_dets = {address: -leaves[address].unconstrain(AllSelection())[1] for address in values}
        return values, log_dets


def _run(program: Any, variables: Any, method: str, *args: Any, **options: Any) -> Any:
    """A method of the model on placeholders; what it would write (running statistics) is dropped."""
    rngs = _streams(jax.random.key(0))
    result, _ = program.apply(variables, *args, method=method, rngs=rngs, mutable=DenyList("params"), **options)
    return result


def _streams(key: Any) -> dict[str, Any]:
    """Keys for the rng streams that networks have by custom: on placeholders it does not matter what is drawn."""
    return {"choice": key, "dropout": key}


def find_latents(model: Program, observed: frozenset[Address], selection: Selection, args: Placeholder) -> Latents:
    """The choices of a model that are not observed, and are selected.

    Raises:
      DiscreteGradientError: if one is discrete.
      NotImplementedByGenerativeFunctionError: if one may be absent, or its support depends on parameters or on what is observed.
      SelectionError: if there are some that are not observed, and none is selected.
    """
    return _find_latents(model, observed, selection, args)


@functools.lru_cache(maxsize=64)
def _find_latents(model: Program, observed: frozenset[Address], selection: Selection, args: Placeholder) -> Latents:
    program, zeros = model.model, args.zeros()
    with jax.ensure_compile_time_eval():
        return _found(program, observed, selection, zeros)


def _found(program: Any, observed: frozenset[Address], selection: Selection, args: Any) -> Latents:
    key = jax.random.key(0)
    variables: Any = {}
    if program.needs_variables:
        shapes = jax.eval_shape(lambda: program.init({"params": key, **_streams(key)}, *args))
        variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def run(variables: Any, args: Any) -> Any:
        return _run(program, variables, "simulate", key, args)[1]

    arrays, structure = jax.tree.flatten(args)
    dynamic = [position for position, leaf in enumerate(arrays) if isinstance(leaf, np.ndarray)]

    def with_arrays(values: Sequence[Any]) -> Any:
        leaves = list(arrays)
        for position, value in zip(dynamic, values, strict=True):
            leaves[position] = value
        return structure.unflatten(leaves)

    trace = run(variables, args)
    latents = _latents(trace, observed, selection)
    addresses = [latent.address for latent in latents]

    def images(variables: Any, values: Any, drawn: Any) -> Any:
        """One point of each choice's support, from the parameters, the arguments, and all choices."""
        _, (_, trace) = _run(program, variables, "importance", key, drawn, with_arrays(values))
        leaves = dict(trace.leaves())
        results = []
        for latent in latents:
            point = jnp.zeros((*(plate.length for plate in latent.plates), *latent.point), latent.dtype)
            results.append(Support(leaves[latent.address], False).forward(point, len(latent.plates)))
        return results

    values = [arrays[position] for position in dynamic]
    sources = _sources(images, variables, values, trace.strip())
    for address, found in zip(addresses, sources, strict=True):
        if "variable" in found:
            raise NotImplementedByGenerativeFunctionError(
                f"The support of the choice {show_address(address)} depends on parameters of the model, which a guide that is "
                "built from the model does not have. Write a guide of your own, or select other choices."
            )
        unknown = [name for name in found if isinstance(name, tuple) and name not in addresses]
        if unknown:
            raise NotImplementedByGenerativeFunctionError(
                f"The support of the choice {show_address(address)} depends on {show_address(unknown[0])}, which this guide "
                "does not draw. Write a guide of your own, or let the guide draw both."
            )
    supports = None if any(sources) else _supports(trace, latents)
    depends_on_args = any("argument" in found for found in sources)
    if supports is None and not any(sources):
        # They are constants that differ by element, and which elements a batch has is known only when it comes.
        depends_on_args = True
    return Latents(program, tuple(latents), supports, variables, args, depends_on_args)


def _latents(trace: Any, observed: frozenset[Address], selection: Selection) -> list[Latent]:
    latents: list[Latent] = []
    others: list[Address] = []
    for site, above in sites(trace.outline()):
        address = site.address
        if any(address[: len(path)] == path for path in observed):
            continue
        if address not in selection:
            others.append(address)
            continue
        if any(group.kind in (SWITCH, BRANCH) for group in above):
            raise NotImplementedByGenerativeFunctionError(
                f"The choice {show_address(address)} may be absent (it stands in a {above[-1].title}), and a guide that is built "
                "from a model has the same choices always. Write a guide for it, and combine the two by `AutoGuides`."
            )
        if site.trace.is_discrete:
            raise DiscreteGradientError(
                f"The choice {show_address(address)} is discrete, and there is no map between it and R^n. Observe it, give "
                "it a guide of its own and combine the two by `AutoGuides`, or leave it out of the selection."
            )
        plates = tuple(Plate(group.address, group.length or 0, group.population) for group in above)
        value = site.trace.get_retval()
        shape = value.shape[len(plates) :]
        point = tuple(bijector_of(_first(site.trace, len(plates))).inverse_event_shape(shape))
        latents.append(Latent(address, plates, shape, point, value.dtype))
    if others and not latents:
        raise SelectionError(
            "There is no choice for the guide: of the choices that are not observed, "
            f"{', '.join(show_address(address) for address in others)}, none is selected."
        )
    return latents


def _first(leaf: Any, axes: int) -> Any:
    """The trace of the first element of plates."""
    for _ in range(axes):
        leaf = jax.tree.map(lambda part: part[0], leaf)
    return leaf


def _supports(trace: Any, latents: Sequence[Latent]) -> Mapping[Address, Support] | None:
    """The constant maps; None where they differ by the elements of a batch of a population."""
    leaves, supports = dict(trace.leaves()), {}
    for latent in latents:
        leaf, axes = leaves[latent.address], len(latent.plates)
        one, each = Support(_first(leaf, axes), True), Support(leaf, False)
        lengths = [plate.length for plate in latent.plates]
        # Two maps of one family that agree at some points are one.
        points = jax.random.normal(jax.random.key(0), (3, *latent.point), latent.dtype)
        here = [jnp.broadcast_to(point, (*lengths, *latent.point)) for point in points]
        alike = all(
            bool(jnp.all(a == b))
            for point in here
            for a, b in zip(one.forward(point, axes), each.forward(point, axes), strict=True)
        )
        if not alike and latent.is_local:
            return None
        is_identity = alike and all(_is_same(point, *one.forward(point, 0)) for point in points)
        supports[latent.address] = dataclasses.replace(one, is_identity=is_identity) if alike else each
    return supports


def _is_same(point: Any, value: Any, log_det: Any) -> bool:
    return value.shape == point.shape and bool(jnp.all(value == point)) and bool(log_det == 0)


def _sources(function: Any, variables: Any, values: Any, choices: ChoiceMap) -> list[set[Any]]:
    """What each result of a function depends on: "variable", "argument", or addresses of choices."""
    addresses = choices.addresses()
    given = [choices[address] for address in addresses]

    def flat(variables: Any, values: Any, given: Any) -> Any:
        return function(variables, values, choice_map(dict(zip(addresses, given, strict=True))))

    jaxpr = jax.make_jaxpr(flat)(variables, values, given)
    results = jax.eval_shape(flat, variables, values, given)
    inputs = [
        *(Source("variable", (), 0) for _ in jax.tree.leaves(variables)),
        *(Source("argument", (), 0) for _ in jax.tree.leaves(values)),
        *(
            Source("choice", address, 0)
            for address, part in zip(addresses, given, strict=True)
            for _ in jax.tree.leaves(part)
        ),
    ]
    found = iter(walk(jaxpr.jaxpr, [Dependency(frozenset({source})) for source in inputs]))
    sources: list[set[Any]] = []
    for result in results:
        names: set[Any] = set()
        for _ in jax.tree.leaves(result):
            for source in next(found).sources:
                names.add(source.path if source.kind == "choice" else source.kind)
        sources.append(names)
    return sources

r"""`Map`: a generative function over the elements of its arguments, independently.

With inner density p(t; x) and n elements,

    p(t_1, …, t_n; x_1, …, x_n) = Π_i p(t_i; x_i),   retval (f(t_1, x_1), …, f(t_n, x_n)) stacked,

so scores and weights are sums over the elements. Choices are those of the inner function, with a leading axis of n.
Constraints may be given for all elements (arrays with that axis) or for some (`VectorChoiceMap` with indices).

**Minibatches.** Where the n elements are a batch from a population of N (``total=N``), the map stands for all of it:

    log p(t; x) = N/n · Σ_i log p(t_i; x_i),

so over batches drawn uniformly the score, every weight and the log |det J| of a change of variables have the
population's sums as their expectation, and so have their gradients. A model and a guide that both say ``total=N`` give
an unbiased estimate of every objective that is linear in the log weight, for choices that all elements share (outside of
the map) and for those of each element (inside). Such a map is a stand-in for a sum, not a normalised density: it serves
stochastic gradients, and weights of a sampler need all elements.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gjflax.combinators.elements import (
    assess_element,
    by_selection,
    check_selection,
    checked_weight,
    constrain_element,
    given_elements,
    importance_of_element,
    masked_elements,
    same_indices,
    simulate_element,
    split_key,
    sum_elements,
    traced_indices,
    with_options,
)
from gjflax.combinators.map_change import ElementsChange
from gjflax.core.choice_map import (
    ChoiceMap,
    EmptyChoiceMap,
    VectorChoiceMap,
    choice_map,
    vector,
)
from gjflax.core.context import current_address
from gjflax.core.diff import Diff, unknown_change
from gjflax.core.errors import ArgumentError, ChoiceMapError, SelectionError, show_address
from gjflax.core.frozen import hashable, thawed
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.in_place import chosen_leaves, remember, take_elements
from gjflax.core.lifting import share_inner_scope, vmap_module
from gjflax.core.masked import Masked, has_masked
from gjflax.core.outline import PLATE, Group, Part
from gjflax.core.pytree import STATIC
from gjflax.core.selection import Selection
from gjflax.core.trace import CallTrace, Trace, canonical, leafwise, plain, total
from gjflax.core.typing import Arguments, PRNGKey, Score


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MapTrace(CallTrace):
    """The traces of the elements, as one trace with a leading axis."""

    inner: Trace
    length: int = dataclasses.field(metadata=STATIC)

    def get_retval(self) -> Any:
        return self.inner.get_retval()

    def get_score(self) -> Score:
        return self._whole(sum_elements(self.inner.get_score()))

    def project(self, selection: Selection) -> Score:
        if not selection.mentions_indices:
            return self._whole(sum_elements(self.inner.project(selection)))
        parts = [
            self.inner.project(subselection)[..., positions]
            for subselection, positions in by_selection(selection, self.length)
            if not subselection.is_empty and jnp.ndim(self.inner.project(subselection))
        ]
        return self._whole(total([sum_elements(part) for part in parts]))

    def strip(self) -> ChoiceMap:
        return vector(range(self.length), self.inner.strip())

    def leaves(self, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Trace]]:
        """The traces of the single choices, with the scores of the elements at hand; see `multiplicity`."""
        leaves = self.inner.leaves(prefix)
        factor = self._whole(1.0)
        return leaves if factor == 1.0 else [(address, _counted(leaf, factor)) for address, leaf in leaves]

    def outline(self, prefix: tuple[Any, ...] = ()) -> tuple[Part, ...]:
        parts = self.inner.outline(prefix)
        return (Group(PLATE, prefix, type(self.gen_fn).__name__, parts, self.length, self.gen_fn.total),)

    def unconstrain(self, selection: Selection) -> tuple[ChoiceMap, Score]:
        if selection.mentions_indices:
            raise SelectionError(
                f"`unconstrain` maps the choices of all elements of a `Map`; the selection at "
                f"{show_address(current_address())} names elements {sorted(selection.indices)}."
            )
        choices, log_det = jax.vmap(lambda inner: inner.unconstrain(selection))(self.inner)
        return vector(range(self.length), choices), self._whole(sum_elements(log_det))

    def _whole(self, of_elements: Any) -> Any:
        return self.gen_fn._of_population(of_elements, self.length)

    def get_subtree(self, address: Any) -> Any:
        return self.strip().get_subtree(address)

    def chosen(self, accepted: Any, old: Any) -> Trace:
        written = getattr(self, "written", None)
        if written is None or written["old"] is not old:
            return leafwise(accepted, self, old)
        args = chosen_leaves(accepted, self.args, old.args, written["args"])
        return MapTrace(self.gen_fn, args, written["inner"].chosen(accepted, self.inner), self.length)


def multiplicity(leaf: Trace) -> float:
    """How often the score of a choice counts in the score of the trace that gave it among its ``leaves()``.

    It is N/n for a choice in a `Map` of n elements with ``total=N``, a product of these in nested maps, and else 1. The
    choice's own score stays log q of its value, which is what a score-function gradient differentiates. A JAX
    transformation of the leaf forgets it.

    >>> import gjflax, jax, jax.numpy as jnp
    >>> batch = gjflax.Map(gjflax.Normal, in_axes=(0, None), total=12)
    >>> key, tr = batch.simulate(jax.random.key(0), (jnp.arange(3.0), 1.0))
    >>> [multiplicity(leaf) for _, leaf in tr.leaves()]
    [4.0]
    """
    return getattr(leaf, "_multiplicity", 1.0)


def _counted(leaf: Trace, factor: float) -> Trace:
    counted = copy.copy(leaf)
    object.__setattr__(counted, "_multiplicity", factor * multiplicity(leaf))
    return counted


class Map(GenerativeFunction):
    """A generative function over the elements of its arguments. See the text of this file.

    Attributes:
      inner: the generative function of one element. Its parameters are those of the map: a model can be trained
        mapped and used on one element.
      in_axes: which axis of each argument is mapped, as in ``jax.vmap``: an int for all, or a tuple with an int, None
        or a pytree of these for each argument. By default axis 0 of every argument, or none where `repeats` is given.
      repeats: the number of elements, where no argument says it.
      variable_axes: axes of Flax collections, as in ``nn.vmap``: ``{"params": 0}`` gives every element parameters
        of its own. Other collections are shared.
      split_rngs: as in ``nn.vmap``. By default all streams but "params" are split; where "params" has an axis
        it must be split too.
      total: the size N of the population that the n elements are a batch of: scores and weights count N/n times. By
        default the elements are all there are.

    Raises:
      ArgumentError: if the axes do not fit the arguments, the mapped axes have different lengths, or there are more
        elements than `total`.

    >>> import gjflax, jax, jax.numpy as jnp
    >>> points = gjflax.Map(gjflax.Normal, in_axes=(0, None))
    >>> key, tr = points.simulate(jax.random.key(0), (jnp.arange(3.0), 1.0))
    >>> tr.strip()
    VectorChoiceMap
    ├── indices: i32[3]
    └── inner: f32[3]

    A batch of 3 of 12 counts four times:

    >>> batch = gjflax.Map(gjflax.Normal, in_axes=(0, None), total=12)
    >>> key, (retval, score) = batch.assess(jax.random.key(0), tr.strip(), tr.get_args())
    >>> bool(jnp.isclose(score, 4 * tr.get_score()))
    True
    """

    trace_type = MapTrace

    inner: Any
    in_axes: Any = None
    repeats: int | None = None
    variable_axes: Any = None
    split_rngs: Any = None
    total: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inner, GenerativeFunction):
            raise ArgumentError(f"`Map` maps a generative function; got {self.inner!r:.80}. Is @gen missing?")
        repeats = self.repeats
        if repeats is not None and (not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1):
            raise ArgumentError(f"`repeats` is a positive integer; got {repeats!r}.")
        size = self.total
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ArgumentError(f"`total` is the size of the population, a positive integer; got {size!r}.")
        # Lists and dicts do not hash, and a module that does not hash cannot be a static part of a trace.
        for name in ("in_axes", "variable_axes", "split_rngs"):
            object.__setattr__(self, name, hashable(getattr(self, name)))
        super().__post_init__()

    def setup(self) -> None:
        share_inner_scope(self)

    # The interface ----------------------------------------------------------------------------------------------

    def simulate(self, key: PRNGKey, args: Arguments) -> tuple[PRNGKey, MapTrace]:
        length = self._length(args)
        key, keys = split_key(key, length)
        inner = self._lifted(simulate_element, length, (0, self._axes(args)))(self.inner, keys, args)
        return key, self._trace(args, inner, length)

    def importance(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Score, MapTrace]]:
        length = self._length(args)
        key, keys = split_key(key, length)
        given, indices = given_elements(choices, length)
        if indices is not None:
            # Every element runs under the constraint that it may be given.
            given = masked_elements(given, indices, length)
        function = with_options(importance_of_element, strict)
        lifted = self._lifted(function, length, (0, 0, self._axes(args)))
        weights, inner = lifted(self.inner, keys, given, args)
        weight = checked_weight(sum_elements(weights), traced_indices(choices), length)
        return key, (self._of_population(weight, length), self._trace(args, inner, length))

    def assess(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Any, Score]]:
        length = self._length(args)
        given, indices = given_elements(choices, length)
        if indices is not None:
            raise ChoiceMapError(
                f"`assess` needs the choices of all {length} elements of {show_address(current_address())}; the "
                f"choice map gives {indices.shape[0]}, by index."
            )
        function = with_options(assess_element, strict)
        keys = jax.random.split(key, length)
        retval, scores = self._lifted(function, length, (0, 0, self._axes(args)))(self.inner, keys, given, args)
        return key, (plain(retval), self._of_population(sum_elements(scores), length))

    def update(
        self,
        key: PRNGKey,
        trace: Any,
        choices: ChoiceMap,
        argdiffs: Arguments,
        *,
        param_diff: Any = unknown_change,
        strict: bool = True,
    ) -> tuple[PRNGKey, tuple[Any, Score, MapTrace, ChoiceMap]]:
        args = Diff.primal(argdiffs)
        given, indices = given_elements(choices, self._same_length(args, trace))
        change = ElementsChange(self, trace, argdiffs, param_diff, key)
        run = {"param_diff": param_diff, "strict": strict}
        if indices is None:
            if given.is_empty() and not change.everywhere:
                if change.moved is not None:
                    change.update_some(change.moved, EmptyChoiceMap(), **run)
                discard: ChoiceMap = EmptyChoiceMap()
            else:
                discard = vector(range(trace.length), change.update_all(given, **run))
        else:
            which = choices.indices if isinstance(choices, VectorChoiceMap) else indices
            if change.everywhere or (change.moved is not None and not same_indices(change.moved, indices)):
                # In one pass: between two there would be a state with choices of its own, or of density 0.
                everywhere = change.update_all(masked_elements(given, indices, trace.length), **run)
                discard = _discarded(everywhere, given, which, indices, trace)
            else:
                discard = vector(which, change.update_some(indices, given, **run))
        retdiff, new = self._changed(change)
        weight = checked_weight(change.weight(), traced_indices(choices), trace.length)
        return change.key, (retdiff, self._of_population(weight, trace.length), new, discard)

    def regenerate(
        self,
        key: PRNGKey,
        trace: Any,
        selection: Selection,
        argdiffs: Arguments,
        *,
        param_diff: Any = unknown_change,
    ) -> tuple[PRNGKey, tuple[Any, Score, MapTrace]]:
        length = self._same_length(Diff.primal(argdiffs), trace)
        check_selection(selection, length)
        change = ElementsChange(self, trace, argdiffs, param_diff, key)
        if not selection.mentions_indices:
            change.regenerate_all(selection, param_diff)
        else:
            for subselection, positions in by_selection(selection, length):
                if not subselection.is_empty or change.everywhere or change.moved is not None:
                    change.regenerate_some(positions, subselection, param_diff)
        retdiff, new = self._changed(change)
        return change.key, (retdiff, self._of_population(change.weight(), length), new)

    def constrain(
        self, unconstrained: ChoiceMap, args: Arguments, *, fixed: ChoiceMap | None = None
    ) -> tuple[ChoiceMap, Score]:
        length = self._length(args)
        given, indices = given_elements(unconstrained, length)
        held, held_indices = given_elements(choice_map(fixed), length)
        if indices is not None or held_indices is not None:
            raise ChoiceMapError("`constrain` maps the choices of all elements of a `Map`; they were given by index.")
        choices, log_det = self._lifted(constrain_element, length, (0, 0, self._axes(args)))(
            self.inner, given, held, args
        )
        return vector(range(length), choices), self._of_population(sum_elements(log_det), length)

    @nn.nowrap
    def variables_of(self, trace: Any) -> Mapping[str, Any]:
        of_elements = self.inner.variables_of(trace.inner) if trace.length else {}
        axes = thawed(self.variable_axes) or {}
        shared = [name for name in of_elements if axes.get(name) is None]
        first = {name: jax.tree.map(lambda leaf: leaf[0], of_elements[name]) for name in shared}
        return {**of_elements, **first}

    @nn.nowrap
    def argument_names(self) -> tuple[str, ...]:
        return self.inner.argument_names()

    # Inside -----------------------------------------------------------------------------------------------------

    @nn.nowrap
    def _of_population(self, of_elements: Any, length: int) -> Any:
        """What a sum over so many elements says of all `total`."""
        if self.total is None or self.total == length:
            return of_elements
        return of_elements * (self.total / length)

    @nn.nowrap
    def _trace(self, args: Arguments, inner: Trace, length: int) -> MapTrace:
        return MapTrace(self.as_unbound(), canonical(args), inner, length)

    @nn.nowrap
    def _changed(self, change: ElementsChange) -> tuple[Any, MapTrace]:
        args, diffs = change.stored_args()
        new = MapTrace(self.as_unbound(), args, change.elements.inner, change.trace.length)
        remember(new, change.trace, args=diffs, inner=change.elements)
        return change.elements.retdiff(), new

    @nn.nowrap
    def _axes(self, args: Arguments) -> tuple[Any, ...]:
        """The mapped axis of each argument."""
        axes = thawed(self.in_axes)
        if axes is None:
            axes = 0 if self.repeats is None else None
        if axes is None or isinstance(axes, int):
            return (axes,) * len(args)
        if not isinstance(axes, tuple) or len(axes) != len(args):
            raise ArgumentError(
                f"`in_axes` of the Map at {show_address(current_address())} is {axes}, and there are {len(args)} arguments: "
                "give an int for all, or a tuple with one entry for each."
            )
        return axes

    @nn.nowrap
    def _length(self, args: Arguments) -> int:
        """The number of elements."""
        lengths: dict[str, int] = {}
        for position, (axis, argument) in enumerate(zip(self._axes(args), args, strict=True)):
            for path, leaf, leaf_axis in _mapped_leaves(axis, argument, position):
                shape = jnp.shape(leaf)
                if not -len(shape) <= leaf_axis < len(shape):
                    raise ArgumentError(
                        f"`in_axes` maps axis {leaf_axis} of argument {path}, which has shape {shape}. Broadcast it "
                        "with None in `in_axes`, or give `repeats` where no argument is mapped."
                    )
                lengths[path] = shape[leaf_axis]
        if self.repeats is not None:
            lengths["repeats"] = self.repeats
        if not lengths:
            raise ArgumentError(
                f"The Map at {show_address(current_address())} maps no argument, so its length is unknown: "
                "give `in_axes` with an axis, or `repeats`."
            )
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{path}: {length}" for path, length in lengths.items())
            raise ArgumentError(f"The mapped arguments of a Map have different lengths ({listed}).")
        length = next(iter(lengths.values()))
        if self.total is not None and length > self.total:
            raise ArgumentError(
                f"The Map at {show_address(current_address())} has {length} elements, more than the population that they "
                f"are a batch of: `total` is {self.total}. Give the number of all data points."
            )
        return length

    @nn.nowrap
    def _same_length(self, args: Arguments, trace: MapTrace) -> int:
        length = self._length(args)
        if length != trace.length:
            raise ArgumentError(
                f"The Map's trace at {show_address(current_address())} has {trace.length} elements, and its new arguments "
                f"{length}: the structure of a trace does not change. Make a new trace with `importance`."
            )
        return length

    @nn.nowrap
    def _take(self, args: Arguments, indices: Any) -> Arguments:
        """The arguments of some elements, with the elements on the mapped axis as before."""

        def take_leaf(leaf: Any, axis: int) -> Any:
            leaf = jnp.moveaxis(jnp.asarray(leaf), axis, 0)
            return jnp.moveaxis(take_elements(leaf, indices), 0, axis)

        def take(axis: Any, argument: Any) -> Any:
            if axis is None:
                return argument
            if isinstance(axis, int):
                return jax.tree.map(lambda leaf: take_leaf(leaf, axis), argument)
            return jax.tree.map(take, axis, argument, is_leaf=lambda node: node is None)

        return tuple(take(axis, argument) for axis, argument in zip(self._axes(args), args, strict=True))

    @nn.nowrap
    def _first(self, args: Arguments, axes: tuple[Any, ...]) -> Arguments:
        """The arguments of the first element."""

        def first(axis: Any, argument: Any) -> Any:
            if axis is None:
                return argument
            if isinstance(axis, int):
                return jax.tree.map(lambda leaf: jnp.take(jnp.asarray(leaf), 0, axis=axis), argument)
            return jax.tree.map(first, axis, argument, is_leaf=lambda node: node is None)

        return tuple(first(axis, argument) for axis, argument in zip(axes, args, strict=True))

    @nn.nowrap
    def _lifted(
        self, function: Callable[..., Any], length: int, in_axes: tuple[Any, ...], indices: Any = None
    ) -> Callable[..., Any]:
        """The function of one element over so many: over all, or over those at the indices."""
        if not self.inner.needs_variables:
            return lambda inner, *args: jax.vmap(
                lambda *element: function(inner, *element), in_axes=in_axes, axis_size=length
            )(*args)
        lifted = vmap_module(function, in_axes, length, thawed(self.variable_axes), thawed(self.split_rngs))
        if indices is not None:
            for name, axis in (thawed(self.variable_axes) or {}).items():
                lifted = lifted if axis is None else _with_part_of(lifted, name, axis, indices)
        return lifted


def _discarded(discard: ChoiceMap, given: ChoiceMap, which: Any, indices: Any, trace: MapTrace) -> ChoiceMap:
    """What every element discards; at the given elements alone where no other can discard anything."""
    if has_masked(trace.inner.strip()):
        return vector(range(trace.length), discard)
    part = take_elements(discard, indices)
    if not has_masked(given):
        # Indices of a map in the map are no masked values.
        part = jax.tree.map(
            lambda value: value.value if isinstance(value, Masked) else value,
            part,
            is_leaf=lambda value: isinstance(value, Masked),
        )
    return vector(which, part)


def _with_part_of(lifted: Callable[..., Any], collection: str, axis: int, indices: Any) -> Callable[..., Any]:
    """The function of a module, which sees a collection's variables of some elements only."""

    def take(variables: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.take(leaf, indices, axis=axis), variables)

    map_variables: Any = nn.map_variables
    return map_variables(lifted, collection, trans_in_fn=take)


_NOT_MAPPED = object()


def _mapped_leaves(axis: Any, argument: Any, position: int) -> list[tuple[str, Any, int]]:
    """The leaves of an argument that are mapped, with their names and axes."""
    if axis is None:
        return []
    if isinstance(axis, int):
        paths = jax.tree_util.tree_flatten_with_path(argument)[0]
        return [(f"{position}{jax.tree_util.keystr(path)}", leaf, axis) for path, leaf in paths]
    try:
        axes = jax.tree.map(
            lambda one, part: jax.tree.map(lambda _: _NOT_MAPPED if one is None else one, part),
            axis,
            argument,
            is_leaf=lambda node: node is None,
        )
    except ValueError as error:
        raise ArgumentError(f"`in_axes` does not have the structure of argument {position}: {error}") from error
    paths = jax.tree_util.tree_flatten_with_path(argument)[0]
    pairs = zip(paths, jax.tree.leaves(axes), strict=True)
    return [
        (f"{position}{jax.tree_util.keystr(path)}", leaf, one) for (path, leaf), one in pairs if one is not _NOT_MAPPED
    ]

r"""Addresses by other names: what `AddressMap` and `Inline` have in common.

Let α be a bijection from the outer addresses to the inner ones that moves whole subtrees. With inner density p(t; x) and
return value f(t, x),

    p_outer(t; x) = p(t ∘ α⁻¹; x),   retval f(t ∘ α⁻¹, x):

the choice at the outer address a is the inner one at α(a). Scores and weights are those of the inner function. So all
that happens here is that constraints and selections go in under the inner names, and choices come out under the outer ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from gjflax.combinators.named_vectors import vectors_above_names
from gjflax.core.choice_map import (
    BuiltinChoiceMap,
    ChoiceMap,
    EmptyChoiceMap,
    VectorChoiceMap,
    by_name,
    choice_map,
    vector,
)
from gjflax.core.context import current_address, renaming
from gjflax.core.diff import Diff
from gjflax.core.errors import (
    ArgumentError,
    DuplicateAddressError,
    InvalidAddressError,
    UnvisitedConstraintError,
    nearest,
    show_address,
)
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.lifting import share_inner_scope
from gjflax.core.outline import Group, Part
from gjflax.core.pytree import STATIC, static_field
from gjflax.core.selection import AllSelection, NoneSelection, Selection, select
from gjflax.core.trace import Trace, WrappedTrace
from gjflax.core.typing import Arguments, Component, PRNGKey, Score

Path = tuple[str, ...]

# The bijection ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Moves:
    """A bijection of addresses: pairs of an outer and an inner one, below which all moves. Other addresses stay."""

    pairs: tuple[tuple[Path, Path], ...]

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{show_address(new)}: {show_address(old)}" for new, old in self.pairs) + "}"

    def outer_address(self, inner: tuple[Any, ...]) -> tuple[Any, ...]:
        """The outer name of an inner address."""
        for new, old in self.pairs:
            if inner[: len(old)] == old:
                return (*new, *inner[len(old) :])
        return inner

    def parts(self, inner: tuple[Any, ...]) -> bool:
        """Whether some of what stands below an inner address moves away by itself."""
        return any(len(old) > len(inner) and old[: len(inner)] == inner for _, old in self.pairs)

    def outer(self, choices: ChoiceMap) -> ChoiceMap:
        """Choices of the inner function under their outer names."""
        return self._moved(choices, [(old, new) for new, old in self.pairs])

    def inner(self, choices: ChoiceMap, like: ChoiceMap, strict: bool = True) -> ChoiceMap:
        """Constraints under the inner function's names.

        Args:
          choices: constraints by outer address.
          like: choices of the inner function: they say where vectors are.
          strict: whether it is an error if a constraint names no choice; else those with another name here are dropped.

        Raises:
          UnvisitedConstraintError: see above.
        """
        at, staying = current_address(), self._staying(choices, outer=True)
        for new, old in self.pairs:
            stale = staying.get_subtree(old).addresses()
            if stale and strict:
                raise UnvisitedConstraintError(
                    f"A value was given for {show_address((*at, *old, *stale[0]))}, which is no choice here: it is called "
                    f"{show_address((*at, *new, *stale[0]))}. To ignore what is not used, pass strict=False."
                )
            if stale:
                choices = choices.filter(~select(old) | select(*(new for new, _ in self.pairs)))
        known = self.outer(like).addresses()
        for address in choices.addresses() if strict else ():
            # What is above or below a choice is told where that is asked for.
            if not any(_overlap(address, one) for one in known):
                raise UnvisitedConstraintError(
                    f"A value was given for {show_address((*at, *address))}, which is not a choice of this generative "
                    f"function. {nearest((*at, *address), [(*at, *one) for one in known])} To ignore what is not used, pass "
                    "strict=False."
                )
        return _with_vectors_of(like, self._moved(choices, list(self.pairs)))

    def inner_selection(self, selection: Selection) -> Selection:
        """A selection of outer addresses as one of the inner addresses."""
        if isinstance(selection, (AllSelection, NoneSelection)):
            return selection
        return _renamed(selection, tuple((old, selection[new]) for new, old in self.pairs), True)

    def check(self, choices: ChoiceMap, owner: str) -> None:
        """Whether the addresses are those of these choices of the inner function, and stay apart.

        Raises:
          ArgumentError: if an inner address has no choice at or below it, or an outer one stands in a vector.
          DuplicateAddressError: if a choice that moves would stand where one that stays does.
        """
        at, addresses = current_address(), choices.addresses()
        for new, old in self.pairs:
            if not any(address[: len(old)] == old for address in addresses):
                known = dict.fromkeys(address[: len(old)] for address in addresses)
                raise ArgumentError(
                    f"The {owner} at {show_address(at)} moves {show_address(old)} to {show_address(new)}, and the inner function "
                    f"has no choice at or below {show_address(old)}. {nearest(old, known)}"
                )
        staying = self._staying(choices, outer=False)
        for new, old in self.pairs:
            for address in staying.addresses():
                if _overlap(address, new):
                    raise DuplicateAddressError(
                        f"The {owner} at {show_address(at)} moves {show_address(old)} to {show_address(new)}, and the inner "
                        f"function has a choice at {show_address(address)}, which stays there. Give one of them another name."
                    )
            level = staying.inner if isinstance(staying, VectorChoiceMap) else staying
            if any(isinstance(level.get_subtree(new[:depth]), VectorChoiceMap) for depth in range(1, len(new))):
                raise ArgumentError(
                    f"The {owner} at {show_address(at)} moves {show_address(old)} to {show_address(new)}, which is inside a "
                    "vector of choices, and its elements have choices of their own. Move it elsewhere."
                )

    def _staying(self, choices: ChoiceMap, outer: bool) -> ChoiceMap:
        """The choices that do not move, of choices under outer or inner names."""
        return choices.filter(~select(*(new if outer else old for new, old in self.pairs)))

    def _moved(self, choices: ChoiceMap, pairs: list[tuple[Path, Path]]) -> ChoiceMap:
        """The choices with the subtrees of the pairs' first addresses at their second ones."""
        if choices.is_empty() or choices.is_value():
            return choices
        if isinstance(choices, VectorChoiceMap):
            # The elements of a map have names of their own.
            return vector(choices.indices, self._moved(choices.inner, pairs))
        result = choices.filter(~select(*(source for source, _ in pairs)))
        for source, target in pairs:
            result = result.merge(_below(target, choices.get_subtree(source)))
        return result


def moves(pairs: Mapping[Any, Any]) -> Moves:
    """The bijection of a dict from outer to inner addresses.

    Raises:
      InvalidAddressError: if something is no address.
      DuplicateAddressError: if two outer, or two inner, addresses are the same, or one is above the other.
    """
    paths = tuple((path(new), path(old)) for new, old in pairs.items())
    for kind, side in (("new", [new for new, _ in paths]), ("old", [old for _, old in paths])):
        for position, one in enumerate(side):
            for other in side[:position]:
                if _overlap(one, other):
                    raise DuplicateAddressError(
                        f"The {kind} addresses {show_address(other)} and {show_address(one)} overlap: what is below an address "
                        "moves with it, so each is named once, and none below another."
                    )
    return Moves(paths)


def path(address: Any) -> Path:
    path = address if isinstance(address, tuple) else (address,)
    if not path or not all(isinstance(part, str) and part and "/" not in part for part in path):
        raise InvalidAddressError(
            f'An address that is moved, or moved to, is a string without "/", or a tuple of such strings; got {address!r}.'
        )
    return path


def _overlap(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether one address is the other or above it."""
    return one[: len(other)] == other[: len(one)]


def _below(path: Path, choices: ChoiceMap) -> ChoiceMap:
    return EmptyChoiceMap() if choices.is_empty() else choice_map({path: choices})


def _with_vectors_of(like: ChoiceMap, choices: ChoiceMap) -> ChoiceMap:
    """Choices with vectors above names where these have them: what moved out of a map was given below its names."""
    if isinstance(like, VectorChoiceMap):
        return vectors_above_names(choices)
    if not isinstance(choices, BuiltinChoiceMap):
        return choices
    return by_name({name: _with_vectors_of(like.get_submap(name), child) for name, child in choices.children.items()})


def _renamed(staying: Selection, moved: tuple[tuple[Path, Selection], ...], is_root: bool) -> Selection:
    return _Renamed(staying, moved, is_root) if moved else staying


@dataclasses.dataclass(frozen=True, repr=False)
class _Renamed(Selection):
    """A selection of inner addresses, by outer names.

    Attributes:
      staying: what is selected of the addresses that stay.
      moved: inner addresses below which choices have moved, and what is selected there.
      is_root: whether this is the root, where the outer choices have the vectors that the inner ones have.
    """

    staying: Selection = static_field()
    moved: tuple[tuple[Path, Selection], ...] = static_field()
    is_root: bool = static_field()

    def get_subselection(self, component: Component) -> Selection:
        staying = self.staying.get_subselection(component)
        if not isinstance(component, str):
            elements = tuple((path, below.get_subselection(component)) for path, below in self.moved)
            return _renamed(staying, elements, self.is_root)
        below = tuple((path[1:], selection) for path, selection in self.moved if path[0] == component)
        if below and not below[0][0]:
            return below[0][1]
        return _renamed(staying, below, False)

    @property
    def includes_root(self) -> bool:
        return self.staying.includes_root

    @property
    def is_empty(self) -> bool:
        return self.staying.is_empty and all(selection.is_empty for _, selection in self.moved)

    @property
    def indices(self) -> frozenset[int]:
        if self.is_root:
            return self.staying.indices
        # What has moved out of a vector is told apart by element below its outer name.
        return self.staying.indices.union(*(selection.indices for _, selection in self.moved))

    @property
    def addresses(self) -> list[tuple[Component, ...]]:
        return self.staying.addresses


# Traces ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RenamedTrace(WrappedTrace):
    """The trace of the inner function, whose choices have other names."""

    gen_fn: Any = dataclasses.field(metadata=STATIC)
    inner: Trace

    @property
    def moves(self) -> Moves:
        return self.gen_fn.moves_of(self.inner.strip())

    def get_gen_fn(self) -> Any:
        return self.gen_fn

    def project(self, selection: Selection) -> Score:
        return self.inner.project(self.moves.inner_selection(selection))

    def strip(self) -> ChoiceMap:
        return self.moves.outer(self.inner.strip())

    def leaves(self, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Trace]]:
        outer = self.moves.outer_address
        return [((*prefix, *outer(address)), leaf) for address, leaf in self.inner.leaves()]

    def outline(self, prefix: tuple[Any, ...] = ()) -> tuple[Part, ...]:
        outer = self.moves.outer_address

        def part(inner: Part) -> Part:
            address = (*prefix, *outer(inner.address))
            if isinstance(inner, Group):
                return dataclasses.replace(inner, address=address, parts=tuple(map(part, inner.parts)))
            return dataclasses.replace(inner, address=address)

        return tuple(map(part, self.inner.outline()))

    def unconstrain(self, selection: Selection) -> tuple[ChoiceMap, Score]:
        moves = self.moves
        with renaming(moves.outer_address):
            choices, log_det = self.inner.unconstrain(moves.inner_selection(selection))
        return moves.outer(choices), log_det

    def get_subtree(self, address: Any) -> Any:
        components = address if isinstance(address, tuple) else (address,)
        pairs = self.moves.pairs
        for new, old in pairs:
            if components[: len(new)] == new:
                return self.inner.get_subtree((*old, *components[len(new) :]))
        if any(_overlap(components, path) for pair in pairs for path in pair):
            return self.strip().get_subtree(address)
        return self.inner.get_subtree(address)


# The combinators -------------------------------------------------------------------------------------------------------


class Renaming(GenerativeFunction):
    """Base class of combinators that give addresses other names. A subclass says which, by `moves_of`.

    Attributes:
      inner: the generative function.
    """

    trace_type = RenamedTrace

    inner: Any

    def setup(self) -> None:
        share_inner_scope(self)

    @nn.nowrap
    def moves_of(self, *choices: ChoiceMap) -> Moves:
        """The bijection for an inner function with all these choices."""
        raise NotImplementedError

    @nn.nowrap
    def outer_address(self, inner: tuple[Any, ...]) -> tuple[Any, ...]:
        """How an inner address, or a part of one, is called in messages."""
        raise NotImplementedError

    # The interface ----------------------------------------------------------------------------------------------

    def simulate(self, key: PRNGKey, args: Arguments) -> tuple[PRNGKey, RenamedTrace]:
        with self._inside():
            key, inner = self.inner.simulate(key, args)
        return key, self._trace(inner)

    def importance(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Score, RenamedTrace]]:
        given = self._given(choices, args, strict)
        with self._inside():
            key, (weight, inner) = self.inner.importance(key, given, args, strict=strict)
        return key, (weight, self._trace(inner))

    def assess(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Any, Score]]:
        given = self._given(choices, args, strict)
        with self._inside():
            return self.inner.assess(key, given, args, strict=strict)

    def update(
        self, key: PRNGKey, trace: Any, choices: ChoiceMap, argdiffs: Arguments, *, strict: bool = True, **options: Any
    ) -> tuple[PRNGKey, tuple[Any, Score, RenamedTrace, ChoiceMap]]:
        old = trace.inner.strip()
        given = self._given(choices, Diff.primal(argdiffs), strict)
        with self._inside():
            key, (retdiff, weight, inner, discard) = self.inner.update(
                key, trace.inner, given, argdiffs, strict=strict, **options
            )
        return key, (retdiff, weight, self._trace(inner), self.moves_of(old).outer(discard))

    def regenerate(
        self, key: PRNGKey, trace: Any, selection: Selection, argdiffs: Arguments, **options: Any
    ) -> tuple[PRNGKey, tuple[Any, Score, RenamedTrace]]:
        below = trace.moves.inner_selection(selection)
        with self._inside():
            key, (retdiff, weight, inner) = self.inner.regenerate(key, trace.inner, below, argdiffs, **options)
        return key, (retdiff, weight, self._trace(inner))

    def constrain(
        self, unconstrained: ChoiceMap, args: Arguments, *, fixed: ChoiceMap | None = None
    ) -> tuple[ChoiceMap, Score]:
        moves, like = self._known(args)
        given, held = moves.inner(unconstrained, like), moves.inner(choice_map(fixed), like)
        with self._inside():
            choices, log_det = self.inner.constrain(given, args, fixed=held)
        return moves.outer(choices), log_det

    @nn.nowrap
    def variables_of(self, trace: Any) -> Mapping[str, Any]:
        return self.inner.variables_of(trace.inner)

    @nn.nowrap
    def argument_names(self) -> tuple[str, ...]:
        return self.inner.argument_names()

    # Inside -----------------------------------------------------------------------------------------------------

    @nn.nowrap
    def _inside(self) -> contextlib.AbstractContextManager[Any]:
        """The context of work of the inner function, whose addresses messages call by their outer names."""
        return renaming(self.outer_address)

    @nn.nowrap
    def _trace(self, inner: Trace) -> RenamedTrace:
        choices = inner.strip()
        self.moves_of(choices).check(choices, type(self).__name__)
        return RenamedTrace(self.as_unbound(), inner)

    @nn.nowrap
    def _known(self, args: Arguments) -> tuple[Moves, ChoiceMap]:
        """The bijection at these arguments, and the types of the inner function's choices."""
        with self._inside():
            like = choices_of(self.inner.as_unbound(), args)
        moves = self.moves_of(like)
        moves.check(like, type(self).__name__)
        return moves, like

    @nn.nowrap
    def _given(self, choices: ChoiceMap, args: Arguments, strict: bool) -> ChoiceMap:
        """Constraints under the inner names."""
        if choices.is_empty():
            return choices
        moves, like = self._known(args)
        return moves.inner(choices, like, strict)

    @nn.nowrap
    def _arguments_of(self, trace: Any) -> Arguments:
        return self.inner._arguments_of(trace.inner)


# What is known before it runs ------------------------------------------------------------------------------------------


def choices_of(module: Any, args: Arguments) -> ChoiceMap:
    """The choices that an unbound generative function has at these arguments, as shapes and dtypes.

    Finding them costs as much as tracing it, so they are kept.
    """
    leaves, structure = jax.tree.flatten(args)
    kinds = tuple(_Type(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf for leaf in leaves)
    try:
        return _choices_of_once(module, structure, kinds)
    except TypeError:
        # A module with an array as a field, or an argument that does not hash. Other mistakes are made again.
        return _choices_of(module, structure, kinds)


@dataclasses.dataclass(frozen=True)
class _Type:
    shape: tuple[int, ...]
    dtype: Any


def _choices_of(module: Any, structure: Any, kinds: tuple[Any, ...]) -> ChoiceMap:
    arrays = [jax.ShapeDtypeStruct(kind.shape, kind.dtype) for kind in kinds if isinstance(kind, _Type)]

    def run(key: Any, arrays: list[Any]) -> ChoiceMap:
        given = iter(arrays)
        args = structure.unflatten([next(given) if isinstance(kind, _Type) else kind for kind in kinds])
        # Parameters have no values here, so they are made; other rng streams fall back on "params".
        (_, trace), _ = module.init_with_output(key, key, args, method="simulate")
        return trace.strip()

    return jax.eval_shape(run, jax.eval_shape(jax.random.key, 0), arrays)


_choices_of_once = functools.lru_cache(maxsize=256)(_choices_of)

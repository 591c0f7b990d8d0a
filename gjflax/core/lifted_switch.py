"""A switch between functions of one module whose results have different types.

``flax.linen.switch`` asks that all branches return the same types and make the same variables. Here every function has
a result of its own: the switch gives the results of all, those of functions that were not taken filled with zeros, or
with values that the caller names. Outside of ``jax.vmap`` only the function that is taken runs.

Each function is traced once, to a jaxpr. So its types are known before the switch is made, and the cost of tracing
nested switches grows with their number, not with two to the power of their depth. A result that only hands on what
it would be filled with does not pass through the switch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import lift
from jax import lax
from jax.core import Tracer
from jax.extend.core import Literal, jaxpr_as_fun

from gjflax.core.context import current_address
from gjflax.core.errors import BranchMismatchError, show_address
from gjflax.core.masked import where

Function = Callable[[Any, Any], tuple[Any, Any]]
"""``function(module, operands)`` gives two trees of arrays: where it is not taken, the first is filled with given
values and the second with zeros."""


def switch(
    index: Any,
    functions: Sequence[Function],
    module: Any,
    operands: Any,
    fills: Sequence[Any] | None = None,
    lifted: bool = True,
) -> list[tuple[Any, Any]]:
    """Run one of several functions of a module.

    Args:
      index: which one, an integer array without axes, in range.
      functions: see `Function`.
      module: the module; bound, if `lifted`.
      operands: a tree. Its arrays go through the switch; what else it holds is known while tracing.
      fills: for each function, what its first tree is where it is not taken, of the same types. By default the first
        trees are empty.
      lifted: whether the functions use the module's variables or rng streams.

    Returns:
      The results of all functions, filled where they were not taken. While the module is initialising all functions
      run, so that the variables of all are made. Variables that a function writes keep their old values where it is
      not taken; those that it makes are zero there.
    """
    fills = [()] * len(functions) if fills is None else fills
    if lifted and module.is_initializing():
        return _all_run(index, [function(module, operands) for function in functions], fills)

    def use(branches: list[_Branch], inputs: Any, variables: Any) -> tuple[Any, Any]:
        return _one_taken(index, branches, jax.tree.leaves(inputs), fills, variables)

    return _staged(functions, module, operands, lifted, use)


def trace_each(functions: Sequence[Function], module: Any, operands: Any, lifted: bool = True) -> None:
    """Trace functions of a module for what they note while being traced. Nothing runs and nothing is written.

    While the module is initialising they run, so that variables are made as ever.
    """
    if lifted and module.is_initializing():
        for function in functions:
            function(module, operands)
        return
    _staged(functions, module, operands, lifted, lambda branches, inputs, variables: ((), ()))


@dataclasses.dataclass(frozen=True)
class _Branch:
    """A function as a jaxpr, with the types of its results and of the variables that it may have written."""

    jaxpr: Any
    results: tuple[Any, Any]
    variables: Any

    def passes(self, position: int, inputs: list[Any]) -> Any:
        """The input or constant that an output is, or None where the function computes it."""
        output, jaxpr = self.jaxpr.jaxpr.outvars[position], self.jaxpr.jaxpr
        if isinstance(output, Literal):
            return None
        known = zip([*jaxpr.invars, *jaxpr.constvars], [*inputs, *self.jaxpr.consts], strict=True)
        return next((value for variable, value in known if variable is output), None)


def _staged(
    functions: Sequence[Function],
    module: Any,
    operands: Any,
    lifted: bool,
    use: Callable[[list[_Branch], Any, Any], tuple[Any, Any]],
) -> Any:
    """Trace the functions; `use` gets them, their inputs, and the variables as they are before."""
    leaves, structure = jax.tree.flatten(operands)
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray))]

    def rebuilt(arrays: Sequence[Any]) -> Any:
        everything = list(leaves)
        for position, array in zip(positions, arrays, strict=True):
            everything[position] = array
        return structure.unflatten(everything)

    targets = [lambda module, *arrays, f=function: f(module, rebuilt(arrays)) for function in functions]
    arrays = [leaves[position] for position in positions]
    if not lifted:
        branches = [_stage(lambda inputs, f=target: (f(module, *inputs), ()), arrays) for target in targets]
        return use(branches, arrays, ())[0]

    def transform(*arguments: Any) -> Any:
        scoped, (scopes, *arrays) = arguments[: len(targets)], arguments[len(targets) :]

        def inner(scope_fn: Any, repack_fn: Any, variables: Any, rngs: Any, *arrays: Any) -> tuple[Any, Any]:
            def pure(inputs: Any, function: Any) -> Any:
                variables, arrays = inputs
                below = scope_fn(variables, rngs)
                result = function(below, *arrays)
                return result, repack_fn(below)

            inputs = (variables, arrays)
            branches = [_stage(lambda inputs, f=function: pure(inputs, f), inputs) for function in scoped]
            return use(branches, inputs, variables)

        return lift.pack(inner, (True,), (True,), (True,), name="switch")(scopes, *arrays)

    return nn.transforms.lift_direct_transform(transform, tuple(targets), module, *arrays)


def _stage(function: Callable[[Any], Any], inputs: Any) -> _Branch:
    jaxpr, (results, variables) = jax.make_jaxpr(function, return_shape=True)(inputs)
    return _Branch(jaxpr, results, variables)


def _all_run(index: Any, results: list[tuple[Any, Any]], fills: Sequence[Any]) -> list[tuple[Any, Any]]:
    chosen = []
    for number, ((filled, zeroed), fill) in enumerate(zip(results, fills, strict=True)):
        taken = index == number
        filled = jax.tree.map(lambda leaf, other, taken=taken: where(taken, leaf, other), filled, fill)
        zeroed = jax.tree.map(lambda leaf, taken=taken: where(taken, leaf, _zeros(leaf)), zeroed)
        chosen.append((filled, zeroed))
    return chosen


# One column for each array that the switch may give: what it is in each branch ------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Output:
    """An output of a branch: its position, and its value where the branch only hands it on."""

    position: int
    passed: Any


@dataclasses.dataclass(frozen=True)
class _Given:
    """A value that is there before the switch."""

    passed: Any


@dataclasses.dataclass(frozen=True)
class _Column:
    """What an array is in each branch: a source, or None for zeros."""

    sources: list[_Output | _Given | None]
    like: Any

    def passed(self) -> Any:
        """Its value, where that is there before the switch and the same in all branches; else None."""
        values = [None if source is None else source.passed for source in self.sources]
        return values[0] if all(value is values[0] for value in values) else None


def _one_taken(
    index: Any, branches: list[_Branch], inputs: list[Any], fills: Sequence[Any], variables: Any
) -> tuple[list[tuple[Any, Any]], Any]:
    """The results of all branches, of which one runs, and the variables after it."""
    columns: list[_Column] = []
    for number, (branch, fill) in enumerate(zip(branches, fills, strict=True)):
        given = [_Given(leaf) for leaf in jax.tree.leaves(fill)]
        for position, like in enumerate(jax.tree.leaves(branch.results)):
            sources: list[Any] = [given[position] if position < len(given) else None] * len(branches)
            sources[number] = _Output(position, branch.passes(position, inputs))
            columns.append(_Column(sources, like))
    written = _union([_written(branch, inputs) for branch in branches], variables, columns, ())
    passed = [column.passed() for column in columns]
    waiting = [column for column, value in zip(columns, passed, strict=True) if value is None]

    def run(number: int) -> Callable[..., list[Any]]:
        def taken(*inputs: Any) -> list[Any]:
            outputs = jaxpr_as_fun(branches[number].jaxpr)(*inputs)
            values = []
            for column in waiting:
                source = column.sources[number]
                if isinstance(source, _Output):
                    values.append(outputs[source.position])
                else:
                    values.append(_zeros(column.like) if source is None else source.passed)
            return values

        return taken

    runs = [run(number) for number in range(len(branches))]
    if isinstance(index, Tracer):
        computed = iter(lax.switch(index, runs, *inputs))
    else:
        # An index that is known leaves nothing to choose, and outside of jit a conditional would be compiled every time.
        # Constants come out of a jaxpr as NumPy-like arrays, which would be another type to `jax.jit`.
        computed = map(jnp.asarray, runs[int(index)](*inputs))
    values = [next(computed) if value is None else value for value in passed]

    results, start = [], 0
    for branch in branches:
        end = start + len(jax.tree.leaves(branch.results))
        results.append(jax.tree.structure(branch.results).unflatten(values[start:end]))
        start = end
    return results, jax.tree.map(lambda position: values[position], written)


class _Absent:
    """A variable that a branch does not have."""


_ABSENT = _Absent()


def _written(branch: _Branch, inputs: list[Any]) -> Any:
    """The variables after a branch: at each place the output, as the only source of a column."""
    leaves, structure = jax.tree.flatten(branch.variables)
    start = len(jax.tree.leaves(branch.results))
    outputs = [_Output(position, branch.passes(position, inputs)) for position in range(start, start + len(leaves))]
    return structure.unflatten([_Column([output], like) for output, like in zip(outputs, leaves, strict=True)])


def _union(parts: list[Any], before: Any, columns: list[_Column], at: tuple[str, ...]) -> Any:
    """The variables of all branches as one tree of positions in `columns`, to which theirs are added.

    A branch that lacks a variable leaves it as it was before; it is zero if there was none.
    """
    there = [part for part in parts if part is not _ABSENT]
    if all(isinstance(part, Mapping) for part in there):
        below = before if isinstance(before, Mapping) else {}
        names = dict.fromkeys(name for part in there for name in part)
        return {
            name: _union(
                [part.get(name, _ABSENT) if part is not _ABSENT else part for part in parts],
                below.get(name, _ABSENT),
                columns,
                (*at, name),
            )
            for name in names
        }
    if all(type(part) is tuple for part in there):
        # What is sown is a tuple that gets longer.
        below = before if isinstance(before, tuple) else ()

        def entry(part: Any, position: int) -> Any:
            return part[position] if part is not _ABSENT and position < len(part) else _ABSENT

        return tuple(
            _union([entry(part, i) for part in parts], entry(below, i), columns, at)
            for i in range(max(map(len, there)))
        )
    structures = {jax.tree.structure(part) for part in there}
    types = {tuple((leaf.like.shape, leaf.like.dtype) for leaf in jax.tree.leaves(part)) for part in there}
    if len(structures) > 1 or len(types) > 1:
        raise BranchMismatchError(
            f"The branches at {show_address(current_address())} write the variable {'/'.join(at)} with different types: "
            f"{', '.join(str(jax.tree.map(lambda leaf: leaf.like, part)) for part in there)}."
        )
    structure = structures.pop()
    known = before is not _ABSENT and jax.tree.structure(before) == structure
    was = jax.tree.leaves(before) if known else None
    start = len(columns)
    for position, leaf in enumerate(jax.tree.leaves(there[0])):
        absent = None if was is None else _Given(was[position])
        sources = [absent if part is _ABSENT else jax.tree.leaves(part)[position].sources[0] for part in parts]
        columns.append(_Column(sources, leaf.like))
    return structure.unflatten(range(start, len(columns)))


def _zeros(like: Any) -> Any:
    """Zeros of a type; for a random key, the key whose data are zeros."""
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jnp.zeros(like.shape, like.dtype)
    kinds = []

    def look(key: Any) -> Any:
        kinds.append(jax.random.key_impl(key))
        return jax.random.key_data(key)

    data = jax.eval_shape(look, jax.ShapeDtypeStruct(like.shape, like.dtype))
    return jax.random.wrap_key_data(jnp.zeros(data.shape, data.dtype), impl=kinds[0])

r"""Which callee of a body depends on which: the body staged out as a jaxpr, and a walk over its equations.

Addresses are static once traced. So a body can be run with a handler that gives every callee's return value from outside,
and becomes a function

    (variables, rng streams, arguments, return values of callees)  →  (arguments of callees, return value)

without any choice in it. For every output this module finds the inputs that it depends on. One analysis, several uses:
``update`` visits only callees whose arguments may have changed; score-function gradients use only the costs downstream
of a choice; a model is drawn as a graph.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from jax.extend.core import Literal

from gjflax.core.lifting import SOWN
from gjflax.core.pytree import Pytree
from gjflax.core.trace import canonical, plain
from gjflax.language import handlers

Path = tuple[str, ...]

ARGUMENT, RETVAL, VARIABLE, RANDOM = "argument", "retval", "variable", "random"


class Source(NamedTuple):
    """An input of a body: a leaf of its arguments, of a callee's return value, of its variables, or an rng stream."""

    kind: str
    path: tuple[Any, ...]
    leaf: int


@dataclasses.dataclass(frozen=True)
class Dependency:
    """What one leaf depends on, and the input that it is, where it is one unchanged.

    Sources are of the type `Source`; a rule of `walk` may have others.
    """

    sources: frozenset[Any]
    forwards: Source | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Dependencies:
    """What the arguments of a body's callees, and its return value, depend on: leaf by leaf.

    Attributes:
      arguments: by address; the leaves are those of ``canonical(args)``.
      retval: of the body's return value, likewise.
    """

    arguments: Mapping[Path, tuple[Dependency, ...]]
    retval: tuple[Dependency, ...]

    def callees_before(self, address: Path) -> frozenset[Path]:
        """The addresses whose return values a callee's arguments depend on."""
        sources = (source for leaf in self.arguments[address] for source in leaf.sources)
        return frozenset(source.path for source in sources if source.kind == RETVAL)

    def downstream(self, address: Path) -> frozenset[Path]:
        """The address, and all whose arguments depend on it, at any distance."""
        reached = {address}
        # In the order of the body, so one pass is enough.
        for other in self.arguments:
            if self.callees_before(other) & reached:
                reached.add(other)
        return frozenset(reached)


class UnstagedError(Exception):
    """A body that does not stage out with the callees that are known; caught here."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Stage(handlers.Handler):
    """Callees do not run: their return values come from outside, and their arguments are kept."""

    key: Any
    retvals: dict[str, Any]

    def call(self, address: Path, callee: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
        name = "/".join(address)
        if name not in self.retvals:
            raise UnstagedError
        return plain(self.retvals[name]), canonical(args)

    def outcome(self) -> Any:
        return {"/".join(address): args for address, args in self._records.items()}


def dependencies_of(module: Any, args: Any, retvals: Mapping[Path, Any]) -> Dependencies | None:
    """The dependencies of a bound module's body; None where it cannot be staged out.

    Args:
      module: a `GenModule`, bound.
      args: its arguments. Integers of Python are part of the structure, which a body may branch on.
      retvals: the return values of its callees by address.
    """
    scope = module.scope
    variables = jax.tree.map(lambda leaf: leaf, dict(module.variables)) if scope is not None else {}
    streams = tuple(sorted(scope.rngs)) if scope is not None else ()
    known = {"/".join(address): canonical(retval) for address, retval in retvals.items()}
    return _staged(module.as_unbound(), variables, streams, staged_args(args), known)


def staged_args(args: Any) -> Any:
    """Arguments with integers and flags of Python as structure."""
    return jax.tree.map(
        lambda leaf: _Static(leaf) if isinstance(leaf, (int, str, bool)) or not _is_array(leaf) else leaf, args
    )


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray):
        return not leaf.dtype.hasobject
    return isinstance(leaf, (float, complex, jax.Array, np.generic, jax.ShapeDtypeStruct))


@dataclasses.dataclass(frozen=True)
class _Static(Pytree):
    value: Any = dataclasses.field(metadata={"static": True})


def _array_positions(staged: Any) -> list[int]:
    """Where the arrays among staged arguments stand in the leaves of ``canonical(args)``, in which numbers are leaves."""
    leaves = jax.tree.leaves(staged, is_leaf=lambda leaf: isinstance(leaf, _Static))
    numbers = [leaf for leaf in leaves if not isinstance(leaf, _Static) or isinstance(leaf.value, int)]
    return [position for position, leaf in enumerate(numbers) if not isinstance(leaf, _Static)]


def as_given(args: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, _Static) else leaf,
        args,
        is_leaf=lambda leaf: isinstance(leaf, _Static),
    )


def _staged(module: Any, variables: Any, streams: tuple[str, ...], args: Any, retvals: Any) -> Dependencies | None:
    leaves, structure = jax.tree.flatten((variables, args, retvals))
    shapes = tuple(
        (jnp.shape(leaf), jax.dtypes.canonicalize_dtype(jnp.result_type(leaf)) if not _is_key(leaf) else leaf.dtype)
        for leaf in leaves
    )
    try:
        hash((module, structure))
    except TypeError:
        # A module with an array or a dict in a field does not hash.
        return _analyse(module, structure, shapes, streams)
    return _analyse_once(module, structure, shapes, streams)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _analyse(module: Any, structure: Any, shapes: Any, streams: tuple[str, ...]) -> Dependencies | None:
    leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    variables, args, retvals = structure.unflatten(leaves)
    keys = {stream: jax.eval_shape(jax.random.key, 0) for stream in streams}

    def body(variables: Any, keys: Any, args: Any, retvals: Any) -> Any:
        def run(bound: Any) -> Any:
            handler = Stage(jax.random.key(0), retvals)
            return handlers.run_body(bound, handler, as_given(args))

        result, after = nn.apply(run, module, mutable=True)(variables, rngs=keys)
        if not _names(after) <= _names(variables):
            # A module of another scope, in a field: it would read its initial variables, which depend on nothing.
            raise UnstagedError
        return result

    try:
        jaxpr, outputs = jax.make_jaxpr(body, return_shape=True)(variables, keys, args, retvals)
    except Exception:
        # Whatever is wrong with the body is told where it runs in earnest.
        return None
    retval, arguments = outputs
    inputs = [
        *(Source(VARIABLE, (), position) for position, _ in enumerate(jax.tree.leaves(variables))),
        *(Source(RANDOM, (stream,), 0) for stream in keys),
        *(Source(ARGUMENT, (), position) for position in _array_positions(args)),
        *(
            Source(RETVAL, tuple(name.split("/")), position)
            for name in sorted(retvals)
            for position, _ in enumerate(jax.tree.leaves(retvals[name]))
        ),
    ]
    found = iter(walk(jaxpr.jaxpr, [Dependency(frozenset({source}), source) for source in inputs]))
    of_retval = tuple(next(found) for _ in jax.tree.leaves(retval))
    of_arguments = {name: tuple(next(found) for _ in jax.tree.leaves(arguments[name])) for name in sorted(arguments)}
    # In the order in which the body calls them, which a dict that has gone through JAX has lost.
    order = {name: position for position, name in enumerate(_order(of_arguments))}
    ordered = sorted(of_arguments, key=order.__getitem__)
    return Dependencies({tuple(name.split("/")): of_arguments[name] for name in ordered}, of_retval)


def _names(variables: Mapping[str, Any]) -> set[str]:
    """The variables by name, without what is sown."""
    kept = {name: collection for name, collection in variables.items() if name not in SOWN}
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(unfreeze(kept))[0]}


def _order(arguments: Mapping[str, tuple[Dependency, ...]]) -> list[str]:
    """The callees, each after those that it depends on."""
    before = {
        name: {"/".join(source.path) for leaf in leaves for source in leaf.sources if source.kind == RETVAL}
        for name, leaves in arguments.items()
    }
    ordered: list[str] = []

    def place(name: str) -> None:
        if name not in ordered:
            for other in sorted(before[name]):
                place(other)
            ordered.append(name)

    for name in arguments:
        place(name)
    return ordered


_analyse_once = functools.lru_cache(maxsize=512)(_analyse)

_NOTHING = Dependency(frozenset())


def dependencies_in(function: Callable[..., Any], *inputs: Any) -> tuple[Dependency, ...] | None:
    """What the leaves of ``canonical(function(*inputs))`` depend on; None where it cannot be staged out.

    Args:
      function: a pure function without choices.
      *inputs: its arguments. Their leaves are the sources: arguments, by position in ``canonical(inputs)``.
    """
    staged = staged_args(inputs)
    try:
        jaxpr = jax.make_jaxpr(lambda given: canonical(function(*as_given(given))))(staged)
    except Exception:
        # Whatever is wrong with the function is told where it runs in earnest.
        return None
    sources = [Source(ARGUMENT, (), position) for position in _array_positions(staged)]
    return tuple(walk(jaxpr.jaxpr, [Dependency(frozenset({source}), source) for source in sources]))


Rule = Callable[[Any, list[Dependency]], list[Dependency] | None]
"""The dependencies of an equation's outputs, from the equation and those of its inputs; None where it says nothing."""


def walk(jaxpr: Any, inputs: list[Dependency], rule: Rule | None = None) -> list[Dependency]:
    """The dependencies of a jaxpr's outputs, from those of its inputs. Constants depend on nothing.

    Args:
      jaxpr: the jaxpr.
      inputs: what each of its inputs depends on.
      rule: is asked first about every equation, also in jaxprs that are called.
    """
    known: dict[Any, Dependency] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Dependency:
        return _NOTHING if isinstance(atom, Literal) else known.get(atom, _NOTHING)

    for equation in jaxpr.eqns:
        before = [read(atom) for atom in equation.invars]
        inner, ruled = _called(equation), None if rule is None else rule(equation, before)
        if ruled is not None:
            after = ruled
        elif inner is not None and len(inner.invars) == len(before):
            after = walk(inner, before, rule)
        else:
            together = Dependency(frozenset().union(*(part.sources for part in before)))
            after = [together] * len(equation.outvars)
            if _is_identity(equation):
                after = [before[0]]
        known.update(zip(equation.outvars, after, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _called(equation: Any) -> Any:
    """The jaxpr that an equation calls once, with its inputs as they stand."""
    if equation.primitive.name not in (
        "pjit",
        "jit",
        "closed_call",
        "core_call",
        "remat",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
    ):
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(name)
        if inner is not None:
            return getattr(inner, "jaxpr", inner)
    return None


def _is_identity(equation: Any) -> bool:
    """Whether an equation gives its input back, as conversions to the dtype that it has already do."""
    if equation.primitive.name not in ("convert_element_type", "copy", "copy_p"):
        return False
    source, result = equation.invars[0], equation.outvars[0]
    return source.aval.shape == result.aval.shape and source.aval.dtype == result.aval.dtype

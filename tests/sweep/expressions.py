"""Values between choices: a small language of types and expressions, read by two interpreters.

A program of the sweep computes its distributions' arguments from earlier values. The same expression is evaluated by
JAX, inside of the generative function, and by NumPy in float64, inside of the oracle. Every expression is bounded or
has a slope of at most 1, so float32 loses no more than its own precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gjflax

Path = tuple[Any, ...]

# Types ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array.

    Attributes:
      shape: its shape.
      domain: "real", "wild" (real with heavy tails), "positive", "unit", "lower" and "covariance" (a factor or a
        covariance matrix), "simplex"; and the discrete "whole", "index" (below `size`) and "flag".
      size: how many values an index has.
    """

    shape: tuple[int, ...] = ()
    domain: str = "real"
    size: int = 0

    @property
    def is_discrete(self) -> bool:
        return self.domain in ("whole", "index", "flag")

    def mapped(self, length: int, axis: int = 0) -> Array:
        """The type of so many, stacked."""
        return dataclasses.replace(self, shape=(*self.shape[:axis], length, *self.shape[axis:]))


@dataclasses.dataclass(frozen=True)
class Record:
    """The type of a dict."""

    fields: tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Maybe:
    """The type of a value that may be absent, by a flag that has the axes of the vectors that it stands in."""

    of: Any


Type = Any
"""An `Array`, a `Record`, a `Maybe`, or a tuple of types."""

REAL = Array()


def leaves(kind: Type, path: Path = ()) -> list[tuple[Path, Array]]:
    """The arrays of a type, with their paths. Nothing can be said of what may be absent."""
    if isinstance(kind, Maybe):
        return []
    if isinstance(kind, Array):
        return [(path, kind)]
    if isinstance(kind, Record):
        return [leaf for name, field in kind.fields for leaf in leaves(field, (*path, name))]
    return [leaf for place, part in enumerate(kind) for leaf in leaves(part, (*path, place))]


def map_type(function: Callable[[Array], Any], kind: Type) -> Any:
    """A function of every array of a type; a record becomes one of the results."""
    if isinstance(kind, Array):
        return function(kind)
    if isinstance(kind, Maybe):
        return Maybe(map_type(function, kind.of))
    if isinstance(kind, Record):
        return Record(tuple((name, map_type(function, field)) for name, field in kind.fields))
    return tuple(map_type(function, part) for part in kind)


def has_maybe(kind: Type) -> bool:
    """Whether something of the type may be absent."""
    if isinstance(kind, Maybe):
        return True
    if isinstance(kind, Record):
        return any(has_maybe(field) for _, field in kind.fields)
    return isinstance(kind, tuple) and any(map(has_maybe, kind))


def certain(kind: Type) -> Type:
    """The type of what `unmasked` makes of it."""
    if isinstance(kind, Array):
        return kind
    if isinstance(kind, Maybe):
        return certain(kind.of)
    if isinstance(kind, Record):
        return Record(tuple((name, certain(field)) for name, field in kind.fields))
    return tuple(map(certain, kind))


def zeros(kind: Type) -> Any:
    """Zeros of a type, as NumPy has them."""
    if isinstance(kind, Array):
        dtype = bool if kind.domain == "flag" else np.int64 if kind.is_discrete else np.float64
        return np.zeros(kind.shape, dtype)
    if isinstance(kind, Record):
        return {name: zeros(field) for name, field in kind.fields}
    return tuple(map(zeros, kind))


# Values that may be absent -------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Possibly:
    """The oracle's value of type `Maybe`. Where it is absent, it is zero."""

    value: Any
    flag: Any

    def unmask(self, default: Any) -> Any:
        return jax.tree.map(lambda leaf, other: np.where(_leading(self.flag, leaf), leaf, other), self.value, default)


def _leading(flag: Any, leaf: Any) -> Any:
    """A flag with the leading axes of a value, so that it broadcasts against it."""
    flag = np.asarray(flag)
    return flag.reshape(flag.shape + (1,) * (np.ndim(leaf) - flag.ndim))


def unmasked(tree: Any) -> Any:
    """The tree with numbers where values are absent: 0.25 for floats, else zero."""

    def default(leaf: Any) -> Any:
        kind = np.dtype(leaf.dtype).kind
        return False if kind == "b" else 0 if kind in "iu" else 0.25

    def known(part: Any) -> Any:
        return part.unmask(jax.tree.map(default, part.value)) if _may_be_absent(part) else part

    return jax.tree.map(known, tree, is_leaf=_may_be_absent)


def as_possibly(tree: Any) -> Any:
    """A tree of gjflax with values that may be absent as the oracle has them."""

    def convert(part: Any) -> Any:
        if not _may_be_absent(part):
            return part
        flag = np.asarray(part.flag)
        masked = lambda leaf: np.where(_leading(flag, leaf), leaf, np.zeros_like(leaf))
        return Possibly(jax.tree.map(masked, part.value), flag)

    return jax.tree.map(convert, tree, is_leaf=_may_be_absent)


def _may_be_absent(part: Any) -> bool:
    return isinstance(part, (gjflax.Masked, Possibly))


# Number systems ------------------------------------------------------------------------------------------------------


class Jax:
    """Evaluation by JAX, in its default precision."""

    numpy: Any = jnp

    @staticmethod
    def constant(value: Any) -> Any:
        """Numbers stay numbers, and are weakly typed; arrays have the default dtype."""
        if not isinstance(value, tuple):
            return value
        array = np.asarray(value)
        return jnp.asarray(array, {"f": jnp.result_type(float), "b": bool}.get(array.dtype.kind, jnp.int32))

    @staticmethod
    def real(value: Any) -> Any:
        array = jnp.asarray(value)
        return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.result_type(float))

    @staticmethod
    def whole(value: Any) -> Any:
        return jnp.asarray(value, jnp.int32)


class Float64:
    """Evaluation by NumPy, in float64."""

    numpy: Any = np

    @staticmethod
    def constant(value: Any) -> Any:
        return np.asarray(value)

    @staticmethod
    def real(value: Any) -> Any:
        return np.asarray(value, np.float64)

    @staticmethod
    def whole(value: Any) -> Any:
        return np.asarray(value, np.int64)


# Expressions ---------------------------------------------------------------------------------------------------------


def number(value: Any) -> str:
    """A number, or nested tuple of numbers, as it is written."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(number, value)) + "]"
    return repr(value)


class Expression:
    """Something that can be computed from named values."""

    def evaluate(self, values: dict[str, Any], system: Any) -> Any:
        raise NotImplementedError

    def show(self) -> str:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Constant(Expression):
    value: Any

    def evaluate(self, values: dict[str, Any], system: Any) -> Any:
        return system.constant(self.value)

    def show(self) -> str:
        return number(self.value)


@dataclasses.dataclass(frozen=True)
class Variable(Expression):
    """A named value, or a part of it."""

    name: str
    path: Path = ()

    def evaluate(self, values: dict[str, Any], system: Any) -> Any:
        value = values[self.name]
        for component in self.path:
            value = value[component]
        return value

    def show(self) -> str:
        return self.name + "".join(f"[{component!r}]" for component in self.path)


@dataclasses.dataclass(frozen=True)
class Entry(Expression):
    """One number of an array, as a real."""

    of: Expression
    at: tuple[int, ...]

    def evaluate(self, values: dict[str, Any], system: Any) -> Any:
        value = system.real(self.of.evaluate(values, system))
        return value[self.at] if self.at else value

    def show(self) -> str:
        return self.of.show() + (f"[{', '.join(map(str, self.at))}]" if self.at else "")


@dataclasses.dataclass(frozen=True)
class Mean(Expression):
    """The mean of an array's numbers."""

    of: Expression

    def evaluate(self, values: dict[str, Any], system: Any) -> Any:
        return system.numpy.mean(system.real(self.of.evaluate(values, system)))

    def show(self) -> str:
        return f"mean({self.of.show()})"


@dataclasses.dataclass(frozen=True)
class Squashed(Expression):
    """tanh of a number: between −1 and 1."""

    of: Expression

    def evaluate(self, values: dict[str, Any], system: Any) -> Any:
        return system.numpy.tanh(self.of.evaluate(values, system))

    def show(self) -> str:
        return f"tanh({self.of.show()})"


@dataclasses.dataclass(frozen=True)
class Affine(Expression):
    """base + slope x, with numbers or arrays of one shape."""

    base: Any
    slope: Any
    of: Expression

    def evaluate(self, values: dict[str, Any], system: Any) -> Any:
        return system.constant(self.base) + system.constant(self.slope) * self.of.evaluate(values, system)

    def show(self) -> str:
        return f"({number(self.base)} + {number(self.slope)} * {self.of.show()})"


@dataclasses.dataclass(frozen=True)
class Times(Expression):
    """A constant, e to the power of a bounded number: positive where the constant is."""

    constant: Any
    power: Expression

    def evaluate(self, values: dict[str, Any], system: Any) -> Any:
        return system.constant(self.constant) * system.numpy.exp(self.power.evaluate(values, system))

    def show(self) -> str:
        return f"{number(self.constant)} * exp({self.power.show()})"


@dataclasses.dataclass(frozen=True)
class Exceeds(Expression):
    """Whether a number that is the same in all number systems exceeds a threshold: of a choice, no result."""

    of: Expression
    threshold: float

    def evaluate(self, values: dict[str, Any], system: Any) -> Any:
        return system.real(self.of.evaluate(values, system)) > self.threshold

    def show(self) -> str:
        return f"({self.of.show()} > {self.threshold})"


@dataclasses.dataclass(frozen=True)
class Modulo(Expression):
    """A whole number, or flag, modulo another."""

    of: Expression
    size: int

    def evaluate(self, values: dict[str, Any], system: Any) -> Any:
        return system.whole(self.of.evaluate(values, system)) % self.size

    def show(self) -> str:
        return f"({self.of.show()} % {self.size})"


@dataclasses.dataclass(frozen=True)
class Tuple(Expression):
    parts: tuple[Expression, ...]

    def evaluate(self, values: dict[str, Any], system: Any) -> Any:
        return tuple(part.evaluate(values, system) for part in self.parts)

    def show(self) -> str:
        return "(" + "".join(f"{part.show()}, " for part in self.parts) + ")"


@dataclasses.dataclass(frozen=True)
class Dict(Expression):
    fields: tuple[tuple[str, Expression], ...]

    def evaluate(self, values: dict[str, Any], system: Any) -> Any:
        return {name: field.evaluate(values, system) for name, field in self.fields}

    def show(self) -> str:
        return "{" + ", ".join(f"{name!r}: {field.show()}" for name, field in self.fields) + "}"


def to_jax(value: Any) -> Any:
    """A tree of NumPy values as JAX has them."""
    return jax.tree.map(lambda leaf: Jax.real(leaf) if np.asarray(leaf).dtype.kind == "f" else jnp.asarray(leaf), value)


def to_float64(value: Any) -> Any:
    """A tree of values as the oracle has them."""

    def leaf(value: Any) -> Any:
        array = np.asarray(value)
        return array.astype(np.float64) if array.dtype.kind == "f" else array

    return jax.tree.map(leaf, value)

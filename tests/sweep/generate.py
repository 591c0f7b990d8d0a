"""Random programs, drawn choice by choice by Hypothesis, so that a program that fails is shrunk.

Every decision is a number below some n, and 0 is the simplest. A new kind of node is added to a `Dialect` by a
function of the writer that `writes` registers; those of the combinators stand in `writers`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sweep import expressions as ex
from sweep import families
from sweep.expressions import Array, Expression, Record, Type
from sweep.programs import Body, Call, Layer, Leaf, Map, Node


@dataclasses.dataclass(frozen=True)
class Dialect:
    """Which programs are written.

    Attributes:
      families: the distributions.
      combinators: the kinds of nodes beside distributions and bodies, by the names under which they are registered.
      sites: how many `trace` statements of distributions there are at most.
      depth: how deep generative functions nest.
      networks: whether there are Flax layers.
      vectors: whether a choice may be a vector.
    """

    families: tuple[str, ...]
    combinators: tuple[str, ...]
    sites: int = 5
    depth: int = 3
    networks: bool = True
    vectors: bool = True


@dataclasses.dataclass(frozen=True)
class Known:
    """A value that an expression may use.

    Attributes:
      variable: how it is written.
      kind: its type.
      is_exact: whether it is the same in both number systems, so that a comparison with it is safe.
    """

    variable: ex.Variable
    kind: Array
    is_exact: bool


@dataclasses.dataclass(frozen=True)
class Shared:
    """An address that several branches may have.

    Attributes:
      address: the address.
      callees: what may stand there, of values of one type.
    """

    address: str
    callees: tuple[Node, ...]


Writing = Callable[["Writer", int], Node]

COMBINATORS: dict[str, Writing] = {}
"""How nodes of a kind are written, by name."""


def writes(name: str) -> Callable[[Writing], Writing]:
    """Register a function of the writer and the depth left, which writes a kind of node."""

    def register(function: Writing) -> Writing:
        COMBINATORS[name] = function
        return function

    return register


BASES = (0.5, -1.0, 0.0, 2.0)
SLOPES = (1.0, -0.5, 0.3)
SCALES = (0.7, 1.6, 0.3)
SHAPES = (2.0, 3.5)
NAMES = "abcdefghijklmnopqrstuvwxyz"


class Writer:
    """Writes one program."""

    def __init__(self, decide: Callable[[int], int], dialect: Dialect):
        self.decide, self.dialect = decide, dialect
        self.sites_left = dialect.sites
        self._count = 0

    def one_of(self, options: Any) -> Any:
        """One of the options."""
        return options[self.decide(len(options))]

    def fresh(self, prefix: str) -> str:
        """A name that is not used yet."""
        self._count += 1
        return f"{prefix}{self._count}"

    # Generative functions -------------------------------------------------------------------------------------------

    def program(self) -> Node:
        """A whole program."""
        kind = self.decide(3)
        return self.combinator(self.dialect.depth) if kind == 2 else self.body(self.dialect.depth)

    def node(self, depth: int) -> Node:
        """Any generative function."""
        kind = self.decide(5)
        if kind < 2 or depth <= 0 or self.sites_left <= 1:
            return self.leaf()
        return self.body(depth - 1) if kind == 2 else self.combinator(depth - 1)

    def combinator(self, depth: int) -> Node:
        """A generative function made by a combinator."""
        names = self.dialect.combinators
        return COMBINATORS[self.one_of(names)](self, depth) if names else self.body(depth)

    def node_of_type(self, depth: int, inputs: tuple[Type, ...], output: Type) -> Node:
        """A generative function of these types, for combinators whose inner functions must fit together."""
        return self.body(depth, inputs, output)

    def leaf(self) -> Leaf:
        """A distribution."""
        self.sites_left -= 1
        family = families.by_name(self.one_of(self.dialect.families))
        may_be_vector = self.dialect.vectors and family in families.COMMON and family.event is None
        shape = self.one_of(((), (), (2,))) if may_be_vector else ()
        scalars = tuple(bool(shape) and self.decide(2) == 1 for _ in family.domains)
        if all(scalars):
            scalars = (False, *scalars[1:])
        return Leaf(family.name, family.event[1] if family.event else shape, scalars)

    def body(
        self,
        depth: int,
        inputs: tuple[Type, ...] | None = None,
        output: Type | None = None,
        names: str = "x",
        shared: Sequence[Shared] = (),
    ) -> Body:
        """A function with statements; its types are free, or given. Some of the shared choices are among its own."""
        if inputs is None:
            inputs = tuple(self.argument_type() for _ in range(self.one_of((1, 0, 2))))
        parameters = tuple((self.fresh(names), kind) for kind in inputs)
        known = [
            Known(ex.Variable(name, path), array, array.is_discrete)
            for name, kind in parameters
            for path, array in ex.leaves(kind)
        ]
        statements: list[Call | Layer] = []
        parts: dict[str, Node] = {}
        as_class = self.decide(4) == 3
        for choice in shared:
            if self.decide(4) < 3:
                callee = self.one_of(choice.callees)
                args = tuple(self.expression(kind, known) for kind in callee.inputs)
                statements.append(Call(self.fresh("v"), (choice.address,), callee, args))
                known += self.known(statements[-1])
        for place in range(self.one_of((2, 1, 3))):
            if self.sites_left <= 0 and any(isinstance(statement, Call) for statement in statements):
                break
            if shared and statements and self.decide(2):
                break
            if self.dialect.networks and place > 0 and self.decide(5) == 4:
                statement: Call | Layer = Layer(self.fresh("h"), 2, self.expression(Array((2,)), known))
            else:
                statement = self.call(depth, known, parts, as_class)
            statements.append(statement)
            known += self.known(statement)
        returned, kind = self.returned(known) if output is None else (self.expression(output, known), output)
        remat = as_class and self.decide(6) == 5
        return Body(parameters, tuple(statements), returned, kind, as_class, remat)

    def known(self, statement: Call | Layer) -> list[Known]:
        """What a statement makes known."""
        exact = isinstance(statement, Call) and _is_chosen(statement.callee)
        return [
            Known(ex.Variable(statement.name, path), array, exact or array.is_discrete)
            for path, array in ex.leaves(statement.output)
        ]

    def call(self, depth: int, known: list[Known], parts: dict[str, Node], as_class: bool) -> Call:
        """A `trace` statement, of a new callee or, in a class, of a part that stands at another address too."""
        part = None
        if parts and self.decide(2):
            part = self.one_of(tuple(parts))
            callee = parts[part]
        else:
            callee = self.node(depth)
            if as_class and callee.has_parameters and self.decide(2):
                part = self.fresh("part")
                parts[part] = callee
        name = self.fresh("v")
        address = (name,) if self.decide(6) < 5 else (name, "w")
        args = tuple(self.expression(kind, known) for kind in callee.inputs)
        is_inline = part is None and callee.has_parameters and self.decide(2) == 1
        return Call(name, address, callee, args, part, is_inline)

    # Types and values -----------------------------------------------------------------------------------------------

    def argument_type(self) -> Type:
        """The type of an argument of a body."""
        form = self.decide(8)
        if form < 5:
            return ex.REAL
        if form == 5:
            return Array((2,))
        if form == 6:
            return Array((), "index", 3)
        return Record((("mu", Array()), ("gain", Array((2,)))))

    def returned(self, known: list[Known]) -> tuple[Expression, Type]:
        """What a body of free type returns."""
        last = known[-1]
        form = self.decide(6)
        if form < 2:
            return last.variable, last.kind
        if form == 2:
            return self.expression(ex.REAL, known), ex.REAL
        if form == 3:
            other = self.one_of(known)
            return ex.Tuple((last.variable, other.variable)), (last.kind, other.kind)
        if form == 4:
            kind = Record((("out", last.kind), ("mean", ex.REAL)))
            return ex.Dict((("out", last.variable), ("mean", self.expression(ex.REAL, known)))), kind
        return self.expression(Array((2,)), known), Array((2,))

    def value(self, kind: Type) -> Any:
        """A value of a type, as NumPy has it: an argument of the program."""
        if isinstance(kind, Record):
            return {name: self.value(field) for name, field in kind.fields}
        if isinstance(kind, tuple):
            return tuple(self.value(part) for part in kind)
        if kind.domain == "index":
            return self._whole(kind.shape, kind.size)
        if kind.domain == "flag":
            return self._whole(kind.shape, 2) == 1
        if kind.domain == "whole":
            return self._whole(kind.shape, 4)
        return np.asarray(self._constant(kind), np.float32)

    def _whole(self, shape: tuple[int, ...], size: int) -> Any:
        start = self.decide(size)
        count = int(np.prod(shape))
        return np.asarray((start + np.arange(count)) % size, np.int32).reshape(shape)

    def _constant(self, kind: Array) -> Any:
        """A constant of a domain: a number, or an array of numbers near it."""
        if kind.domain in ("lower", "covariance"):
            matrix = [[1.2, 0.0], [0.4, 0.7]] if kind.domain == "lower" else [[1.3, 0.4], [0.4, 0.8]]
            return np.asarray(self.one_of(SCALES)) * _pattern(kind.shape[:-2])[..., None, None] * np.asarray(matrix)
        if kind.domain == "count":
            return np.full(kind.shape, 3.0)
        if kind.domain in ("positive", "shape"):
            return np.asarray(self.one_of(SCALES if kind.domain == "positive" else SHAPES)) * _pattern(kind.shape)
        if kind.domain in ("low", "high"):
            return (-2.0 if kind.domain == "low" else 2.0) * _pattern(kind.shape)
        return self.one_of(BASES) - 1.0 + _pattern(kind.shape)

    # Expressions ----------------------------------------------------------------------------------------------------

    def expression(self, kind: Type, known: list[Known]) -> Expression:
        """An expression of a type, of known values."""
        assert not isinstance(kind, ex.Maybe), kind
        if isinstance(kind, Record):
            return ex.Dict(tuple((name, self.expression(field, known)) for name, field in kind.fields))
        if isinstance(kind, tuple):
            return ex.Tuple(tuple(self.expression(part, known) for part in kind))
        if kind.is_discrete:
            return self._discrete(kind, known)
        if not known or kind.domain == "count" or self.decide(5) == 4:
            return ex.Constant(written(self._constant(kind)))
        if kind.domain in ("real", "wild"):
            same = [k for k in known if k.kind == kind]
            if same and self.decide(4) == 3:
                return self.one_of(same).variable
            number = self.number(known)
            return ex.Affine(written(self._constant(kind)), written(self.one_of(SLOPES) * _pattern(kind.shape)), number)
        power = ex.Affine(0.0, self.one_of((0.5, -0.5)), _squashed(self.number(known)))
        if kind.domain in ("low", "high"):
            return ex.Affine(written(self._constant(kind)), written(0.5 * _pattern(kind.shape)), _squashed(power.of))
        return ex.Times(written(self._constant(kind)), power)

    def number(self, known: list[Known]) -> Expression:
        """A real number made of a known value: itself where that is moderate, else squashed."""
        # The last values come first: they are what makes a program more than independent choices.
        used = self.one_of(known[::-1])
        shape = used.kind.shape
        if not shape:
            number: Expression = ex.Entry(used.variable, ())
        elif self.decide(2):
            number = ex.Mean(used.variable)
        else:
            number = ex.Entry(used.variable, tuple(self.decide(length) for length in shape))
        is_moderate = used.kind.domain in ("real", "index", "flag")
        return number if is_moderate and self.decide(2) else ex.Squashed(number)

    def _discrete(self, kind: Array, known: list[Known]) -> Expression:
        if kind.domain == "flag":
            exact = [k for k in known if k.is_exact and k.kind.shape == kind.shape and k.kind.domain != "flag"]
            if exact and self.decide(4):
                used = self.one_of(exact[::-1])
                return ex.Exceeds(used.variable, 0.5 if used.kind.is_discrete else self.one_of((0.0, 0.5, -1.0)))
            return ex.Constant(written(self._whole(kind.shape, 2) == 1))
        size = kind.size or 3
        discrete = [k for k in known if k.kind.is_discrete and k.kind.shape == kind.shape]
        if discrete and self.decide(4):
            return ex.Modulo(self.one_of(discrete[::-1]).variable, size)
        exact = [k for k in known if k.is_exact and not k.kind.is_discrete and k.kind.shape == kind.shape]
        if exact and self.decide(4):
            return ex.Modulo(ex.Exceeds(self.one_of(exact[::-1]).variable, self.one_of((0.0, 0.5))), size)
        return ex.Constant(written(self._whole(kind.shape, size)))


def _is_chosen(node: Node) -> bool:
    """Whether what it returns are choices, as they are."""
    return isinstance(node, Leaf) or (isinstance(node, Map) and _is_chosen(node.inner))


def _pattern(shape: tuple[int, ...]) -> Any:
    """Ones for a number; for an array numbers near 1, not all equal."""
    return 1.0 + 0.25 * (np.arange(int(np.prod(shape))) % 3).reshape(shape)


def written(value: Any) -> Any:
    """As nested tuples, which hash."""
    array = np.asarray(value)
    array = np.round(array, 4) if array.dtype.kind == "f" else array

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return tuples(array.tolist())


def _squashed(number: Expression) -> Expression:
    return number if isinstance(number, ex.Squashed) else ex.Squashed(number)

"""How a `Writer` writes the combinators, and the dialects of the sweeps."""

from __future__ import annotations

import dataclasses
from typing import Any

from sweep import expressions as ex
from sweep import families
from sweep.combinators import (
    CHILDREN,
    AddressMap,
    CallAt,
    Cond,
    Dimap,
    Inline,
    Mask,
    Mix,
    Network,
    OrElse,
    Product,
    RandomParams,
    Recurse,
    Repeat,
    Scan,
    Switch,
    Unfold,
)
from sweep.expressions import Array, Record, Type
from sweep.generate import COMBINATORS, Dialect, Known, Shared, Writer, writes, written
from sweep.programs import Body, Call, Leaf, Map, Node, Train, any_axis

# Elements ------------------------------------------------------------------------------------------------------------


@writes("Map")
def _map(writer: Writer, depth: int) -> Node:
    inner = writer.node(depth)
    length = _length_of(inner)
    drawn = tuple(_axis(writer, kind) for kind in inner.inputs)
    is_repeated = not any_axis(drawn) or writer.decide(4) == 3
    # Of what has no array there is no axis.
    axes = tuple(axis if ex.leaves(kind) else None for axis, kind in zip(drawn, inner.inputs, strict=True))
    return Map(inner, length, axes, is_repeated or not any_axis(axes), _own(writer, inner))


def _length_of(inner: Node) -> int:
    # No two axes of one array are equal, and there are few shapes, for each is compiled anew.
    return 2 if any(isinstance(node, (Map, Unfold, Scan, Recurse)) for node in inner.walk()) else 3


def _own(writer: Writer, inner: Node) -> bool:
    """Whether every element has parameters of its own."""
    return inner.has_parameters and writer.decide(3) == 2


def _axis(writer: Writer, kind: Type) -> Any:
    if isinstance(kind, Record) and writer.decide(2):
        return Record(tuple((name, _axis(writer, field)) for name, field in kind.fields))
    if isinstance(kind, Array) and kind.shape and kind.domain not in ("lower", "covariance"):
        return writer.one_of((0, None, 1, -1))
    return writer.one_of((0, None))


@writes("Repeat")
def _repeat(writer: Writer, depth: int) -> Node:
    inner = writer.node(depth)
    return Repeat(inner, _length_of(inner), (None,) * len(inner.inputs), True, _own(writer, inner))


@writes("Product")
def _product(writer: Writer, depth: int) -> Node:
    factors = tuple(writer.node(depth - 1) for _ in range(writer.one_of((2, 1))))
    names = tuple(writer.fresh("p") for _ in factors) if writer.decide(2) else None
    return Product(factors, names)


# Parameters ----------------------------------------------------------------------------------------------------------


@writes("Train")
def _train(writer: Writer, depth: int) -> Node:
    shapes = {"mu": (), "w": (2,)} if writer.decide(2) else {"mu": ()}
    learned = Record(tuple((name, Array(shape)) for name, shape in shapes.items()))
    others = tuple(writer.argument_type() for _ in range(writer.one_of((1, 0))))
    inner = writer.body(depth, (*others, learned), names="x")
    initial = tuple((name, written(writer.value(Array(shape)))) for name, shape in shapes.items())
    return Train(inner, initial)


@writes("FlaxModule")
def _network(writer: Writer, depth: int) -> Node:
    return Network(writer.fresh("net")) if writer.dialect.networks else writer.leaf()


@writes("RandomParams")
def _random_params(writer: Writer, depth: int) -> Node:
    if not writer.dialect.networks:
        return writer.leaf()
    writer.sites_left -= 1
    chosen = writer.one_of((("kernel",), ("bias",), ("kernel", "bias")))
    return RandomParams(writer.fresh("net"), chosen, writer.one_of((0.0, 0.5)))


# Branches ------------------------------------------------------------------------------------------------------------

ALIKE = (
    (("Normal", "Laplace"), ((), (2,))),
    (("Exponential", "LogNormal", "Normal"), ((),)),
    (("Bernoulli",), ((), (2,))),
    (("Categorical",), ((),)),
)
"""Distributions whose values are of one type, by name and shape: what may stand at one address in several branches."""


def _shared(writer: Writer, depth: int) -> list[Shared]:
    """Addresses that branches may share: of choices that may have different distributions, or of one callee."""
    result = []
    for _ in range(writer.one_of((1, 2, 0))):
        known = [(names, shapes) for names, shapes in ALIKE if set(names) <= set(writer.dialect.families)]
        if not known or writer.decide(5) == 4:
            result.append(Shared(writer.fresh("s"), (writer.node(depth - 1),)))
            continue
        names, shapes = writer.one_of(known)
        shape = writer.one_of(shapes) if writer.dialect.vectors else ()
        writer.sites_left -= 1
        leaves = tuple(Leaf(name, shape, (False,) * len(families.by_name(name).domains)) for name in names)
        result.append(Shared(writer.fresh("s"), leaves))
    return result


def _branches(writer: Writer, depth: int, count: int, own: bool) -> tuple[Node, ...]:
    """Functions of the same result; and of the same arguments, unless they have their own."""
    known = [(names, shapes) for names, shapes in ALIKE if set(names) <= set(writer.dialect.families)]
    if known and writer.decide(5) == 4:
        names, shapes = writer.one_of(known[:1] if not own else known)
        writer.sites_left -= 1
        picked = [writer.one_of(names) for _ in range(count)]
        return tuple(Leaf(name, shapes[0], (False,) * len(families.by_name(name).domains)) for name in picked)
    shared = _shared(writer, depth)
    output = _result(writer)
    inputs = _arguments(writer)
    branches = []
    for _ in range(count):
        branches.append(writer.body(depth, inputs, output, shared=shared))
        inputs = _arguments(writer) if own else inputs
    return tuple(branches)


def _arguments(writer: Writer) -> tuple[Type, ...]:
    return tuple(writer.argument_type() for _ in range(writer.one_of((1, 0, 2))))


def _result(writer: Writer) -> Type:
    options = (ex.REAL, Array((2,)), (ex.REAL, Array((), "index", 3)), Record((("u", ex.REAL), ("w", Array((2,))))))
    return writer.one_of(options)


@writes("Switch")
def _switch(writer: Writer, depth: int) -> Node:
    own = writer.decide(3) == 2
    return Switch(_branches(writer, depth, writer.one_of((2, 3)), own), own)


@writes("Cond")
def _cond(writer: Writer, depth: int) -> Node:
    return Cond(_branches(writer, depth, 2, own=False))


@writes("OrElse")
def _or_else(writer: Writer, depth: int) -> Node:
    return OrElse(_branches(writer, depth, 2, own=True))


@writes("Mix")
def _mix(writer: Writer, depth: int) -> Node:
    writer.sites_left -= 1
    return Mix(_branches(writer, depth, writer.one_of((2, 3)), own=True))


@writes("Mask")
def _mask(writer: Writer, depth: int) -> Node:
    inner = writer.node(depth)
    # A mask around a mask would give a value that is absent twice.
    return Mask(writer.body(depth) if ex.has_maybe(inner.output) else inner)


# Steps ---------------------------------------------------------------------------------------------------------------


def _state(writer: Writer) -> Type:
    return writer.one_of(
        (ex.REAL, Array((2,)), Array((), "index", 3), Record((("u", ex.REAL), ("k", Array((), "index", 2)))))
    )


@writes("Unfold")
def _unfold(writer: Writer, depth: int) -> Node:
    state, length = _state(writer), 3
    others = (writer.argument_type(),) if writer.decide(2) else ()
    inner = writer.body(depth - 1, (Array((), "index", length), state, *others), state)
    return Unfold(inner, _length_of(inner), _own(writer, inner))


@writes("Scan")
def _scan(writer: Writer, depth: int) -> Node:
    carry, bare = _state(writer), writer.decide(5) == 4
    x: Type = () if bare else writer.argument_type()
    inner = writer.body(depth - 1, (carry, x), (carry, _result(writer)))
    return Scan(inner, _length_of(inner), _own(writer, inner), writer.decide(3) == 2, bare)


# Trees ---------------------------------------------------------------------------------------------------------------


@writes("Recurse")
def _recurse(writer: Writer, depth: int) -> Node:
    given, result = writer.one_of((ex.REAL, Array((3,)))), writer.one_of((ex.REAL, Array((3,))))
    exists = writer.one_of((Array((CHILDREN,), "flag"), Array((), "index", CHILDREN + 1)))
    shared = (writer.argument_type(),) if writer.decide(3) == 2 else ()
    produced = (ex.REAL, given.mapped(CHILDREN), exists)
    production = writer.body(depth - 2, (given, *shared), produced)
    own = (ex.REAL, result.mapped(CHILDREN), Array((CHILDREN,), "flag"), *shared)
    aggregation = writer.body(depth - 2, own, result)
    leaf = writer.body(depth - 2, (given, *shared), result)
    # The kernels of every level are traced anew.
    return Recurse(production, aggregation, leaf, 2 if writer.decide(6) == 5 else 1)


# Other forms ---------------------------------------------------------------------------------------------------------


@writes("CallAt")
def _call_at(writer: Writer, depth: int) -> Node:
    return CallAt(writer.node(depth))


@writes("Dimap")
def _dimap(writer: Writer, depth: int) -> Node:
    inner = writer.node(depth)
    parameters = tuple((writer.fresh("x"), kind) for kind in _arguments(writer))
    known = [
        Known(ex.Variable(name, path), array, array.is_discrete)
        for name, kind in parameters
        for path, array in ex.leaves(kind)
    ]
    before = tuple(writer.expression(kind, known) for kind in inner.inputs)
    known += [Known(ex.Variable("y", path), array, array.is_discrete) for path, array in ex.leaves(inner.output)]
    kind = _result(writer)
    return Dimap(inner, parameters, before, writer.expression(kind, known), kind)


def _moved(writer: Writer, depth: int, has_names: bool) -> tuple[Body, tuple[str, ...]]:
    """A body, and an address of a call in it that makes choices; or one whose choices have names, where that is asked."""
    body = writer.body(depth)
    calls = [statement for statement in body.statements if isinstance(statement, Call)]
    fit = [call for call in calls if _chooses(call.callee) and (not has_names or isinstance(call.callee, Body))]
    if fit:
        return body, writer.one_of(fit).address
    if not has_names:
        body, call = _with_call(writer, body, writer.leaf())
        return body, call.address
    below = writer.body(depth - 1, shared=_shared(writer, 0))
    below = below if _chooses(below) else _with_call(writer, below, writer.leaf())[0]
    body, call = _with_call(writer, body, below)
    return body, call.address


def _with_call(writer: Writer, body: Body, callee: Node) -> tuple[Body, Call]:
    """The body with one more call."""
    name = writer.fresh("v")
    call = Call(name, (name,), callee, tuple(writer.expression(kind, []) for kind in callee.inputs))
    return dataclasses.replace(body, statements=(*body.statements, call)), call


def _chooses(node: Node) -> bool:
    """Whether it makes choices, at all times."""
    if isinstance(node, (Leaf, RandomParams, Mix)):
        return True
    if isinstance(node, (Switch, Cond, OrElse)):
        return all(map(_chooses, node.branches))
    return any(map(_chooses, node.children))


@writes("AddressMap")
def _address_map(writer: Writer, depth: int) -> Node:
    body, address = _moved(writer, depth, has_names=False)
    new = (writer.fresh("new"),) if writer.decide(2) else ("up", writer.fresh("new"))
    return AddressMap(body, address, new)


@writes("Inline")
def _inline(writer: Writer, depth: int) -> Node:
    body, address = _moved(writer, depth, has_names=True)
    return Inline(body, address, ())


# Dialects ------------------------------------------------------------------------------------------------------------

COMMON = tuple(family.name for family in families.COMMON)
EVERY = tuple(families.FAMILIES)


def default_dialect(**options: Any) -> Dialect:
    """The dialect of the default sweep."""
    return Dialect(**{"families": COMMON, "combinators": tuple(COMBINATORS), **options})

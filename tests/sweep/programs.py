"""Programs as abstract syntax trees, with two readings: a generative function of gjflax, and a walk in NumPy.

Every node is a generative function. `Node.build` makes it with gjflax; `Node.run` runs it in a `World`, which holds
the value of every choice and takes down the density of each. The second reading knows nothing of gjflax: addresses,
parameter paths and the meaning of a combinator are written here once more, one element and one step at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from sweep import expressions as ex
from sweep import families
from sweep.expressions import Array, Expression, Float64, Jax, Record, Type

import gjflax

Address = tuple[Any, ...]
Values = dict[Address, Any]


@dataclasses.dataclass(frozen=True)
class Site:
    """A choice of one run: its distribution, value and density."""

    family: families.Family
    args: tuple[Any, ...]
    value: Any
    log_density: float

    @property
    def mapping(self) -> Any:
        return self.family.mapping


class MissingChoice(Exception):
    """A run came to a choice that has no value. It may have one of these."""

    def __init__(self, address: Address, values: list[Any]):
        super().__init__(address)
        self.address, self.values = address, values


class World:
    """The values of choices, and what a run visited.

    Attributes:
      sites: the visited choices, in order.
    """

    def __init__(self, choices: Mapping[Address, Any]):
        self._choices = choices
        self.sites: dict[Address, Site] = {}

    def choose(self, address: Address, family: families.Family, shape: tuple[int, ...], args: tuple[Any, ...]) -> Any:
        """Visit a choice: its value."""
        assert address not in self.sites, address
        if address not in self._choices:
            raise MissingChoice(address, family.support(args) if family.is_discrete and not shape else [])
        raw = np.asarray(self._choices[address])
        value = raw if family.is_discrete else raw.astype(np.float64)
        assert value.shape == shape, (address, value.shape, shape)
        args = tuple(np.asarray(arg, np.float64) for arg in args)
        with np.errstate(all="ignore"):
            log_density = float(np.sum(family.log_density(value, *args)))
        self.sites[address] = Site(family, args, value, log_density)
        return value


class Printer:
    """The source text of a program: the definitions that its text refers to."""

    def __init__(self) -> None:
        self._known: dict[Any, str] = {}
        self.definitions: list[str] = []

    def define(self, node: Any, write: Callable[[], Callable[[str], str]]) -> str:
        """The name of a node that is written as a definition: ``write()(name)`` is its text."""
        if node not in self._known:
            # What it refers to comes first, in text and in number.
            text = write()
            self._known[node] = f"f{len(self._known)}"
            self.definitions.append(text(self._known[node]))
        return self._known[node]


def source(node: Node) -> str:
    """The program as text."""
    printer = Printer()
    text = node.show(printer)
    return "\n\n".join([*printer.definitions, f"program = {text}"])


class Node:
    """A generative function."""

    @property
    def inputs(self) -> tuple[Type, ...]:
        """The types of its arguments."""
        raise NotImplementedError

    @property
    def output(self) -> Type:
        """The type of what it returns."""
        raise NotImplementedError

    @property
    def children(self) -> tuple[Node, ...]:
        """The generative functions that it calls."""
        return ()

    @property
    def has_parameters(self) -> bool:
        """Whether it has Flax parameters."""
        return any(child.has_parameters for child in self.children)

    @property
    def may_leave_out(self) -> bool:
        """Whether constraints may be left without effect and without error, by a choice that is not there at run time."""
        return any(child.may_leave_out for child in self.children)

    @property
    def has_computed_addresses(self) -> bool:
        """Whether an index among its addresses is computed, so that it is not known while tracing."""
        return any(child.has_computed_addresses for child in self.children)

    def build(self) -> Any:
        """The generative function of gjflax."""
        raise NotImplementedError

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        """Run in a world, with its choices below an address: what it returns."""
        raise NotImplementedError

    def show(self, printer: Printer) -> str:
        """As an expression of Python."""
        raise NotImplementedError

    def walk(self) -> list[Node]:
        """It and all below it."""
        return [self, *(node for child in self.children for node in child.walk())]


@functools.lru_cache(maxsize=1024)
def built(node: Node) -> Any:
    """The generative function of a node, one for equal nodes."""
    return node.build()


# Leaves --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Leaf(Node):
    """A distribution, of values of a shape. Arguments that are `scalars` broadcast."""

    family: str
    shape: tuple[int, ...]
    scalars: tuple[bool, ...]

    @property
    def inputs(self) -> tuple[Type, ...]:
        return families.by_name(self.family).argument_types(self.shape, self.scalars)

    @property
    def output(self) -> Type:
        return families.by_name(self.family).value_type(self.shape)

    @property
    def mapping(self) -> Any:
        """The map from R^n, None where there is none."""
        return families.by_name(self.family).mapping

    def build(self) -> Any:
        return families.by_name(self.family).distribution

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        return world.choose(at, families.by_name(self.family), self.output.shape, args)

    def show(self, printer: Printer) -> str:
        return self.family


# Bodies --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """A statement ``name = trace(address, callee)(*args)``. With `part` the callee is a part of the module.

    With `is_inline` the body makes the callee, and all modules in it, as it runs: they are the body's own submodules.
    """

    name: str
    address: Address
    callee: Node
    args: tuple[Expression, ...]
    part: str | None = None
    is_inline: bool = False

    @property
    def path(self) -> str:
        """Where the callee's parameters stand."""
        return self.part or "_".join(self.address)

    @property
    def output(self) -> Type:
        return ex.certain(self.callee.output)

    @property
    def is_unmasked(self) -> bool:
        """Whether the callee may return something absent, which a default then stands for."""
        return ex.has_maybe(self.callee.output)

    def show(self, printer: Printer) -> str:
        address = repr(self.address[0] if len(self.address) == 1 else self.address)
        callee = self.callee.show(printer)
        if self.part is not None:
            callee = f"self.{self.part}"
        if self.is_inline:
            callee = f"inline({callee})"
        args = ", ".join(arg.show() for arg in self.args)
        called = f"trace({address}, {callee})({args})"
        return f"{self.name} = {f'unmasked({called})' if self.is_unmasked else called}"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A statement ``name = tanh(nn.Dense(features)(x))``."""

    name: str
    features: int
    of: Expression

    @property
    def output(self) -> Type:
        return Array((self.features,), "real")

    def show(self, printer: Printer) -> str:
        return f"{self.name} = jnp.tanh(nn.Dense({self.features})({self.of.show()}))"


_BELOW = "__"


def made_inline(module: Any, path: str) -> Any:
    """A copy of a free module that belongs to the module that runs, as do all in it: each has a path as its name."""

    def copy(value: Any, name: str) -> Any:
        if isinstance(value, nn.Module):
            return made_inline(value, name)
        if isinstance(value, tuple):
            return tuple(copy(part, f"{name}_{number}") for number, part in enumerate(value))
        if isinstance(value, Mapping):
            return {key: copy(part, f"{name}_{key}") for key, part in value.items()}
        return value

    names = [field.name for field in dataclasses.fields(module) if field.init and field.name not in ("parent", "name")]
    fields = {name: copy(getattr(module, name), f"{path}{_BELOW}{name}") for name in names}
    return type(module)(**fields, name=path)


def parameters_below(params: Any, path: str) -> Any:
    """The parameters of a callee as they stand where it is free, of one that was made inline.

    A combinator of one function stands for that: ``inner`` is no level of the parameters.
    """
    below: dict[str, Any] = {}
    for name, own in params.items():
        if name != path and not name.startswith(path + _BELOW):
            continue
        level = below
        for part in name.split(_BELOW)[1:]:
            level = level if part == "inner" else level.setdefault(part, {})
        level.update(own)
    return below


@dataclasses.dataclass(frozen=True)
class Body(Node):
    """A function with statements; or, as a class, a `GenModule`, which can use one callee at two addresses.

    Attributes:
      parameters: the arguments: names and types.
      statements: calls and network layers.
      returned: what it returns.
      returned_type: its type.
      as_class: whether it is written as a class.
      remat: whether the class is transformed by ``nn.remat``.
    """

    parameters: tuple[tuple[str, Type], ...]
    statements: tuple[Call | Layer, ...]
    returned: Expression
    returned_type: Type
    as_class: bool = False
    remat: bool = False

    @property
    def inputs(self) -> tuple[Type, ...]:
        return tuple(kind for _, kind in self.parameters)

    @property
    def output(self) -> Type:
        return self.returned_type

    @property
    def children(self) -> tuple[Node, ...]:
        return tuple(statement.callee for statement in self.statements if isinstance(statement, Call))

    @property
    def parts(self) -> dict[str, Node]:
        calls = [statement for statement in self.statements if isinstance(statement, Call)]
        return {call.part: call.callee for call in calls if call.part is not None}

    @property
    def has_parameters(self) -> bool:
        return super().has_parameters or any(isinstance(statement, Layer) for statement in self.statements)

    def build(self) -> Any:
        if self.as_class:
            return (RematWritten if self.remat else Written)(self, parent=None)
        return gjflax.gen(lambda *args: self.execute(args))

    def execute(self, args: tuple[Any, ...], module: Any = None) -> Any:
        """The body, as gjflax runs it."""
        values = dict(zip([name for name, _ in self.parameters], args, strict=True))
        for statement in self.statements:
            if isinstance(statement, Layer):
                x = statement.of.evaluate(values, Jax)
                values[statement.name] = nn.tanh(nn.Dense(statement.features, param_dtype=x.dtype)(x))
            else:
                callee = built(statement.callee) if statement.part is None else getattr(module, statement.part)
                if statement.is_inline:
                    callee = made_inline(callee, statement.path)
                arguments = [arg.evaluate(values, Jax) for arg in statement.args]
                address: Any = statement.address if len(statement.address) > 1 else next(iter(statement.address))
                result = gjflax.trace(address, callee)(*arguments)
                values[statement.name] = ex.unmasked(result) if statement.is_unmasked else result
        return self.returned.evaluate(values, Jax)

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        values = dict(zip([name for name, _ in self.parameters], args, strict=True))
        layers = 0
        for statement in self.statements:
            if isinstance(statement, Layer):
                layer = params[f"Dense_{layers}"]
                layers += 1
                x = statement.of.evaluate(values, Float64)
                values[statement.name] = np.tanh(x @ layer["kernel"] + layer["bias"])
            else:
                arguments = tuple(arg.evaluate(values, Float64) for arg in statement.args)
                below = parameters_below(params, statement.path)
                result = statement.callee.run(world, (*at, *statement.address), arguments, below)
                values[statement.name] = ex.unmasked(result) if statement.is_unmasked else result
        return self.returned.evaluate(values, Float64)

    def show(self, printer: Printer) -> str:
        def write() -> Callable[[str], str]:
            statements = [statement.show(printer) for statement in self.statements]
            statements.append(f"return {self.returned.show()}")
            names = [name for name, _ in self.parameters]
            if not self.as_class:
                body = "".join(f"\n    {line}" for line in statements)
                return lambda name: f"@gen\ndef {name}({', '.join(names)}):{body}"
            parts = "".join(f"\n        self.{part} = {callee.show(printer)}" for part, callee in self.parts.items())
            setup = f"\n    def setup(self):{parts}" if parts else ""
            call = f"\n    @nn.compact\n    def __call__({', '.join(['self', *names])}):"
            body = "".join(f"\n        {line}" for line in statements)
            return lambda name: f"class {name}(GenModule):{setup}{call}{body}"

        name = printer.define(self, write)
        if not self.as_class:
            return name
        return f"nn.remat({name})()" if self.remat else f"{name}()"


class Written(gjflax.GenModule):
    """A body as a class."""

    body: Any

    def setup(self) -> None:
        for part, callee in self.body.parts.items():
            # As written it is made here; Flax takes one module in two places of a tree for shared.
            setattr(self, part, built(callee).clone(parent=None, _deep_clone=True))

    @nn.compact
    def __call__(self, *args: Any) -> Any:
        return self.body.execute(args, self)


RematWritten = nn.remat(Written)


# Combinators ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Train(Node):
    """`TrainCombinator`: the last argument of the inner function is learned. Initial values by name, one record."""

    inner: Node
    initial: tuple[tuple[str, Any], ...]

    @property
    def inputs(self) -> tuple[Type, ...]:
        return self.inner.inputs[:-1]

    @property
    def output(self) -> Type:
        return self.inner.output

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.inner,)

    @property
    def has_parameters(self) -> bool:
        return True

    def build(self) -> Any:
        initial = {name: np.asarray(value, np.float32) for name, value in self.initial}
        return gjflax.TrainCombinator(built(self.inner), params=initial, parent=None)

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        learned = {name: params[name] for name, _ in self.initial}
        return self.inner.run(world, at, (*args, learned), params)

    def show(self, printer: Printer) -> str:
        initial = ", ".join(f"{name!r}: {ex.number(value)}" for name, value in self.initial)
        return f"TrainCombinator({self.inner.show(printer)}, params={{{initial}}})"


@dataclasses.dataclass(frozen=True)
class Map(Node):
    """`Map` over so many elements.

    Attributes:
      inner: the function of one element.
      length: how many.
      axes: the mapped axis of each argument; None where it is not, and a record of these for one that is a record.
      repeats: whether the length is said, and not left to the arguments.
      own: whether every element has parameters of its own.
    """

    inner: Node
    length: int
    axes: tuple[Any, ...]
    repeats: bool
    own: bool = False

    @property
    def inputs(self) -> tuple[Type, ...]:
        return tuple(_mapped_type(kind, axis, self.length) for kind, axis in self._pairs())

    @property
    def output(self) -> Type:
        return ex.map_type(lambda array: array.mapped(self.length), self.inner.output)

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.inner,)

    def _pairs(self) -> list[tuple[Type, Any]]:
        return list(zip(self.inner.inputs, self.axes, strict=True))

    def build(self) -> Any:
        options: dict[str, Any] = {"repeats": self.length} if self.repeats else {}
        axes = tuple(_as_axes(axis) for axis in self.axes)
        if any(axis is not None for axis in axes):
            options["in_axes"] = axes
        if self.own:
            options["variable_axes"] = {"params": 0}
        return gjflax.Map(built(self.inner), parent=None, **options)

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        results = []
        for index in range(self.length):
            taken = tuple(_take(arg, axis, index) for arg, axis in zip(args, self.axes, strict=True))
            below = jax.tree.map(lambda leaf, i=index: leaf[i], params) if self.own else params
            results.append(self.inner.run(world, (*at, index), taken, below))
        return stack(results)

    def show(self, printer: Printer) -> str:
        options = [f"in_axes={tuple(_as_axes(axis) for axis in self.axes)}"] if any_axis(self.axes) else []
        options += [f"repeats={self.length}"] if self.repeats else []
        options += ['variable_axes={"params": 0}'] if self.own else []
        return f"Map({', '.join([self.inner.show(printer), *options])})"


def any_axis(axes: tuple[Any, ...]) -> bool:
    """Whether anything is mapped."""
    return any(_as_axes(axis) is not None for axis in axes)


def _as_axes(axis: Any) -> Any:
    """As `Map` takes it: a record of axes is a dict."""
    if isinstance(axis, Record):
        return {name: _as_axes(field) for name, field in axis.fields}
    return axis


def _mapped_type(kind: Type, axis: Any, length: int) -> Type:
    if axis is None:
        return kind
    if isinstance(axis, Record):
        fields = dict(axis.fields)
        return Record(tuple((name, _mapped_type(field, fields[name], length)) for name, field in kind.fields))
    return ex.map_type(lambda array: array.mapped(length, axis if axis >= 0 else len(array.shape) + 1 + axis), kind)


def _take(value: Any, axis: Any, index: int) -> Any:
    """An element's part of an argument."""
    if axis is None:
        return value
    if isinstance(axis, Record):
        return {name: _take(value[name], field, index) for name, field in axis.fields}
    return jax.tree.map(lambda leaf: np.take(leaf, index, axis=axis), value)


def stack(results: list[Any]) -> Any:
    """Trees of values, one for each element, as one."""
    return jax.tree.map(lambda *parts: np.stack(parts), *results)

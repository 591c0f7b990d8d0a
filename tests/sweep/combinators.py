"""The combinators' nodes: each is read by gjflax, and once more in NumPy, one branch, element and step at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from sweep import expressions as ex
from sweep import families
from sweep.expressions import Array, Expression, Float64, Jax, Maybe, Record, Type
from sweep.programs import Address, Leaf, Map, Node, Printer, World, built, stack

import gjflax

FLAG = Array((), "flag")

# One of several ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Branching(Node):
    """One of several functions, which return the same type."""

    branches: tuple[Node, ...]

    names = ()
    """Under which names the branches' parameters stand."""

    @property
    def output(self) -> Type:
        return self.branches[0].output

    @property
    def children(self) -> tuple[Node, ...]:
        return self.branches

    @property
    def may_leave_out(self) -> bool:
        return True

    def taken(self, first: Any) -> int:
        """The number of the branch that the first argument takes."""
        return int(first)

    def own_arguments(self, args: tuple[Any, ...], number: int) -> tuple[Any, ...]:
        return args

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        number = self.taken(args[0])
        below = params.get(self.names[number], {})
        return self.branches[number].run(world, at, self.own_arguments(args[1:], number), below)

    def _shown(self, printer: Printer) -> str:
        return ", ".join(branch.show(printer) for branch in self.branches)


@dataclasses.dataclass(frozen=True)
class Switch(Branching):
    """`Switch`. With `own` every branch has arguments of its own."""

    own: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"branches_{number}" for number in range(len(self.branches)))

    @property
    def inputs(self) -> tuple[Type, ...]:
        shared = tuple(branch.inputs for branch in self.branches) if self.own else self.branches[0].inputs
        return (Array((), "index", len(self.branches)), *shared)

    def own_arguments(self, args: tuple[Any, ...], number: int) -> tuple[Any, ...]:
        return args[number] if self.own else args

    def build(self) -> Any:
        return gjflax.Switch(tuple(map(built, self.branches)), own_arguments=self.own, parent=None)

    def show(self, printer: Printer) -> str:
        return f"Switch(({self._shown(printer)}){', own_arguments=True' if self.own else ''})"


@dataclasses.dataclass(frozen=True)
class Cond(Branching):
    """`Cond`."""

    names = ("then", "otherwise")

    @property
    def inputs(self) -> tuple[Type, ...]:
        return (FLAG, *self.branches[0].inputs)

    def taken(self, first: Any) -> int:
        return 0 if first else 1

    def build(self) -> Any:
        return gjflax.Cond(*map(built, self.branches), parent=None)

    def show(self, printer: Printer) -> str:
        return f"Cond({self._shown(printer)})"


@dataclasses.dataclass(frozen=True)
class OrElse(Branching):
    """`OrElse`."""

    names = ("first", "second")

    @property
    def inputs(self) -> tuple[Type, ...]:
        return (FLAG, self.branches[0].inputs, self.branches[1].inputs)

    def taken(self, first: Any) -> int:
        return 0 if first else 1

    def own_arguments(self, args: tuple[Any, ...], number: int) -> tuple[Any, ...]:
        return args[number]

    def build(self) -> Any:
        return gjflax.OrElse(*map(built, self.branches), parent=None)

    def show(self, printer: Printer) -> str:
        return f"OrElse({self._shown(printer)})"


@dataclasses.dataclass(frozen=True)
class Mix(Branching):
    """`Mix`: the number of the branch is a choice."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"components_{number}" for number in range(len(self.branches)))

    @property
    def inputs(self) -> tuple[Type, ...]:
        return (Array((len(self.branches),)), *(branch.inputs for branch in self.branches))

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        number = int(world.choose((*at, "component"), families.by_name("Categorical"), (), args[:1]))
        below = params.get(self.names[number], {})
        return self.branches[number].run(world, (*at, "value"), args[1 + number], below)

    def build(self) -> Any:
        return gjflax.Mix(tuple(map(built, self.branches)), parent=None)

    def show(self, printer: Printer) -> str:
        return f"Mix(({self._shown(printer)}))"


@dataclasses.dataclass(frozen=True)
class Mask(Node):
    """`Mask`."""

    inner: Node

    @property
    def inputs(self) -> tuple[Type, ...]:
        return (FLAG, *self.inner.inputs)

    @property
    def output(self) -> Type:
        return Maybe(self.inner.output)

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.inner,)

    @property
    def may_leave_out(self) -> bool:
        return True

    def build(self) -> Any:
        return gjflax.Mask(built(self.inner), parent=None)

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        if not args[0]:
            return ex.Possibly(ex.zeros(self.inner.output), np.asarray(False))
        return ex.Possibly(self.inner.run(world, at, args[1:], params), np.asarray(True))

    def show(self, printer: Printer) -> str:
        return f"Mask({self.inner.show(printer)})"


# Several side by side ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Product(Node):
    """`Product`, of factors by name, or without names by position."""

    factors: tuple[Node, ...]
    names: tuple[str, ...] | None

    @property
    def inputs(self) -> tuple[Type, ...]:
        return tuple(factor.inputs for factor in self.factors)

    @property
    def output(self) -> Type:
        outputs = tuple(factor.output for factor in self.factors)
        return outputs if self.names is None else Record(tuple(zip(self.names, outputs, strict=True)))

    @property
    def children(self) -> tuple[Node, ...]:
        return self.factors

    @property
    def _labels(self) -> tuple[str, ...]:
        return tuple(map(str, range(len(self.factors)))) if self.names is None else self.names

    def build(self) -> Any:
        factors = tuple(map(built, self.factors))
        if self.names is None:
            return gjflax.Product(factors, parent=None)
        return gjflax.Product(dict(zip(self.names, factors, strict=True)), parent=None)

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        results = {}
        for label, factor, one in zip(self._labels, self.factors, args, strict=True):
            results[label] = factor.run(world, (*at, label), one, params.get(f"factors_{label}", {}))
        return tuple(results.values()) if self.names is None else results

    def show(self, printer: Printer) -> str:
        shown = [factor.show(printer) for factor in self.factors]
        if self.names is None:
            return f"Product(({', '.join(shown)}))"
        pairs = (f"{name!r}: {factor}" for name, factor in zip(self.names, shown, strict=True))
        return f"Product({{{', '.join(pairs)}}})"


@dataclasses.dataclass(frozen=True)
class Repeat(Map):
    """`Repeat`: a map in which nothing is mapped."""

    def build(self) -> Any:
        options: dict[str, Any] = {"variable_axes": {"params": 0}} if self.own else {}
        return gjflax.Repeat(built(self.inner), self.length, parent=None, **options)

    def show(self, printer: Printer) -> str:
        own = ', variable_axes={"params": 0}' if self.own else ""
        return f"Repeat({self.inner.show(printer)}, {self.length}{own})"


# One after the other -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Steps(Node):
    """`Unfold` and `Scan`: a kernel, so many steps, and whether each has parameters of its own."""

    inner: Node
    length: int
    own: bool = False

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.inner,)

    def of_step(self, params: Any, index: int) -> Any:
        """The parameters of a step."""
        return jax.tree.map(lambda leaf: leaf[index], params) if self.own else params

    @property
    def options(self) -> dict[str, Any]:
        return {"variable_axes": {"params": 0}} if self.own else {}

    @property
    def _shown(self) -> str:
        return ', variable_axes={"params": 0}' if self.own else ""


@dataclasses.dataclass(frozen=True)
class Unfold(Steps):
    """`Unfold`, of a kernel of (time, state, *args)."""

    @property
    def inputs(self) -> tuple[Type, ...]:
        return (Array((), "index", self.length + 1), *self.inner.inputs[1:])

    @property
    def output(self) -> Type:
        return ex.map_type(lambda array: array.mapped(self.length), self.inner.output)

    @property
    def may_leave_out(self) -> bool:
        return True

    def build(self) -> Any:
        return gjflax.Unfold(built(self.inner), self.length, parent=None, **self.options)

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        count, state, *rest = args
        states = []
        for time in range(int(count)):
            state = self.inner.run(world, (*at, time), (np.asarray(time), state, *rest), self.of_step(params, time))
            states.append(state)
        # What is beyond the length repeats the last state.
        return stack(states + [state] * (self.length - len(states)))

    def show(self, printer: Printer) -> str:
        return f"Unfold({self.inner.show(printer)}, max_length={self.length}{self._shown})"


@dataclasses.dataclass(frozen=True)
class Scan(Steps):
    """`Scan`, of a kernel of (carry, x). With `bare` there are no inputs, and x is None."""

    reverse: bool = False
    bare: bool = False

    @property
    def inputs(self) -> tuple[Type, ...]:
        carry, x = self.inner.inputs
        return carry, ex.map_type(lambda array: array.mapped(self.length), x)

    @property
    def output(self) -> Type:
        carry, y = self.inner.output
        return carry, ex.map_type(lambda array: array.mapped(self.length), y)

    def build(self) -> Any:
        length = {"length": self.length} if self.bare else {}
        return gjflax.Scan(built(self.inner), reverse=self.reverse, parent=None, **length, **self.options)

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        carry, xs = args
        outputs: list[Any] = [None] * self.length
        for index in reversed(range(self.length)) if self.reverse else range(self.length):
            x = jax.tree.map(lambda leaf, i=index: leaf[i], xs)
            carry, outputs[index] = self.inner.run(world, (*at, index), (carry, x), self.of_step(params, index))
        return carry, stack(outputs)

    def show(self, printer: Printer) -> str:
        options = (", reverse=True" if self.reverse else "") + (f", length={self.length}" if self.bare else "")
        return f"Scan({self.inner.show(printer)}{options}{self._shown})"


# Trees ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recurse(Node):
    """`Recurse`, of at most two children. The production returns (value, inputs, exists)."""

    production: Node
    aggregation: Node
    leaf: Node
    depth: int

    @property
    def inputs(self) -> tuple[Type, ...]:
        return self.leaf.inputs

    @property
    def output(self) -> Type:
        return self.leaf.output

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.production, self.aggregation, self.leaf)

    @property
    def may_leave_out(self) -> bool:
        return True

    def build(self) -> Any:
        kernels = map(built, self.children)
        return gjflax.Recurse(*kernels, max_branch=CHILDREN, max_depth=self.depth, parent=None)

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        root, *shared = args

        def result(level: int, number: int, given: Any) -> Any:
            here = (*at, f"level_{level}")
            if level == self.depth:
                return self.leaf.run(world, (*here, "leaf", number), (given, *shared), params.get("leaf", {}))
            produced = self.production.run(
                world, (*here, "production", number), (given, *shared), params.get("production", {})
            )
            value, inputs, exists = produced
            exists = exists if np.ndim(exists) else np.arange(CHILDREN) < exists
            results = [
                result(level + 1, CHILDREN * number + child, jax.tree.map(lambda leaf, i=child: leaf[i], inputs))
                if exists[child]
                else ex.zeros(self.output)
                for child in range(CHILDREN)
            ]
            own = (value, stack(results), exists, *shared)
            return self.aggregation.run(world, (*here, "aggregation", number), own, params.get("aggregation", {}))

        return result(0, 0, root)

    def show(self, printer: Printer) -> str:
        kernels = ", ".join(kernel.show(printer) for kernel in self.children)
        return f"Recurse({kernels}, max_branch={CHILDREN}, max_depth={self.depth})"


CHILDREN = 2
"""How many children a node of a tree may have."""

# The same in another form ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CallAt(Node):
    """`CallAt`, and of a distribution `ChoiceAt`."""

    inner: Node

    @property
    def inputs(self) -> tuple[Type, ...]:
        return (*self.inner.inputs, Array((), "index", 4))

    @property
    def output(self) -> Type:
        return self.inner.output

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.inner,)

    @property
    def may_leave_out(self) -> bool:
        return True

    @property
    def has_computed_addresses(self) -> bool:
        return True

    def build(self) -> Any:
        make = gjflax.ChoiceAt if isinstance(self.inner, Leaf) else gjflax.CallAt
        return make(built(self.inner), parent=None)

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        return self.inner.run(world, (*at, int(args[-1])), args[:-1], params)

    def show(self, printer: Printer) -> str:
        return f"{'ChoiceAt' if isinstance(self.inner, Leaf) else 'CallAt'}({self.inner.show(printer)})"


@dataclasses.dataclass(frozen=True)
class Dimap(Node):
    """`Dimap`, of expressions of the arguments, and of these and the return value `y`."""

    inner: Node
    parameters: tuple[tuple[str, Type], ...]
    before: tuple[Expression, ...]
    after: Expression
    after_type: Type

    @property
    def inputs(self) -> tuple[Type, ...]:
        return tuple(kind for _, kind in self.parameters)

    @property
    def output(self) -> Type:
        return self.after_type

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.inner,)

    def _named(self, args: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip([name for name, _ in self.parameters], args, strict=True))

    def _before(self, args: tuple[Any, ...], system: Any) -> tuple[Any, ...]:
        return tuple(part.evaluate(self._named(args), system) for part in self.before)

    def _after(self, args: tuple[Any, ...], retval: Any, system: Any) -> Any:
        return self.after.evaluate({**self._named(args), "y": retval}, system)

    def build(self) -> Any:
        pre = lambda *args: self._before(args, Jax)
        post = lambda args, inner_args, retval: self._after(args, retval, Jax)
        return gjflax.Dimap(built(self.inner), pre, post, parent=None)

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        return self._after(args, self.inner.run(world, at, self._before(args, Float64), params), Float64)

    def show(self, printer: Printer) -> str:
        names = ", ".join(name for name, _ in self.parameters)
        before = "".join(f"{part.show()}, " for part in self.before)
        pre, post = f"lambda {names}: ({before})", f"lambda ({names}), _, y: {self.after.show()}"
        return f"Dimap({self.inner.show(printer)}, {pre}, {post})"


class Renamed(World):
    """A world in which a program's addresses, below one, have other names."""

    def __init__(self, world: World, at: Address, old: Address, new: Address):
        super().__init__({})
        self.world, self.at, self.old, self.new = world, at, old, new

    def choose(self, address: Address, family: families.Family, shape: tuple[int, ...], args: tuple[Any, ...]) -> Any:
        rest = address[len(self.at) :]
        if rest[: len(self.old)] == self.old:
            rest = (*self.new, *rest[len(self.old) :])
        return self.world.choose((*self.at, *rest), family, shape, args)


@dataclasses.dataclass(frozen=True)
class Moved(Node):
    """A function in which one address has another name."""

    inner: Node
    old: Address
    new: Address

    @property
    def inputs(self) -> tuple[Type, ...]:
        return self.inner.inputs

    @property
    def output(self) -> Type:
        return self.inner.output

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.inner,)

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        return self.inner.run(Renamed(world, at, self.old, self.new), at, args, params)


@dataclasses.dataclass(frozen=True)
class AddressMap(Moved):
    """`AddressMap`, of one address."""

    def build(self) -> Any:
        return gjflax.AddressMap(built(self.inner), {self.new: self.old}, parent=None)

    def show(self, printer: Printer) -> str:
        return f"AddressMap({self.inner.show(printer)}, {{{self.new!r}: {self.old!r}}})"


@dataclasses.dataclass(frozen=True)
class Inline(Moved):
    """`Inline`, of one address: what is below it stands at the top."""

    def build(self) -> Any:
        return gjflax.Inline(built(self.inner), self.old, parent=None)

    def show(self, printer: Printer) -> str:
        return f"Inline({self.inner.show(printer)}, {self.old!r})"


# Networks ------------------------------------------------------------------------------------------------------------

SIZE = 2
"""How many numbers a network takes and gives."""


@dataclasses.dataclass(frozen=True)
class Network(Node):
    """`FlaxModule` of a dense layer. Two of different names share nothing."""

    name: str

    @property
    def inputs(self) -> tuple[Type, ...]:
        return (Array((SIZE,)),)

    @property
    def output(self) -> Type:
        return Array((SIZE,), "wild")

    @property
    def has_parameters(self) -> bool:
        return True

    def build(self) -> Any:
        return gjflax.FlaxModule(_dense(), parent=None)

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        return args[0] @ params["kernel"] + params["bias"]

    def show(self, printer: Printer) -> str:
        return f"FlaxModule(nn.Dense({SIZE}))"


def _dense() -> Any:
    return nn.Dense(SIZE, param_dtype=jnp.result_type(float), parent=None)


@dataclasses.dataclass(frozen=True)
class RandomParams(Node):
    """`RandomParams` of a dense layer, with a hyperparameter: the scale of a normal prior.

    Attributes:
      name: as in `Network`.
      chosen: which of the parameters are choices.
      loc: the mean of the prior.
    """

    name: str
    chosen: tuple[str, ...]
    loc: float

    @property
    def inputs(self) -> tuple[Type, ...]:
        return (Array((), "positive"), Array((SIZE,)))

    @property
    def output(self) -> Type:
        return Array((SIZE,), "wild")

    @property
    def has_parameters(self) -> bool:
        return len(self.chosen) < len(SHAPES)

    def build(self) -> Any:
        prior = _Prior(self.loc)
        selection = gjflax.select(list(self.chosen))
        return gjflax.RandomParams(_dense(), (gjflax.Normal, prior), selection, num_hyperparameters=1, parent=None)

    def run(self, world: World, at: Address, args: tuple[Any, ...], params: Any) -> Any:
        scale, x = args
        prior = (np.asarray(self.loc), scale)
        values = {
            name: world.choose((*at, name), families.by_name("Normal"), SHAPES[name], prior) for name in self.chosen
        }
        values = {**params, **values}
        return x @ values["kernel"] + values["bias"]

    def show(self, printer: Printer) -> str:
        prior = f"(Normal, lambda scale: ({self.loc}, scale))"
        return f"RandomParams(nn.Dense({SIZE}), {prior}, select({list(self.chosen)}), num_hyperparameters=1)"


SHAPES = {"kernel": (SIZE, SIZE), "bias": (SIZE,)}


@dataclasses.dataclass(frozen=True)
class _Prior:
    """The arguments of a normal prior."""

    loc: float

    def __call__(self, scale: Any) -> tuple[Any, Any]:
        return self.loc, scale

r"""The graph of a model: which choice depends on which, through networks, parameters and arguments.

The model is staged out to a jaxpr, with a mark at every value that is drawn, at the arguments that it is drawn with, and at
the output of every network. A walk over the equations then finds for each mark the marks that lead to it without another
one in between: these are the edges. Arguments and parameters are marks at the inputs.

In a scan the walk runs until nothing is added. What is handed on from step to step comes from the step before, so a hidden
Markov model has an edge from its state to itself.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.outline import BRANCH, SWITCH, Group, Part, groups, sites
from gjflax.core.watching import current_branches, watching
from gjflax.language.abstract import AbstractModel, Path, SingleChoice, abstract_key, abstract_model, here, value_of
from gjflax.language.dependency import Dependency, walk

CHOICE, NETWORK, PARAMETER, ARGUMENT = "choice", "network", "parameter", "argument"


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of a model's graph.

    Attributes:
      name: its name in the graph: the address of a choice, ``net:Dense_0``, ``param:mu``, ``arg:x``.
      kind: `CHOICE`, `NETWORK`, `PARAMETER` or `ARGUMENT`.
      label: how it is written in a picture.
      detail: more of it: a choice's distribution, how many parameters a network has.
      shape: the shape of a choice of one element, of a parameter or argument (if it is one array).
      discrete: whether a choice is.
      observed: "yes", "partly" or "no".
      group: the name of the group that it stands in.
      address: of a choice.
    """

    name: str
    kind: str
    label: str
    detail: str = ""
    shape: tuple[int, ...] | None = None
    discrete: bool = False
    observed: str = "no"
    group: str | None = None
    address: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class NodeGroup:
    """A plate, steps, a switch or a branch: `kind` as in `outline`. `parent` is the name of the group around it."""

    name: str
    kind: str
    label: str
    length: int | None = None
    parent: str | None = None
    address: tuple[Any, ...] = ()


class Edge(NamedTuple):
    """The target depends on the source; on that of the step before, if `previous`. The target may be a group."""

    source: str
    target: str
    previous: bool = False


@dataclasses.dataclass(frozen=True)
class ModelGraph:
    """The nodes of a model, what they stand in, and the edges between them. Made by `model_graph`."""

    nodes: tuple[Node, ...]
    groups: tuple[NodeGroup, ...]
    edges: tuple[Edge, ...]


def model_graph(model: Any, args: Any, *, variables: Any = None) -> ModelGraph:
    """The graph of a model at some arguments.

    Args:
      model: a generative function, bound or not.
      args: its arguments, a tuple of values or of shapes (``jax.ShapeDtypeStruct``).
      variables: its Flax variables. By default those that it is bound to, or the shapes of those that `init` makes.
    """
    abstract = abstract_model(model, args, variables)
    recorder = _Recorder(abstract)
    drawn = recorder.stage()
    return _Builder(recorder, drawn).graph()


class _Origin(NamedTuple):
    """A mark that a value depends on; in a scan perhaps that of the step before."""

    mark: int
    previous: bool = False


@dataclasses.dataclass
class _Mark:
    """A place in the program. Of a network, `path` is that of its module; of a choice, `address` that where it is drawn."""

    kind: str
    path: Path = ()
    address: tuple[Any, ...] = ()
    label: str = ""
    branches: tuple[str, ...] = ()
    leads: set[_Origin] = dataclasses.field(default_factory=set)
    reached: bool = False


@dataclasses.dataclass
class _Drawn:
    """What a run drew: its outline, its choices, and what each choice's value and each group's control depend on."""

    parts: tuple[Part, ...]
    choices: list[SingleChoice]
    values: list[frozenset[_Origin]]
    controls: list[frozenset[_Origin]]


class _Recorder:
    """Stages a model out with marks, and walks over its equations."""

    def __init__(self, model: AbstractModel):
        self.model = model
        self.marks: list[_Mark] = []
        self._inside_network = False

    def stage(self) -> _Drawn:
        found: list[Any] = []

        def run(variables: Any, key: Any, args: Any) -> Any:
            with watching(self._draw), nn.intercept_methods(self._network):
                parts = self.model.simulate(variables, key, args).outline()
            singles, control = list(sites(parts)), [group.control for group in groups(parts)]
            found[:] = parts, [SingleChoice.of(site, around) for site, around in singles]
            return [value_of(site) for site, _ in singles], control

        # Inputs have marks too, the first ones.
        inputs: list[_Mark] = [_Mark(PARAMETER, path) for path, _ in self.model.named_variables()]
        count = len(inputs)
        for position, argument in enumerate(self.model.args):
            inputs += [_Mark(ARGUMENT, (str(position),)) for _ in jax.tree.leaves(argument)]
        self.marks = inputs
        of_inputs = [Dependency(frozenset({_Origin(number)})) for number in range(len(inputs))]
        of_inputs.insert(count, Dependency(frozenset()))
        jaxpr, outputs = jax.make_jaxpr(run, return_shape=True)(self.model.variables, abstract_key(), self.model.args)
        after = walk(jaxpr.jaxpr, of_inputs, self._rule)
        values, controls = jax.tree.unflatten(jax.tree.structure(outputs), [one.sources for one in after])
        parts, choices = found
        return _Drawn(parts, choices, values, [frozenset() if one is None else one for one in controls])

    # Marks, while the model is being staged out ------------------------------------------------------------------

    def _draw(self, draw: Callable[[Any], Any], args: tuple[Any, ...]) -> Any:
        number = self._mark(_Mark(CHOICE, address=here()))
        key, trace = draw(tuple(self._marked("argument", number, arg) for arg in args))
        return key, trace.replace(value=self._marked(CHOICE, number, trace.value))

    def _network(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if self._inside_network or isinstance(module, GenerativeFunction) or context.method_name == "setup":
            return call(*args, **kwargs)
        path = tuple(module.scope.path)
        number = self._mark(
            _Mark(NETWORK, path, here(), path[-1] if path else type(module).__name__, current_branches())
        )
        with self._inside():
            return jax.tree.map(lambda leaf: self._marked(NETWORK, number, leaf), call(*args, **kwargs))

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        self._inside_network = True
        try:
            yield
        finally:
            self._inside_network = False

    def _mark(self, mark: _Mark) -> int:
        self.marks.append(mark)
        return len(self.marks) - 1

    def _marked(self, what: str, number: int, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            # What is another tree may look at its parts when it is put together again.
            return jax.tree.map(lambda part: self._marked(what, number, part), value, is_leaf=lambda v: v is not value)
        return checkpoint_name(value, f"{_PREFIX}{what}/{number}") if isinstance(value, jax.Array) else value

    # Rules of the walk -------------------------------------------------------------------------------------------

    def _rule(self, equation: Any, before: list[Dependency]) -> list[Dependency] | None:
        kind = equation.primitive.name
        if kind == "name" and equation.params["name"].startswith(_PREFIX):
            return self._at_mark(equation.params["name"], before[0])
        if kind == "scan":
            return self._at_scan(equation.params, before)
        if kind == "cond":
            return self._at_branches(equation.params, before)
        return None

    def _at_mark(self, name: str, before: Dependency) -> list[Dependency]:
        what, number = name.removeprefix(_PREFIX).split("/")
        mark = self.marks[int(number)]
        mark.leads |= before.sources
        mark.reached = True
        return [before] if what == "argument" else [Dependency(frozenset({_Origin(int(number))}))]

    def _at_scan(self, params: Any, before: list[Dependency]) -> list[Dependency]:
        body, first, count = params["jaxpr"].jaxpr, params["num_consts"], params["num_carry"]
        inside = _marks_in(body)
        carried = [part.sources for part in before[first : first + count]]
        while True:
            state = [Dependency(sources) for sources in carried]
            after = walk(body, [*before[:first], *state, *before[first + count :]], self._rule)
            handed = [
                frozenset(_Origin(origin.mark, origin.previous or origin.mark in inside) for origin in part.sources)
                for part in after[:count]
            ]
            more = [old | new for old, new in zip(carried, handed, strict=True)]
            if more == carried:
                break
            carried = more
        # From outside, what comes from any step comes from the scan.
        return [
            Dependency(frozenset(_Origin(o.mark) if o.mark in inside else o for o in part.sources)) for part in after
        ]

    def _at_branches(self, params: Any, before: list[Dependency]) -> list[Dependency]:
        index, operands = before[0], before[1:]
        results = [walk(branch.jaxpr, operands, self._rule) for branch in params["branches"]]
        return [
            Dependency(index.sources.union(*(part.sources for part in parts))) for parts in zip(*results, strict=True)
        ]


_PREFIX = "gjflax/"


def _marks_in(jaxpr: Any) -> set[int]:
    """The numbers of all marks in a jaxpr."""
    found: set[int] = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name" and equation.params["name"].startswith(_PREFIX):
            found.add(int(equation.params["name"].split("/")[-1]))
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda part: hasattr(part, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= _marks_in(inner)
    return found


# From marks to a graph -------------------------------------------------------------------------------------------------


class _Builder:
    """Makes the graph of what a `_Recorder` found."""

    def __init__(self, recorder: _Recorder, drawn: _Drawn):
        self._marks, self._model, self._drawn = recorder.marks, recorder.model, drawn
        self._groups: dict[int, NodeGroup] = {}
        self._nodes: dict[int, Node] = {}
        self._names: collections.Counter[str] = collections.Counter()

    def graph(self) -> ModelGraph:
        self._add_groups(self._drawn.parts, None)
        self._add_choices()
        self._add_networks()
        self._add_inputs()
        edges = {edge for number in self._nodes for edge in self._edges_into(number)}
        controls = {
            self._groups[id(group)].name: {self._nodes[origin.mark].name for origin in self._known(origins)}
            for group, origins in zip(groups(self._drawn.parts), self._drawn.controls, strict=True)
            if group.control is not None
        }
        edges |= {Edge(source, name) for name, sources in controls.items() for source in sources}
        for name, sources in controls.items():
            # What decides a switch leads to all that is in it.
            edges = {edge for edge in edges if edge.source not in sources or not self._is_in(edge.target, name)}
        order = {node.name: position for position, node in enumerate(self._nodes.values())}
        listed = sorted(edges, key=lambda edge: (order[edge.source], order.get(edge.target, -1), edge))
        graph = ModelGraph(tuple(self._nodes.values()), tuple(dict.fromkeys(self._groups.values())), tuple(listed))
        return _with_chains_joined(_without_unused(graph))

    def _unique(self, name: str) -> str:
        self._names[name] += 1
        count = self._names[name]
        return name if count == 1 else self._unique(f"{name}#{count}")

    def _add_groups(self, parts: tuple[Part, ...], parent: str | None, above: tuple[Any, ...] = ()) -> None:
        for part in parts:
            if not isinstance(part, Group):
                continue
            at, own = ("/".join(map(str, path)) for path in (part.address, part.address[len(above) :]))
            if part.kind == BRANCH:
                name, label = f"{parent}.{part.title}", part.title.replace("branches_", "branch ")
            else:
                name, label = f"{part.title}({at})", own or part.title
            if part.kind == SWITCH and own:
                label = f"{own}: {part.title}"
            group = NodeGroup(self._unique(name), part.kind, label, part.length, parent, part.address)
            self._groups[id(part)] = group
            inner = part.parts
            if part.kind == SWITCH and len(inner) == 1 and isinstance(inner[0], Group):
                # The only branch, of a mask, is the switch itself.
                self._groups[id(inner[0])] = group
                inner = inner[0].parts
            self._add_groups(inner, group.name, part.address)

    def _add_choices(self) -> None:
        free = {number for number, mark in enumerate(self._marks) if mark.kind == CHOICE and mark.reached}
        addresses = collections.Counter(choice.address for choice in self._drawn.choices)
        for choice, origins in zip(self._drawn.choices, self._drawn.values, strict=True):
            own = sorted(origin.mark for origin in origins if origin.mark in free)
            number = next((n for n in own if self._marks[n].address == choice.address), own[0] if own else None)
            if number is None:
                # Drawn by a generative function that is no distribution: it depends on what leads to its value.
                number = len(self._marks)
                self._marks.append(_Mark(CHOICE, leads=set(origins)))
            free.discard(number)
            name = "/".join(map(str, choice.address)) or "choice"
            branches = [group.title for group in choice.around if group.kind == BRANCH]
            if addresses[choice.address] > 1 and branches:
                name = f"{name}@{branches[-1]}"
            above = choice.around[-1].address if choice.around else ()
            label = "/".join(map(str, choice.address[len(above) :] or choice.address[-1:])) or choice.distribution
            self._nodes[number] = Node(
                self._unique(name),
                CHOICE,
                label,
                choice.distribution,
                choice.shape[choice.axes :],
                choice.discrete,
                group=self._groups[id(choice.around[-1])].name if choice.around else None,
                address=choice.address,
            )

        # In the order in which they are drawn.
        self._nodes = dict(sorted(self._nodes.items()))

    def _add_networks(self) -> None:
        variables = self._model.named_variables()
        for number, mark in enumerate(self._marks):
            if mark.kind != NETWORK or not mark.reached:
                continue
            own = [leaf.size for path, leaf in variables if path[0] == "params" and _is_below(path[1:], mark.path)]
            detail = f"{sum(own):,} parameters".replace(",", " ") if own else ""
            around = self._around(mark)
            group = self._groups[id(around[-1])].name if around else None
            name = self._unique(f"net:{'/'.join(mark.path) or mark.label}")
            self._nodes[number] = Node(name, NETWORK, mark.label, detail, group=group)

    def _around(self, mark: _Mark) -> list[Group]:
        """The groups in which a network stands: those of the body that calls it."""
        found: list[Group] = []
        parts, branches = self._drawn.parts, list(mark.branches)
        while True:
            inner = [
                part
                for part in parts
                if isinstance(part, Group)
                and mark.address[: len(part.address)] == part.address
                and (part.kind != BRANCH or part.title in branches[:1])
            ]
            if len(inner) != 1:
                return found
            found.append(inner[0])
            parts, branches = inner[0].parts, branches[inner[0].kind == BRANCH :]

    def _add_inputs(self) -> None:
        """Arguments, and parameters that are no network's."""
        names = self._model.module.argument_names()
        merged: dict[tuple[str, Path], Node] = {}
        for number, mark in enumerate(self._marks):
            if mark.kind not in (ARGUMENT, PARAMETER) or (mark.kind, mark.path) in merged:
                if (mark.kind, mark.path) in merged:
                    self._nodes[number] = merged[mark.kind, mark.path]
                continue
            if mark.kind == ARGUMENT:
                position = int(mark.path[0])
                label = names[position] if position < len(names) else f"argument {position}"
                leaves = jax.tree.leaves(self._model.args[position])
                shape = tuple(leaves[0].shape) if len(leaves) == 1 else None
                node = Node(self._unique(f"arg:{label}"), ARGUMENT, label, shape=shape)
            else:
                path = mark.path[1:] if mark.path[0] == "params" else mark.path
                label, shape = "/".join(path), self._model.named_variables()[number][1].shape
                node = Node(self._unique(f"param:{label}"), PARAMETER, label, shape=tuple(shape))
            merged[mark.kind, mark.path] = self._nodes[number] = node

    def _known(self, origins: Iterable[_Origin]) -> list[_Origin]:
        """The origins that have a node; in the place of choices that are integrated out, what leads to these."""
        found: dict[_Origin, None] = {}
        left, seen = list(origins), set()
        while left:
            origin = left.pop()
            if origin.mark in self._nodes:
                found[origin] = None
            elif self._marks[origin.mark].kind == CHOICE and origin not in seen:
                seen.add(origin)
                leads = self._marks[origin.mark].leads
                left += [_Origin(lead.mark, lead.previous or origin.previous) for lead in leads]
        return list(found)

    def _is_in(self, name: str, group: str) -> bool:
        """Whether a node or group stands in a group."""
        above = {node.name: node.group for node in self._nodes.values()}
        above |= {inner.name: inner.parent for inner in self._groups.values()}
        around = above[name]
        return around is not None and (around == group or self._is_in(around, group))

    def _edge(self, origin: _Origin, target: str) -> Edge:
        return Edge(self._nodes[origin.mark].name, target, origin.previous)

    def _edges_into(self, number: int) -> Iterator[Edge]:
        mark, node = self._marks[number], self._nodes[number]
        for origin in self._known(mark.leads):
            source = self._marks[origin.mark]
            if node.kind == NETWORK and source.kind == PARAMETER and _is_below(source.path[1:], mark.path):
                continue
            if origin.mark != number or origin.previous:
                yield self._edge(origin, node.name)


def _is_below(path: Path, above: Path) -> bool:
    return path[: len(above)] == above


def _without_unused(graph: ModelGraph) -> ModelGraph:
    """The graph without arguments, parameters and networks that no choice depends on."""
    while True:
        used = {edge.source for edge in graph.edges}
        nodes = tuple(node for node in graph.nodes if node.kind == CHOICE or node.name in used)
        if len(nodes) == len(graph.nodes):
            return graph
        gone = {node.name for node in graph.nodes} - {node.name for node in nodes}
        edges = tuple(edge for edge in graph.edges if edge.target not in gone)
        graph = ModelGraph(nodes, graph.groups, edges)


def _with_chains_joined(graph: ModelGraph) -> ModelGraph:
    """The graph with networks that only feed one another as one box."""
    while True:
        nodes = {node.name: node for node in graph.nodes}
        outgoing, incoming = collections.defaultdict(list), collections.defaultdict(list)
        for edge in graph.edges:
            outgoing[edge.source].append(edge)
            incoming[edge.target].append(edge)
        for edge in graph.edges:
            one, other = nodes.get(edge.source), nodes.get(edge.target)
            if one is None or other is None or one is other or edge.previous or one.group != other.group:
                continue
            if {one.kind, other.kind} == {NETWORK} and len(outgoing[one.name]) == len(incoming[other.name]) == 1:
                graph = _joined(graph, one, other)
                break
        else:
            return graph


def _joined(graph: ModelGraph, one: Node, other: Node) -> ModelGraph:
    counts = [int(node.detail.removesuffix(" parameters").replace(" ", "")) for node in (one, other) if node.detail]
    detail = f"{sum(counts):,} parameters".replace(",", " ") if counts else ""
    both = dataclasses.replace(
        one,
        name=f"{one.name}+{other.name.removeprefix('net:')}",
        label=f"{one.label}, {other.label}",
        detail=detail,
    )
    renamed = {one.name: both.name, other.name: both.name}
    edges = [
        Edge(renamed.get(edge.source, edge.source), renamed.get(edge.target, edge.target), edge.previous)
        for edge in graph.edges
        if (edge.source, edge.target) != (one.name, other.name)
    ]
    nodes = [both if node is one else node for node in graph.nodes if node is not other]
    return ModelGraph(tuple(nodes), graph.groups, tuple(dict.fromkeys(edges)))

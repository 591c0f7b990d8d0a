r"""A layered layout of a graph whose nodes stand in groups, after Sugiyama, Tagawa and Toda (1981).

Every group is laid out by itself, from the inside out, and is then one box in the layout of the group around it. In each:

1. nodes are put in layers, so that edges lead down;
2. an edge over several layers, or through the border of a group, gets a bend in each: a node without size;
3. layers are ordered by the mean position of their neighbours, up and down in turns, and the order with the fewest
   crossings kept;
4. positions are drawn to those of the neighbours as far as the order and the widths allow: a least squares problem with
   order constraints in each layer, which pooling adjacent violators solves.

Lengths are points, and y grows downwards.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from gjflax.language.graph import NETWORK, Edge, ModelGraph

MARGIN, SIBLINGS, LAYERS, BEND = 14.0, 18.0, 26.0, 12.0
CLEARANCE = 5.0
ROUNDS = 12
FINE = 1e-4
"""How much a place within a group counts beside the group's place among others."""

Point = tuple[float, float]


@dataclasses.dataclass
class Box:
    """A node, a group, or a bend (of no height): its size, and its centre within what it stands in."""

    width: float
    height: float
    x: float = 0.0
    y: float = 0.0


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything is.

    Attributes:
      boxes: of nodes and groups by name, with centres in the picture.
      bends: for each edge the points that it passes between its ends.
      width: of the picture.
      height: of the picture.
    """

    boxes: Mapping[str, Box]
    bends: Mapping[Edge, tuple[Point, ...]]
    width: float
    height: float


ROOT = ""


def layout(graph: ModelGraph, sizes: Mapping[str, Point], header: float) -> Layout:
    """The layout of a graph.

    Args:
      graph: the graph.
      sizes: width and height of every node, and the least width of every group.
      header: the height of a group's label.
    """
    return _Layout(graph, sizes, header).result()


class _Layout:
    def __init__(self, graph: ModelGraph, sizes: Mapping[str, Point], header: float):
        self._sizes, self._header = sizes, header
        self._parent = {node.name: node.group or ROOT for node in graph.nodes}
        self._parent |= {group.name: group.parent or ROOT for group in graph.groups}
        self._members: dict[str, list[str]] = defaultdict(list)
        for name, parent in self._parent.items():
            self._members[parent].append(name)
        self._boxes: dict[str, Box] = {}
        self._bends: dict[tuple[str, Edge], list[Box]] = defaultdict(list)
        self._groups = {group.name for group in graph.groups}
        self._angular = self._groups | {node.name for node in graph.nodes if node.kind == NETWORK}
        self._edges = [edge for edge in graph.edges if edge.source != edge.target and not edge.previous]

    def result(self) -> Layout:
        width, height = self._arrange(ROOT)
        origins: dict[str, Point] = {ROOT: (0.0, 0.0)}
        placed: dict[str, Box] = {}
        for name in self._outside_in():
            box, (left, top) = self._boxes[name], origins[self._parent[name]]
            placed[name] = Box(box.width, box.height, left + box.x, top + box.y)
            if name in self._groups:
                origins[name] = (left + box.x - box.width / 2, top + box.y - box.height / 2)
        bends = {}
        for edge in self._edges:
            points = []
            for group in self._passed(edge):
                left, top = origins[group]
                points += [(left + bend.x, top + bend.y) for bend in self._bends[group, edge]]
            bends[edge] = self._straightened(edge, points, placed)
        return Layout(placed, bends, width, height)

    def _straightened(self, edge: Edge, bends: list[Point], placed: Mapping[str, Box]) -> tuple[Point, ...]:
        """The bends without those that nothing stands in the way of leaving out."""
        ends = {edge.source, edge.target}
        beside = ends | {*self._around(edge.source), *self._around(edge.target)}
        beside |= {name for name in placed if any(end in self._around(name) for end in ends)}
        obstacles = [(box, name in self._angular) for name, box in placed.items() if name not in beside]
        points = [(placed[edge.source].x, placed[edge.source].y), *bends]
        points.append((placed[edge.target].x, placed[edge.target].y))
        kept, at = [points[0]], 0
        while at < len(points) - 1:
            far = len(points) - 1
            while far > at + 1 and any(_hits(points[at], points[far], *obstacle) for obstacle in obstacles):
                far -= 1
            at = far
            kept.append(points[at])
        return tuple(kept[1:-1])

    def _outside_in(self) -> Iterable[str]:
        def below(group: str) -> Iterable[str]:
            for name in self._members[group]:
                yield name
                yield from below(name)

        return below(ROOT)

    def _around(self, name: str) -> list[str]:
        """The groups that something stands in, the innermost first."""
        around = [self._parent[name]]
        while around[-1] != ROOT:
            around.append(self._parent[around[-1]])
        return around

    def _passed(self, edge: Edge) -> list[str]:
        """The groups in which an edge runs, in order."""
        up, down = self._around(edge.source), self._around(edge.target)
        meeting = next(group for group in up if group in down)
        return [*up[: up.index(meeting)], meeting, *reversed(down[: down.index(meeting)])]

    def _member(self, group: str, name: str) -> str | None:
        """What stands in the group and is, or holds, the thing of this name; None if it is outside."""
        chain = [name, *self._around(name)]
        return chain[chain.index(group) - 1] if group in chain[1:] else None

    def _arrange(self, group: str) -> Point:
        """Lay out what is in a group: its width and height."""
        for name in self._members[group]:
            if name in self._groups:
                width, height = self._arrange(name)
                self._boxes[name] = Box(max(width, self._sizes[name][0]), height)
            else:
                self._boxes[name] = Box(*self._sizes[name])
        links: list[tuple[str | None, str | None, Edge]] = []
        for edge in self._edges:
            ends = self._member(group, edge.source), self._member(group, edge.target)
            if group in self._passed(edge) and ends[0] != ends[1]:
                links.append((*ends, edge))
        return self._place(group, links)

    def _place(self, group: str, links: Sequence[tuple[str | None, str | None, Edge]]) -> Point:
        members = self._members[group]
        layer_of = _layers(members, [(a, b) for a, b, _ in links if a is not None and b is not None])
        enters, leaves = any(a is None for a, _, _ in links), any(b is None for _, b, _ in links)
        bottom = max(layer_of.values(), default=0) + 1
        layers: dict[int, list[Box]] = defaultdict(list)
        for name in members:
            layers[layer_of[name]].append(self._boxes[name])
        neighbours: list[tuple[Box, Box, float, float]] = []
        for source, target, edge in links:
            turned = source is not None and target is not None and layer_of[source] > layer_of[target]
            first = -1 if source is None else layer_of[source]
            last = bottom if target is None else layer_of[target]
            low, high = (last, first) if turned else (first, last)
            between = [*range(low + (source is not None or turned), high + (target is None and not turned))]
            chain = [Box(BEND, 0.0) for _ in between]
            for bend, layer in zip(chain, between, strict=True):
                layers[layer].append(bend)
            self._bends[group, edge] = chain[::-1] if turned else chain
            ends: list[tuple[Box, float]] = [(bend, 0.0) for bend in chain]
            start = [] if source is None else [(self._boxes[source], self._offset(source, edge, out=True))]
            end = [] if target is None else [(self._boxes[target], self._offset(target, edge, out=False))]
            ends = [*end, *ends, *start] if turned else [*start, *ends, *end]
            for (one, dx), (other, dy) in zip(ends, ends[1:], strict=False):
                neighbours.append((one, other, dx, dy))
        ordered = [layers[number] for number in sorted(layers)]
        _order(ordered, neighbours)
        _spread(ordered, neighbours)
        return self._stack(group, ordered, enters, leaves)

    def _offset(self, name: str, edge: Edge, out: bool) -> float:
        """Where an edge crosses the border of a group, from its centre."""
        if name not in self._groups or name == edge.target:
            return 0.0
        chain = self._bends[name, edge]
        at = chain[-1 if out else 0].x if chain else None
        return 0.0 if at is None else at - self._boxes[name].width / 2

    def _stack(self, group: str, layers: list[list[Box]], enters: bool, leaves: bool) -> Point:
        boxes = [box for layer in layers for box in layer]
        if not boxes:
            return 2 * MARGIN, 2 * MARGIN
        margin = MARGIN
        left = min(box.x - box.width / 2 for box in boxes) - margin
        width = max(box.x + box.width / 2 for box in boxes) + margin - left
        least = self._sizes[group][0] if group != ROOT else 0.0
        left, width = left - max(0.0, least - width) / 2, max(width, least)
        top = margin
        for number, layer in enumerate(layers):
            height = max(box.height for box in layer)
            at_border = height == 0 and ((number == 0 and enters) or (number == len(layers) - 1 and leaves))
            top = 0.0 if number == 0 and at_border else top
            for box in layer:
                box.x, box.y = box.x - left, top + height / 2
            top += height + (margin if number == 0 and at_border else LAYERS)
        height = top - LAYERS + margin + (self._header if group != ROOT else 0.0)
        if leaves and layers and all(box.height == 0 for box in layers[-1]):
            for box in layers[-1]:
                box.y = height
        return width, height


def _hits(one: Point, other: Point, box: Box, angular: bool) -> bool:
    """Whether the line between two points comes near a box, or the ellipse in it where it is not angular."""
    reach = box.width / 2 + CLEARANCE, box.height / 2 + CLEARANCE
    start = [(one[axis] - (box.x, box.y)[axis]) / reach[axis] for axis in (0, 1)]
    along = [(other[axis] - one[axis]) / reach[axis] for axis in (0, 1)]
    if not angular:
        length = along[0] ** 2 + along[1] ** 2
        nearest = min(1.0, max(0.0, -(start[0] * along[0] + start[1] * along[1]) / length)) if length else 0.0
        return sum((a + nearest * b) ** 2 for a, b in zip(start, along, strict=True)) < 1
    # What is left of the line after clipping at the sides.
    low, high = 0.0, 1.0
    for a, b in zip(start, along, strict=True):
        if abs(b) < 1e-9:
            low, high = (1.0, 0.0) if abs(a) > 1 else (low, high)
            continue
        near, far = sorted(((-1 - a) / b, (1 - a) / b))
        low, high = max(low, near), min(high, far)
    return low < high


def _layers(members: Sequence[str], links: Sequence[tuple[str, str]]) -> dict[str, int]:
    """A layer for each: below those that lead to it, and what nothing leads to just above what it leads to."""
    after: dict[str, list[str]] = defaultdict(list)
    for one, other in links:
        if other not in after[one]:
            after[one].append(other)
    order: list[str] = []
    state: dict[str, int] = {}
    forwards: list[tuple[str, str]] = []

    def visit(name: str) -> None:
        state[name] = 1
        for other in after[name]:
            # An edge back to what is being visited would close a cycle: between groups there may be one.
            if state.get(other) != 1:
                forwards.append((name, other))
                if other not in state:
                    visit(other)
        state[name] = 2
        order.append(name)

    for name in members:
        if name not in state:
            visit(name)
    layer = dict.fromkeys(members, 0)
    for name in reversed(order):
        for one, other in forwards:
            if one == name:
                layer[other] = max(layer[other], layer[one] + 1)
    has_source = {other for _, other in forwards}
    for name in members:
        below = [layer[other] for one, other in forwards if one == name]
        if name not in has_source and below:
            layer[name] = min(below) - 1
    return layer


Neighbours = Sequence[tuple[Box, Box, float, float]]


def _order(layers: list[list[Box]], neighbours: Neighbours) -> None:
    """Order every layer so that few edges cross."""
    near: dict[int, list[tuple[Box, float]]] = defaultdict(list)
    for one, other, dx, dy in neighbours:
        near[id(one)].append((other, dy * FINE))
        near[id(other)].append((one, dx * FINE))
    where = {id(box): (number, float(at)) for number, layer in enumerate(layers) for at, box in enumerate(layer)}
    best, fewest = [list(layer) for layer in layers], _crossings(layers, neighbours)
    for turn in range(ROUNDS):
        step = 1 if turn % 2 == 0 else -1
        for number in range(len(layers))[::step]:

            def mean(box: Box, number: int = number, step: int = step) -> float:
                beside = [where[id(b)][1] + d for b, d in near[id(box)] if where[id(b)][0] == number - step]
                return sum(beside) / len(beside) if beside else where[id(box)][1]

            layers[number].sort(key=mean)
            for at, box in enumerate(layers[number]):
                where[id(box)] = (number, float(at))
        crossings = _crossings(layers, neighbours)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    layers[:] = best


def _crossings(layers: list[list[Box]], neighbours: Neighbours) -> int:
    at = {id(box): (number, place) for number, layer in enumerate(layers) for place, box in enumerate(layer)}
    lines = [
        (at[id(one)][0], at[id(one)][1] + dx * FINE, at[id(other)][1] + dy * FINE) for one, other, dx, dy in neighbours
    ]
    return sum(
        a[0] == b[0] and (a[1] - b[1]) * (a[2] - b[2]) < 0
        for number, a in enumerate(lines)
        for b in lines[number + 1 :]
    )


def _spread(layers: list[list[Box]], neighbours: Neighbours) -> None:
    """Put every box near its neighbours, in the order of its layer."""
    near: dict[int, list[tuple[Box, float]]] = defaultdict(list)
    for one, other, dx, dy in neighbours:
        near[id(one)].append((other, dy - dx))
        near[id(other)].append((one, dx - dy))
    for layer in layers:
        _apart(layer, [0.0] * len(layer))
    for turn in range(2 * ROUNDS):
        for layer in layers if turn % 2 == 0 else layers[::-1]:
            wanted = [
                sum(other.x + shift for other, shift in near[id(box)]) / len(near[id(box)]) if near[id(box)] else box.x
                for box in layer
            ]
            _apart(layer, wanted)


def _apart(layer: list[Box], wanted: list[float]) -> None:
    """The positions nearest to those wanted at which the boxes do not overlap, in order."""
    starts, at = [], 0.0
    for number, box in enumerate(layer):
        at += box.width / 2 + (SIBLINGS + layer[number - 1].width / 2 if number else 0.0)
        starts.append(at)
    pools: list[list[float]] = []
    for want, start in zip(wanted, starts, strict=True):
        pools.append([want - start, 1.0])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (one, many), (other, more) = pools[-2], pools.pop()
            pools[-1] = [(one * many + other * more) / (many + more), many + more]
    shifts = [shift for shift, count in pools for _ in range(int(count))]
    for box, start, shift in zip(layer, starts, shifts, strict=True):
        box.x = start + shift

"""The layered layout: nothing overlaps, groups hold what is in them, edges lead down."""

from __future__ import annotations

import random

import pytest

from gjflax.language.graph import CHOICE, Edge, ModelGraph, Node, NodeGroup
from gjflax.visualization.layout import Box, Layout, layout

HEADER = 60.0


def made(nodes: dict[str, str | None], groups: dict[str, str | None], edges: list[tuple[str, str]]) -> ModelGraph:
    return ModelGraph(
        tuple(Node(name, CHOICE, name, group=group) for name, group in nodes.items()),
        tuple(NodeGroup(name, "plate", name, 3, parent) for name, parent in groups.items()),
        tuple(Edge(*pair) for pair in edges),
    )


def laid_out(graph: ModelGraph) -> Layout:
    sizes = {node.name: (60.0, 40.0) for node in graph.nodes} | {group.name: (50.0, 0.0) for group in graph.groups}
    return layout(graph, sizes, HEADER)


def sides(box: Box) -> tuple[float, float, float, float]:
    return box.x - box.width / 2, box.x + box.width / 2, box.y - box.height / 2, box.y + box.height / 2


def overlap(one: Box, other: Box) -> bool:
    (a, b, c, d), (e, f, g, h) = sides(one), sides(other)
    return a < f and e < b and c < h and g < d


def check(graph: ModelGraph) -> Layout:
    found = laid_out(graph)
    parents = {node.name: node.group for node in graph.nodes} | {group.name: group.parent for group in graph.groups}

    def around(name: str) -> set[str]:
        parent = parents[name]
        return set() if parent is None else {parent, *around(parent)}

    boxes = found.boxes
    assert set(boxes) == set(parents)
    for name, box in boxes.items():
        left, right, top, bottom = sides(box)
        assert left >= 0 and top >= 0 and right <= found.width + 1e-6 and bottom <= found.height + 1e-6
        for outer in around(name):
            frame = sides(boxes[outer])
            assert left > frame[0] and right < frame[1] and top > frame[2] and bottom <= frame[3] - HEADER
        for other in boxes:
            if other != name and other not in around(name) and name not in around(other):
                assert not overlap(box, boxes[other]), (name, other)
    return found


CHAIN = made({"a": None, "b": None, "c": None}, {}, [("a", "b"), ("b", "c"), ("a", "c")])
PLATES = made(
    {"mu": None, "tau": None, "mean": "outer", "y": "inner", "end": None},
    {"outer": None, "inner": "outer"},
    [("mu", "mean"), ("tau", "mean"), ("mean", "y"), ("mu", "y"), ("y", "end")],
)
CROSSED = made({"a": None, "b": None, "c": None, "d": None}, {}, [("a", "d"), ("b", "c")])
BETWEEN_GROUPS = made({"a": "one", "b": "two", "c": "one"}, {"one": None, "two": None}, [("a", "b"), ("b", "c")])


@pytest.mark.parametrize(
    "graph", [CHAIN, PLATES, CROSSED, BETWEEN_GROUPS], ids=["chain", "plates", "crossed", "groups"]
)
def test_nothing_overlaps(graph: ModelGraph):
    found = check(graph)
    if graph is not BETWEEN_GROUPS:  # between these edges lead both ways
        for edge in graph.edges:
            assert found.boxes[edge.source].y < found.boxes[edge.target].y


def test_edges_are_not_crossed_without_need():
    boxes = check(CROSSED).boxes
    assert (boxes["a"].x < boxes["b"].x) == (boxes["d"].x < boxes["c"].x)


def test_an_edge_past_a_node_bends():
    found = check(CHAIN)
    assert found.bends[Edge("a", "b")] == found.bends[Edge("b", "c")] == ()
    ((x, y),) = found.bends[Edge("a", "c")]
    box = found.boxes["b"]
    assert abs(x - box.x) > box.width / 2 and y == box.y


def test_an_input_stands_just_above_what_it_leads_to():
    graph = made({"a": None, "b": None, "c": None, "x": None}, {}, [("a", "b"), ("b", "c"), ("x", "c")])
    boxes = check(graph).boxes
    assert boxes["x"].y == boxes["b"].y


def test_a_graph_without_nodes_has_a_picture():
    found = laid_out(made({}, {}, []))
    assert found.boxes == {} and found.width > 0


@pytest.mark.parametrize("seed", range(15))
def test_random_graphs(seed: int):
    draw = random.Random(seed)
    groups: dict[str, str | None] = {}
    for number in range(draw.randint(0, 4)):
        groups[f"g{number}"] = draw.choice([None, *groups])
    nodes = {f"n{number}": draw.choice([None, *groups]) for number in range(draw.randint(1, 12))}
    nodes |= {f"in_{group}": group for group in groups}
    names = list(nodes)
    pairs = {
        tuple(sorted(draw.sample(range(len(names)), 2)))
        for _ in range(draw.randint(0, 2 * len(names)))
        if len(names) > 1
    }
    check(made(nodes, groups, [(names[a], names[b]) for a, b in sorted(pairs)]))

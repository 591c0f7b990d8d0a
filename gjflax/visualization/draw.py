"""A model's graph as a picture, by matplotlib.

Choices are ellipses, observed ones shaded, networks boxes, parameters and arguments small. Plates and steps are rounded
frames, branches dashed ones. A dashed edge comes from the step before.
"""

from __future__ import annotations

import io
import math
from typing import Any

from gjflax.core.outline import BRANCH, PLATE, STEPS, SWITCH
from gjflax.language.graph import ARGUMENT, CHOICE, NETWORK, Edge, ModelGraph, Node, NodeGroup
from gjflax.visualization.captions import PREVIOUS, caption, detail
from gjflax.visualization.layout import Box, Layout, Point, layout

INK, FAINT, PAPER = "#22303c", "#66757f", "#ffffff"
FILL = {"no": PAPER, "partly": "#e4e8ec", "yes": "#bcc6cf"}
NETWORK_FILL, NETWORK_INK = "#e8f0fb", "#3b6ea8"
INPUT_INK = "#8a6d3b"
GROUP_FILL = {PLATE: "#f7f9fa", STEPS: "#f7f9fa", SWITCH: "#fbf8f2", BRANCH: "#fffdf8"}
GROUP_INK = {PLATE: "#9aa7b1", STEPS: "#9aa7b1", SWITCH: "#c2a878", BRANCH: "#c2a878"}

LARGE, SMALL, HEADER, LOOP = 11.0, 7.5, 13.0, 34.0


def _text_width(text: str, size: float) -> float:
    """The width of a text in a font of usual proportions."""
    narrow = sum(character in "iljtf.,:;|![]()' " for character in text)
    wide = sum(character in "mwMW@" or character.isupper() for character in text)
    return size * (0.6 * len(text) - 0.26 * narrow + 0.16 * wide)


def _size(node: Node, loop: bool) -> Point:
    width = max(_text_width(node.label, LARGE), _text_width(detail(node), SMALL))
    two = bool(detail(node))
    if node.kind == CHOICE:
        width, height = max(58.0, 1.2 * width + 16.0), 40.0 if two else 34.0
    elif node.kind == NETWORK:
        width, height = max(64.0, width + 20.0), 34.0 if two else 26.0
    else:
        width, height = max(24.0, width + 10.0), 26.0 if two else 18.0
    return width + (2 * LOOP if loop else 0.0), height


def draw(graph: ModelGraph) -> Any:
    """The picture, a matplotlib figure."""
    from matplotlib.figure import Figure

    loops = {edge.source for edge in graph.edges if edge.source == edge.target}
    sizes = {node.name: _size(node, node.name in loops) for node in graph.nodes}
    sizes |= {group.name: (_text_width(caption(group), SMALL) + 20.0, 0.0) for group in graph.groups}
    placed = layout(graph, sizes, HEADER)
    figure = Figure(figsize=(placed.width / 72, placed.height / 72), facecolor=PAPER)
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, placed.width)
    axes.set_ylim(placed.height, 0)
    axes.axis("off")
    picture = _Picture(axes, graph, placed)
    for depth, group in enumerate(graph.groups):
        picture.group(group, depth)
    for edge in graph.edges:
        picture.edge(edge)
    for node in graph.nodes:
        picture.node(node)
    return figure


def save(graph: ModelGraph, file: Any, format: str, resolution: int = 160) -> None:
    """Draw the graph to a file, or to a buffer."""
    import matplotlib

    # Fixed names inside the picture, so that the same graph gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "gjflax", "svg.fonttype": "none", "font.family": "DejaVu Sans"}):
        metadata = {"Date": None} if format == "svg" else None
        draw(graph).savefig(file, format=format, dpi=resolution, metadata=metadata)


def svg(graph: ModelGraph) -> str:
    """The picture as the text of an SVG."""
    buffer = io.StringIO()
    save(graph, buffer, "svg")
    return buffer.getvalue()


class _Picture:
    def __init__(self, axes: Any, graph: ModelGraph, placed: Layout):
        self._axes, self._placed = axes, placed
        self._nodes = {node.name: node for node in graph.nodes}
        loops = {edge.source for edge in graph.edges if edge.source == edge.target}
        # A node with a loop has room for it on both sides, so that it stands above and below others.
        self._boxes = {
            name: Box(box.width - 2 * LOOP, box.height, box.x, box.y) if name in loops else box
            for name, box in placed.boxes.items()
        }

    def group(self, group: NodeGroup, depth: int) -> None:
        from matplotlib.patches import FancyBboxPatch

        box = self._boxes[group.name]
        style: dict[str, Any] = {"linestyle": (0, (4, 3))} if group.kind == BRANCH else {}
        corner = box.x - box.width / 2, box.y - box.height / 2
        self._axes.add_patch(
            FancyBboxPatch(
                corner,
                box.width,
                box.height,
                boxstyle="round,pad=0,rounding_size=7",
                facecolor=GROUP_FILL[group.kind],
                edgecolor=GROUP_INK[group.kind],
                linewidth=1.1,
                zorder=0.1 + 0.01 * depth,
                **style,
            )
        )
        right, bottom = box.x + box.width / 2 - 7, box.y + box.height / 2 - 6
        paper = {"facecolor": GROUP_FILL[group.kind], "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        words = {"ha": "right", "va": "bottom", "zorder": 3, "bbox": paper}
        self._axes.text(right, bottom, caption(group), fontsize=SMALL, color=FAINT, **words)

    def node(self, node: Node) -> None:
        from matplotlib.patches import Ellipse, FancyBboxPatch

        box, below = self._boxes[node.name], detail(node)
        ink, look = INK, {"linewidth": 1.2, "zorder": 4}
        if node.kind == CHOICE:
            fill = FILL[node.observed]
            self._axes.add_patch(Ellipse((box.x, box.y), box.width, box.height, facecolor=fill, edgecolor=INK, **look))
        elif node.kind == NETWORK:
            ink = NETWORK_INK
            corner = box.x - box.width / 2, box.y - box.height / 2
            shape = FancyBboxPatch(
                corner, box.width, box.height, boxstyle="round,pad=0,rounding_size=2", facecolor=NETWORK_FILL, **look
            )
            shape.set_edgecolor(NETWORK_INK)
            self._axes.add_patch(shape)
        else:
            ink = INPUT_INK
        size = LARGE if node.kind in (CHOICE, NETWORK) else 9.0
        style = "italic" if node.kind == ARGUMENT else "normal"
        up = 4.5 if below else 0.0
        words = {"ha": "center", "va": "center", "zorder": 5}
        self._axes.text(box.x, box.y - up, node.label, fontsize=size, color=ink, style=style, **words)
        if below:
            self._axes.text(box.x, box.y + 8.0, below, fontsize=SMALL, color=FAINT, **words)

    def edge(self, edge: Edge) -> None:
        source, target = self._boxes[edge.source], self._boxes[edge.target]
        if edge.source == edge.target:
            self._loop(source)
            return
        if edge.previous:
            self._back(edge, source, target)
            return
        bends = self._placed.bends.get(edge, ())
        points = [(source.x, source.y), *bends, (target.x, target.y)]
        points[0] = self._border(edge.source, points[1])
        points[-1] = self._border(edge.target, points[-2])
        self._arrow(_smooth(points))

    def _border(self, name: str, towards: Point) -> Point:
        """Where the line from the centre to a point leaves the outline."""
        box, gap = self._boxes[name], 1.5
        dx, dy = towards[0] - box.x, towards[1] - box.y
        if dx == dy == 0:
            return box.x, box.y
        half = box.width / 2 + gap, box.height / 2 + gap
        node = self._nodes.get(name)
        if node is not None and node.kind == CHOICE:
            scale = 1 / math.hypot(dx / half[0], dy / half[1])
        else:
            scale = 1 / max(abs(dx) / half[0], abs(dy) / half[1])
        return box.x + scale * dx, box.y + scale * dy

    def _arrow(self, path: tuple[list[Point], list[int]], dashed: bool = False) -> None:
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path

        look: dict[str, Any] = {"linestyle": (0, (3, 2))} if dashed else {}
        self._axes.add_patch(
            FancyArrowPatch(
                path=Path(*path),
                arrowstyle="-|>,head_length=4.5,head_width=2.2",
                facecolor=INK if not dashed else FAINT,
                edgecolor=INK if not dashed else FAINT,
                linewidth=1.0,
                shrinkA=0,
                shrinkB=0,
                zorder=2,
                **look,
            )
        )

    def _loop(self, box: Box) -> None:
        start = (box.x + 0.38 * box.width, box.y - 0.33 * box.height)
        end = (box.x + 0.38 * box.width + 1, box.y + 0.33 * box.height + 1)
        out = box.x + box.width / 2 + 30
        controls = [(out, box.y - 0.75 * box.height), (out, box.y + 0.75 * box.height)]
        self._arrow(([start, *controls, end], [1, 4, 4, 4]), dashed=True)
        self._previous(box.x + box.width / 2 + 20, box.y)

    def _back(self, edge: Edge, source: Box, target: Box) -> None:
        side = max(source.x + source.width / 2, target.x + target.width / 2) + 16
        start, end = (source.x + source.width / 2, source.y), (target.x + target.width / 2 + 2, target.y)
        if abs(source.y - target.y) < 1:
            # Side by side: over the top.
            top = min(source.y - source.height / 2, target.y - target.height / 2) - 14
            start, end = (source.x, source.y - source.height / 2), (target.x, target.y - target.height / 2 - 2)
            self._arrow(([start, (source.x, top), (target.x, top), end], [1, 4, 4, 4]), dashed=True)
            self._previous((source.x + target.x) / 2, top + 2)
            return
        self._arrow(([start, (side, source.y), (side, target.y), end], [1, 4, 4, 4]), dashed=True)
        self._previous(0.25 * (source.x + source.width / 2) + 0.75 * side, (source.y + target.y) / 2)

    def _previous(self, x: float, y: float) -> None:
        paper = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
        words = {"ha": "center", "va": "center", "zorder": 6, "bbox": paper}
        self._axes.text(x, y, PREVIOUS, fontsize=SMALL, color=FAINT, **words)


def _smooth(points: list[Point]) -> tuple[list[Point], list[int]]:
    """A curve through points, which passes those between the ends vertically."""
    vertices, codes = [points[0]], [1]
    for number, (one, other) in enumerate(zip(points, points[1:], strict=False)):
        if len(points) == 2:
            return [one, other], [1, 2]
        half = 0.5 * (other[1] - one[1])
        leave = (one[0], one[1] + half) if number else (one[0] + 0.3 * (other[0] - one[0]), one[1] + half)
        arrive = (other[0], other[1] - half)
        if number == len(points) - 2:
            arrive = (other[0] - 0.3 * (other[0] - one[0]), other[1] - half)
        vertices += [leave, arrive, other]
        codes += [4, 4, 4]
    return vertices, codes

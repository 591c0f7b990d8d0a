"""A model's graph as text: for graphviz, and for mermaid."""

from __future__ import annotations

from collections.abc import Iterator

from gjflax.core.outline import BRANCH
from gjflax.language.graph import ARGUMENT, CHOICE, NETWORK, PARAMETER, Edge, ModelGraph, Node
from gjflax.visualization.captions import PREVIOUS, caption, detail

_MERMAID_SHAPES = {CHOICE: ("([", "])"), NETWORK: ("[", "]"), PARAMETER: ("(", ")"), ARGUMENT: ("[/", "/]")}

_MERMAID_CLASSES = """\
  classDef choice fill:#ffffff,stroke:#22303c,color:#22303c
  classDef observed fill:#bcc6cf,stroke:#22303c,color:#22303c
  classDef partly fill:#e4e8ec,stroke:#22303c,color:#22303c
  classDef network fill:#e8f0fb,stroke:#3b6ea8,color:#3b6ea8
  classDef input fill:#ffffff,stroke:#ffffff,color:#8a6d3b"""

_DOT_SHAPES = {
    CHOICE: "shape=ellipse, style=filled",
    NETWORK: 'shape=box, style=filled, fillcolor="#e8f0fb", color="#3b6ea8"',
    PARAMETER: 'shape=plaintext, fontcolor="#8a6d3b"',
    ARGUMENT: 'shape=plaintext, fontcolor="#8a6d3b", fontname="italic"',
}

_DOT_FILLS = {"no": "white", "partly": "#e4e8ec", "yes": "#bcc6cf"}


def mermaid(graph: ModelGraph) -> str:
    """The graph in mermaid's language, which GitHub and many notebooks draw."""
    ids = _ids(graph)

    def lines(group: str | None, indent: str) -> Iterator[str]:
        for node in graph.nodes:
            if node.group == group:
                first, last = _MERMAID_SHAPES[node.kind]
                text = "<br/>".join(_escaped(line, "&quot;") for line in _words(node))
                yield f'{indent}{ids[node.name]}{first}"{text}"{last}:::{_mermaid_class(node)}'
        for inner in graph.groups:
            if inner.parent == group:
                yield f'{indent}subgraph {ids[inner.name]}["{_escaped(caption(inner), "&quot;")}"]'
                yield from lines(inner.name, indent + "  ")
                yield f"{indent}end"

    arrows = [
        f'  {ids[edge.source]} -. "{PREVIOUS}" .-> {ids[edge.target]}'
        if edge.previous
        else f"  {ids[edge.source]} --> {ids[edge.target]}"
        for edge in graph.edges
    ]
    return "\n".join(["flowchart TB", *lines(None, "  "), *arrows, _MERMAID_CLASSES, ""])


def graphviz(graph: ModelGraph) -> str:
    """The graph in graphviz's language, for ``dot``."""
    ids = _ids(graph)

    def lines(group: str | None, indent: str) -> Iterator[str]:
        for node in graph.nodes:
            if node.group == group:
                fill = f', fillcolor="{_DOT_FILLS[node.observed]}"' if node.kind == CHOICE else ""
                text = "\\n".join(_escaped(line, '\\"') for line in _words(node))
                yield f'{indent}{ids[node.name]} [label="{text}", {_DOT_SHAPES[node.kind]}{fill}];'
        for inner in graph.groups:
            if inner.parent == group:
                style = "rounded,dashed" if inner.kind == BRANCH else "rounded"
                yield f"{indent}subgraph cluster_{ids[inner.name]} {{"
                label = _escaped(caption(inner), '\\"')
                yield f'{indent}  label="{label}"; labeljust=r; labelloc=b; style="{style}";'
                yield from lines(inner.name, indent + "  ")
                yield f"{indent}}}"

    head = ["digraph model {", "  compound=true;", "  rankdir=TB;"]
    return "\n".join([*head, *lines(None, "  "), *(_dot_edge(graph, edge, ids) for edge in graph.edges), "}", ""])


def _dot_edge(graph: ModelGraph, edge: Edge, ids: dict[str, str]) -> str:
    looks = ["style=dashed", f'label="{PREVIOUS}"'] if edge.previous else []
    target = edge.target
    if any(group.name == target for group in graph.groups):
        # An edge to a cluster leads to a node in it, and is cut off at the border.
        looks.append(f"lhead=cluster_{ids[target]}")
        target = next(node.name for node in graph.nodes if _is_in(graph, node.group, target))
    shown = f" [{', '.join(looks)}]" if looks else ""
    return f"  {ids[edge.source]} -> {ids[target]}{shown};"


def _is_in(graph: ModelGraph, group: str | None, above: str) -> bool:
    if group is None or group == above:
        return group == above
    return _is_in(graph, next(one.parent for one in graph.groups if one.name == group), above)


def _ids(graph: ModelGraph) -> dict[str, str]:
    """Names that every tool reads."""
    nodes = {node.name: f"n{number}" for number, node in enumerate(graph.nodes)}
    return nodes | {group.name: f"g{number}" for number, group in enumerate(graph.groups)}


def _words(node: Node) -> list[str]:
    below = detail(node)
    return [node.label, below] if below else [node.label]


def _mermaid_class(node: Node) -> str:
    if node.kind == CHOICE:
        return {"no": "choice", "partly": "partly", "yes": "observed"}[node.observed]
    return "network" if node.kind == NETWORK else "input"


def _escaped(text: str, quote: str) -> str:
    return text.replace("\\", "\\\\").replace('"', quote)

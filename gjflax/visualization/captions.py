"""What is written on the nodes and groups of a model's graph."""

from __future__ import annotations

from gjflax.core.outline import STEPS
from gjflax.language.graph import CHOICE, NETWORK, Node, NodeGroup

PREVIOUS = "t−1"
"""What is written on an edge from the step before."""


def caption(group: NodeGroup) -> str:
    """What is written on a group."""
    if group.kind == STEPS:
        return f"{group.label}: {group.length} steps"
    return group.label if group.length is None else f"{group.label}: {group.length}"


def detail(node: Node) -> str:
    """What is written below the name of a node."""
    shape = f"[{', '.join(map(str, node.shape))}]" if node.shape else ""
    if node.kind == CHOICE and node.detail != node.label:
        return f"{node.detail} {shape}".strip()
    return node.detail if node.kind == NETWORK else shape

"""Which choices of a model's graph are observed: all of a choice, a part of its elements, or none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from gjflax.core.choice_map import ChoiceMap, VectorChoiceMap, choice_map
from gjflax.core.masked import Masked
from gjflax.core.selection import Selection, select
from gjflax.language.graph import CHOICE, ModelGraph, Node

Lengths = list[tuple[int, int]]
"""Of the plates and steps around a choice, the outermost first: how deep each one's address is, and its length."""


def with_observed(graph: ModelGraph, observed: Any) -> ModelGraph:
    """The graph with choices marked as observed: "yes", "partly" or "no".

    Args:
      graph: the graph.
      observed: a choice map, a nested dict, a trace, a selection or an address; None for nothing.
    """
    ask = _question(observed)
    nodes = [
        dataclasses.replace(node, observed=ask(node.address, _lengths(graph, node))) if node.kind == CHOICE else node
        for node in graph.nodes
    ]
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _question(observed: Any) -> Callable[[tuple[Any, ...], Lengths], str]:
    if observed is None:
        return lambda address, lengths: "no"
    if isinstance(observed, (str, tuple)):
        observed = select(observed)
    if isinstance(observed, Selection):
        return lambda address, lengths: _of_selection(observed, address, lengths)
    choices = choice_map(observed)
    return lambda address, lengths: _of_choices(choices, address, lengths)


def _lengths(graph: ModelGraph, node: Node) -> Lengths:
    groups = {group.name: group for group in graph.groups}
    found: Lengths = []
    name = node.group
    while name is not None:
        group = groups[name]
        if group.length is not None:
            found.insert(0, (len(group.address), group.length))
        name = group.parent
    return found


def _of_selection(selection: Selection, address: tuple[Any, ...], lengths: Lengths) -> str:
    """At every element a selection may say something else."""
    for depth in range(len(address) + 1):
        here = selection[address[:depth]] if depth else selection
        if here.mentions_indices:
            inner = list(lengths)
            own = next((pair for pair in lengths if pair[0] == depth), None)
            if own is not None:
                inner.remove(own)
            count = max(here.indices) + 1 if own is None else own[1]
            below = [(at - depth, length) for at, length in inner if at >= depth]
            found = {_of_selection(here[index], address[depth:], below) for index in range(count)}
            return next(iter(found)) if len(found) == 1 else "partly"
    return "yes" if address in selection else "no"


def _of_choices(choices: ChoiceMap, address: tuple[Any, ...], lengths: Lengths) -> str:
    partly, rest = False, address
    while isinstance(choices, VectorChoiceMap) or rest:
        if isinstance(choices, VectorChoiceMap):
            depth = len(address) - len(rest)
            own = next((pair for pair in lengths if pair[0] == depth), None)
            lengths = [pair for pair in lengths if pair is not own]
            indices = choices.static_indices
            partly = partly or indices is None or (own is not None and len(indices) < own[1])
            choices = choices.inner
        else:
            choices, rest = choices.get_submap(rest[0]), rest[1:]
    if not choices.is_value():
        return "no"
    value = choices.get_value()
    if isinstance(value, Masked):
        known = isinstance(value.flag, (bool, np.ndarray)) and bool(np.all(value.flag))
        partly = partly or not known
    return "partly" if partly else "yes"

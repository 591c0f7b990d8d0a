r"""Which costs are downstream of a choice, and on which plates element by element.

The graph is plain data: the plates that every choice stands in, and edges a → b where the arguments of b depend on the
choice a. A choice and a cost that stand in a common plate meet element by element: the elements of a `Map` do not see
each other. So an edge has a *relation*, a tuple with an entry for each of the outermost plates that both ends share:

* `SAME`: element i reaches element i only;
* `LATER`: step t reaches the steps s ≥ t (s ≤ t where they run backwards). Then the rest is not known.

What is not in the tuple mixes: all elements reach all. Along a path relations are *weakest*, entry by entry; over
several paths too. Everything else is the closure of the edges.

A score-function gradient multiplies ∇ log q(a) by the costs downstream of a alone: the others are independent of a given
what comes before it, and E[∇ log q(a)] = 0 (Schulman et al., "Gradient estimation using stochastic computation graphs",
NIPS 2015).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import lax

from gjflax.learning.sites import ELEMENTS, REVERSED_STEPS, STEPS, Plate

SAME, LATER = "same", "later"

Relation = tuple[str, ...]
Node = TypeVar("Node", bound=Hashable)


def weakest(one: Relation, other: Relation) -> Relation:
    """The relation along a path of two edges, or over two paths.

    >>> weakest(("same", "same"), ("same", "later"))
    ('same', 'later')
    >>> weakest(("same",), ())
    ()
    """
    result = []
    for a, b in zip(one, other, strict=False):
        result.append(SAME if a == b == SAME else LATER)
        if result[-1] == LATER:
            break
    return tuple(result)


def common(one: Iterable[Plate], other: Iterable[Plate]) -> Relation:
    """The relation of an edge between nodes in these plates."""
    result = []
    for a, b in zip(one, other, strict=False):
        if a != b or a.kind not in (ELEMENTS, STEPS, REVERSED_STEPS):
            break
        result.append(SAME if a.kind == ELEMENTS else LATER)
        if result[-1] == LATER:
            break
    return tuple(result)


def closure(
    plates: Mapping[Node, tuple[Plate, ...]], edges: Mapping[Node, Iterable[Node]]
) -> dict[Node, dict[Node, Relation]]:
    """For every node those that it reaches, itself first, and how.

    Args:
      plates: the plates of every node.
      edges: for every node those whose arguments depend on it.
    """
    reached = {}
    for start in plates:
        found: dict[Node, Relation] = {start: tuple(SAME for _ in plates[start])}
        waiting = [start]
        while waiting:
            node = waiting.pop()
            for after in edges.get(node, ()):
                relation = weakest(found[node], common(plates[node], plates[after]))
                known = found.get(after)
                new = relation if known is None else weakest(known, relation)
                if new != known:
                    found[after] = new
                    waiting.append(after)
        reached[start] = found
    return reached


def elementwise(relation: Relation) -> int:
    """The number of leading plates on which a relation is element by element."""
    return sum(entry == SAME for entry in relation)


def gather(cost: Any, relation: Relation, own: tuple[Plate, ...], leading: int) -> Any:
    """A cost as each element of a choice sees it: the sum over what it reaches.

    Args:
      cost: an array with `leading` axes that are no plates, then one for each plate of the cost.
      relation: how the choice reaches the cost.
      own: the plates of the choice.
      leading: see above.

    Returns:
      An array with the same leading axes and one for each of the choice's plates, of length 1 where all see the same.
    """
    kept = leading + len(relation)
    cost = jnp.sum(cost, axis=tuple(range(kept, cost.ndim)))
    if relation and relation[-1] == LATER:
        backwards = own[len(relation) - 1].kind == REVERSED_STEPS
        cost = lax.cumsum(cost, axis=kept - 1, reverse=not backwards)
    return cost.reshape(cost.shape + (1,) * (len(own) - len(relation)))

"""What combinators over elements have in common: `Map`, `Unfold`, `Scan`.

Their traces are those of the elements, with a leading axis; scores and weights are sums over it. Constraints come for
all elements (arrays with that axis, or a vector of choices that covers them) or for some, by index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap, VectorChoiceMap
from gjflax.core.context import current_address
from gjflax.core.diff import Diff, unknown_change
from gjflax.core.errors import ChoiceMapError, ChoiceShapeError, SelectionError, show_address
from gjflax.core.masked import Masked
from gjflax.core.selection import Selection
from gjflax.core.trace import Trace, canonical
from gjflax.core.typing import PRNGKey, PRNGKeys


def sum_elements(scores: Any) -> Any:
    """The sum over the map's own axis, the last one: what stands before it are axes of a batch of traces."""
    return jnp.sum(scores, axis=-1) if jnp.ndim(scores) else scores


def split_key(key: PRNGKey, count: int) -> tuple[PRNGKey, PRNGKeys]:
    key, below = jax.random.split(key)
    return key, jax.random.split(below, count)


def write_elements(full: Trace, part: Trace, indices: Any) -> Trace:
    return jax.tree.map(lambda leaf, new: jnp.asarray(leaf).at[indices].set(new), full, part)


def given_elements(choices: ChoiceMap, length: int) -> tuple[ChoiceMap, Any]:
    """The inner choices, with the elements on the leading axis; and the indices, None for all in order."""
    if choices.is_empty():
        return EmptyChoiceMap(), None
    if isinstance(choices, VectorChoiceMap):
        if choices.covers(length):
            return choices.inner, None
        indices = choices.static_indices
        if indices is not None and sorted(indices) == list(range(length)):
            order = np.argsort(indices)
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[order], choices.inner), None
        if indices is not None and max(indices) >= length:
            raise ChoiceMapError(
                f"The choice map gives element {max(indices)} of {show_address(current_address())}, which has "
                f"{length} elements (0 to {length - 1})."
            )
        return choices.inner, jnp.asarray(choices.index_array())
    choices = _flag_each(choices, length)
    for address in choices.addresses():
        for leaf in jax.tree.leaves(choices.get_subtree(address).get_value()):
            if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != length:
                raise ChoiceShapeError(
                    f"The value given for {show_address((*current_address(), *address))} has shape "
                    f"{jnp.shape(leaf)}; here every value has a leading axis of {length}, one entry for each element "
                    "or step. Give some of them by index, with a `VectorChoiceMap`."
                )
    return jax.tree.map(jnp.asarray, choices), None


def _flag_each(choices: ChoiceMap, length: int) -> ChoiceMap:
    """One flag for all elements becomes one for each."""

    def spread(value: Any) -> Any:
        if isinstance(value, Masked) and jnp.ndim(value.flag) == 0:
            return Masked(value.value, jnp.broadcast_to(jnp.asarray(value.flag), (length,)))
        return value

    return jax.tree.map(spread, choices, is_leaf=lambda value: isinstance(value, Masked))


def check_selection(selection: Selection, length: int) -> None:
    if selection.indices and max(selection.indices) >= length:
        raise SelectionError(
            f"The selection names element {max(selection.indices)} of {show_address(current_address())}, which has "
            f"{length} elements (0 to {length - 1})."
        )


def by_selection(selection: Selection, length: int) -> list[tuple[Selection, np.ndarray]]:
    """The elements grouped by what is selected in them."""
    groups: dict[Selection, list[int]] = {}
    for index in range(length):
        groups.setdefault(selection[index], []).append(index)
    return [(subselection, np.asarray(positions)) for subselection, positions in groups.items()]


def simulate_element(inner: Any, key: Any, args: Any) -> Any:
    return inner.simulate(key, args)[1]


def importance_of_element(inner: Any, key: Any, choices: Any, args: Any, **options: Any) -> Any:
    return inner.importance(key, choices, args, **options)[1]


def assess_element(inner: Any, key: Any, choices: Any, args: Any, **options: Any) -> Any:
    _, (retval, score) = inner.assess(key, choices, args, **options)
    return canonical(retval), score


def update_element(inner: Any, key: Any, trace: Any, choices: Any, args: Any, **options: Any) -> Any:
    argdiffs = Diff.mark(args, unknown_change)
    _, (_, weight, trace, discard) = inner.update(key, trace, choices, argdiffs, **options)
    return weight, trace, discard


def regenerate_element(selection: Selection) -> Callable[..., Any]:
    def regenerate(inner: Any, key: Any, trace: Any, args: Any, **options: Any) -> Any:
        argdiffs = Diff.mark(args, unknown_change)
        _, (_, weight, trace) = inner.regenerate(key, trace, selection, argdiffs, **options)
        return weight, trace

    return regenerate


def constrain_element(inner: Any, unconstrained: Any, fixed: Any, args: Any) -> Any:
    return inner.constrain(unconstrained, args, fixed=fixed)


def with_options(function: Callable[..., Any], strict: bool, param_diff: Any = unknown_change) -> Callable[..., Any]:
    """The function with the options that differ from what every generative function assumes."""
    options = {} if strict else {"strict": False}
    if param_diff is not unknown_change:
        options["param_diff"] = param_diff
    return lambda *args: function(*args, **options)

"""The sweep finds errors: known errors of other libraries are planted, and it must fail.

Each is one of `Gen`'s or `GenJAX`'s, as their users met it, or a slip that is easily made.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from sweep.combinators import Network
from sweep.generate import Dialect, Writer
from sweep.laws import Discrepancy, Session
from sweep.programs import Body, Call, Leaf, Map, Node
from sweep.sweeping import sweep
from sweep.writers import default_dialect

import gjflax
from gjflax.combinators.branching import Branching
from gjflax.core import interface
from gjflax.core.choice_map import ValueChoiceMap
from gjflax.language import handlers, incremental

BRANCHES = default_dialect(combinators=("Switch", "Cond"), networks=False)
SIMPLE = default_dialect(combinators=("Map",), networks=False)

Change = Callable[[Any], Any]


def after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, change: Change) -> None:
    """Let a method's result be changed."""
    method = getattr(owner, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(method(*args, **kwargs))

    monkeypatch.setattr(owner, name, changed)


def finds_it(dialect: Dialect, programs: int = 30) -> None:
    with pytest.raises(Discrepancy):
        sweep(dialect, programs, seed=0, shrink=False)


@pytest.mark.parametrize("method", ["_update_any", "_regenerate_any"])
def test_a_branch_that_flips_with_weight_zero(monkeypatch: pytest.MonkeyPatch, method: str):
    def change(result: Any) -> Any:
        key, (retdiff, weight, *rest) = result
        return key, (retdiff, jnp.zeros_like(weight), *rest)

    after(monkeypatch, Branching, method, change)
    finds_it(BRANCHES)


def test_a_leaf_that_stores_the_weight_as_its_score(monkeypatch: pytest.MonkeyPatch):
    def change(result: Any) -> Any:
        key, (retdiff, weight, trace, discard) = result
        return key, (retdiff, weight, trace.replace(score=weight), discard)

    after(monkeypatch, gjflax.Distribution, "update", change)
    finds_it(SIMPLE)


def test_unchanged_values_among_what_is_discarded(monkeypatch: pytest.MonkeyPatch):
    def change(result: Any) -> Any:
        key, (retdiff, weight, trace, discard) = result
        return key, (retdiff, weight, trace, ValueChoiceMap(trace.value) if discard.is_empty() else discard)

    after(monkeypatch, gjflax.Distribution, "update", change)
    finds_it(SIMPLE)


def test_a_misspelt_constraint_that_is_accepted(monkeypatch: pytest.MonkeyPatch):
    for module in (handlers, incremental):
        monkeypatch.setattr(module, "check_visited", lambda *args: None)
    finds_it(SIMPLE)


def inline_network(writer: Writer) -> Body:
    """A body that makes a network in two maps inline, and draws around what it gives. Random programs rarely hold one."""
    network: Node = Network("network")
    for length in (3, 2):
        network = Map(network, length, (0,), False, False)
    made = Call("means", ("means",), network, (writer.expression(network.inputs[0], []),), is_inline=True)
    drawn = Leaf("Normal", (2,), (False, True))
    args = tuple(writer.expression(kind, writer.known(made)) for kind in drawn.inputs)
    return Body((), (made, Call("y", ("y",), drawn, args)), args[0], drawn.inputs[0])


def try_inline_networks() -> None:
    for seed in range(3):
        writer = Writer(random.Random(seed).randrange, default_dialect())
        session = Session(inline_network(writer), writer)
        session.simulate()
        for _ in range(4):
            session.update()
            session.regenerate()


def test_parameters_that_do_not_reach_a_network_made_inline(monkeypatch: pytest.MonkeyPatch):
    """Those of one scope were looked for, of several that a transformation has."""
    try_inline_networks()

    def of_one_scope(module: Any) -> bool:
        return not module.scope.is_mutable_collection("params") and not jax.tree.leaves(
            dict(module.scope.root.variables())
        )

    monkeypatch.setattr(interface, "_has_no_variables", of_one_scope)
    with pytest.raises(Discrepancy, match="weight|score|retval"):
        try_inline_networks()


def test_a_weight_of_the_wrong_sign(monkeypatch: pytest.MonkeyPatch):
    def change(result: Any) -> Any:
        key, (retdiff, weight, *rest) = result
        return key, (retdiff, -weight, *rest)

    after(monkeypatch, gjflax.Distribution, "regenerate", change)
    finds_it(SIMPLE)


def test_elements_that_share_their_randomness(monkeypatch: pytest.MonkeyPatch):
    def one_for_all(key: Any, length: int) -> Any:
        return key, jnp.broadcast_to(jax.random.split(key)[0], (length,))

    monkeypatch.setattr("gjflax.combinators.map.split_key", one_for_all)
    finds_it(SIMPLE)


def test_a_density_without_its_scale(monkeypatch: pytest.MonkeyPatch):
    """The normal density of a library in which it was right for a scale of one only."""
    from gjflax.distributions import native

    monkeypatch.setattr(native, "_normal", lambda value, loc, scale: -0.5 * ((value - loc) / scale) ** 2 - 0.9189385)
    finds_it(SIMPLE)

"""Selections: sets of addresses, checked by enumeration of a small universe."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gjflax
from gjflax import AllSelection, BuiltinSelection, NoneSelection, Selection, choice_map, select

UNIVERSE = [
    ("a",),
    ("b",),
    ("b", "c"),
    ("b", "d"),
    ("b", "c", "e"),
    ("b", 0),
    ("b", 1),
    ("b", 0, "c"),
    ("b", 1, "c"),
    ("b", 1, "d"),
    ("c",),
]

ATOMS = [
    select("a"),
    select("b"),
    select(("b", "c")),
    select(("b", 1)),
    select(("b", 0, "c"), "c"),
    select(("b", "d"), ("b", 0)),
    AllSelection(),
    NoneSelection(),
]

PAIRS = list(itertools.combinations(ATOMS[:6], 2))
COMPOUND = [*ATOMS, *(~s for s in ATOMS), *(s | t for s, t in PAIRS[::2]), *(s & ~t for s, t in PAIRS[1::2])]


def members(selection: Selection) -> set[Any]:
    """The addresses of the universe that are selected."""
    return {address for address in UNIVERSE if address in selection}


EVERYTHING = set(UNIVERSE)


def test_select_is_what_is_named_and_what_stands_below():
    assert members(select("a")) == {("a",)}
    assert members(select("b")) == {address for address in UNIVERSE if address[0] == "b"}
    assert members(select(("b", "d"))) == {("b", "d"), ("b", 1, "d")}
    assert members(select(("b", 1))) == {("b", 1), ("b", 1, "c"), ("b", 1, "d")}
    assert members(select(("b", 0, "c"))) == {("b", 0, "c")}
    assert members(select()) == set()
    assert members(AllSelection()) == EVERYTHING


def test_a_name_below_a_vector_speaks_of_every_element():
    assert ("y", 7, "pos") in select(("y", "pos"))
    assert ("y", 7, "pos") in select(("y", "pos"), ("y", 3))
    assert ("y", 7, "w") not in select(("y", "pos"), ("y", 3))
    assert ("y", 3, "w") in select(("y", "pos"), ("y", 3))
    assert ("y", "pos") not in select(("y", 3, "pos"))


@pytest.mark.parametrize(
    "one, other",
    [
        (select("a", "b"), select(["a", "b"])),
        (select("a", "b"), select("b", "a")),
        (select("a", "b"), select({"a", "b"})),
        (select(("b", "c"), ("b", "d")), select(("b", "d"), ("b", "c"))),
        (select(("b", "c")), select({"b": {"c": True}})),
        (select(("b", "c")), select({"b": select("c")})),
        (select(("b", "c")), select({"b": "c"})),
        (select("b", ("b", "c")), select("b")),
        (select(("b", "c"), "b"), select("b")),
        (select(select("a")), select("a")),
        (select([select("a")]), select("a")),
        (select(("b", 1)), select(("b", np.int64(1)))),
        (select(), NoneSelection()),
    ],
)
def test_ways_of_saying_the_same(one: Selection, other: Selection):
    assert one == other
    assert hash(one) == hash(other)
    assert members(one) == members(other)


def test_ways_of_saying_it_together():
    got = select("a", {"b": {"c": True}}, ["c", {"b": "d"}])
    assert members(got) == members(select("a", ("b", "c"), "c", ("b", "d")))


@pytest.mark.parametrize("first", COMPOUND, ids=range(len(COMPOUND)))
def test_boolean_algebra_by_enumeration(first: Selection):
    assert members(~first) == EVERYTHING - members(first)
    assert members(~~first) == members(first)
    for second in ATOMS:
        assert members(first | second) == members(first) | members(second)
        assert members(first & second) == members(first) & members(second)
        assert members(~(first | second)) == members(~first & ~second)
        assert members(~(first & second)) == members(~first | ~second)
        assert members(first & (second | ATOMS[2])) == members((first & second) | (first & ATOMS[2]))


@pytest.mark.parametrize("selection", COMPOUND, ids=range(len(COMPOUND)))
def test_subselections_are_read_from_the_root(selection: Selection):
    for address in UNIVERSE:
        walked = selection
        for component in address:
            walked = walked[component]
        assert walked.includes_root == (address in selection)
        assert walked == selection[address]
        assert (address[1:] in selection[address[0]]) == (address in selection)


def test_simple_combinations_stay_simple():
    a = select("a")
    assert ~~a is a
    assert ~AllSelection() == NoneSelection() and ~NoneSelection() == AllSelection()
    for unit in (a | NoneSelection(), NoneSelection() | a, a & AllSelection(), AllSelection() & a, a | a, a & a):
        assert unit == a
    for zero in (a & NoneSelection(), NoneSelection() & a):
        assert zero.is_empty
    for one in (a | AllSelection(), AllSelection() | a):
        assert one == AllSelection()
    assert isinstance(a, BuiltinSelection) and not a.is_empty
    assert select().is_empty


def test_selections_are_static():
    """They hash and compare, so one that says the same does not compile again."""
    count = 0

    def chosen(chm, selection):
        nonlocal count
        count += 1
        return chm.filter(selection)

    compiled = jax.jit(chosen, static_argnums=1)
    chm = choice_map({"a": jnp.zeros(()), "b": jnp.ones(())})
    for selection in (
        select("a"),
        select(["a"]),
        select("b") | select("a"),
        select("b") | select("a"),
        ~select("b"),
        ~select("b"),
    ):
        compiled(chm, selection)
    assert count == 3
    assert len({select("a"), select(["a"]), ~select("a"), ~select("a"), select("a") & ~select("b")}) == 3
    assert jax.tree.leaves(select("a") & ~select("b")) == []
    assert select("a") != select("b") and select("a") != "a" and select("a") != AllSelection()


def test_filtering_is_membership():
    chm = choice_map({"a": 1.0, "b": {"c": 2.0, "d": 3.0}, "c": 4.0})
    for selection in COMPOUND:
        got = set(chm.filter(selection).addresses())
        assert got == {address for address in chm.addresses() if address in selection}


def test_addresses_and_indices_that_are_named():
    selection = ~select(("b", 0, "c"), "a") | select(("b", 2))
    assert set(selection.addresses) == {("b", 0, "c"), ("a",), ("b", 2)}
    assert selection.indices == frozenset() and selection["b"].indices == {0, 2}
    assert not select("a").mentions_indices and select(3).mentions_indices
    assert AllSelection().addresses == [] and AllSelection().indices == frozenset()


def test_a_selection_of_a_trace_weighs_its_share():
    @gjflax.gen
    def model():
        x = gjflax.trace("x", gjflax.Normal)(0.0, 1.0)
        return gjflax.trace("y", gjflax.Normal)(x, 2.0)

    _, tr = model.simulate(jax.random.key(0), ())
    choices, weight = select("x").filter(tr)
    np.testing.assert_allclose(weight, jax.scipy.stats.norm.logpdf(tr["x"]), rtol=1e-6)
    assert choices.addresses() == [("x",)]

"""When `regenerate` and `project` refuse a selection that selects nothing, and when that is what generic code asks for."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gjflax
from gjflax import NoneSelection, Normal, SelectionError, gen, select, trace

KEY, OTHER_KEY = jax.random.split(jax.random.key(2))


@gen
def line(x: Any) -> Any:
    slope = trace("slope", Normal)(0.0, 1.0)
    return trace("y", Normal)(slope * x, 0.5)


other = gen(lambda x: trace("level", Normal)(x, 2.0))
either = gjflax.Cond(line, other)
chain = gjflax.Unfold(gen(lambda t, x: trace("x", Normal)(x, 1.0)), max_length=3)
mapped = gjflax.Map(line)
renamed = gjflax.AddressMap(line, {"gain": "slope"})
nested = gen(lambda x: trace("part", line)(x))
X, XS = jnp.float32(0.7), jnp.array([0.5, -1.0])

MODELS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "body": (line, (X,)),
    "Cond": (either, (jnp.array(True), X)),
    "Unfold": (chain, (jnp.int32(2), X)),
    "Map": (mapped, (XS,)),
    "AddressMap": (renamed, (X,)),
    "callee": (nested, (X,)),
}


def moved(name: str, selection: Any) -> tuple[bool, Any, Any]:
    """Of a move that is compiled, whether all choices stayed, and its weight; and the selection's share of the old score."""
    model, args = MODELS[name]
    _, old = model.simulate(KEY, args)
    _, (_, weight, new) = jax.jit(lambda tr: model.regenerate(OTHER_KEY, tr, selection, args))(old)
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), old.strip(), new.strip())
    return all(jax.tree.leaves(same)), weight, model.project(KEY, old, selection)[1]


MISSPELT = {
    "body": ("slop", '"slope"'),
    "Cond": ("levle", '"level"'),
    "Unfold": (("y",), '"x"'),
    "Map": ((1, "slop"), '"slope"'),
    "AddressMap": ("slope", '"gain"'),
    "callee": (("part", "slop"), r'\("part", "slope"\)'),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_misspelt_address_names_the_nearest(name: str):
    address, near = MISSPELT[name]
    model, args = MODELS[name]
    _, old = model.simulate(KEY, args)
    for selection in (select(address), select(address) & ~select("nothing")):
        with pytest.raises(SelectionError, match=f"(Did you mean|Known here:).*{near}"):
            model.regenerate(KEY, old, selection, args)
        # To `project` the flag and the length are scalars, which may have been numbers of Python.
        if name not in ("Cond", "Unfold"):
            with pytest.raises(SelectionError, match=f"(Did you mean|Known here:).*{near}"):
                model.project(KEY, old, selection)


@pytest.mark.parametrize(
    ("name", "selection"),
    [
        ("body", NoneSelection()),
        ("Map", NoneSelection()),
        ("body", select()),
        ("body", ~select("slope", "y")),
        ("body", select("slope") & select("y")),
        ("Cond", select("level")),
        ("Unfold", select((2, "x"))),
        ("callee", select("part") & ~select("part")),
    ],
)
def test_nothing_may_be_selected(name: str, selection: Any):
    unmoved, weight, share = moved(name, selection)
    assert unmoved and float(weight) == 0.0
    # A step behind the end of a chain has no score; nor has a branch that is not taken.
    assert float(share) == 0.0


@pytest.mark.parametrize(
    ("name", "selection"),
    [
        ("body", select("slope", "elsewhere")),
        ("body", ~select("elsewhere")),
        ("Cond", select("slope", "level")),
        ("Map", select("slope")),
        ("callee", select("part")),
    ],
)
def test_what_is_there_is_redrawn(name: str, selection: Any):
    assert not moved(name, selection)[0]


def test_a_body_that_branches_on_an_argument_of_python():
    """The address is one of another value; and that after the move counts, too."""

    @gen
    def steps(count: int) -> None:
        for i in range(count):
            trace(f"z{i}", Normal)(0.0, 1.0)

    _, old = steps.simulate(KEY, (2,))
    _, (_, weight, new) = steps.regenerate(KEY, old, select("z2"), (2,))
    assert float(weight) == 0.0 and float(steps.project(KEY, old, select("z2"))[1]) == 0.0
    np.testing.assert_array_equal(new["z1"], old["z1"])
    _, (_, _, new) = steps.regenerate(KEY, old, select("z2"), (3,))
    assert "z2" in new

    @gen
    def with_extra(x: Any) -> None:
        trace("a", Normal)(0.0, 1.0)
        if x.shape:
            trace("b", Normal)(0.0, 1.0)

    _, old = with_extra.simulate(KEY, (X,))
    _, (_, _, new) = with_extra.regenerate(KEY, old, select("b"), (XS,))
    assert "b" in new


def test_a_generative_function_that_calls_others_hands_selections_on():
    """Of the callees only one has the address; that is not said to the others."""

    @gen
    def both(x: Any) -> Any:
        return trace("line", line)(x) + trace("other", other)(x)

    _, old = both.simulate(KEY, (X,))
    _, (_, _, new) = both.regenerate(OTHER_KEY, old, select(("line", "slope")), (X,))
    assert new["line", "slope"] != old["line", "slope"] and new["other", "level"] == old["other", "level"]


def test_choices_that_are_integrated_out():
    """They are choices of the program, though not of the trace."""

    @gen
    def model(x: Any) -> None:
        h = trace("h", gjflax.Bernoulli)(x)
        trace("y", Normal)(h.astype(jnp.float32), 1.0)

    marginal = gjflax.Marginal(model, "y", gjflax.Enumerate())
    for outer, address in ((marginal, ("h",)), (gen(lambda x: trace("part", marginal)(x)), ("part", "h"))):
        _, old = outer.simulate(KEY, (X,))
        _, (_, weight, _) = outer.regenerate(OTHER_KEY, old, select(address), (X,))
        np.testing.assert_allclose(weight, 0.0, atol=1e-6)
        assert float(outer.project(KEY, old, select(address))[1]) == 0.0


def test_what_has_no_choices_at_all():
    network = gjflax.FlaxModule(nn.Dense(2))
    bound = network.bind(network.init(KEY, XS))
    _, old = bound.simulate(KEY, (XS,))
    assert float(bound.regenerate(OTHER_KEY, old, select("slope"), (XS,))[1][1]) == 0.0
    assert float(bound.project(KEY, old, select("slope"))[1]) == 0.0

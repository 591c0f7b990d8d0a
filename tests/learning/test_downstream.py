"""What is downstream of what, as plain data; and what the engine finds of it in programs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gjflax import Bernoulli, Map, Normal, Scan, Switch, Unfold, gen, trace
from gjflax.core.choice_map import choice_map
from gjflax.learning.downstream import LATER, SAME, closure, common, elementwise, gather, weakest
from gjflax.learning.flow import flow_of
from gjflax.learning.sites import ELEMENTS, REVERSED_STEPS, STEPS, UNKNOWN, Plate, sites_of

KEY = jax.random.key(0)


def plate(kind: str, name: str, depth: int = 0, length: int = 3) -> Plate:
    return Plate(kind, (name,), depth, length)


POINTS, CHAIN = plate(ELEMENTS, "points"), plate(STEPS, "chain")


@pytest.mark.parametrize(
    ("one", "other", "relation"),
    [
        ((), (POINTS,), ()),
        ((POINTS,), (POINTS,), (SAME,)),
        ((POINTS,), (plate(ELEMENTS, "others"),), ()),
        ((POINTS,), (plate(ELEMENTS, "points", length=4),), ()),
        ((CHAIN,), (CHAIN,), (LATER,)),
        ((CHAIN,), (plate(REVERSED_STEPS, "chain"),), ()),
        ((CHAIN, plate(ELEMENTS, "points", 1)), (CHAIN, plate(ELEMENTS, "points", 1)), (LATER,)),
        ((POINTS, plate(STEPS, "chain", 1)), (POINTS, plate(STEPS, "chain", 1)), (SAME, LATER)),
        ((plate(UNKNOWN, "x"),), (plate(UNKNOWN, "x"),), ()),
    ],
)
def test_the_relation_of_an_edge(one: Any, other: Any, relation: Any):
    assert common(one, other) == common(other, one) == relation


def test_the_weakest_of_two_relations():
    assert weakest((SAME, SAME), (SAME, SAME)) == (SAME, SAME)
    assert weakest((SAME, SAME), (SAME,)) == (SAME,)
    assert weakest((SAME, LATER), (SAME, SAME)) == (SAME, LATER)
    assert weakest((LATER,), (SAME, SAME)) == (LATER,)
    assert elementwise((SAME, LATER)) == 1


def test_a_path_that_leaves_a_plate_and_comes_back_mixes_its_elements():
    plates = {"a": (POINTS,), "sum": (), "b": (POINTS,), "c": (POINTS,)}
    reached = closure(plates, {"a": ["sum", "c"], "sum": ["b"]})
    assert reached["a"] == {"a": (SAME,), "sum": (), "b": (), "c": (SAME,)}
    assert reached["sum"] == {"sum": (), "b": ()} and reached["b"] == {"b": (SAME,)}
    # Over two paths the weaker counts, whichever is found first.
    for edges in ({"a": ["sum", "b"], "sum": ["b"]}, {"a": ["b", "sum"], "sum": ["b"]}):
        assert closure(plates, edges)["a"]["b"] == ()


def test_a_cycle_ends():
    plates = {"a": (CHAIN,), "b": (CHAIN,)}
    assert closure(plates, {"a": ["a", "b"], "b": ["a"]})["a"] == {"a": (LATER,), "b": (LATER,)}


def test_gathering_costs():
    cost = jnp.arange(12.0).reshape(3, 4)
    inner = plate(ELEMENTS, "inner", 1, 4)
    np.testing.assert_array_equal(gather(cost, (SAME, SAME), (POINTS, inner), 0), cost)
    np.testing.assert_array_equal(gather(cost, (SAME,), (POINTS,), 0), cost.sum(1))
    np.testing.assert_array_equal(gather(cost, (SAME,), (POINTS, inner), 0), cost.sum(1)[:, None])
    np.testing.assert_array_equal(gather(cost, (), (POINTS,), 0), cost.sum()[None])
    later = np.cumsum(np.asarray(cost.sum(1))[::-1])[::-1]
    np.testing.assert_array_equal(gather(cost, (LATER,), (CHAIN,), 0), later)
    backwards = np.cumsum(np.asarray(cost.sum(1)))
    np.testing.assert_array_equal(gather(cost, (LATER,), (plate(REVERSED_STEPS, "chain"),), 0), backwards)
    # With axes before those of the plates.
    np.testing.assert_array_equal(gather(cost, (LATER,), (plate(STEPS, "chain", length=4),), 1)[:, -1], cost[:, -1])


@gen
def point(shift):
    z = trace("z", Normal)(shift, 1.0)
    return trace("x", Normal)(z, 0.5)


@gen
def step(time, state):
    return trace("s", Normal)(state, 1.0)


@gen
def program():
    w = trace("w", Normal)(0.0, 1.0)
    trace("alone", Normal)(0.0, 1.0)
    xs = trace("points", Map(point, in_axes=None, repeats=3))(w)
    states = trace("chain", Unfold(step, max_length=4))(4, w)
    trace("switch", Switch((gen(lambda x: trace("a", Normal)(x, 1.0)), gen(lambda x: trace("a", Normal)(0.0, 1.0)))))(
        (w > 0).astype(jnp.int32), states[-1]
    )
    return trace("end", Normal)(jnp.sum(xs), 1.0)


def test_sites_add_up_to_the_score():
    _, tr = program.simulate(KEY, ())
    sites = sites_of(tr)
    np.testing.assert_allclose(sum(np.sum(site.log_density) for site in sites), tr.get_score(), rtol=1e-5)
    shapes = {site.address: site.shape for site in sites}
    assert shapes["points", "z"] == (3,) and shapes["chain", "s"] == (4,) and shapes[("w",)] == ()
    kinds = {site.address: [plate.kind for plate in site.plates] for site in sites}
    assert kinds["points", "x"] == [ELEMENTS] and kinds["chain", "s"] == [STEPS]


def test_sites_of_a_batch_stand_for_the_population():
    batch = Map(gen(lambda: trace("z", Normal)(0.0, 1.0)), repeats=3, total=12)
    _, tr = batch.simulate(KEY, ())
    (site,) = sites_of(tr)
    assert site.multiplicity == 4.0
    np.testing.assert_allclose(4 * np.sum(site.log_density), tr.get_score(), rtol=1e-6)


def test_sites_of_steps_that_do_not_count():
    _, tr = Unfold(step, max_length=4).simulate(KEY, (jnp.asarray(2), 0.0))
    (site,) = sites_of(tr)
    np.testing.assert_array_equal(site.log_density[2:], [0.0, 0.0])
    np.testing.assert_allclose(np.sum(site.log_density), tr.get_score(), rtol=1e-6)
    _, tr = Scan(gen(lambda c, x: (trace("s", Normal)(c, 1.0), x)), reverse=True).simulate(KEY, (0.0, jnp.zeros(3)))
    assert sites_of(tr)[0].plates[0].kind == REVERSED_STEPS


def test_the_flow_of_a_program():
    _, tr = program.simulate(KEY, ())
    flow = flow_of(program, program, tr.strip(), choice_map({}), (), ())
    assert flow is not None
    found = {site.address: sources.score for site, sources in zip(sites_of(tr), flow.guide, strict=True)}
    w, z, x, s = ("w",), ("points", "z"), ("points", "x"), ("chain", "s")
    assert found[w] == {w} and found[("alone",)] == {("alone",)}
    assert found[z] == {w, z} and found[x] == {z, x} and found[("end",)] == {x, ("end",)}
    assert found[s] == {w, s}
    # Which branch is taken depends on w, and what it is given on the last state.
    assert found["switch", "a"] == {w, s, ("switch", "a")}


def test_a_program_that_does_not_stage_out_has_no_flow():
    @gen
    def fragile():
        z = trace("z", Bernoulli)(0.0)
        # Known when it runs, unknown when it is staged out.
        return trace("x", Normal)(1.0 if int(z) else 0.0, 1.0)

    _, tr = fragile.simulate(KEY, ())
    assert flow_of(fragile, fragile, tr.strip(), choice_map({}), (), ()) is None

"""Which choices a picture shades."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gjflax import Map, Masked, Normal, Repeat, VectorChoiceMap, choice_map, gen, select, trace
from gjflax.language.graph import ModelGraph, model_graph
from gjflax.visualization.observed import with_observed


@gen
def pupil(mean):
    return trace("score", Normal)(mean, 1.0)


@gen
def school(mean):
    own = trace("own", Normal)(mean, 1.0)
    return trace("pupils", Map(pupil, repeats=30))(own)


@gen
def schools():
    mean = trace("mean", Normal)(0.0, 1.0)
    return trace("schools", Repeat(school, 8))(mean)


@functools.cache
def graph() -> ModelGraph:
    return model_graph(schools, ())


def observed(given: Any) -> dict[str, str]:
    return {node.name: node.observed for node in with_observed(graph(), given).nodes if node.observed != "no"}


SCORES = jnp.zeros((8, 30))


@pytest.mark.parametrize(
    "given, expected",
    [
        (None, {}),
        ("mean", {"mean": "yes"}),
        (("schools", "own"), {"schools/own": "yes"}),
        (select("schools"), {"schools/own": "yes", "schools/pupils/score": "yes"}),
        (~select("mean"), {"schools/own": "yes", "schools/pupils/score": "yes"}),
        (select(("schools", 2)), {"schools/own": "partly", "schools/pupils/score": "partly"}),
        (select(("schools", 2, "own")), {"schools/own": "partly"}),
        ({"schools": {"pupils": {"score": SCORES}}}, {"schools/pupils/score": "yes"}),
        ({"schools": {range(8): {"pupils": {range(30): {"score": SCORES}}}}}, {"schools/pupils/score": "yes"}),
        ({("schools", 3, "own"): 0.0}, {"schools/own": "partly"}),
        ({"schools": VectorChoiceMap(jnp.array([3]), {"own": jnp.zeros(1)})}, {"schools/own": "partly"}),
        ({"mean": Masked(0.0, jnp.array(True))}, {"mean": "partly"}),
        (choice_map({}), {}),
    ],
    ids=str,
)
def test_observed(given: Any, expected: dict[str, str]):
    assert observed(given) == expected


def test_a_trace_observes_all_of_it():
    tr = jax.eval_shape(lambda key: schools.simulate(key, ())[1], jax.random.key(0))
    assert set(observed(tr).values()) == {"yes"} and len(observed(tr)) == 3

"""`Pytree`: dataclasses as JAX pytrees, with flax serialisation."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState

import gjflax
from gjflax import Map, Normal, Pytree, VectorChoiceMap, choice_map, gen, select, static_field, trace


@dataclasses.dataclass(repr=False)
class Scaled(Pytree):
    value: Any
    unit: str = static_field(default="m")


@dataclasses.dataclass
class Move(Pytree):
    """The static part comes first in the constructor, the dynamic first in `flatten`."""

    selection: gjflax.Selection
    step: Any

    def flatten(self):
        return (self.step,), (self.selection,)


@dataclasses.dataclass
class Mixed(Pytree):
    """`flatten` in another order than the fields, on both sides."""

    a: Any
    name: str
    b: Any
    size: int

    def flatten(self):
        return (self.b, self.a), (self.size, self.name)


@dataclasses.dataclass
class Computed(Pytree):
    """`flatten` computes, so the constructor takes what it returns: static parts, then dynamic ones."""

    power: int
    root: Any

    def flatten(self):
        return (self.root * 1.0,), (self.power + 0,)


@dataclasses.dataclass
class Child(Scaled):
    more: Any = 0.0


@dataclasses.dataclass
class Refuses(Pytree):
    """Its constructor takes arrays only; JAX unflattens with other objects."""

    value: Any

    def __post_init__(self):
        if not hasattr(self.value, "shape"):
            raise TypeError("not an array")


INSTANCES = [
    Scaled(jnp.arange(2.0), "kg"),
    Move(select("a"), jnp.float32(0.5)),
    Mixed(jnp.zeros(2), "n", jnp.ones(3), 4),
    Computed(2, jnp.float32(3.0)),
    Child(jnp.zeros(()), "s", jnp.ones(())),
    Refuses(jnp.zeros(3)),
    Scaled({"x": jnp.zeros(2), "y": (jnp.ones(()), None)}, "kg"),
]

each_instance = pytest.mark.parametrize("value", INSTANCES, ids=lambda value: type(value).__name__)


def fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


@each_instance
def test_flattening_and_back(value: Any):
    leaves, structure = jax.tree.flatten(value)
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is type(value)
    jax.tree.map(np.testing.assert_array_equal, fields(again), fields(value))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, value)
    assert jax.tree.structure(doubled) == structure
    assert all(hasattr(leaf, "shape") for leaf in leaves), "a static part is a leaf"


@each_instance
def test_through_transformations(value: Any):
    count = 0

    @jax.jit
    def twice(value):
        nonlocal count
        count += 1
        return jax.tree.map(lambda leaf: 2 * leaf, value)

    out = twice(value)
    twice(out)
    assert count == 1
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), out, value)
    stacked = jax.vmap(lambda _: value)(jnp.arange(3.0))
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(stacked))


@each_instance
def test_unflattening_with_anything(value: Any):
    """JAX puts objects, None and shapes into trees; a constructor that checks must not see them."""
    structure = jax.tree.structure(value)
    if isinstance(value, Computed):
        return  # its `flatten` computes with what stands in the fields
    assert jax.tree.structure(jax.eval_shape(lambda v: v, value)) == structure
    for filler in (object(), "text"):
        assert (
            jax.tree.leaves(jax.tree.unflatten(structure, [filler] * structure.num_leaves))
            == [filler] * structure.num_leaves
        )


@each_instance
def test_serialisation_round_trip(value: Any):
    other = jax.tree.map(jnp.zeros_like, value)
    restored = serialization.from_bytes(other, serialization.to_bytes(value))
    assert jax.tree.structure(restored) == jax.tree.structure(value)
    jax.tree.map(np.testing.assert_array_equal, restored, value)


def test_static_parts_make_another_structure():
    assert jax.tree.structure(Scaled(1.0, "m")) != jax.tree.structure(Scaled(1.0, "kg"))
    assert jax.tree.structure(Move(select("a"), 1.0)) != jax.tree.structure(Move(select("b"), 1.0))
    assert jax.tree.structure(Move(select("a"), 1.0)) == jax.tree.structure(Move(select("a"), 2.0))
    assert jax.tree.leaves(Scaled(1.5, "kg")) == [1.5]


def test_leaves_have_the_names_of_fields():
    paths, _ = jax.tree_util.tree_flatten_with_path(Mixed(0.0, "n", {"c": 1.0}, 4))
    assert [jax.tree_util.keystr(path) for path, _ in paths] == [".b['c']", ".a"]


def test_replace():
    moved = Scaled(1.0, "kg").replace(value=2.0)
    assert moved == Scaled(2.0, "kg")
    assert Move(select("a"), 1.0).replace(selection=select("b")).selection == select("b")


def test_printing():
    assert repr(Scaled(jnp.zeros((2, 3)), "kg")) == "Scaled\n├── value: f32[2,3]\n└── unit: 'kg'"


# Serialisation of gjflax's own values --------------------------------------------------------------------------------


class Network(gjflax.GenModule):
    @nn.compact
    def __call__(self, x):
        z = trace(("latent", "z"), Normal)(jnp.zeros(2), 1.0)
        return trace("y", Map(Normal, in_axes=(0, None)))(nn.Dense(3)(z) + x, 0.5)


@gen(gjflax.TrainCombinator, params={"mu": 0.5})
def learned(x, params):
    return trace("x", Normal)(params["mu"] * x, 1.0)


def traces() -> dict[str, Any]:
    key, x = jax.random.key(0), jnp.float32(0.3)
    variables = Network().init(key, x)
    return {
        "network": Network().bind(variables).simulate(key, (x,))[1],
        "learned": learned.simulate(key, (x,))[1],
        "distribution": Normal.simulate(key, (0.0, x))[1],
        "batch": jax.vmap(lambda k: learned.simulate(k, (x,))[1])(jax.random.split(key, 3)),
    }


@pytest.mark.parametrize("name", ["network", "learned", "distribution", "batch"])
def test_a_trace_survives_serialisation(name: str):
    tr = traces()[name]
    other = jax.tree.map(jnp.zeros_like, tr)
    restored = serialization.from_bytes(other, serialization.to_bytes(tr))
    assert jax.tree.structure(restored) == jax.tree.structure(tr)
    jax.tree.map(np.testing.assert_array_equal, restored, tr)
    np.testing.assert_array_equal(restored.get_score(), tr.get_score())
    assert restored.get_gen_fn() == tr.get_gen_fn()
    state = serialization.to_state_dict(tr)
    assert all(isinstance(key, str) for key in state), "the names of a checkpoint are those of fields"


@pytest.mark.parametrize(
    "value",
    [
        choice_map({"a": 1.0, "b": {"c": jnp.arange(3.0)}}),
        choice_map({}),
        choice_map(2.0),
        choice_map({("y", 3, "pos"): 2.0}),
        VectorChoiceMap(jnp.array([1, 4]), {"pos": jnp.zeros(2)}),
        select("a", ("b", "c")) & ~select("d"),
        gjflax.Diff.no_change(jnp.arange(3.0)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_choice_maps_selections_and_diffs_survive_serialisation(value: Any):
    target = jax.tree.map(jnp.zeros_like, value)
    restored = serialization.from_bytes(target, serialization.to_bytes(value))
    assert jax.tree.structure(restored) == jax.tree.structure(value)
    jax.tree.map(np.testing.assert_array_equal, restored, value)


def test_a_train_state_may_hold_a_trace_and_a_selection():
    class State(TrainState):
        chain: Any = None
        moved: Any = None

    tr = traces()["learned"]
    params = learned.init(jax.random.key(0), jnp.float32(0.0))["params"]
    tx = optax.sgd(1e-2, momentum=0.9)

    def state(chain, params):
        return State.create(apply_fn=learned.apply, params=params, tx=tx, chain=chain, moved=select("x"))

    saved = state(tr, {"mu": jnp.float32(2.0)}).apply_gradients(grads={"mu": jnp.float32(1.0)})
    restored = serialization.from_bytes(state(jax.tree.map(jnp.zeros_like, tr), params), serialization.to_bytes(saved))
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    assert restored.step == 1 and restored.moved == select("x")
    assert restored.chain["x"] == tr["x"]


def test_choice_maps_pickle():
    chm = choice_map({"a": jnp.arange(2.0), ("y", 3, "pos"): 2.0})
    assert pickle.loads(pickle.dumps(chm)) == chm
    selection = select("a") | ~select(("b", 1))
    assert pickle.loads(pickle.dumps(selection)) == selection

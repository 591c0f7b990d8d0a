"""Printing: every value of gjflax as a tree, arrays by dtype and shape."""

from __future__ import annotations

import textwrap
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gjflax
from gjflax import Bernoulli, GenModule, Map, Normal, TrainCombinator, VectorChoiceMap, choice_map, gen, select, trace

KEY = jax.random.key(0)


@gen
def line(x):
    slope = trace("slope", Normal)(0.0, 2.0)
    return trace(("y", "noisy"), Normal)(slope * x, 0.1)


def learned(x, params):
    return trace("y", Normal)(params["net"]["w"] @ x, 1.0)


class Network(GenModule):
    hidden: int = 3

    @nn.compact
    def __call__(self, x):
        return trace("y", Bernoulli)(nn.Dense(self.hidden)(x))


def abstract(model: Any, *args: Any) -> Any:
    """A trace without values, which prints as one with them."""
    return jax.eval_shape(lambda key: model.simulate(key, args)[1], KEY)


def same(value: Any, expected: str) -> None:
    assert repr(value) == textwrap.dedent(expected).strip("\n")


def test_a_trace():
    tr = abstract(line, jnp.arange(3.0))
    same(
        tr,
        """
        BuiltinTrace
        ├── gen_fn: BuiltinGenerativeFunction
        │   └── source: <line>
        ├── args
        │   └── 0: f32[3]
        ├── retval: f32[3]
        └── choices
            ├── slope: DistributionTrace
            │   ├── gen_fn: Normal
            │   ├── args
            │   │   ├── 0: f32[]
            │   │   └── 1: f32[]
            │   ├── value: f32[]
            │   └── score: f32[]
            └── y/noisy: DistributionTrace
                ├── gen_fn: Normal
                ├── args
                │   ├── 0: f32[3]
                │   └── 1: f32[]
                ├── value: f32[3]
                └── score: f32[]
        """,
    )


def test_the_choices_of_a_trace():
    tr = abstract(line, jnp.arange(3.0))
    same(
        tr.strip(),
        """
        BuiltinChoiceMap
        ├── slope: f32[]
        └── y: BuiltinChoiceMap
            └── noisy: f32[3]
        """,
    )


def test_a_map():
    @gen
    def inner(x):
        return trace("pos", Normal)(x["mean"], 1.0)

    mapped = Map(inner, in_axes=({"mean": 0},))
    tr = abstract(mapped, {"mean": jnp.arange(4.0)})
    same(
        tr,
        """
        MapTrace
        ├── gen_fn: Map
        │   ├── inner: BuiltinGenerativeFunction
        │   │   └── source: <test_a_map.<locals>.inner>
        │   └── in_axes
        │       └── 0: {'mean': 0}
        ├── args
        │   └── 0
        │       └── mean: f32[4]
        ├── inner: BuiltinTrace
        │   ├── gen_fn: BuiltinGenerativeFunction
        │   │   └── source: <test_a_map.<locals>.inner>
        │   ├── args
        │   │   └── 0
        │   │       └── mean: f32[4]
        │   ├── retval: f32[4]
        │   └── choices
        │       └── pos: DistributionTrace
        │           ├── gen_fn: Normal
        │           ├── args
        │           │   ├── 0: f32[4]
        │           │   └── 1: f32[4]
        │           ├── value: f32[4]
        │           └── score: f32[4]
        └── length: 4
        """,
    )
    same(
        tr.strip(),
        """
        VectorChoiceMap
        ├── indices: i32[4]
        └── pos: f32[4]
        """,
    )


def test_a_train_combinator():
    model = TrainCombinator(gen(learned), params={"net": {"w": np.ones(2, np.float32)}})
    tr = abstract(model, jnp.ones(2))
    same(
        tr,
        """
        TrainTrace
        ├── gen_fn: TrainCombinator
        │   ├── inner: BuiltinGenerativeFunction
        │   │   └── source: <learned>
        │   └── params
        │       └── net
        │           └── w: f32[2]
        └── inner: BuiltinTrace
            ├── gen_fn: BuiltinGenerativeFunction
            │   └── source: <learned>
            ├── args
            │   ├── 0: f32[2]
            │   └── 1
            │       └── net
            │           └── w: f32[2]
            ├── retval: f32[]
            └── choices
                └── y: DistributionTrace
                    ├── gen_fn: Normal
                    ├── args
                    │   ├── 0: f32[]
                    │   └── 1: f32[]
                    ├── value: f32[]
                    └── score: f32[]
        """,
    )


def test_a_network():
    x = jnp.ones(2)
    variables = Network().lazy_init(KEY, x)
    tr = abstract(Network().bind(variables), x)
    assert repr(tr).startswith("BuiltinTrace\n├── gen_fn: Network\n│   └── hidden: 3\n├── args")
    assert "value: i32[3]" in repr(tr)


def test_selections():
    same(
        select(["a", ("y", 3, "pos")]),
        """
        BuiltinSelection
        ├── a: AllSelection
        └── y: BuiltinSelection
            └── 3: BuiltinSelection
                └── pos: AllSelection
        """,
    )
    same(
        select("a") | ~select("b"),
        """
        _Union
        ├── left: BuiltinSelection
        │   └── a: AllSelection
        └── right: _Complement
            └── inner: BuiltinSelection
                └── b: AllSelection
        """,
    )


def test_choice_maps():
    same(choice_map({}), "EmptyChoiceMap")
    same(choice_map(1.5), "ValueChoiceMap\n└── value: 1.5")
    same(
        VectorChoiceMap([1, 5], jnp.zeros((2, 3))),
        """
        VectorChoiceMap
        ├── indices: i32[2]
        └── inner: f32[2,3]
        """,
    )
    same(
        choice_map({"a": 1.0, "y": VectorChoiceMap(jnp.array([1, 4]), {"pos": jnp.zeros(2)})}),
        """
        BuiltinChoiceMap
        ├── a: 1.0
        └── y: VectorChoiceMap
            ├── indices: i32[2]
            └── pos: f32[2]
        """,
    )


@pytest.mark.parametrize(
    "value, text",
    [
        (jnp.zeros((2, 3)), "f32[2,3]"),
        (jnp.zeros((), jnp.int32), "i32[]"),
        (jnp.zeros(2, bool), "bool[2]"),
        (jnp.zeros(2, jnp.bfloat16), "bf16[2]"),
        (np.zeros(2, np.float64), "f64[2]"),
        (np.zeros(2, np.uint8), "u8[2]"),
        (np.zeros(2, np.complex64), "c64[2]"),
        (jax.random.key(0), "key[]"),
        (jax.ShapeDtypeStruct((4,), jnp.float16), "f16[4]"),
        (1.5, "1.5"),
        ("text", "'text'"),
        (None, "None"),
    ],
    ids=str,
)
def test_leaves(value: Any, text: str):
    assert repr(gjflax.ValueChoiceMap(value)) == f"ValueChoiceMap\n└── value: {text}"


def test_traced_values_print_as_arrays():
    seen = []

    @jax.jit
    def show(x):
        seen.append(repr(choice_map({"a": x})))
        return x

    show(jnp.zeros(3))
    assert seen == ["BuiltinChoiceMap\n└── a: f32[3]"]


def test_pretty_prints_at_the_width_that_it_is_given(capsys):
    gjflax.pretty(width=40).print(select("a"))
    assert capsys.readouterr().out.rstrip() == "BuiltinSelection\n└── a: AllSelection"
    tr = abstract(line, 1.0)
    gjflax.pretty(width=80, no_color=True).print(tr)
    assert capsys.readouterr().out.rstrip() == repr(tr)
    gjflax.pretty().print({"plain": 1})
    assert "plain" in capsys.readouterr().out


def test_names_in_brackets_are_not_markup():
    assert repr(choice_map({"[bold]a": 1.0})) == "BuiltinChoiceMap\n└── [bold]a: 1.0"

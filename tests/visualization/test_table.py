"""`tabulate`: choices and parameters in one table."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import gjflax
from gjflax import Bernoulli, GenModule, Map, Mask, Mix, Normal, Repeat, Scan, gen, tabulate, trace

KEY = jax.random.key(0)


class Network(GenModule):
    @nn.compact
    def __call__(self, x):
        z = trace("z", Normal)(jnp.zeros(2), 1.0)
        h = nn.BatchNorm(use_running_average=False)(nn.Dense(5)(z)[None])[0]
        h = nn.Dropout(0.5, deterministic=False)(h)
        return trace("k", Bernoulli)(nn.Dense(3)(h) + x)


def rows(text: str) -> list[list[str]]:
    """The cells of every row, split where two blanks stand."""
    lines = [line for line in text.split("\n") if line.startswith((" choice", " params", " batch_stats"))]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_choices_and_parameters():
    text = tabulate(Map(Network(), in_axes=0), KEY, (jnp.zeros(4),), console_kwargs={"width": 120})
    assert rows(text) == [
        ["choice", "z", "[4, 2]", "f32", "Normal", "real", "Map 4", "8"],
        ["choice", "k", "[4, 3]", "i32", "Bernoulli", "{0, 1}", "Map 4", "12"],
        ["params", "BatchNorm_0/bias", "[5]", "f32", "5"],
        ["params", "BatchNorm_0/scale", "[5]", "f32", "5"],
        ["params", "Dense_0/bias", "[5]", "f32", "5"],
        ["params", "Dense_0/kernel", "[2, 5]", "f32", "10"],
        ["params", "Dense_1/bias", "[3]", "f32", "3"],
        ["params", "Dense_1/kernel", "[5, 3]", "f32", "15"],
        ["batch_stats", "BatchNorm_0/mean", "[5]", "f32", "5"],
        ["batch_stats", "BatchNorm_0/var", "[5]", "f32", "5"],
    ]
    assert text.rstrip().split("\n")[-3:] == [
        "Choices: 2, of 8 continuous and 12 discrete dimensions",
        "Parameters: 43 (172 B)",
        "batch_stats: 10 (40 B)",
    ]


@gen
def step(carry, x):
    return trace("y", Normal)(carry + x, 1.0), None


@gen
def combined():
    mean = trace("mean", Normal)(0.0, 1.0)
    trace("maybe", Mask(Normal))(mean > 0, mean, 1.0)
    trace("mixed", Repeat(Mix((Normal, gjflax.LogNormal)), 2))(jnp.zeros(2), (0.0, 1.0), (0.0, 1.0))
    trace("runs", Map(Scan(step), in_axes=(0, None)))(jnp.zeros(3), jnp.zeros(4))
    trace("total", gjflax.Pareto)(2.0, jnp.exp(mean))


def test_combinators():
    assert rows(tabulate(combined, KEY)) == [
        ["choice", "mean", "scalar", "f32", "Normal", "real", "1"],
        ["choice", "maybe", "scalar", "f32", "Normal", "real", "Mask", "1"],
        ["choice", "mixed/component", "[2]", "i32", "Categorical", "0, …, k − 1", "Repeat 2", "2"],
        ["choice", "mixed/value", "[2]", "f32", "Normal", "real", "Repeat 2, Switch branch 0", "2"],
        ["choice", "mixed/value", "[2]", "f32", "LogNormal", "> 0", "Repeat 2, Switch branch 1", "2"],
        ["choice", "runs/y", "[3, 4]", "f32", "Normal", "real", "Map 3, Scan 4", "12"],
        ["choice", "total", "scalar", "f32", "Pareto", "≥ a bound", "1"],
    ]


def test_a_distribution_and_one_of_ones_own():
    own = gjflax.distribution(
        lambda key, n: jax.random.randint(key, (), 0, n), lambda v, n: -jnp.log(n), name="die", discrete=True
    )
    assert rows(tabulate(own, KEY, (jnp.float32(6.0),))) == [
        ["choice", "(the root)", "scalar", "i32", "die", "discrete", "1"]
    ]


def test_it_runs_on_shapes_and_on_bound_models():
    model, shape = Network(), jax.ShapeDtypeStruct((), jnp.float32)
    expected = tabulate(model, KEY, (shape,))
    variables = jax.eval_shape(model.init, KEY, shape)
    assert tabulate(model, KEY, (shape,), variables=variables) == expected
    zeros: Any = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)
    assert tabulate(model.bind(zeros), KEY, (shape,)) == expected
    wide = jax.ShapeDtypeStruct((10**6, 10**4), jnp.float32)
    assert "10 000 000 000" in tabulate(Map(Map(Normal, in_axes=(0, None)), in_axes=(0, None)), KEY, (wide, 1.0))


def test_errors():
    with pytest.raises(gjflax.ArgumentError, match="Expected a random key"):
        tabulate(combined, 0)
    with pytest.raises(gjflax.ArgumentError, match="`args` is a tuple"):
        tabulate(Network(), KEY, jnp.zeros(()))
    with pytest.raises(gjflax.CalleeError, match="Expected a generative function"):
        tabulate(nn.Dense(3), KEY, (jnp.zeros(2),))
    with pytest.raises(gjflax.UnboundParametersError, match="`variables` lacks"):
        tabulate(Network(), KEY, (jnp.zeros(()),), variables={"params": {}})

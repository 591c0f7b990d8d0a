"""Modules that are one program as one object."""

from __future__ import annotations

import functools
import gc
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gjflax import GenModule, Normal, gen, select, trace
from gjflax.core import interned as interning
from gjflax.core.interned import TracedProgramError, interned, program_key

KEY = jax.random.key(0)


def scaled(factor: Any, *, offset: Any = 0.0) -> Any:
    return lambda x, power=2: factor * x**power + offset


def recursive(depth: int) -> Any:
    def countdown(n):
        return 0 if n == 0 else countdown(n - depth)

    return countdown


def with_default(value: Any) -> Any:
    def function(x, default=value, *, keyword=value):
        return default

    return function


@pytest.mark.parametrize(
    "make",
    [
        scaled,
        recursive,
        with_default,
        nn.initializers.normal,
        lambda value: nn.Dense(3, kernel_init=nn.initializers.normal(value)),
        lambda value: nn.Sequential([nn.Dense(3), lambda x: value * x]),
        lambda value: functools.partial(scaled(value), power=3),
        lambda value: functools.partial(jnp.sum, axis=int(value)),
        lambda value: gen(scaled(value)),
        lambda value: (value, scaled(scaled(value))),
        lambda value: scaled(nn.Dense(int(value))),
        lambda value: nn.Dense(int(value)).__call__,
    ],
)
def test_the_same_program_has_the_same_key(make):
    assert program_key(make(1.0)) == program_key(make(1.0))
    assert hash(program_key(make(1.0))) == hash(program_key(make(1.0)))
    assert program_key(make(1.0)) != program_key(make(2.0))


def test_different_code_has_different_keys():
    first, second = (lambda x: x + 1), (lambda x: x + 2)
    assert program_key(first) != program_key(second)
    assert program_key(nn.Dense(3)) != program_key(nn.DenseGeneral(3))
    assert program_key(1) != program_key(1.0) and program_key(1) != program_key(True)


def test_what_does_not_hash_is_compared_by_identity():
    array, equal = np.ones(3), np.ones(3)
    assert program_key(scaled(array)) == program_key(scaled(array))
    assert program_key(scaled(array)) != program_key(scaled(equal))
    changed = [1.0]
    assert program_key(scaled(changed)) != program_key(scaled([1.0])), "a list may change"


def test_traced_values_are_no_program():
    def run(x: Any) -> Any:
        for value in (scaled(x), scaled([x]), functools.partial(jnp.sum, x)):
            with pytest.raises(TracedProgramError):
                program_key(value)
        module = nn.Sequential([scaled(x)])
        assert interned(module) is module
        return x

    jax.jit(run)(1.0)


def test_one_object_for_each_program_as_long_as_it_lives():
    def make(value: float) -> Any:
        return nn.Dense(3, kernel_init=nn.initializers.normal(value), parent=None)

    first = interned(make(0.123))
    assert interned(make(0.123)) is first and interned(make(0.5)) is not first
    count = len(interning._programs)
    del first
    gc.collect()
    assert len(interning._programs) <= count - 1


class Decoder(GenModule):
    init: Any

    @nn.compact
    def __call__(self, x):
        layers = nn.Sequential([nn.Dense(3, kernel_init=self.init), lambda h: jnp.tanh(2.0 * h), nn.Dense(2)])
        return trace("y", Normal)(layers(x), 1.0)


class Model(GenModule):
    """Its callee is made anew in every run, with a function as a field."""

    @nn.compact
    def __call__(self, x):
        return trace("d", Decoder(nn.initializers.normal(0.1)))(x)


def test_traces_of_callees_that_a_body_makes_are_of_one_type():
    x = jnp.ones(3)
    model = Model().bind(jax.jit(Model().init)(KEY, x))
    _, first = model.simulate(KEY, (x,))
    _, second = model.simulate(KEY, (x,))
    assert jax.tree.structure(first) == jax.tree.structure(second)

    def step(tr: Any, key: Any) -> Any:
        _, (_, weight, tr) = model.regenerate(key, tr, select("d"), (x,))
        return tr, weight

    last, _ = jax.jit(lambda tr: jax.lax.scan(step, tr, jax.random.split(KEY, 3)))(first)
    assert last.get_gen_fn() == Model() and np.any(last["d", "y"] != first["d", "y"])

"""Batches: what an epoch holds, in which order, and where a run goes on."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gjflax import ArgumentError, TrainingDataError, batches

KEY = jax.random.key(0)
DATA = {"x": np.arange(7), "y": (jnp.arange(14.0).reshape(7, 2),)}


def same(one: Any, other: Any) -> None:
    one, other = list(one), list(other)
    assert len(one) == len(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("size", [1, 3, 7, 10, None])
@pytest.mark.parametrize("key", [None, KEY, jax.random.PRNGKey(3)], ids=["in order", "shuffled", "by a legacy key"])
def test_every_epoch_holds_every_element_once(size: int | None, key: Any):
    source = batches(DATA, size, key=key, epochs=3)
    assert source.steps_per_epoch == -(-7 // (size or 7)) and source.length == 7
    for number in range(3):
        parts = list(source.epoch(number))
        assert [len(part["x"]) for part in parts[:-1]] == [size] * (len(parts) - 1)
        order = np.concatenate([part["x"] for part in parts])
        assert sorted(order) == list(range(7))
        # Elements stay together, and arrays of their kind.
        np.testing.assert_array_equal(np.concatenate([part["y"][0] for part in parts]), np.asarray(DATA["y"][0])[order])
        assert isinstance(parts[0]["x"], np.ndarray) and isinstance(parts[0]["y"][0], jax.Array)
        if key is None:
            assert order.tolist() == list(range(7))


def test_the_order_is_another_in_each_epoch_and_for_each_key():
    def orders(key: Any) -> list[tuple[int, ...]]:
        source = batches(np.arange(50), 50 - 1, key=key, epochs=4)
        return [tuple(np.concatenate(list(source.epoch(number)))) for number in range(4)]

    assert orders(KEY) == orders(KEY)
    assert len({*orders(KEY), *orders(jax.random.key(1))}) == 8


def test_the_first_element_is_shuffled_uniformly():
    """Counts of 2000 epochs of 5 elements: 4 standard errors of a count, sqrt(2000 · 0.2 · 0.8) = 18."""
    source = batches(np.arange(5), 2, key=KEY, epochs=None)
    first = [next(source.epoch(number))[0] for number in range(2000)]
    assert np.all(np.abs(np.bincount(first) - 400) < 4 * np.sqrt(2000 * 0.2 * 0.8))


def test_the_remainder_may_be_dropped():
    source = batches(DATA, 3, epochs=2, drop_remainder=True)
    assert [part["x"].tolist() for part in source] == [[0, 1, 2], [3, 4, 5]] * 2


@pytest.mark.parametrize(
    "source",
    [
        batches(DATA, 3, key=KEY, epochs=3),
        batches(DATA, epochs=4),
        batches([np.zeros(2), np.ones(3)], epochs=4),
        batches(lambda epoch: (np.full(2, 10 * epoch + i) for i in range(epoch + 1)), epochs=4),
    ],
    ids=["arrays", "whole", "list", "function"],
)
def test_it_goes_on_at_any_step(source: Any):
    every = list(source)
    for step in range(len(every) + 2):
        same(source.from_step(step), every[step:])
    # Within an epoch too.
    for number in range(source.epochs):
        whole = list(source.epoch(number))
        for skip in range(len(whole) + 1):
            same(source.epoch(number, skip), whole[skip:])


def test_endless_data_go_on():
    source = batches(np.arange(4), 3, key=KEY, epochs=None)
    some = list(itertools.islice(source, 9))
    assert len(some) == 9 and source.epochs is None
    same(itertools.islice(source.from_step(5), 4), some[5:])


def test_iterables_are_gone_through_in_each_epoch():
    class Loader:
        def __iter__(self):
            yield {"x": np.zeros(2)}
            yield {"x": np.ones(1)}

    def generator():
        yield from Loader()

    want = list(Loader()) * 2
    same(batches(Loader(), epochs=2), want)
    same(batches(generator, epochs=2), want)
    same(batches(lambda *epochs: Loader(), epochs=2), want)
    same(batches(list(Loader()), epochs=2), want)
    same(batches(iter(want)), want)


def test_tensors_of_others_become_arrays():
    class Tensor:
        def __init__(self, value: Any):
            self.value = value

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return np.asarray(self.value, dtype)

    (batch,) = batches([{"x": Tensor([1.0, 2.0]), "n": 3}])
    assert isinstance(batch["x"], np.ndarray) and batch["x"].tolist() == [1.0, 2.0] and batch["n"] == 3


def test_data_of_another_form_are_refused():
    for data, match in [
        ({"x": np.zeros(3), "y": [np.zeros(4)]}, r"differ.*data\['x'\] has 3, data\['y'\]\[0\] has 4"),
        (np.zeros((0, 2)), "empty: data has no elements"),
        ({}, "no arrays"),
        ({"x": np.float32(1.0)}, r"data\['x'\] is a scalar"),
        ({"x": np.zeros(2), "name": "text"}, r"data\['name'\] is a str"),
        (3.5, "data is a float"),
        ([], "empty"),
    ]:
        with pytest.raises(TrainingDataError, match=match):
            batches(data)
    with pytest.raises(TrainingDataError, match="2 elements, fewer than a batch of 3"):
        batches(np.zeros(2), 3, drop_remainder=True)


def test_a_generator_gives_one_epoch():
    def generate():
        yield np.zeros(2)

    for epochs in (2, None):
        with pytest.raises(TrainingDataError, match="a generator, which can be gone through only once"):
            batches(generate(), epochs=epochs)
    source = batches(generate())
    assert len(list(source)) == 1
    with pytest.raises(TrainingDataError, match="gone through before"):
        list(source)


def test_epochs_that_are_empty_or_differ_are_refused():
    with pytest.raises(TrainingDataError, match="Epoch 1 of the data gave 0 batches: it is empty"):
        list(batches(lambda epoch: [np.zeros(2)] * (1 - epoch), epochs=2))
    with pytest.raises(TrainingDataError, match="gave 1 batches, and 2 of it were used before"):
        list(batches(lambda: [np.zeros(2)]).epoch(0, skip=2))


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ArgumentError, match="`batch_size`, `key` is for a pytree of arrays; the data are a list"):
        batches([np.zeros(3)], 2, key=KEY)
    with pytest.raises(ArgumentError, match="`batch_size` is a positive integer; got 0"):
        batches(DATA, 0)
    with pytest.raises(ArgumentError, match="`epochs` is a positive integer"):
        batches(DATA, 2, epochs=-1)
    with pytest.raises(ArgumentError, match="batches already"):
        batches(batches(DATA, 2))

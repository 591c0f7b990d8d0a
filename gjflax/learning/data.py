"""Batches of data: epochs over arrays, shuffled by a key, or over whatever gives batches one after another.

Where a run stands in its data is a pure function of the step: epoch e of shuffled arrays is in the order

    permutation(fold_in(key, e)),

so nothing but the step has to be kept to go on exactly where a run was interrupted, in the middle of an epoch too.
"""

from __future__ import annotations

import inspect
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from gjflax.core.errors import ArgumentError, TrainingDataError
from gjflax.core.keys import typed_key
from gjflax.core.typing import PRNGKey


class Batches:
    """Batches of data, epoch by epoch. Made by `batches`; iterating over it starts at the first step.

    Attributes:
      epochs: how often the data are gone through; None for endlessly.
      steps_per_epoch: how many batches an epoch has; None where only going through it tells.
      length: how many elements there are; None where batches are made elsewhere.
      once: whether they can be gone through only once.
    """

    def __init__(
        self, epochs: int | None, steps_per_epoch: int | None, *, length: int | None = None, once: bool = False
    ):
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.length = length
        self.once = once

    def epoch(self, number: int, skip: int = 0) -> Iterator[Any]:
        """The batches of an epoch, without the first `skip`; epochs count from 0."""
        raise NotImplementedError

    def checksum(self) -> int | None:
        """A number that other data would hardly have; None where batches are made elsewhere."""
        return None

    def peek(self) -> Any:
        """The first batch, which stays where it is."""
        return next(self.epoch(0))

    def from_step(self, step: int) -> Iterator[Any]:
        """All batches from a step on; steps count from 0.

        Batches of arrays are found at once. Where an iterable gives the batches, those before are read and dropped.
        """
        if self.steps_per_epoch is None:
            every = itertools.chain.from_iterable(map(self.epoch, self._numbers(0)))
            return itertools.islice(every, step, None)
        first, skip = divmod(step, self.steps_per_epoch)
        return itertools.chain.from_iterable(
            self.epoch(number, skip if number == first else 0) for number in self._numbers(first)
        )

    def __iter__(self) -> Iterator[Any]:
        return self.from_step(0)

    def _numbers(self, first: int) -> Iterable[int]:
        return itertools.count(first) if self.epochs is None else range(first, self.epochs)


def batches(
    data: Any,
    batch_size: int | None = None,
    *,
    key: PRNGKey | None = None,
    epochs: int | None = 1,
    drop_remainder: bool = False,
) -> Batches:
    """Batches of data, epoch by epoch.

    Args:
      data: one of

        - a pytree of arrays (a dict, a tuple, one array) with a common leading axis, the elements;
        - an iterable of batches that are made elsewhere (a list, a loader of grain, a ``tf.data.Dataset``), gone
          through once per epoch;
        - a function that gives such an iterable: of the epoch's number, by which it may shuffle, or of nothing
          (a generator function).
      batch_size: the number of elements in a batch, of arrays. By default all of them: every batch is the whole data.
      key: a random key that shuffles the elements of arrays anew in each epoch; by default they keep their order.
      epochs: how often to go through the data; None for endlessly.
      drop_remainder: whether to leave out the last batch of an epoch where it is smaller than the others.

    Returns:
      An iterable of batches, NumPy arrays of NumPy arrays and JAX arrays of JAX arrays. Its method ``from_step(step)``
      goes on where an interrupted run stopped.

    Raises:
      TrainingDataError: if arrays differ in length, there are no data, a batch is larger than the data while the
        remainder is dropped, or an iterator that can be gone through only once should give several epochs.
      ArgumentError: if an option does not fit the data.

    >>> data = {"x": np.arange(5), "y": np.arange(10).reshape(5, 2)}
    >>> [batch["x"].tolist() for batch in batches(data, 2)]
    [[0, 1], [2, 3], [4]]
    >>> shuffled = batches(data, 2, key=jax.random.key(0), epochs=3)
    >>> rest = [batch["x"].tolist() for batch in shuffled.from_step(4)]
    >>> rest == [batch["x"].tolist() for batch in shuffled][4:]
    True
    """
    for name, value in (("batch_size", batch_size), ("epochs", epochs)):
        if value is not None and (not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1):
            raise ArgumentError(f"`{name}` is a positive integer; got {value!r}.")
    if isinstance(data, Batches):
        raise ArgumentError("`data` are batches already.")
    if gives_batches(data):
        given = {"batch_size": batch_size, "key": key, "drop_remainder": drop_remainder or None}
        unfit = [name for name, value in given.items() if value is not None]
        if unfit:
            raise ArgumentError(
                f"`{'`, `'.join(unfit)}` is for a pytree of arrays; the data are a {type(data).__name__}, whose items are "
                "batches as they stand. Batch and shuffle where they are made; a list of arrays is written as a tuple."
            )
        return _GivenBatches(data, epochs)
    return _ArrayBatches(data, batch_size, None if key is None else typed_key(key), epochs, drop_remainder)


def gives_batches(data: Any) -> bool:
    """Whether the data are batches, or a function that gives them, rather than a pytree of arrays."""
    if isinstance(data, (list, range)):
        return True
    is_leaf = jax.tree_util.all_leaves([data])
    return is_leaf and not hasattr(data, "shape") and (callable(data) or hasattr(data, "__iter__"))


class _ArrayBatches(Batches):
    """Batches of the elements of arrays."""

    def __init__(
        self, data: Any, batch_size: int | None, key: PRNGKey | None, epochs: int | None, drop_remainder: bool
    ):
        length = _common_length(data)
        size = length if batch_size is None else int(batch_size)
        if drop_remainder and size > length:
            raise TrainingDataError(
                f"There are {length} elements, fewer than a batch of {size}, and the remainder is dropped: no batch is left."
            )
        whole, rest = divmod(length, size)
        super().__init__(epochs, whole + (rest > 0 and not drop_remainder), length=length)
        self._data, self._key, self._length, self._size = data, key, length, size

    def epoch(self, number: int, skip: int = 0) -> Iterator[Any]:
        steps = range(skip, self.steps_per_epoch or 0)
        if self._size == self._length:
            return (self._data for _ in steps)
        order = None
        if self._key is not None:
            order = np.asarray(jax.random.permutation(jax.random.fold_in(self._key, number), self._length))
        return (self._batch(order, step * self._size) for step in steps)

    def checksum(self) -> int | None:
        value = 0
        for leaf in jax.tree.leaves(self._data):
            array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
            value = zlib.crc32(np.ascontiguousarray(array).tobytes(), value)
        return value

    def _batch(self, order: np.ndarray | None, start: int) -> Any:
        which = slice(start, start + self._size) if order is None else order[start : start + self._size]
        return jax.tree.map(lambda leaf: leaf[which], self._data)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _common_length(data: Any) -> int:
    """The length of the leading axis of all arrays."""
    leaves = jax.tree_util.tree_flatten_with_path(data)[0]
    if not leaves:
        raise TrainingDataError(f"There are no arrays in the data: {data!r:.80}.")
    lengths: dict[int, str] = {}
    for path, leaf in leaves:
        name = f"data{jax.tree_util.keystr(path)}"
        if not hasattr(leaf, "shape") or not hasattr(leaf, "__getitem__"):
            raise TrainingDataError(
                f"The data are a pytree of arrays, an iterable of batches, or a function that gives one; {name} is "
                f"a {type(leaf).__name__}."
            )
        if not leaf.shape:
            raise TrainingDataError(f"{name} is a scalar: every array of the data has a leading axis, the elements.")
        lengths.setdefault(leaf.shape[0], name)
    if len(lengths) > 1:
        listed = ", ".join(f"{name} has {length}" for length, name in lengths.items())
        raise TrainingDataError(f"The arrays of the data differ in their number of elements: {listed}.")
    length = next(iter(lengths))
    if length == 0:
        raise TrainingDataError(f"The data are empty: {next(iter(lengths.values()))} has no elements.")
    return length


class _GivenBatches(Batches):
    """Batches that are made elsewhere."""

    def __init__(self, data: Any, epochs: int | None):
        known = len(data) if isinstance(data, (list, range)) else None
        super().__init__(epochs, known, once=isinstance(data, Iterator))
        if known == 0:
            raise TrainingDataError("The data are empty: an epoch has no batches.")
        if self.once and epochs != 1:
            raise TrainingDataError(
                f"The data are a {type(data).__name__}, which can be gone through only once, and "
                f"{'several' if epochs is None else epochs} epochs are asked for. Give a list, a loader, or the function that "
                "makes the iterator."
            )
        self._make = _by_epoch(data) if callable(data) else lambda _: data

    def epoch(self, number: int, skip: int = 0) -> Iterator[Any]:
        if self.once:
            if self._make is _exhausted:
                raise TrainingDataError("The data are an iterator that was gone through before. Give a new one.")
            items, self._make = self._make(number), _exhausted
        else:
            items = self._make(number)
        return self._items(items, number, skip)

    def peek(self) -> Any:
        if not self.once:
            return super().peek()
        items = self.epoch(0)
        first = next(items)
        self._make = lambda _: itertools.chain([first], items)
        return first

    def _items(self, items: Iterable[Any], number: int, skip: int) -> Iterator[Any]:
        count = 0
        for item in items:
            count += 1
            if count > skip:
                yield jax.tree.map(_array, item)
        if count == 0 or count < skip:
            raise TrainingDataError(
                f"Epoch {number} of the data gave {count} batches"
                + (f", and {skip} of it were used before: it is not the same as then." if skip else ": it is empty.")
            )


def _exhausted(number: int) -> Iterable[Any]:
    return ()


def _by_epoch(function: Callable[..., Any]) -> Callable[[int], Iterable[Any]]:
    """The function as one of the epoch's number."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes_number = any(
        parameter.kind in (*positional, inspect.Parameter.VAR_POSITIONAL)
        for parameter in inspect.signature(function).parameters.values()
    )
    return function if takes_number else lambda _: function()


def _array(leaf: Any) -> Any:
    """Tensors of other libraries as NumPy arrays."""
    is_foreign = hasattr(leaf, "__array__") and not isinstance(leaf, (np.ndarray, np.generic, jax.Array))
    return np.asarray(leaf) if is_foreign else leaf

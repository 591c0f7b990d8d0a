"""Scikit-learn's 1,797 digits of 8 × 8 pixels, a few of them with labels."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import models
import numpy as np
from jaxtyping import Array, Int, Key
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TRAINING, HELD_OUT = 1437, 360
"""How many images are trained on, and how many are held out."""

SPLIT_SEED = 0


class Digits(NamedTuple):
    """Images, with grey levels from 0 to 16, and the digits they show."""

    images: Int[np.ndarray, "n 8 8"]
    labels: Int[np.ndarray, " n"]


class Partly(NamedTuple):
    """A training set of which some images have labels."""

    labelled: Digits
    unlabelled: Int[np.ndarray, "n 8 8"]


def load_datasets() -> tuple[Digits, Digits]:
    """The training set and the held-out set: always the same split, with every digit's share the same in both."""
    digits = load_digits()
    images, labels = digits.images.astype(np.int32), digits.target.astype(np.int32)
    parts = train_test_split(
        images, labels, train_size=TRAINING, test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=labels
    )
    return Digits(parts[0], parts[2]), Digits(parts[1], parts[3])


def keep_labels(digits: Digits, number: int, key: Key[Array, ""]) -> Partly:
    """A training set that keeps so many labels, the same number of each class, and loses the others."""
    order = np.asarray(jax.random.permutation(key, len(digits.labels)))
    of_classes = [order[digits.labels[order] == label] for label in range(models.CLASSES)]
    kept = np.concatenate([indices[: number // models.CLASSES] for indices in of_classes])
    lost = np.setdiff1d(np.arange(len(digits.labels)), kept)
    return Partly(Digits(digits.images[kept], digits.labels[kept]), digits.images[lost])


def sizes_of(partly: Partly, labelled_batch: int, unlabelled_batch: int) -> models.Sizes:
    """How many images there are of either kind, and how many go into a batch."""
    labelled, unlabelled = len(partly.labelled.labels), len(partly.unlabelled)
    return models.Sizes(labelled, unlabelled, min(labelled_batch, labelled), min(unlabelled_batch, unlabelled))


def batches(
    partly: Partly, sizes: models.Sizes, key: Key[Array, ""]
) -> Callable[[int], Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Batches of labelled images, their labels, and unlabelled images, as a function of the epoch's number.

    An epoch goes once through the unlabelled images, in random order; what does not fill the last batch is left out.
    The labelled ones are gone through, each time in another order, as often as that takes.
    """

    def epoch(number: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        keys = jax.random.split(jax.random.fold_in(key, number))
        unlabelled = _shuffled(keys[0], sizes.unlabelled, sizes.unlabelled_batch)
        rounds = -(-len(unlabelled) // (sizes.labelled // sizes.labelled_batch))
        labelled = np.concatenate(
            [_shuffled(key, sizes.labelled, sizes.labelled_batch) for key in jax.random.split(keys[1], rounds)]
        )
        for ours, others in zip(labelled, unlabelled, strict=False):
            yield partly.labelled.images[ours], partly.labelled.labels[ours], partly.unlabelled[others]

    return epoch


def _shuffled(key: Key[Array, ""], number: int, batch_size: int) -> Int[np.ndarray, "batches batch"]:
    """Numbers below `number` in random order, in whole batches."""
    count = number // batch_size
    return np.asarray(jax.random.permutation(key, number))[: count * batch_size].reshape(count, batch_size)

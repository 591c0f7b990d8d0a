"""Scikit-learn's digits: 1,797 scanned digits of 8 × 8 pixels with 17 grey levels. They come with the package."""

from typing import NamedTuple

import jax
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


def load_datasets() -> tuple[Digits, Digits]:
    """The training set and the held-out set: always the same split, with every digit's share the same in both."""
    digits = load_digits()
    train, held_out = train_test_split(
        np.arange(len(digits.target)),
        train_size=TRAINING,
        test_size=HELD_OUT,
        random_state=SPLIT_SEED,
        stratify=digits.target,
    )
    images, labels = digits.images.astype(np.int32), digits.target.astype(np.int32)
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


def shuffled_batches(
    images: Int[Array, "n 8 8"], key: Key[Array, ""], batch_size: int
) -> Int[Array, "batches batch 8 8"]:
    """One epoch of batches in random order. What does not fill the last batch is left out of this epoch."""
    count = len(images) // batch_size
    order = jax.random.permutation(key, len(images))[: count * batch_size]
    return images[order].reshape(count, batch_size, *images.shape[1:])

"""Images of several digits: scikit-learn's real 8 × 8 digits, placed on a canvas where none overlaps another."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CANVAS, SIDE = 24, 8
"""The height and width of an image and of a digit, in pixels."""

LEVELS = 16

TRAINING, HELD_OUT = 1437, 360
"""Of how many digits the images are made that are trained on, and of how many others those that are held out."""

SPLIT_SEED = 0


class Scenes(NamedTuple):
    """Images, with grey levels from 0 to 1, and how many digits each of them shows."""

    images: Float[np.ndarray, "n canvas canvas"]
    counts: Int[np.ndarray, " n"]


def load_datasets(train: int, held_out: int, max_digits: int, key: Key[Array, ""]) -> tuple[Scenes, Scenes]:
    """Images to train on and others, made of other digits.

    Args:
      train: how many images to train on.
      held_out: how many others.
      max_digits: the largest number of digits in an image; all numbers up to it are equally likely.
      key: the random key of all that is drawn.
    """
    digits = load_digits().images.astype(np.float32) / LEVELS
    parts = train_test_split(digits, train_size=TRAINING, test_size=HELD_OUT, random_state=SPLIT_SEED)
    keys = jax.random.split(key)
    return make_scenes(parts[0], train, max_digits, keys[0]), make_scenes(parts[1], held_out, max_digits, keys[1])


def make_scenes(digits: Float[np.ndarray, "digits 8 8"], number: int, max_digits: int, key: Key[Array, ""]) -> Scenes:
    """So many images of some of the digits."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    counts = rng.integers(max_digits + 1, size=number).astype(np.int32)
    images = np.zeros((number, CANVAS, CANVAS), np.float32)
    for image, count in zip(images, counts, strict=True):
        for row, column in _corners(rng, count):
            image[row : row + SIDE, column : column + SIDE] = digits[rng.integers(len(digits))]
    return Scenes(images, counts)


def _corners(rng: np.random.Generator, count: int) -> Int[np.ndarray, "count 2"]:
    """Upper left corners, uniform among those where no digit overlaps another: by rejection."""
    while True:
        corners = rng.integers(CANVAS - SIDE + 1, size=(count, 2))
        apart = np.abs(corners[:, None] - corners[None]).max(axis=-1) >= SIDE
        if np.all(apart | np.eye(count, dtype=bool)):
            return corners

"""Random keys: legacy keys in and out, and one independent stream of keys per address."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from gjflax.core.errors import ArgumentError
from gjflax.core.typing import Address, PRNGKey, PRNGKeys

_END = 0x9E3779B9


def is_typed_key(key: Any) -> bool:
    """Whether this is a key of ``jax.random.key``, not one of ``jax.random.PRNGKey``."""
    dtype = getattr(key, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def typed_key(key: Any) -> Key[Array, ""]:
    """The key as a typed one.

    Raises:
      ArgumentError: if it is not a single JAX key.
    """
    if is_typed_key(key):
        if key.shape != ():
            raise ArgumentError(
                f"Expected one random key, got an array of keys of shape {key.shape}. "
                "Map over keys with jax.vmap, or pass one of them."
            )
        return key
    if getattr(key, "dtype", None) == np.uint32 and getattr(key, "shape", None) == (2,):
        return jax.random.wrap_key_data(jnp.asarray(key), impl="threefry2x32")
    described = f"{key.dtype}{list(key.shape)}" if hasattr(key, "shape") and hasattr(key, "dtype") else repr(key)
    raise ArgumentError(
        f"Expected a random key (jax.random.key(seed) or jax.random.PRNGKey(seed)) as the first argument, "
        f"got {described[:80]}."
    )


def like_key(key: Key[Array, ""], given: PRNGKey) -> PRNGKey:
    """A typed key in the kind of `given`."""
    return key if is_typed_key(given) else jax.random.key_data(key)


def slash(key: PRNGKey, n: int) -> tuple[PRNGKey, PRNGKeys]:
    """Split a key into one to go on with and `n` to use.

    Args:
      key: a random key, typed or legacy.
      n: how many sub-keys.

    Returns:
      The key to go on with, and an array of `n` keys.

    Raises:
      ArgumentError: if `n` is not a number of keys.

    >>> key, sub_keys = slash(jax.random.key(0), 3)
    >>> sub_keys.shape
    (3,)
    """
    if not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 0:
        raise ArgumentError(f"`n` is how many keys are wanted, an integer of 0 or more; got {n!r}.")
    keys = jax.random.split(key, n + 1)
    return keys[0], keys[1:]


class KeySource:
    """Keys by address: ``source.at("x")`` depends on the key and the address, not on the order of calls.

    So adding a choice to a model leaves the draws of the others as they were. A source that was never asked
    gives its key back unchanged, which saves the cost of splitting where nothing is drawn.
    """

    def __init__(self, key: Key[Array, ""]):
        self._key = key
        self._used: set[int] = set()

    def at(self, address: Address) -> Key[Array, ""]:
        """The key of an address."""
        data = zlib.crc32(repr(address).encode())
        # Two addresses with equal checksums would draw equal values.
        while data in self._used or data == _END:
            data = (data * 0x01000193 + 1) % 2**32
        self._used.add(data)
        return jax.random.fold_in(self._key, np.uint32(data))

    def end(self) -> Key[Array, ""]:
        """The key to go on with."""
        return after(self._key) if self._used else self._key


def after(key: Key[Array, ""]) -> Key[Array, ""]:
    """The key to go on with after one that was used: unlike those of a `KeySource`, and those that ``split`` gives."""
    return jax.random.fold_in(key, np.uint32(_END))

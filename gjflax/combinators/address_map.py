r"""`AddressMap`: a generative function whose choices have other addresses.

With a bijection α from new addresses to old ones and inner density p(t; x),

    p_AddressMap(t; x) = p(t ∘ α⁻¹; x):

the choice at the new address a is the one that the inner function has at α(a). What the dict names moves, with all that is
below it; other addresses stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from gjflax.combinators.renaming import Moves, Renaming, moves
from gjflax.core.choice_map import ChoiceMap
from gjflax.core.errors import ArgumentError
from gjflax.core.generative_function import GenerativeFunction


class AddressMap(Renaming):
    """A generative function whose choices have other addresses. See the text of this file.

    Constraints, selections, traces, discards and gradients speak of the new addresses.

    Attributes:
      inner: the generative function. Its parameters are those of the `AddressMap`.
      mapping: a dict from new addresses to old ones: ``{"new": "old", ("a", "b"): "c"}``. Below an old address there may
        be many choices; so two names are swapped by ``{"a": "b", "b": "a"}``.

    Raises:
      ArgumentError: if `mapping` is not a dict, or no choice of the inner function is at or below an old address.
      InvalidAddressError: if something in it is no address.
      DuplicateAddressError: if two new or two old addresses overlap, or a new one is one that stays.

    >>> import gjflax, jax
    >>> @gjflax.gen
    ... def line(x):
    ...     slope = gjflax.trace("slope", gjflax.Normal)(0.0, 2.0)
    ...     return gjflax.trace("y", gjflax.Normal)(slope * x, 0.1)
    >>> renamed = gjflax.AddressMap(line, {("latent", "k"): "slope"})
    >>> key, (weight, tr) = renamed.importance(jax.random.key(0), {("latent", "k"): 1.5}, (2.0,))
    >>> tr.strip().addresses()
    [('y',), ('latent', 'k')]
    >>> float(tr["latent", "k"])
    1.5
    """

    mapping: Any

    def __post_init__(self) -> None:
        if not isinstance(self.inner, GenerativeFunction):
            raise ArgumentError(f"`AddressMap` takes a generative function; got {self.inner!r:.80}. Is @gen missing?")
        if not isinstance(self.mapping, Moves):
            if not isinstance(self.mapping, Mapping):
                raise ArgumentError(f"`mapping` is a dict from new addresses to old ones; got {self.mapping!r:.80}.")
            object.__setattr__(self, "mapping", moves(self.mapping))
        super().__post_init__()

    @nn.nowrap
    def moves_of(self, *choices: ChoiceMap) -> Moves:
        return self.mapping

    @nn.nowrap
    def outer_address(self, inner: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.mapping.outer_address(inner)

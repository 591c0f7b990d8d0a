r"""`Inline`: a generative function in which the choices below one address stand at the top.

With inner density p(t; x) and an address s, the choice at a is the one that the inner function has at (s, a) if it has
that, else the one at a: the level s is gone. It is what the statement `inline` does in a body, for a callee of any kind.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from gjflax.combinators.renaming import Moves, Path, Renaming, path
from gjflax.core.choice_map import BuiltinChoiceMap, ChoiceMap
from gjflax.core.context import current_address
from gjflax.core.errors import ArgumentError, nearest, show_address
from gjflax.core.generative_function import GenerativeFunction


class Inline(Renaming):
    """A generative function in which the choices below one address stand at the top. See the text of this file.

    Attributes:
      inner: the generative function. Its parameters are those of the `Inline`.
      address: the address whose level goes. The addresses below it must neither begin nor extend one at the top.

    Raises:
      InvalidAddressError: if `address` is no address.
      ArgumentError: if no choice of the inner function is below it.
      DuplicateAddressError: if an address below it begins or extends one at the top.

    >>> import gjflax, jax
    >>> @gjflax.gen
    ... def low(x):
    ...     return gjflax.trace("low", gjflax.Normal)(x, 1.0)
    >>> @gjflax.gen
    ... def high(x):
    ...     return gjflax.trace("high", gjflax.Normal)(x, 1.0)
    >>> @gjflax.gen
    ... def model(x):
    ...     z = gjflax.trace("branch", gjflax.Cond(low, high))(x > 0.0, x)
    ...     return gjflax.trace("y", gjflax.Normal)(z, 0.1)
    >>> key, tr = gjflax.Inline(model, "branch").simulate(jax.random.key(0), (jax.numpy.float32(2.0),))
    >>> sorted(tr.strip().addresses())
    [('high',), ('low',), ('y',)]
    """

    address: Any

    def __post_init__(self) -> None:
        if not isinstance(self.inner, GenerativeFunction):
            raise ArgumentError(f"`Inline` takes a generative function; got {self.inner!r:.80}. Is @gen missing?")
        object.__setattr__(self, "address", path(self.address))
        super().__post_init__()

    @nn.nowrap
    def moves_of(self, *choices: ChoiceMap) -> Moves:
        names = dict.fromkeys(name for part in choices for name in part.get_subtree(self.address).names())
        if not names:
            addresses = [address for part in choices for address in part.addresses()]
            levels = dict.fromkeys(
                address[: len(self.address)] for address in addresses if len(address) > len(self.address)
            )
            raise ArgumentError(
                f"The Inline at {show_address(current_address())} moves up what is below {show_address(self.address)}, and the "
                f"inner function has no choice below that. {nearest(self.address, levels)}"
            )
        return Moves(tuple(pair for name in names for pair in self._pairs((name,), choices)))

    @nn.nowrap
    def _pairs(self, new: Path, choices: tuple[ChoiceMap, ...]) -> list[tuple[Path, Path]]:
        """The moves of what is called `new` outside: one by one, where other choices stand at that name already."""
        old = (*self.address, *new)
        moving = [part.get_subtree(old) for part in choices if old in part]
        is_free = self.address[: len(new)] == new[: len(self.address)] or not any(new in part for part in choices)
        if is_free or not all(isinstance(part, BuiltinChoiceMap) for part in moving):
            return [(new, old)]
        names = dict.fromkeys(name for part in moving for name in part.names())
        return [pair for name in names for pair in self._pairs((*new, name), choices)]

    @nn.nowrap
    def outer_address(self, inner: tuple[Any, ...]) -> tuple[Any, ...]:
        return inner[len(self.address) :] if inner[: len(self.address)] == self.address else inner

r"""`OrElse`: one of two generative functions with arguments of their own, by a flag.

With branches p_1, p_2, their arguments x_1, x_2 and a flag b,

    p(t; b, x_1, x_2) = p_1(t; x_1) if b, else p_2(t; x_2).

What happens to the choices when the flag changes stands in `branching`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from gjflax.combinators.branch_arguments import own_arguments
from gjflax.combinators.cond import TwoWay
from gjflax.core.typing import Arguments


class OrElse(TwoWay):
    """One of two generative functions with arguments of their own: called with ``(flag, first_args, second_args)``.

    It is a `Cond` whose branches take different arguments, and all that is said of `Switch` holds.

    Attributes:
      first: the generative function that runs where the flag is true, called with ``(*first_args)``.
      second: the one that runs where it is false, called with ``(*second_args)``. Their parameters are ``first`` and
        ``second``.

    Raises:
      ArgumentError: if the flag is not a boolean scalar, or the arguments are not two tuples.
      BranchMismatchError: if the two return different types, or have choices of different types at one address.

    >>> import gjflax, jax
    >>> waiting = gjflax.OrElse(gjflax.Exponential, gjflax.Gamma)
    >>> key, (retval, score) = waiting.assess(jax.random.key(0), 2.0, (True, (0.5,), (3.0, 1.0)))
    >>> round(float(score), 4)
    -1.6931
    """

    first: Any
    second: Any

    @property
    def alternatives(self) -> Mapping[str, Any]:
        return {"first": self.first, "second": self.second}

    @nn.nowrap
    def arguments(self, args: Arguments) -> tuple[Arguments, ...]:
        return own_arguments(args[1:], 2, "OrElse")

r"""`Cond`: one of two generative functions, by a predicate.

With branches p_then, p_otherwise and a predicate b,

    p(t; b, x) = p_then(t; x) if b, else p_otherwise(t; x).

What happens to the choices when the predicate changes stands in `branching`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from gjflax.combinators.branch_arguments import branch_flag, check_branches
from gjflax.combinators.branching import Branching
from gjflax.core.errors import ArgumentError
from gjflax.core.typing import Arguments


class TwoWay(Branching):
    """Base class of combinators that choose between their first two fields by a boolean, true for the first."""

    def __post_init__(self) -> None:
        check_branches(list(self.alternatives.values()), type(self).__name__)
        super().__post_init__()

    @nn.nowrap
    def stored(self, args: Arguments) -> Arguments:
        if not args:
            raise ArgumentError(f"`{type(self).__name__}` takes a boolean as its first argument; got no arguments.")
        return (branch_flag(args[0], type(self).__name__), *args[1:])

    @nn.nowrap
    def index_of(self, stored: Any) -> Any:
        return jnp.where(stored[0], jnp.int32(0), jnp.int32(1))

    @nn.nowrap
    def static_index(self, args: Arguments) -> int | None:
        return int(not args[0]) if isinstance(args[0], (bool, np.bool_, np.ndarray)) else None


class Cond(TwoWay):
    """One of two generative functions, by a predicate: called with ``(predicate, *args)``, as ``jax.lax.cond``.

    It is a `Switch` of two with a boolean in place of the index, and all that is said there holds.

    Attributes:
      then: the generative function that runs where the predicate is true.
      otherwise: the one that runs where it is false. Their parameters are ``then`` and ``otherwise``.

    Raises:
      ArgumentError: if the predicate is not a boolean scalar.
      BranchMismatchError: if the two return different types, or have choices of different types at one address.

    >>> import gjflax, jax
    >>> noise = gjflax.Cond(gjflax.Laplace, gjflax.Normal)
    >>> key, tr = noise.simulate(jax.random.key(0), (True, 0.0, 2.0))
    >>> key, (_, weight, other, _) = noise.update(key, tr, {}, (False, 0.0, 2.0))
    >>> other.get_retval() == tr.get_retval()
    Array(True, dtype=bool)
    """

    then: Any
    otherwise: Any

    @property
    def alternatives(self) -> Mapping[str, Any]:
        return {"then": self.then, "otherwise": self.otherwise}

    @nn.nowrap
    def arguments(self, args: Arguments) -> tuple[Arguments, ...]:
        return (args[1:], args[1:])

r"""`Mask`: a generative function that may be left out, by a flag.

With inner density p(t; x) and a flag b,

    p(t; b, x) = p(t; x) if b, and no choices with density 1 if not;   retval Masked(f(t, x), b).

So the score is that of the inner function where the flag is true, else 0. When the flag changes, choices appear, drawn
or constrained, or are gone; see `branching`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from gjflax.combinators.branch_arguments import branch_flag, check_branches
from gjflax.combinators.branching import Branching
from gjflax.core.errors import ArgumentError
from gjflax.core.lifting import share_inner_scope
from gjflax.core.masked import Masked
from gjflax.core.typing import Arguments


class Mask(Branching):
    """A generative function that may be left out: called with ``(flag, *args)``.

    Every choice is a `Masked` value, which is there where the flag is true; also where the flag is a Python boolean, so
    that a trace has the same structure whatever the flag. A constraint is ignored where the flag is false. The inner
    function runs only where the flag is true, outside of ``jax.vmap``.

    Attributes:
      inner: the generative function. Its parameters are those of the mask.

    Raises:
      ArgumentError: if the flag is not a boolean scalar.

    >>> import gjflax, jax
    >>> maybe = gjflax.Mask(gjflax.Normal)
    >>> key, tr = maybe.simulate(jax.random.key(0), (False, 0.0, 1.0))
    >>> float(tr.get_score()), tr.get_retval().flag
    (0.0, Array(False, dtype=bool))
    >>> key, (_, weight, tr, _) = maybe.update(key, tr, 1.5, (True, 0.0, 1.0))
    >>> tr.get_retval().unmask(0.0)
    Array(1.5, dtype=float32)
    """

    inner: Any

    def __post_init__(self) -> None:
        check_branches([self.inner], "Mask")
        super().__post_init__()

    def setup(self) -> None:
        share_inner_scope(self)

    @property
    def alternatives(self) -> Mapping[str, Any]:
        return {"inner": self.inner}

    @property
    def number_of_alternatives(self) -> int:
        return 2

    @nn.nowrap
    def stored(self, args: Arguments) -> Arguments:
        if not args:
            raise ArgumentError("`Mask` takes the flag as its first argument; got no arguments.")
        return (branch_flag(args[0], "Mask"), *args[1:])

    @nn.nowrap
    def index_of(self, stored: Any) -> Any:
        return jnp.where(stored[0], jnp.int32(0), jnp.int32(1))

    @nn.nowrap
    def static_index(self, args: Arguments) -> int | None:
        # Where the flag is false nothing is asked for, and what is given is ignored.
        return 0 if isinstance(args[0], (bool, np.bool_, np.ndarray)) and args[0] else None

    @nn.nowrap
    def arguments(self, args: Arguments) -> tuple[Arguments, ...]:
        return (args[1:],)

    @nn.nowrap
    def choose_retval(self, taken: Sequence[Any], retvals: Sequence[Any]) -> Any:
        return Masked(retvals[0], taken[0])

    @nn.nowrap
    def variables_of(self, trace: Any) -> Mapping[str, Any]:
        params = super().variables_of(trace).get("params", {})
        return {"params": params["inner"]} if params else {}

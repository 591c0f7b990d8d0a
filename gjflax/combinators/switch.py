r"""`Switch`: one of several generative functions, by an index.

With branches p_k(t; x) and an index i,

    p(t; i, x) = p_i(t; x),   retval f_i(t, x).

What happens to the choices when the index changes stands in `branching`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from gjflax.combinators.branch_arguments import branch_index, check_branches, own_arguments
from gjflax.combinators.branching import Branching
from gjflax.core.errors import ArgumentError
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.typing import Arguments


class Switch(Branching):
    """One of several generative functions, by an index: called with ``(index, *args)``, as ``jax.lax.switch``.

    Every branch is called with ``(*args)`` and returns the same structure, shapes and dtypes. Only the branch taken runs;
    under ``jax.vmap`` over the index all run and the results are selected.

    An address that all branches have holds a value, of one shape and dtype. One that only some have holds a `Masked`
    value, which is there where one of these is taken, whether the index is static or not: so a trace has the same
    structure whatever the index.

    In ``assess`` a choice may be missing that only branches need that are not taken. Where it is missing and an index
    that is known only when running takes its branch, the score is NaN.

    Attributes:
      branches: the generative functions, a tuple or list. Their parameters are ``branches_0``, ``branches_1``, ...; those
        of all exist after ``init``, whatever the index. What a branch that is not taken would write to other collections
        stays as it was.
      own_arguments: whether each branch has arguments of its own: called with ``(index, args_0, args_1, ...)``, one tuple
        for each branch.

    Raises:
      ArgumentError: if the index is not an integer scalar, or is a Python integer out of range. A traced index is clamped
        into the range, as ``jax.lax.switch`` does.
      BranchMismatchError: if the branches return different types, or have choices of different types at one address.

    >>> import gjflax, jax
    >>> @gjflax.gen
    ... def shifted(x):
    ...     return gjflax.trace("y", gjflax.Normal)(x + gjflax.trace("shift", gjflax.Normal)(0.0, 1.0), 0.1)
    >>> @gjflax.gen
    ... def plain(x):
    ...     return gjflax.trace("y", gjflax.Normal)(x, 0.1)
    >>> switch = gjflax.Switch((shifted, plain))
    >>> key, tr = switch.simulate(jax.random.key(0), (1, 3.0))
    >>> tr["shift"].flag
    Array(False, dtype=bool)
    >>> key, (retdiff, weight, tr, discard) = switch.update(key, tr, {"shift": 0.5}, (0, 3.0))
    >>> tr["shift"].unmask(0.0)
    Array(0.5, dtype=float32)
    """

    branches: Any
    own_arguments: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.branches, GenerativeFunction):
            raise ArgumentError("`Switch` takes its branches in one tuple: write Switch((first, second)).")
        if not isinstance(self.branches, (tuple, list)) or not self.branches:
            raise ArgumentError(f"`Switch` takes a tuple of generative functions; got {self.branches!r:.80}.")
        check_branches(self.branches, "Switch")
        if not isinstance(self.own_arguments, bool):
            raise ArgumentError(f"`own_arguments` is True or False; got {self.own_arguments!r:.80}.")
        # A list does not hash, and a module that does not hash cannot be a static part of a trace.
        object.__setattr__(self, "branches", tuple(self.branches))
        super().__post_init__()

    @property
    def alternatives(self) -> Mapping[str, Any]:
        return {f"branches_{number}": branch for number, branch in enumerate(self.branches)}

    @nn.nowrap
    def stored(self, args: Arguments) -> Arguments:
        if not args:
            raise ArgumentError("`Switch` takes the index as its first argument; got no arguments.")
        return (branch_index(args[0], len(self.branches), "Switch"), *args[1:])

    @nn.nowrap
    def index_of(self, stored: Any) -> Any:
        return stored[0]

    @nn.nowrap
    def static_index(self, args: Arguments) -> int | None:
        return int(args[0]) if isinstance(args[0], (int, np.integer, np.ndarray)) else None

    @nn.nowrap
    def arguments(self, args: Arguments) -> tuple[Arguments, ...]:
        if self.own_arguments:
            return own_arguments(args[1:], len(self.branches), "Switch")
        return (args[1:],) * len(self.branches)

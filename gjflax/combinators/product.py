r"""`Product`: independent generative functions side by side.

With factors p_k(t_k; x_k),

    p(t_1, …, t_n; x_1, …, x_n) = Π_k p_k(t_k; x_k),

so scores and weights are sums over the factors. Each factor's choices stand below its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax.core import FrozenDict

from gjflax.combinators.branch_arguments import check_branches, own_arguments
from gjflax.core.context import at_body
from gjflax.core.errors import ArgumentError
from gjflax.language.gen import GenModule, trace


class Product(GenModule):
    """Independent generative functions side by side: called with one tuple of arguments for each factor.

    Attributes:
      factors: the generative functions, a dict by name, or a tuple or list, whose names are ``"0"``, ``"1"``, .... A
        factor's choices stand below its name, and its parameters are ``factors_<name>``. The return value is a dict or a
        tuple of theirs.
      names: the factors' names, in the order of their arguments; by default that of the dict.

    Raises:
      ArgumentError: if the arguments are not one tuple for each factor, in the order of the factors.

    >>> import gjflax, jax
    >>> pair = gjflax.Product({"x": gjflax.Normal, "n": gjflax.Poisson})
    >>> key, tr = pair.simulate(jax.random.key(0), ((0.0, 2.0), (3.0,)))
    >>> sorted(tr.get_retval())
    ['n', 'x']
    >>> key, (weight, tr) = pair.importance(key, {"x": 1.0}, ((0.0, 2.0), (3.0,)))
    >>> tr["x"]
    Array(1., dtype=float32)
    """

    factors: Any
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        factors = self.factors
        if not isinstance(factors, (Mapping, tuple, list)) or not factors:
            raise ArgumentError(f"`Product` takes a dict or a tuple of generative functions; got {factors!r:.80}.")
        if isinstance(factors, Mapping):
            names = tuple(factors) if self.names is None else tuple(self.names)
            if sorted(map(str, names)) != sorted(map(str, factors)):
                raise ArgumentError(f"`names` gives the order of the factors {list(factors)}; got {self.names!r:.80}.")
            if not all(isinstance(name, str) and name and "/" not in name for name in names):
                raise ArgumentError(f'The names of a Product\'s factors are strings without "/"; got {list(names)}.')
            # A dict does not hash, and a module that does not hash cannot be a static part of a trace. Frozen dicts are
            # equal in any order, and the arguments have one.
            object.__setattr__(self, "factors", FrozenDict(factors))
            object.__setattr__(self, "names", names)
        else:
            object.__setattr__(self, "factors", tuple(factors))
            if self.names is not None:
                raise ArgumentError("The factors of a Product have `names` where they are a dict.")
        check_branches(list(self._named().values()), "Product")
        super().__post_init__()

    def __call__(self, *args: Any) -> Any:
        named = self._named()
        with at_body():
            own = own_arguments(args, len(named), "Product", "factor")
        retvals = {name: trace(name, factor)(*one) for (name, factor), one in zip(named.items(), own, strict=True)}
        return tuple(retvals.values()) if self.names is None else retvals

    @nn.nowrap
    def _named(self) -> dict[str, Any]:
        if self.names is not None:
            return {name: self.factors[name] for name in self.names}
        return {str(position): factor for position, factor in enumerate(self.factors)}

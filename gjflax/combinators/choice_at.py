r"""`ChoiceAt`: one random choice at an address that is computed.

With the density p(v; x) of a distribution and a key k,

    p(v at k; x, k) = p(v; x):

a `CallAt` of a distribution. What happens when the key changes stands there.
"""

from __future__ import annotations

import flax.linen as nn

from gjflax.combinators.call_at import CallAt
from gjflax.core.errors import ArgumentError
from gjflax.distributions.distribution import Distribution


class ChoiceAt(CallAt):
    """One random choice at an address that is an argument: called with ``(*args, key)``. See `CallAt`.

    Attributes:
      inner: the distribution.

    Raises:
      ArgumentError: if it is not a distribution, or there is no key, or that is neither a string nor an integer scalar.
      UnvisitedConstraintError: if a constraint certainly stands at another key.

    >>> import gjflax, jax
    >>> choice = gjflax.ChoiceAt(gjflax.Normal)
    >>> key, (weight, tr) = choice.importance(jax.random.key(0), {3: 1.5}, (0.0, 1.0, 3))
    >>> float(tr[3]), 4 in tr
    (1.5, False)
    >>> key, (_, weight, new, discard) = choice.update(key, tr, {4: 0.5}, (0.0, 1.0, 4))
    >>> float(new[4]), round(float(weight), 4)
    (0.5, 1.0)
    """

    @nn.nowrap
    def _check_inner(self) -> None:
        if not isinstance(self.inner, Distribution):
            raise ArgumentError(
                f"`ChoiceAt` makes one choice of a distribution; got {self.inner!r:.80}. For a generative function use "
                "`CallAt`."
            )

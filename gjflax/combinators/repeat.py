r"""`Repeat`: independent runs of a generative function at the same arguments.

With inner density p(t; x),

    p(t_1, …, t_n; x) = Π_i p(t_i; x),   retval (f(t_1, x), …, f(t_n, x)) stacked:

a `Map` in which no argument is mapped. By de Finetti's theorem this is how exchangeable data are modelled; n of them, drawn
from N, stand for all with ``total=N``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gjflax.combinators.map import Map
from gjflax.core.errors import ArgumentError


class Repeat(Map):
    """Independent runs of a generative function at the same arguments. See the text of this file.

    Attributes:
      inner: the generative function of one run. Its parameters are those of the whole.
      repeats: the number of runs.
      variable_axes: axes of Flax collections, as in `Map`: ``{"params": 0}`` gives every run parameters of its own.
      split_rngs: as in `Map`.
      total: the size of the population that the runs are a batch of, as in `Map`.

    Raises:
      ArgumentError: if `repeats` is not a positive integer.

    >>> import gjflax, jax
    >>> throws = gjflax.Repeat(gjflax.Bernoulli, 4)
    >>> key, tr = throws.simulate(jax.random.key(0), (0.3,))
    >>> tr.get_retval().shape
    (4,)
    """

    repeats: int  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleVariableOverride]
    in_axes: Any = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.repeats is None:
            raise ArgumentError("`Repeat` takes a generative function and how often it runs: `Repeat(inner, repeats)`.")
        super().__post_init__()

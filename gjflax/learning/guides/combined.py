"""`AutoGuides`: several guides of one model as one, each for some of its choices."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from gjflax.combinators.inline import Inline
from gjflax.combinators.renaming import Moves
from gjflax.core.choice_map import ChoiceMap
from gjflax.core.errors import ArgumentError
from gjflax.core.generative_function import GenerativeFunction
from gjflax.language.gen import GenModule, trace


class _SideBySide(GenModule):
    """Independent guides, each at an address of its own."""

    guides: tuple[Any, ...]
    own_arguments: bool = False

    def __call__(self, *args: Any) -> Any:
        if self.own_arguments and (len(args) != len(self.guides) or not all(isinstance(one, tuple) for one in args)):
            raise ArgumentError(
                f"These `AutoGuides` take one tuple of arguments for each of the {len(self.guides)} guides; got {args!r:.80}."
            )
        return tuple(
            trace(_name(number), guide)(*(args[number] if self.own_arguments else args))
            for number, guide in enumerate(self.guides)
        )


class OptionalInline(Inline):
    """An `Inline` of what may have no choice below its address: a guide of no choice."""

    @nn.nowrap
    def moves_of(self, *choices: ChoiceMap) -> Moves:
        return super().moves_of(*choices) if any(self.address in part for part in choices) else Moves(())


def _name(number: int) -> str:
    return f"guide_{number}"


def AutoGuides(*guides: Any, own_arguments: bool = False) -> GenerativeFunction:
    """A guide made of several, which draw different choices of one model, independently.

    Each may be built from the model, with a `selection` of what it draws, or be written by hand: the choices that have no
    map to R^n, such as discrete ones, need that.

    Args:
      *guides: the guides. Their parameters are ``guides_0``, ``guides_1``, ....
      own_arguments: whether each is called with arguments of its own, one tuple each; by default all are called alike.

    Returns:
      A generative function with the choices of all, at their own addresses, and a tuple of their return values.

    Raises:
      ArgumentError: if there is no guide, or one is not a generative function.
      DuplicateAddressError: if two draw one choice; where they are called.

    >>> import flax.linen as nn, gjflax, jax
    >>> @gjflax.gen
    ... def model():
    ...     k = gjflax.trace("k", gjflax.Bernoulli)(0.3)
    ...     mu = gjflax.trace("mu", gjflax.Normal)(0.0, 1.0)
    ...     return gjflax.trace("y", gjflax.Normal)(mu + 2.0 * k, 1.0)
    >>> class OfK(gjflax.GenModule):
    ...     @nn.compact
    ...     def __call__(self):
    ...         logits = self.param("logits", nn.initializers.zeros, ())
    ...         gjflax.trace("k", gjflax.ENUM(gjflax.Bernoulli))(logits=logits)
    >>> of_mu = gjflax.AutoNormal(model, {"y": 1.0}, selection=gjflax.select("mu"))
    >>> guide = AutoGuides(OfK(), of_mu)
    >>> variables = guide.init(jax.random.key(0))
    >>> key, tr = guide.bind(variables).simulate(jax.random.key(1), ())
    >>> sorted(tr.strip().to_dict())
    ['k', 'mu']
    """
    if not guides:
        raise ArgumentError("`AutoGuides` takes the guides, one after the other; got none.")
    for guide in guides:
        if not isinstance(guide, GenerativeFunction):
            raise ArgumentError(f"`AutoGuides` takes generative functions; got {guide!r:.80}.")
    combined: Any = _SideBySide(tuple(guides), own_arguments)
    for number in range(len(guides)):
        combined = OptionalInline(combined, _name(number))
    return combined

"""Arguments of a distribution that are pytrees themselves, such as a TFP distribution in another, as a trace keeps them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from gjflax.core.pytree import STATIC, Pytree
from gjflax.core.trace import canonical, plain
from gjflax.core.typing import Arguments
from gjflax.distributions.arguments import free_promotion


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Packed(Pytree):
    """An argument that is itself a pytree, by its leaves.

    A TFP distribution looks at the shapes of its parameters whenever it is put together again, which it is at the end
    of a `jax.vmap`, where they have one more axis.
    """

    parts: tuple[Any, ...]
    structure: Any = dataclasses.field(metadata=STATIC)

    @classmethod
    def of(cls, value: Any) -> Packed:
        """The argument, packed."""
        parts, structure = jax.tree.flatten(value)
        return cls(tuple(canonical(part) for part in parts), structure)

    def value(self) -> Any:
        """The argument."""
        with free_promotion():
            return jax.tree.unflatten(self.structure, plain(self.parts))


def unpacked(args: Any) -> Arguments:
    """The arguments, of those that a trace keeps."""
    return tuple(arg.value() if isinstance(arg, Packed) else plain(arg) for arg in args)

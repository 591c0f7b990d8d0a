r"""Priors of parameters: what a user writes, and which of it speaks of a path.

A prior is one of

- ``(Normal, (0.0, 1.0))``, a distribution and its arguments, or a distribution alone if it takes none;
- ``(Normal, lambda scale: (0.0, scale))``, a distribution and a function that gives its arguments from hyperparameters;
- ``lambda path, shape: (Normal, (0.0, shape[0] ** -0.5))``, a function that gives one of the above.

`Priors` is one of these for all parameters, or a dict of them by path, where the longest path that leads to a parameter
counts. It hashes, for it is a field of a module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gjflax.core.context import current_address
from gjflax.core.errors import ArgumentError, show_address
from gjflax.core.interface import is_tracer
from gjflax.core.interned import TracedProgramError, program_key
from gjflax.core.typing import Arguments
from gjflax.distributions.distribution import Distribution

Path = tuple[str, ...]

_FORM = (
    "A prior is written (Normal, (0.0, 1.0)), (Normal, lambda scale: (0.0, scale)) or lambda path, shape: (...), or as a "
    "dict of these by path"
)


class _Constants:
    """The arguments of a prior as a hashable value: equal where structure and numbers are."""

    def __init__(self, args: tuple[Any, ...]):
        self.args = args
        leaves, self._structure = jax.tree.flatten(args)
        if any(map(is_tracer, leaves)):
            raise ArgumentError(
                "The arguments of a prior are constants of the program; got a traced array. Let them be a function of "
                "hyperparameters, (Normal, lambda scale: (0.0, scale)), and give these as the first arguments, with "
                "`num_hyperparameters`."
            )
        self._numbers = tuple((str(array.dtype), array.shape, array.tobytes()) for array in map(np.asarray, leaves))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Constants):
            return NotImplemented
        return self._structure == other._structure and self._numbers == other._numbers

    def __hash__(self) -> int:
        return hash((self._structure, self._numbers))


@dataclasses.dataclass(frozen=True)
class Prior:
    """A distribution with its arguments."""

    distribution: Distribution
    arguments: Any

    @classmethod
    def parse(cls, value: Any, at: Path) -> Prior:
        distribution, arguments = value if isinstance(value, tuple) and len(value) == 2 else (value, ())
        if not isinstance(distribution, Distribution):
            raise ArgumentError(f"The prior of {_below(at)} is {value!r:.80}. {_FORM}.")
        if isinstance(arguments, tuple):
            return cls(distribution, _Constants(arguments))
        if not callable(arguments):
            raise ArgumentError(
                f"The arguments of the prior of {_below(at)} are a tuple, or a function of the hyperparameters; "
                f"got {arguments!r:.80}. {_FORM}."
            )
        return cls(distribution, arguments)

    @property
    def depends_on_hyperparameters(self) -> bool:
        return not isinstance(self.arguments, _Constants)

    def at(self, hyperparameters: Arguments) -> Arguments:
        if isinstance(self.arguments, _Constants):
            return self.arguments.args
        args = self.arguments(*hyperparameters)
        if not isinstance(args, tuple):
            raise ArgumentError(
                f"The function that gives the arguments of the prior of {show_address(current_address())} returned "
                f"{args!r:.80}; it returns a tuple: lambda scale: (0.0, scale)."
            )
        return args

    def __repr__(self) -> str:
        arguments = self.arguments
        if isinstance(arguments, _Constants):
            return f"{self.distribution.label}({', '.join(map(_brief, arguments.args))})"
        return f"{self.distribution.label}(...)"


def _below(path: Path) -> str:
    return show_address(path) if path else "all parameters"


def _brief(argument: Any) -> str:
    shape = jnp.shape(argument)
    return f"array{list(shape)}" if shape else repr(argument)


class Priors:
    """Priors by path, as a hashable value: pairs of a path and what is given for all parameters below it."""

    def __init__(self, prior: Any):
        self._entries = tuple(_flat(prior, ()))
        self._key = tuple((path, _program(given)) for path, given in self._entries)

    @property
    def paths(self) -> list[Path]:
        """The paths that are named."""
        return [path for path, _ in self._entries]

    def entry(self, path: Path, shape: tuple[int, ...]) -> Prior | None:
        """The prior of a parameter, None where none is given."""
        leading = [(prefix, given) for prefix, given in self._entries if path[: len(prefix)] == prefix]
        if not leading:
            return None
        _, given = max(leading, key=lambda pair: len(pair[0]))
        if isinstance(given, Prior):
            return given
        result = given(path, shape)
        return None if result is None else Prior.parse(result, path)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Priors):
            return NotImplemented
        return self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def _tree_children(self) -> Iterator[tuple[str, Any]]:
        for path, given in self._entries:
            yield "/".join(path) or "all", given


def _program(given: Any) -> Any:
    """What two priors that say the same are equal by: functions too, which a body makes anew in every run."""
    parts = (given.distribution, given.arguments) if isinstance(given, Prior) else (given,)
    try:
        return tuple(map(program_key, parts))
    except TracedProgramError as error:
        raise ArgumentError(
            "A function in a prior closes over a traced array, and a prior is part of the program. Let it be a function of "
            "hyperparameters, (Normal, lambda scale: (0.0, scale)), and give these as the first arguments, with "
            "`num_hyperparameters`."
        ) from error


def _flat(prior: Any, prefix: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(prior, Mapping):
        for key, value in prior.items():
            components = key if isinstance(key, tuple) else (key,)
            if not all(isinstance(component, str) for component in components):
                raise ArgumentError(f"A key of `prior` is the path of parameters, of names; got {key!r}. {_FORM}.")
            yield from _flat(value, (*prefix, *components))
    elif callable(prior) and not isinstance(prior, (nn.Module, type)):
        yield prefix, prior
    else:
        yield prefix, Prior.parse(prior, prefix)

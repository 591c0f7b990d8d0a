"""Modules that are one program as one object: what makes the traces of two runs one type.

A body may make its callees as it runs, with functions among their fields: ``nn.Dense(3, kernel_init=normal(0.1))``, a
lambda in a ``nn.Sequential``. Python compares functions by identity, so the callees of two runs would be different
modules, and a trace could not be the carry of a scan. Here a function is its code and what it closes over.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import weakref
from collections.abc import Hashable
from typing import Any, TypeVar

import flax.linen as nn
import jax
from jax.core import Tracer

from gjflax.core.frozen import Frozen, hashable

M = TypeVar("M", bound=nn.Module)


class _Identity:
    """A value that is compared by identity."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class TracedProgramError(Exception):
    """A value that JAX is tracing is part of a program, which so is none of its own."""


def program_key(value: Any) -> Hashable:
    """A value that hashes, and is equal for two functions, modules, or tuples of these, that are the same program.

    Raises:
      TracedProgramError: if a value that JAX is tracing is part of it.

    >>> def scaled(factor):
    ...     return lambda x: factor * x
    >>> program_key(scaled(2.0)) == program_key(scaled(2.0)), program_key(scaled(2.0)) == program_key(scaled(3.0))
    (True, False)
    """
    return _key(value, ())


def _key(value: Any, above: tuple[int, ...]) -> Hashable:
    if id(value) in above:
        # A function that calls itself: how far up it stands.
        return ("above", above[::-1].index(id(value)))
    inside = (*above, id(value))
    if isinstance(value, nn.Module):
        fields = [field.name for field in dataclasses.fields(value) if field.name not in ("parent", "name")]
        return (type(value), *((name, _key(hashable(getattr(value, name, None)), inside)) for name in fields))
    if isinstance(value, types.FunctionType):
        cells = tuple(_closed_over(cell, inside) for cell in value.__closure__ or ())
        keywords = tuple((value.__kwdefaults__ or {}).items())
        return (
            value.__code__,
            _Identity(value.__globals__),
            _key(value.__defaults__, inside),
            _key(keywords, inside),
            cells,
        )
    if isinstance(value, types.MethodType):
        return (_key(value.__func__, inside), _key(value.__self__, inside))
    if isinstance(value, functools.partial):
        keywords = tuple(value.keywords.items())
        return (functools.partial, *(_key(part, inside) for part in (value.func, value.args, keywords)))
    if isinstance(value, Frozen):
        return (Frozen, value.kind, _key(value.items, inside))
    if isinstance(value, tuple):
        return (type(value), *(_key(part, inside) for part in value))
    try:
        hash(value)
    except TypeError:
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value)):
            raise TracedProgramError from None
        return _Identity(value)
    return (type(value), value)


def _closed_over(cell: Any, above: tuple[int, ...]) -> Hashable:
    try:
        return _key(cell.cell_contents, above)
    except ValueError:  # a variable that has no value yet
        return _Identity(cell)


_programs: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()


def interned(module: M) -> M:
    """The first module that is the same program as this one, which is not bound."""
    try:
        return _programs.setdefault(program_key(module), module)
    except TracedProgramError:
        return module

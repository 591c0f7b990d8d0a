"""Dicts and lists as hashable values: fields of modules that are static parts of traces must hash."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, repr=False)
class Frozen:
    """A dict or list as a hashable value."""

    kind: type
    items: tuple[Hashable, ...]

    def __repr__(self) -> str:
        return repr(thawed(self))


def hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Frozen(dict, tuple((key, hashable(child)) for key, child in value.items()))
    if isinstance(value, list):
        return Frozen(list, tuple(hashable(child) for child in value))
    if isinstance(value, tuple):
        return tuple(hashable(child) for child in value)
    return value


def thawed(value: Any) -> Any:
    if isinstance(value, Frozen) and value.kind is dict:
        return {key: thawed(child) for key, child in value.items}  # pyright: ignore[reportGeneralTypeIssues]
    if isinstance(value, Frozen):
        return [thawed(child) for child in value.items]
    if isinstance(value, tuple):
        return tuple(thawed(child) for child in value)
    return value

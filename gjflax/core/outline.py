"""The outline of a trace: its single choices, and what they stand in (plates, steps, branches).

`Trace.outline` gives it. A combinator's trace says with a `Group` what it is; where it says nothing, its choices stand
side by side. A model's picture and its table are made of outlines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

Address = tuple[Any, ...]

PLATE, STEPS, SWITCH, BRANCH = "plate", "steps", "switch", "branch"


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A single choice: its address, and its trace with the axes of the groups around it."""

    address: Address
    trace: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Choices that stand together.

    Attributes:
      kind: `PLATE` of independent elements, `STEPS` in which each depends on the one before, `SWITCH` between branches,
        or one `BRANCH` of these.
      address: where it stands. Groups that stand in each other may have one address.
      title: what it is called: the combinator, or the branch.
      parts: what is in it.
      length: how many elements or steps there are.
      population: of how many in all these elements are a batch; None where they are all.
      control: an array that decides what of it is there, such as the index of a switch.
    """

    kind: str
    address: Address
    title: str
    parts: tuple[Part, ...]
    length: int | None = None
    population: int | None = None
    control: Any = None


Part = Site | Group


def sites(parts: tuple[Part, ...], above: tuple[Group, ...] = ()) -> Iterator[tuple[Site, tuple[Group, ...]]]:
    """The single choices of an outline, each with the groups around it, the outermost first."""
    for part in parts:
        if isinstance(part, Group):
            yield from sites(part.parts, (*above, part))
        else:
            yield part, above


def groups(parts: tuple[Part, ...]) -> Iterator[Group]:
    """The groups of an outline, each before those in it."""
    for part in parts:
        if isinstance(part, Group):
            yield part
            yield from groups(part.parts)

"""A place from which to watch every single choice that is drawn, for analyses that run a model without computing it.

It also knows the branches of switches in which the program is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

Draw = Callable[[tuple[Any, ...]], Any]
"""What a distribution's `simulate` does, as a function of its arguments: ``key, trace``."""

Watcher = Callable[[Draw, tuple[Any, ...]], Any]
"""Called in place of every draw, with the draw and its arguments; it returns what the draw returns."""


class _Current(threading.local):
    watcher: Watcher | None = None
    branches: tuple[str, ...] = ()


_current = _Current()


def watched(draw: Draw, args: tuple[Any, ...]) -> Any:
    """A draw, seen by the watcher of this thread if there is one."""
    watcher = _current.watcher
    return draw(args) if watcher is None else watcher(draw, args)


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """The context in which every draw of this thread is handed to `watcher`."""
    before = _current.watcher
    _current.watcher = watcher
    try:
        yield
    finally:
        _current.watcher = before


@contextlib.contextmanager
def in_branch(title: str) -> Iterator[None]:
    """The context in which a branch of a switch is traced, called as its trace's outline calls it."""
    before = _current.branches
    _current.branches = (*before, title)
    try:
        yield
    finally:
        _current.branches = before


def current_branches() -> tuple[str, ...]:
    """The branches that are being traced in this thread, the outermost first."""
    return _current.branches

"""Where the program is: the bodies that are running in this thread, and the address being visited in each.

Only error messages and `trace` read it. A body pushes a frame when it starts and pops it when it ends, also by an
exception; every thread has a stack of its own.

Beside it, what is noted while a method of the interface runs: where a density is only estimated (`note_estimate`,
`estimates`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jax.extend import core as jax_core

from gjflax.core.errors import CalleeError


@dataclasses.dataclass
class Frame:
    """One running body: who owns it, what `trace` does in it, and in which JAX transformation it runs."""

    owner: Any
    handler: Any
    prefix: tuple[Any, ...]
    trace_state: Any
    visiting: tuple[Any, ...] | None = None
    uncalled: dict[Any, str] = dataclasses.field(default_factory=dict)
    """What was said by `trace` or `inline` and not called yet, with the error's message, by any key."""
    inlined: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """How many callees of a name were inlined so far."""
    renamed: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda address: address
    """How users see the address of something in this body."""

    def shown(self, path: tuple[Any, ...]) -> tuple[Any, ...]:
        """The full address, as users see it, of what this body has at a path."""
        return self.renamed((*self.prefix, *path))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A place where a density is only estimated, by randomness that is no choice, and what that randomness is."""

    address: tuple[Any, ...]
    randomness: str


class _Stack(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.estimates: list[list[Estimate]] = []


_stack = _Stack()


def trace_state() -> Any:
    """A token of the JAX transformation that is being traced; equal tokens mean the same one."""
    return jax_core.get_opaque_trace_state(convention="flax")


def top_frame() -> Frame | None:
    """The innermost running body of this thread."""
    return _stack.frames[-1] if _stack.frames else None


def current_address() -> tuple[Any, ...]:
    """The full address of the choice or callee being visited; ``()`` outside of any body."""
    frame = top_frame()
    return frame.shown(frame.visiting) if frame is not None and frame.visiting is not None else ()


def shown(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The full address, as users see it, of what the running body has at a path."""
    frame = top_frame()
    return frame.shown(path) if frame is not None else path


def _pushed_on(owner: Any, handler: Any, state: Any, visiting: Any = None) -> Frame:
    """A frame for what runs at the address that is being visited."""
    below = top_frame()
    if below is None or below.visiting is None:
        return Frame(owner, handler, (), state, visiting)
    return Frame(owner, handler, below.prefix + below.visiting, state, visiting, renamed=below.renamed)


@contextlib.contextmanager
def _on_top(frame: Frame) -> Iterator[Frame]:
    _stack.frames.append(frame)
    try:
        yield frame
    finally:
        _stack.frames.pop()
    for message in frame.uncalled.values():
        raise CalleeError(message)


def running(owner: Any, handler: Any) -> contextlib.AbstractContextManager[Frame]:
    """The context in which a body runs."""
    return _on_top(_pushed_on(owner, handler, trace_state()))


def running_inline(owner: Any, caller: Frame) -> contextlib.AbstractContextManager[Frame]:
    """The context in which a body runs as a part of another: its choices are the other's own."""
    return _on_top(Frame(owner, caller.handler, caller.prefix, caller.trace_state, renamed=caller.renamed))


@contextlib.contextmanager
def visiting(frame: Frame, address: tuple[Any, ...]) -> Iterator[None]:
    """The context in which a body's `trace` statement calls its callee."""
    frame.visiting = address
    try:
        yield
    finally:
        frame.visiting = None


def at_body() -> contextlib.AbstractContextManager[None]:
    """The context in which a body that is running checks its own arguments: messages name where it stands."""
    frame = top_frame()
    return contextlib.nullcontext() if frame is None else visiting(frame, ())


def naming(address: tuple[Any, ...]) -> contextlib.AbstractContextManager[Frame]:
    """The context of work on the part of a trace at an address, where no body runs."""
    return _on_top(_pushed_on(None, None, None, visiting=address))


def renaming(
    outer_of: Callable[[tuple[Any, ...]], tuple[Any, ...]],
) -> contextlib.AbstractContextManager[Frame]:
    """The context of work on a generative function whose addresses users know by other names.

    Args:
      outer_of: from an address of the generative function to the one by which users know it.
    """
    frame = _pushed_on(None, None, None, visiting=())
    start, outside = len(frame.prefix), frame.renamed
    frame.renamed = lambda address: outside((*address[:start], *outer_of(address[start:])))
    return _on_top(frame)


def note_estimate(randomness: str) -> None:
    """Say that the density which is being traced is an estimate; called by an `assess` that draws.

    Args:
      randomness: what makes it one, in a few words: the subject of a sentence.
    """
    for noted in _stack.estimates:
        noted.append(Estimate(current_address(), randomness))


def is_outermost() -> bool:
    """Whether nothing of the interface runs in this thread: a method that is called here is called by a user."""
    return not _stack.frames and not _stack.estimates


@contextlib.contextmanager
def estimates() -> Iterator[list[Estimate]]:
    """Collect what `note_estimate` says inside."""
    noted: list[Estimate] = []
    _stack.estimates.append(noted)
    try:
        yield noted
    finally:
        _stack.estimates.pop()

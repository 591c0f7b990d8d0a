"""Where the program is: the bodies that are running in this thread, and the address being visited in each.

Only error messages and `trace` read it. A body pushes a frame when it starts and pops it when it ends, also by an
exception; every thread has a stack of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

from jax.extend import core as jax_core

from gjflax.core.errors import CalleeError, show_address


@dataclasses.dataclass
class Frame:
    """One running body: who owns it, what `trace` does in it, and in which JAX transformation it runs."""

    owner: Any
    handler: Any
    prefix: tuple[Any, ...]
    trace_state: Any
    visiting: tuple[Any, ...] | None = None
    uncalled: dict[tuple[Any, ...], Any] = dataclasses.field(default_factory=dict)
    """The `trace` statements whose callees were not called yet, by address."""


class _Stack(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []


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
    return frame.prefix + frame.visiting if frame is not None and frame.visiting is not None else ()


@contextlib.contextmanager
def running(owner: Any, handler: Any) -> Iterator[Frame]:
    """The context in which a body runs."""
    frame = Frame(owner, handler, current_address(), trace_state())
    _stack.frames.append(frame)
    try:
        yield frame
    finally:
        _stack.frames.pop()
    for path, callee in frame.uncalled.items():
        label = getattr(callee, "label", type(callee).__name__)
        raise CalleeError(
            f"The callee of trace({show_address((*frame.prefix, *path))}, ...) was never called, so it made no choice: write "
            f"trace({show_address(path)}, {label})(*args), with parentheses also where there are no arguments."
        )


@contextlib.contextmanager
def visiting(frame: Frame, address: tuple[Any, ...]) -> Iterator[None]:
    """The context in which a body's `trace` statement calls its callee."""
    frame.visiting = address
    try:
        yield
    finally:
        frame.visiting = None


@contextlib.contextmanager
def naming(address: tuple[Any, ...]) -> Iterator[None]:
    """The context of work on the part of a trace at an address, where no body runs."""
    frame = Frame(None, None, current_address(), None, visiting=address)
    _stack.frames.append(frame)
    try:
        yield
    finally:
        _stack.frames.pop()

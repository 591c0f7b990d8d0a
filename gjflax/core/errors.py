"""Every error that gjflax raises on bad input: one class for each mistake.

All derive from `GJFlaxError`; each also derives from the built-in exception that Python users expect
(`KeyError`, `ValueError`, `TypeError`), so that code which knows nothing of gjflax can catch it. They are
raised while a program is being traced, before anything runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class GJFlaxError(Exception):
    """Base class of all errors of gjflax."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which hides the line breaks of a message.
        return str(self.args[0]) if self.args else ""


class MissingChoiceError(GJFlaxError, KeyError):
    """An address was asked for, or needed to compute a density, and has no value.

    Give a value for the address, or use `importance`, which samples the choices that are not given.
    """


class UnvisitedConstraintError(GJFlaxError, KeyError):
    """A constraint names an address that the generative function never visits: most often a misspelling.

    Correct the address; or pass ``strict=False`` where a choice map is meant to hold more than the callee uses.
    """


class DuplicateAddressError(GJFlaxError, ValueError):
    """Two `trace` statements of one body use the same address, or one address is a prefix of another."""


class InvalidAddressError(GJFlaxError, TypeError):
    """An address of a `trace` statement is not a string or a tuple of strings."""


class ChoiceShapeError(GJFlaxError, ValueError):
    """A value given for a choice has another shape than the distribution draws."""


class ChoiceDtypeError(GJFlaxError, TypeError):
    """A value given for a choice has a dtype that the distribution cannot take without losing information."""


class ChoiceMapError(GJFlaxError, ValueError):
    """A choice map is malformed, or two of them say different things of the same address."""


class SelectionError(GJFlaxError, ValueError):
    """A selection selects nothing, or its addresses are not those of the trace."""


class ParameterPathError(GJFlaxError, KeyError):
    """A prior names a parameter that the network does not have, or a parameter that is to be a choice has no prior."""


class DiscreteGradientError(GJFlaxError, TypeError):
    """A gradient, or a map to R^n, was asked for at a choice that is discrete."""


class TraceContextError(GJFlaxError, RuntimeError):
    """`trace` was called where no generative function is running."""


class TraceTransformError(GJFlaxError, RuntimeError):
    """`trace` was called inside a JAX transformation that the generative function's body started, or its body runs under one.

    A choice made inside a raw ``jax.lax.scan``, ``jax.vmap``, ``jax.lax.cond``, ``jax.jit`` or ``jax.grad``
    cannot leave it, nor one of a class made by ``nn.vmap`` or ``nn.scan``. Make the mapped or looped code a generative
    function of its own and use a combinator.
    """


class CalleeError(GJFlaxError, TypeError):
    """`trace` was given something that is not a generative function, or something already called."""


class UnboundParametersError(GJFlaxError, ValueError):
    """A generative function with parameters was called without variables.

    Use ``model.bind(variables).simulate(...)`` or ``model.apply(variables, ..., method="simulate")``.
    """


class ArgumentError(GJFlaxError, TypeError):
    """A key, an argument tuple or an argument of a combinator is not of the form that the interface asks for."""


class BranchMismatchError(GJFlaxError, TypeError):
    """The branches of a `Switch` return different types, or have choices of different types at one address."""


class UntracedRandomnessError(GJFlaxError, RuntimeError):
    """A density or its gradient was asked for, and the body draws randomness that is not a choice.

    The density is then only an estimate, and the gradient of its logarithm is biased. Switch the randomness off
    (``deterministic=True``), make it a choice with `trace`, or accept the bias with ``untraced="allow"``.
    """


class MissingStreamError(GJFlaxError, RuntimeError):
    """A forward sample needs the rng stream "choice", and it was not supplied."""


class NotReparameterizedError(GJFlaxError, TypeError):
    """A pathwise gradient was asked for through a choice whose distribution has no reparameterisation."""


class EnumerationError(GJFlaxError, ValueError):
    """Choices are to be summed over exactly, and their values are not known or their combinations too many."""


class NotImplementedByGenerativeFunctionError(GJFlaxError, NotImplementedError):
    """A generative function was asked for a method of the interface that it does not implement."""


class TrainingDataError(GJFlaxError, ValueError):
    """Data are empty, their arrays differ in length, or they cannot be gone through as often as asked for."""


class NonFiniteGradientError(GJFlaxError, FloatingPointError):
    """No step of a whole stretch of training had a finite loss and finite gradients, so nothing was learned in it."""


class CheckpointError(GJFlaxError, ValueError):
    """A checkpoint is of another run: of another key, other data or other parameters."""


class MissingDependencyError(GJFlaxError, ImportError):
    """What was asked for needs a package that is not installed."""


def show_address(address: Any) -> str:
    """How an address is written in messages: `"x"` or `("y", "pos")`.

    >>> show_address(("x",)), show_address(("y", 3, "pos")), show_address(())
    ('"x"', '("y", 3, "pos")', 'the root')
    """
    parts = address if isinstance(address, tuple) else (address,)
    words = [f'"{part}"' if isinstance(part, str) else str(part) for part in parts]
    if not words:
        return "the root"
    return words[0] if len(words) == 1 else f"({', '.join(words)})"


def nearest(address: Any, candidates: Iterable[Any]) -> str:
    """The end of a message about an unknown address: the nearest known one, or all of them.

    >>> nearest("slop", ["slope", "intercept"])
    'Did you mean "slope"?'
    >>> nearest("z", ["slope", "intercept"])
    'Known here: "slope", "intercept".'
    >>> nearest("z", [])
    'No address is known here.'
    """
    known = [show_address(candidate) for candidate in candidates]
    # Compared without the quotes, which would make any two short names alike.
    bare = {shown.replace('"', ""): shown for shown in known}
    close = difflib.get_close_matches(show_address(address).replace('"', ""), bare, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {bare[close[0]]}?"
    if not known:
        return "No address is known here."
    shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
    return f"Known here: {shown}."

"""`FlaxModule`: any Flax module as a generative function without choices.

Its density is that of an empty choice map: score and weights are 0, and its return value is the module's output. So a
network can stand wherever a generative function is asked for: at an address, in `Map`, as a branch.

Randomness in the module (dropout) is not a choice. It makes the density of a body that calls it an estimate, which the
gradient methods refuse, and keeps `update` from knowing that the output is what it was only where nothing has changed.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap
from gjflax.core.context import current_address
from gjflax.core.diff import Diff, no_change, unknown_change
from gjflax.core.errors import ArgumentError, UnvisitedConstraintError, show_address
from gjflax.core.frozen import hashable, thawed
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.lifting import share_inner_scope
from gjflax.core.selection import Selection
from gjflax.core.trace import CallTrace, Trace, canonical, plain
from gjflax.core.typing import Arguments, PRNGKey, Score


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FlaxModuleTrace(CallTrace):
    """The arguments and the output of a module; and a score of 0, so that a batch of traces has a batch of scores."""

    retval: Any
    score: Any

    def get_retval(self) -> Any:
        return plain(self.retval)

    def get_score(self) -> Score:
        return self.score

    def project(self, selection: Selection) -> Score:
        return self.score

    def strip(self) -> ChoiceMap:
        return EmptyChoiceMap()

    def leaves(self, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Trace]]:
        return []

    def unconstrain(self, selection: Selection) -> tuple[ChoiceMap, Score]:
        return EmptyChoiceMap(), self.score


class FlaxModule(GenerativeFunction):
    """Any Flax module as a generative function without choices. See the text of this file.

    Attributes:
      inner: the module. Its variables are those of this generative function, under the same paths.
      kwargs: keyword arguments of every call, which are part of the program: ``{"train": False}``.
      method: the name of the method that is called.

    Raises:
      ArgumentError: if it is not a Flax module, or is a generative function already, or has no such method.

    >>> import flax.linen as nn, gjflax, jax, jax.numpy as jnp
    >>> network = gjflax.FlaxModule(nn.Dense(3))
    >>> variables = network.init(jax.random.key(0), jnp.ones(2))
    >>> sorted(variables["params"])
    ['bias', 'kernel']
    >>> key, tr = network.bind(variables).simulate(jax.random.key(1), (jnp.ones(2),))
    >>> tr.get_retval().shape, float(tr.get_score())
    ((3,), 0.0)
    """

    trace_type = FlaxModuleTrace

    inner: Any
    kwargs: Any = ()
    method: str = "__call__"

    def __post_init__(self) -> None:
        if isinstance(self.inner, GenerativeFunction):
            raise ArgumentError(
                f"`FlaxModule` takes a plain Flax module; {type(self.inner).__name__} is a generative function already: "
                "use it as it is."
            )
        if not isinstance(self.inner, nn.Module):
            cure = "make an instance of it" if isinstance(self.inner, type) else "give a flax.linen module"
            raise ArgumentError(f"`FlaxModule` takes a Flax module; got {self.inner!r:.80}: {cure}.")
        if not callable(getattr(type(self.inner), self.method, None)):
            raise ArgumentError(f"{type(self.inner).__name__} has no method `{self.method}`.")
        object.__setattr__(self, "kwargs", _frozen_keywords(self.kwargs))
        super().__post_init__()

    def setup(self) -> None:
        share_inner_scope(self)

    # The interface ----------------------------------------------------------------------------------------------

    def simulate(self, key: PRNGKey, args: Arguments) -> tuple[PRNGKey, FlaxModuleTrace]:
        return key, self._run(args)

    def importance(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Score, FlaxModuleTrace]]:
        self._refuse(choices, strict)
        return key, (jnp.zeros(()), self._run(args))

    def assess(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Any, Score]]:
        self._refuse(choices, strict)
        return key, (self._output(args), jnp.zeros(()))

    def update(
        self,
        key: PRNGKey,
        trace: FlaxModuleTrace,
        choices: ChoiceMap,
        argdiffs: Arguments,
        *,
        param_diff: Any = unknown_change,
        strict: bool = True,
    ) -> tuple[PRNGKey, tuple[Any, Score, FlaxModuleTrace, ChoiceMap]]:
        self._refuse(choices, strict)
        weight: Any = jnp.zeros(())
        if self.knows_no_change(trace, argdiffs, param_diff):
            return key, (no_change(trace.get_retval()), weight, trace, EmptyChoiceMap())
        new = self._run(Diff.primal(argdiffs))
        return key, (unknown_change(new.get_retval()), weight, new, EmptyChoiceMap())

    def regenerate(
        self,
        key: PRNGKey,
        trace: FlaxModuleTrace,
        selection: Selection,
        argdiffs: Arguments,
        *,
        param_diff: Any = unknown_change,
    ) -> tuple[PRNGKey, tuple[Any, Score, FlaxModuleTrace]]:
        key, (retdiff, weight, new, _) = self.update(key, trace, EmptyChoiceMap(), argdiffs, param_diff=param_diff)
        return key, (retdiff, weight, new)

    def constrain(
        self, unconstrained: ChoiceMap, args: Arguments, *, fixed: ChoiceMap | None = None
    ) -> tuple[ChoiceMap, Score]:
        for given in (unconstrained, EmptyChoiceMap() if fixed is None else fixed):
            self._refuse(given, True)
        return EmptyChoiceMap(), jnp.zeros(())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output. There is no choice in it, so no rng stream "choice" is asked for."""
        return getattr(self.inner, self.method)(*args, **{**thawed(self.kwargs), **kwargs})

    @nn.nowrap
    def positional(self, args: Arguments, kwargs: Mapping[str, Any]) -> tuple[Any, Arguments]:
        if not kwargs:
            return self, args
        name = type(self.inner).__name__
        try:
            bound = inspect.signature(getattr(self.inner, self.method)).bind(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError(f"`{name}`: {error}.") from error
        # An argument by keyword may stand behind one that is left out.
        bound.apply_defaults()
        named = [keyword for keyword in bound.kwargs if keyword in kwargs]
        if named:
            raise ArgumentError(
                f"`{name}` takes {', '.join(named)} by keyword only, which a trace cannot hold: the arguments of a "
                f"generative function are a tuple. Write FlaxModule(module, kwargs={{'{named[0]}': ...}})."
            )
        return self, bound.args

    # Inside -----------------------------------------------------------------------------------------------------

    @nn.nowrap
    def _output(self, args: Arguments) -> Any:
        return getattr(self.inner, self.method)(*args, **thawed(self.kwargs))

    @nn.nowrap
    def _run(self, args: Arguments) -> FlaxModuleTrace:
        return FlaxModuleTrace(self.as_unbound(), canonical(args), canonical(self._output(args)), jnp.zeros(()))

    @nn.nowrap
    def _refuse(self, choices: ChoiceMap, strict: bool) -> None:
        if strict and not choices.is_empty():
            here = current_address()
            given = ", ".join(show_address((*here, *address)) for address in choices.addresses()[:3])
            raise UnvisitedConstraintError(
                f"A value was given for {given}, and the network {type(self.inner).__name__} at {show_address(here)} has "
                "no choices. To ignore what is not used, pass strict=False."
            )


def _frozen_keywords(kwargs: Any) -> Any:
    """The keyword arguments as a hashable value: they are a static part of traces."""
    if not isinstance(thawed(kwargs), Mapping) and kwargs != ():
        raise ArgumentError(f"`kwargs` is a dict of keyword arguments of the module; got {kwargs!r:.80}.")
    frozen = hashable(dict(thawed(kwargs)))
    try:
        hash(frozen)
    except TypeError as error:
        raise ArgumentError(
            f"`kwargs` are part of the program and must hash, so arrays cannot be among them ({error}); "
            "pass these by position, as arguments."
        ) from error
    return frozen

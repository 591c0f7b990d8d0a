"""The modelling language: `trace`, `gen`, `GenModule`, `BuiltinGenerativeFunction`.

From a user's function to a trace: an interface method (``simulate``, say) makes a handler and calls the module's
body under it. Inside, each ``trace(address, callee)(*args)`` finds the handler at the top of the thread's stack of
running bodies; the handler calls the callee's method of the same name, keeps its trace, and returns its value to
the body. When the body ends, what was kept becomes a `BuiltinTrace`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
from flax import errors as flax_errors

from gjflax.core import context, in_place
from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap, choice_map
from gjflax.core.diff import unknown_change
from gjflax.core.errors import (
    ArgumentError,
    CalleeError,
    InvalidAddressError,
    TraceContextError,
    TraceTransformError,
    UnboundParametersError,
    show_address,
)
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.lifting import is_lifted, mapping_of
from gjflax.core.outline import Part
from gjflax.core.selection import Selection
from gjflax.core.trace import CallTrace, Trace, canonical, plain, total
from gjflax.core.typing import Arguments, PRNGKey, Score
from gjflax.distributions.distribution import Distribution
from gjflax.language import handlers, incremental


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BuiltinTrace(CallTrace):
    """A run of a body: the traces of its callees by address."""

    retval: Any
    choices: dict[str, Trace]

    @property
    def by_path(self) -> dict[handlers.Path, Trace]:
        """The callees' traces, by address as a tuple."""
        return {tuple(address.split("/")): trace for address, trace in self.choices.items()}

    def get_retval(self) -> Any:
        return plain(self.retval)

    def get_score(self) -> Score:
        return total([trace.get_score() for trace in self.choices.values()])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return next((trace.batch_shape for trace in self.choices.values()), ())

    def project(self, selection: Selection) -> Score:
        parts = [(trace, selection[address]) for address, trace in self.by_path.items()]
        return total([trace.project(below) for trace, below in parts if not below.is_empty])

    def strip(self) -> ChoiceMap:
        return _by_address({address: trace.strip() for address, trace in self.by_path.items()})

    def leaves(self, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Trace]]:
        return [leaf for address, trace in self.by_path.items() for leaf in trace.leaves((*prefix, *address))]

    def outline(self, prefix: tuple[Any, ...] = ()) -> tuple[Part, ...]:
        return tuple(part for address, trace in self.by_path.items() for part in trace.outline((*prefix, *address)))

    def unconstrain(self, selection: Selection) -> tuple[ChoiceMap, Score]:
        results = {}
        for address, trace in self.by_path.items():
            if trace.strip().filter(selection[address]).is_empty():
                continue
            with context.naming(address):
                results[address] = trace.unconstrain(selection[address])
        choices = _by_address({address: unconstrained for address, (unconstrained, _) in results.items()})
        return choices, total([log_det for _, log_det in results.values()])

    def chosen(self, accepted: Any, old: Any) -> Trace:
        parts = {name: trace.chosen(accepted, old.choices[name]) for name, trace in self.choices.items()}
        args = in_place.chosen_leaves(accepted, self.args, old.args, self._written("args", old))
        retval = in_place.chosen_leaves(accepted, self.retval, old.retval, self._written("retval", old))
        return BuiltinTrace(self.gen_fn, args, retval, parts)

    def _written(self, part: str, old: Any) -> Any:
        written = getattr(self, "written", None)
        return written[part] if written is not None and written["old"] is old else None

    def get_subtree(self, address: Any) -> Any:
        components = address if isinstance(address, tuple) else (address,)
        for path, trace in self.by_path.items():
            if components[: len(path)] == path:
                rest = components[len(path) :]
                return trace.get_subtree(rest) if rest else trace
        return self.strip().get_subtree(address)


def _by_address(parts: Mapping[Any, ChoiceMap]) -> ChoiceMap:
    if all(len(address) == 1 for address in parts):
        return choice_map({address[0]: part for address, part in parts.items()})
    return choice_map(dict(parts))


def _by_name(traces: Mapping[handlers.Path, Trace]) -> dict[str, Trace]:
    return {"/".join(address): trace for address, trace in traces.items()}


def trace(address: Any, callee: Any) -> Callable[..., Any]:
    """Call a generative function at an address, in the body of another: ``value = trace("z", Normal)(0.0, 1.0)``.

    A callee that is part of a module (``self.decoder``, or made in a compact method) is used as it is, so two
    addresses share its parameters. A free one, such as a global `gen` function, becomes a submodule of the current
    module, with the address as its name.

    Args:
      address: a string, or a tuple of strings.
      callee: a generative function.

    Returns:
      A function of the callee's arguments. Distributions take them by keyword too.

    Raises:
      InvalidAddressError: if the address is not of that form.
      CalleeError: if the callee is not a generative function, or the body ends and it was not called.
      TraceContextError: outside of any generative function's body.
      TraceTransformError: inside a JAX transformation that the body started.
      DuplicateAddressError: if the body has used the address already.

    >>> import gjflax, jax
    >>> @gjflax.gen
    ... def model(x):
    ...     slope = gjflax.trace("slope", gjflax.Normal)(0.0, 2.0)
    ...     return gjflax.trace("y", gjflax.Normal)(slope * x, 0.1)
    >>> key, tr = model.simulate(jax.random.key(0), (3.0,))
    >>> sorted(tr.strip().to_dict())
    ['slope', 'y']
    """
    path = _check_address(address)
    if not isinstance(callee, GenerativeFunction):
        raise CalleeError(_not_callable(path, callee))

    def visit(frame: context.Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with context.visiting(frame, path):
            free, arguments = callee.positional(args, kwargs)
            attached = _attach("_".join(path), free)
            try:
                return frame.handler.visit(path, attached, arguments)
            except UnboundParametersError as error:
                if attached.scope is None:
                    error.add_note(_not_compact(frame, f"the callee at {show_address(path)}"))
                raise

    label = getattr(callee, "label", type(callee).__name__)
    return _statement(
        lambda frame: f"trace({show_address(path if frame is None else frame.shown(path))}, ...)",
        f"trace({show_address(path)}, {label})",
        visit,
    )


def inline(callee: Any) -> Callable[..., Any]:
    """Call a generative function in the body of another as a part of it: ``value = inline(prior)(0.0)``.

    The callee's choices stand at the caller's own level, beside those of its `trace` statements, as if the callee's body
    were written there. So they must have addresses of their own.

    A callee that is part of a module (``self.prior``, or made in a compact method) is used as it is. A free one becomes a
    submodule of the current module, named as Flax names modules without a name: by its class or, if it was made by `gen`,
    its function, and how many of that name came before: ``prior_0``.

    Args:
      callee: a generative function with a body: one made by `gen`, or a `GenModule`. To inline another, such as a
        combinator, call it at an address by `trace` and wrap the caller: ``Inline(caller, address)``.

    Returns:
      A function of the callee's arguments.

    Raises:
      CalleeError: if the callee has no body, or the caller's body ends and it was not called.
      TraceContextError: outside of any generative function's body.
      TraceTransformError: inside a JAX transformation that the body started.
      DuplicateAddressError: if the caller has used an address of the callee already.

    >>> import gjflax, jax
    >>> @gjflax.gen
    ... def line():
    ...     return gjflax.trace("slope", gjflax.Normal)(0.0, 2.0)
    >>> @gjflax.gen
    ... def model(x):
    ...     return gjflax.trace("y", gjflax.Normal)(gjflax.inline(line)() * x, 0.1)
    >>> key, tr = model.simulate(jax.random.key(0), (3.0,))
    >>> sorted(tr.strip().to_dict())
    ['slope', 'y']
    """
    if not isinstance(callee, GenModule) or type(callee).body_is_lifted:
        raise CalleeError(_no_body(callee))

    def splice(frame: context.Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _, arguments = callee.positional(args, kwargs)
        attached = _attach(_name_of_inlined(frame, callee), callee)

        def run(bound: Any) -> Any:
            with context.running_inline(bound, frame):
                return bound(*arguments)

        if attached.scope is not None:
            return run(attached)
        try:
            return nn.apply(run, attached)({})
        except (flax_errors.ScopeParamNotFoundError, flax_errors.ScopeCollectionNotFound) as error:
            cause = _not_compact(frame, f"the inlined {callee._title()}")
            raise UnboundParametersError(f"`{callee._title()}` has parameters, and is free. {cause}") from error

    written = f"inline({callee._title()})"
    return _statement(
        lambda frame: f"{written} at {show_address(() if frame is None else frame.shown(()))}", written, splice
    )


def _statement(
    called: Callable[[context.Frame | None], str],
    written: str,
    run: Callable[[context.Frame, tuple[Any, ...], dict[str, Any]], Any],
) -> Callable[..., Any]:
    """What `trace` and `inline` return: a function that runs in the body that it is called in.

    Args:
      called: how messages name it, where it is called in a frame.
      written: how it is written, up to the arguments.
      run: what it does there, with positional and keyword arguments.
    """
    written_in, token = context.top_frame(), object()
    if written_in is not None:
        written_in.uncalled[token] = (
            f"The callee of {called(written_in)} was never called, so it made no choice: write {written}(*args), with "
            "parentheses also where there are no arguments."
        )

    def call(*args: Any, **kwargs: Any) -> Any:
        frame = context.top_frame()
        if written_in is not None:
            written_in.uncalled.pop(token, None)
        if frame is None or frame.handler is None:
            raise TraceContextError(
                f"{called(None)} was called where no generative function is running. It belongs in "
                "the body of a @gen function or a GenModule, which runs by `simulate`, `importance`, `assess`, ..."
            )
        if frame.trace_state != context.trace_state():
            raise TraceTransformError(
                f"{called(frame)} was called inside a JAX transformation "
                "(jax.lax.scan, fori_loop or cond, jax.vmap, jit or grad) that the body started, which its choice cannot "
                "leave. Make that code a generative function: use `Map` in place of vmap, `Unfold` or `Scan` for loops, "
                "`Switch` for branches; or move the transformation outside of the model."
            )
        return run(frame, args, kwargs)

    return call


def _not_compact(frame: context.Frame, callee: str) -> str:
    return (
        f"The body of {type(frame.owner).__name__} is not compact, so it cannot make a submodule of {callee}: make that "
        "in `setup` (self.inner = ...), or use @nn.compact."
    )


def _no_body(callee: Any) -> str:
    name = getattr(callee, "label", type(callee).__name__)
    if not isinstance(callee, GenerativeFunction):
        return f"inline(...) needs a @gen function or a GenModule; got {callee!r:.80}. Is the decorator @gen missing?"
    if isinstance(callee, GenModule):
        cause = f"{name} is a lifted transformation of a body, which choices leave only as a trace of their own"
    else:
        cause = f"{name} has no body of `trace` statements"
    return (
        f"inline({name}) needs a @gen function or a GenModule, and {cause}. Call it at an address, "
        f'trace("part", {name})(*args), and move its choices up with the combinator: Inline(caller, "part").'
    )


def _name_of_inlined(frame: context.Frame, callee: Any) -> str | None:
    """The name of a free callee as a submodule; None for one that Flax names itself, by its class."""
    title = getattr(getattr(callee, "source", None), "__name__", "")
    if not title.isidentifier():
        return None
    frame.inlined[title] += 1
    return f"{title}_{frame.inlined[title] - 1}"


def _check_address(address: Any) -> handlers.Path:
    path = address if isinstance(address, tuple) else (address,)
    if not path or not all(isinstance(part, str) and part and "/" not in part for part in path):
        raise InvalidAddressError(
            f'The address of a choice is a string without "/", or a tuple of such strings; got {address!r}. In a Python '
            'loop write f"z{i}"; for a vector of choices use `Map`.'
        )
    return path


def _not_callable(path: handlers.Path, callee: Any) -> str:
    if isinstance(callee, type) and issubclass(callee, GenerativeFunction):
        cure = f"This is the class {callee.__name__}: make an instance of it."
    elif isinstance(callee, nn.Module):
        cure = "A plain Flax module has no choices: call it directly."
    elif callable(callee):
        cure = "Is the decorator @gen missing?"
    else:
        cure = 'Write trace("z", Normal)(loc, scale), not trace("z", Normal(loc, scale)).'
    return f"trace({show_address(path)}, ...) needs a generative function, got {callee!r:.80}. {cure}"


def _attach(name: str | None, callee: Any) -> Any:
    """The callee as part of the current module, of this name if it is free."""
    if not callee.needs_variables or callee.scope is not None:
        return callee
    try:
        return callee.copy(name=name)
    except flax_errors.AssignSubModuleError:
        # The body is neither compact nor setup: the callee runs unbound, which is enough if it has no parameters.
        return callee


def _as_body(function: Callable[..., Any]) -> Callable[..., Any]:
    """A class's ``__call__`` as a body: run under a handler where one is set for this module, else a forward sample."""

    @functools.wraps(function)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[-1], handlers.Handler):
            handler = args[-1]
            handler.begin()
            with context.running(self, handler):
                retval = function(self, *args[:-1], **kwargs)
                return canonical(retval), handler.outcome()
        frame = context.top_frame()
        if frame is not None and frame.owner is self and frame.visiting is None:
            return function(self, *args, **kwargs)
        handler = handlers.Simulate(self._choice_key())
        handler.begin()
        with context.running(self, handler):
            return function(self, *args, **kwargs)

    setattr(__call__, "is_body", True)  # noqa: B010
    return __call__


class GenModule(GenerativeFunction):
    """A generative function as a class: subclass it and write ``__call__`` with `trace` in it, as any Flax module.

    >>> import flax.linen as nn, gjflax, jax, jax.numpy as jnp
    >>> class Decoder(gjflax.GenModule):
    ...     hidden: int = 8
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         z = gjflax.trace("z", gjflax.Normal)(jnp.zeros(2), 1.0)
    ...         h = nn.tanh(nn.Dense(self.hidden)(jnp.concatenate([z, x])))
    ...         return gjflax.trace("y", gjflax.Normal)(nn.Dense(3)(h), 0.5)
    >>> x = jnp.ones(4)
    >>> variables = Decoder().init(jax.random.key(0), x)
    >>> key, tr = Decoder().bind(variables).simulate(jax.random.key(1), (x,))
    >>> tr["y"].shape
    (3,)
    """

    trace_type = BuiltinTrace

    body_is_lifted = False
    """Whether the class was made by a lifted transformation of another, such as ``nn.remat(Model)``."""

    body_is_mapped_by: ClassVar[str | None] = None
    """The lifted transformation that runs the body many times, where there is one: ``nn.vmap(Model)``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        call = cls.__dict__.get("__call__")
        if call is not None:
            cls.body_is_lifted = hasattr(call, "is_body") and is_lifted(call)
            cls.body_is_mapped_by = mapping_of(call) if cls.body_is_lifted else None
            if not cls.body_is_lifted:
                cls.__call__ = _as_body(call)  # pyright: ignore[reportAttributeAccessIssue]
        super().__init_subclass__(**kwargs)

    def simulate(self, key: PRNGKey, args: Arguments) -> tuple[PRNGKey, BuiltinTrace]:
        retval, (key, traces) = handlers.run_body(self, handlers.Simulate(key), args)
        return key, BuiltinTrace(self.as_unbound(), canonical(args), retval, _by_name(traces))

    def importance(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Score, BuiltinTrace]]:
        retval, (key, weight, traces) = handlers.run_body(self, handlers.Importance(key, choices, strict), args)
        return key, (weight, BuiltinTrace(self.as_unbound(), canonical(args), retval, _by_name(traces)))

    def assess(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Any, Score]]:
        retval, (key, score) = handlers.run_body(self, handlers.Assess(key, choices, strict), args)
        return key, (plain(retval), score)

    def update(
        self,
        key: PRNGKey,
        trace: Any,
        choices: ChoiceMap,
        argdiffs: Arguments,
        *,
        param_diff: Any = unknown_change,
        strict: bool = True,
    ) -> tuple[PRNGKey, tuple[Any, Score, BuiltinTrace, ChoiceMap]]:
        parts, retdiff, (key, weight, traces, discard) = incremental.run_incrementally(
            self,
            functools.partial(incremental.Update, key, choices=choices, strict=strict),
            trace,
            argdiffs,
            param_diff,
        )
        new = BuiltinTrace(self.as_unbound(), parts.args, parts.retval, _by_name(traces))
        in_place.remember(new, trace, args=parts.argdiffs, retval=parts.retdiffs)
        return key, (retdiff, weight, new, discard)

    def regenerate(
        self,
        key: PRNGKey,
        trace: Any,
        selection: Selection,
        argdiffs: Arguments,
        *,
        param_diff: Any = unknown_change,
    ) -> tuple[PRNGKey, tuple[Any, Score, BuiltinTrace]]:
        parts, retdiff, (key, weight, traces) = incremental.run_incrementally(
            self, functools.partial(incremental.Regenerate, key, selection=selection), trace, argdiffs, param_diff
        )
        new = BuiltinTrace(self.as_unbound(), parts.args, parts.retval, _by_name(traces))
        in_place.remember(new, trace, args=parts.argdiffs, retval=parts.retdiffs)
        return key, (retdiff, weight, new)

    def constrain(
        self, unconstrained: ChoiceMap, args: Arguments, *, fixed: ChoiceMap | None = None
    ) -> tuple[ChoiceMap, Score]:
        handler = handlers.Constrain(jax.random.key(0), unconstrained, EmptyChoiceMap() if fixed is None else fixed)
        _, outcome = handlers.run_body(self, handler, args)
        return outcome

    @nn.nowrap
    def variables_of(self, trace: Any) -> Mapping[str, Any]:
        # A free callee has its address as its name. One with another name is asked for by Flax, and is not found.
        parts = {path: part.get_gen_fn().variables_of(part) for path, part in trace.by_path.items()}
        params = {"_".join(path): known["params"] for path, known in parts.items() if known.get("params")}
        return {"params": params} if params else {}

    @nn.nowrap
    def positional(self, args: Arguments, kwargs: Mapping[str, Any]) -> tuple[Any, Arguments]:
        if not kwargs:
            return self, args
        try:
            bound = self._signature().bind(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError(f"`{self._title()}`: {error}.") from error
        # An argument by keyword may stand behind one that is left out.
        bound.apply_defaults()
        named = [name for name in bound.kwargs if name in kwargs]
        if named:
            raise ArgumentError(
                f"`{self._title()}` has the keyword-only arguments {', '.join(named)}, which a trace cannot hold: "
                "the arguments of a generative function are a tuple. Make them positional."
            )
        return self, bound.args

    @nn.nowrap
    def argument_names(self) -> tuple[str, ...]:
        parameters = self._signature().parameters.values()
        return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))

    @nn.nowrap
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.__call__)

    @nn.nowrap
    def _title(self) -> str:
        return type(self).__name__


class BuiltinGenerativeFunction(GenModule):
    """A function with `trace` in it as a generative function. Made by `gen`.

    Attributes:
      source: the function. It runs as a compact method, so it may make Flax modules inline.
    """

    source: Callable[..., Any]

    @nn.compact
    def __call__(self, *args: Any) -> Any:
        return self.source(*args)

    @nn.nowrap
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.source)

    @nn.nowrap
    def _title(self) -> str:
        return getattr(self.source, "__name__", type(self).__name__)


def gen(target: Any = None, /, **options: Any) -> Any:
    """Make a generative function of a function: ``@gen``, or ``@gen(combinator, **options)``.

    Args:
      target: the function; or a combinator (a class of generative functions whose first field is the inner one).
      **options: the combinator's other fields.

    Returns:
      A `BuiltinGenerativeFunction`; with a combinator, a decorator that wraps it in one.

    Raises:
      CalleeError: if it is neither.

    >>> import gjflax, jax, jax.numpy as jnp
    >>> @gjflax.gen(gjflax.Map, in_axes=(0,))
    ... def noisy(x):
    ...     return gjflax.trace("y", gjflax.Normal)(x, 1.0)
    >>> key, tr = noisy.simulate(jax.random.key(0), (jnp.arange(3.0),))
    >>> tr["y"].shape
    (3,)
    """
    if isinstance(target, type) and issubclass(target, (GenModule, Distribution)):
        raise CalleeError(
            f"`{target.__name__}` is a class of generative functions already: leave @gen away, and make an instance of it."
        )
    if isinstance(target, type) and issubclass(target, GenerativeFunction):
        combinator: Any = target
        return lambda function: combinator(gen(function), parent=None, **options)
    if isinstance(target, GenerativeFunction) and not options:
        return target
    if not callable(target) or isinstance(target, type) or options:
        raise CalleeError(f"`gen` decorates a function, or takes a combinator class first; got {target!r:.80}.")
    if inspect.isfunction(target) and next(iter(inspect.signature(target).parameters), None) == "self":
        raise CalleeError(
            f"`gen` decorates a function, and {getattr(target, '__qualname__', target)} is a method: it would not be given "
            "its `self`. Subclass `GenModule`, whose `__call__` may use `trace`."
        )
    return BuiltinGenerativeFunction(target, parent=None)

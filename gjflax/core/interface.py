"""What happens at the door of every interface method, so that no implementation has to do it.

A method of the interface is entered with a legacy or a typed key, a nested dict or a choice map, bound or unbound.
`interface_method` brings these into one form, calls the implementation, and gives the key back in its own kind.
`GenerativeFunction` applies it to every interface method that a subclass defines.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flax import errors as flax_errors
from jax.core import Tracer

from gjflax.core.choice_map import choice_map
from gjflax.core.context import current_address
from gjflax.core.diff import Change
from gjflax.core.errors import ArgumentError, UnboundParametersError, show_address
from gjflax.core.keys import is_typed_key, like_key, typed_key
from gjflax.core.selection import Selection, select
from gjflax.core.trace import Trace


def _arguments(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise ArgumentError(
            f"`{name}` is a tuple with one entry for each argument, such as (x,) or (); got {type(value).__name__}."
        )
    return value


def _trace(name: str, value: Any) -> Trace:
    if not isinstance(value, Trace):
        raise ArgumentError(f"`{name}` is a trace, as `simulate` or `importance` return; got {type(value).__name__}.")
    return value


def _selection(name: str, value: Any) -> Selection:
    return value if isinstance(value, Selection) else select(value)


def _choices(name: str, value: Any) -> Any:
    return choice_map(value)


def _change(name: str, value: Any) -> Change:
    if not isinstance(value, Change):
        raise ArgumentError(f"`{name}` is Diff.no_change or Diff.unknown_change; got {value!r}.")
    return value


def _as_is(name: str, value: Any) -> Any:
    return value


def _untraced(name: str, value: Any) -> str:
    if value not in ("refuse", "allow"):
        raise ArgumentError(f'`{name}` is "refuse" or "allow"; got {value!r}.')
    return value


_FORMS: Mapping[str, Callable[[str, Any], Any]] = {
    "args": _arguments,
    "argdiffs": _arguments,
    "trace": _trace,
    "choices": _choices,
    "fixed": _choices,
    "unconstrained": _choices,
    "selection": _selection,
    "param_diff": _change,
    "untraced": _untraced,
}

PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "simulate": ("key", "args"),
    "importance": ("key", "choices", "args"),
    "assess": ("key", "choices", "args"),
    "update": ("key", "trace", "choices", "argdiffs"),
    "regenerate": ("key", "trace", "selection", "argdiffs"),
    "propose": ("key", "args"),
    "project": ("key", "trace", "selection"),
    "unzip": ("key", "fixed"),
    "choice_grad": ("key", "trace", "selection"),
    "arg_grad": ("key", "trace", "argnums"),
    "param_grad": ("key", "trace", "params"),
    "score_params": ("key", "trace", "params"),
    "constrain": ("unconstrained", "args"),
    "unconstrain": ("trace", "selection"),
}
"""The positional parameters of the interface's methods."""

RUNS_BODY = ("simulate", "importance", "assess", "update", "regenerate", "propose", "constrain")
"""The methods that run a generative function's body, so need its variables."""


def interface_method(function: Callable[..., Any], like: str | None = None) -> Callable[..., Any]:
    """The method with its arguments brought into form, entered unbound where it was called so.

    Args:
      function: the method.
      like: the method of the interface whose arguments it takes, by default the one of its name.
    """
    name = getattr(function, "__name__", "")
    if hasattr(function, "compact"):
        raise TypeError(
            f"`{name}` is a method of the generative function interface, which may be called unbound, so it cannot be "
            "@nn.compact. Make its submodules in `setup`, or in a compact method that it calls."
        )
    parameters = PARAMETERS[like or name]
    has_key = parameters[0] == "key"
    runs_body = (like or name) in RUNS_BODY
    declared = zip(parameters, list(inspect.signature(function).parameters.values())[1:], strict=False)
    defaults = {name: parameter.default for name, parameter in declared if parameter.default is not parameter.empty}

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        positioned = dict(zip(parameters, args, strict=False))
        given = {**defaults, **positioned, **kwargs}
        missing = any(parameter not in given for parameter in parameters)
        if missing or len(args) > len(parameters) or not positioned.keys().isdisjoint(kwargs):
            form = f"({', '.join(parameters)})" + (" with one tuple `args`" if "args" in parameters else "")
            raise ArgumentError(
                f"`{getattr(self, 'label', type(self).__name__)}.{name}` takes {form}; "
                f"got {len(args)} positional arguments{_listed(kwargs)}."
            )
        values = {key: _FORMS.get(key, _as_is)(key, value) for key, value in given.items()}
        if "trace" in values and not isinstance(values["trace"], self.trace_type):
            made_by = values["trace"].get_gen_fn()
            raise ArgumentError(
                f"`{getattr(self, 'label', type(self).__name__)}.{name}` at {show_address(current_address())} takes a "
                f"{self.trace_type.__name__}; got a {type(values['trace']).__name__}, which "
                f"{getattr(made_by, 'label', type(made_by).__name__)} made. A trace goes to the generative function that "
                "made it, and a body has callees of one kind at one address."
            )
        if has_key:
            values["key"] = typed_key(given["key"])
        positional = [values.pop(parameter) for parameter in parameters]
        if runs_body and self.needs_variables and self.scope is None:
            result = _enter_unbound(self, name, given, positional, values)
        else:
            result = function(self, *positional, **values)
        if has_key and not is_typed_key(given["key"]):
            result = (like_key(result[0], given["key"]), *result[1:])
        return result

    return method


def _listed(kwargs: Mapping[str, Any]) -> str:
    return f" and {', '.join(kwargs)}" if kwargs else ""


def _enter_unbound(
    module: Any, name: str, given: Mapping[str, Any], positional: list[Any], values: dict[str, Any]
) -> Any:
    """Run the method again with an empty set of variables, or those that the trace itself knows."""
    variables = module.variables_of(given["trace"]) if "trace" in given else {}
    try:
        return module.apply(variables, *positional, method=name, **values)
    except (flax_errors.ScopeParamNotFoundError, flax_errors.ScopeCollectionNotFound) as error:
        described = getattr(module, "source", None) or type(module)
        raise UnboundParametersError(
            f"`{getattr(described, '__name__', described)}` has parameters (or other variables) and was called "
            f"without them: use `model.bind(variables).{name}(...)` or "
            f'`model.apply(variables, ..., method="{name}")`, with `variables = model.init(key, *args)`.'
        ) from error


def is_tracer(value: Any) -> bool:
    """Whether the value is not known while tracing."""
    return isinstance(value, Tracer)

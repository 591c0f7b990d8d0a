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

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors as flax_errors
from jax.core import Tracer

from gjflax.core.choice_map import choice_map
from gjflax.core.context import current_address, estimates, is_outermost, top_frame
from gjflax.core.diff import Change, Diff, no_change, unknown_change
from gjflax.core.errors import ArgumentError, UnboundParametersError, show_address
from gjflax.core.keys import after, is_typed_key, like_key, typed_key
from gjflax.core.selection import Selection, select
from gjflax.core.trace import Trace, require_named


def _arguments(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise ArgumentError(
            f"`{name}` is a tuple with one entry for each argument, such as (x,) or (); got {type(value).__name__}."
        )
    return value


def _argdiffs(name: str, value: Any) -> tuple[Any, ...]:
    arguments = _arguments(name, value)
    for argument in arguments:
        if isinstance(argument, Change):
            raise ArgumentError(
                f"An entry of `{name}` is Diff.{argument!r} itself: it marks a value, Diff.{argument!r}(value)."
            )
    return arguments


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
    "argdiffs": _argdiffs,
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


TAKES_ONE_TRACE = ("update", "regenerate", "choice_grad", "arg_grad", "param_grad", "score_params")
"""The methods that take a single trace, not a batch of traces."""


CHANGES = ("update", "regenerate")
"""The methods that change a trace."""


SELECTS = ("regenerate", "project")
"""The methods that take a selection which may select nothing."""


def _check_named(values: Mapping[str, Any], result: Any) -> None:
    """An error where a user's selection names what is certainly no choice.

    A number of Python, or what is no number at all, may decide which choices a body has; then an address may be one of
    other arguments. A trace stores such a number as a scalar of integers or booleans.
    """
    trace = values["trace"]
    args = trace.get_args() if "argdiffs" not in values else Diff.primal(values["argdiffs"])
    traces = [trace] if "argdiffs" not in values else [trace, result[1][2]]
    stored = "argdiffs" not in values
    if not any(_may_be_structure(leaf, stored) for leaf in jax.tree.leaves(args)):
        require_named(values["selection"], traces)


def _may_be_structure(leaf: Any, stored: bool) -> bool:
    if isinstance(leaf, (float, complex)):
        return False
    if isinstance(leaf, int) or not hasattr(leaf, "dtype"):
        return True
    is_number = jnp.issubdtype(leaf.dtype, jnp.inexact) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    return stored and leaf.ndim == 0 and not is_number


def _has_no_variables(module: Any) -> bool:
    """Whether there are no variables at all that a bound module may read, so that none can have changed.

    Inside a lifted transformation each scope that was lifted is a root of its own, and a combinator that was made inline
    has a scope without variables: those of what it combines stand beside it. So every scope counts that Flax would lift.
    """
    scope = module.scope
    if scope.is_mutable_collection("params") or _holds_variables(scope.root):
        return False
    roots = {id(part.root): part.root for part in nn.transforms.get_module_scopes(module)[0]}
    return not any(map(_holds_variables, roots.values()))


def _holds_variables(root: Any) -> bool:
    return bool(jax.tree.leaves(dict(root.variables())))


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
    runs_body, changes = (like or name) in RUNS_BODY, (like or name) in CHANGES
    selects = (like or name) in SELECTS
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
                f"`{_called(self)}.{name}` takes {form}; got {len(args)} positional arguments{_listed(kwargs)}."
            )
        values = {key: _FORMS.get(key, _as_is)(key, value) for key, value in given.items()}
        if "trace" in values and not isinstance(values["trace"], self.trace_type):
            made_by = values["trace"].get_gen_fn()
            raise ArgumentError(
                f"`{_called(self)}.{name}` at {show_address(current_address())} takes a {self.trace_type.__name__}; got a "
                f"{type(values['trace']).__name__}, which {_called(made_by)} made. A trace goes to the generative function "
                "that made it, and a body has callees of one kind at one address."
            )
        if name in TAKES_ONE_TRACE and top_frame() is None and values["trace"].batch_shape:
            raise ArgumentError(
                f"`{_called(self)}.{name}` takes one trace; got a batch of traces of shape {values['trace'].batch_shape}. "
                f"Map it over the batch: `jax.vmap(lambda key, tr: model.{name}(key, tr, ...))(keys, traces)`."
            )
        if has_key:
            values["key"] = typed_key(given["key"])
        if changes and self.scope is not None and values.get("param_diff", unknown_change) is unknown_change:
            if _has_no_variables(self):
                values["param_diff"] = no_change
        entered = dict(values) if selects and is_outermost() else None
        positional = [values.pop(parameter) for parameter in parameters]
        if runs_body and self.needs_variables and self.scope is None:
            result = _enter_unbound(self, name, given, positional, values)
        else:
            with estimates() as noted:
                result = function(self, *positional, **values)
            if noted and has_key and result[0] is positional[0]:
                # A density that was estimated has used the key, though what stands around the estimate did not see it.
                result = (after(result[0]), *result[1:])
        if entered is not None:
            _check_named(entered, result)
        if has_key and not is_typed_key(given["key"]):
            result = (like_key(result[0], given["key"]), *result[1:])
        return result

    return method


def _called(module: Any) -> str:
    """How messages name a generative function: a distribution's label, a function's name, else the class."""
    source = getattr(module, "source", None)
    return getattr(module, "label", None) or getattr(source, "__name__", type(module).__name__)


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
        raise UnboundParametersError(
            f"`{_called(module)}` has parameters (or other variables) and was called "
            f"without them: use `model.bind(variables).{name}(...)` or "
            f'`model.apply(variables, ..., method="{name}")`, with `variables = model.init(key, *args)`.'
        ) from error


def is_tracer(value: Any) -> bool:
    """Whether the value is not known while tracing."""
    return isinstance(value, Tracer)

"""A module run with other values in the place of some of its parameters, which are named by their paths.

A module that is made in a compact method and handed to another one (``nn.Sequential([nn.Dense(3)])``) is, for Flax, part
of the module that made it, and its parameters stand there. Here the paths are those of the module alone, as its own
`init` gives them, wherever it is: so what is said of a network by path holds in every place where it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from gjflax.core.choice_map import VectorChoiceMap
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.typing import Arguments
from gjflax.language.gen import GenModule

Path = tuple[str, ...]

# Shapes ----------------------------------------------------------------------------------------------------------------

_CACHE_SIZE = 256
_found: dict[Any, Parameters] = {}


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What is known of a generative function before it runs.

    Attributes:
      templates: shape and dtype of its parameters, by path.
      beside_vector: whether its choices are a vector, as those of a map are.
    """

    templates: dict[Path, Any]
    beside_vector: bool


def parameters_of(module: Any, args: Arguments) -> Parameters:
    """The parameters that ``module.init`` makes, for a generative function that is not bound.

    Finding them costs as much as tracing it, so they are kept.
    """
    leaves, structure = jax.tree.flatten(args)
    precision = jax.dtypes.canonicalize_dtype(np.float64)
    try:
        call = (module, structure, tuple(map(_kind, leaves)), precision)
        found = _found.get(call)
    except TypeError:
        # What does not hash, such as a module with an array as a field.
        return _find(module, args)
    if found is None:
        found = _find(module, args)
        _found[call] = found
        while len(_found) > _CACHE_SIZE:
            _found.pop(next(iter(_found)), None)
    return found


def _kind(leaf: Any) -> Any:
    """What the shapes of parameters may depend on."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return tuple(leaf.shape), str(leaf.dtype)
    return float if isinstance(leaf, float) else (type(leaf), leaf)


def _find(module: Any, args: Arguments) -> Parameters:
    def run(key: Any) -> Any:
        # The arguments are closed over, so that flags among them stay flags.
        (_, trace), variables = module.init_with_output(key, key, args, method="simulate")
        return trace.strip(), variables.get("params", {})

    choices, params = jax.eval_shape(run, jax.random.key(0))
    return Parameters(dict(_by_path(nn.meta.unbox(params), ())), isinstance(choices, VectorChoiceMap))


def _by_path(tree: Any, prefix: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(tree, Mapping):
        for name, child in tree.items():
            yield from _by_path(child, (*prefix, name))
    else:
        yield prefix, tree


# Values ----------------------------------------------------------------------------------------------------------------


def with_parameters(module: Any, values: Mapping[Path, Any], function: Callable[..., Any], *args: Any) -> Any:
    """``function(module, *args)``, where the bound module has these values as parameters.

    What the function writes to other variables is kept, and so are parameters that it makes; the values are not.
    """
    if not values:
        return function(module, *args)
    scopes = _outermost_scopes(module)
    by_scope: list[dict[Path, Any]] = [{} for _ in scopes]
    by_path = _scopes_by_path(module)
    for path, value in values.items():
        position, below = _location(path, by_path, scopes)
        by_scope[position][below] = value
    put, take_away = _replacing(by_scope)
    lift: Any = nn.map_variables
    return lift(function, "params", trans_in_fn=put, trans_out_fn=take_away, mutable=True)(module, *args)


def settle(module: Any) -> None:
    """Let combinators take the scope of what they combine, from the innermost on."""
    if isinstance(module, GenerativeFunction) and not isinstance(module, GenModule):
        module._try_setup(shallow=True)
        settle(getattr(module, "inner", None))
        module._try_setup()


def _scopes(module: Any) -> list[Any]:
    """The scopes of a bound module and of those that it holds, in an order that is that of their fields."""
    settle(module)
    return nn.transforms.get_module_scopes(module)[0]


def _scopes_by_path(module: Any) -> list[tuple[Path, Any]]:
    """The scopes of a module, each with the path that it has in the module alone."""
    alone = [scope.path for scope in _scopes(module.as_unbound().bind({}))]
    return list(zip(alone, _scopes(module), strict=True))


def _outermost_scopes(module: Any) -> list[Any]:
    """Those scopes of a module that are below no other one, in the order in which Flax lifts them."""
    scopes = dict.fromkeys(_scopes(module))
    return [scope for scope in scopes if not any(above in scopes for above in _above(scope))]


def _above(scope: Any) -> Iterator[Any]:
    while scope.parent is not None:
        scope = scope.parent
        yield scope


def _location(path: Path, scopes_by_path: list[tuple[Path, Any]], scopes: list[Any]) -> tuple[int, Path]:
    """Where a parameter stands: which of the scopes, and the path below it."""
    leading = [(prefix, scope) for prefix, scope in scopes_by_path if path[: len(prefix)] == prefix]
    prefix, scope = max(leading, key=lambda pair: len(pair[0]))
    names: Path = ()
    while scope not in scopes:
        names, scope = (scope.name, *names), scope.parent
    return scopes.index(scope), (*names, *path[len(prefix) :])


def _replacing(by_scope: list[dict[Path, Any]]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Functions that put values in the place of parameters, and take them away again; called once for each scope."""
    values_of, originals_of = iter(by_scope), []

    def put(collections: Any) -> Any:
        values, params = next(values_of), collections.get("params", {})
        originals_of.append({path: _get(params, path) for path in values})
        for path, value in values.items():
            params = _with(params, path, value)
        return {**collections, "params": params} if params else collections

    def take_away(collections: Any) -> Any:
        # What is written back, in `init` above all, are the parameters that are no choices.
        originals, params = originals_of.pop(0), collections.get("params")
        if params is None:
            return collections
        for path, original in originals.items():
            params = _with(params, path, original)
        others = {name: collection for name, collection in collections.items() if name != "params"}
        return {**others, "params": params} if params else others

    return put, take_away


def _get(tree: Any, path: Path) -> Any:
    """What stands at a path, None where nothing does."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def _with(tree: Any, path: Path, value: Any) -> Any:
    """The tree with a value at a path, or without what stands there where the value is None."""
    if not path:
        return value
    children = dict(tree) if isinstance(tree, Mapping) else {}
    child = _with(children.get(path[0], {}), path[1:], value)
    if child is None or (value is None and child == {}):
        children.pop(path[0], None)
    else:
        children[path[0]] = child
    return children

"""Trees for people: every `Pytree`, linen module and nested dict as a rich tree, arrays as ``f32[3,4]``."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from gjflax.core.pytree import Const, Pytree


def short_dtype(dtype: Any) -> str:
    """The short name of a dtype.

    >>> short_dtype(np.dtype("float32")), short_dtype(np.dtype("bool"))
    ('f32', 'bool')
    """
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return "key"
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return "bool"
    name = dtype.name
    if name.startswith(("float", "int", "uint", "complex", "bfloat")):
        head = "bf" if name.startswith("bfloat") else name[0]
        return head + name.lstrip("abcdefghijklmnopqrstuvwxyz")
    return name


def short_array(value: Any) -> str:
    """An array by dtype and shape: ``f32[100]``."""
    return f"{short_dtype(value.dtype)}[{','.join(map(str, value.shape))}]"


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """What stands below a node, named."""
    named = getattr(value, "_tree_children", None)
    if hasattr(value, "label"):
        return  # a distribution is its name
    if named is not None and not isinstance(value, type):
        yield from named()
    elif isinstance(value, nn.Module):
        for field in dataclasses.fields(value):
            if field.name not in ("parent", "name") and field.init and getattr(value, field.name) is not None:
                yield field.name, getattr(value, field.name)
    elif isinstance(value, Pytree):
        for field in dataclasses.fields(value):  # pyright: ignore[reportArgumentType]
            yield field.name, getattr(value, field.name)
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield str(key), child
    elif isinstance(value, (tuple, list)):
        for index, child in enumerate(value):
            yield str(index), child


def _is_node(value: Any) -> bool:
    if isinstance(value, Const):
        return False
    if hasattr(type(value), "_tree_children"):
        return True
    return isinstance(value, (Pytree, nn.Module, Mapping)) or (isinstance(value, (tuple, list)) and len(value) > 0)


def _label(value: Any) -> str:
    if isinstance(value, Const):
        return _label(value.value)
    if isinstance(value, (Pytree, nn.Module)):
        return str(getattr(value, "label", type(value).__name__))
    if isinstance(value, range):
        return f"i32[{len(value)}]"
    if _is_array(value):
        return short_array(value)
    if isinstance(value, type) or callable(value):
        return f"<{getattr(value, '__qualname__', getattr(value, '__name__', repr(value)))}>"
    return repr(value)


def _grow(tree: Tree, name: str, value: Any) -> None:
    if not _is_node(value):
        tree.add(Text(f"{name}: {_label(value)}"))
        return
    if isinstance(value, (Pytree, nn.Module)):
        branch = tree.add(Text(f"{name}: {_label(value)}"))
    else:
        branch = tree.add(Text(name))
    for child_name, child in _children(value):
        _grow(branch, child_name, child)


def rich_tree(value: Any) -> Tree:
    """The rich tree of a value, as `pretty`'s console prints it."""
    tree = Tree(Text(_label(value) if isinstance(value, (Pytree, nn.Module)) else type(value).__name__))
    for name, child in _children(value):
        _grow(tree, name, child)
    return tree


def render_text(value: Any, width: int = 100) -> str:
    """The tree of a value as plain text, without a trailing line break."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(rich_tree(value))
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n"))


def pretty(width: int | None = None, **kwargs: Any) -> Console:
    """A rich console that prints gjflax's values as trees.

    Args:
      width: characters per line; the terminal's own by default.
      **kwargs: further arguments of ``rich.console.Console``.

    >>> import gjflax
    >>> gjflax.pretty(width=60).print(gjflax.select(["a"]))
    BuiltinSelection
    └── a: AllSelection
    """
    return Console(width=width, **kwargs)

"""`Pytree`: a base class whose subclasses are JAX pytrees, flax-serialisable and printed as trees.

A subclass is a dataclass. Either its fields say what is static (`static_field`), or a method ``flatten`` returns
the dynamic and the static parts::

    @dataclasses.dataclass
    class Move(gjflax.Pytree):
        selection: gjflax.Selection
        step: float

        def flatten(self):
            return (self.step,), (self.selection,)
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import serialization
from flax.serialization import to_state_dict
from jax.tree_util import GetAttrKey

from gjflax.core.errors import ArgumentError

P = TypeVar("P", bound="Pytree")

STATIC = {"static": True}
"""The metadata of a dataclass field that is structure, as `static_field` sets it."""


def static_field(**kwargs: Any) -> Any:
    """A dataclass field that is part of the pytree's structure, not one of its leaves. It must hash.

    >>> @dataclasses.dataclass
    ... class Scaled(Pytree):
    ...     value: float
    ...     unit: str = static_field(default="m")
    >>> jax.tree.map(lambda v: 2 * v, Scaled(1.5, "kg"))
    Scaled(value=3.0, unit='kg')
    """
    metadata = {**kwargs.pop("metadata", {}), **STATIC}
    return dataclasses.field(metadata=metadata, **kwargs)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Which attributes of a class are leaves and which are structure."""

    dynamic: tuple[str, ...]
    static: tuple[str, ...]


class Pytree:
    """Base class of JAX pytrees with a ``flatten`` method. See the module's text for how to subclass it.

    >>> import jax, dataclasses
    >>> @dataclasses.dataclass
    ... class Move(Pytree):
    ...     name: str
    ...     step: float
    ...     def flatten(self):
    ...         return (self.step,), (self.name,)
    >>> jax.tree.leaves(Move("drift", 0.5))
    [0.5]
    """

    _layout: ClassVar[_Layout | None]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._layout = None
        jax.tree_util.register_pytree_with_keys(cls, cls._flatten_with_keys, cls._unflatten, cls._flatten_plain)
        serialization.register_serialization_state(cls, _to_state, _from_state)

    def flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The dynamic parts (pytrees of arrays) and the static parts (hashable), in that order.

        By default the dataclass's fields, in order; those made by `static_field` are static.
        """
        layout = self._field_layout()
        dynamic = tuple(getattr(self, name) for name in layout.dynamic)
        return dynamic, tuple(getattr(self, name) for name in layout.static)

    def replace(self: P, **changes: Any) -> P:
        """A copy with other values for the named fields."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]

    def __repr__(self) -> str:
        from gjflax.core.printing import render_text

        return render_text(self)

    def __rich__(self) -> Any:
        from gjflax.core.printing import rich_tree

        return rich_tree(self)

    @classmethod
    def _field_layout(cls) -> _Layout:
        fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        static = tuple(f.name for f in fields if f.metadata.get("static", False))
        return _Layout(tuple(f.name for f in fields if f.name not in static), static)

    @classmethod
    def _get_layout(cls) -> _Layout | None:
        """The names behind what ``flatten`` returns; None where it returns something that is not a field."""
        if cls._layout is None:
            if cls.flatten is Pytree.flatten:
                cls._layout = cls._field_layout()
            else:
                cls._layout = cls._probe_layout() or _Layout((), ())
        return cls._layout if cls._layout != _Layout((), ()) else None

    @classmethod
    def _probe_layout(cls) -> _Layout | None:
        """Find the fields that a user's ``flatten`` returns, by running it on an instance made of markers."""
        names = {f.name: object() for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
        probe = object.__new__(cls)
        for name, marker in names.items():
            object.__setattr__(probe, name, marker)
        by_marker = {id(marker): name for name, marker in names.items()}
        try:
            dynamic, static = probe.flatten()
            return _Layout(
                tuple(by_marker[id(marker)] for marker in dynamic),
                tuple(by_marker[id(marker)] for marker in static),
            )
        except Exception:  # flatten may compute with its fields, which a marker does not allow
            return None

    def _flatten_plain(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return self.flatten()

    def _flatten_with_keys(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        dynamic, static = self.flatten()
        return tuple(zip(map(GetAttrKey, _names(self, dynamic)), dynamic, strict=True)), static

    @classmethod
    def _unflatten(cls, static: tuple[Any, ...], dynamic: Any) -> Any:
        layout = cls._get_layout()
        if layout is None:
            return cls(*static, *dynamic)
        # Not the constructor: JAX unflattens with objects that are not arrays, which a constructor may refuse.
        self = object.__new__(cls)
        for name, value in zip(layout.dynamic, dynamic, strict=True):
            object.__setattr__(self, name, value)
        for name, value in zip(layout.static, static, strict=True):
            object.__setattr__(self, name, value)
        return self


def _names(tree: Pytree, dynamic: tuple[Any, ...]) -> tuple[str, ...]:
    layout = tree._get_layout()
    return layout.dynamic if layout else tuple(str(i) for i in range(len(dynamic)))


def _to_state(tree: Pytree) -> dict[str, Any]:
    dynamic, _ = tree.flatten()
    return {name: _state(value) for name, value in zip(_names(tree, dynamic), dynamic, strict=True)}


def _state(value: Any) -> Any:
    """What Flax saves of a part. Of a random key it is the data: Flax has no form for keys."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, to_state_dict(value))


def _from_state(target: Pytree, state: dict[str, Any]) -> Pytree:
    dynamic, static = target.flatten()
    kind, names = type(target).__name__, _names(target, dynamic)
    if not isinstance(state, dict) or sorted(state) != sorted(names):
        given = ", ".join(sorted(state)) if isinstance(state, dict) else type(state).__name__
        raise ArgumentError(
            f"What was saved does not fit the template: a {kind} has the parts {', '.join(names) or 'none'}, and saved are "
            f"{given or 'none'}. Make the template with the generative function and arguments of the trace that was saved."
        )
    restored = tuple(
        _fitted(value, serialization.from_state_dict(value, state[name], name=name), f"{kind}.{name}")
        for name, value in zip(names, dynamic, strict=True)
    )
    return type(target)._unflatten(static, restored)


def _fitted(target: Any, restored: Any, name: str) -> Any:
    """What was read, with keys as keys.

    Raises:
      ArgumentError: if a part has another shape than the template's.
    """

    def fit(wanted: Any, found: Any) -> Any:
        if _is_key(wanted) and not _is_key(found):
            found = jax.random.wrap_key_data(jnp.asarray(found), impl=_implementation(wanted))
        if jnp.shape(found) != jnp.shape(wanted):
            raise ArgumentError(
                f"What was saved does not fit the template: {name} has the shape {jnp.shape(found)}, and the template's has "
                f"{jnp.shape(wanted)}. Make the template with arguments of the shapes with which the trace was made."
            )
        return found

    return jax.tree.map(fit, target, restored)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _implementation(key: Any) -> Any:
    """The implementation of a random key, of which the shape may be all that is known."""
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found[0]


@dataclasses.dataclass(frozen=True)
class Const(Pytree):
    """A value that is part of a pytree's structure: hashable, compared by ``==``, without leaves.

    >>> jax.tree.leaves(Const(3))
    []
    """

    value: Any = static_field()

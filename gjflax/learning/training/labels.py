"""Labels of parameters, for ``optax.multi_transform``: which optimiser trains which part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from gjflax.core.errors import ArgumentError, ParameterPathError, nearest
from gjflax.core.selection import Selection, select

Path = tuple[str, ...]


def label_parameters(rules: Mapping[str, Any], default: str) -> Callable[[Any], Any]:
    """A function that labels every parameter, as ``optax.multi_transform`` takes it.

    Args:
      rules: for each label, which parameters have it: a `Selection` of their paths, or what `select` takes
        (``"guide"``, ``("model", "Dense_0")``, a list of these), or a predicate of a path, a tuple of names. A
        parameter has the first label whose rule fits it.
      default: the label of all others.

    Returns:
      ``labels(params)``, a pytree of labels with the structure of the parameters.

    Raises:
      ParameterPathError: from the function, if a rule fits no parameter.

    >>> import optax
    >>> params = {"model": {"Dense_0": {"kernel": 1.0, "bias": 0.0}}, "guide": {"loc": 0.0}}
    >>> labels = label_parameters({"held": "model", "slow": lambda path: path[-1] == "loc"}, default="fast")
    >>> labels(params)
    {'guide': {'loc': 'slow'}, 'model': {'Dense_0': {'bias': 'held', 'kernel': 'held'}}}
    >>> tx = optax.multi_transform(
    ...     {"held": optax.set_to_zero(), "slow": optax.adam(1e-3), "fast": optax.adam(1e-2)}, labels
    ... )
    """
    for label in (*rules, default):
        if not isinstance(label, str):
            raise ArgumentError(f"A label of parameters is a string; got {label!r}.")
    fits = {label: _predicate(rule) for label, rule in rules.items()}

    def labels(params: Any) -> Any:
        paths = [_names(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
        for label, fit in fits.items():
            if not any(map(fit, paths)):
                asked = "" if callable(rules[label]) else _asked(rules[label])
                raise ParameterPathError(
                    f"The rule of the label {label!r} fits no parameter. {nearest(asked, [*paths, *_above(paths)])}"
                )

        def label_of(path: Path) -> str:
            return next((label for label, fit in fits.items() if fit(path)), default)

        return jax.tree_util.tree_map_with_path(lambda path, _: label_of(_names(path)), params)

    return labels


def _predicate(rule: Any) -> Callable[[Path], bool]:
    if callable(rule):
        return lambda path: bool(rule(path))
    selection = rule if isinstance(rule, Selection) else select(rule)
    return lambda path: path in selection


def _asked(rule: Any) -> Any:
    """The first address that a rule names."""
    addresses = (rule if isinstance(rule, Selection) else select(rule)).addresses
    return addresses[0] if addresses else ""


def _above(paths: list[Path]) -> list[Path]:
    """The paths of the subtrees that hold parameters."""
    return list(dict.fromkeys(path[:depth] for path in paths for depth in range(1, len(path))))


def _names(path: Any) -> Path:
    """The names on the way to a parameter; what boxes it (metadata of partitioning) has none."""
    return tuple(str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey))

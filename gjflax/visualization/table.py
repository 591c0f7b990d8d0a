"""`tabulate`: the choices and the parameters of a model in one table."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from gjflax.core.keys import typed_key
from gjflax.core.outline import BRANCH
from gjflax.core.printing import short_dtype
from gjflax.distributions.support import describe
from gjflax.language.abstract import AbstractModel, SingleChoice, abstract_model, choices_of

COLUMNS = ("", "address or path", "shape", "dtype", "distribution", "support", "stands in", "count")


@dataclasses.dataclass(frozen=True)
class _Row:
    """A choice, or a variable, whose kind is its collection."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: Any
    distribution: str = ""
    support: str = ""
    around: str = ""
    discrete: bool = False

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        is_key = jnp.issubdtype(self.dtype, jax.dtypes.prng_key)
        return 0 if is_key else self.count * np.dtype(self.dtype).itemsize

    @property
    def cells(self) -> tuple[str, ...]:
        shape = f"[{', '.join(map(str, self.shape))}]" if self.shape else "scalar"
        own = self.distribution, self.support, self.around
        return (self.kind, self.name, shape, short_dtype(self.dtype), *own, _grouped(self.count))


def tabulate(
    model: Any,
    key: Any,
    args: Any = (),
    *,
    variables: Mapping[str, Any] | None = None,
    console_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The choices and the parameters of a model in one table. Nothing is computed.

    Choices in a `Map`, an `Unfold` or a `Scan` are listed with the axes that these give them. Of a `Switch` the choices of
    all branches are listed. It is like ``flax.linen.tabulate``, which lists a model's modules and knows of no choices.

    Args:
      model: a generative function, bound or not.
      key: a random key, of which only the type matters.
      args: its arguments, a tuple of values, or of shapes (``jax.ShapeDtypeStruct``).
      variables: its Flax variables. By default those that it is bound to, or the shapes of those that `init` would make.
      console_kwargs: arguments of ``rich.console.Console``, such as ``width``.

    Returns:
      The table as text, with the totals below it: the numbers in all choices, continuous and discrete, and the number
      and the size of the parameters.

    Raises:
      CalleeError: if the model is not a generative function.
      ArgumentError: if `args` is not a tuple, or does not fit the model, or `key` is no key.
      UnboundParametersError: if `variables` lacks some.

    >>> import flax.linen as nn, gjflax, jax, jax.numpy as jnp
    >>> class Model(gjflax.GenModule):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return gjflax.trace("y", gjflax.Normal)(nn.Dense(3)(x), 1.0)
    >>> print(tabulate(Model(), jax.random.key(0), (jnp.ones(2),)).strip())
    Model
    <BLANKLINE>
              address or path   shape    dtype   distribution   support   stands in   count
     ──────────────────────────────────────────────────────────────────────────────────────
     choice   y                 [3]      f32     Normal         real                      3
    <BLANKLINE>
     params   Dense_0/bias      [3]      f32                                              3
     params   Dense_0/kernel    [2, 3]   f32                                              6
    <BLANKLINE>
    Choices: 1, of 3 continuous and 0 discrete dimensions
    Parameters: 9 (36 B)
    """
    typed_key(key)
    abstract = abstract_model(model, args, variables)
    rows = [*map(_of_choice, choices_of(abstract)), *_of_variables(abstract)]
    table = Table(title=_title(abstract.module), box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if number == len(COLUMNS) - 1 else "left", overflow="fold")
    for number, row in enumerate(rows):
        ends = number + 1 < len(rows) and rows[number + 1].kind != row.kind
        table.add_row(*map(Text, row.cells), end_section=ends)
    out = io.StringIO()
    console = Console(file=out, **{"force_terminal": False, "width": 110, **(console_kwargs or {})})
    console.print(Group(table, *map(Text, _totals(rows))))
    return "\n".join(["", *(line.rstrip() for line in out.getvalue().rstrip().split("\n")), ""])


def _of_choice(choice: SingleChoice) -> _Row:
    around = []
    for group in choice.around:
        if group.kind == BRANCH:
            # The only branch, of a mask, is the switch itself.
            around[-1] += "" if group.title == "inner" else f" {group.title.replace('branches_', 'branch ')}"
        else:
            around.append(group.title if group.length is None else f"{group.title} {group.length}")
    name = "/".join(map(str, choice.address)) or "(the root)"
    support = describe(choice.distribution) or ("discrete" if choice.discrete else "")
    shown = ", ".join(around)
    return _Row("choice", name, choice.shape, choice.dtype, choice.distribution, support, shown, choice.discrete)


def _of_variables(abstract: AbstractModel) -> list[_Row]:
    named = [(path, leaf) for path, leaf in abstract.named_variables()]
    # Parameters first; other collections in the order of their names.
    named.sort(key=lambda pair: (pair[0][0] != "params", pair[0][0]))
    return [_Row(path[0], "/".join(path[1:]), tuple(leaf.shape), leaf.dtype) for path, leaf in named]


def _totals(rows: list[_Row]) -> list[str]:
    lines = []
    choices = [row for row in rows if row.kind == "choice"]
    discrete = sum(row.count for row in choices if row.discrete)
    continuous = sum(row.count for row in choices) - discrete
    lines.append(
        f"Choices: {_grouped(len(choices))}, of {_grouped(continuous)} continuous and {_grouped(discrete)} discrete dimensions"
    )
    for kind in dict.fromkeys(row.kind for row in rows if row.kind != "choice"):
        own = [row for row in rows if row.kind == kind]
        name = "Parameters" if kind == "params" else kind
        lines.append(f"{name}: {_grouped(sum(row.count for row in own))} ({_size(sum(row.bytes for row in own))})")
    return lines


def _title(module: Any) -> str:
    source = getattr(module, "source", None)
    return getattr(module, "label", None) or getattr(source, "__name__", type(module).__name__)


def _grouped(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _size(count: int) -> str:
    power = min(3, max(0, len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.{1 if power else 0}f} {('B', 'KB', 'MB', 'GB')[power]}"

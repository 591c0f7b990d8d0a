"""`Trace`: one run of a generative function, with its choices and their score.

A trace never carries Flax variables: under ``jax.vmap`` they would be copied once per particle. Its generative
function is the unbound module, a static part of the pytree.

Scores are kept part by part and added up when asked for. All methods work on a batch of traces too (as
``jax.vmap(model.simulate)`` gives them), with the batch as leading axes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gjflax.core.choice_map import ChoiceMap
from gjflax.core.errors import ArgumentError, SelectionError, nearest, show_address
from gjflax.core.outline import Part, Site
from gjflax.core.pytree import STATIC, Const, Pytree
from gjflax.core.selection import AllSelection, Selection
from gjflax.core.typing import Address, Arguments, Score


class Trace(Pytree):
    """One run of a generative function. Subclasses say how their parts are stored."""

    def get_gen_fn(self) -> Any:
        """The generative function: an unbound module, equal across runs."""
        raise NotImplementedError

    def get_args(self) -> Arguments:
        """The arguments of the run."""
        raise NotImplementedError

    def get_retval(self) -> Any:
        """What the run returned."""
        raise NotImplementedError

    def get_score(self) -> Score:
        """log p(choices; arguments), the sum over all choices."""
        return self.project(AllSelection())

    def project(self, selection: Selection) -> Score:
        """The selected choices' share of the score; 0 where none is selected."""
        raise NotImplementedError

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The axes of a batch of traces, as ``jax.vmap`` gives it; ``()`` of one trace."""
        return jax.eval_shape(lambda trace: trace.get_score(), self).shape

    def strip(self) -> ChoiceMap:
        """The choices alone."""
        raise NotImplementedError

    def get_choices(self) -> ChoiceMap:
        """The choices alone: `strip` by its usual name."""
        return self.strip()

    def unconstrain(self, selection: Selection) -> tuple[ChoiceMap, Score]:
        """The selected choices mapped to R^n, and the log |det| of that map's Jacobian."""
        raise NotImplementedError

    def leaves(self, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Trace]]:
        """The traces of the single choices, with their addresses."""
        raise NotImplementedError

    def outline(self, prefix: tuple[Any, ...] = ()) -> tuple[Part, ...]:
        """The single choices and what they stand in. By default side by side; a combinator's trace says more."""
        return tuple(Site(address, leaf) for address, leaf in self.leaves(prefix))

    @property
    def is_discrete(self) -> bool:
        """Of the trace of a single choice: whether its value is one of a discrete distribution."""
        return False

    @property
    def is_reparameterized(self) -> bool:
        """Of the trace of a single choice: whether its value, as drawn, is differentiable in the arguments."""
        return False

    @property
    def counts_for_others(self) -> bool:
        """Of a trace that gives no single choices: whether some count more than once, for a batch's population."""
        return False

    @property
    def hides_choices(self) -> bool:
        """Whether its program has choices that are not among those of the trace: they are integrated out."""
        return False

    def get_subtree(self, address: Address) -> Any:
        """The trace, or the choices, below an address."""
        return self.strip().get_subtree(address)

    def has_subtree(self, address: Address) -> bool:
        """Whether there are choices at or below the address."""
        return self.strip().has_subtree(address)

    def __contains__(self, address: Address) -> bool:
        return self.has_subtree(address)

    def __getitem__(self, address: Address) -> Any:
        """The value at an address, or the choices below it.

        Raises:
          MissingChoiceError: if there is neither.
        """
        return self.strip()[address]

    def chosen(self, accepted: Any, old: Trace) -> Trace:
        """This trace where `accepted` is true, else the old one that `update` or `regenerate` made it from.

        See `choose`. By default leaf by leaf; a trace of many elements knows which of them were written.
        """
        return leafwise(accepted, self, old)

    def require_selected(self, selection: Selection) -> ChoiceMap:
        """The selected choices, with an error where there are none.

        Raises:
          SelectionError: if the selection selects nothing of this trace.
        """
        choices = self.strip()
        selected = choices.filter(selection)
        if selected.is_empty():
            raise SelectionError(_selects_nothing(selection, choices.addresses()))
        return selected


def also_of_template(method: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A method of a trace, also where its arrays are shapes alone, as ``jax.eval_shape`` makes them: then the result's are.

    Whatever a method computes with arrays needs it. It is what makes the choices of a template a template of the choices.
    """

    @functools.wraps(method)
    def either(trace: Any) -> Any:
        is_template = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(trace))
        return jax.eval_shape(method, trace) if is_template else method(trace)

    return either


def require_named(selection: Selection, traces: Sequence[Trace]) -> None:
    """An error where a selection names addresses, and nothing is there: most often a misspelling.

    To select nothing is no mistake: of generic code, with ``select()`` or a complement; or with an address that one of the
    traces has, though it is absent at run time, in a branch that is not taken or behind the end of a chain; or with one of a
    choice that is integrated out; or of what has no choices, as a network.

    Args:
      selection: the selection.
      traces: the traces that it was meant for, such as that before a move and that after it.

    Raises:
      SelectionError: if it selects no choice of any trace, and none of the addresses that it names is one of theirs.
    """
    named = selection.addresses
    if not named:
        return
    choices = [trace.strip() for trace in traces]
    known = [address for part in choices for address in part.addresses()]
    if not known:
        return
    # Indices are no names: whether there is such an element is said elsewhere, and may not be known yet.
    names = {_names(address)[:length] for address in known for length in range(len(address) + 1)}
    if any(_names(address) in names for address in named):
        return
    if all(part.filter(selection).is_empty() for part in choices) and not any(map(_hides_choices, traces)):
        raise SelectionError(_selects_nothing(selection, list(dict.fromkeys(known))))


def _hides_choices(trace: Trace) -> bool:
    parts = jax.tree.leaves(trace, is_leaf=lambda part: isinstance(part, Trace) and part.hides_choices)
    return any(isinstance(part, Trace) for part in parts)


def _names(address: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(component for component in address if isinstance(component, str))


def _selects_nothing(selection: Selection, known: Sequence[Any]) -> str:
    wanted = selection.addresses
    asked = ", ".join(show_address(part) for part in wanted) or "nothing"
    return f"The selection ({asked}) selects no choice of this trace. {nearest(wanted[0] if wanted else '', known)}"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CallTrace(Trace):
    """A trace that stores its generative function and its arguments, as `canonical` makes them."""

    gen_fn: Any = dataclasses.field(metadata=STATIC)
    args: Any

    def get_gen_fn(self) -> Any:
        return self.gen_fn

    def get_args(self) -> Arguments:
        return plain(self.args)


class WrappedTrace(Trace):
    """A trace that has another one, `inner`, and hands on what that says; a subclass says what differs."""

    inner: Trace

    def get_args(self) -> Arguments:
        return self.inner.get_args()

    def get_retval(self) -> Any:
        return self.inner.get_retval()

    def get_score(self) -> Score:
        return self.inner.get_score()

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.inner.batch_shape

    def project(self, selection: Selection) -> Score:
        return self.inner.project(selection)

    def strip(self) -> ChoiceMap:
        return self.inner.strip()

    def leaves(self, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Trace]]:
        return self.inner.leaves(prefix)

    def outline(self, prefix: tuple[Any, ...] = ()) -> tuple[Part, ...]:
        return self.inner.outline(prefix)

    def unconstrain(self, selection: Selection) -> tuple[ChoiceMap, Score]:
        return self.inner.unconstrain(selection)

    def get_subtree(self, address: Address) -> Any:
        return self.inner.get_subtree(address)

    def chosen(self, accepted: Any, old: Any) -> Trace:
        return self.replace(inner=self.inner.chosen(accepted, old.inner))


def leafwise(accepted: Any, new: Any, old: Any) -> Any:
    """`choose` for trees of arrays: leaves that are the same array stay."""

    def choose_leaf(one: Any, other: Any) -> Any:
        return one if one is other else jnp.where(accepted, one, other)

    return jax.tree.map(choose_leaf, new, old)


def choose(accepted: Any, new: Any, old: Any) -> Any:
    """The new trace where `accepted` is true, else the old one: how a kernel accepts or rejects.

    It equals ``jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)``, which in a loop would copy the whole
    trace in every step. Called in the same JAX transformation as the ``update`` or ``regenerate`` that made `new` from
    `old`, it touches only what that touched.

    Args:
      accepted: a boolean scalar.
      new: the trace that `update` or `regenerate` returned.
      old: the trace that was passed to it.

    Returns:
      A trace of the same structure.

    Raises:
      ArgumentError: if the traces are not of the same structure.

    >>> import gjflax, jax, jax.numpy as jnp
    >>> key, old = gjflax.Normal.simulate(jax.random.key(0), (0.0, 1.0))
    >>> key, (_, weight, new, _) = gjflax.Normal.update(key, old, 5.0, (0.0, 1.0))
    >>> choose(weight > 0, new, old).get_retval() == old.get_retval()
    Array(True, dtype=bool)
    """
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ArgumentError(
            "`choose` takes two traces of one structure, the new one made from the old one by `update` or `regenerate`; "
            f"got {jax.tree.structure(new)} and {jax.tree.structure(old)}."
        )
    if getattr(accepted, "dtype", None) != jnp.bool_ and not isinstance(accepted, bool):
        raise ArgumentError(f"`accepted` is a boolean scalar; got {accepted!r:.80}.")
    return new.chosen(accepted, old) if isinstance(new, Trace) else leafwise(accepted, new, old)


def strong(value: Any) -> Any:
    """An array that is not weakly typed, so that a trace keeps its types under `update`."""
    if isinstance(value, jax.Array):
        if getattr(value, "weak_type", False) or getattr(getattr(value, "aval", None), "weak_type", False):
            return lax.convert_element_type(value, value.dtype)
        return value
    return lax.convert_element_type(jnp.asarray(value), jax.dtypes.canonicalize_dtype(jnp.result_type(value)))


def canonical(tree: Any) -> Any:
    """A tree as traces store it: numbers become strongly typed arrays, what is no number becomes structure."""

    def leaf(value: Any) -> Any:
        if isinstance(value, jax.Array):
            return strong(value)
        is_object = isinstance(value, np.ndarray) and value.dtype.hasobject
        if isinstance(value, (bool, int, float, complex, np.ndarray, np.generic)) and not is_object:
            return strong(value)
        return Const(value)

    return jax.tree.map(leaf, tree, is_leaf=lambda value: isinstance(value, Const))


def plain(tree: Any) -> Any:
    """The inverse of `canonical`: structure becomes values again."""
    return jax.tree.map(
        lambda value: value.value if isinstance(value, Const) else value,
        tree,
        is_leaf=lambda value: isinstance(value, Const),
    )


def total(scores: list[Any]) -> Any:
    """The sum of scores; a float32 zero where there are none."""
    if not scores:
        return jnp.zeros(())
    result = scores[0]
    for score in scores[1:]:
        result = add_scores(result, score)
    return result


def add_scores(a: Any, b: Any) -> Any:
    """The sum of two scores, which may have different float dtypes and batch ranks (a zero has no batch)."""
    if a.dtype == b.dtype and a.shape == b.shape:
        return lax.add(a, b)
    # Not `jnp.promote_types`, which a user may have forbidden.
    dtype = a.dtype if a.dtype.itemsize >= b.dtype.itemsize else b.dtype
    return jnp.asarray(a, dtype) + jnp.asarray(b, dtype)

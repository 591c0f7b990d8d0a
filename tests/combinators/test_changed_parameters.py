"""Changed parameters reach what follows a callee, whatever combinators it is made of and wherever it is made.

The callee has a network and no choice of its own, so only what depends on its return value says that it ran. The
arguments are marked as unchanged, and nothing is said of the parameters, so these count as changed. Then

    weight = log p(t; x, new θ) − log p(t; x, old θ),

which `assess` gives without any knowledge of what changed, and once NumPy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import gjflax
from gjflax import Diff, GenModule, NoneSelection, Normal, gen, trace

KEY = jax.random.key(4)
Make = Callable[[], Any]
Layer = tuple[Callable[[Make], Any], Callable[[tuple[Any, ...]], tuple[Any, ...]]]


def network() -> Any:
    return gjflax.FlaxModule(nn.Dense(1))


def _twice(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), args)


def _with_flag(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (jnp.array(True), *args)


def _scanned(make: Make) -> Any:
    """A scan of two steps, which adds up what the callee returns."""
    return gjflax.Scan(gjflax.Dimap(make(), pre=_of_step, post=_added))


def _of_step(carry: Any, args: Any) -> tuple[Any, ...]:
    return args


def _added(args: Any, step: Any, retval: Any) -> Any:
    return args[0] + total(retval), ()


def _unfolded(make: Make) -> Any:
    """An unfold of two steps, likewise."""
    return gjflax.Unfold(gjflax.Dimap(make(), pre=_of_time, post=_moved), max_length=2)


def _of_time(time: Any, state: Any, *args: Any) -> tuple[Any, ...]:
    return args


def _moved(args: Any, step: Any, retval: Any) -> Any:
    return args[1] + total(retval)


LAYERS: dict[str, Layer] = {
    "Map": (lambda make: gjflax.Map(make()), _twice),
    "Repeat": (lambda make: gjflax.Repeat(make(), 2), lambda args: args),
    "Mask": (lambda make: gjflax.Mask(make()), _with_flag),
    "Cond": (lambda make: gjflax.Cond(make(), make()), _with_flag),
    "Switch": (lambda make: gjflax.Switch((make(), make())), lambda args: (jnp.int32(1), *args)),
    "OrElse": (lambda make: gjflax.OrElse(make(), make()), lambda args: (jnp.array(True), args, args)),
    "Dimap": (lambda make: gjflax.Dimap.map_retval(make(), total), lambda args: args),
    "Product": (lambda make: gjflax.Product({"a": make(), "b": make()}), lambda args: (args, args)),
    "Scan": (_scanned, lambda args: (jnp.float32(0.0), _twice(args))),
    "Unfold": (_unfolded, lambda args: (2, jnp.float32(0.0), *args)),
    "CallAt": (lambda make: gjflax.CallAt(make()), lambda args: (*args, 3)),
}


def total(retval: Any) -> Any:
    """The sum of the floats of a return value; that of a masked one where it is there."""
    floats = [leaf for leaf in jax.tree.leaves(retval) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    return sum(map(jnp.sum, floats), jnp.float32(0.0))


def combined(names: tuple[str, ...]) -> tuple[Make, tuple[Any, ...]]:
    """A function that makes the network in these combinators, the first outermost, and arguments for it."""
    make, args = network, (jnp.array([0.2, -0.1, 0.3]),)
    for name in reversed(names):
        wrap, wrapped_args = LAYERS[name]
        make, args = (lambda wrap=wrap, make=make: wrap(make)), wrapped_args(args)
    return make, args


class Held(GenModule):
    """The callee as a field."""

    callee: nn.Module

    @nn.compact
    def __call__(self, *args: Any) -> Any:
        trace("y", Normal)(total(trace("callee", self.callee)(*args)), 1.0)


def inline(make: Make) -> Any:
    class Inline(GenModule):
        @nn.compact
        def __call__(self, *args: Any) -> Any:
            trace("y", Normal)(total(trace("callee", make())(*args)), 1.0)

    return Inline()


def in_setup(make: Make) -> Any:
    class InSetup(GenModule):
        def setup(self) -> None:
            self.callee = make()

        def __call__(self, *args: Any) -> Any:
            trace("y", Normal)(total(trace("callee", self.callee)(*args)), 1.0)

    return InSetup()


def field_of_inline(make: Make) -> Any:
    class Outer(GenModule):
        @nn.compact
        def __call__(self, *args: Any) -> Any:
            trace("held", Held(make()))(*args)

    return Outer()


def free(make: Make) -> Any:
    callee = make()

    @gen
    def body(*args: Any) -> None:
        trace("y", Normal)(total(trace("callee", callee)(*args)), 1.0)

    return body


PLACES = {
    "inline": inline,
    "in setup": in_setup,
    "field": lambda make: Held(make()),
    "field of inline": field_of_inline,
    "free": free,
}


def check(model: Any, args: tuple[Any, ...]) -> None:
    variables = jax.jit(model.init)(KEY, *args)
    moved = jax.tree.map(lambda leaf: leaf + 0.5, variables)
    _, old = model.bind(variables).simulate(KEY, args)
    unchanged = tuple(map(Diff.no_change, args))

    @jax.jit
    def changes(moved: Any, old: Any) -> Any:
        bound = model.bind(moved)
        _, (_, score) = bound.assess(KEY, old.strip(), args)
        _, (_, updated, after_update, _) = bound.update(KEY, old, {}, unchanged)
        _, (_, regenerated, after_regenerate) = bound.regenerate(KEY, old, NoneSelection(), unchanged)
        differences = [new.get_score() - old.get_score() for new in (after_update, after_regenerate)]
        return score - old.get_score(), [updated, regenerated, *differences]

    expected, given = changes(moved, old)
    assert abs(float(expected)) > 2e-3
    np.testing.assert_allclose(given, [float(expected)] * 4, rtol=1e-4, atol=1e-4)


INLINE = [
    ("Map", "Map"),
    ("Map", "Mask"),
    ("Mask", "Map"),
    ("Map", "Cond"),
    ("Map", "Dimap"),
    ("Unfold", "Scan", "Map"),
]


@pytest.mark.parametrize("names", INLINE, ids="-".join)
def test_two_and_three_combinators_inline(names: tuple[str, ...]):
    make, args = combined(names)
    check(inline(make), args)


def test_every_place():
    make, args = combined(("Map", "Map"))
    for place in PLACES.values():
        check(place(make), args)


def test_weight_by_hand():
    """log N(y; Σ (x k + b), 1) under new and old parameters, with the sum over the four elements of two maps."""
    make, args = combined(("Map", "Map"))
    model = inline(make)
    variables = model.init(KEY, *args)
    moved = jax.tree.map(lambda leaf: leaf - 0.25, variables)
    _, old = model.bind(variables).simulate(KEY, args)
    _, (_, weight, _, _) = model.bind(moved).update(KEY, old, {}, (Diff.no_change(args[0]),))

    def log_density(variables: Any) -> float:
        (layer,) = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)["params"].values()
        mean = np.sum(np.asarray(args[0], np.float64) @ layer["kernel"] + layer["bias"])
        return float(stats.norm.logpdf(float(old["y"]), mean, 1.0))

    np.testing.assert_allclose(weight, log_density(moved) - log_density(variables), rtol=1e-5)


def test_nothing_is_run_where_there_are_no_variables():
    """Nested and inline, too: the counterpart, which keeps an update without change free."""
    runs = []

    def noted(x: Any) -> Any:
        runs.append(x)
        return x

    class Free(GenModule):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            gjflax.trace("e", gjflax.Map(gjflax.Map(gjflax.Dimap.map_retval(Normal, noted))))(x, jnp.ones_like(x))

    model, x = Free(), jnp.ones((2, 3))
    _, old = model.bind({}).simulate(KEY, (x,))
    runs.clear()
    _, (_, weight, new, _) = model.bind({}).update(KEY, old, {}, (Diff.no_change(x),))
    assert float(weight) == 0.0 and not runs
    assert new.get_score() == old.get_score()


class Statistic(nn.Module):
    """A network with a variable that is no parameter, so that Flax would make it without being asked."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x * self.variable("statistics", "scale", lambda: jnp.zeros(())).value


class Reads(GenModule):
    """A body that reads a module of its field, which may belong to another module."""

    network: nn.Module

    @nn.compact
    def __call__(self, x: Any) -> Any:
        trace("y", Normal)(self.network(x).sum(), 1.0)


def test_other_variables_of_a_module_that_belongs_to_another():
    class Outer(GenModule):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            trace("part", Reads(Statistic()))(x)

    check(Outer(), (jnp.ones(3),))


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("outer", LAYERS)
def test_all_pairs_inline(outer: str):
    for inner in LAYERS:
        make, args = combined((outer, inner))
        check(inline(make), args)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_some_triples_in_every_place(place: str):
    triples = list(itertools.product(LAYERS, repeat=3))
    for position in np.random.default_rng(len(place)).choice(len(triples), 3, replace=False):
        make, args = combined(triples[position])
        check(PLACES[place](make), args)

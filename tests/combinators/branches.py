"""Generative functions with branches, and their densities by hand in float64: what the tests of `Switch` and its kin share."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from gjflax import Diff, Exponential, Map, Masked, Normal, Switch, gen, trace

KEY = jax.random.key(0)
KEYS = jax.random.split(jax.random.key(1), 4)
X = jnp.array([0.5, -1.0, 2.0])


def norm(value: Any, loc: Any, scale: Any) -> np.ndarray:
    return stats.norm.logpdf(np.float64(value), np.float64(loc), np.float64(scale))


# Two branches: "a" (a vector) and "m" (mapped) are in both; "rate" and "pair" in one each; "sub" is a switch in both, with
# a choice that both of its branches have, and one that one has.


@gen
def small(x, y):
    trace("u", Normal)(x, 0.5)


@gen
def large(x, y):
    trace("u", Normal)(y, 2.5)
    trace("t", Exponential)(1.0 + y**2)


inner = Switch((small, large))


@gen
def first(x, j):
    rate = trace("rate", Exponential)(2.0)
    a = trace("a", Normal)(x + rate, jnp.array([1.3, 0.6]))
    m = trace("m", Map(Normal, in_axes=(0, None)))(jnp.arange(3.0) * x, 0.8)
    trace("sub", inner)(j, x, rate)
    return {"sum": jnp.sum(a), "m": m}


@gen
def second(x, j):
    m = trace("m", Map(Normal, repeats=3))(0.5, 0.3)
    a = trace("a", Normal)(jnp.sum(m), jnp.array([2.0, 0.4]))
    trace("pair", Normal)(a * x, 1.7)
    trace("sub", inner)(1 - j, jnp.sum(a), x)
    return {"sum": a[0] - x, "m": m * 2.0}


model = Switch((first, second))
ALL = [("rate",), ("a",), ("m",), ("pair",), ("sub", "u"), ("sub", "t")]
STATES = list(itertools.product(range(2), range(2)))
FLIPS = [(old, new) for old in STATES for new in STATES]


def terms(c: Any, index: int, x: float, j: int) -> dict[Any, np.ndarray]:
    """The log densities of the choices that are there, elementwise, by address."""
    c = {address: np.float64(value) for address, value in c.items()}
    a, m = c["a",], c["m",]
    if index == 0:
        of_branch = {
            ("rate",): stats.expon.logpdf(c["rate",], scale=0.5),
            ("a",): norm(a, x + c["rate",], [1.3, 0.6]),
            ("m",): norm(m, np.arange(3) * x, 0.8),
        }
        sub, x, y = j, x, c["rate",]
    else:
        of_branch = {
            ("m",): norm(m, 0.5, 0.3),
            ("a",): norm(a, m.sum(), [2.0, 0.4]),
            ("pair",): norm(c["pair",], a * x, 1.7),
        }
        sub, x, y = 1 - j, a.sum(), x
    if sub == 0:
        return of_branch | {("sub", "u"): norm(c["sub", "u"], x, 0.5)}
    return of_branch | {
        ("sub", "u"): norm(c["sub", "u"], y, 2.5),
        ("sub", "t"): stats.expon.logpdf(c["sub", "t"], scale=1 / (1.0 + y**2)),
    }


def there(index: int, j: int) -> set[Any]:
    sub = {("sub", "u"), ("sub", "t")} if index != j else {("sub", "u")}
    return {("a",), ("m",), ("rate",) if index == 0 else ("pair",)} | sub


def values(choices: Any) -> dict[Any, np.ndarray]:
    """The choices that are there, by address; of vectors every element must be there or none."""
    result = {}
    for address in choices.addresses():
        value = choices.get_subtree(address).get_value()
        if isinstance(value, Masked):
            flags = np.unique(value.flag)
            assert flags.size == 1
            if flags[0]:
                result[address] = np.asarray(value.value)
        else:
            result[address] = np.asarray(value)
    return result


def total(parts: dict[Any, np.ndarray], of: Any = None) -> float:
    return float(sum(np.sum(part) for address, part in parts.items() if of is None or address in of))


def close(got: Any, want: Any, tolerance: float = 3e-4) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-4, atol=tolerance)


def same(a: dict[Any, Any], b: dict[Any, Any]) -> None:
    assert a.keys() == b.keys()
    for address, value in a.items():
        np.testing.assert_array_equal(value, b[address])


def leaf_types(tree: Any) -> Any:
    leaves = [(leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), leaves


def args_of(index: int, x: float, j: int) -> Any:
    return (jnp.int32(index), jnp.float32(x), jnp.int32(j))


@jax.jit
def simulate(key: Any, *args: Any) -> Any:
    return model.simulate(key, args)[1]


@jax.jit
def assess(choices: Any, *args: Any) -> Any:
    return model.assess(KEY, choices, args)[1]


@jax.jit
def update(key: Any, tr: Any, choices: Any, *args: Any) -> Any:
    _, (retdiff, weight, new, discard) = model.update(key, tr, choices, args)
    return Diff.primal(retdiff), weight, new, discard, new.get_retval(), new.get_score(), new.strip()


# Three branches, of which each two share an address -------------------------------------------------------------------


def pairwise(*names: str) -> Any:
    @gen
    def branch(x):
        for position, name in enumerate(names):
            trace(name, Normal)(x * (position + 1), 0.5 + len(names) + ord(name) % 7)

    return branch


NAMES = [("p", "q"), ("q", "r"), ("r", "p", "s")]
ring = Switch([pairwise(*names) for names in NAMES])


def ring_terms(c: Any, index: int, x: float) -> dict[Any, np.ndarray]:
    names = NAMES[index]
    return {(n,): norm(c[n,], x * (i + 1), 0.5 + len(names) + ord(n) % 7) for i, n in enumerate(names)}


# Two branches with a choice that one of them alone has ------------------------------------------------------------


@gen
def plus(x):
    return trace("y", Normal)(x + trace("only", Exponential)(1.5), 0.5)


@gen
def minus(x):
    return trace("y", Normal)(-x, 2.0)


either = Switch((plus, minus))


def either_terms(tr: Any, indices: Any, xs: Any) -> tuple[np.ndarray, np.ndarray]:
    """The log densities of "y" and "only", zero where it is not there."""
    y, only = np.float64(tr["y"]), np.float64(tr["only"].value)
    is_plus = np.asarray(indices) == 0
    loc, scale = np.where(is_plus, xs + only, -np.asarray(xs)), np.where(is_plus, 0.5, 2.0)
    return norm(y, loc, scale), np.where(is_plus, stats.expon.logpdf(only, scale=1 / 1.5), 0.0)

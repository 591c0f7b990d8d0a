"""`Product`: scores and weights are sums over independent factors."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.branches import KEY, KEYS, X, close, leaf_types, norm, same, total, values
from scipy import stats

from gjflax import (
    ArgumentError,
    Diff,
    Exponential,
    GenModule,
    Map,
    Mask,
    MissingChoiceError,
    Normal,
    Poisson,
    Product,
    UnvisitedConstraintError,
    gen,
    select,
    trace,
)


@gen
def pair(loc):
    scale = trace("scale", Exponential)(2.0)
    return trace("y", Normal)(loc + jnp.array([0.0, 1.0]), 0.3 + scale)


product = Product({"pair": pair, "count": Poisson, "each": Map(Normal, in_axes=(0, None))})
ARGS = ((0.5,), (3.0,), (jnp.arange(3.0), 1.7))
OTHER = ((-1.0,), (1.2,), (jnp.arange(3.0) - 1.0, 0.6))


def terms(c: dict[Any, Any], args: Any) -> dict[Any, np.ndarray]:
    (loc,), (rate,), (locs, width) = jax.tree.map(np.float64, args)
    c = {address: np.float64(value) for address, value in c.items()}
    return {
        ("pair", "scale"): stats.expon.logpdf(c["pair", "scale"], scale=0.5),
        ("pair", "y"): norm(c["pair", "y"], loc + np.array([0.0, 1.0]), 0.3 + c["pair", "scale"]),
        ("count",): stats.poisson.logpmf(c["count",], rate),
        ("each",): norm(c["each",], locs, width),
    }


def test_the_density_is_the_product():
    _, tr = jax.jit(lambda key: product.simulate(key, ARGS))(KEY)
    parts = terms(values(tr.strip()), ARGS)
    close(tr.get_score(), total(parts))
    for address in parts:
        close(tr.project(select(address)), total(parts, of=[address]))
    _, (retval, score) = jax.jit(lambda choices: product.assess(KEY, choices, ARGS))(tr.strip())
    close(score, total(parts))
    assert retval.keys() == {"pair", "count", "each"}
    np.testing.assert_array_equal(retval["pair"], tr["pair", "y"])
    _, (weight, tr) = product.importance(KEY, {"count": 4, "pair": {"scale": 0.5}, "each": {1: 0.25}}, ARGS)
    parts = terms(values(tr.strip()), ARGS)
    close(weight, total(parts, of=[("count",), ("pair", "scale")]) + parts["each",][1])


def test_weights_are_sums_over_the_factors():
    _, tr = product.simulate(KEY, ARGS)
    was = values(tr.strip())
    before = terms(was, ARGS)
    given = {"pair": {"y": jnp.array([0.3, -0.2])}, "count": 2}

    @jax.jit
    def run(tr):
        _, (_, weight, new, discard) = product.update(KEYS[0], tr, given, OTHER)
        _, (_, second_weight, second, _) = product.update(KEYS[1], new, {"pair": {"scale": 0.9}}, ARGS)
        _, (_, back_weight, back, _) = product.update(KEYS[1], new, discard, ARGS)
        _, (_, redrawn_weight, redrawn) = product.regenerate(KEYS[2], tr, select("count", ("pair", "y")), OTHER)
        return (weight, new, discard), (second_weight, second), (back_weight, back), (redrawn_weight, redrawn)

    (weight, new, discard), (second_weight, second), (back_weight, back), (redrawn_weight, redrawn) = run(tr)
    after = terms(values(new.strip()), OTHER)
    close(weight, total(after) - total(before))
    close(new.get_score(), total(after))
    same(values(discard), {("pair", "y"): was["pair", "y"], ("count",): was["count",]})
    last = terms(values(second.strip()), ARGS)
    close(second_weight, total(last) - total(after))
    close(second.get_score(), total(last))
    close(back_weight, -np.float64(weight))
    same(values(back.strip()), was)
    kept = [("pair", "scale"), ("each",)]
    close(redrawn_weight, total(terms(values(redrawn.strip()), OTHER), of=kept) - total(before, of=kept))
    assert leaf_types(tr) == leaf_types(new) == leaf_types(redrawn)


def test_the_factors_that_are_not_touched_stay():
    _, tr = product.simulate(KEY, ARGS)
    unchanged = tuple(map(Diff.no_change, tr.get_args()))
    _, (_, weight, new, _) = product.update(KEY, tr, {"count": 7}, unchanged)
    rate = 3.0
    close(weight, stats.poisson.logpmf(7, rate) - stats.poisson.logpmf(int(tr["count"]), rate))
    for name in ("pair", "each"):
        pairs = zip(*(jax.tree.leaves(one.get_subtree(name).strip()) for one in (new, tr)), strict=True)
        assert all(one is other for one, other in pairs)


def test_a_tuple_of_factors():
    plain = Product([Normal, Poisson])
    args = ((0.5, 1.7), (3.0,))
    _, tr = plain.simulate(KEY, args)
    assert isinstance(tr.get_retval(), tuple) and tr.strip().addresses() == [("0",), ("1",)]
    value, count = tr.get_retval()
    close(tr.get_score(), norm(value, 0.5, 1.7) + stats.poisson.logpmf(int(count), 3.0))
    assert plain == Product((Normal, Poisson)) and hash(plain) == hash(Product((Normal, Poisson)))
    batched = jax.jit(jax.vmap(lambda key: plain.simulate(key, args)[1]))(jax.random.split(KEY, 3))
    values_, counts = batched.get_retval()
    close(batched.get_score(), norm(values_, 0.5, 1.7) + stats.poisson.logpmf(np.asarray(counts), 3.0))


def test_the_order_of_the_arguments_is_that_of_the_factors():
    one, other = Product({"a": Normal, "b": Poisson}), Product({"b": Poisson, "a": Normal})
    assert one != other and one == Product({"b": Poisson, "a": Normal}, names=("a", "b"))
    _, (weight, _) = other.importance(KEY, {"a": 0.5, "b": 2}, ((3.0,), (0.0, 1.0)))
    close(weight, norm(0.5, 0.0, 1.0) + stats.poisson.logpmf(2, 3.0))


class Net(GenModule):
    @nn.compact
    def __call__(self, x):
        return trace("y", Normal)(nn.Dense(2)(x), 0.5)


@pytest.mark.slow
def test_the_parameters_of_the_factors(no_leaks: Any):
    nets = Product({"a": Net(), "b": Mask(Net())})
    args = ((X,), (False, X))
    shapes = no_leaks(lambda: jax.tree.map(jnp.shape, jax.eval_shape(lambda: nets.init(KEY, *args))))
    dense = {"Dense_0": {"bias": (2,), "kernel": (3, 2)}}
    assert shapes == {"params": {"factors_a": dense, "factors_b": dense}}
    variables = nets.init(KEY, *args)
    _, tr = nets.bind(variables).simulate(KEY, ((X,), (True, X)))
    params = jax.tree.map(np.float64, variables["params"])
    means = {name: np.float64(X) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"] for name, p in params.items()}
    here = values(tr.strip())
    want = norm(here["a", "y"], means["factors_a"], 0.5).sum() + norm(here["b", "y"], means["factors_b"], 0.5).sum()
    close(tr.get_score(), want)
    each = Map(nets, in_axes=0)
    _, mapped = each.bind(variables).simulate(KEY, ((X[None],), (jnp.array([True]), X[None])))
    assert mapped["a", "y"].shape == (1, 2)


def test_bad_input():
    with pytest.raises(ArgumentError, match="`Product` takes a dict or a tuple of generative functions"):
        Product(())
    with pytest.raises(ArgumentError, match="`Product` takes a dict or a tuple of generative functions"):
        Product(Normal)
    with pytest.raises(ArgumentError, match="Is @gen missing"):
        Product({"a": Normal, "b": abs})
    with pytest.raises(ArgumentError, match='strings without "/"'):
        Product({"a/b": Normal})
    with pytest.raises(ArgumentError, match='strings without "/"'):
        Product({0: Normal})
    with pytest.raises(ArgumentError, match="`names` gives the order of the factors"):
        Product({"a": Normal}, names=("b",))
    with pytest.raises(ArgumentError, match="have `names` where they are a dict"):
        Product((Normal,), names=("b",))
    two = Product({"a": Normal, "b": Normal})
    with pytest.raises(ArgumentError, match=r'Product at "p" .* for each factor, 2 in all; got 1'):
        gen(lambda: trace("p", two)((0.0, 1.0))).simulate(KEY, ())
    with pytest.raises(ArgumentError, match="one tuple of arguments for each factor.*got float"):
        two.simulate(KEY, (0.0, 1.0))
    with pytest.raises(UnvisitedConstraintError, match='"c".*Known here: "a", "b"'):
        two.importance(KEY, {"c": 1.0}, ((0.0, 1.0), (0.0, 1.0)))
    with pytest.raises(MissingChoiceError, match='"b"'):
        two.assess(KEY, {"a": 1.0}, ((0.0, 1.0), (0.0, 1.0)))

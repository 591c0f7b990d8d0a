"""Gradients through a `Switch`, and choices in R^n, against finite differences by hand."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.branches import ALL, KEY, KEYS, STATES, X, args_of, close, model, simulate, terms, total, values

import gjflax
from gjflax import AllSelection, Diff, GenModule, Masked, Normal, Switch, gen, select, trace


def differences(function: Any, at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    at = np.asarray(at, np.float64)
    result = np.zeros_like(at)
    for position in np.ndindex(at.shape):
        shift = np.zeros_like(at)
        shift[position] = step
        result[position] = (function(at + shift) - function(at - shift)) / (2 * step)
    return result


choice_gradients = jax.jit(lambda tr: model.choice_grad(KEY, tr, AllSelection()))
argument_gradients = jax.jit(lambda tr: model.arg_grad(KEY, tr, 1))


@pytest.mark.parametrize("index, j", STATES)
def test_choice_and_argument_gradients(index: int, j: int):
    tr = simulate(KEYS[0], *args_of(index, 0.7, j))
    here = values(tr.strip())
    _, grads = choice_gradients(tr)
    for address in ALL:
        found = grads.get_subtree(address).get_value()
        found = found.value if isinstance(found, Masked) else found
        if address not in here:
            assert np.all(np.asarray(found) == 0.0)
            continue
        want = differences(lambda v, a=address: total(terms({**here, a: v}, index, 0.7, j)), here[address])
        np.testing.assert_allclose(found, want, rtol=2e-3, atol=2e-3)
    _, found = argument_gradients(tr)
    want = differences(lambda x: total(terms(here, index, float(x), j)), np.array(0.7))
    np.testing.assert_allclose(found, want, rtol=2e-3, atol=2e-3)


class Rough(gjflax.Distribution):
    """A user's own density, with a derivative in its argument that is infinite at 0."""

    def sample(self, key: Any, scale: Any) -> Any:
        return 1.0 + jax.random.exponential(key) * scale

    def logpdf(self, value: Any, scale: Any) -> Any:
        return -jnp.sqrt(value) / scale - jnp.log(value)


@gen
def rooted(x, w):
    """Fit for positive x alone."""
    trace("rough", Rough())(jnp.sqrt(x))
    return trace("y", gjflax.LogNormal)(w * jnp.log(x), jnp.sqrt(x))


@gen
def any_sign(x, w):
    return trace("y", Normal)(w * x, 1.0)


@pytest.mark.slow
def test_branches_that_are_not_taken_send_no_nan_back():
    """Under vmap every branch runs, also on arguments and values that are none for it."""
    careful = Switch((rooted, any_sign))
    xs, indices = jnp.array([2.0, -3.0, 0.5]), jnp.array([0, 1, 0])
    ys, roughs = jnp.array([1.5, -2.0, 0.7]), jnp.array([1.1, 0.0, 2.0])

    def score(x, w, index, y, rough):
        choices = {"y": y, "rough": Masked(rough, index == 0)}
        return careful.assess(KEY, choices, (index, x, w))[1][1]

    w = jnp.array([0.5, 0.8, -1.0])
    grads = jax.jit(jax.vmap(jax.grad(score, argnums=(0, 1, 3, 4))))(xs, w, indices, ys, roughs)
    for i in range(3):
        alone = jax.grad(score, argnums=(0, 1, 3, 4))(xs[i], w[i], indices[i], ys[i], roughs[i])
        for batched, one in zip(grads, alone, strict=True):
            assert np.isfinite(batched[i])
            np.testing.assert_allclose(batched[i], one, rtol=1e-4, atol=1e-5)
    assert grads[3][1] == 0.0

    # Of the weight and the retval of simulate, importance and update too.
    def through(x, w, index, y):
        _, tr = careful.simulate(KEY, (index, x, w))
        _, (weight, other) = careful.importance(KEY, {"y": y}, (index, x, w))
        _, (_, change, new, _) = careful.update(KEY, other, {"y": y + 1.0}, (Diff.no_change(index), x, w))
        return tr.get_score() + tr.get_retval() + weight + change + new.get_score()

    grads = jax.jit(jax.vmap(jax.grad(through, argnums=(0, 1, 3))))(xs, w, indices, ys)
    for i in range(3):
        alone = jax.grad(through, argnums=(0, 1, 3))(xs[i], w[i], indices[i], ys[i])
        for batched, one in zip(grads, alone, strict=True):
            np.testing.assert_allclose(batched[i], one, rtol=1e-3, atol=1e-4)


def test_parameter_gradients_of_a_batch_are_finite():
    """A value that is outside of the support of a branch that is not taken."""

    class Positive(GenModule):
        @nn.compact
        def __call__(self, x):
            return trace("y", gjflax.LogNormal)(nn.Dense(1)(x)[0], 0.5)

    class Real(GenModule):
        @nn.compact
        def __call__(self, x):
            return trace("y", Normal)(nn.Dense(1)(x)[0], 0.5)

    mixed = Switch((Positive(), Real()))
    variables = mixed.init(KEY, 0, X)
    indices, ys = jnp.array([0, 1, 1]), jnp.array([2.0, -1.0, 0.0])

    def loss(params, indices, ys):
        def one(index, y):
            return mixed.apply({"params": params}, KEY, {"y": y}, (index, X), method="assess")[1][1]

        return jnp.sum(jax.vmap(one)(indices, ys))

    grads = jax.jit(jax.grad(loss))(variables["params"], indices, ys)
    looped = [jax.grad(loss)(variables["params"], indices[i : i + 1], ys[i : i + 1]) for i in range(3)]
    want = jax.tree.map(lambda *parts: sum(parts), *looped)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, want)


# R^n -----------------------------------------------------------------------------------------------------------------


constrain = jax.jit(lambda free, args: model.constrain(free, args))


@pytest.mark.parametrize("index, j", STATES)
def test_to_and_from_the_unconstrained_space(index: int, j: int):
    tr = simulate(KEYS[0], *args_of(index, 0.7, j))
    free, log_det = model.unconstrain(tr, AllSelection())
    here, flat = values(tr.strip()), values(free)
    assert flat.keys() == here.keys()
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(free) if leaf.dtype != bool)
    args = tr.get_args()
    choices, back = constrain(free, args)
    close(back, -np.float64(log_det))
    for address, value in values(choices).items():
        np.testing.assert_allclose(value, here[address], rtol=1e-4, atol=1e-5)
    assert values(choices).keys() == here.keys()
    # Some of the choices, with the others held: the Jacobian is that of these alone.
    some, of_some = model.unconstrain(tr, select("rate", "sub"))
    others = tr.strip().filter(~select("rate", "sub"))
    if index == 0:
        choices, back = jax.jit(lambda *a: model.constrain(some, a, fixed=others))(*args)
        close(back, -np.float64(of_some))
        assert values(choices).keys() == here.keys()
        close(of_some, log_det)

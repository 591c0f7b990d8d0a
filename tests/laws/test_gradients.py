"""Gradients in choices, arguments and parameters, against central differences of the densities by hand, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from laws.cases import Case, each_case

import gjflax
from gjflax import choice_map, select

KEYS = jax.random.split(jax.random.key(21), 3)
STEP = 1e-5


def central_differences(function: Callable[[Any], float], tree: Any) -> Any:
    """The gradient of a function of a tree of float64 arrays."""
    leaves, structure = jax.tree.flatten(tree)
    leaves = [np.asarray(leaf, np.float64) for leaf in leaves]

    def at(position: int, index: Any, shift: float) -> float:
        moved = [leaf.copy() for leaf in leaves]
        moved[position][index] += shift
        return function(jax.tree.unflatten(structure, moved))

    gradients = []
    for position, leaf in enumerate(leaves):
        gradient = np.zeros_like(leaf)
        for index in np.ndindex(leaf.shape):
            gradient[index] = (at(position, index, STEP) - at(position, index, -STEP)) / (2 * STEP)
        gradients.append(gradient)
    return jax.tree.unflatten(structure, gradients)


def log_density(case: Case, values: dict[Any, Any], args: Any, params: Any) -> float:
    terms = case.terms(values, *jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (args, params)))
    return float(sum(np.sum(term) for term in terms.values()))


def prepared(case: Case) -> tuple[Any, Any, dict[Any, Any], Any]:
    model = case.bound()
    _, trace = model.simulate(KEYS[0], case.args)
    choices = trace.strip()
    values = {address: np.asarray(choices.get_subtree(address).get_value()) for address in choices.addresses()}
    return model, trace, values, case.variables().get("params", {})


def close(got: Any, want: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), got, want)


@each_case
def test_choice_gradients(case: Case):
    model, trace, values, params = prepared(case)
    continuous = [address for address in values if address not in case.discrete]
    want = central_differences(
        lambda moved: log_density(case, {**values, **moved}, case.args, params),
        {address: values[address] for address in continuous},
    )
    gradient = jax.jit(lambda tr, chosen=None: model.choice_grad(KEYS[1], tr, chosen)[1], static_argnums=1)
    for chosen in ([continuous[0]], continuous):
        selection = gjflax.AllSelection() if chosen == [()] else select(chosen)
        grads = gradient(trace, selection)
        selected = selection.filter(trace)[0].strip()
        assert jax.tree.structure(grads) == jax.tree.structure(selected)
        assert sorted(grads.addresses()) == sorted(chosen)
        for address in chosen:
            close(grads.get_subtree(address).get_value(), want[address])


@each_case
def test_argument_gradients(case: Case):
    model, trace, values, params = prepared(case)
    floating = [
        position
        for position, arg in enumerate(case.args)
        if all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(arg))
    ]

    def density(moved: Any) -> float:
        args = dict(enumerate(case.args)) | dict(zip(floating, moved, strict=True))
        return log_density(case, values, tuple(args.values()), params)

    want = central_differences(density, tuple(case.args[position] for position in floating))
    for position, gradient in zip(floating, want, strict=True):
        _, grads = jax.jit(lambda tr, p=position: model.arg_grad(KEYS[1], tr, p))(trace)
        close(grads, gradient)
    _, together = model.arg_grad(KEYS[1], trace, tuple(floating))
    close(together, want)


@each_case
def test_parameter_gradients(case: Case):
    _, trace, values, params = prepared(case)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, params)
    want = log_density(case, values, case.args, moved)
    _, score = case.gen_fn.score_params(KEYS[1], trace, moved)
    np.testing.assert_allclose(score, want, rtol=1e-4, atol=1e-4)
    if params:
        gradient = central_differences(lambda p: log_density(case, values, case.args, p), moved)
        _, grads = jax.jit(lambda tr, p: case.gen_fn.param_grad(KEYS[1], tr, p))(trace, moved)
        close(grads, gradient)
        close(jax.grad(lambda p: case.gen_fn.score_params(KEYS[1], trace, p)[1])(moved), gradient)


@each_case
def test_update_under_other_parameters_weighs_the_change(case: Case):
    """Parameters are one more argument: the weight is log p(t; new parameters) − log p(t; old ones)."""
    _, trace, values, params = prepared(case)
    if not params:
        return
    moved = jax.tree.map(lambda leaf: leaf + 0.1, params)
    model = case.gen_fn.bind({"params": moved})
    want = log_density(case, values, case.args, moved) - log_density(case, values, case.args, params)
    _, (_, weight, new, _) = model.update(KEYS[1], trace, {}, case.args)
    np.testing.assert_allclose(weight, want, rtol=1e-3, atol=1e-3)
    _, (_, weight, again) = model.regenerate(KEYS[1], trace, gjflax.NoneSelection(), case.args)
    np.testing.assert_allclose(weight, want, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(new.get_score(), again.get_score(), rtol=1e-5)


@each_case
def test_unzip_has_second_derivatives(case: Case):
    model, trace, values, params = prepared(case)
    free = next(address for address in values if address not in case.discrete)
    held = {address: value for address, value in values.items() if address != free}
    _, score, retval = model.unzip(KEYS[1], choice_map(held))

    def of(flat: Any) -> Any:
        return score(choice_map({free: flat.reshape(values[free].shape)}), *case.args)

    flat = jnp.ravel(jnp.asarray(values[free]))
    want = central_differences(
        lambda v: log_density(case, {**values, free: v.reshape(values[free].shape)}, case.args, params),
        np.asarray(flat),
    )
    close(jax.grad(of)(flat), want)
    hessian = jax.jit(jax.hessian(of))(flat)
    close(hessian, hessian.T)
    slope = jax.jit(jax.grad(of))
    shifted = (slope(flat.at[0].add(1e-2)) - slope(flat.at[0].add(-1e-2))) / 2e-2
    np.testing.assert_allclose(hessian[0], shifted, rtol=2e-2, atol=2e-2)
    np.testing.assert_array_equal(
        jax.tree.leaves(retval(choice_map({free: values[free]}), *case.args))[0], jax.tree.leaves(trace.get_retval())[0]
    )

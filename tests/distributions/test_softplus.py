"""log(1 + exp x) and its derivatives, against NumPy in float64 and the logistic function's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

import gjflax
from gjflax.distributions.softplus import softplus

POINTS = np.array([-1e4, -90.0, -20.0, -1.5, -1e-3, 0.0, 1e-3, 1.5, 20.0, 90.0, 1e4], np.float32)


def test_it_is_the_logarithm_at_any_size() -> None:
    exact = np.logaddexp(POINTS.astype(np.float64), 0.0)
    np.testing.assert_allclose(jax.jit(softplus)(POINTS), exact, rtol=3e-7, atol=1e-38)
    limits = softplus(jnp.array([-jnp.inf, jnp.inf, jnp.nan]))
    np.testing.assert_array_equal(limits, [0.0, np.inf, np.nan])


def test_its_derivatives_are_those_of_the_logistic_function() -> None:
    """σ, σ(1 − σ) and σ(1 − σ)(1 − 2σ); at 0 too, where max(x, 0) and |x| have none."""
    x = POINTS[3:8]
    sigma = special.expit(x.astype(np.float64))
    first = jax.grad(softplus)
    second, third = jax.grad(first), jax.grad(jax.grad(first))
    np.testing.assert_allclose(jax.vmap(first)(x), sigma, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(second)(x), sigma * (1 - sigma), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(third)(x), sigma * (1 - sigma) * (1 - 2 * sigma), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.vmap(jax.jacfwd(jax.grad(softplus)))(x), sigma * (1 - sigma), rtol=1e-6)


def test_the_curvature_of_a_logistic_likelihood_starts_right() -> None:
    """At logits of 0, from which a regression starts: the Hessian is −¼ XᵀX."""
    x = np.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]], np.float32)
    y = jnp.array([1, 0, 1])

    def log_likelihood(w):
        return gjflax.Bernoulli.assess(jax.random.key(0), y, (x @ w,))[1][1]

    np.testing.assert_allclose(jax.hessian(log_likelihood)(jnp.zeros(2)), -0.25 * x.T @ x, rtol=1e-6)


def test_outside_of_its_support_a_bernoulli_has_no_slope():
    for value in (2, -1):
        density = lambda logits, value=value: gjflax.Bernoulli.assess(jax.random.key(0), jnp.int32(value), (logits,))[
            1
        ][1]
        assert density(0.3) == -jnp.inf and jax.grad(density)(0.3) == 0.0

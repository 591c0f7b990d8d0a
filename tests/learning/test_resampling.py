"""Resampling schemes: how many descendants each particle has. The means are of 20,000 draws, to 4 standard errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gjflax.learning.resampling import SCHEMES, draw_ancestors

DRAWS = 20_000
WEIGHTS = np.array([0.0, 0.4, 0.05, 0.3, 0.0, 0.25, 0.0])
LOG_WEIGHTS = np.log(WEIGHTS, out=np.full(7, -np.inf), where=WEIGHTS > 0).astype(np.float32) + 3.0


def counts_of(scheme: str, log_weights: np.ndarray) -> np.ndarray:
    """The number of descendants of each particle, in every draw."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    drawn = jax.jit(jax.vmap(lambda key: draw_ancestors(key, jnp.asarray(log_weights), scheme)))(keys)
    assert drawn.dtype == jnp.int32
    return (np.asarray(drawn)[:, :, None] == np.arange(len(log_weights))).sum(axis=1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_descendants_are_in_proportion_to_the_weights(scheme: str) -> None:
    counts = counts_of(scheme, LOG_WEIGHTS)
    expected = 7 * WEIGHTS
    error = counts.std(axis=0) / np.sqrt(DRAWS)
    assert np.all(np.abs(counts.mean(axis=0) - expected) <= 4 * error + 1e-6)
    # How much the numbers may vary is what the schemes differ in.
    variance = counts.var(axis=0)
    binomial = expected * (1 - WEIGHTS)
    fraction = expected - np.floor(expected)
    if scheme == "multinomial":
        np.testing.assert_allclose(variance, binomial, rtol=0.06)
    if scheme == "systematic":
        assert np.all((counts == np.floor(expected)) | (counts == np.ceil(expected)))
        np.testing.assert_allclose(variance, fraction * (1 - fraction), rtol=0.06, atol=1e-6)
    if scheme == "residual":
        left = fraction.sum()
        assert np.all(counts >= np.floor(expected))
        np.testing.assert_allclose(variance, fraction * (1 - fraction / left), rtol=0.06, atol=1e-6)
    if scheme == "stratified":
        assert np.all(np.abs(counts - expected) < 2) and np.all(variance <= binomial)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_where_all_weights_are_zero_they_count_as_equal(scheme: str) -> None:
    counts = counts_of(scheme, np.full(5, -np.inf, np.float32))
    np.testing.assert_allclose(counts.mean(axis=0), 1.0, atol=4 / np.sqrt(DRAWS))

"""Settings of all tests, and the helpers that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

# Read before a test module is imported: mixing ranks or dtypes by accident is an error in gjflax. TFP promotes by
# itself, so gjflax suspends both settings around its calls.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_platforms", "cpu")


@pytest.fixture
def no_leaks() -> Callable[[Callable[[], Any]], Any]:
    """Run a function while JAX checks that no tracer outlives its transformation.

    The result's leaves must be concrete too: Flax gives leaked tracers back from `init` without an error.
    """

    def run(function: Callable[[], Any]) -> Any:
        with jax.checking_leaks():
            result = function()
        assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(result))
        return result

    return run


@pytest.fixture(autouse=True)
def _compile_fast(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most of the time of the default tests goes into compiling small programs that run once.

    What runs long is optimised: slow tests, and those with the marker `optimized`.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    optimized = any(request.node.get_closest_marker(name) for name in ("slow", "optimized"))
    if "laws" in request.node.path.parts:
        # Many small programs, also where they are slow together.
        optimized = False
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def _empty_stack() -> Iterator[None]:
    """Every test leaves the stack of running bodies as it found it."""
    from gjflax.core.context import top_frame

    assert top_frame() is None
    yield
    assert top_frame() is None

"""Settings of all tests, and the helpers that they share."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
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


GROWTH = 2**30
"""After so many more bytes a process forgets what it has traced and compiled: the tests make thousands of programs."""
_memory = 0


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    global _memory
    yield
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        return
    now = int(statistics.read_text().split()[1]) * resource.getpagesize()
    _memory = _memory or now
    if now > _memory + GROWTH:
        jax.clear_caches()
        gc.collect()
        _memory = now


@pytest.fixture(autouse=True)
def _empty_stack() -> Iterator[None]:
    """Every test leaves the stack of running bodies as it found it."""
    from gjflax.core.context import top_frame

    assert top_frame() is None
    yield
    assert top_frame() is None

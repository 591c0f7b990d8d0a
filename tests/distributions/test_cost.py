"""What a choice costs while tracing, and what importing costs."""

from __future__ import annotations

import pathlib
import statistics
import subprocess
import sys

import pytest

TRACING = """
import statistics, time
import jax, jax.numpy as jnp
import gjflax

SITES = 100

def seconds(function, *args):
    # The processor's time, which another program on the machine does not change much.
    start = time.process_time()
    jax.make_jaxpr(lambda *args: function(*args))(*args)
    return time.process_time() - start

def added(distribution, density):
    @gjflax.gen
    def model(x):
        for i in range(SITES):
            x = gjflax.trace(f"z{i}", distribution)(x, 2.0)
        return x

    values = {f"z{i}": jnp.float32(i + 1) for i in range(SITES)}
    key = jax.random.key(0)

    def ours(values, x):
        return model.assess(key, values, (x,))[1][1]

    def by_hand(values, x):
        total = jnp.zeros(())
        for value in values.values():
            total = total + jnp.sum(density(value, x, 2.0))
            x = value
        return total

    x = jnp.float32(1.0)
    for function in (ours, by_hand):
        seconds(function, values, x)
    # Pairs, so that a slow moment of the machine counts for both.
    return statistics.median(seconds(ours, values, x) - seconds(by_hand, values, x) for _ in range(5)) / SITES

print(added(gjflax.Normal, jax.scipy.stats.norm.logpdf), added(gjflax.Gamma, jax.scipy.stats.gamma.logpdf))
"""


def run(program: str) -> str:
    """The output of a program in a fresh interpreter, without the run-time checks of the tests."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_a_choice_adds_less_than_half_a_millisecond_to_tracing() -> None:
    # One family that is built without TFP, and one that goes through it.
    for added in map(float, run(TRACING).split()):
        assert added < 0.5e-3, f"{added * 1e3:.3f} ms"


FIRST_USE = """
import sys
import gjflax
assert not any(name.startswith("tensorflow_probability") for name in sys.modules)
import jax, jax.numpy as jnp
key = jax.random.key(0)
@gjflax.gen
def model():
    x = gjflax.trace("x", gjflax.Normal)(0.0, 1.0)
    gjflax.trace("u", gjflax.Uniform)(0.0, 2.0)
    gjflax.trace("k", gjflax.Poisson)(3.0)
    return gjflax.trace("y", gjflax.Bernoulli)(probs=jnp.array(0.3))
_, tr = model.simulate(key, ())
free, _ = model.unconstrain(tr, gjflax.select("x", "u"))
model.constrain(free, (), fixed=tr.strip().filter(gjflax.select("k", "y")))
model.choice_grad(key, tr, gjflax.select("x"))
assert not any(name.startswith("tensorflow_probability") for name in sys.modules)
gjflax.Gamma.simulate(key, (1.0, 2.0))
assert any(name.startswith("tensorflow_probability") for name in sys.modules)
print("passed")
"""


def test_tfp_is_loaded_when_a_family_first_needs_it() -> None:
    assert run(FIRST_USE) == "passed"


@pytest.mark.slow
@pytest.mark.timing
def test_importing_costs_at_most_a_fifth_more_than_flax_and_optax(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    # Packages are compiled where they are installed; a checkout is, where its bytecode may be kept.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))

    def seconds(names: str) -> float:
        return float(
            run(f"import time; start = time.process_time(); import {names}; print(time.process_time() - start)")
        )

    for names in ("gjflax", "flax.linen, optax"):
        seconds(names)
    pairs = [(seconds("gjflax"), seconds("flax.linen, optax")) for _ in range(5)]
    assert statistics.median(ours / theirs for ours, theirs in pairs) <= 1.2

"""What one `trace` site costs while tracing: a chain of K sites, x_i ~ Normal(x_{i-1}, 1), beside hand-written JAX."""

from __future__ import annotations

import statistics

import jax
import jax.numpy as jnp
from timing import interleaved

from gjflax import Normal, gen, trace

SITES = 200
KEY = jax.random.key(0)
CHOICES = {f"x{i}": jnp.float32(0.1 * (i % 7)) for i in range(SITES)}


@gen
def chain():
    previous = 0.0
    for i in range(SITES):
        previous = trace(f"x{i}", Normal)(previous, 1.0)
    return previous


def by_scipy(choices):
    previous, score = 0.0, 0.0
    for i in range(SITES):
        score = score + jax.scipy.stats.norm.logpdf(choices[f"x{i}"], previous, 1.0)
        previous = choices[f"x{i}"]
    return score


def sampled_by_hand(key):
    previous, score, choices = 0.0, 0.0, {}
    for i in range(SITES):
        previous = previous + jax.random.normal(jax.random.fold_in(key, i))
        choices[f"x{i}"] = previous
        score = score + jax.scipy.stats.norm.logpdf(choices[f"x{i}"], previous, 1.0)
    return choices, score


def assessed(choices):
    return chain.assess(KEY, choices, ())[1][1]


def traced(function, argument):
    # A new function object each time: JAX would give a cached jaxpr back.
    return lambda: jax.make_jaxpr(lambda x: function(x))(argument)


if __name__ == "__main__":
    times = interleaved(
        {
            "assess, hand": traced(by_scipy, CHOICES),
            "assess, gjflax": traced(assessed, CHOICES),
            "gradient, hand": traced(jax.grad(by_scipy), CHOICES),
            "gradient, gjflax": traced(jax.grad(assessed), CHOICES),
            "simulate, hand": traced(sampled_by_hand, KEY),
            "simulate, gjflax": traced(lambda key: chain.simulate(key, ()), KEY),
        }
    )
    per_site = {name: statistics.median(seconds) / SITES * 1e3 for name, seconds in times.items()}
    for name in ("assess", "gradient", "simulate"):
        hand, ours = per_site[f"{name}, hand"], per_site[f"{name}, gjflax"]
        print(f"{name:9} hand {hand:.3f} ms, gjflax {ours:.3f} ms, added {ours - hand:+.3f} ms per site")
    for name, function in (("hand", by_scipy), ("gjflax", assessed)):
        forward = len(jax.make_jaxpr(function)(CHOICES).eqns) / SITES
        backward = len(jax.make_jaxpr(jax.grad(function))(CHOICES).eqns) / SITES
        print(f"equations per site, {name:6}: {forward:.1f}, with gradient {backward:.1f}")

"""A Metropolis step at one site of a model of M groups: what it costs as M grows, beside hand-written steps.

The model: mu ~ Normal(0, 1); z_i ~ Normal(mu, 1); y_i ~ Normal(z_i, 1). A scan carries the trace; every step proposes a new
z_i for one i, and accepts or rejects. All candidates carry choices, scores, arguments and return values for each element:

========  =========================================================================================
gjflax    ``update`` of one element, and ``choose``
plain     the two terms that mention z_i, by hand, written as one would
fenced    the same with a fence between what is read and what is written, so that XLA does not copy
full      the log density of the whole model in each step, by hand
========  =========================================================================================

All make the same moves, which is checked before they are timed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, ratio

from gjflax import Map, Normal, VectorChoiceMap, choose, gen, trace

STEPS = 20_000
FULL_STEPS = 500
SIZES = (100, 1_000, 10_000, 100_000)


@gen
def group(mu):
    z = trace("z", Normal)(mu, 1.0)
    return trace("y", Normal)(z, 1.0)


@functools.cache
def model_of(size):
    @gen
    def model():
        mu = trace("mu", Normal)(0.0, 1.0)
        return trace("groups", Map(group, repeats=size))(mu)

    return model


def log_normal(value, mean):
    return -0.5 * (value - mean) ** 2 - 0.5 * jnp.log(2 * jnp.pi)


def moves(size, steps):
    keys = jax.random.split(jax.random.key(1), 3)
    return (
        jax.random.randint(keys[0], (steps,), 0, size),
        jax.random.normal(keys[1], (steps,)),
        jnp.log(jax.random.uniform(keys[2], (steps,))),
    )


def by_update(size, tr, steps):
    """The chain with gjflax: the values of z, and how many moves were accepted."""
    model = model_of(size)

    def step(carry, move):
        tr, count = carry
        index, by, log_uniform = move
        value = tr["groups", "z"][index] + by
        choices = {"groups": VectorChoiceMap(index[None], {"z": value[None]})}
        _, (_, weight, new, _) = model.update(jax.random.key(0), tr, choices, ())
        accepted = log_uniform < weight
        return (choose(accepted, new, tr), count + accepted), None

    (tr, count), _ = jax.lax.scan(step, (tr, 0), moves(size, steps))
    return tr["groups", "z"], count


def no_fence(index, values):
    return values


def fence(index, values):
    """Behind it is written, before it read; no index is negative, which XLA does not know."""
    return jax.lax.cond(index < 0, lambda parts: jax.tree.map(jnp.negative, parts), lambda parts: parts, values)


def by_hand(separate, size, mu, z, y, steps):
    """The chain by hand, on the two terms that a move changes."""

    def step(carry, move):
        (z, mean, score_z, score_y, retval), count = carry
        index, by, log_uniform = move
        old, old_z, old_y = z[index], score_z[index], score_y[index]
        new = old + by
        new_z, new_y = log_normal(new, mu), log_normal(y[index], new)
        accepted = log_uniform < new_z + new_y - old_z - old_y
        chosen = [jnp.where(accepted, a, b) for a, b in ((new, old), (new_z, old_z), (new_y, old_y))]
        chosen, accepted = separate(index, (chosen, accepted.astype(jnp.int32)))
        value, one, other = chosen
        written = (
            z.at[index].set(value),
            mean.at[index].set(value),
            score_z.at[index].set(one),
            score_y.at[index].set(other),
            retval,
        )
        return (written, count + accepted), None

    start = (z, z + 0.0, log_normal(z, mu), log_normal(y, z), y + 0.0)
    ((z, *_), count), _ = jax.lax.scan(step, (start, 0), moves(size, steps))
    return z, count


def by_full_scoring(size, mu, z, y, steps):
    """The chain by hand, on the density of everything."""

    def density(z):
        return jnp.sum(log_normal(z, mu)) + jnp.sum(log_normal(y, z))

    def step(carry, move):
        z, score, count = carry
        index, by, log_uniform = move
        new = z.at[index].add(by)
        new_score = density(new)
        accepted = log_uniform < new_score - score
        return (jnp.where(accepted, new, z), jnp.where(accepted, new_score, score), count + accepted), None

    (z, _, count), _ = jax.lax.scan(step, (z, density(z), 0), moves(size, steps))
    return z, count


def measure(size, rounds=7):
    """Microseconds of a step by each way, and ratios to the fenced one: medians over interleaved rounds."""
    _, tr = jax.jit(model_of(size).simulate)(jax.random.key(0), ())
    mu, z, y = tr["mu"], tr["groups", "z"], tr["groups", "y"]
    full_steps = max(FULL_STEPS, STEPS // max(1, size // 100))
    ways = {
        "gjflax": (jax.jit(functools.partial(by_update, size, steps=STEPS)), (tr,), STEPS),
        "plain": (jax.jit(functools.partial(by_hand, no_fence, size, steps=full_steps)), (mu, z, y), full_steps),
        "fenced": (jax.jit(functools.partial(by_hand, fence, size, steps=STEPS)), (mu, z, y), STEPS),
        "full": (jax.jit(functools.partial(by_full_scoring, size, steps=full_steps)), (mu, z, y), full_steps),
    }
    ours, hand = ways["gjflax"], ways["fenced"]
    for got, want in zip(ours[0](*ours[1]), hand[0](*hand[1]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    times = interleaved(
        {name: lambda f=f, args=args: jax.block_until_ready(f(*args)) for name, (f, args, _) in ways.items()}, rounds
    )
    per_step = {name: [seconds / ways[name][2] * 1e6 for seconds in times[name]] for name in times}
    medians = {name: sorted(values)[len(values) // 2] for name, values in per_step.items()}
    return medians, {name: ratio(per_step, name, "fenced") for name in per_step}


def main():
    print(f"{'M':>8}  microseconds a step: gjflax, plain, fenced, full      gjflax/fenced")
    for size in SIZES:
        medians, ratios = measure(size)
        shown = "  ".join(f"{medians[name]:9.3f}" for name in ("gjflax", "plain", "fenced", "full"))
        print(f"{size:>8}  {shown}   {ratios['gjflax']:.2f}")


if __name__ == "__main__":
    main()

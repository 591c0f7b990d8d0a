"""Running time of compiled gjflax programs beside the same programs in hand-written JAX.

The model: x_mu, a, b uniform; x_i ~ Normal(x_mu, 1); y_i ~ Normal(a x_i + b, 1). Results are compared before they are timed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from timing import interleaved, ratio

from gjflax import Map, Normal, Uniform, choice_map, gen, select, trace

KEY = jax.random.key(0)
START = {"x_mu": jnp.float32(0.5), "a": jnp.float32(1.0), "b": jnp.float32(0.2)}


def line_of(size):
    @gen
    def line():
        x_mu = trace("x_mu", Uniform)(-3.0, 3.0)
        a = trace("a", Uniform)(-4.0, 4.0)
        b = trace("b", Uniform)(-3.0, 3.0)
        x = trace("x", Map(Normal, repeats=size))(x_mu, 1.0)
        return trace("y", Map(Normal, in_axes=(0, None)))(a * x + b, 1.0)

    return line


def log_density_by_hand(theta, x, y):
    inside = (jnp.abs(theta["x_mu"]) <= 3) & (jnp.abs(theta["a"]) <= 4) & (jnp.abs(theta["b"]) <= 3)
    dx, dy = x - theta["x_mu"], y - (theta["a"] * x + theta["b"])
    quadratic = -0.5 * (jnp.sum(dx * dx) + jnp.sum(dy * dy)) - x.shape[0] * jnp.log(2 * jnp.pi)
    return jnp.where(inside, quadratic - jnp.log(6.0 * 8.0 * 6.0), -jnp.inf)


def data(size):
    keys = jax.random.split(KEY)
    x = 1.0 + jax.random.normal(keys[0], (size,))
    return x, 2.0 * x - 1.0 + jax.random.normal(keys[1], (size,))


def compare(name, hand, ours, *args):
    hand, ours = jax.jit(hand), jax.jit(ours)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), hand(*args), ours(*args))
    repeats = 20
    run = {
        label: lambda f=f: jax.block_until_ready([f(*args) for _ in range(repeats)])
        for label, f in (("hand", hand), ("gjflax", ours))
    }
    times = interleaved(run, rounds=25)
    median = sorted(times["hand"])[len(times["hand"]) // 2] / repeats * 1e6
    print(f"{name:28} hand {median:10.1f} us   gjflax / hand {ratio(times, 'gjflax', 'hand'):.2f}")


def main():
    for size in (100, 10_000, 1_000_000):
        x, y = data(size)
        line = line_of(size)

        def ours(theta, x, y, line=line):
            return line.assess(KEY, {**theta, "x": x, "y": y}, ())[1][1]

        compare(
            f"value and gradient, n={size}",
            jax.value_and_grad(log_density_by_hand),
            jax.value_and_grad(ours),
            START,
            x,
            y,
        )

    x, y = data(100)
    line, selection = line_of(100), select(["x_mu", "a", "b"])
    _, (_, start) = line.importance(KEY, {**START, "x": x, "y": y}, ())

    def climb_by_hand(theta, x, y):
        def step(theta, _):
            gradient = jax.grad(log_density_by_hand)(theta, x, y)
            return jax.tree.map(lambda value, slope: value + 1e-4 * slope, theta, gradient), None

        return jax.lax.scan(step, theta, None, length=500)[0]

    def climb(tr):
        def step(tr, _):
            _, gradient = line.choice_grad(KEY, tr, selection)
            values = selection.filter(tr)[0]
            moved = jax.tree.map(lambda value, slope: value + 1e-4 * slope, values, gradient)
            _, (_, _, tr, _) = line.update(KEY, tr, moved, ())
            return tr, None

        return jax.lax.scan(step, tr, None, length=500)[0]

    compare(
        "500 MAP steps, n=100",
        lambda tr: climb_by_hand({name: tr[name] for name in START}, tr["x"], tr["y"]),
        lambda tr: choice_map(selection.filter(climb(tr))[0]).to_dict(),
        start,
    )


if __name__ == "__main__":
    main()

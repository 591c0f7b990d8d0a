"""Models whose traces are written by one process and read by another, which makes them anew from this file.

As a program, ``python saved_models.py <format> <folder> <name>...``, it is the reader: it restores what was written in the
folder, and writes the leaves of what it found, and what it computed with it, as NumPy arrays.
"""

from __future__ import annotations

import functools
import pathlib
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

import gjflax
from gjflax import Map, Normal, choice_map, gen, trace

KEY = jax.random.key(3)


@gen
def pair(mean):
    z = trace(("latent", "z"), Normal)(mean, 1.0)
    return trace("y", Normal)(z, 0.5)


class Network(gjflax.GenModule):
    @nn.compact
    def __call__(self, x):
        z = trace("z", Normal)(jnp.zeros(2), 1.0)
        return trace("y", Map(Normal, in_axes=(0, None)))(nn.Dense(3)(z) + x, 0.5)


@gen
def walk(time, position, scale):
    return trace("position", Normal)(position, scale)


@gen
def autoregression(level, x):
    level = trace("level", Normal)(0.5 * level + x, 1.0)
    return level, trace("count", gjflax.Poisson)(jnp.exp(level))


@gen
def named(style, key):
    """A string among the arguments, and a random key."""
    return trace("x", Normal)(jax.random.uniform(key) if style == "random" else 0.0, 1.0)


@gen
def heads(p):
    return trace("coin", gjflax.Bernoulli)(probs=p).astype(jnp.float32)


@gen
def learned(x, params):
    return trace("x", Normal)(params["mu"] * x, 1.0)


@gen
def nested(xs):
    outliers = trace("outliers", Map(gjflax.Mask(pair), in_axes=0))(xs > 0, xs)
    flags = trace("kinds", Map(gjflax.Bernoulli, repeats=2))(0.3)
    trace("noise", Map(gjflax.Cond(gjflax.Laplace, Normal), in_axes=(0, None, None)))(flags == 1, 0.0, 1.0)
    return trace("walks", Map(gjflax.Unfold(walk, 4), in_axes=(0, None, None)))(
        jnp.array([2, 4], jnp.int32), outliers.unmask(0.0)[0], 0.5
    )


MODELS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "distribution": (Normal, (jnp.float32(0.3), 2.0)),
    "body": (pair, (1.5,)),
    "network": (Network(), (jnp.float32(0.3),)),
    "structure": (named, ("random", jax.random.key(8))),
    "map": (Map(pair, in_axes=0), (jnp.arange(3.0),)),
    "map of maps": (Map(Map(Normal, in_axes=(0, None)), in_axes=(0, None)), (jnp.ones((2, 3)), 1.0)),
    "repeat": (gjflax.Repeat(heads, 4), (0.5,)),
    "unfold": (gjflax.Unfold(walk, 5), (5, 0.0, 0.1)),
    "unfold of any length": (gjflax.Unfold(walk, 5), (jnp.int32(3), 0.0, 0.1)),
    "scan": (gjflax.Scan(autoregression), (1.0, jnp.arange(3.0))),
    "switch": (
        gjflax.Switch((Normal, gjflax.StudentT), own_arguments=True),
        (jnp.int32(1), (0.0, 1.0), (3.0, 0.0, 1.0)),
    ),
    "cond": (gjflax.Cond(gjflax.Laplace, Normal), (True, 0.0, 2.0)),
    "mask": (gjflax.Mask(pair), (jnp.array(True), 0.5)),
    "mix": (gjflax.Mix((Normal, gjflax.Laplace)), (jnp.zeros(2), (0.0, 1.0), (1.0, 2.0))),
    "product": (gjflax.Product({"x": Normal, "n": gjflax.Poisson}), ((0.0, 2.0), (3.0,))),
    "random parameters": (gjflax.RandomParams(nn.Dense(3), (Normal, (0.0, 1.0)), "kernel"), (jnp.ones(2),)),
    "trained": (gjflax.TrainCombinator(learned, {"mu": 0.5}), (2.0,)),
    "flax module": (gjflax.FlaxModule(nn.Dense(3)), (jnp.ones(2),)),
    "choice at": (gjflax.ChoiceAt(Normal), (0.0, 1.0, jnp.int32(3))),
    "calls at": (Map(gjflax.CallAt(pair)), (jnp.arange(2.0), jnp.array([3, 5], jnp.int32))),
    "nested": (nested, (jnp.array([0.5, -1.0]),)),
}


def variables_of(name: str) -> Any:
    model, args = MODELS[name]
    return model.init(jax.random.key(1), *args)


def bound(name: str, variables: Any) -> Any:
    model, _ = MODELS[name]
    return model.bind(variables) if variables else model


def trace_of(name: str, variables: Any) -> Any:
    _, args = MODELS[name]
    return bound(name, variables).simulate(KEY, args)[1]


def everything(name: str) -> dict[str, Any]:
    """A trace, its choices, and the variables."""
    return jax.jit(lambda: _everything(name))()


def _everything(name: str) -> dict[str, Any]:
    variables = variables_of(name)
    made = trace_of(name, variables)
    return {"trace": made, "variables": variables, "choices": made.strip(), "key": jax.random.key(5)}


@functools.cache
def template(name: str) -> Any:
    """The structure of `everything`, of which no number is computed."""
    return jax.eval_shape(lambda: _everything(name))


def write(format: str, folder: pathlib.Path, name: str, saved: Any) -> None:
    place = folder / name.replace(" ", "_")
    if format == "flax":
        # A typed key of one's own is no part of what Flax can write.
        saved = {**saved, "key": jax.random.key_data(saved["key"])}
        place.with_suffix(".msgpack").write_bytes(serialization.to_bytes(saved))
        place.with_suffix(".choices").write_bytes(saved["choices"].to_bytes())
    else:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(place.with_suffix(".orbax"), saved)
            checkpointer.wait_until_finished()


def read(format: str, folder: pathlib.Path, name: str) -> Any:
    place, like = folder / name.replace(" ", "_"), dict(template(name))
    if format == "flax":
        like["key"] = jax.eval_shape(jax.random.key_data, like["key"])
        found = serialization.from_bytes(like, place.with_suffix(".msgpack").read_bytes())
        return {**found, "key": jax.random.wrap_key_data(jnp.asarray(found["key"]))}
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(place.with_suffix(".orbax"), like)


def numbers(tree: Any) -> list[np.ndarray]:
    """The leaves as arrays, of random keys the data."""
    leaves = jax.tree.leaves(tree)
    return [np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in leaves]


def computed(name: str, found: Any) -> Any:
    """What is done with a trace that was read: its score, and an update of it."""
    _, args = MODELS[name]

    def run(found: Any) -> Any:
        model = bound(name, found["variables"])
        _, (_, weight, new, _) = model.update(KEY, found["trace"], choice_map(), args)
        return found["trace"].get_score(), weight, new.get_score()

    return jax.jit(run)({part: found[part] for part in ("trace", "variables")})


def main(format: str, folder: pathlib.Path, names: list[str]) -> None:
    for name in names:
        found = read(format, folder, name)
        assert jax.tree.structure(found) == jax.tree.structure(template(name)), name
        arrays = [*numbers(found), *map(np.asarray, computed(name, found))]
        np.savez(folder / f"{name.replace(' ', '_')}.npz", *arrays)
        if format == "flax":
            data = (folder / name.replace(" ", "_")).with_suffix(".choices").read_bytes()
            assert gjflax.ChoiceMap.from_bytes(data) == found["choices"], name


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3:])

"""What one process writes another one reads: traces, choice maps and variables, by Flax's serialisation and by orbax."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved_models
from flax import serialization

import gjflax
from gjflax import ArgumentError, Map, Masked, Normal, VectorChoiceMap, choice_map

FEW = ["network", "structure"]
COMPUTED = ["choice at", "calls at", "unfold of any length", "mask", "switch"]


def read_elsewhere(format: str, folder: pathlib.Path, names: list[str]) -> None:
    """Another process restores everything and says what it found."""
    program = pathlib.Path(saved_models.__file__)
    result = subprocess.run(
        [sys.executable, str(program), format, str(folder), *names],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]


def check(format: str, folder: pathlib.Path, names: list[str]) -> None:
    saved = {name: saved_models.everything(name) for name in names}
    for name in names:
        saved_models.write(format, folder, name, saved[name])
    read_elsewhere(format, folder, names)
    for name in names:
        found = list(np.load(folder / f"{name.replace(' ', '_')}.npz").values())
        expected = saved_models.numbers(saved[name])
        for one, other in zip(found[:-3], expected, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)
            assert one.dtype == other.dtype
        score = saved[name]["trace"].get_score()
        # The same numbers, added up in another program: an update that changes nothing weighs nothing.
        np.testing.assert_allclose(found[-3:], [score, 0.0, score], rtol=1e-6, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("format", ["flax", "orbax"])
def test_another_process_reads_all_of_it(format: str, tmp_path: pathlib.Path):
    check(format, tmp_path, list(saved_models.MODELS))


def test_another_process_reads_what_flax_wrote(tmp_path: pathlib.Path):
    check("flax", tmp_path, FEW)


# Within one process --------------------------------------------------------------------------------------------------


def round_trip(value: Any, template: Any) -> Any:
    return serialization.from_bytes(template, serialization.to_bytes(value))


def test_random_keys_survive():
    args = ("random", jax.random.split(jax.random.key(8))[0])
    _, made = saved_models.named.simulate(jax.random.key(0), args)
    like = jax.eval_shape(lambda: made)
    for template in (like, jax.tree.map(lambda leaf: leaf, made)):
        restored = round_trip(made, template)
        assert restored.get_args()[0] == "random"
        assert restored.get_args()[1] == args[1], "the key is one again, of the same implementation"
        assert jax.tree.structure(restored) == jax.tree.structure(made)
    other = jax.random.key(8, impl="rbg")
    choices = choice_map({"k": gjflax.ValueChoiceMap(other)})
    restored = round_trip(choices, jax.eval_shape(lambda: choices))
    assert jax.random.key_impl(restored["k"]) == jax.random.key_impl(other)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in COMPUTED else pytest.mark.slow) for name in sorted(saved_models.MODELS)],
)
def test_the_choices_of_a_template_are_a_template_of_the_choices(name: str):
    """Also where they say more than the arrays of the trace: flags, the axis of a key."""
    like = saved_models.template(name)
    choices = like["trace"].strip()
    assert jax.tree.structure(choices) == jax.tree.structure(like["choices"])
    assert jax.tree.leaves(choices) == jax.tree.leaves(like["choices"])
    made = {part: saved_models.everything(name)[part] for part in ("trace", "choices")}
    restored = round_trip(made, {"trace": like["trace"], "choices": choices})
    assert restored["choices"] == made["choices"] == restored["trace"].strip()


def test_state_dicts_have_the_names_of_fields():
    _, made = Map(saved_models.pair, in_axes=0).simulate(jax.random.key(0), (jnp.arange(3.0),))
    state = serialization.to_state_dict(made)
    assert sorted(state) == ["args", "inner"]
    assert sorted(state["inner"]["choices"]) == ["latent/z", "y"]
    restored = serialization.from_state_dict(made, state)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), restored, made))


@pytest.mark.parametrize(
    "choices",
    [
        choice_map({"a": jnp.arange(2.0), "b": Masked(jnp.ones(2), jnp.array([True, False]))}),
        choice_map({"y": VectorChoiceMap([3, 1], {"x": jnp.ones(2)})}),
        choice_map({"y": VectorChoiceMap(jnp.array([3, 1]), {"x": jnp.ones(2)})}),
    ],
    ids=["masked", "static indices", "array indices"],
)
def test_choice_maps_survive_flax(choices: Any):
    assert round_trip(choices, jax.eval_shape(lambda: choices)) == choices


def test_a_template_of_other_shapes_is_refused():
    model = Map(Normal, in_axes=(0, None))
    made = [model.simulate(jax.random.key(0), (jnp.zeros(n), 1.0))[1] for n in (3, 4)]
    with pytest.raises(ArgumentError, match=r"MapTrace.args has the shape \(3,\), and the template's has \(4,\)"):
        round_trip(made[0], made[1])


def test_a_template_of_another_kind_is_refused():
    _, one = Normal.simulate(jax.random.key(0), (0.0, 1.0))
    _, other = saved_models.pair.simulate(jax.random.key(0), (0.0,))
    with pytest.raises(
        ArgumentError, match="a BuiltinTrace has the parts args, retval, choices, and saved are args, score, val"
    ):
        round_trip(one, other)

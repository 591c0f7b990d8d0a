"""`render_model`: texts, pictures, files."""

from __future__ import annotations

import functools
import pathlib

import flax.linen as nn
import jax.numpy as jnp
import pytest

import gjflax
from gjflax import Normal, Scan, gen, trace
from gjflax.visualization.render import RenderedModel


@gen
def step(carry, x):
    z = trace("z", Normal)(carry, 1.0)
    v = trace("v", Normal)(z + x, 1.0)
    return v, trace("y", Normal)(nn.Dense(1)(v[None])[0], 1.0)


@gen
def model(xs):
    start = trace("start", Normal)(0.0, 1.0)
    last, _ = trace("run", Scan(step))(start, xs)
    return trace("end", gjflax.Cond(Normal, gjflax.Cauchy))(last > 0, 0.0, 1.0)


@functools.cache
def rendered() -> RenderedModel:
    return gjflax.render_model(model, (jnp.arange(3.0),), observed=("run", "y"))


@pytest.fixture(autouse=True)
def _matplotlib() -> None:
    pytest.importorskip("matplotlib")


@pytest.mark.parametrize(
    "name, start",
    [
        ("model.png", b"\x89PNG"),
        ("model.svg", b"<?xml"),
        ("model.pdf", b"%PDF"),
        ("model.PNG", b"\x89PNG"),
        ("model.dot", b"digraph model {"),
        ("model.gv", b"digraph model {"),
        ("model.mmd", b"flowchart TB"),
        ("model.mermaid", b"flowchart TB"),
    ],
)
def test_files(name: str, start: bytes, tmp_path: pathlib.Path):
    rendered().save(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_other_files_are_refused(tmp_path: pathlib.Path):
    with pytest.raises(gjflax.ArgumentError, match=r"saved as .png, .svg or .pdf.*model.jpeg"):
        rendered().save(tmp_path / "model.jpeg")


def test_the_picture_has_all_names():
    svg = rendered()._repr_svg_()
    assert svg is not None and svg == rendered()._repr_svg_(), "the same graph gives the same file"
    for word in ("start", ">z<", ">v<", ">y<", "xs", "Dense_0", "run: 3 steps", "end: Cond", "then", "Cauchy", "t−1"):
        assert word in svg, word
    assert "#bcc6cf" in svg, "y is shaded"


def test_the_picture_is_as_large_as_its_layout():
    figure = rendered().figure()
    width, height = figure.get_size_inches()
    assert 2 < width < 12 and 3 < height < 12


def test_it_is_shown_as_text_without_a_notebook():
    assert repr(rendered()) == rendered().mermaid
    assert rendered().graphviz.startswith("digraph")


def test_an_error_names_what_is_wrong():
    with pytest.raises(gjflax.CalleeError, match="Expected a generative function"):
        gjflax.render_model(nn.Dense(3), (jnp.ones(2),))

"""A user's own kind of generative function: five methods, and the rest derives from them."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gjflax
from gjflax import Diff, GenerativeFunction, Map, Normal, Trace, choice_map, gen, select, trace
from gjflax.core.diff import unknown_change

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True, repr=False)
class ShiftTrace(Trace):
    gen_fn: Any = gjflax.static_field()
    args: Any
    inner: Any

    def get_gen_fn(self):
        return self.gen_fn

    def get_args(self):
        return self.args

    def get_retval(self):
        return self.inner.get_retval() + self.args[0]

    def project(self, selection):
        return self.inner.project(selection)

    def strip(self):
        return self.inner.strip()

    def leaves(self, prefix=()):
        return self.inner.leaves(prefix)

    def unconstrain(self, selection):
        return self.inner.unconstrain(selection)


class Shift(GenerativeFunction):
    """Adds its first argument to what the inner function returns; the rest goes to the inner function."""

    inner: Any

    def simulate(self, key, args):
        key, inner = self.inner.simulate(key, args[1:])
        return key, ShiftTrace(self.as_unbound(), args, inner)

    def importance(self, key, choices, args, **options):
        key, (weight, inner) = self.inner.importance(key, choices, args[1:], **options)
        return key, (weight, ShiftTrace(self.as_unbound(), args, inner))

    def assess(self, key, choices, args, **options):
        key, (retval, score) = self.inner.assess(key, choices, args[1:], **options)
        return key, (retval + args[0], score)

    def update(self, key, trace, choices, argdiffs, **options):
        key, (_, weight, inner, discard) = self.inner.update(key, trace.inner, choices, argdiffs[1:], **options)
        new = ShiftTrace(self.as_unbound(), Diff.primal(argdiffs), inner)
        return key, (unknown_change(new.get_retval()), weight, new, discard)

    def regenerate(self, key, trace, selection, argdiffs, **options):
        key, (_, weight, inner) = self.inner.regenerate(key, trace.inner, selection, argdiffs[1:], **options)
        new = ShiftTrace(self.as_unbound(), Diff.primal(argdiffs), inner)
        return key, (unknown_change(new.get_retval()), weight, new)

    def constrain(self, unconstrained, args, *, fixed=None):
        return self.inner.constrain(unconstrained, args[1:], fixed=fixed)


class Network(gjflax.GenModule):
    @nn.compact
    def __call__(self, x):
        z = trace("z", Normal)(0.0, 1.0)
        return trace("y", Normal)(nn.Dense(2)(x * z), 0.5)


X = jnp.array([1.0, -2.0, 0.5])
SHIFT = jnp.array([10.0, 20.0])


def test_it_composes_with_everything():
    """Mapped, called from a body, learned and with parameters, it is the inner function but for the shift."""

    class Model(gjflax.GenModule):
        @nn.compact
        def __call__(self, shifts, x):
            one = trace("one", Shift(Network()))(shifts[0], x)
            many = trace("many", Map(Shift(Network()), in_axes=(0, None)))(shifts, x)
            return one, many

    shifts = jnp.stack([SHIFT, 2 * SHIFT])
    model = Model()

    @jax.jit
    def run(key):
        bound = model.bind(model.init(key, shifts, X))
        key, tr = bound.simulate(key, (shifts, X))
        _, assessed = bound.assess(key, tr, (shifts, X))
        _, (_, weight, new, discard) = bound.update(key, tr, changed, (shifts, X))
        _, (_, back, again, _) = bound.update(key, new, discard, (shifts, X))
        return tr, assessed, (weight, new, discard), (back, again)

    changed = {"one": {"z": 0.3}, ("many", 1, "z"): -0.4}
    tr, (retval, score), (weight, new, discard), (back, again) = run(KEY)
    one, many = tr.get_retval()
    np.testing.assert_allclose(one, tr["one", "y"] + SHIFT, rtol=1e-6)
    np.testing.assert_allclose(many, tr["many", "y"] + shifts, rtol=1e-6)
    np.testing.assert_allclose(score, tr.get_score(), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, retval, tr.get_retval())
    np.testing.assert_allclose(weight, new.get_score() - tr.get_score(), rtol=1e-4, atol=1e-5)
    assert discard["many", 1, "z"] == tr["many", 1, "z"]
    np.testing.assert_allclose(back, -weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(again["many", "z"], tr["many", "z"])


def test_what_derives_from_the_five_methods():
    model = Shift(Network())
    variables = model.init(KEY, SHIFT, X)
    assert set(variables["params"]) == {"inner"}
    bound = model.bind(variables)
    key, (choices, score, retval) = bound.propose(KEY, (SHIFT, X))
    _, tr = bound.simulate(KEY, (SHIFT, X))
    assert choices == tr.strip() and score == tr.get_score()
    np.testing.assert_array_equal(retval, tr.get_retval())

    def density(z, shift=SHIFT, params=variables["params"]):
        mean = X * z @ params["inner"]["Dense_0"]["kernel"] + params["inner"]["Dense_0"]["bias"]
        norm = jax.scipy.stats.norm.logpdf
        return norm(z) + norm(tr["y"], mean, 0.5).sum()

    _, grads = bound.choice_grad(key, tr, select("z"))
    np.testing.assert_allclose(grads["z"], jax.grad(density)(tr["z"]), rtol=1e-5)
    _, grads = bound.arg_grad(key, tr, 0)
    np.testing.assert_array_equal(grads, jnp.zeros(2))
    _, grads = model.param_grad(key, tr, variables["params"])
    want = jax.grad(density, argnums=2)(tr["z"], SHIFT, variables["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, want)
    _, logpdf = model.score_params(key, tr, jax.tree.map(lambda p: 2 * p, variables["params"]))
    want = density(tr["z"], params=jax.tree.map(lambda p: 2 * p, variables["params"]))
    np.testing.assert_allclose(logpdf, want, rtol=1e-5)
    _, weight = bound.project(key, tr, select("z"))
    np.testing.assert_allclose(weight, jax.scipy.stats.norm.logpdf(tr["z"]), rtol=1e-5)
    free, log_det = bound.unconstrain(tr, select("z"))
    chm, back = bound.constrain(free, (SHIFT, X), fixed=select("y").filter(tr)[0])
    np.testing.assert_allclose(chm["z"], tr["z"], rtol=1e-6)
    np.testing.assert_allclose(back, -log_det)
    forward = model.apply(variables, SHIFT, X, rngs={"choice": KEY})
    assert forward.shape == (2,)
    _, score_of, retval_of = bound.unzip(key, select("y").filter(tr)[0])
    np.testing.assert_allclose(score_of({"z": 0.7}, SHIFT, X), density(0.7), rtol=1e-5)
    np.testing.assert_allclose(retval_of({"z": 0.7}, SHIFT, X), tr.get_retval(), rtol=1e-6)


def test_interface_methods_cannot_be_compact():
    with pytest.raises(TypeError, match="simulate.*compact"):

        class Bad(GenerativeFunction):
            @nn.compact
            def simulate(self, key, args):
                return key, None


def test_a_key_may_be_given_by_name():
    _, one = Normal.simulate(key=KEY, args=(0.0, 1.0))
    _, two = Normal.simulate(KEY, (0.0, 1.0))
    _, three = Normal.simulate(KEY, args=(0.0, 1.0))
    assert one[()] == two[()] == three[()]
    legacy, _ = Normal.simulate(key=jax.random.PRNGKey(0), args=(0.0, 1.0))
    assert legacy.dtype == jnp.uint32


def test_arguments_of_all_kinds_are_kept():
    """What is no number is structure: a name, a function, a flag of a body's own making."""

    @gen
    def body(mode, activation, x, nothing, table):
        mean = activation(x) if mode == "warm" else x
        return {"y": trace("y", Normal)(mean + table["shift"][0], 1.0), "mode": mode, "none": None}

    args = ("warm", jnp.tanh, 2.0, None, {"shift": [1.0]})
    key, tr = jax.jit(lambda key, x: body.simulate(key, ("warm", jnp.tanh, x, None, {"shift": [1.0]})))(KEY, 2.0)
    assert tr.get_args()[0] == "warm" and tr.get_args()[1] is jnp.tanh and tr.get_args()[3] is None
    assert tr.get_retval()["mode"] == "warm" and tr.get_retval()["none"] is None
    np.testing.assert_allclose(tr.get_score(), jax.scipy.stats.norm.logpdf(tr["y"], np.tanh(2.0) + 1.0, 1.0), rtol=1e-5)
    _, (retdiff, weight, new, _) = body.update(key, tr, {}, ("cold", *args[1:]))
    assert new.get_args()[0] == "cold" and Diff.primal(retdiff)["mode"] == "cold"
    norm = jax.scipy.stats.norm.logpdf
    np.testing.assert_allclose(weight, norm(tr["y"], 3.0) - norm(tr["y"], np.tanh(2.0) + 1.0), rtol=1e-4)
    _, grads = body.arg_grad(key, tr, (2, 4))
    np.testing.assert_allclose(grads[1]["shift"][0], tr["y"] - np.tanh(2.0) - 1.0, rtol=1e-4)


def test_scores_of_two_dtypes_add_up():
    """Double precision where a part of the model asks for it, under strict promotion."""

    @gen
    def model():
        fine = trace("fine", Normal)(jnp.float64(0.5), jnp.float64(1.0))
        return trace("coarse", Normal)(fine.astype(jnp.float32), jnp.float32(1.0))

    with jax.enable_x64(True):
        key, tr = model.simulate(jax.random.key(0), ())
        assert tr["fine"].dtype == jnp.float64 and tr["coarse"].dtype == jnp.float32
        assert tr.get_score().dtype == jnp.float64
        _, (_, weight, _, _) = model.update(key, tr, {"fine": 0.25, "coarse": 1.0}, ())
        norm = jax.scipy.stats.norm.logpdf
        want = norm(0.25, 0.5) + norm(1.0, 0.25) - tr.get_score()
        np.testing.assert_allclose(weight, want, rtol=1e-6)


def test_a_batch_of_traces_is_one_trace():
    @gen
    def model():
        scale = trace("scale", gjflax.Exponential)(1.0)
        return trace("y", Map(Normal, in_axes=(0, None)))(jnp.arange(3.0), scale)

    def ask(tr):
        return tr.get_score(), tr.project(select("y")), tr.unconstrain(gjflax.AllSelection())

    _, batch = jax.vmap(lambda key: model.simulate(key, ()))(jax.random.split(KEY, 4))
    assert batch["y"].shape == (4, 3)
    together, one_by_one = jax.jit(ask)(batch), jax.jit(jax.vmap(ask))(batch)
    assert together[0].shape == (4,)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), together, one_by_one)


def test_a_choice_map_may_be_made_of_a_batch():
    chm = jax.vmap(lambda x: choice_map({"a": x}))(jnp.arange(3.0))
    np.testing.assert_array_equal(chm["a"], jnp.arange(3.0))

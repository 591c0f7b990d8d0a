"""`Mix` against sums over its components by hand in NumPy."""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.branches import KEY, KEYS, X, close, leaf_types, norm, same, total, values
from scipy import special, stats

from gjflax import (
    AllSelection,
    ArgumentError,
    BranchMismatchError,
    Exponential,
    GenModule,
    Map,
    Masked,
    MissingChoiceError,
    Mix,
    Normal,
    UnvisitedConstraintError,
    choose,
    gen,
    select,
    trace,
)

# Three components: all have the vector "y", the first and the last "scale", the last alone "shift".


@gen
def scaled(loc):
    scale = trace("scale", Exponential)(0.7)
    return trace("y", Normal)(loc + jnp.array([0.0, 1.0]), 0.3 + scale)


@gen
def fixed(loc, scale):
    return trace("y", Normal)(loc, scale * jnp.array([1.0, 2.5]))


@gen
def shifted(loc):
    shift = trace("shift", Normal)(loc, 3.0)
    return trace("y", Normal)(jnp.stack([shift, -shift]), 0.2 + trace("scale", Exponential)(2.0))


mix = Mix((scaled, fixed, shifted))
LOGITS = jnp.array([0.3, -0.5, 1.1])
ARGS = (LOGITS, (jnp.float32(0.5),), (jnp.float32(-1.0), jnp.float32(1.6)), (jnp.float32(0.2),))
OTHER = (LOGITS * 2.0, (jnp.float32(-0.5),), (jnp.float32(1.0), jnp.float32(0.6)), (jnp.float32(1.2),))
OF_COMPONENT = [{"y", "scale"}, {"y"}, {"y", "scale", "shift"}]
GIVEN = {"y": jnp.array([0.4, -1.2]), "scale": 0.9, "shift": -0.3}


def terms(c: dict[Any, Any], args: Any) -> dict[Any, np.ndarray]:
    logits, (a,), (b, s), (d,) = jax.tree.map(np.float64, args)
    k = int(c["component",])
    c = {address[1:]: np.float64(value) for address, value in c.items()}
    y = c["y",]
    result = {("component",): special.log_softmax(logits)[k]}
    if k == 0:
        result |= {("value", "scale"): stats.expon.logpdf(c["scale",], scale=1 / 0.7)}
        result |= {("value", "y"): norm(y, a + np.array([0, 1]), 0.3 + c["scale",])}
    elif k == 1:
        result |= {("value", "y"): norm(y, b, s * np.array([1.0, 2.5]))}
    else:
        result |= {("value", "scale"): stats.expon.logpdf(c["scale",], scale=0.5)}
        result |= {("value", "shift"): norm(c["shift",], d, 3.0)}
        result |= {("value", "y"): norm(y, c["shift",] * np.array([1, -1]), 0.2 + c["scale",])}
    return result


def addresses(component: int) -> set[Any]:
    return {("component",), *(("value", name) for name in OF_COMPONENT[component])}


@jax.jit
def start(key: Any, component: Any, args: Any) -> Any:
    return mix.importance(key, {"component": component}, args)[1]


@jax.jit
def move(key: Any, tr: Any, component: Any, args: Any) -> Any:
    """Another component; nothing of it is given, or one value that may be new."""
    _, (_, weight, new, discard) = mix.update(key, tr, {"component": component}, args)
    masked = Masked(GIVEN["scale"], component != 1)
    _, given = mix.update(key, tr, {"component": component, "value": {"scale": masked}}, args)
    return (weight, new, discard), given[1:]


@pytest.mark.parametrize("component", range(3))
def test_the_density_is_the_weight_times_the_component(component: int):
    weight, tr = start(KEYS[0], component, ARGS)
    here = values(tr.strip())
    assert here.keys() == addresses(component)
    parts = terms(here, ARGS)
    close(weight, parts["component",])
    close(tr.get_score(), total(parts))
    for address in parts:
        close(tr.project(select(address)), total(parts, of=[address]))
    np.testing.assert_array_equal(tr.get_retval(), here["value", "y"])
    _, (retval, score) = jax.jit(lambda choices, args: mix.assess(KEY, choices, args))(tr.strip(), ARGS)
    close(score, total(parts))
    np.testing.assert_array_equal(retval, tr.get_retval())


def test_the_indicator_follows_the_weights():
    components = jax.jit(jax.vmap(lambda key: mix.simulate(key, ARGS)[1]["component"]))(jax.random.split(KEY, 4000))
    exact = special.softmax(np.float64(LOGITS))
    frequencies = np.bincount(components, minlength=3) / 4000
    # 4000 draws, within 4 standard errors.
    assert np.all(np.abs(frequencies - exact) < 4 * np.sqrt(exact * (1 - exact) / 4000))


@pytest.mark.parametrize("old, new", list(itertools.product(range(3), range(3))))
def test_update_to_another_component(old: int, new: int):
    _, before = start(KEYS[0], old, ARGS)
    was = values(before.strip())
    for with_scale, (weight, after, discard) in enumerate(move(KEYS[1], before, new, OTHER)):
        now = values(after.strip())
        assert now.keys() == addresses(new)
        given = {("component",)} | ({("value", "scale")} if with_scale and new != 1 else set())
        drawn = now.keys() - was.keys() - given
        new_terms, old_terms = terms(now, OTHER), terms(was, ARGS)
        close(weight, total(new_terms) - total(new_terms, of=drawn) - total(old_terms))
        close(after.get_score(), total(new_terms))
        lost = {address: value for address, value in was.items() if address not in now or address in given}
        same(values(discard), lost)
        assert leaf_types(after) == leaf_types(before)


@pytest.mark.parametrize("old", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_regenerate_of_the_indicator_keeps_the_value(old: int):
    """The weight is log p(y | k') − log p(y | k), whatever the weights: the redrawn indicator adds nothing."""
    _, before = start(KEYS[0], old, ARGS)
    was = values(before.strip())
    run = jax.jit(jax.vmap(lambda key: mix.regenerate(key, before, select("component"), ARGS)[1][1:]))
    weights, traces = run(jax.random.split(KEYS[1], 12))
    seen = set()
    for number in range(12):
        now = values(jax.tree.map(lambda leaf, number=number: leaf[number], traces.strip()))
        component = int(now["component",])
        seen.add(component)
        assert now.keys() == addresses(component)
        kept = (now.keys() & was.keys()) - {("component",)}
        same({address: now[address] for address in kept}, {address: was[address] for address in kept})
        close(weights[number], total(terms(now, ARGS), of=kept) - total(terms(was, ARGS), of=kept))
    assert len(seen) == 3


# The indicator summed out --------------------------------------------------------------------------------------------

normals = Mix((Normal, Normal, Normal))
NORMAL_ARGS = (LOGITS, (0.0, 1.0), (2.0, 0.4), (-1.0, 3.0))


def log_joints(y: Any, args: Any) -> np.ndarray:
    logits, *own = jax.tree.map(np.float64, args)
    return special.log_softmax(logits) + np.array([np.sum(norm(y, *one)) for one in own])


@pytest.mark.parametrize("y", [0.3, 2.5, -40.0])
def test_marginal_and_posterior_by_enumeration(y: float):
    joints = log_joints(y, NORMAL_ARGS)
    key, marginal = normals.log_marginal(KEY, y, NORMAL_ARGS)
    close(marginal, special.logsumexp(joints))
    _, posterior = normals.log_posterior(KEY, y, NORMAL_ARGS)
    np.testing.assert_allclose(posterior, joints - special.logsumexp(joints), rtol=1e-4, atol=1e-4)
    # It is what assess gives, summed.
    scores = [normals.assess(KEY, {"component": k, "value": y}, NORMAL_ARGS)[1][1] for k in range(3)]
    close(marginal, special.logsumexp(np.float64(scores)))


def test_the_gradient_of_the_marginal_with_a_component_of_weight_0():
    def marginal(logits, loc):
        args = (logits, (loc, 1.0), (2.0, 0.4), (-1.0, 3.0))
        return normals.log_marginal(KEY, 0.7, args)[1]

    logits = jnp.array([0.3, -jnp.inf, 1.1])
    in_logits, in_loc = jax.grad(marginal, argnums=(0, 1))(logits, jnp.float32(0.5))
    joints = np.float64([0.3, -np.inf, 1.1]) + [norm(0.7, 0.5, 1.0), 0.0, norm(0.7, -1.0, 3.0)]
    posterior = special.softmax(joints)
    np.testing.assert_allclose(in_logits, posterior - special.softmax(np.float64(logits)), atol=1e-5)
    np.testing.assert_allclose(in_loc, posterior[0] * 0.2, rtol=1e-4)
    _, tr = normals.simulate(KEY, (logits, *NORMAL_ARGS[1:]))
    assert tr["component"] != 1


def test_metropolis_hastings_on_the_indicator_samples_its_posterior():
    """The acceptance ratio of a flip: a weight of 0 would sample the prior."""
    y = jnp.float32(1.3)
    _, (_, tr) = normals.importance(KEY, {"component": 2, "value": y}, NORMAL_ARGS)

    def chain(key):
        def step(tr, key):
            one, two = jax.random.split(key)
            _, (_, weight, new) = normals.regenerate(one, tr, select("component"), NORMAL_ARGS)
            return choose(jnp.log(jax.random.uniform(two)) < weight, new, tr), None

        return jax.lax.scan(step, tr, jax.random.split(key, 30))[0]

    last = jax.jit(jax.vmap(chain))(jax.random.split(KEYS[2], 2000))
    assert np.all(last["value"] == y)
    exact = special.softmax(log_joints(y, NORMAL_ARGS))
    frequencies = np.bincount(last["component"], minlength=3) / 2000
    # The last states of 2000 chains, which are independent: within 4 standard errors.
    assert np.all(np.abs(frequencies - exact) < 4 * np.sqrt(exact * (1 - exact) / 2000))
    prior = special.softmax(np.float64(LOGITS))
    assert np.any(np.abs(frequencies - prior) > 8 * np.sqrt(prior * (1 - prior) / 2000))


def test_far_out_of_a_component_it_is_left_and_never_entered():
    """30 standard deviations."""
    two = Mix((Normal, Normal))
    args = (jnp.zeros(2), (0.0, 1.0), (30.0, 1.0))
    _, (_, tr) = two.importance(KEY, {"component": 0, "value": 30.0}, args)
    _, (_, there, moved, _) = two.update(KEY, tr, {"component": 1}, args)
    close(there, 450.0)
    _, (_, back, again, _) = two.update(KEY, moved, {"component": 0}, args)
    close(back, -450.0)
    close(again.get_score(), np.float64(tr.get_score()))
    close(np.float64(moved.get_score()) - np.float64(there), np.float64(tr.get_score()))


@pytest.mark.slow
def test_a_mixture_for_each_element():
    each = Map(normals, in_axes=(None, 0, None, None))
    args = (LOGITS, (jnp.arange(4.0), jnp.ones(4)), (2.0, 0.4), (-1.0, 3.0))
    _, tr = jax.jit(lambda key: each.simulate(key, args))(KEY)

    def by_hand(components, y):
        own = [norm(y, np.arange(4), 1.0), norm(y, 2.0, 0.4), norm(y, -1.0, 3.0)]
        return special.log_softmax(np.float64(LOGITS))[components] + np.choose(components, own)

    components, y = np.asarray(tr["component"]), np.float64(tr["value"])
    close(tr.get_score(), by_hand(components, y).sum())
    flipped = (components + 1) % 3
    update = jax.jit(lambda tr, component: each.update(KEY, tr, {(2, "component"): component}, args)[1])
    _, weight, new, discard = update(tr, jnp.asarray(flipped[2]))
    close(weight, by_hand(flipped, y)[2] - by_hand(components, y)[2])
    np.testing.assert_array_equal(new["value"], tr["value"])
    assert discard[2, "component"] == components[2] and new["component"][2] == flipped[2]


# Parameters ----------------------------------------------------------------------------------------------------------


class Net(GenModule):
    width: int = 2

    @nn.compact
    def __call__(self, x):
        return trace("y", Normal)(nn.Dense(2)(nn.tanh(nn.Dense(self.width)(x))), 0.5)


nets = Mix([Net(), Net(3)])


def test_parameters_of_the_components(no_leaks: Any):
    args = (jnp.zeros(2), (X,), (X + 1.0,))
    shapes = no_leaks(lambda: jax.tree.map(jnp.shape, jax.eval_shape(lambda: nets.init(KEY, *args))))
    assert shapes["params"].keys() == {"components_0", "components_1"}
    assert shapes["params"]["components_1"]["Dense_1"]["kernel"] == (3, 3)
    variables = nets.init(KEY, *args)
    bound = nets.bind(variables)

    def mean(number, x):
        params = jax.tree.map(np.float64, variables["params"][f"components_{number}"])
        # The outer layer is made first.
        second, first = params["Dense_0"], params["Dense_1"]
        hidden = np.tanh(np.float64(x) @ first["kernel"] + first["bias"])
        return hidden @ second["kernel"] + second["bias"]

    y = jnp.array([0.5, -0.2])
    joints = [np.log(0.5) + norm(y, mean(number, X + number), 0.5).sum() for number in range(2)]
    _, marginal = bound.log_marginal(KEY, {"y": y}, args)
    close(marginal, special.logsumexp(joints))
    _, (weight, tr) = bound.importance(KEY, {"component": 1, "value": {"y": y}}, args)
    close(weight, joints[1])
    # Unbound and in another module the parameters go as in any.
    _, applied = nets.apply(variables, KEY, {"y": y}, args, method="log_marginal")
    close(applied, marginal)
    _, gradient = nets.param_grad(KEY, tr, variables["params"])
    assert np.all(jax.tree.leaves(gradient["components_0"])[0] == 0.0)
    residual = (np.float64(y) - mean(1, X + 1)) / 0.25
    np.testing.assert_allclose(gradient["components_1"]["Dense_0"]["bias"], residual, rtol=1e-4)


# Bad input -----------------------------------------------------------------------------------------------------------


@gen
def scalar_y(x):
    return trace("y", Normal)(x, 1.0)


@pytest.mark.parametrize(
    "args, match",
    [
        ((jnp.zeros(3), (0.0,), (0.0,)), r'Mix at "m" have shape \(3,\), and it has 2 components'),
        ((jnp.zeros((4, 2)), (0.0,), (0.0,)), r"shape \(4, 2\).*use `Map`"),
        ((0.5, (0.0,), (0.0,)), r"shape \(\)"),
        ((jnp.zeros(2), (0.0,)), "one tuple of arguments for each component, 2 in all; got 1"),
        ((jnp.zeros(2), 0.0, 0.0), "one tuple of arguments for each component.*got float"),
    ],
)
def test_arguments_that_do_not_fit(args: Any, match: str):
    two = Mix((scalar_y, scalar_y))
    for method in ("simulate", "log_marginal", "log_posterior"):
        # The methods that sum the indicator out have no address, and say the same.
        call = gen(lambda: trace("m", two)(*args)).simulate if method == "simulate" else getattr(two, method)
        arguments = (KEY, ()) if method == "simulate" else (KEY, {"y": 0.0}, args)
        with pytest.raises(ArgumentError, match=match if method == "simulate" else None):
            jax.eval_shape(lambda call=call, arguments=arguments: call(*arguments))


def test_components_that_do_not_fit():
    with pytest.raises(BranchMismatchError, match="return different things"):
        Mix((scalar_y, fixed)).simulate(KEY, (jnp.zeros(2), (0.0,), (0.0, 1.0)))
    with pytest.raises(ArgumentError, match="`Mix` takes a tuple of generative functions"):
        Mix(())
    with pytest.raises(ArgumentError, match="`Mix` takes a tuple of generative functions"):
        Mix(scalar_y)
    with pytest.raises(ArgumentError, match="Is @gen missing"):
        Mix((scalar_y, abs))


def test_values_that_are_not_those_of_every_component():
    with pytest.raises(MissingChoiceError, match='"scale"'):
        mix.log_marginal(KEY, {"y": jnp.zeros(2)}, ARGS)
    with pytest.raises(UnvisitedConstraintError, match='"scale"'):
        mix.log_marginal(KEY, {"y": jnp.zeros(2), "scale": 1.0}, ARGS)
    _, tr = start(KEY, 1, ARGS)
    with pytest.raises(UnvisitedConstraintError, match=r'\("value", "shfit"\).*Did you mean \("value", "shift"\)'):
        mix.update(KEY, tr, {"value": {"shfit": 1.0}}, ARGS)
    with pytest.raises(UnvisitedConstraintError, match='"componnet".*Did you mean "component"'):
        mix.importance(KEY, {"componnet": 1}, ARGS)


def test_a_list_of_components_is_a_tuple_of_them():
    assert Mix([Normal, Normal]) == Mix((Normal, Normal)) and hash(Mix([Normal])) == hash(Mix((Normal,)))
    _, tr = mix.simulate(KEY, ARGS)
    _, (_, _, new) = mix.regenerate(KEYS[1], tr, AllSelection(), ARGS)
    assert leaf_types(new) == leaf_types(tr)

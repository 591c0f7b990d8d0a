"""`Unfold` and `Scan` of Flax modules: parameters, collections and streams by step; and nesting."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.chain import central, close, norm, plain, types

from gjflax import (
    AllSelection,
    Bernoulli,
    Diff,
    GenModule,
    Map,
    Normal,
    Repeat,
    Scan,
    TrainCombinator,
    Unfold,
    choice_map,
    gen,
    select,
    trace,
)

KEY = jax.random.key(0)
N = 3
H = jnp.array([0.5, -1.0])
XS = jnp.arange(1.0, 1.0 + N)


class Cell(GenModule):
    """A recurrent network with a vector of choices at each step, as a kernel over time."""

    @nn.compact
    def __call__(self, time, state, gain):
        h = nn.tanh(nn.Dense(2)(state) + gain * time.astype(jnp.float32))
        self.sow("intermediates", "h", h)
        y = trace("y", Normal)(nn.Dense(2, name="out")(h), 0.5)
        return 0.5 * h + 0.1 * y


class ScanCell(GenModule):
    """The same over inputs."""

    @nn.compact
    def __call__(self, state, x):
        h = nn.tanh(nn.Dense(2)(state) + x)
        self.sow("intermediates", "h", h)
        y = trace("y", Normal)(nn.Dense(2, name="out")(h), 0.5)
        return 0.5 * h + 0.1 * y, y


def by_hand(params: Any, y: Any, inputs: Any, state: Any = H) -> list[float]:
    """The terms of the steps in float64, the parameters shared or one set for each step."""
    params, state = jax.tree.map(np.float64, params), np.float64(state)
    result = []
    for step, x in enumerate(np.float64(inputs)):
        here = params if params["out"]["bias"].ndim == 1 else jax.tree.map(lambda leaf, i=step: leaf[i], params)
        h = np.tanh(state @ here["Dense_0"]["kernel"] + here["Dense_0"]["bias"] + x)
        result.append(norm(y[step], h @ here["out"]["kernel"] + here["out"]["bias"], 0.5).sum())
        state = 0.5 * h + 0.1 * np.float64(y[step])
    return result


CASES = {
    "unfold": (
        lambda **options: Unfold(Cell(), N, **options),
        (N, H, 0.3),
        0.3 * np.arange(N),
        Cell(),
        (jnp.int32(0), H, 0.3),
    ),
    "scan": (lambda **options: Scan(ScanCell(), **options), (H, XS), np.arange(1.0, 1.0 + N), ScanCell(), (H, XS[0])),
}
each = pytest.mark.parametrize("name", CASES)


def random_params(params: Any) -> Any:
    """Biases that are not zero."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    return structure.unflatten([jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])


# Parameters ------------------------------------------------------------------------------------------------------------


@each
def test_parameters_are_those_of_the_kernel(name: str, no_leaks: Any):
    make, args, inputs, kernel, kernel_args = CASES[name]
    model = make()
    variables = no_leaks(lambda: model.init(KEY, *args))
    alone = kernel.init(KEY, *kernel_args)
    assert set(variables) == {"params"}
    close(variables["params"], alone["params"])
    params = random_params(variables["params"])
    key, tr = jax.jit(lambda p: model.bind({"params": p}).simulate(KEY, args))(params)
    close(tr.get_score(), sum(by_hand(params, tr["y"], inputs)))
    assert len(np.unique(tr["y"])) == 2 * N
    _, (weight, new) = model.bind({"params": params}).importance(KEY, {(1, "y"): jnp.ones(2)}, args)
    close(weight, by_hand(params, new["y"], inputs)[1])


@each
def test_a_set_of_parameters_for_each_step(name: str, no_leaks: Any):
    make, args, inputs, _, _ = CASES[name]
    model = make(variable_axes={"params": 0})
    variables = no_leaks(lambda: model.init(KEY, *args))
    kernel = variables["params"]["Dense_0"]["kernel"]
    assert kernel.shape == (N, 2, 2) and len(np.unique(kernel)) == 4 * N
    params = random_params(variables["params"])
    _, tr = jax.jit(lambda p: model.bind({"params": p}).simulate(KEY, args))(params)
    close(tr.get_score(), sum(by_hand(params, tr["y"], inputs)))
    _, score = model.score_params(KEY, tr, jax.tree.map(lambda leaf: leaf + 0.1, params))
    close(score, sum(by_hand(jax.tree.map(lambda leaf: leaf + 0.1, params), tr["y"], inputs)))


@pytest.mark.slow
@each
def test_steps_may_start_from_one_set_of_parameters(name: str):
    make, args, *_ = CASES[name]
    kernel = make(variable_axes={"params": 0}, split_rngs={"params": False}).init(KEY, *args)["params"]["out"]["kernel"]
    np.testing.assert_array_equal(kernel[0], kernel[2])


@each
def test_parameter_gradients(name: str):
    make, args, inputs, _, _ = CASES[name]
    for options in ({}, {"variable_axes": {"params": 0}}):
        model = make(**options)
        params = random_params(jax.eval_shape(lambda m=model: m.init(KEY, *args))["params"])
        _, tr = model.bind({"params": params}).simulate(KEY, args)
        _, grads = jax.jit(lambda p, m=model, tr=tr: m.param_grad(KEY, tr, p))(params)
        for path in (("Dense_0", "kernel"), ("out", "bias")):

            def moved(leaf, path=path, params=params):
                changed = {**params[path[0]], path[1]: leaf}
                return sum(by_hand({**params, path[0]: changed}, tr["y"], inputs))  # noqa: B023

            want = central(moved, np.float64(params[path[0]][path[1]]))
            close(grads[path[0]][path[1]], want, rtol=2e-3, atol=2e-3)


@each
def test_an_update_under_other_parameters_weighs_the_change(name: str):
    make, args, inputs, _, _ = CASES[name]
    model = make()
    params = random_params(jax.eval_shape(lambda: model.init(KEY, *args))["params"])
    other = jax.tree.map(lambda leaf: leaf - 0.2, params)
    _, tr = model.bind({"params": params}).simulate(KEY, args)

    @jax.jit
    def run(tr, params, given):
        return model.bind({"params": params}).update(KEY, tr, given, args)[1][1:]

    weight, new, discard = run(tr, other, choice_map({(2, "y"): jnp.ones(2)}))
    close(weight, sum(by_hand(other, new["y"], inputs)) - sum(by_hand(params, tr["y"], inputs)))
    assert types(new) == types(tr)
    weight, back, _ = run(new, params, discard)
    close(weight, tr.get_score() - new.get_score())
    assert back.strip() == tr.strip()
    # Arguments that are known not to have changed do not hide the change of parameters.
    diffs = tuple(map(Diff.no_change, args))
    _, (_, weight, new, _) = model.bind({"params": other}).update(KEY, tr, {}, diffs)
    close(weight, sum(by_hand(other, tr["y"], inputs)) - sum(by_hand(params, tr["y"], inputs)))
    _, (retdiff, weight, new, _) = model.bind({"params": params}).update(KEY, tr, {}, diffs, param_diff=Diff.no_change)
    assert new is tr and Diff.is_unchanged((retdiff,)) and weight == 0.0


@pytest.mark.slow
@each
def test_init_by_every_method(name: str):
    make, args, *_ = CASES[name]
    for options in ({}, {"variable_axes": {"params": 0}}):
        model = make(**options)
        variables = jax.eval_shape(lambda model=model: model.init(KEY, *args))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), variables)
        _, tr = model.bind(zeros).importance(KEY, {"y": jnp.zeros((N, 2))}, args)[1]
        calls = {
            "simulate": (KEY, args),
            "importance": (KEY, {(1, "y"): jnp.ones(2)}, args),
            "assess": (KEY, tr.strip(), args),
            "update": (KEY, tr, {(1, "y"): jnp.ones(2)}, args),
            "regenerate": (KEY, tr, select((1, "y")), args),
        }
        for method, arguments in calls.items():
            with jax.checking_leaks():
                made = jax.eval_shape(
                    lambda key, m=method, a=arguments, model=model: model.init(key, *a, method=m), KEY
                )
            assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, variables), method


# Other collections and streams -----------------------------------------------------------------------------------------


@each
def test_what_is_sown_is_stacked(name: str):
    make, args, *_ = CASES[name]
    model = make()
    variables = {"params": model.init(KEY, *args)["params"]}
    (_, tr), sown = model.apply(variables, KEY, args, method="simulate", mutable=["intermediates"])
    (h,) = sown["intermediates"]["h"]
    assert h.shape == (N, 2)
    states = tr.get_retval() if name == "unfold" else None
    if states is not None:
        close(states, 0.5 * h + 0.1 * tr["y"])


class Normalised(GenModule):
    """A step with running statistics: of what the state is."""

    train: bool = True

    @nn.compact
    def __call__(self, time, state):
        h = nn.BatchNorm(use_running_average=not self.train, momentum=0.5)(state)
        trace("y", Normal)(h, 1.0)
        return state + 1.0


BATCH = jnp.array([[1.0, 2.0], [3.0, 6.0]])


def running_mean(start: Any, steps: int) -> np.ndarray:
    mean, state = np.float64(start), np.float64(BATCH)
    for _ in range(steps):
        mean = 0.5 * mean + 0.5 * state.mean(axis=0)
        state = state + 1.0
    return mean


def test_running_statistics_are_carried_from_step_to_step(no_leaks: Any):
    model = Unfold(Normalised(), 4)
    variables = no_leaks(lambda: model.init(KEY, 4, BATCH))
    close(variables["batch_stats"]["BatchNorm_0"]["mean"], np.zeros(2))
    variables = {
        "params": variables["params"],
        "batch_stats": jax.tree.map(lambda s: s + 0.5, variables["batch_stats"]),
    }
    writable = model.bind(variables, mutable=["batch_stats"])
    _, full = writable.simulate(KEY, (4, BATCH))
    _, part = model.bind(variables, mutable=["batch_stats"]).simulate(KEY, (2, BATCH))
    # Bound modules keep what they wrote, as Flax's do.
    close(writable.variables["batch_stats"]["BatchNorm_0"]["mean"], running_mean(0.5, 4))

    def mean(method, *arguments):
        _, updates = model.apply(variables, KEY, *arguments, method=method, mutable=["batch_stats"])
        return updates["batch_stats"]["BatchNorm_0"]["mean"]

    close(mean("simulate", (4, BATCH)), running_mean(0.5, 4))
    close(mean("update", full, {(1, "y"): BATCH}, (4, BATCH)), running_mean(0.5, 4))
    # Once in every step, though two selections are tried in each.
    close(mean("regenerate", full, select((1, "y")), (4, BATCH)), running_mean(0.5, 4))
    # Steps that do not count leave no trace in them, and new ones are neither skipped nor counted twice.
    calls = [
        lambda n: mean("simulate", (n, BATCH)),
        lambda n: mean("update", part, {(1, "y"): BATCH}, (n, BATCH)),
        lambda n: mean("regenerate", part, select((1, "y")), (n, BATCH)),
    ]
    for call in map(jax.jit, calls):
        for length in (0, 1, 3, 4):
            close(call(length), running_mean(0.5, length))
    # Statistics that may not be written are read.
    _, (_, score) = Unfold(Normalised(train=False), 4).apply(variables, KEY, full.strip(), (4, BATCH), method="assess")
    states = np.asarray(BATCH) + np.arange(4.0)[:, None, None]
    close(score, norm(full["y"], (states - 0.5) / np.sqrt(1.5), 1.0).sum())


def test_statistics_for_each_step():
    model = Unfold(Normalised(), 3, variable_axes={"batch_stats": 0})
    variables = model.init(KEY, 3, BATCH)
    assert variables["batch_stats"]["BatchNorm_0"]["mean"].shape == (3, 2)
    _, updates = model.apply(variables, KEY, (3, BATCH), method="simulate", mutable=["batch_stats"])
    want = 0.5 * (np.asarray(BATCH).mean(axis=0) + np.arange(3)[:, None])
    close(updates["batch_stats"]["BatchNorm_0"]["mean"], want)


def test_untraced_randomness_differs_from_step_to_step():
    class Noisy(GenModule):
        @nn.compact
        def __call__(self, state, x):
            noise = jax.random.normal(self.make_rng("noise"))
            kept = nn.Dropout(0.5, deterministic=False)(jnp.ones(8))
            trace("y", Normal)(x, 1.0)
            return state, (noise, kept)

    _, tr = Scan(Noisy()).apply({}, KEY, (0.0, XS), method="simulate", rngs={"noise": KEY, "dropout": KEY})
    _, (noise, kept) = tr.get_retval()
    assert len(np.unique(noise)) == N and len(np.unique(kept, axis=0)) == N
    (_, tr) = Unfold(gen(_dropping), 8).apply({}, KEY, (jnp.int32(5), 0.0), method="simulate", rngs={"dropout": KEY})
    # Beyond the length the last state stays, though a mask would be drawn anew.
    values = np.asarray(tr.get_retval())
    np.testing.assert_array_equal(values[4:], np.full(4, values[4]))


def _dropping(time, state):
    trace("y", Normal)(0.0, 1.0)
    return state + nn.Dropout(0.5, deterministic=False)(jnp.ones(16)).sum() + time.astype(jnp.float32)


def test_recomputed_layers():
    """``nn.remat`` of the kernel, and of a module with the combinator in its body."""
    params = random_params(jax.eval_shape(lambda: Unfold(Cell(), N).init(KEY, N, H, 0.3))["params"])

    class Body(GenModule):
        @nn.compact
        def __call__(self, state):
            return trace("chain", Unfold(Cell(), N))(N, state, 0.3)

    inputs = 0.3 * np.arange(N)
    y = jnp.asarray(np.random.default_rng(0).normal(size=(N, 2)), jnp.float32)
    plain_grads = None
    for model, given, args, tree in [
        (Unfold(Cell(), N), {"y": y}, (N, H, 0.3), params),
        (Unfold(nn.remat(Cell)(), N), {"y": y}, (N, H, 0.3), params),
        (Body(), {("chain", "y"): y}, (H,), {"Cell_0": params}),
        (nn.remat(Body)(), {("chain", "y"): y}, (H,), {"Cell_0": params}),
    ]:
        made = jax.eval_shape(lambda m=model, a=args: m.init(KEY, *a))["params"]
        if jax.tree.structure(made) != jax.tree.structure(tree):
            tree = {next(iter(made)): params}

        def score(tree, state, model=model, given=given, args=args):
            at = tuple(state if arg is H else arg for arg in args)
            return model.apply({"params": tree}, KEY, given, at, method="assess")[1][1]

        value, grads = jax.jit(jax.value_and_grad(score, argnums=1))(tree, H)
        close(value, sum(by_hand(params, y, inputs)))
        plain_grads = grads if plain_grads is None else plain_grads
        close(grads, plain_grads)


def test_in_the_body_of_another_function():
    """A free callee's parameters go by its address; its choices and retvals are those of the chain."""

    @gen
    def body(state, n):
        states = trace("chain", Unfold(Cell(), N))(n, state, 0.3)
        return trace("end", Normal)(jnp.sum(states[-1]), 0.1)

    variables = body.init(KEY, H, N)
    params = random_params(variables["params"])
    (inner,) = params.values()
    _, tr = body.bind({"params": params}).simulate(KEY, (H, N))
    y = tr["chain", "y"]
    chain = tr.get_subtree("chain")
    want = sum(by_hand(inner, y, 0.3 * np.arange(N))) + norm(tr["end"], np.sum(chain.get_retval()[-1]), 0.1)
    close(tr.get_score(), want)
    # Arguments that a trace gives back are arrays: also the length.
    args = tr.get_args()
    _, (_, weight, new, discard) = body.bind({"params": params}).update(KEY, tr, {("chain", 1, "y"): jnp.ones(2)}, args)
    after = sum(by_hand(inner, new["chain", "y"], 0.3 * np.arange(N)))
    after += norm(new["end"], np.sum(new.get_subtree("chain").get_retval()[-1]), 0.1)
    close(weight, after - want)
    assert discard.addresses() == [("chain", "y")] and types(new) == types(tr)


def test_learned_arguments():
    @gen(TrainCombinator, params={"gain": 0.5, "scale": np.array([0.3, 0.6], np.float32)})
    def learned(time, state, params):
        y = trace("y", Normal)(params["gain"] * state, params["scale"])
        return y

    def terms(tr, params, start):
        before = np.concatenate([np.float64(start)[None], np.float64(tr["y"])[:-1]])
        return norm(tr["y"], params["gain"] * before, params["scale"]).sum()

    model = Unfold(learned, N)
    values = {"gain": 0.5, "scale": np.array([0.3, 0.6])}
    key, tr = model.simulate(KEY, (N, H))
    close(tr.get_score(), terms(tr, values, H))
    _, (_, weight, new, _) = model.update(key, tr, {(0, "y"): H}, (N, H))
    close(weight, terms(new, values, H) - terms(tr, values, H))
    assert set(model.init(KEY, N, H)["params"]) == {"gain", "scale"}
    other = {"gain": jnp.float32(-1.0), "scale": jnp.array([1.0, 2.0])}
    close(model.score_params(KEY, tr, other)[1], terms(tr, other, H))
    # The other way round: the whole chain's last argument is learned.
    whole = TrainCombinator(Unfold(gen(_given_params), N), params=values)
    key, tr = whole.simulate(KEY, (N, H))
    close(tr.get_score(), terms(tr, values, H))
    close(whole.score_params(KEY, tr, other)[1], terms(tr, other, H))


def _given_params(time, state, params):
    return trace("y", Normal)(params["gain"] * state, params["scale"])


# Nesting ---------------------------------------------------------------------------------------------------------------


@gen
def walk(time, state, scale):
    return trace("x", Normal)(0.9 * state, scale)


def walk_terms(x: Any, start: Any, scale: Any) -> np.ndarray:
    x = np.float64(x)
    before = np.concatenate([np.float64(start)[..., None], x[..., :-1]], axis=-1)
    return norm(x, 0.9 * before, np.asarray(scale)[..., None] if np.ndim(scale) else scale)


def check(model: Any, args: Any, other_args: Any, given: Any, terms: Any) -> Any:
    """All that changes a trace, against the terms by hand: ``terms(choices, args)`` is their sum."""

    @jax.jit
    def run(key):
        key, tr = model.simulate(key, args)
        key, (_, weight, new, discard) = model.update(key, tr, given, other_args)
        key, (_, back_weight, back, _) = model.update(key, new, discard, args)
        key, (_, fresh_weight, fresh) = model.regenerate(key, new, AllSelection(), args)
        key, (_, score) = model.assess(key, new.strip(), other_args)
        key, (part_weight, part) = model.importance(key, given, args)
        return tr, weight, new, discard, back_weight, back, fresh_weight, fresh, score, part

    tr, weight, new, discard, back_weight, back, fresh_weight, fresh, score, part = run(KEY)
    close(tr.get_score(), terms(tr, args))
    close(weight, terms(new, other_args) - terms(tr, args))
    close(new.get_score(), terms(new, other_args))
    close(score, terms(new, other_args))
    close(back_weight, -weight)
    assert back.strip() == tr.strip()
    close(fresh_weight, 0.0)
    close(fresh.get_score(), terms(fresh, args))
    close(part.get_score(), terms(part, args))
    assert types(new) == types(tr) == types(fresh)
    return tr, new, discard


def test_a_chain_for_each_element_of_a_map():
    model = Map(Unfold(walk, N), in_axes=(None, 0, None))
    args, other = (N, jnp.array([0.0, 5.0]), 0.5), (N, jnp.array([1.0, -1.0]), 1.5)
    tr, new, discard = check(
        model, args, other, {(1, 2, "x"): 9.0, (1, 0, "x"): 7.0}, lambda tr, a: walk_terms(tr["x"], a[1], a[2]).sum()
    )
    want = np.asarray(tr["x"]).copy()
    want[1, 2], want[1, 0] = 9.0, 7.0
    np.testing.assert_array_equal(new["x"], want)
    assert discard[1, 2, "x"] == tr["x"][1, 2] and tr["x"].shape == (2, N)


@pytest.mark.slow
def test_chains_of_several_lengths_in_a_map():
    model = Map(Unfold(walk, N), in_axes=(0, 0, None))

    def terms(tr, args):
        at = np.arange(N) < np.asarray(args[0])[:, None]
        return np.where(at, walk_terms(tr["x"].value, args[1], args[2]), 0.0).sum()

    args = (jnp.array([3, 1]), jnp.array([0.0, 5.0]), 0.5)
    other = (args[0], -args[1], 1.5)
    tr, new, discard = check(model, args, other, {"x": jnp.full((2, N), 2.0)}, terms)
    np.testing.assert_array_equal(tr["x"].flag, [[True, True, True], [True, False, False]])
    np.testing.assert_array_equal(discard["x"].flag, tr["x"].flag)


@gen
def many(time, state, scale):
    x = trace("x", Map(Normal, in_axes=(0, None)))(0.9 * state, scale)
    y = trace("y", Repeat(Normal, 2))(jnp.sum(x), 1.0)
    return x + 0.1 * jnp.sum(y)


def many_terms(tr: Any, args: Any) -> float:
    state, total = np.float64(args[1]), 0.0
    for time in range(args[0]):
        x, y = np.float64(plain(tr["x"]))[time], np.float64(plain(tr["y"]))[time]
        total += norm(x, 0.9 * state, args[2]).sum() + norm(y, x.sum(), 1.0).sum()
        state = x + 0.1 * y.sum()
    return total


@pytest.mark.parametrize("length", [N, pytest.param(np.array(2), marks=pytest.mark.slow)], ids=["known", "array"])
def test_a_map_in_each_step(length: Any):
    args, other = (length, jnp.array([1.0, 2.0]), 0.5), (length, jnp.array([-1.0, 0.0]), 1.5)
    given = {(1, "x", 0): 4.0, (1, "y", 1): 3.0}
    tr, new, discard = check(Unfold(many, N), args, other, given, many_terms)
    assert tr["x"].shape == (N, 2) if length is N else plain(tr["x"]).shape == (N, 2)
    assert plain(new["x"])[1, 0] == 4.0 and plain(new["y"])[1, 1] == 3.0
    assert discard.addresses() == [("x",), ("y",)]


@gen
def outer(time, state, scale):
    """A chain whose steps are chains, the second of a length that a choice decides."""
    xs = trace("xs", Unfold(walk, 2))(2, state, scale)
    coin = trace("coin", Bernoulli)(logits=xs[-1])
    ys = trace("ys", Unfold(walk, 2))(1 + coin, xs[-1], scale)
    return ys[-1]


def outer_terms(tr: Any, args: Any) -> float:
    state, total = np.float64(args[1]), 0.0
    xs, coins, ys = (plain(tr[address]) for address in (("xs", "x"), "coin", ("ys", "x")))
    for time in range(args[0]):
        total += walk_terms(xs[time], state, args[2]).sum()
        end = np.float64(xs[time][-1])
        total += -np.logaddexp(0.0, -end if coins[time] else end)
        total += walk_terms(ys[time], end, args[2])[: 1 + coins[time]].sum()
        state = ys[time][coins[time]]
    return float(total)


def test_chains_in_chains():
    """The inner length goes up in one step and down in another."""
    model = Unfold(outer, 2)
    given = {"coin": jnp.array([1, 0]), ("ys", "x"): jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    tr, new, discard = check(model, (2, 0.5, 0.7), (2, -0.5, 1.5), given, outer_terms)
    np.testing.assert_array_equal(new["ys", "x"].flag, [[True, True], [True, False]])
    np.testing.assert_array_equal(discard["coin"], tr["coin"])
    was, now = np.asarray(tr["ys", "x"].flag), np.asarray(new["ys", "x"].flag)
    np.testing.assert_array_equal(discard["ys", "x"].flag, was)
    np.testing.assert_array_equal(discard["ys", "x"].value[was], tr["ys", "x"].value[was])
    assert (was != now).any()


@pytest.mark.slow
def test_an_inner_length_that_a_constraint_changes():
    """Of one step: what is gone in it is discarded with what was overwritten, and what is new in it is drawn."""
    model, args = Unfold(outer, 2), (2, 0.5, 0.7)
    _, (_, tr) = jax.jit(lambda: model.importance(KEY, {"coin": jnp.array([1, 1])}, args))()
    run = jax.jit(lambda tr, given: model.update(KEY, tr, given, args)[1][1:])
    weight, shorter, discard = run(tr, choice_map({(1, "coin"): jnp.int32(0)}))
    close(weight, outer_terms(shorter, args) - outer_terms(tr, args))
    np.testing.assert_array_equal(discard["coin"].flag, [False, True])
    np.testing.assert_array_equal(discard["ys", "x"].flag, [[False, False], [False, True]])
    assert discard["ys", "x"].value[1, 1] == tr["ys", "x"].value[1, 1]
    back_weight, back, _ = run(shorter, discard)
    close(back_weight, -weight)
    assert back.strip() == tr.strip()
    # Without the value that was discarded it is drawn, at no weight of its own.
    weight, longer, discard = run(shorter, choice_map({(1, "coin"): jnp.int32(1)}))
    fresh = norm(longer["ys", "x"].value[1, 1], 0.9 * longer["ys", "x"].value[1, 0], 0.7)
    close(weight, outer_terms(longer, args) - outer_terms(shorter, args) - fresh)

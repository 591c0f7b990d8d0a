"""`SMCObjective` against the Kalman filter, the forward algorithm, sums over all draws and ancestors, and quadrature.

The statistical tests say how many independent losses they use; their bounds are 4 standard errors.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learning.objectives.state_space import (
    COIN_PARAMS,
    COIN_XS,
    START,
    Coin,
    coins,
    coins_log_evidence,
    drifting,
    kalman_log_evidence,
    linear,
    linear_with_gaps,
    locally_optimal,
    simulated,
)

import gjflax
from gjflax import (
    ELBO,
    REINFORCE,
    ArgumentError,
    Dimap,
    GenModule,
    ImportanceWeightedELBO,
    Map,
    MissingChoiceError,
    Normal,
    SMCObjective,
    TrainCombinator,
    Unfold,
    UnvisitedConstraintError,
    choice_map,
    gen,
    trace,
)

KEY = jax.random.key(0)
DRAWS = 20_000
BIASED = {"ancestor_gradient": False}


def losses(objective: Any, variables: Any, *args: Any, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Independent losses, in float64."""

    def loss(key: Any) -> Any:
        return objective.apply(variables, *args, rngs={"choice": key})

    keys = jax.random.split(jax.random.key(seed), draws)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(loss, keys, batch_size=2_000))(keys), np.float64)


def value_and_grad(objective: Any, variables: Any, key: Any, observed: Any, *args: Any) -> Any:
    """The loss and its gradient at the key that `loss` is given."""

    def loss(variables: Any) -> Any:
        return objective.apply(variables, key, choice_map(observed), *args, method="loss")

    return jax.jit(jax.value_and_grad(loss))(variables)


def same(one: Any, other: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), one, other)


def within(draws: Any, exact: Any, rounding: float = 2e-5) -> None:
    """The mean of draws is the exact value."""
    draws = np.asarray(draws, np.float64)
    error = 4 * draws.std(axis=0) / np.sqrt(len(draws))
    gap = np.abs(draws.mean(axis=0) - exact)
    assert np.all(gap <= error + rounding * np.maximum(1, np.abs(exact))), (gap, error)


# The value ---------------------------------------------------------------------------------------------------------------

XS = simulated(6)
SETTINGS = [(resample, scheme) for resample in ("always", 0.6) for scheme in gjflax.learning.resampling.SCHEMES]
QUICK = [("always", "multinomial"), (0.6, "systematic")]


def slowly(settings: list[Any], quick: list[Any]) -> list[Any]:
    return [pytest.param(*one, marks=() if one in quick else pytest.mark.slow) for one in settings]


@pytest.mark.parametrize(("resample", "scheme"), slowly([*SETTINGS, ("never", "multinomial")], QUICK))
def test_the_evidence_of_a_linear_model_is_unbiased(resample: Any, scheme: str) -> None:
    """E[p̂(x)] / p(x) = 1, by 20,000 filters of 4 particles."""
    model, guide = Unfold(linear, max_length=6), Unfold(drifting, max_length=6)
    objective = SMCObjective(model, guide, num_samples=4, resample=resample, scheme=scheme, **BIASED)
    drawn = -losses(objective, {}, {"x": XS}, (6, START), (6, START, XS))
    within(np.exp(drawn - kalman_log_evidence(XS)), 1.0)
    assert drawn.std() > 0.2  # else there would be nothing to test


@pytest.mark.parametrize(
    ("resample", "scheme"), slowly([(0.6, "residual"), ("always", "stratified")], [(0.6, "residual")])
)
def test_the_evidence_of_a_chain_of_coins_is_unbiased(resample: Any, scheme: str) -> None:
    """E[p̂(x)] / p(x) = 1, by 20,000 filters of 3 particles, with the score function."""
    objective = SMCObjective(*coins(3), num_samples=3, resample=resample, scheme=scheme, **BIASED)
    variables = {"params": jax.tree.map(jnp.float32, COIN_PARAMS)}
    drawn = -losses(objective, variables, {"x": COIN_XS}, (3, 0.0), (3, 0.0, COIN_XS))
    within(np.exp(drawn - coins_log_evidence(COIN_PARAMS, COIN_XS)), 1.0)
    assert drawn.std() > 0.1


def test_observations_may_be_missing() -> None:
    """By a `Mask` in the kernel; 20,000 filters of 4 particles against the Kalman filter that skips them."""
    seen = jnp.array([True, False, True, True, False, False])
    model, guide = Unfold(linear_with_gaps, max_length=6), Unfold(drifting, max_length=6)
    objective = SMCObjective(model, guide, num_samples=4)
    observed = {"x": gjflax.Masked(jnp.where(seen, XS, jnp.nan), seen)}
    drawn = -losses(objective, {}, observed, (6, START, seen), (6, START, jnp.where(seen, XS, 0)))
    within(np.exp(drawn - kalman_log_evidence(XS, seen)), 1.0)


@pytest.mark.slow
def test_the_bound_is_above_the_importance_weighted_one_and_meets_the_evidence() -> None:
    """On 50 steps, by 500 losses each: means apart by more than 4 standard errors; the gap falls as 1/K."""
    length = 50
    xs = simulated(length, seed=1)
    exact = kalman_log_evidence(xs)
    model, guide = Unfold(linear, max_length=length), Unfold(drifting, max_length=length)

    def gaps(objective: Any) -> tuple[float, float]:
        drawn = exact + losses(objective, {}, {"x": xs}, (length, START), (length, START, xs), draws=500)
        return drawn.mean(), 4 * drawn.std() / np.sqrt(len(drawn))

    weighted, weighted_error = gaps(ImportanceWeightedELBO(model, guide, num_samples=8))
    by_count = {}
    for count in (8, 32):
        by_count[count] = gaps(
            SMCObjective(model, guide, num_samples=count, resample=0.5, scheme="systematic", **BIASED)
        )
    assert by_count[8][0] + by_count[8][1] < weighted - weighted_error
    ratio = by_count[8][0] / by_count[32][0]
    spread = ratio * np.hypot(*(error / gap for gap, error in by_count.values()))
    assert 4 / 1.7 - spread < ratio < 4 * 1.7 + spread
    optimal = gaps(
        SMCObjective(model, Unfold(locally_optimal, max_length=length), num_samples=8, resample=0.5, **BIASED)
    )
    assert optimal[0] + optimal[1] < 0.5 * by_count[8][0]


def test_at_the_posterior_a_single_step_gives_the_evidence() -> None:
    objective = SMCObjective(Unfold(linear, max_length=1), Unfold(locally_optimal, max_length=1), num_samples=3)
    loss = objective.apply({}, {"x": XS[:1]}, (1, START), (1, START, XS), rngs={"choice": KEY})
    np.testing.assert_allclose(-loss, kalman_log_evidence(XS[:1]), rtol=1e-5)


# The gradient, with a sum over all that may be drawn -------------------------------------------------------------------------


def coin_paths(count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """All values of the coins of all particles, and all ancestors of the later steps."""
    rows = itertools.product(
        itertools.product((0, 1), repeat=count * length), itertools.product(range(count), repeat=count * (length - 1))
    )
    zs, ancestors = zip(*rows, strict=True)
    return np.reshape(zs, (-1, length, count)), np.reshape(ancestors, (-1, length - 1, count))


def expected_log_evidence(params: Any, resample: Any, *, hold: bool, count: int = 2) -> Any:
    """Σ over all coins and ancestors of their probability times log p̂, by hand; with the ancestors' probability held."""
    m, g = params["model"], params["guide"]
    log_sigmoid = jax.nn.log_sigmoid

    def log_bernoulli(z: Any, logits: Any) -> Any:
        return jnp.where(z == 1, log_sigmoid(logits), log_sigmoid(-logits))

    def term(zs: Any, ancestors: Any) -> Any:
        log_q = log_a = log_evidence = 0.0
        log_w = jnp.zeros(count)
        state, guide_state = jnp.zeros(count), jnp.zeros(count)
        for time, x in enumerate(np.asarray(COIN_XS, np.float64)):
            if time:
                probabilities = jax.nn.softmax(log_w)
                wanted = True if resample == "always" else 1 / jnp.sum(probabilities**2) < resample * count
                # Where there is no resampling, one row of ancestors stands for all.
                a = ancestors[time - 1]
                drawn = jnp.sum(jnp.log(probabilities[a]))
                nothing = jnp.where(jnp.all(a == jnp.arange(count)), 0.0, -jnp.inf)
                log_a = log_a + jnp.where(wanted, drawn, nothing)
                log_evidence = log_evidence + jnp.where(wanted, jax.nn.logsumexp(log_w) - np.log(count), 0.0)
                log_w, state, guide_state = (
                    jnp.where(wanted, leaf, old)
                    for leaf, old in zip(
                        (jnp.zeros(count), state[a], guide_state[a]), (log_w, state, guide_state), strict=True
                    )
                )
            z = zs[time].astype(log_w.dtype)
            step_q = log_bernoulli(z, g["bias"] + g["pull"] * x + g["stay"] * guide_state)
            scale = jnp.exp(m["log_scale"])
            step_p = log_bernoulli(z, m["bias"] + m["stay"] * state)
            step_p = step_p - 0.5 * ((x - m["loc"] * z) / scale) ** 2 - m["log_scale"] - 0.5 * np.log(2 * np.pi)
            log_w, log_q = log_w + step_p - step_q, log_q + jnp.sum(step_q)
            state, guide_state = 2.0 * z - 1, z - 0.5
        log_evidence = log_evidence + jax.nn.logsumexp(log_w) - np.log(count)
        log_a = jax.lax.stop_gradient(log_a) if hold else log_a
        impossible = log_a == -jnp.inf
        return jnp.where(impossible, 0.0, jnp.exp(jnp.where(impossible, 0.0, log_a) + log_q) * log_evidence)

    return jnp.sum(jax.vmap(term)(*map(jnp.asarray, coin_paths(count, len(COIN_XS)))))


@pytest.mark.parametrize(
    ("resample", "ancestor_gradient"),
    slowly([("always", True), (0.9, True), ("always", False)], [("always", True)]),
)
def test_gradients_of_coins_are_those_of_the_sum_over_all_paths(resample: Any, ancestor_gradient: bool) -> None:
    """20,000 gradients of filters of 2 particles and 3 steps; every choice has the score function."""
    hold = not ancestor_gradient
    value, gradient = exact(functools.partial(expected_log_evidence, resample=resample, hold=hold), COIN_PARAMS)
    objective = SMCObjective(*coins(3), num_samples=2, resample=resample, ancestor_gradient=ancestor_gradient)
    drawn = gradients(objective, COIN_PARAMS, {"x": COIN_XS}, (3, 0.0), (3, 0.0, COIN_XS))
    within(drawn[0], -value)
    jax.tree.map(lambda draws, exact: within(draws, -exact), drawn[1], gradient)


def exact(objective: Any, params: Any) -> Any:
    """The value and the gradient of a function, in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(jnp.float64, params)
        result = jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(objective))(wide))
        assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(result))
        return result


def gradients(objective: Any, params: Any, *args: Any, draws: int = DRAWS) -> Any:
    """Independent losses and gradients."""

    def loss(params: Any, key: Any) -> Any:
        return objective.apply({"params": params}, *args, rngs={"choice": key})

    one = functools.partial(jax.value_and_grad(loss), jax.tree.map(jnp.float32, params))
    keys = jax.random.split(jax.random.key(1), draws)
    drawn = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=2_000))(keys)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), drawn)


# The gradient, with quadrature over reparameterised draws -----------------------------------------------------------------------

PATH_PARAMS = {
    "model": {"slope": 0.8, "log_scale": -0.4},
    "guide": {"loc": [0.3, -0.2], "slope": [0.2, 0.5], "log_scale": [-0.1, 0.2]},
}
PATH_XS = (1.2, -0.7)


class Path(GenModule):
    @nn.compact
    def __call__(self, time, z):
        slope, log_scale = (self.param(name, nn.initializers.zeros, ()) for name in PATH_PARAMS["model"])
        z = trace("z", Normal)(slope * z, 1.0)
        trace("x", Normal)(z, jnp.exp(log_scale))
        return z


class PathGuide(GenModule):
    distribution: Any = Normal

    @nn.compact
    def __call__(self, time, z):
        loc, slope, log_scale = (self.param(name, nn.initializers.zeros, ()) for name in PATH_PARAMS["guide"])
        return trace("z", self.distribution)(loc + slope * z, jnp.exp(log_scale))


def paths(distribution: Any = Normal) -> tuple[Any, Any]:
    """A model with shared parameters, and a guide with a set for each of two steps."""
    by_step = {"params": 0}
    return Unfold(Path(), max_length=2), Unfold(PathGuide(distribution), max_length=2, variable_axes=by_step)


def expected_path(params: Any, *, hold: bool, score: bool, points: int = 14) -> Any:
    """E[log p̂] of 2 particles and 2 steps: a sum over the ancestors, by Gauss-Hermite quadrature over the four draws.

    Args:
      params: the parameters.
      hold: whether the probabilities of ancestors, at given draws, are held.
      score: whether the draws are held too, and their density is what is differentiated.
    """
    m, g = params["model"], params["guide"]
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    weights = weights / weights.sum()

    def log_normal(value: Any, loc: Any, log_scale: Any) -> Any:
        return -0.5 * ((value - loc) / jnp.exp(log_scale)) ** 2 - log_scale - 0.5 * np.log(2 * np.pi)

    def step(time: int, z: Any, noise: Any) -> Any:
        loc, log_scale = g["loc"][time] + g["slope"][time] * z, g["log_scale"][time]
        new = loc + jnp.exp(log_scale) * noise
        new = jax.lax.stop_gradient(new) if score else new
        log_p = log_normal(new, m["slope"] * z, 0.0) + log_normal(PATH_XS[time], new, m["log_scale"])
        log_q = log_normal(new, loc, log_scale)
        density = jnp.exp(log_q - jax.lax.stop_gradient(log_q)) if score else jnp.ones(2)
        return new, log_p - log_q, jnp.prod(density)

    def term(noise: Any) -> Any:
        z, log_w, density = step(0, jnp.zeros(2), noise[0])
        probabilities = jax.nn.softmax(log_w)
        probabilities = jax.lax.stop_gradient(probabilities) if hold else probabilities
        result = jax.nn.logsumexp(log_w) - np.log(2)
        for ancestors in itertools.product((0, 1), repeat=2):
            _, second, second_density = step(1, z[np.array(ancestors)], noise[1])
            chance = probabilities[ancestors[0]] * probabilities[ancestors[1]] * second_density
            result = result + chance * (jax.nn.logsumexp(second) - np.log(2))
        return density * result

    grid = np.stack(np.meshgrid(*[nodes] * 4, indexing="ij"), -1).reshape(-1, 2, 2)
    chances = np.prod(np.stack(np.meshgrid(*[weights] * 4, indexing="ij"), -1).reshape(-1, 4), axis=1)
    return jnp.sum(jax.vmap(term)(jnp.asarray(grid)) * chances)


@pytest.mark.slow
@pytest.mark.parametrize("distribution", [Normal, REINFORCE(Normal)], ids=["pathwise", "score function"])
@pytest.mark.parametrize("ancestor_gradient", [True, False])
def test_gradients_through_paths_are_those_by_quadrature(distribution: Any, ancestor_gradient: bool) -> None:
    """40,000 gradients; the parameters of the guide are of each step. With REINFORCE all is the score function."""
    score = distribution is not Normal
    value, gradient = exact(functools.partial(expected_path, hold=not ancestor_gradient, score=score), PATH_PARAMS)
    objective = SMCObjective(*paths(distribution), num_samples=2, ancestor_gradient=ancestor_gradient)
    params = jax.tree.map(jnp.float32, PATH_PARAMS, is_leaf=lambda leaf: isinstance(leaf, list))
    drawn = gradients(objective, params, {"x": jnp.float32(PATH_XS)}, (2, 0.0), (2, 0.0), draws=40_000)
    within(drawn[0], -value)
    for side in params:
        for name in params[side]:
            within(drawn[1][side][name], -np.asarray(gradient[side][name]))
    # The two gradients differ by more than what is tested here.
    _, other = exact(functools.partial(expected_path, hold=ancestor_gradient, score=score), PATH_PARAMS)
    with pytest.raises(AssertionError):
        for name in params["guide"]:
            within(drawn[1]["guide"][name], -np.asarray(other["guide"][name]))


# The same as others -----------------------------------------------------------------------------------------------------------

COINS = {"params": jax.tree.map(np.float32, COIN_PARAMS)}
COIN_CALL = ({"x": COIN_XS}, (3, 0.0), (3, 0.0, COIN_XS))
PATHS = {"params": jax.tree.map(np.float32, PATH_PARAMS, is_leaf=lambda leaf: isinstance(leaf, list))}
PATH_CALL = ({"x": jnp.float32(PATH_XS)}, (2, 0.0), (2, 0.0))


@pytest.mark.parametrize("pair", [(coins(3), COINS, COIN_CALL), (paths(), PATHS, PATH_CALL)], ids=["coins", "paths"])
def test_without_resampling_it_is_the_importance_weighted_bound(pair: Any) -> None:
    """Loss and gradient, to rounding, at the same key; and so are the variables that `init` makes."""
    sides, variables, call = pair
    weighted = ImportanceWeightedELBO(*sides, num_samples=5)
    filtered = SMCObjective(*sides, num_samples=5, resample="never")
    same(value_and_grad(filtered, variables, KEY, *call), value_and_grad(weighted, variables, KEY, *call))
    initial = lambda objective: jax.jit(lambda key: objective.init(key, *call))(KEY)
    same(initial(filtered), initial(weighted), atol=0)


def test_of_one_particle_it_is_the_elbo() -> None:
    filtered, elbo = SMCObjective(*paths()), ELBO(*paths())
    same(value_and_grad(filtered, PATHS, KEY, *PATH_CALL), value_and_grad(elbo, PATHS, KEY, *PATH_CALL))


def test_steps_beyond_the_length_do_not_count() -> None:
    """A chain with room for five steps, of which three count, is one of three: loss and gradient, whatever stands beyond."""
    beyond = jnp.concatenate([COIN_XS, jnp.full(2, jnp.nan)])
    short = value_and_grad(SMCObjective(*coins(3), num_samples=4, resample=0.9), COINS, KEY, *COIN_CALL)
    objective, length = SMCObjective(*coins(5), num_samples=4, resample=0.9), jnp.int32(3)
    same(value_and_grad(objective, COINS, KEY, {"x": beyond}, (length, 0.0), (length, 0.0, beyond)), short)


class Encoded(GenModule):
    """A guide as a body: a network reads all observations, backwards, and an `Unfold` takes what it makes of them."""

    @nn.compact
    def __call__(self, xs):
        read = nn.RNN(nn.SimpleCell(1), reverse=True, keep_order=True)(xs[:, None])[:, 0]
        trace("steps", Unfold(CoinReader(), max_length=3))(3, 0.0, read)


class CoinReader(GenModule):
    @nn.compact
    def __call__(self, time, state, read):
        stay = self.param("stay", nn.initializers.ones, ())
        z = trace("z", gjflax.Bernoulli)(logits=read[time] + stay * state)
        return z.astype(stay.dtype) - 0.5


class CoinSequence(GenModule):
    """The model as a body."""

    @nn.compact
    def __call__(self):
        trace("steps", Unfold(Coin(), max_length=3))(3, 0.0)


def test_an_unfold_in_a_body_is_found() -> None:
    """At the same key its loss and gradient are those of the `Unfold`s, called with what the body's network gives."""
    objective = SMCObjective(CoinSequence(), Encoded(), num_samples=4)
    observed = {"steps": {"x": COIN_XS}}
    initial = lambda objective: jax.jit(lambda key: objective.init(key, observed, (), (COIN_XS,)))(KEY)
    variables = initial(objective)
    params = variables["params"]
    same(initial(ELBO(CoinSequence(), Encoded())), variables, atol=0)
    got = value_and_grad(objective, variables, KEY, observed, (), (COIN_XS,))

    network = nn.RNN(nn.SimpleCell(1), reverse=True, keep_order=True)
    inner = SMCObjective(Unfold(Coin(), max_length=3), Unfold(CoinReader(), max_length=3), num_samples=4)

    def loss(params: Any) -> Any:
        read = network.apply({"params": {"cell": params["guide"]["SimpleCell_0"]}}, COIN_XS[:, None])[:, 0]
        below = {"model": params["model"]["Coin_0"], "guide": params["guide"]["CoinReader_0"]}
        args = (choice_map({"x": COIN_XS}), (3, 0.0), (3, 0.0, read))
        return inner.apply({"params": below}, KEY, *args, method="loss")

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    same(got, (value, {"params": gradient}))
    assert np.abs(jax.tree.leaves(gradient["guide"]["SimpleCell_0"])[0]).max() > 1e-3


def test_kernels_write_and_sow() -> None:
    """What they write is carried over the steps that count, and averaged over the particles; what they sow is stacked."""

    class Counting(GenModule):
        @nn.compact
        def __call__(self, time, z, xs):
            calls = self.variable("counts", "calls", lambda: jnp.zeros(()))
            if not self.is_initializing():
                calls.value = calls.value + 1 + 0 * z
            z = nn.Dropout(0.5, deterministic=False)(z[None])[0]
            self.sow("intermediates", "kept", z)
            return trace("z", Normal)(0.5 * z + 0.4 * xs[time], 0.8)

    objective = SMCObjective(Unfold(linear, max_length=6), Unfold(Counting(), max_length=6), num_samples=3)
    length = jnp.int32(4)
    call = ({"x": XS}, (length, 1.0), (length, 1.0, XS))
    rngs = {"choice": KEY, "dropout": jax.random.key(1)}
    run = lambda: objective.apply({"counts": {"guide": {"calls": jnp.zeros(())}}}, *call, rngs=rngs, mutable=True)
    _, variables = jax.jit(run)()
    np.testing.assert_allclose(variables["counts"]["guide"]["calls"], 4.0)
    (kept,) = variables["intermediates"]["guide"]["kept"]
    assert kept.shape == (6, 3)
    assert set(np.unique(kept[0])) <= {0.0, 2.0}  # all start in the state 1
    later = np.asarray(kept[1:4]) == 0
    assert later.any() and not later.all()


@pytest.mark.slow
def test_initialising_leaks_nothing(no_leaks: Any) -> None:
    """The parameters of networks in bodies and kernels are made outside of the loops over steps and samples."""
    objective = SMCObjective(CoinSequence(), Encoded(), num_samples=2)
    variables = no_leaks(lambda: objective.init(KEY, {"steps": {"x": COIN_XS}}, (), (COIN_XS,)))
    assert sorted(variables["params"]["guide"]) == ["CoinReader_0", "SimpleCell_0"]


def test_wrappers_are_looked_through() -> None:
    @gen
    def trained(time, z, slope, params):
        z = trace("z", Normal)(slope * z, 1.0)
        trace("x", Normal)(z, params["scale"])
        return z

    model = TrainCombinator(Unfold(trained, max_length=2), {"scale": 0.6})
    guide = Dimap(Unfold(drifting, max_length=2), pre=lambda xs: (2, 0.0, 2 * xs))
    xs = jnp.float32(PATH_XS)
    scale, observed = {"scale": jnp.float32(0.7)}, choice_map({"x": xs})
    wrapped = SMCObjective(model, guide, num_samples=3)
    run = lambda key: wrapped.apply({"params": {"model": scale}}, key, observed, (2, 0.0, 0.8), (xs,), method="loss")
    got = jax.jit(run)(KEY)
    plain = SMCObjective(Unfold(trained, max_length=2), Unfold(drifting, max_length=2), num_samples=3)
    args = ((2, 0.0, 0.8, scale), (2, 0.0, 2 * xs))
    want = jax.jit(lambda key: plain.apply({}, key, observed, *args, method="loss"))(KEY)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.slow
def test_maps_are_filters_side_by_side() -> None:
    """The loss is the sum of the sequences', each with its key; of a batch of a population as often as it counts."""
    model, guide = coins(3)
    batch = jnp.stack([COIN_XS, COIN_XS[::-1], 2 * COIN_XS, -COIN_XS])
    args = ({"x": batch}, (3, 0.0), (3, 0.0, batch))
    maps = {"model": Map(model, in_axes=None, repeats=4), "guide": Map(guide, in_axes=(None, None, 0))}
    got = value_and_grad(SMCObjective(**maps, num_samples=4), COINS, KEY, *args)

    one = SMCObjective(model, guide, num_samples=4)

    @jax.jit
    def of_sequence(key: Any, xs: Any) -> Any:
        call = (choice_map({"x": xs}), (3, 0.0), (3, 0.0, xs))
        return jax.value_and_grad(lambda variables: one.apply(variables, key, *call, method="loss"))(COINS)

    parts = [of_sequence(key, xs) for key, xs in zip(jax.random.split(KEY, 4), batch, strict=True)]
    same(got, jax.tree.map(lambda *leaves: sum(leaves), *parts))
    of_population = {side: one.clone(total=20) for side, one in maps.items()}
    value = SMCObjective(**of_population, num_samples=4).apply(
        COINS, KEY, choice_map(args[0]), *args[1:], method="loss"
    )
    np.testing.assert_allclose(value, 5 * got[0], rtol=1e-5)
    filters = SMCObjective(**maps, num_samples=4)
    run = lambda key: filters.apply(COINS, *args, rngs={"choice": key}, mutable=["diagnostics"])
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(run, KEY)[1]["diagnostics"])
    assert shapes == {"log_weights": (4, 4), "effective_sample_size": (4, 3), "resamplings": (4,)}


def test_diagnostics() -> None:
    """The weights' log mean is the bound; resampling follows the effective sample sizes."""
    model, guide = Unfold(linear, max_length=6), Unfold(drifting, max_length=6)
    objective = SMCObjective(model, guide, num_samples=4, resample=0.6, **BIASED)
    call = ({"x": XS}, (6, START), (6, START, XS))
    run = jax.jit(lambda key: objective.apply({}, *call, rngs={"choice": key}, mutable=["diagnostics"]))
    for seed in range(5):
        loss, sown = run(jax.random.key(seed))
        sown = sown["diagnostics"]
        np.testing.assert_allclose(jax.nn.logsumexp(sown["log_weights"]) - np.log(4), -loss, rtol=1e-5)
        sizes = np.asarray(sown["effective_sample_size"])
        assert sizes.shape == (6,) and np.all((sizes >= 1 - 1e-5) & (sizes <= 4 + 1e-5))
        assert sown["resamplings"] == np.sum(sizes[:-1] < 0.6 * 4) > 0


# What is refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resample": 0.0}, "`resample`"),
        ({"resample": "sometimes"}, "`resample`"),
        ({"scheme": "best"}, "`scheme`"),
        ({"scheme": "systematic"}, "systematic scheme has infinite variance"),
        ({"num_samples": 0}, "`num_samples`"),
    ],
)
def test_settings_are_checked(settings: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SMCObjective(*coins(3), **settings)


def _two_unfolds() -> Any:
    @gen
    def body():
        trace("steps", Unfold(linear, max_length=6))(6, START)
        trace("more", Unfold(linear, max_length=6))(6, START)

    return body


def _global_choice() -> Any:
    @gen
    def body():
        trace("steps", Unfold(linear, max_length=6))(6, trace("start", Normal)(0.0, 1.0))

    return body


GUIDE, GUIDE_ARGS, OBSERVED = Unfold(drifting, max_length=6), (6, START, XS), {"x": XS}


@pytest.mark.parametrize(
    ("model", "model_args", "guide", "observed", "error", "message"),
    [
        (linear, (0, START), GUIDE, OBSERVED, ArgumentError, r'choice at "z" is outside of one \(Normal\)'),
        (_global_choice(), (), GUIDE, OBSERVED, ArgumentError, 'choice at "start" is outside'),
        (_two_unfolds(), (), GUIDE, OBSERVED, ArgumentError, 'another part at "more"'),
        (Normal, (0.0, 1.0), GUIDE, OBSERVED, ArgumentError, "it is a Normal"),
        (Unfold(linear, max_length=5), (5, START), GUIDE, OBSERVED, ArgumentError, "`max_length` 5, and the guide 6"),
        (Unfold(linear, max_length=6), (4, START), GUIDE, OBSERVED, ArgumentError, "length of the model is 4, and that"),
        (Unfold(linear, max_length=6), (6, START), GUIDE, {"y": XS}, MissingChoiceError, '"x"'),
        (Unfold(linear, max_length=6), (6, START), GUIDE, {"x": XS, "y": XS}, UnvisitedConstraintError, '"y"'),
        (Map(Unfold(linear, max_length=6), in_axes=None, repeats=2), (6, START), GUIDE, OBSERVED, ArgumentError, "both a `Map`"),
        (gen(lambda: trace("s", Unfold(linear, max_length=6))(6, START)), (), GUIDE, OBSERVED, ArgumentError, "same address"),
    ],
)  # fmt: skip
def test_wrong_pairs_are_refused_by_name(
    model: Any, model_args: Any, guide: Any, observed: Any, error: type[Exception], message: str
) -> None:
    objective = SMCObjective(model, guide, num_samples=2)
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda key: objective.apply({}, observed, model_args, GUIDE_ARGS, rngs={"choice": key}), KEY)
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda key: objective.init(key, observed, model_args, GUIDE_ARGS), KEY)


def test_a_threshold_makes_no_unbiased_gradient_through_paths() -> None:
    objective = SMCObjective(*paths(), num_samples=2, resample=0.5)
    with pytest.raises(ArgumentError, match=r'choice at "z" is differentiated through, and whether to resample jumps'):
        jax.eval_shape(lambda key: objective.apply(PATHS, *PATH_CALL, rngs={"choice": key}), KEY)


def test_lengths_that_differ_where_only_running_tells_give_nan() -> None:
    objective = SMCObjective(*coins(3), num_samples=2)

    @jax.jit
    def loss(one: Any, other: Any) -> Any:
        return objective.apply(COINS, {"x": COIN_XS}, (one, 0.0), (other, 0.0, COIN_XS), rngs={"choice": KEY})

    assert np.isfinite(loss(2, 2)) and np.isnan(loss(2, 3))

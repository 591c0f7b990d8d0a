"""Gradients of bounds under every combinator, against sums over all values in float64; and planted errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learning import problems
from learning.gradients import Problem, assert_unbiased, estimates, exact, variance
from learning.problems import plain

from gjflax import (
    ELBO,
    ENUM,
    REINFORCE,
    Bernoulli,
    Categorical,
    GenModule,
    LeaveOneOut,
    Map,
    MeasureValued,
    MovingAverage,
    Normal,
    Predicted,
    gen,
    trace,
)
from gjflax.learning import plan, surrogate
from gjflax.learning.baselines import Baseline

Wrap = Callable[[Any], Any]
SCORE, SUM, PAIR = plain, ENUM, MeasureValued

TABLE: list[tuple[Callable[..., Problem], tuple[Wrap, ...]]] = [
    *((problems.chain, pair) for pair in ((SCORE, SCORE), (PAIR, SUM))),
    (problems.relay, (SCORE, SCORE)),
    *((problems.mixed, pair) for pair in ((SUM, PAIR), (PAIR, SUM), (PAIR, PAIR))),
    *((problems.mixed, triple) for triple in ((SCORE, SUM, REINFORCE), (SUM, PAIR, REINFORCE), (SUM, SUM, PAIR))),
    *((problems.leaving, pair) for pair in ((SCORE, SCORE), (SUM, SCORE), (PAIR, SUM))),
    *((problems.switch, pair) for pair in ((SCORE, SCORE), (SUM, SCORE), (SCORE, PAIR))),
    *(
        (problem, (estimator,))
        for problem in (
            problems.vector,
            problems.points,
            problems.unfold,
            problems.backwards,
            problems.uncertain_length,
            problems.others,
        )
        for estimator in (SCORE, PAIR)
    ),
    *(
        (problem, (SCORE,))
        for problem in (
            problems.amortised,
            problems.nested_maps,
            problems.both_backwards,
            problems.map_of_unfolds,
            problems.unfold_of_maps,
        )
    ),
]
QUICK = {(problems.mixed, (SCORE, SUM, REINFORCE))}


def name(row: Any) -> str:
    problem, estimators = row
    return "-".join([problem.__name__, *(estimator.__name__ for estimator in estimators)])


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=name(row), marks=[] if row in QUICK else pytest.mark.slow) for row in TABLE]
)
def test_value_and_gradient_are_unbiased(row: Any):
    """4 standard errors of 10,000 draws."""
    make, estimators = row
    problem = make(*estimators)
    drawn = estimates(problem)
    assert_unbiased(drawn, exact(problem))
    print(f"{name(row)}: variance of the gradient {variance(drawn[1]):.4g}")


EXACT = [
    (problems.chain, (SUM, SUM)),
    (problems.leaving, (SUM, SUM)),
    (problems.nested_maps, (SUM,)),
    (problems.unfold, (SUM,)),
    (problems.switch, (SUM, SUM)),
    (problems.amortised, (SUM,)),
    (problems.uncertain_length, (SUM,)),
]


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=name(row), marks=[] if row[0] is problems.leaving else pytest.mark.slow) for row in EXACT],
)
def test_where_all_is_enumerated_one_draw_is_exact(row: Any):
    problem = row[0](*row[1])
    value, gradient = estimates(problem, draws=1)
    want, want_gradient = exact(problem)
    np.testing.assert_allclose(value[0], want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-5), gradient, want_gradient)


def test_a_value_without_probability_counts_for_nothing():
    """Its own cost is infinite. The gradient is that of the two values that there are."""
    probs = jnp.array([0.3, 0.7, 0.0])

    @gen
    def model():
        trace("z", Categorical)(probs=np.array([0.2, 0.3, 0.5], np.float32))

    @gen
    def guide(probs):
        trace("z", ENUM(Categorical))(probs=probs)

    def loss(first: Any) -> Any:
        given = jnp.array([0.0, 0.7, 0.0]).at[0].set(first)
        return ELBO(model, guide).apply({}, {}, (), (given,), rngs={"choice": jax.random.key(0)})

    def exact_loss(first: Any) -> Any:
        q = jnp.array([first, 0.7]) / (first + 0.7)
        return jnp.sum(q * (jnp.log(q) - jnp.log(jnp.array([0.2, 0.3]))))

    for got, want in zip(jax.jit(jax.value_and_grad(loss))(probs[0]), jax.value_and_grad(exact_loss)(0.3), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_in_double_precision():
    """Promotion is strict in the tests, so nothing may make a number in another precision."""
    with jax.enable_x64(True):
        problem = problems.mixed(SUM, PAIR, REINFORCE)
        objective = ELBO(problem.model, problem.guide, num_samples=2)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), problem.params)

        def loss(params: Any) -> Any:
            return objective.apply({"params": params}, {"x": 0.9}, rngs={"choice": jax.random.key(0)})

        value, gradient = jax.jit(jax.value_and_grad(loss))(params)
        assert value.dtype == jnp.float64 and np.isfinite(value)
        assert all(np.isfinite(leaf) and leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(gradient))


class _Constant(nn.Module):
    """A prediction for each site, whatever it is given."""

    sites: tuple[str, ...]

    @nn.compact
    def __call__(self, *inputs: Any):
        return {name: self.param(name.replace("/", "_"), nn.initializers.constant(0.7), ()) for name in self.sites}


def with_collections(problem: Problem, **options: Any) -> Any:
    """Draws of loss and gradient where the baseline has variables of its own."""
    objective = ELBO(problem.model, problem.guide, **options)
    args = (problem.observed, problem.model_args, problem.guide_args)
    variables = objective.init(jax.random.key(0), *args)
    others = {name: value for name, value in variables.items() if name != "params"}
    params = {**variables["params"], **problem.params}
    # A baseline that has moved.
    others = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), others)

    def loss(params: Any, key: Any) -> Any:
        return objective.apply({"params": params, **others}, *args, rngs={"choice": key})

    keys = jax.random.split(jax.random.key(1), 10_000)
    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))(params, keys)
    return value, gradient


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_samples": 3}, id="leave one out", marks=pytest.mark.slow),
        pytest.param({"num_samples": 3, "baseline": None}, id="none", marks=pytest.mark.slow),
        pytest.param({"baseline": MovingAverage(0.9)}, id="moving average", marks=pytest.mark.slow),
        pytest.param({"baseline": Predicted(_Constant(("a", "b")))}, id="predicted", marks=pytest.mark.slow),
        pytest.param({"num_samples": 2, "baseline": LeaveOneOut()}, id="two", marks=pytest.mark.slow),
    ],
)
def test_baselines_leave_the_gradient_unbiased(options: Any):
    problem = problems.chain(SCORE, SCORE)
    value, gradient = with_collections(problem, **options)
    gradient.pop("baseline", None)
    assert_unbiased((value, gradient), exact(problem))


# Planted errors: each is one that such code has had, and the bound of 4 standard errors finds it -----------------------


def caught(problem: Problem, **options: Any) -> None:
    with pytest.raises(AssertionError, match="of"):
        assert_unbiased(estimates(problem, **options), exact(problem))


def test_a_dropped_score_term_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan.Plan, "scored", lambda self: [])
    caught(problems.chain(SCORE, SCORE))


class _OfAll(Baseline):
    """The mean over all samples, its own among them."""

    def __call__(self, signals: Any, observed: Any, model_args: Any, guide_args: Any):
        return {name: jnp.mean(s, axis=0, keepdims=True) for name, s in signals.items()}, jnp.zeros(())


def test_a_baseline_that_knows_the_sample_is_caught():
    caught(problems.chain(SCORE, SCORE), num_samples=3, baseline=_OfAll())


@pytest.mark.slow
def test_costs_that_are_taken_to_be_elsewhere_are_caught(monkeypatch: pytest.MonkeyPatch):
    original = plan.closure
    monkeypatch.setattr(
        plan, "closure", lambda plates, edges: original(plates, {a: {b for b in edges[a] if b == a} for a in edges})
    )
    caught(problems.relay(SCORE, SCORE))


@pytest.mark.slow
def test_an_element_that_is_taken_to_be_alone_is_caught(monkeypatch: pytest.MonkeyPatch):
    """Every cost of the plate is taken to be of the same element, though it is of a later one."""
    monkeypatch.setattr(surrogate, "gather", lambda cost, relation, own, leading: cost)
    caught(problems.unfold(SCORE))


# Rao-Blackwellisation --------------------------------------------------------------------------------------------------


def _coins(n: int, total: int | None = None, estimator: Wrap = plain) -> Problem:
    """Coins without a connection to each other, in a `Map` of n elements."""

    @gen
    def point():
        z = trace("z", Bernoulli)(probs=0.3)
        trace("x", Normal)(2.0 * problems.real(z) - 1.0, 0.8)

    @gen
    def coin(logit):
        trace("z", estimator(Bernoulli))(logit)

    class Guide(GenModule):
        @nn.compact
        def __call__(self):
            trace("points", Map(coin, total=total))(self.param("logits", nn.initializers.zeros, (n,)))

    class Model(GenModule):
        @nn.compact
        def __call__(self):
            trace("points", Map(point, repeats=n, total=total))()

    observed = {"points": {"x": jnp.linspace(-1.0, 1.5, n)}}
    return Problem(Model(), Guide(), {"guide": {"logits": jnp.linspace(-0.5, 0.8, n)}}, {}, observed)


def _variances(problem: Problem) -> tuple[float, float]:
    """The variance of the gradient, summed over logits, with an element's own costs and with those of all: exactly."""
    logits = np.asarray(problem.params["guide"]["logits"], np.float64)
    x = np.asarray(problem.observed["points"]["x"], np.float64)
    z = np.array([[0.0], [1.0]])
    q1 = 1 / (1 + np.exp(-logits))
    q = np.where(z == 1, q1, 1 - q1)
    likelihood = -0.5 * ((x - (2 * z - 1)) / 0.8) ** 2 - np.log(0.8) - 0.5 * np.log(2 * np.pi)
    cost, score = np.log(np.where(z == 1, 0.3, 0.7)) + likelihood - np.log(q), z - q1
    mean, spread = (q * cost).sum(0), (q * cost**2).sum(0) - (q * cost).sum(0) ** 2
    # An element's gradient is its score times its cost, and −1 for the derivative of −log q itself.
    gradient = (q * (cost - 1) * score).sum(0)
    own = (q * ((cost - 1) * score) ** 2).sum(0) - gradient**2
    # The costs of the others do not depend on its score: they add their mean, and noise.
    rest, noise = mean.sum() - mean, spread.sum() - spread
    of_all = (q * ((cost - 1 + rest) * score) ** 2).sum(0) + noise * (q * score**2).sum(0) - gradient**2
    return float(own.sum()), float(of_all.sum())


def test_an_element_of_a_map_hears_only_of_its_own_costs(monkeypatch: pytest.MonkeyPatch):
    """The variance is what it is by hand, for 8 coins: some 20 times less than with the costs of all."""
    problem = _coins(8)
    own, of_all = _variances(problem)
    measured = variance(estimates(problem, draws=20_000)[1])
    # The relative error of a variance of 20,000 draws, 8 entries: some percent.
    assert abs(measured / own - 1) < 0.1
    monkeypatch.setattr(surrogate, "flow_of", lambda *args: None)
    drawn = estimates(problem, draws=20_000)
    assert abs(variance(drawn[1]) / of_all - 1) < 0.1
    assert of_all / own > 8
    assert_unbiased(drawn[1], jax.grad(lambda params: _loss_of_coins(problem, params))(problem.params))


@pytest.mark.parametrize(
    "estimator", [SCORE, *(pytest.param(e, marks=pytest.mark.slow) for e in (SUM, PAIR))], ids=lambda e: e.__name__
)
def test_a_batch_stands_for_its_population(estimator: Wrap):
    """3 coins of 12 have 4 times the loss and the gradient of the 3: 4 standard errors of 10,000 draws."""
    problem = _coins(3, 12, estimator)
    value, gradient = jax.value_and_grad(lambda params: 4 * _loss_of_coins(problem, params))(problem.params)
    assert_unbiased(estimates(problem), (np.asarray(value), gradient))


def _loss_of_coins(problem: Problem, params: Any) -> Any:
    """A sum over the two values of each coin."""
    logits, x = params["guide"]["logits"], problem.observed["points"]["x"]
    loss = 0.0
    for z, p in ((0.0, 0.7), (1.0, 0.3)):
        log_q = jax.nn.log_sigmoid(logits if z else -logits)
        log_p = np.log(p) + jax.scipy.stats.norm.logpdf(x, 2 * z - 1, 0.8)
        loss = loss + jnp.sum(jnp.exp(log_q) * (log_q - log_p))
    return loss

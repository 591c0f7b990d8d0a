"""`TFPDistribution`: families beyond the named ones against TFP itself, composites against formulas by hand."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributions.tfp_oracle import kernels, tf, tfb, tfd
from scipy import special, stats

import gjflax
from gjflax import (
    GaussianProcess,
    HiddenMarkovModel,
    Independent,
    LinearGaussianStateSpaceModel,
    MixtureSameFamily,
    TFPDistribution,
    TransformedDistribution,
    gen,
    trace,
)

KEY = jax.random.key(6)
V = np.float32([0.5, 1.5, 3.0])

BEYOND: list[tuple[str, tuple[Any, ...], Any]] = [
    ("Moyal", (V, 2.0), V),
    ("Zipf", (np.float32([2.5, 3.5]),), [1, 4]),
    ("Skellam", (2.0, V), [-2, 0, 3]),
    ("BetaBinomial", (9.0, 2.0, V), [0, 3, 9]),
    ("JohnsonSU", (-0.5, 2.0, V, 2.0), V),
    ("DirichletMultinomial", (5.0, V), [1, 3, 1]),
    ("VonMisesFisher", (np.float32([0.6, 0.8, 0.0]), 2.5), np.float32([0.0, 0.6, 0.8])),
    ("PowerSpherical", (np.float32([0.6, 0.8]), 2.5), np.float32([0.8, 0.6])),
    ("Triangular", (-1.0, 4.0, 2.0), 0.5),
    ("LogLogistic", (0.5, V), V),
    ("LogitNormal", (0.5, V), np.float32([0.1, 0.4, 0.8])),
    ("InverseGaussian", (2.0, V), V),
    ("GeneralizedPareto", (0.1, V, 0.3), V),
    ("GeneralizedNormal", (0.5, 2.0, V), V),
    ("HalfStudentT", (3.0, 0.2, V), V),
    ("NoncentralChi2", (3.0, V), V),
    ("ContinuousBernoulli", (V,), np.float32([0.1, 0.4, 0.8])),
    ("RelaxedBernoulli", (0.7, V), np.float32([0.1, 0.4, 0.8])),
    ("OrderedLogistic", (np.float32([-1.0, 0.5, 2.0]), V), [0, 3, 1]),
    ("PlackettLuce", (V,), [2, 0, 1]),
    ("MultivariateNormalDiagPlusLowRank", (V, V, np.float32([[0.5], [0.1], [0.2]])), V),
    ("SinhArcsinh", (0.5, V, 0.3, 1.2), V),
    ("TruncatedCauchy", (0.5, V, -1.0, 4.0), V),
    ("PERT", (0.0, V, 4.0), V),
    ("Chi", (V,), V),
    ("ExponentiallyModifiedGaussian", (0.5, 2.0, V), V),
]


SLOW_TO_COMPILE = ("NoncentralChi2", "Skellam", "VonMisesFisher")


@pytest.mark.parametrize(
    ("name", "args", "value"),
    [pytest.param(*case, marks=pytest.mark.slow) if case[0] in SLOW_TO_COMPILE else case for case in BEYOND],
    ids=[case[0] for case in BEYOND],
)
def test_every_family_of_tfp_scores_as_tfp_does(name: str, args: tuple[Any, ...], value: Any) -> None:
    family = getattr(tfd, name)
    distribution = TFPDistribution(family)
    _, (retval, score) = jax.jit(lambda args: distribution.assess(KEY, value, args))(args)

    @jax.jit
    def log_prob(args: Any) -> Any:
        made = family(*args)
        return jnp.sum(made.log_prob(jnp.asarray(value, made.dtype)))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want = log_prob(tuple(map(jnp.float32, args)))
    np.testing.assert_allclose(score, want, rtol=1e-5, atol=1e-5)
    whole = isinstance(value, list)
    assert retval.dtype == (jnp.int32 if whole else jnp.float32)
    assert distribution.at(args).is_discrete == whole


OUTSIDE: list[tuple[str, tuple[Any, ...], tuple[float, ...]]] = [
    ("Zipf", (2.5,), (0, -1)),
    ("BetaBinomial", (4.0, 2.0, 3.0), (-1, 5)),
    ("LogitNormal", (0.5, 2.0), (0.0, 1.0, -0.2, 1.2, np.inf)),
    ("LogLogistic", (0.5, 2.0), (0.0, -1.0, np.inf)),
    ("HalfStudentT", (3.0, 0.5, 2.0), (0.4, -np.inf, np.inf)),
    ("InverseGaussian", (2.0, 3.0), (0.0, -1.0, np.inf)),
    ("RelaxedBernoulli", (0.7, 0.3), (0.0, 1.0, 1.5, -np.inf)),
    ("ContinuousBernoulli", (0.7,), (-0.1, 1.1, np.inf)),
    ("PERT", (0.0, 2.0, 4.0), (-0.1, 4.1, np.inf)),
    ("Triangular", (0.0, 4.0, 2.0), (-0.1, 4.1, np.inf)),
    ("Moyal", (0.5, 2.0), (-np.inf, np.inf)),
    ("Chi", (3.0,), (-0.5, np.inf)),
]


@pytest.mark.parametrize(("name", "args", "values"), OUTSIDE, ids=[case[0] for case in OUTSIDE])
def test_outside_of_a_known_support_the_score_is_minus_infinity(name: str, args: Any, values: Any) -> None:
    distribution = TFPDistribution(name)
    whole = distribution.at(args).is_discrete
    points = jnp.asarray(values, jnp.int32 if whole else jnp.float32)
    score = jax.vmap(jax.value_and_grad(lambda args, v: distribution.assess(KEY, v, args)[1][1]), (None, 0))
    scores, gradients = jax.jit(score)(tuple(map(jnp.float32, args)), points)
    assert np.all(np.isneginf(scores)), scores
    assert not any(np.isnan(gradient).any() for gradient in gradients)


# Names and equality ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Normal", "StudentT", "Moyal", "Categorical", "MixtureSameFamily"])
def test_a_class_and_its_name_are_one_family(name: str) -> None:
    by_class, by_name = TFPDistribution(getattr(tfd, name)), TFPDistribution(name)
    assert by_class == by_name and hash(by_class) == hash(by_name)
    assert by_class == getattr(gjflax, name, by_name)
    assert pickle.loads(pickle.dumps(by_class)) == by_name


def test_two_ways_of_naming_a_family_compile_once() -> None:
    count = 0

    @jax.jit
    def score(trace: Any) -> Any:
        nonlocal count
        count += 1
        return trace.get_score()

    for distribution in (gjflax.StudentT, TFPDistribution(tfd.StudentT), TFPDistribution("StudentT")):
        score(distribution.importance(KEY, 1.0, (3.0, 0.0, 2.0))[1][1])
    assert count == 1


def test_a_class_of_another_library_is_not_mistaken_for_tfp_s() -> None:
    class Normal(tfd.Cauchy):  # pyright: ignore[reportUntypedBaseClass]
        """A distribution with the name of another."""

    distribution = TFPDistribution(Normal)
    assert distribution != gjflax.Normal
    score = distribution.assess(KEY, 1.0, (0.5, 2.0))[1][1]
    np.testing.assert_allclose(score, stats.cauchy(0.5, 2).logpdf(1.0), rtol=1e-5)


def test_what_is_no_family_is_refused() -> None:
    with pytest.raises(gjflax.ArgumentError, match="class of TFP"):
        TFPDistribution(3)
    with pytest.raises(gjflax.ArgumentError, match="class of TFP"):
        TFPDistribution(dict)
    with pytest.raises(gjflax.ArgumentError, match="no distribution `Nrmal`"):
        TFPDistribution("Nrmal").simulate(KEY, (0.0, 1.0))


def test_several_arrays_are_no_choice() -> None:
    joint = TFPDistribution(tfd.JointDistributionSequential)
    with pytest.raises(gjflax.ArgumentError, match="several arrays"):
        joint.simulate(KEY, ([tfd.Normal(0.0, 1.0), tfd.Normal(0.0, 1.0)],))


# Keywords -------------------------------------------------------------------------------------------------------


def assess(distribution: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    @gen
    def model() -> Any:
        return trace("x", distribution)(*args, **kwargs)

    return model.assess(KEY, {"x": value}, ())[1][1]


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "value", "want"),
    [
        ("Bernoulli", (), {"probs": 0.2}, 1, np.log(0.2)),
        ("Bernoulli", (), {"logits": 0.3}, 1, np.log(special.expit(0.3))),
        ("NegativeBinomial", (), {"total_count": 3.0, "probs": 0.2}, 2, stats.nbinom(3, 0.8).logpmf(2)),
        ("NegativeBinomial", (3.0,), {"probs": 0.2}, 2, stats.nbinom(3, 0.8).logpmf(2)),
        ("NegativeBinomial", (), {"probs": 0.2, "total_count": 3.0}, 2, stats.nbinom(3, 0.8).logpmf(2)),
        ("StudentT", (), {"df": 3.0, "loc": 0.5, "scale": 2.0}, 1.0, stats.t(3, 0.5, 2).logpdf(1)),
        ("StudentT", (3.0,), {"scale": 2.0, "loc": 0.5}, 1.0, stats.t(3, 0.5, 2).logpdf(1)),
        ("Gamma", (2.5,), {"rate": 2.0}, 1.0, stats.gamma(2.5, scale=0.5).logpdf(1)),
        ("Normal", (0.5,), {"scale": 2.0}, 1.0, stats.norm(0.5, 2).logpdf(1)),
        ("Uniform", (), {"high": 4.0}, 1.0, -np.log(4)),
        ("Uniform", (), {}, 0.5, 0.0),
        ("Wishart", (4.0,), {"scale_tril": jnp.eye(2)}, jnp.eye(2), stats.wishart(4, np.eye(2)).logpdf(np.eye(2))),
        ("Gamma", (2.5, 2.0), {"force_probs_to_zero_outside_support": True}, -1.0, -np.inf),
    ],
)
def test_parameters_go_by_name(name: str, args: Any, kwargs: Any, value: Any, want: float) -> None:
    np.testing.assert_allclose(assess(getattr(gjflax, name), value, *args, **kwargs), want, rtol=1e-5)


def test_what_was_given_by_name_before_stays_so() -> None:
    coin = gjflax.Bernoulli.by_keyword("probs")
    np.testing.assert_allclose(assess(coin, 1, probs=0.2), np.log(0.2), rtol=1e-5)
    counts = gjflax.NegativeBinomial.by_keyword("probs")
    want = stats.nbinom(3, 0.8).logpmf(2)
    np.testing.assert_allclose(assess(counts, 2, 0.2, total_count=3.0), want, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "message"),
    [
        ("Normal", (0.0,), {"sd": 1.0}, r'"x" \(Normal\).*no argument `sd`.*It takes \(loc, scale\)'),
        ("Gamma", (1.0,), {"scale": 1.0}, r'"x" \(Gamma\).*no argument `scale`.*concentration'),
        ("Normal", (0.0,), {}, r'"x" \(Normal\).*missing.*scale'),
        ("Gamma", (), {}, r'"x" \(Gamma\).*missing.*concentration'),
        ("Normal", (0.0, 1.0, 2.0), {}, r'"x" \(Normal\).*too many positional'),
        ("Normal", (0.0, 1.0), {"loc": 2.0}, r'"x" \(Normal\).*multiple values for argument .loc'),
        ("Bernoulli", (), {}, r'"x" \(Bernoulli\).*either `logits` or `probs`, not none'),
        ("Bernoulli", (0.5,), {"probs": 0.5}, r'"x" \(Bernoulli\).*either `logits` or `probs`, not both'),
        ("Poisson", (), {}, r'"x" \(Poisson\).*`rate` or `log_rate`, not none'),
        ("Wishart", (3.0,), {}, r'"x" \(Wishart\).*`scale` or `scale_tril`, not none'),
        ("NegativeBinomial", (3.0,), {}, r'"x" \(NegativeBinomial\)'),
        ("Normal", ("zero", 1.0), {}, r'"x" \(Normal\).*real numbers.*zero'),
        ("Gamma", (1j, 1.0), {}, r'"x" \(Gamma\).*real numbers'),
        ("Normal", (None, 1.0), {}, r'"x" \(Normal\).*real numbers'),
    ],
)
def test_wrong_arguments_are_an_error_that_names_the_address_and_the_family(
    name: str, args: Any, kwargs: Any, message: str
) -> None:
    with pytest.raises(gjflax.ArgumentError, match=message):
        assess(getattr(gjflax, name), 1.0, *args, **kwargs)


@pytest.mark.parametrize("name", ["Normal", "Gamma"])
def test_arguments_that_do_not_broadcast_are_an_error_that_names_the_address(name: str) -> None:
    with pytest.raises(gjflax.ChoiceShapeError, match=rf'"x" \({name}\).*\(2,\), \(3,\)'):
        assess(getattr(gjflax, name), jnp.ones(3), jnp.ones(2), jnp.ones(3))


def test_too_few_values_for_the_keywords_are_an_error() -> None:
    with pytest.raises(gjflax.ArgumentError, match="come by keyword"):
        gjflax.StudentT.by_keyword("loc", "scale").simulate(KEY, (1.0,))


# Composites -----------------------------------------------------------------------------------------------------

WEIGHTS, LOCS, SCALES = np.array([0.3, 0.7]), np.array([-1.0, 2.0]), np.array([0.5, 3.0])
INITIAL, TRANSITION = np.array([0.6, 0.4]), np.array([[0.7, 0.3], [0.2, 0.8]])


def normal_mixture(locs: Any) -> tuple[Any, ...]:
    return tfd.Categorical(probs=jnp.float32(WEIGHTS)), tfd.Normal(locs, jnp.float32(SCALES))


def log_normal(loc: Any) -> tuple[Any, ...]:
    return tfd.Normal(loc[0], 2.0), tfb.Exp()


def gammas(concentration: Any) -> tuple[Any, ...]:
    return tfd.Gamma(concentration, 2.0), 1


POINTS = np.linspace(0, 1, 4)[:, None]


def process(amplitude: Any) -> tuple[Any, ...]:
    return kernels.ExponentiatedQuadratic(amplitude[0], amplitude[1]), jnp.float32(POINTS)


def process_oracle(value: Any, amplitude: Any) -> Any:
    kernel = amplitude[0] ** 2 * np.exp(-0.5 * ((POINTS - POINTS.T) / amplitude[1]) ** 2)
    return stats.multivariate_normal(np.zeros(4), kernel + 0.2 * np.eye(4)).logpdf(value)


def markov(locs: Any) -> tuple[Any, ...]:
    chain = tfd.Categorical(probs=jnp.float32(INITIAL)), tfd.Categorical(probs=jnp.float32(TRANSITION))
    return *chain, tfd.Normal(locs, 0.5), 3


def markov_oracle(value: Any, locs: Any) -> Any:
    """The sum over all paths of states."""
    paths = []
    for path in itertools.product(range(2), repeat=3):
        steps = [np.log(TRANSITION[a, b]) for a, b in itertools.pairwise(path)]
        emissions = stats.norm(locs[list(path)], 0.5).logpdf(value)
        paths.append(np.log(INITIAL[path[0]]) + sum(steps) + emissions.sum())
    return special.logsumexp(paths)


def walk(noise: Any) -> tuple[Any, ...]:
    """A random walk that is observed with noise."""
    step, seen = tfd.MultivariateNormalDiag(scale_diag=noise[:1]), tfd.MultivariateNormalDiag(scale_diag=noise[1:])
    return 3, jnp.eye(1), step, jnp.eye(1), seen, tfd.MultivariateNormalDiag(scale_diag=jnp.full(1, 2.0))


def walk_oracle(value: Any, noise: Any) -> Any:
    """A walk's covariance at steps s and t is that of the start and of the steps until the earlier one."""
    earlier = np.minimum(*np.meshgrid(range(3), range(3)))
    covariance = 4.0 + noise[0] ** 2 * earlier + noise[1] ** 2 * np.eye(3)
    return stats.multivariate_normal(np.zeros(3), covariance).logpdf(np.asarray(value)[:, 0])


COMPOSITES: dict[str, tuple[Any, Callable[[Any], Any], Any, list[Any], Callable[..., Any]]] = {
    "MixtureSameFamily": (
        MixtureSameFamily,
        normal_mixture,
        LOCS,
        [0.3, -4.0],
        lambda value, locs: special.logsumexp(np.log(WEIGHTS) + stats.norm(locs, SCALES).logpdf(value)),
    ),
    "TransformedDistribution": (
        TransformedDistribution,
        log_normal,
        np.array([0.5]),
        [0.3, 4.0],
        lambda value, loc: stats.lognorm(2, scale=np.exp(loc[0])).logpdf(value),
    ),
    "Independent": (
        Independent,
        gammas,
        np.array([1.5, 2.0, 0.7]),
        [[0.3, 1.0, 2.0], [4.0, 0.1, 0.2]],
        lambda value, concentration: stats.gamma(concentration, scale=0.5).logpdf(value).sum(),
    ),
    "GaussianProcess": (
        GaussianProcess.by_keyword("observation_noise_variance"),
        lambda amplitude: (*process(amplitude), 0.2),
        np.array([1.5, 0.4]),
        [[0.3, 1.0, -2.0, 0.0], [4.0, 0.1, 0.2, -0.7]],
        process_oracle,
    ),
    "HiddenMarkovModel": (
        HiddenMarkovModel,
        markov,
        LOCS,
        [[0.3, 1.0, 2.0], [-1.0, -1.1, 2.2]],
        markov_oracle,
    ),
    "LinearGaussianStateSpaceModel": (
        LinearGaussianStateSpaceModel,
        walk,
        np.array([0.5, 0.3]),
        [[[0.3], [1.0], [2.0]], [[-1.0], [-1.1], [2.2]]],
        walk_oracle,
    ),
}
each_composite = pytest.mark.parametrize("name", COMPOSITES)


@pytest.mark.slow
@each_composite
def test_a_composite_in_a_body_crosses_jit_updates_and_differentiates(name: str) -> None:
    distribution, build, parameter, (first, second), oracle = COMPOSITES[name]

    @gen
    def model(parameter: Any) -> Any:
        return trace("x", distribution)(*build(parameter))

    parameter, other = jnp.float32(parameter), jnp.float32(parameter) * 1.25
    first, second = jnp.float32(first), jnp.float32(second)

    def want(value: Any, parameter: Any) -> Any:
        return oracle(np.asarray(value, np.float64), np.asarray(parameter, np.float64))

    # A trace leaves one compiled function and enters another.
    _, drawn = jax.jit(model.simulate)(KEY, (parameter,))
    assert drawn["x"].shape == first.shape and drawn["x"].dtype == jnp.float32
    np.testing.assert_allclose(drawn.get_score(), want(drawn["x"], parameter), rtol=1e-4, atol=1e-4)
    update = jax.jit(lambda trace, x, p: model.update(KEY, trace, {"x": x}, (p,))[1][1:])
    weight, changed, discard = update(drawn, first, parameter)
    np.testing.assert_allclose(weight, want(first, parameter) - want(drawn["x"], parameter), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(discard["x"], drawn["x"])
    weight, changed, _ = update(changed, second, other)
    np.testing.assert_allclose(weight, want(second, other) - want(first, parameter), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(changed.get_score(), want(second, other), rtol=1e-4, atol=1e-4)
    assert jax.tree.structure(changed) == jax.tree.structure(drawn)

    gradient = jax.jit(jax.grad(lambda p: model.assess(KEY, {"x": first}, (p,))[1][1]))(parameter)
    from distributions.table import differences

    numeric = differences(lambda p: oracle(np.asarray(first, np.float64), p), parameter)
    np.testing.assert_allclose(gradient, numeric, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("MixtureSameFamily", "HiddenMarkovModel") else pytest.mark.slow)
        for name in COMPOSITES
    ],
)
def test_a_composite_maps_over_keys_and_arguments(name: str) -> None:
    distribution, build, parameter, _, oracle = COMPOSITES[name]

    @gen
    def model(parameter: Any) -> Any:
        return trace("x", distribution)(*build(parameter))

    parameters = jnp.float32(np.stack([parameter, 1.25 * parameter, 1.5 * parameter]))
    traces = jax.jit(jax.vmap(lambda key, p: model.simulate(key, (p,))[1]))(jax.random.split(KEY, 3), parameters)
    for i in range(3):
        want = oracle(np.asarray(traces["x"][i], np.float64), np.asarray(parameters[i], np.float64))
        np.testing.assert_allclose(traces.get_score()[i], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("distribution", "args", "values"),
    [
        (MixtureSameFamily, (tfd.Categorical(logits=[0.0, 1.0]), tfd.Gamma([1.5, 2.0], [1.0, 3.0])), [-1.0, np.inf]),
        (TransformedDistribution, (tfd.Normal(0.0, 2.0), tfb.Exp()), [-1.0, 0.0, np.inf]),
        (TransformedDistribution, (tfd.Gamma(2.0, 2.0), tfb.Shift(3.0)), [2.0, -np.inf]),
        (Independent, (tfd.Beta([1.5, 2.0], 3.0), 1), [[0.5, 1.5], [-0.1, 0.5]]),
        (
            HiddenMarkovModel,
            (*markov(jnp.float32(LOCS))[:2], tfd.Gamma([1.5, 2.0], [1.0, 3.0]), 2),
            [[1.0, -1.0], [np.inf, 1.0]],
        ),
        (LinearGaussianStateSpaceModel, walk(jnp.float32([0.5, 0.3])), [[[0.0], [np.inf], [0.0]]]),
        (GaussianProcess, process(jnp.float32([1.5, 0.4])), [[0.0, np.nan, 0.0, -np.inf]]),
    ],
    ids=lambda value: value.label if isinstance(value, TFPDistribution) else "",
)
def test_outside_of_a_composite_s_support_the_score_is_minus_infinity(
    distribution: Any, args: Any, values: Any
) -> None:
    for value in values:
        score = jax.jit(jax.value_and_grad(lambda v: distribution.assess(KEY, v, args)[1][1]))
        score, gradient = score(jnp.float32(value))
        assert np.isneginf(score)
        assert not np.isnan(gradient).any()


def test_composites_of_counts_draw_integers() -> None:
    rates = tfd.Poisson(jnp.array([0.5, 9.0]))
    mixture = (tfd.Categorical(probs=[0.3, 0.7]), rates)
    _, (_, drawn) = MixtureSameFamily.importance(KEY, 2, mixture)
    assert drawn.value.dtype == jnp.int32 and drawn.is_discrete
    want = special.logsumexp(np.log(WEIGHTS) + stats.poisson([0.5, 9.0]).logpmf(4))
    np.testing.assert_allclose(MixtureSameFamily.assess(KEY, 4, mixture)[1][1], want, rtol=1e-5)
    assert np.isneginf(MixtureSameFamily.assess(KEY, -1, mixture)[1][1])
    for distribution, args, shape in (
        (HiddenMarkovModel, (*markov(jnp.float32(LOCS))[:2], rates, 4), (4,)),
        (Independent, (tfd.Bernoulli(probs=[0.3, 0.7]), 1), (2,)),
    ):
        drawn = jax.eval_shape(lambda key, d=distribution, args=args: d.simulate(key, args)[1], KEY)
        assert drawn.value.dtype == jnp.int32 and drawn.value.shape == shape


def test_a_mixture_maps_to_unconstrained_space_where_its_parts_have_one_support() -> None:
    weights = tfd.Categorical(probs=jnp.float32(WEIGHTS))
    same, different = tfd.Gamma([1.5, 2.0], [1.0, 3.0]), tfd.Uniform([0.0, 1.0], [2.0, 3.0])
    _, (_, drawn) = MixtureSameFamily.importance(KEY, 1.5, (weights, same))
    assert not drawn.is_discrete
    free, minus_log_det = MixtureSameFamily.unconstrain(drawn, gjflax.AllSelection())
    choices, log_det = MixtureSameFamily.constrain(free, (weights, same))
    np.testing.assert_allclose(choices.get_value(), drawn.value, rtol=1e-5)
    np.testing.assert_allclose(log_det, -minus_log_det, rtol=1e-5)
    _, (_, drawn) = MixtureSameFamily.importance(KEY, 1.5, (weights, different))
    with pytest.raises(gjflax.NotImplementedByGenerativeFunctionError, match="MixtureSameFamily"):
        MixtureSameFamily.unconstrain(drawn, gjflax.AllSelection())
    _, gradient = MixtureSameFamily.choice_grad(KEY, drawn, gjflax.AllSelection())
    assert gradient.get_value() == 0


def test_a_mixture_of_vectors_is_one_choice() -> None:
    components = tfd.MultivariateNormalDiag(jnp.float32([[0.0, 1.0], [3.0, -1.0]]), jnp.float32([2.0, 0.5]))
    args = tfd.Categorical(probs=jnp.float32(WEIGHTS)), components
    value = np.array([0.5, 0.2])
    each = [stats.multivariate_normal(mean, np.diag([4.0, 0.25])).logpdf(value) for mean in ([0, 1], [3, -1])]
    score = MixtureSameFamily.assess(KEY, value, args)[1][1]
    np.testing.assert_allclose(score, special.logsumexp(np.log(WEIGHTS) + each), rtol=1e-5)
    free, _ = MixtureSameFamily.unconstrain(MixtureSameFamily.importance(KEY, value, args)[1][1], gjflax.AllSelection())
    assert free.get_value().shape == (2,)


STRICT: list[tuple[Any, tuple[Any, ...], Any]] = [
    (gjflax.Gamma, (np.full((3, 2), 1.5), np.array([1.5, 2.0])), np.full((3, 2), 0.5)),
    (gjflax.Beta, (np.full((3, 2), 1.5), np.array([1.5, 2.0])), np.full((3, 2), 0.5)),
    (gjflax.NegativeBinomial.by_keyword("probs"), (np.full((3, 2), 1.5), np.array([0.2, 0.5])), [[1, 2]] * 3),
    (gjflax.MultivariateNormalTriL, (np.ones((3, 2)), np.eye(2)), np.full((3, 2), 0.5)),
    (gjflax.Dirichlet, (np.ones((2, 3)),), np.full((2, 3), 1 / 3)),
]


@pytest.mark.parametrize(("distribution", "args", "value"), STRICT, ids=[case[0].label for case in STRICT])
def test_second_derivatives_of_compiled_scores_pass_where_ranks_must_agree(
    distribution: Any, args: Any, value: Any
) -> None:
    # JAX takes the derivative of a compiled function when it is asked for, outside of the call.
    args = tuple(map(jnp.float32, args))
    value = jnp.asarray(value, jnp.int32 if isinstance(value, list) else jnp.float32)
    score = jax.jit(lambda args: distribution.assess(KEY, value, args)[1][1])
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        hessian = jax.jit(jax.hessian(score))(args)
    assert all(np.isfinite(part).all() for part in jax.tree.leaves(hessian))


def test_derivatives_of_a_compiled_composite_pass_where_ranks_must_agree() -> None:
    @gen
    def model(concentration: Any) -> None:
        parts = tfd.Gamma(concentration, jnp.ones(2))
        trace("x", HiddenMarkovModel)(*markov(jnp.float32(LOCS))[:2], parts, 3)

    score = jax.jit(lambda c: model.assess(KEY, {"x": jnp.array([1.0, 2.0, 3.0])}, (c,))[1][1])
    gradient = jax.grad(score)(jnp.array([1.5, 2.0]))
    step = jnp.array([1e-2, 0.0])
    numeric = (score(jnp.array([1.5, 2.0]) + step) - score(jnp.array([1.5, 2.0]) - step)) / 2e-2
    np.testing.assert_allclose(gradient[0], numeric, rtol=1e-2)


def test_a_draw_is_differentiable_in_its_arguments_and_a_whole_one_has_slope_zero() -> None:
    draw = jax.jit(lambda rate: gjflax.Gamma.simulate(KEY, (2.5, rate))[1].value)
    # A draw scales with 1 / rate.
    np.testing.assert_allclose(jax.grad(draw)(2.0), -draw(2.0) / 2.0, rtol=1e-4)
    geometric = gjflax.Geometric.by_keyword("probs")
    count = jax.jit(lambda probs: geometric.simulate(KEY, (probs,))[1].value.astype(jnp.float32))
    assert jax.grad(count)(0.3) == 0


# Arguments that are part of the program -------------------------------------------------------------------------


def test_a_number_that_shapes_the_computation_stays_known_in_a_trace() -> None:
    _, drawn = jax.jit(lambda key: gjflax.CholeskyLKJ.importance(key, jnp.eye(3), (3, 1.5))[1])(KEY)
    dimension, concentration = drawn.get_args()
    assert dimension == 3 and isinstance(dimension, int)
    assert isinstance(concentration, jax.Array)
    assert jax.jit(lambda trace: trace.get_gen_fn().assess(KEY, trace.value, trace.get_args())[1][1])(drawn).shape == ()


def test_a_traced_number_of_steps_is_an_error_that_says_so() -> None:
    with pytest.raises(gjflax.ArgumentError, match="`dimension`.*known while"):
        jax.jit(lambda n: gjflax.CholeskyLKJ.simulate(KEY, (n, 1.5))[1].value)(3)


@pytest.mark.parametrize("dimension", [np.int64(3), np.array(3), jnp.array(3)])
def test_an_array_may_stand_for_a_number_of_the_program(dimension: Any) -> None:
    assert gjflax.CholeskyLKJ.at((dimension, 1.5)).template.shape == (3, 3)


def test_flags_and_shapes_are_part_of_the_program() -> None:
    factor = jnp.linalg.cholesky(jnp.array([[2.0, 0.5], [0.5, 1.0]]))
    wishart = TFPDistribution("WishartTriL").by_keyword("input_output_cholesky")
    _, drawn = jax.jit(lambda key: wishart.importance(key, factor, (4.0, factor, True))[1])(KEY)
    assert drawn.get_args()[2] is True
    assert np.isfinite(drawn.get_score())
    assert np.isneginf(wishart.assess(KEY, -drawn.value, (4.0, factor, True))[1][1])
    _, drawn = TFPDistribution("Sample").simulate(KEY, (tfd.Normal(0.0, 2.0), [3]))
    assert drawn.value.shape == (3,)


def test_a_function_is_part_of_the_program() -> None:
    def mean(points: Any) -> Any:
        return 3 * points[..., 0]

    distribution = GaussianProcess.by_keyword("mean_fn", "observation_noise_variance")
    args = (*process(np.float32([1.5, 0.4])), mean, 0.2)
    score = distribution.assess(KEY, np.float32(3 * POINTS[:, 0]), args)[1][1]
    np.testing.assert_allclose(score, process_oracle(np.zeros(4), [1.5, 0.4]), rtol=1e-4)


def test_samples_keep_their_dtype() -> None:
    empirical = TFPDistribution("Empirical")
    _, drawn = empirical.simulate(KEY, (jnp.array([3, 3, 8]),))
    assert drawn.value.dtype == jnp.int32 and int(drawn.value) in (3, 8)
    np.testing.assert_allclose(empirical.assess(KEY, 3, (jnp.array([3, 3, 8]),))[1][1], np.log(2 / 3), rtol=1e-5)


def test_a_mask_stays_a_mask() -> None:
    masked = TFPDistribution("Masked")
    args = (tfd.Normal(jnp.zeros(2), 2.0), jnp.array([True, False]))
    want = stats.norm(0, 2).logpdf(0.5)
    np.testing.assert_allclose(masked.assess(KEY, jnp.array([0.5, 9.0]), args)[1][1], want, rtol=1e-5)


def test_an_operator_is_an_argument() -> None:
    student = TFPDistribution(tfd.MultivariateStudentTLinearOperator)
    factor = np.linalg.cholesky(np.array([[2.0, 0.5], [0.5, 1.0]]))
    args = (np.float32(4.0), np.float32([0.5, 1.0]), tf.linalg.LinearOperatorLowerTriangular(jnp.float32(factor)))
    want = stats.multivariate_t([0.5, 1.0], factor @ factor.T, 4).logpdf([1.0, 2.0])
    _, drawn = jax.jit(lambda key: student.simulate(key, args))(KEY)
    assert drawn.value.shape == (2,)
    np.testing.assert_allclose(student.assess(KEY, np.float32([1.0, 2.0]), args)[1][1], want, rtol=1e-5)


@pytest.mark.parametrize(("name", "want"), [("Normal", True), ("Gamma", True), ("Poisson", False), ("Beta", True)])
def test_a_trace_says_whether_its_value_is_reparameterised(name: str, want: bool) -> None:
    args = (2.0,) if name == "Poisson" else (2.0, 3.0)
    _, (_, given) = getattr(gjflax, name).importance(KEY, 1, args)
    assert given.is_reparameterized == want


def test_tfp_s_own_warnings_do_not_reach_the_user() -> None:
    # Under the tests' settings any warning is an error.
    for name, args in (("StudentT", (3.0, 0.0, 2.0)), ("VonMises", (0.0, 2.0)), ("NegativeBinomial", (3.0, 0.2))):
        jax.eval_shape(lambda key, name=name, args=args: getattr(gjflax, name).simulate(key, args)[1], KEY)

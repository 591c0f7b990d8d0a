"""The interface of one choice: weights by hand, values and dtypes that are taken or refused, users' own families."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import gjflax
from gjflax import (
    AllSelection,
    Bernoulli,
    Diff,
    Distribution,
    EmptyChoiceMap,
    Gamma,
    NoneSelection,
    Normal,
    Poisson,
    ValueChoiceMap,
    VectorChoiceMap,
    distribution,
    gen,
    trace,
)

KEY = jax.random.key(7)


def normal(value: Any, loc: Any = 0.5, scale: Any = 2.0) -> float:
    return float(np.sum(stats.norm(loc, scale).logpdf(np.asarray(value, np.float64))))


def gamma(value: Any, concentration: Any = 2.5, rate: Any = 3.0) -> float:
    return float(np.sum(stats.gamma(concentration, scale=1 / np.asarray(rate)).logpdf(np.asarray(value, np.float64))))


# One family that is built without TFP and one that goes through it.
LEAVES = pytest.mark.parametrize(
    ("leaf", "args", "other", "oracle"),
    [
        (Normal, (0.5, 2.0), (-1.0, 0.3), normal),
        (Gamma, (2.5, 3.0), (4.0, 0.7), gamma),
        (Normal, (np.float32([0.5, 1.0]), 2.0), (np.float32([3.0, 0.1]), 0.3), normal),
        (Gamma, (2.5, np.float32([3.0, 0.2])), (4.0, np.float32([0.7, 9.0])), gamma),
    ],
    ids=["Normal", "Gamma", "Normal-vector", "Gamma-vector"],
)


def value_like(args: tuple[Any, ...], number: float) -> Any:
    shape = np.broadcast_shapes(*map(np.shape, args))
    return np.float32(np.full(shape, number) + 0.25 * np.arange(int(np.prod(shape))).reshape(shape))


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


# Weights --------------------------------------------------------------------------------------------------------


@LEAVES
def test_importance_weighs_a_given_value_by_its_density_and_a_drawn_one_not(
    leaf: Any, args: Any, other: Any, oracle: Any
) -> None:
    value = value_like(args, 0.7)
    _, (weight, given) = leaf.importance(KEY, ValueChoiceMap(value), args)
    close(weight, oracle(value, *args))
    close(given.get_score(), weight)
    np.testing.assert_array_equal(given.get_retval(), value)
    _, (weight, drawn) = leaf.importance(KEY, EmptyChoiceMap(), args)
    assert weight == 0 and weight.dtype == drawn.get_score().dtype
    close(drawn.get_score(), oracle(drawn.get_retval(), *args))


@LEAVES
def test_updates_in_a_row_weigh_by_the_score_before(leaf: Any, args: Any, other: Any, oracle: Any) -> None:
    _, tr = leaf.simulate(KEY, args)
    before = oracle(tr.get_retval(), *args)
    for number, new_args in ((0.7, args), (1.9, other), (0.4, args), (3.3, args)):
        value = value_like(args, number)
        old = tr.get_retval()
        _, (retdiff, weight, tr, discard) = leaf.update(KEY, tr, ValueChoiceMap(value), new_args)
        after = oracle(value, *new_args)
        close(weight, after - before)
        close(tr.get_score(), after)
        np.testing.assert_array_equal(discard.get_value(), old)
        np.testing.assert_array_equal(Diff.primal(retdiff), value)
        assert not Diff.is_unchanged(retdiff)
        before = after


@LEAVES
def test_update_with_other_arguments_keeps_the_value(leaf: Any, args: Any, other: Any, oracle: Any) -> None:
    value = value_like(args, 0.7)
    _, (_, tr) = leaf.importance(KEY, value, args)
    _, (retdiff, weight, changed, discard) = leaf.update(KEY, tr, EmptyChoiceMap(), other)
    close(weight, oracle(value, *other) - oracle(value, *args))
    close(changed.get_score(), oracle(value, *other))
    assert discard.is_empty() and Diff.is_unchanged(retdiff)
    for got, want in zip(changed.get_args(), other, strict=True):
        close(got, want)


@LEAVES
def test_update_by_the_discard_goes_back(leaf: Any, args: Any, other: Any, oracle: Any) -> None:
    _, tr = leaf.simulate(KEY, args)
    _, (_, weight, changed, discard) = leaf.update(KEY, tr, ValueChoiceMap(value_like(args, 0.7)), other)
    _, (_, back_weight, back, _) = leaf.update(KEY, changed, discard, args)
    close(back_weight, -weight)
    close(back.get_score(), tr.get_score())
    np.testing.assert_array_equal(back.get_retval(), tr.get_retval())
    assert jax.tree.structure(back) == jax.tree.structure(tr)


def test_nothing_changed_is_nothing_done() -> None:
    _, tr = Normal.simulate(KEY, (0.5, 2.0))
    argdiffs = tuple(map(Diff.no_change, tr.get_args()))
    _, (retdiff, weight, same, discard) = Normal.update(KEY, tr, EmptyChoiceMap(), argdiffs)
    assert same is tr and weight == 0 and discard.is_empty() and Diff.is_unchanged(retdiff)


@LEAVES
def test_regenerate_draws_at_no_weight_or_keeps_and_rescores(leaf: Any, args: Any, other: Any, oracle: Any) -> None:
    _, tr = leaf.simulate(KEY, args)
    _, (_, weight, new) = leaf.regenerate(jax.random.key(8), tr, AllSelection(), other)
    assert weight == 0
    assert not np.any(np.asarray(new.get_retval()) == np.asarray(tr.get_retval()))
    close(new.get_score(), oracle(new.get_retval(), *other))
    _, (retdiff, weight, kept) = leaf.regenerate(KEY, tr, NoneSelection(), other)
    np.testing.assert_array_equal(kept.get_retval(), tr.get_retval())
    close(weight, oracle(tr.get_retval(), *other) - oracle(tr.get_retval(), *args))
    assert Diff.is_unchanged(retdiff)


def test_project_is_the_score_or_nothing() -> None:
    _, tr = Normal.simulate(KEY, (0.5, 2.0))
    assert Normal.project(KEY, tr, AllSelection())[1] == tr.get_score()
    assert Normal.project(KEY, tr, NoneSelection())[1] == 0


def test_propose_gives_the_choice_its_score_and_its_value() -> None:
    _, (choices, score, retval) = Normal.propose(KEY, (0.5, 2.0))
    assert choices.get_value() == retval
    close(score, normal(retval))


def test_the_structure_and_types_of_a_trace_do_not_change_under_update() -> None:
    for leaf, args, value in ((Normal, (0, 2), 1), (Gamma, (2, 3), 1), (Bernoulli, (0.3,), True), (Poisson, (3,), 2.0)):
        _, tr = leaf.simulate(KEY, args)
        _, (_, _, changed, _) = leaf.update(KEY, tr, ValueChoiceMap(value), tr.get_args())
        _, (_, _, redrawn) = leaf.regenerate(KEY, tr, AllSelection(), tr.get_args())
        for other in (changed, redrawn):
            assert jax.tree.structure(other) == jax.tree.structure(tr)
            assert list(map(jax.typeof, jax.tree.leaves(other))) == list(map(jax.typeof, jax.tree.leaves(tr)))

    def step(tr: Any, value: Any) -> Any:
        _, (_, weight, tr, _) = Normal.update(KEY, tr, ValueChoiceMap(value), tr.get_args())
        return tr, weight

    _, tr = Normal.simulate(KEY, (0.5, 2.0))
    last, weights = jax.lax.scan(step, tr, jnp.array([0.1, 0.2, 0.3]))
    close(tr.get_score() + weights.sum(), last.get_score())


def test_legacy_keys_come_back_in_kind() -> None:
    legacy = jax.random.PRNGKey(0)
    key, _ = Gamma.simulate(legacy, (2.0, 3.0))
    assert key.dtype == jnp.uint32 and key.shape == (2,)
    key, _ = Gamma.simulate(KEY, (2.0, 3.0))
    assert jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)


def test_nothing_leaks_from_a_compiled_run(no_leaks: Any) -> None:
    for leaf in (Normal, Gamma):
        slope = jax.jit(jax.grad(lambda x, leaf=leaf: leaf.assess(KEY, x, (2.0, 3.0))[1][1]))
        no_leaks(lambda leaf=leaf, slope=slope: (jax.jit(leaf.simulate)(KEY, (2.0, 3.0)), slope(0.7)))


# What is taken and what is refused ------------------------------------------------------------------------------


def assess(leaf: Any, value: Any, *args: Any) -> tuple[Any, Any]:
    @gen
    def model() -> Any:
        return trace("x", leaf)(*args)

    return model.assess(KEY, {"x": value}, ())[1]


@pytest.mark.parametrize("value", [1, np.int64(1), np.float64(1.0), jnp.int32(1), [1.0], np.array([1])])
def test_an_integer_or_a_double_stands_for_a_float(value: Any) -> None:
    loc = 0.5 * np.ones(np.shape(value), np.float32)
    retval, score = assess(Normal, value, loc, 2.0)
    assert retval.dtype == jnp.float32 and score.dtype == jnp.float32
    close(score, normal(1.0))


@pytest.mark.parametrize("value", [1, 1.0, True, np.uint8(1), np.bool_(True), np.float64(1.0), jnp.bfloat16(1)])
def test_a_whole_number_of_any_dtype_stands_for_a_discrete_choice(value: Any) -> None:
    for leaf, want in ((Bernoulli, np.log(0.3)), (gjflax.Geometric, np.log(0.3 * 0.7))):
        retval, score = assess(leaf.by_keyword("probs"), value, 0.3)
        assert retval.dtype == jnp.int32
        close(score, want)


@pytest.mark.parametrize(
    ("leaf", "value"),
    [
        (Normal, 1j),
        (Normal, True),
        (Normal, "one"),
        (Normal, np.array([object()])),
        (Poisson, 0.5),
        (Poisson, np.nan),
        (Poisson, 1j),
        (Poisson, 3e10),
        (Poisson, 2**40),
        (Poisson, np.int64(2**40)),
        (Poisson, np.uint32(2**32 - 1)),
        (gjflax.Deterministic, 2),
    ],
)
def test_a_value_that_cannot_stand_for_the_choice_is_refused_by_address(leaf: Any, value: Any) -> None:
    args = {Normal: (0.0, 1.0), Poisson: (2.0,)}.get(leaf, (True,))
    with pytest.raises((gjflax.ChoiceDtypeError, gjflax.ChoiceMapError, gjflax.ChoiceShapeError)) as caught:
        assess(leaf, value, *args)
    assert isinstance(caught.value, gjflax.ChoiceMapError) or '"x"' in str(caught.value)


def test_a_traced_fraction_for_a_discrete_choice_has_density_zero() -> None:
    score = jax.jit(lambda value: assess(Poisson, value, 2.0)[1])
    close(score(3.0), stats.poisson(2).logpmf(3))
    assert np.isneginf(score(2.5)) and np.isneginf(score(jnp.nan)) and np.isneginf(score(3e10))
    vector = jax.jit(lambda value: assess(Poisson, value, jnp.array([2.0, 3.0]))[1])
    assert np.isneginf(vector(jnp.array([1.0, 0.5])))
    assert np.isfinite(vector(jnp.array([1.0, 2.0])))
    large = jax.jit(lambda value: assess(Poisson, value, 2.0)[1])
    assert np.isneginf(large(np.uint32(2**32 - 1)))


@pytest.mark.parametrize("leaf", [Normal, Gamma])
@pytest.mark.parametrize("shape", [(), (2,), (3, 1), (1, 3)])
def test_a_value_of_another_shape_is_refused_by_address(leaf: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(gjflax.ChoiceShapeError, match=rf'"x" \({leaf.label}\).*\(3,\)'):
        assess(leaf, jnp.ones(shape), jnp.ones(3), 2.0)


def test_update_checks_the_old_value_against_arguments_of_another_shape() -> None:
    _, tr = Normal.simulate(KEY, (jnp.zeros(3), 2.0))
    with pytest.raises(gjflax.ChoiceShapeError):
        Normal.update(KEY, tr, EmptyChoiceMap(), (jnp.zeros(2), 2.0))
    with pytest.raises(gjflax.ChoiceShapeError):
        Normal.regenerate(KEY, tr, AllSelection(), (jnp.zeros(2), 2.0))


def test_a_missing_value_is_an_error_that_names_the_address() -> None:
    @gen
    def model() -> None:
        trace("x", Normal)(0.0, 1.0)

    with pytest.raises(gjflax.MissingChoiceError, match=r'"x" \(Normal\)'):
        model.assess(KEY, {}, ())


def test_values_below_a_choice_are_refused_or_ignored() -> None:
    below = gjflax.choice_map({"y": 1.0})
    with pytest.raises(gjflax.UnvisitedConstraintError, match="below it"):
        Normal.importance(KEY, below, (0.0, 1.0))
    _, (weight, _) = Normal.importance(KEY, below, (0.0, 1.0), strict=False)
    assert weight == 0
    with pytest.raises(gjflax.UnvisitedConstraintError, match="below it"):
        Normal.constrain(below, (0.0, 1.0))


def test_elements_are_not_given_one_by_one() -> None:
    some = VectorChoiceMap([0, 2], ValueChoiceMap(jnp.ones(2)))
    with pytest.raises(gjflax.UnvisitedConstraintError, match="one by one"):
        Normal.importance(KEY, some, (jnp.zeros(3), 1.0))
    whole = VectorChoiceMap(range(3), ValueChoiceMap(jnp.ones(3)))
    _, (weight, _) = Normal.importance(KEY, whole, (jnp.zeros(3), 2.0))
    close(weight, normal(np.ones(3), 0.0, 2.0))


# Precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", [Normal, Gamma])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_arguments_are_computed_in_single_precision(leaf: Any, dtype: Any) -> None:
    args = (jnp.asarray([2.5, 3.5], dtype), jnp.asarray([1.5, 0.25], dtype))
    oracle = {Normal: normal, Gamma: gamma}[leaf]
    value = np.float32([1.23456, 7.65432])
    _, (retval, score) = leaf.assess(KEY, value, args)
    assert retval.dtype == jnp.float32 and score.dtype == jnp.float32
    np.testing.assert_array_equal(retval, value)
    close(score, oracle(value, *(np.asarray(arg, np.float64) for arg in args)))
    _, tr = leaf.simulate(KEY, args)
    assert tr.get_retval().dtype == jnp.float32
    # A half precision value is taken for what it is.
    half = jnp.asarray(value, dtype)
    _, (retval, score) = leaf.assess(KEY, half, args)
    assert retval.dtype == jnp.float32
    close(score, oracle(np.asarray(half, np.float64), *(np.asarray(arg, np.float64) for arg in args)))


@pytest.mark.parametrize("leaf", [Normal, Gamma])
def test_arguments_of_mixed_precision_do_not_break_strict_promotion(leaf: Any) -> None:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        args = (jnp.ones((2, 3), jnp.bfloat16), jnp.full(3, 2, jnp.int32))
        _, tr = jax.jit(leaf.simulate)(KEY, args)
        assert tr.get_retval().shape == (2, 3) and tr.get_retval().dtype == jnp.float32
        gradient = jax.grad(lambda a: leaf.assess(KEY, jnp.ones((2, 3)), (a, args[1]))[1][1])(args[0])
        assert gradient.dtype == jnp.bfloat16 and gradient.shape == (2, 3)
        free, _ = leaf.unconstrain(tr, AllSelection())
        leaf.constrain(free, args)


X64 = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)
from scipy import stats
import gjflax
key = jax.random.key(0)
families = [
    (gjflax.Normal, (0.1, 2.1), 0.3, stats.norm(0.1, 2.1).logpdf(0.3)),
    (gjflax.Gamma, (2.1, 3.3), 0.3, stats.gamma(2.1, scale=1 / 3.3).logpdf(0.3)),
    (gjflax.Gamma, (np.array([2.1, 2.2]), 3.3), np.array([0.3, 0.4]),
     stats.gamma(np.array([2.1, 2.2]), scale=1 / 3.3).logpdf([0.3, 0.4]).sum()),
    (gjflax.Poisson, (3.3,), 2, stats.poisson(3.3).logpmf(2)),
    (gjflax.Binomial.by_keyword("probs"), (9, 0.3), 2, stats.binom(9, 0.3).logpmf(2)),
    (gjflax.Bernoulli, (0.3,), 1, np.log(1 / (1 + np.exp(-0.3)))),
    (gjflax.Deterministic, (0.3,), 0.3, 0.0),
]
for leaf, args, value, want in families:
    whole = leaf.label in ("Poisson", "Binomial", "Bernoulli")
    mapped = not whole and leaf.label != "Deterministic"

    def run(value, args):
        _, tr = leaf.simulate(key, args)
        if not mapped:
            return leaf.assess(key, value, args)[1], tr, None
        free, log_det = leaf.unconstrain(tr, gjflax.AllSelection())
        return leaf.assess(key, value, args)[1], tr, (free, log_det, leaf.constrain(free, args)[1])

    (retval, score), tr, there_and_back = jax.jit(run)(value, args)
    assert score.dtype == jnp.float64, (leaf.label, score.dtype)
    np.testing.assert_allclose(score, want, rtol=2e-8, atol=1e-8)
    assert tr.get_retval().dtype == (jnp.int32 if whole else jnp.float64), (leaf.label, tr.get_retval().dtype)
    if mapped:
        free, log_det, back = there_and_back
        assert free.get_value().dtype == jnp.float64 == log_det.dtype
        np.testing.assert_allclose(back, -log_det, rtol=1e-12)

# Outside of jit numbers are Python's, and must not become single precision on the way.
np.testing.assert_allclose(gjflax.Normal.assess(key, 0.3, (0.1, 2.1))[1][1], stats.norm(0.1, 2.1).logpdf(0.3), rtol=1e-12)

single = np.array([0.1, 0.2], np.float32)
for leaf in (gjflax.Normal, gjflax.Gamma):
    # Single precision arguments stay so beside a number; a double value is computed as one.
    def run():
        alike = leaf.assess(key, single, (single, 2.1))[1]
        wider = leaf.assess(key, np.float64(single), (single, 2.1))[1]
        _, tr = leaf.simulate(key, (single, 2.1))
        updated = leaf.update(key, tr, np.float64(single), (single, 2.2))[1][2]
        return alike, wider, tr, updated, leaf.regenerate(key, tr, gjflax.AllSelection(), tr.get_args())[1][2]

    alike, wider, tr, *changed = jax.eval_shape(run)
    assert all(part.dtype == jnp.float32 for part in alike), leaf.label
    assert all(part.dtype == jnp.float64 for part in wider), leaf.label
    for trace in (tr, *changed):
        assert trace.get_retval().dtype == jnp.float32 == trace.get_score().dtype, leaf.label
print("passed")
"""


def test_double_precision_is_kept_throughout() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", X64], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "passed", done.stderr[-3000:]


# Users' own -----------------------------------------------------------------------------------------------------


def sample_laplace(key: Any, scale: Any) -> Any:
    return scale * jax.random.laplace(key, jnp.shape(scale))


def laplace(value: Any, scale: Any) -> Any:
    return -jnp.abs(value) / scale - jnp.log(2 * scale)


class Laplacian(Distribution):
    """A family as a subclass."""

    is_reparameterized = True

    def sample(self, key: Any, scale: Any) -> Any:
        return sample_laplace(key, scale)

    def logpdf(self, value: Any, scale: Any) -> Any:
        return laplace(value, scale)


OWN = pytest.mark.parametrize(
    "own", [Laplacian(), distribution(sample_laplace, laplace, reparameterized=True)], ids=["subclass", "functions"]
)


def test_the_class_called_with_two_functions_is_the_distribution_of_them() -> None:
    options = {"name": "two-sided", "reparameterized": True, "bijector": lambda scale: None}
    short, long = (make(sample_laplace, laplace, **options) for make in (Distribution, distribution))
    assert short == long and short.label == "two-sided" and short.is_reparameterized
    _, (_, score) = short.assess(KEY, 1.0, (0.5,))
    np.testing.assert_allclose(score, stats.laplace.logpdf(1.0, scale=0.5), rtol=1e-6)
    # Neither the base class nor a subclass with fields of its own is meant.
    assert type(Distribution()) is Distribution
    assert type(Laplacian()) is Laplacian


@OWN
def test_a_user_s_family_has_the_whole_interface(own: Any) -> None:
    scale = jnp.array([0.5, 2.0])

    def oracle(value: Any, scale: Any) -> float:
        return float(stats.laplace(0, np.asarray(scale)).logpdf(np.asarray(value)).sum())

    _, tr = jax.jit(own.simulate)(KEY, (scale,))
    assert tr.is_reparameterized and not tr.is_discrete
    close(tr.get_score(), oracle(tr.get_retval(), scale))
    value = jnp.array([0.3, -0.7])
    _, (_, weight, changed, _) = own.update(KEY, tr, value, (2 * scale,))
    close(weight, oracle(value, 2 * scale) - oracle(tr.get_retval(), scale))
    _, (_, weight, _, _) = own.update(KEY, changed, 2 * value, (scale,))
    close(weight, oracle(2 * value, scale) - oracle(value, 2 * scale))
    _, gradient = own.choice_grad(KEY, changed, AllSelection())
    close(gradient.get_value(), -np.sign(value) / (2 * scale))
    _, gradient = own.arg_grad(KEY, changed)
    close(gradient, np.abs(value) / (2 * scale) ** 2 - 1 / (2 * scale))


@OWN
def test_a_user_s_family_takes_keywords_in_a_body(own: Any) -> None:
    @gen
    def model(scale: Any) -> Any:
        return trace("x", own)(scale=scale)

    _, tr = model.simulate(KEY, (2.0,))
    close(tr.get_score(), stats.laplace(0, 2).logpdf(tr["x"]))

    @gen
    def wrong() -> Any:
        return trace("x", own)(width=2.0)

    with pytest.raises(gjflax.ArgumentError, match='"x".*width'):
        wrong.simulate(KEY, ())


def test_keyword_only_arguments_are_refused() -> None:
    def logpdf(value: Any, *, scale: Any) -> Any:
        return laplace(value, scale)

    @gen
    def model() -> Any:
        return trace("x", distribution(sample_laplace, logpdf))(scale=2.0)

    with pytest.raises(gjflax.ArgumentError, match="keyword-only"):
        model.simulate(KEY, ())


def test_a_log_density_may_be_elementwise_or_summed_or_of_events() -> None:
    def sample(key: Any) -> Any:
        return jax.random.normal(key, (2, 3))

    value = jnp.arange(6.0).reshape(2, 3)
    for axes in ((), 1, None):

        def logpdf(value: Any, axes: Any = axes) -> Any:
            return jnp.sum(-0.5 * value**2 - 0.5 * np.log(2 * np.pi).astype(np.float32), axis=axes)

        score = distribution(sample, logpdf).assess(KEY, value, ())[1][1]
        close(score, normal(value, 0, 1))


@pytest.mark.parametrize("result", [0, -1.5, np.float64(-1.5), jnp.int32(-2), jnp.bfloat16(-1.5)])
def test_a_log_density_of_any_number_is_a_float_score(result: Any) -> None:
    constant = distribution(lambda key: jnp.zeros(()), lambda value: result)
    _, tr = constant.simulate(KEY, ())
    assert tr.get_score().dtype == jnp.float32 and float(tr.get_score()) == float(result)
    _, (_, weight, _, _) = constant.update(KEY, tr, 1.0, ())
    assert weight == 0


def test_half_precision_terms_are_summed_in_single_precision() -> None:
    flat = distribution(lambda key: jnp.zeros(3000, jnp.bfloat16), lambda value: value * 0 - 1)
    _, tr = flat.simulate(KEY, ())
    assert tr.get_retval().dtype == jnp.bfloat16
    assert float(tr.get_score()) == -3000


def test_a_log_density_that_broadcasts_by_accident_is_refused() -> None:
    def logpdf(value: Any, loc: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            return -((value - loc) ** 2)

    crossed = distribution(lambda key, loc: jnp.zeros(3), logpdf, name="crossed")
    with pytest.raises(gjflax.ChoiceShapeError, match=r"crossed.*\(3, 3\).*\(3,\)"):
        crossed.assess(KEY, jnp.zeros(3), (jnp.zeros((3, 1)),))


def test_a_sampler_of_several_arrays_is_refused() -> None:
    pair = distribution(lambda key: (jnp.zeros(()), jnp.ones(())), lambda value: 0.0, name="pair")
    for run in (lambda: pair.simulate(KEY, ()), lambda: pair.assess(KEY, 1.0, ())):
        with pytest.raises(gjflax.ChoiceShapeError, match="pair.*one array"):
            run()


def test_a_missing_method_is_an_error_that_names_the_class() -> None:
    class Half(Distribution):
        """A family without a density."""

        def sample(self, key: Any) -> Any:
            return jax.random.normal(key)

    with pytest.raises(gjflax.NotImplementedByGenerativeFunctionError, match="`Half` has no `logpdf`"):
        Half().simulate(KEY, ())
    with pytest.raises(gjflax.NotImplementedByGenerativeFunctionError, match="`Distribution` has no `sample`"):
        Distribution().simulate(KEY, ())


def test_a_discrete_family_of_a_user_has_no_gradient() -> None:
    die = distribution(lambda key: jax.random.randint(key, (), 1, 7), lambda value: -np.log(6), discrete=True)
    _, tr = die.simulate(KEY, ())
    assert tr.is_discrete and tr.get_retval().dtype == jnp.int32
    with pytest.raises(gjflax.DiscreteGradientError):
        die.choice_grad(KEY, tr, AllSelection())
    # Floats that are said to be discrete have none either.
    coin = distribution(
        lambda key: jax.random.bernoulli(key).astype(jnp.float32), lambda value: -np.log(2), discrete=True
    )
    _, tr = coin.simulate(KEY, ())
    with pytest.raises(gjflax.DiscreteGradientError):
        coin.choice_grad(KEY, tr, AllSelection())


def test_a_family_may_have_fields() -> None:
    class Shifted(Distribution):
        """A unit normal, shifted."""

        by: float = 3.0

        def sample(self, key: Any) -> Any:
            return self.by + jax.random.normal(key)

        def logpdf(self, value: Any) -> Any:
            return -0.5 * (value - self.by) ** 2 - 0.5 * np.log(2 * np.pi)

    close(Shifted(5.0).assess(KEY, 4.0, ())[1][1], normal(4.0, 5, 1))
    assert Shifted(5.0) == Shifted(5.0) != Shifted(4.0)


def test_a_family_made_inside_a_module_is_the_one_made_outside() -> None:
    class Model(gjflax.GenModule):
        """A model that makes its families inline."""

        @nn.compact
        def __call__(self) -> Any:
            x = trace("x", Laplacian())(2.0)
            return trace("y", gjflax.TFPDistribution("Gumbel"))(x, 2.0)

    _, tr = jax.jit(Model().simulate)(KEY, ())
    assert tr.get_subtree("x").get_gen_fn() == Laplacian()
    assert tr.get_subtree("y").get_gen_fn() == gjflax.Gumbel
    assert jax.tree.structure(tr) == jax.tree.structure(Model().simulate(KEY, ())[1])
    want = stats.laplace(0, 2).logpdf(tr["x"]) + stats.gumbel_r(tr["x"], 2).logpdf(tr["y"])
    np.testing.assert_allclose(tr.get_score(), want, rtol=1e-5)


def test_a_distribution_is_a_stochastic_layer_of_a_flax_module() -> None:
    class Noisy(nn.Module):
        """A layer that adds noise."""

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return gjflax.TFPDistribution("Normal")(x, scale=2.0)

    out = Noisy().apply({}, jnp.zeros(4), rngs={"choice": KEY})
    assert out.shape == (4,) and len(set(np.asarray(out).tolist())) == 4
    with pytest.raises(gjflax.MissingStreamError):
        Noisy().apply({}, jnp.zeros(4))
    with pytest.raises(gjflax.UnboundParametersError, match="`Normal` was called directly"):
        Normal(0.0, scale=1.0)

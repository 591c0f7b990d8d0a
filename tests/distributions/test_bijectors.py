"""`constrain` and `unconstrain` of one choice: round trips, and log determinants against differentiated Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distributions.tfp_oracle import tfb, tfd

import gjflax
from gjflax import AllSelection, EmptyChoiceMap, NoneSelection, TFPDistribution, ValueChoiceMap

KEY = jax.random.key(5)
Coordinates = Callable[[Any], Any]


def everything(value: Any) -> Any:
    return value.reshape(-1)


def all_but_last(value: Any) -> Any:
    return value[..., :-1].reshape(-1)


def lower(value: Any) -> Any:
    rows, columns = np.tril_indices(value.shape[-1])
    return value[..., rows, columns].reshape(-1)


def strictly_lower(value: Any) -> Any:
    rows, columns = np.tril_indices(value.shape[-1], -1)
    return value[..., rows, columns].reshape(-1)


V = jnp.array([1.5, 2.0, 3.0])
MATRIX = jnp.array([[2.0, 0.5], [0.5, 1.0]])
CASES: list[tuple[str, tuple[Any, ...], Coordinates]] = [
    ("Normal", (0.5, 2.0), everything),
    ("Normal", (V, 2.0), everything),
    ("LogNormal", (V[:, None], jnp.array([0.5, 2.0])), everything),
    ("HalfNormal", (V,), everything),
    ("TruncatedNormal", (0.0, V, -1.0, V), everything),
    ("StudentT", (3.0, V, 2.0), everything),
    ("Cauchy", (V, 2.0), everything),
    ("HalfCauchy", (V - 2, 2.0), everything),
    ("Laplace", (V, 2.0), everything),
    ("Logistic", (V, 2.0), everything),
    ("Gumbel", (V, 2.0), everything),
    ("Uniform", (-1.0, V), everything),
    ("Uniform", (V, 5.0), everything),
    ("Uniform", (), everything),
    ("Exponential", (V,), everything),
    ("Gamma", (V, 2.0), everything),
    ("InverseGamma", (V, 2.0), everything),
    ("Chi2", (V,), everything),
    ("Beta", (V, 2.0), everything),
    ("Beta", (2.0, 3.0), everything),
    ("Kumaraswamy", (V, 2.0), everything),
    ("Weibull", (V, 2.0), everything),
    ("Pareto", (2.5, V), everything),
    ("VonMises", (V, 2.0), everything),
    ("Dirichlet", (V,), all_but_last),
    ("Dirichlet", (jnp.stack([V, 2 * V]),), all_but_last),
    ("MultivariateNormalDiag", (V, V), everything),
    ("MultivariateNormalTriL", (jnp.zeros(2), MATRIX), everything),
    ("Wishart", (4.5, MATRIX), lower),
    ("CholeskyLKJ", (4, 2.0), strictly_lower),
    ("WishartTriL", (5.0, jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])), lower),
    ("LKJ", (3, 2.0), strictly_lower),
    ("RelaxedOneHotCategorical", (0.7, V), all_but_last),
    ("MultivariateStudentTLinearOperator", (), everything),
]


@pytest.mark.parametrize(("name", "args", "coordinates"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_round_trips_and_the_log_determinant_is_that_of_the_jacobian(
    name: str, args: tuple[Any, ...], coordinates: Coordinates
) -> None:
    distribution = getattr(gjflax, name, None) or TFPDistribution(name)
    if name == "MultivariateStudentTLinearOperator":
        from distributions.tfp_oracle import tf

        args = (4.0, jnp.zeros(2), tf.linalg.LinearOperatorLowerTriangular(jnp.linalg.cholesky(MATRIX)))
    template = distribution.at(args).template
    shape = tuple(distribution.at(args).bijector().inverse_event_shape(template.shape))
    point = jnp.linspace(-1.3, 0.9, int(np.prod(shape)))

    def forward(x: Any) -> Any:
        choices, log_det = distribution.constrain(ValueChoiceMap(x.reshape(shape)), args)
        return coordinates(choices.get_value()), (choices.get_value(), log_det)

    @jax.jit
    def there_and_back(x: Any) -> Any:
        jacobian, (value, log_det) = jax.jacfwd(forward, has_aux=True)(x)
        _, (_, trace) = distribution.importance(KEY, ValueChoiceMap(value), args)
        free, minus_log_det = distribution.unconstrain(trace, AllSelection())
        return jacobian, value, log_det, free.get_value(), minus_log_det

    jacobian, value, log_det, back, minus_log_det = there_and_back(point)
    assert value.shape == template.shape and value.dtype == template.dtype and back.shape == shape
    np.testing.assert_allclose(back.reshape(-1), point, rtol=1e-4, atol=1e-4)
    assert jacobian.shape == (point.size, point.size)
    assert log_det.shape == () == minus_log_det.shape
    want = np.linalg.slogdet(np.asarray(jacobian, np.float64))[1]
    np.testing.assert_allclose(log_det, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(minus_log_det, -want, rtol=1e-4, atol=2e-4)


INTEGRALS: list[tuple[str, tuple[Any, ...], int]] = [
    ("Gamma", (2.5, 2.0), 0),
    ("Uniform", (-1.0, 3.0), 0),
    ("TruncatedNormal", (0.5, 2.0, -1.0, 3.0), 0),
    ("HalfNormal", (2.0,), 0),
    ("Dirichlet", (jnp.array([2.0, 3.5]),), 1),
    ("Dirichlet", (jnp.array([2.0, 3.0, 2.5]),), 2),
    ("RelaxedOneHotCategorical", (1.7, jnp.array([0.3, -0.3, 0.1])), 2),
    ("CholeskyLKJ", (2, 2.0), 1),
    ("LKJ", (2, 2.0), 1),
]


@pytest.mark.parametrize(("name", "args", "dimension"), INTEGRALS, ids=[f"{c[0]}-{i}" for i, c in enumerate(INTEGRALS)])
def test_the_density_in_unconstrained_space_integrates_to_one(name: str, args: tuple[Any, ...], dimension: int) -> None:
    distribution = getattr(gjflax, name, None) or TFPDistribution(name)
    grid, step = np.linspace(-14, 14, 301 if dimension == 2 else 2001, retstep=True)
    axes = np.meshgrid(*[grid] * max(dimension, 1))
    points = np.float32(np.stack(axes, -1).reshape(-1, dimension) if dimension else grid)

    @jax.jit
    @jax.vmap
    def density(x: Any) -> Any:
        choices, log_det = distribution.constrain(ValueChoiceMap(x), args)
        return jnp.exp(distribution.assess(KEY, choices, args)[1][1] + log_det)

    total = np.sum(np.asarray(density(points), np.float64)) * step ** max(dimension, 1)
    np.testing.assert_allclose(total, 1, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("LogNormal", (0.5, 2.0)),
        ("HalfNormal", (2.0,)),
        ("Exponential", (2.0,)),
        ("Uniform", (-1.0, 3.0)),
        ("Normal", (0.5, 2.0)),
        ("Laplace", (0.5, 2.0)),
    ],
)
def test_a_family_without_tfp_maps_as_tfp_does(name: str, args: tuple[float, ...]) -> None:
    ours = getattr(gjflax, name).at(args).bijector()
    theirs = getattr(tfd, name)(*map(jnp.float32, args)).experimental_default_event_space_bijector()
    points = jnp.linspace(-20.0, 20.0, 41)
    close = {"rtol": 2e-5, "atol": 2e-5}
    np.testing.assert_allclose(ours.forward(points), theirs.forward(points), **close)
    ldj = ours.forward_log_det_jacobian(points, 0)
    np.testing.assert_allclose(ldj, np.broadcast_to(theirs.forward_log_det_jacobian(points, 0), (41,)), **close)
    inner = jnp.linspace(-5.0, 5.0, 11)
    np.testing.assert_allclose(ours.inverse(ours.forward(inner)), inner, rtol=1e-4, atol=1e-4)
    inverse_ldj = ours.inverse_log_det_jacobian(ours.forward(inner), 1)
    np.testing.assert_allclose(inverse_ldj, -ours.forward_log_det_jacobian(inner, 1), rtol=1e-4)
    assert tuple(ours.forward_event_shape((3,))) == tuple(ours.inverse_event_shape((3,))) == (3,)


def test_a_measured_bijector_inverts_its_log_determinant() -> None:
    bijector = gjflax.Dirichlet.at((V,)).bijector()
    x = jnp.array([[0.3, -0.5], [1.0, 2.0]])
    y = bijector.forward(x)
    assert tuple(bijector.forward_event_shape((2,))) == (3,)
    each = bijector.forward_log_det_jacobian(x, 1)
    assert each.shape == (2,)
    np.testing.assert_allclose(bijector.forward_log_det_jacobian(x, 2), each.sum(), rtol=1e-5)
    np.testing.assert_allclose(bijector.inverse_log_det_jacobian(y, 1), -each, rtol=1e-5)


@pytest.mark.parametrize("high", [1.0, 7.0, 1e6])
def test_rounding_never_leaves_the_interval(high: float) -> None:
    args = (0.1, high)
    for x in (-200.0, -90.0, 17.0, 40.0, 200.0):
        choices, _ = gjflax.Uniform.constrain(ValueChoiceMap(x), args)
        assert np.isfinite(gjflax.Uniform.assess(KEY, choices, args)[1][1])


def test_a_batch_of_traces_has_a_log_determinant_for_each() -> None:
    args = (jnp.array([1.0, 2.0]), jnp.array([[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]))
    run = jax.vmap(lambda key, low, high: gjflax.Uniform.simulate(key, (low, high))[1])
    traces = run(jax.random.split(KEY, 2), *args)
    choices, log_dets = gjflax.Uniform.unconstrain(traces, AllSelection())
    assert choices.get_value().shape == (2, 3) and log_dets.shape == (2,)
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], traces)
        alone, log_det = gjflax.Uniform.unconstrain(one, AllSelection())
        np.testing.assert_allclose(choices.get_value()[i], alone.get_value(), rtol=1e-5)
        np.testing.assert_allclose(log_dets[i], log_det, rtol=1e-5)
    assert not traces.is_discrete and traces.is_reparameterized


def test_a_batch_of_traces_without_arguments_knows_its_kind() -> None:
    traces = jax.vmap(lambda key: gjflax.Uniform.simulate(key, ())[1])(jax.random.split(KEY, 2))
    assert traces.is_reparameterized and not traces.is_discrete


def test_nothing_selected_is_nothing_mapped() -> None:
    _, trace = gjflax.Normal.simulate(KEY, (0.0, 1.0))
    choices, log_det = trace.unconstrain(NoneSelection())
    assert choices.is_empty() and log_det == 0


def test_a_discrete_choice_has_no_map() -> None:
    _, trace = gjflax.Poisson.simulate(KEY, (2.0,))
    with pytest.raises(gjflax.DiscreteGradientError, match="Poisson"):
        gjflax.Poisson.unconstrain(trace, AllSelection())
    with pytest.raises(gjflax.DiscreteGradientError, match="Poisson"):
        gjflax.Poisson.constrain(ValueChoiceMap(0.5), (2.0,))


@pytest.mark.parametrize(
    ("name", "args", "shape"), [("Exponential", (2.0,), (3,)), ("Uniform", (0.0, V), ()), ("Dirichlet", (V,), (3,))]
)
def test_a_point_of_another_shape_is_refused(name: str, args: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(gjflax.ChoiceShapeError, match="unconstrained"):
        getattr(gjflax, name).constrain(ValueChoiceMap(jnp.zeros(shape)), args)


def test_a_fixed_choice_is_given_back_and_a_missing_one_is_named() -> None:
    choices, log_det = gjflax.Poisson.constrain(EmptyChoiceMap(), (2.0,), fixed=ValueChoiceMap(3))
    assert choices.get_value() == 3 and log_det == 0

    @gjflax.gen
    def model() -> None:
        gjflax.trace("rate", gjflax.Gamma)(2.0, 1.0)

    with pytest.raises(gjflax.MissingChoiceError, match='"rate"'):
        model.constrain({}, ())


def test_a_support_may_depend_on_another_choice() -> None:
    @gjflax.gen
    def model() -> None:
        low = gjflax.trace("low", gjflax.Exponential)(0.5)
        gjflax.trace("x", gjflax.Uniform)(low, low + 2.0)

    _, trace = model.simulate(KEY, ())
    free, minus_log_det = model.unconstrain(trace, AllSelection())
    choices, log_det = model.constrain(free, ())
    np.testing.assert_allclose(choices["x"], trace["x"], rtol=1e-5)

    def forward(x: Any) -> Any:
        made, _ = model.constrain({"low": x[0], "x": x[1]}, ())
        return jnp.stack([made["low"], made["x"]])

    jacobian = jax.jacobian(forward)(jnp.stack([free["low"], free["x"]]))
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], rtol=1e-4)
    np.testing.assert_allclose(minus_log_det, -log_det, rtol=1e-4)


def test_a_user_s_distribution_maps_by_the_bijector_that_it_names() -> None:
    def sample(key: Any, scale: Any) -> Any:
        return scale * jax.random.exponential(key, jnp.shape(scale))

    def logpdf(value: Any, scale: Any) -> Any:
        return jnp.where(value < 0, -jnp.inf, -value / scale - jnp.log(scale))

    bounded = gjflax.distribution(sample, logpdf, bijector=lambda scale: tfb.Exp())
    _, trace = bounded.simulate(KEY, (jnp.float32(2.0),))
    free, minus_log_det = bounded.unconstrain(trace, AllSelection())
    np.testing.assert_allclose(free.get_value(), np.log(trace.value), rtol=1e-5)
    np.testing.assert_allclose(minus_log_det, -np.log(trace.value), rtol=1e-5)
    unbounded = gjflax.distribution(sample, logpdf, name="waiting")
    _, trace = unbounded.simulate(KEY, (jnp.float32(2.0),))
    with pytest.raises(gjflax.NotImplementedByGenerativeFunctionError, match="waiting"):
        unbounded.unconstrain(trace, AllSelection())

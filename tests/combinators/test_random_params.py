"""`RandomParams`: a network whose parameters, all of them or some, are choices."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.networks import (
    KEY,
    KEYS,
    MLP,
    MLP_PRIOR,
    X,
    close,
    deep,
    deep_log_density,
    f64,
    minimise,
    same,
    shapes,
    types,
)
from jax.flatten_util import ravel_pytree
from scipy import stats

import gjflax
from gjflax import (
    AllSelection,
    Bernoulli,
    Diff,
    Exponential,
    GenModule,
    Laplace,
    LogNormal,
    MultivariateNormalTriL,
    Normal,
    RandomParams,
    select,
    trace,
)


@pytest.fixture(scope="module")
def deep_variables() -> Any:
    return jax.jit(deep.init)(KEY, X)


def test_the_density_of_a_network_by_hand(deep_variables):
    assert shapes(deep_variables) == {"params": {"MLP_0": {"Dense_0": {"bias": (3,)}}}}
    params = {"MLP_0": {"Dense_0": {"bias": jnp.array([0.3, -0.2, 0.5])}}}
    model = deep.bind({"params": params})
    _, tr = model.simulate(KEY, (X,))
    close(tr.get_score(), deep_log_density(tr.strip(), params))
    _, (_, score) = model.assess(KEY, tr.strip(), (X + 1.0,))
    close(score, deep_log_density(tr.strip(), params, X + 1.0))


def test_update_weighs_new_weights_hyperparameters_arguments_and_parameters(deep_variables):
    model = deep.bind(deep_variables)
    _, tr = model.simulate(KEYS[0], (X,))
    _, other = model.simulate(KEYS[1], (X,))
    old = deep_log_density(tr.strip(), deep_variables["params"])
    moved = jax.tree.map(lambda leaf: leaf + 0.3, deep_variables)
    kernel = ("net", "Dense_0", "kernel")
    update = jax.jit(lambda variables, tr, values, x: deep.bind(variables).update(KEY, tr, values, (x,))[1])
    for changes in ([kernel], ["scale", kernel, ("net", "out", "bias")], []):
        new_values = gjflax.choice_map({address: other[address] for address in changes})
        for variables, x in ((deep_variables, X), (moved, X), (deep_variables, X - 0.5)):
            _, weight, new, discard = update(variables, tr, new_values, x)
            choices = tr.strip().overwrite(new_values)
            close(weight, deep_log_density(choices, variables["params"], x) - old, atol=1e-4)
            close(new.get_score(), deep_log_density(choices, variables["params"], x), atol=1e-4)
            assert discard == gjflax.choice_map({address: tr[address] for address in changes})
            assert types(new) == types(tr)
            _, back, restored, _ = update(deep_variables, new, discard, X)
            close(back, -f64(weight), atol=1e-4)
            assert restored.strip() == tr.strip()


def test_regenerate_keeps_the_score_of_the_selected(deep_variables):
    model = deep.bind(deep_variables)
    _, tr = model.simulate(KEYS[0], (X,))
    params = deep_variables["params"]
    for address in (("net", "Dense_0", "kernel"), ("net", "out"), "scale"):
        _, (_, weight, new) = model.regenerate(KEYS[2], tr, select(address), (X,))
        changed = [a for a in tr.strip().addresses() if np.any(tr[a] != new[a])]
        assert changed == [a for a in tr.strip().addresses() if a in select(address)]
        assert types(new) == types(tr)

        def proposal(choices: Any, at: Any = address) -> float:
            """The log density of what was redrawn, given the rest, when it is drawn from the prior."""
            if at == "scale":
                return stats.expon.logpdf(f64(choices["scale"]), scale=1 / 1.5)
            below = [a for a in choices.addresses() if a in select(at)]
            scale = f64(choices["scale"])
            terms = {
                ("net", "Dense_0", "kernel"): lambda v: stats.norm.logpdf(v, 0.1, scale),
                ("net", "out", "kernel"): lambda v: stats.laplace.logpdf(v, 0.0, 0.7),
                ("net", "out", "bias"): lambda v: stats.norm.logpdf(v, 2.0, 2 * scale),
            }
            return sum(terms[a](f64(choices[a])).sum() for a in below)

        want = deep_log_density(new.strip(), params) - deep_log_density(tr.strip(), params)
        close(weight, want - proposal(new.strip()) + proposal(tr.strip()), atol=2e-4)


def test_what_did_not_change_is_not_scored_again(deep_variables):
    net = RandomParams(MLP(), MLP_PRIOR, num_hyperparameters=1)
    scale = jnp.float32(0.7)
    _, tr = net.simulate(KEY, (scale, X))
    unchanged = (Diff.no_change(scale), Diff.no_change(X))
    _, (retdiff, weight, new, discard) = net.update(KEY, tr, {}, unchanged, param_diff=Diff.no_change)
    assert weight == 0.0 and discard.is_empty() and Diff.is_unchanged(retdiff)
    assert all(new.params[name] is tr.params[name] for name in tr.params) and new.inner is tr.inner
    # A new hyperparameter concerns the priors that ask for it; a new input concerns no prior.
    _, (_, _, new, _) = net.update(KEY, tr, {}, (scale + 1.0, Diff.no_change(X)), param_diff=Diff.no_change)
    kept = {name for name in tr.params if new.params[name] is tr.params[name]}
    assert kept == {"out/kernel"} and new.inner is tr.inner
    _, (_, _, new, _) = net.update(KEY, tr, {}, (Diff.no_change(scale), X + 1.0), param_diff=Diff.no_change)
    assert all(new.params[name] is tr.params[name] for name in tr.params) and new.inner is not tr.inner
    # A new weight concerns the network.
    bias = {("out", "bias"): jnp.zeros(2)}
    _, (retdiff, _, new, _) = net.update(KEY, tr, bias, unchanged, param_diff=Diff.no_change)
    assert not Diff.is_unchanged(retdiff)
    close(new.get_retval(), f64(tr.get_retval()) - f64(tr["out", "bias"]))


def test_gradients_are_those_of_finite_differences():
    """In double precision, of the choices, the hyperparameter and the learned rest, with the density by hand."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.asarray(X), jnp.float64)
        variables = jax.jit(deep.init)(KEY, x)
        model = deep.bind(variables)
        _, tr = jax.jit(model.simulate)(KEY, (x,))
        _, of_choices = jax.jit(model.choice_grad, static_argnums=2)(KEY, tr, AllSelection())
        _, of_params = jax.jit(model.param_grad)(KEY, tr, variables["params"])

        def differences(function: Any, at: Any) -> Any:
            flat, unravel = ravel_pytree(at)
            flat, step = np.asarray(flat), 1e-6
            each = [function(unravel(jnp.asarray(flat + s))) for s in step * np.eye(flat.size)]
            back = [function(unravel(jnp.asarray(flat - s))) for s in step * np.eye(flat.size)]
            return unravel(jnp.asarray((np.array(each) - np.array(back)) / (2 * step)))

        params = variables["params"]
        want = differences(lambda c: deep_log_density(c, params), tr.strip())
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-5, atol=1e-6), of_choices, want)
        want = differences(lambda p: deep_log_density(tr.strip(), p), params)
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-5, atol=1e-6), of_params, want)


def test_constrain_and_unconstrain():
    net = RandomParams(nn.Dense(3), {"kernel": (LogNormal, (0.5, 0.8)), "bias": (Exponential, (2.0,))})
    x = jnp.ones(2)
    _, tr = net.simulate(KEY, (x,))
    unconstrained, log_det = net.unconstrain(tr, AllSelection())
    close(unconstrained["kernel"], np.log(f64(tr["kernel"])))
    close(unconstrained["bias"], np.log(np.expm1(f64(tr["bias"]))), atol=1e-4)
    want = -np.log(f64(tr["kernel"])).sum() + -np.log(-np.expm1(-f64(tr["bias"]))).sum()
    close(log_det, want)
    choices, back = net.constrain(unconstrained, (x,))
    close(back, -want)
    jax.tree.map(lambda a, b: close(a, b), choices, tr.strip())
    only, log_det = net.unconstrain(tr, select("kernel"))
    assert only.addresses() == [("kernel",)]
    held, log_det = net.constrain(only, (x,), fixed={"bias": tr["bias"]})
    close(log_det, np.log(f64(tr["kernel"])).sum())
    with pytest.raises(gjflax.MissingChoiceError, match="bias"):
        net.constrain(only, (x,))


def test_a_learned_hyperparameter():
    """With the weights given, the scale that maximises their density is their root mean square."""

    class Empirical(GenModule):
        @nn.compact
        def __call__(self, x):
            log_scale = self.param("log_scale", nn.initializers.zeros, ())
            net = RandomParams(MLP(), (Normal, lambda scale: (0.0, scale)), num_hyperparameters=1)
            return trace("net", net)(jnp.exp(log_scale), x)

    variables = Empirical().init(KEY, X)
    assert shapes(variables["params"]) == {"log_scale": ()}
    _, tr = Empirical().bind({"params": {"log_scale": jnp.log(2.5)}}).simulate(KEY, (X,))
    learned = minimise(lambda params: -Empirical().score_params(KEY, tr, params)[1], variables["params"], 1000)
    weights = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tr.strip())])
    close(np.exp(learned["log_scale"]), np.sqrt(np.mean(weights**2)), rtol=1e-4)


# How a prior is written -----------------------------------------------------------------------------------------------


def scores_by_path(net: Any, x: Any = X) -> Any:
    _, tr = net.simulate(KEY, (x,))
    return tr, {address: float(tr.project(select(address))) for address in tr.strip().addresses()}


def test_the_longest_path_counts():
    prior = {(): (Normal, (0.0, 5.0)), "Dense_0": {"kernel": (Laplace, (1.0, 0.5))}, "out": (Normal, (0.0, 0.1))}
    tr, scores = scores_by_path(RandomParams(MLP(), prior))
    value = {address: f64(tr[address]) for address in scores}
    close(scores["Dense_0", "kernel"], stats.laplace.logpdf(value["Dense_0", "kernel"], 1.0, 0.5).sum())
    close(scores["Dense_0", "bias"], stats.norm.logpdf(value["Dense_0", "bias"], 0.0, 5.0).sum())
    for name in ("kernel", "bias"):
        close(scores["out", name], stats.norm.logpdf(value["out", name], 0.0, 0.1).sum())


def test_a_prior_by_path_and_shape():
    asked = {}

    def prior(path, shape):
        asked[path] = shape
        return Normal, (0.0, 1.0 / np.sqrt(shape[0]))

    tr, scores = scores_by_path(RandomParams(MLP(), prior, select("Dense_0", ("out", "bias"))).bind(MLP().init(KEY, X)))
    assert asked == {("Dense_0", "kernel"): (3, 3), ("Dense_0", "bias"): (3,), ("out", "bias"): (2,)}
    close(scores["out", "bias"], stats.norm.logpdf(f64(tr["out", "bias"]), 0.0, 2**-0.5).sum())


def test_a_distribution_without_arguments():
    standard = gjflax.distribution(
        lambda key: jax.random.normal(key), lambda value: jax.scipy.stats.norm.logpdf(value), name="standard"
    )
    tr, scores = scores_by_path(RandomParams(nn.Dense(2), standard))
    close(scores["kernel",], stats.norm.logpdf(f64(tr["kernel"])).sum())


def test_rows_of_a_kernel_may_be_correlated():
    factor = jnp.array([[1.5, 0.0], [0.4, 0.7]])
    tr, scores = scores_by_path(
        RandomParams(nn.Dense(2, use_bias=False), (MultivariateNormalTriL, (jnp.array([1.0, -1.0]), factor)))
    )
    covariance = np.asarray(factor @ factor.T, np.float64)
    want = stats.multivariate_normal.logpdf(f64(tr["kernel"]), [1.0, -1.0], covariance)
    assert tr["kernel"].shape == (3, 2) and np.unique(tr["kernel"]).size == 6
    close(scores["kernel",], want.sum())


def test_relevance_of_inputs_broadcasts():
    """One scale for each input, against all of its weights."""
    net = RandomParams(nn.Dense(4, use_bias=False), (Normal, lambda s: (0.0, s[:, None])), num_hyperparameters=1)
    scales = jnp.array([0.1, 1.0, 10.0])
    _, tr = net.simulate(KEY, (scales, X))
    want = stats.norm.logpdf(f64(tr["kernel"]), 0.0, f64(scales)[:, None]).sum()
    close(tr.get_score(), want)
    unconstrained, log_det = net.unconstrain(tr, AllSelection())
    same(unconstrained["kernel"], tr["kernel"])
    assert log_det == 0.0


def test_priors_draw_what_they_say():
    """Means and variances of 4000 draws of each weight, and no correlation between two; 4 standard errors."""
    net = RandomParams(nn.Dense(2), {"kernel": (Normal, (0.5, 2.0)), "bias": (Laplace, (-1.0, 0.7))})
    draws = jax.jit(jax.vmap(lambda key: net.simulate(key, (jnp.ones(3),))[1].strip()))(jax.random.split(KEY, 4000))
    flat = np.concatenate([draws["kernel"].reshape(-1, 6), draws["bias"]], 1).astype(np.float64)
    mean, variance = np.array([0.5] * 6 + [-1.0] * 2), np.array([4.0] * 6 + [2 * 0.49] * 2)
    kurtosis = np.array([3.0] * 6 + [6.0] * 2)
    assert np.all(np.abs(flat.mean(0) - mean) < 4 * np.sqrt(variance / 4000))
    assert np.all(np.abs(((flat - mean) ** 2).mean(0) - variance) < 4 * variance * np.sqrt((kurtosis - 1) / 4000))
    correlation = np.corrcoef(flat.T)[np.triu_indices(8, 1)]
    assert np.all(np.abs(correlation) < 4 / np.sqrt(4000))


def test_half_precision_parameters():
    net = RandomParams(nn.Dense(3, param_dtype=jnp.bfloat16), (Normal, (0.0, 2.0)), select("kernel"))
    x = jnp.ones(2, jnp.bfloat16)
    variables = net.init(KEY, x)
    assert variables["params"]["bias"].dtype == jnp.bfloat16
    model = net.bind(variables)
    _, tr = model.simulate(KEY, (x,))
    assert tr["kernel"].dtype == jnp.bfloat16 and tr.get_score().dtype == jnp.float32
    close(tr.get_score(), stats.norm.logpdf(f64(tr["kernel"]), 0.0, 2.0).sum())
    # A value that is given takes the parameter's dtype, and what is scored is what the network sees.
    exact = jnp.array([[1.0001, 2.0, 3.0], [4.0, 5.0, 6.0]])
    _, (weight, tr) = model.importance(KEY, {"kernel": exact}, (x,))
    assert tr["kernel"].dtype == jnp.bfloat16
    close(weight, stats.norm.logpdf(f64(exact.astype(jnp.bfloat16)), 0.0, 2.0).sum())


def test_discrete_weights():
    """A network of zeros and ones: the choices are integers, the parameter is not."""
    net = RandomParams(nn.Dense(2), (Bernoulli.by_keyword("probs"), (0.3,)), select("kernel"))
    variables = net.init(KEY, X)
    model = net.bind(variables)
    _, tr = model.simulate(KEY, (X,))
    assert tr["kernel"].dtype == jnp.int32
    close(tr.get_score(), stats.bernoulli.logpmf(np.asarray(tr["kernel"]), 0.3).sum())
    close(tr.get_retval(), np.asarray(X) @ np.asarray(tr["kernel"]))
    with pytest.raises(gjflax.DiscreteGradientError, match="kernel"):
        model.choice_grad(KEY, tr, select("kernel"))


# Bad input ------------------------------------------------------------------------------------------------------------

STANDARD = (Normal, (0.0, 1.0))


@pytest.mark.parametrize(
    "prior, selection, error, message",
    [
        ({"Dense_1": STANDARD}, None, gjflax.ParameterPathError, r'prior .* names "Dense_1".*Did you mean "Dense_0"'),
        (
            {"Dense_0": STANDARD, ("out", "kernal"): STANDARD},
            None,
            gjflax.ParameterPathError,
            r'Did you mean \("out", "kernel"\)',
        ),
        ({"Dense_0": STANDARD}, None, gjflax.ParameterPathError, r'"out", "\w+"\) is selected and has no prior'),
        (lambda path, shape: None, "out", gjflax.ParameterPathError, "has no prior"),
        (STANDARD, select("owt"), gjflax.SelectionError, r'selection .* names "owt".*Did you mean "out"'),
        (STANDARD, ~select(("out", "bais")), gjflax.SelectionError, r'Did you mean \("out", "bias"\)'),
        (STANDARD, select(("out", 0)), gjflax.SelectionError, "no parameter there"),
        (
            (MultivariateNormalTriL, (jnp.zeros(4), jnp.eye(4))),
            select(("out", "kernel")),
            gjflax.ChoiceShapeError,
            r'\("out", "kernel"\) \(MultivariateNormalTriL\) draws the shape \(4,\).*\(3, 2\)',
        ),
        (lambda path, shape: Normal, "out", gjflax.ArgumentError, "out"),
        (lambda path, shape: (0.0, 1.0), "out", gjflax.ArgumentError, r"A prior is written \(Normal, \(0.0, 1.0\)\)"),
    ],
)
def test_wrong_paths_and_priors_are_found_while_tracing(prior, selection, error, message):
    net = RandomParams(MLP(), prior, selection)
    with pytest.raises(error, match=message):
        jax.eval_shape(net.init, KEY, X)


def test_wrong_forms_are_found_when_it_is_made():
    with pytest.raises(gjflax.ArgumentError, match="takes a Flax module, or a generative function"):
        RandomParams(MLP, STANDARD)
    for wrong in ((Normal, 0.0), 3.0, (0.0, 1.0), {"out": Normal, 3: STANDARD}, {"out": None}, MLP()):
        with pytest.raises(gjflax.ArgumentError):
            RandomParams(MLP(), wrong)
    with pytest.raises(gjflax.ArgumentError, match="counts arguments"):
        RandomParams(MLP(), STANDARD, num_hyperparameters=True)
    with pytest.raises(gjflax.ArgumentError, match="num_hyperparameters"):
        jax.jit(lambda scale: RandomParams(MLP(), (Normal, (0.0, scale))).simulate(KEY, (X,))[1])(1.0)
    with pytest.raises(gjflax.ArgumentError, match="closes over a traced array"):
        jax.jit(lambda scale: RandomParams(MLP(), (Normal, lambda: (0.0, scale))).simulate(KEY, (X,))[1])(1.0)
    with pytest.raises(gjflax.ArgumentError, match="before the network's arguments"):
        RandomParams(MLP(), STANDARD, num_hyperparameters=3).simulate(KEY, (X,))
    with pytest.raises(gjflax.ArgumentError, match="returned"):
        RandomParams(nn.Dense(1), (Normal, lambda scale: scale), num_hyperparameters=1).simulate(KEY, (1.0, X))


def test_wrong_choices_are_named():
    net = RandomParams(MLP(), STANDARD, select("out"))
    model = net.bind(MLP().init(KEY, X))
    _, tr = model.simulate(KEY, (X,))
    with pytest.raises(
        gjflax.UnvisitedConstraintError, match=r'\("Dense_0", "bias"\), which is a parameter and no choice'
    ):
        model.importance(KEY, {("Dense_0", "bias"): jnp.zeros(3)}, (X,))
    with pytest.raises(gjflax.UnvisitedConstraintError, match=r'Did you mean \("out", "kernel"\)'):
        model.update(KEY, tr, {("out", "kernal"): jnp.zeros((3, 2))}, (X,))
    with pytest.raises(gjflax.ChoiceShapeError, match=r'\("out", "kernel"\)'):
        model.importance(KEY, {("out", "kernel"): jnp.zeros((2, 3))}, (X,))
    with pytest.raises(gjflax.MissingChoiceError, match=r'\("out", "kernel"\)'):
        model.assess(KEY, {("out", "bias"): jnp.zeros(2)}, (X,))
    model.importance(KEY, {"nothing": 1.0, ("Dense_0", "bias"): jnp.zeros(3)}, (X,), strict=False)
    wider = RandomParams(MLP(), STANDARD).bind({})
    with pytest.raises(gjflax.ArgumentError, match="its selection or its network is another"):
        wider.update(KEY, tr, {}, (X,))
    with pytest.raises(gjflax.UnboundParametersError):
        net.simulate(KEY, (X,))


def test_a_parameter_that_has_no_address_is_refused():
    class Slash(nn.Module):
        @nn.compact
        def __call__(self, x):
            counts = self.param("counts", lambda key: jnp.arange(6).reshape(2, 3))
            return x * self.param("a/b", nn.initializers.ones, ()) + counts.astype(x.dtype)

    with pytest.raises(gjflax.ArgumentError, match='has a "/" in its name'):
        RandomParams(Slash(), STANDARD, select("a/b")).simulate(KEY, (X,))
    with pytest.raises(gjflax.ArgumentError, match="no array of real numbers"):
        RandomParams(Slash(), STANDARD, select("counts")).simulate(KEY, (X,))


def test_a_network_without_parameters_has_no_choices():
    net = RandomParams(nn.Sequential([nn.tanh]), STANDARD)
    _, tr = net.simulate(KEY, (X,))
    assert tr.strip().is_empty() and tr.get_score() == 0.0
    close(tr.get_retval(), np.tanh(f64(X)))
    with pytest.raises(gjflax.ParameterPathError, match='names "kernel".*no parameter there'):
        RandomParams(nn.Sequential([nn.tanh]), {"kernel": STANDARD}).simulate(KEY, (X,))


def test_equal_ones_are_equal():
    """Traces made by two of them are one type to `jax.jit`."""

    def make(scale: float) -> Any:
        return RandomParams(MLP(), {"out": (Normal, (jnp.zeros(2), np.float32(scale)))}, select(("out", "bias")))

    assert make(1.0) == make(1.0) and hash(make(1.0)) == hash(make(1.0))
    assert make(1.0) != make(2.0)
    variables = MLP().init(KEY, X)
    structures = {jax.tree.structure(make(1.0).bind(variables).simulate(KEY, (X,))[1]) for _ in range(2)}
    assert len(structures) == 1
    assert "out: Normal(array[2], " in repr(make(1.0).bind(variables).simulate(KEY, (X,))[1])


def test_the_network_is_traced_for_its_shapes_once():
    calls = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls.append(x.shape)
            return nn.Dense(2)(x)

    net = RandomParams(Counted(), STANDARD)
    for _ in range(3):
        net.simulate(KEY, (jnp.ones(3),))
    assert len(calls) == 4, "one run each, and one for the shapes"
    net.simulate(KEY, (jnp.ones(4),))
    assert len(calls) == 6, "another shape of the input, another network"

"""What all guides that are built from a model have in common."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm
from learning.guides import models
from tensorflow_probability.substrates import jax as tfp

import gjflax
from gjflax import (
    AutoDelta,
    AutoFlow,
    AutoLaplace,
    AutoLowRankNormal,
    AutoMultivariateNormal,
    AutoNormal,
    Bernoulli,
    GenModule,
    Map,
    Normal,
    Switch,
    gen,
    select,
    trace,
)

KEY = jax.random.key(0)
X = jnp.array([0.5, -1.0, 2.0])
OBSERVED = {("points", "y"): jnp.array([1.0, 2.0, 0.5])}
NORMALS = {
    "normal": AutoNormal,
    "multivariate": AutoMultivariateNormal,
    "low rank": lambda *args: AutoLowRankNormal(*args, rank=2),
}
FLOWS = {
    "iaf": lambda *args: AutoFlow(*args, hidden=(8,)),
    "real nvp": lambda *args: AutoFlow(*args, kind="real_nvp", hidden=(8,)),
}

QUICK_FIRST = [
    AutoMultivariateNormal,
    *(
        pytest.param(make, marks=pytest.mark.slow)
        for make in (AutoNormal, NORMALS["low rank"], *FLOWS.values(), AutoLaplace, AutoDelta)
    ),
]


def close(a, b, rtol=2e-4, atol=2e-4):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)


def moved(variables, key=7):
    """Parameters away from their initial values, where a wrong sign or a missing factor shows."""
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    return structure.unflatten(
        [leaf + 0.3 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    )


def bound(make, model=models.supports, observed=OBSERVED, args=(X,)):
    guide = make(model, observed, args)
    return guide.bind(moved(guide.init(KEY, *args)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [*NORMALS.values(), *FLOWS.values()], ids=[*NORMALS, *FLOWS])
def test_the_score_of_a_draw_is_its_density(make):
    """Also where a support depends on another choice, so on the model's arguments by way of it."""
    guide = bound(make)

    @jax.jit
    def both(key):
        _, tr = guide.simulate(key, (X,))
        _, (retval, score) = guide.assess(key, tr.strip(), (X,))
        return tr, score

    tr, score = both(jax.random.key(3))
    close(tr.get_score(), score, rtol=1e-3, atol=1e-3)
    assert set(tr.strip().addresses()) == {("rate",), ("p",), ("high",), ("below",), ("points", "z")}
    assert tr["points", "z"].shape == (3, 2) and 0 < tr["below"] < tr["high"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [*NORMALS.values(), FLOWS["real nvp"]], ids=[*NORMALS, "real nvp"])
def test_densities_by_the_change_of_variables(make):
    """The density of the values is that of the points over the Jacobian of the maps, taken by autodiff."""
    guide = bound(make, models.constant_supports)
    tr = jax.jit(lambda key: guide.simulate(key, ())[1])(jax.random.key(4))

    names = list(tr.points)
    sizes = [tr.points[name].size for name in names]

    def values(flat):
        parts = jnp.split(flat, np.cumsum(sizes)[:-1])
        points = dict(zip(names, parts, strict=True))
        return jnp.concatenate(
            [
                tfp.bijectors.Softplus().forward(points["rate"]),
                tfp.bijectors.Sigmoid().forward(points["p"]),
                tfp.bijectors.Sigmoid(0.5, 3.0).forward(points["high"]),
                tfp.bijectors.Softplus().forward(points["points/z"]),
            ]
        )

    assert names == ["rate", "p", "high", "points/z"] or sorted(names) == ["high", "p", "points/z", "rate"]
    order = ["rate", "p", "high", "points/z"]
    names, sizes = order, [tr.points[name].size for name in order]
    flat = jnp.concatenate([jnp.ravel(tr.points[name]) for name in names])
    _, log_det = jnp.linalg.slogdet(jax.jacobian(values)(flat))
    log_q = sum(
        jnp.sum(part)
        for part in guide.log_density(
            {tuple(name.split("/")): point for name, point in tr.points.items()}, guide._rows(())
        ).values()
    )
    close(tr.get_score(), log_q - log_det, rtol=1e-3)
    close(jnp.concatenate([jnp.ravel(tr.values[name]) for name in names]), values(flat))


@pytest.mark.slow
def test_normals_against_tfp():
    guides = {name: bound(make, models.constant_supports) for name, make in NORMALS.items()}
    tfd = tfp.distributions
    point = 0.3 * jax.random.normal(KEY, (guides["multivariate"].size,))
    full = guides["multivariate"]
    want = tfd.MultivariateNormalTriL(full.loc, full.scale_tril).log_prob(point)
    close(full.log_density_flat(point), want)
    low = guides["low rank"]
    covariance = jnp.diag(jnp.exp(2 * low.log_scale)) + low.factor @ low.factor.T
    close(
        low.log_density_flat(point),
        tfd.MultivariateNormalFullCovariance(low.loc, covariance).log_prob(point),
        rtol=1e-3,
    )
    # And the draws: their mean and covariance, of 40,000 draws within 4 standard errors.
    draws = jax.jit(jax.vmap(low.draw_flat))(jax.random.split(KEY, 40_000))
    spread = jnp.sqrt(jnp.diagonal(covariance))
    assert jnp.all(jnp.abs(draws.mean(0) - low.loc) < 4 * spread / 200)
    error = jnp.sqrt((jnp.outer(spread, spread) ** 2 + covariance**2) / 40_000)
    assert jnp.all(jnp.abs(jnp.cov(draws.T) - covariance) < 4 * error)


def test_a_guide_at_the_posterior_gives_the_evidence():
    """All log weights of the exact posterior are the log evidence: no sampling error hides a mistake."""
    mean, covariance, evidence = models.regression_posterior()
    guide = AutoMultivariateNormal(models.regression, models.OBSERVED, (models.X,))
    params = guide.params_of(jnp.asarray(mean, jnp.float32), jnp.linalg.cholesky(jnp.asarray(covariance, jnp.float32)))
    objective = gjflax.ELBO(models.regression, guide, num_samples=5)
    variables = {"params": {"guide": params}}
    loss, noted = objective.apply(
        variables, models.OBSERVED, (models.X,), rngs={"choice": KEY}, mutable=["diagnostics"]
    )
    close(-loss, evidence, rtol=1e-5)
    close(noted["diagnostics"]["log_weights"], np.full(5, evidence), rtol=1e-5)


def test_laplace_is_exact_for_a_normal_posterior():
    mean, covariance, _ = models.regression_posterior()
    guide = AutoLaplace(models.regression, models.OBSERVED, (models.X,))
    variables = {"params": {"loc": jnp.asarray(mean, jnp.float32)}}
    normal, found = guide.approximation(variables, models.regression, models.OBSERVED, (models.X,))
    lower = normal.bind(found).scale_tril
    close(lower @ lower.T, covariance, rtol=1e-4)


@pytest.mark.slow
def test_laplace_has_the_curvature_in_unconstrained_space():
    """Of a Beta posterior, whose density in R is that of p times p (1 − p)."""
    guide = AutoLaplace(models.coin, {"heads": 7})
    a, b = 2.0 + 7, 3.0 + 3
    point = np.log(a / b)  # the mode of p^a (1 − p)^b in the logit
    normal, found = guide.approximation({"params": {"loc": jnp.array([point], jnp.float32)}}, models.coin, {"heads": 7})
    p = a / (a + b)
    close(normal.bind(found).scale_tril, [[((a + b) * p * (1 - p)) ** -0.5]], rtol=1e-4)
    gradient = jax.grad(
        lambda loc: gjflax.ELBO(models.coin, guide).apply(
            {"params": {"guide": {"loc": loc}}}, {"heads": 7}, rngs={"choice": KEY}
        )
    )(jnp.array([point], jnp.float32))
    close(gradient, [0.0], atol=1e-5)
    flat = AutoLaplace(gen(_flat))
    with pytest.raises(gjflax.ArgumentError, match="not positive definite"):
        flat.approximation({"params": {"loc": jnp.zeros(1)}}, gen(_flat), {})


def _flat():
    return trace("p", gjflax.distribution(lambda key: jnp.zeros(()), lambda v: v**2, bijector=tfp.bijectors.Identity))()


def test_map_by_a_point_is_the_mode_of_the_density_of_the_choice():
    guide = AutoDelta(models.coin, {"heads": 7})
    objective = gjflax.MAP(models.coin, guide)
    variables = objective.init(KEY, {"heads": 7})

    @jax.jit
    def step(variables):
        loss = lambda v: objective.apply(v, {"heads": 7}, rngs={"choice": KEY})
        return jax.tree.map(lambda p, g: p - 0.3 * g, variables, jax.grad(loss)(variables))

    for _ in range(60):
        variables = step(variables)
    _, tr = guide.bind({"params": variables["params"]["guide"]}).simulate(KEY, ())
    close(tr["p"], (2.0 + 7 - 1) / (2.0 + 3.0 + 10 - 2), rtol=1e-4)
    assert tr.get_score() == 0.0
    _, (_, elsewhere) = guide.bind({"params": variables["params"]["guide"]}).assess(KEY, {"p": 0.1}, ())
    assert elsewhere == -jnp.inf


def test_a_trained_guide_needs_no_data_and_never_runs_the_model():
    runs = []

    @gen
    def model(x):
        runs.append(1)
        s = trace("s", gjflax.Gamma)(2.0, 1.0)
        return trace("y", Normal)(s * x, 1.0)

    guide = AutoNormal(model, ["y"], (jnp.ones(4),))
    variables = guide.init(KEY)
    before = len(runs)
    _, tr = guide.bind(variables).simulate(KEY, ())
    guide.bind(variables).assess(KEY, tr.strip(), ())
    assert len(runs) == before


@pytest.mark.slow
def test_interface_of_a_mean_field_guide():
    """Weights by the sum over its choices."""
    guide = bound(AutoNormal)
    args = (X,)

    @jax.jit
    def run(key):
        _, tr = guide.simulate(key, args)
        some = guide.importance(key, {"high": 2.0, "below": 0.4}, args)[1]
        _, _, new, discard = update = guide.update(key, tr, {"rate": 0.7}, args)[1]
        back = guide.update(key, new, discard, args)[1]
        redrawn = guide.regenerate(jax.random.fold_in(key, 1), tr, select("rate"), args)[1]
        low = guide.update(key, tr, {"below": 0.4}, args)[1][2]  # which every `high` allows
        moved = guide.regenerate(jax.random.fold_in(key, 2), low, select("high"), args)[1]
        mapped = guide.constrain({_key(name): point for name, point in tr.points.items()}, args)
        return tr, some, update, back, redrawn, low, moved, mapped, guide.unconstrain(tr, gjflax.AllSelection())

    tr, (weight, some), (_, change, new, discard), back, redrawn, low, moved, mapped, unmapped = run(KEY)
    close(sum(jnp.sum(leaf.get_score()) for _, leaf in tr.leaves()), tr.get_score())

    at = {address: jnp.sum(leaf.get_score()) for address, leaf in some.leaves()}
    close(weight, at["high",] + at["below",])
    assert some["high"] == 2.0 and some["below"] == jnp.float32(0.4)

    close(change, new.get_score() - tr.get_score())
    close(back[1], -change)
    close(back[2].get_score(), tr.get_score())
    assert discard.to_dict() == {"rate": tr["rate"]}

    _, weight, new = redrawn
    close(weight, 0.0)
    assert new["rate"] != tr["rate"] and jnp.all(new["points", "z"] == tr["points", "z"])
    # A support that moves with another choice: the kept choice is scored again.
    _, weight, new = moved
    close(weight, new.project(~select("high")) - low.project(~select("high")))
    assert new["below"] == jnp.float32(0.4) and jnp.abs(weight) > 1e-3

    close(mapped[1], -unmapped[1])
    jax.tree.map(close, mapped[0], tr.strip())


def _key(name):
    return tuple(name.split("/"))


@pytest.mark.slow
def test_a_joint_guide_says_what_it_cannot():
    guide = bound(AutoMultivariateNormal)
    _, tr = guide.simulate(KEY, (X,))
    close(guide.project(KEY, tr, gjflax.AllSelection())[1], tr.get_score())
    with pytest.raises(gjflax.NotImplementedByGenerativeFunctionError, match="joint density of all its choices"):
        guide.project(KEY, tr, select("rate"))
    with pytest.raises(gjflax.NotImplementedByGenerativeFunctionError, match="joint density of all its choices"):
        guide.importance(KEY, {"rate": 1.0}, (X,))


@pytest.mark.slow
class Trained(nn.Module):
    """A network in training: its statistics are written, and it may drop units."""

    rate: float

    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))
        return nn.Dense(1)(nn.Dropout(self.rate, deterministic=False)(h))


class RandomLastLayer(GenModule):
    rate: float

    @nn.compact
    def __call__(self, x):
        net = gjflax.RandomParams(Trained(self.rate), (Normal, (0.0, 2.0)), select("Dense_1"))
        return trace("y", Normal)(trace("net", net)(x), 0.7)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_of_a_network_that_writes_statistics(rate):
    """The loss, and the statistics that it leaves, by hand."""
    x, y = jax.random.normal(KEY, (6, 2)), jnp.ones((6, 1))
    model = RandomLastLayer(rate)
    objective = gjflax.MAP(model, AutoDelta(model, {"y": y}, (x,)))
    rngs = {name: jax.random.fold_in(KEY, number) for number, name in enumerate(("choice", "dropout"))}
    variables = moved(objective.init({"params": KEY, **rngs}, {"y": y}, (x,)))
    loss, written = objective.apply(variables, {"y": y}, (x,), rngs=rngs, mutable=["batch_stats"])
    params = jax.tree.map(np.asarray, variables["params"]["model"]["Trained_0"])
    h = np.asarray(x) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    before, after = (of["batch_stats"]["model"]["Trained_0"]["BatchNorm_0"] for of in (variables, written))
    close(after["mean"], 0.99 * before["mean"] + 0.01 * h.mean(0))
    close(after["var"], 0.99 * before["var"] + 0.01 * h.var(0))
    chosen = jax.tree.map(np.asarray, variables["params"]["guide"]["loc"]["net"]["Dense_1"])
    h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
    h = h * params["BatchNorm_0"]["scale"] + params["BatchNorm_0"]["bias"]
    log_p = jnp.sum(norm.logpdf(y, h @ chosen["kernel"] + chosen["bias"], 0.7))
    log_p += sum(jnp.sum(norm.logpdf(leaf, 0.0, 2.0)) for leaf in jax.tree.leaves(chosen))
    if rate == 0.0:
        close(loss, -log_p)
    else:
        assert jnp.isfinite(loss) and abs(loss + log_p) > 1e-3, "no unit was dropped"


@pytest.mark.parametrize("make", QUICK_FIRST)
def test_of_no_choice(make):
    """Where all is observed every bound is the density, and only the model is trained."""
    observed = {"y": 1.5, "z": 0.5}

    class Model(GenModule):
        @nn.compact
        def __call__(self):
            z = trace("z", Normal)(self.param("loc", nn.initializers.ones, ()), 2.0)
            trace("y", Normal)(z, 1.0)

    guide = make(Model(), observed)
    for kind in (gjflax.ELBO, gjflax.ImportanceWeightedELBO, gjflax.MAP, gjflax.MaximumLikelihood):
        objective = kind(Model(), guide, num_samples=2)
        variables = objective.init(KEY, observed)
        loss, grads = jax.value_and_grad(lambda v, o=objective: o.apply(v, observed, rngs={"choice": KEY}))(variables)
        close(loss, -norm.logpdf(0.5, 1.0, 2.0) - norm.logpdf(1.5, 0.5, 1.0))
        close(grads["params"]["model"]["loc"], 0.5 / 4)
        assert sum(leaf.size for leaf in jax.tree.leaves(grads["params"].get("guide", {}))) == 0
    _, tr = guide.bind({"params": variables["params"].get("guide", {})}).simulate(KEY, ())
    assert tr.strip().is_empty() and tr.get_score() == 0.0


@pytest.mark.parametrize(
    "make",
    [pytest.param(make, marks=pytest.mark.slow) for make in (*FLOWS.values(), NORMALS["low rank"])]
    + [AutoNormal, AutoMultivariateNormal],
)
def test_the_location_is_what_is_drawn_without_noise(make, monkeypatch):
    guide = bound(make)
    location = guide.at_location((X,))
    monkeypatch.setattr(jax.random, "normal", lambda key, shape=(), dtype=jnp.float32: jnp.zeros(shape, dtype))
    _, tr = guide.simulate(KEY, (X,))
    for address in tr.strip().addresses():
        close(location[address], tr[address], rtol=1e-5, atol=1e-6)


def test_guides_of_no_choice_side_by_side():
    observed = {"y": 1.5, "z": 0.5}

    @gen
    def model():
        z = trace("z", Normal)(1.0, 2.0)
        trace("y", Normal)(z, 1.0)

    objective = gjflax.ELBO(model, gjflax.AutoGuides(AutoNormal(model, observed), AutoDelta(model, observed)))
    loss = objective.apply(objective.init(KEY, observed), observed, rngs={"choice": KEY})
    close(loss, -norm.logpdf(0.5, 1.0, 2.0) - norm.logpdf(1.5, 0.5, 1.0))


def test_guides_side_by_side_for_choices_of_one_map():
    """The score is the sum of both, by hand; an update by outer address reaches the right one; the ELBO is that of both."""

    @gen
    def element():
        a = trace("a", Normal)(0.0, 1.0)
        b = trace("b", Normal)(a, 1.0)
        trace("y", Normal)(b, 1.0)

    model = gen(lambda: trace("points", gjflax.Map(element, repeats=3))())
    observed = {("points", "y"): X}
    parts = [AutoNormal(model, observed, selection=gjflax.select(("points", name))) for name in "ab"]
    guide = gjflax.AutoGuides(*parts)
    variables = moved(guide.init(KEY))
    bound = guide.bind(variables)
    _, tr = bound.simulate(KEY, ())
    assert sorted(tr.strip().addresses()) == [("points", "a"), ("points", "b")]

    def by_hand(choices):
        total = 0.0
        for number, name in enumerate("ab"):
            own = variables["params"][f"guides_{number}"]
            loc, log_scale = (own[kind]["points"][name] for kind in ("loc", "log_scale"))
            total += jnp.sum(norm.logpdf(choices["points", name], loc, jnp.exp(log_scale)))
        return total

    close(tr.get_score(), by_hand(tr))
    new = {("points", "b"): jnp.array([0.3, -0.2, 1.0])}
    _, (_, weight, changed, discard) = bound.update(KEY, tr, new, ())
    close(weight, by_hand(changed) - by_hand(tr))
    close(discard["points", "b"], tr["points", "b"])
    close(changed["points", "a"], tr["points", "a"])
    objective = gjflax.ELBO(model, guide)
    params = {"params": {"guide": variables["params"]}}
    loss, noted = objective.apply(params, observed, rngs={"choice": KEY}, mutable=["diagnostics"])
    close(-loss, sum(noted["diagnostics"]["terms"].values()))
    assert {"points/a", "points/b", "points/y"} == set(noted["diagnostics"]["terms"])


@pytest.mark.parametrize("make", QUICK_FIRST)
def test_of_a_model_whose_choice_is_at_the_root(make):
    """Its ELBO is log p − log q by hand, and its density that of the guide of the same choice at an address."""
    model = Map(Normal, in_axes=(0, None))
    args = (jnp.array([0.5, -1.0, 2.0]), 1.5)
    guide, named = make(model, (), args), make(gen(lambda *args: trace("z", model)(*args)), (), args)
    params = moved(guide.init(KEY))["params"]
    _, tr = guide.bind({"params": params}).simulate(KEY, ())
    leaves, structure = jax.tree.leaves(params), jax.tree.structure(named.init(KEY)["params"])
    same = named.bind({"params": structure.unflatten(leaves)})
    _, (_, score) = same.assess(KEY, {"z": tr.get_retval()}, ())
    close(tr.get_score(), score)
    _, elbo = gjflax.ELBO(model, guide).apply(
        {"params": {"guide": params}}, {}, args, rngs={"choice": KEY}, mutable=["diagnostics"]
    )
    close(elbo["diagnostics"]["terms"]["root"], elbo["diagnostics"]["log_weights"][0])
    if make in (AutoLaplace, AutoDelta):
        close(elbo["diagnostics"]["log_weights"][0], norm.logpdf(leaves[0], *args).sum())


@pytest.mark.slow
def test_mistakes():
    @gen
    def discrete():
        trace("k", Bernoulli)(0.5)

    with pytest.raises(gjflax.DiscreteGradientError, match='"k" is discrete'):
        AutoNormal(discrete).init(KEY)
    with pytest.raises(gjflax.SelectionError, match='not observed, "w", none is selected'):
        AutoNormal(models.regression, models.OBSERVED, (models.X,), selection=gjflax.select("v")).init(KEY)
    with pytest.raises(gjflax.ArgumentError, match="`model` of a guide"):
        AutoNormal(lambda: None)
    with pytest.raises(gjflax.ArgumentError, match="`model_args` is a tuple"):
        AutoNormal(models.regression, models.OBSERVED, models.X)

    @gen
    def branches():
        i = trace("i", Bernoulli)(0.5)
        trace("part", Switch((gen(lambda: trace("a", Normal)(0.0, 1.0)), gen(lambda: trace("b", Normal)(0.0, 1.0)))))(i)

    with pytest.raises(gjflax.NotImplementedByGenerativeFunctionError, match="may be absent"):
        AutoNormal(branches, {"i": 0}).init(KEY)

    class Learned(GenModule):
        @gjflax.core.generative_function.nn.compact
        def __call__(self):
            high = self.param("high", lambda key: jnp.ones(()))
            trace("u", gjflax.Uniform)(0.0, high)

    with pytest.raises(gjflax.NotImplementedByGenerativeFunctionError, match="depends on parameters"):
        AutoNormal(Learned()).init(KEY)
    guide = bound(AutoNormal)
    with pytest.raises(gjflax.UnvisitedConstraintError, match='Did you mean "rate"'):
        guide.importance(KEY, {"rates": 1.0}, (X,))
    with pytest.raises(gjflax.MissingChoiceError, match='"high"'):
        guide.assess(KEY, {"rate": 1.0, "p": 0.5}, (X,))
    with pytest.raises(gjflax.ChoiceShapeError, match=r"\(3, 2\) there"):
        values = guide.simulate(KEY, (X,))[1].strip().to_dict()
        values["points"]["z"] = jnp.ones(2)
        guide.assess(KEY, values, (X,))


def test_supports_that_depend_on_arguments_ask_for_them():
    @gen
    def model(high):
        trace("u", gjflax.Uniform)(0.0, high)

    guide = AutoNormal(model, (), (1.0,))
    variables = guide.init(KEY, 5.0)
    _, tr = guide.bind(jax.tree.map(lambda leaf: leaf + 3.0, variables)).simulate(KEY, (5.0,))
    assert 4.0 < tr["u"] < 5.0
    with pytest.raises(gjflax.ArgumentError, match="guide_args=model_args"):
        guide.bind(variables).simulate(KEY, ())


@pytest.mark.slow
def test_guides_in_other_programs():
    """A guide is a generative function: mapped, called in a body, vectorised, without leaks."""
    guide = AutoNormal(models.regression, models.OBSERVED, (models.X,))
    variables = guide.init(KEY)
    traces = jax.vmap(lambda key: guide.bind(variables).simulate(key, ())[1])(jax.random.split(KEY, 4))
    assert traces.get_score().shape == (4,) and traces["w"].shape == (4, 2)
    each = jnp.stack([guide.bind(variables).simulate(key, ())[1].get_score() for key in jax.random.split(KEY, 4)])
    close(traces.get_score(), each)

    mapped = Map(guide, repeats=3)
    assert jax.tree.map(jnp.shape, mapped.init(KEY)["params"]) == jax.tree.map(jnp.shape, variables["params"])
    _, tr = mapped.bind(variables).simulate(KEY, ())
    assert tr["w"].shape == (3, 2)
    close(tr.get_score(), mapped.bind(variables).assess(KEY, tr.strip(), ())[1][1])


def test_no_leaks(no_leaks):
    for make in (AutoNormal, AutoMultivariateNormal, AutoDelta):
        no_leaks(lambda make=make: make(models.regression, models.OBSERVED, (models.X,)).init(KEY, models.X))

"""Generative functions in Flax's own world: collections, streams, transformations, training states, NNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.errors import ModifyScopeVariableError
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec

import gjflax
from gjflax import Diff, GenModule, Map, Normal, TrainCombinator, gen, select, trace

KEY = jax.random.key(0)
X = jnp.array([0.5, -1.0, 2.0])
XS = jnp.stack([X, 2 * X, -X, X + 1])


def norm(value: Any, mean: Any, scale: Any = 1.0) -> Any:
    return jnp.sum(jax.scipy.stats.norm.logpdf(value, mean, scale))


def close(got: Any, want: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


class Network(GenModule):
    """A latent z, and an observation whose mean is a network of both."""

    hidden: int = 4

    @nn.compact
    def __call__(self, x):
        z = trace("z", Normal)(jnp.zeros(2), 1.0)
        h = nn.tanh(nn.Dense(self.hidden)(jnp.concatenate([z, x])))
        self.sow("intermediates", "hidden", h)
        return trace("y", Normal)(nn.Dense(2)(h), 0.5)


def by_hand(params: Any, z: Any, y: Any, x: Any = X) -> Any:
    h = jnp.tanh(jnp.concatenate([z, x]) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    return norm(z, 0.0) + norm(y, h @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"], 0.5)


@pytest.fixture(scope="module")
def variables() -> Any:
    return jax.jit(Network().init)(KEY, X)


@pytest.fixture(scope="module")
def tr(variables: Any) -> Any:
    return jax.jit(lambda v: Network().bind(v).simulate(KEY, (X,))[1])(variables)


# Mutable collections and streams -------------------------------------------------------------------------------------


class Normalised(GenModule):
    train: bool = True

    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(use_running_average=not self.train, momentum=0.5)(x)
        return trace("y", Normal)(nn.Dense(1)(h), 1.0)


def test_batch_statistics_are_updated_by_every_method_that_runs_the_body():
    x = jnp.arange(12.0).reshape(4, 3)
    model = Normalised()
    variables = model.init(KEY, x)
    assert set(variables) == {"params", "batch_stats"}
    (_, tr), _ = model.apply(variables, KEY, (x,), method="simulate", mutable=["batch_stats"])
    calls = {
        "simulate": (KEY, (x,)),
        "importance": (KEY, {"y": tr["y"]}, (x,)),
        "assess": (KEY, tr.strip(), (x,)),
        "update": (KEY, tr, {"y": tr["y"] + 1}, (x,)),
        "regenerate": (KEY, tr, select("y"), (x,)),
    }
    for method, arguments in calls.items():
        _, updates = jax.eval_shape(
            lambda m=method, a=arguments: model.apply(variables, *a, method=m, mutable=["batch_stats"])
        )
        assert shapes(updates) == shapes({"batch_stats": variables["batch_stats"]}), method
    _, updates = model.apply(variables, *calls["update"], method="update", mutable=["batch_stats"])
    close(updates["batch_stats"]["BatchNorm_0"]["mean"], 0.5 * x.mean(axis=0))


def test_densities_and_gradients_read_statistics_and_write_none():
    x = jnp.arange(12.0).reshape(4, 3)
    variables = Normalised().init(KEY, x)
    variables = {**variables, "batch_stats": jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])}
    frozen = Normalised(train=False)
    stats, p = variables["batch_stats"]["BatchNorm_0"], variables["params"]

    def density(params, x):
        h = (x - stats["mean"][None]) / jnp.sqrt(stats["var"][None] + 1e-5)
        return norm(tr["y"], h @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])

    _, tr = frozen.bind(variables).simulate(KEY, (x,))
    close(tr.get_score(), density(p, x))
    _, grads = frozen.bind(variables).arg_grad(KEY, tr)
    close(grads, jax.grad(density, argnums=1)(p, x))
    for subject, options in (
        (frozen.bind(variables), {}),
        (frozen, {"variables": {"batch_stats": variables["batch_stats"]}}),
    ):
        _, logpdf = subject.score_params(KEY, tr, p, **options)
        close(logpdf, density(p, x))
    # In training the statistics are those of the batch, and what is written is dropped.
    given = {"variables": {"batch_stats": variables["batch_stats"]}}
    _, one = Normalised().score_params(KEY, tr, p, **given)
    _, two = Normalised().bind(variables, mutable=["batch_stats"]).score_params(KEY, tr, p)
    h = (x - x.mean(axis=0)[None]) / jnp.sqrt(x.var(axis=0)[None] + 1e-5)
    want = norm(tr["y"], h @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"][None])
    close((one, two), (want, want))


def test_gradients_in_training_mode_need_no_mutable_collection():
    """A module that is bound read-only, whose network writes statistics: the density uses those of the batch."""
    x = jnp.arange(12.0).reshape(4, 3) ** 1.5
    model = Normalised()
    variables = model.init(KEY, x)
    p, bound = variables["params"], model.bind(variables)
    (_, tr), _ = model.apply(variables, KEY, (x,), method="simulate", mutable=["batch_stats"])

    def density(params, y, x):
        h = (x - x.mean(axis=0)[None]) / jnp.sqrt(x.var(axis=0)[None] + 1e-5)
        layers = params["Dense_0"], params["BatchNorm_0"]
        h = h * layers[1]["scale"][None] + layers[1]["bias"][None]
        return norm(y, h @ layers[0]["kernel"] + layers[0]["bias"][None])

    of_params, of_y, of_x = jax.grad(density, argnums=(0, 1, 2))(p, tr["y"], x)
    close(bound.score_params(KEY, tr, p)[1], density(p, tr["y"], x))
    close(bound.param_grad(KEY, tr, p)[1], of_params)
    close(bound.choice_grad(KEY, tr, select("y"))[1]["y"], of_y)
    close(bound.arg_grad(KEY, tr)[1], of_x)
    close(bound.unzip(KEY, {})[1](tr.strip(), x), density(p, tr["y"], x))
    close(bound.variables, variables)


class Writes(GenModule):
    """A body that writes its own parameter, which no gradient may do behind its caller's back."""

    @nn.compact
    def __call__(self):
        loc = self.variable("params", "loc", lambda: jnp.zeros(()))
        loc.value = loc.value + 1.0
        return trace("y", Normal)(loc.value, 1.0)


def test_gradients_write_no_parameters():
    variables = Writes().init(KEY)
    (_, tr), _ = Writes().apply(variables, KEY, (), method="simulate", mutable=["params"])
    with pytest.raises(ModifyScopeVariableError, match="params"):
        Writes().bind(variables).choice_grad(KEY, tr, select("y"))


def test_dropout_draws_from_its_stream():
    class Dropping(GenModule):
        rate: float = 0.5

        @nn.compact
        def __call__(self, x, deterministic=False):
            h = nn.Dropout(self.rate)(x, deterministic=deterministic)
            return trace("y", Normal)(h, 1.0)

    y, x = jnp.zeros(8), jnp.ones(8)

    def assess(key, *args):
        return Dropping().apply({}, KEY, {"y": y}, (x, *args), method="assess", rngs={"dropout": key})[1][1]

    scores = {float(assess(jax.random.key(seed))) for seed in range(4)}
    # A unit that is kept is 2, so the score says how many there were.
    kept = [round((float(norm(y, 0.0)) - score) / 2.0, 4) for score in scores]
    assert len(scores) > 1 and all(count == int(count) for count in kept)
    close(assess(KEY, True), norm(y, 1.0))
    _, grads = Dropping().choice_grad(KEY, Dropping().importance(KEY, {"y": y}, (x, True))[1][1], select("y"))
    close(grads["y"], x)


def test_streams_of_one_key_are_independent_of_the_choices():
    """``rngs={"dropout": key}`` with the key of the choices is the natural mistake; the draws must not coincide."""

    class Model(GenModule):
        @nn.compact
        def __call__(self):
            noise = jax.random.normal(self.make_rng("noise"))
            return noise, trace("y", Normal)(0.0, 1.0)

    _, tr = Model().apply({}, KEY, (), method="simulate", rngs={"noise": KEY})
    noise, y = tr.get_retval()
    assert not np.isclose(noise, y)


# Metadata, dtypes and intermediates ----------------------------------------------------------------------------------


class Partitioned(GenModule):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return trace("y", Normal)(nn.Dense(2, kernel_init=init)(x), 1.0)


def test_partitioned_parameters_keep_their_boxes():
    variables = Partitioned().init(KEY, X)
    box = variables["params"]["Dense_0"]["kernel"]
    assert isinstance(box, nn.Partitioned)
    assert nn.get_partition_spec(variables)["params"]["Dense_0"]["kernel"] == PartitionSpec(None, "model")
    key, tr = Partitioned().bind(variables).simulate(KEY, (X,))
    close(tr.get_score(), norm(tr["y"], X @ box.value))
    _, grads = Partitioned().param_grad(key, tr, variables["params"])
    assert jax.tree.structure(grads) == jax.tree.structure(variables["params"])
    close(grads["Dense_0"]["kernel"].value, jnp.outer(X, tr["y"] - X @ box.value))
    mapped = Map(Partitioned(), in_axes=0)
    assert jax.tree.structure(jax.eval_shape(lambda: mapped.init(KEY, XS))) == jax.tree.structure(variables)
    _, (_, score) = mapped.bind(variables).assess(key, {"y": jnp.zeros((4, 2))}, (XS,))
    close(score, norm(jnp.zeros((4, 2)), XS @ box.value))


def test_intermediates_are_sown_and_captured():
    variables = Network().init(KEY, X)
    assert set(variables) == {"params"}
    run = {"method": "simulate", "mutable": ["intermediates"], "capture_intermediates": True}
    (_, tr), state = Network().apply(variables, KEY, (X,), **run)
    seen = state["intermediates"]
    p = variables["params"]
    hidden = jnp.tanh(jnp.concatenate([tr["z"], X]) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
    close(seen["hidden"], (hidden,))
    assert seen["Dense_1"]["__call__"][0].shape == (2,)
    # Of a Map, every element leaves its own.
    mapped = Map(Network(), in_axes=0)
    _, state = jax.eval_shape(lambda: mapped.apply(variables, KEY, (XS,), **run))
    assert state["intermediates"]["hidden"][0].shape == (4, 4)
    assert state["intermediates"]["Dense_0"]["__call__"][0].shape == (4, 4)
    # Where nobody asks for them they cost nothing.
    _, tr = mapped.apply(variables, KEY, (XS,), method="simulate")
    assert tr["y"].shape == (4, 2)


def test_half_precision_parameters_meet_single_precision_data():
    class Half(GenModule):
        @nn.compact
        def __call__(self, x):
            return trace("y", Normal)(nn.Dense(2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(x), 0.5)

    variables = Half().init(KEY, X)
    y = jnp.array([0.123456, -1.98765])
    bound = Half().bind(variables)
    key, (weight, tr) = bound.importance(KEY, {"y": y}, (X,))
    np.testing.assert_array_equal(tr["y"], y)
    assert tr["y"].dtype == weight.dtype == tr.get_score().dtype == jnp.float32
    mean = nn.Dense(2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16).apply(
        {"params": variables["params"]["Dense_0"]}, X
    )
    close(weight, norm(y, mean.astype(jnp.float32), 0.5))
    _, grads = Half().param_grad(key, tr, variables["params"])
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(grads))
    _, (_, _, new, discard) = bound.update(key, tr, {"y": y + 1}, (X,))
    assert jax.tree.structure(new) == jax.tree.structure(tr)
    assert [leaf.dtype for leaf in jax.tree.leaves(new)] == [leaf.dtype for leaf in jax.tree.leaves(tr)]
    assert discard["y"].dtype == jnp.float32


# Initialisation ------------------------------------------------------------------------------------------------------


def test_every_way_to_initialise_gives_the_same_parameters(variables: Any, no_leaks: Any):
    close(no_leaks(lambda: Network().init(KEY, X)), variables)
    close(no_leaks(lambda: jax.jit(Network().init)(KEY, X)), variables)
    by_method = no_leaks(lambda: jax.jit(lambda: Network().init(KEY, KEY, (X,), method="simulate"))())
    close(by_method, variables)
    like = jax.ShapeDtypeStruct(X.shape, X.dtype)
    close(Network().lazy_init(KEY, like), variables)
    close(Network().lazy_init(KEY, KEY, (like,), method="simulate"), variables)
    output, made = Network().init_with_output(KEY, X)
    assert output.shape == (2,)
    close(made, variables)


def test_init_of_composed_models_leaks_no_tracer(no_leaks: Any):
    class Composed(GenModule):
        def setup(self):
            self.net = nn.remat(Network)(2)

        @nn.compact
        def __call__(self, xs):
            first = trace("first", self.net)(xs[0])
            return first, trace("many", Map(Network(), in_axes=0))(xs)

    objective = gjflax.ELBO(model=Composed(), guide=Guide(), num_samples=2)
    # Not compiled: jit would find a leak by itself.
    made = no_leaks(lambda: Composed().init(KEY, XS))
    assert set(made["params"]) == {"net", "Network_0"}
    observed = {"first": {"y": jnp.zeros(2)}, "many": {"y": jnp.zeros((4, 2))}}
    made = no_leaks(lambda: jax.jit(objective.init)(KEY, observed, (XS,)))
    assert set(made) == {"params"} and set(made["params"]) == {"model", "guide"}


class Guide(GenModule):
    @nn.compact
    def __call__(self):
        loc = self.param("loc", nn.initializers.zeros, (5, 2))
        trace(("first", "z"), Normal)(loc[0], 1.0)
        trace(("many", "z"), Normal)(loc[1:], 1.0)


# Flax's transformations, in a user's hand ----------------------------------------------------------------------------


def test_remat_of_a_class_changes_nothing(variables: Any, tr: Any):
    Remat = nn.remat(Network)
    assert shapes(Remat().init(KEY, X)) == shapes(variables)
    bound = Remat().bind(variables)
    _, again = bound.simulate(KEY, (X,))
    close(again.strip(), tr.strip())
    close(again.get_score(), tr.get_score())

    def loss(params):
        return Remat().apply({"params": params}, KEY, tr.strip(), (X,), method="assess")[1][1]

    close(jax.grad(loss)(variables["params"]), jax.grad(by_hand)(variables["params"], tr["z"], tr["y"]))
    assert "prevent_cse" in str(jax.make_jaxpr(jax.grad(loss))(variables["params"])), "nothing is recomputed"


def test_jit_of_a_class_changes_nothing(variables: Any, tr: Any):
    _, again = nn.jit(Network)().bind(variables).simulate(KEY, (X,))
    close(again.strip(), tr.strip())


class Point(GenModule):
    """Holds a layer as a field."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x, shift):
        return trace("y", Normal)(self.inner(x)[0] + shift["shift"], 1.0)


class Holder(GenModule):
    """Holds a generative function as a field, as models hold their decoders."""

    held: Any

    @nn.compact
    def __call__(self, xs):
        return trace("held", self.held)(xs)


@pytest.mark.parametrize(
    "transform, lead",
    [(Holder, 0), (nn.remat(Holder), 0), (nn.jit(Holder), 0), (lambda held: Map(Holder(held), in_axes=0), 1)],
    ids=["plain", "remat", "jit", "mapped"],
)
@pytest.mark.parametrize(
    "make, axes",
    [
        (lambda inner: Map(inner, in_axes=0), 1),
        (lambda inner: Map(Map(inner, in_axes=0), in_axes=0), 2),
        (lambda inner: inner, 0),
    ],
    ids=["map", "map of map", "none"],
)
def test_combinators_that_are_fields_stay_transparent_under_transformations(
    make: Any, axes: int, transform: Any, lead: int
):
    """What a lifted transformation of the holder does must not show in the tree of the held function's parameters."""
    model = transform(make(TrainCombinator(Point(nn.Dense(1)), params={"shift": 0.5})))
    xs = jnp.ones((2,) * (lead + axes) + (3,))
    want = {"params": {"held": {"inner": {"kernel": (3, 1), "bias": (1,)}, "shift": ()}}}
    assert shapes(jax.eval_shape(lambda: model.init(KEY, xs))) == want
    assert shapes(jax.eval_shape(lambda: model.init(KEY, KEY, (xs,), method="simulate"))) == want


def test_an_objective_of_several_samples_has_the_tree_of_one():
    class Encoder(GenModule):
        @nn.compact
        def __call__(self, y):
            return trace("z", Normal)(nn.Dense(1)(y[None])[0], 1.0)

    class Decoder(GenModule):
        @nn.compact
        def __call__(self):
            z = trace("z", Normal)(0.0, 1.0)
            return trace("y", Normal)(nn.Dense(1)(z[None])[0], 1.0)

    def tree(num_samples):
        objective = gjflax.ELBO(Map(Decoder(), repeats=3), Map(Encoder(), in_axes=0), num_samples=num_samples)
        return shapes(jax.eval_shape(lambda: objective.init(KEY, {"y": jnp.ones(3)}, (), (jnp.ones(3),))))

    assert tree(1) == tree(2)
    assert set(tree(2)["params"]["guide"]) == set(tree(2)["params"]["model"]) == {"Dense_0"}


def test_vmap_of_a_method_by_its_user(variables: Any):
    keys = jax.random.split(KEY, 3)
    options = {"variable_axes": {"params": None}, "split_rngs": {"params": False}}

    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, keys, x):
            net = Network(name="net")
            return nn.vmap(lambda net, key: net.simulate(key, (x,))[1], in_axes=0, **options)(net, keys)

    traces = Ensemble().apply({"params": {"net": variables["params"]}}, keys, X)
    _, want = jax.vmap(lambda key: Network().bind(variables).simulate(key, (X,)))(keys)
    close(traces.strip(), want.strip())
    assert shapes(Ensemble().init(KEY, keys, X)) == {"params": {"net": shapes(variables["params"])}}
    Lifted = nn.vmap(Network, in_axes=(0, None), methods=["simulate"], **options)
    _, traces = Lifted().apply(variables, keys, (X,), method="simulate")
    close(traces.strip(), want.strip())
    Layers = nn.vmap(
        Network, variable_axes={"params": 0}, split_rngs={"params": True, "choice": True}, in_axes=None, axis_size=3
    )
    made = Layers().init(KEY, X)
    assert made["params"]["Dense_0"]["kernel"].shape == (3, 5, 4)
    assert Layers().apply(made, X, rngs={"choice": KEY}).shape == (3, 2)
    by_methods = nn.vmap(Network, in_axes=(0, 0, None), methods=["assess"], **options)
    _, (_, scores) = by_methods().apply(variables, keys, want.strip(), (X,), method="assess")
    close(scores, want.get_score())


@pytest.mark.parametrize("outer", [lambda lifted: lifted, nn.remat], ids=["alone", "under remat"])
def test_a_body_under_vmap_or_scan_has_no_addresses_for_its_elements(variables: Any, outer: Any):
    """Not in a body, not at the root: with a mapped argument it would not run, and without one its score would have an axis."""
    options = {"split_rngs": {"params": False, "choice": True}}
    Mapped = nn.vmap(Network, in_axes=0, variable_axes={"params": None}, **options)
    Repeated = nn.vmap(Network, in_axes=None, axis_size=3, variable_axes={"params": None}, **options)
    Scanned = nn.scan(Network, variable_broadcast="params", **options)
    for kind, args, by in ((Mapped, (XS,), "vmap"), (Repeated, (X,), "vmap"), (Scanned, (X, XS), "scan")):
        lifted = outer(kind)()
        with pytest.raises(gjflax.TraceTransformError, match=f"root is a body under nn.{by}.*`(Map|Scan)"):
            lifted.apply(variables, KEY, args, method="simulate")
        with pytest.raises(gjflax.TraceTransformError, match=f'at "part" is a body under nn.{by}.*methods='):
            gen(lambda *args, lifted=lifted: trace("part", lifted)(*args)).init(KEY, *args)
    layer = outer(Mapped)().apply(variables, XS, rngs={"choice": KEY})
    assert layer.shape == (4, 2)


def test_scan_over_a_method_by_its_user(variables: Any):
    class Chain(nn.Module):
        @nn.compact
        def __call__(self, keys, x):
            def step(net, x, key):
                _, tr = net.simulate(key, (x,))
                return jnp.append(tr.get_retval(), 1.0), tr

            scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
            return scan(Network(name="net"), x, keys)

    keys = jax.random.split(KEY, 3)
    assert shapes(Chain().init(KEY, keys, X)) == {"params": {"net": shapes(variables["params"])}}
    last, traces = Chain().apply({"params": {"net": variables["params"]}}, keys, X)
    inputs = [X, *(jnp.append(y, 1.0) for y in traces["y"][:2])]
    for i, x in enumerate(inputs):
        close(traces.get_score()[i], by_hand(variables["params"], traces["z"][i], traces["y"][i], x))
    close(last[:2], traces["y"][2])


def test_layers_of_a_scanned_stochastic_module():
    """A GenModule as the cell of a scan, with parameters for each layer, drawing from the stream "choice"."""

    class Cell(GenModule):
        @nn.compact
        def __call__(self, h, _):
            return trace("h", Normal)(nn.Dense(3)(h), 0.1), None

    Stack = nn.scan(Cell, variable_axes={"params": 0}, split_rngs={"params": True, "choice": True}, length=4)
    variables = Stack().init(KEY, X, None)
    assert variables["params"]["Dense_0"]["kernel"].shape == (4, 3, 3)
    one, _ = Stack().apply(variables, X, None, rngs={"choice": jax.random.key(1)})
    two, _ = Stack().apply(variables, X, None, rngs={"choice": jax.random.key(2)})
    assert one.shape == (3,) and not np.allclose(one, two)


# A stochastic layer --------------------------------------------------------------------------------------------------


class Layered(nn.Module):
    noise: Any = Normal

    @nn.compact
    def __call__(self, x):
        h = Network(name="net")(x)
        return self.noise(h, 0.1) + gen_layer.copy(name="shift")(h)


@gen
def gen_layer(h):
    return trace("shift", Normal)(jnp.mean(h), 0.01)


def test_generative_functions_are_layers_of_a_plain_module(variables: Any):
    made = Layered().init(KEY, X)
    assert shapes(made) == {"params": {"net": shapes(variables["params"])}}
    close(Layered().init({"params": KEY, "choice": jax.random.key(9)}, X), made)
    draws = [Layered().apply(made, X, rngs={"choice": jax.random.key(seed)}) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.allclose(draws[0], draws[2])
    with pytest.raises(gjflax.MissingStreamError, match='net.*"choice"'):
        Layered().apply(made, X)
    with pytest.raises(gjflax.MissingStreamError, match='"choice"'):
        Layered().apply(made, X, rngs={"dropout": KEY})


def test_a_layer_draws_from_the_density_of_its_body():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Network(name="net")(x)

    variables = Layer().init(KEY, X)
    draw = jax.jit(jax.vmap(lambda key: Layer().apply(variables, X, rngs={"choice": key})))
    direct = jax.jit(
        jax.vmap(lambda key: Network().bind({"params": variables["params"]["net"]}).simulate(key, (X,))[1]["y"])
    )
    layers, traces = draw(jax.random.split(KEY, 4000)), direct(jax.random.split(jax.random.key(7), 4000))
    error = np.sqrt(layers.var(axis=0) / 4000 + traces.var(axis=0) / 4000)
    assert np.all(np.abs(layers.mean(axis=0) - traces.mean(axis=0)) < 4 * error)


# Training ------------------------------------------------------------------------------------------------------------


def train(state: TrainState, loss: Any, steps: int) -> tuple[TrainState, Any]:
    """A training loop as users have it: value and gradient of the loss, and an update of the state."""

    @jax.jit
    def run(state, key):
        def step(state, key):
            value, grads = jax.value_and_grad(lambda params: loss(state, params, key))(state.params)
            return state.apply_gradients(grads=grads), value

        return jax.lax.scan(step, state, jax.random.split(key, steps))

    # Optax raises a number to the power of an integer count, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        return run(state, KEY)


def test_a_train_state_learns_by_assess(variables: Any, tr: Any):
    data = {"z": tr["z"], "y": jnp.array([3.0, -2.0])}
    state = TrainState.create(apply_fn=Network().apply, params=variables["params"], tx=optax.adam(2e-2))

    def loss(state, params, key):
        _, (_, score) = state.apply_fn({"params": params}, key, data, (X,), method="assess")
        return -score

    state, losses = train(state, loss, 300)
    assert losses[-1] < losses[0]
    best = -norm(data["z"], 0.0) - norm(jnp.zeros(2), 0.0, 0.5)
    np.testing.assert_allclose(losses[-1], best, atol=0.02)
    assert state.step == 300


@gen
def joint(scale):
    z = trace("z", Normal)(0.0, 1.0)
    return trace("x", Normal)(z, scale)


class Amortised(GenModule):
    @nn.compact
    def __call__(self):
        loc = self.param("loc", nn.initializers.zeros, ())
        log_scale = self.param("log_scale", nn.initializers.zeros, ())
        return trace("z", Normal)(loc, jnp.exp(log_scale))


class Learned(GenModule):
    @nn.compact
    def __call__(self):
        mean = self.param("mean", nn.initializers.zeros, ())
        z = trace("z", Normal)(mean, 1.0)
        return trace("x", Normal)(z, 0.5)


def test_a_train_state_learns_by_the_elbo():
    """Conjugate: z ~ N(0, 1), x | z ~ N(z, 1/2) at x = 1, so z | x ~ N(0.8, 0.2), and the bound is the evidence."""
    objective = gjflax.ELBO(model=joint, guide=Amortised(), num_samples=4)
    observed, args = {"x": 1.0}, (0.5,)
    params = objective.init(KEY, observed, args)["params"]
    tx = optax.adam(optax.cosine_decay_schedule(5e-2, 500))
    state = TrainState.create(apply_fn=objective.apply, params=params, tx=tx)

    def loss(state, params, key):
        return state.apply_fn({"params": params}, observed, args, rngs={"choice": key})

    state, losses = train(state, loss, 500)
    np.testing.assert_allclose(state.params["guide"]["loc"], 0.8, atol=0.05)
    np.testing.assert_allclose(jnp.exp(2 * state.params["guide"]["log_scale"]), 0.2, atol=0.03)
    np.testing.assert_allclose(-losses[-50:].mean(), norm(1.0, 0.0, np.sqrt(1.25)), atol=0.02)


def test_one_side_is_frozen_by_optax():
    objective = gjflax.ELBO(model=Learned(), guide=Amortised())
    params = objective.init(KEY, {"x": 1.0})["params"]
    assert shapes(params) == {"model": {"mean": ()}, "guide": {"loc": (), "log_scale": ()}}
    tx = optax.multi_transform(
        {"train": optax.sgd(1e-2), "freeze": optax.set_to_zero()}, {"model": "train", "guide": "freeze"}
    )
    state = TrainState.create(apply_fn=objective.apply, params=params, tx=tx)

    def loss(state, params, key):
        return state.apply_fn({"params": params}, {"x": 1.0}, rngs={"choice": key})

    state, _ = train(state, loss, 5)
    jax.tree.map(np.testing.assert_array_equal, state.params["guide"], params["guide"])
    assert state.params["model"]["mean"] != params["model"]["mean"]


def test_a_checkpoint_of_variables_and_a_trace(variables: Any, tr: Any, tmp_path: Path):
    """A trace goes as the dict of its leaves, and comes back into a trace of the same model."""
    from flax import serialization

    saved = {"variables": variables, "trace": serialization.to_state_dict(tr)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        target = jax.tree.map(jnp.zeros_like, saved)
        restored = checkpointer.restore(tmp_path / "checkpoint", target)
    jax.tree.map(np.testing.assert_array_equal, restored["variables"], variables)
    again = serialization.from_state_dict(jax.tree.map(jnp.zeros_like, tr), restored["trace"])
    _, (_, weight, _, _) = Network().bind(restored["variables"]).update(KEY, again, {}, (X,))
    close(weight, 0.0)
    np.testing.assert_array_equal(again["y"], tr["y"])


# Summaries and NNX ---------------------------------------------------------------------------------------------------


def test_tabulate_lists_modules_by_every_method(variables: Any):
    size = sum(leaf.size for leaf in jax.tree.leaves(variables))
    for table in (
        Network().tabulate(KEY, X),
        Network().tabulate(KEY, KEY, (X,), method="simulate"),
        Map(Network(), in_axes=0).tabulate(KEY, KEY, (XS,), method="simulate"),
    ):
        assert "Dense_0" in table and f"Total Parameters: {size}" in table
    assert "simulate" in Network().tabulate(KEY, KEY, (X,), method="simulate")


def test_nnx_calls_a_model_as_a_layer(variables: Any):
    layer = nnx.bridge.ToNNX(Network(), rngs=nnx.Rngs(0, choice=1))
    nnx.bridge.lazy_init(layer, X)
    params = nnx.state(layer, nnx.Param)
    assert set(params) == {"Dense_0", "Dense_1"}
    one, two = layer(X), layer(X)
    assert one.shape == (2,) and not np.allclose(one, two), "the stream goes on"


def test_nnx_runs_the_interface_and_its_gradients(tr: Any):
    layer = nnx.bridge.ToNNX(Network(), rngs=nnx.Rngs(0))
    nnx.bridge.lazy_init(layer, KEY, (X,), method="simulate")
    params = jax.tree.map(jnp.asarray, nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    _, drawn = layer(KEY, (X,), method="simulate")
    close(drawn.get_score(), by_hand(params, drawn["z"], drawn["y"]))

    @nnx.value_and_grad
    def loss(layer):
        return -layer(KEY, tr.strip(), (X,), method="assess")[1][1]

    value, grads = loss(layer)
    want, want_grads = jax.value_and_grad(lambda p: -by_hand(p, tr["z"], tr["y"]))(params)
    close(value, want)
    close(nnx.to_pure_dict(grads), want_grads)


# Variables and traces ------------------------------------------------------------------------------------------------


def test_a_bound_module_is_a_function_of_its_variables(variables: Any, tr: Any):
    """Binding inside jit, grad and vmap: the variables are arguments like others."""

    def score(params, choices):
        return Network().bind({"params": params}).assess(KEY, choices, (X,))[1][1]

    want = jax.value_and_grad(by_hand)(variables["params"], tr["z"], tr["y"])
    close(jax.jit(jax.value_and_grad(score))(variables["params"], tr.strip()), want)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 0.1]), variables["params"])
    both = jax.vmap(score, in_axes=(0, None))(many, tr.strip())
    close(both[0], want[0])


def test_gradients_are_trees_like_the_state(variables: Any, tr: Any):
    state = TrainState.create(apply_fn=Network().apply, params=variables["params"], tx=optax.sgd(0.1))
    _, grads = Network().param_grad(KEY, tr, state.params)
    moved = state.apply_gradients(grads=grads)
    close(moved.params, jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads))
    _, (_, weight, _, _) = Network().bind({"params": moved.params}).update(KEY, tr, {}, (Diff.no_change(X),))
    close(weight, by_hand(moved.params, tr["z"], tr["y"]) - tr.get_score())


def test_a_star_import_has_every_public_name():
    names: dict[str, Any] = {}
    exec("from gjflax import *", names)
    assert {"Normal", "Unfold", "ELBO", "fit", "render_model"} <= names.keys()
    assert not [name for name in names if name.startswith("_") and name != "__builtins__"]

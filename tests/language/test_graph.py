"""The graph of a model: its edges against those that one writes by hand."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import gjflax
from gjflax import (
    Bernoulli,
    Beta,
    Categorical,
    Cauchy,
    Cond,
    Enumerate,
    FlaxModule,
    GenModule,
    Map,
    Marginal,
    Mask,
    Mix,
    Normal,
    Poisson,
    RandomParams,
    Repeat,
    Scan,
    Switch,
    TrainCombinator,
    Unfold,
    gen,
    select,
    trace,
)
from gjflax.language.graph import ModelGraph, model_graph

X = jax.ShapeDtypeStruct((4,), jnp.float32)


def shown(graph: ModelGraph) -> set[str]:
    """The edges as text, those from the step before with ``~>``."""
    return {f"{edge.source} {'~>' if edge.previous else '->'} {edge.target}" for edge in graph.edges}


def places(graph: ModelGraph) -> dict[str, str | None]:
    return {node.name: node.group for node in graph.nodes} | {group.name: group.parent for group in graph.groups}


@gen
def counted(p):
    hidden = trace("hidden", Bernoulli)(probs=p)
    return trace("seen", Normal)(jnp.where(hidden == 1, 3.0, -1.0), 1.0)


@gen
def integrated():
    p = trace("p", Beta)(2.0, 3.0)
    return trace("part", Map(Marginal(counted, "seen", Enumerate()), in_axes=None, repeats=3))(p)


@gen
def point(x, slope):
    return trace("y", Normal)(slope * x, 1.0)


@gen
def regression(xs):
    slope = trace("slope", Normal)(0.0, 2.0)
    return trace("points", Map(point, in_axes=(0, None)))(xs, slope)


@gen
def chain():
    a = trace("a", Normal)(0.0, 1.0)
    b = trace("b", Normal)(jnp.tanh(a) + 1.0, 1.0)
    c = trace("c", Normal)(0.0, jnp.exp(b))
    trace("d", Poisson)(jnp.exp(jnp.where(a > 0, c, 0.0)))
    trace("e", Normal)(jax.lax.cond(b > 0, lambda: 1.0, lambda: 2.0), 1.0)
    trace("alone", Normal)(jnp.zeros_like(a) + jax.lax.stop_gradient(0.0), 1.0)


class Decoder(GenModule):
    @nn.compact
    def __call__(self):
        z = trace("z", Normal)(jnp.zeros(2), 1.0)
        h = nn.tanh(nn.Dense(16)(z))
        log_scale = self.param("log_scale", nn.initializers.zeros, ())
        return trace("x", Normal)(nn.Dense(3)(h), jnp.exp(log_scale))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(5)(x)))


class Skipping(GenModule):
    """A network that is used twice, one with two inputs, and a value that goes past the networks."""

    def setup(self):
        self.shared = Encoder()
        self.head = nn.Dense(1)

    def __call__(self, x):
        a = trace("a", Normal)(self.shared(x), 1.0)
        b = trace("b", Normal)(self.shared(jnp.concatenate([a, a])), 1.0)
        return trace("c", Normal)(self.head(jnp.concatenate([a, b]))[0] + a[0], 1.0)


@gen
def hidden_step(time, state, transition, means):
    state = trace("state", Categorical)(transition[state])
    trace("y", Normal)(means[state], 1.0)
    return state


@gen
def hidden():
    transition = trace("transition", Normal)(jnp.zeros((3, 3)), 1.0)
    means = trace("means", Normal)(jnp.zeros(3), 5.0)
    states = trace("chain", Unfold(hidden_step, 6))(6, jnp.int32(0), transition, means)
    return trace("after", Normal)(means[states[-1]], 1.0)


@gen
def momentum(carry, x):
    z = trace("z", Normal)(carry["v"], 1.0)
    v = trace("v", Normal)(0.5 * z, 1.0)
    w = trace("w", Normal)(carry["w"], 1.0)
    y = trace("y", Normal)(x + w, 1.0)
    return {"v": v, "w": w}, y


@gen
def filtered(xs):
    start = trace("start", Normal)(0.0, 1.0)
    last, ys = trace("run", Scan(momentum))({"v": start, "w": jnp.float32(0.0)}, xs)
    trace("end", Normal)(last["w"], 1.0)
    return trace("total", Normal)(ys.sum(), 1.0)


@gen
def delayed(line, x):
    z = trace("z", Normal)(line[2], 1.0)
    return (z, line[0], line[1]), None


@gen
def delay():
    last, _ = trace("line", Scan(delayed, length=5))((0.0, 0.0, 0.0), None)
    return trace("end", Normal)(last[2], 1.0)


@gen
def cluster(logits, mean):
    return trace("value", Mix((Normal, Cauchy)))(logits, (mean, 1.0), (0.0, 1.0))


@gen
def mixture():
    logits = trace("logits", Normal)(jnp.zeros(2), 1.0)
    mean = trace("mean", Normal)(0.0, 1.0)
    return trace("data", Map(cluster, repeats=5))(logits, mean)


@gen
def maybe():
    here = trace("here", Bernoulli)(probs=0.5)
    x = trace("x", Mask(Normal))(here == 1, 0.0, 1.0)
    return trace("y", Normal)(x.unmask(0.0), 1.0)


class Wide(GenModule):
    @nn.compact
    def __call__(self, x):
        return trace("w", Normal)(nn.Dense(1)(x)[0], 1.0)


@gen
def branches(x):
    b = trace("b", Bernoulli)(probs=0.5)
    scale = trace("scale", Normal)(0.0, 1.0)
    return trace("either", Cond(Wide(), gen(lambda x: trace("n", Normal)(x[0], jnp.exp(scale)))))(b == 1, x)


@gen
def kind(flag, x):
    return trace("inner", Cond(Normal, Cauchy))(flag, x, 1.0)


@gen
def nested_branches():
    k = trace("k", Categorical)(jnp.zeros(2))
    flag = trace("flag", Bernoulli)(probs=0.5)
    x = trace("x", Normal)(0.0, 1.0)
    return trace("outer", Switch((kind, gen(lambda flag, x: trace("n", Normal)(x, 1.0)))))(k, flag == 1, x)


@gen
def any_length(n):
    return trace("steps", Unfold(gen(lambda time, s: trace("s", Normal)(s, 1.0)), 6))(n, 0.0)


class Gradient(GenModule):
    """A network inside a derivative, in a lifted body."""

    @nn.compact
    def __call__(self):
        z = trace("z", Normal)(jnp.zeros(2), 1.0)
        network = nn.Dense(1, name="f")
        size = network(z)
        slope = jax.grad(lambda x: nn.Dense(1, parent=None).apply(network.variables, x)[0])(z)
        return trace("y", Normal)(slope, jnp.exp(size[0]))


@gen
def pupil(mean):
    return trace("score", Normal)(mean, 1.0)


@gen
def school(mean):
    own = trace("own", Normal)(mean, 1.0)
    return trace("pupils", Map(pupil, repeats=30))(own)


@gen
def schools():
    mean = trace("mean", Normal)(0.0, 1.0)
    return trace("schools", Repeat(school, 8))(mean)


@gen
def weights(x):
    scale = trace("scale", Normal)(0.0, 1.0)
    prior = (Normal, lambda s: (0.0, jnp.exp(s)))
    network = RandomParams(nn.Dense(3), prior, select("kernel"), num_hyperparameters=1)
    return trace("y", Normal)(trace("net", network)(scale, x), 1.0)


@gen
def learned(x, params):
    return trace("y", Normal)(params["slope"] * x[0], params["scale"])


@gen
def through_network(x):
    z = trace("z", Normal)(0.0, 1.0)
    return trace("y", Normal)(trace("f", FlaxModule(nn.Dense(1)))(x * z)[0], 1.0)


NETWORK = "net:Dense_0+Dense_1"

CASES: dict[str, tuple[Any, tuple[Any, ...], set[str]]] = {
    "regression": (regression, (X,), {"slope -> points/y", "arg:xs -> points/y"}),
    "chain": (chain, (), {"a -> b", "b -> c", "a -> d", "c -> d", "b -> e"}),
    "decoder": (
        Map(Decoder(), repeats=7),
        (),
        {f"z -> {NETWORK}", f"{NETWORK} -> x", "param:log_scale -> x"},
    ),
    "skipping": (
        Skipping(),
        (X,),
        {
            "arg:x -> net:shared",
            "net:shared -> a",
            "a -> net:shared#2",
            "net:shared#2 -> b",
            "a -> net:head",
            "b -> net:head",
            "net:head -> c",
            "a -> c",
        },
    ),
    "hidden": (
        hidden,
        (),
        {
            "transition -> chain/state",
            "chain/state ~> chain/state",
            "chain/state -> chain/y",
            "means -> chain/y",
            "chain/state -> after",
            "means -> after",
        },
    ),
    "filtered": (
        filtered,
        (X,),
        {
            "start -> run/z",
            "run/v ~> run/z",
            "run/z -> run/v",
            "run/w ~> run/w",
            "run/w -> run/y",
            "arg:xs -> run/y",
            "run/w -> end",
            "run/y -> total",
        },
    ),
    "delay": (delay, (), {"line/z ~> line/z", "line/z -> end"}),
    "mixture": (
        mixture,
        (),
        {
            "logits -> data/value/component",
            "data/value/component -> Switch(data/value/value)",
            "mean -> data/value/value@branches_0",
        },
    ),
    "maybe": (maybe, (), {"here -> Mask(x)", "here -> y", "x -> y"}),
    "branches": (
        branches,
        (X,),
        {
            "b -> Cond(either)",
            "arg:x -> net:Wide_0/Dense_0",
            "net:Wide_0/Dense_0 -> either/w",
            "scale -> either/n",
            "arg:x -> either/n",
        },
    ),
    "nested branches": (
        nested_branches,
        (),
        {
            "k -> Switch(outer)",
            "flag -> Cond(outer/inner)",
            "x -> outer/inner@then",
            "x -> outer/inner@otherwise",
            "x -> outer/n",
        },
    ),
    "any length": (
        any_length,
        (jax.ShapeDtypeStruct((), jnp.int32),),
        {"steps/s ~> steps/s", "arg:n -> steps/s"},
    ),
    "gradient": (nn.remat(Gradient)(), (), {"z -> net:f", "net:f -> y", "param:f/kernel -> y"}),
    "schools": (schools, (), {"mean -> schools/own", "schools/own -> schools/pupils/score"}),
    "weights": (
        weights,
        (X,),
        {"scale -> net/kernel", "net/kernel -> net:Dense_0", "arg:x -> net:Dense_0", "net:Dense_0 -> y"},
    ),
    "learned": (
        TrainCombinator(learned, {"slope": 0.5, "scale": 1.0}),
        (X,),
        {"arg:x -> y", "param:slope -> y", "param:scale -> y"},
    ),
    "network as callee": (through_network, (X,), {"z -> net:Dense_0", "arg:x -> net:Dense_0", "net:Dense_0 -> y"}),
    "a choice that is integrated out": (integrated, (), {"p -> part/seen"}),
    "distribution": (Normal, (0.0, jnp.float32(1.0)), {"arg:argument 0 -> choice", "arg:argument 1 -> choice"}),
}

GRAPHS: dict[str, ModelGraph] = {}


def graph_of(name: str) -> ModelGraph:
    if name not in GRAPHS:
        model, args, _ = CASES[name]
        GRAPHS[name] = model_graph(model, args)
    return GRAPHS[name]


@pytest.mark.parametrize("name", list(CASES))
def test_edges(name: str):
    assert shown(graph_of(name)) == CASES[name][2]
    names = [node.name for node in graph_of(name).nodes] + [group.name for group in graph_of(name).groups]
    assert len(set(names)) == len(names)


def test_choices_stand_in_plates():
    assert places(graph_of("schools")) == {
        "mean": None,
        "schools/own": "Repeat(schools)",
        "schools/pupils/score": "Map(schools/pupils)",
        "Repeat(schools)": None,
        "Map(schools/pupils)": "Repeat(schools)",
    }
    assert [(g.kind, g.label, g.length) for g in graph_of("schools").groups] == [
        ("plate", "schools", 8),
        ("plate", "pupils", 30),
    ]
    assert [(g.kind, g.label, g.length) for g in graph_of("hidden").groups] == [("steps", "chain", 6)]
    score = next(node for node in graph_of("schools").nodes if node.name == "schools/pupils/score")
    assert (score.label, score.detail, score.shape, score.discrete) == ("score", "Normal", (), False)


def test_branches_stand_in_switches():
    of_mixture = places(graph_of("mixture"))
    assert of_mixture["data/value/value@branches_1"] == "Switch(data/value/value).branches_1"
    assert of_mixture["Switch(data/value/value).branches_1"] == "Switch(data/value/value)"
    assert of_mixture["Switch(data/value/value)"] == "Map(data)"
    assert places(graph_of("maybe"))["x"] == "Mask(x)"


def test_networks_stand_where_they_are_called():
    assert places(graph_of("decoder"))[NETWORK] == "Map()"
    assert places(graph_of("decoder"))["param:log_scale"] is None
    assert places(graph_of("branches"))["net:Wide_0/Dense_0"] == "Cond(either).then"
    box = next(node for node in graph_of("decoder").nodes if node.name == NETWORK)
    assert (box.label, box.detail) == ("Dense_0, Dense_1", "99 parameters")  # 2·16 + 16 + 16·3 + 3


def test_nodes_are_in_the_order_of_the_program():
    assert [node.name for node in graph_of("chain").nodes] == ["a", "b", "c", "d", "e", "alone"]
    assert next(node for node in graph_of("hidden").nodes if node.name == "chain/state").discrete


def test_it_runs_on_shapes_and_on_bound_models():
    model = Decoder()
    variables = jax.eval_shape(model.init, jax.random.key(0))
    expected = model_graph(model, ())
    assert model_graph(model, (), variables=variables) == expected
    bound = model.bind(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables))
    assert model_graph(bound, ()) == expected
    with pytest.raises(gjflax.UnboundParametersError, match="`variables` lacks what `Decoder` reads"):
        model_graph(model, (), variables={"params": {}})


def test_nothing_is_computed():
    computed = []

    @gen
    def watching():
        z = trace("z", Normal)(0.0, 1.0)
        jax.debug.callback(lambda value: computed.append(value), z)
        return trace("y", Normal)(z, 1.0)

    assert shown(model_graph(watching, ())) == {"z -> y"}
    jax.effects_barrier()
    assert not computed


def test_marks_do_not_stay():
    """A body's function that was compiled while the model was staged out runs as before."""
    double = jax.jit(
        lambda x: 2 * nn.Dense(1, parent=None).apply({"params": {"kernel": x, "bias": jnp.zeros(1)}}, x[0])
    )

    @gen
    def model():
        z = trace("z", Normal)(jnp.ones((1, 1)), 1.0)
        return trace("y", Normal)(double(z), 1.0)

    assert "z" in {edge.source for edge in model_graph(model, ()).edges}
    _, (retval, _) = model.assess(jax.random.key(0), {"z": jnp.full((1, 1), 3.0), "y": jnp.zeros(1)}, ())
    assert float(double(jnp.full((1, 1), 3.0))[0]) == 18.0 and retval.shape == (1,)


# Errors ----------------------------------------------------------------------------------------------------------------


def test_what_is_no_model_is_refused():
    with pytest.raises(gjflax.CalleeError, match="Expected a generative function"):
        model_graph(nn.Dense(3), (X,))
    with pytest.raises(gjflax.ArgumentError, match="`args` is a tuple"):
        model_graph(regression, X)

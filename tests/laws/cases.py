"""The generative functions under law, each with its density by hand.

A case's oracle is the function `terms`: from the choices, arguments and parameters, the log density of every choice
at its address, elementwise, in NumPy float64. It knows nothing of gjflax. With ancestral sampling all weights are sums
of such terms, so every law has one independent right-hand side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import gjflax
from gjflax import (
    AddressMap,
    Bernoulli,
    Categorical,
    Cond,
    Dimap,
    Exponential,
    FlaxModule,
    GenModule,
    Inline,
    Laplace,
    Map,
    Mix,
    MultivariateNormalTriL,
    Normal,
    Product,
    RandomParams,
    TrainCombinator,
    gen,
    inline,
    select,
    trace,
)

_variables: dict[str, Any] = {}
Address = tuple[str, ...]
Terms = dict[Address, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A generative function, arguments for it, and its density by hand.

    Attributes:
      name: how the case is called in test ids.
      gen_fn: the generative function, unbound.
      args: its arguments.
      other_args: other arguments of the same shapes.
      terms: ``terms(choices, args, params)``: log densities by address.
      discrete: addresses of discrete choices.
      length: the number of elements, where choices may be given one by one, of the Map at `mapped`.
      mapped: the address of that Map.
    """

    name: str
    gen_fn: Any
    args: tuple[Any, ...]
    other_args: tuple[Any, ...]
    terms: Callable[[dict[Address, np.ndarray], tuple[Any, ...], Any], Terms]
    discrete: tuple[Address, ...] = ()
    length: int | None = None
    mapped: Address = ()

    def variables(self) -> Any:
        """Initialised once for each case, which saves most of the suite's time."""
        if self.name not in _variables:
            _variables[self.name] = jax.jit(self.gen_fn.init)(jax.random.key(7), *self.args)
        return _variables[self.name]

    def bound(self) -> Any:
        """The module as a user runs it: bound where it has variables, else as it is."""
        variables = self.variables()
        return self.gen_fn.bind(variables) if variables else self.gen_fn

    def oracle(self, choices: Any, args: tuple[Any, ...] | None = None, params: Any = None) -> Terms:
        """The terms of a choice map."""
        params = self.variables().get("params", {}) if params is None else params
        values = {address: np.asarray(choices.get_subtree(address).get_value()) for address in choices.addresses()}
        as_numpy = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (args or self.args, params))
        return self.terms(values, *as_numpy)


def normal(value: Any, loc: Any, scale: Any) -> np.ndarray:
    return stats.norm.logpdf(np.float64(value), loc, scale)


def log_bernoulli(value: Any, logit: Any) -> np.ndarray:
    return -np.logaddexp(0.0, np.where(value == 1, -1.0, 1.0) * np.float64(logit))


# Leaves --------------------------------------------------------------------------------------------------------------

scalar = Case(
    "scalar",
    Normal,
    (jnp.float32(0.7), jnp.float32(2.5)),
    (jnp.float32(-1.0), jnp.float32(0.4)),
    lambda c, a, p: {(): normal(c[()], *a)},
)

_locs = jnp.array([[0.3, -1.0, 2.0], [1.0, 0.0, -0.5]])
vector = Case(
    "vector",
    Normal,
    (_locs, jnp.float32(0.6)),
    (_locs - 1.0, jnp.float32(1.7)),
    lambda c, a, p: {(): normal(c[()], *a)},
)


class Triangular(gjflax.Distribution):
    """A user's own distribution on [0, width], by inversion."""

    def sample(self, key: Any, width: Any) -> Any:
        return width * jnp.sqrt(jax.random.uniform(key, jnp.shape(width)))

    def logpdf(self, value: Any, width: Any) -> Any:
        inside = (value > 0) & (value <= width)
        return jnp.where(inside, jnp.log(2 * jnp.where(inside, value, 1.0) / width**2), -jnp.inf)


own = Case(
    "own distribution",
    Triangular(),
    (jnp.array([2.0, 3.0]),),
    (jnp.array([4.0, 5.0]),),
    lambda c, a, p: {(): np.log(2 * c[()].astype(np.float64) / a[0] ** 2)},
)

# Bodies --------------------------------------------------------------------------------------------------------------


@gen
def _chain(rate):
    scale = trace("scale", Exponential)(rate)
    loc = trace("loc", Normal)(0.0, 1.0 + scale)
    coin = trace("coin", Bernoulli)(logits=loc)
    return trace("y", Normal)(loc + coin.astype(jnp.float32), 0.3)


def _chain_terms(c, a, p):
    (rate,) = a
    return {
        ("scale",): stats.expon.logpdf(np.float64(c["scale",]), scale=1 / rate),
        ("loc",): normal(c["loc",], 0.0, 1.0 + c["scale",]),
        ("coin",): log_bernoulli(c["coin",], c["loc",]),
        ("y",): normal(c["y",], np.float64(c["loc",]) + c["coin",], 0.3),
    }


chain = Case("chain", _chain, (jnp.float32(2.0),), (jnp.float32(0.8),), _chain_terms, discrete=(("coin",),))


@gen
def _vectors(loc):
    z = trace("z", Normal)(jnp.zeros(3), 2.0)
    kind = trace("kind", Categorical)(jnp.stack([z, -z]))
    factor = jnp.array([[1.5, 0.0], [0.4, 0.7]])
    return trace(("out", "w"), MultivariateNormalTriL)(loc * z[:2] + kind.astype(jnp.float32), factor)


def _vectors_terms(c, a, p):
    z = np.float64(c["z",])
    logits = np.stack([z, -z])
    log_probs = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    factor = np.array([[1.5, 0.0], [0.4, 0.7]])
    mean = a[0] * z[:2] + c["kind",]
    return {
        ("z",): normal(z, 0.0, 2.0),
        ("kind",): log_probs[np.arange(2), c["kind",]],
        ("out", "w"): stats.multivariate_normal.logpdf(np.float64(c["out", "w"]), mean, factor @ factor.T),
    }


vectors = Case("vectors", _vectors, (jnp.float32(0.5),), (jnp.float32(-1.5),), _vectors_terms, discrete=(("kind",),))


@gen
def _outer(x):
    left = trace("left", _chain)(x)
    middle = trace("middle", Normal)(left, 0.5)
    return trace("right", _chain)(1.0 + middle**2)


def _outer_terms(c, a, p):
    def below(name):
        return {address[1:]: value for address, value in c.items() if address[0] == name}

    left = {("left", *k): v for k, v in _chain_terms(below("left"), a, p).items()}
    middle = {("middle",): normal(c["middle",], c["left", "y"], 0.5)}
    rate = 1.0 + np.float64(c["middle",]) ** 2
    right = {("right", *k): v for k, v in _chain_terms(below("right"), (rate,), p).items()}
    return left | middle | right


nested = Case(
    "nested",
    _outer,
    (jnp.float32(1.5),),
    (jnp.float32(3.0),),
    _outer_terms,
    discrete=(("left", "coin"), ("right", "coin")),
)

# Maps ----------------------------------------------------------------------------------------------------------------

mapped_leaf = Case(
    "mapped leaf",
    Map(Normal, in_axes=(0, None)),
    (jnp.arange(4.0), jnp.float32(1.5)),
    (jnp.arange(4.0) ** 2, jnp.float32(0.5)),
    lambda c, a, p: {(): normal(c[()], *a)},
    length=4,
)

repeated = Case(
    "repeated",
    Map(_chain, repeats=3),
    (jnp.float32(2.0),),
    (jnp.float32(0.8),),
    _chain_terms,
    discrete=(("coin",),),
    length=3,
)


@gen
def _regression(points, weights):
    def mean(x):
        return weights["slope"] * x + weights["offset"]

    x = trace("x", Map(Normal, in_axes=(0, None)))(points, 0.8)
    return trace("y", Map(Normal, in_axes=(0, None)))(mean(x), 0.4)


_weights = {"slope": jnp.float32(2.0), "offset": jnp.float32(-1.0)}
regression = Case(
    "regression",
    _regression,
    (jnp.arange(3.0), _weights),
    (jnp.arange(3.0) + 1.0, jax.tree.map(lambda w: -w, _weights)),
    lambda c, a, p: {
        ("x",): normal(c["x",], a[0], 0.8),
        ("y",): normal(c["y",], a[1]["slope"] * np.float64(c["x",]) + a[1]["offset"], 0.4),
    },
    length=3,
    mapped=("x",),
)


@gen
def _pair(inputs, scale):
    a = trace("a", Normal)(inputs["mu"], scale)
    return trace("b", Normal)(a * inputs["gain"], 0.2)


_inputs = {"mu": jnp.arange(6.0).reshape(2, 3), "gain": jnp.float32(1.5)}


def _grid_terms(c, a, p):
    inputs, scales = a
    mu = inputs["mu"].T  # the outer map runs over axis 1
    return {
        ("a",): normal(c["a",], mu, scales[:, None]),
        ("b",): normal(c["b",], np.float64(c["a",]) * inputs["gain"], 0.2),
    }


grid = Case(
    "map of map",
    Map(Map(_pair, in_axes=({"mu": 0, "gain": None}, None)), in_axes=({"mu": 1, "gain": None}, 0)),
    (_inputs, jnp.array([0.5, 1.0, 2.0])),
    ({"mu": -_inputs["mu"], "gain": jnp.float32(0.5)}, jnp.array([1.5, 0.3, 0.7])),
    _grid_terms,
    length=3,
)

# Networks ------------------------------------------------------------------------------------------------------------


class Decoder(GenModule):
    """A latent z, and an observation whose mean is a network of (z, x)."""

    hidden: int = 5

    @nn.compact
    def __call__(self, x):
        z = trace("z", Normal)(jnp.zeros(2), 1.5)
        h = nn.tanh(nn.Dense(self.hidden)(jnp.concatenate([z, x])))
        return trace("y", Normal)(nn.Dense(3)(h), 0.5)


def _decoder_terms(c, a, p):
    def dense(layer, x):
        return np.einsum("...i,...ij->...j", x, layer["kernel"]) + layer["bias"]

    (x,) = a
    z = np.float64(c["z",])
    h = np.tanh(dense(p["Dense_0"], np.concatenate([z, x], -1)))
    return {("z",): normal(z, 0.0, 1.5), ("y",): normal(c["y",], dense(p["Dense_1"], h), 0.5)}


_x = jnp.array([0.5, -1.0, 2.0])
_xs = jnp.stack([_x, _x + 1.0, -_x, 2 * _x])
network = Case("network", Decoder(), (_x,), (_x - 0.7,), _decoder_terms)
RematDecoder = nn.remat(Decoder)
remat = Case("remat network", RematDecoder(), (_x,), (_x - 0.7,), _decoder_terms)
mapped_network = Case("mapped network", Map(Decoder(), in_axes=0), (_xs,), (_xs - 0.7,), _decoder_terms, length=4)
own_parameters = Case(
    "network per element",
    Map(Decoder(), in_axes=0, variable_axes={"params": 0}),
    (_xs,),
    (_xs - 0.7,),
    _decoder_terms,
    length=4,
)


class Twice(GenModule):
    """One decoder at two addresses, and a free callee with parameters of its own."""

    def setup(self):
        self.decoder = Decoder()

    @nn.compact
    def __call__(self, x):
        first = trace("first", self.decoder)(x)
        second = trace("second", self.decoder)(first)
        return trace("free", Map(Decoder(hidden=2), in_axes=0))(jnp.stack([first, second]))


def _twice_terms(c, a, p):
    def below(name):
        return {address[1:]: value for address, value in c.items() if address[0] == name}

    first, second, free = below("first"), below("second"), below("free")
    inputs = np.stack([np.float64(first["y",]), np.float64(second["y",])])
    return (
        {("first", *k): v for k, v in _decoder_terms(first, a, p["decoder"]).items()}
        | {("second", *k): v for k, v in _decoder_terms(second, (np.float64(first["y",]),), p["decoder"]).items()}
        | {("free", *k): v for k, v in _decoder_terms(free, (inputs,), p["Decoder_0"]).items()}
    )


twice = Case("shared and free networks", Twice(), (_x,), (_x - 0.7,), _twice_terms, length=2, mapped=("free",))


class Inner(GenModule):
    """A network in two maps that are made inline, without a choice of its own."""

    @nn.compact
    def __call__(self, x):
        return trace("y", Normal)(trace("means", Map(Map(FlaxModule(nn.Dense(2)))))(x), 0.5)


def _inner_terms(c, a, p):
    return {("y",): normal(c["y",], a[0] @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"], 0.5)}


_xss = jnp.stack([_xs[:2], _xs[2:] / 2])
network_in_maps = Case("network in maps inline", Inner(), (_xss,), (_xss - 0.7,), _inner_terms)

# Learned arguments ---------------------------------------------------------------------------------------------------


@gen(TrainCombinator, params={"mu": 0.4, "net": {"w": np.array([0.5, -1.5], np.float32)}})
def _learned(x, params):
    h = trace("h", Normal)(params["mu"], 0.8)
    return trace("y", Normal)(params["net"]["w"] @ x + h, 0.6)


def _learned_terms(c, a, p):
    (x,) = a
    mean = np.asarray(x @ p["net"]["w"])
    return {("h",): normal(c["h",], p["mu"], 0.8), ("y",): normal(c["y",], mean + np.float64(c["h",]), 0.6)}


learned = Case("learned", _learned, (_x[:2],), (_x[:2] + 1.0,), _learned_terms)
mapped_learned = Case(
    "mapped learned", Map(_learned, in_axes=0), (_xs[:, :2],), (_xs[:, :2] + 1.0,), _learned_terms, length=4
)


class Scaled(GenModule):
    """A network whose noise is a parameter outside of it."""

    @nn.compact
    def __call__(self, x, params):
        return trace("y", Normal)(nn.Dense(2)(x), jnp.exp(params["log_scale"]))


learned_network = Case(
    "learned network",
    TrainCombinator(Scaled(), params={"log_scale": -0.5}),
    (_x,),
    (_x + 1.0,),
    lambda c, a, p: {
        ("y",): normal(c["y",], a[0] @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"], np.exp(p["log_scale"]))
    },
)


@gen
def _calls_learned(x):
    first = trace("first", _learned)(x)
    return trace("second", _learned)(jnp.stack([first, 0.5 * first]))


def _calls_learned_terms(c, a, p):
    def below(name):
        return {address[1:]: value for address, value in c.items() if address[0] == name}

    inputs = np.float64(c["first", "y"]) * np.array([1.0, 0.5])
    return {("first", *k): v for k, v in _learned_terms(below("first"), a, p["first"]).items()} | {
        ("second", *k): v for k, v in _learned_terms(below("second"), (inputs,), p["second"]).items()
    }


calls_learned = Case("calls learned", _calls_learned, (_x[:2],), (_x[:2] + 1.0,), _calls_learned_terms)

# Flax modules ---------------------------------------------------------------------------------------------------------


@gen
def _calls_module(x):
    h = trace("h", FlaxModule(nn.Dense(3)))(x)
    z = trace("z", Normal)(jnp.tanh(h), 0.7)
    return trace("y", Map(FlaxModule(nn.Dense(2)), in_axes=0))(jnp.stack([z, h]))


def _calls_module_terms(c, a, p):
    (x,) = a
    return {("z",): normal(c["z",], np.tanh(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]), 0.7)}


calls_module = Case("network as a callee", _calls_module, (_x,), (_x - 0.7,), _calls_module_terms)

_prior = {"kernel": (Normal, lambda scale: (0.2, scale)), "bias": (Exponential, (1.5,))}
random_weights = Case(
    "random weights",
    RandomParams(nn.Dense(2), _prior, num_hyperparameters=1),
    (jnp.float32(0.6), _x),
    (jnp.float32(1.7), _x - 0.7),
    lambda c, a, p: {
        ("kernel",): normal(c["kernel",], 0.2, a[0]),
        ("bias",): stats.expon.logpdf(np.float64(c["bias",]), scale=1 / 1.5),
    },
)


class Bayesian(GenModule):
    """A network with random first weights, whose scale is random and whose other parameters are learned."""

    @nn.compact
    def __call__(self, x):
        scale = trace("scale", Exponential)(2.0)
        net = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)])
        prior = (Normal, lambda scale: (0.0, scale))
        mean = trace("net", RandomParams(net, prior, select(("layers_0", "kernel")), num_hyperparameters=1))(scale, x)
        return trace("y", Normal)(mean, 0.5)


def _bayesian_terms(c, a, p):
    (x,) = a
    kernel = np.float64(c["net", "layers_0", "kernel"])
    h = np.tanh(np.einsum("...i,...ij->...j", x, kernel) + p["Dense_0"]["bias"])
    mean = h @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]
    return {
        ("scale",): stats.expon.logpdf(np.float64(c["scale",]), scale=1 / 2.0),
        ("net", "layers_0", "kernel"): normal(kernel, 0.0, np.float64(c["scale",])[..., None, None]),
        ("y",): normal(c["y",], mean, 0.5),
    }


bayesian = Case("random weights in a body", Bayesian(), (_x,), (_x - 0.7,), _bayesian_terms)
mapped_bayesian = Case(
    "mapped random weights", Map(Bayesian(), in_axes=0), (_xs,), (_xs - 0.7,), _bayesian_terms, length=4
)

# Other arguments, other addresses ----------------------------------------------------------------------------------------

dimapped = Case(
    "dimap",
    Dimap(
        _chain,
        pre=lambda loc, size: (2.0 * size["of"] + loc**2,),
        post=lambda args, inner_args, y: {"y": y + args[0], "rate": inner_args[0]},
    ),
    (jnp.float32(0.5), {"of": jnp.float32(0.8)}),
    (jnp.float32(-1.5), {"of": jnp.float32(0.3)}),
    lambda c, a, p: _chain_terms(c, (2 * a[1]["of"] + a[0] ** 2,), p),
    discrete=(("coin",),),
)

mapped_dimapped_network = Case(
    "mapped dimap of a network",
    Map(Dimap(Decoder(), pre=lambda x, shift: (x - shift,), post=lambda args, inner_args, y: y * args[1])),
    (_xs, jnp.arange(4.0)),
    (_xs - 0.7, jnp.arange(4.0) ** 2),
    lambda c, a, p: _decoder_terms(c, (a[0] - a[1][:, None],), p),
)


def _under_names(pairs: dict[Address, Address], terms: Any) -> Any:
    """The terms of an inner function, for choices that have other names: pairs of new and old addresses."""

    def renamed(values: Any, pairs: Any) -> Any:
        result = {}
        for address, value in values.items():
            moved = [(new, old) for old, new in pairs if address[: len(old)] == old]
            result[(*moved[0][0], *address[len(moved[0][1]) :]) if moved else address] = value
        return result

    def outer(c, a, p):
        return renamed(terms(renamed(c, pairs.items()), a, p), [(old, new) for new, old in pairs.items()])

    return outer


_new_names = {
    ("middle",): ("left", "loc"),
    ("left", "loc"): ("middle",),
    ("r",): ("right",),
    ("deep", "k"): ("left", "scale"),
}
renamed = Case(
    "other addresses",
    AddressMap(_outer, _new_names),
    (jnp.float32(1.5),),
    (jnp.float32(3.0),),
    _under_names(_new_names, _outer_terms),
    discrete=(("left", "coin"), ("r", "coin")),
)

_of_twice = {("z",): ("first", "z"), ("second", "z"): ("first", "y"), ("mean", "of"): ("second", "z")}
_of_twice |= {("out",): ("second", "y"), ("w",): ("free", "y"), ("free", "v"): ("free", "z")}
renamed_networks = Case(
    "networks with other addresses",
    AddressMap(Twice(), _of_twice),
    (_x,),
    (_x - 0.7,),
    _under_names(_of_twice, _twice_terms),
)

_level_up = {(name,): ("left", name) for name in ("scale", "loc", "coin", "y")}
level_up = Case(
    "a level less",
    Inline(_outer, "left"),
    (jnp.float32(1.5),),
    (jnp.float32(3.0),),
    _under_names(_level_up, _outer_terms),
    discrete=(("coin",), ("right", "coin")),
)

_map_up = {("z",): ("free", "z"), ("y",): ("free", "y")}
map_up = Case("a map's level less", Inline(Twice(), "free"), (_x,), (_x - 0.7,), _under_names(_map_up, _twice_terms))


@gen
def _pasted(x):
    left = inline(_chain)(x)
    middle = trace("middle", Normal)(left, 0.5)
    return trace("right", _chain)(1.0 + middle**2)


inlined = Case(
    "inlined",
    _pasted,
    (jnp.float32(1.5),),
    (jnp.float32(3.0),),
    _under_names(_level_up, _outer_terms),
    discrete=(("coin",), ("right", "coin")),
)


@gen
def _head(x):
    return trace(("out", "w"), Normal)(nn.Dense(2)(x), 0.4)


@gen
def _body(x):
    return inline(_head)(x) + trace(("out", "v"), Normal)(nn.Dense(2)(x), 0.9)


class Spliced(GenModule):
    """A module's own decoder inlined and called, and free callees inlined, one in another."""

    def setup(self):
        self.decoder = Decoder()

    @nn.compact
    def __call__(self, x):
        first = inline(self.decoder)(x)
        second = trace("second", self.decoder)(first)
        return inline(_body)(second)


def _spliced_terms(c, a, p):
    def dense(layer, x):
        return np.einsum("...i,...ij->...j", x, layer["kernel"]) + layer["bias"]

    decoder, body = p["decoder"], p["_body_0"]
    first = _decoder_terms({k: c[k] for k in (("z",), ("y",))}, a, decoder)
    second = _decoder_terms({k[1:]: v for k, v in c.items() if k[0] == "second"}, (np.float64(c["y",]),), decoder)
    means = np.float64(c["second", "y"])
    return (
        first
        | {("second", *k): v for k, v in second.items()}
        | {
            ("out", "w"): normal(c["out", "w"], dense(body["_head_0"]["Dense_0"], means), 0.4),
            ("out", "v"): normal(c["out", "v"], dense(body["Dense_0"], means), 0.9),
        }
    )


inlined_networks = Case("inlined networks", Spliced(), (_x,), (_x - 0.7,), _spliced_terms)
remat_inlined = Case("remat of inlined networks", nn.remat(Spliced)(), (_x,), (_x - 0.7,), _spliced_terms)

_of_spliced = {("u",): ("z",), ("v",): ("second", "z"), ("o",): ("out",)}
all_in_each_other = Case(
    "dimap, other addresses and a level less, in each other",
    Map(
        Inline(
            AddressMap(
                Dimap(Spliced(), pre=lambda x, size: (size * x,)),
                {("part", "u"): "z", ("part", "v"): ("second", "z"), "o": "out"},
            ),
            "part",
        ),
        in_axes=(0, None),
    ),
    (_xs, jnp.float32(0.5)),
    (_xs - 0.7, jnp.float32(-0.8)),
    _under_names(_of_spliced, lambda c, a, p: _spliced_terms(c, (a[1] * a[0],), p)),
)

# Branches, without choices that may be absent: those have tests of their own ---------------------------------------------

_mix_args = (jnp.array([0.4, -0.3]), (_x, jnp.float32(0.7)), (_x - 1.0, jnp.float32(1.8)))
_mix_other = (jnp.array([-0.5, 0.2]), (_x + 0.5, jnp.float32(1.1)), (_x, jnp.float32(0.6)))


def _mixture_terms(c, a, p):
    logits, *own = a
    number = int(c["component",])
    return {
        ("component",): logits[number] - np.logaddexp(*logits),
        ("value",): normal(c["value",], *own[number]),
    }


mixture = Case("mixture", Mix((Normal, Normal)), _mix_args, _mix_other, _mixture_terms, discrete=(("component",),))

flipped = Case(
    "a flag that flips",
    Cond(Normal, Laplace),
    (jnp.array(True), _x, jnp.float32(0.7)),
    (jnp.array(False), _x - 1.0, jnp.float32(1.8)),
    lambda c, a, p: {(): (normal if a[0] else stats.laplace.logpdf)(np.float64(c[()]), *a[1:])},
)

side_by_side = Case(
    "product",
    Product({"mixture": Mix((Normal, Normal)), "chain": _chain}),
    (_mix_args, (jnp.float32(2.0),)),
    (_mix_other, (jnp.float32(0.8),)),
    lambda c, a, p: {
        (name, *address): value
        for name, terms, args in (("mixture", _mixture_terms, a[0]), ("chain", _chain_terms, a[1]))
        for address, value in terms({k[1:]: v for k, v in c.items() if k[0] == name}, args, p).items()
    },
    discrete=(("mixture", "component"), ("chain", "coin")),
)

CASES = [
    scalar,
    vector,
    own,
    chain,
    vectors,
    nested,
    mapped_leaf,
    repeated,
    regression,
    grid,
    network,
    remat,
    mapped_network,
    own_parameters,
    twice,
    network_in_maps,
    learned,
    mapped_learned,
    learned_network,
    calls_learned,
    calls_module,
    random_weights,
    bayesian,
    mapped_bayesian,
    mixture,
    flipped,
    side_by_side,
    dimapped,
    mapped_dimapped_network,
    renamed,
    renamed_networks,
    level_up,
    map_up,
    inlined,
    inlined_networks,
    remat_inlined,
    all_in_each_other,
]

QUICK = (regression, learned)
"""The cases of the default tests. The sweep of random programs holds all combinators to the same laws."""

SLOW = (
    chain,
    grid,
    network,
    network_in_maps,
    own_parameters,
    mapped_learned,
    mixture,
    flipped,
    side_by_side,
    dimapped,
    renamed,
    map_up,
    inlined,
)
"""Those of the slow tests, one for every kind. The others, which combine these, are for `make thorough`."""


def _each(quick: tuple[Case, ...]) -> Any:
    def marks(case: Case) -> Any:
        if case in quick:
            return ()
        return pytest.mark.slow if case in SLOW else (pytest.mark.slow, pytest.mark.thorough)

    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=marks(case)) for case in CASES])


each_case = _each(QUICK)
"""A law for every case."""

each_case_with_parameters = _each((chain, network, learned, mapped_learned))
"""A law for every case, which has little to say of those without parameters: by default it runs for one of these."""

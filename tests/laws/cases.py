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
    Bernoulli,
    Categorical,
    Exponential,
    GenModule,
    Map,
    MultivariateNormalTriL,
    Normal,
    TrainCombinator,
    gen,
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
    learned,
    mapped_learned,
    learned_network,
    calls_learned,
]

QUICK = (scalar, chain, vectors, regression, grid, network, mapped_network, learned, mapped_learned)
"""The cases of the default tests. The others carry the marker `slow`: they combine what these have one by one."""


def _each(quick: tuple[Case, ...]) -> Any:
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=case.name, marks=() if case in quick else pytest.mark.slow) for case in CASES]
    )


each_case = _each(QUICK)
"""A law for every case."""

each_case_with_parameters = _each((chain, network, mapped_network, learned, mapped_learned))
"""A law for every case, which has little to say of those without parameters: by default it runs for one of these."""

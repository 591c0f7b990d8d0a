"""Bad input is refused while a program is traced, with an error of its own class that names what is wrong.

Every row runs under ``jax.eval_shape``, which computes nothing: so what it raises is raised before anything runs.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import gjflax
from gjflax import (
    ELBO,
    ENUM,
    AllSelection,
    Bernoulli,
    Cond,
    Diff,
    GenModule,
    Map,
    Mask,
    Mix,
    Normal,
    OrElse,
    Product,
    RandomParams,
    Reparameterized,
    Switch,
    TrainCombinator,
    VectorChoiceMap,
    choice_map,
    gen,
    select,
    slash,
    trace,
)
from gjflax.core import errors
from gjflax.core.context import top_frame
from gjflax.learning.fit import require_some_finite
from gjflax.learning.training.checkpoints import require_same
from gjflax.learning.training.optional import require

KEY = jax.random.key(0)


@gen
def flip(p):
    coin = trace("coin", Bernoulli)(probs=p)
    return trace("noise", Normal)(coin.astype(jnp.float32), 1.0)


@gen
def pair():
    left = trace("left", flip)(0.3)
    return left + trace("right", flip)(0.6)


@gen
def flips():
    return trace("all", Map(flip, repeats=3))(0.5)


@gen
def line(x, slope):
    return trace("y", Normal)(slope * x, 1.0)


lines = Map(line, in_axes=(0, None))
flips_of_one = Map(flip, repeats=3)
XS = jnp.arange(3.0)


class Network(GenModule):
    @nn.compact
    def __call__(self, x):
        return trace("y", Normal)(nn.Dense(2)(x), 1.0)


class Normalised(GenModule):
    """It reads a collection of its own."""

    @nn.compact
    def __call__(self, x):
        return trace("y", Normal)(nn.BatchNorm(use_running_average=True)(x), 1.0)


class Forgetful(GenModule):
    @nn.compact
    def __call__(self, x):
        z = trace("z", Normal)(0.0, 1.0)
        trace("y", Normal)
        return z


class Noisy(GenModule):
    """Its randomness is no choice: the rng stream is a field."""

    stream: str = "dropout"

    @nn.compact
    def __call__(self, x):
        if self.stream == "dropout":
            x = nn.Dropout(0.5, deterministic=False)(x)
        else:
            x = x + jax.random.normal(self.make_rng(self.stream), x.shape)
        return trace("y", Normal)(x, 1.0)


class Layer(nn.Module):
    """A plain module with a stochastic layer."""

    @nn.compact
    def __call__(self, x):
        return line.copy(name="noise")(x, 1.0)


@gen
def joint():
    z = trace("z", Normal)(0.0, 1.0)
    return trace("x", Normal)(z, 1.0)


class Guide(GenModule):
    @nn.compact
    def __call__(self):
        return trace("z", Normal)(self.param("loc", nn.initializers.zeros, ()), 1.0)


@gen
def discrete_guide():
    return trace(("z", "kind"), Bernoulli)(0.0)


@gen
def enumerated_guide():
    return trace("z", ENUM(Bernoulli))(jnp.zeros(20))


@gen
def guide_with_more():
    return trace("z", Normal)(0.0, 1.0) + trace("more", Normal)(0.0, 1.0)


class Bare(gjflax.GenerativeFunction):
    """A user's own generative function that implements nothing yet."""


class Sampler(gjflax.Distribution):
    """A user's own distribution without a bijector."""

    def sample(self, key: Any) -> Any:
        return jax.random.uniform(key)

    def logpdf(self, value: Any) -> Any:
        return jnp.zeros_like(value)


@gen
def either(leaf):
    return trace("x", Normal)(0.0, 1.0) if leaf else trace("x", line)(0.0, 1.0)


@gen
def unit():
    return trace("x", Normal)(0.0, 1.0)


@gen
def two_of_them():
    return trace("x", Normal)(jnp.zeros(2), 1.0)


@gen
def their_sum():
    return jnp.sum(trace("x", Normal)(jnp.zeros(2), 1.0))


dense_prior = RandomParams(nn.Dense(2), {"kernl": (Normal, (0.0, 1.0))})
half_a_prior = RandomParams(nn.Dense(2), {"kernel": (Normal, (0.0, 1.0))})

network = Network()


class NotCompact(GenModule):
    def __call__(self, x):
        return trace("inner", network)(x)


def body(function: Callable[[], Any]) -> Callable[[Any], Any]:
    """Simulate a body, at an address of another, so that messages must say the whole address."""

    @gen
    def outer():
        return trace("outer", gen(function))()

    return lambda key: outer.simulate(key, ())


def scanned() -> Any:
    return jax.lax.scan(lambda carry, _: (trace("x", Normal)(carry, 1.0), None), 0.0, None, length=3)


def unbound(method: str, *args: Any) -> Callable[[Any], Any]:
    return lambda key: getattr(Network(), method)(key, *args)


def network_trace() -> Any:
    variables = Network().init(KEY, XS)
    return Network().bind(variables).simulate(KEY, (XS,))[1]


def normalised_trace_and_params() -> Any:
    variables = Normalised().init(KEY, XS[None])
    return Normalised().bind(variables).simulate(KEY, (XS[None],))[1], variables["params"]


def noisy_trace(stream: str) -> Any:
    return Noisy(stream).apply({}, KEY, (XS,), method="simulate", rngs={stream: KEY})[1]


@dataclasses.dataclass(frozen=True)
class Row:
    """One mistake: what it is, the class and the text of its error, and the call of a key that makes it."""

    name: str
    error: type[Exception]
    match: str
    call: Callable[[Any], Any]


def of(model: Any, *args: Any) -> Any:
    return model.simulate(KEY, args)[1]


def batch_of(model: Any, *args: Any) -> Any:
    return jax.vmap(lambda key: model.simulate(key, args)[1])(jax.random.split(KEY, 4))


def has(*parts: str) -> str:
    """A pattern that finds these texts in this order."""
    return "(?s)" + ".*".join(map(re.escape, parts))


ROWS = [
    # Choices -----------------------------------------------------------------------------------------------------
    Row(
        "a missing choice",
        errors.MissingChoiceError,
        has('("right", "noise")', "Normal", "importance"),
        lambda key: pair.assess(key, {"left": {"coin": 1, "noise": 0.0}, "right": {"coin": 0}}, ()),
    ),
    Row(
        "a missing choice below a Map",
        errors.MissingChoiceError,
        has('("all", "coin")', "Bernoulli"),
        lambda key: flips.assess(key, {"all": {"noise": jnp.zeros(3)}}, ()),
    ),
    Row(
        "an address that a trace does not have",
        errors.MissingChoiceError,
        has('("left", "coim")', 'Did you mean ("left", "coin")?'),
        lambda key: of(pair)["left", "coim"],
    ),
    Row(
        "the value of several choices",
        errors.MissingChoiceError,
        has("choices below names"),
        lambda key: of(pair).strip().get_value(),
    ),
    Row(
        "an unvisited constraint",
        errors.UnvisitedConstraintError,
        has('"lefft"', 'Did you mean "left"?', "strict=False"),
        lambda key: pair.importance(key, {"lefft": {"coin": 1}}, ()),
    ),
    Row(
        "a misspelt constraint of a callee",
        errors.UnvisitedConstraintError,
        has('("left", "coim")', 'Did you mean ("left", "coin")?'),
        lambda key: pair.importance(key, {"left": {"coim": 1}}, ()),
    ),
    Row(
        "a misspelt constraint to assess",
        errors.UnvisitedConstraintError,
        has('("left", "niose")', 'Did you mean ("left", "noise")?'),
        lambda key: pair.assess(key, of(pair).strip().merge({"left": {"niose": 1.0}}), ()),
    ),
    Row(
        "a misspelt constraint to update",
        errors.UnvisitedConstraintError,
        has('("right", "coim")', 'Did you mean ("right", "coin")?'),
        lambda key: pair.update(key, of(pair), {"right": {"coim": 1}}, ()),
    ),
    Row(
        "a misspelt constraint below a Map",
        errors.UnvisitedConstraintError,
        has('("all", "coim")', 'Did you mean ("all", "coin")?'),
        lambda key: flips.importance(key, {"all": {"coim": jnp.zeros(3, int)}}, ()),
    ),
    Row(
        "a misspelt constraint of one element",
        errors.UnvisitedConstraintError,
        has('("all", "coim")', 'Did you mean ("all", "coin")?'),
        lambda key: flips.update(key, of(flips), {("all", 1, "coim"): 0}, ()),
    ),
    Row(
        "a value where choices are below names",
        errors.UnvisitedConstraintError,
        has('"left"', "not a single choice", 'Known here: "coin", "noise"'),
        lambda key: pair.importance(key, {"left": 1.0}, ()),
    ),
    Row(
        "values below a single choice",
        errors.UnvisitedConstraintError,
        has('("left", "coin")', "single value", '"x"'),
        lambda key: pair.importance(key, {"left": {"coin": {"x": 1}}}, ()),
    ),
    Row(
        "elements of a single choice",
        errors.UnvisitedConstraintError,
        has('"y"', "one by one", "Map"),
        lambda key: line.importance(key, {("y", 0): 1.0}, (XS, 1.0)),
    ),
    Row(
        "a wrong shape",
        errors.ChoiceShapeError,
        has('("left", "noise")', "(3,)", "draws ()"),
        lambda key: pair.importance(key, {"left": {"noise": jnp.zeros(3)}}, ()),
    ),
    Row(
        "a shape that would broadcast",
        errors.ChoiceShapeError,
        has('"y"', "shape ()", "draws (3,)", "Map", "jax.vmap"),
        lambda key: line.assess(key, {"y": 0.0}, (XS, 1.0)),
    ),
    Row(
        "a wrong number of elements",
        errors.ChoiceShapeError,
        has('("all", "noise")', "(4,)", "leading axis of 3"),
        lambda key: flips.importance(key, {"all": {"noise": jnp.zeros(4)}}, ()),
    ),
    Row(
        "a wrong shape of an element",
        errors.ChoiceShapeError,
        has('("all", "noise")', "(2,)", "draws ()"),
        lambda key: flips.importance(key, {"all": {"noise": jnp.zeros((3, 2))}}, ()),
    ),
    Row(
        "a shape that the new arguments do not allow",
        errors.ChoiceShapeError,
        has('"y"', "(3,)", "draws (2,)"),
        lambda key: line.update(key, of(line, XS, 1.0), {}, (jnp.zeros(2), 1.0)),
    ),
    Row(
        "a dtype that cannot stand for the other",
        errors.ChoiceDtypeError,
        has('("left", "noise")', "complex64", "float32"),
        lambda key: pair.importance(key, {"left": {"noise": 1j}}, ()),
    ),
    Row(
        "truth values for a real choice",
        errors.ChoiceDtypeError,
        has('"y"', "bool", "float32"),
        lambda key: line.importance(key, {"y": jnp.ones(3, bool)}, (XS, 1.0)),
    ),
    # Choice maps -------------------------------------------------------------------------------------------------
    Row(
        "two values for one address",
        errors.ChoiceMapError,
        has('("a", "b")', "overwrite"),
        lambda key: choice_map({"a": {"b": 1.0}}).merge({"a": {"b": 2.0}}),
    ),
    Row(
        "a value and choices below it",
        errors.ChoiceMapError,
        has('"a"', "overwrite"),
        lambda key: choice_map({"a": 1.0, ("a", "b"): 2.0}),
    ),
    Row("a key that is no address", errors.ChoiceMapError, has("1.5"), lambda key: choice_map({1.5: 1.0})),
    Row("a truth value as a key", errors.ChoiceMapError, has("True"), lambda key: choice_map({("a", True): 1.0})),
    Row("no choice map at all", errors.ChoiceMapError, has("str", "hello"), lambda key: choice_map("hello")),
    Row(
        "a list that is no array",
        errors.ChoiceMapError,
        has("[[1.0], 2.0]"),
        lambda key: choice_map({"a": [[1.0], 2.0]}),
    ),
    Row(
        "elements with different addresses",
        errors.ChoiceMapError,
        has("[0, 1]", "different addresses"),
        lambda key: choice_map({"y": {0: {"a": 1.0}, 1: {"b": 1.0}}}),
    ),
    Row(
        "elements with different addresses, one by one",
        errors.ChoiceMapError,
        has('"y"', "different addresses"),
        lambda key: choice_map({("y", 0, "a"): 1.0, ("y", 1, "b"): 1.0}),
    ),
    Row(
        "indices that repeat",
        errors.ChoiceMapError,
        has("repeat", "[0, 0]"),
        lambda key: VectorChoiceMap([0, 0], XS[:2]),
    ),
    Row(
        "a negative index",
        errors.ChoiceMapError,
        has("from 0", "-1"),
        lambda key: VectorChoiceMap(np.array([-1]), XS[:1]),
    ),
    Row(
        "indices that are no integers",
        errors.ChoiceMapError,
        has("integers", "0.5"),
        lambda key: VectorChoiceMap([0.5], XS[:1]),
    ),
    Row(
        "indices in two dimensions",
        errors.ChoiceMapError,
        has("one dimension"),
        lambda key: VectorChoiceMap(np.zeros((1, 1), int), XS[:1]),
    ),
    Row(
        "traced indices that are no integers",
        errors.ChoiceMapError,
        has("integers"),
        lambda key: VectorChoiceMap(jnp.zeros(2), XS[:2]),
    ),
    Row(
        "indices and values of different lengths",
        errors.ChoiceMapError,
        has("2 indices", "leading axis of 2", '"pos"', "(3,)"),
        lambda key: VectorChoiceMap([0, 1], {"pos": XS}),
    ),
    Row(
        "an element that a Map does not have",
        errors.ChoiceMapError,
        has("element 7", '"all"', "0 to 2"),
        lambda key: flips.importance(key, {("all", 7, "coin"): 0}, ()),
    ),
    Row(
        "an element that the overwritten vector does not have",
        errors.ChoiceMapError,
        has("Element 7", '"all"', "3 elements"),
        lambda key: of(flips).strip().overwrite({("all", 7, "coin"): 0}),
    ),
    Row(
        "a density of some elements",
        errors.ChoiceMapError,
        has("all 3 elements", "gives 2"),
        lambda key: lines.assess(key, {(0, "y"): 0.0, (2, "y"): 1.0}, (XS, 1.0)),
    ),
    Row(
        "some elements to constrain",
        errors.ChoiceMapError,
        has("all elements", "by index"),
        lambda key: lines.constrain({(0, "y"): 0.0, (2, "y"): 1.0}, (XS, 1.0)),
    ),
    Row(
        "a selection by traced index",
        errors.ChoiceMapError,
        has("known while tracing"),
        lambda key: select((0, "y")).filter(VectorChoiceMap(jnp.array([0, 2]), {"y": XS[:2]})),
    ),
    Row(
        "a dict of a vector with traced indices",
        errors.ChoiceMapError,
        has("traced indices"),
        lambda key: VectorChoiceMap(jnp.array([0, 2]), XS[:2]).to_dict(),
    ),
    Row(
        "different addresses at different indices",
        errors.ChoiceMapError,
        has("same addresses at each index"),
        lambda key: select((0, "coin"), (1, "noise")).filter(of(Map(flip, repeats=3), 0.5)),
    ),
    # Addresses ---------------------------------------------------------------------------------------------------
    Row(
        "an address used twice",
        errors.DuplicateAddressError,
        has('("outer", "a")', "twice"),
        body(lambda: (trace("a", Normal)(0.0, 1.0), trace("a", Normal)(0.0, 1.0))),
    ),
    Row(
        "an address that is a prefix of an earlier one",
        errors.DuplicateAddressError,
        has('("outer", "a")', "prefix"),
        body(lambda: (trace(("a", "b"), Normal)(0.0, 1.0), trace("a", Normal)(0.0, 1.0))),
    ),
    Row(
        "an address below an earlier one",
        errors.DuplicateAddressError,
        has('("outer", "a", "coin")', "prefix"),
        body(lambda: (trace("a", flip)(0.5), trace(("a", "coin"), Normal)(0.0, 1.0))),
    ),
    *(
        Row(
            f"the address {address!r}",
            errors.InvalidAddressError,
            has("string", repr(address)),
            body(lambda address=address: trace(address, Normal)(0.0, 1.0)),
        )
        for address in (3, (), "", "a/b", ("a", 1), None)
    ),
    Row("a selection of a number", errors.InvalidAddressError, has("0.5"), lambda key: select(0.5)),
    Row("a selection of a truth value", errors.InvalidAddressError, has("True"), lambda key: select(("a", True))),
    Row("a selection of the empty address", errors.InvalidAddressError, has("AllSelection"), lambda key: select(())),
    Row("a selection of the last element", errors.InvalidAddressError, has("from 0"), lambda key: select(("y", -1))),
    # Callees -----------------------------------------------------------------------------------------------------
    Row("a class as callee", errors.CalleeError, has("instance"), body(lambda: trace("a", Network)(XS))),
    Row("a layer as callee", errors.CalleeError, has("plain Flax"), body(lambda: trace("a", nn.Dense(1))(XS))),
    Row("a function as callee", errors.CalleeError, has("@gen"), body(lambda: trace("a", lambda: 0.0)())),
    Row(
        "a callee that is not called",
        errors.CalleeError,
        has('("outer", "a")', "never called", 'trace("a", Normal)(*args)'),
        body(lambda: trace("a", Normal)),
    ),
    Row(
        "a callee that is not called, of a class",
        errors.CalleeError,
        has('"y"', "never called", "(*args)"),
        lambda key: Forgetful().init(key, XS),
    ),
    Row("@gen of a class of models", errors.CalleeError, has("Network", "leave @gen away"), lambda key: gen(Network)),
    Row("@gen of a class of distributions", errors.CalleeError, has("Sampler", "leave @gen"), lambda key: gen(Sampler)),
    Row("a value as callee", errors.CalleeError, has('("z", Normal)(loc'), body(lambda: trace("a", 1.5)())),
    Row("@gen of a class", errors.CalleeError, has("function", "Dense"), lambda key: gen(nn.Dense)),
    Row("@gen of a number", errors.CalleeError, has("function", "3"), lambda key: gen(3)),
    Row("@gen with options alone", errors.CalleeError, has("combinator"), lambda key: gen(lambda: None, repeats=3)),
    Row("@gen of a method", errors.CalleeError, has("method", "GenModule"), lambda key: gen(Network.setup)),
    # Where trace may stand ---------------------------------------------------------------------------------------
    Row(
        "trace outside of a body",
        errors.TraceContextError,
        has('"a"', "@gen"),
        lambda key: trace("a", Normal)(0.0, 1.0),
    ),
    *(
        Row(f"trace inside {name}", errors.TraceTransformError, has('("outer", "x")', "Map", "Switch"), body(function))
        for name, function in {
            "lax.scan": scanned,
            "vmap": lambda: jax.vmap(lambda x: trace("x", Normal)(x, 1.0))(XS),
            "jit": lambda: jax.jit(lambda x: trace("x", Normal)(x, 1.0))(0.0),
            "grad": lambda: jax.grad(lambda x: trace("x", Normal)(x, 1.0))(0.0),
            "lax.cond": lambda: jax.lax.cond(True, lambda: trace("x", Normal)(0.0, 1.0), lambda: 0.0),
            "lax.map": lambda: jax.lax.map(lambda x: trace("x", Normal)(x, 1.0), XS),
            "lax.fori_loop": lambda: jax.lax.fori_loop(0, 3, lambda i, x: trace("x", Normal)(x, 1.0), 0.0),
            "lax.while_loop": lambda: jax.lax.while_loop(lambda x: x < 1, lambda x: trace("x", Normal)(x, 1.0), 0.0),
            "jax.checkpoint": lambda: jax.checkpoint(lambda x: trace("x", Normal)(x, 1.0))(0.0),
        }.items()
    ),
    # Parameters --------------------------------------------------------------------------------------------------
    Row("simulate without parameters", errors.UnboundParametersError, has("bind", "apply"), unbound("simulate", (XS,))),
    Row("propose without parameters", errors.UnboundParametersError, has("bind", "apply"), unbound("propose", (XS,))),
    Row("importance without", errors.UnboundParametersError, has("bind", "apply"), unbound("importance", {}, (XS,))),
    Row(
        "assess without parameters",
        errors.UnboundParametersError,
        has("Network", "bind", "apply"),
        unbound("assess", {"y": XS[:2]}, (XS,)),
    ),
    Row(
        "update without parameters",
        errors.UnboundParametersError,
        has("Network", "bind", "apply"),
        lambda key: Network().update(key, network_trace(), {}, (XS,)),
    ),
    Row(
        "regenerate without parameters",
        errors.UnboundParametersError,
        has("Network", "bind", "apply"),
        lambda key: Network().regenerate(key, network_trace(), select("y"), (XS,)),
    ),
    Row(
        "choice_grad without parameters",
        errors.UnboundParametersError,
        has("Network", "bind"),
        lambda key: Network().choice_grad(key, network_trace(), select("y")),
    ),
    *(
        Row(
            f"{method} under {name}",
            errors.UnboundParametersError,
            has("`params` lacks", "Network", f'"{lacks}"', 'variables["params"]'),
            lambda key, m=method, p=params: getattr(Network(), m)(key, network_trace(), p),
        )
        for method in ("score_params", "param_grad")
        for name, params, lacks in (
            ("no parameters", {}, "kernel"),
            ("some parameters", {"Dense_0": {"kernel": jnp.zeros((3, 2))}}, "bias"),
        )
    ),
    Row(
        "a density without other collections",
        errors.UnboundParametersError,
        has("Normalised", "variables=", '"batch_stats"'),
        lambda key: Normalised().score_params(key, *normalised_trace_and_params()),
    ),
    Row(
        "all variables as parameters",
        errors.ArgumentError,
        has("`params`", 'variables["params"]', 'the key "params"'),
        lambda key: Network().score_params(key, network_trace(), Network().init(key, XS)),
    ),
    Row(
        "a distribution that is called, not traced",
        errors.UnboundParametersError,
        has("Normal", "trace(address, callee)(*args)"),
        body(lambda: trace("a", Normal(0.0, 1.0))),
    ),
    # Selections --------------------------------------------------------------------------------------------------
    *(
        Row(
            f"{name} of nothing",
            errors.SelectionError,
            has('("left", "niose")', 'Did you mean ("left", "noise")?'),
            call,
        )
        for name, call in {
            "choice_grad": lambda key: pair.choice_grad(key, of(pair), select(("left", "niose"))),
            "unconstrain": lambda key: pair.unconstrain(of(pair), select(("left", "niose"))),
            "regenerate": lambda key: pair.regenerate(key, of(pair), select(("left", "niose")), ()),
            "project": lambda key: pair.project(key, of(pair), select(("left", "niose"))),
        }.items()
    ),
    Row(
        "a gradient in the empty selection",
        errors.SelectionError,
        has("nothing", '("left", "coin")'),
        lambda key: pair.choice_grad(key, of(pair), select()),
    ),
    Row(
        "an element that the selected Map does not have",
        errors.SelectionError,
        has("element 3", "3 elements"),
        lambda key: lines.regenerate(key, of(lines, XS, 1.0), select((3, "y")) | select((0, "y")), (XS, 1.0)),
    ),
    *(
        Row(f"{name} of elements of one value", errors.SelectionError, has("elements [0]", "Normal", "`Map`"), call)
        for name, call in {
            "project": lambda key: of(pair).project(select(("left", "noise", 0))),
            "regenerate": lambda key: lines.regenerate(key, of(lines, XS, 1.0), select(("y", 0)), (XS, 1.0)),
            "unconstrain": lambda key: of(pair).unconstrain(~select(("left", "noise", 0)) & ~select(("left", "coin"))),
        }.items()
    ),
    Row(
        "some elements to unconstrain",
        errors.SelectionError,
        has("all elements", "[1]"),
        lambda key: lines.unconstrain(of(lines, XS, 1.0), select((1, "y"))),
    ),
    Row(
        "a gradient in a discrete choice",
        errors.DiscreteGradientError,
        has('("left", "coin")', "discrete", "~select"),
        lambda key: pair.choice_grad(key, of(pair), select("left")),
    ),
    Row(
        "a gradient in a discrete choice of one element",
        errors.DiscreteGradientError,
        has('("all", "coin")', "discrete"),
        lambda key: flips.choice_grad(key, of(flips), select(("all", 1, "coin"))),
    ),
    Row(
        "a discrete choice to R^n",
        errors.DiscreteGradientError,
        has('("left", "coin")', "discrete"),
        lambda key: pair.unconstrain(of(pair), AllSelection()),
    ),
    Row(
        "a discrete choice from R^n",
        errors.DiscreteGradientError,
        has('("left", "coin")', "discrete"),
        lambda key: pair.constrain({"left": {"coin": 0.3, "noise": 0.0}}, ()),
    ),
    # Arguments ---------------------------------------------------------------------------------------------------
    Row(
        "arguments that are no tuple",
        errors.ArgumentError,
        has("`args`", "tuple", "float"),
        lambda key: Normal.simulate(key, 0.0),
    ),
    Row("a list of arguments", errors.ArgumentError, has("`args`", "list"), lambda key: line.simulate(key, [1.0, 2.0])),
    Row(
        "arguments one by one",
        errors.ArgumentError,
        has("one tuple", "3 pos"),
        lambda key: Normal.simulate(key, 0.0, 1.0),
    ),
    Row("no key", errors.ArgumentError, has("(key, args)", "1 positional"), lambda key: line.simulate((1.0, 2.0))),
    Row("nothing", errors.ArgumentError, has("(key, args)", "0 positional"), lambda key: line.simulate()),
    Row("a key given twice", errors.ArgumentError, has("(key, args)"), lambda key: pair.simulate(key, (), key=key)),
    Row("key and arguments swapped", errors.ArgumentError, has("`args`"), lambda key: line.simulate((1.0, 2.0), key)),
    Row("a seed as a key", errors.ArgumentError, has("jax.random.key(seed)", "0"), lambda key: pair.simulate(0, ())),
    Row(
        "an array of keys",
        errors.ArgumentError,
        has("(3,)", "vmap"),
        lambda key: pair.simulate(jax.random.split(key, 3), ()),
    ),
    Row(
        "choices in the place of the trace",
        errors.ArgumentError,
        has("`trace`", "dict"),
        lambda key: pair.update(key, {}, {}, ()),
    ),
    Row(
        "the trace of another generative function",
        errors.ArgumentError,
        has("Map.update", "MapTrace", "BuiltinTrace"),
        lambda key: lines.update(key, of(line, XS, 1.0), {}, (XS, 1.0)),
    ),
    *(
        Row(
            f"a batch of traces to {name}",
            errors.ArgumentError,
            has(f"{title}.{name}`", "one trace", "(4,)", "jax.vmap", name),
            call,
        )
        for title, model, args in (("pair", pair, ()), ("Map", flips_of_one, (0.5,)), ("Normal", Normal, (0.0, 1.0)))
        for name, call in {
            "update": lambda key, m=model, a=args: m.update(key, batch_of(m, *a), {}, a),
            "regenerate": lambda key, m=model, a=args: m.regenerate(key, batch_of(m, *a), AllSelection(), a),
            "choice_grad": lambda key, m=model, a=args: m.choice_grad(key, batch_of(m, *a), AllSelection()),
            "arg_grad": lambda key, m=model, a=args: m.arg_grad(key, batch_of(m, *a)),
            "score_params": lambda key, m=model, a=args: m.score_params(key, batch_of(m, *a), {}),
            "param_grad": lambda key, m=model, a=args: m.param_grad(key, batch_of(m, *a), {}),
        }.items()
    ),
    Row(
        "callees of two kinds at one address",
        errors.ArgumentError,
        has('at "x"', "BuiltinTrace", "Normal", "one kind at one address"),
        lambda key: either.update(key, of(either, True), {}, (False,)),
    ),
    Row(
        "a callee with parameters in a body that is not compact",
        errors.UnboundParametersError,
        has("NotCompact", '"inner"', "setup", "@nn.compact"),
        lambda key: NotCompact().init(key, XS),
    ),
    Row(
        "a list of changes",
        errors.ArgumentError,
        has("`argdiffs`", "list"),
        lambda key: pair.update(key, of(pair), {}, []),
    ),
    Row(
        "a mark without a value",
        errors.ArgumentError,
        has("`argdiffs`", "Diff.no_change(value)"),
        lambda key: line.update(key, of(line, XS, 1.0), {}, (Diff.no_change, 1.0)),
    ),
    *(
        Row(f"slash by {count!r}", errors.ArgumentError, has("`n`", repr(count)), lambda key, n=count: slash(key, n))
        for count in (-1, 1.5, True, None)
    ),
    Row(
        "a change that is none",
        errors.ArgumentError,
        has("`param_diff`", "True"),
        lambda key: pair.update(key, of(pair), {}, (), param_diff=True),
    ),
    Row(
        "a policy that is none",
        errors.ArgumentError,
        has("refuse", "allow", "maybe"),
        lambda key: pair.choice_grad(key, of(pair), select(("left", "noise")), untraced="maybe"),
    ),
    Row(
        "a gradient in no argument",
        errors.ArgumentError,
        has("argument 2 of 2"),
        lambda key: line.arg_grad(key, of(line, XS, 1.0), 2),
    ),
    Row(
        "a gradient in an integer argument",
        errors.ArgumentError,
        has("Argument 0", "floating"),
        lambda key: gen(lambda n: trace("y", Normal)(n * 1.0, 1.0)).arg_grad(
            key, of(gen(lambda n: trace("y", Normal)(n * 1.0, 1.0)), 1)
        ),
    ),
    Row(
        "a gradient in a text",
        errors.ArgumentError,
        has("Argument 0", "floating"),
        lambda key: gen(lambda s: trace("y", Normal)(0.0, 1.0)).arg_grad(
            key, of(gen(lambda s: trace("y", Normal)(0.0, 1.0)), "text")
        ),
    ),
    Row(
        "an argument that a callee does not have",
        errors.ArgumentError,
        has("line", "gradient"),
        body(lambda: trace("a", line)(1.0, 2.0, gradient=2.0)),
    ),
    Row(
        "an argument by keyword only",
        errors.ArgumentError,
        has("keyword-only", "scale"),
        body(lambda: trace("a", gen(lambda x, *, scale: trace("y", Normal)(x, scale)))(0.0, scale=1.0)),
    ),
    Row(
        "keywords for a combinator",
        errors.ArgumentError,
        has("Map", "position", "slope"),
        body(lambda: trace("a", lines)(XS, slope=1.0)),
    ),
    # Map ---------------------------------------------------------------------------------------------------------
    Row("a Map of a function", errors.ArgumentError, has("Map", "@gen"), lambda key: Map(lambda x: x)),
    *(
        Row(
            f"repeats={repeats}",
            errors.ArgumentError,
            has("repeats", str(repeats)),
            lambda key, r=repeats: Map(flip, repeats=r),
        )
        for repeats in (0, -1, 1.5, True)
    ),
    Row(
        "axes of other arguments",
        errors.ArgumentError,
        has("in_axes", "2 arguments"),
        lambda key: Map(line, in_axes=(0,)).simulate(key, (XS, 1.0)),
    ),
    Row(
        "axes in a list",
        errors.ArgumentError,
        has("in_axes", "tuple"),
        lambda key: Map(line, in_axes=[0, None]).simulate(key, (XS, 1.0)),
    ),
    Row(
        "an axis that is not there",
        errors.ArgumentError,
        has("axis 1", "(3,)"),
        lambda key: Map(line, in_axes=(1, None)).simulate(key, (XS, 1.0)),
    ),
    Row(
        "no mapped argument",
        errors.ArgumentError,
        has("length is unknown", "repeats"),
        lambda key: Map(line, in_axes=(None, None)).simulate(key, (XS, 1.0)),
    ),
    Row(
        "axes of another structure",
        errors.ArgumentError,
        has("structure", "argument 0"),
        lambda key: Map(line, in_axes=({"a": 0}, None)).simulate(key, (XS, 1.0)),
    ),
    Row(
        "lengths that differ",
        errors.ArgumentError,
        has("0: 3", "1: 2"),
        lambda key: Map(line, in_axes=0).simulate(key, (XS, XS[:2])),
    ),
    Row(
        "a length that is not `repeats`",
        errors.ArgumentError,
        has("0: 3", "repeats: 2"),
        lambda key: Map(line, in_axes=(0, None), repeats=2).simulate(key, (XS, 1.0)),
    ),
    Row(
        "a length that changes",
        errors.ArgumentError,
        has("3 elements", "2", "importance"),
        lambda key: lines.update(key, of(lines, XS, 1.0), {}, (XS[:2], 1.0)),
    ),
    # TrainCombinator ---------------------------------------------------------------------------------------------
    Row(
        "training a function",
        errors.ArgumentError,
        has("TrainCombinator", "@gen"),
        lambda key: TrainCombinator(lambda p: p, params={}),
    ),
    Row(
        "parameters that are no dict",
        errors.ArgumentError,
        has("`params`", "dict", "0.5"),
        lambda key: TrainCombinator(flip, params=0.5),
    ),
    Row(
        "parameters without names",
        errors.ArgumentError,
        has("`params`", "name"),
        lambda key: TrainCombinator(flip, params={0: 0.5}),
    ),
    Row(
        "traced initial values",
        errors.ArgumentError,
        has("initial values", "bind"),
        lambda key: TrainCombinator(flip, params={"p": jax.random.uniform(key)}),
    ),
    Row(
        "parameters of other shapes",
        errors.ArgumentError,
        has("(2,)", "()"),
        lambda key: TrainCombinator(gen(lambda p: trace("x", Normal)(p["mu"], 1.0)), params={"mu": 0.0}).apply(
            {"params": {"mu": jnp.zeros(2)}}, key, (), method="simulate"
        ),
    ),
    Row(
        "a wrong number of changes",
        errors.ArgumentError,
        has("2 entries", "0 arguments, or 1"),
        lambda key: TrainCombinator(gen(lambda p: trace("x", Normal)(p["mu"], 1.0)), params={"mu": 0.0}).update(
            key,
            of(TrainCombinator(gen(lambda p: trace("x", Normal)(p["mu"], 1.0)), params={"mu": 0.0})),
            {},
            (1.0, 2.0),
        ),
    ),
    # Branches ----------------------------------------------------------------------------------------------------
    Row(
        "branches with different return values",
        errors.BranchMismatchError,
        has('"which"', "branch 0 returns float32[]", "branch 1 float32[2]", "Return the same"),
        lambda key: gen(lambda: trace("which", Switch((unit, two_of_them)))(0)).simulate(key, ()),
    ),
    Row(
        "branches with different choices at one address",
        errors.BranchMismatchError,
        has('("which", "x")', "branch 0 has float32[]", "branch 1 float32[2]", "different addresses"),
        lambda key: gen(lambda: trace("which", Switch((unit, their_sum)))(0)).simulate(key, ()),
    ),
    *(
        Row(
            f"a wrong {what} of a {name}",
            errors.ArgumentError,
            has(f'{name} at "which"', *parts),
            lambda key, model=model, args=args: gen(lambda: trace("which", model)(*args)).simulate(key, ()),
        )
        for name, model, what, args, parts in [
            ("Switch", Switch((unit, unit)), "index", (0.5,), ("one integer", "0.5", "use `Cond`")),
            ("Switch", Switch((unit, unit)), "number of branches", (2,), ("is 2", "2 branches")),
            ("Switch", Switch((line, line), own_arguments=True), "argument", (0, 0.5, 0.5), ("one tuple", "float")),
            ("Cond", Cond(unit, unit), "predicate", (1,), ("one boolean", "got 1", "comparison")),
            ("OrElse", OrElse(unit, line), "number of arguments", (True, ()), ("one tuple", "2 in all; got 1")),
            ("Mask", Mask(unit), "flag", (XS > 1,), ("one boolean", "bool[3]", "use `Map`")),
            ("Mix", Mix((unit, unit)), "weight", (XS, (), ()), ("shape (3,)", "2 components")),
            ("Product", Product((unit, unit)), "number of arguments", ((),), ("one tuple", "2 in all; got 1")),
        ]
    ),
    # Random parameters -------------------------------------------------------------------------------------------
    Row(
        "a prior of a parameter that is not there",
        errors.ParameterPathError,
        has('"kernl"', "no parameter there", 'Did you mean "kernel"?'),
        lambda key: gen(lambda: trace("net", dense_prior)(XS)).simulate(key, ()),
    ),
    Row(
        "a parameter without a prior",
        errors.ParameterPathError,
        has('("net", "bias")', "selected and has no prior"),
        lambda key: gen(lambda: trace("net", half_a_prior)(XS)).simulate(key, ()),
    ),
    # Objectives --------------------------------------------------------------------------------------------------
    Row(
        "a guide without reparameterisation where it is needed",
        errors.NotReparameterizedError,
        has('("z", "kind")', "Bernoulli", "sticking the landing", "switch that off"),
        lambda key: ELBO(joint, discrete_guide, sticking_the_landing=True).init(key, {"x": 1.0}),
    ),
    Row(
        "a demanded reparameterisation that is none",
        errors.NotReparameterizedError,
        has('"z"', "Bernoulli", "REINFORCE", "reparameterized=True"),
        lambda key: gen(lambda: trace("z", Reparameterized(Bernoulli))(0.0)).simulate(key, ()),
    ),
    Row(
        "an enumeration of too many values",
        errors.EnumerationError,
        has('"z"', "ENUM(Bernoulli)", "2^20", "REINFORCE"),
        lambda key: ELBO(gen(lambda: trace("z", Bernoulli)(jnp.zeros(20))), enumerated_guide).apply(
            {}, {}, rngs={"choice": key}
        ),
    ),
    Row(
        "a latent that the guide lacks",
        errors.MissingChoiceError,
        has('"z"', "guide"),
        lambda key: ELBO(joint, gen(lambda: None)).init(key, {"x": 1.0}),
    ),
    Row(
        "a choice that only the guide has",
        errors.UnvisitedConstraintError,
        has('"more"', "guide"),
        lambda key: ELBO(joint, guide_with_more).init(key, {"x": 1.0}),
    ),
    Row(
        "an observed choice of the guide",
        errors.ChoiceMapError,
        has('"z"', "guide"),
        lambda key: ELBO(joint, Guide()).init(key, {"x": 1.0, "z": 0.0}),
    ),
    Row(
        "an observed choice that is misspelt",
        errors.MissingChoiceError,
        has('"x"', "observed"),
        lambda key: ELBO(joint, Guide()).init(key, {"xx": 1.0}),
    ),
    Row("no samples", errors.ArgumentError, has("num_samples", "0"), lambda key: ELBO(joint, Guide(), num_samples=0)),
    Row("a class as guide", errors.ArgumentError, has("guide", "Guide"), lambda key: ELBO(joint, Guide)),
    Row(
        "arguments of the model, not in a tuple",
        errors.ArgumentError,
        has("tuple", "float"),
        lambda key: ELBO(joint, Guide()).init(key, {"x": 1.0}, 0.5),
    ),
    Row(
        "an objective without its stream",
        errors.MissingStreamError,
        has('"choice"', "rngs="),
        lambda key: ELBO(joint, Guide()).apply(ELBO(joint, Guide()).init(key, {"x": 1.0}), {"x": 1.0}),
    ),
    # Randomness that is no choice --------------------------------------------------------------------------------
    *(
        Row(f"{method} through {stream}", errors.UntracedRandomnessError, has(f'"{stream}"', 'untraced="allow"'), call)
        for stream in ("dropout", "noise")
        for method, call in {
            "choice_grad": lambda key, s=stream: (
                Noisy(s).bind({}, rngs={s: key}).choice_grad(key, noisy_trace(s), select("y"))
            ),
            "arg_grad": lambda key, s=stream: Noisy(s).bind({}, rngs={s: key}).arg_grad(key, noisy_trace(s), 0),
            "param_grad": lambda key, s=stream: Noisy(s).param_grad(key, noisy_trace(s), {}),
            "score_params": lambda key, s=stream: Noisy(s).score_params(key, noisy_trace(s), {}),
            "unzip's score": lambda key, s=stream: Noisy(s).unzip(key, {})[1]({"y": XS}, XS),
            "unzip's retval": lambda key, s=stream: Noisy(s).unzip(key, {})[2]({"y": XS}, XS),
        }.items()
    ),
    Row(
        "allowed randomness without its stream",
        errors.UntracedRandomnessError,
        has('"dropout"', "bound with that stream"),
        lambda key: Noisy().choice_grad(key, noisy_trace("dropout"), select("y"), untraced="allow"),
    ),
    Row(
        "a stochastic layer without its stream",
        errors.MissingStreamError,
        has("noise", '"choice"', "rngs="),
        lambda key: Layer().apply({}, 1.0),
    ),
    # Training ----------------------------------------------------------------------------------------------------
    Row(
        "arrays of different lengths",
        errors.TrainingDataError,
        has("data['x'] has 3", "data['y'] has 4"),
        lambda key: gjflax.batches({"x": np.zeros(3), "y": np.zeros(4)}),
    ),
    Row(
        "training in vain",
        errors.NonFiniteGradientError,
        has("last 100 of 250 steps", "clip_by_global_norm"),
        lambda key: require_some_finite(100, 120, 250, last=False),
    ),
    Row(
        "a checkpoint of another run",
        errors.CheckpointError,
        has("runs/1", "data/elements was 10 and is 9", "another directory"),
        lambda key: require_same({"data": {"elements": 10}}, {"data": {"elements": 9}}, "runs/1"),
    ),
    Row(
        "a package that is not installed",
        errors.MissingDependencyError,
        has("Drawing needs `no_such_module`", "pip install no-such-package"),
        lambda key: require("no_such_module", "Drawing", "no-such-package"),
    ),
    # What a generative function does not say ---------------------------------------------------------------------
    *(
        Row(
            f"{method} of a class that lacks it",
            errors.NotImplementedByGenerativeFunctionError,
            has("Bare", method),
            call,
        )
        for method, call in {
            "simulate": lambda key: Bare().simulate(key, ()),
            "importance": lambda key: Bare().importance(key, {}, ()),
            "assess": lambda key: Bare().assess(key, {}, ()),
            "update": lambda key: Bare().update(key, of(pair), {}, ()),
            "regenerate": lambda key: Bare().regenerate(key, of(pair), select("a"), ()),
            "constrain": lambda key: Bare().constrain({}, ()),
        }.items()
    ),
    Row(
        "no bijector",
        errors.NotImplementedByGenerativeFunctionError,
        has('"s"', "Sampler", "bijector"),
        lambda key: gen(lambda: trace("s", Sampler())()).constrain({"s": 0.0}, ()),
    ),
]

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]


@pytest.fixture(autouse=True)
def _without_checked_signatures() -> Iterator[None]:
    """The errors are those that a user sees, whose signatures nobody checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input_is_named_before_anything_runs(row: Row):
    with pytest.raises(row.error, match=row.match) as caught:
        jax.eval_shape(row.call, KEY)
    assert type(caught.value) is row.error
    assert top_frame() is None


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_every_error_is_one_of_gjflax_and_public(error: type[Exception]):
    assert issubclass(error, errors.GJFlaxError)
    assert getattr(gjflax, error.__name__) is error
    assert error.__doc__


def test_every_error_is_tested():
    raised = {row.error for row in ROWS}
    assert raised == set(CLASSES) - {errors.GJFlaxError}


def test_errors_are_the_built_in_ones_that_python_users_catch():
    with pytest.raises(KeyError):
        of(pair)["middle"]
    with pytest.raises(TypeError):
        Normal.simulate(KEY, 0.0)
    with pytest.raises(ValueError):
        choice_map({"a": 1.0}).merge({"a": 2.0})
    # A KeyError prints its argument's repr; these print their text.
    assert str(errors.MissingChoiceError('No choice at "a".')) == 'No choice at "a".'
    assert str(errors.GJFlaxError()) == ""


# What is meant to be allowed -----------------------------------------------------------------------------------------


def test_constraints_that_no_choice_takes_up_may_be_ignored():
    more = {"left": {"coin": 1, "other": {"x": 1.0}}, "elsewhere": 2.0}
    _, (weight, new) = pair.importance(KEY, more, (), strict=False)
    np.testing.assert_allclose(weight, np.log(0.3), rtol=1e-6)
    assert new["left", "coin"] == 1
    _, (_, _, new, discard) = pair.update(KEY, new, {"left": {"coin": 0}, "elsewhere": 2.0}, (), strict=False)
    assert new["left", "coin"] == 0
    assert discard.to_dict() == {"left": {"coin": 1}}
    _, (_, score) = pair.assess(KEY, new.strip().merge({"elsewhere": 1.0}), (), strict=False)
    np.testing.assert_allclose(score, new.get_score(), rtol=1e-6)


def test_constraints_that_a_mapped_callee_does_not_take_up_may_be_ignored():
    more = {"all": {"coin": np.array([1, 0, 1]), "other": jnp.zeros(3)}}
    _, (weight, new) = flips.importance(KEY, more, (), strict=False)
    np.testing.assert_allclose(weight, 3 * np.log(0.5), rtol=1e-6)
    np.testing.assert_array_equal(new["all", "coin"], [1, 0, 1])
    one = {("all", 1): {"coin": 1, "other": 0.0}}
    _, (_, _, new, discard) = flips.update(KEY, new, one, (), strict=False)
    np.testing.assert_array_equal(new["all", "coin"], [1, 1, 1])
    assert discard["all", 1, "coin"] == 0


@pytest.mark.parametrize("stream", ["dropout", "noise"])
def test_untraced_randomness_may_be_allowed(stream: str):
    tr = noisy_trace(stream)
    bound = Noisy(stream).bind({}, rngs={stream: jax.random.key(4)})
    _, grads = bound.choice_grad(KEY, tr, select("y"), untraced="allow")
    assert grads["y"].shape == XS.shape
    _, logpdf = bound.score_params(KEY, tr, {}, untraced="allow")
    assert jnp.isfinite(logpdf)
    _, grads = bound.arg_grad(KEY, tr, untraced="allow")
    assert grads.shape == XS.shape
    assert bound.param_grad(KEY, tr, {}, untraced="allow")[1] == {}
    _, score, retval = bound.unzip(KEY, {}, untraced="allow")
    # One call of unzip is one draw: its score is a function, as a gradient and a line search need.
    assert score({"y": tr["y"]}, XS) == score({"y": tr["y"]}, XS)
    np.testing.assert_array_equal(retval({"y": tr["y"]}, XS), tr["y"])


# A failed call leaves nothing half-done ------------------------------------------------------------------------------


def test_a_failing_body_leaves_no_running_body_behind():
    class Broken(Exception):
        pass

    @gen
    def breaks(fail):
        trace("a", Normal)(0.0, 1.0)
        if fail:
            assert top_frame() is not None
            raise Broken
        return trace("b", Normal)(0.0, 1.0)

    @gen
    def outer(fail):
        return trace("inner", Map(breaks, in_axes=None, repeats=2))(fail)

    for model in (breaks, outer):
        with pytest.raises(Broken):
            model.simulate(KEY, (True,))
        assert top_frame() is None
        _, tr = model.simulate(KEY, (False,))
        with pytest.raises(Broken):
            model.update(KEY, tr, {}, (True,))
        assert top_frame() is None
        _, again = model.simulate(KEY, (False,))
        jax.tree.map(np.testing.assert_array_equal, tr, again)


def test_a_body_may_catch_what_a_callee_raises():
    @gen
    def fails():
        trace("a", Normal)(0.0, 1.0)
        trace("a", Normal)(0.0, 1.0)

    @gen
    def careful():
        try:
            trace("first", fails)()
        except gjflax.DuplicateAddressError:
            value = trace("second", Normal)(0.0, 1.0)
        return value

    _, tr = careful.simulate(KEY, ())
    assert tr.strip().addresses() == [("second",)]


def test_a_failed_init_or_apply_can_be_repeated():
    variables = Network().init(KEY, XS)
    with pytest.raises(gjflax.UnvisitedConstraintError):
        Network().apply(variables, KEY, {"z": 1.0}, (XS,), method="importance")
    bound = Network().bind(variables)
    with pytest.raises(gjflax.MissingChoiceError):
        bound.assess(KEY, {}, (XS,))
    _, (_, score) = bound.assess(KEY, {"y": XS[:2]}, (XS,))
    _, (_, other) = Network().apply(variables, KEY, {"y": XS[:2]}, (XS,), method="assess")
    assert score == other


def test_threads_run_models_of_their_own():
    """All bodies are halfway at the same time, and every second one fails there."""
    count = 12
    barrier = threading.Barrier(count, timeout=60)

    def run(number: int) -> Any:
        @gen
        def inner(x):
            value = trace(f"inner{number}", Normal)(x, 1.0)
            barrier.wait()
            if number % 2:
                trace(f"inner{number}", Normal)(x, 1.0)
            barrier.wait()
            return value

        @gen
        def model(x):
            first = trace(f"first{number}", Normal)(x, 1.0)
            barrier.wait()
            last = trace(f"nested{number}", inner)(first)
            return trace(f"last{number}", Normal)(last, 1.0)

        try:
            _, tr = model.simulate(jax.random.key(number), (float(number),))
            return tr, top_frame()
        except gjflax.DuplicateAddressError as error:
            barrier.wait()
            return str(error), top_frame()

    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(run, range(count)))
    for number, (result, frame) in enumerate(results):
        assert frame is None
        if number % 2:
            assert f'("nested{number}", "inner{number}")' in result
        else:
            values = result.strip()
            names = [(f"first{number}",), (f"nested{number}", f"inner{number}"), (f"last{number}",)]
            assert values.addresses() == names
            means = [float(number), values[names[0]], values[names[1]]]
            want = sum(jax.scipy.stats.norm.logpdf(values[name], mean) for name, mean in zip(names, means, strict=True))
            np.testing.assert_allclose(result.get_score(), want, rtol=1e-5)


def test_threads_share_one_model():
    """The seed, the trace and the weight are each thread's own where the module is not."""

    def run(number: int) -> tuple[Any, Any]:
        key, tr = pair.simulate(jax.random.key(number), ())
        _, (_, weight, _, discard) = pair.update(key, tr, {"left": {"noise": float(number)}}, ())
        return tr, (weight, discard["left", "noise"])

    alone = [run(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, range(8)))
    for one, other in zip(alone, together, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_change_is_marked_by_its_diff():
    """`update` takes plain values and marked ones alike, so forgetting the mark is no error."""
    tr = of(line, XS, 1.0)
    _, (_, plain, _, _) = line.update(KEY, tr, {}, (XS, 2.0))
    _, (_, marked, _, _) = line.update(KEY, tr, {}, (Diff.no_change(XS), Diff.unknown_change(2.0)))
    assert plain == marked

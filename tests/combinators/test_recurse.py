"""`Recurse` on a small probabilistic context-free grammar: every tree by enumeration, strings by the inside algorithm."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gjflax import (
    AllSelection,
    ArgumentError,
    BranchMismatchError,
    Categorical,
    GenModule,
    Map,
    Masked,
    NoneSelection,
    Normal,
    Recurse,
    Switch,
    UnvisitedConstraintError,
    choice_map,
    gen,
    select,
    trace,
)

KEYS = jax.random.split(jax.random.key(5), 8)
slow = pytest.mark.slow

# The grammar S -> S S | a | b, and at the last level S -> a | b. A string is an array of tokens and its length. -----------

DEPTH, ROOM = 2, 4
RULES = np.array([0.3, 0.5, 0.2])
LAST = np.array([0.6, 0.4])


@gen
def expand(node, log_rules):
    rule = trace("rule", Categorical)(log_rules)
    return rule, jnp.zeros(2, jnp.int32) + node, jnp.where(rule == 0, 2, 0)


@gen
def join(rule, parts, exists, log_rules):
    tokens, lengths = parts
    together = jnp.roll(tokens[1], lengths[0]) + tokens[0]
    one = jnp.zeros(ROOM, jnp.int32).at[0].set(rule)
    return jnp.where(exists[0], together, one), jnp.where(exists[0], jnp.sum(lengths), 1)


@gen
def end(node, log_rules):
    token = trace("token", Categorical)(jnp.log(jnp.asarray(LAST, jnp.float32)))
    return jnp.zeros(ROOM, jnp.int32).at[0].set(token + 1), jnp.int32(1)


grammar = Recurse(expand, join, end, max_branch=2, max_depth=DEPTH)
ARGS = (jnp.int32(0), jnp.log(jnp.asarray(RULES, jnp.float32)))


def trees(level: int = 0, node: int = 0) -> list[tuple[dict[Any, int], float, tuple[int, ...]]]:
    """All trees below a node: choices by address, probability, and yield."""
    if level == DEPTH:
        return [({("level_2", "leaf", node, "token"): t}, LAST[t], (t + 1,)) for t in range(2)]
    address = (f"level_{level}", "production", node, "rule")
    found = [({address: rule}, RULES[rule], (rule,)) for rule in (1, 2)]
    for left, right in itertools.product(trees(level + 1, 2 * node), trees(level + 1, 2 * node + 1)):
        found.append(({address: 0, **left[0], **right[0]}, RULES[0] * left[1] * right[1], left[2] + right[2]))
    return found


ADDRESSES = [("level_0", "production", 0, "rule")]
ADDRESSES += [("level_1", "production", node, "rule") for node in range(2)]
ADDRESSES += [("level_2", "leaf", node, "token") for node in range(4)]


def given(tree: dict[Any, int]) -> Any:
    """The choices of a tree, with flags for those that it has."""
    return choice_map({a: Masked(jnp.int32(tree.get(a, 0)), jnp.array(a in tree)) for a in ADDRESSES})


def there(choices: Any) -> dict[Any, Any]:
    found = {}
    for address in ADDRESSES:
        part = choices.get_subtree(address)
        if not part.is_empty() and part.get_value().flag:
            found[address] = int(part.get_value().value)
    return found


def log_probability(tree: dict[Any, int]) -> float:
    return float(sum(np.log(LAST[v] if "leaf" in a else RULES[v]) for a, v in tree.items()))


def close(got: Any, want: Any, atol: float = 1e-4) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-5, atol=atol)


assess = jax.jit(lambda chm: grammar.assess(KEYS[0], chm, ARGS)[1])
importance = jax.jit(lambda key, chm: grammar.importance(key, chm, ARGS)[1])
update = jax.jit(lambda key, tr, chm, rules: grammar.update(key, tr, chm, (ARGS[0], rules))[1])


def of_tree(tree: dict[Any, int]) -> Any:
    return importance(KEYS[0], given(tree))[1]


def test_every_tree():
    """The trees' probabilities by hand, and their sum."""
    everything = trees()
    assert len(everything) == 38
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[given(tree) for tree, _, _ in everything])
    (tokens, lengths), scores = jax.jit(jax.vmap(lambda chm: grammar.assess(KEYS[0], chm, ARGS)[1]))(stacked)
    close(scores, [np.log(probability) for _, probability, _ in everything])
    close(np.sum(np.exp(scores)), 1.0)
    for row, length, (_, _, string) in zip(np.asarray(tokens), lengths, everything, strict=True):
        assert tuple(row[: int(length)]) == string and not np.any(row[int(length) :])


def inside(string: tuple[int, ...], level: int) -> float:
    """The probability that a node yields the string."""
    if level == DEPTH:
        return LAST[string[0] - 1] if len(string) == 1 else 0.0
    splits = [(string[:cut], string[cut:]) for cut in range(1, len(string))]
    below = sum(inside(left, level + 1) * inside(right, level + 1) for left, right in splits)
    return RULES[0] * below + (RULES[string[0]] if len(string) == 1 else 0.0)


def cky(string: tuple[int, ...]) -> float:
    """The same for the grammar without a bound, by a chart from short spans to long ones."""
    size = len(string)
    chart = {(i, i + 1): RULES[string[i]] for i in range(size)}
    for width in range(2, size + 1):
        for i in range(size - width + 1):
            chart[i, i + width] = RULES[0] * sum(chart[i, j] * chart[j, i + width] for j in range(i + 1, i + width))
    return chart[0, size]


def test_strings():
    """Sums over the trees of a string: the inside algorithm; where no tree reaches the last level, that without a bound."""
    by_string: dict[Any, float] = {}
    for tree, _, string in trees():
        by_string[string] = by_string.get(string, 0.0) + float(np.exp(log_probability(tree)))
    for string, probability in by_string.items():
        close(probability, inside(string, 0))
        if len(string) < DEPTH:
            close(probability, cky(string))
    # The library agrees on the trees one by one (`test_every_tree`), so also on these sums; and on how often they are drawn.
    keys = jax.random.split(KEYS[1], 3000)
    tokens, lengths = jax.jit(jax.vmap(lambda key: grammar.simulate(key, ARGS)[1].get_retval()))(keys)
    drawn = [tuple(row[:length]) for row, length in zip(np.asarray(tokens).tolist(), lengths.tolist(), strict=True)]
    for string, probability in by_string.items():
        error = np.sqrt(probability * (1 - probability) / len(drawn))
        assert abs(drawn.count(string) / len(drawn) - probability) < 4 * error + 1e-9


@slow
def test_strings_without_a_bound():
    """Trees of strings of up to four tokens have at most four levels, so the bound does not matter to them."""
    deep = Recurse(expand, join, end, max_branch=2, max_depth=4)

    def parses(string: tuple[int, ...], level: int, node: int) -> list[dict[Any, int]]:
        address = (f"level_{level}", "production", node, "rule")
        found = [{address: string[0]}] if len(string) == 1 else []
        for cut in range(1, len(string)):
            left = parses(string[:cut], level + 1, 2 * node)
            right = parses(string[cut:], level + 1, 2 * node + 1)
            found += [{address: 0, **one, **other} for one, other in itertools.product(left, right)]
        return found

    addresses = [(f"level_{level}", "production", node, "rule") for level in range(4) for node in range(2**level)]
    addresses += [("level_4", "leaf", node, "token") for node in range(16)]
    score = jax.jit(lambda chm: deep.assess(KEYS[0], chm, ARGS)[1])
    for string in [(1,), (2, 1), (1, 1, 2), (2, 1, 1, 2)]:
        probability = 0.0
        for tree in parses(string, 0, 0):
            chm = choice_map({a: Masked(jnp.int32(tree.get(a, 0)), jnp.array(a in tree)) for a in addresses})
            (tokens, length), one = score(chm)
            assert tuple(np.asarray(tokens)[: int(length)].tolist()) == string
            probability += float(np.exp(one))
        close(probability, cky(string), atol=1e-7)


@pytest.mark.slow
def test_nodes_are_numbered_by_level():
    tree = {ADDRESSES[0]: 0, ADDRESSES[1]: 1, ADDRESSES[2]: 0, ADDRESSES[5]: 1, ADDRESSES[6]: 0}
    tr = of_tree(tree)
    assert there(tr.strip()) == tree
    assert tr["level_1", "production", 1, "rule"].value == 0 and not tr["level_2", "leaf", 1, "token"].flag
    assert tr.get_retval()[0].tolist() == [1, 2, 1, 0] and tr.get_retval()[1] == 3
    close(tr.get_score(), log_probability(tree))
    close(tr.project(select("level_1")), np.log(RULES[1] * RULES[0]))
    close(tr.project(select(("level_2", "leaf", 2))), np.log(LAST[1]))
    _, (retval, score) = grammar.assess(KEYS[0], tr.strip(), ARGS)
    close(score, tr.get_score())


SMALL = {ADDRESSES[0]: 2}
BUSHY = {ADDRESSES[0]: 0, ADDRESSES[1]: 1, ADDRESSES[2]: 0, ADDRESSES[5]: 1, ADDRESSES[6]: 0}
OTHER = {ADDRESSES[0]: 0, ADDRESSES[1]: 0, ADDRESSES[2]: 2, ADDRESSES[3]: 1, ADDRESSES[4]: 1}


@pytest.mark.parametrize("before, after", list(itertools.permutations([SMALL, BUSHY, OTHER], 2)))
def test_update_from_tree_to_tree(before: Any, after: Any):
    """Weight and discard between trees of different shapes, there and back."""
    old = of_tree(before)
    (_, weight, new, discard) = update(KEYS[1], old, given(after), ARGS[1])
    assert there(new.strip()) == after
    close(weight, log_probability(after) - log_probability(before))
    close(new.get_score(), log_probability(after))
    assert there(discard) == before
    (_, back, again, _) = update(KEYS[2], new, discard, ARGS[1])
    assert there(again.strip()) == before
    close(back, -np.float64(weight))


@pytest.mark.slow
def test_update_draws_what_appears():
    old = of_tree(SMALL)
    change = {ADDRESSES[0]: 0, ADDRESSES[2]: 1}
    rules = np.array([0.5, 0.25, 0.25])
    (_, weight, new, discard) = update(KEYS[1], old, given(change), jnp.log(jnp.asarray(rules, jnp.float32)))
    now = there(new.strip())
    assert now[ADDRESSES[0]] == 0 and now[ADDRESSES[2]] == 1 and there(discard) == SMALL
    close(weight, np.log(rules[0] * rules[1]) - np.log(RULES[2]))
    close(new.get_score(), sum(np.log(LAST[v] if "leaf" in a else rules[v]) for a, v in now.items()))
    # A node that stays keeps its choices, though its parent's are given anew.
    (_, weight, new, _) = update(KEYS[1], of_tree(BUSHY), given({ADDRESSES[0]: 0}), ARGS[1])
    assert there(new.strip()) == BUSHY
    close(weight, 0.0)
    # One choice at a time, without flags.
    _, (_, weight, new, discard) = grammar.update(KEYS[1], of_tree(BUSHY), {ADDRESSES[5]: 0}, ARGS)
    close(weight, np.log(LAST[0]) - np.log(LAST[1]))
    assert there(discard) == {ADDRESSES[5]: 1}


@pytest.mark.slow
def test_regenerate():
    old = of_tree(BUSHY)
    regenerate = jax.jit(lambda key, tr, selection: grammar.regenerate(key, tr, selection, ARGS)[1])
    _, weight, new = regenerate(KEYS[1], old, NoneSelection())
    assert there(new.strip()) == BUSHY
    close(weight, 0.0)
    for key in KEYS[:4]:
        _, weight, new = regenerate(key, old, select("level_1"))
        now = there(new.strip())
        assert now[ADDRESSES[0]] == 0
        # Leaves stay where they were and are, with the density that they had.
        assert all(now[a] == BUSHY[a] for a in ADDRESSES[3:] if a in now and a in BUSHY)
        close(weight, 0.0)
        close(new.get_score(), log_probability(now))
        _, weight, new = regenerate(key, old, AllSelection())
        close(weight, 0.0)
        close(new.get_score(), log_probability(there(new.strip())))


# Continuous choices, networks, and other combinators -----------------------------------------------------------------


class Grow(GenModule):
    """Three children at most, as many as a network says; a vector is the value."""

    @nn.compact
    def __call__(self, u):
        count = trace("count", Categorical)(nn.Dense(4)(u))
        value = trace("value", Normal)(u, 0.5)
        return value, jnp.stack([value, 2 * value, -value]), count


class Sum(GenModule):
    @nn.compact
    def __call__(self, value, results, exists):
        total = nn.Dense(2)(jnp.sum(results, axis=0) + value)
        return trace("noise", Normal)(total, 0.3)


class Stop(GenModule):
    @nn.compact
    def __call__(self, u):
        return trace("end", Normal)(nn.Dense(2)(u), 1.5)


deep = Recurse(Grow(), Sum(), Stop(), max_branch=3, max_depth=2)
U = jnp.array([0.5, -1.0])


@pytest.fixture(scope="module")
def variables() -> Any:
    return jax.jit(deep.init)(jax.random.key(0), U)


def dense(variables: Any, name: str, x: Any) -> Any:
    layer = variables["params"][name]["Dense_0"]
    return np.float64(x) @ np.float64(layer["kernel"]) + np.float64(layer["bias"])


def score_by_hand(choices: Any, u: Any, variables: Any) -> tuple[Any, float]:
    """A node's result and the density of all that is there, by recursion."""

    def value(*address: Any) -> Any:
        found = choices[address]
        assert bool(found.flag)
        return np.float64(found.value)

    def norm(x: Any, loc: Any, scale: float) -> float:
        return float(stats.norm.logpdf(x, loc, scale).sum())

    def node(level: int, index: int, u: Any) -> tuple[Any, float]:
        if level == 2:
            end = value("level_2", "leaf", index, "end")
            return end, norm(end, dense(variables, "leaf", u), 1.5)
        at = (f"level_{level}", "production", index)
        logits = dense(variables, "production", u)
        count, own = int(value(*at, "count")), value(*at, "value")
        score = logits[count] - np.logaddexp.reduce(logits) + norm(own, u, 0.5)
        results = np.zeros(2)
        for child, below in list(enumerate([own, 2 * own, -own]))[:count]:
            result, part = node(level + 1, 3 * index + child, below)
            results, score = results + result, score + part
        noise = value(f"level_{level}", "aggregation", index, "noise")
        return noise, score + norm(noise, dense(variables, "aggregation", results + own), 0.3)

    return node(0, 0, np.float64(u))


@functools.cache
def method(name: str) -> Any:
    return jax.jit(lambda variables, *args: getattr(deep.bind(variables), name)(*args)[1])


COUNTS = {("level_0", "production", 0, "count"): 2, ("level_1", "production", 1, "count"): 3}


@slow
def test_a_recursion_with_networks(variables: Any):
    """Density, return value and weights against a recursion in NumPy, also under other arguments and parameters."""
    weight, tr = method("importance")(variables, KEYS[0], choice_map(COUNTS), (U,))
    result, score = score_by_hand(tr.strip(), U, variables)
    close(tr.get_retval(), result)
    close(tr.get_score(), score, atol=1e-3)
    assert tr["level_2", "leaf", 5, "end"].flag and not tr["level_1", "production", 2, "count"].flag
    logits = [
        dense(variables, "production", u) for u in (U, 2 * np.float64(tr["level_0", "production", 0, "value"].value))
    ]
    close(weight, sum(x[n] - np.logaddexp.reduce(x) for x, n in zip(logits, (2, 3), strict=True)))
    other_variables = jax.tree.map(lambda leaf: 0.8 * leaf + 0.05, variables)
    for changed, u in ((variables, U), (other_variables, U + 0.5)):
        _, weight, new, discard = method("update")(changed, KEYS[1], tr, choice_map({}), (u,))
        result, now = score_by_hand(tr.strip(), u, changed)
        close(weight, now - score, atol=1e-3)
        close(new.get_retval(), result)
    _, logpdf = deep.score_params(KEYS[1], tr, other_variables["params"])
    close(logpdf, score_by_hand(tr.strip(), U, other_variables)[1], atol=1e-3)


@pytest.mark.slow
def test_parameters_are_shared_by_all_nodes(no_leaks: Any):
    variables = no_leaks(lambda: deep.init(jax.random.key(0), U))
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "production": {"Dense_0": {"kernel": (2, 4), "bias": (4,)}},
        "aggregation": {"Dense_0": {"kernel": (2, 2), "bias": (2,)}},
        "leaf": {"Dense_0": {"kernel": (2, 2), "bias": (2,)}},
    }


@slow
def test_gradients(variables: Any):
    _, tr = method("importance")(variables, KEYS[0], choice_map(COUNTS), (U,))
    address = ("level_2", "leaf", "end")
    _, gradient = deep.bind(variables).choice_grad(KEYS[1], tr, select(address))
    gradient = gradient[address]
    assert gradient.value.shape == (9, 2) and np.all(np.isfinite(gradient.value))
    np.testing.assert_array_equal(np.any(gradient.value != 0, axis=1), gradient.flag)
    _, by_params = deep.param_grad(KEYS[1], tr, variables["params"])
    for name in ("production", "aggregation", "leaf"):
        shift = np.zeros(variables["params"][name]["Dense_0"]["bias"].shape)
        for i in range(len(shift)):
            step = np.where(np.arange(len(shift)) == i, 1e-4, 0.0)

            def shifted(sign: float, name: str = name, step: Any = step) -> float:
                params = jax.tree.map(np.float64, variables["params"])
                params[name]["Dense_0"]["bias"] = params[name]["Dense_0"]["bias"] + sign * step
                return score_by_hand(tr.strip(), U, {"params": params})[1]

            close(by_params[name]["Dense_0"]["bias"][i], (shifted(1) - shifted(-1)) / 2e-4, atol=2e-3)


@slow
def test_compiled_mapped_and_rematerialised(variables: Any):
    _, tr = method("importance")(variables, KEYS[0], choice_map(COUNTS), (U,))
    us = jnp.stack([U, U + 1.0])
    _, batch = Map(deep, in_axes=0).bind(variables).simulate(KEYS[1], (us,))
    for i in range(2):
        result, score = score_by_hand(jax.tree.map(lambda leaf, i=i: leaf[i], batch.inner.strip()), us[i], variables)
        close(batch.get_retval()[i], result)
        close(batch.inner.get_score()[i], score, atol=1e-3)
    small = Recurse(nn.remat(Grow)(), Sum(), Stop(), max_branch=3, max_depth=2)
    assert jax.tree.map(jnp.shape, small.init(jax.random.key(0), U)) == jax.tree.map(jnp.shape, variables)
    _, (_, weight, new, _) = small.bind(variables).update(KEYS[1], tr.replace(gen_fn=small), {}, (U + 0.5,))
    close(
        weight, score_by_hand(tr.strip(), U + 0.5, variables)[1] - score_by_hand(tr.strip(), U, variables)[1], atol=1e-3
    )


@slow
def test_in_a_branch():
    @gen
    def plain(node, log_rules):
        return jnp.zeros(ROOM, jnp.int32), jnp.int32(0)

    model = Switch((grammar, plain))
    chm = given(BUSHY)
    _, (weight, tr) = model.importance(KEYS[0], chm, (0, *ARGS))
    close(weight, log_probability(BUSHY))
    _, (_, weight, new, discard) = model.update(KEYS[1], tr, {}, (1, *ARGS))
    close(weight, -log_probability(BUSHY))
    assert new.get_retval()[1] == 0 and there(discard) == BUSHY
    _, (_, weight, back, _) = model.update(KEYS[2], new, discard, (0, *ARGS))
    close(weight, log_probability(BUSHY))
    assert there(back.strip()) == BUSHY


def test_one_compiled_update():
    step = jax.jit(lambda key, tr, chm: grammar.update(key, tr, chm, ARGS)[1][2])
    current = of_tree(SMALL)
    for tree in (BUSHY, OTHER, SMALL):
        current = step(KEYS[1], current, given(tree))
        assert there(current.strip()) == tree
    assert step._cache_size() == 1


# Flags and errors ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_children_by_flags_and_a_leaf_alone():
    """A child may be there though one before it is not."""

    @gen
    def right_only(u):
        return u, jnp.stack([u, u]), jnp.array([False, True])

    @gen
    def collect(value, results, exists):
        return (
            jnp.where(exists[1], 10 * results[1], 0)
            + jnp.where(exists[0], 1000, 0)
            + jnp.where(results[0] != 0, 5000, 0)
        )

    @gen
    def seven(u):
        return jnp.int32(7)

    assert Recurse(right_only, collect, seven, 2, 3).simulate(KEYS[0], (1.0,))[1].get_retval() == 7000
    assert Recurse(right_only, collect, seven, 2, 0).simulate(KEYS[0], (1.0,))[1].get_retval() == 7


@pytest.mark.slow
def test_errors():
    @gen
    def leaf(u):
        return u

    @gen
    def add(value, results, exists):
        return jnp.sum(results)

    def with_production(*returned: Any) -> Any:
        @gen
        def production(u):
            return returned[0] if len(returned) == 1 else returned

        @gen
        def outer():
            return trace("tree", Recurse(production, add, leaf, 2, 1))(1.0)

        # Errors come while tracing.
        return jax.eval_shape(lambda key: outer.simulate(key, ()), KEYS[0])

    two = jnp.zeros(2)
    with_production(0.0, two, 1)
    with pytest.raises(ArgumentError, match=r'"tree".*returns \(value, inputs, exists\)'):
        with_production(0.0)
    with pytest.raises(ArgumentError, match=r'"tree".*leading axis of 2: float32\[2\]; got float32\[3\]'):
        with_production(0.0, jnp.zeros(3), 1)
    with pytest.raises(ArgumentError, match=r"got int32\[2\]"):
        with_production(0.0, jnp.zeros(2, jnp.int32), 1)
    for exists in (1.5, jnp.array([True]), jnp.array([1, 0])):
        with pytest.raises(ArgumentError, match="which of its 2 children there are"):
            with_production(0.0, two, exists)

    @gen
    def production(u):
        return u, jnp.stack([u, u]), 1

    @gen
    def counted(value, results, exists):
        return jnp.int32(1)

    with pytest.raises(BranchMismatchError, match=r"aggregation.*returns int32\[\].*float32\[\]"):
        Recurse(production, counted, leaf, 2, 1).simulate(KEYS[0], (1.0,))
    with pytest.raises(ArgumentError, match="root's input; got no arguments"):
        Recurse(production, add, leaf, 2, 1).simulate(KEYS[0], ())
    with pytest.raises(ArgumentError, match="`max_branch` of a Recurse is an integer from 1; got 0"):
        Recurse(production, add, leaf, 0, 1)
    with pytest.raises(ArgumentError, match="`max_depth` of a Recurse is an integer from 0; got -1"):
        Recurse(production, add, leaf, 1, -1)
    with pytest.raises(ArgumentError, match="`Recurse` takes generative functions"):
        Recurse(lambda u: u, add, leaf, 1, 1)
    with pytest.raises(UnvisitedConstraintError, match="level_3"):
        jax.eval_shape(lambda key: grammar.importance(key, {("level_3", "production", 0, "rule"): 1}, ARGS), KEYS[0])

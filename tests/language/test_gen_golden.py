"""The worked example of Gen's description of its interface, as golden numbers.

After https://www.gen.dev/docs/stable/ref/core/gfi/: a ~ B(0.3), b ~ B(0.4); if b, c ~ B(0.6), else d ~ B(0.1); e ~ B(0.7).
Gen runs one of two Python branches; here they are the branches of a `Cond`, under the address "rest".
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gjflax import Bernoulli, Cond, Diff, Masked, gen, select, trace

KEYS = list(jax.random.split(jax.random.key(4), 12))


@gen
def if_b():
    trace("c", Bernoulli)(probs=0.6)


@gen
def if_not_b():
    trace("d", Bernoulli)(probs=0.1)


@gen
def bar():
    trace("a", Bernoulli)(probs=0.3)
    b = trace("b", Bernoulli)(probs=0.4)
    trace("rest", Cond(if_b, if_not_b))(b == 1)
    trace("e", Bernoulli)(probs=0.7)


OLD = {"a": 0, "b": 1, "rest": {"c": 0}, "e": 1}


@pytest.fixture(scope="module")
def old():
    _, (weight, tr) = bar.importance(KEYS[0], OLD, ())
    assert float(weight) == pytest.approx(np.log(0.0784), abs=1e-5)
    return tr


def there(choices):
    """The choices that are there, by address."""
    values = {address: choices.get_subtree(address).get_value() for address in choices.addresses()}
    masks = {address: value for address, value in values.items() if isinstance(value, Masked)}
    certain = {address: int(value) for address, value in values.items() if address not in masks}
    return certain | {address: int(value.value) for address, value in masks.items() if value.flag}


def test_the_score(old):
    assert float(jnp.exp(old.get_score())) == pytest.approx(0.7 * 0.4 * 0.4 * 0.7, abs=1e-6)
    _, (_, score) = bar.assess(KEYS[1], OLD, ())
    assert float(jnp.exp(score)) == pytest.approx(0.0784, abs=1e-6)


def test_updating_both_choices_of_the_branch(old):
    _, (_, weight, new, discard) = bar.update(KEYS[1], old, {"b": 0, "rest": {"d": 1}}, ())
    assert float(jnp.exp(new.get_score())) == pytest.approx(0.0294, abs=1e-6)
    assert float(weight) == pytest.approx(np.log(0.375), abs=1e-5)
    assert there(discard) == {("b",): 1, ("rest", "c"): 0}
    assert there(new.strip()) == {("a",): 0, ("b",): 0, ("rest", "d"): 1, ("e",): 1}


def test_updating_the_condition_alone_draws_what_is_new(old):
    seen = set()
    for key in jax.random.split(KEYS[2], 40):
        _, (_, weight, new, discard) = bar.update(key, old, {"b": 0}, ())
        d = there(new.strip())["rest", "d"]
        seen.add(d)
        # What is drawn does not count; e is as it was.
        assert float(weight) == pytest.approx(np.log(3.75), abs=1e-5)
        assert float(jnp.exp(new.get_score())) == pytest.approx(0.7 * 0.6 * (0.1 if d else 0.9) * 0.7, abs=1e-6)
        assert there(discard) == {("b",): 1, ("rest", "c"): 0}
        if seen == {0, 1}:
            break
    assert seen == {0, 1}


def test_regenerating_counts_only_what_is_kept(old):
    for key in KEYS:
        _, (_, weight, new) = bar.regenerate(key, old, select("a", "b"), ())
        # With b = 1 again c is kept and its density is the same; with b = 0 it is gone. Both count nothing.
        assert float(weight) == 0.0
        assert there(new.strip())["e",] == 1


def test_the_way_back(old):
    _, (_, weight, new, discard) = bar.update(KEYS[1], old, {"b": 0, "rest": {"d": 1}}, ())
    _, (_, back, again, discarded) = bar.update(KEYS[2], new, discard, Diff.mark((), Diff.no_change))
    assert float(back) == pytest.approx(-float(weight), abs=1e-5)
    assert there(again.strip()) == there(old.strip())
    assert there(discarded) == {("b",): 0, ("rest", "d"): 1}

"""Python branches: which choices there are may depend on choices, where these are known.

The first model is the worked example of Gen's documentation of its interface; its numbers are from there.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gjflax import (
    Bernoulli,
    Diff,
    GenModule,
    Map,
    MissingChoiceError,
    Normal,
    UnvisitedConstraintError,
    choice_map,
    gen,
    select,
    trace,
)

KEY = jax.random.key(0)
KEYS = list(jax.random.split(KEY, 24))


@gen
def bar():
    trace("a", Bernoulli)(probs=0.3)
    if trace("b", Bernoulli)(probs=0.4):
        trace("c", Bernoulli)(probs=0.6)
    else:
        trace("d", Bernoulli)(probs=0.1)
    trace("e", Bernoulli)(probs=0.7)


OLD = {"a": 0, "b": 1, "c": 0, "e": 1}


def old_trace() -> Any:
    _, (weight, tr) = bar.importance(KEY, OLD, ())
    np.testing.assert_allclose(np.exp(weight), 0.0784, rtol=1e-5)
    np.testing.assert_allclose(np.exp(tr.get_score()), 0.0784, rtol=1e-5)
    return tr


def test_update_across_the_branch_with_the_new_choice_given():
    _, (_, weight, new, discard) = bar.update(KEY, old_trace(), {"b": 0, "d": 1}, ())
    assert new.strip().to_dict() == {"a": 0, "b": 0, "d": 1, "e": 1}
    np.testing.assert_allclose(np.exp(new.get_score()), 0.0294, rtol=1e-5)
    np.testing.assert_allclose(weight, np.log(0.375), rtol=1e-5)
    assert discard.to_dict() == {"b": 1, "c": 0}


def test_update_across_the_branch_with_the_new_choice_drawn():
    drawn = set()
    for key in KEYS:
        _, (_, weight, new, discard) = bar.update(key, old_trace(), {"b": 0}, ())
        np.testing.assert_allclose(weight, np.log(3.75), rtol=1e-5)
        assert discard.to_dict() == {"b": 1, "c": 0}
        drawn.add(int(new["d"]))
        kept = new.strip().filter(~select("d"))
        assert kept.to_dict() == {"a": 0, "b": 0, "e": 1}
        np.testing.assert_allclose(np.exp(new.get_score()), 0.0294 if new["d"] else 0.2646, rtol=1e-5)
    assert drawn == {0, 1}


def test_update_and_back():
    tr = old_trace()
    _, (_, weight, new, discard) = bar.update(KEY, tr, {"b": 0, "d": 1}, ())
    _, (_, back_weight, back, back_discard) = bar.update(KEY, new, discard, ())
    np.testing.assert_allclose(back_weight, -weight, rtol=1e-5)
    assert back.strip() == tr.strip()
    assert back_discard.to_dict() == {"b": 0, "d": 1}
    np.testing.assert_allclose(back.get_score(), tr.get_score(), rtol=1e-6)


def test_regenerate_weighs_nothing_that_is_new_or_gone():
    branches = set()
    for key in KEYS:
        _, (_, weight, new) = bar.regenerate(key, old_trace(), select("a", "b"), ())
        assert weight == 0.0
        assert new["e"] == 1
        branches.add(int(new["b"]))
        if new["b"]:
            assert new["c"] == 0 and "d" not in new
        else:
            assert "d" in new and "c" not in new
    assert branches == {0, 1}


@pytest.mark.parametrize("given", [{"b": 1}, {"b": 1, "c": 1}, {"b": 0, "d": 0, "a": 1}, {"e": 0}, {}], ids=str)
def test_importance_weighs_what_was_given(given: dict[str, int]):
    probabilities = {"a": 0.3, "b": 0.4, "c": 0.6, "d": 0.1, "e": 0.7}
    want = sum(np.log(probabilities[name] if value else 1 - probabilities[name]) for name, value in given.items())
    for key in KEYS[:6]:
        _, (weight, tr) = bar.importance(key, given, ())
        np.testing.assert_allclose(weight, want, rtol=1e-5, atol=1e-6)
        assert all(tr[name] == value for name, value in given.items())
        assert ("c" in tr) == bool(tr["b"]) and ("d" in tr) != bool(tr["b"])


def test_assess_needs_the_choices_of_the_branch_and_no_others():
    _, (_, score) = bar.assess(KEY, OLD, ())
    np.testing.assert_allclose(np.exp(score), 0.0784, rtol=1e-5)
    with pytest.raises(UnvisitedConstraintError, match='"d"'):
        bar.assess(KEY, OLD | {"d": 1}, ())
    with pytest.raises(MissingChoiceError, match='"c"'):
        bar.assess(KEY, {"a": 0, "b": 1, "d": 1, "e": 1}, ())
    with pytest.raises(UnvisitedConstraintError, match='"c"'):
        bar.update(KEY, old_trace(), {"b": 0, "c": 1}, ())


# Branches of more than one choice ------------------------------------------------------------------------------------


@gen
def pair(x):
    first = trace("first", Normal)(x, 1.0)
    return trace(("second", "deep"), Normal)(first, 2.0)


@gen
def tree(branch, x):
    if branch:
        y = trace("left", pair)(x)
        trace("points", Map(Normal, in_axes=(0, None)))(jnp.arange(3.0), 1.0)
    else:
        y = trace(("right", "only"), Normal)(x, 3.0)
    return trace("shared", Normal)(y, 0.5)


def norm(value: Any, mean: Any, scale: Any) -> Any:
    return np.sum(jax.scipy.stats.norm.logpdf(value, mean, scale))


def test_a_branch_of_the_arguments_takes_whole_subtrees_along():
    key, tr = tree.simulate(KEY, (True, 0.5))
    key, (_, weight, new, discard) = tree.update(key, tr, {}, (False, 0.7))
    assert sorted(new.strip().addresses()) == [("right", "only"), ("shared",)]
    assert discard == tr.strip().filter(~select("shared"))
    want = norm(new["shared"], new["right", "only"], 0.5) - tr.get_score()
    np.testing.assert_allclose(weight, want, rtol=1e-4)
    np.testing.assert_allclose(new.get_score(), want + tr.get_score() + norm(new["right", "only"], 0.7, 3.0), rtol=1e-4)
    # What comes back is given whole, as the discard has it.
    _, (_, back_weight, back, _) = tree.update(key, new, discard, (True, 0.5))
    np.testing.assert_allclose(back_weight, tr.get_score() - new.get_score(), rtol=1e-4)
    assert back.strip() == tr.strip()


def test_regenerate_over_a_branch_of_the_arguments():
    key, tr = tree.simulate(KEY, (True, 0.5))
    _, (_, weight, new) = tree.regenerate(key, tr, select("left"), (False, 0.7))
    want = norm(tr["shared"], new["right", "only"], 0.5) - norm(tr["shared"], tr["left", "second", "deep"], 0.5)
    np.testing.assert_allclose(weight, want, rtol=1e-4)
    assert new["shared"] == tr["shared"]


@gen
def loop(count):
    total = 0.0
    for i in range(count):
        total = trace(f"z{i}", Normal)(total, 1.0)
    return trace("end", Normal)(total, 0.5)


@pytest.mark.parametrize("old, new", [(4, 2), (2, 4), (3, 3), (2, 0)])
def test_a_loop_of_another_length(old: int, new: int):
    key, tr = loop.simulate(KEY, (old,))
    given = {"z3": 0.25} if new == 4 else {}
    _, (_, weight, longer, discard) = loop.update(key, tr, given, (new,))
    assert set(longer.strip().names()) == {f"z{i}" for i in range(new)} | {"end"}
    assert set(discard.names()) == {f"z{i}" for i in range(new, old)}

    def terms(t, count):
        means = [0.0, *(t[f"z{i}"] for i in range(count))]
        scores = {f"z{i}": norm(t[f"z{i}"], means[i], 1.0) for i in range(count)}
        return scores | {"end": norm(t["end"], means[-1], 0.5)}

    after, before = terms(longer, new), terms(tr, old)
    fresh = [f"z{i}" for i in range(old, new) if f"z{i}" not in given]
    want = sum(after.values()) - sum(before.values()) - sum(after[name] for name in fresh)
    np.testing.assert_allclose(weight, want, rtol=1e-4, atol=1e-5)
    _, (_, weight, redrawn) = loop.regenerate(key, tr, select("z0"), (new,))
    kept = [f"z{i}" for i in range(1, min(old, new))] + ["end"]
    after = terms(redrawn, new)
    want = sum(after[name] - before[name] for name in kept)
    np.testing.assert_allclose(weight, want, rtol=1e-4, atol=1e-5)


def test_two_distributions_at_one_address():
    """The value is kept, and scored by the distribution that now draws it."""

    @gen
    def model(wide):
        return trace("x", Normal)(0.0, 2.0) if wide else trace("x", Normal)(0.0, 1.0)

    key, tr = model.simulate(KEY, (True,))
    _, (_, weight, new, discard) = model.update(key, tr, {}, (Diff.unknown_change(False),))
    np.testing.assert_allclose(weight, norm(tr["x"], 0.0, 1.0) - norm(tr["x"], 0.0, 2.0), rtol=1e-5)
    assert new["x"] == tr["x"] and discard.is_empty()


def test_branches_on_static_values_compile():
    """A Python value that is known while tracing may branch under jit; a traced choice may not."""
    compiled = jax.jit(lambda key: tree.simulate(key, (False, 0.7)))
    _, tr = compiled(KEY)
    assert sorted(tr.strip().addresses()) == [("right", "only"), ("shared",)]
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(bar.simulate)(KEY, ())


def test_a_branch_with_parameters():
    class Either(GenModule):
        def setup(self):
            self.left, self.right = nn.Dense(1), nn.Dense(1)

        def __call__(self, branch, x):
            mean = self.left(x) if branch else self.right(x)
            return trace("left" if branch else "right", Normal)(mean, 1.0)

    model, x = Either(), jnp.ones(2)
    variables = {"params": {**model.init(KEY, True, x)["params"], **model.init(KEY, False, x)["params"]}}
    assert set(variables["params"]) == {"left", "right"}
    key, tr = model.bind(variables).simulate(KEY, (True, x))
    _, (_, weight, new, discard) = model.bind(variables).update(key, tr, {"right": jnp.zeros(1)}, (False, x))
    mean = {name: x @ p["kernel"] + p["bias"] for name, p in variables["params"].items()}
    want = norm(np.zeros(1), mean["right"], 1.0) - norm(tr["left"], mean["left"], 1.0)
    np.testing.assert_allclose(weight, want, rtol=1e-4)
    assert discard == choice_map({"left": tr["left"]})

"""`Diff`: arguments and what is known of how they changed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gjflax import Diff, Map, Normal, gen, trace


def test_marks():
    unchanged, unknown = Diff.no_change(1.0), Diff.unknown_change(2.0)
    assert unchanged.value == 1.0 and unchanged.change is Diff.no_change
    assert unknown.value == 2.0 and unknown.change is Diff.unknown_change
    assert Diff(3.0).change is Diff.unknown_change
    assert Diff.no_change(unknown).value == 2.0, "a mark of a mark is the last one"
    assert repr(Diff.no_change) == "no_change"
    assert [d.change for d in Diff.mark((1.0, 2.0), Diff.no_change)] == [Diff.no_change] * 2


def test_primal_takes_all_marks_off():
    tree = (Diff.no_change({"a": 1.0}), 2.0, [Diff.unknown_change(3.0), None])
    assert Diff.primal(tree) == ({"a": 1.0}, 2.0, [3.0, None])
    assert Diff.primal(5.0) == 5.0


@pytest.mark.parametrize(
    "tree, expected",
    [
        ((), True),
        ((Diff.no_change(1.0),), True),
        ((Diff.no_change({"a": 1.0, "b": 2.0}), [Diff.no_change(2.0)]), True),
        ((Diff.no_change(1.0), Diff.unknown_change(1.0)), False),
        ((Diff.no_change(1.0), 1.0), False),
        ((1.0,), False),
    ],
)
def test_unchanged_is_when_everything_is_marked_so(tree, expected):
    assert Diff.is_unchanged(tree) is expected


def test_marks_pass_through_jit():
    @jax.jit
    def double(diff):
        assert diff.change is Diff.no_change
        return Diff.unknown_change(2 * diff.value)

    out = double(Diff.no_change(jnp.arange(3.0)))
    np.testing.assert_array_equal(out.value, [0.0, 2.0, 4.0])
    assert out.change is Diff.unknown_change


def test_a_distribution_knows_what_did_not_change():
    key, tr = Normal.simulate(jax.random.key(0), (0.0, 1.0))
    _, (retdiff, _, same, _) = Normal.update(key, tr, {}, (Diff.no_change(0.0), Diff.no_change(1.0)))
    assert retdiff.change is Diff.no_change and same is tr
    # A value that is kept did not change, whatever its arguments did; only its score has.
    _, (retdiff, weight, _, _) = Normal.update(key, tr, {}, (Diff.no_change(0.0), Diff.unknown_change(2.0)))
    assert retdiff.change is Diff.no_change and weight != 0.0
    _, (retdiff, _, _, _) = Normal.update(key, tr, 1.0, (Diff.no_change(0.0), Diff.no_change(1.0)))
    assert retdiff.change is Diff.unknown_change and retdiff.value == 1.0


def test_new_values_of_arguments_count_whatever_their_mark_in_a_list_of_marks():
    """A mark on one argument says nothing of another."""

    @gen
    def model(x, scale):
        return trace("y", Normal)(x, scale)

    for subject in (model, Map(model, in_axes=(0, None))):
        x = jnp.arange(3.0)
        key, tr = subject.simulate(jax.random.key(1), (x, 1.0))
        _, (_, weight, new, _) = subject.update(key, tr, {}, (Diff.no_change(x), Diff.unknown_change(2.0)))
        want = np.sum(jax.scipy.stats.norm.logpdf(tr["y"], x, 2.0) - jax.scipy.stats.norm.logpdf(tr["y"], x, 1.0))
        np.testing.assert_allclose(weight, want, rtol=1e-5)
        assert new.get_args()[1] == 2.0

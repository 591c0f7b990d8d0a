"""Indices of elements that repeat: an error where they are known, a weight of NaN where they are traced.

Beside each stand indices that do not repeat, whose weight is that of densities written by hand in SciPy.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gjflax import ArgumentError, CallAt, ChoiceMapError, Diff, Map, Normal, Unfold, VectorChoiceMap, gen, trace

KEY = jax.random.key(0)
OLD = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], np.float32)
MEANS = np.linspace(-1.0, 1.0, 6).astype(np.float32)
VALUES = np.array([2.0, -1.0], np.float32)
REPEATED, DISTINCT = (1, 1), (4, 1)


def logpdf(x, mean):
    return stats.norm.logpdf(np.asarray(x, np.float64), np.asarray(mean, np.float64), 1.0)


def written(indices):
    new = OLD.copy()
    new[list(indices)] = VALUES
    return new


def change(density, indices):
    return density(written(indices)) - density(OLD)


@gen
def walk(time, position):
    return trace("x", Normal)(position, 1.0)


def walked(x):
    return logpdf(x, np.concatenate([[0.0], x[:-1]])).sum()


normals, chain = Map(Normal, in_axes=(0, None)), Unfold(walk, 6)


def of_map(indices, args):
    _, (_, tr) = normals.importance(KEY, jnp.asarray(OLD), (MEANS, 1.0))
    return normals.update(KEY, tr, VectorChoiceMap(indices, jnp.asarray(VALUES)), args)[1][1]


def of_map_in_part(indices):
    return normals.importance(KEY, VectorChoiceMap(indices, jnp.asarray(VALUES)), (MEANS, 1.0))[1][0]


def of_chain(indices, args, extra=()):
    _, (_, tr) = chain.importance(KEY, {"x": jnp.asarray(OLD)}, (jnp.int32(6), 0.0))
    # More than a few steps are updated in one pass over all.
    values = jnp.concatenate([VALUES, OLD[np.array(extra, int)]])
    indices = jnp.concatenate([indices, jnp.array(extra, indices.dtype)])
    return chain.update(KEY, tr, VectorChoiceMap(indices, {"x": values}), args(tr))[1][1]


def unchanged(tr):
    return Diff.mark(tr.get_args(), Diff.no_change)


def of_arguments(indices):
    _, (_, tr) = normals.importance(KEY, jnp.asarray(OLD), (MEANS, 1.0))
    means = jnp.asarray(MEANS).at[indices].add(1.0)
    return normals.update(KEY, tr, {}, (Diff.of_elements(means, indices), Diff.no_change(1.0)))[1][1]


def moved_by(indices):
    means = MEANS.copy()
    means[list(indices)] += 1.0
    return logpdf(OLD, means).sum() - logpdf(OLD, MEANS).sum()


def of_nested(indices, args):
    grid = Map(normals, in_axes=(0, None))
    means = np.stack([MEANS, 2 * MEANS])
    _, (_, tr) = grid.importance(KEY, jnp.stack([OLD, OLD]), (means, 1.0))
    given = VectorChoiceMap(jnp.array([1]), VectorChoiceMap(indices[None], jnp.asarray(VALUES)[None]))
    return grid.update(KEY, tr, given, args(tr))[1][1]


def of_map_in_chain(indices):
    """Steps that are given nothing have no indices that repeat."""

    @gen
    def several(time, state):
        trace("x", normals)(MEANS, 1.0)
        return state

    given = {"x": VectorChoiceMap(indices[None], jnp.asarray(VALUES)[None])}
    return Unfold(several, 3).importance(KEY, VectorChoiceMap(jnp.array([2]), given), (3, 0.0))[1][0]


def of_call(indices):
    """What is given at other keys is ignored, so only the repetition is wrong."""
    return CallAt(Normal).importance(KEY, VectorChoiceMap(indices, jnp.asarray(VALUES)), (0.5, 1.0, jnp.int32(1)))[1][0]


def in_part(indices):
    return logpdf(VALUES, MEANS[list(indices)]).sum()


CASES = {
    "map, some": (lambda i: of_map(i, Diff.mark((MEANS, 1.0), Diff.no_change)), lambda x: logpdf(x, MEANS).sum()),
    "map, all": (lambda i: of_map(i, (MEANS, 1.0)), lambda x: logpdf(x, MEANS).sum()),
    "map, importance": (of_map_in_part, in_part),
    "chain, some": (lambda i: of_chain(i, unchanged), walked),
    "chain, many": (lambda i: of_chain(i, unchanged, (0, 2, 3)), walked),
    "chain, all": (lambda i: of_chain(i, lambda tr: tr.get_args()), walked),
    "arguments": (of_arguments, moved_by),
    "nested, some": (lambda i: of_nested(i, unchanged), lambda x: logpdf(x, 2 * MEANS).sum()),
    "nested, all": (lambda i: of_nested(i, lambda tr: tr.get_args()), lambda x: logpdf(x, 2 * MEANS).sum()),
    "map in chain": (of_map_in_chain, in_part),
    "call": (of_call, lambda indices: logpdf(VALUES[1], 0.5)),
}


@pytest.mark.parametrize("case", CASES)
def test_indices_that_repeat(case: str):
    weight, expected = CASES[case]
    compiled = jax.jit(weight)
    assert np.isnan(compiled(jnp.array(REPEATED)))
    wanted = expected(DISTINCT) if expected in (in_part, moved_by) or case == "call" else change(expected, DISTINCT)
    np.testing.assert_allclose(compiled(jnp.array(DISTINCT)), wanted, rtol=1e-5)
    np.testing.assert_allclose(weight(jnp.array(DISTINCT)), wanted, rtol=1e-5)
    with pytest.raises((ChoiceMapError, ArgumentError), match="must not repeat"):
        weight(jnp.array(REPEATED))


def test_assess_of_steps_that_are_given_twice():
    """Of a length that is not known, what is given in part may be all there is."""

    def score(indices, length):
        return chain.assess(KEY, VectorChoiceMap(indices, {"x": jnp.asarray(VALUES)}), (length, 0.0))[1][1]

    compiled = jax.jit(score)
    np.testing.assert_allclose(compiled(jnp.array([0, 1]), 2), walked(VALUES), rtol=1e-5)
    assert np.isnan(compiled(jnp.array([0, 0]), 1)) and np.isnan(compiled(jnp.array([0, 6]), 1))


def test_what_a_compiled_function_made_is_checked_where_it_is_used():
    chm = jax.jit(lambda i: VectorChoiceMap(i, jnp.asarray(VALUES)))(jnp.array(REPEATED))
    with pytest.raises(ChoiceMapError, match=r"\[1, 1\].*must not repeat"):
        normals.importance(KEY, chm, (MEANS, 1.0))
    with pytest.raises(ChoiceMapError, match="must not repeat"):
        VectorChoiceMap(jnp.array([0, 1]), VectorChoiceMap(jnp.array([[0, 1], [2, 2]]), jnp.zeros((2, 2))))
    # One that repeats an index of another vector does not repeat.
    VectorChoiceMap(jnp.array([0, 1]), VectorChoiceMap(jnp.array([[0, 1], [0, 1]]), jnp.zeros((2, 2))))


def test_a_vector_that_some_elements_lack_has_no_indices_that_repeat():
    @gen
    def both():
        trace("a", Normal)(0.0, 1.0)
        trace("b", normals)(MEANS, 1.0)

    def weight(first, second, inside):
        one = VectorChoiceMap(first[None], {"a": jnp.array([0.5])})
        other = {"b": VectorChoiceMap(inside[None], jnp.asarray(VALUES)[None])}
        given = one.overwrite(VectorChoiceMap(second[None], other))
        return Map(both, repeats=3).importance(KEY, given, ())[1][0]

    got = jax.jit(weight)(jnp.int32(0), jnp.int32(2), jnp.array(DISTINCT))
    np.testing.assert_allclose(got, in_part(DISTINCT) + logpdf(0.5, 0.0), rtol=1e-5)


def test_one_index_costs_no_sorting_and_many_no_more_than_that():
    _, tr = normals.simulate(KEY, (MEANS, 1.0))

    def weight(indices):
        given = VectorChoiceMap(indices, jnp.zeros(indices.shape))
        return normals.update(KEY, tr, given, Diff.mark((MEANS, 1.0), Diff.no_change))[1][1]

    def sorted_sizes(indices):
        return re.findall(r"\w+\[(\d+)\] = sort\[", str(jax.make_jaxpr(weight)(indices)))

    assert sorted_sizes(jnp.array([2])) == []
    assert sorted_sizes(jnp.array([2, 3])) == ["2"]


@pytest.mark.parametrize("indices", [[-1], [2, -3], [-1, 4], [7]])
def test_indices_of_no_element_in_a_difference(indices: list[int]) -> None:
    with pytest.raises(ArgumentError, match="from 0 to 4"):
        Diff.of_elements(jnp.arange(5.0), jnp.array(indices))

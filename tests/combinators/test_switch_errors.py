"""Bad input of `Switch` is an error with a name, at trace time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinators.branches import KEY, close, minus, norm, plus
from scipy import stats

from gjflax import (
    ArgumentError,
    Bernoulli,
    BranchMismatchError,
    Diff,
    Map,
    Masked,
    MissingChoiceError,
    NoneSelection,
    Normal,
    Switch,
    UnvisitedConstraintError,
    gen,
    trace,
)


@gen
def float_retval(x):
    return trace("y", Normal)(x, 1.0)


@gen
def vector_choice(x):
    return trace("y", Normal)(jnp.zeros(2) + x, 1.0)[0]


@gen
def pair_retval(x):
    return trace("y", Normal)(x, 1.0), jnp.zeros(3)


@gen
def below_y(x):
    return trace(("y", "deep"), Normal)(x, 1.0)


@gen
def mapped_y(x):
    return jnp.sum(trace("y", Map(Normal, repeats=3))(x, 1.0))


@gen
def longer_y(x):
    return jnp.sum(trace("y", Map(Normal, repeats=4))(x, 1.0))


@gen
def whole_y(x):
    return trace("y", Bernoulli)(logits=x).astype(jnp.float32)


@pytest.mark.parametrize(
    "index, match",
    [
        (0.0, r"at \"s\" is one integer.*0\.0"),
        (True, "truth value use `Cond`"),
        (jnp.array(0.0), r"float32\[\]"),
        (jnp.array(False), r"bool\[\]"),
        (jnp.zeros(2, int), r"int32\[2\].*use `Map`"),
        ("0", "'0'"),
        (None, "None"),
        (2, "is 2, and it has 2 branches"),
        (-1, "is -1, and it has 2 branches"),
        (np.int32(5), "is 5, and it has 2 branches"),
    ],
)
def test_a_wrong_index(index: Any, match: str):
    switch = Switch((plus, minus))
    with pytest.raises(ArgumentError, match=match):
        gen(lambda: trace("s", switch)(index, 0.5)).simulate(KEY, ())
    _, tr = switch.simulate(KEY, (0, 0.5))
    for call in (
        lambda: switch.importance(KEY, {}, (index, 0.5)),
        lambda: switch.assess(KEY, tr.strip(), (index, 0.5)),
        lambda: switch.update(KEY, tr, {}, (index, 0.5)),
        lambda: switch.regenerate(KEY, tr, NoneSelection(), (index, 0.5)),
        lambda: switch.constrain(tr.strip(), (index, 0.5)),
    ):
        with pytest.raises(ArgumentError):
            call()


@pytest.mark.parametrize(
    "other, match",
    [
        (pair_retval, r"return different things: branch 0 returns float32\[\], branch 1 \(float32\[\], float32\[3\]\)"),
        (vector_choice, r'\("s", "y"\): branch 0 has float32\[\], branch 1 float32\[2\]'),
        (below_y, r'\("s", "y"\): branch 0 has a single value, branch 1 choices below "deep"'),
        (mapped_y, r'\("s", "y"\): branch 0 has a single value, branch 1 a vector of 3 choices'),
        (whole_y, r'\("s", "y"\): branch 0 has float32\[\], branch 1 int32\[\]'),
    ],
)
def test_branches_that_do_not_fit(other: Any, match: str):
    switch = Switch((float_retval, other))
    with pytest.raises(BranchMismatchError, match=match):
        gen(lambda: trace("s", switch)(0, 0.5)).simulate(KEY, ())
    with pytest.raises(BranchMismatchError):
        jax.eval_shape(lambda i: switch.importance(KEY, {}, (i, 0.5)), 0)
    with pytest.raises(BranchMismatchError):
        switch.init(KEY, 0, 0.5)


def test_maps_of_different_lengths_do_not_fit():
    with pytest.raises(BranchMismatchError, match="a vector of 3 choices, branch 1 a vector of 4 choices"):
        Switch((mapped_y, longer_y)).simulate(KEY, (0, 0.5))


def test_retvals_that_do_not_fit_in_assess():
    with pytest.raises(BranchMismatchError, match="return different things"):
        Switch((float_retval, pair_retval)).assess(KEY, {"y": 1.0}, (0, 0.5))


def test_misspelt_constraints():
    switch = Switch((plus, minus))
    _, tr = switch.simulate(KEY, (0, 0.5))
    wrong = {"onlu": 1.0}
    for call in (
        lambda **options: switch.importance(KEY, wrong, (0, 0.5), **options),
        lambda **options: switch.assess(KEY, tr.strip().merge(wrong), (0, 0.5), **options),
        lambda **options: switch.update(KEY, tr, wrong, (0, 0.5), **options),
        lambda **options: switch.update(KEY, tr, wrong, (Diff.no_change(0), 0.5), **options),
    ):
        with pytest.raises(UnvisitedConstraintError, match='"onlu".*any branch.*Did you mean "only"'):
            call()
        call(strict=False)
    with pytest.raises(UnvisitedConstraintError, match='"onlu"'):
        switch.constrain(tr.strip().merge(wrong), (0, 0.5))


def test_a_constraint_of_a_branch_that_is_known_not_to_be_taken():
    switch = Switch((plus, minus))
    _, tr = switch.simulate(KEY, (1, 0.5))
    with pytest.raises(UnvisitedConstraintError, match='"only".*not a choice of branch 1.*that one is taken'):
        switch.importance(KEY, {"only": 1.0}, (1, 0.5))
    with pytest.raises(UnvisitedConstraintError, match="that one is taken"):
        switch.update(KEY, tr, {"only": 1.0}, (1, 0.5))
    with pytest.raises(UnvisitedConstraintError, match="that one is taken"):
        switch.assess(KEY, {"only": 1.0, "y": 1.0}, (1, 0.5))
    # Where it is not known, the constraint holds if the branch is taken.
    for index in (0, 1):
        _, (weight, new) = switch.importance(KEY, {"only": 1.0}, (jnp.int32(index), 0.5))
        close(weight, 0.0 if index else stats.expon.logpdf(1.0, scale=1 / 1.5))


def test_a_choice_that_is_missing():
    switch = Switch((plus, minus))
    with pytest.raises(MissingChoiceError, match='"only"'):
        switch.assess(KEY, {"y": 1.0}, (0, 0.5))
    with pytest.raises(MissingChoiceError, match='"y"'):
        switch.assess(KEY, {"only": 1.0}, (jnp.int32(0), 0.5))
    _, (_, score) = switch.assess(KEY, {"y": 1.0}, (1, 0.5))
    close(score, norm(1.0, -0.5, 2.0))
    for compile_ in (lambda f: f, jax.jit):
        run = compile_(lambda index: switch.assess(KEY, {"y": 1.0}, (index, 0.5))[1])
        retval, score = run(jnp.int32(1))
        close(score, norm(1.0, -0.5, 2.0))
        assert retval == 1.0
        assert np.isnan(run(jnp.int32(0))[1])
    # A choice that is there by a flag that is false is missing too.
    _, (_, score) = switch.assess(KEY, {"y": 1.0, "only": Masked(1.0, jnp.array(False))}, (jnp.int32(0), 0.5))
    assert np.isnan(score)


def test_fields_that_are_wrong():
    with pytest.raises(ArgumentError, match=r"write Switch\(\(first, second\)\)"):
        Switch(plus)
    with pytest.raises(ArgumentError, match="a tuple of generative functions"):
        Switch(())
    with pytest.raises(ArgumentError, match="Is @gen missing"):
        Switch((plus, lambda x: x))
    with pytest.raises(ArgumentError, match="takes the index as its first argument"):
        plus_only = Switch((plus,))
        plus_only.simulate(KEY, ())
    own = Switch((plus, minus), own_arguments=True)
    with pytest.raises(ArgumentError, match="one tuple of arguments for each branch, 2 in all; got 1"):
        own.simulate(KEY, (0, (0.5,)))
    with pytest.raises(ArgumentError, match="one tuple of arguments for each branch.*got float"):
        own.simulate(KEY, (0, 0.5, 0.5))

"""Random programs under random calls: what gjflax says, against an oracle that knows only densities.

The slow tests run ten thousand programs; ``GJFLAX_SWEEP_PROGRAMS`` sets how many.
"""

from __future__ import annotations

import os
import random

import pytest
from sweep.generate import COMBINATORS, Writer
from sweep.interpreter import compiled, eager
from sweep.laws import LAWS
from sweep.sweeping import Tally, kind_of, sweep
from sweep.writers import COMMON, EVERY, default_dialect

PROGRAMS = int(os.environ.get("GJFLAX_SWEEP_PROGRAMS", "10000"))
SHARDS = 50

# The chance that a true sampler fails is this number for each family and method, of which there are about a hundred.
LEAST_P_VALUE = 1e-7


def draws_follow_their_distributions(tally: Tally) -> None:
    unlikely = {key: found for key, found in tally.draws.p_values().items() if found[1] < LEAST_P_VALUE}
    assert not unlikely


@pytest.mark.parametrize("shard", range(4))
def test_the_laws_hold(shard: int):
    tally = sweep(default_dialect(), 50, seed=shard)
    assert tally.programs >= 50
    assert len(tally.texts) >= 45
    draws_follow_their_distributions(tally)


def test_every_combinator_and_distribution_is_written():
    """In as many programs as the default sweep has."""
    seen = set()
    for seed in range(200):
        writer = Writer(random.Random(seed).randrange, default_dialect())
        seen |= {kind_of(node) for node in writer.program().walk()}
    assert len(seen) == len(COMBINATORS) + len(COMMON) + len(("Body",)), seen


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_the_laws_hold_of_many_programs(shard: int):
    """One in five is as large as in the default sweep; of the others, which cost a fraction, there are more."""
    programs = PROGRAMS // SHARDS + (shard < PROGRAMS % SHARDS)
    size = {} if shard % 5 == 0 else {"sites": 2, "depth": 1}
    dialect = default_dialect(families=(*COMMON, *COMMON, *EVERY), **size)
    tally = sweep(dialect, programs, seed=1000 + shard, calls=2, shrink=False)
    draws_follow_their_distributions(tally)
    if programs >= 200 and not size:
        assert set(tally.calls) == {*LAWS, "simulate"}
        # A rare family may be missing.
        assert len(tally.nodes) >= len(COMBINATORS) + len(EVERY) + len(("Body",)) - 2, tally.nodes


SMALL = {"families": ("Normal", "Bernoulli", "Exponential"), "sites": 3, "depth": 2, "vectors": False}


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("runner", [eager, compiled])
def test_the_laws_hold_where_jax_runs_the_programs(runner):
    """As above, without the interpreter: operation by operation, and compiled."""
    sweep(default_dialect(**SMALL), 25, seed=3, calls=2, shrink=False, runner=runner)

"""The sweep: many programs, each under some calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies as st
from sweep.draws import Draws
from sweep.generate import Dialect, Writer
from sweep.interpreter import interpreted
from sweep.laws import LAWS, Runner, Session
from sweep.programs import Node


def kind_of(node: Node) -> str:
    """What a tally calls a node."""
    return getattr(node, "family", type(node).__name__)


@dataclasses.dataclass
class Tally:
    """What a sweep has covered.

    Attributes:
      programs: how many programs ran.
      texts: a number for each text of a program, so that those that differ can be counted.
      calls: how often each law was tried.
      nodes: in how many programs each kind of node was.
      draws: the fresh values.
    """

    programs: int = 0
    texts: set[int] = dataclasses.field(default_factory=set)
    calls: dict[str, int] = dataclasses.field(default_factory=dict)
    nodes: dict[str, int] = dataclasses.field(default_factory=dict)
    draws: Draws = dataclasses.field(default_factory=Draws)

    def add(self, session: Session, calls: list[str]) -> None:
        """Count a program."""
        self.programs += 1
        self.texts.add(hash(session.text))
        for call in calls:
            self.calls[call] = self.calls.get(call, 0) + 1
        for name in {kind_of(node) for node in session.node.walk()}:
            self.nodes[name] = self.nodes.get(name, 0) + 1


def run_program(
    decide: Callable[[int], int], dialect: Dialect, calls: int, tally: Tally, runner: Runner = interpreted
) -> None:
    """Write one program, and call its interface."""
    writer = Writer(decide, dialect)
    session = Session(writer.program(), writer, tally.draws, runner)
    session.simulate()
    made = [LAWS[decide(len(LAWS))] for _ in range(calls)]
    for law in made:
        getattr(session, law)()
    tally.add(session, ["simulate", *made])


def sweep(
    dialect: Dialect,
    programs: int,
    seed: int,
    calls: int = 4,
    shrink: bool = True,
    tally: Tally | None = None,
    runner: Runner = interpreted,
) -> Tally:
    """Run so many programs. A failure is shrunk, and raised with the program's text.

    Args:
      dialect: which programs.
      programs: how many.
      seed: of the programs.
      calls: how many calls after `simulate` each program gets.
      shrink: whether a failure is made small before it is raised.
      tally: what to add to.
      runner: how the calls are run.
    """
    tally = Tally() if tally is None else tally
    phases = [hypothesis.Phase.generate] + ([hypothesis.Phase.shrink] if shrink else [])

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=programs,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
        print_blob=False,
        report_multiple_bugs=False,
    )
    @hypothesis.given(st.randoms(use_true_random=False))
    def run(random: Any) -> None:
        run_program(random.randrange, dialect, calls, tally, runner)

    run()
    return tally

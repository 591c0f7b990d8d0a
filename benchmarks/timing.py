"""Interleaved timing: the same rounds for all candidates, and medians of ratios inside a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def interleaved(candidates: Mapping[str, Callable[[], Any]], rounds: int = 15) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for count in range(rounds + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if count:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Mapping[str, list[float]], of: str, to: str) -> float:
    """The median over rounds of one candidate's time divided by another's."""
    return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))

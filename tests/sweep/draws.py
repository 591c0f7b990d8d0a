"""Fresh values: that no two share their randomness, and that all together follow their distributions.

A value from a continuous distribution becomes uniform on (0, 1) by its distribution function, at the arguments that the
oracle computed; one of a discrete distribution by a uniform number between the distribution function below it and at
it. So the draws of all programs are one sample for each family and method.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from scipy import stats
from sweep.programs import Address, Site


@dataclasses.dataclass
class Draws:
    """Fresh values of many programs, as uniform numbers by method and family."""

    uniforms: dict[tuple[str, str], list[Any]] = dataclasses.field(default_factory=dict)
    _noise: Any = dataclasses.field(default_factory=lambda: np.random.default_rng(0))

    def look(self, method: str, sites: dict[Address, Site]) -> list[Address]:
        """Take down values that a method drew. Returns the addresses of choices whose elements are no independent draws."""
        by_name: dict[Address, list[tuple[Address, Any]]] = {}
        shared: list[Address] = []
        for address, site in sites.items():
            noise = self._noise.uniform(size=np.shape(site.value))
            with np.errstate(all="ignore"):
                uniform = site.family.uniforms(site.value, site.args, noise)
            if uniform is None or not np.all(np.isfinite(uniform)):
                continue
            self.uniforms.setdefault((method, site.family.name), []).append(np.ravel(uniform))
            if site.family.is_discrete:
                continue
            names = tuple(part for part in address if not isinstance(part, int))
            by_name.setdefault((*names, site.family.name), []).append((address, np.ravel(uniform)))
        for elements in by_name.values():
            numbers = np.concatenate([numbers for _, numbers in elements])
            # Three equal numbers are no accident; two may be.
            if len(numbers) > 2 and np.ptp(numbers) < 1e-5:
                shared += [address for address, _ in elements]
        return shared

    def p_values(self) -> dict[tuple[str, str], tuple[int, float]]:
        """By method and family: how many draws, and the p-value of their being uniform (Kolmogorov and Smirnov)."""
        result = {}
        for key, parts in self.uniforms.items():
            numbers = np.concatenate(parts)
            result[key] = len(numbers), float(stats.kstest(numbers, "uniform").pvalue)
        return result

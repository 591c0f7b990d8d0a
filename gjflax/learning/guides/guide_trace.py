"""`GuideTrace`: what a guide that is built from a model drew, choice by choice or with one density of all."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from gjflax.core.choice_map import ChoiceMap, choice_map
from gjflax.core.pytree import STATIC
from gjflax.core.selection import Selection
from gjflax.core.trace import CallTrace, Trace, total
from gjflax.core.typing import Score
from gjflax.distributions.distribution_trace import DistributionTrace
from gjflax.distributions.families import Normal
from gjflax.learning.guides.latents import Address, Latent, Latents


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GuideTrace(CallTrace):
    """The values that a guide drew, with the points of R^n behind them.

    Attributes:
      gen_fn: the guide.
      args: its arguments.
      points: by address, the points.
      values: by address, the values.
      scores: by address the log densities of the elements, where they are independent given the choices before; else
        the joint log density at ``()``.
      normals: by address location and scale of the choices that are independent normal variables themselves.
    """

    points: dict[str, Any]
    values: dict[str, Any]
    scores: dict[str, Any]
    normals: dict[str, tuple[Any, Any]]

    def get_retval(self) -> Any:
        return self.strip().to_dict()

    def strip(self) -> ChoiceMap:
        return choice_map({path_of(name): value for name, value in self.values.items()})

    @property
    def batch_shape(self) -> tuple[int, ...]:
        if not self._latents.each:
            return ()
        latent = self._latents.each[0]
        axes = len(latent.plates) + len(latent.shape)
        shape = jnp.shape(self.values["/".join(latent.address)])
        return shape[: len(shape) - axes]

    @property
    def _latents(self) -> Latents:
        return self.gen_fn.latents

    @property
    def is_joint(self) -> bool:
        """Whether there is one log density for all choices together."""
        return self.gen_fn.is_joint

    @property
    def parts(self) -> list[tuple[Latent, Trace]]:
        """The choices one by one, where they are independent given those before, with axes for their plates."""
        return [(latent, self._part("/".join(latent.address))) for latent in self._latents.each]

    def _part(self, name: str) -> Trace:
        value, score = self.values[name], self.scores[name]
        if name in self.normals:
            return DistributionTrace(Normal, Normal.stored(self.normals[name]), value, score)
        return _Part(self.gen_fn, value, score)

    def project(self, selection: Selection) -> Score:
        chosen = [latent for latent in self._latents.each if latent.address in selection]
        if not self.is_joint:
            return total([self._whole(latent, self.scores["/".join(latent.address)]) for latent in chosen])
        if 0 < len(chosen) < len(self._latents.each):
            raise self.gen_fn.refusal("the share of some choices in the score")
        return self.scores[""] if chosen or not self._latents.each else total([])

    def _whole(self, latent: Any, scores: Any) -> Any:
        axes = len(latent.plates)
        lengths = jnp.shape(scores)[jnp.ndim(scores) - axes :]
        summed = jnp.sum(scores, axis=tuple(range(-axes, 0))) if axes else scores
        factor = latent.multiplicity(lengths)
        return summed if factor == 1.0 else factor * summed

    @property
    def counts_for_others(self) -> bool:
        return self._latents.has_population

    def leaves(self, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Trace]]:
        """One trace for each choice, where they are independent given those before; else one for all."""
        if self.is_joint:
            return [(prefix, _Part(self.gen_fn, self.strip(), self.scores[""]))]
        return [((*prefix, *latent.address), part) for latent, part in self.parts]

    def unconstrain(self, selection: Selection) -> tuple[ChoiceMap, Score]:
        chosen = [latent for latent in self._latents.each if latent.address in selection]
        points = {latent.address: self.points["/".join(latent.address)] for latent in chosen}
        everything = {path_of(name): point for name, point in self.points.items()}
        _, log_dets = self._latents.constrain(everything, self.gen_fn.arguments_of_model(self.get_args()))
        parts = [-self._whole(latent, log_dets[latent.address]) for latent in chosen]
        return choice_map(points), total(parts)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Part(Trace):
    """A choice of a guide, or all of them together."""

    gen_fn: Any = dataclasses.field(metadata=STATIC)
    value: Any
    score: Any

    def get_gen_fn(self) -> Any:
        return self.gen_fn

    def get_retval(self) -> Any:
        return self.value

    def get_score(self) -> Score:
        return self.score

    def strip(self) -> ChoiceMap:
        return choice_map(self.value)

    @property
    def is_reparameterized(self) -> bool:
        return True


def path_of(name: str) -> Address:
    return tuple(name.split("/")) if name else ()

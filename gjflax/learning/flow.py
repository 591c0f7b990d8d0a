r"""Which choices the score of every choice depends on, in a guide and a model: both staged out, and a walk over equations.

Given every choice, both programs are functions of these without any randomness,

    choices z  →  (log q of each guide site, its arguments; log p of each model site, its arguments),

whatever combinators they are made of. For each output `gjflax.language.dependency` finds the choices that it depends on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax

from gjflax.core.choice_map import ChoiceMap
from gjflax.core.typing import Arguments
from gjflax.distributions.distribution_trace import DistributionTrace
from gjflax.language.dependency import dependencies_in
from gjflax.learning.sites import Address, Site, sites_of


@dataclasses.dataclass(frozen=True)
class Sources:
    """What a site depends on.

    Attributes:
      score: the choices that its log density depends on, its own among them.
      arguments: the choices that its distribution's arguments depend on, or whether it is there.
    """

    score: frozenset[Address]
    arguments: frozenset[Address]


@dataclasses.dataclass(frozen=True)
class Flow:
    """The sources of the sites of a guide and a model.

    Attributes:
      guide: of each site of the guide.
      model: of each site of the model.
      model_sites: the sites of the model. Their arrays stand for nothing.
    """

    guide: tuple[Sources, ...]
    model: tuple[Sources, ...]
    model_sites: tuple[Site, ...]

    def between(self, addresses: Iterable[Address]) -> Flow:
        """The flow from sites, at these addresses: a site may stand for several choices below its address."""
        known = sorted(addresses, key=len, reverse=True)

        def owners(choices: frozenset[Address]) -> frozenset[Address]:
            return frozenset(next(a for a in known if choice[: len(a)] == a) for choice in choices)

        guide, model = (
            tuple(Sources(owners(sources.score), owners(sources.arguments)) for sources in part)
            for part in (self.guide, self.model)
        )
        return dataclasses.replace(self, guide=guide, model=model)


def flow_of(
    guide: Any, model: Any, choices: ChoiceMap, observed: ChoiceMap, guide_args: Arguments, model_args: Arguments
) -> Flow | None:
    """The flow from the guide's choices; None where the programs cannot be staged out.

    Args:
      guide: the guide, bound.
      model: the model, bound.
      choices: the guide's choices.
      observed: the observed ones, from which nothing flows.
      guide_args: the arguments of the guide.
      model_args: the arguments of the model.
    """
    leaves, structure = jax.tree.flatten(choices)
    owners: dict[int, set[Address]] = {}
    for address in choices.addresses():
        for leaf in jax.tree.leaves(choices.get_subtree(address)):
            owners.setdefault(id(leaf), set()).add(address)
    found: dict[str, tuple[Site, ...]] = {}
    counts: dict[int, int] = {}

    def outputs(*values: Any) -> Any:
        given = structure.unflatten(values)
        found["guide"] = sites_of(_importance(guide, given, guide_args))
        found["model"] = sites_of(_importance(model, given.merge(observed), model_args))
        each = [(site, _outputs(site)) for site in (*found["guide"], *found["model"])]
        counts.update({id(site): len(outputs) for site, outputs in each})
        return [outputs for _, outputs in each]

    dependencies = dependencies_in(outputs, *leaves)
    if dependencies is None:
        return None
    rest = iter(dependencies)

    def sources(site: Site) -> Sources:
        score, *arguments = [
            frozenset(owner for source in next(rest).sources for owner in owners[id(leaves[source.leaf])])
            for _ in range(counts[id(site)])
        ]
        return Sources(score, frozenset().union(*arguments))

    guide_sources = tuple(map(sources, found["guide"]))
    return Flow(guide_sources, tuple(map(sources, found["model"])), found["model"])


def _outputs(site: Site) -> list[Any]:
    present = [] if site.present is None else [site.present]
    return [site.log_density, *present, *_arrays(site.leaf)]


def _arrays(leaf: Any) -> list[Any]:
    """The arrays among the arguments of a site."""
    arguments = leaf.args if isinstance(leaf, DistributionTrace) else leaf.get_args()
    return [value for value in jax.tree.leaves(arguments) if isinstance(value, jax.Array)]


def _importance(module: Any, choices: ChoiceMap, args: Arguments) -> Any:
    """A run of a bound module with all choices given, as a pure function of these."""
    key = jax.random.key(0)
    if module.scope is None:
        return module.importance(key, choices, args)[1][1]
    rngs = {name: jax.random.key(0) for name in module.scope.rngs}
    mutable = module.scope.mutable
    variables = dict(module.variables)
    result: Any = module.as_unbound().apply(
        variables, key, choices, args, method="importance", rngs=rngs, mutable=mutable
    )
    _, (_, trace) = result if mutable is False else result[0]
    return trace

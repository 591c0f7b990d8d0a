r"""The plan of a gradient estimate: what costs there are, which are downstream of which choice, and what is done for each.

A *term* is a summand of the log weight: −log q of a guide site, log p of a model site, or −KL of a pair of these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gjflax.core.errors import ArgumentError, show_address
from gjflax.learning.divergence import is_known
from gjflax.learning.downstream import Relation, closure, common, elementwise, weakest
from gjflax.learning.enumerated import Enumerated, enumerated
from gjflax.learning.estimators.enumeration import ENUMERATED
from gjflax.learning.estimators.estimator import SCORE_FUNCTION
from gjflax.learning.estimators.measure_valued import MEASURE_VALUED
from gjflax.learning.flow import Flow
from gjflax.learning.sites import REVERSED_STEPS, STEPS, UNKNOWN, Address, Plate, Site

GUIDE, MODEL, DIVERGENCE = "guide", "model", "divergence"


@dataclasses.dataclass(frozen=True)
class Term:
    """A summand of the log weight.

    Attributes:
      kind: `GUIDE`, `MODEL` or `DIVERGENCE`.
      address: the choice that it belongs to.
      guide: the number of the guide's site, or None.
      model: the number of the model's site, or None.
      plates: the plates that it has as axes.
      sources: the guide's choices that it depends on; None where that is not known.
    """

    kind: str
    address: Address
    guide: int | None
    model: int | None
    plates: tuple[Plate, ...]
    sources: frozenset[Address] | None


@dataclasses.dataclass(frozen=True)
class Choice:
    """A site of the guide, without its arrays.

    Attributes:
      address: its address.
      plates: its plates.
      kind: how it is differentiated.
    """

    address: Address
    plates: tuple[Plate, ...]
    kind: str


@dataclasses.dataclass(frozen=True)
class Measured:
    """A choice with a measure-valued derivative.

    Attributes:
      number: the number of the guide's site.
      kept: on how many of its outermost plates all elements are changed at once.
    """

    number: int
    kept: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """See the text of this file.

    Attributes:
      choices: the guide's sites.
      terms: the summands of the log weight.
      reach: for every address of the guide, the numbers of the terms downstream of it, and how it reaches them.
      enumerated: the choices that are summed over.
      before: for every address of the guide, the numbers of the enumerated choices that it is downstream of.
      term_before: for every term, likewise.
      measured: the choices with a measure-valued derivative.
    """

    choices: tuple[Choice, ...]
    terms: tuple[Term, ...]
    reach: Mapping[Address, Mapping[int, Relation]]
    enumerated: tuple[Enumerated, ...]
    before: Mapping[Address, frozenset[int]]
    term_before: tuple[frozenset[int], ...]
    measured: tuple[Measured, ...]

    def scored(self) -> list[int]:
        """The numbers of the guide's sites with the score function."""
        return [number for number, choice in enumerate(self.choices) if choice.kind == SCORE_FUNCTION]


def make_plan(
    guide_sites: tuple[Site, ...],
    kinds: tuple[str, ...],
    model_sites: tuple[Site, ...],
    flow: Flow | None,
    wants_divergence: Callable[[Address], bool],
) -> Plan:
    """The plan for the sites of a guide and a model.

    Args:
      guide_sites: the guide's.
      kinds: how each of them is differentiated.
      model_sites: the model's.
      flow: what depends on what; None where everything may depend on everything.
      wants_divergence: for an address, whether an analytic divergence stands for its two terms, where there may be one.
    """
    choices = tuple(Choice(site.address, site.plates, kind) for site, kind in zip(guide_sites, kinds, strict=True))
    plates = _plates_of(choices)
    flow = None if flow is None else flow.between(plates)
    edges = _edges(plates, choices, flow)
    reached = closure(plates, edges)
    terms = _terms(guide_sites, model_sites, flow, reached, wants_divergence)
    reach = {address: _terms_reached(found, plates, terms) for address, found in reached.items()}

    def kept(address: Address) -> int:
        """On how many plates everything that depends on a choice stays in its element."""
        relations: Iterable[Relation] = [*reach[address].values(), *reached[address].values()]
        return min((elementwise(relation) for relation in relations), default=0)

    sums, measured, done = [], [], set()
    for number, (site, choice) in enumerate(zip(guide_sites, choices, strict=True)):
        if choice.kind == ENUMERATED and choice.address not in done:
            done.add(choice.address)
            sums.append(enumerated(choice.address, site, kept(choice.address)))
        if choice.kind == MEASURE_VALUED:
            measured.append(Measured(number, kept(choice.address)))
    _check_alike(choices)
    return Plan(
        choices,
        terms,
        reach,
        tuple(sums),
        {
            address: frozenset(j for j, choice in enumerate(sums) if address in reached[choice.address])
            for address in plates
        },
        tuple(
            frozenset(j for j, choice in enumerate(sums) if number in reach[choice.address])
            for number in range(len(terms))
        ),
        tuple(measured),
    )


def _plates_of(choices: tuple[Choice, ...]) -> dict[Address, tuple[Plate, ...]]:
    """The plates of each address. Branches may differ; then they have none in common."""
    plates: dict[Address, tuple[Plate, ...]] = {}
    for choice in choices:
        plates[choice.address] = choice.plates if plates.get(choice.address, choice.plates) == choice.plates else ()
    return plates


def _edges(
    plates: Mapping[Address, Any], choices: tuple[Choice, ...], flow: Flow | None
) -> dict[Address, set[Address]]:
    edges: dict[Address, set[Address]] = {address: set() for address in plates}
    for number, choice in enumerate(choices):
        for source in edges if flow is None else flow.guide[number].score:
            edges[source].add(choice.address)
    return edges


def _terms(
    guide_sites: tuple[Site, ...],
    model_sites: tuple[Site, ...],
    flow: Flow | None,
    reached: Mapping[Address, Mapping[Address, Relation]],
    wants_divergence: Callable[[Address], bool],
) -> tuple[Term, ...]:
    pairs = {}
    for i, guide_site in enumerate(guide_sites):
        if flow is not None and wants_divergence(guide_site.address):
            j = _partner(guide_site, guide_sites, model_sites)
            if (
                j is not None
                and not _asks_for_later(guide_site, flow.model[j].arguments, reached[guide_site.address])
                and is_known(guide_site, model_sites[j])
            ):
                pairs[i] = j
    terms = [
        Term(
            DIVERGENCE,
            guide_sites[i].address,
            i,
            j,
            guide_sites[i].plates,
            flow.guide[i].arguments | flow.model[j].arguments if flow is not None else None,
        )
        for i, j in pairs.items()
    ]
    for i, site in enumerate(guide_sites):
        if i not in pairs:
            terms.append(Term(GUIDE, site.address, i, None, site.plates, flow and flow.guide[i].score))
    for j, site in enumerate(model_sites):
        if j not in pairs.values():
            terms.append(Term(MODEL, site.address, None, j, site.plates, flow and flow.model[j].score))
    return tuple(terms)


def _asks_for_later(site: Site, arguments: frozenset[Address], reached: Iterable[Address]) -> bool:
    """Whether the model's arguments at a site may depend on what the guide draws there or after it.

    The divergence is that given what was drawn before. Along steps, the choice at the same address is that of a step before: in
    model and guide alike, for their plates are equal.
    """
    kinds = {plate.kind for plate in site.plates}
    is_chain = UNKNOWN not in kinds and bool(kinds & {STEPS, REVERSED_STEPS})
    return not (arguments - {site.address} if is_chain else arguments).isdisjoint(reached)


def _partner(site: Site, guide_sites: tuple[Site, ...], model_sites: tuple[Site, ...]) -> int | None:
    """The number of the model's site that stands for the same choice as a guide's, in the same plates."""
    if site.present is not None or sum(other.address == site.address for other in guide_sites) > 1:
        return None
    found = [j for j, other in enumerate(model_sites) if other.address == site.address]
    if len(found) != 1:
        return None
    other = model_sites[found[0]]
    same = other.present is None and other.plates == site.plates and other.multiplicity == site.multiplicity
    return found[0] if same else None


def _terms_reached(
    found: Mapping[Address, Relation], plates: Mapping[Address, tuple[Plate, ...]], terms: tuple[Term, ...]
) -> dict[int, Relation]:
    reach: dict[int, Relation] = {}
    for number, term in enumerate(terms):
        for address, relation in found.items():
            if term.sources is None:
                reach[number] = ()
            elif address in term.sources:
                here = weakest(relation, common(plates[address], term.plates))
                reach[number] = weakest(reach[number], here) if number in reach else here
    return reach


def _check_alike(choices: tuple[Choice, ...]) -> None:
    """The sites of branches at one address are enumerated or measured together, or not at all."""
    kinds: dict[Address, str] = {}
    for choice in choices:
        other = kinds.setdefault(choice.address, choice.kind)
        if other != choice.kind and ENUMERATED in (other, choice.kind):
            raise ArgumentError(
                f"The guide's branches have different estimators at {show_address(choice.address)}, and one of them is ENUM: "
                "give all of them ENUM, or another address."
            )

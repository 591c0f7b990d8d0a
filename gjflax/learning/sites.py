r"""The single choices of a trace as sites: where each stands, which axes its score has, and how its score counts.

The score of a trace is a sum over its sites,

    log p(t; x) = Σ_s c_s Σ_i 1[s_i is there] log p_s(t_{s,i}; x_{s,i}),

where i runs over the plates around the site (the elements of the `Map`s, the steps of an `Unfold`) and c_s is how often the
batch stands for its population (``Map(total=N)``).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from gjflax.combinators.dimap import DimapTrace
from gjflax.combinators.map import MapTrace
from gjflax.combinators.marginal import MarginalTrace
from gjflax.combinators.marginal_algorithms import Enumerate
from gjflax.combinators.random_params import RandomParamsTrace
from gjflax.combinators.renaming import RenamedTrace
from gjflax.combinators.steps_trace import StepsTrace
from gjflax.combinators.switch_trace import SwitchTrace
from gjflax.combinators.train import TrainTrace
from gjflax.core.errors import NotReparameterizedError, show_address
from gjflax.core.trace import Trace
from gjflax.distributions.distribution_trace import DistributionTrace
from gjflax.language.gen import BuiltinTrace
from gjflax.learning.estimators.estimator import PATHWISE, GradientEstimator, kind_of
from gjflax.learning.guides.guide_trace import GuideTrace

Address = tuple[Any, ...]

ELEMENTS, STEPS, REVERSED_STEPS, UNKNOWN = "elements", "steps", "reversed steps", "unknown"


@dataclasses.dataclass(frozen=True)
class Plate:
    """An axis that the choices below an address have. Plates of two programs are the same where they are equal.

    Attributes:
      kind: independent `ELEMENTS`, `STEPS` that depend on those before, `REVERSED_STEPS`, or `UNKNOWN`.
      address: where it stands.
      depth: how many plates stand around it.
      length: the length of the axis.
    """

    kind: str
    address: Address
    depth: int
    length: int


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A single choice, for all elements of its plates.

    Attributes:
      address: its address. The branches of a `Switch` may have several sites at one.
      leaf: its trace, with one leading axis for each plate.
      plates: the plates around it, the outermost first.
      present: whether it is there, an array of the plates' shape; None where it certainly is.
      multiplicity: how often its score counts in that of the whole trace.
      pathwise: of a site that stands for several choices below its address, whether all are reparameterised; else None.
      is_estimate: whether the score is an estimate of the density.
    """

    address: Address
    leaf: Any
    plates: tuple[Plate, ...]
    present: Any = None
    multiplicity: float = 1.0
    pathwise: bool | None = None
    is_estimate: bool = False

    @property
    def distribution(self) -> Any:
        """The distribution, with the estimator that it may be wrapped in."""
        return self.leaf.get_gen_fn()

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the plates."""
        return tuple(plate.length for plate in self.plates)

    @property
    def log_density(self) -> Any:
        """log p of the value, of the plates' shape; 0 where the choice is not there."""
        score = jnp.broadcast_to(jnp.asarray(self.leaf.get_score()), self.shape)
        return score if self.present is None else jnp.where(self.present, score, 0)


@dataclasses.dataclass(frozen=True)
class _Around:
    """What stands around a trace."""

    address: Address = ()
    plates: tuple[Plate, ...] = ()
    present: Any = None
    multiplicity: float = 1.0

    def at(self, address: Address) -> _Around:
        return dataclasses.replace(self, address=(*self.address, *address))

    def plate(self, kind: str, length: int) -> _Around:
        present = None if self.present is None else jnp.broadcast_to(self.present[..., None], (*self._shape, length))
        plates = (*self.plates, Plate(kind, self.address, len(self.plates), length))
        return dataclasses.replace(self, plates=plates, present=present)

    def where(self, flag: Any) -> _Around:
        flag = jnp.broadcast_to(jnp.asarray(flag), self._shape)
        return dataclasses.replace(self, present=flag if self.present is None else self.present & flag)

    def site(self, leaf: Any, **fields: Any) -> Site:
        return Site(self.address, leaf, self.plates, self.present, self.multiplicity, **fields)

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(plate.length for plate in self.plates)


def sites_of(trace: Trace) -> tuple[Site, ...]:
    """The single choices of one trace (not of a batch), in the order of the program."""
    return tuple(_sites(trace, _Around()))


def kinds_of(sites: tuple[Site, ...]) -> tuple[str, ...]:
    """How each choice of a guide is differentiated: see `gjflax.learning.estimators`.

    Raises:
      NotReparameterizedError: if a choice would have the score function, and its density is not known.
    """
    return tuple(map(_kind_of, sites))


def _kind_of(site: Site) -> str:
    pathwise = site.leaf.is_reparameterized if site.pathwise is None else site.pathwise
    kind = kind_of(site.distribution, pathwise)
    if site.is_estimate and kind != PATHWISE:
        raise NotReparameterizedError(
            f"The guide's choices at {show_address(site.address)} are those of a Marginal whose density is an estimate, and "
            "not all are reparameterised: they have no gradient. Use `Enumerate`, or reparameterised choices."
        )
    return kind


@functools.singledispatch
def _sites(trace: Trace, around: _Around) -> Iterator[Site]:
    """A kind of trace that is not known here: one site with the score of the whole, where its choices are all alike.

    Else its leaves, whose axes may mean anything.
    """
    leaves = trace.leaves()
    pathwise = {leaf.is_reparameterized and not isinstance(leaf.get_gen_fn(), GradientEstimator) for _, leaf in leaves}
    if not leaves:
        return
    if len(pathwise) == 1:
        yield around.site(trace, pathwise=pathwise.pop())
        return
    for address, leaf in leaves:
        here = around.at(address)
        for length in jnp.shape(leaf.get_score())[len(around.plates) :]:
            here = here.plate(UNKNOWN, length)
        yield here.site(leaf)


@_sites.register
def _(trace: DistributionTrace, around: _Around) -> Iterator[Site]:
    yield around.site(trace)


@_sites.register
def _(trace: BuiltinTrace, around: _Around) -> Iterator[Site]:
    for address, part in trace.by_path.items():
        yield from _sites(part, around.at(address))


@_sites.register
def _(trace: MapTrace, around: _Around) -> Iterator[Site]:
    factor = trace.gen_fn._of_population(1.0, trace.length)
    counted = dataclasses.replace(around, multiplicity=around.multiplicity * factor)
    yield from _sites(trace.inner, counted.plate(ELEMENTS, trace.length))


@_sites.register
def _(trace: StepsTrace, around: _Around) -> Iterator[Site]:
    kind = REVERSED_STEPS if getattr(trace.gen_fn, "reverse", False) else STEPS
    below = around.plate(kind, trace.length)
    yield from _sites(trace.inner, below if trace.active is None else below.where(trace.active))


@_sites.register
def _(trace: SwitchTrace, around: _Around) -> Iterator[Site]:
    for taken, branch in zip(trace.taken, trace.branches, strict=True):
        yield from _sites(branch, around.where(taken))


@_sites.register
def _(trace: RandomParamsTrace, around: _Around) -> Iterator[Site]:
    for path, part in trace.by_path.items():
        yield from _sites(part, around.at(path))
    yield from _sites(trace.inner, around)


@_sites.register
def _(trace: TrainTrace, around: _Around) -> Iterator[Site]:
    yield from _sites(trace.inner, around)


@_sites.register
def _(trace: DimapTrace, around: _Around) -> Iterator[Site]:
    yield from _sites(trace.inner, around)


@_sites.register
def _(trace: RenamedTrace, around: _Around) -> Iterator[Site]:
    moves, outside = trace.moves, len(around.plates)
    sites = tuple(_sites(trace.inner, dataclasses.replace(around, address=())))
    inside = {plate for site in sites for plate in site.plates[outside:]}
    named = collections.Counter((moves.outer_address(plate.address), plate.depth) for plate in inside)

    def moved(plate: Plate) -> Plate:
        # Where the choices of a plate part, or two plates meet, its elements are not those of a plate outside.
        is_one = not moves.parts(plate.address) and named[moves.outer_address(plate.address), plate.depth] == 1
        address = (*around.address, *moves.outer_address(plate.address))
        return dataclasses.replace(plate, address=address, kind=plate.kind if is_one else UNKNOWN)

    for site in sites:
        if moves.parts(site.address):
            choices = [moves.outer_address((*site.address, *below)) for below in site.leaf.strip().addresses()]
            address = _common(choices)
        else:
            address = moves.outer_address(site.address)
        plates = (*around.plates, *map(moved, site.plates[outside:]))
        yield dataclasses.replace(site, address=(*around.address, *address), plates=plates)


def _common(addresses: list[Address]) -> Address:
    """The address that all of these stand at or below."""
    first, last = min(addresses), max(addresses)
    return tuple(a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


@_sites.register
def _(trace: GuideTrace, around: _Around) -> Iterator[Site]:
    if trace.is_joint:
        yield around.site(trace, pathwise=True)
        return
    for latent, part in trace.parts:
        here, above = around, 0
        for plate in latent.plates:
            length = jnp.shape(part.get_score())[len(here.plates)]
            here = here.at(plate.address[above:]).plate(ELEMENTS, length)
            above = len(plate.address)
        counts = latent.multiplicity([plate.length for plate in here.plates[len(around.plates) :]])
        here = dataclasses.replace(here.at(latent.address[above:]), multiplicity=around.multiplicity * counts)
        yield here.site(part)


@_sites.register
def _(trace: MarginalTrace, around: _Around) -> Iterator[Site]:
    pathwise = all(leaf.is_reparameterized for _, leaf in trace.leaves())
    exact = isinstance(trace.gen_fn.algorithm, Enumerate)
    yield around.site(trace, pathwise=pathwise, is_estimate=not exact)

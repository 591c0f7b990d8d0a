r"""What guides have in common that are built from a model: a density on R^n, mapped to the supports of the model's choices.

With a density q(u) on points u of R^n and the map b onto the supports, z = b(u),

    log q(z) = log q(u) − log |det b'(u)|.

Where choices stand in a `Map` of n elements that are a batch of a population of N (``total=N``), the guide has parameters for
each of the N, is called with the indices of the batch, and its elements count N/n times, as those of the model do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gjflax.core.choice_map import ChoiceMap, choice_map
from gjflax.core.context import current_address
from gjflax.core.diff import Change, Diff, no_change, unknown_change
from gjflax.core.errors import (
    ArgumentError,
    ChoiceShapeError,
    MissingChoiceError,
    NotImplementedByGenerativeFunctionError,
    UnvisitedConstraintError,
    nearest,
    show_address,
)
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.keys import KeySource, typed_key
from gjflax.core.selection import AllSelection, Selection, select
from gjflax.core.trace import Trace, canonical, total
from gjflax.core.typing import Arguments, PRNGKey, Score
from gjflax.learning.guides.guide_trace import GuideTrace, path_of
from gjflax.learning.guides.latents import Address, Latent, Latents, Placeholder, Points, Program, find_latents


class AutoGuide(GenerativeFunction):
    """Base class of guides that are built from a model.

    A subclass says what the density on R^n is, by `draw` and `log_density`, and makes its parameters in `setup`.

    Attributes:
      model: the model. Its parameters are no part of the guide's.
      observed: the choices that are observed: a choice map or nested dict of which only the addresses count, or addresses.
      model_args: arguments of the model, of which only shapes and dtypes count.
      selection: the choices that the guide draws, of those that are not observed; by default all.

    Where all of the model's choices are observed, it is the guide of no choice, whose score is 0: so a model whose network
    is learned and one whose network is drawn (`RandomParams`) have the same objective.

    Called with no arguments, or those of the model. These are needed only where a support depends on them. Where the model has a
    batch of a population, their indices, an integer vector, come first.

    Raises:
      DiscreteGradientError: if a choice is discrete.
      SelectionError: if there are choices that are not observed, and none is selected.
      NotImplementedByGenerativeFunctionError: if a choice may be absent, or its support depends on parameters or on what
        the guide does not draw.
    """

    model: Any
    observed: Any = ()
    model_args: Any = ()
    selection: Selection = AllSelection()

    trace_type = GuideTrace

    is_point = False
    """Whether it is a point mass, whose score has no Jacobian."""

    is_joint = False
    """Whether there is one log density, of all choices together."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, (GenerativeFunction, Program)):
            raise ArgumentError(f"`model` of a guide is a generative function; got {self.model!r:.80}.")
        object.__setattr__(self, "model", Program(self.model))
        object.__setattr__(self, "observed", _addresses(self.observed))
        if not isinstance(self.model_args, (tuple, Placeholder)):
            raise ArgumentError(f"`model_args` is a tuple of the model's arguments; got {self.model_args!r:.80}.")
        object.__setattr__(self, "model_args", Placeholder(self.model_args))
        super().__post_init__()

    # What a subclass says ---------------------------------------------------------------------------------------

    @nn.nowrap
    def draw(self, key: PRNGKey, rows: Rows) -> Points:
        """Points, drawn with reparameterisation."""
        raise NotImplementedError

    @nn.nowrap
    def log_density(self, points: Points, rows: Rows) -> dict[Address, Any]:
        """log q(u): of the elements by address, or the joint one at ``()``."""
        raise NotImplementedError

    @nn.nowrap
    def location(self, rows: Rows) -> Points:
        """The point of R^n that stands for the density: the location of a normal one, of a flow the image of 0."""
        raise NotImplementedError

    @nn.nowrap
    def normals(self, rows: Rows) -> dict[Address, tuple[Any, Any]]:
        """Location and scale of the points that are independent normal variables; by default of none."""
        return {}

    @nn.nowrap
    def draw_scored(self, key: PRNGKey, rows: Rows) -> tuple[Points, dict[Address, Any]]:
        """Points and their log densities: to be written where the two together cost less."""
        points = self.draw(key, rows)
        return points, self.log_density(points, rows)

    # The interface ----------------------------------------------------------------------------------------------

    @property
    def latents(self) -> Latents:
        """The choices that the guide is about."""
        return find_latents(self.model, self.observed, self.selection, self.model_args)

    def simulate(self, key: PRNGKey, args: Arguments) -> tuple[PRNGKey, GuideTrace]:
        key, below = jax.random.split(key)
        return key, self._drawn(below, args)

    def importance(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Score, GuideTrace]]:
        given = self._given(choices, strict)
        key, below = jax.random.split(key)
        rows = self._rows(args)
        if len(given) == len(self.latents.each):
            trace = self._trace_of_values(given, args)
            return key, (trace.get_score(), trace)
        if not given:
            trace = self._drawn(below, args)
            return key, (jnp.zeros_like(trace.get_score()), trace)
        trace = self._trace_of_some(self.draw(below, rows), given, rows, args)
        return key, (trace.project(_only(given)), trace)

    def assess(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Any, Score]]:
        given = self._given(choices, strict)
        for latent in self.latents.each:
            if latent.address not in given:
                raise MissingChoiceError(
                    f"`assess` needs a value for every choice, and none was given for "
                    f"{show_address((*current_address(), *latent.address))}."
                )
        trace = self._trace_of_values(given, args)
        return key, (trace.get_retval(), trace.get_score())

    def update(
        self,
        key: PRNGKey,
        trace: Any,
        choices: ChoiceMap,
        argdiffs: Arguments,
        *,
        param_diff: Change = unknown_change,
        strict: bool = True,
    ) -> tuple[PRNGKey, tuple[Any, Score, GuideTrace, ChoiceMap]]:
        given = self._given(choices, strict)
        if not given and self.knows_no_change(trace, argdiffs, param_diff):
            return key, (no_change(trace.get_retval()), jnp.zeros_like(trace.get_score()), trace, choice_map({}))
        old = {path_of(name): value for name, value in trace.values.items()}
        new = self._trace_of_values({**old, **given}, Diff.primal(argdiffs))
        discard = choice_map({address: old[address] for address in given})
        return key, (unknown_change(new.get_retval()), new.get_score() - trace.get_score(), new, discard)

    def regenerate(
        self,
        key: PRNGKey,
        trace: Any,
        selection: Selection,
        argdiffs: Arguments,
        *,
        param_diff: Change = unknown_change,
    ) -> tuple[PRNGKey, tuple[Any, Score, GuideTrace]]:
        kept = [latent.address for latent in self.latents.each if latent.address not in selection]
        if len(kept) == len(self.latents.each):
            key, (retdiff, weight, new, _) = self.update(key, trace, choice_map({}), argdiffs, param_diff=param_diff)
            return key, (retdiff, weight, new)
        args = Diff.primal(argdiffs)
        key, below = jax.random.split(key)
        if not kept:
            new = self._drawn(below, args)
            return key, (unknown_change(new.get_retval()), jnp.zeros_like(new.get_score()), new)
        held, rows = {address: trace.values["/".join(address)] for address in kept}, self._rows(args)
        new = self._trace_of_some(self.draw(below, rows), held, rows, args)
        weight = new.project(_only(kept)) - trace.project(_only(kept))
        return key, (unknown_change(new.get_retval()), weight, new)

    def constrain(
        self, unconstrained: ChoiceMap, args: Arguments, *, fixed: ChoiceMap | None = None
    ) -> tuple[ChoiceMap, Score]:
        if fixed is not None and not fixed.is_empty():
            raise self.refusal("`constrain` with some choices `fixed`")
        points, rows = self._given(unconstrained, True), self._rows(args)
        trace = self._trace(points, self.log_density(points, rows), rows, args)
        _, log_det = trace.unconstrain(AllSelection())
        return trace.strip(), -log_det

    def at_location(self, args: Arguments) -> ChoiceMap:
        """The choices at the location of the density on R^n: the one point that `MAP` moves."""
        values, _ = self.latents.constrain(self.location(self._rows(args)), self.arguments_of_model(args))
        return choice_map(dict(values))

    # Inside -----------------------------------------------------------------------------------------------------

    @nn.nowrap
    def refusal(self, what: str) -> NotImplementedByGenerativeFunctionError:
        """The error for what is not known of a joint density."""
        return NotImplementedByGenerativeFunctionError(
            f"`{type(self).__name__}` at {show_address(current_address())} has a joint density of all its choices, and {what} is "
            "not known of it. Give all of them, or none; or use `AutoNormal`, whose choices are independent."
        )

    @nn.nowrap
    def arguments_of_model(self, args: Arguments) -> Any | None:
        """The arguments of the model among those of the guide; None if they were left out."""
        latents = self.latents
        own = args[1:] if latents.has_population else args
        if not own and latents.has_population and latents.supports is None:
            self._check_batch(len(args[0]))
        return own or None

    @nn.nowrap
    def _check_batch(self, size: int) -> None:
        """Raise where the supports, which are found by running the model, are those of another number of elements."""
        for latent in self.latents.each:
            for plate in latent.plates:
                if plate.population is not None and plate.length != size:
                    raise ArgumentError(
                        f"The guide at {show_address(current_address())} has supports that depend on other choices, which it "
                        f"finds by running the model. It was built for a batch of {plate.length} elements, and is called with "
                        f"{size}: give it the model's arguments too, `guide_args=(indices, *model_args)`."
                    )

    @nn.nowrap
    def parameters_by_choice(
        self, name: str, initial: Callable[[Any, tuple[int, ...], Any], Any]
    ) -> dict[Address, Any]:
        """A parameter that is a tree by address, with a row for each element; called in ``setup``."""

        def tree(key: PRNGKey) -> Any:
            keys = KeySource(typed_key(key))
            return nested(
                {
                    latent.address: initial(keys.at(latent.address), (*latent.rows, *latent.point), latent.dtype)
                    for latent in self.latents.each
                }
            )

        value = self.param(name, tree)
        return {latent.address: below(value, latent.address) for latent in self.latents.each}

    @nn.nowrap
    def _rows(self, args: Arguments) -> Rows:
        if not self.latents.has_population:
            return Rows(None)
        at, given = show_address(current_address()), args[0] if args else None
        is_array = isinstance(given, (np.ndarray, jax.Array))
        if not is_array or given.ndim != 1 or not jnp.issubdtype(given.dtype, jnp.integer):
            shown = f"{given.dtype}{list(given.shape)}" if is_array else "no argument" if not args else f"{given!r:.60}"
            raise ArgumentError(
                f"The guide at {at} has choices for each element of a population, of which the model has a batch: its first "
                f"argument is the batch's indices, a vector of integers; got {shown}. Call it with "
                "`guide_args=(indices, *model_args)`."
            )
        return Rows(jnp.asarray(given))

    @nn.nowrap
    def _drawn(self, key: PRNGKey, args: Arguments) -> GuideTrace:
        rows = self._rows(args)
        return self._trace(*self.draw_scored(key, rows), rows, args)

    @nn.nowrap
    def _trace(self, points: Points, scores: dict[Address, Any], rows: Rows, args: Arguments) -> GuideTrace:
        """The trace of points with their log densities."""
        for latent in self.latents.each:
            self._check_shape(latent, points[latent.address], rows.shape(latent, latent.point), "point")
        values, log_dets = self.latents.constrain(points, self.arguments_of_model(args))
        if self.is_point:
            log_dets = {address: jnp.zeros_like(log_det) for address, log_det in log_dets.items()}
        if self.is_joint:
            scores = {(): total([scores[()], *(-jnp.sum(log_det) for log_det in log_dets.values())])}
        else:
            scores = {address: score - log_dets[address] for address, score in scores.items()}
        normals = {a: normal for a, normal in self.normals(rows).items() if self.latents.is_unconstrained(a)}
        parts = map(_by_name, (points, values, scores, normals))
        return GuideTrace(self.as_unbound(), canonical(args), *parts)

    @nn.nowrap
    def _trace_of_values(self, values: Points, args: Arguments) -> GuideTrace:
        rows = self._rows(args)
        for latent in self.latents.each:
            self._check_shape(latent, values[latent.address], rows.shape(latent, latent.shape), "value")
        points = self.latents.unconstrain(values, self.arguments_of_model(args))
        trace = self._trace(points, self.log_density(points, rows), rows, args)
        # As given, not as they come back from R^n.
        return trace.replace(values=_by_name(values))

    @nn.nowrap
    def _trace_of_some(self, drawn: Points, given: Points, rows: Rows, args: Arguments) -> GuideTrace:
        """The trace of some values, and points for the rest."""
        if self.is_joint:
            raise self.refusal("the density of some choices given the others")
        model_args = self.arguments_of_model(args)
        values, _ = self.latents.constrain(drawn, model_args)
        points = dict(drawn)
        # Supports depend on choices before, so each round gets one choice further at least.
        for _ in range(1 if self.latents.supports is not None else len(self.latents.each)):
            values = {**self.latents.constrain(points, model_args)[0], **given}
            inverse = self.latents.unconstrain(values, model_args)
            points = {**points, **{address: inverse[address] for address in given}}
        trace = self._trace(points, self.log_density(points, rows), rows, args)
        return trace.replace(values={**trace.values, **_by_name(given)})

    @nn.nowrap
    def _given(self, choices: Any, strict: bool) -> Points:
        """The given values, by address."""
        choices = choice_map(choices)
        known = [latent.address for latent in self.latents.each]
        if strict:
            for address in choices.addresses():
                if address not in known:
                    at = current_address()
                    raise UnvisitedConstraintError(
                        f"A value was given for {show_address((*at, *address))}, which is not a choice of this guide. "
                        f"{nearest((*at, *address), [(*at, *one) for one in known])} To ignore what is not used, pass "
                        "strict=False."
                    )
        return {
            latent.address: jnp.asarray(choices[latent.address], latent.dtype)
            for latent in self.latents.each
            if latent.address in choices
        }

    @nn.nowrap
    def _check_shape(self, latent: Latent, array: Any, expected: tuple[int, ...], what: str) -> None:
        if jnp.shape(array) != expected:
            raise ChoiceShapeError(
                f"The {what} given for {show_address((*current_address(), *latent.address))} has shape {jnp.shape(array)}; this "
                f"guide has {expected} there."
            )


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which elements of a population a guide is asked about: their indices, or None where there is no population."""

    indices: Any

    def shape(self, latent: Latent, event: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an array with axes for the plates of a choice."""
        lengths = [plate.length if plate.population is None else int(self.indices.shape[0]) for plate in latent.plates]
        return (*lengths, *event)

    def take(self, latent: Latent, array: Any) -> Any:
        """The rows of an array that has them all."""
        for axis, plate in enumerate(latent.plates):
            if plate.population is not None:
                array = jnp.take(array, self.indices, axis=axis)
        return array


def nested(parts: Mapping[Address, Any]) -> Any:
    """A nested dict of values by address; the value itself, of the address ``()``."""
    result: dict[str, Any] = {}
    for address, value in parts.items():
        if not address:
            return value
        place = result
        for name in address[:-1]:
            place = place.setdefault(name, {})
        place[address[-1]] = value
    return result


def below(tree: Any, address: Address) -> Any:
    """What stands at an address of a nested dict."""
    for name in address:
        tree = tree[name]
    return tree


def _by_name(parts: Mapping[Address, Any]) -> dict[str, Any]:
    return {"/".join(address): value for address, value in parts.items()}


def _only(addresses: Any) -> Selection:
    return select(list(addresses))


def _addresses(observed: Any) -> frozenset[Address]:
    """The addresses of what is observed, of choices or of addresses."""
    if isinstance(observed, frozenset):
        return observed
    if isinstance(observed, (str, tuple, list, set)) and not isinstance(observed, ChoiceMap):
        parts = [observed] if isinstance(observed, str) else list(observed)
        return frozenset(part if isinstance(part, tuple) else (part,) for part in parts)
    if isinstance(observed, Trace):
        observed = observed.strip()
    return frozenset(choice_map(observed).addresses())

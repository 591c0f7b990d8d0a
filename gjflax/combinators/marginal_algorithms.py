r"""Algorithms that integrate choices out: what `Marginal` asks to estimate a density.

With kept choices u and hidden choices r, of joint density p(u, r), an algorithm gives an estimate ξ of p(u) = Σ_r p(u, r)
together with hidden choices r, in two ways. For every function f,

=================  ====================================================================================
`estimate`         (ξ, r) given u, with  E[ξ f(r)] = Σ_r p(u, r) f(r);  so E[ξ] = p(u)
`estimate_with`    ξ given (u, r) ~ p, as if `estimate` had found r:  E[f(r) / ξ | u] = E[f(r) | u, by `estimate`] / p(u)
=================  ====================================================================================

Importance sampling with K particles draws r_k ~ q(·; u) with weights w_k = p(u, r_k) / q(r_k; u), gives ξ = (w_1 + … + w_K) / K,
and takes r = r_j with probability w_j / Σ_k w_k. With a hidden choice given, that is one of the K particles and the others
are drawn. Both are one density on (u, j, r_1, …, r_K), from its two ends,

    π(u, j, r_1, …, r_K) = (1/K) p(u, r_j) Π_{k≠j} q(r_k; u) = ξ · [w_j / Σ_k w_k · Π_k q(r_k; u)],

whose marginal in (u, r_j) is p. So q must be positive where p is; and where q is positive and p is not, E[1/ξ] is less than
1/p(u), which matters to `simulate` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gjflax.combinators.presence import Flags, either, flagged, given, negated, present
from gjflax.core.choice_map import ChoiceMap
from gjflax.core.context import current_address
from gjflax.core.errors import (
    ArgumentError,
    ChoiceMapError,
    EnumerationError,
    MissingChoiceError,
    UnvisitedConstraintError,
    nearest,
    show_address,
)
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.interface import is_tracer
from gjflax.core.masked import Masked, both, has_masked, is_masked, with_axes
from gjflax.core.trace import Trace
from gjflax.core.typing import Arguments, PRNGKey, Score
from gjflax.distributions import discrete
from gjflax.distributions.tfp import TFPDistribution


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimate of a density.

    Attributes:
      log_density: log ξ.
      hidden: the hidden choices r.
      randomness: what makes the density of a program with it an estimate, as the end of a sentence; None where the
        density is exact and what the program returns does not depend on the hidden choices.
    """

    log_density: Score
    hidden: ChoiceMap
    randomness: str | None


class MarginalAlgorithm:
    """Base class. See the text of this file for what the two methods owe each other.

    Both are called with the bound `Marginal`: ``marginal.inner`` is its inner function, ``marginal.hidden_of(trace)`` the
    hidden choices of one of its traces, and ``marginal.mapped(function, count)`` runs ``function(marginal, key)`` over
    many keys, or other trees of arrays. An algorithm that holds generative functions is a linen module, so that they
    have parameters; any other is a frozen dataclass.
    """

    def estimate(self, key: PRNGKey, marginal: Any, choices: ChoiceMap, args: Arguments) -> Estimate:
        """An estimate of the density of kept choices."""
        raise NotImplementedError

    def estimate_with(self, key: PRNGKey, marginal: Any, trace: Trace, args: Arguments) -> Score:
        """log ξ where the hidden choices of a trace of the inner function are those that `estimate` found."""
        raise NotImplementedError


class Importance(MarginalAlgorithm):
    """Base class of importance sampling. A subclass says how one particle is drawn and weighed."""

    num_particles: int

    def particle(self, key: PRNGKey, marginal: Any, choices: ChoiceMap, args: Arguments) -> tuple[Score, ChoiceMap]:
        """Hidden choices r ~ q(·; u) and their log weight log p(u, r) / q(r; u): ``weight, hidden``."""
        raise NotImplementedError

    def weight_of(self, key: PRNGKey, marginal: Any, trace: Trace, args: Arguments) -> Score:
        """The log weight of the hidden choices of a trace of the inner function."""
        raise NotImplementedError

    def estimate(self, key: PRNGKey, marginal: Any, choices: ChoiceMap, args: Arguments) -> Estimate:
        what = f"importance sampling with {self.num_particles} particle{'s' if self.num_particles > 1 else ''}"
        if self.num_particles == 1:
            weight, hidden = self.particle(key, marginal, choices, args)
            return Estimate(weight, hidden, what)
        key, picking = jax.random.split(key)
        weights, particles = self._particles(key, marginal, choices, args, self.num_particles)
        return Estimate(self._log_mean(weights), _picked(picking, weights, particles), what)

    def estimate_with(self, key: PRNGKey, marginal: Any, trace: Trace, args: Arguments) -> Score:
        key, weighing = jax.random.split(key)
        weight = self.weight_of(weighing, marginal, trace, args)
        if self.num_particles == 1:
            return weight
        others, _ = self._particles(key, marginal, marginal.kept_of(trace), args, self.num_particles - 1)
        return self._log_mean(jnp.concatenate([others, weight[None]]))

    def _particles(
        self, key: PRNGKey, marginal: Any, choices: ChoiceMap, args: Arguments, count: int
    ) -> tuple[Any, ChoiceMap]:
        def draw(marginal: Any, key: PRNGKey) -> tuple[Score, ChoiceMap]:
            return marginal.algorithm.particle(key, marginal, choices, args)

        return marginal.mapped(draw, count)(marginal, jax.random.split(key, count))

    def _log_mean(self, weights: Any) -> Score:
        return jax.nn.logsumexp(weights) - np.log(self.num_particles).astype(weights.dtype)


@dataclasses.dataclass(frozen=True)
class DefaultImportance(Importance):
    """Importance sampling from the inner function's internal proposal: hidden choices from the prior, given what came before.

    Attributes:
      num_particles: K, the number of draws.
    """

    num_particles: int = 1

    def __post_init__(self) -> None:
        _check_count(self.num_particles)

    def particle(self, key: PRNGKey, marginal: Any, choices: ChoiceMap, args: Arguments) -> tuple[Score, ChoiceMap]:
        _, (weight, trace) = marginal.inner.importance(key, choices, args)
        return weight, marginal.hidden_of(trace)

    def weight_of(self, key: PRNGKey, marginal: Any, trace: Trace, args: Arguments) -> Score:
        # With ancestral sampling p(u, r) / q(r; u) is what the kept choices contribute to the score.
        return trace.project(marginal.selection)


class CustomImportance(Importance, nn.Module):
    """Importance sampling from a proposal of one's own.

    Attributes:
      proposal: a generative function of the kept choices (a choice map) and the arguments, ``proposal(choices, *args)``,
        whose choices are the hidden ones, at their addresses. It may have parameters, as an amortised proposal has. Where
        hidden choices may be absent, those of the proposal are absent where they are, or the estimate is NaN.
      num_particles: K, the number of draws.
    """

    proposal: Any
    num_particles: int = 1

    def __post_init__(self) -> None:
        _check_count(self.num_particles)
        if not isinstance(self.proposal, GenerativeFunction):
            raise ArgumentError(
                f"`proposal` of a CustomImportance is a generative function; got {self.proposal!r:.80}. Is @gen missing?"
            )
        super().__post_init__()

    def particle(self, key: PRNGKey, marginal: Any, choices: ChoiceMap, args: Arguments) -> tuple[Score, ChoiceMap]:
        key, drawing = jax.random.split(key)
        _, trace = self.proposal.simulate(drawing, (choices, *args))
        hidden = trace.strip()
        try:
            _, (_, score) = marginal.inner.assess(key, choices.merge(hidden), args)
        except (MissingChoiceError, UnvisitedConstraintError, ChoiceMapError) as error:
            error.add_note(_PROPOSAL_NOTE)
            raise
        # With all that is there given, this draws nothing: it says what is there.
        _, (_, run) = marginal.inner.importance(key, choices.merge(hidden), args)
        return _nan_where_unlike(marginal.hidden_of(run), hidden, score - trace.get_score()), hidden

    def weight_of(self, key: PRNGKey, marginal: Any, trace: Trace, args: Arguments) -> Score:
        kept, hidden = marginal.kept_of(trace), marginal.hidden_of(trace)
        try:
            _, (_, score) = self.proposal.assess(key, hidden, (kept, *args))
        except (MissingChoiceError, UnvisitedConstraintError) as error:
            error.add_note(_PROPOSAL_NOTE)
            raise
        return trace.get_score() - score


_PROPOSAL_NOTE = "The choices of a Marginal's proposal are those that it integrates out, and no others."


@dataclasses.dataclass(frozen=True)
class Enumerate(MarginalAlgorithm):
    """The exact sum over hidden choices that have finitely many values.

    Attributes:
      values: the values of hidden choices by address, where they are not `Bernoulli` or `Categorical`, whose values are
        known. Of a choice that is a vector, the values of one element.
      max_terms: the number of terms above which the sum is refused.

    Raises:
      EnumerationError: if the values of a hidden choice are not known, or there are too many combinations.

    A hidden choice that is absent, beyond a length or in a branch that is not taken, has one term, not one for each value.
    """

    values: Any = ()
    max_terms: int = 10_000

    def __post_init__(self) -> None:
        if isinstance(self.values, Mapping):
            by_address = [(key if isinstance(key, tuple) else (key,), value) for key, value in self.values.items()]
            for address, one in by_address:
                if is_tracer(one) or np.ndim(one) != 1 or not np.size(one):
                    raise ArgumentError(
                        f"`values` of an Enumerate has a list of numbers for {show_address(address)}; got {one!r:.60}."
                    )
            # Tuples, so that it hashes.
            frozen = tuple((address, tuple(np.asarray(one).tolist())) for address, one in by_address)
            object.__setattr__(self, "values", frozen)
        elif self.values != () and not isinstance(self.values, tuple):
            raise ArgumentError(f"`values` of an Enumerate is a dict of lists by address; got {self.values!r:.60}.")

    def estimate(self, key: PRNGKey, marginal: Any, choices: ChoiceMap, args: Arguments) -> Estimate:
        key, drawing = jax.random.split(key)
        _, (_, trace) = marginal.inner.importance(drawing, choices, args)
        return self._sum(key, marginal, trace, choices, args)

    def estimate_with(self, key: PRNGKey, marginal: Any, trace: Trace, args: Arguments) -> Score:
        return self._sum(key, marginal, trace, marginal.kept_of(trace), args).log_density

    def _sum(self, key: PRNGKey, marginal: Any, trace: Trace, choices: ChoiceMap, args: Arguments) -> Estimate:
        """The sum over the hidden choices, whatever they are in the trace."""
        key, picking = jax.random.split(key)
        hidden_before = marginal.hidden_of(trace)
        terms, count = self._terms(trace, unmasked(hidden_before))
        first = jax.tree.map(lambda leaf: leaf[0], terms)
        may_be_absent = has_masked(hidden_before) or has_masked(choices)
        depends = []

        def term(marginal: Any, hidden: ChoiceMap) -> tuple[Score, Any]:
            if not may_be_absent:
                _, (retval, score) = marginal.inner.assess(key, choices.merge(hidden), args)
                depends.append(depends_on(hidden, retval))
                return score, {}
            # All that is there is given, so the weight is the density.
            _, (score, run) = marginal.inner.importance(key, choices.merge(hidden), args, strict=False)
            depends.append(depends_on(hidden, run.get_retval()))
            flags = {address: flag for address, flag in present(marginal.hidden_of(run)).items() if flag is not True}
            return jnp.where(_is_first_where_absent(flags, hidden, first), score, -jnp.inf), flags

        scores, flags = marginal.mapped(term, count)(marginal, terms)
        found, flags = _picked(picking, scores, (terms, flags))
        what = "the return value depends on choices that are summed out" if any(depends) else None
        hidden = flagged(found, {address: flags.get(address, True) for address in found.addresses()})
        return Estimate(jax.nn.logsumexp(scores), hidden, what)

    def _terms(self, trace: Trace, hidden: ChoiceMap) -> tuple[ChoiceMap, int]:
        """All combinations of values of the hidden choices, on a leading axis, and their number."""
        here = current_address()
        leaves = [(address, leaf) for address, leaf in trace.leaves() if hidden.has_subtree(address)]
        own = dict(self.values)
        for address in own:
            if address not in hidden.addresses():
                raise ArgumentError(
                    f"`values` of the Enumerate at {show_address(here)} names {show_address(address)}, which is no choice "
                    f"that is integrated out. {nearest(address, hidden.addresses())}"
                )
        # Numbers in place of the arrays say which of these an address has.
        arrays, structure = jax.tree.flatten(hidden)
        positions = structure.unflatten(range(len(arrays)))
        ranges: dict[int, Any] = {}
        for address in hidden.addresses():
            at = (*here, *address)
            if address in own:
                each = [np.asarray(own[address])]
            else:
                # Branches that share an address have a choice each.
                each = [_finite_values(leaf, at) for known, leaf in leaves if known == address] or [
                    _finite_values(None, at)
                ]
            if any(len(values) != len(each[0]) for values in each):
                raise EnumerationError(
                    f"The choice {show_address(at)} is to be summed out, and it has other values in one branch than in another. "
                    "Give them different addresses, or use DefaultImportance or CustomImportance."
                )
            ranges[positions.get_subtree(address).get_value()] = each[0]
        digits = [len(ranges[i]) for i, array in enumerate(arrays) for _ in range(array.size)]
        count = 1
        for digit in digits:
            count *= digit
        if count > self.max_terms:
            raise EnumerationError(
                f"The Marginal at {show_address(here)} sums over {count} combinations of the values of "
                f"{', '.join(map(show_address, hidden.addresses()))}, and `max_terms` of its Enumerate is "
                f"{self.max_terms}. Where elements are independent, map the Marginal of one element; else use "
                "DefaultImportance or CustomImportance."
            )
        columns = iter(np.unravel_index(np.arange(count), digits) if digits else ())
        values = []
        for position, array in enumerate(arrays):
            index = [next(columns) for _ in range(array.size)]
            each = np.stack(index, axis=1) if index else np.zeros((count, 0), int)
            chosen = ranges[position][each].reshape(count, *array.shape)
            values.append(jnp.asarray(chosen, array.dtype))
        return structure.unflatten(values), count


def _nan_where_unlike(hidden: ChoiceMap, proposed: ChoiceMap, weight: Score) -> Score:
    """The weight of proposed choices, NaN where one of them is absent and the hidden one is not, or the other way round.

    Of a choice that only the proposal makes there is no density by which to divide its own.
    """
    if not has_masked(hidden) and not has_masked(proposed):
        return weight
    there, drawn = present(hidden), given(hidden, proposed)
    unlike = [either(both(there[a], negated(drawn[a])), both(negated(there[a]), drawn[a])) for a in there]
    return jnp.where(jnp.any(jnp.stack([jnp.any(jnp.asarray(flag)) for flag in unlike])), jnp.nan, weight)


def unmasked(choices: ChoiceMap) -> ChoiceMap:
    """The choices as if all were there."""
    return jax.tree.map(lambda value: value.value if isinstance(value, Masked) else value, choices, is_leaf=is_masked)


def _is_first_where_absent(flags: Flags, term: ChoiceMap, first: ChoiceMap) -> Any:
    """Whether in a term of the sum every choice that is absent has the first of its values, which counts for all."""
    counts: Any = True
    for address, flag in flags.items():
        same = term.get_subtree(address).get_value() == first.get_subtree(address).get_value()
        counts = counts & jnp.all(with_axes(jnp.asarray(flag), same.ndim) | same)
    return counts


def _finite_values(leaf: Trace | None, at: tuple[Any, ...]) -> Any:
    """The values of a choice, or of one element of a vector of choices."""
    distribution = None if leaf is None else leaf.get_gen_fn()
    if isinstance(distribution, TFPDistribution) and distribution.label in ("Bernoulli", "Categorical"):
        here: Any = distribution.at(leaf.get_args())  # pyright: ignore[reportOptionalMemberAccess]
        if isinstance(here, discrete.Bernoulli):
            return np.arange(2)
        if isinstance(here, discrete.Categorical):
            return np.arange(jnp.shape(here.parameters[0])[-1])
    raise EnumerationError(
        f"The choice {show_address(at)} is to be summed out, and its values are not known to be finitely many: name them, "
        f"Enumerate({{{show_address(at[-1:])}: [0, 1, 2]}}), or use DefaultImportance or CustomImportance."
    )


def depends_on(mapped: Any, tree: Any) -> bool:
    """Whether a tree depends on arrays over which the function that is running is mapped."""
    levels = {id(leaf._trace) for leaf in jax.tree.leaves(mapped) if is_tracer(leaf)}
    return any(id(leaf._trace) in levels for leaf in jax.tree.leaves(tree) if is_tracer(leaf))


def _picked(key: PRNGKey, weights: Any, particles: Any) -> Any:
    """One of the particles, drawn by their log weights."""
    index = jax.random.categorical(key, jax.lax.stop_gradient(weights))
    return jax.tree.map(lambda leaf: leaf[index], particles)


def _check_count(count: Any) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ArgumentError(f"`num_particles` is a positive integer; got {count!r}.")

r"""`Marginal`: a generative function some of whose choices are integrated out by an algorithm.

With inner density p(u, r; x), kept choices u and hidden choices r, the density is p(u; x) = Σ_r p(u, r; x). Where it is not
known, an algorithm estimates it, and the estimate stands wherever the density would: as the score, and in weights. See
`marginal_algorithms` for what an algorithm gives. Let e be all that it draws, so that with importance sampling
e = (j, r_1, …, r_K) and r = r_j. It draws e ~ q(e; u), and there is a density π(u, e) with the marginal p(u, r) in (u, r) and

    ξ = π(u, e) / q(e; u),   so  E[ξ] = p(u).

The combinator is a sampler of (u, e) that shows u alone: e is untraced randomness in Gen's sense, and every method is that of
Gen's interface for π and q (choices u, untraced e). The return value is the inner function's at (u, r).

==============  ====================================================================================
``simulate``    (u, e) ~ π: the inner function draws (u, r), the rest of e is drawn given r;  score log ξ, E[1/ξ | u] = 1/p(u)
``assess``      e ~ q(·; u);  score log ξ
``importance``  w = log ξ, with e ~ q(·; u), where all of u is given; w = 0 where nothing is; in part: see below
``update``      e' ~ q(·; u');  w = log ξ' − log ξ, with the old estimate from the trace
``regenerate``  w = 0 where all of u is selected (u', e' ~ π); w = log ξ' − log ξ where nothing is; in part: see below
==============  ====================================================================================

An update of nothing keeps e, so its weight is 0. An estimate is never made twice for one trace: a new one for the old u would
be another sample, and Metropolis-Hastings on u would no longer have p as its stationary distribution.

**Some of u given.** Let u = (v, s) with v given and s missing, and let q₀(·; v) be the internal proposal of the inner function.
`importance` draws (s, r) ~ q₀(s, r; v), then the rest of e from π given (u, r). The weight is that of the inner function:

    w = log π(u, e) / [q₀(s, r; v) π(e | u, r)] = log p(u, r) / q₀(s, r; v),   E[exp w] = Σ_{s, r} p(v, s, r) = p(v),

and the score is log ξ, as in `simulate`. Whether a constraint by a flag is there is not known now: both are computed, and
the flags say which one counts.

**Some of u redrawn.** A move needs the density with which s was proposed, q₀(s; v) = Σ_a q₀(s, a; v). It is estimated like any
other, by hidden choices a of its own, which are used for nothing else. With q₀(a; u) the internal proposal given all of u,

    E[q₀(a; u) / q₀(s, a; v)] = 1 / q₀(s; v)   under a ~ q₀(a | s; v),
    S(u, a) := log q₀(s, a; v) / q₀(a; u) = what the choices s contribute to the score of (u, a), by ancestral sampling.

So `regenerate` draws (s', a') ~ q₀(·; v) and e' ~ q(·; u'), and for the way back b ~ q₀(·; u); then

    w = log ξ' − log ξ − S(u', a') + S(u, b)

is the log acceptance ratio of a move on (u, e) with the auxiliary variables a' and b, whose roles the way back exchanges. An
`update` that needs new kept choices s draws them so, and has w = log ξ' − log ξ − S(u', a').

**Kept choices that may be absent**, beyond a length or behind a flag, in a branch that is not taken. Which are there is part of
u, and u says it: the arguments and the kept choices decide it, never the hidden ones. So a density given u is that of what is
there, a choice that is gone is no part of v, and one that is new is among the missing s. In the way back of `regenerate`, s is
what u has and u' lacks, or what is selected.

After A. Lew et al., "Probabilistic programming with stochastic probabilities", PLDI 2023; C. Andrieu and G. Roberts, "The
pseudo-marginal approach for efficient Monte Carlo computations", 2009.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gjflax.combinators.elements import masked_elements
from gjflax.combinators.map import multiplicity
from gjflax.combinators.marginal_algorithms import DefaultImportance, MarginalAlgorithm, depends_on
from gjflax.combinators.presence import Flags, either, fitted, flagged, negated, present, selected
from gjflax.combinators.presence import given as is_among
from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap, ValueChoiceMap, VectorChoiceMap, choice_map
from gjflax.core.choice_map.vectors import all_vectors_in
from gjflax.core.context import current_address, note_estimate
from gjflax.core.diff import Diff, no_change, unknown_change
from gjflax.core.errors import (
    ArgumentError,
    MissingChoiceError,
    NotImplementedByGenerativeFunctionError,
    SelectionError,
    UnvisitedConstraintError,
    nearest,
    show_address,
)
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.lifting import share_inner_scope, vmap_module
from gjflax.core.masked import both, has_masked, where
from gjflax.core.pytree import STATIC
from gjflax.core.selection import AllSelection, Selection, select
from gjflax.core.trace import Trace, leafwise, total
from gjflax.core.typing import Arguments, PRNGKey, Score


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MarginalTrace(Trace):
    """The kept choices with their score, which may be an estimate.

    Attributes:
      inner: a trace of the inner function, with the kept choices and the hidden ones that the algorithm found: a sample
        from (an approximation of) the distribution of the hidden choices given the kept ones.
      score: log ξ.
    """

    gen_fn: Any = dataclasses.field(metadata=STATIC)
    inner: Trace
    score: Any

    @property
    def hides_choices(self) -> bool:
        return True

    def get_gen_fn(self) -> Any:
        return self.gen_fn

    def get_args(self) -> Arguments:
        return self.inner.get_gen_fn()._arguments_of(self.inner)

    def get_retval(self) -> Any:
        return self.inner.get_retval()

    def get_score(self) -> Score:
        return self.score

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return jnp.shape(self.score)

    def project(self, selection: Selection) -> Score:
        """The score where all kept choices are selected, 0 where none is.

        Raises:
          NotImplementedByGenerativeFunctionError: if some are, and others not.
        """
        kept = self.strip()
        if kept.filter(selection).is_empty():
            return jnp.zeros_like(self.score)
        if kept.filter(~selection).is_empty():
            return self.score
        raise self._lacks_shares("`project` selects some of them")

    def strip(self) -> ChoiceMap:
        return self.inner.strip().filter(self.gen_fn.selection)

    def leaves(self, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Trace]]:
        return [
            (address, KeptTrace(self, leaf))
            for address, leaf in self.inner.leaves(prefix)
            if address[len(prefix) :] in self.gen_fn.selection
        ]

    def unconstrain(self, selection: Selection) -> tuple[ChoiceMap, Score]:
        return self.inner.unconstrain(self.gen_fn.selection & selection)

    def _lacks_shares(self, problem: str) -> NotImplementedByGenerativeFunctionError:
        listed = ", ".join(map(show_address, self.strip().addresses()))
        return NotImplementedByGenerativeFunctionError(
            f"The score of the Marginal at {show_address(current_address())} is one number for all of its kept choices "
            f"({listed}), and has no parts: {problem}. Select all of them or none."
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class KeptTrace(Trace):
    """One kept choice of a `MarginalTrace`."""

    marginal: MarginalTrace
    inner: Trace

    def get_gen_fn(self) -> Any:
        return self.inner.get_gen_fn()

    def get_args(self) -> Arguments:
        return self.inner.get_args()

    def get_retval(self) -> Any:
        return self.inner.get_retval()

    def strip(self) -> ChoiceMap:
        return self.inner.strip()

    def get_score(self) -> Score:
        """The score, where it is that of this one choice alone."""
        if not isinstance(self.marginal.strip(), VectorChoiceMap) and len(self.marginal.strip().addresses()) == 1:
            if jnp.shape(self.inner.get_score()) == jnp.shape(self.marginal.score):
                return self.marginal.score
        raise self.marginal._lacks_shares("one of them was asked for by itself")

    @property
    def is_discrete(self) -> bool:
        return self.inner.is_discrete

    @property
    def is_reparameterized(self) -> bool:
        """Whether the kept choices and the estimate, as drawn, are differentiable."""
        algorithm = self.marginal.gen_fn.algorithm
        # What a proposal draws beside the given particle is not in the trace.
        drawn_alike = isinstance(algorithm, DefaultImportance) or getattr(algorithm, "num_particles", 0) == 1
        return drawn_alike and all(leaf.is_reparameterized for _, leaf in self.marginal.inner.leaves())


class Marginal(GenerativeFunction):
    """A generative function some of whose choices are integrated out. See the text of this file.

    Attributes:
      inner: the generative function.
      selection: the kept choices: a selection, an address, or a list of addresses. All others are hidden, and integrated out.
      algorithm: how: `DefaultImportance`, `CustomImportance`, `Enumerate`, or one's own `MarginalAlgorithm`.

    Where the algorithm is a linen module, as `CustomImportance` is, parameters stand below ``"inner"`` and
    ``"algorithm"`` (those of a proposal at ``("algorithm", "proposal")``); otherwise they are those of the inner function,
    at its paths.

    Unless the density is exact (`Enumerate`), gradients of it are refused, as the logarithm of an estimate has another
    gradient than that of the density, in the mean: see ``untraced`` of `unzip`, also where it is a callee.

    Raises:
      SelectionError: if the selection names what is no choice of the inner function, or an element of a vector.
      UnvisitedConstraintError: if a value is given for a hidden choice.
      NotImplementedByGenerativeFunctionError: if a hidden choice decides whether a kept one is there; from ``project``, if
        some of the kept choices are selected and others not; from ``constrain``, if the support of a kept choice depends on
        a hidden one.

    >>> import gjflax, jax, jax.numpy as jnp
    >>> @gjflax.gen
    ... def model(p):
    ...     z = gjflax.trace("z", gjflax.Bernoulli)(probs=p)
    ...     return gjflax.trace("y", gjflax.Normal)(jnp.where(z == 1, 3.0, -1.0), 1.0)
    >>> exact = gjflax.Marginal(model, "y", gjflax.Enumerate())
    >>> key, (y, score) = exact.assess(jax.random.key(0), {"y": 0.5}, (0.25,))
    >>> expected = 0.75 * jax.scipy.stats.norm.pdf(0.5, -1.0) + 0.25 * jax.scipy.stats.norm.pdf(0.5, 3.0)
    >>> jnp.allclose(jnp.exp(score), expected)
    Array(True, dtype=bool)
    >>> estimated = gjflax.Marginal(model, "y", gjflax.DefaultImportance(num_particles=100))
    >>> key, (y, score) = estimated.assess(jax.random.key(0), {"y": 0.5}, (0.25,))
    >>> bool(abs(jnp.exp(score) / expected - 1) < 0.5)
    True
    """

    trace_type = MarginalTrace

    inner: Any
    selection: Any
    algorithm: Any = DefaultImportance()

    def __post_init__(self) -> None:
        if not isinstance(self.inner, GenerativeFunction):
            raise ArgumentError(f"`Marginal` takes a generative function; got {self.inner!r:.80}. Is @gen missing?")
        if not isinstance(self.algorithm, MarginalAlgorithm):
            raise ArgumentError(
                "`algorithm` of a Marginal is DefaultImportance, CustomImportance, Enumerate or another MarginalAlgorithm; "
                f"got {self.algorithm!r:.80}."
            )
        selection = self.selection if isinstance(self.selection, Selection) else select(self.selection)
        if any(not isinstance(part, str) for address in selection.addresses for part in address):
            raise SelectionError(
                "The selection of a Marginal names an element of a vector, and it keeps a choice in all elements or in none. "
                "Map the Marginal of one element."
            )
        object.__setattr__(self, "selection", selection)
        super().__post_init__()

    def setup(self) -> None:
        if not isinstance(self.algorithm, nn.Module):
            share_inner_scope(self)

    # What algorithms use ----------------------------------------------------------------------------------------

    @nn.nowrap
    def kept_of(self, trace: Trace) -> ChoiceMap:
        """The kept choices of a trace of the inner function."""
        return trace.strip().filter(self.selection)

    @nn.nowrap
    def hidden_of(self, trace: Trace) -> ChoiceMap:
        """The hidden choices of a trace of the inner function."""
        return trace.strip().filter(~self.selection)

    @nn.nowrap
    def mapped(self, function: Callable[..., Any], count: int) -> Callable[..., Any]:
        """``function(marginal, tree)`` over `count` entries on the leading axis of the tree's arrays."""
        return vmap_module(function, (0,), count)

    # The interface ----------------------------------------------------------------------------------------------

    def simulate(self, key: PRNGKey, args: Arguments) -> tuple[PRNGKey, MarginalTrace]:
        key, drawing, estimating = jax.random.split(key, 3)
        _, inner = self.inner.simulate(drawing, args)
        return key, self._with_hidden(estimating, inner, args)

    def importance(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Score, MarginalTrace]]:
        given = self._visible(choices, strict)
        if given.is_empty():
            key, trace = self.simulate(key, args)
            return key, (jnp.zeros_like(trace.score), trace)
        key, drawing, estimating, others = jax.random.split(key, 4)
        _, (weight, inner) = self.inner.importance(drawing, given, args, strict=strict)
        kept = self.kept_of(inner)
        complete = is_given(given, kept)
        if complete is False:
            return key, (weight, self._with_hidden(estimating, inner, args))
        all_given = self._estimated(estimating, kept, args)
        if complete is True:
            return key, (all_given.score, all_given)
        in_part = self._with_hidden(others, inner, args)
        return key, leafwise(complete, (all_given.score, all_given), (weight, in_part))

    def assess(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Any, Score]]:
        key, below = jax.random.split(key)
        given = self._visible(choices, strict)
        held = given
        if any(not isinstance(part.known_indices, range) for part in all_vectors_in(given)):
            # Where elements may be absent, some may be all that are there.
            held = self.kept_of(self.inner.importance(below, given, args, strict=strict)[1][1])
        trace = self._estimated(below, held, args, assessing=True)
        there = is_given(given, trace.strip())
        if there is False:
            missing = [address for address in trace.strip().addresses() if not given.has_subtree(address)]
            raise MissingChoiceError(
                f"`assess` needs a value for every kept choice, and none was given for "
                f"{show_address((*current_address(), *(missing or trace.strip().addresses())[0]))}, or not for all of its "
                "elements. Give one, or use `importance`, which draws it."
            )
        # Whether a masked choice is there is not known now; where it is not, there is no density to give.
        score = trace.score if there is True else jnp.where(there, trace.score, jnp.nan)
        return key, (trace.get_retval(), score)

    def update(
        self,
        key: PRNGKey,
        trace: Any,
        choices: ChoiceMap,
        argdiffs: Arguments,
        *,
        param_diff: Any = unknown_change,
        strict: bool = True,
    ) -> tuple[PRNGKey, tuple[Any, Score, MarginalTrace, ChoiceMap]]:
        given = self._visible(choices, strict)
        if given.is_empty() and self.knows_no_change(trace, argdiffs, param_diff):
            return key, (no_change(trace.get_retval()), jnp.zeros_like(trace.score), trace, EmptyChoiceMap())
        args = Diff.primal(argdiffs)
        key, changing, estimating, drawing = jax.random.split(key, 4)
        options = {"param_diff": param_diff, "strict": strict}
        _, (_, _, inner, discard) = self.inner.update(changing, trace.inner, given, argdiffs, **options)
        kept, old = self.kept_of(inner), trace.strip()
        if has_masked(kept):
            given = fitted(given, old)
            new, contribution = self._redrawn(drawing, estimating, old.overwrite(given), args)
            before, after, overwritten = present(old), is_among(old, new.strip()), is_among(old, given)
            discard = flagged(
                old, {a: both(there, either(overwritten[a], negated(after[a]))) for a, there in before.items()}
            )
            return key, (unknown_change(new.get_retval()), new.score - trace.score - contribution, new, discard)
        known = {*old.addresses(), *given.addresses()}
        if known.issuperset(kept.addresses()):
            new = self._estimated(estimating, kept, args)
            weight = new.score - trace.score
        else:
            held = kept.filter(_selected(known))
            new, contribution = self._redrawn(drawing, estimating, held, args)
            weight = new.score - trace.score - contribution
        return key, (unknown_change(new.get_retval()), weight, new, discard.filter(self.selection))

    def regenerate(
        self,
        key: PRNGKey,
        trace: Any,
        selection: Selection,
        argdiffs: Arguments,
        *,
        param_diff: Any = unknown_change,
    ) -> tuple[PRNGKey, tuple[Any, Score, MarginalTrace]]:
        kept, args = trace.strip(), Diff.primal(argdiffs)
        if kept.filter(selection).is_empty():
            options = {"param_diff": param_diff}
            key, (retdiff, weight, new, _) = self.update(key, trace, EmptyChoiceMap(), argdiffs, **options)
            return key, (retdiff, weight, new)
        if kept.filter(~selection).is_empty():
            key, new = self.simulate(key, args)
            return key, (unknown_change(new.get_retval()), jnp.zeros_like(new.score), new)
        key, drawing, estimating, back = jax.random.split(key, 4)
        redrawn, before = selected(kept, selection), present(kept)
        held = kept.filter(~selection)
        if has_masked(kept):
            held = flagged(kept, {a: both(there, negated(redrawn[a])) for a, there in before.items()})
        new, contribution = self._redrawn(drawing, estimating, held, args)
        _, (_, reverse) = self.inner.importance(back, kept, trace.get_args())
        # A choice that is gone would be redrawn on the way back.
        if has_masked(kept):
            after = is_among(kept, new.strip())
            lost = {a: both(there, either(redrawn[a], negated(after[a]))) for a, there in before.items()}
            contribution_back = self._score_where(reverse, lost)
        else:
            stays = _selected({*held.addresses()}.intersection(new.strip().addresses()))
            contribution_back = reverse.project(self.selection) - reverse.project(self.selection & stays & ~selection)
        weight = new.score - trace.score - contribution + contribution_back
        return key, (unknown_change(new.get_retval()), weight, new)

    def constrain(
        self, unconstrained: ChoiceMap, args: Arguments, *, fixed: ChoiceMap | None = None
    ) -> tuple[ChoiceMap, Score]:
        held = self._visible(choice_map(fixed), True)
        self._visible(unconstrained, True)
        # Any hidden choices do: their values must not matter.
        _, trace = self.inner.simulate(jax.random.key(0), args)
        depends = []

        def run(marginal: Any, hidden: ChoiceMap) -> tuple[ChoiceMap, Score]:
            mapped, log_det = marginal.inner.constrain(unconstrained, args, fixed=held.merge(hidden))
            mapped = mapped.filter(marginal.selection)
            depends.append(depends_on(hidden, (mapped, log_det)))
            return mapped, log_det

        one = jax.tree.map(lambda leaf: leaf[None], self.hidden_of(trace))
        result = self.mapped(run, 1)(self, one)
        if any(depends):
            raise NotImplementedByGenerativeFunctionError(
                f"The support of a kept choice of the Marginal at {show_address(current_address())} depends on a hidden "
                "choice, so there is no map from R^n to it. Keep that choice too, or map the others and give this one as "
                "`fixed`."
            )
        return jax.tree.map(lambda leaf: leaf[0], result)

    @nn.nowrap
    def variables_of(self, trace: Any) -> Mapping[str, Any]:
        known = self.inner.variables_of(trace.inner)
        if not isinstance(self.algorithm, nn.Module):
            return known
        return {name: {"inner": collection} for name, collection in known.items()}

    # Inside -----------------------------------------------------------------------------------------------------

    @nn.nowrap
    def _with_hidden(self, key: PRNGKey, inner: Trace, args: Arguments) -> MarginalTrace:
        """A trace with the hidden choices of a trace of the inner function, which were drawn with the kept ones."""
        self._check(inner, args)
        return MarginalTrace(self.as_unbound(), inner, self.algorithm.estimate_with(key, self, inner, args))

    @nn.nowrap
    def _estimated(self, key: PRNGKey, kept: ChoiceMap, args: Arguments, assessing: bool = False) -> MarginalTrace:
        """A trace with these kept choices, with an estimate and hidden choices that the algorithm finds."""
        key, running = jax.random.split(key)
        estimate = self.algorithm.estimate(key, self, kept, args)
        if assessing and estimate.randomness is not None:
            note_estimate(estimate.randomness)
        _, (_, inner) = self.inner.importance(running, kept.merge(estimate.hidden), args)
        self._check(inner, args)
        return MarginalTrace(self.as_unbound(), inner, estimate.log_density)

    @nn.nowrap
    def _redrawn(
        self, drawing: PRNGKey, estimating: PRNGKey, held: ChoiceMap, args: Arguments
    ) -> tuple[MarginalTrace, Score]:
        """A trace with the kept choices that are not held redrawn; and S(u', a'), what these contribute to a score."""
        _, (weight, drawn) = self.inner.importance(drawing, held, args, strict=False)
        contribution = drawn.project(self.selection) - weight
        return self._estimated(estimating, self.kept_of(drawn), args), contribution

    @nn.nowrap
    def _visible(self, choices: ChoiceMap, strict: bool) -> ChoiceMap:
        """The choices that are kept, with an error for others."""
        others = choices.filter(~self.selection)
        if strict and not others.is_empty():
            here = current_address()
            kept = [(*here, *address) for address in self.selection.addresses]
            raise UnvisitedConstraintError(
                f"A value was given for {show_address((*here, *others.addresses()[0]))}, which is not among the kept choices "
                f"of the Marginal at {show_address(here)}: what is not kept is integrated out, so it has no value. "
                f"{nearest((*here, *others.addresses()[0]), kept)} To ignore what is not used, pass strict=False."
            )
        return choices.filter(self.selection)

    @nn.nowrap
    def _score_where(self, trace: Trace, flags: Flags) -> Score:
        """The score of those kept choices of a trace of the inner function whose flags are true."""
        leaves = [(address, leaf) for address, leaf in trace.leaves() if address in flags]
        if {address for address, _ in leaves} != set(flags):
            raise NotImplementedByGenerativeFunctionError(
                f"The inner function of the Marginal at {show_address(current_address())} does not give its single choices' "
                "traces by `leaves`, which `regenerate` of some kept choices needs where others may be absent. Select all."
            )
        parts = [(flags[address], multiplicity(leaf) * leaf.get_score()) for address, leaf in leaves]
        return total([jnp.sum(where(flag, score, jnp.zeros_like(score))) for flag, score in parts])

    @nn.nowrap
    def _check(self, inner: Trace, args: Arguments) -> None:
        """Errors for a selection that does not fit the inner function."""
        here, known, kept = current_address(), inner.strip(), self.kept_of(inner)
        for address in self.selection.addresses:
            if not known.has_subtree(address):
                raise SelectionError(
                    f"The selection of the Marginal at {show_address(here)} names {show_address(address)}, and its inner "
                    f"function has no choice there. {nearest(address, known.addresses())}"
                )
        if kept.is_empty():
            raise SelectionError(
                f"The selection of the Marginal at {show_address(here)} keeps no choice of its inner function. "
                f"{nearest('', known.addresses())}"
            )
        if has_masked(kept):
            self._check_presence(kept, self.hidden_of(inner), args)

    @nn.nowrap
    def _check_presence(self, kept: ChoiceMap, hidden: ChoiceMap, args: Arguments) -> None:
        """An error where a hidden choice decides which of the kept ones are there."""
        decided: list[tuple[str, ...]] = []

        def run(marginal: Any, hidden: ChoiceMap) -> Score:
            _, (weight, trace) = marginal.inner.importance(jax.random.key(0), kept.merge(hidden), args)
            flags = present(marginal.kept_of(trace))
            decided.extend(address for address, flag in flags.items() if depends_on(hidden, flag))
            return weight

        if not hidden.is_empty():
            self.mapped(run, 1)(self, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], hidden))
        if decided:
            here = current_address()
            raise NotImplementedByGenerativeFunctionError(
                f"Whether the kept choice {show_address((*here, *decided[0]))} is there depends on a hidden choice of the "
                f"Marginal at {show_address(here)}, so that it is known which of the kept choices are there only where that one "
                "is. Keep the choice on which it depends too, or hide both."
            )


def is_given(given: ChoiceMap, choices: ChoiceMap) -> Any:
    """Whether the choices are all given: a bool where it is known while tracing, else an array."""
    if isinstance(choices, VectorChoiceMap):
        if not isinstance(given, VectorChoiceMap):
            return is_given(given, choices.inner)
        indices, length = given.known_indices, len(choices)
        if indices is not None and has_masked(choices):
            # Those that are absent need not be given.
            inner = given.inner if given.covers(length) else masked_elements(given.inner, np.asarray(indices), length)
            return is_given(inner, choices.inner)
        if indices is None or sorted(indices) != list(range(length)):
            return False
        return is_given(given.inner, choices.inner)
    if isinstance(choices, ValueChoiceMap):
        here = present(given)[()] if given.is_value() else False
        either_way = either(negated(present(choices)[()]), here)
        return either_way if isinstance(either_way, bool) else jnp.all(either_way)
    flags = [is_given(given.get_submap(name), choices.get_submap(name)) for name in choices.names()]
    if any(flag is False for flag in flags):
        return False
    unknown = [flag for flag in flags if flag is not True]
    return jnp.all(jnp.stack(unknown)) if unknown else True


def _selected(addresses: set[tuple[str, ...]]) -> Selection:
    return AllSelection() if () in addresses else select(*addresses)

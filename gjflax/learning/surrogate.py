r"""The surrogate of a sum of costs: its value is the estimate, and its gradient that of every choice's estimator.

The log weight of a sample is a sum of terms, W = Σ_c c with c = log p of a model site or −log q of a guide site. What is
returned is

    S = Σ_c Σ_v q(v) c(v)                                     enumerated choices, summed over their values
      + Σ_a stop(f_a − b_a) (log q_a − stop(log q_a))          choices with the score function
      + Σ_a Σ_θ stop(k_θ (f_a(z⁺) − f_a(z⁻))) (θ − stop(θ))    choices with a measure-valued derivative

where f_a is the sum of the terms downstream of a, element by element on its plates where that is known (see `downstream`),
and b_a its baseline. The last two lines are 0 in value. Reparameterised choices need nothing: the terms are differentiable
through them.

Values z⁺ and enumerated values are given to the guide as constraints, in runs with the same key. Keys go by address, so the
choices that do not depend on them are the same in every run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gjflax.core.choice_map import ChoiceMap, EmptyChoiceMap, choice_map
from gjflax.core.lifting import Streams, vmap_module
from gjflax.core.masked import Masked
from gjflax.core.trace import Trace, total
from gjflax.core.typing import Arguments, PRNGKey
from gjflax.distributions.arguments import wider
from gjflax.learning import runs
from gjflax.learning.baselines import Signals
from gjflax.learning.divergence import divergence
from gjflax.learning.downstream import gather
from gjflax.learning.enumerated import Sums, combinations
from gjflax.learning.estimators.estimator import PATHWISE
from gjflax.learning.estimators.measure_valued import pairs_of
from gjflax.learning.flow import flow_of
from gjflax.learning.plan import DIVERGENCE, Plan, make_plan
from gjflax.learning.sites import Address, Site, kinds_of, sites_of


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is estimated: a guide and a model at what is observed.

    Attributes:
      observed: the observed choices.
      model_args: the arguments of the model.
      guide_args: the arguments of the guide.
      wants_divergence: for an address of the guide, whether an analytic divergence is wanted there.
    """

    observed: ChoiceMap
    model_args: Arguments
    guide_args: Arguments
    wants_divergence: Callable[[Address], bool] = lambda address: False


def sample(
    module: Any, model_key: PRNGKey, guide_key: PRNGKey, trace: Trace, streams: Streams, problem: Problem
) -> tuple[Plan, Any]:
    """One sample of a module with a guide and a model: its plan, and the arrays that a `Surrogate` is made of.

    The guide and the model may run many times, at several values of one choice. All of these are one sample: randomness
    that is no choice (dropout) is the same in them.

    Args:
      module: the module, bound.
      model_key: the key of the model's run.
      guide_key: the key of the guide's run.
      trace: what the guide drew with it.
      streams: where the module's rng streams stood before that.
      problem: see `Problem`.
    """
    sites = sites_of(trace)
    kinds = kinds_of(sites)
    choices = trace.strip()
    flow, first = None, None
    if any(kind != PATHWISE for kind in kinds) or any(problem.wants_divergence(site.address) for site in sites):
        flow = flow_of(module.guide, module.model, choices, problem.observed, problem.guide_args, problem.model_args)
    if flow is None:
        first = runs.weigh(module.model, model_key, runs.merged(choices, problem.observed), problem.model_args)
    model_sites = flow.model_sites if first is None else sites_of(first[0])  # pyright: ignore[reportOptionalMemberAccess]
    runs.require_floats(sites, kinds, model_sites)
    plan = make_plan(sites, kinds, model_sites, flow, problem.wants_divergence)

    def run(module: Any, given: ChoiceMap) -> Any:
        """The guide with some choices given, and the model."""
        if given.is_empty():
            guide_trace, weighed = trace, first
        else:
            streams.rewind()
            _, (_, guide_trace) = module.guide.importance(guide_key, given, problem.guide_args)
            weighed = None
        if weighed is None:
            together = runs.merged(guide_trace.strip(), problem.observed)
            weighed = runs.weigh(module.model, model_key, together, problem.model_args)
        guide_sites = sites_of(guide_trace)
        return guide_sites, _reading(plan, guide_sites, sites_of(weighed[0]), weighed[1])

    def with_pairs(module: Any, given: ChoiceMap) -> Any:
        """The same, and again at the two values for each parameter of every measured choice."""
        guide_sites, reading = run(module, given)
        measured = []
        for number, choice in enumerate(plan.measured):
            site = guide_sites[choice.number]
            pairs = pairs_of(site.leaf, jax.random.fold_in(guide_key, number))
            each = [_one_by_one(site, choice.kept, pair) for pair in pairs]
            values, elements = (jnp.concatenate(parts) for parts in zip(*each, strict=True))
            is_whole = choice.kept == len(site.plates)

            def again(module: Any, value: Any, there: Any, whole: bool = is_whole, at: Address = site.address) -> Any:
                constraint = choice_map({at: value if whole else Masked(value, there)})
                return run(module, given.overwrite(constraint))[1]

            readings = vmap_module(again, (0, 0), len(values), same_streams=True)(
                module, lax.stop_gradient(values), elements
            )
            parameters = [(pair.parameter, lax.stop_gradient(pair.constant)) for pair in pairs]
            measured.append((lax.stop_gradient(readings), parameters, site.present))
        return reading, measured

    if not plan.enumerated:
        return plan, with_pairs(module, EmptyChoiceMap())
    values = combinations(plan.enumerated)

    def at_values(module: Any, *values: Any) -> Any:
        return with_pairs(module, _given(plan, sites, values))

    return plan, vmap_module(at_values, (0,) * len(values), len(values[0]), same_streams=True)(module, *values)


def _given(plan: Plan, sites: tuple[Site, ...], values: tuple[Any, ...]) -> ChoiceMap:
    given = {}
    for choice, value in zip(plan.enumerated, values, strict=True):
        shape = next(site for site in sites if site.address == choice.address).leaf.get_retval().shape
        given[choice.address] = jnp.broadcast_to(value, shape)
    return choice_map(given)


def _one_by_one(site: Site, kept: int, pair: Any) -> tuple[Any, Any]:
    """The choice's value with one number changed after the other, first to z⁺, then to z⁻: on a first axis.

    Numbers in different elements of the outermost plates, as many as are kept, are changed at once. The second result says
    in which elements of all plates: the others may depend on these, and are drawn again.
    """
    value = site.leaf.get_retval()
    shape = value.shape[kept:]
    which = jnp.eye(math.prod(shape), dtype=bool).reshape((math.prod(shape),) + (1,) * kept + shape)
    changed = [jnp.where(which, part[None].astype(value.dtype), value[None]) for part in (pair.plus, pair.minus)]
    plates = len(site.plates)
    elements = jnp.any(which, axis=tuple(range(1 + plates, which.ndim)))
    elements = jnp.broadcast_to(elements, (len(elements), *site.shape))
    return jnp.concatenate(changed), jnp.concatenate([elements, elements])


def _reading(plan: Plan, guide: tuple[Site, ...], model: tuple[Site, ...], correction: Any) -> dict[str, Any]:
    """The arrays of one run: log q of the guide's sites, those of enumerated choices, and the terms."""
    terms = []
    for term in plan.terms:
        if term.kind == DIVERGENCE:
            assert term.guide is not None and term.model is not None
            terms.append(-guide[term.guide].multiplicity * divergence(guide[term.guide], model[term.model]))
            continue
        site, sign = (guide[term.guide], -1) if term.guide is not None else (model[term.model or 0], 1)
        terms.append(sign * site.multiplicity * site.log_density)
    return {
        "log_q": [site.log_density for site in guide],
        "enumerated": [
            choice.log_q([site for site in guide if site.address == choice.address]) for choice in plan.enumerated
        ],
        "terms": terms,
        "correction": correction,
    }


class Surrogate:
    """The estimate of samples, of the plan and the arrays that `sample` gives, stacked on a first axis.

    Args:
      plan: the plan.
      arrays: the arrays of all samples.
    """

    def __init__(self, plan: Plan, arrays: Any):
        self._plan = plan
        reading, measured = arrays
        self._numbers = tuple(choice.number for choice in plan.enumerated)
        self._reading = self._with_axes(reading, 1)
        self._measured = [
            (
                self._with_axes(jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1 + bool(self._numbers), 0), again), 2),
                [(self._with_axes(theta, 1), self._with_axes(constant, 1)) for theta, constant in parameters],
                None if present is None else self._with_axes(present, 1),
            )
            for again, parameters, present in measured
        ]
        before = [plan.before[choice.address] for choice in plan.enumerated]
        self._sums = Sums(1, self._reading["enumerated"], before)
        self._before = before

    def _with_axes(self, arrays: Any, leading: int) -> Any:
        """Arrays with one axis for each enumerated choice, where they have one for all."""
        if not self._numbers:
            return arrays
        return jax.tree.map(
            lambda leaf: leaf.reshape(leaf.shape[:leading] + self._numbers + leaf.shape[leading + 1 :]), arrays
        )

    def signals(self) -> Signals:
        """The costs downstream of every choice with the score function: see `baselines`."""
        result = {}
        for number in self._plan.scored():
            choice = self._plan.choices[number]
            result[name_of(choice.address)] = lax.stop_gradient(
                self._downstream(self._sums, self._reading, number, len(choice.plates))
            )
        return result

    def log_weights(self, baselines: Signals) -> Any:
        """S of every sample, with these baselines."""
        plan, sums = self._plan, self._sums
        parts = [self._total_of_terms(range(len(plan.terms))), self._correction()]
        signals = self.signals()
        for number in plan.scored():
            choice = plan.choices[number]
            name = name_of(choice.address)
            known = plan.before[choice.address]
            log_q = sums.restrict(self._reading["log_q"][number], known)
            signal = lax.stop_gradient(signals[name] - baselines.get(name, jnp.zeros_like(signals[name])))
            parts.append(sums.total(_times(signal, log_q - lax.stop_gradient(log_q)), known))
        for choice, (again, parameters, present) in zip(plan.measured, self._measured, strict=True):
            parts.append(self._of_measured(choice, again, parameters, present))
        return total(parts)

    def terms_by_address(self) -> dict[str, Any]:
        """log p − log q of each address, of every sample: they add up to the log weights."""
        addresses = dict.fromkeys(term.address for term in self._plan.terms)
        numbers = {a: [n for n, term in enumerate(self._plan.terms) if term.address == a] for a in addresses}
        return {name_of(a): lax.stop_gradient(self._total_of_terms(numbers[a])) for a in addresses}

    def _correction(self) -> Any:
        correction = self._reading["correction"]
        return jnp.sum(correction, axis=tuple(range(1, correction.ndim)))

    def _total_of_terms(self, numbers: Any) -> Any:
        known = {number: self._plan.term_before[number] for number in numbers}
        terms = {number: self._sums.restrict(self._reading["terms"][number], known[number]) for number in numbers}
        return total([self._sums.total(terms[number], known[number]) for number in numbers])

    def _downstream(self, sums: Sums, reading: Any, number: int, kept: int) -> Any:
        """The terms downstream of a choice, as each of its elements sees them on as many plates as are kept."""
        choice = self._plan.choices[number]
        own = self._plan.before[choice.address]
        parts = [jnp.zeros((1,) * (sums.axes + len(choice.plates)), reading["correction"].dtype)]
        for term, relation in self._plan.reach[choice.address].items():
            known = self._plan.term_before[term]
            cost = sums.over(sums.restrict(reading["terms"][term], known), known - own)
            parts.append(gather(cost, relation[:kept], choice.plates, sums.axes))
        return total(parts)

    def _of_measured(self, choice: Any, again: Any, parameters: Any, present: Any) -> Any:
        """The measure-valued part of one choice: Σ_θ stop(k (f(z⁺) − f(z⁻))) (θ − stop(θ))."""
        plan, sums = self._plan, self._sums
        plates = plan.choices[choice.number].plates
        known = plan.before[plan.choices[choice.number].address]
        costs = self._downstream(Sums(2, again["enumerated"], self._before), again, choice.number, choice.kept)
        # Its first axis: parameters, then z⁺ and z⁻, then the numbers of the value that are changed one by one.
        costs = costs.reshape(len(parameters), 2, -1, *costs.shape[1:])
        parts = []
        for difference, (theta, constant) in zip(costs[:, 0] - costs[:, 1], parameters, strict=True):
            theta, constant = sums.restrict(theta, known), sums.restrict(constant, known)
            below = theta.shape[sums.axes + choice.kept :]
            # From (numbers, ..., kept plates, 1, ...) to (..., kept plates, the axes of the numbers).
            difference = jnp.moveaxis(difference, 0, -1)[(..., *(0,) * (len(plates) - choice.kept), slice(None))]
            difference = difference.reshape(*difference.shape[: sums.axes + choice.kept], *below)
            part = _times(_times(lax.stop_gradient(constant), difference), theta - lax.stop_gradient(theta))
            part = jnp.sum(part, axis=tuple(range(sums.axes + len(plates), part.ndim)))
            if present is not None:
                part = jnp.where(sums.restrict(present, known), part, 0)
            parts.append(sums.total(part, known))
        return total(parts)


def _times(one: Any, other: Any) -> Any:
    """The product of two float arrays, in the more precise of their dtypes."""
    dtype = wider(one.dtype, other.dtype)
    return one.astype(dtype) * other.astype(dtype)


def name_of(address: Address) -> str:
    """An address as one string."""
    return "/".join(map(str, address)) or "root"

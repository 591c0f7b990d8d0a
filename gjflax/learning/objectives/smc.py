r"""`SMCObjective`: the bound of a particle filter as a module.

A model and a guide that run step by step, p = Π_t p(z_t, x_t | s_{t−1}) and q = Π_t q(z_t | r_{t−1}), where the states s and r
are what their kernels return. K particles, each with both states, go through the steps together. Step t

    resamples     a_k with E[number of descendants of j] = K W_j, W_j the normalised weights; then all weights are 1
    proposes      z_k ~ q(z_t | r_k)
    weighs        w_k ← w_k α_k,   α_k = p(z_k, x_t | s_k) / q(z_k | r_k)

and with the mean of the weights before each resampling and at the end,

    p̂(x) = Π_resamplings (1/K Σ_k w_k) · (1/K Σ_k w_k at the end),   E[p̂(x)] = p(x),   E[log p̂(x)] ≤ log p(x).

Without resampling log p̂ is the importance weighted bound. With it the bound's gap grows with the number of steps where that
bound's grows with its exponential (Maddison et al., "Filtering variational objectives", NIPS 2017; Le et al., "Auto-encoding
sequential Monte Carlo", ICLR 2018; Naesseth et al., "Variational sequential Monte Carlo", AISTATS 2018).

**The gradient.** The ancestors are choices too. Given them, log p̂ is differentiated through reparameterised draws and through
the weights. What is drawn without a reparameterisation is credited with what it can still change:

    ∇E[log p̂] = E[∇_paths log p̂ + Σ_{t,k} (log p̂ − log p̂_t − b_{t,k}) ∇ (log W_{a_{t,k}} + log q(z_{t,k} | r_k))],

where log p̂_t is what was fixed before, the part of log p̂ up to the last resampling, log q counts for choices with the score
function, and b_{t,k} is the log mean of the other particles' weights after step t, which depends on neither a_{t,k} nor z_{t,k}.

*Dropping the ancestors' part* makes the gradient biased, and vary much less: the three papers train that way. Two things go with
that choice only. Whether to resample by the effective sample size is a jump in every path that crosses the threshold, which no
gradient through the path sees. And the probability of ancestors that are drawn together (systematic, stratified, residual) has a
score function of infinite variance.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gjflax.combinators.elements import given_elements, split_key
from gjflax.combinators.map import Map
from gjflax.combinators.unfold import Unfold
from gjflax.core.choice_map import ChoiceMap
from gjflax.core.errors import ArgumentError, ChoiceMapError, UnvisitedConstraintError, show_address
from gjflax.core.frozen import thawed
from gjflax.core.interface import is_tracer
from gjflax.core.lifting import scan_module, vmap_module, written_where
from gjflax.core.masked import where
from gjflax.core.selection import select
from gjflax.core.trace import plain, total
from gjflax.core.typing import Arguments, FloatArray, PRNGKey
from gjflax.learning import runs
from gjflax.learning.estimators.estimator import PATHWISE
from gjflax.learning.estimators.relaxed import RELAXED
from gjflax.learning.objectives.base import Objective, effective_sample_size
from gjflax.learning.objectives.renyi import bounds_without_each, renyi_bound
from gjflax.learning.objectives.unfolds import Found, Pair, at_step, find
from gjflax.learning.resampling import SCHEMES, draw_ancestors
from gjflax.learning.sites import kinds_of, sites_of

ALWAYS, NEVER = "always", "never"


class SMCObjective(Objective):
    """Minus the log evidence by a particle filter, a loss. Its randomness comes from the rng stream "choice".

    Its gradient is unbiased by default. With ``ancestor_gradient=False`` it is **biased**, and varies much less: what Maddison
    et al., Le et al. and Naesseth et al. train with. Only then may `resample` be a fraction, and `scheme` another.

    Attributes:
      model: an `Unfold`; its choices at each step are those of the guide's step and the observed ones.
      guide: an `Unfold` over the same steps, which proposes each step's choices that are not observed.
      num_samples: the number K of particles.
      resample: ``"always"``, before every step but the first; ``"never"``, which leaves the importance weighted bound; or
        a fraction: where the effective sample size is below that fraction of the particles.
      scheme: ``"multinomial"``, ``"systematic"``, ``"stratified"`` or ``"residual"``.
      ancestor_gradient: whether the gradient has the score function of the ancestors that resampling draws. Choices of the
        guide that have the score function have it either way.

    Model and guide may stand in a `TrainCombinator`, in a `Dimap`, or in a body without other choices, both at the same
    address. Two `Map`s of these are filters side by side, one for each sequence, and the loss is their sum.

    The collection "diagnostics" gets ``log_weights``, of shape ``[num_samples]``, whose log mean is the bound; the
    ``effective_sample_size`` after each step, ``[steps]``; and the number of ``resamplings``. Of two `Map`s all have a leading
    axis of sequences.

    Raises:
      ArgumentError: if model or guide is no `Unfold` in this sense, their lengths differ, or the gradient that is asked for
        is not unbiased as it should be.
      MissingChoiceError, UnvisitedConstraintError: if model and guide do not have the same choices.

    >>> import gjflax, jax
    >>> @gjflax.gen(gjflax.Unfold, max_length=20)
    ... def model(time, position):
    ...     position = gjflax.trace("position", gjflax.Normal)(position, 1.0)
    ...     gjflax.trace("seen", gjflax.Normal)(position, 0.5)
    ...     return position
    >>> @gjflax.gen(gjflax.Unfold, max_length=20)
    ... def guide(time, position, seen):
    ...     return gjflax.trace("position", gjflax.Normal)(0.2 * position + 0.8 * seen[time], 0.2**0.5)
    >>> seen = jnp.sin(jnp.arange(20.0))
    >>> objective = SMCObjective(model=model, guide=guide, num_samples=16)
    >>> objective.apply({}, {"seen": seen}, (20, 0.0), (20, 0.0, seen), rngs={"choice": jax.random.key(1)}).shape
    ()
    """

    resample: Any = ALWAYS
    scheme: str = "multinomial"
    ancestor_gradient: bool = True

    def __post_init__(self) -> None:
        if not _is_criterion(self.resample):
            raise ArgumentError(
                f'`resample` is "always", "never", or a fraction of the particles between 0 and 1; got {self.resample!r:.80}.'
            )
        if self.scheme not in SCHEMES:
            raise ArgumentError(f"`scheme` is one of {', '.join(SCHEMES)}; got {self.scheme!r:.80}.")
        if not isinstance(self.ancestor_gradient, bool):
            raise ArgumentError(f"`ancestor_gradient` is True or False; got {self.ancestor_gradient!r:.80}.")
        if self.ancestor_gradient and self.resample != NEVER and self.scheme != "multinomial":
            raise ArgumentError(
                f"The score function of ancestors by the {self.scheme} scheme has infinite variance. Use "
                '`scheme="multinomial"`; or leave that part of the gradient out, which makes it biased: '
                "`ancestor_gradient=False`."
            )
        super().__post_init__()

    def loss(self, key: PRNGKey, observed: ChoiceMap, model_args: Arguments, guide_args: Arguments) -> FloatArray:
        model, guide = find("model", self.model, model_args, key), find("guide", self.guide, guide_args, key)
        observed_below = _observed_of(model, guide, observed)
        if self.is_initializing():
            # The variables are those of any objective, and so is the bound where nothing is resampled.
            return -renyi_bound(self.draw(key, observed, model_args, guide_args).log_weights)
        result = _Filter(self).run(_pair(self.scope, model, guide), key, observed_below, model.args, guide.args)
        self.sow_diagnostics(**result.diagnostics)
        return -result.bound


class _Result(NamedTuple):
    """What a filter gives: log p̂, with the gradient of its expectation, and what there is to know of it."""

    bound: Any
    diagnostics: dict[str, Any]


class _Carry(NamedTuple):
    """Between two steps. The states are pairs, of the model and the guide, of all particles.

    Attributes:
      before: what the last step that counts was given.
      states: what it returned.
      log_weights: since the last resampling.
      log_evidence: log p̂ up to there.
      resamplings: how many there were.
    """

    before: Any
    states: Any
    log_weights: Any
    log_evidence: Any
    resamplings: Any


class _Filter:
    """A particle filter with an objective's settings."""

    def __init__(self, objective: SMCObjective):
        self.count = objective.num_samples
        self.resample = objective.resample
        self.scheme = objective.scheme
        self.ancestor_gradient = objective.ancestor_gradient and objective.resample != NEVER

    def run(
        self, pair: Pair, key: PRNGKey, observed: ChoiceMap, model_args: Arguments, guide_args: Arguments
    ) -> _Result:
        """The filter of a pair of `Unfold`s; of a pair of `Map`s the sum over the filters of their elements."""
        if not isinstance(pair.model, Map):
            return _Steps(self, pair, model_args, guide_args).run(pair, key, observed)
        model, guide = pair.model, pair.guide
        length = _same_length(model, guide, model_args, guide_args)
        given, indices = given_elements(observed, length)
        if indices is not None:
            raise ChoiceMapError(
                f"An objective needs the observations of all {length} elements of a Map; the choice map gives "
                f"{indices.shape[0]}, by index."
            )

        def element(pair: Pair, key: PRNGKey, observed: ChoiceMap, model_args: Arguments, guide_args: Arguments) -> Any:
            pair.model._try_setup()
            pair.guide._try_setup()
            model = find("model", pair.model.inner, model_args, key)
            guide = find("guide", pair.guide.inner, guide_args, key)
            observed = _observed_of(model, guide, observed)
            return self.run(_pair(pair.scope, model, guide), key, observed, model.args, guide.args)

        axes = (0, 0, model._axes(model_args), guide._axes(guide_args))
        lifted = vmap_module(element, axes, length, thawed(model.variable_axes), thawed(model.split_rngs))
        bounds, diagnostics = lifted(pair, jax.random.split(key, length), given, model_args, guide_args)
        return _Result(model._of_population(jnp.sum(bounds), length), diagnostics)


class _Steps:
    """The steps of one filter."""

    def __init__(self, settings: _Filter, pair: Pair, model_args: Arguments, guide_args: Arguments):
        model, guide = pair.model, pair.guide
        self.settings = settings
        self.args = model_args, guide_args
        self.plans = model._plan(model_args), guide._plan(guide_args)
        self.fits = _same_steps(model, guide, model_args, guide_args)
        self.length = self.plans[0].length
        # Where only one of the two lengths is the maximal one as a number, the other says which steps count.
        dynamic = [plan for plan in self.plans if plan.active is not None]
        self.active, self.source = (dynamic[0].active, dynamic[0].source) if dynamic else (None, None)
        self.kinds: list[tuple[Any, str]] = []

    def run(self, pair: Pair, key: PRNGKey, observed: ChoiceMap) -> _Result:
        count = self.settings.count
        with runs.choices_of_both():
            given = pair.model.constraints_of_steps(observed, self.plans[0])

        def keys_of(key: PRNGKey) -> Any:
            """The keys that model and guide would give their steps in `Objective.draw`."""
            model_key, guide_key = runs.split(key)
            return jax.random.split(model_key, self.length), split_key(guide_key, self.length)[1]

        keys = jax.vmap(keys_of, out_axes=1)(jax.random.split(key, count))
        # One that is none of the particles' keys.
        resampling_keys = jax.random.split(jax.random.fold_in(key, count), self.length)
        xs = {"keys": keys, "given": given, "inputs": tuple(plan.inputs for plan in self.plans)}
        if self.source is not None:
            xs = jax.tree.map(lambda leaf: jnp.asarray(leaf)[self.source], xs)
        first = np.arange(self.length) == 0
        xs = {**xs, "first": first, "active": self.active, "resampling_key": resampling_keys}

        def spread(leaf: Any) -> Any:
            return jnp.broadcast_to(leaf, (count, *leaf.shape))

        states = jax.tree.map(spread, tuple(plan.initial for plan in self.plans))
        zero = jnp.zeros((), jnp.result_type(float))
        carry = _Carry(states, states, spread(zero), zero, jnp.zeros((), jnp.int32))
        carry, by_step = scan_module(self._step, self.length)(pair, carry, xs)
        self._check_gradient()
        bound = carry.log_evidence + renyi_bound(carry.log_weights)
        diagnostics = {
            "log_weights": carry.log_evidence + carry.log_weights,
            "effective_sample_size": by_step["effective_sample_size"],
            "resamplings": carry.resamplings,
        }
        if "scores" in by_step:
            scores, before, baselines = by_step["scores"], by_step["log_evidence"], by_step["baselines"]
            if self.settings.resample == NEVER:
                # The particles do not meet, so the others' bound may be that of all steps.
                baselines = bounds_without_each(carry.log_weights)[None]
            signals = lax.stop_gradient(bound - before[:, None] - baselines)
            bound = bound + jnp.sum(signals * (scores - lax.stop_gradient(scores)))
        if self.fits is not None:
            bound = jnp.where(self.fits, bound, jnp.nan)
        return _Result(bound, diagnostics)

    # One step ---------------------------------------------------------------------------------------------------

    def _step(self, pair: Pair, carry: _Carry, x: Any) -> tuple[_Carry, Any]:
        carry, ancestor_scores = self._resampled(carry, x)
        states = carry.states
        if self.active is not None:
            # A step that does not count is the last one again, from the states that it was given.
            states = jax.tree.map(lambda old, new: where(x["active"], new, old), carry.before, carry.states)

        def advance() -> Any:
            def one(pair: Pair, keys: Any, states: Any) -> Any:
                return self._advance(pair, keys, states, x["given"], x["inputs"])

            return vmap_module(one, (0, 0), self.settings.count)(pair, x["keys"], states)

        if self.active is None:
            new_states, increments, choice_scores = advance()
        else:
            new_states, increments, choice_scores = written_where(pair, x["active"], advance)
            new_states = jax.tree.map(lambda old, new: where(x["active"], new, old), carry.states, new_states)
            increments = jnp.where(x["active"], increments, 0)
        log_weights = carry.log_weights + increments.astype(carry.log_weights.dtype)
        by_step = {"effective_sample_size": effective_sample_size(log_weights)}
        scores = [part for part in (ancestor_scores, choice_scores) if part is not None]
        if scores:
            sum_of_scores = total(scores)
            by_step |= {
                "scores": sum_of_scores if self.active is None else jnp.where(x["active"], sum_of_scores, 0),
                "log_evidence": carry.log_evidence,
                "baselines": bounds_without_each(lax.stop_gradient(log_weights)),
            }
        return carry._replace(before=states, states=new_states, log_weights=log_weights), by_step

    def _resampled(self, carry: _Carry, x: Any) -> tuple[_Carry, Any]:
        """The particles after resampling, where that is to be done, and log W of each ancestor, where it has a gradient."""
        settings = self.settings
        if settings.resample == NEVER:
            return carry, None
        log_weights = carry.log_weights
        wanted = ~x["first"] if x["active"] is None else ~x["first"] & x["active"]
        if settings.resample != ALWAYS:
            wanted &= effective_sample_size(log_weights) < settings.resample * settings.count
        drawn = draw_ancestors(x["resampling_key"], lax.stop_gradient(log_weights), settings.scheme)
        ancestors = jnp.where(wanted, drawn, jnp.arange(settings.count))
        scores = None
        if settings.ancestor_gradient:
            scores = jnp.where(wanted, jax.nn.log_softmax(log_weights)[ancestors], 0)
        return carry._replace(
            states=jax.tree.map(lambda leaf: leaf[ancestors], carry.states),
            log_weights=jnp.where(wanted, 0, log_weights),
            log_evidence=carry.log_evidence + jnp.where(wanted, renyi_bound(log_weights), 0),
            resamplings=carry.resamplings + jnp.asarray(wanted, jnp.int32),
        ), scores

    def _advance(self, pair: Pair, keys: Any, states: Any, given: ChoiceMap, inputs: Any) -> tuple[Any, Any, Any]:
        """One particle's new states, log α, and Σ log q of its choices that have the score function."""
        (model_key, guide_key), (model_state, guide_state) = keys, states
        model_args = pair.model._arguments(self.args[0], plain(model_state), plain(inputs[0]))
        guide_args = pair.guide._arguments(self.args[1], plain(guide_state), plain(inputs[1]))
        drawn = at_step(pair.guide, inputs[1], lambda kernel: kernel.simulate(guide_key, guide_args)[1])
        sites = sites_of(drawn)
        kinds = kinds_of(sites)
        self.kinds = [(site.address, kind) for site, kind in zip(sites, kinds, strict=True)]
        choices = runs.merged(drawn.strip(), given)
        retval, log_p = at_step(
            pair.model,
            inputs[0],
            lambda kernel: runs.density(kernel, model_key, choices, model_args, sites, kinds),
        )
        new_states = (
            pair.model._checked(pair.model._next(retval), model_state),
            pair.guide._checked(pair.guide._next(drawn.get_retval()), guide_state),
        )
        scored = [site.log_density for site, kind in zip(sites, kinds, strict=True) if kind not in (PATHWISE, RELAXED)]
        return new_states, log_p - drawn.get_score(), total([jnp.sum(part) for part in scored]) if scored else None

    def _check_gradient(self) -> None:
        """Raise where the gradient should be unbiased, and whether to resample jumps as a draw moves."""
        if not self.settings.ancestor_gradient or self.settings.resample in (ALWAYS, NEVER):
            return
        for address, kind in self.kinds:
            if kind in (PATHWISE, RELAXED):
                raise ArgumentError(
                    f"The guide's choice at {show_address(address)} is differentiated through, and whether to resample jumps "
                    "where the effective sample size passes the threshold: that gradient is biased. Use "
                    '`resample="always"`; or say that it may be: `ancestor_gradient=False`.'
                )


def _is_criterion(resample: Any) -> bool:
    if isinstance(resample, str):
        return resample in (ALWAYS, NEVER)
    return isinstance(resample, (int, float)) and not isinstance(resample, bool) and 0 < resample < 1


def _pair(scope: Any, model: Found, guide: Found) -> Pair:
    return Pair(model=model.function, guide=guide.function, parent=scope)


def _observed_of(model: Found, guide: Found, observed: ChoiceMap) -> ChoiceMap:
    """The observed choices of the model's `Unfold` or `Map`.

    Raises:
      ArgumentError: if model and guide do not go together.
      UnvisitedConstraintError: if others are observed.
    """
    if model.address != guide.address:
        raise ArgumentError(
            f"The `Unfold` of the model stands at {show_address(model.address)}, and that of the guide at "
            f"{show_address(guide.address)}: they have the same choices, so they stand at the same address."
        )
    if isinstance(model.function, Map) != isinstance(guide.function, Map):
        kinds = [f"a {type(side.function).__name__}" for side in (model, guide)]
        raise ArgumentError(
            f"The model of an SMCObjective is {kinds[0]}, and its guide {kinds[1]}: either both are an `Unfold`, or both a `Map` "
            "of one."
        )
    if not isinstance(model.function, Map):
        _same_steps(model.function, guide.function, model.args, guide.args)
    if not model.address:
        return observed
    elsewhere = observed.filter(~select(model.address)).addresses()
    if elsewhere:
        raise UnvisitedConstraintError(
            f"A value was observed at {show_address(elsewhere[0])}, and all choices of the model are below "
            f"{show_address(model.address)}."
        )
    return observed.get_subtree(model.address)


def _same_length(model: Map, guide: Map, model_args: Arguments, guide_args: Arguments) -> int:
    """The number of elements of both."""
    lengths = model._length(model_args), guide._length(guide_args)
    for what, (one, other) in {
        "elements": lengths,
        "`total`": (model.total, guide.total),
        "`variable_axes`": (thawed(model.variable_axes) or {}, thawed(guide.variable_axes) or {}),
    }.items():
        if one != other:
            raise ArgumentError(
                f"The model's Map and the guide's differ in {what}: {one} and {other}. An SMCObjective runs one filter for "
                "each element of both."
            )
    return lengths[0]


def _same_steps(model: Unfold, guide: Unfold, model_args: Arguments, guide_args: Arguments) -> Any:
    """None where two unfoldings certainly have the same number of steps; else whether they have.

    Raises:
      ArgumentError: if they certainly have not.
    """
    if model.max_length != guide.max_length:
        raise ArgumentError(
            f"The model of an SMCObjective has `max_length` {model.max_length}, and the guide {guide.max_length}: they have the "
            "same steps."
        )
    one, other = model._length(model_args), guide._length(guide_args)
    if is_tracer(one) or is_tracer(other):
        return None if one is other else jnp.asarray(one) == jnp.asarray(other)
    if int(one) != int(other):
        raise ArgumentError(
            f"The length of the model is {int(one)}, and that of the guide {int(other)}: in an SMCObjective they have the same "
            "steps."
        )
    return None

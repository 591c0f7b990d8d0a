r"""`RandomParams`: a network whose parameters, all of them or some, are choices.

Let θ be the parameters of a network, S those that a selection of their paths picks, and θ_R the rest. With a prior p_s
for each path s in S and the network's own density p(t; x, θ) (1 for a plain Flax module),

    p(θ_S, t; x, θ_R) = Π_s p_s(θ_s) · p(t; x, θ_S, θ_R),   retval f(t, x, θ_S, θ_R).

The choices θ_s stand at their own paths, beside those of t; θ_R stay parameters, under the paths that they have without
the combinator. So a network is learned, fitted by maximum a posteriori or sampled by changing one selection.

A prior is written ``(Normal, (0.0, 1.0))``, or ``(Normal, lambda scale: (0.0, scale))`` with hyperparameters: these are the
first `num_hyperparameters` arguments of the generative function, so they may be learned, or random themselves. There is
one prior for all parameters, or a dict of them by path, or a function of path and shape; `priors` has all forms. The value
has the shape and dtype of the parameter: a distribution of a smaller shape is drawn in independent copies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gjflax.combinators.flax_module import FlaxModule
from gjflax.combinators.named_vectors import names_above_vectors, vectors_above_names
from gjflax.combinators.parameter_values import Parameters, parameters_of, settle, with_parameters
from gjflax.combinators.priors import Path, Priors
from gjflax.core.choice_map import ChoiceMap, choice_map
from gjflax.core.context import current_address, naming
from gjflax.core.diff import Diff, no_change, unknown_change
from gjflax.core.errors import (
    ArgumentError,
    DuplicateAddressError,
    ParameterPathError,
    SelectionError,
    UnvisitedConstraintError,
    nearest,
    show_address,
)
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.keys import KeySource, typed_key
from gjflax.core.lifting import share_inner_scope
from gjflax.core.outline import Part
from gjflax.core.selection import AllSelection, Selection, select
from gjflax.core.trace import CallTrace, Trace, canonical, leafwise, total
from gjflax.core.typing import Arguments, PRNGKey, Score
from gjflax.distributions.distribution_trace import DistributionTrace
from gjflax.distributions.shaped import Shaped, shaped

# Traces ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RandomParamsTrace(CallTrace):
    """The parameters that are choices, by path, and the run of the network under them."""

    params: dict[str, DistributionTrace]
    inner: Trace

    @property
    def by_path(self) -> dict[Path, DistributionTrace]:
        """The traces of the parameters, by path as a tuple."""
        return {tuple(path.split("/")): trace for path, trace in self.params.items()}

    def get_retval(self) -> Any:
        return self.inner.get_retval()

    def get_score(self) -> Score:
        return total([*(trace.get_score() for trace in self.params.values()), self.inner.get_score()])

    def project(self, selection: Selection) -> Score:
        parts = [trace.project(selection[path]) for path, trace in self.by_path.items() if path in selection]
        return total([*parts, self.inner.project(selection)])

    def strip(self) -> ChoiceMap:
        return _merged({path: trace.strip() for path, trace in self.by_path.items()}, self.inner.strip())

    def leaves(self, prefix: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Trace]]:
        own = [leaf for path, trace in self.by_path.items() for leaf in trace.leaves((*prefix, *path))]
        return [*own, *self.inner.leaves(prefix)]

    def outline(self, prefix: tuple[Any, ...] = ()) -> tuple[Part, ...]:
        own = [part for path, trace in self.by_path.items() for part in trace.outline((*prefix, *path))]
        return (*own, *self.inner.outline(prefix))

    def unconstrain(self, selection: Selection) -> tuple[ChoiceMap, Score]:
        results = {}
        for path, trace in self.by_path.items():
            if path in selection:
                with naming(path):
                    results[path] = trace.unconstrain(selection[path])
        inner, log_det = self.inner.unconstrain(selection)
        choices = _merged({path: unconstrained for path, (unconstrained, _) in results.items()}, inner)
        return choices, total([*(log_det for _, log_det in results.values()), log_det])

    def get_subtree(self, address: Any) -> Any:
        components = address if isinstance(address, tuple) else (address,)
        found = self.by_path.get(components)
        if found is not None:
            return found
        if any(path[: len(components)] == components for path in self.by_path):
            return self.strip().get_subtree(address)
        return self.inner.get_subtree(address)

    def chosen(self, accepted: Any, old: Any) -> Trace:
        params: Any = {name: trace.chosen(accepted, old.params[name]) for name, trace in self.params.items()}
        args = leafwise(accepted, self.args, old.args)
        return RandomParamsTrace(self.gen_fn, args, params, self.inner.chosen(accepted, old.inner))


def _merged(own: Mapping[Path, ChoiceMap], inner: ChoiceMap) -> ChoiceMap:
    return choice_map(dict(own)).merge(names_above_vectors(inner) if own else inner)


# The combinator --------------------------------------------------------------------------------------------------------


class RandomParams(GenerativeFunction):
    """A network whose parameters, all of them or some, are choices. See the text of this file.

    Attributes:
      inner: a Flax module, or a generative function with parameters.
      prior: the distribution of the parameters that are choices: one for all, or by path. It may speak of parameters
        that are not selected.
      selection: the paths of the parameters that are choices, all by default. The others stay parameters.
      num_hyperparameters: how many of the first arguments go to the prior, and not to the network.

    Raises:
      ArgumentError: if the network or the prior is of another form.
      ParameterPathError: if the prior names a path that the network does not have, or a selected parameter has none.
      SelectionError: if the selection names a path that the network does not have.

    >>> import flax.linen as nn, gjflax, jax, jax.numpy as jnp
    >>> network = gjflax.RandomParams(nn.Dense(3), (gjflax.Normal, (0.0, 2.0)), gjflax.select("kernel"))
    >>> variables = network.init(jax.random.key(0), jnp.ones(2))
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'bias': (3,)}}
    >>> key, tr = network.bind(variables).simulate(jax.random.key(1), (jnp.ones(2),))
    >>> tr["kernel"].shape, bool(jnp.allclose(tr.get_retval(), tr["kernel"].sum(0)))
    ((2, 3), True)
    """

    trace_type = RandomParamsTrace

    inner: Any
    prior: Any
    selection: Any = None
    num_hyperparameters: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.inner, GenerativeFunction):
            if not isinstance(self.inner, nn.Module):
                raise ArgumentError(
                    f"`RandomParams` takes a Flax module, or a generative function; got {self.inner!r:.80}."
                )
            object.__setattr__(self, "inner", FlaxModule(self.inner, parent=None))
        if not isinstance(self.prior, Priors):
            object.__setattr__(self, "prior", Priors(self.prior))
        if not isinstance(self.selection, Selection):
            selection = AllSelection() if self.selection is None else select(self.selection)
            object.__setattr__(self, "selection", selection)
        count: Any = self.num_hyperparameters
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ArgumentError(f"`num_hyperparameters` counts arguments; got {count!r}.")
        super().__post_init__()

    def setup(self) -> None:
        settle(self.inner)
        share_inner_scope(self)

    # The interface ----------------------------------------------------------------------------------------------

    def simulate(self, key: PRNGKey, args: Arguments) -> tuple[PRNGKey, RandomParamsTrace]:
        keys = KeySource(typed_key(key))
        sites, params = self._sites(args), {}
        for site in sites:
            with naming(site.path):
                _, params[site.path] = site.prior.simulate(keys.at(site.path), site.args)
        run = lambda module, *x: module.simulate(keys.at(()), x)[1]
        inner = self._under(sites, _values(params), run, *self._inputs(args))
        return keys.end(), self._trace(args, params, inner)

    def importance(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Score, RandomParamsTrace]]:
        keys, sites = KeySource(typed_key(key)), self._sites(args)
        params, weights = {}, []
        for site in sites:
            with naming(site.path):
                given = choices.get_subtree(site.path)
                _, (weight, params[site.path]) = site.prior.importance(
                    keys.at(site.path), given, site.args, strict=strict
                )
                weights.append(weight)
        rest = self._rest(choices, sites, args, strict)
        run = lambda module, *x: module.importance(keys.at(()), rest, x, strict=strict)[1]
        weight, inner = self._under(sites, _values(params), run, *self._inputs(args))
        return keys.end(), (total([*weights, weight]), self._trace(args, params, inner))

    def assess(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Any, Score]]:
        sites = self._sites(args)
        values, scores = {}, []
        for site in sites:
            with naming(site.path):
                given = choices.get_subtree(site.path)
                _, (values[site.path], score) = site.prior.assess(key, given, site.args, strict=strict)
                scores.append(score)
        rest = self._rest(choices, sites, args, strict)
        run = lambda module, *x: module.assess(key, rest, x, strict=strict)[1]
        retval, score = self._under(sites, values, run, *self._inputs(args))
        return key, (retval, total([*scores, score]))

    def update(
        self,
        key: PRNGKey,
        trace: RandomParamsTrace,
        choices: ChoiceMap,
        argdiffs: Arguments,
        *,
        param_diff: Any = unknown_change,
        strict: bool = True,
    ) -> tuple[PRNGKey, tuple[Any, Score, RandomParamsTrace, ChoiceMap]]:
        keys, args = KeySource(typed_key(key)), Diff.primal(argdiffs)
        sites = self._sites_of(trace, args)
        params, weights, discards, changed = {}, [], {}, param_diff
        for site in sites:
            with naming(site.path):
                diffs = self._prior_diffs(site, argdiffs)
                _, (retdiff, weight, params[site.path], discards[site.path]) = site.prior.update(
                    keys.at(site.path), trace.by_path[site.path], choices.get_subtree(site.path), diffs, strict=strict
                )
                weights.append(weight)
                changed = changed if Diff.is_unchanged(retdiff) else unknown_change
        rest = self._rest(choices, sites, args, strict)
        options = {"param_diff": changed, "strict": strict}
        inner_diffs = argdiffs[self.num_hyperparameters :]
        run = lambda module: module.update(keys.at(()), trace.inner, rest, inner_diffs, **options)[1]
        retdiff, weight, inner, discard = self._under(sites, _values(params), run)
        new = self._trace(args, params, inner)
        return keys.end(), (retdiff, total([*weights, weight]), new, _merged(discards, discard))

    def regenerate(
        self,
        key: PRNGKey,
        trace: RandomParamsTrace,
        selection: Selection,
        argdiffs: Arguments,
        *,
        param_diff: Any = unknown_change,
    ) -> tuple[PRNGKey, tuple[Any, Score, RandomParamsTrace]]:
        keys, args = KeySource(typed_key(key)), Diff.primal(argdiffs)
        sites = self._sites_of(trace, args)
        params, weights, changed = {}, [], param_diff
        for site in sites:
            with naming(site.path):
                diffs = self._prior_diffs(site, argdiffs)
                _, (retdiff, weight, params[site.path]) = site.prior.regenerate(
                    keys.at(site.path), trace.by_path[site.path], selection[site.path], diffs
                )
                weights.append(weight)
                changed = changed if Diff.is_unchanged(retdiff) else unknown_change
        inner_diffs = argdiffs[self.num_hyperparameters :]
        options = {"param_diff": changed}
        run = lambda module: module.regenerate(keys.at(()), trace.inner, selection, inner_diffs, **options)[1]
        retdiff, weight, inner = self._under(sites, _values(params), run)
        return keys.end(), (retdiff, total([*weights, weight]), self._trace(args, params, inner))

    def constrain(
        self, unconstrained: ChoiceMap, args: Arguments, *, fixed: ChoiceMap | None = None
    ) -> tuple[ChoiceMap, Score]:
        held = choice_map(fixed)
        sites = self._sites(args)
        choices, values, log_dets = {}, {}, []
        for site in sites:
            with naming(site.path):
                choices[site.path], log_det = site.prior.constrain(
                    unconstrained.get_subtree(site.path), site.args, fixed=held.get_subtree(site.path)
                )
                _, (values[site.path], _) = site.prior.assess(jax.random.key(0), choices[site.path], site.args)
                log_dets.append(log_det)
        rest, held = (self._rest(given, sites, args, True) for given in (unconstrained, held))
        run = lambda module, *x: module.constrain(rest, x, fixed=held)
        inner, log_det = self._under(sites, values, run, *self._inputs(args))
        return _merged(choices, inner), total([*log_dets, log_det])

    @nn.nowrap
    def variables_of(self, trace: Any) -> Mapping[str, Any]:
        return self.inner.variables_of(trace.inner)

    # Inside -----------------------------------------------------------------------------------------------------

    @nn.nowrap
    def _trace(self, args: Arguments, params: Mapping[Path, DistributionTrace], inner: Trace) -> RandomParamsTrace:
        for path in params:
            for address in inner.strip().addresses():
                if path[: len(address)] == address[: len(path)]:
                    raise DuplicateAddressError(
                        f"The network at {show_address(current_address())} has a choice at {show_address(address)} and a "
                        f"parameter with the path {show_address(path)}, which is a choice too: rename one of them."
                    )
        by_name = {"/".join(path): trace for path, trace in params.items()}
        return RandomParamsTrace(self.as_unbound(), canonical(args), by_name, inner)

    @nn.nowrap
    def _inputs(self, args: Arguments) -> Arguments:
        """The arguments of the network."""
        return args[self.num_hyperparameters :]

    @nn.nowrap
    def _prior_diffs(self, site: _Site, argdiffs: Arguments) -> Arguments:
        """The arguments of a prior, with what is known of how they changed."""
        hyperparameters = argdiffs[: self.num_hyperparameters]
        unchanged = not site.depends_on_hyperparameters or Diff.is_unchanged(hyperparameters)
        return Diff.mark(site.args, no_change if unchanged else unknown_change)

    @nn.nowrap
    def _sites(self, args: Arguments) -> list[_Site]:
        """The parameters that are choices, each with its prior at its arguments."""
        if len(args) < self.num_hyperparameters:
            raise ArgumentError(
                f"The RandomParams at {show_address(current_address())} takes {self.num_hyperparameters} hyperparameters "
                f"before the network's arguments; got {len(args)} arguments."
            )
        templates = self._parameters(args).templates
        here = current_address()
        _check_paths(self.selection.addresses, templates, SelectionError, "selection", here)
        _check_paths(self.prior.paths, templates, ParameterPathError, "prior", here)
        sites = []
        for path, template in templates.items():
            if path not in self.selection:
                continue
            _check_choosable(path, template, here)
            entry = self.prior.entry(path, tuple(template.shape))
            if entry is None:
                raise ParameterPathError(
                    f"The parameter {show_address((*here, *path))} is selected and has no prior: give it one, or leave "
                    f"it out of the selection."
                )
            with naming(path):
                args_of_prior = entry.at(args[: self.num_hyperparameters])
            prior = shaped(entry.distribution, tuple(template.shape), template.dtype)
            sites.append(_Site(path, prior, args_of_prior, entry.depends_on_hyperparameters))
        return sites

    @nn.nowrap
    def _sites_of(self, trace: RandomParamsTrace, args: Arguments) -> list[_Site]:
        """The same for a trace, which must have these choices."""
        sites = self._sites(args)
        paths, old = [site.path for site in sites], list(trace.by_path)
        if sorted(paths) != sorted(old):
            raise ArgumentError(
                f"The trace at {show_address(current_address())} has the parameters {_listed(old)} as choices, and this "
                f"RandomParams {_listed(paths)}: its selection or its network is another."
            )
        return sites

    @nn.nowrap
    def _parameters(self, args: Arguments) -> Parameters:
        return parameters_of(self.inner.as_unbound(), self._inputs(args))

    @nn.nowrap
    def _rest(self, choices: ChoiceMap, sites: list[_Site], args: Arguments, strict: bool) -> ChoiceMap:
        """The choices that are not parameters, with an error for those that are and that were not selected."""
        rest = choices.filter(~select(*(site.path for site in sites))) if sites else choices
        if self._parameters(args).beside_vector:
            rest = vectors_above_names(rest)
        if not strict or rest.is_empty():
            return rest
        here, selected = current_address(), [site.path for site in sites]
        for address in rest.addresses():
            if address in self._parameters(args).templates:
                raise UnvisitedConstraintError(
                    f"A value was given for {show_address((*here, *address))}, which is a parameter and no choice: the "
                    "selection of the RandomParams leaves it out."
                )
            if isinstance(self.inner, FlaxModule):
                raise UnvisitedConstraintError(
                    f"A value was given for {show_address((*here, *address))}, which is no parameter of the network. "
                    f"{nearest((*here, *address), [(*here, *path) for path in selected])} To ignore what is not used, "
                    "pass strict=False."
                )
        return rest

    @nn.nowrap
    def _under(self, sites: list[_Site], chosen: Mapping[Path, Any], function: Callable[..., Any], *args: Any) -> Any:
        """A function of the inner module and arguments, run with these parameters as chosen."""
        # The choices of a discrete prior are integers, and the parameter is not.
        values = {site.path: lax.convert_element_type(chosen[site.path], site.prior.dtype) for site in sites}
        return with_parameters(self.inner, values, function, *args)


@dataclasses.dataclass(frozen=True)
class _Site:
    """A parameter that is a choice: its path, its prior, and the prior's arguments."""

    path: Path
    prior: Shaped
    args: Arguments
    depends_on_hyperparameters: bool


def _values(params: Mapping[Path, DistributionTrace]) -> dict[Path, Any]:
    return {path: trace.get_retval() for path, trace in params.items()}


def _listed(paths: list[Path]) -> str:
    return ", ".join(map(show_address, paths)) or "none"


def _check_paths(
    named: list[Any], templates: Mapping[Path, Any], error: type[Exception], what: str, here: tuple[Any, ...]
) -> None:
    for path in named:
        # The root speaks of all parameters, of which there may be none.
        if path and not any(known[: len(path)] == tuple(path) for known in templates):
            raise error(
                f"The {what} of the RandomParams at {show_address(here)} names {show_address(path)}, and the network has "
                f"no parameter there. {nearest(path, dict.fromkeys(known[: len(path)] for known in templates))}"
            )


def _check_choosable(path: Path, template: Any, here: tuple[Any, ...]) -> None:
    if any("/" in name for name in path):
        raise ArgumentError(
            f'The parameter {show_address((*here, *path))} has a "/" in its name, which no address has: rename it, or '
            "leave it out of the selection."
        )
    if not hasattr(template, "shape") or not jnp.issubdtype(template.dtype, jnp.floating):
        raise ArgumentError(
            f"The parameter {show_address((*here, *path))} is no array of real numbers, so it has no prior: leave it out "
            "of the selection."
        )

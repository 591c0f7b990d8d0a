r"""The generative function interface.

A generative function with arguments x and parameters θ is a density p(t; x, θ) on choice maps t, together with a
return value f(t, x, θ). Its choices have addresses and live in choice maps and traces; its parameters have Flax
paths and live in Flax variable collections; the interface is a set of ordinary module methods.

The internal proposal q is ancestral sampling: choices that are not given are drawn from the prior, given what
came before. With it, for a constraint u and the choices t that result,

==============  ====================================================================================
``simulate``    t ~ p(·; x), score log p(t; x)
``importance``  t ~ q(·; u, x),  w = log p(t; x) − log q(t; u, x),  so  E[exp w] = p(u)
``assess``      score log p(u; x), where u holds every choice
``update``      t' from t and u,  w = log p(t'; x') − log p(t; x) − log q(fresh choices)
``regenerate``  t' from t with a selection redrawn,  w = log p(t'; x') / p(t; x) + log q(old) / q(new)
==============  ====================================================================================

Parameters are one more argument: a trace made under other parameters is brought up to date by ``update``, with the
right weight, unless ``param_diff=Diff.no_change`` says that they are the same.

After M. Cusumano-Towner et al., "Gen: a general-purpose probabilistic programming system with programmable
inference", PLDI 2019, section 3.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import errors as flax_errors
from flax.core.scope import in_filter, union_filters

from gjflax.core.choice_map import ChoiceMap, choice_map
from gjflax.core.context import estimates
from gjflax.core.diff import Change, Diff, no_change, unknown_change
from gjflax.core.errors import (
    ArgumentError,
    DiscreteGradientError,
    MissingStreamError,
    NotImplementedByGenerativeFunctionError,
    UnboundParametersError,
    UntracedRandomnessError,
    show_address,
)
from gjflax.core.interface import PARAMETERS, interface_method
from gjflax.core.interned import TracedProgramError, interned, program_key
from gjflax.core.keys import typed_key
from gjflax.core.lifting import is_lifted
from gjflax.core.masked import Masked
from gjflax.core.printing import rich_tree
from gjflax.core.selection import Selection
from gjflax.core.trace import Trace
from gjflax.core.typing import Arguments, PRNGKey, Score

G = TypeVar("G", bound="GenerativeFunction")

CHOICE_STREAM = "choice"
"""The rng stream from which a forward sample by ``__call__`` is drawn."""


def is_same(one: Any, other: Any) -> bool:
    """Whether two generative functions, which are not bound, are certainly one program."""
    try:
        # A function that was defined once more is not equal, and the same program.
        return one is other or bool(one == other) or program_key(one) == program_key(other)
    except (TypeError, ValueError, TracedProgramError):
        # Of arrays in fields, or in what a function closes over, it is not known.
        return False


class GenerativeFunction(nn.Module):
    """Base class: a linen module that is a density on choice maps. See the text of this file.

    To write a new kind, implement ``simulate``, ``importance``, ``assess``, ``update``, ``regenerate`` (and
    ``constrain``, if gradients in R^n are wanted); their traces subclass `Trace`. All else derives from these.
    Implementations are entered with a typed key, a `ChoiceMap`, a tuple of arguments, and a bound module.
    """

    needs_variables = True
    """Whether running it may read Flax variables; where not, an unbound call needs no scope."""

    trace_type = Trace
    """The class of its traces; its methods refuse others."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        for name in PARAMETERS:
            if name in cls.__dict__ and not is_lifted(cls.__dict__[name]):
                setattr(cls, name, interface_method(cls.__dict__[name]))
        super().__init_subclass__(**kwargs)

    # What each kind implements ----------------------------------------------------------------------------------

    def simulate(self, key: PRNGKey, args: Arguments) -> tuple[PRNGKey, Trace]:
        """Run forwards: ``key, trace``, with choices drawn from p(·; args)."""
        raise self._lacks("simulate")

    def importance(
        self, key: PRNGKey, choices: Any, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Score, Trace]]:
        """Run with some choices given: ``key, (weight, trace)``.

        Args:
          key: a random key.
          choices: the constraints u, a choice map or nested dict.
          args: the arguments.
          strict: whether a constraint that no choice takes up is an error.

        Returns:
          The weight is log p(t) − log q(t; u), the density of the constraints given what was drawn before them;
          its exponential has the expectation p(u).
        """
        raise self._lacks("importance")

    def assess(
        self, key: PRNGKey, choices: Any, args: Arguments, *, strict: bool = True
    ) -> tuple[PRNGKey, tuple[Any, Score]]:
        """The density of given choices: ``key, (retval, score)``. Every choice must be given; none is drawn.

        A kind whose score is an unbiased estimate of the density, with randomness from the key, says so by
        `gjflax.core.context.note_estimate`: gradients of it are then refused, also where it is a callee.
        """
        raise self._lacks("assess")

    def update(
        self,
        key: PRNGKey,
        trace: Any,
        choices: Any,
        argdiffs: Arguments,
        *,
        param_diff: Change = unknown_change,
        strict: bool = True,
    ) -> tuple[PRNGKey, tuple[Any, Score, Trace, ChoiceMap]]:
        """Change some choices, arguments or parameters of a trace: ``key, (retdiff, weight, trace, discard)``.

        Args:
          key: a random key, used only where a new choice must be drawn.
          trace: the trace to change.
          choices: new values.
          argdiffs: the new arguments, each a `Diff` (a plain value counts as changed).
          param_diff: whether the parameters may differ from those under which the trace was made.
          strict: whether a constraint that no choice takes up is an error.

        Returns:
          The return value as a `Diff`; the weight log p(t') − log p(t) − log q(fresh choices); the new trace; and
          the values that were overwritten or are gone, and nothing else: updating with them gives the old trace
          and the negative weight.
        """
        raise self._lacks("update")

    def regenerate(
        self,
        key: PRNGKey,
        trace: Any,
        selection: Selection,
        argdiffs: Arguments,
        *,
        param_diff: Change = unknown_change,
    ) -> tuple[PRNGKey, tuple[Any, Score, Trace]]:
        """Redraw the selected choices from the prior: ``key, (retdiff, weight, trace)``.

        The weight is log p(t')/p(t) + log q(old selected)/q(new selected), the log acceptance ratio of the
        Metropolis-Hastings move that proposes so: kept choices contribute their new minus their old score, and
        choices redrawn, new or gone contribute nothing.

        Raises:
          SelectionError: if the selection names addresses, and none is one of a choice of the old or the new trace.
        """
        raise self._lacks("regenerate")

    @nn.nowrap
    def constrain(self, unconstrained: Any, args: Arguments, *, fixed: Any = None) -> tuple[ChoiceMap, Score]:
        """Map choices in R^n to their supports: ``choices, log |det J|`` of that map.

        Each choice goes through its own distribution's bijector, at the arguments that the choices before it
        give, so a support may depend on another choice.

        Args:
          unconstrained: choices in R^n, as `unconstrain` gives them.
          args: the arguments.
          fixed: choices that are not mapped but needed to run: discrete or observed ones.
        """
        raise self._lacks("constrain")

    def variables_of(self, trace: Trace) -> Mapping[str, Any]:
        """The Flax variables that a trace itself knows, for calls without variables: none in general."""
        return {}

    # What derives from it ---------------------------------------------------------------------------------------

    def propose(self, key: PRNGKey, args: Arguments) -> tuple[PRNGKey, tuple[ChoiceMap, Score, Any]]:
        """Draw choices as a proposal: ``key, (choices, score, retval)``."""
        key, trace = self.simulate(key, args)
        return key, (trace.strip(), trace.get_score(), trace.get_retval())

    @nn.nowrap
    def project(self, key: PRNGKey, trace: Trace, selection: Any) -> tuple[PRNGKey, Score]:
        """The selected choices' share of a trace's score: ``key, weight``.

        Raises:
          SelectionError: if the selection names addresses, and none is one of a choice of the trace.
        """
        return key, trace.project(selection)

    @nn.nowrap
    def unconstrain(self, trace: Trace, selection: Any) -> tuple[ChoiceMap, Score]:
        """Map the selected choices of a trace to R^n: ``choices, log |det J|`` of that map.

        The determinant is that of this map, so it is minus what `constrain` gives at the result.

        Raises:
          SelectionError: if nothing is selected.
          DiscreteGradientError: if a selected choice is discrete.
        """
        trace.require_selected(selection)
        return trace.unconstrain(selection)

    @nn.nowrap
    def knows_no_change(self, trace: Trace, argdiffs: Arguments, param_diff: Change) -> bool:
        """Whether it is certainly the program that made a trace, with the same arguments and parameters.

        A generative function that a body makes may hold values that changed, in a field or in what a function closes over.
        """
        same_parameters = param_diff is no_change or not self.needs_variables
        return same_parameters and Diff.is_unchanged(argdiffs) and is_same(trace.get_gen_fn(), self.as_unbound())

    @nn.nowrap
    def unzip(
        self, key: PRNGKey, fixed: Any, *, untraced: str = "refuse"
    ) -> tuple[PRNGKey, Callable[..., Score], Callable[..., Any]]:
        """The density and the return value as pure functions: ``key, score, retval``.

        Args:
          key: a random key.
          fixed: choices that are held.
          untraced: ``"refuse"`` to raise where the body draws randomness that is no choice, else ``"allow"``.

        Returns:
          ``score(choices, *args)`` and ``retval(choices, *args)``, for the choices that are not held. They may
          be differentiated to any order, compiled and mapped.
        """
        evaluate = self._evaluator(None, untraced)

        def score(choices: Any, *args: Any) -> Score:
            return evaluate(None, key, fixed.merge(choice_map(choices)), args)[1]

        def retval(choices: Any, *args: Any) -> Any:
            return evaluate(None, key, fixed.merge(choice_map(choices)), args)[0]

        return key, score, retval

    @nn.nowrap
    def choice_grad(
        self, key: PRNGKey, trace: Trace, selection: Any, *, untraced: str = "refuse"
    ) -> tuple[PRNGKey, ChoiceMap]:
        """The gradient of the score in the selected choices: ``key, gradients``.

        The gradients have the structure of ``selection.filter(trace)[0].strip()``; the other choices are held.

        Raises:
          SelectionError: if nothing is selected.
          DiscreteGradientError: if a selected choice is discrete.
        """
        selected = trace.require_selected(selection)
        _refuse_discrete(trace, selected, selection)
        evaluate = self._evaluator(trace, untraced)
        choices, args = trace.strip(), self._arguments_of(trace)

        leaves, structure = jax.tree.flatten(selected)
        # What is no float is a flag of a choice that may be absent.
        floating = [position for position, leaf in enumerate(leaves) if _is_floating(leaf)]

        def with_values(values: list[Any]) -> ChoiceMap:
            all_leaves = list(leaves)
            for position, value in zip(floating, values, strict=True):
                all_leaves[position] = value
            return jax.tree.unflatten(structure, all_leaves)

        def score(values: list[Any]) -> Score:
            return evaluate(None, key, choices.overwrite(with_values(values)), args)[1]

        return key, with_values(jax.grad(score)([leaves[position] for position in floating]))

    @nn.nowrap
    def arg_grad(
        self, key: PRNGKey, trace: Trace, argnums: int | tuple[int, ...] = 0, *, untraced: str = "refuse"
    ) -> tuple[PRNGKey, Any]:
        """The gradient of the score in the arguments: ``key, gradients``, as ``jax.grad`` gives for `argnums`."""
        evaluate = self._evaluator(trace, untraced)
        choices, args = trace.strip(), self._arguments_of(trace)
        for position in argnums if isinstance(argnums, tuple) else (argnums,):
            if not -len(args) <= position < len(args):
                raise ArgumentError(f"`argnums` names argument {position} of {len(args)}.")
            if not all(map(_is_floating, jax.tree.leaves(args[position]))):
                raise ArgumentError(f"Argument {position} is not floating point, so it has no gradient.")

        def score(*args: Any) -> Score:
            return evaluate(None, key, choices, args)[1]

        return key, jax.grad(score, argnums=argnums)(*args)

    @nn.nowrap
    def score_params(
        self,
        key: PRNGKey,
        trace: Trace,
        params: Any,
        *,
        variables: Mapping[str, Any] | None = None,
        untraced: str = "refuse",
    ) -> tuple[PRNGKey, Score]:
        """The log density of a trace's choices under other parameters: ``key, logpdf``.

        Args:
          key: a random key.
          trace: the trace whose choices and arguments count.
          params: the collection "params", such as ``state.params``.
          variables: other collections that the model reads ("batch_stats"); a bound module knows its own.
          untraced: see `unzip`.
        """
        evaluate = self._evaluator(trace, untraced, variables)
        return key, evaluate(params, key, trace.strip(), self._arguments_of(trace))[1]

    @nn.nowrap
    def param_grad(
        self,
        key: PRNGKey,
        trace: Trace,
        params: Any,
        *,
        variables: Mapping[str, Any] | None = None,
        untraced: str = "refuse",
    ) -> tuple[PRNGKey, Any]:
        """The gradient of `score_params` in the parameters: ``key, gradients``, a tree like `params`."""
        evaluate = self._evaluator(trace, untraced, variables)
        choices, args = trace.strip(), self._arguments_of(trace)

        def score(params: Any) -> Score:
            return evaluate(params, key, choices, args)[1]

        return key, jax.grad(score)(params)

    def __call__(self, *args: Any) -> Any:
        """A forward sample's return value, drawn from the rng stream "choice": a stochastic layer."""
        _, trace = self.simulate(self._choice_key(), args)
        return trace.get_retval()

    @nn.nowrap
    def __rich__(self) -> Any:
        return rich_tree(self)

    @nn.nowrap
    def argument_names(self) -> tuple[str, ...]:
        """What the first arguments are called, for people; as many as have a name."""
        return ()

    # Helpers of implementations ---------------------------------------------------------------------------------

    @nn.nowrap
    def as_unbound(self: G) -> G:
        """The module without scope, parent and name, as traces keep it."""
        if self.scope is None and self.name is None:
            return self
        return interned(self.clone(_deep_clone=True, _reset_names=True, name=None))

    @nn.nowrap
    def positional(self, args: Arguments, kwargs: Mapping[str, Any]) -> tuple[Any, Arguments]:
        """The callee and arguments that a call ``trace(address, self)(*args, **kwargs)`` means."""
        if kwargs:
            raise ArgumentError(
                f"`{type(self).__name__}` takes its arguments by position; got the keywords {', '.join(kwargs)}."
            )
        return self, args

    @nn.nowrap
    def _arguments_of(self, trace: Trace) -> Arguments:
        """The arguments with which `assess` describes this trace again."""
        return trace.get_args()

    @nn.nowrap
    def _choice_key(self) -> PRNGKey:
        scope = self.scope
        if scope is None:
            raise UnboundParametersError(
                f"`{getattr(self, 'label', type(self).__name__)}` was called directly, and is not part of a module. "
                "Inside a generative function write `trace(address, callee)(*args)`; elsewhere use `simulate(key, args)`, or "
                '`apply(variables, *args, rngs={"choice": key})`.'
            )
        if scope.has_rng(CHOICE_STREAM):
            return typed_key(self.make_rng(CHOICE_STREAM))
        if self.is_initializing():
            # Not make_rng: drawing from "params" would shift the initial values of the parameters.
            params_rng: Any = scope.rngs["params"]
            stream = params_rng.as_jax_rng()
            return typed_key(jax.random.fold_in(stream, np.uint32(zlib.crc32(CHOICE_STREAM.encode()))))
        raise MissingStreamError(
            f"A forward sample of `{type(self).__name__}` (module path {'/'.join(scope.path) or '/'}) draws from the rng "
            'stream "choice": pass `rngs={"choice": key}` to `apply`. Where it stands in the body of another '
            "generative function, its choices need an address: `trace(address, callee)(*args)`."
        )

    @nn.nowrap
    def _lacks(self, method: str) -> NotImplementedByGenerativeFunctionError:
        return NotImplementedByGenerativeFunctionError(f"`{type(self).__name__}` does not implement `{method}`.")

    @nn.nowrap
    def _evaluator(
        self, trace: Trace | None, untraced: str, others: Mapping[str, Any] | None = None
    ) -> Callable[[Any, PRNGKey, ChoiceMap, Arguments], tuple[Any, Score]]:
        """``assess`` as a pure function of (params, key, choices, args); params None stands for the module's own.

        It runs on an unbound module, so raw JAX transformations of it are safe, and without rng streams, so a body
        that draws untraced randomness is found out.
        """
        if self.scope is None:
            module, variables = self, dict(self.variables_of(trace)) if trace is not None else {}
            mutable: Any = tuple(others or ()) or False
            rngs: Mapping[str, Any] = {}
        else:
            module, variables = self.as_unbound(), dict(self.variables)
            mutable = self.scope.mutable
            rngs = {name: self.make_rng(name) for name in self.scope.rngs} if untraced == "allow" else {}
        variables.update(others or {})

        def assess(used: Mapping[str, Any], mutable: Any, *inputs: Any) -> Any:
            # Mutable collections are read, and what a density evaluation would write to them is dropped.
            try:
                result: Any = module.apply(used, *inputs, method="assess", rngs=rngs, mutable=mutable)
            except flax_errors.ModifyScopeVariableError:
                states = tuple(name for name in used if name != "params")
                if all(in_filter(mutable, name) for name in states):
                    raise
                # A network in training mode writes as it computes: to what it was given, but never to its parameters.
                return assess(used, union_filters(mutable, states), *inputs)
            return result if mutable is False else result[0]

        def evaluate(params: Any, key: PRNGKey, choices: ChoiceMap, args: Arguments) -> tuple[Any, Score]:
            used = variables if params is None else {**variables, "params": params}
            try:
                with estimates() as noted:
                    output = assess(used, mutable, key, choices, args)
            except (flax_errors.InvalidRngError, MissingStreamError) as error:
                raise UntracedRandomnessError(
                    "The body draws randomness that is not a choice, from an rng stream that is not supplied here: "
                    f"{error} The density is then an estimate, and its gradient is biased. Switch that randomness "
                    '(dropout, say) off, make it a choice with `trace`, or accept the bias with untraced="allow" '
                    "on a module bound with that stream."
                ) from error
            except (flax_errors.ScopeParamNotFoundError, flax_errors.ScopeCollectionNotFound) as error:
                raise UnboundParametersError(_lacking(module, params, error)) from error
            except flax_errors.ApplyScopeInvalidVariablesStructureError as error:
                raise ArgumentError(
                    '`params` is the collection itself, such as `state.params` or `variables["params"]`; got a dict with '
                    'the key "params".'
                ) from error
            if noted and untraced == "refuse":
                raise UntracedRandomnessError(
                    f"The density at {show_address(noted[0].address)} is an estimate: {noted[0].randomness}. The gradient of "
                    "its logarithm is biased. Use an exact algorithm, keep the choices that are integrated out, or accept "
                    'the bias with untraced="allow".'
                )
            return output[1]

        return evaluate


for _name in PARAMETERS:
    setattr(GenerativeFunction, _name, interface_method(GenerativeFunction.__dict__[_name]))


def _lacking(module: Any, params: Any, error: Exception) -> str:
    """What to say where Flax did not find a variable."""
    model, found = type(module).__name__, str(error).split(" (https:")[0]
    if 'collection "' in found and 'collection "params"' not in found:
        return (
            f"`{model}` reads a collection that was not given: pass it with `variables=`, or `bind` the model. {found}"
        )
    if params is None:
        return f"`{model}` has parameters and was called without them: use `model.bind(variables)`. {found}"
    return (
        f"`params` lacks a parameter that `{model}` reads. {found} Pass the whole collection, as `init` made it: "
        '`variables["params"]`.'
    )


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, float) or (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating))


def _present(value: Any) -> Any:
    return value.value if isinstance(value, Masked) else value


def _refuse_discrete(trace: Trace, selected: ChoiceMap, selection: Selection) -> None:
    discrete = [address for address, leaf in trace.leaves() if leaf.is_discrete and address in selection]
    discrete += [
        address
        for address in selected.addresses()
        for leaf in jax.tree.leaves(_present(selected.get_subtree(address).get_value()))
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and address not in discrete
    ]
    if discrete:
        raise DiscreteGradientError(
            f"The choice {show_address(discrete[0])} is discrete, so the score has no gradient in it. "
            f"Leave it out of the selection: selection & ~select({show_address(discrete[0])})."
        )

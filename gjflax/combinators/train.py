r"""`TrainCombinator`: a generative function whose last argument is learned.

With inner density p(t; x, φ), the combinator has the density p(t; x, φ) with φ its parameters: they stand in the Flax
collection "params", under their own names, and start from the values given. Unbound, the combinator runs with these
initial values, or, given a trace, with those that the trace was made with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import errors as flax_errors
from flax.core import unfreeze

from gjflax.core.choice_map import ChoiceMap
from gjflax.core.diff import Change, Diff, unknown_change
from gjflax.core.errors import ArgumentError
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.interface import is_tracer
from gjflax.core.lifting import share_inner_scope
from gjflax.core.pytree import STATIC
from gjflax.core.selection import Selection
from gjflax.core.trace import Trace, WrappedTrace, strong
from gjflax.core.typing import Arguments, PRNGKey, Score


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainTrace(WrappedTrace):
    """The trace of the inner function, whose last argument, in `get_args` too, are the parameters."""

    gen_fn: Any = dataclasses.field(metadata=STATIC)
    inner: Trace

    def get_gen_fn(self) -> Any:
        return self.gen_fn


class FrozenParams:
    """Initial parameters as a hashable value: equal where structure and numbers are."""

    def __init__(self, tree: Any):
        self.tree = jax.tree.map(lambda leaf: leaf, unfreeze(dict(tree)))
        leaves, self._structure = jax.tree.flatten(self.tree)
        if any(is_tracer(leaf) for leaf in leaves):
            raise ArgumentError(
                "`TrainCombinator`'s `params` are initial values, known while tracing; got a traced array. Pass trained "
                "parameters with `bind` or `apply`."
            )
        self._numbers = tuple((str(array.dtype), array.shape, array.tobytes()) for array in map(np.asarray, leaves))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FrozenParams):
            return NotImplemented
        return self._structure == other._structure and self._numbers == other._numbers

    def __hash__(self) -> int:
        return hash((self._structure, self._numbers))

    def __repr__(self) -> str:
        return repr(self.tree)

    def _tree_children(self) -> Iterable[tuple[str, Any]]:
        return self.tree.items()


class TrainCombinator(GenerativeFunction):
    """A generative function whose last argument is learned. See the text of this file.

    Attributes:
      inner: a generative function that takes a dict of parameters as its last argument. Parameters of its own are
        in the same tree, under their own names.
      params: the initial parameters, a dict of numbers, arrays or dicts of these.

    >>> import gjflax, jax
    >>> @gjflax.gen(gjflax.TrainCombinator, params={"mu": 0.5})
    ... def model(params):
    ...     return gjflax.trace("x", gjflax.Normal)(params["mu"], 1.0)
    >>> key, tr = model.simulate(jax.random.key(0), ())
    >>> variables = model.init(jax.random.key(0))
    >>> float(variables["params"]["mu"])
    0.5
    """

    trace_type = TrainTrace

    inner: Any
    params: Any

    def __post_init__(self) -> None:
        if not isinstance(self.inner, GenerativeFunction):
            raise ArgumentError(
                f"`TrainCombinator` takes a generative function; got {self.inner!r:.80}. Is @gen missing?"
            )
        if not isinstance(self.params, FrozenParams):
            if not isinstance(self.params, Mapping) or not all(isinstance(name, str) for name in self.params):
                raise ArgumentError(f"`params` is a dict of parameters by name; got {self.params!r:.80}.")
            object.__setattr__(self, "params", FrozenParams(self.params))
        super().__post_init__()

    def setup(self) -> None:
        share_inner_scope(self)

    # The interface ----------------------------------------------------------------------------------------------

    def simulate(self, key: PRNGKey, args: Arguments) -> tuple[PRNGKey, TrainTrace]:
        key, inner = self.inner.simulate(key, (*args, self._values()))
        return key, self._trace(inner)

    def importance(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, **options: Any
    ) -> tuple[PRNGKey, tuple[Score, TrainTrace]]:
        key, (weight, inner) = self.inner.importance(key, choices, (*args, self._values()), **options)
        return key, (weight, self._trace(inner))

    def assess(
        self, key: PRNGKey, choices: ChoiceMap, args: Arguments, **options: Any
    ) -> tuple[PRNGKey, tuple[Any, Score]]:
        return self.inner.assess(key, choices, (*args, self._values()), **options)

    def update(
        self, key: PRNGKey, trace: Any, choices: ChoiceMap, argdiffs: Arguments, **options: Any
    ) -> tuple[PRNGKey, tuple[Any, Score, TrainTrace, ChoiceMap]]:
        argdiffs = self._with_params(trace, argdiffs, options.get("param_diff", unknown_change))
        key, (retdiff, weight, inner, discard) = self.inner.update(key, trace.inner, choices, argdiffs, **options)
        return key, (retdiff, weight, self._trace(inner), discard)

    def regenerate(
        self, key: PRNGKey, trace: Any, selection: Selection, argdiffs: Arguments, **options: Any
    ) -> tuple[PRNGKey, tuple[Any, Score, TrainTrace]]:
        argdiffs = self._with_params(trace, argdiffs, options.get("param_diff", unknown_change))
        key, (retdiff, weight, inner) = self.inner.regenerate(key, trace.inner, selection, argdiffs, **options)
        return key, (retdiff, weight, self._trace(inner))

    def constrain(
        self, unconstrained: ChoiceMap, args: Arguments, *, fixed: ChoiceMap | None = None
    ) -> tuple[ChoiceMap, Score]:
        return self.inner.constrain(unconstrained, (*args, self._values()), fixed=fixed)

    @nn.nowrap
    def variables_of(self, trace: Any) -> Mapping[str, Any]:
        below = self.inner.variables_of(trace.inner).get("params", {})
        return {"params": {**below, **trace.get_args()[-1]}}

    @nn.nowrap
    def argument_names(self) -> tuple[str, ...]:
        return self.inner.argument_names()[:-1]

    # Inside -----------------------------------------------------------------------------------------------------

    @nn.nowrap
    def _trace(self, inner: Trace) -> TrainTrace:
        return TrainTrace(self.as_unbound(), inner)

    @nn.nowrap
    def _arguments_of(self, trace: Trace) -> Arguments:
        return trace.get_args()[:-1]

    @nn.nowrap
    def _values(self) -> Any:
        """The parameters in scope; the initial ones where there are no parameters at all.

        Not by ``self.param``, which Flax allows in ``setup`` and compact methods only, and once in each.
        """
        scope = self.scope
        assert scope is not None
        initial = self.params.tree
        if self._is_without_parameters():
            return jax.tree.map(strong, initial)
        for name, value in initial.items():
            if not scope.name_reserved(name, "params"):
                scope.reserve(name, "params")
            if not self.has_variable("params", name):
                if not self.is_mutable_collection("params"):
                    raise flax_errors.ScopeParamNotFoundError(name, scope.path_text)
                self.put_variable("params", name, jax.tree.map(strong, value))
        values = {name: unfreeze(nn.meta.unbox(self.get_variable("params", name))) for name in initial}
        self._check_like_initial(values)
        return values

    @nn.nowrap
    def _is_without_parameters(self) -> bool:
        """Whether it runs where no parameters are given, for itself or for anything else."""
        assert self.scope is not None
        return "params" not in self.scope.root.variables() and not self.is_mutable_collection("params")

    @nn.nowrap
    def _check_like_initial(self, values: Any) -> None:
        expected, given = (jax.tree.map(jnp.shape, tree) for tree in (self.params.tree, values))
        if expected != given:
            raise ArgumentError(
                f"The parameters given to a TrainCombinator have shapes {given}; its initial values have {expected}."
            )

    @nn.nowrap
    def _with_params(self, trace: TrainTrace, argdiffs: Arguments, param_diff: Change) -> Arguments:
        """The inner function's arguments. Kernels pass all of ``get_args()``, other callers those before the parameters."""
        count = len(trace.get_args())
        if len(argdiffs) == count:
            return argdiffs
        if len(argdiffs) != count - 1:
            raise ArgumentError(
                f"`argdiffs` has {len(argdiffs)} entries; this TrainCombinator takes {count - 1} arguments, or {count} "
                "with its parameters last."
            )
        if param_diff is Diff.no_change or self._is_without_parameters():
            return (*argdiffs, Diff.no_change(trace.get_args()[-1]))
        return (*argdiffs, Diff.unknown_change(self._values()))

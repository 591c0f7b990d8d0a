r"""`Mix`: a mixture of generative functions.

With weights π_k = softmax(logits)_k and components p_k(v; x_k),

    p(k, v) = π_k p_k(v; x_k),   retval f_k(v, x_k).

The indicator k has finitely many values, so it can be summed out:

    p(v) = Σ_k π_k p_k(v; x_k),   p(k | v) = π_k p_k(v; x_k) / p(v).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gjflax.combinators.branch_arguments import check_branches, own_arguments
from gjflax.combinators.switch import Switch
from gjflax.core.choice_map import ChoiceMap
from gjflax.core.context import at_body, current_address
from gjflax.core.errors import ArgumentError, show_address
from gjflax.core.interface import interface_method
from gjflax.core.typing import Arguments, PRNGKey, Score
from gjflax.distributions.families import Categorical
from gjflax.language.gen import GenModule, trace


class Mix(GenModule):
    """A mixture of generative functions: called with ``(logits, args_0, args_1, ...)``, one tuple for each component.

    The indicator of the component is a choice at ``"component"``, a `Categorical`; the component's choices are below
    ``"value"``, those of a `Switch`.

    Attributes:
      components: the generative functions, a tuple or list. Their parameters are ``components_0``, ``components_1``, ....

    Raises:
      ArgumentError: if the logits are not a vector with one entry for each component, or the arguments not one tuple for
        each.
      BranchMismatchError: if the components return different types, or have choices of different types at one address.

    >>> import gjflax, jax, jax.numpy as jnp
    >>> noise = gjflax.Mix((gjflax.Normal, gjflax.StudentT))
    >>> args = (jnp.log(jnp.array([0.9, 0.1])), (0.0, 1.0), (2.0, 0.0, 5.0))
    >>> key, tr = noise.simulate(jax.random.key(0), args)
    >>> sorted(tr.strip().to_dict())
    ['component', 'value']
    >>> key, log_density = noise.log_marginal(jax.random.key(0), 8.0, args)
    >>> key, log_posterior = noise.log_posterior(jax.random.key(0), 8.0, args)
    >>> jnp.exp(log_posterior).round(4)
    Array([0., 1.], dtype=float32)
    """

    components: Any

    def __post_init__(self) -> None:
        if not isinstance(self.components, (tuple, list)) or not self.components:
            raise ArgumentError(f"`Mix` takes a tuple of generative functions; got {self.components!r:.80}.")
        check_branches(self.components, "Mix")
        object.__setattr__(self, "components", tuple(self.components))
        super().__post_init__()

    def setup(self) -> None:
        self.switch = Switch(self.components, own_arguments=True)

    def __call__(self, logits: Any, *args: Any) -> Any:
        with at_body():
            self._check(logits, args)
        component = trace("component", Categorical)(logits)
        return trace("value", self.switch)(component, *args)

    @functools.partial(interface_method, like="assess")
    def log_marginal(self, key: PRNGKey, choices: Any, args: Arguments) -> tuple[PRNGKey, Score]:
        """The density of a value with the indicator summed out: ``key, log p(value)``.

        Args:
          key: a random key.
          choices: the choices below ``"value"``, of which every component has all.
          args: the arguments of the mixture.

        Raises:
          MissingChoiceError, UnvisitedConstraintError: if they are not the choices of every component.
        """
        return key, jax.nn.logsumexp(self._log_joints(key, choices, args))

    @functools.partial(interface_method, like="assess")
    def log_posterior(self, key: PRNGKey, choices: Any, args: Arguments) -> tuple[PRNGKey, Score]:
        """The log probabilities of the components given a value: ``key, log p(component | value)``, a vector.

        The arguments are those of `log_marginal`. It is what a Gibbs move of the indicator draws from.
        """
        return key, jax.nn.log_softmax(self._log_joints(key, choices, args))

    @nn.nowrap
    def variables_of(self, trace: Any) -> Mapping[str, Any]:
        value = trace.get_subtree("value")
        known = value.get_gen_fn().variables_of(value).get("params", {})
        params = {name.replace("branches", "components"): part for name, part in known.items()}
        return {"params": params} if params else {}

    @nn.nowrap
    def _log_joints(self, key: PRNGKey, choices: ChoiceMap, args: Arguments) -> Any:
        """log π_k + log p_k(value), for each component k."""
        logits, *own = args
        self._check(logits, own)
        own = own_arguments(tuple(own), len(self.components), "Mix", "component")
        keys = jax.random.split(key, len(self.components))
        scores = []
        for component, one_key, one in zip(self.components, keys, own, strict=True):
            _, (_, score) = component.assess(one_key, choices, one)
            scores.append(score)
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.log_softmax(jnp.asarray(logits)) + jnp.stack(scores)

    @nn.nowrap
    def _check(self, logits: Any, own: Sequence[Any]) -> None:
        count = len(self.components)
        if jnp.shape(logits) != (count,):
            raise ArgumentError(
                f"The logits of the Mix at {show_address(current_address())} have shape {jnp.shape(logits)}, and it has "
                f"{count} components: give a vector with one entry for each. For one mixture per element use `Map`."
            )
        own_arguments(tuple(own), count, "Mix", "component")

r"""`ELBO`: the evidence lower bound as a module.

With a model p(x, z), a guide q(z) and observed choices x,

    log p(x) ≥ E_q[log p(x, z) − log q(z)],

and the loss is minus the mean of the log weights log p(x, z_s) − log q(z_s) over samples z_s ~ q. Every choice of
the guide is reparameterised, z = g(ε; φ) with ε free of parameters, so the gradient of the loss is an unbiased estimate
of the bound's (Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gjflax.core.choice_map import ChoiceMap, choice_map
from gjflax.core.errors import (
    ArgumentError,
    ChoiceMapError,
    MissingChoiceError,
    NotReparameterizedError,
    UnvisitedConstraintError,
    show_address,
)
from gjflax.core.generative_function import GenerativeFunction
from gjflax.core.lifting import vmap_module
from gjflax.core.trace import Trace
from gjflax.core.typing import Arguments, FloatArray


class ELBO(nn.Module):
    """Minus the evidence lower bound, a loss. Its randomness comes from the rng stream "choice".

    Attributes:
      model: the joint density; its choices are those of the guide and the observed ones.
      guide: the variational family, over the choices that are not observed.
      num_samples: how many samples of the guide the bound is averaged over.

    The log weights are sown in the collection "diagnostics" as ``log_weights``, of shape ``[num_samples]``.

    Raises:
      NotReparameterizedError: if a choice of the guide has no reparameterisation.
      MissingChoiceError, UnvisitedConstraintError: if model and guide do not have the same choices.

    >>> import gjflax, jax, flax.linen as nn, jax.numpy as jnp
    >>> @gjflax.gen
    ... def model():
    ...     z = gjflax.trace("z", gjflax.Normal)(0.0, 1.0)
    ...     return gjflax.trace("x", gjflax.Normal)(z, 1.0)
    >>> class Guide(gjflax.GenModule):
    ...     @nn.compact
    ...     def __call__(self):
    ...         loc = self.param("loc", nn.initializers.zeros, ())
    ...         return gjflax.trace("z", gjflax.Normal)(loc, 0.7)
    >>> objective = gjflax.ELBO(model=model, guide=Guide(), num_samples=8)
    >>> observed = {"x": 1.5}
    >>> variables = objective.init(jax.random.key(0), observed)
    >>> loss = objective.apply(variables, observed, rngs={"choice": jax.random.key(1)})
    >>> loss.shape
    ()
    """

    model: GenerativeFunction
    guide: GenerativeFunction
    num_samples: int = 1

    def __post_init__(self) -> None:
        for name in ("model", "guide"):
            if not isinstance(getattr(self, name), GenerativeFunction):
                raise ArgumentError(f"`{name}` of an ELBO is a generative function; got {getattr(self, name)!r:.80}.")
        if not isinstance(self.num_samples, int) or self.num_samples < 1:
            raise ArgumentError(f"`num_samples` is a positive integer; got {self.num_samples!r}.")
        super().__post_init__()

    def __call__(self, observed: Any, model_args: Arguments = (), guide_args: Arguments = ()) -> FloatArray:
        """The loss for observed choices.

        Args:
          observed: the observed choices, a choice map or nested dict.
          model_args: the arguments of the model.
          guide_args: the arguments of the guide.
        """
        observed = choice_map(observed)
        keys = jax.random.split(self._key(), self.num_samples)
        if self.num_samples == 1:
            log_weights = self._log_weight(keys[0], observed, model_args, guide_args)[None]
        else:
            sampled = vmap_module(type(self)._log_weight, (0, None, None, None), self.num_samples)
            log_weights = sampled(self, keys, observed, model_args, guide_args)
        if not self.is_initializing():  # else they would be among the variables, with the shape that they have here
            self.sow(
                "diagnostics", "log_weights", log_weights, reduce_fn=lambda _, new: new, init_fn=lambda: jnp.zeros(())
            )
        return -jnp.mean(log_weights)

    def _log_weight(self, key: Any, observed: ChoiceMap, model_args: Arguments, guide_args: Arguments) -> Any:
        """log p(x, z) − log q(z) at one sample z of the guide."""
        key, guide_key = jax.random.split(key)
        _, trace = self.guide.simulate(guide_key, guide_args)
        require_reparameterized(trace)
        try:
            _, (_, score) = self.model.assess(key, trace.strip().merge(observed), model_args)
        except (MissingChoiceError, UnvisitedConstraintError, ChoiceMapError) as error:
            error.add_note("In an ELBO the choices of the guide and the observed ones are together those of the model.")
            raise
        return score - trace.get_score()

    def _key(self) -> Any:
        return self.guide._choice_key()


def require_reparameterized(trace: Trace) -> None:
    """Raise, naming the choice, where a guide's trace has one through which no gradient flows."""
    for address, leaf in trace.leaves():
        if not leaf.is_reparameterized:
            label = leaf.get_gen_fn().label
            raise NotReparameterizedError(
                f"The guide's choice at {show_address(address)} ({label}) has no reparameterisation, so the gradient of the "
                "ELBO would silently leave out its distribution. Use a distribution that has one (Normal, Gamma, Beta, "
                "...), sum the choice out of the model, or, for a distribution of your own whose sampler is "
                "differentiable, declare `reparameterized=True`."
            )

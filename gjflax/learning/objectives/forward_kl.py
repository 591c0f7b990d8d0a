r"""`ForwardKL`: amortised inference from simulations.

The model draws pairs (z, x), and the guide learns to tell z from x:

    E_{p(z, x)}[−log q(z | x)] = E_{p(x)} KL(p(z | x) || q(z | x)) + constant.

The model is not trained, and nothing is differentiated through a draw, so z may be discrete. It is the sleep phase of
wake-sleep (Hinton, Dayan, Frey and Neal, Science 1995; Gen's ``lecture!``), and neural posterior estimation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gjflax.core.choice_map import ChoiceMap
from gjflax.core.errors import ArgumentError, SelectionError, show_address
from gjflax.core.selection import select
from gjflax.core.typing import Arguments, FloatArray, PRNGKey
from gjflax.learning import runs
from gjflax.learning.objectives.base import Objective


class ForwardKL(Objective):
    """Minus the mean log density that the guide gives to simulated choices. Randomness: the rng stream "choice".

    Of `observed` only the addresses count: they say what of a simulation the guide is told.

    Attributes:
      model: the joint density, from which pairs are drawn. It gets no gradient.
      guide: the variational family, over the choices that are not observed.
      num_samples: how many simulations.
      guide_inputs: ``guide_inputs(x)`` gives the guide's arguments for simulated observations x, a choice map. By default the
        guide is called with `guide_args`, which is right only where these do not depend on what was observed.

    The collection "diagnostics" gets ``log_densities``, of shape ``[num_samples]``.

    Raises:
      SelectionError: if an observed address is none of the model's.
      MissingChoiceError, UnvisitedConstraintError: if the guide does not have the model's other choices.

    >>> import flax.linen as nn, gjflax, jax
    >>> @gjflax.gen
    ... def model():
    ...     z = gjflax.trace("z", gjflax.Normal)(0.0, 1.0)
    ...     return gjflax.trace("x", gjflax.Normal)(z, 1.0)
    >>> class Guide(gjflax.GenModule):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         gjflax.trace("z", gjflax.Normal)(nn.Dense(1)(x[None])[0], 0.7)
    >>> objective = ForwardKL(model, Guide(), num_samples=16, guide_inputs=lambda x: (x["x"],))
    >>> variables = objective.init(jax.random.key(0), {"x": 0.0})
    >>> objective.apply(variables, {"x": 0.0}, rngs={"choice": jax.random.key(1)}).shape
    ()
    """

    guide_inputs: Callable[[ChoiceMap], Arguments] | None = None

    def __post_init__(self) -> None:
        check_inputs(self.guide_inputs)
        super().__post_init__()

    def loss(self, key: PRNGKey, observed: ChoiceMap, model_args: Arguments, guide_args: Arguments) -> FloatArray:
        log_densities = dreamt(self, key, observed, model_args, guide_args, self.guide_inputs)
        self.sow_diagnostics(log_densities=log_densities)
        return -jnp.mean(log_densities)


def check_inputs(guide_inputs: Any) -> None:
    """An error unless it is a function."""
    if guide_inputs is not None and not callable(guide_inputs):
        raise ArgumentError(
            "`guide_inputs` is a function from observed choices to the guide's arguments, such as "
            f'lambda x: (x["x"],); got {guide_inputs!r:.80}.'
        )


def dreamt(
    objective: Objective,
    key: PRNGKey,
    observed: ChoiceMap,
    model_args: Arguments,
    guide_args: Arguments,
    guide_inputs: Callable[[ChoiceMap], Arguments] | None,
) -> FloatArray:
    """log q(z | x) at pairs that the model draws: one for each sample."""
    addresses = observed.addresses()

    def one(objective: Objective, key: PRNGKey) -> Any:
        model_key, guide_key = runs.split(key)
        _, trace = objective.model.simulate(model_key, model_args)
        choices = jax.tree.map(lax.stop_gradient, trace.strip())
        for address in addresses:
            if address not in choices.addresses():
                raise SelectionError(
                    f"{show_address(address)} is given as observed, and is not a choice of the model. Its choices are "
                    f"{', '.join(map(show_address, choices.addresses()))}."
                )
        is_observed = select(addresses)
        given = choices.filter(is_observed)
        args = guide_args if guide_inputs is None else guide_inputs(given)
        if not isinstance(args, tuple):
            raise ArgumentError(
                f"`guide_inputs` returns a tuple of arguments, such as (x,); got {type(args).__name__}."
            )
        with runs.choices_of_both():
            return objective.guide.assess(guide_key, choices.filter(~is_observed), args)[1][1]

    return objective.over_samples(one, key)

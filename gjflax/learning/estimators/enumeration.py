r"""`ENUM`: the exact expectation over a choice with finitely many values,

E[f(z)] = Σ_v q(v; φ) f(v),   ∇ E[f(z)] = Σ_v f(v) ∇ q(v; φ) + q(v; φ) ∇ f(v).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from gjflax.core.errors import ArgumentError, EnumerationError, show_address
from gjflax.distributions.tfp import TFPDistribution
from gjflax.learning.estimators.estimator import GradientEstimator, named_arguments

ENUMERATED = "enumerated"


class ENUM(GradientEstimator):
    """Sum over all values of a choice, exactly.

    The objective runs guide and model once for every value. Several such choices are enumerated jointly. The elements of a
    `Map` are enumerated side by side, where what depends on an element stays in it: K runs for K values; else jointly.

    Attributes:
      inner: a `Bernoulli`, `Categorical` or `OneHotCategorical`, or any distribution with `values`.
      values: its values, where it is another one: a tuple, list or range of numbers. They must be all that have a density.

    Raises:
      EnumerationError: if its values are not known, or too many.

    >>> import gjflax, jax, jax.numpy as jnp, flax.linen as nn
    >>> class Guide(gjflax.GenModule):
    ...     @nn.compact
    ...     def __call__(self):
    ...         logit = self.param("logit", nn.initializers.zeros, ())
    ...         return gjflax.trace("coin", gjflax.ENUM(gjflax.Bernoulli))(logit)
    >>> @gjflax.gen
    ... def model():
    ...     coin = gjflax.trace("coin", gjflax.Bernoulli)(probs=0.25)
    ...     return gjflax.trace("x", gjflax.Normal)(jnp.where(coin == 1, 1.0, -1.0), 1.0)
    >>> objective = gjflax.ELBO(model, Guide())
    >>> variables = objective.init(jax.random.key(0), {"x": 0.0})
    >>> losses = [objective.apply(variables, {"x": 0.0}, rngs={"choice": jax.random.key(seed)}) for seed in (1, 2)]
    >>> bool(losses[0] == losses[1])
    True
    """

    values: Any = None

    kind: ClassVar[str] = ENUMERATED

    def __post_init__(self) -> None:
        if self.values is not None:
            values = np.asarray(self.values)
            if (
                values.ndim != 1
                or not values.size
                or values.dtype.kind not in "iuf"
                or len(set(self.values)) < len(values)
            ):
                raise ArgumentError(f"`values` of ENUM are distinct numbers; got {self.values!r:.80}.")
            object.__setattr__(self, "values", tuple(values.tolist()))
        super().__post_init__()


def values_of(address: Any, leaf: Any) -> np.ndarray:
    """The values of one cell of a choice, on the first axis: a cell is a number, or the vector of a one-hot choice.

    Raises:
      EnumerationError: if they are not known.
    """
    estimator = leaf.get_gen_fn()
    if estimator.values is not None:
        return np.asarray(estimator.values)
    name = estimator.inner.label
    is_known = isinstance(estimator.inner, TFPDistribution)
    if is_known and name == "Bernoulli":
        return np.arange(2)
    if is_known and name in ("Categorical", "OneHotCategorical"):
        (parameter,) = named_arguments(estimator.inner, leaf.get_args()).values()
        count = parameter.shape[-1]
        return np.arange(count) if name == "Categorical" else np.eye(count)
    raise EnumerationError(
        f"The choice at {show_address(address)} ({name}) has the estimator ENUM, and its values are not known: give them, "
        f"ENUM({name}, values=(0, 1, 2)), or use REINFORCE."
    )

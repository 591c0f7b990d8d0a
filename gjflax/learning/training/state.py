"""`TrainState`: Flax's, with all that a run needs to go on exactly where it stopped.

The keys of a step come from the run's key and the step's number alone:

    fold_in(fold_in(key, step), name of the stream),

so a state that was restored draws what the uninterrupted run would have drawn.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics as clu_metrics
from flax import struct
from flax.training import train_state

from gjflax.core.keys import typed_key
from gjflax.core.lifting import SOWN
from gjflax.core.typing import PRNGKey

STREAMS = ("choice", "dropout")
"""The rng streams that a step supplies by default."""


# Evaluated annotations: clu reads them, so this file does without the `annotations` of the future.
@struct.dataclass
class TrainMetrics(clu_metrics.Collection):
    """What is averaged between two reports: the loss, and the norm of its gradient in all parameters."""

    loss: clu_metrics.Average.from_output("loss")  # pyright: ignore[reportInvalidTypeForm]
    grad_norm: clu_metrics.Average.from_output("grad_norm")  # pyright: ignore[reportInvalidTypeForm]


class TrainState(train_state.TrainState):
    """Flax's `TrainState`, with the run's key, the other collections, metrics and the number of skipped steps.

    Attributes:
      key: the random key of the run; it stays.
      variables: the collections but "params": running statistics, moving averages of baselines.
      metrics: what was averaged since the last report, a ``clu.metrics.Collection``.
      skipped: how many steps were left out because their loss or gradients were not finite.

    >>> import gjflax, jax, optax, flax.linen as nn
    >>> class Mean(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         mean = self.param("mean", nn.initializers.zeros, ())
    ...         return ((x - mean) ** 2).mean()
    >>> state = gjflax.TrainState.init(Mean(), optax.sgd(0.5), jax.random.key(0), jax.numpy.array([1.0, 3.0]))
    >>> sorted(state.rngs())
    ['choice', 'dropout']
    >>> loss, grads = jax.value_and_grad(lambda params: state.apply_fn({"params": params}, jax.numpy.ones(2)))(state.params)
    >>> float(state.apply_gradients(grads=grads).params["mean"])
    1.0
    """

    # Flax declares narrower types for its fields than it takes: any pytree of parameters will do.
    step: Any
    params: Any = struct.field(pytree_node=True)
    key: Any
    variables: Any
    metrics: Any
    skipped: Any

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., Any],
        params: Any,
        tx: optax.GradientTransformation,
        key: PRNGKey,
        variables: Mapping[str, Any] | None = None,
        metrics: type[clu_metrics.Collection] = TrainMetrics,
        **kwargs: Any,
    ) -> "TrainState":
        """The state before the first step.

        Args:
          apply_fn: ``objective.apply``.
          params: the collection "params".
          tx: the optimiser.
          key: the random key of the run.
          variables: the other collections; by default there are none.
          metrics: the class of what is averaged between two reports.
          **kwargs: fields of a subclass.
        """
        state = super().create(
            apply_fn=apply_fn,
            params=params,
            tx=tx,
            key=typed_key(key),
            variables=dict(variables or {}),
            metrics=metrics.empty(),
            skipped=jnp.zeros((), jnp.int32),
            **kwargs,
        )
        # An array from the start: else the first step would be compiled twice.
        return state.replace(step=jnp.zeros((), jnp.int32))

    @classmethod
    def init(
        cls,
        objective: nn.Module,
        tx: optax.GradientTransformation,
        key: PRNGKey,
        *inputs: Any,
        streams: Iterable[str] = STREAMS,
        metrics: type[clu_metrics.Collection] = TrainMetrics,
    ) -> "TrainState":
        """The state before the first step, with the variables that ``objective.init`` gives.

        Args:
          objective: a module that returns a loss.
          tx: the optimiser.
          key: the random key of the run, of which the initial parameters are drawn too.
          *inputs: what the objective is called with: ``observed, model_args, guide_args``.
          streams: the rng streams that it draws from, besides "params".
          metrics: the class of what is averaged between two reports.
        """
        rngs = {name: fold_in_name(typed_key(key), f"init {name}") for name in ("params", *streams)}
        variables = {name: part for name, part in objective.init(rngs, *inputs).items() if name not in SOWN}
        params = variables.pop("params", {})
        return cls.create(apply_fn=objective.apply, params=params, tx=tx, key=key, variables=variables, metrics=metrics)

    def rngs(self, streams: Iterable[str] = STREAMS) -> dict[str, Any]:
        """The keys of this step, one for each rng stream."""
        return step_rngs(self.key, self.step, streams)


def fold_in_name(key: Any, name: str) -> Any:
    """The key for what has this name."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))


def step_rngs(key: Any, step: Any, streams: Iterable[str]) -> dict[str, Any]:
    """The keys of a step. Each stream has its own: one key for two streams would make these draw the same."""
    here = jax.random.fold_in(key, step)
    return {name: fold_in_name(here, name) for name in streams}


def copied(tree: Any) -> Any:
    """The tree with arrays of its own, for one that a step may write over."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)

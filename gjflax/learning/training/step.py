r"""One step of training, as a pure function.

With parameters θ, other collections v, a batch b and the keys of step k,

    loss, v' = objective(θ, v, b; keys),   g = ∇_θ loss,   θ', optimiser' = update(g).

Where the loss or an entry of g is not finite the step is left out: θ, v and the optimiser's state stay, and the number of
skipped steps grows by one. The step's number always goes on, so that the next step has other keys.

Several steps may be made in one compiled call, as a scan over their batches: where a step takes less time than Python needs
to call it, that is most of the time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics
from flax import struct
from flax.training import train_state

from gjflax.core.errors import ArgumentError
from gjflax.core.keys import typed_key
from gjflax.core.lifting import SOWN
from gjflax.core.trace import leafwise
from gjflax.distributions.arguments import free_promotion
from gjflax.learning.training.state import TrainMetrics, TrainState, copied, fold_in_name, step_rngs

Inputs = Callable[[Any], tuple[Any, ...]]
"""From a batch to what the objective is called with."""

_FLAX_FIELDS = {field.name for field in dataclasses.fields(train_state.TrainState)}


def as_inputs(batch: Any) -> tuple[Any, ...]:
    """What a batch means by default: a tuple is ``(observed, model_args, guide_args)``, anything else is `observed`."""
    return batch if type(batch) is tuple else (batch,)


class Run(struct.PyTreeNode):
    """What is carried from step to step: a Flax state of any class, and the parts that it may lack.

    A part that is a field of the state is kept here alone, and put back by `whole`. In a state that is not a
    `gjflax.TrainState`, a further field that holds a dict is the collection of its name (``batch_stats``).
    """

    state: Any
    key: Any
    variables: Any
    metrics: Any
    skipped: Any
    fields: tuple[str, ...] = struct.field(pytree_node=False)

    @classmethod
    def start(cls, state: Any, key: Any, metrics: type[clu_metrics.Collection] = TrainMetrics) -> Run:
        """The run of a state with this key; its arrays are copies, since a step writes over its input."""
        own_metrics, own_skipped = getattr(state, "metrics", None), getattr(state, "skipped", None)
        measures = isinstance(own_metrics, clu_metrics.Collection)
        is_own_class = isinstance(state, TrainState)
        collections = [] if is_own_class else _collections(state)
        fields = {
            "key": getattr(state, "key", None) is not None,
            "variables": is_own_class,
            "metrics": measures,
            "skipped": own_skipped is not None,
            **dict.fromkeys(collections, True),
        }
        run = cls(
            state=state.replace(step=jnp.asarray(state.step, jnp.int32)),
            key=typed_key(key),
            variables=state.variables if is_own_class else {name: getattr(state, name) for name in collections},
            metrics=own_metrics if measures else metrics.empty(),
            skipped=jnp.zeros((), jnp.int32) if own_skipped is None else own_skipped,
            fields=tuple(name for name, is_own in fields.items() if is_own),
        )
        return copied(run.with_state(run.state))

    def whole(self) -> Any:
        """The state with all of its fields."""
        parts = {"key": self.key, "variables": self.variables, "metrics": self.metrics, "skipped": self.skipped}
        parts = {**self.variables, **parts}
        return self.state.replace(**{name: parts[name] for name in self.fields})

    def with_state(self, state: Any, **parts: Any) -> Run:
        """This run after the state became another one."""
        return self.replace(state=state.replace(**dict.fromkeys(self.fields)), **parts)


def _collections(state: Any) -> list[str]:
    """The fields of a user's state that are collections."""
    names = [field.name for field in dataclasses.fields(state) if field.name not in _FLAX_FIELDS]
    return [name for name in names if isinstance(getattr(state, name), Mapping)]


def train_step(
    objective: nn.Module, inputs: Inputs, streams: tuple[str, ...], run: Run, batch: Any
) -> tuple[Run, jax.Array]:
    """One step on a batch: the run after it, and the loss."""
    state = run.whole()
    rngs = step_rngs(run.key, state.step, streams)

    def loss_fn(params: Any) -> Any:
        loss, written = objective.apply(
            {"params": params, **run.variables},
            *inputs(batch),
            rngs=rngs,
            mutable=[*run.variables, "diagnostics"],
        )
        return _scalar(loss), written

    (loss, written), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    diagnostics = written.get("diagnostics", {})
    variables = {**run.variables, **{name: part for name, part in written.items() if name not in SOWN}}
    # What came as frozen dicts, Flax gives back as plain ones.
    variables = jax.tree.unflatten(jax.tree.structure(run.variables), jax.tree.leaves(variables))

    with free_promotion():  # clu and optax mix dtypes, which a user may have forbidden
        applied = state.apply_gradients(grads=grads)
    # What is computed for the reports is kept apart: fused with it, the rest would be rounded otherwise than in a bare loop.
    applied, seen, grads = jax.lax.optimization_barrier((applied, loss, grads))
    finite = functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(part)) for part in jax.tree.leaves((seen, grads))])
    with free_promotion():
        # In single precision, whatever the parameters have: it is a sum of many squares.
        grad_norm = optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads))
        measured = {**diagnostics, "loss": seen.astype(jnp.float32), "grad_norm": grad_norm}
        metrics = run.metrics.merge(type(run.metrics).single_from_model_output(**measured))
    taken = run.with_state(applied, variables=variables, metrics=metrics)
    kept = leafwise(finite, taken, run)
    step, skipped = run.state.step + 1, run.skipped + jnp.where(finite, 0, 1).astype(run.skipped.dtype)
    return kept.replace(state=kept.state.replace(step=step), skipped=skipped), seen


def held_out_loss(
    objective: nn.Module, inputs: Inputs, streams: tuple[str, ...], run: Run, index: Any, batch: Any
) -> Any:
    """The loss of a held-out batch. Its noise is the same in every evaluation, so that two of them compare well.

    What the objective would write to its variables is dropped.
    """
    rngs = step_rngs(fold_in_name(run.key, "held out"), index, streams)
    variables = {"params": run.state.params, **run.variables}
    loss, _ = objective.apply(variables, *inputs(batch), rngs=rngs, mutable=[*run.variables, "diagnostics"])
    return _scalar(loss)


def _scalar(loss: Any) -> Any:
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ArgumentError(
            f"An objective returns a scalar loss; got {jnp.result_type(loss)} of shape {jnp.shape(loss)}."
        )
    return loss


def _compiled(function: Callable[..., Any], donate: tuple[int, ...]) -> Callable[..., Any]:
    """``compiled(objective, inputs, streams, ...)``: the rest of the function, compiled once for equal objectives."""

    def make(*static: Any) -> Callable[..., Any]:
        return jax.jit(functools.partial(function, *static), donate_argnums=donate)

    cached = functools.lru_cache(maxsize=32)(make)

    def compiled(*static: Any) -> Callable[..., Any]:
        try:
            hash(static)
        except TypeError:  # a module with a field that does not hash
            return make(*static)
        return cached(*static)

    return compiled


def train_steps(
    objective: nn.Module, inputs: Inputs, streams: tuple[str, ...], run: Run, batches: Any
) -> tuple[Run, jax.Array]:
    """Steps on batches that are stacked on a first axis: the run after them, and the losses."""
    return jax.lax.scan(functools.partial(train_step, objective, inputs, streams), run, batches)


def train_repeatedly(
    objective: nn.Module, inputs: Inputs, streams: tuple[str, ...], count: int, run: Run, batch: Any
) -> tuple[Run, jax.Array]:
    """So many steps on one batch: the run after them, and the losses."""
    step = functools.partial(train_step, objective, inputs, streams)
    return jax.lax.scan(lambda run, _: step(run, batch), run, None, length=count)


compiled_step = _compiled(train_step, donate=(0,))
compiled_steps = _compiled(train_steps, donate=(0,))
compiled_repetition = _compiled(train_repeatedly, donate=(0,))
compiled_held_out_loss = _compiled(held_out_loss, donate=())

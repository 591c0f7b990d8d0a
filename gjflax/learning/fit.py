"""`fit`: the usual training loop, for those who have none.

It is nothing but the pieces of a loop: `TrainState`, batches that are shuffled by the run's key, a compiled step, clu's
metrics, and at every report an evaluation on held-out data, early stopping, callbacks, a writer and a checkpoint. What it
computes is a function of the run's key, the data and the objective alone, so a run that was killed and called again ends
with the bits of one that was not.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics as clu_metrics
from flax.training import train_state
from flax.training.early_stopping import EarlyStopping

from gjflax.core.errors import ArgumentError, NonFiniteGradientError, TrainingDataError
from gjflax.core.keys import typed_key
from gjflax.core.typing import PRNGKey
from gjflax.distributions.arguments import free_promotion
from gjflax.learning.data import Batches, batches, gives_batches
from gjflax.learning.training.checkpoints import Checkpoints, key_identity
from gjflax.learning.training.progress import ProgressReporter
from gjflax.learning.training.state import STREAMS, TrainMetrics, TrainState, copied, fold_in_name
from gjflax.learning.training.step import (
    Inputs,
    Run,
    as_inputs,
    compiled_held_out_loss,
    compiled_repetition,
    compiled_step,
    compiled_steps,
)
from gjflax.learning.training.writers import Writer, create_writer, plot_history

Row = dict[str, Any]
"""What is reported at a step: "step", "epoch", the metrics, "skipped", and "held_out_loss" where there are such data."""

Callback = Callable[[Any, Row], Any]

_REPORTS = 20
"""How often a run is reported on where its epochs say nothing of it."""

_IN_VAIN = 100
"""After so many steps in a row that had to be left out, a run is given up."""

_AHEAD = 8
"""How many steps may wait for the device: enough to keep it busy, few enough to stop at once."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What `fit` returns.

    Attributes:
      state: the state after the last step.
      history: a row for each report: a dict with "step", "epoch", the metrics (by default "loss" and "grad_norm",
        averaged since the report before), "skipped" (steps left out so far), and "held_out_loss".
      stopped_early: whether early stopping or a callback ended the run.
    """

    state: Any
    history: list[Row]
    stopped_early: bool

    def column(self, name: str) -> np.ndarray:
        """One entry of all rows of the history that have it."""
        return np.asarray([row[name] for row in self.history if name in row])

    def plot(self, path: str | Path | None = None) -> Any:
        """The history as a matplotlib figure; see `plot_history`."""
        return plot_history(self.history, path)


def fit(
    objective: nn.Module,
    state_or_optimizer: train_state.TrainState | optax.GradientTransformation,
    data: Any,
    *,
    key: PRNGKey | None = None,
    num_epochs: int | None = None,
    num_steps: int | None = None,
    batch_size: int | None = None,
    inputs: Inputs = as_inputs,
    held_out: Any = None,
    held_out_objective: nn.Module | None = None,
    report_every: int | None = None,
    scanned_steps: int = 1,
    early_stopping: EarlyStopping | None = None,
    callbacks: Iterable[Callback] = (),
    checkpoints: Checkpoints | str | Path | None = None,
    writer: Writer | str | Path | None = None,
    metrics: type[clu_metrics.Collection] = TrainMetrics,
    streams: Iterable[str] = STREAMS,
    progress: bool = True,
) -> FitResult:
    """Train an objective by stochastic gradients.

    Args:
      objective: a module that returns a scalar loss: an `ELBO` or its kin, or any other.
      state_or_optimizer: an optax optimiser, with which training begins at parameters that ``objective.init`` draws; or
        a Flax `TrainState`, which goes on at its step. Of a `gjflax.TrainState` all fields are kept up to date. In a
        user's own class, a field that holds a dict is the collection of its name (``batch_stats``).
      data: what `batches` takes (a pytree of arrays, an iterable of batches, a function that gives one), or what it
        returned. Arrays are shuffled anew in each epoch, by the run's key; `batches` without a key keeps their order.
      key: the random key of the run. Left out where the state has one.
      num_epochs: how often to go through the data in all; or
      num_steps: how many steps to have made in all, those of the given state and of a checkpoint included.
      batch_size: the number of elements in a batch of arrays; by default all of them.
      inputs: a function, compiled with the step, from a batch to the arguments of the objective,
        ``(observed, model_args, guide_args)`` or the first of these. By default a tuple is that already, and anything
        else is what is observed.
      held_out: data on which the loss is evaluated at every report, in the forms of `data`, in batches of
        `batch_size`: the mean over the batches, each weighted by its number of elements, with the same noise every time.
      held_out_objective: the objective of that evaluation, with the same variables: with more samples, or with
        dropout switched off. By default `objective`.
      report_every: the number of steps between two reports. By default a report ends each epoch; where an epoch is
        a single step, or has no end, each twentieth of the run.
      scanned_steps: how many steps one compiled call makes at most, in a ``jax.lax.scan``: faster where a step is short. Such
        a call ends at a report, and where the next batch has another shape. The run is the same up to rounding.
      early_stopping: a ``flax.training.early_stopping.EarlyStopping``, updated at every report with the held-out loss, or
        with the training loss where nothing is held out; one that is not finite is not shown to it.
      callbacks: functions of the state and the report's row; one that returns True ends the run.
      checkpoints: a directory, or `Checkpoints`. If there is a checkpoint, the run goes on from it.
      writer: a directory, for which `create_writer` makes one, or a metric writer in the manner of clu.
      metrics: a ``clu.metrics.Collection`` of what is averaged between reports. Its metrics are given ``loss``,
        ``grad_norm``, and the objective's diagnostics by name.
      streams: the rng streams that a step supplies.
      progress: whether to show what happens, with a progress bar on a terminal.

    Returns:
      The state after the last step, with the history of the reports.

    Raises:
      ArgumentError: if an argument is not of this form, or the state is beyond the last step already.
      TrainingDataError: if the data are not of this form, or end before the last step.
      NonFiniteGradientError: if a hundred steps in a row had a loss or gradients that are not finite, or none of the run
        had finite ones. Single steps of this kind are left out, and counted.
      CheckpointError: if the checkpoint is of another run.
      MissingDependencyError: if checkpoints are asked for, and orbax is not installed.

    >>> import gjflax, jax.numpy as jnp
    >>> class Mean(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return ((x - self.param("mean", nn.initializers.zeros, ())) ** 2).mean()
    >>> data = jnp.array([1.0, 2.0, 6.0])
    >>> result = gjflax.fit(Mean(), optax.sgd(0.5), data, key=jax.random.key(0), num_steps=3, progress=False)
    >>> float(result.state.params["mean"]), result.history[-1]["step"]
    (3.0, 3)
    """
    if not isinstance(objective, nn.Module):
        raise ArgumentError(f"`objective` is a module that returns a loss; got {objective!r:.80}.")
    counts = {"num_steps": num_steps, "report_every": report_every, "scanned_steps": scanned_steps}
    for name, number in counts.items():
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise ArgumentError(f"`{name}` is a positive integer; got {number!r}.")
    run_key, streams = _run_key(state_or_optimizer, key), tuple(streams)
    source = _source(data, batch_size, run_key, num_epochs, num_steps)
    state = state_or_optimizer
    if isinstance(state, optax.GradientTransformation):
        state = _initial_state(objective, state, run_key, source.peek(), inputs, streams, metrics)
    loop = _Loop(
        source=source,
        run=Run.start(state, run_key, metrics),
        num_steps=_number_of_steps(source, num_steps),
        made=_Steps((objective, inputs, streams)),
        held_out=_held_out(held_out_objective or objective, inputs, streams, held_out, batch_size),
        report_every=report_every,
        scanned_steps=scanned_steps,
        early_stopping=early_stopping,
        callbacks=tuple(callbacks),
    )
    if isinstance(checkpoints, (str, Path)):
        checkpoints = Checkpoints(checkpoints)
    owned = create_writer(writer) if isinstance(writer, (str, Path)) else None
    with contextlib.ExitStack() as stack:
        if checkpoints is not None:
            loop.checkpoints = stack.enter_context(checkpoints)
        if owned is not None:
            stack.callback(owned.close)
        loop.writer = owned or writer
        loop.restore()
        loop.progress = stack.enter_context(ProgressReporter(loop.num_steps, loop.steps, shown=progress))
        loop.go()
    return FitResult(loop.run.whole(), loop.history, loop.stopped)


def _run_key(given: Any, key: Any) -> Any:
    """The random key of the run."""
    if not isinstance(given, (train_state.TrainState, optax.GradientTransformation)):
        raise ArgumentError(f"`state_or_optimizer` is a TrainState or an optax optimiser; got {given!r:.80}.")
    own = getattr(given, "key", None)
    if own is not None and key is not None:
        raise ArgumentError("The state has a random key of its own: leave `key` out.")
    if own is None and key is None:
        raise ArgumentError("`key` is missing: the random key of the run, of which every step's keys are made.")
    return typed_key(key if own is None else own)


def _initial_state(
    objective: nn.Module,
    tx: optax.GradientTransformation,
    key: Any,
    batch: Any,
    inputs: Inputs,
    streams: tuple[str, ...],
    metrics: Any,
) -> TrainState:
    @jax.jit
    def init(key: Any, batch: Any) -> Any:
        return TrainState.init(objective, tx, key, *inputs(batch), streams=streams, metrics=metrics)

    return init(key, batch)


def _source(data: Any, batch_size: int | None, key: Any, num_epochs: int | None, num_steps: int | None) -> Batches:
    """The batches of a run: endless where their number is given by steps."""
    if isinstance(data, Batches):
        if batch_size is not None or num_epochs is not None:
            raise ArgumentError("The data are batches, whose size and number of epochs are their own.")
        if num_steps is None and data.epochs is None:
            raise ArgumentError("The data are batches without end: give `num_steps`.")
        return data
    if (num_epochs is None) == (num_steps is None):
        raise ArgumentError("Give one of `num_epochs` and `num_steps`.")
    if isinstance(data, Iterator):
        return batches(data, batch_size, epochs=num_epochs or 1)
    # Whole data need no order.
    shuffled = None if batch_size is None else fold_in_name(key, "data")
    return batches(data, batch_size, key=shuffled, epochs=num_epochs)


def _number_of_steps(source: Batches, num_steps: int | None) -> int | None:
    """The number of steps in all; None where only going through the data tells."""
    if num_steps is not None:
        return num_steps
    if source.steps_per_epoch is None or source.epochs is None:
        return None
    return source.epochs * source.steps_per_epoch


def _held_out(
    objective: nn.Module, inputs: Inputs, streams: tuple[str, ...], data: Any, batch_size: int | None
) -> Callable[[Run], float] | None:
    """The loss on held-out data, as a function of the run."""
    if data is None:
        return None
    if isinstance(data, Iterator):
        raise TrainingDataError(
            f"`held_out` is a {type(data).__name__}, which can be gone through only once, and it is evaluated at every "
            "report. Give arrays, a list, or the function that makes the iterator."
        )
    source = data
    if not isinstance(data, Batches):
        source = batches(data, None if gives_batches(data) else batch_size)
    loss = compiled_held_out_loss(objective, inputs, streams)

    def evaluate(run: Run) -> float:
        terms = [(loss(run, index, batch), _size(batch)) for index, batch in enumerate(source.epoch(0))]
        return float(np.average([float(value) for value, _ in terms], weights=[size for _, size in terms]))

    return evaluate


def _size(batch: Any) -> int:
    """The number of elements of a batch; 1 where it does not say."""
    leaves = jax.tree.leaves(batch)
    return leaves[0].shape[0] if leaves and getattr(leaves[0], "shape", ()) else 1


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Compiled steps of an objective, one or several in a call."""

    what: tuple[Any, ...]

    def __call__(self, run: Run, made: list[Any]) -> tuple[Run, Any]:
        """The run after steps on these batches, and their losses, a scalar or an array."""
        first = made[0]
        if len(made) == 1:
            return compiled_step(*self.what)(run, first)
        if all(batch is first for batch in made):
            return compiled_repetition(*self.what, len(made))(run, first)
        return compiled_steps(*self.what)(run, jax.tree.map(_stacked, *made))


def _stacked(*leaves: Any) -> Any:
    return (jnp if isinstance(leaves[0], jax.Array) else np).stack(leaves)


class _Item(NamedTuple):
    """A batch, the epoch that it belongs to, how many batches of that are used with this one, and whether it is the last."""

    batch: Any
    epoch: int
    offset: int
    ends_epoch: bool

    @property
    def form(self) -> Any:
        """What the batches of one call have in common."""
        leaves, structure = jax.tree.flatten(self.batch)
        return structure, [(np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves]


@dataclasses.dataclass
class _Loop:
    """A run in progress."""

    source: Batches
    run: Run
    num_steps: int | None
    made: _Steps
    held_out: Callable[[Run], float] | None
    report_every: int | None
    scanned_steps: int
    early_stopping: EarlyStopping | None
    callbacks: tuple[Callback, ...]
    checkpoints: Checkpoints | None = None
    writer: Any = None
    progress: Any = None
    history: list[Row] = dataclasses.field(default_factory=list)
    stopped: bool = False

    def __post_init__(self) -> None:
        self.steps = int(self.run.state.step)
        spe = self.source.steps_per_epoch
        # Where an epoch's length is not known, the batches of the steps before are read again.
        self.position = (0, 0) if spe is None else divmod(self.steps, spe)
        self._drop = self.steps if spe is None else 0
        if self.num_steps is not None and self.steps >= self.num_steps:
            raise ArgumentError(
                f"The state has made {self.steps} steps, and the run has {self.num_steps} in all: give a larger number."
            )
        if self.report_every is None and self.num_steps is not None:
            endless = spe is None and self.source.once
            if spe == 1 or endless:
                self.report_every = max(1, self.num_steps // _REPORTS)
        self._reported, self._skipped, self._in_vain = self.steps, int(self.run.skipped), 0

    def restore(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        found = self.checkpoints and self.checkpoints.restore(self.run, self._identity())
        if not found:
            return
        self.run, record = found
        self.history, self.stopped, self.position = record["history"], record["stopped"], tuple(record["position"])
        self.steps, self._drop = int(self.run.state.step), 0
        self._reported, self._skipped = self.steps, int(self.run.skipped)
        if self.early_stopping is not None and record["early_stopping"] is not None:
            self.early_stopping = self.early_stopping.replace(**record["early_stopping"])

    def go(self) -> None:
        """Make the steps that are left."""
        if self._finished():
            return
        waiting: collections.deque[Any] = collections.deque()
        for chunk in self._chunks():
            if self._reported == self.steps:
                self.run = self.run.replace(metrics=type(self.run.metrics).empty())
            self.run, losses = self.made(self.run, [item.batch for item in chunk])
            self.steps += len(chunk)
            item = chunk[-1]
            self.position = (item.epoch + 1, 0) if item.ends_epoch else (item.epoch, item.offset)
            waiting.append(losses)
            if len(waiting) > _AHEAD:
                self._show(jax.block_until_ready(waiting.popleft()))
            if self._reports_after(item, self.steps):
                while waiting:
                    self._show(waiting.popleft())
                self.report(item.epoch, self._is_last(item, self.steps))
            if self._finished():
                return
        if self.num_steps is not None:
            raise TrainingDataError(
                f"The data ended after {self.steps} of {self.num_steps} steps: give more, or fewer steps."
            )

    def _show(self, losses: Any) -> None:
        for loss in np.atleast_1d(np.asarray(losses)):
            self.progress.step(loss)

    def _is_last(self, item: _Item, steps: int) -> bool:
        return steps == self.num_steps or (item.ends_epoch and item.epoch + 1 == self.source.epochs)

    def _reports_after(self, item: _Item, steps: int) -> bool:
        """Whether there is a report after so many steps, of which this was the last."""
        if self.report_every is None:
            return item.ends_epoch or self._is_last(item, steps)
        return steps % self.report_every == 0 or self._is_last(item, steps)

    def _chunks(self) -> Iterator[list[_Item]]:
        """The batches of one compiled call after another. A report ends a call, so that an interrupted run makes the same."""
        chunk: list[_Item] = []
        for steps, item in enumerate(self._walk(), start=self.steps + 1):
            if chunk and item.form != chunk[0].form:
                yield chunk
                chunk = []
            chunk.append(item)
            if len(chunk) == self.scanned_steps or self._reports_after(item, steps):
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def report(self, epoch: int, last: bool) -> None:
        """Compute the numbers of a report, and tell everyone who is to know."""
        row = self._row(epoch, last)
        self.history.append(row)
        self.progress.report(row)
        if self.writer is not None:
            self.writer.write_scalars(self.steps, {k: v for k, v in row.items() if k not in ("step", "epoch")})
            self.writer.flush()
        if self.early_stopping is not None:
            watched = row.get("held_out_loss", row.get("loss"))
            if watched is None:
                raise ArgumentError(
                    'Early stopping watches the held-out loss or the metric "loss", and there is neither: give `held_out`.'
                )
            # NaN would be its best for good: no loss is less.
            if math.isfinite(watched):
                self.early_stopping = self.early_stopping.update(watched)
            self.stopped = self.early_stopping.should_stop
        if self.callbacks:
            state = copied(self.run).whole()
            asked = [callback(state, dict(row)) for callback in self.callbacks]
            self.stopped = self.stopped or any(answer is True for answer in asked)
        if self.stopped:
            self.progress.say(f"Stopped after {self.steps} steps.")
        if self.checkpoints and (last or self.stopped or len(self.history) % self.checkpoints.every == 0):
            self.checkpoints.save(self.steps, self.run, self._record(), self._identity())

    def _row(self, epoch: int, last: bool) -> Row:
        made, skipped = self.steps - self._reported, int(self.run.skipped)
        self._in_vain = self._in_vain + made if skipped - self._skipped == made else 0
        self._reported, self._skipped = self.steps, skipped
        require_some_finite(self._in_vain, skipped, self.steps, last=last)
        with free_promotion():  # clu divides floats by integers
            computed = {name: float(value) for name, value in self.run.metrics.compute().items()}
        row = {"step": self.steps, "epoch": epoch + 1, **computed, "skipped": skipped}
        if self.held_out is not None:
            row["held_out_loss"] = self.held_out(self.run)
        return row

    def _walk(self) -> Iterator[_Item]:
        """The batches that are left."""
        epoch, offset = self.position

        def walk() -> Iterator[_Item]:
            numbers = itertools.count(epoch) if self.source.epochs is None else range(epoch, self.source.epochs)
            for number in numbers:
                start = offset if number == epoch else 0
                items = self.source.epoch(number, start)
                for index, (batch, is_last) in enumerate(_marking_last(items), start=start + 1):
                    yield _Item(batch, number, index, is_last)

        return itertools.islice(walk(), self._drop, None)

    def _finished(self) -> bool:
        return self.stopped or (self.num_steps is not None and self.steps >= self.num_steps)

    def _record(self) -> dict[str, Any]:
        early = None if self.early_stopping is None else dataclasses.asdict(self.early_stopping)
        return {
            "history": self.history,
            "stopped": self.stopped,
            "position": list(self.position),
            "early_stopping": early,
        }

    @functools.cached_property
    def _checksum(self) -> int | None:
        return self.source.checksum()

    def _identity(self) -> dict[str, Any]:
        return {
            "key": key_identity(self.run.key),
            "data": {
                "elements": self.source.length,
                "steps per epoch": self.source.steps_per_epoch,
                "checksum": self._checksum,
            },
        }


def _marking_last(items: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
    """The items, each with whether it is the last."""
    for item in items:
        for following in items:
            yield item, False
            item = following
        yield item, True


def require_some_finite(in_vain: int, skipped: int, steps: int, *, last: bool) -> None:
    """Raise where training goes on in vain: so many steps in a row were skipped, or all of a run that is over.

    Raises:
      NonFiniteGradientError: if so.
    """
    if in_vain >= _IN_VAIN or (last and skipped == steps):
        raise NonFiniteGradientError(
            f"The loss or its gradients were not finite in the last {in_vain} of {steps} steps, which were left out. Lower "
            "the learning rate, clip gradients (optax.clip_by_global_norm), or look for where the loss is not finite: "
            "jax.config.update('jax_debug_nans', True)."
        )

"""`fit` against loops written by hand, bit for bit, and what it does with the variables and arguments of its users."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu import metrics as clu_metrics
from flax import struct
from flax.core import FrozenDict, freeze
from flax.errors import InvalidRngError
from flax.training import train_state
from flax.training.early_stopping import EarlyStopping

import gjflax
from gjflax import (
    ELBO,
    ArgumentError,
    GenModule,
    Map,
    NonFiniteGradientError,
    Normal,
    ParameterPathError,
    TrainingDataError,
    TrainState,
    batches,
    label_parameters,
    select,
    trace,
)
from gjflax.learning.training.state import fold_in_name, step_rngs

KEY = jax.random.key(0)
SIZE, BATCH = 10, 4
Y = np.random.default_rng(0).normal(1.0, 2.0, SIZE).astype(np.float32)
fit = functools.partial(gjflax.fit, progress=False)


def identical(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


# A model of a mean, from batches -------------------------------------------------------------------------------------


class Model(GenModule):
    @nn.compact
    def __call__(self, n: int):
        scale = jnp.exp(self.param("log_scale", nn.initializers.zeros, ()))
        mean = trace("mean", Normal)(0.0, 3.0)
        return trace("y", Map(Normal, repeats=n, total=SIZE))(mean, scale)


class Guide(GenModule):
    @nn.compact
    def __call__(self):
        loc = self.param("loc", nn.initializers.zeros, ())
        return trace("mean", Normal)(loc, jnp.exp(self.param("log_scale", nn.initializers.constant(-1.0), ())))


OBJECTIVE = ELBO(Model(), Guide(), num_samples=2)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(5.0), optax.adam(optax.cosine_decay_schedule(0.1, 20)))


def observing(batch: Any) -> tuple[Any, ...]:
    return {"y": batch}, (len(batch),)


@jax.jit
def step_by_hand(state: Any, batch: Any) -> tuple[Any, Any]:
    def loss_fn(params: Any) -> Any:
        return OBJECTIVE.apply({"params": params}, *observing(batch), rngs=state.rngs())

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    with jax.numpy_dtype_promotion("standard"):
        return state.apply_gradients(grads=grads), (loss, optax.tree.norm(grads))


def order(key: Any, epochs: int) -> Any:
    """The batches that `fit` trains on."""
    return batches(Y, BATCH, key=fold_in_name(key, "data"), epochs=epochs)


@pytest.fixture(scope="module")
def by_hand() -> tuple[Any, list[Any]]:
    """The state and the measurements of four epochs."""
    state = TrainState.init(OBJECTIVE, OPTIMIZER, KEY, *observing(Y[:BATCH]))
    measured = []
    for batch in order(KEY, 4):
        state, numbers = step_by_hand(state, batch)
        measured.append(np.asarray(numbers))
    return state, measured


@pytest.mark.optimized  # as the loop by hand, which is compiled before a test begins
def test_it_is_the_loop_written_by_hand(by_hand: Any):
    state, measured = by_hand
    result = fit(OBJECTIVE, OPTIMIZER, Y, key=KEY, num_epochs=4, batch_size=BATCH, inputs=observing)
    identical(result.state.params, state.params)
    identical(result.state.opt_state, state.opt_state)
    assert result.state.step == 12 and result.state.skipped == 0 and not result.stopped_early
    assert result.state.key == KEY
    assert [(row["step"], row["epoch"]) for row in result.history] == [(3, 1), (6, 2), (9, 3), (12, 4)]
    averages = np.asarray(measured).reshape(4, 3, 2).mean(axis=1)
    np.testing.assert_allclose(result.column("loss"), averages[:, 0], rtol=1e-5)
    np.testing.assert_allclose(result.column("grad_norm"), averages[:, 1], rtol=1e-5)
    assert result.column("loss")[-1] < result.column("loss")[0]


@pytest.mark.optimized  # as the loop by hand, which is compiled before a test begins
def test_it_goes_on_from_a_state_as_if_it_had_not_stopped(by_hand: Any):
    first = fit(OBJECTIVE, OPTIMIZER, Y, key=KEY, num_steps=5, batch_size=BATCH, inputs=observing)
    before = jax.tree.map(np.asarray, first.state.params)
    rest = fit(OBJECTIVE, first.state, Y, num_epochs=4, batch_size=BATCH, inputs=observing)
    identical(rest.state.params, by_hand[0].params)
    identical(rest.state.opt_state, by_hand[0].opt_state)
    # The state that was given is as it was.
    identical(first.state.params, before)
    with pytest.raises(ArgumentError, match="has made 12 steps, and the run has 12 in all"):
        fit(OBJECTIVE, rest.state, Y, num_epochs=4, batch_size=BATCH, inputs=observing)


@pytest.mark.optimized  # as the loop by hand, which is compiled before a test begins
def test_a_plain_flax_state_is_taken_and_given_back(by_hand: Any):
    start = TrainState.init(OBJECTIVE, OPTIMIZER, KEY, *observing(Y[:BATCH]))
    plain = train_state.TrainState.create(apply_fn=OBJECTIVE.apply, params=start.params, tx=OPTIMIZER)
    result = fit(OBJECTIVE, plain, Y, key=KEY, num_epochs=4, batch_size=BATCH, inputs=observing)
    assert type(result.state) is train_state.TrainState
    identical(result.state.params, by_hand[0].params)
    assert result.state.step == 12 and plain.step == 0


@pytest.mark.slow
def test_held_out_data_are_evaluated_at_every_report():
    held_out = np.linspace(-1.0, 1.0, 6, dtype=np.float32)
    states = []

    def keep(state: Any, row: Any) -> None:
        states.append(state)

    data = {"key": KEY, "num_epochs": 3, "batch_size": BATCH, "inputs": observing, "held_out": held_out}
    result = fit(OBJECTIVE, OPTIMIZER, Y, callbacks=[keep], **data)

    def loss(params: Any, index: int, batch: Any) -> float:
        rngs = step_rngs(fold_in_name(KEY, "held out"), index, ["choice"])
        return float(OBJECTIVE.apply({"params": params}, *observing(batch), rngs=rngs))

    state, row = states[1], result.history[1]
    want = (4 * loss(state.params, 0, held_out[:4]) + 2 * loss(state.params, 1, held_out[4:])) / 6
    np.testing.assert_allclose(row["held_out_loss"], want, rtol=1e-5)
    # The states that callbacks were given are theirs, and training is what it is without them.
    assert [int(state.step) for state in states] == [3, 6, 9]
    identical(states[-1].params, result.state.params)
    # Another objective with the same variables.
    best = fit(OBJECTIVE, OPTIMIZER, Y, held_out_objective=ELBO(Model(), Guide(), num_samples=50), **data)
    identical(best.state.params, result.state.params)
    assert best.history[1]["held_out_loss"] != row["held_out_loss"]


# Deterministic losses, whose course is known by hand -----------------------------------------------------------------


class Quadratic(nn.Module):
    """The mean of (w − x)² / 2: its gradient is w minus the mean of x."""

    start: float = 0.0

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.constant(self.start), ())
        mean = self.variable("seen", "mean", lambda: jnp.zeros(()))
        if not self.is_initializing() and self.is_mutable_collection("seen"):
            mean.value = x.mean()
        return ((w - x) ** 2).mean() / 2


def test_a_schedule_goes_by_the_steps():
    rates = [0.5, 0.25, 0.125, 0.0625, 0.03125]
    schedule = optax.exponential_decay(0.5, transition_steps=1, decay_rate=0.5)
    result = fit(Quadratic(), optax.sgd(schedule), jnp.ones(3), key=KEY, num_steps=5)
    assert result.state.params["w"] == 1 - np.prod([1 - rate for rate in rates])
    # A run whose epochs say nothing of it is reported on by twentieths.
    assert [row["step"] for row in result.history] == [1, 2, 3, 4, 5]
    assert fit(Quadratic(), optax.sgd(schedule), jnp.ones(3), key=KEY, num_steps=60).column("step").tolist() == list(
        range(3, 61, 3)
    )


@pytest.mark.parametrize("held_out", [None, jnp.full((1, 1), -1.0)])
def test_a_report_that_is_not_finite_does_not_stop_training(held_out):
    """Neither one of a step that was left out, nor one of data held out whose loss is not finite."""

    class Objective(nn.Module):
        @nn.compact
        def __call__(self, x):
            return (self.param("p", nn.initializers.zeros, ()) - 3.0) ** 2 + jnp.sum(0 * jnp.log(x))

    x = jnp.array([[-1.0]] + [[1.0]] * 199)
    result = fit(
        Objective(),
        optax.sgd(1e-2),
        batches(x, 1, epochs=1),
        key=KEY,
        num_steps=200,
        report_every=1,
        held_out=held_out,
        early_stopping=EarlyStopping(min_delta=1e-4, patience=5),
    )
    assert result.state.skipped == 1 and not result.stopped_early
    np.testing.assert_allclose(result.state.params["p"], 3 - 3 * 0.98**199, rtol=1e-5)


def test_steps_that_are_not_finite_are_left_out_and_counted():
    good = [np.full(2, value, np.float32) for value in (1.0, 3.0, -2.0)]
    bad = np.array([np.nan, 1.0], np.float32)
    huge = np.full(2, 1e30, np.float32)
    tx = optax.sgd(0.5, momentum=0.9)
    want = fit(Quadratic(), tx, good, key=KEY, num_epochs=1)
    got = fit(Quadratic(), tx, [good[0], bad, good[1], huge, good[2], bad], key=KEY, num_epochs=1)
    identical(got.state.params, want.state.params)
    identical(got.state.opt_state, want.state.opt_state)
    identical(got.state.variables, want.state.variables)
    assert got.state.skipped == 3 and got.state.step == 6
    assert got.history[0]["skipped"] == 3 and got.history[0]["loss"] == want.history[0]["loss"]


def test_training_in_vain_is_given_up():
    bad, good = np.full(1, np.nan, np.float32), np.zeros(1, np.float32)
    with pytest.raises(NonFiniteGradientError, match="not finite in the last 2 of 2 steps"):
        fit(Quadratic(), optax.sgd(0.1), [bad, bad], key=KEY, num_epochs=1)
    with pytest.raises(NonFiniteGradientError, match="not finite in the last 100 of 101 steps"):
        fit(Quadratic(), optax.sgd(0.1), [good, *[bad] * 200], key=KEY, num_epochs=1, report_every=1)
    # One report without a finite step is none of these.
    result = fit(Quadratic(), optax.sgd(0.1), [bad, good], key=KEY, num_epochs=1, report_every=1)
    assert np.isnan(result.history[0]["loss"]) and result.state.skipped == 1


def test_it_stops_early_at_the_expected_step():
    options = {"key": KEY, "num_steps": 40, "report_every": 2}
    free = fit(Quadratic(), optax.sgd(0.2), jnp.ones(2), held_out=jnp.ones(1), **options)
    stopping, expected = EarlyStopping(min_delta=1e-3, patience=2), None
    for row in free.history:
        stopping = stopping.update(row["held_out_loss"])
        if stopping.should_stop:
            expected = row["step"]
            break
    # By hand: w is 1 − 0.8^step, the loss 0.8^(2 step) / 2, and two reports may pass without an improvement.
    losses = [0.5 * 0.8 ** (2 * step) for step in range(2, 41, 2)]
    stalled = next(i for i in range(1, 20) if losses[i - 1] - losses[i] <= 1e-3)
    best = losses[stalled - 1]
    assert best - losses[stalled + 2] <= 1e-3 and expected == 2 * (stalled + 3)
    stop = EarlyStopping(min_delta=1e-3, patience=2)
    result = fit(Quadratic(), optax.sgd(0.2), jnp.ones(2), held_out=jnp.ones(1), early_stopping=stop, **options)
    assert result.stopped_early and result.state.step == expected == result.history[-1]["step"]
    assert result.history == free.history[: len(result.history)]


def test_a_callback_may_end_the_run():
    rows = []

    def until_seven(state: Any, row: Any) -> bool:
        rows.append(row)
        return int(state.step) >= 7

    result = fit(
        Quadratic(), optax.sgd(0.1), jnp.ones(2), key=KEY, num_steps=50, report_every=3, callbacks=[until_seven]
    )
    assert result.stopped_early and result.state.step == 9 and rows == result.history


def test_metrics_of_ones_own():
    @struct.dataclass
    class Metrics(clu_metrics.Collection):
        log_weight: clu_metrics.Average.from_output("log_weights")  # pyright: ignore[reportInvalidTypeForm]
        last: clu_metrics.LastValue.from_output("loss")  # pyright: ignore[reportInvalidTypeForm]

    # Annotations are strings here, and clu reads the classes.
    Metrics.__annotations__ = {
        "log_weight": clu_metrics.Average.from_output("log_weights"),
        "last": clu_metrics.LastValue.from_output("loss"),
    }
    result = fit(OBJECTIVE, OPTIMIZER, Y, key=KEY, num_epochs=1, inputs=observing, metrics=Metrics)
    (row,) = result.history
    np.testing.assert_allclose(row["last"], -row["log_weight"], rtol=1e-6)


# Data of all kinds ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_kind_of_data_gives_the_same_run():
    parts = [Y[:4], Y[4:8], Y[8:]]

    def steps(data: Any, **options: Any) -> Any:
        return fit(Quadratic(), optax.sgd(0.3), data, key=KEY, **options).state.params

    want = steps(parts, num_epochs=2)
    identical(steps(lambda epoch: iter(parts), num_epochs=2), want)
    identical(steps(batches(Y, 4, epochs=2)), want)
    identical(steps(batches(Y, 4, epochs=None), num_steps=6), want)
    identical(steps(iter(parts * 2), num_epochs=1), want)
    identical(steps(iter(parts * 9), num_steps=6), want)
    by_epoch = steps(lambda epoch: parts[: epoch + 1], num_epochs=3)
    identical(by_epoch, steps([parts[0], parts[0], parts[1], *parts], num_epochs=1))


def test_a_batch_is_what_the_objective_is_called_with():
    class Sum(nn.Module):
        @nn.compact
        def __call__(self, observed, model_args=(), guide_args=()):
            w = self.param("w", nn.initializers.zeros, ())
            return w * (observed["y"].sum() + 10 * sum(map(jnp.sum, model_args)) + 100 * sum(map(jnp.sum, guide_args)))

    ones = np.ones(4, np.float32)
    for data, want in [({"y": ones}, 2.0), (({"y": ones}, (ones,)), 22.0), (({"y": ones}, (), (ones,)), 202.0)]:
        assert fit(Sum(), optax.sgd(1.0), data, key=KEY, num_steps=1, batch_size=2).state.params["w"] == -want


def test_the_step_is_compiled_once_and_again_for_the_last_batch():
    traced = []

    def counting(batch: Any) -> Any:
        traced.append(batch.shape)
        return (batch,)

    options = {"key": KEY, "num_epochs": 5, "batch_size": BATCH, "inputs": counting}
    result = fit(Quadratic(), optax.sgd(0.1), Y, **options)
    assert traced == [(4,), (4,), (2,)]  # init, and two shapes of batches
    # Nor does a run that goes on trace again.
    fit(Quadratic(), result.state, Y, **{**options, "key": None, "num_epochs": 6})
    assert len(traced) == 3


@pytest.mark.parametrize("batch_size, shapes", [(BATCH, [(4,), (4,), (2,)]), (None, [(10,), (10,)])])
def test_several_steps_in_one_call_are_the_same_run(batch_size: int | None, shapes: list[Any]):
    """In calls of at most two; a report, and a batch of another shape, end one."""
    options = {"key": KEY, "batch_size": batch_size, "report_every": 3, "num_steps": 10}
    one_by_one = fit(OBJECTIVE, OPTIMIZER, Y, inputs=observing, **options)
    traced = []

    def counting(batch: Any) -> Any:
        traced.append(batch.shape)
        return observing(batch)

    together = fit(OBJECTIVE, OPTIMIZER, Y, inputs=counting, scanned_steps=2, **options)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), together.state.params, one_by_one.state.params
    )
    assert [row["step"] for row in together.history] == [3, 6, 9, 10]
    assert together.state.step == 10
    for row, other in zip(together.history, one_by_one.history, strict=True):
        assert row == pytest.approx(other, rel=2e-5)
    assert [shape for shape in traced if shape in shapes] == traced and len(set(traced)) == len(set(shapes))
    # Each form is traced for `init`, for a call of two steps and for one of a single step, at most.
    assert len(traced) <= 4


# Variables of all kinds ----------------------------------------------------------------------------------------------


class NetworkModel(GenModule):
    @nn.compact
    def __call__(self, x):
        z = trace("z", Normal)(jnp.zeros((len(x), 2)), 1.0)
        return trace("x", Normal)(nn.Dense(3, name="decoder")(z), 1.0)


class NetworkGuide(GenModule):
    layer: Callable[..., Any] = nn.Dense
    batch_norm: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = nn.tanh(self.layer(4, param_dtype=self.dtype, name="hidden")(x))
        h = nn.Dropout(self.dropout, deterministic=not self.dropout)(h)
        if self.batch_norm:
            h = nn.BatchNorm(use_running_average=False)(h)
        loc = self.layer(2, param_dtype=self.dtype, name="out")(h).astype(jnp.float32)
        return trace("z", Normal)(loc, 0.3)


X = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
ADAM = optax.adam(1e-2)
"""One object: another one would have every step compiled again."""


def network(**guide: Any) -> Any:
    return ELBO(NetworkModel(), NetworkGuide(**guide), num_samples=3)


def encoding(x: Any) -> tuple[Any, ...]:
    return {"x": x}, (x,), (x,)


def on_network(objective: Any, tx: Any = None, **options: Any) -> Any:
    return fit(
        objective,
        tx or ADAM,
        X,
        key=KEY,
        num_steps=6,
        report_every=2,
        inputs=encoding,
        **options,
    )


@pytest.mark.slow
def test_running_statistics_with_several_samples():
    objective = network(batch_norm=True, dropout=0.5)
    result = on_network(objective)
    assert set(result.state.variables) == {"batch_stats"}
    start = TrainState.init(objective, ADAM, KEY, *encoding(X))
    changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), result.state.variables, start.variables)
    assert min(jax.tree.leaves(changes)) > 1e-3

    # A class of the user's own, in the way of Flax's examples.
    class WithStatistics(train_state.TrainState):
        batch_stats: Any

    own = WithStatistics.create(
        apply_fn=None, params=start.params, tx=ADAM, batch_stats=freeze(start.variables["batch_stats"])
    )
    again = on_network(objective, own)
    assert type(again.state) is WithStatistics and isinstance(again.state.batch_stats, FrozenDict)
    identical(again.state.batch_stats.unfreeze(), result.state.variables["batch_stats"])
    identical(again.state.params, result.state.params)


def test_what_samples_write_is_averaged():
    """A variable that remembers the choice: after a step it holds the mean over the samples."""

    class Remembering(GenModule):
        @nn.compact
        def __call__(self):
            loc = self.param("loc", nn.initializers.zeros, ())
            z = trace("z", Normal)(loc, 1.0)
            self.sow("intermediates", "z", z)
            memory = self.variable("memory", "z", lambda: jnp.zeros(()))
            calls = self.variable("memory", "calls", lambda: jnp.zeros((), jnp.int32))
            if not self.is_initializing():
                memory.value, calls.value = 0.5 * memory.value + 0.5 * z, calls.value + 1
            return z

    class One(GenModule):
        @nn.compact
        def __call__(self):
            return trace("z", Normal)(0.0, 1.0)

    objective = ELBO(One(), Remembering(), num_samples=4)
    variables = objective.init(KEY, {})
    kept = {**variables, "memory": {"guide": {"z": jnp.float32(2.0), "calls": jnp.int32(7)}}}
    _, written = objective.apply(kept, {}, rngs={"choice": KEY}, mutable=["memory", "intermediates", "diagnostics"])
    (z,) = written["intermediates"]["guide"]["z"]
    assert z.shape == (4,) and len(np.unique(z)) == 4
    np.testing.assert_allclose(written["memory"]["guide"]["z"], 1.0 + 0.5 * np.mean(z), rtol=1e-6)
    assert written["memory"]["guide"]["calls"] == 8


@pytest.mark.slow
def test_dropout_in_a_guide():
    objective = network(dropout=0.5)
    result = on_network(objective)
    assert np.all(np.isfinite(result.column("loss")))
    identical(on_network(objective).state.params, result.state.params)
    # It is drawn: another result than without. And its stream is not that of the choices.
    assert np.any(
        on_network(network()).state.params["guide"]["out"]["bias"] != result.state.params["guide"]["out"]["bias"]
    )
    rngs = result.state.rngs()
    assert np.any(jax.random.key_data(rngs["choice"]) != jax.random.key_data(rngs["dropout"]))
    with pytest.raises(InvalidRngError, match="dropout"):
        state = TrainState.init(objective, ADAM, KEY, *encoding(X))
        on_network(objective, state.replace(key=None), streams=["choice"])


def test_every_step_and_every_stream_has_a_key_of_its_own():
    keys = [key for step in range(3) for key in step_rngs(KEY, step, ["choice", "dropout"]).values()]
    assert len({np.asarray(jax.random.key_data(key)).tobytes() for key in keys}) == 6


def test_held_parameters_stay_as_they_are():
    labels = label_parameters({"held": "model", "slow": lambda path: path[-1] == "bias"}, default="fast")
    tx = optax.multi_transform({"held": optax.set_to_zero(), "slow": optax.sgd(1e-5), "fast": optax.adam(1e-2)}, labels)
    result = on_network(network(), tx)
    start = TrainState.init(network(), tx, KEY, *encoding(X)).params
    identical(result.state.params["model"], start["model"])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), result.state.params["guide"], start["guide"])
    for layer in moved.values():
        assert 0 < layer["bias"] < 1e-3 < layer["kernel"]


def test_parameters_of_half_the_precision():
    with jax.numpy_dtype_promotion("standard"):  # as `nn.Dense` asks for
        result = on_network(network(dtype=jnp.bfloat16))
    dtypes = {path[-2].key: leaf.dtype for path, leaf in jax.tree_util.tree_flatten_with_path(result.state.params)[0]}
    assert dtypes == {"hidden": jnp.bfloat16, "out": jnp.bfloat16, "decoder": jnp.float32}
    assert np.all(np.isfinite(result.column("grad_norm"))) and result.state.skipped == 0
    assert result.column("loss").dtype == np.float64 and result.column("loss")[-1] < result.column("loss")[0]


@pytest.mark.slow
def test_layers_that_are_computed_again():
    want, got = on_network(network()), on_network(network(layer=nn.remat(nn.Dense)))
    assert jax.tree.structure(got.state.params) == jax.tree.structure(want.state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got.state.params, want.state.params)


# Labels --------------------------------------------------------------------------------------------------------------


def test_labels_of_parameters():
    params = {"model": {"Dense_0": {"kernel": 1, "bias": 2}}, "guide": {"Dense_0": {"kernel": 3}}}
    by_selection = label_parameters({"a": select(("model", "Dense_0", "bias")), "b": ["guide"]}, "c")(params)
    assert by_selection == {"model": {"Dense_0": {"kernel": "c", "bias": "a"}}, "guide": {"Dense_0": {"kernel": "b"}}}
    others = label_parameters({"a": ~select("model")}, "c")(params)
    assert others == {"model": {"Dense_0": {"kernel": "c", "bias": "c"}}, "guide": {"Dense_0": {"kernel": "a"}}}
    # The first rule that fits.
    assert label_parameters({"a": "guide", "b": lambda path: True}, "c")(params)["guide"]["Dense_0"]["kernel"] == "a"
    boxed = {"w": nn.Partitioned(jnp.zeros(2), names=("x",))}
    assert jax.tree.leaves(label_parameters({"a": "w"}, "c")(boxed)) == ["a"]
    with pytest.raises(ParameterPathError, match="label 'a' fits no parameter.*Did you mean \"guide\""):
        label_parameters({"a": "giude"}, "c")(params)
    with pytest.raises(ParameterPathError, match="label 'a' fits no parameter"):
        label_parameters({"a": lambda path: False}, "c")(params)


# What is refused -----------------------------------------------------------------------------------------------------


class NoScalar(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("w", nn.initializers.ones, ())


def test_arguments_of_another_form_are_refused():
    state = TrainState.init(Quadratic(), optax.sgd(0.1), KEY, Y)
    plain = train_state.TrainState.create(apply_fn=None, params=state.params, tx=optax.sgd(0.1))
    tx = optax.sgd(0.1)
    for match, call in [
        ("`key` is missing", lambda: fit(Quadratic(), tx, Y, num_steps=1)),
        ("`key` is missing", lambda: fit(Quadratic(), plain, Y, num_steps=1)),
        ("key of its own", lambda: fit(Quadratic(), state, Y, key=KEY, num_steps=1)),
        ("one of `num_epochs` and `num_steps`", lambda: fit(Quadratic(), state, Y)),
        ("one of `num_epochs` and `num_steps`", lambda: fit(Quadratic(), state, Y, num_steps=1, num_epochs=1)),
        ("`num_steps` is a positive integer", lambda: fit(Quadratic(), state, Y, num_steps=0)),
        ("`scanned_steps` is a positive", lambda: fit(Quadratic(), state, Y, num_steps=1, scanned_steps=0)),
        ("`report_every` is a positive", lambda: fit(Quadratic(), state, Y, num_steps=1, report_every=0)),
        ("without end", lambda: fit(Quadratic(), state, batches(Y, 2, epochs=None))),
        ("their own", lambda: fit(Quadratic(), state, batches(Y, 2), num_epochs=1)),
        (r"scalar loss; got float32 of shape \(10,\)", lambda: fit(NoScalar(), tx, Y, key=KEY, num_steps=1)),
    ]:
        with pytest.raises(ArgumentError, match=match):
            call()


def test_data_that_end_too_soon_are_named():
    with pytest.raises(TrainingDataError, match="ended after 2 of 5 steps"):
        fit(Quadratic(), optax.sgd(0.1), iter([Y, Y]), key=KEY, num_steps=5)
    with pytest.raises(TrainingDataError, match="0 batches: it is empty"):
        fit(Quadratic(), optax.sgd(0.1), iter([]), key=KEY, num_steps=5)
    with pytest.raises(TrainingDataError, match="`held_out` is a list_iterator"):
        fit(Quadratic(), optax.sgd(0.1), Y, key=KEY, num_steps=5, held_out=iter([Y]))

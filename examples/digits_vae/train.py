"""Training and evaluation."""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import checkpoints
import figures
import input_pipeline
import jax
import jax.numpy as jnp
import ml_collections
import models
import optax
import progress
import queries
from clu import metrics, parameter_overview
from flax import struct
from flax.training import train_state
from jaxtyping import Array, Float, Key, PyTree

import gjflax


@struct.dataclass
class TrainMetrics(metrics.Collection):
    """Metrics of the training steps of an epoch."""

    loss: metrics.Average.from_output("loss")
    grad_norm: metrics.Average.from_output("grad_norm")


class TrainState(train_state.TrainState):
    """Flax's state, with metrics and the key of a run. A step's own key comes of that key and the step's number."""

    key: Key[Array, ""]
    metrics: TrainMetrics

    def step_keys(self) -> Key[Array, " 2"]:
        """Keys for this step's choices and for the order of an epoch that starts here."""
        return jax.random.split(jax.random.fold_in(self.key, self.step))


TrainStep = Callable[[TrainState, models.Images], TrainState]


def create_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Adam with clipped gradients, and a learning rate that falls to zero over the run."""
    steps = config.num_epochs * (input_pipeline.TRAINING // config.batch_size)
    return _optimizer(config.learning_rate, steps, config.clip_norm)


@functools.cache
def _optimizer(learning_rate: float, steps: int, clip_norm: float) -> optax.GradientTransformation:
    # One object for equal arguments: it is a static part of the state, and a different one means compiling again.
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adam(schedule))


@functools.partial(jax.jit, static_argnums=(0, 2))
def init_params(objective: gjflax.ELBO, key: Key[Array, ""], batch_size: int) -> PyTree:
    """Initial parameters of the decoder, under "model", and the encoder, under "guide"."""
    images = jnp.zeros((batch_size, models.SIDE, models.SIDE), jnp.int32)
    return objective.init(key, *models.objective_args(images))["params"]


def create_train_state(config: ml_collections.ConfigDict, key: Key[Array, ""]) -> TrainState:
    """The state before the first step."""
    objective = models.create_objective(models.create_model(config), config.batch_size)
    init_key, run_key = jax.random.split(key)
    state = TrainState.create(
        apply_fn=objective.apply,
        params=init_params(objective, init_key, config.batch_size),
        tx=create_optimizer(config),
        key=run_key,
        metrics=TrainMetrics.empty(),
    )
    return placed(state)


def placed(state: TrainState) -> TrainState:
    """The state at step 0, its arrays on one device as a restored state has them: both run one compiled program."""
    return jax.device_put(state.replace(step=jnp.zeros((), jnp.int32)), jax.devices()[0])


def train_step(state: TrainState, images: models.Images) -> TrainState:
    """One step of gradient descent on minus the evidence lower bound, in nats per image."""
    key, _ = state.step_keys()

    def loss_fn(params: PyTree) -> gjflax.FloatArray:
        loss = state.apply_fn({"params": params}, *models.objective_args(images), rngs={"choice": key})
        return loss / len(images)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    state = state.apply_gradients(grads=grads)
    update = TrainMetrics.single_from_model_output(loss=loss, grad_norm=optax.tree.norm(grads))
    return state.replace(metrics=state.metrics.merge(update))


@functools.partial(jax.jit, static_argnames=("step", "batch_size"))
def train_epoch(step: TrainStep, state: TrainState, images: models.Images, batch_size: int) -> TrainState:
    """One pass over the images: a step for every batch. The metrics are those of this epoch."""
    _, order_key = state.step_keys()
    batches = input_pipeline.shuffled_batches(images, order_key, batch_size)
    state = state.replace(metrics=TrainMetrics.empty())
    state, _ = jax.lax.scan(lambda state, batch: (step(state, batch), None), state, batches)
    return state


@functools.partial(jax.jit, static_argnames=("objective", "num_samples"))
def evaluate(
    objective: gjflax.ELBO, params: PyTree, images: models.Images, key: Key[Array, ""], num_samples: int
) -> Float[Array, ""]:
    """The evidence lower bound, in nats per image, averaged over samples of every image's code."""

    def loss(key: Key[Array, ""]) -> gjflax.FloatArray:
        return objective.apply({"params": params}, *models.objective_args(images), rngs={"choice": key})

    return -jnp.mean(jax.vmap(loss)(jax.random.split(key, num_samples))) / len(images)


@functools.partial(jax.jit, static_argnames=("model", "num_samples"))
def mean_log_evidence(
    model: models.Model, params: PyTree, images: models.Images, key: Key[Array, ""], num_samples: int
) -> Float[Array, ""]:
    """The importance sampling estimate of log p(x), in nats per image."""
    decoder, encoder = queries.bind(model, params)

    def estimate(image_and_key: tuple[models.Image, Key[Array, ""]]) -> Float[Array, ""]:
        return queries.log_evidence(decoder, encoder, *image_and_key, num_samples)

    # A few images at a time: all of them with all their samples would fill some hundred megabytes.
    return jnp.mean(jax.lax.map(estimate, (images, jax.random.split(key, len(images))), batch_size=24))


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> TrainState:
    """Train, report and draw; go on from the last checkpoint in the work directory, if there is one.

    Args:
      config: the hyperparameters.
      workdir: where checkpoints and figures are written.

    Returns:
      The state after the last step.
    """
    directory = Path(workdir).expanduser().resolve()
    train_set, held_out = input_pipeline.load_datasets()
    train_images, held_out_images = jnp.asarray(train_set.images), jnp.asarray(held_out.images)
    run_key, eval_key = jax.random.split(jax.random.key(config.seed))
    model = models.create_model(config)
    objective = models.create_objective(model, len(held_out_images))

    state = create_train_state(config, run_key)
    history: checkpoints.History = []
    print(parameter_overview.get_parameter_overview(state.params, include_stats=False))
    with checkpoints.open_manager(directory / "checkpoints") as manager:
        if manager.latest_step() is not None:
            state, history = checkpoints.restore(manager, config, state)
        finished = len(history) == config.num_epochs
        if history:
            print("Training is complete." if finished else f"Resuming after epoch {len(history)}.")
        started = time.perf_counter()
        with progress.Reporter(config.num_epochs, len(history)) as reporter:
            for epoch in range(len(history) + 1, config.num_epochs + 1):
                state = train_epoch(train_step, state, train_images, config.batch_size)
                computed = {name: float(value) for name, value in state.metrics.compute().items()}
                elbo = float(evaluate(objective, state.params, held_out_images, eval_key, config.eval_samples))
                history.append({"epoch": epoch, **computed, "held_out_elbo": elbo})
                reporter.report(history[-1])
                if epoch % config.checkpoint_every_epochs == 0 or epoch == config.num_epochs:
                    checkpoints.save(manager, config, state, history)
        if not finished:
            print(f"Trained for {time.perf_counter() - started:.1f} s, with compilation.")

    elbo = evaluate(objective, state.params, held_out_images, eval_key, config.eval_samples)
    evidence = mean_log_evidence(model, state.params, held_out_images, eval_key, config.evidence_samples)
    print(f"Held-out ELBO {elbo:.2f} nats per image; log p(x) by importance sampling {evidence:.2f}.")
    for path in figures.draw_all(directory, model, state.params, held_out, history):
        print(f"Wrote {path}")
    return state

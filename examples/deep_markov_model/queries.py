"""What a trained model is asked about one sequence: what comes next."""

import functools

import input_pipeline
import jax
import ml_collections
import models
from jaxtyping import Array, Float, Key, PyTree

from gjflax import Unfold


@functools.partial(jax.jit, static_argnames=("config", "direction", "steps", "number"))
def forecast(
    config: ml_collections.FrozenConfigDict,
    direction: str,
    params: PyTree,
    seen: input_pipeline.Sequence,
    steps: int,
    number: int,
    key: Key[Array, ""],
) -> Float[Array, "number steps"]:
    """Draws of the x that come after those given: the guide draws the last state, and the model goes on from it.

    The guide's network reads a sequence of any length; a step of the model, with its own part of the parameters, is unfolded
    over as many steps as are asked for.
    """
    guide = models.Guide(config.latents, config.hidden, direction).bind({"params": params["guide"]})
    ahead = Unfold(models.Step(config.hidden), max_length=steps).bind({"params": params["model"]["step"]})

    def draw(key: Key[Array, ""]) -> Float[Array, " steps"]:
        guide_key, model_key = jax.random.split(key)
        _, states = guide.simulate(guide_key, (seen,))
        _, future = ahead.simulate(model_key, (steps, states.get_retval()[-1]))
        return future["x"][:, 0]

    return jax.vmap(draw)(jax.random.split(key, number))

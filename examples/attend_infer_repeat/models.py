r"""Attend, infer, repeat: an image as a number of objects, each with a place and an appearance.

Of one image x, in T steps,

    present_t ~ Bernoulli(prior)                    while present_{t−1}: the first 0 ends it
    where_t ~ Normal(0, 1)                          in R³: the size and the centre of a box
    what_t ~ Normal(0, 1)                           in R^latents
    x ~ Normal(Σ_t place(decode(what_t), where_t), noise)       for each pixel, t over the steps with an object

The guide looks at the image T times. At each step an LSTM says whether there is another object, and where; what it is,
is read off the pixels in that box, which are then erased, so that the next step sees what is left. After S. M. A. Eslami
et al., "Attend, infer, repeat: fast scene understanding with generative models", NIPS 2016, where nothing is erased and the
LSTM has to remember.

What is there in some images only is a `Mask`: where its flag is false it has no choices. `Unfold` takes the steps. Both
sides have the same choices: ("steps", "present"), ("steps", "object", "where") and ("steps", "object", "what").
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections
from input_pipeline import CANVAS, SIDE
from jaxtyping import Array, Bool, Float, Int

import gjflax
from gjflax import ENUM, REINFORCE, Bernoulli, Map, Mask, MeasureValued, Normal, Unfold, trace

ESTIMATORS = {"enum": ENUM, "reinforce": REINFORCE, "measure_valued": MeasureValued}
"""How the gradient goes through the presence of an object. Its place and appearance are reparameterised."""

Image = Float[Array, "canvas canvas"]
Images = Float[Array, "batch canvas canvas"]
Patch = Float[Array, "side side"]
Where = Float[Array, "3"]


class MLP(nn.Module):
    """Dense layers with SiLU between them."""

    features: Sequence[int]

    @nn.compact
    def __call__(self, x: Float[Array, " inputs"]) -> Float[Array, " outputs"]:
        for width in self.features[:-1]:
            x = nn.silu(nn.Dense(width)(x))
        return nn.Dense(self.features[-1])(x)


def box(where: Where) -> tuple[Float[Array, ""], Float[Array, "2"]]:
    """The width of a box and its centre, downwards and to the right, in pixels."""
    return SIDE * jnp.exp(0.1 * where[0]), CANVAS / 2 + 5.0 * where[1:]


def place(patch: Patch, where: Where) -> Image:
    """A patch drawn in a box of the canvas: its pixels interpolated at the centre of each of the canvas's."""
    width, centre = box(where)
    in_patch = (_centres(CANVAS)[None] - centre[:, None]) * SIDE / width + SIDE / 2
    rows, columns = _interpolation(in_patch, SIDE)
    return rows @ patch @ columns.T


def glimpse(image: Image, where: Where) -> Patch:
    """The pixels in a box: those of the canvas interpolated at the centre of each of the patch's."""
    width, centre = box(where)
    in_canvas = (_centres(SIDE)[None] - SIDE / 2) * width / SIDE + centre[:, None]
    rows, columns = _interpolation(in_canvas, CANVAS)
    return rows @ image @ columns.T


def _interpolation(at: Float[Array, "2 points"], number: int) -> Float[Array, "2 points pixels"]:
    """Weights of the pixels of a row in the linear interpolation at some points; beyond the row all is 0."""
    return jnp.maximum(0.0, 1.0 - jnp.abs(at[:, :, None] - _centres(number)[None, None]))


def _centres(number: int) -> Float[Array, " pixels"]:
    """The centres of the pixels in a row."""
    return jnp.arange(number, dtype=jnp.float32) + 0.5


class Object(gjflax.GenModule):
    """The density of the place and the appearance of an object; returns what it adds to the image."""

    latents: int
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Image:
        where = trace("where", Normal)(jnp.zeros(3), 1.0)
        what = trace("what", Normal)(jnp.zeros(self.latents), 1.0)
        # Faint in the beginning: a bright patch at a wrong place would teach the guide that there are no objects.
        grey = nn.sigmoid(MLP((*self.hidden, SIDE * SIDE))(what) - 3.0)
        return place(grey.reshape(SIDE, SIDE), where)


class SceneStep(gjflax.GenModule):
    """A step of the scene: perhaps one more object. Its state: whether to go on, and the image so far."""

    object: Object
    prior_logit: float

    @nn.compact
    def __call__(self, time: Int[Array, ""], state: tuple[Bool[Array, ""], Image]) -> tuple[Bool[Array, ""], Image]:
        going, image = state
        present = trace("present", Mask(Bernoulli))(going, self.prior_logit).unmask(0) == 1
        return present, image + trace("object", Mask(self.object))(present).unmask(0.0)


class Scene(gjflax.GenModule):
    """The joint density of objects and an image ``"x"``; returns the expected image."""

    object: Object
    prior_logit: float
    noise: float
    num_steps: int

    @nn.compact
    def __call__(self) -> Image:
        steps = Unfold(SceneStep(self.object, self.prior_logit), max_length=self.num_steps)
        _, images = trace("steps", steps)(self.num_steps, (jnp.asarray(True), jnp.zeros((CANVAS, CANVAS))))
        trace("x", Normal)(images[-1], self.noise)
        return images[-1]


class Look(gjflax.GenModule):
    """The guide of one object: where it is, from the LSTM's output, and what, from the pixels there. Returns both."""

    latents: int
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(
        self, memory: Float[Array, " memory"], image: Image
    ) -> tuple[Float[Array, "3"], Float[Array, " latents"]]:
        where = _normal("where", nn.Dense(2 * 3)(memory))
        pixels = glimpse(image, where).reshape(-1)
        return where, _normal("what", MLP((*self.hidden, 2 * self.latents))(pixels))


def _normal(address: str, outputs: Float[Array, " outputs"]) -> Float[Array, " values"]:
    mean, raw_scale = jnp.split(outputs, 2)
    return trace(address, Normal)(mean, nn.softplus(raw_scale) + 1e-3)


class AttentionStep(gjflax.GenModule):
    """A step of the guide. Its state: whether to go on, the LSTM's, what the last step found, and what is left to see."""

    latents: int
    hidden: tuple[int, ...]
    memory: int
    estimator: str
    erases: bool

    @nn.compact
    def __call__(self, time: Int[Array, ""], state: Any) -> Any:
        going, carry, found, image = state
        features = nn.silu(nn.Dense(2 * self.memory)(image.reshape(-1)))
        carry, output = nn.OptimizedLSTMCell(self.memory)(carry, jnp.concatenate([features, found]))
        output = nn.silu(nn.Dense(2 * self.memory)(output))
        presence = ESTIMATORS[self.estimator](Bernoulli)
        present = trace("present", Mask(presence))(going, nn.Dense(1)(output)[0]).unmask(0) == 1
        where, what = trace("object", Mask(Look(self.latents, self.hidden)))(present, output, image).unmask(0.0)
        if self.erases:
            image = image * (1.0 - jnp.where(present, place(jnp.ones((SIDE, SIDE)), where), 0.0))
        return present, carry, jnp.concatenate([present.astype(jnp.float32)[None], where, what]), image


class Attention(gjflax.GenModule):
    """The guide of the objects in an image; returns how many there are."""

    latents: int
    hidden: tuple[int, ...]
    memory: int
    num_steps: int
    estimator: str
    erases: bool

    @nn.compact
    def __call__(self, image: Image) -> Int[Array, ""]:
        step = AttentionStep(self.latents, self.hidden, self.memory, self.estimator, self.erases)
        carry = jnp.zeros(self.memory), jnp.zeros(self.memory)
        state = jnp.asarray(True), carry, jnp.zeros(1 + 3 + self.latents), image
        present, *_ = trace("steps", Unfold(step, max_length=self.num_steps))(self.num_steps, state)
        return jnp.sum(present)


def create_scene(config: ml_collections.ConfigDict) -> Scene:
    """The model of one image."""
    return Scene(Object(config.latents, tuple(config.hidden)), config.prior_logit, config.noise, config.num_steps)


def create_attention(config: ml_collections.ConfigDict) -> Attention:
    """The guide of one image."""
    hidden = tuple(config.hidden)
    return Attention(config.latents, hidden, config.memory, config.num_steps, config.estimator, config.erases)


def create_objective(config: ml_collections.ConfigDict) -> gjflax.ELBO:
    """Minus the evidence lower bound of a batch of images.

    With several samples of the guide, each is the baseline of the others' score functions.
    """
    scenes = Map(create_scene(config), repeats=config.batch_size)
    return gjflax.ELBO(scenes, Map(create_attention(config)), num_samples=config.num_samples)


def objective_args(images: Images) -> tuple[gjflax.ChoiceMap, tuple[()], tuple[Images]]:
    """What the objective is called with: the observed choices, and the arguments of the scenes and of the guide."""
    return gjflax.VectorChoiceMap(range(len(images)), {"x": images}), (), (images,)

r"""Model M2 of Kingma, Rezende, Mohamed and Welling: an image has a class and a style.

Of one image x, with class y and style z,

    y ~ Categorical(uniform over 10 classes)
    z ~ Normal(0, 1)                                 in R^latents
    x ~ Binomial(16, sigmoid(MLP(y, z)))             for each of the 8 × 8 pixels

    q(y | x) = Categorical(MLP(x))                   the classifier
    q(z | x, y) = Normal(mean, scale)                with (mean, softplus⁻¹ scale) = MLP(x, y)

An image with a label has the bound

    L(x, y) = E_q(z|x,y)[log p(x, y, z) − log q(z | x, y)],

and one without has the expectation over its classes, which `ENUM` sums,

    U(x) = Σ_y q(y | x) (L(x, y) − log q(y | x)).

Both are parts of one ELBO. `Population` and `PopulationGuide` have a plate for either kind of image, with the same networks
in both. In the plate "labelled" the class is observed, and the guide draws the style alone; in "unlabelled" it draws
both. That bound never shows a label to q(y | x), so the labels' log probability is added, and

    Σ_labelled L(x, y) + Σ_unlabelled U(x) + α N mean_labelled log q(y | x)

is maximised, N being the number of all images: "Semi-supervised learning with deep generative models", NIPS 2014.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Int, Key

import gjflax
from gjflax import ENUM, Binomial, Categorical, Map, Normal, inline, trace

CLASSES = 10

LEVELS = 16
"""The grey levels of scikit-learn's digits are counts: how many of 4 × 4 pixels of the scan are ink."""

SIDE = 8
"""The height and width of an image."""

Image = Int[Array, "height width"]
Images = Int[Array, "batch height width"]
Labels = Int[Array, " batch"]


class MLP(nn.Module):
    """Dense layers with SiLU between them."""

    features: Sequence[int]

    @nn.compact
    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        for width in self.features[:-1]:
            x = nn.silu(nn.Dense(width)(x))
        return nn.Dense(self.features[-1])(x)


class Classifier(nn.Module):
    """The logits of q(y | x). By itself it is the supervised classifier that M2 is compared with."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, images: Int[Array, "... height width"]) -> Float[Array, "... classes"]:
        return MLP((*self.hidden, CLASSES))(_grey(images))


class Digit(gjflax.GenModule):
    """The joint density of the class ``"y"``, the style ``"z"`` and an image ``"x"``; returns its expected grey levels."""

    latents: int
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Float[Array, "height width"]:
        y = trace("y", Categorical)(jnp.zeros(CLASSES))
        z = trace("z", Normal)(jnp.zeros(self.latents), 1.0)
        outputs = MLP((*self.hidden, SIDE * SIDE))(jnp.concatenate([nn.one_hot(y, CLASSES), z]))
        logits = outputs.reshape(SIDE, SIDE)
        trace("x", Binomial)(LEVELS, logits)
        return LEVELS * nn.sigmoid(logits)


class Style(gjflax.GenModule):
    """The guide of an image whose class is known: a density of ``"z"``; returns its mean."""

    latents: int
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, image: Image, y: Int[Array, ""]) -> Float[Array, " latents"]:
        inputs = jnp.concatenate([_grey(image), nn.one_hot(y, CLASSES)])
        mean, raw_scale = jnp.split(MLP((*self.hidden, 2 * self.latents))(inputs), 2)
        trace("z", Normal)(mean, nn.softplus(raw_scale))
        return mean


class ClassAndStyle(gjflax.GenModule):
    """The guide of an image whose class is not known: a density of ``"y"`` and ``"z"``."""

    classifier: Classifier
    style: Style

    def __call__(self, image: Image) -> None:
        y = trace("y", ENUM(Categorical))(self.classifier(image))
        inline(self.style)(image, y)


class Sizes(NamedTuple):
    """How many images there are of a kind, and how many in a batch, which stands for all of them."""

    labelled: int
    unlabelled: int
    labelled_batch: int
    unlabelled_batch: int


class Population(gjflax.GenModule):
    """The joint density of labelled and of unlabelled images."""

    digit: Digit
    sizes: Sizes

    def setup(self) -> None:
        # Both plates have the one module, so they share its parameters.
        self.labelled = Map(self.digit, repeats=self.sizes.labelled_batch, total=self.sizes.labelled)
        self.unlabelled = Map(self.digit, repeats=self.sizes.unlabelled_batch, total=self.sizes.unlabelled)

    def __call__(self) -> None:
        trace("labelled", self.labelled)()
        trace("unlabelled", self.unlabelled)()


class PopulationGuide(gjflax.GenModule):
    """The guide of both: the classes of the labelled images are none of its choices.."""

    classifier: Classifier
    style: Style
    sizes: Sizes

    def setup(self) -> None:
        self.labelled = Map(self.style, total=self.sizes.labelled)
        self.unlabelled = Map(ClassAndStyle(self.classifier, self.style), total=self.sizes.unlabelled)

    def __call__(self, labelled: Images, labels: Labels, unlabelled: Images) -> None:
        trace("labelled", self.labelled)(labelled, labels)
        trace("unlabelled", self.unlabelled)(unlabelled)

    def classify(self, images: Images) -> Float[Array, "batch classes"]:
        """The logits of q(y | x)."""
        return self.classifier(images)


class SemiSupervised(gjflax.ELBO):
    """The loss of M2: minus the bound, and the classifier's cross-entropy on the labels, weighted by α N."""

    label_weight: float = 1.0

    def loss(
        self,
        key: Key[Array, ""],
        observed: gjflax.ChoiceMap,
        model_args: tuple[()],
        guide_args: tuple[Images, Labels, Images],
    ) -> Float[Array, ""]:
        """The loss of a batch, in nats of the whole population."""
        labelled, labels, _ = guide_args
        number = self.guide.sizes.labelled + self.guide.sizes.unlabelled
        classification = number * self.label_weight * cross_entropy(self.guide.classify(labelled), labels)
        return super().loss(key, observed, model_args, guide_args) + classification


class Supervised(nn.Module):
    """The loss of the classifier alone."""

    classifier: Classifier

    def __call__(self, images: Images, labels: Labels) -> Float[Array, ""]:
        return cross_entropy(self.classifier(images), labels)


def cross_entropy(logits: Float[Array, "batch classes"], labels: Labels) -> Float[Array, ""]:
    """Minus the mean log probability of the labels."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def create_objective(config: ml_collections.ConfigDict, sizes: Sizes) -> SemiSupervised:
    """The loss of M2 for as many images."""
    hidden = tuple(config.hidden)
    return SemiSupervised(
        model=Population(Digit(config.latents, hidden), sizes),
        guide=PopulationGuide(Classifier(hidden), Style(config.latents, hidden), sizes),
        label_weight=config.label_weight,
    )


def objective_args(batch: tuple[Images, Labels, Images]) -> tuple[dict, tuple[()], tuple[Images, Labels, Images]]:
    """What the objective is called with for labelled images, their labels, and unlabelled images."""
    labelled, labels, unlabelled = batch
    observed = {"labelled": {"x": labelled, "y": labels}, "unlabelled": {"x": unlabelled}}
    return observed, (), (labelled, labels, unlabelled)


def _grey(images: Int[Array, "... height width"]) -> Float[Array, "... pixels"]:
    return images.reshape(*images.shape[:-2], SIDE * SIDE).astype(jnp.float32) / LEVELS

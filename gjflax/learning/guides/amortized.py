r"""`AmortizedNormal`: normal distributions whose parameters a network reads off the data.

    q(u | y) = Π_a Normal(u_a; loc_a(h), exp(log_scale_a(h))²),   h = encoder(y),   z = b(u),

with a linear map from the features h to the parameters of each choice (Kingma and Welling, "Auto-encoding variational Bayes",
ICLR 2014). Choices in a `Map` have one row of features for each element; so the guide serves batches of any size, and data that
it was not trained on.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gjflax.core.context import current_address
from gjflax.core.errors import ArgumentError, show_address
from gjflax.core.keys import KeySource, typed_key
from gjflax.core.typing import Arguments, PRNGKey
from gjflax.learning.guides.base import AutoGuide, Rows
from gjflax.learning.guides.latents import Address, Latent, Points
from gjflax.learning.guides.normal import normal_log_density


@dataclasses.dataclass(frozen=True)
class _Inputs(Rows):
    """What the encoder is given, with as many rows as elements, and what it made of it, once it ran."""

    inputs: Any = None
    read: list[dict[Address, tuple[Any, Any]]] = dataclasses.field(default_factory=list)

    def shape(self, latent: Latent, event: tuple[int, ...]) -> tuple[int, ...]:
        return (*(len(self.indices) for _ in latent.plates), *event)


class AmortizedNormal(AutoGuide):
    """Independent normal distributions on R^n, whose parameters an encoder gives; see `AutoGuide`.

    Called with ``(inputs, *model_args)``; the model's arguments may be left out where no support depends on them. All
    choices stand in the same `Map`, of which the inputs have the leading axis, or in none.

    Attributes:
      encoder: any Flax module, called with the inputs. It returns features, of shape ``[elements, features]`` or ``[features]``.
        Its parameters are ``encoder``; those of the linear maps ``loc_<address>`` and ``log_scale_<address>``.
      initial_scale: the scale that training starts from, in R^n.

    >>> import flax.linen as nn, gjflax, jax
    >>> @gjflax.gen
    ... def point(x):
    ...     z = gjflax.trace("z", gjflax.Normal)(jnp.zeros(2), 1.0)
    ...     return gjflax.trace("y", gjflax.Normal)(z.sum() * x, 0.1)
    >>> model = gjflax.Map(point)
    >>> x, y = jnp.ones(5), jnp.arange(5.0)
    >>> guide = AmortizedNormal(model, {"y": y}, (x,), encoder=nn.Sequential([nn.Dense(8), nn.tanh]))
    >>> variables = guide.init(jax.random.key(0), y[:, None])
    >>> key, tr = guide.bind(variables).simulate(jax.random.key(1), (y[:3, None],))
    >>> tr["z"].shape
    (3, 2)
    """

    encoder: Any = None
    initial_scale: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.encoder, nn.Module):
            raise ArgumentError(f"`encoder` of an AmortizedNormal is a Flax module; got {self.encoder!r:.80}.")
        super().__post_init__()

    def setup(self) -> None:
        plates = {tuple(plate.address for plate in latent.plates) for latent in self.latents.each}
        if len(plates) > 1 or any(len(one) > 1 for one in plates):
            raise ArgumentError(
                f"The choices of the AmortizedNormal at {show_address(current_address())} do not stand in one and the same "
                "`Map`: select those that do, and combine several guides by `AutoGuides`."
            )
        heads, spread = {}, nn.initializers.normal(0.01)
        for latent in self.latents.each:
            name, width = "_".join(latent.address), math.prod(latent.point)
            start = nn.initializers.constant(math.log(self.initial_scale))
            heads[latent.address] = (
                nn.Dense(width, kernel_init=spread, name=f"loc_{name}"),
                nn.Dense(width, kernel_init=spread, bias_init=start, name=f"log_scale_{name}"),
            )
        self.heads = tuple(heads.items())

    @nn.nowrap
    def draw_scored(self, key: PRNGKey, rows: Rows) -> tuple[Points, dict[Address, Any]]:
        normals, keys, points = self._normals(rows), KeySource(typed_key(key)), {}
        for address, (loc, log_scale) in normals.items():
            points[address] = loc + jnp.exp(log_scale) * jax.random.normal(keys.at(address), loc.shape, loc.dtype)
        return points, self._scores(points, normals)

    @nn.nowrap
    def normals(self, rows: Rows) -> dict[Address, tuple[Any, Any]]:
        return {address: (loc, jnp.exp(log_scale)) for address, (loc, log_scale) in self._normals(rows).items()}

    @nn.nowrap
    def location(self, rows: Rows) -> Points:
        return {address: loc for address, (loc, _) in self._normals(rows).items()}

    @nn.nowrap
    def draw(self, key: PRNGKey, rows: Rows) -> Points:
        return self.draw_scored(key, rows)[0]

    @nn.nowrap
    def log_density(self, points: Points, rows: Rows) -> dict[Address, Any]:
        return self._scores(points, self._normals(rows))

    @nn.nowrap
    def arguments_of_model(self, args: Arguments) -> Any | None:
        return args[1:] or None

    @nn.nowrap
    def _rows(self, args: Arguments) -> Rows:
        if not args:
            raise ArgumentError(
                f"The AmortizedNormal at {show_address(current_address())} was called without the inputs of its encoder: "
                "`guide_args=(inputs, *model_args)`."
            )
        count = jax.tree.leaves(args[0])[0].shape[0] if any(latent.plates for latent in self.latents.each) else 0
        return _Inputs(jnp.arange(count), args[0])

    @nn.nowrap
    def _normals(self, rows: Any) -> dict[Address, tuple[Any, Any]]:
        """Location and log scale of every choice. The encoder runs once: it may write statistics, and draw dropout."""
        if rows.read:
            return rows.read[0]
        features, normals = self.encoder(rows.inputs), {}
        rows.read.append(normals)
        heads = dict(self.heads)
        for latent in self.latents.each:
            lengths = features.shape[: len(latent.plates)]
            if features.ndim != len(latent.plates) + 1:
                raise ArgumentError(
                    f"The encoder of the AmortizedNormal at {show_address(current_address())} returned features of shape "
                    f"{features.shape}; expected {'[elements, features]' if latent.plates else '[features]'}."
                )
            loc, log_scale = (head(features).reshape(*lengths, *latent.point) for head in heads[latent.address])
            normals[latent.address] = loc, log_scale
        return normals

    @nn.nowrap
    def _scores(self, points: Points, normals: dict[Address, tuple[Any, Any]]) -> dict[Address, Any]:
        scores = {}
        for latent in self.latents.each:
            loc, log_scale = normals[latent.address]
            scores[latent.address] = normal_log_density(points[latent.address], loc, log_scale, len(latent.plates))
        return scores

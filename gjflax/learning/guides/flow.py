r"""`AutoFlow`: a normalising flow, mapped to the supports of the model's choices.

With standard normal noise ε ∈ R^D and layers f_1, …, f_K of invertible maps,

    u = f_K ∘ … ∘ f_1(ε),   log q(u) = log Normal(ε; 0, I) − Σ_k log |det f_k'|,   z = b(u).

``kind="iaf"``: each layer is an inverse autoregressive flow, u_i = ε_i s_i(ε_{<i}) + m_i(ε_{<i}): one pass to draw, D passes
to score a value that it did not draw (Kingma et al., "Improved variational inference with inverse autoregressive flow",
NeurIPS 2016). ``kind="real_nvp"``: half of the coordinates are shifted and scaled by functions of the other half: one pass
for both (Dinh, Sohl-Dickstein, Bengio, "Density estimation using real NVP", ICLR 2017). Between layers the coordinates are
reversed. The bijectors are those of TFP; the networks that condition them are Flax modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gjflax.core.errors import ArgumentError
from gjflax.core.typing import FloatArray, PRNGKey
from gjflax.distributions.arguments import free_promotion
from gjflax.learning.guides.base import Rows
from gjflax.learning.guides.joint import JointGuide
from gjflax.learning.guides.latents import Address, Points


class MaskedDense(nn.Module):
    """A dense layer some of whose weights are held at zero.

    Attributes:
      mask: which weights there are, rows of inputs by columns of outputs, a tuple of tuples.
      scale: the standard deviation of the initial weights, times the square root of the number of inputs.
    """

    mask: tuple[tuple[bool, ...], ...]
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: FloatArray) -> FloatArray:
        mask = jnp.asarray(self.mask, x.dtype)
        initial = nn.initializers.variance_scaling(self.scale**2, "fan_in", "normal")
        kernel = self.param("kernel", initial, mask.shape)
        bias = self.param("bias", nn.initializers.zeros, mask.shape[-1:])
        return x @ (kernel * mask).astype(x.dtype) + bias.astype(x.dtype)


class AutoregressiveNetwork(nn.Module):
    """Shift and log scale of every coordinate, from the coordinates before it (MADE; Germain et al., ICML 2015).

    Attributes:
      size: the number D of coordinates.
      hidden: the widths of the hidden layers.
    """

    size: int
    hidden: Sequence[int]

    @nn.compact
    def __call__(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        degrees = np.arange(1, self.size + 1)
        for number, width in enumerate(self.hidden):
            below = np.arange(width) % max(1, self.size - 1) + 1
            x = nn.tanh(MaskedDense(_mask(degrees[:, None] <= below), name=f"hidden_{number}")(x))
            degrees = below
        outputs = np.tile(np.arange(1, self.size + 1), 2)
        # Nearly the identity at first.
        shift, raw = jnp.split(MaskedDense(_mask(degrees[:, None] < outputs), 0.01, name="output")(x), 2, axis=-1)
        return shift, _bounded(raw)


class CouplingNetwork(nn.Module):
    """Shift and log scale of some coordinates, from the others.

    Attributes:
      size: how many are shifted and scaled.
      hidden: the widths of the hidden layers.
    """

    size: int
    hidden: Sequence[int]

    @nn.compact
    def __call__(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        for number, width in enumerate(self.hidden):
            x = nn.tanh(nn.Dense(width, name=f"hidden_{number}")(x))
        initial = nn.initializers.variance_scaling(1e-4, "fan_in", "normal")
        shift, raw = jnp.split(nn.Dense(2 * self.size, kernel_init=initial, name="output")(x), 2, axis=-1)
        return shift, _bounded(raw)


def _mask(mask: Any) -> tuple[tuple[bool, ...], ...]:
    return tuple(tuple(map(bool, row)) for row in mask)


def _bounded(raw: FloatArray) -> FloatArray:
    """A log scale that training cannot blow up at once."""
    return 3.0 * jnp.tanh(raw / 3.0)


class AutoFlow(JointGuide):
    """A normalising flow on R^D, of all choices together; see `AutoGuide`.

    Its parameters are those of the layers' networks, ``layers_0``, ``layers_1``, ..., and ``loc`` and ``log_scale`` of shape
    ``[D]``, of an affine map at the end.

    Attributes:
      kind: ``"iaf"`` or ``"real_nvp"``. Real NVP needs two coordinates at least.
      num_layers: how many layers.
      hidden: the widths of the networks' hidden layers; by default two of 8 + 2 D.
      initial_scale: the scale that training starts from, in R^n.

    >>> import gjflax, jax
    >>> @gjflax.gen
    ... def model():
    ...     x = gjflax.trace("x", gjflax.Normal)(0.0, 1.0)
    ...     z = gjflax.trace("z", gjflax.Normal)(x**2, 0.3)
    ...     return gjflax.trace("y", gjflax.Normal)(x + z, 0.1)
    >>> guide = AutoFlow(model, observed={"y": 0.5}, kind="real_nvp")
    >>> variables = guide.init(jax.random.key(0))
    >>> key, tr = guide.bind(variables).simulate(jax.random.key(1), ())
    >>> key, (_, score) = guide.bind(variables).assess(key, tr.strip(), ())
    >>> bool(abs(score - tr.get_score()) < 1e-4)
    True
    """

    kind: str = "iaf"
    num_layers: int = 2
    hidden: tuple[int, ...] | None = None
    initial_scale: float = 0.3

    def __post_init__(self) -> None:
        if self.kind not in ("iaf", "real_nvp"):
            raise ArgumentError(f'`kind` of an AutoFlow is "iaf" or "real_nvp"; got {self.kind!r}.')
        if not isinstance(self.num_layers, int) or self.num_layers < 1:
            raise ArgumentError(f"`num_layers` is a positive integer; got {self.num_layers!r}.")
        if self.hidden is not None:
            object.__setattr__(self, "hidden", tuple(self.hidden))
        super().__post_init__()

    def setup(self) -> None:
        size = self.size
        if self.kind == "real_nvp" and size == 1:
            raise ArgumentError('An AutoFlow of kind "real_nvp" needs two coordinates at least: use "iaf".')
        hidden = (8 + 2 * size,) * 2 if self.hidden is None else self.hidden
        layers = range(self.num_layers if size else 0)
        if self.kind == "iaf":
            self.layers = [AutoregressiveNetwork(size, hidden) for _ in layers]
        else:
            self.layers = [CouplingNetwork(size - size // 2, hidden) for _ in layers]
        self.loc = self.param("loc", nn.initializers.zeros, (size,))
        self.log_scale = self.param("log_scale", nn.initializers.constant(math.log(self.initial_scale)), (size,))
        if self.is_initializing():
            width = size if self.kind == "iaf" else size // 2
            for layer in self.layers:
                layer(jnp.zeros((width,)))

    @nn.nowrap
    def location_flat(self) -> FloatArray:
        with free_promotion():
            return self._bijector().forward(jnp.zeros_like(self.loc))

    @nn.nowrap
    def draw_scored(self, key: PRNGKey, rows: Rows) -> tuple[Points, dict[Address, Any]]:
        noise = jax.random.normal(key, self.loc.shape, self.loc.dtype)
        bijector = self._bijector()
        with free_promotion():
            point, log_det = bijector.forward(noise), bijector.forward_log_det_jacobian(noise, event_ndims=1)
        return self.split(point), {(): _standard_normal(noise) - log_det}

    @nn.nowrap
    def draw(self, key: PRNGKey, rows: Rows) -> Points:
        return self.draw_scored(key, rows)[0]

    @nn.nowrap
    def log_density_flat(self, point: FloatArray) -> FloatArray:
        bijector = self._bijector()
        with free_promotion():
            noise, log_det = bijector.inverse(point), bijector.inverse_log_det_jacobian(point, event_ndims=1)
        return _standard_normal(noise) + log_det

    @nn.nowrap
    def _bijector(self) -> Any:
        """The map from the noise to the point."""
        from tensorflow_probability.substrates import jax as tfp

        tfb, size = tfp.bijectors, self.loc.size
        reverse = tfb.Permute(np.arange(size, dtype=np.int32)[::-1])
        steps: list[Any] = []
        for number, layer in enumerate(self.layers):
            network, variables = layer.unbind()
            # Loops of TFP run it, so it is a pure function here.
            conditioner = _pure(network, variables)
            if self.kind == "iaf":
                steps.append(tfb.Invert(tfb.MaskedAutoregressiveFlow(shift_and_log_scale_fn=conditioner)))
            else:
                steps.append(tfb.RealNVP(size // 2, shift_and_log_scale_fn=_coupled(conditioner)))
            if number + 1 < len(self.layers) and size > 1:
                steps.append(reverse)
        steps.append(tfb.Shift(self.loc)(tfb.Scale(log_scale=self.log_scale)))
        return tfb.Chain(steps[::-1])


def _standard_normal(noise: FloatArray) -> FloatArray:
    return jnp.sum(-0.5 * noise**2 - 0.5 * math.log(2 * math.pi))


def _pure(network: nn.Module, variables: Mapping[str, Any]) -> Any:
    def conditioner(x: FloatArray, **_: Any) -> Any:
        return network.apply(variables, x)

    return conditioner


def _coupled(conditioner: Any) -> Any:
    return lambda x, output_units, **_: conditioner(x)

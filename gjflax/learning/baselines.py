r"""Baselines: what is subtracted from the signal of a score-function site, so that its gradient varies less.

The gradient (f − b) ∇ log q(z) has the same expectation for every b that does not depend on z, for E[∇ log q(z)] = 0.
A baseline is a module: it is called with the signals of all sites and gives a baseline for each. It never changes an
objective's value.

==============  ================================================================================
`LeaveOneOut`   the mean of the other samples' signals at the same site and element
`MovingAverage` a mean over earlier steps, in the collection "baselines"
`Predicted`     what a network of the user's predicts, trained by the squared error
==============  ================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from gjflax.core.errors import ArgumentError

Signals = Mapping[str, Any]
"""Signals by the name of their site, its address joined by "/": arrays with a first axis of samples, then axes of
enumerated values, then one for each plate; an axis of length 1 where all see the same."""


class Baseline(nn.Module):
    """Base class. A baseline of a site may depend on its signals in other samples, and on what was drawn before it."""

    def __call__(self, signals: Signals, observed: Any, model_args: Any, guide_args: Any) -> tuple[Signals, Any]:
        """Baselines that broadcast against the signals, and a loss that trains them (0 where there is none).

        Args:
          signals: of each site; see `Signals`. No gradient flows from them.
          observed: the observed choices, a choice map.
          model_args: the arguments of the model.
          guide_args: the arguments of the guide.
        """
        raise NotImplementedError


class LeaveOneOut(Baseline):
    """The mean of the other samples' signals; 0 where there is one sample only.

    After W. Kool, H. van Hoof and M. Welling, "Buy 4 REINFORCE samples, get a baseline for free!", 2019.

    >>> import jax.numpy as jnp
    >>> signals = {"z": jnp.array([1.0, 2.0, 6.0])}
    >>> LeaveOneOut().apply({}, signals, None, (), ())[0]["z"].tolist()
    [4.0, 3.5, 1.5]
    """

    def __call__(self, signals: Signals, observed: Any, model_args: Any, guide_args: Any) -> tuple[Signals, Any]:
        return {name: _mean_of_others(signal) for name, signal in signals.items()}, jnp.zeros(())


def _mean_of_others(signal: Any) -> Any:
    count = signal.shape[0]
    if count == 1:
        return jnp.zeros_like(signal)
    return (jnp.sum(signal, axis=0, keepdims=True) - signal) / (count - 1)


class MovingAverage(Baseline):
    """An exponential moving average of each site's signals over the steps before this one.

    It stands in the collection "baselines": pass that with the parameters, and name it in ``mutable`` for it to move.

    Attributes:
      decay: how much of the average stays in a step.

    >>> import jax, jax.numpy as jnp
    >>> average, signals = MovingAverage(decay=0.5), {"z": jnp.array([1.0, 3.0])}
    >>> variables = average.init(jax.random.key(0), signals, None, (), ())
    >>> (first, _), variables = average.apply(variables, signals, None, (), (), mutable="baselines")
    >>> second, _ = average.apply(variables, signals, None, (), ())
    >>> float(first["z"][0]), float(second["z"][0])
    (0.0, 2.0)
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not isinstance(self.decay, float) or not 0 <= self.decay < 1:
            raise ArgumentError(f"`decay` of a MovingAverage is a number in [0, 1); got {self.decay!r:.80}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, signals: Signals, observed: Any, model_args: Any, guide_args: Any) -> tuple[Signals, Any]:
        return {name: self._of_site(name, signal) for name, signal in signals.items()}, jnp.zeros(())

    def _of_site(self, name: str, signal: Any) -> Any:
        # The sum of the weighted signals and that of the weights: so the first steps are not drawn towards 0.
        state = self.variable("baselines", name, lambda: {"total": jnp.zeros(()), "weight": jnp.zeros(())})
        total, weight = state.value["total"], state.value["weight"]
        baseline = total / jnp.maximum(weight, jnp.finfo(weight.dtype).tiny)
        if self.is_mutable_collection("baselines") and not self.is_initializing():
            mean = jnp.asarray(jnp.mean(signal), total.dtype)
            state.value = {
                "total": self.decay * total + (1 - self.decay) * mean,
                "weight": self.decay * weight + (1 - self.decay),
            }
        return jnp.asarray(baseline, signal.dtype).reshape((1,) * signal.ndim)


class Predicted(Baseline):
    """What a network predicts of the signals, trained by the squared error along with everything else.

    Attributes:
      network: a Flax module. Its output is one prediction for all sites, or a dict of predictions by the name of a site:
        scalars, or arrays with the axes of the site's plates.
      inputs: ``inputs(observed, model_args, guide_args)`` gives the network's input. By default the guide's arguments,
        one after the other.
      weight: what the squared error is multiplied with.

    After A. Mnih and K. Gregor, "Neural variational inference and learning in belief networks", ICML 2014.

    >>> import jax, jax.numpy as jnp, flax.linen as nn
    >>> class Scalar(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.Dense(1)(x)[0]
    >>> baseline, signals = Predicted(Scalar()), {"z": jnp.array([1.0, 3.0])}
    >>> variables = baseline.init(jax.random.key(0), signals, None, (), (jnp.ones(2),))
    >>> sorted(variables["params"]["network"])
    ['Dense_0']
    """

    network: nn.Module
    inputs: Callable[[Any, Any, Any], Any] | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.network, nn.Module):
            raise ArgumentError(f"`network` of a Predicted baseline is a Flax module; got {self.network!r:.80}.")
        super().__post_init__()

    def __call__(self, signals: Signals, observed: Any, model_args: Any, guide_args: Any) -> tuple[Signals, Any]:
        # The squared error trains the network alone.
        observed, model_args, guide_args = lax.stop_gradient((observed, model_args, guide_args))
        inputs = guide_args if self.inputs is None else (self.inputs(observed, model_args, guide_args),)
        output: Any = self.network(*inputs)
        predictions, loss = {}, jnp.zeros(())
        for name, signal in signals.items():
            prediction = output[name] if isinstance(output, Mapping) else output
            predictions[name] = _beside(name, jnp.asarray(prediction, signal.dtype), signal)
            errors = (predictions[name] - lax.stop_gradient(signal)) ** 2
            loss = loss + self.weight * jnp.sum(errors) / signal.shape[0]
        return predictions, loss


def _beside(name: str, prediction: Any, signal: Any) -> Any:
    """A prediction with the axes of a site's plates, or of none, with all axes of the signal."""
    if prediction.ndim >= signal.ndim:
        raise ArgumentError(
            f"The baseline's network gave an array of shape {prediction.shape} for the site {name}, whose signals have shape "
            f"{signal.shape} with the samples first: give a scalar, or an array with the axes of the site's plates."
        )
    shape = (1,) * (signal.ndim - prediction.ndim) + prediction.shape
    prediction = prediction.reshape(shape)
    if any(a not in (1, b) and b != 1 for a, b in zip(prediction.shape, signal.shape, strict=True)):
        raise ArgumentError(
            f"The baseline's network gave an array of shape {prediction.shape} for the site {name}, which does not broadcast "
            f"against its signals, of shape {signal.shape}."
        )
    return prediction

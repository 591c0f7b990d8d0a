r"""A deep Markov model and its guide, as `Unfold`s of kernels with Flax modules in them.

    z_t ~ Normal(gated transition of z_{t−1})          in R^latents
    x_t ~ Normal(emitter of z_t)                       in R

    q(z_t | z_{t−1}, x) = Normal(combiner of z_{t−1} and h_t)

where h_t is the state of a GRU. One that reads x backwards knows x_t, …, x_T, as the posterior p(z_t | z_{t−1}, x) does; one that
reads it forwards knows x_1, …, x_t, as a filter does, which may run while the sequence does. The parts are those of Krishnan,
Shalit and Sontag, "Structured inference networks for nonlinear state space models", AAAI 2017: the transition goes between a
linear one and that of a network, by a gate; the combiner averages what z_{t−1} and h_t say.

Both sides describe one sequence; a batch is a `Map` of them.
"""

import flax.linen as nn
import input_pipeline
import ml_collections
from jaxtyping import Array, Float, Int

import gjflax
from gjflax import Map, Normal, Unfold, trace

State = Float[Array, " latents"]


class GatedTransition(nn.Module):
    """The mean and the scale of z_t given z_{t−1}: gate ⊙ network + (1 − gate) ⊙ linear."""

    hidden: int

    @nn.compact
    def __call__(self, z: State) -> tuple[State, State]:
        latents = z.shape[-1]
        gate = nn.sigmoid(nn.Dense(latents)(nn.relu(nn.Dense(self.hidden)(z))))
        proposed = nn.Dense(latents)(nn.relu(nn.Dense(self.hidden)(z)))
        mean = gate * proposed + (1 - gate) * nn.Dense(latents)(z)
        return mean, nn.softplus(nn.Dense(latents)(nn.relu(proposed)))


class Emitter(nn.Module):
    """The mean and the scale of x_t given z_t."""

    hidden: int

    @nn.compact
    def __call__(self, z: State) -> tuple[Float[Array, " 1"], Float[Array, " 1"]]:
        mean = nn.Dense(1)(nn.relu(nn.Dense(self.hidden)(z))) + nn.Dense(1, use_bias=False)(z)
        return mean, nn.softplus(self.param("raw_scale", nn.initializers.zeros, (1,)))


class Step(gjflax.GenModule):
    """One step of the model: the choices ``"z"`` and ``"x"``; returns z_t."""

    hidden: int

    @nn.compact
    def __call__(self, time: Int[Array, ""], z: State) -> State:
        z = trace("z", Normal)(*GatedTransition(self.hidden)(z))
        trace("x", Normal)(*Emitter(self.hidden)(z))
        return z


class GuideStep(gjflax.GenModule):
    """One step of the guide: the choice ``"z"``, from the state before it and the GRU's; returns z_t."""

    @nn.compact
    def __call__(self, time: Int[Array, ""], z: State, read: Float[Array, "steps hidden"]) -> State:
        combined = (nn.tanh(nn.Dense(read.shape[-1])(z)) + read[time]) / 2
        mean, raw_scale = nn.Dense(z.shape[-1])(combined), nn.Dense(z.shape[-1])(combined)
        return trace("z", Normal)(mean, nn.softplus(raw_scale))


class DeepMarkovModel(gjflax.GenModule):
    """The joint density of the states and observations of a sequence; returns the states."""

    latents: int
    hidden: int

    def setup(self) -> None:
        self.start = self.param("start", nn.initializers.zeros, (self.latents,))
        self.step = Step(self.hidden)
        self.steps = Unfold(self.step, max_length=input_pipeline.STEPS)

    def __call__(self) -> Float[Array, "steps latents"]:
        return trace("steps", self.steps)(input_pipeline.STEPS, self.start)


class Guide(gjflax.GenModule):
    """The density of the states given the observations of a sequence, of any length up to `STEPS`; returns the states."""

    latents: int
    hidden: int
    direction: str

    @nn.compact
    def __call__(self, xs: input_pipeline.Sequence) -> Float[Array, "steps latents"]:
        read = nn.RNN(nn.GRUCell(self.hidden), reverse=self.direction == "backward", keep_order=True)(xs)
        start = self.param("start", nn.initializers.zeros, (self.latents,))
        return trace("steps", Unfold(GuideStep(), max_length=len(xs)))(len(xs), start, read)


def create_objective(config: ml_collections.ConfigDict, name: str, direction: str, batch_size: int) -> gjflax.Objective:
    """The loss of a batch of sequences, by the name of its objective and the direction in which the guide reads."""
    pair = {
        "model": Map(DeepMarkovModel(config.latents, config.hidden), repeats=batch_size),
        "guide": Map(Guide(config.latents, config.hidden, direction)),
    }
    if name == "ELBO":
        return gjflax.ELBO(**pair)
    # Without the score function of the ancestors its gradient is biased, and varies much less: as in the papers.
    settings = {"resample": 0.5, "scheme": "systematic", "ancestor_gradient": False}
    return gjflax.SMCObjective(**pair, num_samples=config.num_particles, **settings)


def evidence_objective(config: ml_collections.ConfigDict, direction: str, batch_size: int) -> gjflax.Objective:
    """Minus log p of a batch of sequences, by a particle filter with many particles."""
    with config.unlocked():
        many = config.copy_and_resolve_references()
    many.num_particles = config.evidence_particles
    return create_objective(many, "SMCObjective", direction, batch_size)


def objective_args(xs: input_pipeline.Sequences) -> tuple[dict, tuple[()], tuple[input_pipeline.Sequences]]:
    """What an objective is called with for a batch of sequences."""
    return {"steps": {"x": xs}}, (), (xs,)

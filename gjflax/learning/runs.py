r"""Runs of a guide and a model in an objective: the guide draws z ~ q, the model weighs (z, x).

The model runs in one of two ways. `assess` gives its score alone, and is what reparameterised guides need. `weigh` gives a
trace, whose parts are the costs that score functions, enumeration and the rest are made of; it holds the model to the same
contract: every choice is given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gjflax.core.choice_map import ChoiceMap
from gjflax.core.errors import (
    ChoiceMapError,
    DiscreteGradientError,
    MissingChoiceError,
    UnvisitedConstraintError,
    nearest,
    show_address,
)
from gjflax.core.masked import Masked
from gjflax.core.trace import Trace
from gjflax.core.typing import Arguments, PRNGKey, Score
from gjflax.learning.estimators.relaxed import RELAXED
from gjflax.learning.sites import Site, sites_of


@contextlib.contextmanager
def choices_of_both() -> Iterator[None]:
    """Where the model's choices are not those that it is given, say whose they should be."""
    try:
        yield
    except (MissingChoiceError, UnvisitedConstraintError, ChoiceMapError) as error:
        error.add_note(
            "In an objective the choices of the guide and the observed ones are together those of the model."
        )
        raise


def merged(choices: ChoiceMap, observed: ChoiceMap) -> ChoiceMap:
    """The choices of the guide and the observed ones."""
    with choices_of_both():
        return choices.merge(observed)


def assess(model: Any, key: PRNGKey, choices: ChoiceMap, args: Arguments) -> Score:
    """log p of the guide's and the observed choices."""
    with choices_of_both():
        return model.assess(key, choices, args)[1][1]


def density(
    model: Any, key: PRNGKey, choices: ChoiceMap, args: Arguments, sites: tuple[Site, ...], kinds: tuple[str, ...]
) -> tuple[Any, Score]:
    """The return value, and log p of the guide's and the observed choices; sites and kinds are those of the guide."""
    if RELAXED not in kinds:
        with choices_of_both():
            return model.assess(key, choices, args)[1]
    trace, correction = weigh(model, key, choices, args)
    require_floats(sites, kinds, sites_of(trace))
    return trace.get_retval(), trace.get_score() + correction


def weigh(model: Any, key: PRNGKey, choices: ChoiceMap, args: Arguments) -> tuple[Trace, Any]:
    """The model's trace at the guide's and the observed choices, and a correction of its score.

    The correction is 0, and NaN where a choice is needed that was not there, which only running can tell: a branch that
    the guide did not take.
    """
    with choices_of_both():
        _, (_, trace) = model.importance(key, choices, args)
        return trace, _missing(trace, choices, trace.get_score().dtype)


def _missing(trace: Trace, given: ChoiceMap, dtype: Any) -> Any:
    correction = jnp.zeros((), dtype)
    needed = trace.strip()
    for address in needed.addresses():
        if not given.has_subtree(address):
            raise MissingChoiceError(
                f"The model's choice at {show_address(address)} is neither observed nor drawn by the guide. "
                f"{nearest(address, given.addresses())}"
            )
        value, have = needed[address], given[address]
        shape = jnp.shape(value.value if isinstance(value, Masked) else value)
        if jnp.shape(have.value if isinstance(have, Masked) else have) != shape:
            raise MissingChoiceError(
                f"The model's choice at {show_address(address)} has shape {shape}, and only a part of it was observed or drawn "
                "by the guide."
            )
        if isinstance(have, Masked):
            flag = jnp.asarray(value.flag) if isinstance(value, Masked) else jnp.ones((), bool)
            have_flag = jnp.asarray(have.flag)
            axes = max(flag.ndim, have_flag.ndim)
            flag, have_flag = (f.reshape(f.shape + (1,) * (axes - f.ndim)) for f in (flag, have_flag))
            correction = jnp.where(jnp.all(have_flag | ~flag), correction, jnp.nan)
    return correction


def require_floats(guide_sites: tuple[Site, ...], kinds: tuple[str, ...], model_sites: tuple[Site, ...]) -> None:
    """Refuse a relaxed choice that the model takes as an integer: its gradient would vanish."""
    relaxed = {site.address for site, kind in zip(guide_sites, kinds, strict=True) if kind == RELAXED}
    for site in model_sites:
        if site.address in relaxed and not jnp.issubdtype(site.leaf.get_retval().dtype, jnp.floating):
            name = site.distribution.label
            raise DiscreteGradientError(
                f"The guide's choice at {show_address(site.address)} is relaxed, a float to differentiate, and the model's "
                f"{name} there takes integers, so no gradient would come back. Relax it too: "
                f"trace({show_address(site.address[-1:])}, StraightThrough({name})), or GumbelSoftmax."
            )


def score_of_stopped(guide: Any, key: PRNGKey, choices: ChoiceMap, args: Arguments) -> Score:
    """log q of choices, differentiable in them and not in the guide's variables.

    Raises:
      UntracedRandomnessError: if the guide draws randomness that is no choice, which would be drawn anew.
    """
    stopped = lax.stop_gradient(dict(guide.variables)) if guide.scope is not None else {}
    evaluate = guide._evaluator(None, "refuse", stopped)
    return evaluate(None, key, choices, lax.stop_gradient(args))[1]


def split(key: PRNGKey) -> tuple[PRNGKey, PRNGKey]:
    """The keys of the model and of the guide in one sample."""
    model_key, guide_key = jax.random.split(key)
    return model_key, guide_key

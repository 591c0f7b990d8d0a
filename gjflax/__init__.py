"""gjflax: generative functions as Flax linen modules."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gjflax.combinators.map import Map as Map
from gjflax.combinators.map import MapTrace as MapTrace
from gjflax.combinators.train import TrainCombinator as TrainCombinator
from gjflax.combinators.train import TrainTrace as TrainTrace
from gjflax.core.choice_map import BuiltinChoiceMap as BuiltinChoiceMap
from gjflax.core.choice_map import ChoiceMap as ChoiceMap
from gjflax.core.choice_map import EmptyChoiceMap as EmptyChoiceMap
from gjflax.core.choice_map import ValueChoiceMap as ValueChoiceMap
from gjflax.core.choice_map import VectorChoiceMap as VectorChoiceMap
from gjflax.core.choice_map import choice_map as choice_map
from gjflax.core.diff import Diff as Diff
from gjflax.core.errors import *  # noqa: F403
from gjflax.core.generative_function import GenerativeFunction as GenerativeFunction
from gjflax.core.keys import slash as slash
from gjflax.core.masked import Masked as Masked
from gjflax.core.printing import pretty as pretty
from gjflax.core.pytree import Pytree as Pytree
from gjflax.core.pytree import static_field as static_field
from gjflax.core.selection import AllSelection as AllSelection
from gjflax.core.selection import BuiltinSelection as BuiltinSelection
from gjflax.core.selection import NoneSelection as NoneSelection
from gjflax.core.selection import Selection as Selection
from gjflax.core.selection import select as select
from gjflax.core.trace import Trace as Trace
from gjflax.core.trace import choose as choose
from gjflax.core.typing import FloatArray as FloatArray
from gjflax.distributions.distribution import Distribution as Distribution
from gjflax.distributions.distribution_trace import DistributionTrace as DistributionTrace
from gjflax.distributions.families import *  # noqa: F403
from gjflax.distributions.of_functions import distribution as distribution
from gjflax.distributions.tfp import TFPDistribution as TFPDistribution
from gjflax.language.gen import BuiltinGenerativeFunction as BuiltinGenerativeFunction
from gjflax.language.gen import BuiltinTrace as BuiltinTrace
from gjflax.language.gen import GenModule as GenModule
from gjflax.language.gen import gen as gen
from gjflax.language.gen import inline as inline
from gjflax.language.gen import trace as trace
from gjflax.version import __version__ as __version__

if TYPE_CHECKING:
    from gjflax.on_demand import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """A name of `gjflax.on_demand`; for ``from gjflax import *`` all of them."""
    if name == "__all__":
        return [public for public in __dir__() if not public.startswith("_")]
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module("gjflax.on_demand"), name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *vars(importlib.import_module("gjflax.on_demand"))})

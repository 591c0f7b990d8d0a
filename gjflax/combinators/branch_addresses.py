"""Which addresses the branches have of a combinator that runs one of several generative functions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from gjflax.core.choice_map import ChoiceMap
from gjflax.core.context import current_address
from gjflax.core.errors import UnvisitedConstraintError, nearest, show_address
from gjflax.core.masked import Masked


def check_visited(choices: ChoiceMap, addresses: Sequence[Sequence[Any]], taken: int | None, owner: str) -> None:
    """An error for constraints that no branch visits, or not the one that is known to be taken.

    Args:
      choices: the constraints.
      addresses: those of each branch.
      taken: the branch that is taken, where that is known while tracing.
      owner: the combinator's class.

    Raises:
      UnvisitedConstraintError: if there is such a constraint.
    """
    at = current_address()
    known = {address for part in addresses for address in part}
    for address in choices.addresses():
        if address not in known:
            raise UnvisitedConstraintError(
                f"A value was given for {show_address((*at, *address))}, which is not a choice of any branch of this "
                f"{owner}. {nearest((*at, *address), [(*at, *one) for one in sorted(known)])} To ignore what is not "
                "used, pass strict=False."
            )
        is_masked = isinstance(choices.get_subtree(address).get_value(), Masked)
        if taken is not None and not is_masked and address not in addresses[taken]:
            raise UnvisitedConstraintError(
                f"A value was given for {show_address((*at, *address))}, which is not a choice of branch {taken} of "
                f"this {owner}, and that one is taken. "
                f"{nearest((*at, *address), [(*at, *one) for one in addresses[taken]])} To ignore what is not used, "
                "pass strict=False."
            )


def remembered_addresses(*key: Any) -> list[Any]:
    """What was found of a module at arguments of these types: empty at first, for the caller to fill."""
    try:
        return _memory(*key)
    except TypeError:
        # An argument that does not hash.
        return []


@functools.lru_cache(maxsize=256)
def _memory(*key: Any) -> list[Any]:
    return []

"""`Applied`: a distribution at its arguments, as families implement it."""

from __future__ import annotations

from typing import Any

import jax

from gjflax.core.typing import PRNGKey


class Applied:
    """A distribution at its arguments: what the interface's arithmetic needs of it."""

    is_discrete: bool = False
    reparameterized: bool = False

    @property
    def template(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a value."""
        raise NotImplementedError

    def sample(self, key: PRNGKey) -> Any:
        """A value, drawn with a typed key."""
        raise NotImplementedError

    def logpdf(self, value: Any) -> Any:
        """The log density of a value, elementwise or summed."""
        raise NotImplementedError

    def bijector(self) -> Any:
        """A bijector from R^n onto the support, with the methods of a TFP bijector; or None."""
        return None

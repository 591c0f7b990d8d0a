"""Packages that are needed only by those who ask for what they do."""

from __future__ import annotations

import importlib
from types import ModuleType

from gjflax.core.errors import MissingDependencyError


def require(module: str, purpose: str, *packages: str) -> ModuleType:
    """The module, imported now.

    Raises:
      MissingDependencyError: if it is not installed, with what to install.

    >>> require("json", "This").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs `{module}`, which is not installed: run `pip install {' '.join(packages)}`."
        ) from error

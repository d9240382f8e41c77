"""Packages that only some of the workbench needs, imported when they are first used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def optional(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: Dotted name of the module.
        extra: The extra of this package that installs it.

    Raises:
        ImportError: The package is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"`{module}` cannot be imported ({error}): pip install lightning-prune[{extra}].") from error

"""What goes wrong is told in words: what, and the way out, without the depths of Hydra."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from hydra.errors import CompactHydraException, InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lightning_prune.errors import PruningError

EXPECTED = (
    PruningError,
    ValueError,
    TypeError,
    OSError,
    ImportError,
    MisconfigurationException,
    InstantiationException,
    OmegaConfBaseException,
)
"""Errors that tell a person what to do; any other is a fault of the code, whose whole trace is wanted."""


class Told(CompactHydraException):
    """An error in words; Hydra prints these and no trace. HYDRA_FULL_ERROR=1 brings the trace back."""


def in_words(error: Exception) -> str:
    """Tell an error: Hydra's wrapping is taken off, and what it wrapped is named by its place in the config."""
    if not isinstance(error, InstantiationException):
        return str(error) or type(error).__name__
    text, _, place = str(error).partition("\nfull_key: ")
    cause = error.__cause__
    if "Error locating target" in text:
        target = text.split("'")[1]
        return (
            f"{place or 'config'}._target_: {target!r} does not import ({_root(error)}). Is it spelled right, and does "
            "its module lie in the working directory or among the installed packages?"
        )
    return f"{place}: {in_words(cause)}" if isinstance(cause, Exception) and place else text


def told(task: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Let a command tell expected errors in words."""

    @wraps(task)
    def telling(config: DictConfig) -> None:
        try:
            task(config)
        except EXPECTED as error:
            raise Told(in_words(error)) from shown(error)

    return telling


def shown(error: Exception) -> Exception | None:
    """Return the error as a cause; not one of OmegaConf, which Hydra would print a second time."""
    return None if isinstance(error, OmegaConfBaseException) else error


def _root(error: BaseException) -> str:
    """Return what the innermost error says, in one line."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__ or error
    return " ".join(str(error).split())

"""What a run is called, and how it is known again: the same sweep, started twice, finds what is done."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from inspect import signature
from shlex import quote
from typing import Any

from omegaconf import DictConfig, OmegaConf

_LONGEST = 120
_NO_MATTER = ("threads", "objectives")
"""What a run may differ in and still be the same run."""


def run_name(overrides: str) -> str:
    """Turn the overrides of a run into the name of its folder; a long one ends in a hash.

    >>> run_name("method=slimming,method.pruning_ratio=0.5,seed=0")
    'method=slimming,method.pruning_ratio=0.5,seed=0'
    >>> run_name("data.root=/mnt/data")
    'data.root=_mnt_data'
    """
    name = re.sub(r"[^\w.=,+-]+", "_", overrides) or "defaults"
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 9]}-{_digest(overrides)[:8]}"


def fingerprint(config: DictConfig) -> str:
    """Return a hash of all that decides what a run does; where it lies is no part of it."""
    plain = OmegaConf.to_container(config, resolve=False)
    if not isinstance(plain, dict):
        raise TypeError(f"A run is described by a mapping; got {type(plain).__name__}.")
    return _digest(json.dumps({str(key): each for key, each in plain.items() if key not in _NO_MATTER}, sort_keys=True))


def command(overrides: Sequence[str]) -> str:
    """Return the line that repeats a run.

    >>> command(["method=slimming", "method.ignore=[a, b]"])
    "lightning-prune method=slimming 'method.ignore=[a, b]'"
    """
    return " ".join(["lightning-prune", *map(quote, overrides)])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _register(name: str, resolver: Callable[[str], str]) -> None:
    """Before OmegaConf 2.4 `register_resolver` was another, older function (omry/omegaconf#426)."""
    register: Any = OmegaConf.register_resolver
    if "replace" not in signature(register).parameters:
        register = OmegaConf.register_new_resolver
    register(name, resolver, replace=True)


_register("run_name", run_name)

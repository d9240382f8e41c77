"""What a run leaves in its folder: a summary, or what went wrong."""

from __future__ import annotations

import json
import platform
import shutil
import traceback
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from lightning_prune.__version__ import __version__
from lightning_prune.cli.names import command, fingerprint
from lightning_prune.cli.words import in_words

FORMAT = 2
"""Of summary.json and failure.json; `lightning-prune report` reads it."""

_LEFT_BEHIND = ("csv", "tensorboard", "dense", "pruned")


def finished(folder: Path, config: DictConfig) -> dict[str, Any] | None:
    """Return the summary that the same run left here before; None if there is none, or another run's."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    same = isinstance(summary, dict) and summary.get("fingerprint") == fingerprint(config)
    return summary if same else None


def clear(folder: Path) -> None:
    """Remove what a run that was killed, or that failed, has left: logs of two runs in one folder mean nothing."""
    for name in ("summary.json", "failure.json", "config.yaml"):
        (folder / name).unlink(missing_ok=True)
    for name in _LEFT_BEHIND:
        shutil.rmtree(folder / name, ignore_errors=True)


def write_summary(folder: Path, config: DictConfig, found: dict[str, Any]) -> dict[str, Any]:
    """Write what was found, and on what; the summary comes last, since it says that the run is finished."""
    machine = {"torch": torch.__version__, "lightning": lightning.__version__, "threads": torch.get_num_threads()}
    summary = {**_run(config), **machine, "fingerprint": fingerprint(config), **found}
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    write_whole(folder / "summary.json", json.dumps(summary, indent=2))
    return summary


def write_failure(folder: Path, config: DictConfig, error: Exception) -> None:
    """Write what went wrong, in words and with its trace."""
    wrapped = isinstance(error, InstantiationException) and error.__cause__
    words = f"{type(wrapped or error).__name__}: {in_words(error)}"
    failure = {**_run(config), "error": words, "traceback": "".join(traceback.format_exception(error))}
    write_whole(folder / "failure.json", json.dumps(failure, indent=2))


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _run(config: DictConfig) -> dict[str, Any]:
    """Return what is known about a run before it begins."""
    known = HydraConfig.get()
    overrides = [str(each) for each in known.overrides.task]
    return {
        "format": FORMAT,
        "version": __version__,
        "processor": platform.processor() or platform.machine(),
        "seed": config.seed,
        "choices": {group: choice for group, choice in known.runtime.choices.items() if "/" not in group},
        "overrides": overrides,
        "command": command(overrides),
    }

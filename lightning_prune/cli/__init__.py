"""The command line: `lightning-prune [run | sensitivity | analyze | export | report] ...`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

COMMANDS = ("run", "sensitivity", "analyze", "export", "report")


def quoted(argument: str) -> str:
    """Quote the path of a checkpoint: Lightning puts `=` into their names, which Hydra would read as its own.

    >>> quoted("ckpt_path=epoch=1-step=4.ckpt")
    "ckpt_path='epoch=1-step=4.ckpt'"
    >>> quoted("seed=0")
    'seed=0'
    """
    key, _, value = argument.partition("=")
    bare = value and value[0] not in "'\"" and "'" not in value
    return f"{key}='{value}'" if key.lstrip("+") in ("ckpt_path", "checkpoint") and bare else argument


def main() -> None:
    """Do what the first argument says; without a command, run an experiment.

    Modules in the working directory can be imported, so that `model._target_=mine.Net` finds a user's own network.
    """
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first.isalpha() and first not in COMMANDS:
        sys.exit(f"lightning-prune has no command {first!r}; it has {', '.join(COMMANDS)}. Without one it runs.")
    command = sys.argv.pop(1) if first in COMMANDS else "run"
    sys.argv[1:] = map(quoted, sys.argv[1:])
    sys.path.insert(0, str(Path.cwd()))
    getattr(import_module(f"lightning_prune.cli.{command}"), command)()
    if command == "run":
        sys.exit(import_module("lightning_prune.cli.sweep_end").TellSweep.failed > 0)

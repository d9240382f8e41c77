"""The command line: `lightning-prune [run | sensitivity | analyze | export | report] ...`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

COMMANDS = ("run", "sensitivity", "analyze", "export", "report")


def main() -> None:
    """Do what the first argument says; without a command, run an experiment.

    Modules in the working directory can be imported, so that `model._target_=mine.Net` finds a user's own network.
    """
    command = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in COMMANDS else "run"
    sys.path.insert(0, str(Path.cwd()))
    getattr(import_module(f"lightning_prune.cli.{command}"), command)()
    if command == "run":
        sys.exit(import_module("lightning_prune.cli.sweep_end").TellSweep.failed > 0)

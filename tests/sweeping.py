"""Sweeps of runs of seconds, started as a person would start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "lightning_prune"]
SWEEP = ["--multirun", "experiment=smoke", "dense_twin=false", "hydra.sweep.dir=sweep"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a folder."""
    return subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Sweep into the folder `sweep`."""
    return run(folder, *SWEEP, *arguments)


def left(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return what the runs of a sweep have left under a name: the run's folder -> content."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob(f"sweep/*/{name}"))}

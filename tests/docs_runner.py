"""Runs a program in a process that has imported already what nearly all programs import."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch

PRELOADED = ["lightning.pytorch", "lightning_prune.callbacks", "lightning_prune.workbench"]


def run(program: Path) -> None:
    """Run a file in its folder, as `python file` would, and write what it says into `said`."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    os.chdir(program.parent)
    sys.path[:0] = [str(program.parent)]
    said = os.open("said", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(said, stream)
    runpy.run_path(str(program), run_name="__main__")

"""Every example runs as it stands, and so does every Python block of the README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def output_of(code: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path: Path, tmp_path: Path) -> None:
    assert "reached" in output_of(path.read_text(encoding="utf-8"), tmp_path)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_readme_blocks_run(block: int, tmp_path: Path) -> None:
    assert output_of(BLOCKS[block], tmp_path)


def test_readme_shows_code() -> None:
    assert BLOCKS

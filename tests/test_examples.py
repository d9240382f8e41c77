"""Every example runs as it stands, and so does every Python block of the README."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples"
EXAMPLES = sorted([*FOLDER.glob("*.py"), *FOLDER.glob("*.sh")])
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)

NEEDS = {
    "export_and_serve.py": ["onnx", "onnxscript", "onnxruntime"],
    "finetune_torchvision.py": ["torchvision"],
    "lightning_cli.py": ["jsonargparse", "docstring_parser", "typeshed_client"],
    "sweep.sh": ["hydra_plugins.hydra_joblib_launcher", "jinja2", "plotly"],
    "timm_transformer.py": ["timm"],
}
"""Optional packages; without them an example is skipped."""

SLOW = {
    "ddp.py",
    "export_and_serve.py",
    "finetune_torchvision.py",
    "lasso_without_labels.py",
    "resume.py",
    "sweep.sh",
    "timm_transformer.py",
}

SAID = {
    "custom_op_handler.py": ["first: 16 channels, prunable", "same with channels swapped: True"],
    "ddp.py": ["2 processes hold the same weights: True"],
    "export_and_serve.py": ["pruned.onnx: onnx"],
    "own_model.py": ["the same outputs: True"],
    "resume.py": ["equal bit for bit: True"],
    "sweep.sh": ["2 runs finished"],
    "timm_transformer.py": ["block 1: heads 8 -> 4"],
}
"""What an example claims, beside what was reached."""


def done(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.name, marks=[pytest.mark.slow] if path.name in SLOW else []) for path in EXAMPLES],
)
def test_examples_run(path: Path, tmp_path: Path) -> None:
    for package in NEEDS.get(path.name, []):
        pytest.importorskip(package, reason=f"{path.name} needs {package}")
    ran = done(["bash" if path.suffix == ".sh" else sys.executable, str(path)], tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"reached \d", ran.stdout + ran.stderr if path.suffix == ".sh" else ran.stdout)
    assert [claim for claim in SAID.get(path.name, []) if claim not in ran.stdout] == []
    assert not re.findall(r".*lightning_prune/.*\.py:\d+: .*", ran.stdout + ran.stderr), "a warning of our own"


def test_an_example_says_what_it_shows_and_is_short() -> None:
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(EXAMPLES) >= 13
    for path in EXAMPLES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 80, path.name
        assert f"]({path.name})" in listed, path.name
        if path.suffix == ".py":
            assert len(ast.get_docstring(ast.parse(text)) or "") > 40, path.name
    assert {path.name for path in EXAMPLES} >= {*NEEDS, *SLOW, *SAID}


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_readme_blocks_run(block: int, tmp_path: Path) -> None:
    ran = done([sys.executable, "-c", BLOCKS[block]], tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout


def test_readme_shows_code() -> None:
    assert BLOCKS

"""`lightning-prune analyze` from outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sweeping import run

OWN = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, in_channels, width=8):
        super().__init__(nn.Conv2d(in_channels, width, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
        self.append(nn.Identity())


class Ready(nn.Sequential):
    def __init__(self, in_channels, width=8):
        super().__init__(nn.Conv2d(in_channels, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
"""


def analysis(folder: Path) -> dict[str, object]:
    found = json.loads((folder / "out" / "analysis.json").read_text())
    assert isinstance(found, dict)
    return found


def test_a_network_of_ours(tmp_path: Path) -> None:
    scan = ["sensitivity=true", "ratios=[0.5]", "batches=1", "ignore=['*.stage1.*']"]
    done = run(tmp_path, "analyze", "model=resnet20", "pruning_ratio=0.4", *scan, "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    assert "A cut would give: asked 40.0% of macs" in done.stdout
    assert "as one layer alone loses channels" in " ".join(done.stdout.split())
    found = analysis(tmp_path)
    assert found["plan"]["widths"]["net.conv1"] == 16, "what is ignored is frozen, and so is all that shares with it"
    assert found["plan"]["reached"] == pytest.approx(0.4, abs=0.03)
    assert (tmp_path / "out" / "sensitivity.json").exists()


def test_a_network_of_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    own = ["analyze", "model=own", "model._target_=mine.Ready", "+model.width=12", "hydra.run.dir=out"]
    done = run(tmp_path, *own, "example=[1,3,16,16]")
    assert done.returncode == 0, done.stderr
    assert [group["channels"] for group in analysis(tmp_path)["groups"]] == [12, 5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("model=own", "Missing mandatory value: model._target_"),
        ("model=own model._target_=mine.Nothing", "'mine.Nothing' does not import"),
        ("model=own model._target_=mine.Net example=[1,3,16,16]", "a lazy model once before it is read"),
        ("pruning_ratio=1.2", "`pruning_ratio` is the fraction of macs to remove, in [0, 1); got 1.2"),
        ("ignore=[nothing]", "'nothing' matches no module"),
        ("ckpt_path=mine.py", "mine.py"),
        ("example=[1,1]", "Pass inputs of the shape and dtype"),
    ],
)
def test_errors_are_words(tmp_path: Path, arguments: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    done = run(tmp_path, "analyze", *arguments.split())
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr

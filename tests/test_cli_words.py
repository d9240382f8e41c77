"""What the command line says where something is wrong: a line or two, and no stack trace."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweeping import run

OWN = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, in_channels, image_size, num_classes, width=8):
        super().__init__(
            nn.Conv2d(in_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(width, num_classes),
        )
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("model._target_=nowhere.Net", "model._target_: 'nowhere.Net' does not import (No module named 'nowhere')"),
        ("model._target_=torch.nn.Nothing", "model._target_: 'torch.nn.Nothing' does not import"),
        ("model=resnet19", "Could not find 'model/resnet19'"),
        ("metod=slimming", "Could not override 'metod'"),
        ("method.ratio=0.5", "Could not override 'method.ratio'"),
        ("method.pruning_ratio=1.5", "method: `pruning_ratio` is the fraction of channels to remove, in [0, 1)"),
        ("ckpt_path=nowhere.ckpt", "nowhere.ckpt"),
        ("schedule.begin=7 schedule.end=9", "max_epochs=2"),
        ("objectives=[accuracy]", "`objectives` names figures of summary.json"),
        ("data=mnist data.root=nowhere", "nowhere"),
    ],
)
def test_errors_are_words(tmp_path: Path, arguments: str, words: str) -> None:
    done = run(tmp_path, "experiment=smoke", "dense_twin=false", *arguments.split())
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_the_commands(tmp_path: Path) -> None:
    shown = run(tmp_path, "--help").stdout
    assert shown.startswith("lightning-prune [run]")
    for command in ("report", "analyze", "sensitivity", "export"):
        assert f"lightning-prune {command}" in shown


def test_an_unknown_command_lists_the_known_ones(tmp_path: Path) -> None:
    done = run(tmp_path, "repport", "multirun")
    assert done.returncode == 1
    assert "has no command 'repport'; it has run, sensitivity, analyze, export, report" in done.stderr


def test_a_network_of_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    done = run(tmp_path, "experiment=smoke", "dense_twin=false", "model._target_=mine.Net", "+model.width=16")
    assert done.returncode == 0, done.stderr
    assert "reached 31.2%" in done.stderr + done.stdout

"""The event benchmark: what it times, what its table says, and that what fails or hangs stands in a row of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import apart
import events
import events_one
from circumstances import note, noted
from events_one import EVENTS, drop, measured, ours, peer

EXAMPLE = torch.zeros(1, 3, 8, 8)

# Lightning, where a fit is as short as these
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def small() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def run(first: float, following: float) -> dict[str, float]:
    shares = {f"{event}, verification": 0.1 for event in EVENTS}
    return {"first": first, "following": following, **shares, "parameters left": 0.3}


def row(name: str, own: float, other: float | None, **more: object) -> dict[str, Any]:
    runs = {"ours": [run(own, own), run(2 * own, own)], "drop": [run(own / 2, own / 2)] * 2}
    if other is not None:
        runs["peer"] = [run(other, other), run(2 * other, other)]
    return {"model": name, "runs": runs, **more}


ROWS = [
    row("small", 1.0, 4.0),
    row("middle", 2.0, 4.0),
    row("large", 3.0, 4.0),
    row("endless", 1.0, None, peer="does not end in 120 s"),
    row("alone", 1.0, None, skipped="torch-pruning is not installed"),
    {"model": "broken", "error": "RuntimeError: oh"},
]


def test_the_table_holds_paired_ratios_and_their_median() -> None:
    said = events.table(ROWS)
    assert "| small | 1000 | 4000 | 0.25 | 1000 | 4000 | 0.25 | 0.25 | 0.23 | 0.10 |" in said
    assert "both: median ratio 0.50 over 3 models, largest 0.75; at most 0.5 is aimed at: met" in said


def test_the_table_says_what_failed() -> None:
    said = events.table(ROWS)
    assert "| endless | 1000 | does not end in 120 s |" in said
    assert "Torch-Pruning, endless: does not end in 120 s" in said
    assert "| alone | 1000 | torch-pruning is not installed |" in said
    assert "| broken | fails: RuntimeError: oh |" in said


def test_every_row_of_the_table_is_as_long_as_its_header() -> None:
    head, _, *lines = [line for line in events.table(ROWS).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {head.count("|")}


def test_a_table_without_the_peer_has_no_medians() -> None:
    assert "median" not in events.table(ROWS[3:])


def test_both_of_our_events_are_timed_inside_a_fit() -> None:
    found = measured(small, EXAMPLE, {"ours": ours, "drop": drop}, 2)
    for runs in found.values():
        assert len(runs) == 2
        for seconds in runs:
            assert 0 < seconds["first, verification"] < seconds["first"]
            assert 0 < seconds["following, verification"] < seconds["following"]
            assert seconds["rehearsal"] > 0
            assert 0.2 < seconds["parameters left"] < 0.5


@pytest.mark.skipif(importlib.util.find_spec("torch_pruning") is None, reason="torch-pruning is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_peer_cuts_as_much_in_two_events() -> None:
    found = measured(small, EXAMPLE, {"ours": ours, "peer": peer}, 1)
    (own,), (other,) = found["ours"], found["peer"]
    assert set(EVENTS) <= other.keys()
    assert abs(own["parameters left"] - other["parameters left"]) < 0.02


def test_a_child_that_fails_or_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 1, "", "Traceback\nKeyError: 'oh'\n")

    def hangs(*_: Any, **settings: Any) -> Any:
        raise subprocess.TimeoutExpired("python", settings["timeout"])

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(apart.ChildError, match="KeyError: 'oh'"):
        apart.printed(events.SCRIPT, ["resnet18"])
    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(apart.ChildError, match="does not end in 7 s"):
        apart.printed(events.SCRIPT, ["resnet18"], 7)


def test_where_the_peer_fails_ours_is_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def printed(script: Path, arguments: list[str], limit: float | None = None) -> Any:
        asked.append(arguments)
        if limit is not None:
            raise apart.ChildError("does not end in 1 s")
        return {"ours": []}

    monkeypatch.setattr(events, "printed", printed)
    monkeypatch.setattr(events, "installed", lambda package: "1.0")
    assert events.measured("swin_t", 3, 1) == {"model": "swin_t", "peer": "does not end in 1 s", "runs": {"ours": []}}
    assert asked[-1][-2:] == ["ours", "drop"]


def test_without_the_peer_its_rows_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "printed", lambda script, arguments, limit=None: {})
    monkeypatch.setattr(events, "installed", lambda package: None)
    assert events.measured("resnet18", 3, 1)["skipped"] == "torch-pruning is not installed"


def test_a_failure_stands_in_its_row_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "events.jsonl"
    known = row("small", 1.0, 4.0)
    note(out, known)

    def printed(script: Path, arguments: list[str], limit: float | None = None) -> Any:
        if arguments[0] == "broken":
            raise apart.ChildError("RuntimeError: oh")
        return {"ours": [run(1, 1)], "drop": [run(1, 1)], "peer": [run(2, 2)]}

    monkeypatch.setattr(events, "printed", printed)
    events.measure(Namespace(models=["small", "broken", "next"], repeats=1, limit=1.0, out=out))
    first, second, third = noted(out)
    assert first == known
    assert (second["model"], second["error"]) == ("broken", "RuntimeError: oh")
    assert (third["model"], third["runs"]["ours"]) == ("next", [run(1, 1)])
    assert {"commit", "machine", "time"} <= third.keys()


def test_the_models_are_torchvision_s() -> None:
    assert len(events.MODELS) == 8
    assert set(events.MODELS) <= set(events_one.torchvision.models.list_models())

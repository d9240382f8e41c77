"""The scale benchmark: exponents, what a row holds, processes that fail, resuming, limits, and the table."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import scale
from circumstances import note, noted
from scale import FAMILIES, TASKS, exponent

COUNTS = ("operations", "channels", "parameters")


def row(what: str, size: int, power: float, **more: Any) -> dict[str, Any]:
    counts = dict.fromkeys(COUNTS, 10 * size)
    times = dict.fromkeys(TASKS, 0.001 * size**power)
    return {"what": what, "size": size, **counts, **times, "before MB": 700.0, "peak MB": 720.0, **more}


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_made_up_powers(power: float) -> None:
    rows = [row("depth", size, power) for size in (125, 250, 500, 1000)]
    assert exponent(rows, "read", "operations") == pytest.approx(power)


def test_the_exponent_takes_all_sizes_into_account() -> None:
    rows = [row("depth", size, 1) for size in (1, 10, 100)]
    rows[1]["read"] *= 10
    assert exponent(rows, "read", "operations") == pytest.approx(1)
    rows[2]["read"] *= 10
    assert exponent(rows, "read", "operations") == pytest.approx(1.5)


def test_reading_planning_and_cutting_are_timed_apart() -> None:
    images = torch.zeros(1, 3, 8, 8)
    net = scale.deep(3).eval()
    found = scale.halved(net, images, FAMILIES["depth"].criterion)
    assert set(found) == {*TASKS, *COUNTS}
    assert all(found[task] > 0 for task in TASKS)
    assert found["channels"] == 8 * 4 + 10
    assert net[0].out_channels == 4


def test_a_size_on_meta_is_measured_with_its_memory() -> None:
    found = scale.timed(replace(FAMILIES["depth"], sizes=(2,), repeats=2), 2)
    assert found["peak MB"] > 0.9 * found["before MB"] > 0  # the system rounds both, and each in its own way
    assert found["operations"] == 7 + 2 * 9


def test_four_sizes_of_depth_and_of_width() -> None:
    assert all(len(family.sizes) == 4 for family in FAMILIES.values())


def test_a_process_that_fails_leaves_its_row_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: Any) -> Any:
        if command[-1] == "250":
            return subprocess.CompletedProcess(command, 1, "", "Traceback\nMemoryError: oh\n")
        return subprocess.CompletedProcess(command, 0, json.dumps(row("depth", int(command[-1]), 1)) + "\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(scale, "circumstances", dict)
    out = tmp_path / "scale.jsonl"
    note(out, row("depth", 1000, 1, read=7.0))
    scale.measure(Namespace(out=out, families=["depth"]))
    found = {each["size"]: each for each in noted(out)}
    assert set(found) == set(FAMILIES["depth"].sizes)
    assert found[250]["error"] == "MemoryError: oh"
    assert found[1000]["read"] == 7.0
    assert "depth 250 fails: MemoryError: oh" in scale.table(list(found.values()))


def test_the_table_holds_sizes_exponents_and_limits() -> None:
    rows = [row("depth", size, 1) for size in FAMILIES["depth"].sizes]
    rows += [row("width", size, 2) for size in FAMILIES["width"].sizes]
    rows += [row("llama", 32, 1), row("memory", 1, 1)]
    said = scale.table(rows)
    assert "| residual network: blocks 1,000 | 10,000 | 10,000 | 10,000 | 1.000 | 1.000 | 1.000 | 700 | 720 |" in said
    assert "| **exponent in operations** |  |  |  | **1.00** | **1.00** | **1.00** |  |  |" in said
    assert "| read: exponent in channels, ResNet-50, no weights: times its width | 2.00 | 1.25 | NO |" in said
    assert "| shape of Llama 7B: read, plan and cut, s | 0.10 | 60 | yes |" in said
    assert "| torchvision's resnet50: extra MB that reading takes | 20.00 | 50 | yes |" in said


def test_a_missed_limit_is_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for power, status in ((1.0, 0), (2.0, 1)):
        out = tmp_path / f"{status}.jsonl"
        for size in (1, 2):
            note(out, row("depth", size, power))
        assert scale.main(["--table", "--out", str(out)]) == status
    assert "| NO |" in capsys.readouterr().out

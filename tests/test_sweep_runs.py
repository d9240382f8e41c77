"""Reading what runs left: whole, broken, old and half-written folders."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweep_runs import needs_report, summary, write_failure, write_hydra, write_metrics, write_run, write_sweep

from lightning_prune.cli.report import report
from lightning_prune.errors import ReportError
from lightning_prune.sweeps import Spread, read_runs, seed_groups, write_report
from lightning_prune.sweeps.groups import common, varying
from lightning_prune.sweeps.runs import Broken, Moment, Pair, Run


def only_broken(folder: Path) -> Broken:
    sweep = read_runs([folder])
    assert not sweep.runs
    (broken,) = sweep.broken
    return broken


def only_run(folder: Path) -> Run:
    sweep = read_runs([folder])
    assert not sweep.broken
    (run,) = sweep.runs
    return run


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    write_run(tmp_path / "one", summary(0.5, seed=3))
    run = only_run(tmp_path)
    assert (run.name, run.seed, run.dense_accuracy, run.machine) == ("one", 3, 0.974, "x86_64, 1 thread")
    assert run.settings == {
        "data": "digits",
        "model": "resnet20",
        "schedule": "one_shot",
        "method": "slimming",
        "method.pruning_ratio": "0.5",
    }
    assert run.costs["macs"] == Pair(2_550_000, 1_275_000)
    assert list(run.costs) == ["macs", "params", "batch_1", "batch_64"]
    (cut,) = run.cuts
    assert (cut.epoch, cut.step, cut.asked, cut.macs, cut.accuracy) == (5, 60, 0.5, 1_275_000, 0.65)
    assert cut.held_back == {"fc": "frozen: reaches the model's output"}
    assert run.scales is not None
    assert (len(run.scales.epochs), len(run.scales.edges), len(run.scales.counts[0])) == (16, 41, 40)
    assert run.curves["val/acc"][0] == Moment(11, 0, pytest.approx(0.42))
    assert set(run.curves) == {"train/acc", "val/acc", "train/loss", "val/loss"}


def test_what_a_run_may_lack(tmp_path: Path) -> None:
    content = summary(accuracy={"end": 0.9, "val_before_cut": None, "val_after_cut": []}, events=[], latency_ms={})
    for name in ("scales", "seconds", "widths", "command"):
        del content[name]
    write_run(tmp_path, content, metrics=False)
    run = only_run(tmp_path)
    assert (run.dense_accuracy, run.before_cut, run.scales, run.cuts, run.curves) == (None, None, None, (), {})
    assert run.command == "lightning-prune method=slimming method.pruning_ratio=0.5 seed=0"


def test_runs_of_several_folders_are_read_once(tmp_path: Path) -> None:
    for sweep in ("a", "b/c"):
        write_run(tmp_path / sweep / "0", metrics=False)
    sweep = read_runs([tmp_path / "b", tmp_path / "a", tmp_path / "a" / "0"])
    assert [run.name for run in sweep.runs] == ["a/0", "b/c/0"]
    assert sweep.runs[0].id != sweep.runs[1].id


def test_states_of_what_is_broken(tmp_path: Path) -> None:
    sweep = read_runs([write_sweep(tmp_path)])
    assert len(sweep.runs) == 36
    states = {each.state: each for each in sweep.broken}
    assert set(states) == {"failed", "unfinished", "unreadable"}
    assert "got 1.5" in states["failed"].reason
    assert (states["failed"].command, states["failed"].trace) == ("lightning-prune method=slimming", "At")
    assert "killed" in states["unfinished"].reason
    assert states["unfinished"].command == "lightning-prune method=slimming method.pruning_ratio=0.99"
    assert "summary.json: is not JSON" in states["unreadable"].reason
    assert states["unreadable"].name == "method=fisher,ratio=0.2"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accuracy": {}}, "summary.json: accuracy.end is missing. Run it again"),
        ({"accuracy": None}, "accuracy is missing"),
        ({"accuracy": {"end": math.nan}}, "accuracy.end should be a number and is nan"),
        ({"accuracy": {"end": True}}, "accuracy.end should be a number and is True"),
        ({"macs": [1, 2]}, "macs should be a mapping and is [1, 2]"),
        ({"macs": {"dense": 1, "pruned": 10**400}}, "macs.pruned should be a number"),
        ({"widths": {"conv1": {"dense": 3}}}, "widths.conv1.pruned is missing"),
        ({"events": {"epoch": 1}}, "events should be a list"),
        ({"events": [{"asked": 0.5}]}, "events[0].reached is missing"),
        ({"scales": {"epochs": [0], "edges": [0, 1], "counts": [[1, 2]]}}, "scales.counts do not fit"),
        ({"format": 3}, "format is 3, and this lightning-prune reads 2. Install the version that wrote it"),
        ({"format": 1, "macs": None}, "summary.json of an older version: macs is missing. Run it again"),
    ],
)
def test_a_summary_that_does_not_fit_is_told(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    write_run(tmp_path / "run", {**summary(), **change})
    broken = only_broken(tmp_path)
    assert (broken.name, broken.state) == ("run", "unreadable")
    assert words in broken.reason


def test_an_older_summary_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    content = summary()
    for name in ("format", "overrides", "command", "seed", "fingerprint"):
        del content[name]
    write_run(tmp_path / "run", content)
    (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text("- method.pruning_ratio=0.5\n- 'seed=4'\n")
    run = only_run(tmp_path)
    assert run.seed == 4
    assert run.overrides == ("method.pruning_ratio=0.5", "seed=4")


@pytest.mark.parametrize("content", ["", "[]", "null", '"text"', "[" * 100_000, '{"format": "x"}'])
def test_a_file_of_something_else_is_told(tmp_path: Path, content: str) -> None:
    write_hydra(tmp_path / "run", [])
    (tmp_path / "run" / "summary.json").write_text(content)
    assert only_broken(tmp_path).state == "unreadable"


def test_bytes_that_are_no_text_are_told(tmp_path: Path) -> None:
    write_failure(tmp_path / "run")
    (tmp_path / "run" / "failure.json").write_bytes(b"\xff\xfe\x00")
    assert "failure.json: is not JSON" in only_broken(tmp_path).reason


def test_a_scan_of_sensitivity_is_no_run_that_was_killed(tmp_path: Path) -> None:
    write_hydra(tmp_path / "scan", [])
    (tmp_path / "scan" / ".hydra" / "hydra.yaml").write_text("hydra:\n  job:\n    config_name: sensitivity\n")
    with pytest.raises(ReportError, match="No run has left anything"):
        read_runs([tmp_path])


@pytest.mark.parametrize("lines", ["", "epoch,step\n", "no,such\n1,2\n", "epoch,step,val/acc\n0,x,0.5\n1,2\n"])
def test_curves_of_odd_files(tmp_path: Path, lines: str) -> None:
    write_run(tmp_path, metrics=False)
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text(lines)
    assert only_run(tmp_path).curves == {}


def test_long_curves_are_thinned_and_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, metrics=False)
    write_metrics(tmp_path, epochs=2000)
    with (tmp_path / "csv" / "metrics.csv").open("a") as lines:
        lines.write("2000,24001,nan,inf,,,\n")
    curve = only_run(tmp_path).curves["train/loss"]
    assert (len(curve), curve[0].epoch, curve[-1].epoch) == (300, 0, 1999)


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
places = [
    *((name,) for name in summary()),
    *(("accuracy", name) for name in summary()["accuracy"]),
    *(("events", 0, name) for name in summary()["events"][0]),
    *(("scales", name) for name in summary()["scales"]),
    ("macs", "dense"),
    ("latency_ms", "batch_1"),
    ("widths", "conv1", "pruned"),
    ("choices", "method"),
]


@needs_report
@given(place=st.sampled_from(places), value=values)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_summary_stops_the_report(tmp_path: Path, place: tuple[str | int, ...], value: Any) -> None:
    content: Any = summary()
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "summary.json").write_text(json.dumps(content))
    written = write_report([tmp_path], tmp_path / "report")
    assert len(written.sweep.runs) + len(written.sweep.broken) == 1
    json.loads(written.json.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_seeds_are_grouped(tmp_path: Path) -> None:
    groups = seed_groups(read_runs([write_sweep(tmp_path)]).runs)
    assert [len(group.runs) for group in groups] == [3] * 12
    assert all([run.seed for run in group.runs] == [0, 1, 2] for group in groups)
    assert varying(groups) == ("method", "method.pruning_ratio")
    assert common(groups) == {"data": "digits", "model": "resnet20", "schedule": "one_shot"}


def test_mean_and_spread_by_hand(tmp_path: Path) -> None:
    for seed, end in enumerate((0.90, 0.92, 0.97)):
        write_run(tmp_path / str(seed), summary(seed=seed, accuracy={"end": end}), metrics=False)
    (group,) = seed_groups(read_runs([tmp_path]).runs)
    # the deviations are -0.03, -0.01 and 0.04: sqrt(0.0026 / 2)
    assert group.spread(lambda run: run.accuracy) == Spread(pytest.approx(0.93), pytest.approx(0.0360555), 3)
    assert group.spread(lambda run: run.dense_accuracy) is None
    assert group.cost("macs") == Spread(1_275_000, 0, 3)


def test_the_same_seed_twice_is_two_runs_and_one_seed(tmp_path: Path) -> None:
    for name in "ab":
        write_run(tmp_path / name, metrics=False)
    (group,) = seed_groups(read_runs([tmp_path]).runs)
    assert (len(group.runs), group.seeds) == (2, 1)


def test_a_deleted_default_is_a_setting(tmp_path: Path) -> None:
    for name, more in (("a", []), ("b", ["~lr_scheduler"])):
        write_run(tmp_path / name, summary(overrides=["method=slimming", *more]), metrics=False)
    assert len(seed_groups(read_runs([tmp_path]).runs)) == 2


@needs_report
def test_the_command_writes_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path)
    report([str(tmp_path)])
    told = capsys.readouterr().out.splitlines()
    assert told == ["36 runs finished, 1 failed, 1 unfinished, 1 unreadable", str(tmp_path / "report" / "index.html")]
    rows = list(csv.DictReader((tmp_path / "report" / "runs.csv").read_text().splitlines()))
    assert len(rows) == 39
    (row,) = [row for row in rows if row["folder"] == "method=fisher,ratio=0.7,seed=1"]
    figures = (row["state"], row["setting.method"], row["setting.method.pruning_ratio"], row["seed"], row["macs"])
    assert figures == ("finished", "fisher", "0.7", "1", "765000.0")
    assert row["accuracy"] == str(summary(0.7, 1, "fisher")["accuracy"]["end"])
    data = json.loads((tmp_path / "report" / "runs.json").read_text())
    assert [len(data[name]) for name in ("runs", "groups", "broken")] == [36, 12, 3]
    ids = {run["id"] for run in data["runs"]}
    assert {run for group in data["groups"] for run in group["runs"]} == ids
    assert {tuple(group["front_of"]) for group in data["groups"] if group["settings"]["method"] == "slimming"} == {()}


@needs_report
def test_a_report_is_written_again_where_it_lies(tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "0", metrics=False)
    for _ in range(2):
        report([str(tmp_path / "sweep"), "--out", str(tmp_path / "here")])
    page = (tmp_path / "here" / "index.html").read_text()
    write_run(tmp_path / "sweep" / "1", summary(seed=1), metrics=False)
    report([str(tmp_path / "sweep"), "--out", str(tmp_path / "here")])
    assert (tmp_path / "here" / "index.html").read_text() != page
    assert not (tmp_path / "sweep" / "report").exists()


@needs_report
@pytest.mark.parametrize("case", ["nowhere", "empty", "out"])
def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run", metrics=False)
    arguments, words = {
        "nowhere": ([str(tmp_path / "nowhere")], "is no folder. Give the folder of a sweep"),
        "empty": ([str(tmp_path / "empty")], "No run has left anything in"),
        "out": ([str(tmp_path / "run"), "--out", str(tmp_path / "run" / "summary.json")], "Name another folder"),
    }[case]
    with pytest.raises(SystemExit, match="2"):
        report(arguments)
    told = capsys.readouterr().err
    assert words in told
    assert arguments[-1] in told
    assert told.count("\n") == 1


@needs_report
def test_a_folder_of_nothing_but_broken_runs_has_a_report(tmp_path: Path) -> None:
    write_failure(tmp_path / "0")
    written = write_report([tmp_path], tmp_path / "report")
    assert "got 1.5" in written.page.read_text()
    assert json.loads(written.json.read_text())["runs"] == []

"""The table of timings on disk: what it holds for, and what becomes of a file that is damaged or foreign."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_prune.cost import LatencyTable, Machine
from lightning_prune.errors import LatencyTableError, PruningError

HERE = Machine.here(torch.device("cpu"))


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_saved_is_found_again(folder: Path) -> None:
    table = LatencyTable.cached(HERE)
    assert not table.timings
    table.timings["some operation"] = 1.5
    table.save()
    assert LatencyTable.cached(HERE).timings == {"some operation": 1.5}
    assert [file.suffix for file in folder.iterdir()] == [".json"]


@pytest.mark.parametrize("other", [{"threads": HERE.threads + 1}, {"version": "1.0"}, {"device": "abacus"}])
def test_each_machine_has_a_file_of_its_own(other: dict[str, object], folder: Path) -> None:
    for machine in (HERE, replace(HERE, **other)):
        table = LatencyTable.cached(machine)
        assert not table.timings
        table.timings["some operation"] = 1.0
        table.save()
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("other", [{"threads": HERE.threads + 1}, {"version": "1.0"}, {"device": "abacus"}])
def test_a_table_of_another_machine_is_refused(other: dict[str, object], tmp_path: Path) -> None:
    foreign = LatencyTable(replace(HERE, **other), tmp_path / "foreign.json", {"some operation": 1.0})
    foreign.save()
    with pytest.raises(LatencyTableError, match=f"{next(iter(other.values()))}.*here is .*Leave out `table`"):
        LatencyTable.load(tmp_path / "foreign.json")
    assert issubclass(LatencyTableError, PruningError)


def damaged(content: dict[str, object]) -> list[str]:
    timings = {"some operation": 1.0}
    return [
        "",
        "{",
        "[]",
        "null",
        json.dumps({**content, "format": 0}),
        json.dumps({**content, "milliseconds": {"some operation": -1.0}}),
        json.dumps({**content, "milliseconds": {"some operation": float("nan")}}),
        json.dumps({**content, "milliseconds": {"some operation": "soon"}}),
        json.dumps({**content, "milliseconds": [timings]}),
        json.dumps({**content, "machine": {"device": "abacus"}}),
        json.dumps({"format": 1, "milliseconds": timings}),
    ]


@pytest.mark.parametrize("case", range(11))
def test_a_damaged_file_is_warned_about_and_written_anew(case: int, folder: Path) -> None:
    table = LatencyTable.cached(HERE)
    table.timings["some operation"] = 1.0
    table.save()
    (file,) = folder.iterdir()
    file.write_text(damaged(json.loads(file.read_text()))[case])
    with pytest.raises(LatencyTableError, match=r"cannot be read .*Delete the file\."):
        LatencyTable.load(file)
    with pytest.warns(UserWarning, match="measured anew"):
        fresh = LatencyTable.cached(HERE)
    assert not fresh.timings
    fresh.timings["some operation"] = 2.0
    fresh.save()
    assert LatencyTable.load(file).timings == {"some operation": 2.0}


def test_bytes_that_are_no_text_are_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LatencyTableError, match="cannot be read"):
        LatencyTable.load(tmp_path / "table.json")


def test_a_missing_file_is_an_error_where_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(LatencyTableError, match=r"none\.json"):
        LatencyTable.load(tmp_path / "none.json")


def test_two_processes_keep_what_each_has_measured() -> None:
    one, other = LatencyTable.cached(HERE), LatencyTable.cached(HERE)
    one.timings["a"], other.timings["b"] = 1.0, 2.0
    one.save()
    other.save()
    assert LatencyTable.cached(HERE).timings == {"a": 1.0, "b": 2.0}


def test_a_folder_that_cannot_be_written_to_is_told_and_nothing_else(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file where the folder should be")
    table = LatencyTable(HERE, folder / "table.json", {"a": 1.0})
    with caplog.at_level(logging.WARNING):
        table.save()
    assert "cannot be kept" in caplog.text
    assert table.timings == {"a": 1.0}


def test_a_table_without_a_file_stays_in_memory(folder: Path) -> None:
    LatencyTable(HERE, timings={"a": 1.0}).save()
    assert not folder.exists()

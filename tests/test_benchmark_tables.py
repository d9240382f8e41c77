"""benchmarks/README.md: it says what the result files say, and a table tells where each of its figures is from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import tables
from circumstances import circumstances, note


def test_the_page_is_what_the_result_files_say() -> None:
    tables.main(["--check"])


def test_another_page_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PAGE", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(tables.page() + "better figures", encoding="utf-8")
    with pytest.raises(SystemExit, match="is not what the result files say"):
        tables.main(["--check"])


def test_every_sitting_is_told() -> None:
    rows = [{**circumstances(), "time": f"2026-11-2{day}T10:00:00", "commit": f"c{day}", "seed": day} for day in (3, 4)]
    said = tables.measured_on(rows)
    assert "2026-11-23 to 2026-11-24" in said
    assert "commit c3, c4; seeds 3, 4" in said


def test_what_was_not_measured_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "HERE", tmp_path)
    assert "Not measured yet: `python benchmarks/events.py`." in tables.page()
    note(tmp_path / "events.jsonl", {"model": "net", "error": "RuntimeError: oh", **circumstances()})
    assert "| net | fails: RuntimeError: oh |" in tables.page()

"""The page as a file: what stands in it, that it is whole, and that texts of runs stay texts."""

from __future__ import annotations

import base64
import builtins
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from sweep_runs import EVIL, evil_sweep, needs_report, summary, write_run, write_sweep

from lightning_prune.cli.report import report
from lightning_prune.sweeps import page, read_runs, seed_groups, write_report
from lightning_prune.sweeps.figures import datasets, front_figure, fronts
from lightning_prune.sweeps.rows import table
from lightning_prune.sweeps.run_figures import run_figures

pytestmark = needs_report


class Parsed(HTMLParser):
    """The tags of a page, its texts, and the contents of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: dict[str | None, str] = {}
        self.open: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.open.append(dict(attrs).get("id"))

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.scripts[self.open[-1]] = data
        else:
            self.texts.append(data)

    def figures(self) -> dict[str, Any]:
        return json.loads(gzip.decompress(base64.b64decode(self.scripts["figures"])))


def texts_in(values: Any) -> list[str]:
    """Return all texts in plain data; keys are none."""
    if isinstance(values, dict | list):
        inner = values.values() if isinstance(values, dict) else values
        return [text for each in inner for text in texts_in(each)]
    return [values] if isinstance(values, str) else []


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> Parsed:
    folder = write_sweep(tmp_path_factory.mktemp("sweep"))
    return Parsed(write_report([folder], folder / "report").page.read_text(encoding="utf-8"))


def test_the_page_asks_for_nothing(parsed: Parsed) -> None:
    links = [attributes[name] for _, attributes in parsed.tags for name in ("src", "href") if name in attributes]
    assert all(link is not None and link.startswith(("#", "data:")) for link in links)
    (policy,) = [each["content"] for _, each in parsed.tags if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none';")


def test_the_policy_names_the_scripts_of_the_page(parsed: Parsed) -> None:
    plotly = gzip.decompress(base64.b64decode(parsed.scripts["plotly"]))
    assert b"plotly.js" in plotly[:100]
    (policy,) = [each["content"] for _, each in parsed.tags if each.get("http-equiv") == "Content-Security-Policy"]
    expected = {
        base64.b64encode(hashlib.sha256(script).digest()).decode() for script in (plotly, parsed.scripts[None].encode())
    }
    assert set(re.findall(r"'sha256-([^']+)'", policy or "")) == expected


def test_each_run_has_a_view_and_a_row(parsed: Parsed) -> None:
    views = {each["id"] for tag, each in parsed.tags if tag == "main" and each.get("class") == "run"}
    links = {each["href"] for tag, each in parsed.tags if tag == "a" and "#run=" in (each["href"] or "")}
    assert len(views) == 36
    assert {f"#{str(view).replace('run-', 'run=')}" for view in views} == links
    assert set(parsed.figures()["runs"]) == {str(view).removeprefix("run-") for view in views}


def test_texts_of_runs_stay_texts(tmp_path: Path) -> None:
    written = write_report([evil_sweep(tmp_path)], tmp_path / "report")
    parsed = Parsed(written.page.read_text(encoding="utf-8"))
    assert [each.get("id") for tag, each in parsed.tags if tag == "script"] == ["plotly", "figures", None]
    assert not [each for tag, each in parsed.tags if tag == "img" or any(name.startswith("on") for name in each)]
    assert sum(EVIL in text for text in parsed.texts) > 10
    drawn = [text for text in texts_in(parsed.figures()) if "window.hacked" in text]
    assert len(drawn) > 10
    assert not [text for text in drawn if "<script" in text or "<img" in text]


def test_plotly_knows_every_word_of_the_figures(tmp_path: Path) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    groups = seed_groups(read_runs([write_sweep(tmp_path)]).runs)
    drawn = [front_figure(groups, name, means) for name in ("macs", "batch_1") for means in (True, False)]
    for figure in [*drawn, *run_figures(groups[0].runs[0]).values()]:
        assert graph_objects.Figure(figure).data


def test_the_front_is_drawn_through_the_best(tmp_path: Path) -> None:
    for name, ratio, end in (("a", 0.5, 0.9), ("b", 0.7, 0.8), ("c", 0.6, 0.7)):
        write_run(tmp_path / name, summary(ratio, accuracy={"end": end}), metrics=False)
    groups = seed_groups(read_runs([tmp_path]).runs)
    line, marks = front_figure(groups, "macs", False)["data"]
    assert (line["x"], line["y"]) == ([765_000, 1_275_000], [0.8, 0.9])
    assert len(marks["x"]) == 3
    assert ["macs" in fronts(groups)[group.id] for group in groups] == [True, True, False]


def test_equal_dense_twins_are_one_mark(tmp_path: Path) -> None:
    groups = seed_groups(read_runs([write_sweep(tmp_path)]).runs)
    (dense,) = [trace for trace in front_figure(groups, "macs", False)["data"] if trace["name"] == "dense twin"]
    assert sorted(dense["y"]) == pytest.approx([0.976, 0.978, 0.98])  # 12 runs have each of them


def test_means_carry_their_spread(tmp_path: Path) -> None:
    for seed, end in ((0, 0.9), (1, 0.94)):
        write_run(tmp_path / str(seed), summary(seed=seed, accuracy={"end": end}), metrics=False)
    _, marks = front_figure(seed_groups(read_runs([tmp_path]).runs), "macs", True)["data"]
    assert (marks["y"], marks["error_y"]["array"]) == ([pytest.approx(0.92)], [pytest.approx(0.0282843, abs=1e-7)])


def test_two_data_sets_have_a_front_each(tmp_path: Path) -> None:
    for data, end in (("digits", 0.99), ("cifar10", 0.8)):
        content = summary(accuracy={"end": end})
        content["choices"]["data"] = data
        write_run(tmp_path / data, content, metrics=False)
    groups = seed_groups(read_runs([tmp_path]).runs)
    assert list(datasets(groups)) == ["cifar10", "digits"]
    assert [row.front for row in table(groups).rows] == [("macs", "params", "batch_1", "batch_64")] * 2
    text = write_report([tmp_path], tmp_path / "report").page.read_text()
    assert '<select id="dataset"><option value="cifar10">' in text


def test_latencies_of_two_machines_are_told(tmp_path: Path) -> None:
    for name, processor in (("a", "x86_64"), ("b", "arm64")):
        write_run(tmp_path / name, summary(processor=processor), metrics=False)
    text = write_report([tmp_path], tmp_path / "report").page.read_text()
    assert "Latencies come from 2 machines (arm64, 1 thread; x86_64, 1 thread)" in text


def test_a_table_by_hand(tmp_path: Path) -> None:
    for seed, end in ((0, 0.9), (1, 0.94)):
        accuracy = {"end": end, "dense": 0.95}
        write_run(tmp_path / f"a{seed}", summary(0.5, seed, accuracy=accuracy, latency_ms={}), metrics=False)
    write_run(tmp_path / "b", summary(0.9, 0, accuracy={"end": 0.5}, latency_ms={}, sparsity=0.25), metrics=False)
    found = table(seed_groups(read_runs([tmp_path]).runs))
    columns = ["pruning_ratio", "accuracy, %", "against dense", "MACs", "params", "zeros"]
    assert [column.name for column in found.columns] == columns
    first, last = found.rows
    assert [cell.text for cell in first.cells] == ["0.5", "92.00 ± 2.83", "−3.00 ± 2.83", "1.28 M", "136 k", ""]  # noqa: RUF001
    assert [cell.text for cell in last.cells] == ["0.9", "50.00", "", "255 k", "27.2 k", "25.00"]
    assert [first.label, *(run.label for run in first.runs)] == ["2 seeds", "seed 0", "seed 1"]
    assert found.facets == {"method.pruning_ratio": ("0.5", "0.9")}


def test_the_page_is_the_same_when_it_is_written_again(tmp_path: Path) -> None:
    write_run(tmp_path / "0")
    first = write_report([tmp_path], tmp_path / "report").page.read_bytes()
    assert write_report([tmp_path], tmp_path / "report").page.read_bytes() == first


@pytest.mark.parametrize("missing", ["plotly", "jinja2"])
def test_what_is_missing_is_named_with_the_way_out(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imports = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return imports(name, *arguments, **more)

    page._plotly.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    write_run(tmp_path / "0", metrics=False)
    with pytest.raises(SystemExit, match="2"):
        report([str(tmp_path)])
    assert "pip install 'lightning-prune[report]'" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_many_layers_stand_upright_and_of_many_cuts_the_ends_are_told(tmp_path: Path) -> None:
    content = summary()
    content["widths"] = {f"layer{i}": {"dense": 8, "pruned": 4} for i in range(200)}
    content["events"] = [{**content["events"][0], "step": step, "epoch": step} for step in range(100)]
    write_run(tmp_path / "0", content)
    written = write_report([tmp_path], tmp_path / "report")
    figures = run_figures(written.sweep.runs[0])
    assert figures["widths"]["data"][1]["y"] == [4] * 200
    assert len(figures["widths"]["layout"]["xaxis"]["ticktext"]) < 80
    assert len(figures["curves"]["layout"]["shapes"]) == len(figures["scales"]["layout"]["shapes"]) == 60
    assert len(figures["curves"]["data"][-1]["x"]) == 100
    text = written.page.read_text()
    assert text.count("<small>channels</small>") == 20
    assert "80 more" in text

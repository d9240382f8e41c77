"""The Pareto benchmark: what is missing or failed stands in its table, and no mean hides it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import pareto
import pareto_ways
from circumstances import note, noted
from pareto_peers import kirigami, torch_pruning
from pareto_picture import draw
from pareto_table import cells_of, table, verdict
from pareto_tasks import TASKS, Bench, Job, least_ratio
from pareto_ways import WAYS

Row = dict[str, object]


def row(
    way: str, accuracy: float, *, seed: int = 0, task: str = "lenet5", target: float = 0.5, beyond: float = 0.0
) -> Row:
    figures = {
        "removed": target + beyond,
        "params": 1e3,
        "ms, batch 1": 1.0,
        "ms, batch 64": 2.0,
        "seconds": 3.0,
        "MiB": 4.0,
    }
    return {"task": task, "seed": seed, "target": target, "way": way, "accuracy": accuracy, **figures}


def failed(way: str, reason: str, *, seed: int = 0, kind: str = "failed") -> Row:
    return {"task": "lenet5", "seed": seed, "target": 0.5, "way": way, kind: reason}


ROWS = [
    *(row("magnitude", 98.0 + seed, seed=seed) for seed in range(3)),
    *(row("TP magnitude", 95.0 + seed, seed=seed) for seed in range(2)),
    failed("TP magnitude", "ZeroDivisionError: oh", seed=2),
    failed("kirigami magnitude", "torch-kirigami is not installed", kind="skipped"),
]


def test_means_over_fewer_seeds_say_so() -> None:
    lines = table(ROWS).splitlines()
    (line,) = (line for line in lines if line.startswith("| TP magnitude"))
    assert "without seed 2" in line
    assert "ZeroDivisionError: oh" in line
    assert "95.50 ± 0.71" in line
    (whole,) = (line for line in lines if line.startswith("| magnitude"))
    assert "without" not in whole
    assert "99.00 ± 1.00" in whole


def test_a_peer_that_is_not_installed_stands_in_the_table_by_name() -> None:
    assert "| kirigami magnitude | torch-kirigami is not installed |" in table(ROWS)


def test_the_table_tells_what_all_of_it_took() -> None:
    minutes = [row("magnitude", 98.0, seed=seed) | {"seconds": 90.0} for seed in range(4)]
    assert table(minutes).endswith("\n\nAll fits together took 6 CPU minutes.")


def test_what_was_measured_again_replaces_what_failed() -> None:
    again = [*ROWS, row("TP magnitude", 97.0, seed=2)]
    assert cells_of(again)["lenet5", 0.5]["TP magnitude"].values("accuracy") == [95, 96, 97]
    assert "without seed" not in table(again)


def test_the_verdict_counts_in_standard_errors() -> None:
    ahead = verdict(cells_of(ROWS[:5]))
    assert "| lenet5, 50% | magnitude | 99.00 ± 0.58 | TP magnitude | 95.50 ± 0.50 | +3.50 ± 0.76 |" in ahead
    assert "Of 1 comparisons, better by more than a standard error in 1, worse by more than one in 0." in ahead
    masks = [row("ModelPruning", 99.9, seed=seed) for seed in range(3)]  # its MACs do not fall
    assert verdict(cells_of([*ROWS[:5], *masks])) == ahead


def test_those_that_know_the_cost_are_held_to_what_was_asked_for_in_the_mean() -> None:
    near = [row("Fisher by cost", 98.0, beyond=0.03), row("Fisher by cost", 98.0, seed=1, beyond=-0.01)]
    far = [row("Taylor by cost", 98.0, beyond=0.021), row("Taylor", 98.0, beyond=0.5)]
    said = verdict(cells_of([*near, *far]))
    assert said.endswith("within 2 points of it in 1 of 2 cells; not Taylor by cost on lenet5 at 50% (+2.1).")
    assert verdict(cells_of(near)).endswith("within 2 points of it in 1 of 1 cells.")


def test_the_picture(tmp_path: Path) -> None:
    draw(ROWS, tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


def test_it_goes_on_where_it_stopped_and_tries_again_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ran = tmp_path / "it.jsonl", list[pareto.Key]()

    def measured(cell: pareto.Key, asked: pareto.Run) -> Row:
        ran.append(cell)
        return row(cell[3], 90.0, target=cell[2])

    monkeypatch.setattr(pareto, "_in_a_process", measured)
    note(out, row("magnitude", 98.0))
    note(out, failed("random", "RuntimeError: no"))
    with out.open("a") as lines:
        lines.write('{"task": "lenet5", "se')  # killed while it wrote
    asked = pareto.Run(tmp_path, tmp_path, out, 1, 60, ["lenet5"], [0], [0.5], ["magnitude", "random"])
    pareto.run(asked)
    assert ran == [("lenet5", 0, 0.0, "dense"), ("lenet5", 0, 0.5, "random")]
    pareto.run(asked)
    assert len(ran) == 2
    assert "| random | 90.00 |" in table(noted(out))


def test_a_cell_that_fails_leaves_its_row_with_the_error(tmp_path: Path) -> None:
    asked = pareto.Run(tmp_path / "nothing", tmp_path, tmp_path / "it.jsonl", 1, 120)
    found = pareto._in_a_process(("lenet5", 0, 0.5, "magnitude"), asked)
    assert str(tmp_path / "nothing") in str(found["failed"])
    assert found["way"] == "magnitude"


def test_a_peer_that_is_missing_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pareto_ways, "installed", lambda package: None)
    asked = pareto.Run(tmp_path, tmp_path, tmp_path / "it.jsonl", 1, 60)
    found = pareto._in_a_process(("resnet20", 0, 0.5, "TP Taylor"), asked)
    assert found["skipped"] == "torch-pruning is not installed"
    assert pareto._in_a_process(("lenet5", 0, 0.5, "slimming"), asked)["skipped"] == "the net has no BatchNorm"


def test_no_results_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no results"):
        pareto.main(["--table", "--out", str(tmp_path / "none.jsonl")])


def test_the_smallest_ratio_that_reaches_a_target() -> None:
    assert least_ratio(lambda ratio: ratio**2, 0.25) == 0.5
    found = least_ratio(lambda ratio: ratio**2, 0.5)
    assert found**2 >= 0.5 > (found - 1 / 256) ** 2


class Untrained(Job):
    """A job whose nets nobody trains, on made-up images."""

    def dense(self) -> nn.Module:
        torch.manual_seed(0)
        return self.task.make()

    def batches(self, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.randn(4, 1, 28, 28), torch.arange(4)) for _ in range(count)]

    def train(self, net: nn.Module, callbacks: object = ()) -> nn.Module:
        return net


PEERS = {
    "TP magnitude": torch_pruning,
    "TP Taylor": torch_pruning,
    "kirigami magnitude": kirigami,
    "kirigami Taylor": kirigami,
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("way", PEERS)
def test_peers_reach_the_macs(way: str, task: str, tmp_path: Path) -> None:
    pytest.importorskip("torch_kirigami" if "kirigami" in way else "torch_pruning")
    job = Untrained(Bench(tmp_path, tmp_path), TASKS[task], 0, 0.5)
    net = WAYS[way].run(job)
    assert 0.5 <= job.removed(net) < 0.58
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)

"""The overhead benchmark: what it times, what its table says, and that what fails stands in a row of its own."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import overhead
import overhead_ways
from circumstances import noted
from overhead import measured, ratios, table
from overhead_ways import MOMENTUM, WAYS, Way
from steps_on_noise import Classifier, Clock, HookClock, fitted

# Lightning, where a fit is as short as these
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '[a-z_]*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

LATE = 0.02
"""Seconds that a callback here works."""


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 4), nn.BatchNorm2d(8)),
            *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.fc = nn.Linear(8, 10)


def work() -> None:
    start = time.process_time()
    while time.process_time() < start + LATE:
        pass


class Slow(pl.Callback):
    """Works in every step, once before the first, and for three times as long at an event."""

    def on_fit_start(self, *_: Any) -> None:
        work()

    def on_before_optimizer_step(self, *_: Any) -> None:
        work()

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        for _step in range(3 * trainer.current_epoch):
            work()


def run(step: float, bare: float, **more: float) -> dict[str, float]:
    return {"step": step, "bare": bare, "hooks": 0.01, "before": 2.0, **more}


ROWS: list[dict[str, Any]] = [
    {"model": "small", "way": "BNSlimmingCallback", "runs": [run(1.1, 1.0, event=3.0), run(4.0, 4.0, event=3.0)]},
    {"model": "small", "way": "FisherPruneCallback", "runs": [run(1.04, 1.0, event=0.5)]},
    {"model": "small", "way": "ModelPruning", "runs": [run(2.0, 1.0)]},
    {"model": "small", "way": "RigLCallback", "error": "RuntimeError: oh"},
    {"model": "small", "way": "Torch-Pruning, BNScalePruner", "skipped": "torch-pruning is not installed"},
]


@pytest.mark.parametrize("name", WAYS)
def test_every_callback_trains_and_has_its_event(name: str) -> None:
    row = measured(Net(), name, rounds=1)
    if "skipped" in row:
        pytest.skip(row["skipped"])
    assert "error" not in row
    assert row["runs"][0]["step"] > 0
    assert row["runs"][0]["bare"] > 0
    assert ("event" in row["runs"][0]) == (WAYS[name].event is not None)
    if WAYS[name].event is not None:
        assert row["runs"][0]["event"] > 1e-4


def test_steps_events_and_what_comes_before_are_told_apart() -> None:
    found = fitted(Net(), MOMENTUM, 6, lambda _: [Slow()], "on_train_epoch_start")
    assert LATE < found["hooks"] < 1.5 * LATE
    assert LATE < found["before"] < 2 * LATE
    assert 3 * LATE < found["event"] < 4.5 * LATE
    assert found["step"] > LATE + fitted(Net(), MOMENTUM, 6, lambda _: [])["step"] / 2


def test_only_steps_of_the_first_epoch_count_and_the_first_of_them_does_not() -> None:
    clock = Clock()
    clock.starts = [0.0, 10.0, 11.0, 13.0, 14.0]
    assert clock.step == 1.0
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[again := Clock()], **quiet)
    trainer.fit(Classifier(Net(), MOMENTUM, 4))
    assert len(again.starts) == 4


def test_the_event_is_the_longest_call_and_not_what_comes_before() -> None:
    callback = Slow()
    clock = HookClock(callback)
    clock.calls.update(on_train_start=[5.0], on_fit_start=[1.0], on_train_batch_start=[2.0, 0.1, 0.3, 0.2])
    assert clock.before(None) == 8.0
    assert clock.before("on_train_start") == 3.0
    assert clock.at("on_train_start") == 5.0
    assert clock.step() == pytest.approx(0.2)


def test_what_fails_and_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: pl.LightningModule) -> list[pl.Callback]:
        raise RuntimeError("oh\nwell")

    monkeypatch.setitem(overhead_ways.WAYS, "broken", Way(broken))
    monkeypatch.setitem(overhead_ways.WAYS, "absent", Way(broken, peer="no-such-package"))
    assert measured(Net(), "broken", 1) == {"error": "RuntimeError: oh"}
    assert measured(Net(), "absent", 1) == {"skipped": "no-such-package is not installed"}


def test_the_table_tells_medians_in_steps_and_which_aims_are_missed() -> None:
    said = table(ROWS)
    assert ratios(ROWS[0]) == [1.1, 1.0]
    assert "small, ms of a bare step 1000 (1000 to 1750):" in said
    assert "| BNSlimmingCallback | 1.050 (1.025 to 1.075) | 0.62 (0.44 to 0.81) | 1.88 (1.31 to 2.44) |" in said
    assert "| ModelPruning | 2.000 | 1.00 |  | 2.00 |  |" in said
    assert "| RigLCallback | fails: RuntimeError: oh |" in said
    assert "| Torch-Pruning, BNScalePruner | torch-pruning is not installed |" in said
    assert said.endswith("in 1 of 2 rows that have one; above it: BNSlimmingCallback on small (1.050).")


def test_it_goes_on_and_tries_again_what_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def once(net: nn.Module, way: str, rounds: int) -> dict[str, Any]:
        asked.append(way)
        return {"error": "RuntimeError: oh"} if len(asked) == 1 else {"runs": [run(1.0, 1.0)] * rounds}

    monkeypatch.setattr(overhead, "measured", once)
    out = tmp_path / "overhead.jsonl"
    logger = logging.getLogger("lightning.pytorch")
    threads, level = torch.get_num_threads(), logger.level
    try:
        for _ in range(2):
            overhead.main(["resnet18", "--ways", "ModelPruning", "SparsityMonitor", "--rounds", "2", "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
        logger.setLevel(level)
    assert asked == ["ModelPruning", "SparsityMonitor", "ModelPruning"]
    assert [("error" in row, len(row.get("runs", []))) for row in noted(out)] == [(True, 0), (False, 2), (False, 2)]
    assert "fails" not in capsys.readouterr().out.split("ms of a bare step")[-1]

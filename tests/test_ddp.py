"""Several processes: one plan, one network, and an error on all of them where they disagree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ddp_fits
import ddp_started
import pytest
import torch.nn.functional as F
from fits import EXAMPLE, Module, images, trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_prune.callbacks import MagnitudePruneCallback
from lightning_prune.criteria import Fisher, score_groups
from lightning_prune.graph import read

FAILING = {name: None for name in ddp_fits.FITS if name.startswith("a rank")}
REFUSED = "static graph by hand"
SIGNAL = "fisher's signal"
PARTS = "gates in parts"
GATED = [name for name in ddp_fits.FITS if name.startswith("gates") and name != PARTS]
ENDED = [name for name in ddp_fits.FITS if name not in (*FAILING, *GATED, REFUSED, SIGNAL, PARTS)]

Ranks = tuple[dict[str, Any], dict[str, Any]]


def run_alone(*arguments: str, cwd: Path) -> None:
    """Run a script in a Python process of its own, without what pytest has set."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "MASTER", "LOCAL_RANK"))}
    ran = subprocess.run(
        [sys.executable, *arguments],
        env={**clean, "PYTHONPATH": paths},
        cwd=cwd,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What became of all fits, on both ranks; they run once, for the processes take long to start."""
    folder = tmp_path_factory.mktemp("ddp")
    run_alone(ddp_fits.__file__, str(folder), cwd=folder)
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    return first, second


@pytest.mark.parametrize("name", ENDED)
def test_ranks_end_with_the_same_network(ranks: Ranks, name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert "unexpected" not in first, first
    assert {**first, "took": 0} == {**second, "took": 0}
    assert sum(first["widths"]) == 8
    assert first["finite"]
    assert len(first["cuts"]) == (1 if name in ("slimming", "random") else 2)


@pytest.mark.parametrize("name", GATED)
def test_gates_and_their_samples_are_the_same_on_all_ranks(ranks: Ranks, name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert "unexpected" not in first, first
    assert {**first, "took": 0} == {**second, "took": 0}
    assert len(first["alphas"]) == 18
    assert len(set(first["alphas"])) > 12
    assert len(set(first["noises"])) == len(first["noises"])
    assert sum(first["widths"]) <= 8
    assert len(first["cuts"]) == 3


@pytest.mark.parametrize("goal", ddp_fits.GOALS)
def test_gates_on_two_ranks_are_those_of_one_process_with_the_whole_batch(ranks: Ranks, goal: str) -> None:
    alone = ddp_fits.parted(1, **ddp_fits.GOALS[goal])
    assert len(alone["11"]) > len(alone["17"]) > len(alone["21"])
    for rank in ranks:
        assert "unexpected" not in rank[PARTS], rank[PARTS]
        for step, values in alone.items():
            assert rank[PARTS][goal][step] == pytest.approx(values, abs=1e-5), step


@pytest.mark.parametrize("name", [*(name for name in ENDED if name != "resumed"), *GATED])
def test_all_parameters_are_trained_after_the_cut(ranks: Ranks, name: str) -> None:
    assert all(rank[name]["all parameters move"] for rank in ranks)


def test_a_resumed_fit_is_the_unbroken_one(ranks: Ranks) -> None:
    assert all(all(rank["resumed"]["resumed"].values()) for rank in ranks)


def test_the_signal_is_that_of_all_ranks_together(ranks: Ranks) -> None:
    net, fisher = Module().net.eval(), Fisher()
    with fisher.gathering(net, EXAMPLE):
        for inputs, labels in images():
            F.cross_entropy(net(inputs), labels).backward()
            fisher.take()
    for name, scores in score_groups(fisher, net, read(net, EXAMPLE).groups).items():
        for rank in ranks:
            assert rank[SIGNAL]["scores"][f"net.{name}"] == pytest.approx(scores.tolist(), rel=1e-5)


def test_steps_are_cut_outside_of_accumulation_windows(ranks: Ranks) -> None:
    assert ranks[0]["on steps"]["cuts"] == [[1, 5], [2, 8]]
    assert ranks[0]["on steps, accumulated"]["cuts"] == [[2, 5], [4, 8]]


@pytest.mark.parametrize(
    ("name", "others", "own"),
    [
        ("a rank that fails", "PruningError: Nothing was cut: rank 1 failed: no sc", "RuntimeError: no scores on this"),
        ("a rank with another plan", "PruningError: Nothing was cut: ranks 0 and 1 have different plans", None),
        ("a rank with another network", "PruningError: Nothing was cut: ranks 0 and 1 hold different networks", None),
    ],
)
def test_what_goes_wrong_on_one_rank_is_an_error_on_both(ranks: Ranks, name: str, others: str, own: str | None) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first["error"].startswith(others)
    assert second["error"].startswith(own or others)
    assert max(first["seconds"], second["seconds"]) < 30


def test_a_static_graph_by_hand_is_refused(ranks: Ranks) -> None:
    assert all("static_graph=True the ranks drift apart" in rank[REFUSED]["error"] for rank in ranks)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes_that_lightning_starts_bring_the_cut_back(method: str, tmp_path: Path) -> None:
    run_alone(ddp_started.__file__, method, "held.json", cwd=tmp_path)
    assert json.loads((tmp_path / "held.json").read_text()) == {"widths": [4, 4], "cuts": 1, "shape": [2, 4]}


def test_without_the_mixin_they_are_refused_with_the_way_out() -> None:
    made = trainer(devices=2, strategy=DDPStrategy(start_method="fork"))
    made.strategy._configure_launcher()
    with pytest.raises(
        MisconfigurationException, match=r"start_method='fork'.*Use strategy='ddp', or let Module inherit"
    ):
        MagnitudePruneCallback(0.5).setup(made, Module(), "fit")

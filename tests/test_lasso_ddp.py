"""Reconstruction on several processes: one choice, one refit from what all have seen, and an error on all or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lasso_ddp_fits
import pytest
import torch
from fits import Module, images
from lasso_ddp_fits import WHOLE
from torch import Tensor

from lightning_prune import history_of, reconstruct

FAILING = [name for name in lasso_ddp_fits.FITS if "fails" in name or "NaN" in name or "on 1 batch" in name]
ENDED = [name for name in lasso_ddp_fits.FITS if name not in FAILING]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks have written what became of all fits; they run once, for the processes take long to start."""
    there = tmp_path_factory.mktemp("ddp")
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "MASTER", "LOCAL_RANK"))}
    ran = subprocess.run(
        [sys.executable, lasso_ddp_fits.__file__, str(there)],
        env={**clean, "PYTHONPATH": paths},
        cwd=there,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return there


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", ENDED)
def test_ranks_end_with_the_same_network(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert "unexpected" not in first, first
    assert {**first, "took": 0} == {**second, "took": 0}
    assert sum(first["widths"]) == 8
    assert first["finite"]
    assert len(first["cuts"]) == 1


def test_two_ranks_find_what_one_process_finds_that_sees_all(ranks: list[dict[str, Any]], folder: Path) -> None:
    found = [torch.load(folder / f"together{rank}.pt", weights_only=True) for rank in (0, 1)]
    seen = [batch for rank in found for batch in rank["seen"]]
    assert sum(map(len, seen)) == 48
    assert not torch.equal(found[0]["seen"][0], found[1]["seen"][0])
    alone = Module().eval()
    reconstruct(alone, seen, pruning_ratio=0.5, of="channels", reconstruction=WHOLE)
    assert repr(history_of(alone)[0].kept) == ranks[0]["together"]["kept"][0]
    assert_near(found[0]["state"], alone.state_dict())


@pytest.mark.parametrize("batches", [6, 5])
def test_without_a_fit_too(folder: Path, batches: int) -> None:
    """Of 5 batches one rank has more than the other."""
    alone = Module().eval()
    seen = [batch[0] for batch in images()][:batches]
    reconstruct(alone, seen, pruning_ratio=0.5, of="channels", reconstruction=WHOLE)
    for rank in (0, 1):
        found = torch.load(folder / f"validated{batches}of{rank}.pt", weights_only=True)
        assert_near(found, alone.state_dict())


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-5), name


@pytest.mark.parametrize("name", ["lasso after two epochs", "norms astray", "averaged"])
def test_the_ranks_draw_the_same_plan_up(ranks: list[dict[str, Any]], name: str) -> None:
    """Although norms have seen other images on each: else the moments would be those of two networks."""
    if name not in ranks[0]:
        pytest.skip("this Lightning has no EMAWeightAveraging")
    assert ranks[0][name]["plans"] == ranks[1][name]["plans"]
    assert ranks[0][name]["plans"][-1] == ranks[0][name]["kept"][0]


def test_averaged_copies_stay_the_same_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    if "averaged" not in ranks[0]:
        pytest.skip("this Lightning has no EMAWeightAveraging")
    assert ranks[0]["averaged"]["copies"] == ranks[1]["averaged"]["copies"]
    assert len(ranks[0]["averaged"]["copies"]) == 1


NO_BATCH = "LassoPruneCallback got no batch to look at on rank 1 of 2. Pass a few thousand images in batches"


@pytest.mark.parametrize("name", FAILING)
def test_what_goes_wrong_on_one_rank_is_an_error_on_both(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    own = {
        "NaN on one rank": "PruningError: net.3 reads or returns NaN",
        "a loader that fails on one rank": "OSError: the disk is gone",
        "validated on 1 batch": f"PruningError: {NO_BATCH}",
        "validated on 1 batch without example": f"PruningError: {NO_BATCH}",
    }.get(name, "RuntimeError: out of memory")
    assert second["error"].startswith(own)
    assert first["error"].startswith(f"PruningError: Nothing was cut: rank 1 failed: {own.partition(': ')[2]}")
    assert first.get("widths") in (None, [8, 8])
    assert max(first["seconds"], second["seconds"]) < 30

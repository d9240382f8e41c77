"""Masks on two processes: the same ones, the same weights, and an error on both where one fails.

This file is also the program that both processes run: python test_mask_ddp.py <folder>
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from ddp_fits import Shuffled, ddp, fit, hashed, outcome
from lightning.pytorch.callbacks import Callback
from masked import Exact, is_exact, masked
from torch.optim import AdamW

from lightning_prune.callbacks import Retraining
from lightning_prune.callbacks.masking import MaskProposal
from lightning_prune.masks.held import masks_of, packed_bits, sparsity
from lightning_prune.schedules import linear

WHOLE = Retraining(lr_factor=0.5, rewind_to=2, alternate=[["net.0", "net.3"], ["net.8"]])

gradual = partial(masked, 0.85, schedule=linear, begin=0, end=4, retraining=WHOLE)


class Drifts(Callback):
    """Ranks whose weights differ would choose other masks each: here they do, by hand."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1 and trainer.global_rank == 1:
            with torch.no_grad():
                pl_module.net[3].weight.copy_(pl_module.net[3].weight.flip(0))  # type: ignore[operator,union-attr,index]


class Fails(Callback):
    """On one rank, a weight is no number when the second event comes."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 2 and trainer.global_rank == 1:
            pl_module.net[3].weight.data[0, 0, 0, 0] = float("nan")  # type: ignore[operator,union-attr,index]


class Deceived(Callback):
    """On one rank, masks arrive with as many weights in other places."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == 1 and trainer.current_epoch == 2:
            own = trainer.strategy.broadcast

            def wrong(sent: Any, src: int = 0) -> Any:
                right = own(sent, src)
                if not isinstance(right, MaskProposal):
                    return right
                return MaskProposal({name: mask.flip(0) for name, mask in right.masks.items()})

            trainer.strategy.broadcast = wrong  # type: ignore[method-assign]


def result(module: pl.LightningModule, made: pl.Trainer, look: Exact) -> dict[str, Any]:
    masks = masks_of(module)
    return outcome(module, made) | {
        "masks": hashed({name: packed_bits(mask) for name, mask in masks.items()}),
        "sparsity": sparsity(masks),
        "exact": is_exact(module) and look.wrong == [],
        "rates": [group["lr"] for group in made.optimizers[0].param_groups],
    }


def plain(folder: Path, *others: Callback, **settings: Any) -> dict[str, Any]:
    module, look = Shuffled(partial(AdamW, lr=0.01)), Exact()
    return result(module, fit(module, *others, gradual(), look, **settings), look)


def failing(*others: Callback) -> dict[str, Any]:
    module, start = Shuffled(), time.monotonic()
    try:
        fit(module, *others, gradual())
    except Exception as error:
        return {
            "error": f"{type(error).__name__}: {error}",
            "seconds": time.monotonic() - start,
            "sparsity": sparsity(masks_of(module)),
        }
    return {"error": None}


FITS = {
    "plain": plain,
    "accumulated": partial(plain, accumulate_grad_batches=2, strategy=ddp(gradient_as_bucket_view=True)),
    "drifting": lambda folder: plain(folder, Drifts()),
    "failing": lambda folder: failing(Fails()),
    "deceived": lambda folder: failing(Deceived()),
}

Ranks = tuple[dict[str, Any], dict[str, Any]]


def main() -> None:
    """Run all fits, one after the other."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, results = Path(sys.argv[1]), {}
    for name, run in FITS.items():
        try:
            results[name] = run(folder)
        except Exception as error:
            results[name] = {"unexpected": f"{type(error).__name__}: {error}"}
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        (folder / f"rank{rank}.json").write_text(json.dumps(results), encoding="utf-8")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What became of all fits, on both ranks."""
    folder, here = tmp_path_factory.mktemp("ddp"), Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "MASTER", "LOCAL_RANK"))}
    command = [sys.executable, __file__, str(folder)]
    ran = subprocess.run(
        command, env={**clean, "PYTHONPATH": paths}, cwd=folder, timeout=300, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    return first, second


@pytest.mark.parametrize("name", ["plain", "accumulated"])
def test_ranks_end_with_the_same_masks_and_weights(ranks: Ranks, name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert "unexpected" not in first, first
    assert first == second
    assert first["exact"]
    assert first["finite"]
    assert first["sparsity"] > 0.6
    assert sum(first["widths"]) < 16
    assert first["rates"] == [0.005]


def test_the_first_ranks_masks_are_those_of_both(ranks: Ranks) -> None:
    first, second = (rank["drifting"] for rank in ranks)
    assert "unexpected" not in first, first
    assert first["masks"] == second["masks"]
    assert first["exact"]
    assert second["exact"]


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("failing", "PruningError: Nothing was cut: rank 1 failed: The weight of 'net.3' holds NaN", "ScoreError: The"),
        ("deceived", "PruningError: Nothing was cut: ranks 0 and 1 have different plans", "PruningError: Nothing was"),
    ],
)
def test_what_goes_wrong_on_one_rank_is_an_error_on_both(ranks: Ranks, name: str, first: str, second: str) -> None:
    found = [rank[name] for rank in ranks]
    assert found[0]["error"].startswith(first)
    assert found[1]["error"].startswith(second)
    assert max(one["seconds"] for one in found) < 60
    assert found[0]["sparsity"] == found[1]["sparsity"] > 0  # that of the event before


if __name__ == "__main__":
    main()

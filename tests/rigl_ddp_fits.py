"""Fits on two processes that exchange weights; each rank writes what became of them. Run by test_rigl_beside.py.

python rigl_ddp_fits.py <folder>
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from ddp_fits import ByHand, Shuffled, ddp, fit, hashed
from test_rigl import Watch, kept, sparse
from torch.optim import AdamW

from lightning_prune.masks.held import masks_of


def exchanging(module: Callable[[], pl.LightningModule] = Shuffled, grow: Any = "gradient", **settings: Any) -> Any:
    def run() -> dict[str, Any]:
        net, watch = module(), Watch()
        fit(net, sparse(grow=grow), watch, max_epochs=8, **settings)
        return {
            "weights": hashed(dict(net.named_parameters())),
            "masks": hashed(dict(masks_of(net))),
            "kept": kept(net),
            "exchanges": len(watch.changed),
            "zero": all(watch.zero),
        }

    return run


FITS: dict[str, Callable[[], dict[str, Any]]] = {
    "rigl": exchanging(),
    "set": exchanging(grow="random"),
    "adamw": exchanging(partial(Shuffled, partial(AdamW, lr=0.01))),
    "by hand": exchanging(ByHand),
    "gradient_as_bucket_view": exchanging(strategy=ddp(gradient_as_bucket_view=True)),
    "static_graph": exchanging(strategy=ddp(static_graph=True)),
    "clipped": exchanging(gradient_clip_val=0.1),
}


def main() -> None:
    """Run all fits, one after the other."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, results = Path(sys.argv[1]), {}
    for name, run in FITS.items():
        try:
            results[name] = run()
        except Exception as error:
            results[name] = {"unexpected": f"{type(error).__name__}: {error}"}
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        (folder / f"rank{rank}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()

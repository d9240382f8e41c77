"""A fit on two processes that Lightning starts; writes what this one holds afterwards. Run by test_ddp.py.

python ddp_started.py spawn|fork <file>

Run as a process of its own: torch refuses to train in a forked process once the one it is forked from has started
autograd's threads, as other tests do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from fits import Module, trainer, widths
from lightning.pytorch.strategies import DDPStrategy

from lightning_prune import history_of
from lightning_prune.callbacks import MagnitudePruneCallback, PrunedStateMixin


class Remembering(PrunedStateMixin, Module):
    """Its weights bring their shapes back from other processes."""


if __name__ == "__main__":
    module = Remembering(example=torch.zeros(2, 1, 6, 6))
    strategy = DDPStrategy(start_method=sys.argv[1], process_group_backend="gloo")  # type: ignore[arg-type]
    made = trainer(
        MagnitudePruneCallback(0.5, begin=1, end=1), max_epochs=2, devices=2, strategy=strategy, limit_val_batches=0
    )
    made.fit(module)
    outputs = module(torch.zeros(2, 1, 6, 6))
    held = {"widths": widths(module), "cuts": len(history_of(module)), "shape": list(outputs.shape)}
    Path(sys.argv[2]).write_text(json.dumps(held), encoding="utf-8")

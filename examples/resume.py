"""A fit is killed between two cuts and goes on from its last checkpoint, as if nothing had happened.

One sees that both networks, the one that was never interrupted and the one that was, are equal bit for bit. The second
is built dense, as ever: the checkpoint knows what was cut.
"""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune import history_of
from lightning_prune.callbacks import MagnitudePruneCallback
from lightning_prune.schedules import linear
from lightning_prune.workbench import Classifier, Digits, LeNet5


class PowerCut(pl.Callback):
    """Ends a fit in the middle of epoch 4."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int):
        if (trainer.current_epoch, batch_idx) == (4, 7):
            raise RuntimeError("the lights go out")


def fit(seed: int, *others: pl.Callback, ckpt_path: Path | None = None) -> pl.LightningModule:
    """Train, cut at epochs 2, 3, 4, 5 and 6, and train on."""
    torch.manual_seed(seed)
    net = LeNet5(in_channels=1, image_size=8, num_classes=10)
    model = Classifier(net, 10, optimizer=partial(torch.optim.AdamW, lr=2e-3))
    pruning = MagnitudePruneCallback(0.6, schedule=linear, begin=2, end=6)
    saving = ModelCheckpoint("checkpoints", save_last=True, enable_version_counter=False)
    trainer = pl.Trainer(max_epochs=8, accelerator="cpu", logger=False, callbacks=[pruning, saving, *others])
    trainer.fit(model, Digits(), ckpt_path=ckpt_path)
    return model


unbroken = fit(seed=0)
try:
    fit(0, PowerCut())
except RuntimeError as error:
    print(f"epoch 4: {error}")
resumed = fit(seed=1, ckpt_path=Path("checkpoints/last.ckpt"))  # other weights at first: the file brings its own

print(history_of(resumed)[-1])
pairs = zip(unbroken.state_dict().items(), resumed.state_dict().items(), strict=True)
print("equal bit for bit:", all(one == other and torch.equal(a, b) for (one, a), (other, b) in pairs))

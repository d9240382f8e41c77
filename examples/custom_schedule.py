"""A schedule of your own: a function from progress, 0 to 1, to the share of the pruning ratio, 0 to 1.

One sees what is asked at each epoch: half of it at once, the rest in equal steps.
"""

from functools import partial

import lightning.pytorch as pl
import torch

from lightning_prune import history_of
from lightning_prune.callbacks import MagnitudePruneCallback
from lightning_prune.workbench import Classifier, Digits, LeNet5


def half_at_once(progress: float) -> float:
    """(1 + t) / 2."""
    return (1 + progress) / 2


net = LeNet5(in_channels=1, image_size=8, num_classes=10)
model = Classifier(net, 10, optimizer=partial(torch.optim.AdamW, lr=2e-3))
pruning = MagnitudePruneCallback(0.6, schedule=half_at_once, begin=2, end=6)
trainer = pl.Trainer(max_epochs=8, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(model, Digits())
for record in history_of(model):
    print(f"epoch {record.epoch}: {record}")

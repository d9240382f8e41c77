"""Two processes train one network, and cut the same channels out of it: `python examples/ddp.py`.

One sees one record, for the processes draw up the cut together, and then that each of them holds the same weights. On
GPUs take accelerator="gpu" and as many devices as there are; nothing else changes.
"""

from functools import partial

import lightning.pytorch as pl
import torch

from lightning_prune import history_of
from lightning_prune.callbacks import MagnitudePruneCallback
from lightning_prune.schedules import linear
from lightning_prune.workbench import Classifier, Digits, LeNet5


def main() -> None:
    pl.seed_everything(0)  # the same weights everywhere
    net = LeNet5(in_channels=1, image_size=8, num_classes=10)
    model = Classifier(net, 10, optimizer=partial(torch.optim.AdamW, lr=2e-3))
    trainer = pl.Trainer(
        max_epochs=6,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[MagnitudePruneCallback(0.5, schedule=linear, begin=2, end=4)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, Digits())

    own = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    same = trainer.strategy.reduce_boolean_decision(torch.equal(own, trainer.strategy.broadcast(own)))
    if trainer.is_global_zero:
        print(history_of(model)[-1])
        print(f"{trainer.world_size} processes hold the same weights: {same}")


if __name__ == "__main__":  # each process runs this file
    main()

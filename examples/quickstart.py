"""The ten-line start: a prune callback in a Trainer."""

from functools import partial

import lightning.pytorch as pl
import torch

from lightning_prune import history_of
from lightning_prune.callbacks import BNSlimmingCallback, SparsityMonitor
from lightning_prune.workbench import Classifier, Digits, resnet20

model = Classifier(resnet20(1, 8), 10, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
slimming = BNSlimmingCallback(0.5, strength=2e-2, initial_scale=0.5, begin=3)
trainer = pl.Trainer(max_epochs=6, callbacks=[slimming, SparsityMonitor()])
trainer.fit(model, Digits())
print(history_of(model)[-1])

"""Halve a trained network without training it and without a label: LASSO chooses, least squares make up for it.

One sees the accuracy before and after, and beside it that of the same cut without the refit (He, Zhang, Sun 2017).
"""

from copy import deepcopy
from functools import partial

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_prune import Reconstruction, prune, reconstruct
from lightning_prune.workbench import Classifier, Digits, resnet20

pl.seed_everything(0)
digits, net = Digits(), resnet20(1, 8)
model = Classifier(net, 10, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
trainer = pl.Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(model, digits)  # let this be the network that somebody has given you

images = torch.cat([images for images, _ in digits.train_dataloader()])  # the labels are not looked at


def accuracy(net: nn.Module) -> float:
    """Share of the test digits that are told right."""
    with torch.no_grad():
        right = [net(images).argmax(1) == labels for images, labels in digits.test_dataloader()]
    return float(torch.cat(right).float().mean())


net.eval()
naive, refitted = deepcopy(net), deepcopy(net)
prune(naive, images[:2], pruning_ratio=0.5, of="macs")
done = reconstruct(refitted, images.split(64), speed_up=2, reconstruction=Reconstruction(images=1000))
print(done)
print(f"accuracy: dense {accuracy(net):.1%}, cut by magnitude {accuracy(naive):.1%}, refitted {accuracy(refitted):.1%}")

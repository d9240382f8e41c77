"""A criterion of your own: one class with one method, which gives each channel of a group a number, higher = keep.

One sees the network that it leaves. Any method takes it: callbacks, `prune` and `reconstruct`.
"""

from functools import partial

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_prune import ChannelGroup, history_of
from lightning_prune.callbacks import PruneCallback
from lightning_prune.criteria import Criterion, gather
from lightning_prune.workbench import Classifier, Digits, LeNet5


class InTimesOut(Criterion):
    """score_k = ||weights that make channel k|| * ||weights that read it||.

    Behind a ReLU a channel may come out c times larger and be read with weights c times smaller, and nothing has
    changed: nor has this score, where the norm of all weights has.
    """

    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        """Return one number per channel."""
        parameters = dict(model.named_parameters())
        squares = {0: torch.zeros(group.size), 1: torch.zeros(group.size)}
        for member in group.members:  # a member is one dimension of one tensor: 0 makes channels, 1 reads them
            if member.tensor in parameters:  # else it is a buffer
                weight = parameters[member.tensor].movedim(member.dim, 0)
                squares[member.dim] += gather(weight.reshape(len(weight), -1).square().sum(1), member)
        return (squares[0] * squares[1]).sqrt()


net, digits = LeNet5(in_channels=1, image_size=8, num_classes=10), Digits()
model = Classifier(net, 10, optimizer=partial(torch.optim.AdamW, lr=2e-3))
pruning = PruneCallback(0.5, criterion=InTimesOut(), begin=4)
trainer = pl.Trainer(max_epochs=8, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(model, digits)
trainer.test(model, digits)
print(history_of(model)[-1])

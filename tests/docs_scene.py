"""What the pages leave to their reader: a network, data, a Trainer that is in a hurry.

test_docs.py puts in front of a block those statements of this file that bind the names which the block uses and does
not bind itself.
"""

# ruff: noqa: E402, F401
from functools import partial, wraps

import lightning.pytorch as pl
import torch
from torch import nn

made_by = pl.Trainer.__init__


@wraps(made_by)
def in_haste(self, *given, **settings):
    """What a block does not say to a Trainer itself makes it quick and quiet."""
    quick = {"max_epochs": 3, "limit_train_batches": 4, "limit_val_batches": 1, "limit_test_batches": 1}
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    made_by(self, *given, **{**quick, **quiet, **settings})


pl.Trainer.__init__ = in_haste

from lightning_prune.flow import Flow
from lightning_prune.handlers.registry import Call, handles
from lightning_prune.workbench import Classifier, Digits, resnet20

aten = torch.ops.aten
images = torch.rand(2, 1, 8, 8)
labels = torch.tensor([3, 7])
datamodule = Digits(batch_size=32)
task_a = Digits(seed=0)
task_b = Digits(seed=1)


def build():
    """A dense network, as it was built for training."""
    net = resnet20(1, 8, width=0.25)
    return Classifier(
        net, 10, optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9), example=torch.zeros(2, 1, 8, 8)
    )


model = build()
module = build()
train_loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(torch.rand(256, 1, 8, 8), torch.randint(10, (256,))), batch_size=32
)
loader = train_loader
batches = list(train_loader)[:2]

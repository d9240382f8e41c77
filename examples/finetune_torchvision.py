"""Fine-tune a network of torchvision for a task of your own, and take half of its work away on the way.

One sees the groups of channels that a ResNet-18 has, two cuts along a cubic curve, and what is left: a plain
torchvision ResNet with half of the multiply-accumulates. The last layer learns faster than the rest, in a param group
of its own, and goes on doing so after each cut.
"""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from lightning_prune import history_of
from lightning_prune.callbacks import MagnitudePruneCallback
from lightning_prune.workbench import Digits


class FineTuning(pl.LightningModule):
    """A ResNet-18 with a new last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet18(weights=None)  # weights="DEFAULT" downloads those of ImageNet: what you will want
        self.net.fc = nn.Linear(self.net.fc.in_features, 10)
        self.example_input_array = torch.rand(2, 1, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        """Map grey images of 8 x 8 to logits; the network gets them in colour and larger."""
        return self.net(F.interpolate(images, size=(16, 16)).expand(-1, 3, -1, -1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        last = list(self.net.fc.parameters())
        rest = [parameter for name, parameter in self.net.named_parameters() if not name.startswith("fc.")]
        return torch.optim.SGD([{"params": rest, "lr": 0.02}, {"params": last, "lr": 0.05}], momentum=0.9)


model, digits = FineTuning(), Digits()
pruning = MagnitudePruneCallback(0.5, of="macs", begin=0, end=2)
trainer = pl.Trainer(
    max_epochs=5, limit_val_batches=0, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False
)
trainer.fit(model, digits)
trainer.test(model, digits)
for record in history_of(model):
    print(f"epoch {record.epoch}: {record}")

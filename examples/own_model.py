"""Your own model, without Lightning: look at its channel groups, cut it, save it, load it again."""

import torch
from torch import Tensor, nn

from lightning_prune import find_groups, load_pruned, prune, save_pruned


class Net(nn.Module):
    """A residual block between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 1))
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, h, w) to logits (batch, 10)."""
        features = self.stem(images)
        return self.head((features + self.block(features)).mean((2, 3)))


images = torch.rand(2, 3, 32, 32)
model = Net().eval()
for group in find_groups(model, images):
    print(group)

record = prune(model, images, pruning_ratio=0.5, of="macs")
print(record)

save_pruned(model, "pruned.pt")
copy = load_pruned(Net(), "pruned.pt").eval()
print("the same outputs:", torch.equal(copy(images), model(images)))

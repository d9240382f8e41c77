"""Teach the graph an operation that it cannot know: a fused kernel of your own.

A custom operation is a black box, so without a word about it every channel that goes in is frozen, and the reason names
the operation. A handler of five lines says how channels pass through it. One sees the groups, all of them prunable, and
the proof: channels swapped in every tensor that they touch leave the output as it was.
"""

import torch
from torch import Tensor, nn

from lightning_prune import find_groups, prune
from lightning_prune.flow import Flow
from lightning_prune.handlers.registry import Call, handles_named


@torch.library.custom_op("examples::scaled_relu", mutates_args=())
def scaled_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """relu(x * scale + shift), scale and shift (channels,) for x (n, channels, h, w); let it be a fast kernel."""
    return (x * scale[:, None, None] + shift[:, None, None]).relu()


@scaled_relu.register_fake  # which shape comes out: the graph is read without memory
def _(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.empty_like(x)


@handles_named("examples::scaled_relu")  # an operation of ATen: @handles(torch.ops.aten.name)
def carry(flow: Flow, call: Call) -> None:
    """Scale and shift belong to the channels, dimension 1; everything comes out where it went in."""
    labels = flow.of(call["x"])
    for name in ("scale", "shift"):
        flow.tie(labels[1], flow.of(call[name])[0], call.name)
    flow.put(call.out, labels)


class Net(nn.Module):
    """Two convolutions with the kernel between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3)
        self.scale, self.shift = nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(16))
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(scaled_relu(self.first(images), self.scale, self.shift)).mean((2, 3)))


model, images = Net().eval().requires_grad_(False), torch.rand(2, 3, 16, 16)
wanted = model(images)
for group in find_groups(model, images):
    print(group)
    if not group.frozen:
        order = torch.randperm(group.size)
        for member in group.members:
            tensor = model.get_parameter(member.tensor)
            old, new = member.positions.flatten(), member.positions[order].flatten()
            tensor.index_copy_(member.dim, old, tensor.index_select(member.dim, new))
print("the output is the same with channels swapped:", torch.allclose(model(images), wanted, atol=1e-5))
print(prune(model, images, pruning_ratio=0.5))

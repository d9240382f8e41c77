"""Networks of torchvision, pruned and written: what comes out is what the network gives, at other batch sizes too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from exports import FORMATS
from torch import nn

from lightning_prune import prune
from lightning_prune.exporting import export
from lightning_prune.exporting.formats import opened
from lightning_prune.inputs import Inputs

NETWORKS = ("resnet18", "mobilenet_v3_large", "efficientnet_b0", "vit_b_16", "convnext_tiny")


def lively(name: str) -> nn.Module:
    """Build a network whose output is another for each image, which it is not as torchvision builds it.

    ViT's head begins with zeros and the blocks of ConvNeXt with a scale of 1e-6; and what BatchNorm has not seen
    vanishes in eval mode on its way through a deep network.
    """
    torch.manual_seed(0)
    small = {"image_size": 32} if name == "vit_b_16" else {}
    net: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=10, **small)
    for part, parameter in net.named_parameters():
        if "layer_scale" in part or part == "heads.head.weight":
            nn.init.normal_(parameter, std=0.3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for _ in range(2):
            net(torch.randn(16, 3, 32, 32))
    return net.eval()


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS[:2])
@pytest.mark.parametrize("name", NETWORKS)
def test_equal_outputs(name: str, format: Any, tmp_path: Path) -> None:
    net, images = lively(name), torch.randn(2, 3, 32, 32)
    assert prune(net, images, pruning_ratio=0.3).reached > 0.2
    done = export(net, tmp_path / "net.pt2", format=format, example_inputs=images)
    assert done.difference < 1e-4
    run = opened(format, done.path)
    for size in (1, 4):
        seen = torch.randn(size, 3, 32, 32)
        with torch.no_grad():
            wanted = net(seen)
        (found,) = run(Inputs((seen,)))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        assert size == 1 or (found[0] - found[1]).abs().max() > 0.01 * found.abs().max(), "outputs tell images apart"

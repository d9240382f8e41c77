"""The networks of torchvision that the tests read and cut."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn

ZOO = (
    *("resnet18", "resnet50", "vgg11_bn", "densenet121", "googlenet", "inception_v3", "mobilenet_v2"),
    *("mobilenet_v3_large", "efficientnet_b0", "squeezenet1_0", "mnasnet0_5", "alexnet", "resnext50_32x4d"),
    *("regnet_y_400mf", "efficientnet_v2_s", "convnext_tiny", "shufflenet_v2_x1_0"),
)

CLASSES = 10

FROZEN = {"googlenet": {"fc", "aux1.fc2", "aux2.fc2"}, "inception_v3": {"fc", "AuxLogits.fc"}}
"""The class outputs of those networks that have more than one; the others have one, `class_output`."""


def zoo_model(name: str) -> nn.Module:
    """Build an untrained network.

    Dropout is off, so that two runs in train mode compare. The classifiers of VGG and AlexNet are narrowed: 100
    million weights more would prove nothing more.
    """
    further = {"init_weights": False} if name in FROZEN else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **further)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if name in ("vgg11_bn", "alexnet"):
        linear = [place for place, part in enumerate(model.classifier) if isinstance(part, nn.Linear)]
        widths = [model.classifier[linear[0]].in_features, 256, 256, CLASSES]
        for place, wide, narrow in zip(linear, widths, widths[1:], strict=False):
            model.classifier[place] = nn.Linear(wide, narrow)
    return model


def zoo_input(name: str, batch: int = 2, *, training: bool = True) -> Tensor:
    """Return images; inception's auxiliary head, which runs in train mode only, needs 299 pixels."""
    pixels = 64
    if name == "inception_v3":
        pixels = 299 if training else 96
    return torch.rand(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(1)) - 0.5


def class_outputs(name: str, model: nn.Module) -> set[str]:
    """Return the names of the layers whose channels are the classes."""
    layers = [layer for layer, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return FROZEN.get(name, {layers[-1]})

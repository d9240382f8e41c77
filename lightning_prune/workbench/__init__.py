"""Real things to run the callbacks on: networks, image sets, a classifier and a probe."""

from lightning_prune.workbench.augmentation import ShiftAndFlip
from lightning_prune.workbench.classifier import Classifier
from lightning_prune.workbench.data import Digits, MemoryImages, TorchvisionImages
from lightning_prune.workbench.experiment import Experiment
from lightning_prune.workbench.models import (
    VGG16BN,
    LeNet5,
    LeNet300,
    ResNet,
    resnet20,
    resnet56,
    torchvision_model,
)
from lightning_prune.workbench.probe import CutProbe

__all__ = [
    "VGG16BN",
    "Classifier",
    "CutProbe",
    "Digits",
    "Experiment",
    "LeNet5",
    "LeNet300",
    "MemoryImages",
    "ResNet",
    "ShiftAndFlip",
    "TorchvisionImages",
    "resnet20",
    "resnet56",
    "torchvision_model",
]

"""Real things to run the callbacks on: networks, image sets, a classifier and a probe."""

from lightning_prune.workbench.augmentation import ShiftAndFlip
from lightning_prune.workbench.classifier import Classifier
from lightning_prune.workbench.data import Digits, MemoryImages, TorchvisionImages
from lightning_prune.workbench.experiment import Experiment
from lightning_prune.workbench.models import (
    VGG11BN,
    VGG16BN,
    LeNet5,
    LeNet300,
    MnistFC,
    ResNet,
    resnet20,
    resnet56,
    torchvision_model,
)
from lightning_prune.workbench.probe import CutProbe
from lightning_prune.workbench.shared_trunks import DenseNet, PreActResNet, densenet40, resnet164

__all__ = [
    "VGG11BN",
    "VGG16BN",
    "Classifier",
    "CutProbe",
    "DenseNet",
    "Digits",
    "Experiment",
    "LeNet5",
    "LeNet300",
    "MemoryImages",
    "MnistFC",
    "PreActResNet",
    "ResNet",
    "ShiftAndFlip",
    "TorchvisionImages",
    "densenet40",
    "resnet20",
    "resnet56",
    "resnet164",
    "torchvision_model",
]

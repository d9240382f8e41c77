"""The networks of the speed benchmark: dense, cut, and built narrow from the start; and what a cut has left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_prune.tensors import named_tensors

SIZED = ("vit",)
"""Networks whose constructor has to know the size of the images."""
SHOWN = 5
"""So many findings of a kind are told."""


def classifier(name: str, pixels: int) -> nn.Module:
    """Build one of torchvision's classifiers, with fresh weights."""
    sizes = {"image_size": pixels} if name.startswith(SIZED) else {}
    net: nn.Module = torchvision.models.get_model(name, weights=None, **sizes)
    return net.eval()


def livened(net: nn.Module, pixels: int) -> nn.Module:
    """Let the output depend on the image, and let no activation be so small that the processor takes longer over it.

    ViT's head begins with zeros and the blocks of ConvNeXt with a scale of 1e-6; and what BatchNorm has not seen
    vanishes in eval mode on its way through a deep network.
    """
    for part, parameter in net.named_parameters():
        if "layer_scale" in part or part == "heads.head.weight":
            nn.init.normal_(parameter, std=0.3)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = None
        with torch.no_grad():
            net.train()(torch.randn(8, 3, pixels, pixels))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return net.eval()


def _conv(dense: nn.Conv2d, cut: nn.Conv2d) -> nn.Module:
    leaving, entering = cut.weight.shape[:2]
    sizes: Any = (dense.kernel_size, dense.stride, dense.padding, dense.dilation)
    bias = dense.bias is not None
    return nn.Conv2d(entering * cut.groups, leaving, *sizes, cut.groups, bias, dense.padding_mode)


def _norm(dense: nn.BatchNorm2d, cut: nn.BatchNorm2d) -> nn.Module:
    return nn.BatchNorm2d(len(cut.weight), dense.eps, dense.momentum, dense.affine, dense.track_running_stats)


def _linear(dense: nn.Linear, cut: nn.Linear) -> nn.Module:
    return nn.Linear(cut.weight.shape[1], cut.weight.shape[0], dense.bias is not None)


def _layer_norm(dense: nn.LayerNorm, cut: nn.LayerNorm) -> nn.Module:
    return type(dense)(list(cut.weight.shape), dense.eps, dense.elementwise_affine)


def _attention(dense: nn.MultiheadAttention, cut: nn.MultiheadAttention) -> nn.Module:
    width, bias = cut.out_proj.weight.shape[0], dense.in_proj_bias is not None
    return nn.MultiheadAttention(width, cut.num_heads, dense.dropout, bias, batch_first=dense.batch_first)


FRESH: Mapping[type[nn.Module], Callable[[Any, Any], nn.Module]] = {
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _norm,
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    torchvision.models.convnext.LayerNorm2d: _layer_norm,
    nn.MultiheadAttention: _attention,
}
"""Type of module -> makes one like the dense network's, in the sizes of the cut one's tensors."""


def narrow_of(fresh: nn.Module, cut: nn.Module) -> nn.Module:
    """Build the network that has the widths of a cut one and has never been cut.

    Every module whose tensors have other shapes in the cut network is made anew by its own constructor, with the
    settings of the dense module and the sizes of the cut one; parameters that a block holds itself, and the sizes that
    it notes, are set likewise. The values are then copied, so that both networks should do the same. No bias comes in
    that the architecture does not have.

    Args:
        fresh: The dense architecture, built for this; changed in place.
        cut: The cut network.

    Raises:
        ValueError: Something has another shape still.
    """
    for name, dense in list(fresh.named_modules()):
        module = cut.get_submodule(name)
        if type(dense) in FRESH:
            if _shapes(dense) != {key: shape for key, shape in _shapes(module).items() if key in _shapes(dense)}:
                fresh.set_submodule(name, FRESH[type(dense)](dense, module))
            continue
        for key, parameter in list(dense.named_parameters(recurse=False)):
            shape = getattr(module, key).shape
            if shape != parameter.shape:
                setattr(dense, key, nn.Parameter(torch.empty(shape)))
        for key, value in vars(module).items():
            if type(value) is int and getattr(dense, key, value) != value:
                setattr(dense, key, value)
    wanted = _shapes(cut)
    wrong = [name for name, shape in _shapes(fresh).items() if wanted.get(name) != shape]
    if wrong:
        raise ValueError(f"the narrow network cannot be built: {', '.join(wrong[:SHOWN])} of another shape")
    fresh.load_state_dict(cut.state_dict(), strict=False)
    return fresh.train(cut.training)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(module).items()}


def added_biases(cut: nn.Module, narrow: nn.Module) -> list[str]:
    """Name the biases that a cut has put in, which take up what the removed channels emit."""
    known = named_tensors(narrow)
    return [name for name in named_tensors(cut) if name not in known]


def left_behind(cut: nn.Module, narrow: nn.Module, images: Tensor) -> list[str]:
    """Tell what distinguishes a cut network from one built narrow: modules, hooks, tensors, operations.

    Biases that the cut has put in are left out, and so is that an operation has one.

    Args:
        cut: The cut network.
        narrow: The network built narrow.
        images: What both run with.
    """
    found = [[*_of_modules(cut, narrow)], [*_of_tensors(cut, narrow)], [*_of_operations(cut, narrow, images)]]
    return [line for lines in found for line in lines[:SHOWN]]


def _of_modules(cut: nn.Module, narrow: nn.Module) -> Iterator[str]:
    others = dict(narrow.named_modules())
    for name, module in cut.named_modules():
        kind = type(module).__name__
        if type(others.get(name)) is not type(module):
            yield f"{name} is a {kind}"
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            if getattr(module, hooks):
                yield f"{name} has {hooks[1:].replace('_', ' ')}"


def _of_tensors(cut: nn.Module, narrow: nn.Module) -> Iterator[str]:
    found = named_tensors(cut)
    for name, plain in named_tensors(narrow).items():
        tensor = found[name]
        if tensor.stride() != plain.stride():
            yield f"{name} has strides {tensor.stride()} and not {plain.stride()}"
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            yield f"{name} holds {tensor.untyped_storage().nbytes()} bytes for {tensor.nbytes}"


def _of_operations(cut: nn.Module, narrow: nn.Module, images: Tensor) -> Iterator[str]:
    for found, plain in zip_longest(operations(cut, images), operations(narrow, images)):
        if found != plain:
            yield f"runs {found}, where the narrow network runs {plain}"


class _Recorder(TorchDispatchMode):
    """Lists the operations that are done inside, with the shapes and strides of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do the operation and note it."""
        out = func(*args, **(kwargs or {}))
        results = [(tuple(leaf.shape), leaf.stride()) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.done.append(f"{func} -> {results}")
        return out


def operations(net: nn.Module, images: Tensor) -> list[str]:
    """List the operations of a forward pass."""
    with torch.no_grad(), _Recorder() as recorder:
        net(images)
    return recorder.done

"""2:4 weights in the format that NVIDIA's sparse tensor cores multiply."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_prune.errors import PruningError
from lightning_prune.tensors import named_modules, unwrapped


def to_semi_structured(model: nn.Module) -> tuple[str, ...]:
    """Turn the linear weights that have at most 2 of every 4 into torch's semi-structured sparse tensors.

    They take 9/16 of the memory in 16 bits and their products run on sparse tensor cores. This is for inference: the
    weights no longer require gradients. Linear layers with other weights, or in shapes that torch has no kernel for,
    stay as they are.

    Args:
        model: The model, on a GPU, in half precision or another type that torch has kernels for; changed in place.

    Returns:
        The names of the layers whose weights were turned.

    Raises:
        PruningError: There is no GPU with compute capability 8.0 or more, or no weight that can be turned; the model
            is unchanged.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise PruningError(
            "Semi-structured weights need an NVIDIA GPU with compute capability 8.0 or more (Ampere), and here is "
            f"{_device()}. Keep the masked weights as they are; `save_sparse` stores them in half the space anywhere."
        )
    layers = {
        name: layer
        for name, layer in named_modules(unwrapped(model)).items()
        if isinstance(layer, nn.Linear) and _is_2_4(layer._parameters.get("weight"))
    }
    turned = {name: _turned(layer.weight) for name, layer in layers.items()}
    found = {name: weight for name, weight in turned.items() if weight is not None}
    if not found:
        raise PruningError(
            f"{type(unwrapped(model)).__name__} has no linear layer on the GPU with 2:4 weights in a type and a shape "
            'that torch has kernels for. Prune it with granularity="2:4" and move it with `.half().cuda()`.'
        )
    for name, weight in found.items():
        layers[name].weight = nn.Parameter(weight, requires_grad=False)
    return tuple(found)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _is_2_4(weight: Tensor | None) -> bool:
    if weight is None or not weight.is_cuda or weight.layout is not torch.strided or weight.shape[1] % 4:
        return False
    return bool(((weight.detach() != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all())


def _turned(weight: Tensor) -> Tensor | None:
    """Return the sparse tensor, or None where torch has no kernel for the type or the shape."""
    try:
        turned: Tensor = torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
    except (RuntimeError, ValueError, NotImplementedError):
        return None
    return turned

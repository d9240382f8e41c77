"""BatchNorm statistics estimated anew, for the network that a cut has left."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.errors import PruningError
from lightning_prune.inputs import ExampleInputs, bind
from lightning_prune.tensors import unwrapped


def tracking_norms(model: nn.Module) -> list[_BatchNorm]:
    """List the BatchNorm layers that keep running statistics.

    Raises:
        PruningError: There is none.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    if not norms:
        raise PruningError(
            f"{type(model).__name__} has no BatchNorm with running statistics, so there is nothing to recalibrate. "
            "Leave `recalibrate` out."
        )
    return norms


def recalibrate(model: nn.Module, batches: Iterable[ExampleInputs], most: int | None = None) -> int:
    """Set the running statistics of all BatchNorm layers to their averages over batches.

    mean <- 1/n sum_b mean_b, var <- 1/n sum_b var_b, after Li et al. 2020 ("EagleEye: fast sub-net evaluation",
    section 3.3). Only BatchNorm layers are in train mode meanwhile; nothing else of the model changes.

    Args:
        model: The model, changed in place; if anything fails, its statistics are what they were.
        batches: What forward takes; see `find_groups` for the forms.
        most: So many batches are taken at most; None takes all.

    Returns:
        How many batches there were.

    Raises:
        PruningError: There is no BatchNorm, or no batch.
    """
    model = unwrapped(model)
    norms = tracking_norms(model)
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    done = 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for batch in islice(batches, most):
                bind(model, batch).call(model)
                done += 1
        if not done:
            raise PruningError("There was no batch to recalibrate with; pass batches as the model is trained on.")
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            _restore(norm, buffers)
        raise
    finally:
        for norm, momentum, buffers in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            _restore(norm, {name: buffer for name, buffer in buffers.items() if name == "num_batches_tracked"})
        for module, mode in modes.items():
            module.training = mode
    return done


def _restore(norm: _BatchNorm, buffers: dict[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        norm.get_buffer(name).copy_(buffer)

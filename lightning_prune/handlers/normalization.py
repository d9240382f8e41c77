"""Normalisations tie the channels of their input to their scale, shift and running statistics."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload

from lightning_prune.flow import Flow
from lightning_prune.handlers.registry import Call, handles, packets
from lightning_prune.inputs import tensors_in
from lightning_prune.labels import LabelArray

aten = torch.ops.aten

_BATCH_NORMS = packets(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update "
    "_batch_norm_with_update_functional _batch_norm_no_update batch_norm_with_update cudnn_batch_norm miopen_batch_norm"
)


@handles(*_BATCH_NORMS)
def batch_norm(flow: Flow, call: Call) -> None:
    """Everything of shape (C,) belongs to dimension 1 of the input."""
    source, *others = call.tensors
    channels = flow.of(source)[1]
    for tensor in others:
        if tensor.shape == source.shape[1:2]:
            flow.tie(channels, flow.of(tensor)[0], call.name)
    result, *statistics = tensors_in(call.out)
    flow.put(result, flow.of(source))
    for tensor in statistics:
        if tensor.dim() == 1 and tensor.shape[0] == source.shape[1]:
            flow.put(tensor, [channels])


def is_batch_norm(op: OpOverload) -> bool:
    """Tell whether an operation is a batch normalisation."""
    return op.overloadpacket in _BATCH_NORMS


def _tie_all(flow: Flow, channels: LabelArray | None, tensors: list[Tensor], where: str) -> None:
    for tensor in tensors:
        if tensor.numel() > 1:
            flow.tie(channels, flow.of(tensor)[0], where)


@handles(*packets("native_layer_norm _fused_rms_norm"))
def layer_norm(flow: Flow, call: Call) -> None:
    """The normalised dimensions are those of scale and shift; the statistics do not care about their order."""
    source: Tensor = call["input"]
    labels = flow.of(source)
    normalized = len(call["normalized_shape"])
    for tensor in call.tensors[1:]:
        for dim in range(normalized):
            if tensor.shape[dim] > 1:
                flow.tie(labels[dim - normalized], flow.of(tensor)[dim], call.name)
    result, *statistics = tensors_in(call.out)
    flow.put(result, labels)
    for tensor in statistics:
        if tensor.dim() == source.dim():
            flow.put(tensor, [*labels[:-normalized], *[None] * normalized])


@handles(*packets("native_group_norm"))
def group_norm(flow: Flow, call: Call) -> None:
    """Groups stay equal: their i-th channels are tied, unless each channel is a group of its own or all are one."""
    source: Tensor = call["input"]
    channels, groups = flow.of(source)[1], call["group"]
    if channels is not None and 1 < groups < len(channels):
        rows = channels.reshape(groups, -1)
        flow.space.tie(rows, rows[:1])
    _tie_all(flow, channels, call.tensors[1:], call.name)
    flow.put(call.out[0], flow.of(source))
    if groups == source.shape[1]:
        for statistics in call.out[1:]:
            flow.put(statistics, [None, channels])


@handles(*packets("_weight_norm_interface"))
def weight_norm(flow: Flow, call: Call) -> None:
    """The direction keeps its labels; the magnitude has one entry for each position of one dimension of it."""
    labels, dim = flow.of(call["v"]), call["dim"]
    flow.tie(labels[dim], flow.of(call["g"])[dim], call.name)
    weight, norms = call.out
    flow.put(weight, labels)
    flow.put(norms, [part if place == dim else None for place, part in enumerate(labels[: norms.dim()])])

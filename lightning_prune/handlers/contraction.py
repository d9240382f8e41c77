"""Contractions tie what they sum over and pass on the free dimensions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_prune.flow import Flow
from lightning_prune.handlers.pointwise import align
from lightning_prune.handlers.registry import Call, handles, packets
from lightning_prune.labels import LabelArray

aten = torch.ops.aten


@handles(aten.convolution)
def convolution(flow: Flow, call: Call) -> None:
    """Input channels meet the weight's; with several convolution groups the i-th channels of all are tied.

    The weight is (out, in / groups, *kernel), for a transposed convolution (in, out / groups, *kernel).
    """
    outer, inner, *kernel = flow.of(call["weight"])
    for extent in kernel:
        flow.freeze(extent, "is the extent of a kernel")
    *batch, source = flow.of(call["input"])[: -len(kernel)]
    space = _space(flow, call, len(kernel))
    groups, where = call["groups"], call.name
    if groups > 1 and flow.dense_shape(call["weight"])[1] == 1:
        inner = None
    if groups == 1:
        flow.tie(source, outer if call["transposed"] else inner, where)
        made = inner if call["transposed"] else outer
    elif call["transposed"]:
        made = _grouped_transposed(flow, source, outer, inner, groups, where)
    else:
        made = _grouped(flow, source, outer, inner, groups, where)
    flow.make(made)
    _tie_bias(flow, made, call["bias"], where)
    flow.put(call.out, [*batch, made, *space])


def _space(flow: Flow, call: Call, dims: int) -> list[LabelArray | None]:
    """Return the labels of the spatial dimensions, which go on only where the kernel looks at one place at a time."""
    settings = zip(flow.dense_shape(call["weight"])[-dims:], call["stride"], call["padding"], strict=True)
    space = list(flow.of(call["input"])[-dims:])
    for dim, setting in enumerate(settings):
        if setting != (1, 1, 0):
            flow.freeze(space[dim], f"is slid over by a kernel in {call.name}")
            space[dim] = None
    return space


def _grouped(
    flow: Flow, source: LabelArray | None, outer: LabelArray | None, inner: LabelArray | None, groups: int, where: str
) -> LabelArray | None:
    """Return the output channels of a grouped convolution; depthwise ones follow their input channel."""
    if inner is not None:
        _tie_groups(flow, outer, groups)
        _tie_groups(flow, source, groups)
        flow.tie(None if source is None else source[: len(inner)], inner, where)
    elif outer is not None:
        flow.tie(None if source is None else np.repeat(source, len(outer) // groups), outer, where)
    return outer


def _grouped_transposed(
    flow: Flow, source: LabelArray | None, outer: LabelArray | None, inner: LabelArray | None, groups: int, where: str
) -> LabelArray | None:
    """Return the output channels of a grouped transposed convolution."""
    flow.tie(source, outer, where)
    if outer is not None and len(outer) == groups:
        flow.freeze(inner, f"is the channel multiplier of a depthwise convolution in {where}")
        return np.repeat(outer, 1 if inner is None else len(inner))
    _tie_groups(flow, outer, groups)
    if inner is None:
        return flow.fixed(groups, f"is a convolution group's only output channel in {where}")
    return np.tile(inner, groups)


def _tie_groups(flow: Flow, labels: LabelArray | None, groups: int) -> None:
    if labels is not None:
        rows = labels.reshape(groups, -1)
        flow.space.tie(rows, rows[:1])


def _tie_bias(flow: Flow, made: LabelArray | None, bias: Tensor | None, where: str) -> None:
    if bias is not None and bias.numel() > 1:
        flow.tie(made, flow.of(bias)[0], where)


@handles(aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot, aten.addmm, aten.addmv, aten.addbmm, aten.baddbmm)
def matmul(flow: Flow, call: Call) -> None:
    """The last dimension of the left factor meets the last but one (or only) dimension of the right one."""
    *bias, left, right = call.tensors[:3]
    lefts, rights = list(flow.of(left)), list(flow.of(right))
    flow.tie(lefts.pop(), rights.pop(max(len(rights) - 2, 0)), call.name)
    batch = [align(flow, pair, call.name) for pair in zip(lefts[:-1], rights[:-1], strict=False)]
    for labels in batch:
        flow.attend(labels)
    result = batch + lefts[-1:] + rights[-1:] if right.dim() > 1 else batch + lefts[-1:]
    result = result[len(result) - call.out.dim() :]
    for labels in result[len(batch) :]:
        flow.make(labels)
    _tie_addend(flow, result, bias, call.out, call.name)
    flow.put(call.out, result)


@handles(aten._trilinear)
def trilinear(flow: Flow, call: Call) -> None:
    """A product of three tensors, each widened by new dimensions, summed over some: nn.Bilinear."""
    spread = []
    for place in ("1", "2", "3"):
        tensor, new = call[f"i{place}"], call[f"expand{place}"]
        labels, sizes = list(flow.of(tensor)), list(flow.dense_shape(tensor))
        for dim in sorted(new):
            labels.insert(dim, None)
            sizes.insert(dim, 1)
        spread.append((labels, sizes))
    result = []
    for dim in range(len(spread[0][0])):
        wide = [labels[dim] for labels, sizes in spread if sizes[dim] > 1]
        result.append(align(flow, wide, call.name) if wide else None)
    left = [part for dim, part in enumerate(result) if dim not in call["sumdim"]]
    for part in left:
        flow.make(part)
    flow.put(call.out, left)


@handles(*packets("_cdist_forward"))
def distance(flow: Flow, call: Call) -> None:
    """Distances are contractions: any order of what is summed over leaves them the same."""
    (*batch, rows, inner), (*twin, columns, other) = flow.of(call["x1"]), flow.of(call["x2"])
    flow.tie(inner, other, call.name)
    outer = [align(flow, pair, call.name) for pair in zip(batch, twin, strict=True)]
    flow.put(call.out, [*outer, rows, columns])


def _tie_addend(flow: Flow, result: list[LabelArray | None], addends: list[Tensor], out: Tensor, where: str) -> None:
    """Tie what a fused addition aligns; it broadcasts as any other."""
    for addend in addends:
        for from_right in range(1, addend.dim() + 1):
            if addend.shape[-from_right] > 1:
                flow.tie(result[-from_right], flow.of(addend)[-from_right], where)

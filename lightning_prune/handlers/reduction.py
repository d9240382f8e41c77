"""Reductions: what is summed over does not care about order; what depends on order freezes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.flow import Flow
from lightning_prune.handlers.registry import Call, handles, packets
from lightning_prune.inputs import tensors_in
from lightning_prune.labels import LabelArray

aten = torch.ops.aten


def _reduced(call: Call, ndim: int) -> set[int]:
    dims = call.get("dim")
    if dims is None or dims == []:
        return set(range(ndim))
    return {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)} if ndim else set()


def _remaining(call: Call, labels: tuple[LabelArray | None, ...], reduced: set[int]) -> list[LabelArray | None]:
    keepdim = call.get("keepdim", False)
    return [None if dim in reduced else part for dim, part in enumerate(labels) if keepdim or dim not in reduced]


@handles(*packets("sum mean prod amax amin nansum any all var std var_mean std_mean norm linalg_vector_norm logsumexp"))
def symmetric(flow: Flow, call: Call) -> None:
    """A reduction that any order of the elements leaves the same: reduced labels are free, the others pass."""
    source: Tensor = call.tensors[0]
    labels = _remaining(call, flow.of(source), _reduced(call, source.dim()))
    for out in tensors_in(call.out):
        flow.put(out, labels)


@handles(*packets("max min argmax argmin median mode kthvalue aminmax"))
def extremum(flow: Flow, call: Call) -> None:
    """Extreme values are symmetric too, but where they were found is a channel's number."""
    source: Tensor = call.tensors[0]
    reduced = _reduced(call, source.dim())
    labels = flow.of(source)
    for out in tensors_in(call.out):
        flow.put(out, _remaining(call, labels, reduced))
        if not out.is_floating_point():
            for dim in reduced:
                flow.taint(out, labels[dim], f"is addressed by number after {call.name}")


@handles(*packets("_fft_r2c _fft_c2r _fft_c2c"))
def transform(flow: Flow, call: Call) -> None:
    """A Fourier transform mixes its dimensions by position; the others pass."""
    labels = list(flow.of(call["self"]))
    for dim in call["dim"]:
        flow.freeze(labels[dim], f"is transformed in {call.name}")
        labels[dim] = None
    flow.put(call.out, labels)


@handles(*packets("cumsum cumprod cummax cummin logcumsumexp sort argsort topk"))
def ordered(flow: Flow, call: Call) -> None:
    """What runs along a dimension in order freezes it; the other dimensions pass."""
    source: Tensor = call.tensors[0]
    labels = list(flow.of(source))
    if labels:
        flow.freeze(labels[call["dim"]], f"depends on the order of the channels in {call.name}")
        labels[call["dim"]] = None
    for out in tensors_in(call.out):
        flow.put(out, labels)

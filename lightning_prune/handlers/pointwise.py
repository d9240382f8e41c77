"""Pointwise operations tie the dimensions that they align."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from lightning_prune.handlers.registry import Call, handles, handles_pointwise, packets
from lightning_prune.inputs import tensors_in
from lightning_prune.labels import Flow, LabelArray


def align(flow: Flow, dimensions: Iterable[LabelArray | None], where: str) -> LabelArray | None:
    """Tie dimensions of equal size to each other, and return their labels; None if one of them holds no channels."""
    aligned = list(dimensions)
    first = next((labels for labels in aligned if labels is not None), None)
    for labels in aligned:
        flow.tie(first, labels, where)
    return None if any(labels is None for labels in aligned) else first


def broadcast(flow: Flow, tensors: Sequence[Tensor], shape: Sequence[int], where: str) -> list[LabelArray | None]:
    """Tie what broadcasting to `shape` aligns, and return the labels of the result."""
    result: list[LabelArray | None] = []
    for from_right in range(len(shape), 0, -1):
        wide = [tensor for tensor in tensors if tensor.dim() >= from_right and tensor.shape[-from_right] > 1]
        result.append(align(flow, [flow.of(tensor)[-from_right] for tensor in wide], where))
    return result


_UNTAGGED = packets(
    "hardswish _prelu_kernel rrelu_with_noise log_sigmoid_forward floor_divide native_dropout _fused_dropout complex "
    "polar copy masked_fill bernoulli fill zero random uniform normal log_normal exponential cauchy geometric "
    "detach alias _to_copy lift lift_fresh contiguous clone where"
)


@handles_pointwise
@handles(*_UNTAGGED)
def pointwise(flow: Flow, call: Call) -> None:
    """Every output has the labels of the inputs, aligned from the right."""
    written = call.kwargs.get("out")
    inputs = [tensor for tensor in call.tensors if tensor is not written]
    if any(flow.is_labelled(tensor) for tensor in inputs):
        for out in tensors_in(call.out):
            flow.put(out, broadcast(flow, inputs, out.shape, call.name))


@handles(*packets("_softmax _log_softmax _safe_softmax"))
def softmax(flow: Flow, call: Call) -> None:
    """Softmax permutes with its input: labels stay, along the normalised dimension too."""
    flow.put(call.out, flow.of(call["self"]))

"""Pointwise operations tie the dimensions that they align."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from lightning_prune.flow import Flow
from lightning_prune.handlers.registry import Call, handles, handles_pointwise, packets
from lightning_prune.inputs import tensors_in
from lightning_prune.labels import LabelArray


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
    sizes = [flow.dense_shape(tensor) for tensor in tensors]
    for from_right in range(len(shape), 0, -1):
        there = [place for place, size in enumerate(sizes) if len(size) >= from_right]
        wide = [flow.of(tensors[place])[-from_right] for place in there if sizes[place][-from_right] > 1]
        single = (flow.of(tensors[place])[-from_right] for place in there)
        result.append(align(flow, wide, where) if wide else next((part for part in single if part is not None), None))
    return result


_TAGGED_LATER = "hardtanh hardsigmoid leaky_relu elu celu mish hardshrink softshrink softplus threshold"
"""Activations without torch's pointwise tag in torch 2.5, the oldest that we support."""

_UNTAGGED = packets(
    f"{_TAGGED_LATER} "
    "hardswish _prelu_kernel rrelu_with_noise log_sigmoid_forward floor_divide native_dropout _fused_dropout complex "
    "polar copy masked_fill bernoulli fill zero random uniform normal log_normal exponential cauchy geometric "
    "_conj resolve_conj _conj_physical _neg_view real imag view_as_real_copy fake_quantize_per_tensor_affine "
    "fake_quantize_per_tensor_affine_cachemask _fake_quantize_per_tensor_affine_cachemask_tensor_qparams "
    "detach alias _to_copy lift lift_fresh contiguous clone where"
)


@handles_pointwise
@handles(*_UNTAGGED)
def pointwise(flow: Flow, call: Call) -> None:
    """Every output has the labels of the inputs, aligned from the right."""
    written = call.kwargs.get("out")
    inputs = [tensor for tensor in call.tensors if tensor is not written]
    if len(inputs) == 1 and isinstance(call.out, Tensor) and call.out.shape == inputs[0].shape:
        flow.put(call.out, flow.of(inputs[0]))
    elif any(flow.is_labelled(tensor) for tensor in inputs):
        for out in tensors_in(call.out):
            flow.put(out, broadcast(flow, inputs, out.shape, call.name))


@handles(*packets("bucketize isin searchsorted"))
def looked_up(flow: Flow, call: Call) -> None:
    """Each element is looked up among others, which are known by their numbers."""
    values = call.tensors[1] if call.name.startswith("aten.searchsorted") else call.tensors[0]
    for tensor in call.tensors:
        if tensor is not values:
            flow.freeze_tensor(tensor, f"is looked up in {call.name}")
    flow.put(call.out, flow.of(values))


@handles(*packets("fake_quantize_per_channel_affine_cachemask"))
def quantize_channels(flow: Flow, call: Call) -> None:
    """Scale and zero point belong to the channels of one dimension."""
    labels = flow.of(call["self"])
    for name in ("scale", "zero_point"):
        flow.tie(labels[call["axis"]], flow.of(call[name])[0], call.name)
    for out in call.out:
        flow.put(out, labels)


@handles(*packets("_softmax _log_softmax _safe_softmax"))
def softmax(flow: Flow, call: Call) -> None:
    """Softmax permutes with its input: labels stay, along the normalised dimension too."""
    flow.put(call.out, flow.of(call["self"]))

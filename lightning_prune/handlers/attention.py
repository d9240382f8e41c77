"""Fused attention: queries meet keys, weights meet values, and each head is on its own."""

from __future__ import annotations

from lightning_prune.flow import Flow
from lightning_prune.handlers.pointwise import align
from lightning_prune.handlers.registry import Call, handles, packets
from lightning_prune.inputs import flat_tensors

_ATTENTIONS = packets(
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps"
)


@handles(*_ATTENTIONS)
def attention(flow: Flow, call: Call) -> None:
    """Softmax(Q K^T) V over the last two dimensions: (..., tokens, width) for queries, keys and values."""
    query, key, value = (flow.of(call[name]) for name in ("query", "key", "value"))
    flow.tie(query[-1], key[-1], call.name)
    flow.tie(key[-2], value[-2], call.name)
    outer = [align(flow, parts, call.name) for parts in zip(query[:-2], key[:-2], value[:-2], strict=True)]
    for labels in outer:
        flow.attend(labels)
    if call.get("is_causal", False):
        for tokens in (query[-2], key[-2]):
            flow.freeze(tokens, f"is masked by its position in {call.name}")
    mask = call.get("attn_mask", call.get("attn_bias"))
    if mask is not None:
        weights = [*outer, query[-2], key[-2]]
        for dim, size in enumerate(flow.dense_shape(mask)):
            if size > 1:
                flow.tie(weights[dim - mask.dim()], flow.of(mask)[dim], call.name)
    result, *others = flat_tensors(call.out)
    flow.put(result, [*outer, query[-2], value[-1]])
    for tensor in others:
        if tensor.dim() == result.dim() - 1:
            flow.put(tensor, [*outer, query[-2]])

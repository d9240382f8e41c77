"""Where torch's own layers keep their sizes, and what they should be for the tensors that the layers hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_prune.tensors import named_modules, tensor_at
from lightning_prune.types import Attributes

Size: TypeAlias = "int | tuple[int, ...]"
Sizes: TypeAlias = dict[str, Size]


def _conv(layer: _ConvNd) -> Sizes:
    outer, inner = layer.weight.shape[:2]
    multiplier = layer.out_channels // layer.groups
    transposed = isinstance(layer, _ConvTransposeNd)
    depthwise = 1 < layer.groups == layer.in_channels
    groups = layer.groups
    if depthwise:
        groups = outer if transposed else outer // multiplier
    grouped = inner * groups
    wide = (
        {"out_channels": grouped, "in_channels": outer}
        if transposed
        else {"out_channels": outer, "in_channels": grouped}
    )
    return {**wide, "groups": groups}


def _linear(layer: nn.Linear) -> Sizes:
    return {"out_features": layer.weight.shape[0], "in_features": layer.weight.shape[1]}


def _norm(layer: _NormBase) -> Sizes:
    held = layer.weight if layer.affine else layer.running_mean
    return {} if held is None else {"num_features": held.shape[0]}


def _layer_norm(layer: nn.LayerNorm | nn.RMSNorm) -> Sizes:
    return {"normalized_shape": tuple(layer.weight.shape)} if layer.elementwise_affine else {}


def _group_norm(layer: nn.GroupNorm) -> Sizes:
    if not layer.affine:
        return {}
    channels = layer.weight.shape[0]
    each_its_own = layer.num_groups == layer.num_channels
    return {"num_channels": channels, "num_groups": channels if each_its_own else layer.num_groups}


def _embedding(layer: nn.Embedding | nn.EmbeddingBag) -> Sizes:
    return {"num_embeddings": layer.weight.shape[0], "embedding_dim": layer.weight.shape[1]}


def _rnn(layer: nn.RNNBase) -> Sizes:
    from_input, from_hidden = (tensor_at(layer, f"weight_{part}_l0") for part in ("ih", "hh"))
    hidden = layer.hidden_size if layer.proj_size else from_hidden.shape[1]
    return {"input_size": from_input.shape[1], "hidden_size": hidden}


def _cell(layer: nn.RNNCellBase) -> Sizes:
    return {"input_size": layer.weight_ih.shape[1], "hidden_size": layer.weight_hh.shape[1]}


def _bilinear(layer: nn.Bilinear) -> Sizes:
    return dict(zip(("out_features", "in1_features", "in2_features"), layer.weight.shape, strict=True))


def _attention(layer: nn.MultiheadAttention) -> Sizes:
    """Return the widths of what comes in; how many heads there are and how wide they are, only the trial tells."""
    separate = layer.in_proj_weight is None
    query, key, value = (
        (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight) if separate else [layer.in_proj_weight] * 3
    )
    return {"embed_dim": query.shape[1], "kdim": key.shape[1], "vdim": value.shape[1]}


def _prelu(layer: nn.PReLU) -> Sizes:
    return {"num_parameters": layer.weight.shape[0]}


_TABLE: tuple[tuple[type | tuple[type, ...], Callable[..., Sizes]], ...] = (
    (_ConvNd, _conv),
    (nn.Linear, _linear),
    (_NormBase, _norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.GroupNorm, _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.PReLU, _prelu),
    (nn.RNNBase, _rnn),
    (nn.RNNCellBase, _cell),
    (nn.Bilinear, _bilinear),
    (nn.MultiheadAttention, _attention),
)


@cache
def _rule(kind: type) -> Callable[..., Sizes] | None:
    return next((rule for known, rule in _TABLE if issubclass(kind, known)), None)


def stale_sizes(model: nn.Module) -> Attributes:
    """Return the attributes that contradict the tensors now in the model, with the values that they should have."""
    stale: dict[str, Sizes] = {}
    for name, module in named_modules(model).items():
        rule = _rule(type(module))  # type: ignore[arg-type] # a class is hashable
        sizes = rule(module) if rule else {}
        wrong = {attribute: value for attribute, value in sizes.items() if getattr(module, attribute) != value}
        if wrong:
            stale[name] = wrong
    return stale

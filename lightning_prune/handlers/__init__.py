"""How each ATen operation carries labels from its inputs to its outputs."""

from lightning_prune.handlers import contraction, factories, movement, normalization, pointwise, pooling, reduction
from lightning_prune.handlers.registry import Call, Handler, handler_for, handles, packets

__all__ = [
    "Call",
    "Handler",
    "contraction",
    "factories",
    "handler_for",
    "handles",
    "movement",
    "normalization",
    "packets",
    "pointwise",
    "pooling",
    "reduction",
]

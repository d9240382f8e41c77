"""How each ATen operation carries labels from its inputs to its outputs."""

from lightning_prune.handlers import (
    attention,
    contraction,
    factories,
    indexing,
    movement,
    normalization,
    patches,
    pointwise,
    pooling,
    reduction,
)
from lightning_prune.handlers.registry import Call, Handler, handler_for, handles, name_of, packets

__all__ = [
    "Call",
    "Handler",
    "attention",
    "contraction",
    "factories",
    "handler_for",
    "handles",
    "indexing",
    "movement",
    "name_of",
    "normalization",
    "packets",
    "patches",
    "pointwise",
    "pooling",
    "reduction",
]

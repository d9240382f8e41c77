"""Metrics of networks, for torchmetrics."""

from lightning_prune.metrics.fisher_rao import FisherRaoNorm

__all__ = ["FisherRaoNorm"]

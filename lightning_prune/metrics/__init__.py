"""Metrics of networks, for torchmetrics."""

from lightning_prune.metrics.channel_activity import (
    ChannelActivity,
    InhibitedChannels,
    expected_activity,
    inhibited_share,
)
from lightning_prune.metrics.cumulative_ablation import CumulativeAblationCurve
from lightning_prune.metrics.fisher_rao import FisherRaoNorm

__all__ = [
    "ChannelActivity",
    "CumulativeAblationCurve",
    "FisherRaoNorm",
    "InhibitedChannels",
    "expected_activity",
    "inhibited_share",
]

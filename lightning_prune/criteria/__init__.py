"""The rules that score channels."""

from lightning_prune.criteria.alive import Alive
from lightning_prune.criteria.base import Criterion, gather, score_groups
from lightning_prune.criteria.bn_scale import BNScale, bn_scales
from lightning_prune.criteria.magnitude import Magnitude
from lightning_prune.criteria.random import Random

__all__ = ["Alive", "BNScale", "Criterion", "Magnitude", "Random", "bn_scales", "gather", "score_groups"]

"""The rules that score channels."""

from lightning_prune.criteria.alive import Alive
from lightning_prune.criteria.base import Criterion, gather, score_groups
from lightning_prune.criteria.bn_scale import BNScale, bn_scales
from lightning_prune.criteria.fisher import Fisher
from lightning_prune.criteria.gathered import Gathered
from lightning_prune.criteria.magnitude import Magnitude
from lightning_prune.criteria.random import Random
from lightning_prune.criteria.taylor import Taylor

__all__ = [
    "Alive",
    "BNScale",
    "Criterion",
    "Fisher",
    "Gathered",
    "Magnitude",
    "Random",
    "Taylor",
    "bn_scales",
    "gather",
    "score_groups",
]

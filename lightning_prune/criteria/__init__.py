"""The rules that score channels."""

from lightning_prune.criteria.alive import Alive
from lightning_prune.criteria.base import Criterion, gather, score_groups
from lightning_prune.criteria.bn_scale import BNScale, bn_scales
from lightning_prune.criteria.chip import CHIP
from lightning_prune.criteria.fisher import Fisher
from lightning_prune.criteria.gate_value import GateValue
from lightning_prune.criteria.gathered import Gathered, Watched
from lightning_prune.criteria.geometric_median import GeometricMedian
from lightning_prune.criteria.hrank import HRank
from lightning_prune.criteria.lamp import LAMP
from lightning_prune.criteria.lasso import Lasso
from lightning_prune.criteria.magnitude import Magnitude
from lightning_prune.criteria.max_response import FirstK, MaxResponse
from lightning_prune.criteria.obd import OBD
from lightning_prune.criteria.random import Random
from lightning_prune.criteria.taylor import Taylor
from lightning_prune.criteria.wanda import Wanda

__all__ = [
    "CHIP",
    "LAMP",
    "OBD",
    "Alive",
    "BNScale",
    "Criterion",
    "FirstK",
    "Fisher",
    "GateValue",
    "Gathered",
    "GeometricMedian",
    "HRank",
    "Lasso",
    "Magnitude",
    "MaxResponse",
    "Random",
    "Taylor",
    "Wanda",
    "Watched",
    "bn_scales",
    "gather",
    "score_groups",
]

"""Stochastic gates on channels, inputs and weights: which a network gets, what they cost, and how they are closed."""

from lightning_prune.gates.choosing import GRANULARITIES, Choice, GateGranularity, choose
from lightning_prune.gates.constraint import Constraint
from lightning_prune.gates.expected_l0 import ExpectedL0, GateUnit, decay_gradients
from lightning_prune.gates.folding import Folded, fold
from lightning_prune.gates.settings import Estimator, GateSettings, by_pattern

__all__ = [
    "GRANULARITIES",
    "Choice",
    "Constraint",
    "Estimator",
    "ExpectedL0",
    "Folded",
    "GateGranularity",
    "GateSettings",
    "GateUnit",
    "by_pattern",
    "choose",
    "decay_gradients",
    "fold",
]

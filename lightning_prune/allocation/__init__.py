"""How a pruning ratio is shared out: how many channels each group gives and which ones, how many weights each layer."""

from lightning_prune.allocation.base import Allocation
from lightning_prune.allocation.by_cost import ByCost
from lightning_prune.allocation.graded import InProportion, ShallowToDeep
from lightning_prune.allocation.isomorphic import Isomorphic
from lightning_prune.allocation.limits import Limits, RoundTo
from lightning_prune.allocation.plain import Global, Uniform, Zeros
from lightning_prune.allocation.planning import allocate, lowest
from lightning_prune.allocation.weights import DenseLayer, MaskedLayer, WeightAllocation, kept_of_all

__all__ = [
    "Allocation",
    "ByCost",
    "DenseLayer",
    "Global",
    "InProportion",
    "Isomorphic",
    "Limits",
    "MaskedLayer",
    "RoundTo",
    "ShallowToDeep",
    "Uniform",
    "WeightAllocation",
    "Zeros",
    "allocate",
    "kept_of_all",
    "lowest",
]

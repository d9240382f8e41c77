"""Lightning callbacks: the engine, and a preset for each method."""

from lightning_prune.callbacks.base import PruneCallback
from lightning_prune.callbacks.channel_health import ChannelHealthMonitor
from lightning_prune.callbacks.checkpoints import PrunedStateMixin
from lightning_prune.callbacks.distillation import DistillationCallback
from lightning_prune.callbacks.equilibrium import ChannelEquilibriumCallback
from lightning_prune.callbacks.ewc import EWCCallback
from lightning_prune.callbacks.fisher import FisherPruneCallback
from lightning_prune.callbacks.fisher_rao import FisherRaoMonitor
from lightning_prune.callbacks.l0 import L0PruneCallback
from lightning_prune.callbacks.lasso import LassoPruneCallback
from lightning_prune.callbacks.magnitude import MagnitudePruneCallback
from lightning_prune.callbacks.masking import MaskPruneCallback
from lightning_prune.callbacks.monitor import SparsityMonitor
from lightning_prune.callbacks.retraining import Retraining
from lightning_prune.callbacks.rigl import RigLCallback
from lightning_prune.callbacks.slimming import BNSlimmingCallback

__all__ = [
    "BNSlimmingCallback",
    "ChannelEquilibriumCallback",
    "ChannelHealthMonitor",
    "DistillationCallback",
    "EWCCallback",
    "FisherPruneCallback",
    "FisherRaoMonitor",
    "L0PruneCallback",
    "LassoPruneCallback",
    "MagnitudePruneCallback",
    "MaskPruneCallback",
    "PruneCallback",
    "PrunedStateMixin",
    "Retraining",
    "RigLCallback",
    "SparsityMonitor",
]

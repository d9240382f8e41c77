"""How much a network loses when one layer or group at a time is pruned, without retraining."""

from lightning_prune.sensitivity.curves import Row, Sensitivity
from lightning_prune.sensitivity.scan import sensitivity

__all__ = ["Row", "Sensitivity", "sensitivity"]

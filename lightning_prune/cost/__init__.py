"""What models and plans cost."""

from lightning_prune.cost.clock import batch_of, measure_latency
from lightning_prune.cost.counting import count_macs, count_params, per_example, planned_macs

__all__ = ["batch_of", "count_macs", "count_params", "measure_latency", "per_example", "planned_macs"]

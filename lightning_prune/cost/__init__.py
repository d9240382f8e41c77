"""What models and plans cost."""

from lightning_prune.cost.clock import batch_of, measure_calls, measure_latency
from lightning_prune.cost.costs import COUNTED, EXPECTED, Costs
from lightning_prune.cost.counting import count_macs, count_params, per_example, planned_macs
from lightning_prune.cost.expected import ExpectedCost
from lightning_prune.cost.latency import LatencyPrice, predicted_latency
from lightning_prune.cost.planned import PlannedCost
from lightning_prune.cost.preferred import preferred_multiple
from lightning_prune.cost.price import Price, ShapeOf
from lightning_prune.cost.stopwatch import Bench, Stopwatch
from lightning_prune.cost.timings import LatencyTable, Machine

__all__ = [
    "COUNTED",
    "EXPECTED",
    "Bench",
    "Costs",
    "ExpectedCost",
    "LatencyPrice",
    "LatencyTable",
    "Machine",
    "PlannedCost",
    "Price",
    "ShapeOf",
    "Stopwatch",
    "batch_of",
    "count_macs",
    "count_params",
    "measure_calls",
    "measure_latency",
    "per_example",
    "planned_macs",
    "predicted_latency",
    "preferred_multiple",
]

"""The sweep report: what any number of runs left, as one page and as tables."""

from lightning_prune.sweeps.finding import read_runs
from lightning_prune.sweeps.front import pareto_front
from lightning_prune.sweeps.groups import SeedGroup, Spread, seed_groups
from lightning_prune.sweeps.report import Report, write_report
from lightning_prune.sweeps.runs import Broken, Run, Sweep

__all__ = [
    "Broken",
    "Report",
    "Run",
    "SeedGroup",
    "Spread",
    "Sweep",
    "pareto_front",
    "read_runs",
    "seed_groups",
    "write_report",
]

"""`lightning-prune run`: one experiment, or with --multirun a sweep of them."""

from __future__ import annotations

import logging
import math
from typing import Any, TypeAlias

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from lightning_prune.cli.building import experiment_from, folder, limit_threads
from lightning_prune.cli.outcome import clear, finished, write_failure, write_summary
from lightning_prune.cli.words import EXPECTED, Told, in_words, shown
from lightning_prune.report import comparison_table, count

log = logging.getLogger(__name__)

Objectives: TypeAlias = float | tuple[float, ...]
"""What a sweeper is told about a run: one figure, or several."""


@hydra.main(version_base="1.3", config_path="pkg://lightning_prune.conf", config_name="config")
def run(config: DictConfig) -> Objectives:
    """Run one experiment, leave its figures in the run's folder, and return what a sweeper steers by.

    In a sweep, a run that is done is not done again; and one that fails is told about and does not stop the others.
    """
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    known = finished(folder(), config) if sweeping else None
    if known is not None:
        log.info("done before: %s", folder())
        return objectives(config, known)
    if sweeping:
        clear(folder())
    try:
        return objectives(config, _run(config))
    except Exception as error:
        write_failure(folder(), config, error)
        if sweeping and _is_grid():
            log.error("%s failed: %s", folder().name, in_words(error))
            return math.nan
        if isinstance(error, EXPECTED):
            raise Told(in_words(error)) from shown(error)
        raise


def objectives(config: DictConfig, summary: dict[str, Any]) -> Objectives:
    """Return the figures that `objectives` names, such as accuracy.end and macs.pruned.

    Raises:
        ValueError: There is no such figure.
    """
    values = tuple(_figure(summary, name) for name in config.objectives)
    return values[0] if len(values) == 1 else values


def _run(config: DictConfig) -> dict[str, Any]:
    limit_threads(config)
    summary = write_summary(folder(), config, experiment_from(config).run())
    Console().print(comparison_table(_rows(summary), f"Dense against pruned, seed {config.seed}"))
    log.info("everything about this run lies in %s", folder())
    return summary


def _is_grid() -> bool:
    """Whether the sweeper only tries what it was given: one that learns from figures must hear of a failure."""
    return str(HydraConfig.get().sweeper._target_).endswith(".BasicSweeper")


def _figure(summary: dict[str, Any], name: str) -> float:
    found: Any = summary
    for key in name.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, (int, float)):
        known = "accuracy.end, params.pruned, macs.pruned, latency_ms.batch_1.pruned"
        raise ValueError(f"`objectives` names figures of summary.json, such as {known}; got {name!r}.")
    return float(found)


def _rows(summary: dict[str, Any]) -> dict[str, tuple[str, str]]:
    accuracy = summary["accuracy"]
    dense = f"{accuracy['dense']:.2%}" if "dense" in accuracy else "not trained"
    rows = {"test accuracy": (dense, f"{accuracy['end']:.2%}")}
    for name, label in (("params", "parameters"), ("macs", "MACs")):
        left = summary[name]["pruned"] / summary[name]["dense"]
        rows[label] = (count(summary[name]["dense"]), f"{count(summary[name]['pruned'])} ({left:.0%})")
    if "sparsity" in summary:
        rows["zeros in masked weights"] = ("", f"{summary['sparsity']:.1%}")
    for name, times in summary["latency_ms"].items():
        label = f"latency, batch {name.rpartition('_')[2]}"
        rows[label] = (f"{times['dense']:.3f} ms", f"{times['pruned']:.3f} ms")
    return rows

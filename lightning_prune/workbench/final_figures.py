"""What loggers are told when an experiment is over: what it was, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger


def log_final_figures(loggers: Iterable[Logger], hparams: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Log the hyper-parameters together with the final figures, so that TensorBoard's HPARAMS tab compares a sweep.

    Args:
        loggers: Any of Lightning's.
        hparams: Name -> number, text or None.
        summary: What `Experiment.run` found.
    """
    plain = {name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in hparams.items()}
    figures = _figures(summary)
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(plain, figures)
        else:
            logger.log_hyperparams(plain)
            logger.log_metrics(figures)
        logger.save()


def _figures(summary: Mapping[str, Any]) -> dict[str, float]:
    accuracy = {f"final/{name}_accuracy": summary["accuracy"].get(name) for name in ("dense", "end")}
    left = {f"final/{name}": summary[name]["pruned"] for name in ("params", "macs")}
    latency = {f"final/latency_ms/{batch}": times["pruned"] for batch, times in summary["latency_ms"].items()}
    return {name: float(value) for name, value in {**accuracy, **left, **latency}.items() if value is not None}

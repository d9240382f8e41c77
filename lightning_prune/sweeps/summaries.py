"""From the files of one run's folder to the run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from lightning_prune.sweeps.curves import read_curves
from lightning_prune.sweeps.fields import Fields, UnfitError
from lightning_prune.sweeps.runs import Broken, Cut, Pair, Run, Scales

FORMAT = 2
"""The newest summary.json and failure.json that this version reads."""


def read_run(folder: Path, name: str) -> Run | Broken:
    """Read the folder of a run.

    Args:
        folder: It holds summary.json, failure.json or neither.
        name: What the report calls it.
    """
    try:
        if (folder / "summary.json").is_file():
            return _finished(folder, name)
        if (folder / "failure.json").is_file():
            return _failed(folder, name)
    except UnfitError as error:
        return Broken(name, "unreadable", str(error), _command(_given(folder)))
    except OSError as error:
        return Broken(name, "unreadable", f"{error.strerror}: make the folder readable.")
    reason = "It was killed, or still runs: there is neither summary.json nor failure.json. Started again, it ends."
    return Broken(name, "unfinished", reason, _command(_given(folder)))


def _finished(folder: Path, name: str) -> Run:
    summary = _read(folder / "summary.json")
    accuracy, overrides = summary.inside("accuracy"), tuple(map(str, summary.sequence("overrides"))) or _given(folder)
    return Run(
        name=name,
        seed=_seed(summary, overrides),
        choices=summary.texts("choices"),
        overrides=overrides,
        command=summary.text("command", _command(overrides)),
        version=summary.text("version"),
        machine=_machine(summary),
        accuracy=accuracy.number("end"),
        dense_accuracy=accuracy.number_or_none("dense"),
        before_cut=accuracy.number_or_none("val_before_cut"),
        params=_pair(summary.inside("params")),
        macs=_pair(summary.inside("macs")),
        latency_ms={batch: _pair(times) for batch, times in summary.each("latency_ms").items()},
        seconds=_seconds(summary),
        widths={group: _pair(width) for group, width in summary.each("widths").items()},
        cuts=_cuts(summary, accuracy),
        sparsity=summary.number_or_none("sparsity"),
        scales=_scales(summary),
        curves=read_curves(folder / "csv" / "metrics.csv"),
    )


def _failed(folder: Path, name: str) -> Broken:
    failure = _read(folder / "failure.json")
    command = failure.text("command", _command(_given(folder)))
    error = failure.text("error", "It failed, and left no word why.")
    return Broken(name, "failed", error, command, failure.text("traceback"))


def _read(path: Path) -> Fields:
    """Read a file of JSON.

    Raises:
        UnfitError: It is cut off, no mapping, or of a later version.
    """
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnfitError(f"{path.name}: is not JSON ({error}); perhaps only a part of it was written") from error
    except OSError as error:
        raise UnfitError(f"{path.name}: cannot be read ({error.strerror})") from error
    version = Fields(values, path.name).number_or_none("format") or 1
    if version > FORMAT:
        words = f"{path.name}: format is {version:g}, and this lightning-prune reads {FORMAT}"
        raise UnfitError(words, "Install the version that wrote it, or a later one.")
    return Fields(values, path.name if version == FORMAT else f"{path.name} of an older version")


def _seed(summary: Fields, overrides: tuple[str, ...]) -> int | None:
    given = [each.partition("=")[2] for each in overrides if each.lstrip("+").startswith("seed=")]
    return int(given[-1]) if given and given[-1].lstrip("-").isdecimal() else summary.count_or_none("seed")


def _machine(summary: Fields) -> str:
    threads = summary.text("threads")
    words = (summary.text("processor"), f"{threads} thread{'' if threads == '1' else 's'}" if threads else "")
    return ", ".join(word for word in words if word)


def _pair(fields: Fields) -> Pair:
    return Pair(fields.number("dense"), fields.number("pruned"))


def _seconds(summary: Fields) -> dict[str, float]:
    seconds = summary.inside("seconds") if summary.values.get("seconds") else None
    return {} if seconds is None else {str(name): seconds.number(name) for name in seconds.values}


def _cuts(summary: Fields, accuracy: Fields) -> tuple[Cut, ...]:
    events = [Fields(each, "summary.json", f"events[{i}]") for i, each in enumerate(summary.sequence("events"))]
    after = accuracy.numbers("val_after_cut")
    measured = after if len(after) == len(events) else (None,) * len(events)
    return tuple(
        Cut(
            epoch=event.count_or_none("epoch"),
            step=event.count_or_none("step"),
            of=event.text("of", "channels"),
            asked=event.number("asked"),
            reached=event.number("reached"),
            params=event.inside("params").number("after"),
            macs=event.inside("macs").number("after"),
            held_back=event.texts("held_back"),
            accuracy=value,
        )
        for event, value in zip(events, measured, strict=True)
    )


def _scales(summary: Fields) -> Scales | None:
    if summary.values.get("scales") is None:
        return None
    scales = summary.inside("scales")
    rows = [Fields({"counts": row}, "summary.json", f"scales[{i}]") for i, row in enumerate(scales.sequence("counts"))]
    counts = tuple(tuple(map(int, row.numbers("counts"))) for row in rows)
    epochs, edges = tuple(map(int, scales.numbers("epochs"))), scales.numbers("edges")
    if len(counts) != len(epochs) or any(len(row) != len(edges) - 1 for row in counts):
        raise scales.unfit("counts", "do not fit the epochs and edges")
    return Scales(epochs, edges, counts)


def _given(folder: Path) -> tuple[str, ...]:
    """Return the overrides that Hydra noted: a plain list of YAML."""
    try:
        lines = (folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return ()
    return tuple(line[2:].strip().strip("'\"") for line in lines if line.startswith("- "))


def _command(overrides: tuple[str, ...]) -> str:
    return shlex.join(["lightning-prune", *overrides]) if overrides else ""

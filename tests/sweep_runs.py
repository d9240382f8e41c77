"""Folders as runs leave them, made without training anything."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

needs_report = pytest.mark.skipif(
    not (find_spec("plotly") and find_spec("jinja2")), reason="needs pip install 'lightning-prune[report]'"
)

CHOICES = {"data": "digits", "model": "resnet20", "schedule": "one_shot", "criterion": None, "allocation": None}
EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\"&{{ 7 * 7 }}$x$"


def summary(ratio: float = 0.5, seed: int = 0, method: str = "slimming", **more: Any) -> dict[str, Any]:
    """Return a summary of format 2."""
    left = 1 - ratio
    overrides = [f"method={method}", f"method.pruning_ratio={ratio}", f"seed={seed}"]
    return {
        "format": 2,
        "version": "0.1.0",
        "torch": "2.14.1",
        "processor": "x86_64",
        "threads": 1,
        "seed": seed,
        "choices": {**CHOICES, "method": method},
        "overrides": overrides,
        "command": " ".join(["lightning-prune", *overrides]),
        "fingerprint": "0123",
        "accuracy": {
            "dense": 0.98 - 0.002 * seed,
            "end": accuracy(ratio, seed, method),
            "val_before_cut": 0.975,
            "val_after_cut": [0.9 - ratio / 2],
        },
        "seconds": {"dense": 10.2, "pruned": 11.3},
        "events": [
            {
                "epoch": 5,
                "step": 60,
                "of": "channels",
                "asked": ratio,
                "reached": ratio,
                "params": {"before": 272_000, "after": round(272_000 * left)},
                "macs": {"before": 2_550_000, "after": round(2_550_000 * left)},
                "held_back": {"fc": "frozen: reaches the model's output"},
            }
        ],
        "widths": widths(ratio),
        "params": {"dense": 272_000, "pruned": round(272_000 * left)},
        "macs": {"dense": 2_550_000, "pruned": round(2_550_000 * left)},
        "latency_ms": {
            "batch_1": {"dense": 3.2, "pruned": round(3.2 * left**0.3 + 0.01 * seed, 3)},
            "batch_64": {"dense": 21.0, "pruned": round(21 * left**0.7 + 0.1 * seed, 3)},
        },
        "scales": scales(ratio),
        **more,
    }


def accuracy(ratio: float, seed: int, method: str) -> float:
    """Return a test accuracy that falls with the ratio, faster for some methods."""
    weakness = 0.05 + 0.01 * (sum(map(ord, method)) % 5)
    return round(0.98 - weakness * ratio**2.5 - 0.0031 * (seed * 7 % 3), 4)


def widths(ratio: float) -> dict[str, dict[str, int]]:
    """Return 20 layers; the middle ones lose most."""
    names = ["conv1", *(f"layer{i}.{j}.conv{k}" for i in (1, 2, 3) for j in (0, 1, 2) for k in (1, 2)), "fc"]
    dense = [16, *(16 * 2 ** (i - 1) for i in (1, 2, 3) for _ in range(6)), 10]
    shares = [1 - ratio * (0.6 + 0.4 * ((7 * i) % 5) / 4) for i in range(19)] + [1.0]
    return {
        name: {"dense": wide, "pruned": max(round(wide * share), 1)}
        for name, wide, share in zip(names, dense, shares, strict=True)
    }


def scales(ratio: float, epochs: int = 16, bins: int = 40) -> dict[str, Any]:
    """Return histograms in which a share of the scales wanders to zero."""
    counts = []
    for epoch in range(epochs):
        row = [0] * bins
        for channel in range(688):
            begin = 0.5 + 0.004 * (channel * 37 % 101 - 50)
            dies = (channel * 13 % 100) / 100 < ratio
            scale = begin * max(1 - epoch / 9, 0.02) if dies else begin * (1 + 0.02 * epoch)
            row[min(int(scale * bins / 1.1), bins - 1)] += 1
        counts.append(row)
    return {"epochs": list(range(epochs)), "edges": [1.1 * i / bins for i in range(bins + 1)], "counts": counts}


def write_run(folder: Path, content: dict[str, Any] | None = None, metrics: bool = True) -> Path:
    """Write the folder of a finished run."""
    content = content or summary()
    write_hydra(folder, content.get("overrides", []))
    (folder / "summary.json").write_text(json.dumps(content))
    if metrics:
        write_metrics(folder)
    return folder


def write_failure(folder: Path, **more: Any) -> Path:
    """Write the folder of a run that raised."""
    write_hydra(folder, ["method=slimming", "method.pruning_ratio=1.5"])
    words = "ValueError: `pruning_ratio` is the fraction of channels to remove, in [0, 1); got 1.5. For 40 % pass 0.4."
    failure = {"format": 2, "seed": 0, "command": "lightning-prune method=slimming", "error": words, "traceback": "At"}
    (folder / "failure.json").write_text(json.dumps({**failure, **more}))
    return folder


def write_hydra(folder: Path, overrides: list[str]) -> Path:
    """Write what Hydra leaves before a run begins."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {each}\n" for each in overrides) or "[]\n")
    (folder / ".hydra" / "hydra.yaml").write_text("hydra:\n  job:\n    name: run\n    config_name: config\n")
    return folder


def write_metrics(folder: Path, epochs: int = 16, steps: int = 12) -> None:
    """Write what Lightning's CSVLogger leaves: sparse rows."""
    (folder / "csv").mkdir()
    with (folder / "csv" / "metrics.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, ["epoch", "step", "train/acc", "train/loss", "val/acc", "val/loss", "test/acc"])
        writer.writeheader()
        for epoch in range(epochs):
            when = {"epoch": epoch, "step": steps * (epoch + 1) - 1}
            dip = 0.25 if epoch == 5 else 0.0
            far = 0.8 ** (epoch + 1)
            writer.writerow({**when, "val/acc": 0.98 - 0.7 * far - dip, "val/loss": 0.1 + 2 * far + 2 * dip})
            writer.writerow({**when, "train/acc": 0.99 - 0.7 * far - dip, "train/loss": 0.05 + 2 * far + 2 * dip})
        writer.writerow({"epoch": epochs, "step": steps * epochs, "test/acc": 0.97})


def write_sweep(folder: Path) -> Path:
    """Write a sweep: three methods, four ratios, three seeds; one run failed, one was killed, one file is cut off."""
    for method in ("slimming", "magnitude", "fisher"):
        for ratio in (0.3, 0.5, 0.7, 0.9):
            for seed in (0, 1, 2):
                write_run(folder / f"method={method},ratio={ratio},seed={seed}", summary(ratio, seed, method))
    write_failure(folder / "method=slimming,ratio=1.5")
    write_hydra(folder / "method=slimming,ratio=0.99", ["method=slimming", "method.pruning_ratio=0.99"])
    cut_off = write_run(folder / "method=fisher,ratio=0.2")
    (cut_off / "summary.json").write_text('{"format": 2, "accuracy": {"end": 0.9')
    return folder


def evil_sweep(folder: Path) -> Path:
    """Write runs in which every text that can be one is markup."""
    for number, method in enumerate(("magnitude", EVIL)):
        content = summary(seed=number, method=method, version=EVIL, processor=EVIL)
        content["choices"] |= {"data": f"data {EVIL}", "model": f"{number}{EVIL}"}
        content["widths"] = {f"{EVIL}{i}": {"dense": 8, "pruned": 4} for i in range(3)}
        content["latency_ms"] = {EVIL: {"dense": 2.0, "pruned": 1.0}}
        content["events"][0] |= {"of": EVIL, "held_back": {f"group {EVIL}": f"reason {EVIL}"}}
        content["overrides"].append(f"{EVIL}={EVIL}")
        write_run(folder / f"{number}<b>&", content)
    write_failure(folder / "2<img src=x>", error=EVIL, traceback=EVIL, command=EVIL)
    return folder

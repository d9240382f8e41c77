"""What every result says of itself: when, with which code, versions and machine; and how it is kept on disk."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightning_prune.cost import Machine

PEERS = ("torch-pruning", "torch-kirigami", "onnxruntime")


def circumstances() -> dict[str, object]:
    """When, with which code and on what a result was measured."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("lightning"),
        **{peer: found for peer in PEERS if (found := installed(peer))},
        "threads": torch.get_num_threads(),
        "machine": Machine.here(torch.device("cpu")).device,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def installed(package: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def note(out: Path, result: Mapping[str, object]) -> None:
    """Append one result as a line of JSON; a last line that was cut short makes room for it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("ab+") as lines:
        lines.seek(0)
        lines.truncate(lines.read().rfind(b"\n") + 1)
        lines.write(json.dumps(result).encode() + b"\n")


def noted(out: Path) -> list[dict[str, Any]]:
    """The results in a file, in the order in which they came; a last line that was cut short is left out."""
    lines = out.read_text(encoding="utf-8").splitlines(keepends=True) if out.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _commit() -> str:
    here = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    said = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return said.stdout.strip() or "unknown"

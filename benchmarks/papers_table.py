"""Results on disk, one JSON a line, and the table that puts them beside the papers' figures."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean, stdev

import lightning
import torch
from papers_rows import Row


def circumstances() -> dict[str, object]:
    """When, with which code and on what a result was measured."""
    return {
        "commit": _commit(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def note(out: Path, result: dict[str, object]) -> None:
    """Append one result."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(result) + "\n")


def done(out: Path) -> dict[tuple[str, int], dict[str, object]]:
    """The last result of each row and seed."""
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    results = [json.loads(line) for line in lines]
    return {(result["row"], result["seed"]): result for result in results}


def table(rows: list[Row], out: Path) -> str:
    """One line for each row and figure: mean +- standard deviation over the seeds, and the paper's."""
    results = done(out)
    lines = ["| row | figure | here | seeds | paper |", "|---|---|---|---|---|"]
    for row in rows:
        runs = [result for (name, _), result in sorted(results.items()) if name == row.name]
        names = dict.fromkeys(["error", *row.paper, *(key for run in runs for key in run if _is_figure(run[key]))])
        lines += [_line(row, name, [run[name] for run in runs if name in run]) for name in names]
    return "\n".join(lines)


def _is_figure(value: object) -> bool:
    return isinstance(value, float)


def _line(row: Row, name: str, values: list[float]) -> str:
    spread = f" +- {stdev(values):.2g}" if len(values) > 1 else ""
    here = f"{mean(values):.4g}{spread}" if values else "not run"
    paper = f"{row.paper[name]:g}" if name in row.paper else ""
    return f"| {row.name} | {name} | {here} | {len(values)} | {paper} |"


def _commit() -> str:
    here = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    said = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return said.stdout.strip() or "unknown"

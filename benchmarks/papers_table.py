"""Results on disk, one JSON a line, and the table that puts them beside the papers' figures."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

from circumstances import noted
from papers_rows import Row


def done(out: Path) -> dict[tuple[str, int], dict[str, object]]:
    """The last result of each row and seed."""
    return {(result["row"], result["seed"]): result for result in noted(out)}


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

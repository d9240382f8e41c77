"""The picture of the Pareto benchmark: accuracy against the MACs that are left, a panel for each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from pareto_table import Row, cells_of
from pareto_ways import WAYS

_COLOURS = {"ours": "tab:blue", "Torch-Pruning": "tab:orange", "torch-kirigami": "tab:green", "-": "tab:gray"}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw means and standard deviations; each library's best method at each target is joined by a line.

    Args:
        rows: What was measured.
        path: Where the picture is written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    cells = cells_of(rows)
    tasks = list(dict.fromkeys(task for task, _ in cells))
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(5 * len(tasks), 4.2), squeeze=False, layout="constrained")
    for panel, task in zip(panels[0], tasks, strict=True):
        best: dict[str, dict[float, float]] = {}
        for (name, target), ways in sorted(cells.items()):
            for way, cell in ways.items():
                if name != task or not target or not cell.runs or not WAYS[way].cuts:
                    continue
                library, left = WAYS[way].library, 100 * (1 - mean(cell.values("removed")))
                spread = stdev(cell.values("accuracy")) if len(cell.runs) > 1 else 0
                panel.errorbar(left, cell.mean, spread, fmt=".", alpha=0.45, color=_COLOURS[library], elinewidth=0.7)
                best.setdefault(library, {})[target] = max(cell.mean, best.get(library, {}).get(target, 0.0))
        for library, points in best.items():
            label = {"ours": "lightning_prune", "-": "narrow from scratch"}.get(library, library)
            left = [100 * (1 - target) for target in points]
            panel.plot(left, list(points.values()), "-", color=_COLOURS[library], label=f"{label}, best", linewidth=1.4)
        dense = cells.get((task, 0.0), {}).get("dense")
        if dense is not None and dense.runs:
            panel.axhline(dense.mean, color="black", linewidth=0.8, linestyle=":", label="dense, before")
        panel.set(title=task, xlabel="MACs left, %", ylabel="test accuracy, %")
        lines = [accuracy for points in best.values() for accuracy in points.values()]
        if lines:  # what collapses would press all others together
            panel.set_ylim(bottom=min(lines) - 1.5 * (max(lines) - min(lines)) - 0.1)
        panel.grid(alpha=0.25)
    panels[0][0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

"""The data of a report: a row for each run as CSV, and everything as JSON."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from typing import Any

from lightning_prune.sweeps.figures import costs, fronts
from lightning_prune.sweeps.groups import SeedGroup
from lightning_prune.sweeps.runs import Broken, Run, Sweep

FORMAT = 1
"""Of runs.json."""


def to_csv(sweep: Sweep) -> str:
    """Write a row for each run, those without figures as well; settings and figures have a column each."""
    rows = [*map(_finished, sweep.runs), *map(_broken, sweep.broken)]
    first = ("folder", "state", "seed")
    columns = dict.fromkeys((*first, *sorted({name for row in rows for name in row if name.startswith("setting.")})))
    columns |= dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_json(sweep: Sweep, groups: tuple[SeedGroup, ...]) -> str:
    """Write all that the report knows: runs, groups of seeds with means and spreads, and what is broken."""
    data = {
        "format": FORMAT,
        "runs": [{"id": run.id, **asdict(run)} for run in sweep.runs],
        "groups": _groups(groups),
        "broken": [asdict(each) for each in sweep.broken],
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def _finished(run: Run) -> dict[str, Any]:
    figures: dict[str, Any] = {"accuracy": run.accuracy, "accuracy.dense": run.dense_accuracy}
    for name, pair in run.costs.items():
        label = name if name in ("macs", "params") else f"latency_ms.{name}"
        figures |= {label: pair.pruned, f"{label}.dense": pair.dense}
    seconds = {f"seconds.{network}": value for network, value in run.seconds.items()}
    settings = {f"setting.{name}": value for name, value in run.settings.items()}
    more = {"sparsity": run.sparsity, "accuracy.before_cut": run.before_cut, "cuts": len(run.cuts)}
    told = {"machine": run.machine, "version": run.version, "command": run.command}
    return {"folder": run.name, "state": "finished", "seed": run.seed, **settings, **figures, **seconds, **more, **told}


def _broken(run: Broken) -> dict[str, Any]:
    return {"folder": run.name, "state": run.state, "command": run.command, "error": run.reason}


def _groups(groups: tuple[SeedGroup, ...]) -> list[dict[str, Any]]:
    front = fronts(groups)
    return [
        {
            "settings": group.settings,
            "runs": [run.id for run in group.runs],
            "accuracy": _plain(group, None),
            **{name: _plain(group, name) for name in costs([group])},
            "front_of": front[group.id],
        }
        for group in groups
    ]


def _plain(group: SeedGroup, cost: str | None) -> dict[str, Any] | None:
    found = group.spread(lambda run: run.accuracy) if cost is None else group.cost(cost)
    return None if found is None else asdict(found)

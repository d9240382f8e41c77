"""The page: one file with its figures, its script and Plotly inside, which asks no network for anything."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from lightning_prune.errors import ReportError
from lightning_prune.sweeps.figures import costs, datasets, front_figure
from lightning_prune.sweeps.groups import SeedGroup, common, varying
from lightning_prune.sweeps.rows import run_title, table
from lightning_prune.sweeps.run_figures import MANY_LAYERS, run_figures
from lightning_prune.sweeps.runs import Cut, Run, Sweep
from lightning_prune.sweeps.wording import accuracy, cost, cost_heading, cost_name, count, percent, short

_INSTALL = "The report draws with plotly and jinja2. Install them: pip install 'lightning-prune[report]'"

_ENDS = 10


def render(sweep: Sweep, groups: Sequence[SeedGroup]) -> str:
    """Write the page.

    Whatever comes from runs is text in it: the template escapes, figures are escaped for Plotly, and a content security
    policy lets no script run but the two that are the page's own.

    Raises:
        ReportError: plotly or jinja2 is not installed.
    """
    environment, (plotly, plotly_hash) = _environment(), _plotly()
    script, names = _file("page.js"), varying(groups)
    return str(
        environment.get_template("page.html.jinja").render(
            sweep=sweep,
            table=table(groups),
            common=common(groups),
            costs=costs(groups),
            datasets=list(datasets(groups)),
            machines=sorted({run.machine for run in sweep.runs}),
            titles={run.id: run_title(run, names) for run in sweep.runs},
            told_cuts=_told_cuts,
            many_layers=MANY_LAYERS,
            held_back={run.id: _held_back(run) for run in sweep.runs},
            style=_file("page.css"),
            script=script,
            hashes=[_hash(script), plotly_hash],
            plotly=plotly,
            figures=packed(json.dumps(_figures(sweep, groups), allow_nan=False, separators=(",", ":"))),
        )
    )


def packed(text: str) -> str:
    """Return a text as gzip in base64, which the page unpacks: Plotly takes 2 MB instead of 5.

    >>> gzip.decompress(base64.b64decode(packed("<script>"))).decode()
    '<script>'
    """
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _figures(sweep: Sweep, groups: Sequence[SeedGroup]) -> dict[str, Any]:
    fronts = {
        data: {
            name: {"runs": front_figure(alike, name, False), "means": front_figure(alike, name, True)}
            for name in costs(groups)
        }
        for data, alike in datasets(groups).items()
    }
    return {"fronts": fronts, "runs": {run.id: run_figures(run) for run in sweep.runs}}


def _told_cuts(run: Run) -> list[Cut | None]:
    """Return the cuts to tell; of many the first and the last, and None for those between."""
    few = len(run.cuts) <= 2 * _ENDS
    return list(run.cuts) if few else [*run.cuts[:_ENDS], None, *run.cuts[-_ENDS:]]


def _held_back(run: Run) -> dict[str, list[str]]:
    """Return why groups lost less than was planned in the last cut: reason -> groups."""
    found: dict[str, list[str]] = {}
    for group, reason in (run.cuts[-1].held_back if run.cuts else {}).items():
        found.setdefault(reason, []).append(group)
    return found


def _environment() -> Any:
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
    except ImportError as error:
        raise ReportError(_INSTALL) from error
    environment = Environment(
        autoescape=True, loader=FunctionLoader(_file), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {each.__name__: each for each in (accuracy, count, percent, cost_name, cost_heading, short)}
    environment.globals["cost"] = cost
    return environment


@cache
def _plotly() -> tuple[str, str]:
    """Return Plotly's script, packed, and its hash."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ReportError(_INSTALL) from error
    script = str(get_plotlyjs())
    return packed(script), _hash(script)


def _file(name: str) -> str:
    return files("lightning_prune.sweeps").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"

"""Writes benchmarks/README.md: every table with its machine, versions, seeds, date and command.

    python benchmarks/tables.py [--check]

Nothing is measured: the figures are those of the result files beside it. With --check nothing is written either; the
exit status tells whether README.md is what would be written.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from circumstances import PEERS, markdown, noted
from pareto_picture import draw

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
PICTURE = HERE / "pareto.png"
PARTS = {
    "pareto": "The same task, the same budget",
    "events": "What a prune event costs",
    "overhead": "What callbacks cost in a training step",
    "speedup": "What a cut buys",
    "scale": "How cost grows with depth and width",
}
"""Name of the script -> title of its tables."""
INTRODUCTION = """# Benchmarks

Written by `python benchmarks/tables.py` from the result files in this folder; do not edit. To measure again:
`pip install -e ".[bench]"`, then the command above each table. Machines were shared with other work: trust ratios,
which are of one run, more than times."""


def page() -> str:
    """The whole page."""
    return "\n\n".join([INTRODUCTION, *_parts(), "## All benchmarks", _index()]) + "\n"


def _parts() -> Iterator[str]:
    for name, title in PARTS.items():
        found = next((path for ending in ("jsonl", "json") if (path := HERE / f"{name}.{ending}").exists()), None)
        if found is None:
            yield f"## {title}\n\nNot measured yet: `python benchmarks/{name}.py`."
            continue
        module = importlib.import_module(name)
        if found.suffix == ".jsonl":
            rows = noted(found)
            results: Any = rows
            told = [(f"python benchmarks/{name}.py --data ROOT", row) for row in rows]
        else:
            results = json.loads(found.read_text(encoding="utf-8"))
            told = [(str(results["command"]), results["circumstances"])]
        seeds = sorted({row["seed"] for row in rows}) if found.suffix == ".jsonl" else []
        yield f"## {title}\n\n{told_of(told, seeds)}"
        if name == "pareto":
            yield f"![Accuracy against the MACs that are left]({PICTURE.name})"
        yield module.table(results)


def told_of(measured: Iterable[tuple[str, Mapping[str, Any]]], seeds: Iterable[int] = ()) -> str:
    """Commands, machines, versions, dates and seeds of some measurements, each named once."""
    runs = list(measured)
    versions = ["python", "torch", "lightning", *PEERS]

    def all_of(key: str) -> str:
        return ", ".join(sorted({str(run[key]) for _, run in runs if key in run}))

    lines = [f"`{command}`" for command in dict.fromkeys(command for command, _ in runs)]
    dates = sorted({str(run["time"])[:10] for _, run in runs})
    lines += [f"{all_of('machine')}, threads: {all_of('threads')}; {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}"]
    lines += [", ".join(f"{name} {all_of(name)}" for name in versions if all_of(name))]
    lines += [f"commit {all_of('commit')}" + (f"; seeds {', '.join(map(str, seeds))}" if seeds else "")]
    return "  \n".join(lines)


def _index() -> str:
    rows = []
    stems = sorted((script.stem for script in HERE.glob("*.py")), key=len)
    results: dict[str, list[str]] = {}
    for path in sorted(HERE.glob("*.json*")):
        of = [stem for stem in stems if path.stem == stem or path.stem.startswith(f"{stem}_")]
        results.setdefault(of[-1] if of else "", []).append(f"[{path.name}]({path.name})")
    for script in sorted(HERE.glob("*.py")):
        tree = ast.parse(script.read_text(encoding="utf-8"))
        said = ast.get_docstring(tree) or ""
        if any(isinstance(node, ast.If) and "__name__" in ast.dump(node.test) for node in tree.body):
            first = said.split("\n\n")[0].split(": `python")[0].replace("\n", " ").replace("|", "\\|")
            rows.append([f"[{script.name}]({script.name})", first, ", ".join(results.get(script.stem, []))])
    return markdown(["script", "what it measures", "results here"], rows).replace("---:", "---")


def main(arguments: list[str] | None = None) -> None:
    """Write the page and the picture, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(arguments)
    text = page()
    if given.check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit("benchmarks/README.md is not what the result files say; run `python benchmarks/tables.py`.")
        return
    PAGE.write_text(text, encoding="utf-8")
    if (HERE / "pareto.jsonl").exists():
        draw(noted(HERE / "pareto.jsonl"), PICTURE)


if __name__ == "__main__":
    main()

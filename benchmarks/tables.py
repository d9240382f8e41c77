"""Writes benchmarks/README.md: every table with its machine, versions, seeds, date and command.

    python benchmarks/tables.py [--check]

Nothing is measured: the figures are those of the result files beside it. With --check nothing is written either; the
exit status tells whether README.md is what would be written.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from circumstances import PEERS, noted
from layout import markdown
from pareto_picture import draw

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
PICTURE = HERE / "pareto.png"
PARTS = {
    "pareto": (
        "The same task, the same budget",
        "python benchmarks/pareto.py --data ROOT",
    ),
    "events": ("What a prune event costs", "python benchmarks/events.py"),
    "overhead": ("What callbacks cost", "python benchmarks/overhead.py"),
    "speedup": ("What a cut buys", "python benchmarks/speedup.py"),
    "scale": ("How cost grows with depth and width", "python benchmarks/scale.py"),
}
"""Name of the script -> title of its tables, and the command that measures them."""
INTRODUCTION = """# Benchmarks

Written by `python benchmarks/tables.py` from the result files in this folder; do not edit. To measure again:
`pip install -e ".[bench]"`, then the command above each table. Machines were shared with other work: trust ratios,
which are of one run, more than times."""


def page() -> str:
    """The whole page."""
    return "\n\n".join([INTRODUCTION, *_parts(), "## All benchmarks", _index()]) + "\n"


def _parts() -> Iterator[str]:
    for name, (title, command) in PARTS.items():
        rows = noted(HERE / f"{name}.jsonl")
        said = f"`{command}`  \n{measured_on(rows)}" if rows else f"Not measured yet: `{command}`."
        yield f"## {title}\n\n{said}"
        if rows and name == "pareto":
            yield f"![Accuracy against the MACs that are left]({PICTURE.name})"
        if rows:
            yield importlib.import_module(name).table(rows)


def measured_on(rows: Sequence[Mapping[str, Any]]) -> str:
    """Machines, versions, dates, commits and seeds of some results, each named once."""

    def all_of(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row[key]) for row in rows if key in row))

    dates = sorted({str(row["time"])[:10] for row in rows})
    seeds = all_of("seed")
    lines = [
        f"{all_of('machine')}, threads: {all_of('threads')}; {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}",
        ", ".join(f"{name} {all_of(name)}" for name in ("python", "torch", "lightning", *PEERS) if all_of(name)),
        f"commit {all_of('commit')}" + (f"; seeds {seeds}" if seeds else ""),
    ]
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
    return markdown(["script", "what it measures", "results here"], rows, words=True)


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
    if rows := noted(HERE / "pareto.jsonl"):
        draw(rows, PICTURE)


if __name__ == "__main__":
    main()

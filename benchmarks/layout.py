"""Figures as text: tables in Markdown, and medians with their quartiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import quantiles


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False) -> str:
    """A table; all columns but the first stand on the right, unless they hold words."""
    head = [header, ["---", *["---" if words else "---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in head)


def middle(values: Sequence[float], form: str = ".2f") -> str:
    """Median and quartiles, as text."""
    if len(values) < 2:
        return format(values[0], form) if values else ""
    low, median, high = quantiles(values, n=4, method="inclusive")
    return f"{median:{form}} ({low:{form}} to {high:{form}})"

"""The pictures of the site, as SVG: `python docs/pictures/draw.py` writes them beside this file.

Their colours are middle tones on no background, so that they can be read on light pages and on dark ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from lightning_prune import schedules

GREY, PALE, BLUE, ORANGE, GREEN, RED = "#757b84", "#9aa1ab", "#2f74c0", "#c8702a", "#2f8f5b", "#c2453d"
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"


def text(
    x: float, y: float, words: str, colour: str = GREY, size: int = 14, at: str = "middle", bold: bool = False
) -> str:
    style = f"font-size='{size}' text-anchor='{at}'" + (" font-weight='600'" if bold else "")
    return f"<text x='{x:g}' y='{y:g}' fill='{colour}' {style}>{escape(words)}</text>"


def box(
    x: float, y: float, w: float, h: float, fill: str = "none", line: str = GREY, round: float = 0, solid: float = 1
) -> str:
    return (
        f"<rect x='{x:g}' y='{y:g}' width='{w:g}' height='{h:g}' rx='{round:g}' fill='{fill}' fill-opacity='{solid:g}' "
        f"stroke='{line}'/>"
    )


def line(points: Sequence[tuple[float, float]], colour: str = GREY, width: float = 1.5, arrow: bool = False) -> str:
    way = " ".join(f"{x:g},{y:g}" for x, y in points)
    head = f" marker-end='url(#{colour[1:]})'" if arrow else ""
    return f"<polyline points='{way}' fill='none' stroke='{colour}' stroke-width='{width:g}'{head}/>"


def circle(x: float, y: float, r: float, fill: str, edge: str) -> str:
    return f"<circle cx='{x:g}' cy='{y:g}' r='{r:g}' fill='{fill}' stroke='{edge}' stroke-width='1.5'/>"


def picture(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    heads = "".join(
        f"<marker id='{colour[1:]}' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' "
        f"orient='auto'><path d='M0,0 L8,4 L0,8 z' fill='{colour}'/></marker>"
        for colour in (GREY, BLUE, ORANGE, GREEN)
    )
    body = "\n".join(parts)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
        f"role='img' {FONT}>\n<title>{escape(title)}</title>\n<defs>{heads}</defs>\n{body}\n</svg>\n"
    )


def weight(
    x: float, y: float, name: str, rows: str | None, columns: str | None, goes: int = 2, n: int = 5
) -> list[str]:
    """A weight as a square of outputs (rows) by inputs (columns), coloured where the group's channel `goes`."""
    cell = 18
    made = [box(x + cell * c, y + cell * r, cell, cell, line=PALE) for r in range(n) for c in range(n)]
    if rows:
        made += [box(x, y + cell * goes, cell * n, cell, rows, rows, solid=0.75)]
    if columns:
        made += [box(x + cell * goes, y, cell, cell * n, columns, columns, solid=0.75)]
    return [*made, text(x + cell * n / 2, y - 10, name, bold=True)]


def vector(x: float, y: float, name: str, colour: str, goes: int = 2, n: int = 5) -> list[str]:
    """A vector of a value for each channel."""
    cells = [box(x, y + 18 * r, 18, 18, colour if r == goes else "none", PALE, solid=0.75) for r in range(n)]
    return [*cells, text(x + 9, y - 10, name, bold=True)]


def group() -> str:
    """Two channel groups of a residual block: the trunk's and the one inside of the branch."""
    y, parts = 60.0, []
    parts += weight(30, y, "stem", ORANGE, None)
    parts += weight(200, y, "conv1", BLUE, ORANGE)
    parts += vector(330, y, "bn1", BLUE)
    parts += weight(400, y, "conv2", ORANGE, BLUE)
    parts += vector(530, y, "bn2", ORANGE)
    parts += weight(670, y, "head", None, ORANGE)
    middle = y + 45
    for a, b in ((122, 196), (292, 326), (350, 396), (492, 526), (550, 588), (614, 666)):
        parts.append(line([(a, middle), (b, middle)], arrow=True))
    parts += [circle(601, middle, 12, "none", GREY), text(601, middle + 6, "+", size=18)]
    parts += [line([(150, middle), (150, 190), (601, 190), (601, middle + 15)], arrow=True)]
    parts.append(text(375, 208, "shortcut: what is summed has the same channels"))
    parts += [box(30, 232, 14, 14, ORANGE, ORANGE), text(52, 244, "group “stem”: channel 2 lives in", at="start")]
    parts.append(text(52, 263, "stem (row), conv1 (column), conv2 (row), bn2, head (column)", at="start"))
    parts += [box(520, 232, 14, 14, BLUE, BLUE), text(542, 244, "group “conv1”: channel 2 lives in", at="start")]
    parts.append(text(542, 263, "conv1 (row), bn1, conv2 (column)", at="start"))
    title = "A channel of a residual trunk lives in the weights that write it and in all that read it"
    return picture(800, 280, title, parts)


def labels() -> str:
    """The example of how_it_works.md: which labels of conv, bn and fc are tied."""
    colours, parts = (BLUE, ORANGE, GREEN, RED), []
    step, left = 42, 190
    rows = ((14, "conv.weight, dim 0", "c", 4), (96, "bn.weight", "b", 4), (206, "fc.weight, dim 1", "f", 16))
    for y, name, letter, n in rows:
        wide = 16 / n
        parts.append(text(10, y + 18, name, at="start", bold=True))
        for k in range(n):
            colour, x = colours[k * 4 // n], left + step * (k if n == 16 else k * wide + 1.5)
            parts += [box(x, y, step - 6, 26, colour, colour, round=3, solid=0.85)]
            parts += [text(x + (step - 6) / 2, y + 18, f"{letter}{k}", "#ffffff", bold=True)]
    for k in range(4):
        x = left + step * (k * 4 + 1.5) + 18
        parts.append(line([(x, 40), (x, 95)], colours[k], 2))
        for i in range(4):
            parts.append(line([(x, 122), (left + step * (4 * k + i) + 18, 205)], colours[k], 1.5))
    told = ((64, "BatchNorm: what has shape (C)", "belongs to the channels"),)
    told += ((156, "flatten: channel k is now", "at positions 4k .. 4k + 3"),)
    for y, *words in told:
        parts += [text(10, y + 17 * row, each, at="start", size=12) for row, each in enumerate(words)]
    parts.append(text(left + step * 8, 260, "a colour is a channel: what has it lives or dies together", bold=True))
    return picture(880, 272, "Labels that a convolution, a BatchNorm and a linear layer share", parts)


def timeline() -> str:
    """Where in a fit a cut falls, and what happens in it."""
    y, parts = 50.0, []
    spans = ((20, 170, "epoch 2: steps", PALE), (200, 90, "validation", PALE), (300, 96, "checkpoint", PALE))
    for x, w, words, colour in (*spans, (426, 90, "CUT", RED), (536, 190, "epoch 3: steps", PALE)):
        solid = 0.9 if words == "CUT" else 0.18
        parts += [box(x, y, w, 36, colour, colour, round=4, solid=solid)]
        parts += [text(x + w / 2, y + 23, words, "#ffffff" if words == "CUT" else GREY, bold=True)]
    parts.append(line([(10, y + 54), (745, y + 54)], arrow=True))
    parts.append(line([(411, 28), (411, y + 64)], PALE))
    parts.append(text(411, 20, "the first thing of epoch 3"))
    parts += [line([(426, y + 36), (20, 170)], RED, 1), line([(516, y + 36), (736, 170)], RED, 1)]
    steps = (
        ("plan", "read, score, share", "out, try the cut out"),
        ("agree", "all ranks take the", "plan of rank 0"),
        ("cut", "network, copies,", "optimizer, history"),
        ("check", "each parameter in", "one param group"),
        ("go on", "DDP, BatchNorm", "anew; log; train"),
    )
    for at, (name, *words) in enumerate(steps):
        x = 20 + 145 * at
        colour = RED if name in ("cut", "check") else GREY
        parts += [box(x, 170, 136, 74, colour, colour, round=4, solid=0.12), text(x + 68, 190, name, colour, bold=True)]
        parts += [text(x + 68, 211 + 18 * row, each, size=13) for row, each in enumerate(words)]
    parts.append(line([(312, 254), (312, 262), (589, 262), (589, 254)], RED, 1.5))
    parts.append(text(450, 282, "all of it or none; signals wait", RED))
    return picture(760, 294, "A cut falls at the start of an epoch, and is all or nothing", parts)


SCORES = {
    "conv1": (0.95, 0.9, 0.86, 0.8, 0.78, 0.7, 0.66, 0.6, 0.55, 0.5),
    "conv2": (0.85, 0.8, 0.74, 0.7, 0.62, 0.5, 0.46, 0.36, 0.3, 0.24),
    "conv3": (0.7, 0.6, 0.52, 0.4, 0.34, 0.3, 0.24, 0.2, 0.16, 0.1),
    "conv4": (0.5, 0.34, 0.28, 0.22, 0.18, 0.16, 0.12, 0.1, 0.08, 0.05),
}


def allocation() -> str:
    """Half of the channels of four groups by `Uniform()` and by `Global()`, with made-up scores."""
    order = sorted(score for scores in SCORES.values() for score in scores)
    bound = (order[19] + order[20]) / 2
    parts = []
    for at, (name, words) in enumerate((("Uniform()", "half of every group"), ("Global()", "the lowest half of all"))):
        left = 30 + 390 * at
        parts.append(text(left, 24, name, at="start", bold=True, size=16))
        parts.append(text(left + 100, 24, words, at="start"))
        for column, (layer, scores) in enumerate(SCORES.items()):
            x, kept = left + 90 * column, 0
            for k, score in enumerate(scores):
                stays = k < 5 if name == "Uniform()" else score > bound
                kept += stays
                height = 120 * score
                fill, edge = (BLUE, BLUE) if stays else ("none", PALE)
                parts.append(box(x + 8 * k, 165 - height, 6, height, fill, edge, solid=0.85))
            parts.append(text(x + 39, 184, layer))
            parts.append(text(x + 39, 203, f"{kept} of 10 stay", size=13))
        if name == "Global()":
            parts.append(line([(left - 6, 165 - 120 * bound), (left + 356, 165 - 120 * bound)], RED, 1))
    return picture(780, 214, "Uniform allocation takes half of every group, global allocation the lowest scores", parts)


def curves() -> str:
    """The six schedules."""
    named = ("one_shot", "linear", "cubic", "cosine", "exponential", "one_cycle")
    parts = []
    for at, name in enumerate(named):
        left, top, curve = 24 + 126 * at, 34, getattr(schedules, name)
        parts += [box(left, top, 100, 90, line=PALE), text(left + 50, 20, name, bold=True)]
        points = [(left + t, top + 90 - 86 * curve(t / 100)) for t in range(0, 101, 2)]
        if name == "one_shot":
            points = [(left, top + 90.0), *points]
        parts.append(line(points, BLUE, 2.5))
        parts += [text(left, 142, "begin", at="start", size=12), text(left + 100, 142, "end", at="end", size=12)]
    return picture(780, 152, "How much of the ratio is gone, from begin to end, by each schedule", parts)


def enfilade() -> str:
    """The rooms that a cut goes through."""
    rooms = (
        ("find_groups", "what goes together"),
        ("score", "criterion"),
        ("allocate", "how many of each"),
        ("verify", "try the plan out"),
        ("remove", "surgery"),
        ("rebuild", "optimizer follows"),
        ("record", "history, report"),
    )
    parts = []
    for at, (name, words) in enumerate(rooms):
        x, colour = 10 + 138 * at, RED if at > 3 else BLUE
        parts += [box(x, 20, 122, 58, colour, colour, round=4, solid=0.14), text(x + 61, 44, name, colour, bold=True)]
        parts.append(text(x + 61, 65, words, size=12))
        if at:
            parts.append(line([(x - 16, 49), (x - 2, 49)], arrow=True))
    parts.append(text(276, 104, "pure functions of names, positions and scores"))
    parts.append(text(762, 104, "only these change anything"))
    return picture(970, 116, "From a model to a smaller one, step by step", parts)


PICTURES = {
    "allocation": allocation,
    "enfilade": enfilade,
    "group": group,
    "labels": labels,
    "schedules": curves,
    "timeline": timeline,
}

if __name__ == "__main__":
    for stem, draw in PICTURES.items():
        (Path(__file__).parent / f"{stem}.svg").write_text(draw(), encoding="utf-8")

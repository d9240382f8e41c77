"""Charts for boards that take pictures: shares over epochs as a map of tiles, and curves with their bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isnan

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_INK, _PALE, _FULL = (40, 40, 40), (238, 238, 232), (176, 58, 46)
_LEFT, _TOP, _ROW, _MARGIN = 250, 34, 18, 12


def tiles_picture(
    rows: Mapping[str, Sequence[float]], columns: Sequence[int], title: str, *, axes: tuple[str, str] = ("", "")
) -> NDArray[np.uint8]:
    """Draw a tile for each value, the redder the larger, and the last one of each row as a number.

    Args:
        rows: Name of the row -> its values, in [0, 1], one for each column; NaN leaves a place blank.
        columns: What the columns are, such as epochs.
        title: What the tiles tell.
        axes: What the columns are called, and the rows.

    Returns:
        An RGB picture of shape (height, width, 3).
    """
    wide = max(4, min(28, 560 // max(len(columns), 1)))
    right, bottom = _LEFT + wide * max(len(columns), 1), _TOP + _ROW * len(rows)
    size = (right + 70, bottom + 40)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, 10), title, fill=_INK)
    for row, (name, values) in enumerate(rows.items()):
        top = _TOP + row * _ROW
        label = name if len(name) <= 38 else f"...{name[-35:]}"
        _write_towards(draw, (_LEFT - 8, top + 3), label)
        for column, value in enumerate(values):
            if isnan(value):
                continue
            place = (_LEFT + column * wide, top, _LEFT + (column + 1) * wide - 2, top + _ROW - 3)
            draw.rectangle(place, fill=_between(value))
        if values and not isnan(values[-1]):
            draw.text((right + 6, top + 3), f"{values[-1]:.0%}", fill=_INK)
    if columns:
        draw.text((_LEFT, bottom + 4), str(columns[0]), fill=_INK)
    if len(columns) > 1:
        _write_towards(draw, (right - 2, bottom + 4), str(columns[-1]))
    across, down = axes
    draw.text((max(_LEFT, (_LEFT + right - draw.textlength(across)) / 2), bottom + 20), across, fill=_INK)
    _write_towards(draw, (_LEFT - 8, bottom + 20), down)
    return np.asarray(image)


def curve_picture(
    places: Sequence[float], curves: NDArray[np.float64], title: str, *, axes: tuple[str, str] = ("", "")
) -> NDArray[np.uint8]:
    """Draw the mean of curves as a line, and a band from the lowest to the highest.

    Args:
        places: Where the curves are known, rising, in [0, 1].
        curves: (curves, places), in [0, 1].
        title: What the curves tell.
        axes: What lies on the horizontal axis, and on the vertical one.

    Returns:
        An RGB picture of shape (height, width, 3).
    """
    wide, high, left, top = 480, 280, 56, 44
    image = Image.new("RGB", (left + wide + 24, top + high + 46), "white")
    draw = ImageDraw.Draw(image)

    def points(values: Sequence[float]) -> list[tuple[float, float]]:
        return [(left + wide * x, top + high * (1 - y)) for x, y in zip(places, values, strict=True)]

    draw.text((left, 6), title, fill=_INK)
    low, high_curve, mean = curves.min(0).tolist(), curves.max(0).tolist(), curves.mean(0).tolist()
    draw.polygon([*points(low), *reversed(points(high_curve))], fill=(244, 214, 208))
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        (x, _), (_, y) = (left + wide * tick, 0), (0, top + high * (1 - tick))
        draw.line((left, y, left + wide, y), fill=_PALE)
        _write_towards(draw, (left - 8, y - 6), f"{tick:.0%}")
        draw.text((x - draw.textlength(f"{tick:.0%}") / 2, top + high + 8), f"{tick:.0%}", fill=_INK)
    for start, end in pairwise(points(mean)):
        draw.line((*start, *end), fill=_FULL, width=3)
    draw.line((left, top, left, top + high, left + wide, top + high), fill=_INK)
    across, up = axes
    draw.text((left + (wide - draw.textlength(across)) / 2, top + high + 26), across, fill=_INK)
    draw.text((_MARGIN, top - 22), up, fill=_INK)
    return np.asarray(image)


def _write_towards(draw: ImageDraw.ImageDraw, end: tuple[float, float], text: str) -> None:
    """Write so that the text ends there."""
    draw.text((end[0] - draw.textlength(text), end[1]), text, fill=_INK)


def _between(value: float) -> tuple[int, int, int]:
    share = min(max(value, 0.0), 1.0)
    red, green, blue = (round(pale + share * (full - pale)) for pale, full in zip(_PALE, _FULL, strict=True))
    return red, green, blue

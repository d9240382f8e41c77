"""A heat map: numbers in rows and columns, the darker the worse."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

_INK, _PALE_INK, _UNKNOWN = (40, 40, 40), (255, 255, 255), (225, 228, 232)
_COLD, _WARM, _HOT = (255, 255, 255), (253, 174, 97), (165, 0, 38)
_ROW, _COLUMN, _HEAD, _EDGE, _SCALE = 20, 48, 46, 8, 120
_LONGEST = 40
"""So many characters of a row's name are drawn."""


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    heat: Sequence[Sequence[float | None]],
    ends: tuple[str, str],
) -> Image.Image:
    """Draw a table whose cells are coloured.

    Args:
        title: Stands above.
        rows: Names at the left; long ones lose their beginning.
        columns: Names above.
        cells: What is written in the cells, row by row.
        heat: What colours them: from white (0 and below) over orange to dark red (1 and above); None is grey.
        ends: What white and dark red mean, for the scale below.

    Returns:
        An RGB picture.
    """
    names = [_drawable(name) for name in rows]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = int(max(map(measure.textlength, names), default=0)) + 2 * _EDGE
    heading = _drawable(title, longest=120)
    wide = max(left + _COLUMN * len(columns), int(measure.textlength(heading)) + _EDGE) + _EDGE
    bottom = _HEAD + _ROW * len(rows)
    wide = max(wide, _SCALE + int(sum(map(measure.textlength, ends))) + 4 * _EDGE)
    image = Image.new("RGB", (wide, bottom + _ROW + 2 * _EDGE), "white")
    draw = ImageDraw.Draw(image)
    draw.text((_EDGE, _EDGE), heading, fill=_INK)
    for column, name in enumerate(columns):
        _centred(draw, (left + column * _COLUMN, _HEAD - _ROW), name, _INK)
    for row, name in enumerate(names):
        top = _HEAD + row * _ROW
        draw.text((left - _EDGE - draw.textlength(name), top + 4), name, fill=_INK)
        for column, (text, value) in enumerate(zip(cells[row], heat[row], strict=True)):
            corner = (left + column * _COLUMN, top)
            draw.rectangle((*corner, corner[0] + _COLUMN - 2, top + _ROW - 2), fill=colour(value))
            _centred(draw, corner, text, _PALE_INK if value is not None and value > 0.7 else _INK)
    _draw_scale(draw, bottom + _EDGE, ends)
    return image


def _draw_scale(draw: ImageDraw.ImageDraw, top: int, ends: tuple[str, str]) -> None:
    draw.text((_EDGE, top + 4), ends[0], fill=_INK)
    left = 2 * _EDGE + int(draw.textlength(ends[0]))
    for place in range(_SCALE):
        draw.line((left + place, top + 2, left + place, top + _ROW - 4), fill=colour(place / (_SCALE - 1)))
    draw.rectangle((left, top + 2, left + _SCALE - 1, top + _ROW - 4), outline=_UNKNOWN)
    draw.text((left + _SCALE + _EDGE, top + 4), ends[1], fill=_INK)


def colour(heat: float | None) -> tuple[int, int, int]:
    """Return the colour of a heat in [0, 1]; None is grey.

    >>> colour(0.0), colour(0.25), colour(1.0)
    ((255, 255, 255), (254, 214, 176), (165, 0, 38))
    """
    if heat is None:
        return _UNKNOWN
    place = min(max(heat, 0.0), 1.0) * 2
    low, high, share = (_COLD, _WARM, place) if place <= 1 else (_WARM, _HOT, place - 1)
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _centred(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, fill: tuple[int, int, int]) -> None:
    draw.text((corner[0] + (_COLUMN - 1 - draw.textlength(text)) / 2, corner[1] + 4), text, fill=fill)


def _drawable(name: str, longest: int = _LONGEST) -> str:
    """Shorten a text, and leave out what the font of every Pillow cannot draw."""
    plain = name.encode("latin-1", "replace").decode("latin-1")
    return plain if len(plain) <= longest else f"...{plain[3 - longest :]}"

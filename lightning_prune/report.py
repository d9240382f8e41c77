"""What a cut gained, for people: tables for the terminal and a picture of the widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.table import Table
from torch import Tensor

from lightning_prune.reconstruction import Refit
from lightning_prune.types import Change, ChannelGroup, PruneRecord

_INK, _PALE, _FULL = (40, 40, 40), (205, 212, 222), (38, 110, 180)
_ROW, _LEFT, _BAR = 16, 260, 420

_ENDS = 10
"""So many of a history's first cuts are told, and of its last."""


def count(number: float) -> str:
    """Write a count; a large one in three digits and a unit.

    >>> count(11_689_512), count(2048)
    ('11.7 M', '2048')
    """
    if number < 1e4:
        return f"{number:.0f}"
    rounded = float(f"{number:.3g}")
    size, unit = next(item for item in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if rounded >= item[0])
    return f"{rounded / size:.3g} {unit}"


def record_table(record: PruneRecord, title: str = "Pruned") -> Table:
    """Tell one cut: what was asked and reached, each group's width, and what held it back."""
    table = Table(title=f"{title}: asked {record.asked:.1%} of {record.of}, reached {record.reached:.1%}")
    for column in ("", "dense", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_column("removed", justify="right")
    table.add_column("held back by", overflow="fold", ratio=1)
    for name, change in record.channels.items():
        table.add_row(*_row(name, change), record.held_back.get(name, ""))
    table.add_section()
    table.add_row(*_row("parameters", record.params), "")
    table.add_row(*_row("MACs", record.macs), "")
    return table


def mask_table(masks: Mapping[str, Tensor], title: str = "Masks") -> Table:
    """Tell masks, a line each: how many weights the layer has, how many are left, and their share."""
    table = Table(title=title)
    for column in ("layer", "weights", "left", "share"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    left = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    for name, mask in masks.items():
        table.add_row(name, count(mask.numel()), count(left[name]), f"{left[name] / mask.numel():.1%}")
    total = sum(mask.numel() for mask in masks.values())
    table.add_section()
    table.add_row("all", count(total), count(sum(left.values())), f"{sum(left.values()) / max(total, 1):.1%}")
    return table


def _row(name: str, change: Change) -> tuple[str, ...]:
    return (name, *map(count, (change.dense, change.before, change.after)), f"{change.removed:.1%}")


def refit_table(refits: Sequence[Refit], title: str = "Reconstructed") -> Table:
    """Tell a reconstruction, a line for each layer: the channels that it reads, and how far off its output is."""
    table = Table(title=title, caption="error: ||Y - Y'|| / ||Y|| at the sampled points", caption_justify="left")
    for column in ("layer", "channels read", "of", "error, sliced", "error, refitted"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for refit in refits:
        table.add_row(refit.layer, str(refit.channels), str(refit.of), f"{refit.sliced:.4f}", f"{refit.error:.4f}")
    return table


def describe(groups: Sequence[ChannelGroup]) -> Table:
    """Tell the channel groups, a line each: how many channels, the layers that share them, and why one is frozen.

    >>> from rich import print
    >>> print(describe(groups))  # doctest: +SKIP
    """
    table = Table(title="Channel groups")
    table.add_column("group")
    table.add_column("channels", justify="right")
    table.add_column("tensors", justify="right")
    table.add_column("layers", overflow="fold", ratio=2)
    table.add_column("frozen", overflow="fold", ratio=1)
    for group in groups:
        layers = dict.fromkeys(member.tensor.rpartition(".")[0] or member.tensor for member in group.members)
        table.add_row(group.name, str(group.size), str(len(group.members)), ", ".join(layers), group.frozen or "")
    return table


def history_table(records: Sequence[PruneRecord]) -> Table:
    """Tell all cuts of a training, a line each; of many, the first and the last."""
    table = Table(title="Prune events")
    for column in ("epoch", "step", "asked", "reached", "parameters", "MACs", "removed"):
        table.add_column(column, justify="right")
    few = len(records) <= 2 * _ENDS
    for record in records if few else (*records[:_ENDS], None, *records[-_ENDS:]):
        if record is None:
            table.add_row(*["..."] * len(table.columns))
            continue
        when = ("" if record.epoch is None else str(record.epoch), "" if record.step is None else str(record.step))
        asked = (f"{record.asked:.1%} of {record.of}", f"{record.reached:.1%}")
        left = (count(record.params.after), count(record.macs.after))
        table.add_row(*when, *asked, *left, f"{record.macs.removed:.1%} of MACs")
    return table


def comparison_table(rows: Mapping[str, tuple[str, str]], title: str = "Dense against pruned") -> Table:
    """Put two columns of finished texts side by side."""
    table = Table(title=title)
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("pruned", justify="right")
    for name, (dense, pruned) in rows.items():
        table.add_row(name, dense, pruned)
    return table


def widths_picture(channels: Mapping[str, Change]) -> NDArray[np.uint8]:
    """Draw a bar for each group: its dense width pale, what is left of it full.

    Returns:
        An RGB picture of shape (height, width, 3).
    """
    widest = max((change.dense for change in channels.values()), default=1)
    image = Image.new("RGB", (_LEFT + _BAR + 110, _ROW * len(channels) + 12), "white")
    draw = ImageDraw.Draw(image)
    for row, (name, change) in enumerate(channels.items()):
        top = 6 + row * _ROW
        label = name if len(name) <= 40 else f"...{name[-37:]}"
        draw.text((_LEFT - 8 - draw.textlength(label), top + 1), label, fill=_INK)
        for width, colour in ((change.dense, _PALE), (change.after, _FULL)):
            draw.rectangle((_LEFT, top + 2, _LEFT + max(_BAR * width // widest, 1), top + _ROW - 4), fill=colour)
        draw.text((_LEFT + _BAR * change.dense // widest + 6, top + 1), f"{change.after} of {change.dense}", fill=_INK)
    return np.asarray(image)

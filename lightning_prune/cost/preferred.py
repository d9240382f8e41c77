"""The multiple that widths are worth being rounded to on a machine, from what convolutions take there."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lightning_prune.cost.latency import LatencyPrice
from lightning_prune.cost.replay import Replay, Width
from lightning_prune.fate import Fate
from lightning_prune.types import PruningPlan

_MULTIPLES = (32, 16, 8, 4, 2)
_STEP = max(_MULTIPLES)
_FREE = 0.75


def preferred_multiple(price: LatencyPrice) -> int:
    """Return the multiple that widths are worth being rounded to: 1, 2, 4, 8, 16 or 32.

    Where a processor computes m channels at once, the first channel after a multiple of m takes as long as all m up to
    the next multiple, t(b + 1) = t(b + m): widths between two multiples cost as much as the upper one. Where the time
    grows evenly, the first channel takes 1/m of that. So the answer is the largest m for which

        t(b + 1) - t(b) >= 3/4 (t(b + m) - t(b))

    where t sums all convolutions whose widths are at least 64, and b is the multiple of 32 that is nearest to half of
    each width. What is missing in the table is measured; 1 where there is no such convolution.

    Args:
        price: The price of the model's operations.
    """
    free = {group.name: torch.tensor([0]) for group in price.graph.groups if not group.frozen and group.size > 1}
    fate = Fate(price.graph, PruningPlan(free))
    widths = {replay: _varying(replay, fate) for replay in price.replays if replay.convolves and not replay.tied}
    wide = {replay: dense for replay, dense in widths.items() if min(dense.values(), default=0) >= 2 * _STEP}
    found = {
        offset: [replay.at(_beyond(dense, offset)) for replay, dense in wide.items()] for offset in (0, 1, *_MULTIPLES)
    }
    price.measure([operation for operations in found.values() for operation in operations])
    time = {offset: sum(map(price.time, operations)) for offset, operations in found.items()}
    first = time[1] - time[0]
    return next((m for m in _MULTIPLES if first > 0 and first >= _FREE * (time[m] - time[0])), 1)


def _varying(replay: Replay, fate: Fate) -> dict[Width, int]:
    """Return the dense sizes of the widths that a plan changes."""
    return {width: dense for width, (dense, now) in replay.sizes(fate.shape_left).items() if now < dense}


def _beyond(dense: Mapping[Width, int], offset: int) -> dict[Width, int]:
    """Return widths that are some channels beyond a multiple of 32 near half of what they are."""
    return {width: _STEP * max(1, round(size / 2 / _STEP)) + offset for width, size in dense.items()}

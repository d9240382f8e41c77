"""When gates close: events that cut what has closed, the last of which is the end of the gates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_prune.callbacks.timing import Timing


@dataclass(frozen=True)
class Closing(Timing):
    """Events from `begin` to `end`, where the gates vanish; in between what has closed is cut. One at 2/3 if None."""

    @override
    def lay_out(self, length: float, who: str) -> dict[int, float]:
        known = isfinite(length) and self.begin is None and self.end is None
        last = max(2 * int(length) // 3, 1) if known else self.end if self.end is not None else self.begin
        first = last if self.begin is None else self.begin
        if first is None or last is None:
            return Timing.lay_out(self, length, who)  # which says what is missing
        interval = self.every if self.every_n_steps is None else self.every_n_steps
        return dict.fromkeys([*range(first, last, interval), last], 1.0)


def check_start(events: Iterable[int], start: int, unit: str) -> None:
    """See that gates can learn before the first event.

    Raises:
        MisconfigurationException: It comes too early.
    """
    first = min(events)
    if first <= start:
        raise MisconfigurationException(
            f"The first event of L0PruneCallback is at {unit} {first}, and `start` is {start}: no gate would have "
            "learned by then. Lower `start`, or let `begin` come later."
        )


def warn_of_open_end(events: Iterable[int], length: float, unit: str, limit: str) -> bool:
    """Warn where a fit comes to the first event but not to the last; tell whether it is so.

    Args:
        events: When they are.
        length: Of the fit.
        unit: What both are counted in.
        limit: What sets the length, in words.
    """
    first, last = min(events), max(events)
    if first < length <= last:
        rank_zero_warn(
            f"The last event of L0PruneCallback is at {unit} {last}, but {limit}: this fit leaves the network with "
            "gates on it. Lower `end`, train for longer, or go on from a checkpoint of it."
        )
        return True
    return False

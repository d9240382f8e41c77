"""What no plan goes beyond."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor


@dataclass(frozen=True)
class Limits:
    """What no plan goes beyond.

    Attributes:
        min_channels: Channels that each group keeps at least, >= 1.
        round_to: Widths are rounded to the nearest multiple of it, >= 1; None leaves them as they come.

    Raises:
        ValueError: A limit is below 1.
    """

    min_channels: int = 1
    round_to: int | None = None

    def __post_init__(self) -> None:
        if self.min_channels < 1:
            raise ValueError(
                f"`min_channels` is what each group keeps at least, 1 or more; got {self.min_channels}. "
                "To remove a whole layer, take it out of the model."
            )
        if self.round_to is not None and self.round_to < 1:
            raise ValueError(f"`round_to` is the multiple that widths are rounded to, 1 or more; got {self.round_to}.")

    def rounded(self, width: int, least: int, size: int) -> int:
        """Round a width to the nearest multiple that lies in [least, size], if there is one."""
        if self.round_to is None:
            return width
        nearest = max(floor(width / self.round_to + 0.5), ceil(least / self.round_to)) * self.round_to
        return min(nearest, size)

    def allow(self, width: int) -> bool:
        """Tell whether a group may have this width."""
        return width >= self.min_channels and width % (self.round_to or 1) == 0

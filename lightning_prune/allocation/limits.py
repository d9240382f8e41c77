"""What no plan goes beyond."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Literal, TypeAlias

RoundTo: TypeAlias = int | Literal["auto"] | None
"""The multiple that widths are rounded to; "auto" is what this machine likes, None leaves them as they come."""


@dataclass(frozen=True)
class Limits:
    """What no plan goes beyond.

    Attributes:
        min_channels: Channels that each group keeps at least, >= 1.
        round_to: Widths are rounded to the nearest multiple of it, >= 1; "auto" is what this machine likes, as far as
            it is known (see `knowing`); None leaves them as they come.

    Raises:
        ValueError: A limit is below 1, or something else than a number.
    """

    min_channels: int = 1
    round_to: RoundTo = None

    def __post_init__(self) -> None:
        if self.min_channels < 1:
            raise ValueError(
                f"`min_channels` is what each group keeps at least, 1 or more; got {self.min_channels}. "
                "To remove a whole layer, take it out of the model."
            )
        if self.round_to not in (None, "auto") and (isinstance(self.round_to, str) or self.round_to < 1):
            raise ValueError(
                f'`round_to` is the multiple that widths are rounded to, 1 or more, or "auto"; got {self.round_to!r}.'
            )

    def knowing(self, liked: int) -> Limits:
        """Return them with the multiple that this machine likes in place of "auto"."""
        return replace(self, round_to=liked) if self.round_to == "auto" else self

    @property
    def _multiple(self) -> int:
        """The multiple as a number; 1 as long as nobody knows what this machine likes."""
        return 1 if self.round_to is None or isinstance(self.round_to, str) else self.round_to

    def rounded(self, width: int, least: int, size: int) -> int:
        """Round a width to the nearest multiple that lies in [least, size], if there is one."""
        nearest = max(floor(width / self._multiple + 0.5), ceil(least / self._multiple)) * self._multiple
        return min(nearest, size)

    def allow(self, width: int) -> bool:
        """Tell whether a group may have this width."""
        return width >= self.min_channels and width % self._multiple == 0

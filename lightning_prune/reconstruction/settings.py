"""What a reconstruction is done with."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal, TypeAlias

Targets: TypeAlias = Literal["original", "current"]
"""What a layer is to reproduce: its output in the original network, or in the one that earlier layers have left."""

TARGETS: tuple[Targets, ...] = ("original", "current")


@dataclass(frozen=True)
class Reconstruction:
    """After a cut, the layers that read what is left are refitted to return what they returned.

    He, Zhang, Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks" (arXiv 1707.06168, section 3.1),
    by least squares, layer after layer in the order in which they are called.

    Attributes:
        images: So many examples are looked at, no labels; on several processes together.
        points: So many positions of each layer's output for each example; there are images x points rows.
        targets: "original": each layer makes up for what those before it have lost; "current" leaves that.
        shortcuts: Whether a layer whose output is added to something else makes up for what that has lost, too.
        ridge: How dear it is to change a weight, in parts of what the layer's input channels carry on average, 0 or
            more (see `Moments.refit`); needed where there are fewer rows than columns.
        seed: Of the points.

    Raises:
        ValueError: An argument is out of its range.
    """

    images: int = 5000
    points: int = 10
    targets: Targets = "original"
    shortcuts: bool = True
    ridge: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "points"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is how many are looked at, 1 or more; got {getattr(self, name)}.")
        if self.targets not in TARGETS:
            raise ValueError(f"`targets` is one of {', '.join(map(repr, TARGETS))}; got {self.targets!r}.")
        if not (isfinite(self.ridge) and self.ridge >= 0):
            raise ValueError(f"`ridge` is how dear it is to change a weight, 0 or more; got {self.ridge}.")

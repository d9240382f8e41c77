"""What a factorisation has done, in plain data that prints as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["spatial", "channel"]
"""How a convolution is split: into one down and one across, or into a thinner one and a 1 x 1 that widens again."""

KINDS: tuple[Kind, ...] = ("spatial", "channel")


@dataclass(frozen=True)
class Factorization:
    """One factorisation that happened; `Factorization(**dataclasses.asdict(it))` gives it back.

    Attributes:
        kind: "spatial" or "channel" (see `factorize`).
        ranks: Name of a layer that was factorised -> its rank, the channels between its two factors.
        errors: Name of the same layers -> what is lost, relative, in [0, 1]: of the weight its Frobenius norm, or where
            outputs were looked at, of their deviation from the mean over the sampled points.
        macs: Name of a layer that could be factorised -> its multiply-accumulates per example, before and after;
            equal where it stayed whole.
        macs_before: Those of the whole model.
        macs_after: Those that it has left.
        stayed: Name of a `Conv2d` that stayed as it was -> in words why.
        biases: Names of the layers without a bias whose second factor got one, for the mean of the outputs.
    """

    kind: Kind
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    macs: Mapping[str, tuple[int, int]]
    macs_before: int
    macs_after: int
    stayed: Mapping[str, str] = field(default_factory=dict)
    biases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`kind` is one of {', '.join(map(repr, KINDS))}; got {self.kind!r}.")

    @property
    def speed_up(self) -> float:
        """Multiply-accumulates before, over those after, of all layers that could be factorised."""
        before, after = map(sum, zip(*self.macs.values(), strict=True))
        return before / after

    @property
    def headline(self) -> str:
        """All of it in one line."""
        before, after = map(sum, zip(*self.macs.values(), strict=True))
        return (
            f"{self.kind} factors of {len(self.ranks)} layers; MACs of {len(self.macs)} layers {before:,} -> {after:,} "
            f"({self.speed_up:.2f}x), of the model {self.macs_before:,} -> {self.macs_after:,}"
        )

    def __str__(self) -> str:
        wide = max(map(len, (*self.ranks, *self.stayed)))
        lines = [
            f"  {name:{wide}}  rank {rank}, MACs {self.macs[name][0]:,} -> {self.macs[name][1]:,}, "
            f"error {self.errors[name]:.3f}"
            for name, rank in self.ranks.items()
        ]
        lines += [f"  {name:{wide}}  stayed: it {reason}" for name, reason in self.stayed.items()]
        return "\n".join([self.headline, *lines])

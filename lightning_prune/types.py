"""The values that travel between the rooms: names, indices and counts, never modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Unit: TypeAlias = Literal["channels", "params", "macs", "memory", "latency"]
"""What a pruning ratio is a fraction of; "memory" is that of all activations, "latency" is predicted."""

UNITS: tuple[Unit, ...] = ("channels", "params", "macs", "memory", "latency")

Heads: TypeAlias = Literal["whole", "inside", "keep"]
"""How attention heads are cut: one with all that it holds, the same part of the width of all, or not at all."""

HEADS: tuple[Heads, ...] = ("whole", "inside", "keep")

Constants: TypeAlias = Literal["absorb", "drop"]
"""What becomes of what removed channels emit on average: it goes into the next bias or running mean, or is lost."""

CONSTANTS: tuple[Constants, ...] = ("absorb", "drop")

Trunks: TypeAlias = Literal["whole", "selected", "sampled"]
"""How a trunk that several layers read is cut: as one with all its readers, or each reader picks from the whole;
"selected" lets BatchNorms pick, "sampled" convolutions too."""

TRUNKS: tuple[Trunks, ...] = ("whole", "selected", "sampled")

Kept: TypeAlias = Mapping[str, Mapping[int, Tensor]]
"""Tensor name -> dimension -> positions that stay, ascending: what a cut does to the tensors."""

Attributes: TypeAlias = Mapping[str, Mapping[str, int | tuple[int, ...]]]
"""Module name -> attribute -> its value after a cut."""


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one tensor in a group.

    Attributes:
        tensor: Qualified name, as `named_parameters` or `named_buffers` prints it.
        dim: The dimension along which the channels lie.
        positions: Integer tensor of shape (size, k): where each channel of the group lives along `dim`.
            k is greater than 1 where a channel owns several positions, as after a flatten.
    """

    tensor: str
    dim: int
    positions: Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Member):
            return NotImplemented
        same_place = (self.tensor, self.dim) == (other.tensor, other.dim)
        return same_place and torch.equal(self.positions, other.positions)

    def __hash__(self) -> int:
        return hash((self.tensor, self.dim))

    def __str__(self) -> str:
        k = self.positions.shape[1]
        spread = f", {k} positions a channel" if k > 1 else ""
        return f"{self.tensor} [dim {self.dim}{spread}]"


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only go together.

    Attributes:
        name: The module that makes the channels.
        size: How many channels there are.
        members: Every place where the channels live.
        frozen: None, or in words why the channels cannot be removed.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    frozen: str | None = None

    def __str__(self) -> str:
        state = f"frozen: {self.frozen}" if self.frozen else "prunable"
        lines = [f"{self.name}: {self.size} channels, {state}", *(f"  {member}" for member in self.members)]
        return "\n".join(lines)


class ChannelGroups(tuple[ChannelGroup, ...]):
    """Channel groups in the order in which a model makes them; printing them tells what is tied to what."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


@dataclass(frozen=True)
class PruningPlan:
    """What will go.

    Attributes:
        removed: Group name -> indices of the channels to remove, ascending.
        held_back: Group name -> in words why it gives less than it was asked for.
    """

    removed: Mapping[str, Tensor]
    held_back: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many channels go."""
        return sum(len(indices) for indices in self.removed.values())


@dataclass(frozen=True)
class Change:
    """A count in the dense model, before a cut and after it."""

    dense: int
    before: int
    after: int

    @property
    def removed(self) -> float:
        """Fraction removed against the dense model, in [0, 1]."""
        return 1 - self.after / self.dense if self.dense else 0.0


@dataclass(frozen=True)
class PruneRecord:
    """One cut that happened.

    Attributes:
        asked: The pruning ratio asked for, cumulative, in [0, 1).
        of: What `asked` and `reached` are fractions of.
        reached: The pruning ratio after the cut, counted against the dense model; of latency the predicted one.
        channels: Group name -> its channels. Frozen groups stand here too, unchanged.
        params: Parameters of the model.
        macs: Multiply-accumulates of one forward pass, per example.
        held_back: Group name -> in words why it stayed, or gave less than asked.
        shapes: The shapes before the cut of every tensor that was cut.
        kept: What stayed of these tensors; with `attributes` enough to do the cut again.
        attributes: The module attributes that hold sizes, and their new values.
        before: The values that they had; with `shapes` and `kept` enough to take the cut back.
        biases: Name of a module without a bias -> the width of the one that it got, for what removed channels emitted.
        selects: Names of the modules that got a `ChannelSelect` before them first; other names are those after that.
        epoch: When the cut happened, where there is a trainer.
        step: The optimizer step before which it happened, where there is a trainer.
    """

    asked: float
    of: Unit
    reached: float
    channels: Mapping[str, Change]
    params: Change
    macs: Change
    held_back: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kept: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    attributes: Attributes = field(default_factory=dict)
    before: Attributes = field(default_factory=dict)
    biases: Mapping[str, int] = field(default_factory=dict)
    selects: tuple[str, ...] = ()
    epoch: int | None = None
    step: int | None = None

    def __str__(self) -> str:
        return (
            f"asked {self.asked:.1%} of {self.of}, reached {self.reached:.1%}; "
            f"parameters {self.params.before:,} -> {self.params.after:,}, "
            f"MACs {self.macs.before:,} -> {self.macs.after:,}"
        )

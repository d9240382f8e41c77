"""What the runs of a sweep left, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

_APART = ("seed", "objectives")
"""Seeds are grouped, and what a sweeper steers by changes nothing in a run."""


@dataclass(frozen=True)
class Pair:
    """A figure of the dense network, and the same of the pruned one."""

    dense: float
    pruned: float


@dataclass(frozen=True)
class Cut:
    """One prune event.

    Attributes:
        epoch: When; None where nobody counted.
        step: When; None where nobody counted.
        of: What the ratio counts.
        asked: The pruning ratio that was asked for.
        reached: The pruning ratio that was reached.
        params: Parameters after the cut.
        macs: MACs after the cut.
        held_back: Group -> why it lost less than was planned.
        accuracy: On the validation images right after the cut, in [0, 1]; None where it was not measured.
    """

    epoch: int | None
    step: int | None
    of: str
    asked: float
    reached: float
    params: float
    macs: float
    held_back: Mapping[str, str]
    accuracy: float | None


@dataclass(frozen=True)
class Scales:
    """How many BatchNorm scales lay in each bin at the end of each epoch.

    Attributes:
        epochs: The epochs.
        edges: Of the bins, one more than there are bins.
        counts: (epochs, bins).
    """

    epochs: tuple[int, ...]
    edges: tuple[float, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Moment:
    """A figure while training: when it was taken, and what it was."""

    step: int
    epoch: int
    value: float


@dataclass(frozen=True)
class Run:
    """A run that is finished.

    Attributes:
        name: Its folder, seen from the folder that holds all folders of the report.
        seed: None where none is known.
        choices: Config group -> what was chosen in it.
        overrides: What was given on the command line, as `name=value`.
        command: The line that repeats it.
        version: Of the library that ran it.
        machine: What latencies hang on: processor and threads.
        accuracy: On the test images at the end, in [0, 1].
        dense_accuracy: That of the dense twin, if there was one.
        before_cut: On the validation images before the first cut.
        params: Parameters.
        macs: Multiply-accumulates of one image.
        latency_ms: Batch -> milliseconds.
        seconds: Network -> how long it trained.
        widths: Group -> channels.
        cuts: In order.
        sparsity: Of masked weights, in [0, 1].
        scales: None without BatchNorm.
        curves: Figure -> how it went while training.
    """

    name: str
    seed: int | None
    choices: Mapping[str, str]
    overrides: tuple[str, ...]
    command: str
    version: str
    machine: str
    accuracy: float
    dense_accuracy: float | None
    before_cut: float | None
    params: Pair
    macs: Pair
    latency_ms: Mapping[str, Pair]
    seconds: Mapping[str, float]
    widths: Mapping[str, Pair]
    cuts: tuple[Cut, ...]
    sparsity: float | None = None
    scales: Scales | None = None
    curves: Mapping[str, tuple[Moment, ...]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Return a short name that stays the same when the report is written again."""
        return sha256(self.name.encode("utf-8", "surrogateescape")).hexdigest()[:10]

    @property
    def settings(self) -> dict[str, str]:
        """Return all that tells what was run, but for the seed: the choices, and the given values."""
        given = {name.lstrip("+"): value for name, _, value in (each.partition("=") for each in self.overrides)}
        return {name: value for name, value in {**self.choices, **given}.items() if name not in _APART}

    @property
    def costs(self) -> dict[str, Pair]:
        """Return all that a network costs: cost -> dense and pruned."""
        return {"macs": self.macs, "params": self.params, **self.latency_ms}


@dataclass(frozen=True)
class Broken:
    """A run without figures.

    Attributes:
        name: Its folder, seen from the folder that holds all folders of the report.
        state: "failed", "unfinished" or "unreadable".
        reason: What went wrong, and the way out.
        command: The line that repeats it, where it is known.
        trace: The stack trace, where there is one.
    """

    name: str
    state: str
    reason: str
    command: str = ""
    trace: str = ""


@dataclass(frozen=True)
class Sweep:
    """Everything that was found.

    Attributes:
        root: The folder that holds all others.
        runs: That are finished, by name.
        broken: That are not, by name.
    """

    root: Path
    runs: tuple[Run, ...]
    broken: tuple[Broken, ...]

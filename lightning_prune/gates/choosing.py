"""Which gates a network gets: one for each channel, each input of a layer, or each weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_prune.criteria.readers import Reader, readers_of
from lightning_prune.graph import Graph
from lightning_prune.layers.gate import Gate
from lightning_prune.layers.gated import GATED, Reading, convolution_groups, input_dim, weight_name
from lightning_prune.layers.gates import Gates
from lightning_prune.tensors import named_modules
from lightning_prune.types import ChannelGroup

GateGranularity: TypeAlias = Literal["channels", "inputs", "weights"]
"""What has a gate: each channel of a group, each input of a linear layer, or each of its weights."""

GRANULARITIES: tuple[GateGranularity, ...] = get_args(GateGranularity)

GateMaker: TypeAlias = Callable[..., Gate]
"""Makes a gate of a shape, which is given as separate sizes; `guarded` says whether its best one never closes."""


@dataclass(frozen=True)
class Choice:
    """The gates of a network, and what was left without.

    Attributes:
        gates: The gates.
        left: Group name -> in words why it has none.
    """

    gates: Gates
    left: Mapping[str, str]


def choose(
    model: nn.Module,
    graph: Graph,
    granularity: Mapping[str, GateGranularity],
    make: GateMaker,
    *,
    ignored: Iterable[str] = (),
    per_example: bool = False,
) -> Choice:
    """Make the gates of a network; it is not changed.

    A gate on a channel multiplies what every reader of its group reads of it (see `readers_of`): behind the
    normalisation, behind residual sums and depthwise layers, so that a closed gate is a removed channel.

    Args:
        model: The network.
        graph: A reading of it.
        granularity: Pattern -> what has a gate. Patterns are of names of channel groups for "channels", of linear
            layers for "inputs" and "weights". Of several that match a name the first counts.
        make: Makes a gate.
        ignored: Names of tensors that are not to be touched.
        per_example: Whether each example of a batch has a sample of its own.

    Raises:
        ValueError: A pattern matches nothing, or nothing that can be gated; or each example is to have its own weights.
    """
    if per_example and "weights" in granularity.values():
        raise ValueError(
            "`per_example` gates what each example gives to a layer, and `granularity` has gates on weights, which all "
            'examples share. Take "inputs" or "channels", or per_example=False.'
        )
    builder = _Builder(model, graph, make, set(ignored))
    for pattern, what in granularity.items():
        if what == "channels":
            builder.gate_channels(pattern)
        else:
            builder.gate_layers(pattern, what)
    readings = {name: builder.reading(name) for name in builder.read}
    return Choice(Gates(builder.gates, readings, per_example=per_example), builder.left)


@dataclass
class _Read:
    """What will be gated of what a layer reads."""

    channels: list[tuple[str, Reader]] = field(default_factory=list)
    inputs: str | None = None
    weights: str | None = None


class _Builder:
    """Gathers gates pattern by pattern."""

    def __init__(self, model: nn.Module, graph: Graph, make: GateMaker, ignored: set[str]) -> None:
        self._layers = named_modules(model)
        self._groups = {group.name: group for group in graph.groups}
        self._readers = readers_of(model, graph)
        self._make = make
        self._ignored = ignored
        self._holders = Counter(id(tensor) for layer in self._layers.values() for tensor in layer._parameters.values())
        self.gates: dict[str, Gate] = {}
        self.read: dict[str, _Read] = {}
        self.left: dict[str, str] = {}

    def gate_channels(self, pattern: str) -> None:
        """Gate the channel groups of a pattern."""
        groups = [group for name, group in self._groups.items() if fnmatchcase(name, pattern)]
        reasons = {group.name: reason for group in groups if (reason := self._why_not(group)) is not None}
        if not groups or len(reasons) == len(groups):
            raise ValueError(_nothing(pattern, "channel group", self._groups, reasons))
        self.left.update(reasons)
        for group in groups:
            if group.name not in reasons and group.name not in self.gates:
                self.gates[group.name] = self._make(group.size, guarded=True)
                for reader in self._readers[group.name]:
                    self.read.setdefault(reader.module, _Read()).channels.append((group.name, reader))

    def _why_not(self, group: ChannelGroup) -> str | None:
        """Return in words why a group cannot be gated."""
        if group.frozen:
            return f"frozen: {group.frozen}"
        readers = self._readers.get(group.name, ())
        if not readers:
            return "it is read by something that is no linear, convolutional or attention layer"
        computed = [reader.module for reader in readers if not _has_own_weight(self._layers[reader.module])]
        return f"the weight of {computed[0]}, which reads it, is computed" if computed else None

    def gate_layers(self, pattern: str, what: GateGranularity) -> None:
        """Gate the inputs, or the weights, of the linear layers of a pattern."""
        layers = {name: layer for name, layer in self._layers.items() if isinstance(layer, nn.Linear)}
        found = {name: layer for name, layer in layers.items() if fnmatchcase(name, pattern)}
        reasons = {name: reason for name, layer in found.items() if (reason := self._why_not_layer(name, layer, what))}
        if not found or len(reasons) == len(found):
            raise ValueError(_nothing(pattern, "linear layer", layers, reasons))
        for name, layer in found.items():
            if name not in reasons and getattr(self.read.setdefault(name, _Read()), what) is None:
                shape = (layer.in_features,) if what == "inputs" else tuple(layer.weight.shape)
                gate = f"{name}:{what}"
                self.gates[gate] = self._make(*shape, guarded=what == "inputs")
                setattr(self.read[name], what, gate)

    def _why_not_layer(self, name: str, layer: nn.Linear, what: GateGranularity) -> str | None:
        if f"{name}.weight" in self._ignored:
            return "it is ignored"
        if not _has_own_weight(layer):
            return "its weight is computed"
        if self._holders[id(layer.weight)] > 1:
            return "it shares its weight with another layer"
        if what == "weights" and type(layer) not in GATED:
            return f"the forward of {type(layer).__name__} is its own"
        return None

    def reading(self, name: str) -> Reading:
        """Return what the gates let through to a layer."""
        layer, read = self._layers[name], self.read[name]
        weight = getattr(layer, weight_name(layer))
        index = torch.zeros(weight.shape[input_dim(layer)] * convolution_groups(layer), dtype=torch.int64)
        start = 1
        for group, reader in read.channels:
            size = self.gates[group].log_alpha.numel()
            index[reader.positions] = torch.arange(start, start + size)[:, None]
            start += size
        own = [None if gate is None else self.gates[gate] for gate in (read.inputs, read.weights)]
        return Reading([self.gates[group] for group, _ in read.channels], index.to(weight.device), *own)


def _has_own_weight(layer: nn.Module) -> bool:
    return isinstance(layer._parameters.get(weight_name(layer)), nn.Parameter)


def _nothing(pattern: str, kind: str, names: Iterable[str], reasons: Mapping[str, str]) -> str:
    if not reasons:
        listed = ", ".join(list(names)[:6])
        return f"`granularity` pattern {pattern!r} matches no {kind}; the model has {listed or 'none'}."
    told = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:4])
    return f"`granularity` pattern {pattern!r} matches only what cannot be gated ({told}). Choose others."


def writings(model: nn.Module, graph: Graph, gates: Gates) -> dict[str, Reading]:
    """Find, for layers with gates of their own, the gates of the channels that they make, along their outputs."""
    named, layers = gates.named(), named_modules(model)
    own = {
        id(getattr(layers[name], weight_name(layers[name]))): name
        for name, reading in gates.read_by().items()
        if reading.inputs is not None or reading.weights is not None
    }
    tensors = dict(model.named_parameters())
    found: dict[str, list[tuple[Gate, Tensor]]] = {name: [] for name in own.values()}
    for group in graph.groups:
        is_gated = group.name in named and named[group.name].shape == (group.size,)
        for member in group.members if is_gated else ():
            layer = own.get(id(tensors.get(member.tensor)))
            if layer is not None and member.dim == 0:
                found[layer].append((named[group.name], member.positions))
    return {name: _along(parts, getattr(layers[name], weight_name(layers[name]))) for name, parts in found.items()}


def _along(parts: Sequence[tuple[Gate, Tensor]], weight: Tensor) -> Reading:
    """Return what gates let through along the outputs of a layer."""
    index, start = torch.zeros(weight.shape[0], dtype=torch.int64), 1
    for _, positions in parts:
        index[positions] = torch.arange(start, start + len(positions))[:, None]
        start += len(positions)
    return Reading([gate for gate, _ in parts], index.to(weight.device))

"""Absorption: what removed channels emit goes into the bias, or the running mean, of those that read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_prune.behind import Behind
from lightning_prune.cut import Offsets
from lightning_prune.emissions import Emissions
from lightning_prune.fate import Fate
from lightning_prune.graph import Graph
from lightning_prune.handlers import Call
from lightning_prune.labels import LabelArray
from lightning_prune.nodes import Emission
from lightning_prune.steps import Run, Seen, Step
from lightning_prune.taps import tap_weights
from lightning_prune.tensors import named_modules, named_tensors
from lightning_prune.types import PruningPlan

aten = torch.ops.aten


def absorb(model: nn.Module, graph: Graph, plan: PruningPlan) -> Offsets:
    """Work out what keeps the network's output, on average, where it was when channels go.

    A removed channel that emits c on average gives sum_(k) W[:, k] c to each layer that reads it, summed over the
    kernel's taps too. That goes into the layer's bias; where there is none, it is taken from the running mean of
    the BatchNorm that follows; where there is none either, a bias is made. Exact where the channel is constant
    (gamma = 0) and no padding is met; under zero padding exact but for the border, and on maps that are mostly border
    (see `taps`) on average.

    After Ye et al. 2018, "Rethinking the Smaller-Norm-Less-Informative Assumption in Channel Pruning" (arXiv
    1802.00124, section 4), for any activation and with E[act(gamma z + beta)] where gamma is not 0.

    Args:
        model: The model before the cut; it is not changed.
        graph: A reading of it, or of one with the same layers.
        plan: What goes.
    """
    tensors = named_tensors(model)
    if not len(plan) or any(tensor.is_meta for tensor in tensors.values()):
        return Offsets()
    found = _Found(model, tensors, graph, plan)
    with torch.no_grad():
        for target, offset in found.each():
            found.offsets.setdefault(target, []).append(offset)
    means = {target: torch.stack(offsets).mean(0) for target, offsets in found.offsets.items()}
    return Offsets(
        {name: offset for (kind, name), offset in means.items() if kind == "added"},
        {name: offset for (kind, name), offset in means.items() if kind == "bias"},
    )


class _Found:
    """What a walk through the model's run finds: layers that read removed channels, and where their offset goes.

    A layer that is called several times has several offsets, of which it gets the mean.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor], graph: Graph, plan: PruningPlan) -> None:
        self._run: Run = next(iter(graph.runs.values()))
        self._tensors = tensors
        self._modules = named_modules(model)
        self._behind = Behind(self._run, tensors)
        self._emissions = Emissions(self._run, tensors, Fate(graph, plan))
        self._labels = {
            number: labels
            for step in self._run.steps
            for number, (_, labels) in zip(step.results, step.outputs, strict=True)
        }
        self.offsets: dict[tuple[str, str], list[Tensor]] = {}

    def each(self) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """Yield each layer's target and offset."""
        for step in self._emissions.walk():
            packet = step.op.overloadpacket
            offset = None
            if packet is aten.convolution:
                offset = self._of_convolution(step, Call(step.op, step.args, step.kwargs, None))
            elif packet in (aten.mm, aten.addmm):
                offset = self._of_linear(step)
            if offset is not None and offset[1].any():
                yield from self._placed(step, Call(step.op, step.args, step.kwargs, None), *offset)

    def _constants(self, value: object, dim: int) -> Tensor | None:
        """Return what the removed positions along a dimension emit, and 0 for all others."""
        emission = self._emissions.of(value)
        origin = value.origin if isinstance(value, Seen) else None
        labels = self._labels.get(origin) if isinstance(origin, int) else None
        if emission is None or labels is None:
            return None
        return self._only_gone(emission, labels[dim], dim)

    def _only_gone(self, emission: Emission, labels: LabelArray | None, dim: int) -> Tensor:
        mean = emission.mean
        others = [place for place in range(mean.dim()) if place != dim % mean.dim()]
        along = mean.flatten() if mean.numel() == mean.shape[dim] else mean.mean(others)
        along = along.expand(emission.values.shape[1:][dim])
        constants = torch.zeros_like(along)
        gone = self._emissions.gone(labels)
        constants[gone] = along[gone].nan_to_num(0.0)
        return constants

    def _of_convolution(self, step: Step, call: Call) -> tuple[str, Tensor] | None:
        weight, constants = self._emissions.parameter(call["weight"]), self._constants(call["input"], 1)
        if weight is None or constants is None or not constants.any():
            return None
        groups, name = call["groups"], call["weight"].origin
        if groups == len(constants) > 1:
            return None
        weight, precise = weight.detach(), torch.promote_types(weight.dtype, torch.float32)
        taps = tap_weights(call, step.inputs[0], tuple(weight.shape))
        if groups == 1 and not call["transposed"] and weight.is_contiguous():
            places = torch.outer(constants, taps).flatten().to(weight.device, precise)
            return name, (weight.flatten(1).to(precise) @ places).to("cpu", torch.float64)
        kernel = weight.flatten(2).to("cpu", torch.float64) @ taps
        rows = kernel.view(groups, -1, kernel.shape[1])
        if call["transposed"]:
            rows = rows.mT / prod(call["stride"])
        return name, (rows @ constants.view(groups, -1, 1)).flatten()

    def _of_linear(self, step: Step) -> tuple[str, Tensor] | None:
        constants = self._constants(step.args[-2], 1)
        place = self._emissions.weight_of(step) if constants is not None and constants.any() else None
        if place is None or constants is None:
            return None
        name, transposed = place
        weight = self._tensors[name].detach()
        precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
        offset = (precise if transposed else precise.t()) @ constants.to(precise)
        return name, offset.to("cpu", torch.float64)

    def _placed(self, step: Step, call: Call, weight: str, offset: Tensor) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """Yield where a layer's offset goes, if there is a place for it."""
        bias = {aten.convolution: "bias", aten.addmm: "self"}.get(step.op.overloadpacket)
        norm, name = self._behind.norm(step.results[0]), weight.rpartition(".")[0]
        if bias is not None and self._emissions.parameter(call[bias]) is not None:
            yield ("added", str(call[bias].origin)), offset
        elif norm is not None:
            yield ("added", norm.running_mean), -offset
        elif self._can_have_bias(name, weight):
            yield ("bias", name), offset[self._emissions.stay(step.outputs[0][1][1], len(offset))]

    def _can_have_bias(self, name: str, weight: str) -> bool:
        """Tell whether a module is one with room for a bias, whose weight nobody else has."""
        module = self._modules.get(name)
        parts = [(module, part) for module in self._modules.values() for part in module._parameters.values()]
        owners = [owner for owner, part in parts if part is self._tensors[weight]]
        return isinstance(module, (nn.Linear, _ConvNd)) and owners == [module] and module.bias is None

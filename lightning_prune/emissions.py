"""What removed channels emit on average, carried from BatchNorm through what follows it, without data.

In eval mode BatchNorm gives channel c values that lie around beta_c with spread |gamma_c|. Taken as beta + |gamma| z
with z ~ N(0, 1), they are carried through the operations of a run as values at the nodes of a quadrature over z:
activations, pooling, depthwise convolutions, concatenations and reshapes. So E[act(gamma z + beta)] comes out for any
activation, and exactly where gamma is 0. What depends on the input in another way is unknown, and stays so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, reduce
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from lightning_prune.fate import Fate
from lightning_prune.handlers import Call, handler_for
from lightning_prune.handlers.normalization import batch_norm as _batch_norms
from lightning_prune.handlers.pointwise import pointwise as _pointwise
from lightning_prune.handlers.pooling import pool as _pools
from lightning_prune.handlers.registry import packets
from lightning_prune.labels import LabelArray
from lightning_prune.nodes import Emission, compact, is_even, normal
from lightning_prune.steps import Run, Seen, Step, numbers_read, seen_in
from lightning_prune.taps import tap_weights

log = logging.getLogger(__name__)

_UNKNOWN = torch.full((1,), torch.nan, dtype=torch.float64)
"""Values of which nothing is known."""

_MOST = 2**25
"""So many values are carried at most; of more, only the means."""


class Emissions:
    """Walks through a run and tells what the removed channels emit.

    Args:
        run: The run, in eval mode.
        tensors: The model's tensors by name.
        fate: Who goes.

    Attributes:
        readers: For each tensor of the run the places of the steps that read it.
    """

    def __init__(self, run: Run, tensors: Mapping[str, Tensor], fate: Fate) -> None:
        self._run, self._tensors, self._fate = run, tensors, fate
        self._known: dict[int, Emission] = {}
        self._root: dict[int, int] = {}
        self._place = 0
        self._going: dict[int, tuple[LabelArray, Tensor]] = {}
        self.readers: dict[int, list[int]] = {}
        self._read = [numbers_read(step) for step in run.steps]
        self._maker = {number: step for step in run.steps for number in step.results}
        for place, numbers in enumerate(self._read):
            for number in numbers:
                self.readers.setdefault(number, []).append(place)

    def walk(self) -> Iterator[Step]:
        """Yield each step into which something known goes, before it is done: `of` tells what that is."""
        for place, step in enumerate(self._run.steps):
            self._place, numbers = place, self._read[place]
            known = any(number in self._known for number in numbers)
            if known:
                yield step
            rule = _rule_for(step.op)
            found = self._follow(rule, step) if rule is not None and (known or rule in _BEGIN) else ()
            self._forget(step, numbers)
            for number, emission, (shape, _) in zip(step.results, found, step.outputs, strict=False):
                if emission is not None and emission.values.shape[1:] == shape:
                    self._known[number] = emission

    def of(self, value: object) -> Emission | None:
        """Return what an argument emits; None where it is not known."""
        if isinstance(value, Seen) and isinstance(value.origin, int):
            return self._known.get(value.origin) or self._moved(self._maker[value.origin], value.origin)
        tensor = self.parameter(value)
        return None if tensor is None else Emission(tensor.detach().to("cpu", torch.float64).unsqueeze(0))

    def _moved(self, step: Step, number: int) -> Emission | None:
        """Return what is another view of one of the model's tensors."""
        source = step.args[0] if step.args and step.op.overloadpacket in _MOVES else None
        tensor = self.parameter(source)
        if tensor is None or tensor.is_meta or tensor.numel() > _MOST:
            return None
        return self.move(step, Call(step.op, step.args, step.kwargs, None))[step.results.index(number)]

    def parameter(self, value: object) -> Tensor | None:
        """Return the model's tensor that an argument is, if it is one."""
        return self._tensors.get(value.origin) if isinstance(value, Seen) and isinstance(value.origin, str) else None

    def gone(self, labels: LabelArray | None) -> Tensor:
        """Return the positions that go along a dimension; not to be written to."""
        if labels is None:
            return torch.arange(0)
        if id(labels) not in self._going:  # kept with the labels, so that no others get their id
            self._going[id(labels)] = labels, torch.from_numpy(np.flatnonzero(self._fate.goes(labels)))
        return self._going[id(labels)][1]

    def stay(self, labels: LabelArray | None, size: int) -> Tensor:
        """Return the positions that stay along a dimension of this size."""
        goes = np.zeros(size, dtype=bool) if labels is None else self._fate.goes(labels)
        return torch.from_numpy(np.flatnonzero(~goes))

    def _follow(self, rule: Rule, step: Step) -> Sequence[Emission | None]:
        try:
            found = rule(self, step, Call(step.op, step.args, step.kwargs, None))
        except Exception as error:
            log.debug("what %s emits is not known", step.name, exc_info=error)
            return ()
        return found if isinstance(found, list) else [found]

    def _forget(self, step: Step, numbers: Sequence[int]) -> None:
        """Forget what nobody reads any more, and what shares its memory with a tensor that this step writes to."""
        for number in numbers:
            if self.readers[number][-1] == self._place:
                self._known.pop(number, None)
        writes = step.op._schema.is_mutable
        if numbers and (writes or step.op.overloadpacket in _MOVES):
            root = self._root.get(numbers[0], numbers[0])
            self._root.update(dict.fromkeys(step.results, root))
            if writes:
                for number in [known for known in self._known if self._root.get(known, known) == root]:
                    del self._known[number]

    def batch_norm(self, step: Step, call: Call) -> Emission | None:
        """Values around the shift, as far as the scale; exactly what comes out where what goes in is known exactly."""
        shape, labels = step.outputs[0][0], step.outputs[0][1][1]
        gone = self.gone(labels)
        if not len(gone) or self.parameter(call["running_mean"]) is None:
            return None
        scale, shift = (self._chosen(call[name], gone, default) for name, default in (("weight", 1.0), ("bias", 0.0)))
        emitted = normal(shift, scale.abs())
        before = self.of(call["input"])
        if before is not None:
            centre, variance = (self._chosen(call[f"running_{name}"], gone, 0.0) for name in ("mean", "var"))
            width = torch.sqrt(variance + call.get("eps", call.get("epsilon")))
            exact = (before.along(1)[gone] - centre) / width * scale + shift
            emitted = torch.where(exact.isfinite() & (before.spread_along(1)[gone] == 0), exact, emitted)
        values = torch.full((len(emitted), shape[1]), torch.nan, dtype=torch.float64)
        values[:, gone] = emitted
        sources = frozenset([self._place]) if len(emitted) > 1 else frozenset[int]()
        return Emission(values.view(len(emitted), 1, -1, *[1] * (len(shape) - 2)), sources).expanded(shape)

    def _chosen(self, value: object, places: Tensor, default: float) -> Tensor:
        """Return some elements of one of the model's tensors."""
        tensor = self.parameter(value)
        if tensor is None:
            return torch.full((len(places),), default, dtype=torch.float64)
        return tensor.detach()[places.to(tensor.device)].to("cpu", torch.float64)

    def pointwise(self, step: Step, call: Call) -> Emission | None:
        """Let the operation do its work at the nodes; a sum of what varies independently is taken as normal."""
        op = _functional(step.op)
        if op is None or "out" in step.kwargs or torch.Tag.nondeterministic_seeded in op.tags:
            return None
        operands = [self.of(value) for value in seen_in((*step.args, *step.kwargs.values()))]
        if op.overloadpacket in _IDENTITIES:
            return operands[0]
        inputs = [operand for operand in operands if operand is not None]
        varying = {operand.sources for operand in inputs if operand.sources}
        sources = frozenset[int]().union(*varying)
        if len(varying) < 2:
            return self._evaluated(op, step, operands, sources)
        if op.overloadpacket not in _SUMS or len(operands) != 2:
            return None
        mean = self._evaluated(op, step, [Emission(part.mean.unsqueeze(0)) for part in inputs], sources)
        if mean is None:
            return None
        first, second = (part.variance for part in inputs)
        values = normal(compact(mean.values)[0], torch.sqrt(first + float(call.get("alpha", 1)) ** 2 * second))
        return Emission(values, frozenset([self._place])).expanded(step.outputs[0][0])

    def _evaluated(
        self, op: OpOverload, step: Step, operands: Sequence[Emission | None], sources: frozenset[int]
    ) -> Emission | None:
        """Do an operation with what is known; what meets something unknown is unknown, but for what it is times 0."""
        rank = len(step.outputs[0][0])
        parts = [_UNKNOWN if part is None else compact(part.values) for part in operands]
        parts = [part.reshape(len(part), *[1] * (rank + 1 - part.dim()), *part.shape[1:]) for part in parts]
        queue = list(parts)

        def filled(value: Any) -> Any:
            if isinstance(value, Seen):
                return queue.pop(0)
            return [filled(item) for item in value] if isinstance(value, list) else value

        out = op(*[filled(value) for value in step.args], **{key: filled(value) for key, value in step.kwargs.items()})
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return None
        out = torch.where(_any_of([part.isnan() for part in parts]), torch.nan, out)
        if op.overloadpacket is torch.ops.aten.mul:
            out = torch.where(_any_of([part == 0 for part in parts]), 0.0, out)
        return Emission(out, sources).expanded(step.outputs[0][0])

    def move(self, step: Step, call: Call) -> list[Emission | None]:
        """Let the operation move the values as it moves the tensor's."""
        source, op = self.of(step.args[0]), step.op
        if source is None:
            return []
        if source.values.shape[1:].numel() * len(source.values) > _MOST:
            source = Emission(source.mean.unsqueeze(0)).expanded(source.values.shape[1:])
        given = [value if self.parameter(value) is None else self.parameter(value) for value in step.args[1:]]
        if op.overloadpacket in _VIEWS:
            op = torch.ops.aten.reshape.default
            given = [list(step.outputs[0][0])]
        kwargs = step.kwargs
        out = torch.vmap(lambda values: op(values, *given, **kwargs))(source.values)
        return [Emission(values, source.sources) for values in (out if isinstance(out, (list, tuple)) else [out])]

    def join(self, step: Step, call: Call) -> Emission | None:
        """Concatenate what is known with what is not."""
        parts = [self.of(value) for value in step.args[0]]
        known = [part for part in parts if part is not None]
        if not known:
            return None
        rank = known[0].values.dim() - 1
        dim = call["dim"] % rank
        shape = step.outputs[0][0]
        nodes = max(len(part.values) for part in known)
        even = [other for other in range(rank) if other != dim and all(is_even(part.values, other) for part in known)]
        small = [1 if place in even else size for place, size in enumerate(shape)]
        pieces = []
        for part, was in zip(parts, step.inputs, strict=True):
            values = _UNKNOWN[0] if part is None else compact(part.values, [place + 1 for place in even])
            pieces.append(values.expand(nodes, *small[:dim], was[dim], *small[dim + 1 :]))
        sources = frozenset[int]().union(*(part.sources for part in known))
        return Emission(torch.cat(pieces, dim + 1), sources).expanded(shape)

    def pool(self, step: Step, call: Call) -> Emission | None:
        """What is the same everywhere is so after pooling; what varies is averaged out where one value is left."""
        source = self.of(step.args[0])
        shape = step.outputs[0][0]
        if source is None or source.values.dim() != len(shape) + 1:
            return None
        spatial = re.search(r"([123])d", step.name)
        mixed = range(len(shape) - int(spatial[1] if spatial else 0), len(shape))
        if not all(is_even(source.values, dim) for dim in mixed):
            return None
        values = compact(source.values, [dim + 1 for dim in mixed])
        if all(shape[dim] == 1 for dim in mixed) and "max" not in step.name:
            return Emission(Emission(values).mean.unsqueeze(0)).expanded(shape)
        return Emission(values, source.sources).expanded(shape)

    def pad(self, step: Step, call: Call) -> Emission | None:
        """Padding in space is passed over, as that of convolutions; padded channels hold the value."""
        source, pad, shape = self.of(step.args[0]), list(call["pad"]), step.outputs[0][0]
        if source is None:
            return None
        values = source.values
        for place in range(len(pad) // 2):
            dim = len(shape) - 1 - place
            if not is_even(values, dim):
                padded = [0, 0] * (len(shape) - 1 - dim) + pad[2 * place : 2 * place + 2]
                values = torch.constant_pad_nd(compact(values), padded, float(call.get("value", 0)))
        return Emission(compact(values), source.sources).expanded(shape)

    def average(self, step: Step, call: Call) -> Emission | None:
        """Average over dimensions; what varies from place to place is averaged out."""
        source, dims = self.of(step.args[0]), call.get("dim")
        if source is None or not dims:
            return None
        mean = Emission(source.mean.mean(dims, keepdim=bool(call.get("keepdim"))).unsqueeze(0))
        return mean.expanded(step.outputs[0][0])

    def convolution(self, step: Step, call: Call) -> Emission | None:
        """Depthwise convolutions sum their kernel; of others it is known what channels without weights emit."""
        weight, source = self.parameter(call["weight"]), self.of(call["input"])
        shape, (_, made, *_) = step.outputs[0]
        rows = self.gone(made)
        if weight is None or weight.is_meta or call["transposed"] or not len(rows):
            return None
        if call["groups"] == step.inputs[0][1] > 1:
            if source is None or not is_even(source.values, *range(2, source.values.dim() - 1)):
                return None
            taps = tap_weights(call, step.inputs[0], tuple(weight.shape))
            kernel = weight.detach().flatten(1).to("cpu", torch.float64) @ taps
            shift = self._shift(call["bias"], len(weight))
            inputs = compact(source.values).mean(1).flatten(1).repeat_interleave(len(weight) // call["groups"], 1)
            emitted, sources = inputs * kernel + shift, source.sources
        else:
            dead, sources = _dead_rows(weight.detach().flatten(1), rows), frozenset[int]()
            if not len(dead):
                return None
            emitted = _at(dead, self._shift(call["bias"], len(weight)))
        return Emission(emitted.view(len(emitted), 1, -1, *[1] * (len(shape) - 2)), sources).expanded(shape)

    def linear(self, step: Step, call: Call) -> Emission | None:
        """Channels that have no weights left emit their shift."""
        place = self.weight_of(step)
        rows = self.gone(step.outputs[0][1][-1])
        if place is None or not len(rows):
            return None
        name, transposed = place
        weight = self._tensors[name].detach()
        dead = _dead_rows(weight if transposed else weight.t(), rows)
        if not len(dead):
            return None
        bias = call.get("self") if step.op.overloadpacket is torch.ops.aten.addmm else None
        emitted = _at(dead, self._shift(bias, step.outputs[0][0][-1]))
        return Emission(emitted.view(1, 1, -1)).expanded(step.outputs[0][0])

    def _shift(self, bias: object, size: int) -> Tensor:
        """Return what a layer adds to each of its channels."""
        found = self.of(bias)
        return torch.zeros(size, dtype=torch.float64) if found is None else found.values[0]

    def weight_of(self, step: Step) -> tuple[str, bool] | None:
        """Return the name of the matrix that a product's right factor is, and whether it is stored (out, in)."""
        right = step.args[-1]
        if not isinstance(right, Seen):
            return None
        transposed = False
        while isinstance(right.origin, int):
            before = self._maker[right.origin]
            if before.op.overloadpacket not in _TRANSPOSED:
                return None
            right, transposed = before.args[0], not transposed
        tensor = self.parameter(right)
        return None if tensor is None or tensor.is_meta or tensor.dim() != 2 else (str(right.origin), transposed)


def _any_of(masks: Sequence[Tensor]) -> Tensor:
    """Tell where one of several masks that broadcast holds."""
    return reduce(torch.logical_or, masks)


def _dead_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """Return those of some rows of a matrix (out, in) that hold only zeros."""
    suspects = (weight[:, 0] == 0).cpu()[rows]
    if suspects.any():
        rows = rows[suspects]
        return rows[~weight[rows.to(weight.device)].any(1).cpu()]
    return rows[:0]


def _at(places: Tensor, values: Tensor) -> Tensor:
    """Return one node with some of the values, NaN for others."""
    emitted = torch.full_like(values, torch.nan)
    emitted[places] = values[places]
    return emitted.unsqueeze(0)


def _functional(op: OpOverload) -> OpOverload | None:
    """Return the operation's twin that does not write to its input."""
    if not op._schema.is_mutable:
        return op
    packet = getattr(torch.ops.aten, op._schema.name.removeprefix("aten::").removesuffix("_"), None)
    twin: OpOverload | None = getattr(packet, op._overloadname, None)
    return twin


Rule: TypeAlias = Callable[[Emissions, Step, Call], "list[Emission | None] | Emission | None"]

_IDENTITIES = packets("clone contiguous detach alias _to_copy lift lift_fresh")
_SUMS = packets("add sub")
_VIEWS = packets("view _unsafe_view reshape _reshape_alias")
_TRANSPOSED = packets("t transpose numpy_T")
_MOVES = packets(
    "view _unsafe_view reshape _reshape_alias permute transpose t unsqueeze squeeze expand slice select split "
    "split_with_sizes unbind index_select roll flip native_channel_shuffle channel_shuffle movedim alias detach "
    "unsafe_split unsafe_split_with_sizes"
)
_RULES: dict[OpOverloadPacket, Rule] = {
    **dict.fromkeys(_MOVES, Emissions.move),
    **dict.fromkeys(packets("cat"), Emissions.join),
    **dict.fromkeys(packets("constant_pad_nd"), Emissions.pad),
    **dict.fromkeys(packets("mean"), Emissions.average),
    **dict.fromkeys(packets("convolution"), Emissions.convolution),
    **dict.fromkeys(packets("mm addmm"), Emissions.linear),
}
_BY_HANDLER: dict[object, Rule] = {
    _batch_norms: Emissions.batch_norm,
    _pointwise: Emissions.pointwise,
    _pools: Emissions.pool,
}


_BEGIN: tuple[Rule, ...] = (Emissions.batch_norm, Emissions.convolution, Emissions.linear)
"""The rules that know something of operations into which nothing known goes."""


@cache
def _rule_for(op: OpOverload) -> Rule | None:
    return _RULES.get(op.overloadpacket) or _BY_HANDLER.get(handler_for(op))

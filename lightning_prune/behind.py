"""What comes right behind a layer in a run: the BatchNorm that alone reads its output, the sum that it goes into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.handlers import Call
from lightning_prune.handlers.normalization import is_batch_norm
from lightning_prune.steps import Run, Seen, Step, numbers_read, seen_in

aten = torch.ops.aten

_PRODUCTS = (aten.convolution, aten.mm, aten.addmm)
_TRANSPOSED = (aten.t, aten.transpose, aten.permute)
_VIEWS = (aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias)
_ADDITIONS = (aten.add, aten.add_)


@dataclass(frozen=True)
class Norm:
    """A BatchNorm that is the only one to read something.

    Attributes:
        running_mean: The name of its running mean.
        running_var: The name of its running variance.
        weight: The name of its scale; None where that is 1.
        eps: What is added to the variance.
        result: The number of what it returns.
    """

    running_mean: str
    running_var: str
    weight: str | None
    eps: float
    result: int

    def scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return what it multiplies each channel by, in float64."""
        deviation = (tensors[self.running_var].detach().double() + self.eps).sqrt()
        return (1.0 if self.weight is None else tensors[self.weight].detach().double()) / deviation


class Behind:
    """Looks up what comes behind the steps of a run.

    Args:
        run: The run, in eval mode.
        tensors: The model's tensors by name.
    """

    def __init__(self, run: Run, tensors: Mapping[str, Tensor]) -> None:
        self._run, self._tensors = run, tensors
        self._readers: dict[int, list[Step]] = {}
        self._products: dict[str, list[Step]] = {}
        self._calls: Counter[str] = Counter()
        names: dict[int, str] = {}
        for step in run.steps:
            self._calls.update({seen.origin for seen in seen_in(step.args) if isinstance(seen.origin, str)})
            for number in set(numbers_read(step)):
                self._readers.setdefault(number, []).append(step)
            read = [value.origin for value in step.args if isinstance(value, Seen)]
            if step.op.overloadpacket in _TRANSPOSED and read:
                name = read[0] if isinstance(read[0], str) else names.get(read[0] if isinstance(read[0], int) else -1)
                names.update(dict.fromkeys(step.results, name) if name else {})
            elif step.op.overloadpacket in _PRODUCTS:
                for origin in read:
                    name = origin if isinstance(origin, str) else names.get(origin if origin is not None else -1)
                    if name is not None:
                        self._products.setdefault(name, []).append(step)

    def products(self, weight: str) -> list[Step]:
        """Return the convolutions and matrix products that a tensor of the model is a factor of."""
        return self._products.get(weight, [])

    def norm(self, number: int) -> Norm | None:
        """Return the BatchNorm that alone reads what a step has returned, and nothing else.

        None is returned where there is none, or one without running statistics.
        """
        step = self._only_reader(number)
        if step is None or not is_batch_norm(step.op):
            return None
        call = Call(step.op, step.args, step.kwargs, None)
        mean, variance, weight = (self._name(call[name]) for name in ("running_mean", "running_var", "weight"))
        if mean is None or variance is None or (weight is None and call["weight"] is not None) or self._calls[mean] > 1:
            return None
        return Norm(mean, variance, weight, call.get("eps", call.get("epsilon")), step.results[0])

    def is_summed(self, number: int) -> bool:
        """Tell whether what a step has returned goes nowhere but into a sum with something of the same shape."""
        step = self._only_reader(number)
        while step is not None and step.op.overloadpacket in _VIEWS:
            step = self._only_reader(step.results[0])
        return step is not None and step.op.overloadpacket in _ADDITIONS and len(set(step.inputs)) < len(step.inputs)

    def _only_reader(self, number: int) -> Step | None:
        readers = self._readers.get(number, [])
        return readers[0] if len(readers) == 1 and number not in self._run.returned else None

    def _name(self, value: object) -> str | None:
        """Return the name of an argument that is one of the model's tensors."""
        origin = value.origin if isinstance(value, Seen) else None
        return origin if isinstance(origin, str) and origin in self._tensors else None

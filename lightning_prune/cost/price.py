"""What one operation costs, in the shapes that its tensors have."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from typing import TypeAlias

from torch._ops import OpOverload

from lightning_prune.labels import Labels
from lightning_prune.steps import Step

ShapeOf: TypeAlias = Callable[[tuple[int, ...], Labels], tuple[int, ...]]
"""Says what is left of a tensor, given its shape and its labels in the reading of the model."""

Price: TypeAlias = Callable[[Step, ShapeOf], float]
"""Says what a step of the run costs, for the run's batch.

It asks `ShapeOf` for all shapes that can change, and for the same ones however large they are.
"""


def macs(step: Step, shape_of: ShapeOf) -> float:
    """Return the multiply-accumulates, by the formulas of `torch.utils.flop_counter`."""
    return step.work.flops(shape_of) / 2 if step.work else 0.0


def memory(step: Step, shape_of: ShapeOf) -> float:
    """Return the elements of the tensors that a step makes; views and what is written in place take no memory.

    Summed over the steps it is the memory of all activations of a forward pass, none of them freed.
    """
    return float(sum(prod(shape_of(*made)) for made in step.outputs)) if _makes_tensors(step.op) else 0.0


@cache
def _makes_tensors(op: OpOverload) -> bool:
    """Tell whether an operation returns tensors with memory of their own."""
    aliases = any(result.alias_info is not None for result in op._schema.returns)
    return not aliases and op.name() != "aten::_unsafe_view"

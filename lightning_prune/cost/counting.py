"""What a model costs, counted: parameters and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_prune.fate import Fate
from lightning_prune.flow import Flow
from lightning_prune.graph import Graph
from lightning_prune.inputs import Inputs, tensors_in
from lightning_prune.labels import LabelSpace
from lightning_prune.tensors import named_parameters, named_tensors
from lightning_prune.trace import SUBSTRATES, Setting, run
from lightning_prune.types import Attributes, PruningPlan


def count_params(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> int:
    """Count the elements of all parameters, each once.

    Args:
        model: The model.
        tensors: Name -> tensor that stands in for a parameter.
    """
    standins = tensors or {}
    return sum(standins.get(name, parameter).numel() for name, parameter in named_parameters(model).items())


def count_macs(
    model: nn.Module,
    inputs: Inputs,
    tensors: Mapping[str, Tensor] | None = None,
    attributes: Attributes | None = None,
) -> int:
    """Count the multiply-accumulates per example of a forward pass in eval mode.

    The formulas are those of `torch.utils.flop_counter`. The model runs on meta tensors where it can: on CPU tensors
    there is no formula for attention.

    Args:
        model: The model; it is not changed.
        inputs: What forward is called with; the count is divided by its batch size.
        tensors: Name -> tensor that stands in for one of the model, for the cost of a plan.
        attributes: Module attributes to set for the run.
    """
    everything = {**named_tensors(model), **(tensors or {})}
    for substrate in SUBSTRATES:
        try:
            done = run(model, inputs, Setting(substrate), Flow(LabelSpace()), everything, {}, attributes)
        except Exception:
            if substrate == SUBSTRATES[-1]:
                raise
        else:
            break
    return per_example(done.macs, inputs)


def planned_macs(graph: Graph, plan: PruningPlan) -> int:
    """Count the multiply-accumulates per example that a plan leaves, from the shapes that it leaves of every step."""
    fate = Fate(graph, plan)
    steps = next(iter(graph.runs.values())).steps
    flops = sum(step.work.flops(fate.shape_left) for step in steps if step.work)
    return per_example(flops // 2, graph.inputs)


def per_example(macs: int, inputs: Inputs) -> int:
    """Divide the multiply-accumulates of a run by the batch size of its inputs."""
    return macs // _batch_size(inputs)


def _batch_size(inputs: Inputs) -> int:
    """Return the size of dimension 0 where all tensors agree on it, else 1."""
    sizes = {tensor.shape[0] for tensor in tensors_in((inputs.args, inputs.kwargs)) if tensor.dim()}
    return max(sizes.pop(), 1) if len(sizes) == 1 else 1

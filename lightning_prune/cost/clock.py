"""What a model costs, measured: the time of a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import nn

from lightning_prune.inputs import Inputs
from lightning_prune.modes import in_eval_mode


def batch_of(inputs: Inputs, size: int) -> Inputs:
    """Return inputs with another batch size, by repeating the first example along dimension 0."""
    return inputs.map(
        lambda tensor: tensor[:1].expand(size, *tensor.shape[1:]).contiguous() if tensor.dim() else tensor
    )


def measure_latency(model: nn.Module, inputs: Inputs, *, seconds: float = 0.5) -> float:
    """Measure the median time of a forward pass in eval mode, in milliseconds, with the threads that torch has.

    Args:
        model: The model; its mode is restored.
        inputs: What forward is called with.
        seconds: How long to measure; at least five passes are timed, after one to warm up.
    """

    def call() -> None:
        inputs.call(model)
        _wait(model)

    with in_eval_mode(model), torch.inference_mode():
        return measure_calls(call, seconds=seconds)


def measure_calls(call: Callable[[], object], *, seconds: float = 0.5) -> float:
    """Measure the median time of a call, in milliseconds.

    Args:
        call: What is timed.
        seconds: How long to measure; at least five calls are timed, after one to warm up.
    """
    times: list[float] = []
    call()
    while len(times) < 5 or sum(times) < seconds:
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return median(times) * 1e3


def _wait(model: nn.Module) -> None:
    if any(parameter.is_cuda for parameter in model.parameters()):
        torch.cuda.synchronize()

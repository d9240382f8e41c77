"""How fast onnxruntime runs a file."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lightning_prune.cost import measure_calls
from lightning_prune.exporting.formats import feed, session_of
from lightning_prune.inputs import Inputs


def onnx_latency(path: str | os.PathLike[str], inputs: Inputs, *, seconds: float = 0.5) -> float:
    """Measure the median time of a run in milliseconds, as `measure_latency` does, with as many threads as torch has.

    Args:
        path: An ONNX file.
        inputs: What the network's forward was called with, in the same order.
        seconds: How long to measure; at least five runs are timed, after one to warm up.

    Raises:
        ModuleNotFoundError: onnxruntime is not installed.
    """
    session = session_of(Path(path), torch.get_num_threads())
    arrays = feed(session, inputs)
    return measure_calls(lambda: session.run(None, arrays), seconds=seconds)

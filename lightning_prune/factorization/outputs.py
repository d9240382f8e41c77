"""What convolutions return over batches, as mean and covariance; the rows are not kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Generator, Tensor, nn

from lightning_prune.errors import PruningError
from lightning_prune.inputs import ExampleInputs, bind
from lightning_prune.sampling import draw_points, outputs_at
from lightning_prune.tensors import swapped


class Outputs:
    """Sums over rows, a row being what a layer returns at one point, in float64 on the CPU.

    Args:
        channels: How many channels the layer returns, n.

    Attributes:
        rows: How many rows were taken in.
    """

    def __init__(self, channels: int) -> None:
        self.rows = 0
        self._sum = torch.zeros(channels, dtype=torch.float64)
        self._products = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take rows in, (rows, n)."""
        rows = rows.detach().to("cpu", torch.float64)
        self.rows += len(rows)
        self._sum += rows.sum(0)
        self._products.addmm_(rows.T, rows)

    @property
    def mean(self) -> Tensor:
        """Over the rows, (n,)."""
        return self._sum / self.rows

    @property
    def covariance(self) -> Tensor:
        """Over the rows, divided by their number, (n, n)."""
        return self._products / self.rows - self.mean.outer(self.mean)


def watch_outputs(
    model: nn.Module, layers: Mapping[str, nn.Conv2d], batches: Iterable[ExampleInputs], points: int | None
) -> dict[str, Outputs]:
    """Gather what layers return while the model reads batches, in eval mode; it is afterwards what it was.

    Args:
        model: The model.
        layers: The layers, by their names.
        batches: What forward takes; tensors are brought to the device of the model's first parameter.
        points: So many points of each example's map are drawn at most, none of them twice; None takes all.

    Raises:
        PruningError: There is no batch, a layer is not reached, has no more points than channels, or returns
            something that is not finite.
    """
    found = {name: Outputs(conv.out_channels) for name, conv in layers.items()}
    generator = Generator().manual_seed(0)
    device = next(model.parameters()).device
    count = 0
    with ExitStack() as stack:
        stack.enter_context(swapped(model, {}))
        stack.enter_context(torch.no_grad())
        for name, conv in layers.items():
            stack.enter_context(_watching(conv, found[name], points, generator))
        for batch in batches:
            bind(model, batch).map(lambda tensor: tensor.to(device)).call(model)
            count += 1
    if not count:
        raise PruningError("`batches` yielded nothing; pass batches as the model is trained on, in a list or a loader.")
    for name, outputs in found.items():
        _check(name, outputs)
    return found


def _watching(conv: nn.Conv2d, outputs: Outputs, points: int | None, generator: Generator) -> ExitStack:
    """Take in what a layer returns, until the stack is left."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        drawn = draw_points(conv, args[0], output.numel() if points is None else points, generator)
        outputs.add(outputs_at(conv, output, drawn).flatten(1))

    stack = ExitStack()
    stack.callback(conv.register_forward_hook(hook).remove)
    return stack


def _check(name: str, outputs: Outputs) -> None:
    """See that the rows tell something about a layer."""
    channels = len(outputs.mean)
    if outputs.rows <= channels:
        raise PruningError(
            f"`batches` gave {outputs.rows} points of the outputs of {name!r}, which has {channels} channels: their "
            f"covariance needs more points than channels, better ten times as many. Pass more batches or more "
            f"`points`, or put the layer in `ignore`."
        )
    if not outputs.covariance.isfinite().all():
        raise PruningError(
            f"The outputs of {name!r} over `batches` are not finite. See whether the data holds NaN or the training "
            "diverged, or put the layer in `ignore`."
        )

"""What the event benchmark measures on one model: two prune events in a fit of ours, and two of Torch-Pruning's.

    python benchmarks/events_one.py resnet18 [--repeats 5] [--ways ours drop peer]

Prints JSON: for each way the CPU seconds of the first event and of the following one, in the order of the repeats.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
import torchvision
from torch import Tensor, nn
from torch.optim import SGD

from lightning_prune import pruner
from lightning_prune.callbacks import MagnitudePruneCallback
from lightning_prune.schedules import linear
from lightning_prune.types import Constants

RATIO = 0.5
PIXELS = 224
EVENTS = ("first", "following")

Seconds = dict[str, float]
"""Figure -> CPU seconds, or a fraction."""


class Net(pl.LightningModule):
    """A network whose loss gives every parameter a gradient without a forward pass: what is timed is the event."""

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.net = net
        self.example_input_array = example

    def forward(self, images: Tensor) -> Tensor:
        """Return what the network does."""
        result: Tensor = self.net(images)
        return result

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss."""
        return loss_of(self)

    def train_dataloader(self) -> Any:
        """Return one batch."""
        return [torch.zeros(1)]

    def configure_optimizers(self) -> SGD:
        """Return SGD with momentum."""
        return optimizer_of(self)


def loss_of(net: nn.Module) -> Tensor:
    """Return a number that depends on all parameters."""
    return torch.stack([parameter.mean() for parameter in net.parameters()]).sum()


def optimizer_of(net: nn.Module) -> SGD:
    """Return SGD with momentum."""
    return SGD(net.parameters(), lr=1e-3, momentum=0.9)


class Timed(MagnitudePruneCallback):
    """Times its events, and the rehearsal before the first step."""

    def __init__(self, constants: Constants) -> None:
        super().__init__(RATIO, schedule=linear, begin=0, end=len(EVENTS), constants=constants)
        self.seconds: Seconds = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plan the whole pruning once."""
        with clocked(self.seconds, "rehearsal"):
            super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut."""
        if trainer.current_epoch not in self.events:
            return
        event = EVENTS[list(self.events).index(trainer.current_epoch)]
        with clocked(self.seconds, event), clocked_calls(pruner, "verify", self.seconds, f"{event}, verification"):
            super().on_train_epoch_start(trainer, pl_module)


@contextmanager
def clocked(seconds: Seconds, figure: str) -> Iterator[None]:
    """Add the CPU seconds of what is inside to a figure."""
    gc.collect()
    start = time.process_time()
    yield
    seconds[figure] = seconds.get(figure, 0.0) + time.process_time() - start


@contextmanager
def clocked_calls(module: object, name: str, seconds: Seconds, figure: str) -> Iterator[None]:
    """Add the CPU seconds of all calls of a function to a figure."""
    called = getattr(module, name)
    seconds[figure] = 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        found = called(*args, **kwargs)
        seconds[figure] += time.process_time() - start
        return found

    with patch.object(module, name, timed):
        yield


def ours(net: nn.Module, example: Tensor, constants: Constants = "absorb") -> Seconds:
    """Cut twice in the middle of a fit."""
    callback = Timed(constants)
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_epochs=len(EVENTS) + 1, accelerator="cpu", callbacks=[callback], **quiet)
    trainer.fit(Net(net, example))
    return callback.seconds


def drop(net: nn.Module, example: Tensor) -> Seconds:
    """Lose what removed channels emit, as Torch-Pruning does."""
    return ours(net, example, "drop")


def peer(net: nn.Module, example: Tensor) -> Seconds:
    """Cut twice with one pruner of Torch-Pruning, as its `iterative_steps` do, each time with a new optimizer."""
    seconds: Seconds = {}
    optimizer = optimizer_of(net.eval())
    cut: Callable[[], object] | None = None
    for event in EVENTS:
        loss_of(net).backward()
        optimizer.step()
        optimizer.zero_grad()
        with clocked(seconds, event):
            if cut is None:
                cut = torch_pruning(net, example).step
            cut()
            if isinstance(net, torchvision.models.VisionTransformer):
                net.hidden_dim = net.conv_proj.out_channels
            optimizer = optimizer_of(net)
    with torch.no_grad():
        net(example)
    return seconds


def torch_pruning(net: nn.Module, example: Tensor) -> Any:
    """Build Torch-Pruning's pruner as its examples/torchvision_models do: the last layer stays, heads are groups.

    Its defaults for channel groups are dicts that all its pruners share and write to, so that each gets its own here.
    """
    import torch_pruning as tp

    last = [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    heads = {module: module.num_heads for module in net.modules() if isinstance(module, nn.MultiheadAttention)}
    return tp.pruner.BasePruner(
        net,
        example,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        iterative_steps=len(EVENTS),
        ignored_layers=[last],
        in_channel_groups={},
        out_channel_groups=heads,
        num_heads={},
    )


Way = Callable[[nn.Module, Tensor], Seconds]
WAYS: dict[str, Way] = {"ours": ours, "drop": drop, "peer": peer}


def measured(
    build: Callable[[], nn.Module], example: Tensor, ways: Mapping[str, Way], repeats: int
) -> dict[str, list[Seconds]]:
    """Run all ways in turns, each time on a copy of the same network; what is left of it is a figure too."""
    found: dict[str, list[Seconds]] = {name: [] for name in ways}
    model = build()
    dense = sum(parameter.numel() for parameter in model.parameters())
    for _ in range(repeats):
        for name, way in ways.items():
            twin = copy.deepcopy(model)
            seconds = way(twin, example)
            left = sum(parameter.numel() for parameter in twin.parameters()) / dense
            found[name].append({**seconds, "parameters left": left})
    return found


def classifier(name: str) -> nn.Module:
    """Build one of torchvision's classifiers."""
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ways = {name: WAYS[name] for name in given.ways}
    example = torch.zeros(1, 3, PIXELS, PIXELS)
    if len(ways) > 1:
        measured(lambda: classifier("resnet18"), example, ways, 1)  # what is loaded and looked up only once
    print(json.dumps(measured(lambda: classifier(given.model), example, ways, given.repeats)))


if __name__ == "__main__":
    main()

"""What the benchmarks of training steps share: a short fit on noise, and clocks for it and for callbacks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import wraps
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Seconds = dict[str, float]
"""Figure -> CPU seconds."""

BEFORE = ("setup", "on_fit_start", "on_train_start", "on_train_batch_start")
"""What a callback does once: these hooks, the last of them only when it is called for the first time."""


class Classifier(pl.LightningModule):
    """A network on noise: batches of 8 images of 3 x size x size, and as many epochs as the Trainer asks for."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., Any], steps: int, size: int = 64) -> None:
        super().__init__()
        self.net, self.optimizer, self.steps, self.size = net, optimizer, steps, size
        self.example_input_array = torch.zeros(1, 3, size, size)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Run forward."""
        self(batch[0])

    def train_dataloader(self) -> Any:
        """Return batches of 8."""
        return self._batches(self.steps)

    def val_dataloader(self) -> Any:
        """Return one batch of 8."""
        return self._batches(1)

    def _batches(self, number: int) -> Any:
        images = torch.randn(number * 8, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, torch.zeros(number * 8, dtype=torch.long)), batch_size=8)

    def configure_optimizers(self) -> Any:
        """Return the optimizer asked for."""
        return self.optimizer(self.parameters())


class Clock(pl.Callback):
    """Times the steps of the first epoch, from the start of one batch to the start of the next.

    It counts the time that this process runs: on a machine that others use too, that is what can be compared.
    """

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        """Note the time."""
        if trainer.current_epoch == 0:
            self.starts.append(time.process_time())

    @property
    def step(self) -> float:
        """The median step, without the first."""
        return median(after - before for before, after in zip(self.starts[1:], self.starts[2:], strict=False))


class HookClock:
    """Times what a callback does in Lightning's hooks; what it does in hooks of torch is not seen here."""

    def __init__(self, callback: pl.Callback) -> None:
        self.calls: dict[str, list[float]] = defaultdict(list)
        for name in dir(pl.Callback):
            if name == "setup" or name.startswith("on_"):
                setattr(callback, name, self._timed(name, getattr(callback, name)))

    def _timed(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(hook)
        def timed(*given: Any, **named: Any) -> Any:
            start = time.process_time()
            found = hook(*given, **named)
            self.calls[name].append(time.process_time() - start)
            return found

        return timed

    def before(self, event: str | None) -> float:
        """Seconds before the first step, without an event that comes then."""
        return sum(sum(self.calls[name][:1]) for name in BEFORE if name != event)

    def at(self, event: str) -> float:
        """Seconds of the longest call of the hook in which an event comes."""
        return max(self.calls[event], default=0.0)

    def step(self) -> float:
        """Median seconds in all hooks of a step, but for the first."""
        inside = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward")
        names = (*inside, "on_before_optimizer_step", "on_train_batch_end")
        return sum(median(self.calls[name][1:]) for name in names if len(self.calls[name]) > 1)


def fitted(
    net: nn.Module,
    optimizer: Callable[..., Any],
    steps: int,
    callbacks: Callable[[pl.LightningModule], Sequence[pl.Callback]],
    event: str | None = None,
) -> Seconds:
    """Train for an epoch and one step more.

    Args:
        net: The network.
        optimizer: Builds its optimizer.
        steps: Batches in an epoch, 4 or more.
        callbacks: Builds the callbacks of the fit; the last is the one whose hooks are timed.
        event: The hook in which that one's event comes.

    Returns:
        `step`, a median; and where there are callbacks `hooks`, what a step spends in them, `before`, what they do
        before the first, and `event`.
    """
    module, clock = Classifier(net, optimizer, steps), Clock()
    given = callbacks(module)
    hooks = HookClock(given[-1]) if given else None
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    trainer = pl.Trainer(max_epochs=2, max_steps=steps + 1, accelerator="cpu", callbacks=[clock, *given], **quiet)
    trainer.fit(module)
    found = {"step": clock.step}
    if hooks is not None:
        found |= {"hooks": hooks.step(), "before": hooks.before(event)}
        found |= {"event": hooks.at(event)} if event else {}
    return found

"""What a model is worth on validation data: loss and accuracy, a metric of one's own, or what a Trainer logs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.batches import Batch
from lightning_prune.sensitivity.batches import Batches

Better: TypeAlias = Literal["higher", "lower"]
"""Which way a number is better."""

_IGNORED = -100
"""Targets of this value do not count, as in `torch.nn.functional.cross_entropy`."""


class Measure(ABC):
    """What a model is worth, in one number or several.

    Args:
        better: Name of each number -> which way it is better; the first one is the main one.
    """

    def __init__(self, better: dict[str, Better]) -> None:
        self.better = better

    @abstractmethod
    def of(self, model: nn.Module) -> dict[str, float]:
        """Return the numbers, under their names; the model is in eval mode, and gradients are off."""


class LossAndAccuracy(Measure):
    """Mean cross-entropy and the share of right answers, of class logits (n, classes, ...) and targets (n, ...).

    Args:
        batches: The validation batches.
    """

    def __init__(self, batches: Batches) -> None:
        super().__init__({"accuracy": "higher", "loss": "lower"})
        self._batches = batches

    def of(self, model: nn.Module) -> dict[str, float]:
        """Add up over all batches.

        Raises:
            ValueError: Outputs or targets are of another kind, or no target counts.
        """
        loss, right, count = 0.0, 0, 0
        for batch in self._batches:
            logits, targets = _classes(batch.inputs.call(model), batch.targets)
            counts = targets != _IGNORED
            loss += float(F.cross_entropy(logits.float(), targets.long(), ignore_index=_IGNORED, reduction="sum"))
            right += int(((logits.argmax(1) == targets) & counts).count_nonzero())
            count += int(counts.count_nonzero())
        if not count:
            raise ValueError(f"`datamodule` has no target but {_IGNORED}, which does not count. Pass `metric`.")
        return {"accuracy": right / count, "loss": loss / count}


def _classes(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """See that outputs are logits and targets the numbers of classes."""
    if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
        whole = not targets.is_floating_point() and not targets.is_complex() and targets.dtype is not torch.bool
        if outputs.is_floating_point() and whole and outputs.shape[:1] + outputs.shape[2:] == targets.shape:
            return outputs, targets
    raise ValueError(
        "`metric` None measures loss and accuracy of class logits (n, classes, ...) against whole numbers (n, ...); "
        f"got outputs {_in_words(outputs)} and targets {_in_words(targets)}. Let batches be pairs (inputs, targets), "
        "or pass as `metric` a torchmetrics metric or a function of (outputs, targets)."
    )


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"of type {type(value).__name__}"


class MeanOf(Measure):
    """The mean of a function of (outputs, targets) over all batches, each weighted by its examples.

    Args:
        batches: The validation batches.
        function: Returns one number for a batch.
        better: Which way it is better.
    """

    def __init__(self, batches: Batches, function: Callable[[Any, Any], Any], better: Better) -> None:
        self._name = getattr(function, "__name__", type(function).__name__)
        super().__init__({self._name: better})
        self._batches = batches
        self._function = function

    def of(self, model: nn.Module) -> dict[str, float]:
        """Add up over all batches."""
        total, count = 0.0, 0
        for batch in self._batches:
            total += _number(self._function(batch.inputs.call(model), batch.targets), self._name) * batch.size
            count += batch.size
        return {self._name: total / count}


@runtime_checkable
class Accumulating(Protocol):
    """What a torchmetrics metric can do."""

    def reset(self) -> None:
        """Forget all batches."""

    def update(self, outputs: Any, targets: Any, /) -> None:
        """See a batch."""

    def compute(self) -> Any:
        """Return the number for all batches since the last `reset`."""


Metric: TypeAlias = Accumulating | Callable[[Any, Any], Any]
"""A torchmetrics metric, or a function of (outputs, targets)."""


class Accumulated(Measure):
    """A torchmetrics metric over all batches; a copy of it is used.

    Args:
        batches: The validation batches.
        metric: The metric.
        better: Which way it is better.
    """

    def __init__(self, batches: Batches, metric: Accumulating, better: Better) -> None:
        self._name = type(metric).__name__
        super().__init__({self._name: better})
        self._batches = batches
        self._metric = deepcopy(metric)

    def of(self, model: nn.Module) -> dict[str, float]:
        """Update with all batches, and compute."""
        self._metric.reset()
        for batch in self._batches:
            self._on_device_of(batch).update(batch.inputs.call(model), batch.targets)
        return {self._name: _number(self._metric.compute(), self._name)}

    def _on_device_of(self, batch: Batch) -> Accumulating:
        if isinstance(self._metric, nn.Module) and isinstance(batch.targets, Tensor):
            self._metric.to(batch.targets.device)
        return self._metric


def _number(value: Any, name: str) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, (int, float)):
        raise TypeError(f"`metric` gives one number; got {value!r} from {name}. Take one of its parts, or a mean.")
    return float(value)


class Validates(Protocol):
    """What a `lightning.pytorch.Trainer` can do."""

    def validate(self, model: Any, dataloaders: Any = None, *, verbose: bool = True, datamodule: Any = None) -> Any:
        """Run the validation loop and return what was logged, a dict for each loader."""


class Logged(Measure):
    """A number that a LightningModule logs when a Trainer validates it.

    Args:
        trainer: The Trainer.
        data: A LightningDataModule or loaders.
        name: Under which the number is logged.
        better: Which way it is better.
    """

    def __init__(self, trainer: Validates, data: object, name: str, better: Better) -> None:
        super().__init__({name: better})
        self._trainer = trainer
        self._data = {"datamodule" if hasattr(data, "val_dataloader") else "dataloaders": data}
        self._name = name

    def of(self, model: nn.Module) -> dict[str, float]:
        """Validate once.

        Raises:
            ValueError: Nothing is logged under the name.
        """
        results = self._trainer.validate(model, verbose=False, **self._data)
        logged = {name: value for result in results for name, value in result.items()}
        if self._name not in logged:
            raise ValueError(
                f"`metric` {self._name!r} is not logged in `validation_step`. These are: "
                f"{', '.join(sorted(logged)) or 'none at all'}."
            )
        return {self._name: _number(logged[self._name], self._name)}


def measure_with(
    metric: object, better: Better | None, batches: Batches, trainer: Validates | None, data: object
) -> Measure:
    """Read what is to be measured; see `lightning_prune.sensitivity.sensitivity` for the arguments.

    Raises:
        ValueError: Arguments do not go together, or it is not known which way the metric is better.
        TypeError: `metric` is of another kind.
    """
    if (trainer is not None) is not isinstance(metric, str):
        raise ValueError(
            f"`trainer` and the name of a logged `metric` go together; got {type(trainer).__name__} and {metric!r}. "
            'Pass both, as in metric="val/acc", trainer=Trainer(logger=False), or neither.'
        )
    if metric is None:
        if better is not None:
            raise ValueError(f"`better` is about `metric`, which is not given; got {better!r}. Leave it out.")
        return LossAndAccuracy(batches)
    if isinstance(metric, type) or not (isinstance(metric, (str, Accumulating)) or callable(metric)):
        raise TypeError(
            "`metric` is a torchmetrics metric, a function of (outputs, targets) or the name of a logged number; "
            f"got {metric!r}."
        )
    way = _way(metric, better)
    if isinstance(metric, str):
        assert trainer is not None
        return Logged(trainer, data, metric, way)
    if isinstance(metric, Accumulating):
        return Accumulated(batches, metric, way)
    assert callable(metric)
    return MeanOf(batches, metric, way)


def _way(metric: object, better: Better | None) -> Better:
    """Return which way a metric is better, as said or as it says itself."""
    own = getattr(metric, "higher_is_better", None)
    if better is None and own is not None:
        return "higher" if own else "lower"
    if better is None or better not in get_args(Better):
        raise ValueError(f'`better` says which way {metric!r} is better, "higher" or "lower"; got {better!r}.')
    return better

"""How sensitive each layer is: one at a time is pruned, without retraining, and the model is measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from lightning_prune.chance import random_state_kept
from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.errors import ScoreError
from lightning_prune.graph import check_model
from lightning_prune.sensitivity.batches import Batches
from lightning_prune.sensitivity.candidates import Candidates, Groups, Layers, Prune
from lightning_prune.sensitivity.curves import Row, Scanned, Sensitivity, Value, check_scanned, grid_of
from lightning_prune.sensitivity.measures import Better, Measure, Metric, Validates, measure_with
from lightning_prune.tensors import named_tensors, swapped, unwrapped

__all__ = ["Row", "Sensitivity", "sensitivity"]

_GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def sensitivity(
    model: nn.Module,
    datamodule: object,
    ratios: Sequence[float] = _GRID,
    *,
    of: Scanned = "weights",
    metric: Metric | str | None = None,
    better: Better | None = None,
    criterion: Criterion | None = None,
    ignore: Sequence[str] = (),
    batches: int | None = None,
    trainer: Validates | None = None,
) -> Sensitivity:
    """Prune one layer at a time, at each of some ratios and without retraining, and measure the model.

    Of weights it is the scan of Han et al. 2015 ("Learning both Weights and Connections", section 4.1 and figure 6), of
    channels that of Li et al. 2017 ("Pruning Filters for Efficient ConvNets", section 3.2). Weights are masked as
    `magnitude_masks` does, channels are cut out as `prune` does. All of it happens on copies of the tensors, in eval
    mode and without gradients: afterwards weights, buffers, modes and random state are what they were, also where it
    fails or is interrupted. Each measurement begins with the same random state.

    Args:
        model: Any module.
        datamodule: Where the validation batches come from: a LightningDataModule, or anything that yields batches and
            can be gone through again, such as a DataLoader or a list. The last entry of a list or tuple is taken as the
            targets and what stands before it as the inputs; any other batch is both. Up to 256 MiB they are read once
            and kept, beyond that they are read again each time.
        ratios: Fractions to prune, rising, between 0 and 1.
        of: What is pruned: the "weights" of each linear, convolution, recurrent and attention layer, or the "channels"
            of each group that is not frozen.
        metric: What is measured: None takes accuracy and cross-entropy of class logits; a torchmetrics metric; a
            function of (outputs, targets) whose mean over all examples counts; or, with a `trainer`, the name of a
            number that the LightningModule logs in `validation_step`.
        better: Whether "higher" or "lower" is better; None asks the metric, which those of torchmetrics know.
        criterion: How channels are scored; `Magnitude()` if None. Not for weights.
        ignore: Patterns of module names that are not to be touched.
        batches: Read so many batches only; None reads all. With a `trainer`, its `limit_val_batches` says that.
        trainer: Runs the validation loop for a logged number; best one of its own, without logger and progress bar.

    Returns:
        What was measured: print it, draw it (`picture`), save it, let it choose ratios for `PerLayer` (`thresholds`).

    Raises:
        ValueError: An argument is wrong or does not go with another, or there are no validation batches.
        TypeError: An argument is of another kind.
        PruningError: There is nothing to prune, or the model cannot be read.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = [(torch.randn(16, 4), torch.randint(3, (16,)))]
        >>> scan = sensitivity(net, data, (0.5, 0.9))
        >>> [row.layer for row in scan.rows], list(scan.dense)
        (['0', '2'], ['accuracy', 'loss'])
    """
    check_model(model)
    model = unwrapped(model)
    check_scanned(of)
    grid = grid_of(ratios)
    if of == "weights" and criterion is not None:
        raise ValueError(f'`criterion` is about channels; got {type(criterion).__name__} with of="weights".')
    if trainer is not None and batches is not None:
        raise ValueError(f"`batches` has no effect on a trainer; got {batches}. Set its `limit_val_batches`.")
    with random_state_kept(), torch.no_grad(), swapped(model, named_tensors(model)):
        data = Batches(datamodule, model, batches)
        measure = measure_with(metric, better, data, trainer, datamodule)
        if of == "weights":
            return _scan(model, Layers(model, ignore), measure, of, grid)
        example = next(iter(data)).inputs
        return _scan(model, Groups(model, example, criterion or Magnitude(), ignore), measure, of, grid)


def _scan(
    model: nn.Module, candidates: Candidates, measure: Measure, of: Scanned, ratios: tuple[float, ...]
) -> Sensitivity:
    dense = _measured(model, None, measure)
    if not all(map(isfinite, dense.values())):
        raise ScoreError(
            f"The model as it is gives {dense}, with which nothing compares. Look at its weights and data."
        )
    unknown: dict[str, Value] = dict.fromkeys(dense)
    cells: dict[str, list[dict[str, Value]]] = {name: [] for name in candidates.sizes}
    for name, prune in _shown(candidates, ratios):
        cells[name].append(unknown if prune is None else _finite(_measured(model, prune, measure)))
    rows = tuple(
        Row(name, candidates.sizes[name], {metric: tuple(cell[metric] for cell in line) for metric in dense})
        for name, line in cells.items()
        if any(cell is not unknown for cell in line)
    )
    return Sensitivity(of, ratios, dense, measure.better, rows, candidates.held_back)


def _shown(candidates: Candidates, ratios: Sequence[float]) -> Iterable[tuple[str, Prune | None]]:
    """Yield what is to be measured, with a progress bar on stderr."""
    steps = (step for ratio in ratios for step in candidates.pruned(ratio))
    total = len(ratios) * len(candidates.sizes)
    screen = Console(stderr=True)
    return track(steps, "Scanning", total=total, console=screen, transient=True, disable=not screen.is_terminal)


def _measured(model: nn.Module, prune: Prune | None, measure: Measure) -> dict[str, float]:
    """Measure a model that has been pruned, and give it back as it was."""
    with random_state_kept(), swapped(model, {name: _twin(tensor) for name, tensor in named_tensors(model).items()}):
        if prune is not None:
            prune(model)
        return measure.of(model)


def _finite(values: Mapping[str, float]) -> dict[str, Value]:
    return {name: value if isfinite(value) else None for name, value in values.items()}


def _twin(tensor: Tensor) -> Tensor:
    twin = tensor.detach().clone()
    return nn.Parameter(twin, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin

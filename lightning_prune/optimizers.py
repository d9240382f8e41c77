"""The optimizer follows a cut: the same object, the same parameters, their state cut along."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_prune.cut import Cut, cut_tensor
from lightning_prune.errors import PruningError


def rebuild(optimizer: Optimizer, model: nn.Module, cut: Cut) -> None:
    """Cut the optimizer's state as its parameters were cut.

    Parameters keep their identity in a cut, so that param groups, schedulers and wrappers hold what they held.
    State of the parameter's shape (momentum, Adam's moments) loses the same channels; numbers and step counters
    stay. Where a parameter has state of any other shape, there is no rule: all of its state is dropped, with a warning.

    Args:
        optimizer: Changed in place.
        model: The model after the cut.
        cut: What was cut.
    """
    cut_parameters: dict[Tensor, str] = {
        parameter: name for name, parameter in model.named_parameters() if name in cut.kept
    }
    for parameter, state in optimizer.state.items():
        name = cut_parameters.get(parameter)
        if name is None:
            continue
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
        strange = {key: tuple(value.shape) for key, value in tensors.items() if not _follows(value, cut.shapes[name])}
        if strange:
            state.clear()
            warnings.warn(
                f"{type(optimizer).__name__} keeps {strange} for {name}, which does not follow its shape "
                f"{cut.shapes[name]}: the state of {name} was dropped and builds up anew.",
                stacklevel=2,
            )
        else:
            state.update({key: cut_tensor(value, _present(value, cut.kept[name])) for key, value in tensors.items()})


def _follows(value: Tensor, shape: tuple[int, ...]) -> bool:
    """Tell whether a state tensor has a parameter's shape, or broadcasts with it dimension by dimension."""
    return value.dim() == len(shape) and all(have in (1, want) for have, want in zip(value.shape, shape, strict=True))


def _present(value: Tensor, kept: Mapping[int, Tensor]) -> dict[int, Tensor]:
    return {dim: positions for dim, positions in kept.items() if value.shape[dim] > 1}


def check(optimizers: Iterable[Optimizer], model: nn.Module) -> None:
    """Make sure that optimizers hold parameters of the model only, with state of their shapes.

    Raises:
        PruningError: A parameter is foreign, a state tensor has another shape than its parameter, or the optimizer
            keeps one flat history of all parameters (LBFGS).
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise PruningError("LBFGS keeps one flat history of all parameters, which no cut can follow; use another.")
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter not in names:
                raise PruningError(
                    f"{type(optimizer).__name__} holds a parameter of shape {tuple(parameter.shape)} that is not in "
                    "the model; build the optimizer from the parameters of the model that is pruned."
                )
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.dim() and not _follows(value, tuple(parameter.shape)):
                    raise PruningError(
                        f"After the cut {type(optimizer).__name__} has {key!r} of shape {tuple(value.shape)} for "
                        f"{names[parameter]} of shape {tuple(parameter.shape)}; report this, with the optimizer's name."
                    )

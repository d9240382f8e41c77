"""How a network is retrained after its weights have been pruned: learning rates, rewinding, parts in turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.tensors import named_modules, named_parameters

Dropouts: TypeAlias = Literal["follow", "keep"]
"""Whether dropout falls with the connections of the layer that it acts on."""

Dead: TypeAlias = Literal["remove", "keep"]
"""Whether channels without weights are cut out of the network."""


@dataclass(frozen=True)
class Retraining:
    """How a network is retrained after weights have been pruned; survivors go on from their trained values.

    Han et al. 2015, "Learning both Weights and Connections", sections 3.2 to 3.5.

    Attributes:
        lr_factor: What all learning rates are multiplied by at the first prune event, > 0; the paper has 0.1 for LeNets
            and 0.01 for AlexNet.
        dropout: "follow" lowers the dropout of a pruned layer by sqrt(connections left), "keep" does not.
        dead: "remove" cuts out channels that have no weights left to or from them, after each event; their constant
            goes into the next bias. "keep" leaves them as zeros.
        alternate: Parts of the network, as patterns of module names, that are retrained in turn while the others stand
            still: one part between two prune events, all after the last. The paper has convolutions and linear layers.
        rewind_to: The optimizer step (0: the start) to whose weights the survivors go back at each event, as in the
            lottery ticket experiments (Frankle & Carbin 2019; Frankle et al. 2020); None does not.

    Raises:
        ValueError: A number is out of range, or a word is unknown.
    """

    lr_factor: float = 1.0
    dropout: Dropouts = "follow"
    dead: Dead = "remove"
    alternate: Sequence[Sequence[str]] = ()
    rewind_to: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.lr_factor < float("inf"):
            raise ValueError(
                f"`lr_factor` is what learning rates are multiplied by, above 0; got {self.lr_factor}. 1 leaves them."
            )
        for name, known in (("dropout", ("follow", "keep")), ("dead", ("remove", "keep"))):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` is one of {', '.join(map(repr, known))}; got {getattr(self, name)!r}.")
        if self.rewind_to is not None and self.rewind_to < 0:
            raise ValueError(
                f"`rewind_to` is an optimizer step, 0 or more; got {self.rewind_to}. None does not rewind."
            )
        if isinstance(self.alternate, str) or any(isinstance(part, str) for part in self.alternate):
            raise ValueError(
                f"`alternate` is a list of parts, each a list of patterns, such as [['conv*'], ['fc*']]; got "
                f"{self.alternate!r}."
            )
        if len(self.alternate) == 1:
            raise ValueError(f"`alternate` needs two parts to take turns; got {self.alternate!r}.")


def scale_learning_rates(trainer: pl.Trainer, optimizers: Iterable[Optimizer], factor: float) -> None:
    """Multiply the learning rates of optimizers, and what their schedulers compute them from."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key in _RATES & group.keys():
                group[key] = group[key] * factor
    for config in trainer.lr_scheduler_configs:
        _scale_scheduler(config.scheduler, factor)


_RATES = {"lr", "initial_lr", "max_lr", "min_lr", "swa_lr"}
"""What schedulers keep of learning rates in param groups."""


def _scale_scheduler(scheduler: Any, factor: float) -> None:
    for key in ("base_lrs", "_last_lr", "min_lrs", "max_lrs"):
        if isinstance(getattr(scheduler, key, None), list):
            setattr(scheduler, key, [rate * factor for rate in getattr(scheduler, key)])
    if isinstance(getattr(scheduler, "eta_min", None), float | int):
        scheduler.eta_min *= factor
    for inner in getattr(scheduler, "_schedulers", ()):
        _scale_scheduler(inner, factor)


def parts_of(model: nn.Module, alternate: Sequence[Sequence[str]]) -> list[list[nn.Parameter]]:
    """Return the parameters of each part.

    Raises:
        ValueError: A pattern matches no module with parameters.
    """
    modules = named_modules(model)
    parts = []
    for patterns in alternate:
        found: dict[int, nn.Parameter] = {}
        for pattern in patterns:
            matching = [module for name, module in modules.items() if name and fnmatchcase(name, pattern)]
            own = {id(parameter): parameter for module in matching for parameter in module.parameters()}
            if not own:
                raise ValueError(
                    f"`alternate` pattern {pattern!r} matches no module with parameters. Modules are named as "
                    f"`model.named_modules()` prints them, for example {', '.join(list(modules)[1:4])}."
                )
            found |= own
        parts.append(list(found.values()))
    return parts


def stand_still(parts: Sequence[Sequence[nn.Parameter]], turn: int) -> None:
    """Drop the gradients of all parts but one, so that their parameters, and what is remembered of them, stay."""
    moving = {id(parameter) for parameter in parts[turn % len(parts)]}
    for parameter in (parameter for part in parts for parameter in part):
        if id(parameter) not in moving:
            parameter.grad = None


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy the parameters of a model to the CPU."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in named_parameters(model).items()}


def rewind(model: nn.Module, earlier: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> None:
    """Set parameters to what they were, and let optimizers forget what they have seen since."""
    with torch.no_grad():
        for name, parameter in named_parameters(model).items():
            if name in earlier:
                parameter.copy_(earlier[name])
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state.clear()

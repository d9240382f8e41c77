"""What channels respond: the outputs of norms, or of other layers, while a network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.chance import random_state_kept
from lightning_prune.errors import PruningError
from lightning_prune.inputs import ExampleInputs, bind
from lightning_prune.layers.norms import channel_dim, named_norms
from lightning_prune.modes import in_eval_mode

Activation: TypeAlias = Callable[[Tensor], Tensor]
"""What comes behind a norm, such as `torch.relu`."""

See: TypeAlias = Callable[[str, Tensor], Tensor | None]
"""Takes a layer's name and its output, (n, c, ...); returns what each channel is multiplied by, (c,), or None."""


def layers_of(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Name the layers whose channels are looked at.

    Args:
        model: Any module.
        patterns: Patterns of layers' names (`fnmatch` style); None takes all norms, each with the equilibrium block
            behind it.

    Raises:
        PruningError: There are no norms, and no patterns.
        ValueError: A pattern matches no layer.
    """
    if patterns is None:
        found = named_norms(model)
        if not found:
            raise PruningError(
                f"{type(model).__name__} has no norms behind which channels could be looked at. Name layers: "
                "layers=['conv*']."
            )
        return found
    modules = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ValueError(f"The pattern {pattern!r} in `layers` matches no layer of {type(model).__name__}.")
    return {name: each for name, each in modules.items() if any(fnmatchcase(name, one) for one in patterns)}


@contextmanager
def seen(layers: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Show what layers return, each time that they are run."""

    def shown(name: str, dim: int) -> Callable[..., Tensor | None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            factor = see(name, output.movedim(dim, 1))
            if factor is None:
                return None
            behind = 0 if dim == -1 else output.dim() - 2
            return output * factor.to(output.dtype).view(-1, *(1,) * behind)

        return hook

    handles = [layer.register_forward_hook(shown(name, _dim(layer))) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, inputs: ExampleInputs) -> Any:
    """Run a network in eval mode, without gradients; nothing about it, or the random state, is changed by that."""
    with in_eval_mode(model), torch.no_grad(), random_state_kept():
        return bind(model, inputs).call(model)


def _dim(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else channel_dim(layer)

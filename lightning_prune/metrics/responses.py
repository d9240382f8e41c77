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

Activation: TypeAlias = Callable[[Tensor], Any]
"""What comes behind a norm, such as `torch.relu`: a tensor in, a tensor out. Told as `Any`, since jsonargparse reads
the path of a function of torch, which has no signature, only where no type of result is asked for."""

See: TypeAlias = Callable[[str, Tensor], Tensor | None]
"""Takes a layer's name and its output, (n, c, ...); returns what each channel is multiplied by, (c,), or None."""

_ALONG_LAST = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)


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
    """Show what layers return, each time that they are run; of attention layers the first of what they return.

    Args:
        layers: Name -> layer.
        see: What is shown to it has the channels in dimension 1. Where they lie is told by the layer's kind, as by
            `channel_dim_of`.

    Raises:
        PruningError: (when a layer is run) It returns something else than a tensor (n, c, ...) or (n, ..., c).
    """

    def shown(name: str, dim: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            attended = isinstance(layer, nn.MultiheadAttention)
            tensor = _checked(output[0] if attended else output, name, layer)
            factor = see(name, tensor.movedim(dim, 1))
            if factor is None:
                return None
            behind = 0 if dim == -1 else tensor.dim() - 2
            changed = tensor * factor.to(tensor.dtype).view(-1, *(1,) * behind)
            return (changed, *output[1:]) if attended else changed

        return hook

    handles = [layer.register_forward_hook(shown(name, channel_dim_of(layer))) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, inputs: ExampleInputs) -> Any:
    """Run a network in eval mode, without gradients; nothing about it, or the random state, is changed by that."""
    with in_eval_mode(model), torch.no_grad(), random_state_kept():
        return bind(model, inputs).call(model)


def channel_dim_of(layer: nn.Module) -> int:
    """Return where channels lie in what a layer returns.

    -1 behind Linear, Embedding, LayerNorm and RMSNorm, attention and the transformer layers of torch, and classes made
    from them; and behind norms of one's own that are called so (`LlamaRMSNorm`, timm's `RmsNorm` and `SimpleNorm`).
    1 behind convolutions, the other norms, norms with 2d in their name, and all else: of an activation or a block that
    works on tokens name the linear layer in place of it.
    """
    name = type(layer).__name__.lower()
    if "norm2d" in name:
        return 1
    if isinstance(layer, _ALONG_LAST) or "rmsnorm" in name or "simplenorm" in name:
        return -1
    return channel_dim(layer)


def _checked(output: Any, name: str, layer: nn.Module) -> Tensor:
    kind = type(layer).__name__
    if not isinstance(output, Tensor):
        raise PruningError(
            f"The layer {name!r} ({kind}) returns a {type(output).__name__}; name a layer that returns one tensor, in "
            "`layers`."
        )
    if output.dim() < 2:
        raise PruningError(
            f"The layer {name!r} ({kind}) returns a tensor of shape {tuple(output.shape)}, which has no channels; name "
            "one that returns (n, c, ...) or (n, ..., c), in `layers`."
        )
    return output

"""Which weights of a model masks are put on, and what is remembered of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

from lightning_prune.allocation import DenseLayer
from lightning_prune.errors import PruningError
from lightning_prune.graph import ignored_tensors
from lightning_prune.masks.allocations import deviation
from lightning_prune.tensors import named_modules, unwrapped


def maskable(model: nn.Module, ignore: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Return the weights that masks are put on: those of linear, convolution, recurrent and attention layers.

    Biases, norms and embeddings are never among them, nor is a weight that is tied to one of an embedding. A weight
    that several layers share stands here once, under its first name.

    Args:
        model: The model.
        ignore: Patterns of module names that are not to be touched (`fnmatch` style).

    Raises:
        PruningError: There is no such weight, or one that a mask would not hold on.
        ValueError: A pattern of `ignore` matches no module.
    """
    model = unwrapped(model)
    ignored = ignored_tensors(model, ignore)
    found: dict[int, tuple[str, nn.Parameter]] = {}
    spared: set[int] = set()
    for layer, module in named_modules(model).items():
        prefix = f"{layer}." if layer else ""
        keys = list(_keys_of(module))
        spared |= {
            id(tensor) for key, tensor in module._parameters.items() if key not in keys or f"{prefix}{key}" in ignored
        }
        for key in keys:
            sources = (f"{prefix}parametrizations.{key}.", f"{prefix}{key}_")
            if f"{prefix}{key}" not in ignored and not any(name.startswith(sources) for name in ignored):
                weight = _own(module, layer, key)
                if weight is not None and weight.numel():
                    found.setdefault(id(weight), (f"{prefix}{key}", weight))
    weights = {name: weight for name, weight in found.values() if id(weight) not in spared}
    if not weights:
        raise PruningError(
            f"{type(model).__name__} has no weight that a mask can be put on: no linear, convolution, recurrent or "
            "attention layer that is not ignored. Loosen `ignore`."
        )
    return weights


def input_first(model: nn.Module) -> set[str]:
    """Return the names of the weights whose first dimension is the input: those of transposed convolutions."""
    modules = named_modules(unwrapped(model))
    return {
        f"{layer}.weight" if layer else "weight"
        for layer, module in modules.items()
        if isinstance(module, _ConvTransposeNd)
    }


def _keys_of(module: nn.Module) -> Iterator[str]:
    """Yield the names that a layer of torch has for its weights."""
    if isinstance(module, (nn.Linear, nn.Bilinear, _ConvNd)):
        yield "weight"
    elif isinstance(module, nn.RNNBase):
        yield from (name for name in module._flat_weights_names if name.startswith("weight"))
    elif isinstance(module, nn.RNNCellBase):
        yield from ("weight_ih", "weight_hh")
    elif isinstance(module, nn.MultiheadAttention):
        yield from ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def _own(module: nn.Module, layer: str, key: str) -> nn.Parameter | None:
    """Return a layer's weight, or None where it does without."""
    weight = module._parameters.get(key)
    if key not in module._parameters:
        problem = "is computed from other tensors (weight_norm, parametrizations, or torch.nn.utils.prune)"
    elif _is_lazy(weight):
        problem = "has no shape yet: run a lazy model once before it is masked"
    elif weight is not None and not (weight.is_floating_point() or weight.is_complex()):
        problem = f"is of type {weight.dtype}"
    else:
        return weight
    raise PruningError(
        f"A mask on {key!r} of the layer {layer!r} would not hold: it {problem}. Make it an ordinary parameter, or put "
        "the layer in `ignore`."
    )


def _is_lazy(tensor: Tensor | None) -> bool:
    return isinstance(tensor, UninitializedParameter)


def dense_layers(model: nn.Module, ignore: Sequence[str] = ()) -> dict[str, DenseLayer]:
    """Note shape and deviation of all weights that masks are put on, before any of them is pruned.

    Ratios are counted against these shapes and `StdThreshold` against these deviations, whatever happens later.
    """
    return {
        name: DenseLayer(tuple(weight.shape), deviation(weight)) for name, weight in maskable(model, ignore).items()
    }

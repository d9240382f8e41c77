"""What a layer reads and returns at sampled points, as rows: there its work is one product with a matrix.

A layer with g convolution groups does g such products. For all layers here, with rows X of shape (rows, g, p), Y of
shape (rows, g, o) and the matrix W of shape (g, o, p): Y[:, q] = X[:, q] W[q]' + bias.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.errors import PruningError

Layer = nn.Linear | _ConvNd

_KINDS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
"""The classes whose forward is the product itself."""


def is_product(module: nn.Module | None) -> bool:
    """Tell whether a module is a linear or convolutional layer with a weight of its own, not one that is computed."""
    return isinstance(module, (nn.Linear, _ConvNd)) and isinstance(module._parameters.get("weight"), nn.Parameter)


def groups_of(layer: Layer) -> int:
    """Return the convolution groups; 1 for linear layers."""
    return layer.groups if isinstance(layer, _ConvNd) else 1


def taps_of(layer: Layer) -> int:
    """Return the taps of a kernel: columns that one channel of the input has in a row."""
    return prod(layer.kernel_size) if isinstance(layer, _ConvNd) else 1


def matrix_of(layer: Layer) -> Tensor:
    """Return the weight as (g, o, p), the p columns ordered by channel, and inside of a channel by tap."""
    weight, groups = layer.weight.detach(), groups_of(layer)
    if isinstance(layer, _ConvTransposeNd):
        parts = weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return parts.transpose(1, 2).flatten(2)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def weight_from(layer: Layer, matrix: Tensor) -> Tensor:
    """Return what `matrix_of` has made of a weight, in the weight's shape and dtype."""
    weight, groups = layer.weight, groups_of(layer)
    if isinstance(layer, _ConvTransposeNd):
        parts = matrix.view(groups, weight.shape[1], weight.shape[0] // groups, -1)
        matrix = parts.transpose(1, 2)
    return matrix.reshape(weight.shape).to(weight)


def read_by_product(layer: Layer, inputs: Tensor) -> Tensor:
    """Return what the product inside a layer reads: the layer's input, unless its class prepares that first.

    Classes with a forward of their own may pad before they convolve, for instance the "same" convolutions of networks
    that come from TensorFlow. They are run once more, and what their convolution reads is tried out.

    Args:
        layer: The layer.
        inputs: What it is called with.

    Raises:
        PruningError: The layer is not the product of what it reads and its weight: it changes the weight, or the
            result.
    """
    if getattr(layer.forward, "__func__", None) in {kind.forward for kind in _KINDS}:
        return inputs
    with torch.no_grad(), _Convolved() as convolved:
        output: Tensor = layer.forward(inputs)
    candidates: list[Tensor] = [*convolved.inputs, inputs]
    for read in candidates:
        if _gives(layer, read, output):
            return read
    raise PruningError(
        f"A {type(layer).__name__} does more than a {_kind_of(layer).__name__}: what it returns is not the product of "
        "what it reads and its weight, so that its weight cannot be fitted. Put layers of this class in `ignore`."
    )


class _Convolved(TorchDispatchMode):
    """Notes what convolutions read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs: list[Tensor] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket is torch.ops.aten.convolution:
            self.inputs.append(args[0])
        return func(*args, **(kwargs or {}))


def _kind_of(layer: Layer) -> type[nn.Module]:
    return next(kind for kind in _KINDS if isinstance(layer, kind))


def _gives(layer: Layer, inputs: Tensor, output: Tensor) -> bool:
    """Tell whether a layer without a forward of its own would return the same, but for rounding."""
    try:
        with torch.no_grad():
            plain = _kind_of(layer).forward(layer, inputs)
    except RuntimeError:  # it does not fit in
        return False
    if plain.shape != output.shape:
        return False
    away, size = (plain.float() - output.float()).norm(), output.float().norm()
    return not bool(away > size * torch.finfo(output.dtype).eps ** 0.5)  # NaN is refused where it is looked for


def draw_points(layer: Layer, inputs: Tensor, most: int, generator: Generator) -> Tensor:
    """Draw positions of the output for each example, none of them twice.

    Args:
        layer: The layer.
        inputs: What it reads.
        most: So many positions of an example at most; of fewer all are taken.
        generator: A CPU generator.

    Returns:
        Of shape (examples, points): positions of the output's map, counted as if it were flattened.
    """
    there, examples = prod(_output_map(layer, inputs)), len(_batched(layer, inputs))
    if most >= there:
        return torch.arange(there).expand(examples, there)
    return torch.rand(examples, there, generator=generator).topk(most).indices


def inputs_at(layer: Layer, inputs: Tensor, points: Tensor) -> Tensor:
    """Return the rows that a layer reads at points of its output: (examples * points, g, p)."""
    inputs = _batched(layer, inputs)
    if isinstance(layer, nn.Linear):
        return _picked(inputs.flatten(1, -2).mT, points).unsqueeze(1)
    places = torch.stack(torch.unravel_index(points.to(inputs.device), _output_map(layer, inputs)))  # (map, e, k)
    read, known = _transposed_places(layer, inputs, places) if _is_transposed(layer) else (places, None)
    if known is None:
        inputs, read = _padded(layer, inputs), _read_places(layer, places)
    flat = torch.zeros_like(read[0])
    for along, size in zip(read, inputs.shape[2:], strict=True):
        flat = flat * size + along  # (e, k, taps)
    rows: Tensor = inputs.flatten(2).gather(2, flat.flatten(1).unsqueeze(1).expand(-1, inputs.shape[1], -1))
    rows = rows.unflatten(2, flat.shape[1:])  # (e, channels, k, taps)
    if known is not None:
        rows = rows * known.unsqueeze(1)
    return rows.transpose(1, 2).reshape(points.numel(), groups_of(layer), -1)


def outputs_at(layer: Layer, output: Tensor, points: Tensor) -> Tensor:
    """Return the rows of what a layer returned, or of what has that shape, at points: (examples * points, g, o)."""
    output = _batched(layer, output)
    flat = output.flatten(1, -2).mT if isinstance(layer, nn.Linear) else output.flatten(2)
    rows: Tensor = _picked(flat, points).unflatten(1, (groups_of(layer), -1))
    return rows


def _picked(flat: Tensor, points: Tensor) -> Tensor:
    """Pick points of (examples, channels, positions): (examples * points, channels)."""
    places = points.to(flat.device).unsqueeze(1).expand(-1, flat.shape[1], -1)
    return flat.gather(2, places).transpose(1, 2).flatten(0, 1)


def _batched(layer: Layer, values: Tensor) -> Tensor:
    """Let dimension 0 be the examples, of which each has a map of at least one position."""
    if isinstance(layer, nn.Linear):
        values = values if values.dim() > 1 else values.unsqueeze(0)
        return values if values.dim() > 2 else values.unsqueeze(1)
    return values if values.dim() == len(layer.kernel_size) + 2 else values.unsqueeze(0)


def _is_transposed(layer: Layer) -> bool:
    return isinstance(layer, _ConvTransposeNd)


def _output_map(layer: Layer, inputs: Tensor) -> tuple[int, ...]:
    """Return the sizes of the output's map."""
    inputs = _batched(layer, inputs)
    if isinstance(layer, nn.Linear):
        return tuple(inputs.shape[1:-1])
    reach = [dilation * (taps - 1) for dilation, taps in zip(layer.dilation, layer.kernel_size, strict=True)]
    if isinstance(layer, _ConvTransposeNd):
        assert not isinstance(layer.padding, str)
        settings = zip(inputs.shape[2:], layer.stride, layer.padding, reach, layer.output_padding, strict=True)
        return tuple((size - 1) * stride - 2 * pad + far + more + 1 for size, stride, pad, far, more in settings)
    sizes = [size + pad for size, pad in zip(inputs.shape[2:], _total_padding(layer), strict=True)]
    return tuple((size - far - 1) // stride + 1 for size, far, stride in zip(sizes, reach, layer.stride, strict=True))


def _total_padding(layer: _ConvNd) -> list[int]:
    sides = layer._reversed_padding_repeated_twice
    return [low + high for low, high in zip(sides[::2], sides[1::2], strict=True)][::-1]


def _padded(layer: _ConvNd, inputs: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(inputs, layer._reversed_padding_repeated_twice, mode) if any(_total_padding(layer)) else inputs


def _taps(layer: _ConvNd, device: torch.device) -> Tensor:
    """Return the place of each tap in the kernel, dilated: (map, taps)."""
    axes = [
        torch.arange(taps, device=device) * far for taps, far in zip(layer.kernel_size, layer.dilation, strict=True)
    ]
    return torch.cartesian_prod(*axes).view(-1, len(axes)).T


def _read_places(layer: _ConvNd, places: Tensor) -> Tensor:
    """Return where in the padded map each tap reads for positions of the output: (map, e, k, taps)."""
    stride = torch.tensor(layer.stride, device=places.device).view(-1, 1, 1)
    return (places * stride).unsqueeze(-1) + _taps(layer, places.device)[:, None, None]


def _transposed_places(layer: _ConvNd, inputs: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return which position of the map a transposed kernel's tap brings to positions of the output, and if any."""
    stride, padding, size = (
        torch.tensor(values, device=places.device).view(-1, 1, 1, 1)
        for values in (layer.stride, layer.padding, inputs.shape[2:])
    )
    reach = places.unsqueeze(-1) + padding - _taps(layer, places.device)[:, None, None]
    known = ((reach % stride == 0) & (reach >= 0) & (reach < stride * size)).all(0)
    return (reach // stride).clamp(min=0).minimum(size - 1), known

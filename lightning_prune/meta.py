"""What common operations return on meta tensors, by rules that take microseconds where torch takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload

Kernel: TypeAlias = Callable[..., Any]
"""Returns what the operation returns, or None for anything out of the ordinary: then torch is asked."""

aten = torch.ops.aten

_kernels: dict[OpOverload, Kernel] = {}


def kernel_for(op: OpOverload) -> Kernel | None:
    """Return the quick rule for an operation, if there is one."""
    return _kernels.get(op)


def _quick(*ops: OpOverload) -> Callable[[Kernel], Kernel]:
    def register(kernel: Kernel) -> Kernel:
        _kernels.update(dict.fromkeys(ops, kernel))
        return kernel

    return register


def _overloads(names: str, overload: str = "default") -> list[OpOverload]:
    """Look up operations by name; those that this version of torch does not have are left out."""
    packets = [getattr(aten, name) for name in names.split() if hasattr(aten, name)]
    return [getattr(packet, overload) for packet in packets if overload in packet.overloads()]


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


_OWN = (Tensor, torch.nn.Parameter)
"""The classes of torch's own tensors; others may answer in their own way."""


def _plain(*tensors: Tensor | None) -> bool:
    """Tell whether all tensors that are there are contiguous floats of one type."""
    there = [tensor for tensor in tensors if tensor is not None]
    kind = there[0].dtype
    return kind.is_floating_point and all(
        type(tensor) in _OWN and tensor.dtype is kind and tensor.is_contiguous() for tensor in there
    )


def _in_the_order_of(source: Tensor) -> Tensor | None:
    """Return a dense tensor whose dimensions lie in memory in the order of another one's, if that is clear.

    Where a dimension of size 1 lies makes no difference.
    """
    strides, long = source.stride(), _strides(source)
    if 0 in (*source.shape, *long) or len(set(long)) < len(long):
        return None
    dense, step = [0] * source.dim(), 1
    for dim in sorted(range(source.dim()), key=strides.__getitem__):
        dense[dim], step = step, step * source.shape[dim]
    return torch.empty_strided(source.shape, dense, dtype=source.dtype, device="meta")


def _strides(tensor: Tensor) -> list[int]:
    """List the strides of the dimensions that have several positions."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@_quick(aten.convolution.default)
def _convolution(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    spatial = weight.dim() - 2
    settings = (stride, padding, dilation, output_padding)
    if (
        not _plain(source, weight, bias)
        or source.dim() != weight.dim()
        or {len(part) for part in settings} != {spatial}
    ):
        return None
    outer, inner, *kernel = weight.shape
    entering, leaving = (outer, inner * groups) if transposed else (inner * groups, outer)
    if source.shape[1] != entering or outer % groups or (bias is not None and bias.shape != (leaving,)):
        return None
    extents = []
    for size, width, step, pad, spread, extra in zip(source.shape[2:], kernel, *settings, strict=True):
        reach = spread * (width - 1)
        extents.append(
            (size - 1) * step - 2 * pad + reach + extra + 1 if transposed else (size + 2 * pad - reach - 1) // step + 1
        )
    return _empty(source, (source.shape[0], leaving, *extents)) if min(extents) > 0 else None


@_quick(aten.native_batch_norm.default)
def _batch_norm(
    source: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    held = [tensor for tensor in (weight, bias, mean, variance) if tensor is not None]
    if not _plain(source, *held) or any(tensor.shape != source.shape[1:2] for tensor in held):
        return None
    channels = source.shape[1:2]
    return _empty(source, source.shape), _empty(source, channels), _empty(source, channels)


@_quick(aten.native_layer_norm.default)
def _layer_norm(
    source: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    outer = source.dim() - len(shape)
    held = [tensor for tensor in (weight, bias) if tensor is not None]
    if any(tuple(part) != tuple(shape) for part in (source.shape[outer:], *(tensor.shape for tensor in held))):
        return None
    if not _plain(source, *held) and not (_straightens() and _plain(_empty(source, source.shape), *held)):
        return None
    statistics = (*source.shape[:outer], *[1] * len(shape))
    return _empty(source, source.shape), _empty(source, statistics), _empty(source, statistics)


@cache
def _straightens() -> bool:
    """Tell whether a layer norm returns a contiguous tensor for any other; on old versions of torch it does not."""
    turned = torch.empty(2, 3, 4, device="meta").mT
    return bool(aten.native_layer_norm.default(turned, [3], None, None, 1e-5)[0].is_contiguous())


@_quick(aten.native_group_norm.default)
def _group_norm(
    source: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    channels: int,
    extent: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    held = [tensor for tensor in (weight, bias) if tensor is not None]
    if not _plain(source, *held) or channels % groups or any(tensor.shape != (channels,) for tensor in held):
        return None
    return _empty(source, source.shape), _empty(source, (n, groups)), _empty(source, (n, groups))


@_quick(aten.mm.default)
def _mm(left: Tensor, right: Tensor) -> Any:
    if left.dtype is not right.dtype or left.shape[1] != right.shape[0]:
        return None
    return _empty(left, (left.shape[0], right.shape[1]))


@_quick(aten.bmm.default)
def _bmm(left: Tensor, right: Tensor) -> Any:
    if left.dtype is not right.dtype or left.shape[0] != right.shape[0] or left.shape[2] != right.shape[1]:
        return None
    return _empty(left, (*left.shape[:2], right.shape[2]))


@_quick(aten.addmm.default)
def _addmm(addend: Tensor, left: Tensor, right: Tensor, **scales: object) -> Any:
    if addend.dtype is not left.dtype or addend.shape != right.shape[1:]:
        return None
    return _mm(left, right)


@_quick(*_overloads("_softmax _log_softmax"))
def _softmax(source: Tensor, dim: int, half_to_float: bool) -> Any:
    return None if half_to_float or not source.is_contiguous() else _same(source)


@_quick(*_overloads("_safe_softmax"))
def _safe_softmax(source: Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    return _same(source) if dtype in (None, source.dtype) and source.is_contiguous() else None


_ACTIVATIONS = (
    "relu gelu silu mish sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu elu softplus log_sigmoid exp sqrt rsqrt"
)


@_quick(*_overloads(_ACTIVATIONS))
def _same(source: Tensor, *settings: object, **named: object) -> Any:
    if not source.dtype.is_floating_point:
        return None
    if source.is_contiguous():
        return _empty(source, source.shape)
    return _in_the_order_of(source)


@_quick(*_overloads(" ".join(f"{name}_" for name in _ACTIVATIONS.split())))
def _in_place(source: Tensor, *settings: object) -> Any:
    return source if source.dtype.is_floating_point else None


@_quick(*_overloads("mul add sub div", "Scalar"))
def _with_number(source: Tensor, number: object, *settings: object) -> Any:
    return _same(source) if isinstance(number, (int, float)) else None


@_quick(*_overloads("mul add sub div", "Tensor"))
def _with_tensor(left: Tensor, right: object, **scale: object) -> Any:
    if not isinstance(right, Tensor):
        return _with_number(left, right)
    wide, narrow = (left, right) if (left.dim(), left.numel()) >= (right.dim(), right.numel()) else (right, left)
    if not _is_spread(narrow, wide):
        return None
    if wide.is_contiguous():
        return _empty(wide, wide.shape)
    clear = sum(size > 1 for size in narrow.shape) < 2 and len(set(wide.stride())) == wide.dim()
    out = _in_the_order_of(wide) if clear else None
    return out if out is not None and _strides(out) == _strides(wide) else None


def _is_spread(narrow: Tensor, wide: Tensor) -> bool:
    """Tell whether a contiguous tensor broadcasts to the shape of another float tensor, both without memory."""
    if not (narrow.is_meta and wide.is_meta and narrow.dtype is wide.dtype and _plain(narrow)):
        return False
    fits = zip(reversed(narrow.shape), reversed(wide.shape), strict=False)
    return type(wide) in _OWN and narrow.dim() <= wide.dim() and all(small in (1, size) for small, size in fits)


@_quick(*_overloads("mul_ add_ sub_ div_", "Tensor"))
def _in_place_with_tensor(left: Tensor, right: object, **scale: object) -> Any:
    return left if isinstance(right, Tensor) and 0 not in left.stride() and _is_spread(right, left) else None


@_quick(*_overloads("mean sum", "dim"), *_overloads("sum", "dim_IntList"))
def _mean(source: Tensor, dim: Sequence[int] | None, keepdim: bool = False, **named: object) -> Any:
    if not dim or named or not _plain(source):
        return None
    gone = {place % source.dim() for place in dim}
    shape = [1 if place in gone else size for place, size in enumerate(source.shape) if keepdim or place not in gone]
    return _empty(source, shape)


@_quick(*_overloads("roll"))
def _roll(source: Tensor, shifts: object, dims: object = ()) -> Any:
    return _same(source) if source.is_contiguous() else None


@_quick(*_overloads("cat"))
def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    dim %= max(first.dim(), 1)
    others = [size for place, size in enumerate(first.shape) if place != dim]
    for tensor in tensors:
        if [size for place, size in enumerate(tensor.shape) if place != dim] != others or tensor.dim() != first.dim():
            return None
    if not _plain(*tensors) or not first.dim():
        return None
    shape = list(first.shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return _empty(first, shape)

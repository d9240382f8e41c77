"""Operations of random networks that move channels: slices, shuffles, reshapes, pools."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from random_parts import IMAGE, TOKENS, VECTOR, Part, Shape, Step, axis, channels, divisor, op
from torch import Tensor, nn

# Movement


@op("split")
def _split(step: Step, shape: Shape) -> Part | None:
    n = channels(shape)
    if n < 6:
        return None
    sizes = step.pick(((n - 4, 4), (2, n - 2), (2, n - 5, 3)))
    return Part(lambda p, x: x.split(p.sizes, axis(x.dim())), sizes=list(sizes))


@op("chunk")
def _chunk(step: Step, shape: Shape) -> Part | None:
    n = divisor(step, channels(shape))
    if not n:
        return None
    if step.form % 2:
        return Part(lambda p, x: x.split(p.each, axis(x.dim())), each=channels(shape) // n)
    return Part(lambda p, x: x.chunk(p.n, axis(x.dim())), n=n)


@op("slice")
def _slice(step: Step, shape: Shape) -> Part | None:
    n = channels(shape)
    if n < 6:
        return None
    forms: tuple[Callable[[Part, Tensor], Tensor], ...] = (
        lambda p, x: x[:, : p.to],
        lambda p, x: x[:, : x.shape[1] // 2],
        lambda p, x: x[:, p.to :],
        lambda p, x: x[:, ::2],
        lambda p, x: torch.cat([x[:, : p.to].tanh(), x[:, p.to :]], 1),
        lambda p, x: torch.cat([x[:, p.to :], x[:, : p.to]], 1),
    )
    run = step.pick(forms)
    return Part(lambda p, x: run(p, x.mT).mT if x.dim() == TOKENS else run(p, x), to=n // 3)


@op("halves by a view")
def _halves(step: Step, shape: Shape) -> Part | None:
    n = divisor(step, channels(shape))
    if not n:
        return None

    def run(p: Part, x: Tensor) -> Tensor:
        parts = x.unflatten(axis(x.dim()), (p.n, -1)).unbind(axis(x.dim()))
        return parts[0] * torch.tanh(sum(parts[1:]))

    return Part(run, n=n)


@op("shuffle")
def _shuffle(step: Step, shape: Shape) -> Part | None:
    n = divisor(step, channels(shape))
    if not n:
        return None

    def derived(p: Part, x: Tensor) -> Tensor:
        dim = axis(x.dim())
        return x.unflatten(dim, (p.n, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)

    def coded(p: Part, x: Tensor) -> Tensor:
        dim = axis(x.dim())
        return x.unflatten(dim, (p.n, p.each)).transpose(dim, dim + 1).reshape(x.shape)

    return Part(step.pick((derived, coded)), n=n, each=channels(shape) // n)


@op("flip")
def _flip(step: Step, shape: Shape) -> Part:
    return Part(lambda p, x: x.flip(p.dim), dim=step.pick((axis(len(shape)), len(shape) - 1)))


@op("sum with flipped")
def _sum_with_flipped(step: Step, shape: Shape) -> Part:
    return Part(lambda p, x: x + 0.5 * x.flip(axis(x.dim())))


@op("roll", IMAGE, TOKENS)
def _roll(step: Step, shape: Shape) -> Part:
    dims = (2, 3) if len(shape) == IMAGE else (1,)
    return Part(lambda p, x: x.roll((1,) * len(p.dims), p.dims), dims=dims)


@op("pad channels")
def _pad_channels(step: Step, shape: Shape) -> Part:
    before = (0, 0) * (len(shape) - 1 - axis(len(shape)))
    return Part(lambda p, x: F.pad(x, (*p.pad, 1, 2)), pad=before)


@op("gather")
def _gather(step: Step, shape: Shape) -> Part:
    n = channels(shape)
    index = torch.randperm(n, generator=torch.Generator().manual_seed(step.form))[: max(n - step.form % 3, 2)]
    if step.form % 2:
        return Part(lambda p, x: x.index_select(axis(x.dim()), p.index), index=index)
    return Part(lambda p, x: x[:, :, p.index] if x.dim() == TOKENS else x[:, p.index], index=index)


@op("repeat channels")
def _repeat_channels(step: Step, shape: Shape) -> Part:
    if step.form % 2:
        return Part(lambda p, x: x.repeat_interleave(2, axis(x.dim())))
    return Part(lambda p, x: torch.cat([x, -x, x], axis(x.dim())))


@op("cumulative sum", safe=False)
def _cumulative_sum(step: Step, shape: Shape) -> Part:
    dims = (axis(len(shape)), len(shape) - 1)
    return Part(lambda p, x: 0.3 * x.cumsum(p.dim), dim=step.pick(dims))


@op("written slices")
def _written_slices(step: Step, shape: Shape) -> Part | None:
    """A part of the channels is changed through a view."""
    n = channels(shape)
    if n < 6:
        return None

    def run(p: Part, x: Tensor) -> Tensor:
        y = x.clone()
        y.narrow(axis(x.dim()), p.start, p.n).mul_(0.5)
        y.narrow(axis(x.dim()), p.start, p.n).add_(torch.tanh(x.narrow(axis(x.dim()), 0, p.n)))
        return y

    return Part(run, start=step.pick((0, n // 3, n // 2)), n=n // step.pick((2, 3), 3))


@op("rotate half")
def _rotate_half(step: Step, shape: Shape) -> Part | None:
    if channels(shape) % 2:
        return None

    def run(p: Part, x: Tensor) -> Tensor:
        low, high = x.chunk(2, axis(x.dim()))
        return 0.8 * x + 0.6 * torch.cat([-high, low], axis(x.dim()))

    return Part(run)


@op("written halves")
def _written_halves(step: Step, shape: Shape) -> Part | None:
    if channels(shape) % 2:
        return None

    def run(p: Part, x: Tensor) -> Tensor:
        y, half = torch.zeros_like(x), x.shape[axis(x.dim())] // 2
        y.narrow(axis(x.dim()), 0, half).copy_(x.narrow(axis(x.dim()), half, half))
        y.narrow(axis(x.dim()), half, half).copy_(torch.tanh(x.narrow(axis(x.dim()), 0, half)))
        return y

    return Part(run)


# Between the kinds


@op("to tokens", IMAGE)
def _to_tokens(step: Step, shape: Shape) -> Part:
    forms = (
        lambda p, x: x.flatten(2).transpose(1, 2),
        lambda p, x: x.permute(0, 2, 3, 1).reshape(len(x), -1, x.shape[1]),
        lambda p, x: x.mean(3).mT,
        lambda p, x: x.permute(0, 2, 3, 1).reshape(len(x), p.n, p.c),
    )
    return Part(step.pick(forms), n=shape[2] * shape[3], c=shape[1])


@op("to image", TOKENS)
def _to_image(step: Step, shape: Shape) -> Part | None:
    h = next((n for n in (4, 8, 3, 2) if shape[1] % n == 0), None)
    forms = (
        lambda p, x: x.mT.unflatten(2, (p.h, -1)),
        lambda p, x: x.transpose(1, 2).reshape(len(x), p.c, p.h, p.w),
    )
    return h and Part(step.pick(forms), h=h, w=shape[1] // h, c=shape[2])


@op("mean of extent", IMAGE, TOKENS)
def _mean_of_extent(step: Step, shape: Shape) -> Part:
    return Part(lambda p, x: x.mean((2, 3)) if x.dim() == IMAGE else x.mean(1))


@op("flatten", IMAGE, TOKENS)
def _flatten(step: Step, shape: Shape) -> Part:
    rows = shape[1] * shape[2] * (4 if len(shape) == IMAGE else 1) // (shape[2] if len(shape) == IMAGE else 1)
    return Part(
        lambda p, x: p.layer((F.adaptive_avg_pool2d(x, 2) if x.dim() == IMAGE else x).flatten(1)),
        layer=nn.Linear(rows, step.width),
    )


@op("vector to tokens", VECTOR, safe=False)
def _vector_to_tokens(step: Step, shape: Shape) -> Part | None:
    n = divisor(step, shape[1])
    forms = (lambda p, x: x.unflatten(1, (p.n, -1)), lambda p, x: x.view(len(x), p.n, p.each))
    return n and Part(step.pick(forms), n=n, each=shape[1] // n)


@op("turn", IMAGE, TOKENS, safe=False)
def _turn(step: Step, shape: Shape) -> Part:
    """Channels and tokens, or channels and rows, change places, so that any operation meets channels anywhere."""
    return Part(lambda p, x: x.transpose(*p.dims), dims=step.pick(((1, 2), (1, len(shape) - 1))))


@op("vector to image by a view", VECTOR, safe=False)
def _vector_to_image_by_a_view(step: Step, shape: Shape) -> Part | None:
    forms = (lambda p, x: x.unflatten(1, (-1, 2, 2)), lambda p, x: x.view(len(x), 2, -1, 2))
    return Part(step.pick(forms)) if shape[1] % 4 == 0 and shape[1] > 4 else None


@op("vector to image", VECTOR)
def _vector_to_image(step: Step, shape: Shape) -> Part:
    return Part(
        lambda p, x: p.layer(x[:, :, None, None].expand(-1, -1, 4, 4)),
        layer=nn.Conv2d(shape[1], step.width, 3, padding=1),
    )


# Extent


@op("pool", IMAGE, TOKENS)
def _pool(step: Step, shape: Shape) -> Part | None:
    if min(shape[2:] if len(shape) == IMAGE else shape[1:2]) < 2:
        return None
    if len(shape) == TOKENS:
        return Part(lambda p, x: F.avg_pool1d(x.mT, 2).mT)
    pools = (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.MaxPool2d(3, 1, 1), nn.AdaptiveMaxPool2d(2))
    return Part(lambda p, x: p.pool(x), pool=step.pick(pools))


@op("upsample", IMAGE)
def _upsample(step: Step, shape: Shape) -> Part:
    return Part(lambda p, x: F.interpolate(x, scale_factor=2, mode=p.mode), mode=step.pick(("nearest", "bilinear")))


@op("pixel shuffle", IMAGE)
def _pixel_shuffle(step: Step, shape: Shape) -> Part | None:
    if shape[1] % 4 or shape[1] < 8:
        return None
    return Part(lambda p, x: F.pixel_shuffle(x, 2))


@op("pixel unshuffle", IMAGE)
def _pixel_unshuffle(step: Step, shape: Shape) -> Part | None:
    if shape[2] % 2 or shape[3] % 2:
        return None
    forms = (
        lambda p, x: F.pixel_unshuffle(x, 2),
        lambda p, x: torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1),
        lambda p, x: x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 3, 5, 1, 2, 4).flatten(1, 3),
    )
    return Part(step.pick(forms))


@op("unfold", IMAGE)
def _unfold(step: Step, shape: Shape) -> Part | None:
    if shape[1] * 9 > 150:
        return None
    return Part(lambda p, x: p.layer(F.unfold(x, 3, padding=1).mT), layer=nn.Linear(shape[1] * 9, step.width))


@op("windows", IMAGE)
def _windows(step: Step, shape: Shape) -> Part | None:
    if shape[2] % 2 or shape[3] % 2:
        return None

    def run(p: Part, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = x.view(b, c if p.derived else p.c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        y = p.layer(y).tanh().view(b, h // 2, w // 2, 2, 2, -1)
        return x + y.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h, w)

    return Part(run, layer=nn.Linear(shape[1], shape[1]), c=shape[1], derived=step.pick((True, False)))

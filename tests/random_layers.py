"""Operations of random networks with parameters: layers, tensors used by themselves, norms, activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_parts import (
    ACTIVATIONS,
    IMAGE,
    TOKENS,
    Part,
    Shape,
    Step,
    axis,
    channels,
    divisor,
    first,
    last,
    op,
    over,
    weight,
)
from torch import Tensor, nn

# Layers


@op("linear")
def _linear(step: Step, shape: Shape) -> Part:
    return Part(lambda p, x: first(p.layer(last(x))), layer=nn.Linear(channels(shape), step.width, step.form % 3 > 0))


@op("conv", IMAGE)
def _conv(step: Step, shape: Shape) -> Part:
    options = step.pick(({"padding": 1}, {"padding": 1, "stride": 2}, {"padding": 2, "dilation": 2}, {"bias": False}))
    return Part(lambda p, x: p.layer(x), layer=nn.Conv2d(shape[1], step.width, 3 if len(options) > 1 else 1, **options))


@op("conv grouped", IMAGE)
def _conv_grouped(step: Step, shape: Shape) -> Part | None:
    n = divisor(step, shape[1], step.width)
    return n and Part(lambda p, x: p.layer(x), layer=nn.Conv2d(shape[1], step.width, 3, padding=1, groups=n))


@op("conv depthwise", IMAGE)
def _conv_depthwise(step: Step, shape: Shape) -> Part:
    made = shape[1] * step.pick((1, 1, 2))
    return Part(lambda p, x: p.layer(x), layer=nn.Conv2d(shape[1], made, 3, padding=1, groups=shape[1]))


@op("conv transposed", IMAGE)
def _conv_transposed(step: Step, shape: Shape) -> Part:
    n = divisor(step, shape[1], step.width) if step.form % 2 else None
    layer = nn.ConvTranspose2d(shape[1], step.width, 2, stride=2, groups=n or 1)
    return Part(lambda p, x: p.layer(x), layer=layer)


@op("conv transposed depthwise", IMAGE)
def _conv_transposed_depthwise(step: Step, shape: Shape) -> Part:
    layer = nn.ConvTranspose2d(shape[1], shape[1], 3, padding=1, groups=shape[1])
    return Part(lambda p, x: p.layer(x), layer=layer)


@op("conv1d", TOKENS)
def _conv1d(step: Step, shape: Shape) -> Part:
    layer = nn.Conv1d(shape[2], step.width, 3, padding=1, groups=divisor(step, shape[2], step.width) or 1)
    return Part(lambda p, x: p.layer(x.transpose(1, 2)).transpose(1, 2), layer=layer)


@op("conv1d depthwise", TOKENS)
def _conv1d_depthwise(step: Step, shape: Shape) -> Part:
    kind = step.pick((nn.Conv1d, nn.ConvTranspose1d))
    layer = kind(shape[2], shape[2], 3, padding=1, groups=shape[2])
    return Part(lambda p, x: p.layer(x.mT).mT, layer=layer)


@op("recurrent", TOKENS)
def _recurrent(step: Step, shape: Shape) -> Part:
    kind, both = step.pick((nn.LSTM, nn.GRU)), step.pick((False, True), 2)
    layer = kind(shape[2], step.width, batch_first=True, bidirectional=both)
    return Part(lambda p, x: p.layer(x)[0], layer=layer)


@op("recurrent cell", TOKENS)
def _recurrent_cell(step: Step, shape: Shape) -> Part:
    if step.form % 2:

        def run(p: Part, x: Tensor) -> Tensor:
            state, states = None, []
            for token in x.unbind(1):
                state = p.cell(token, state)
                states.append(state)
            return torch.stack(states, 1)

        return Part(run, cell=nn.GRUCell(shape[2], step.width))
    return Part(lambda p, x: p.cell(x[:, 0])[0][:, None], cell=nn.LSTMCell(shape[2], step.width))


@op("linear over rows", TOKENS)
def _linear_over_rows(step: Step, shape: Shape) -> Part:
    """Batch and tokens are merged first, and the width is hard-coded on the way back."""
    forms = (
        lambda p, x: p.layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], -1),
        lambda p, x: p.layer(x.reshape(-1, p.inner)).view(-1, p.n, p.outer),
        lambda p, x: p.norm(p.layer(x.flatten(0, 1))).unflatten(0, (-1, p.n)),
    )
    layer, norm = nn.Linear(shape[2], step.width), nn.BatchNorm1d(step.width)
    return Part(step.pick(forms), layer=layer, norm=norm, n=shape[1], inner=shape[2], outer=step.width)


# Parameters without a layer


@op("mask")
def _mask(step: Step, shape: Shape) -> Part:
    """A buffer or an untrained parameter as wide as its input."""
    mask = torch.linspace(0.5, 1.5, channels(shape))
    return Part(
        lambda p, x: x * over(x, p.mask), mask=step.pick((mask, nn.Parameter(mask, requires_grad=False), weight(1)))
    )


@op("block linear")
def _block_linear(step: Step, shape: Shape) -> Part | None:
    """A layer for each block of channels."""
    n = divisor(step, channels(shape))
    forms = (
        lambda p, x: first(torch.einsum("...gc,gcd->...gd", last(x).unflatten(-1, (p.n, -1)), p.w).flatten(-2)),
        lambda p, x: first((last(x).unflatten(-1, (p.n, -1)).unsqueeze(-2) @ p.w).flatten(-3)),
    )
    return n and Part(step.pick(forms), w=weight(n, channels(shape) // n, step.width // 2), n=n)


@op("bmm", TOKENS)
def _bmm(step: Step, shape: Shape) -> Part:
    forms = (
        lambda p, x: torch.bmm(x, p.w.expand(len(x), -1, -1)),
        lambda p, x: torch.baddbmm(p.b, x, p.w.expand(len(x), -1, -1)),
        lambda p, x: torch.addmm(p.b, x.flatten(0, 1), p.w).view(*x.shape[:2], -1),
    )
    return Part(step.pick(forms), w=weight(shape[2], step.width), b=weight(step.width))


@op("scale and shift")
def _scale_and_shift(step: Step, shape: Shape) -> Part:
    n = channels(shape)
    return Part(lambda p, x: x * over(x, p.scale) + over(x, p.shift), scale=weight(n), shift=weight(n))


@op("position table", TOKENS)
def _position_table(step: Step, shape: Shape) -> Part:
    return Part(lambda p, x: x + p.table[:, : x.shape[1]], table=weight(1, shape[1] + 2, shape[2]))


@op("class token", TOKENS)
def _class_token(step: Step, shape: Shape) -> Part:
    return Part(lambda p, x: torch.cat([p.token.expand(len(x), -1, -1), x], 1), token=weight(1, 1, shape[2]))


@op("functional conv", IMAGE)
def _functional_conv(step: Step, shape: Shape) -> Part:
    n = step.width
    return Part(
        lambda p, x: F.conv2d(x, p.kernel * p.gain[:, None, None, None], p.shift, padding=1),
        kernel=weight(n, shape[1], 3, 3),
        gain=weight(n),
        shift=weight(n),
    )


@op("stacked weights")
def _stacked_weights(step: Step, shape: Shape) -> Part:
    n, inner = step.width, channels(shape)
    if step.form % 2:
        return Part(
            lambda p, x: first(F.linear(last(x), torch.cat([p.upper, p.lower]))),
            upper=weight(n, inner),
            lower=weight(4, inner),
        )
    return Part(lambda p, x: first(F.linear(last(x), p.both.sum(0))), both=weight(2, n, inner))


@op("einsum")
def _einsum(step: Step, shape: Shape) -> Part:
    if step.form % 2 and step.width % 2 == 0:
        return Part(
            lambda p, x: first(torch.einsum("...c,hdc->...hd", last(x), p.w).flatten(-2)),
            w=weight(2, step.width // 2, channels(shape)),
        )
    return Part(lambda p, x: first(torch.einsum("...c,dc->...d", last(x), p.w)), w=weight(step.width, channels(shape)))


@op("tied weights")
def _tied_weights(step: Step, shape: Shape) -> Part:
    return Part(
        lambda p, x: first(F.linear(p.act(F.linear(last(x), p.w)), p.w.t())),
        w=weight(step.width, channels(shape)),
        act=step.pick(ACTIVATIONS),
    )


@op("layer used twice")
def _layer_used_twice(step: Step, shape: Shape) -> Part:
    n = channels(shape)
    return Part(lambda p, x: first(p.layer(F.gelu(p.layer(last(x))))), layer=nn.Linear(n, n))


@op("weight norm", safe=False)
def _weight_norm(step: Step, shape: Shape) -> Part:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(channels(shape), step.width))
    return Part(lambda p, x: first(p.layer(last(x))), layer=layer)


# Normalisations


@op("batch norm")
def _batch_norm(step: Step, shape: Shape) -> Part:
    affine = step.form % 3 < 2
    if len(shape) == IMAGE:
        return Part(lambda p, x: p.norm(x), norm=nn.BatchNorm2d(shape[1], affine=affine))
    norm = nn.BatchNorm1d(channels(shape), affine=affine)
    return Part(lambda p, x: p.norm(x.mT).mT if x.dim() == TOKENS else p.norm(x), norm=norm)


@op("instance norm", IMAGE)
def _instance_norm(step: Step, shape: Shape) -> Part:
    norm = step.pick((nn.InstanceNorm2d(shape[1], affine=True), nn.GroupNorm(shape[1], shape[1])))
    return Part(lambda p, x: p.norm(x), norm=norm)


@op("layer norm", safe=False)
def _layer_norm(step: Step, shape: Shape) -> Part:
    return Part(lambda p, x: first(p.norm(last(x))), norm=nn.LayerNorm(channels(shape)))


@op("rms norm", safe=False)
def _rms_norm(step: Step, shape: Shape) -> Part:
    if step.form % 2:
        return Part(lambda p, x: first(p.norm(last(x))), norm=nn.RMSNorm(channels(shape), eps=1e-5))
    return Part(
        lambda p, x: x * torch.rsqrt(x.pow(2).mean(axis(x.dim()), keepdim=True) + 1e-5) * over(x, p.gain),
        gain=weight(channels(shape)),
    )


@op("group norm", IMAGE, safe=False)
def _group_norm(step: Step, shape: Shape) -> Part:
    n = divisor(step, shape[1]) if step.form % 2 else 1
    return Part(lambda p, x: p.norm(x), norm=nn.GroupNorm(n or 1, shape[1]))


# Pointwise


@op("activation")
def _activation(step: Step, shape: Shape) -> Part:
    return Part(lambda p, x: p.act(x), act=step.pick(ACTIVATIONS))


@op("prelu")
def _prelu(step: Step, shape: Shape) -> Part:
    if len(shape) == TOKENS:
        return Part(lambda p, x: p.act(x.mT).mT, act=nn.PReLU(shape[2]))
    return Part(lambda p, x: p.act(x), act=nn.PReLU(shape[1]))


@op("written in place")
def _written_in_place(step: Step, shape: Shape) -> Part:
    def run(p: Part, x: Tensor) -> Tensor:
        y = x.clone()
        y.mul_(0.5).add_(torch.tanh(x))
        return F.relu_(y)

    return Part(run)


@op("softmax of channels", safe=False)
def _softmax_of_channels(step: Step, shape: Shape) -> Part:
    return Part(lambda p, x: x * x.softmax(axis(x.dim())))


@op("glu")
def _glu(step: Step, shape: Shape) -> Part | None:
    if channels(shape) % 2 or channels(shape) < 4:
        return None
    if step.form % 2:

        def gated(p: Part, x: Tensor) -> Tensor:
            gate, value = x.chunk(2, axis(x.dim()))
            return F.silu(gate) * torch.tanh(value)

        return Part(gated)
    return Part(lambda p, x: F.glu(x, axis(x.dim())))

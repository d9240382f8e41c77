"""Operations of random networks where channels or tokens meet: sums of two tensors, gates, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from random_parts import IMAGE, TOKENS, VECTOR, Match, Part, Shape, Step, axis, channels, divisor, op, weight
from torch import Tensor, nn

# Two sources


@op("add", sources=2)
def _add(step: Step, shape: Shape, further: Shape) -> Part:
    return Part(lambda p, x, y: x + p.match(y, x), match=Match(further, shape))


@op("mul", sources=2)
def _mul(step: Step, shape: Shape, further: Shape) -> Part:
    return Part(
        lambda p, x, y: x * p.gate(p.match(y, x)), match=Match(further, shape), gate=step.pick((torch.tanh, F.sigmoid))
    )


@op("cat", sources=2)
def _cat(step: Step, shape: Shape, further: Shape) -> Part | None:
    if len(shape) == len(further) == TOKENS and shape[2] == further[2] and step.form % 2:
        return Part(lambda p, x, y: torch.cat([x, y], 1))

    def run(p: Part, x: Tensor, y: Tensor) -> Tensor:
        y = p.match(y, x)
        if x.dim() > VECTOR:
            y = y.expand(-1, -1, *x.shape[2:]) if x.dim() == IMAGE else y.expand(-1, x.shape[1], -1)
        return torch.cat([x, y] if p.in_order else [y, x, y], axis(x.dim()))

    return Part(run, match=Match(further, shape, project=False), in_order=step.pick((True, False), 2))


@op("stack and sum", sources=2)
def _stack_and_sum(step: Step, shape: Shape, further: Shape) -> Part:
    return Part(
        lambda p, x, y: torch.stack([x, p.match(y, x).expand_as(x)], p.dim).sum(p.dim),
        match=Match(further, shape),
        dim=step.pick((0, 1, -1)),
    )


@op("film", sources=2)
def _film(step: Step, shape: Shape, further: Shape) -> Part:
    def run(p: Part, x: Tensor, y: Tensor) -> Tensor:
        y = y.mean((2, 3)) if y.dim() == IMAGE else y.mean(1) if y.dim() == TOKENS else y
        gain, shift = (v[:, None] if x.dim() == TOKENS else v for v in p.layer(y).chunk(2, 1))
        return x * torch.tanh(gain[..., None, None] if x.dim() == IMAGE else gain) + (
            shift[..., None, None] if x.dim() == IMAGE else shift
        )

    return Part(run, layer=nn.Linear(channels(further), 2 * channels(shape)))


@op("cross attention", TOKENS, sources=2)
def _cross_attention(step: Step, shape: Shape, further: Shape) -> Part | None:
    n, each = step.pick((2, 4, 1)), step.pick((4, 2, 6), 3)

    def run(p: Part, x: Tensor, y: Tensor) -> Tensor:
        q = p.q(x).view(len(x), -1, p.heads, p.dim).transpose(1, 2)
        k, v = (layer(y).view(len(x), -1, p.heads, p.dim).transpose(1, 2) for layer in (p.k, p.v))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=p.scale)
        return x + p.out(mixed.transpose(1, 2).reshape(len(x), -1, p.heads * p.dim))

    layers = {"k": nn.Linear(further[2], n * each), "v": nn.Linear(further[2], n * each)}
    q, out = nn.Linear(shape[2], n * each), nn.Linear(n * each, shape[2])
    return Part(run, q=q, **layers, out=out, heads=n, dim=each, scale=each**-0.5)


@op("outer attention", TOKENS, sources=2)
def _outer_attention(step: Step, shape: Shape, further: Shape) -> Part:
    """Scores without a projection: channels of both sources meet in an einsum."""
    return Part(
        lambda p, x, y: x + torch.einsum("bnm,bmc->bnc", torch.einsum("bnc,bmc->bnm", x, p.f(y)).softmax(-1), p.f(y)),
        f=nn.Linear(further[2], shape[2]),
    )


@op("gram matrix", TOKENS)
def _gram_matrix(step: Step, shape: Shape) -> Part | None:
    """Channels meet channels, so that one group lies along two dimensions that a flatten merges."""
    if shape[2] > 12:
        return None
    return Part(lambda p, x: p.layer((x.mT @ x / x.shape[1]).flatten(1)), layer=nn.Linear(shape[2] ** 2, step.width))


@op("outer product", VECTOR)
def _outer_product(step: Step, shape: Shape) -> Part | None:
    if shape[1] > 12:
        return None
    return Part(
        lambda p, x: p.layer((x[:, :, None] * x[:, None]).flatten(1)), layer=nn.Linear(shape[1] ** 2, step.width)
    )


# Gates, and attention


@op("squeeze and excite", IMAGE)
def _squeeze_and_excite(step: Step, shape: Shape) -> Part:
    forms = (
        lambda p, x: x * torch.sigmoid(p.up(F.relu(p.down(x.mean((2, 3), keepdim=True))))),
        lambda p, x: x * F.hardsigmoid(p.up(F.silu(p.down(F.adaptive_avg_pool2d(x, 1))))),
    )
    return Part(step.pick(forms), down=nn.Conv2d(shape[1], step.width, 1), up=nn.Conv2d(step.width, shape[1], 1))


@op("eca gate", IMAGE)
def _eca_gate(step: Step, shape: Shape) -> Part:
    """A convolution along the channels, which freezes them."""
    return Part(
        lambda p, x: x * torch.sigmoid(p.layer(x.mean((2, 3))[:, None])[:, 0, :, None, None]),
        layer=nn.Conv1d(1, 1, 3, padding=1),
    )


@op("spatial gate", safe=False)
def _spatial_gate(step: Step, shape: Shape) -> Part:
    forms = (
        lambda p, x: x * torch.sigmoid(x.mean(axis(x.dim()), keepdim=True)),
        lambda p, x: x * torch.sigmoid(x.amax(axis(x.dim()), keepdim=True)),
        lambda p, x: x - 0.5 * x.mean(axis(x.dim()), keepdim=True).expand_as(x),
    )
    return Part(step.pick(forms))


@op("sum of channels")
def _sum_of_channels(step: Step, shape: Shape) -> Part:
    return Part(lambda p, x: x * torch.tanh(x.sum(axis(x.dim()), keepdim=True)))


@op("token mixer", TOKENS)
def _token_mixer(step: Step, shape: Shape) -> Part:
    up, down = nn.Linear(shape[1], step.width), nn.Linear(step.width, shape[1])
    return Part(lambda p, x: x + p.down(F.gelu(p.up(x.mT))).mT, up=up, down=down)


@op("token linear", TOKENS, safe=False)
def _token_linear(step: Step, shape: Shape) -> Part:
    return Part(lambda p, x: p.layer(x.mT).mT, layer=nn.Linear(shape[1], step.width))


def _scores(p: Part, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with the scale of the dense network."""
    if p.fused:
        return F.scaled_dot_product_attention(q, k, v, scale=p.scale)
    return torch.softmax(q @ k.transpose(-2, -1) * p.scale, -1) @ v


@op("attention fused", TOKENS)
def _attention_fused(step: Step, shape: Shape) -> Part:
    """One layer makes queries, keys and values; sizes are hard-coded, or derived from one of them."""

    def coded(p: Part, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = p.qkv(x).reshape(b, n, 3, p.heads, p.dim).permute(2, 0, 3, 1, 4).unbind(0)
        return p.out(_scores(p, q, k, v).transpose(1, 2).reshape(b, n, p.heads * p.dim))

    def by_heads(p: Part, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (p.heads, -1)).transpose(1, 2) for y in p.qkv(x).chunk(3, -1))
        return p.out(_scores(p, q, k, v).transpose(1, 2).flatten(2))

    def by_dim(p: Part, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (-1, p.dim)).transpose(1, 2) for y in p.qkv(x).chunk(3, -1))
        return p.out(_scores(p, q, k, v).transpose(1, 2).flatten(2))

    heads, dim = step.pick((2, 4, 1), 6), step.pick((4, 3), 9)
    qkv, out = nn.Linear(shape[2], 3 * heads * dim), nn.Linear(heads * dim, step.width)
    run, fused = step.pick((coded, by_heads, by_dim)), step.pick((True, False), 3)
    return Part(run, qkv=qkv, out=out, heads=heads, dim=dim, scale=dim**-0.5, fused=fused)


@op("attention separate", TOKENS)
def _attention_separate(step: Step, shape: Shape) -> Part:
    """Queries, keys and values have layers of their own; the values may be of another width."""

    def run(p: Part, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k = (layer(x).view(b, n, p.heads, p.dim).transpose(1, 2) for layer in (p.q, p.k))
        v = p.v(x).view(b, n, p.heads, -1).transpose(1, 2)
        return x + p.out(_scores(p, q, k, v).transpose(1, 2).reshape(b, n, -1))

    heads, dim, wide = step.pick((2, 4), 2), step.pick((4, 3), 4), step.pick((4, 6), 4)
    layers = {name: nn.Linear(shape[2], heads * (wide if name == "v" else dim)) for name in "qkv"}
    out = nn.Linear(heads * wide, shape[2])
    return Part(run, **layers, out=out, heads=heads, dim=dim, scale=dim**-0.5, fused=step.pick((True, False)))


@op("attention with a table", TOKENS)
def _attention_with_a_table(step: Step, shape: Shape) -> Part:
    """Each head adds its own relative positions, looked up in a table by a constant index."""

    def run(p: Part, x: Tensor) -> Tensor:
        q, k, v = p.qkv(x).unflatten(2, (3, p.heads, p.dim)).permute(2, 0, 3, 1, 4)
        bias = p.table[p.index.flatten()].view(*p.index.shape, -1).permute(2, 0, 1)
        mixed = ((q * p.scale) @ k.mT + bias).softmax(-1) @ v
        return x + p.out(mixed.transpose(1, 2).flatten(2))

    heads, dim, n = step.pick((2, 4)), 4, shape[1]
    index = torch.arange(n)[:, None] - torch.arange(n) + n - 1
    own = {"table": weight(2 * n - 1, heads), "index": index, "scale": dim**-0.5}
    qkv, out = nn.Linear(shape[2], 3 * heads * dim), nn.Linear(heads * dim, shape[2])
    return Part(run, qkv=qkv, out=out, heads=heads, dim=dim, **own)


@op("attention grouped-query", TOKENS)
def _attention_grouped_query(step: Step, shape: Shape) -> Part:
    """Two heads of queries share one of keys and values."""

    def run(p: Part, x: Tensor) -> Tensor:
        q = p.q(x).unflatten(2, (2 * p.pairs, p.dim)).transpose(1, 2)
        k, v = (f(x).unflatten(2, (p.pairs, p.dim)).transpose(1, 2).repeat_interleave(2, 1) for f in (p.k, p.v))
        return x + p.out(_scores(p, q, k, v).transpose(1, 2).flatten(2))

    pairs, dim = step.pick((2, 3), 2), 4
    layers = {name: nn.Linear(shape[2], pairs * dim * (2 if name == "q" else 1)) for name in "qkv"}
    out = nn.Linear(2 * pairs * dim, shape[2])
    return Part(run, **layers, out=out, pairs=pairs, dim=dim, scale=dim**-0.5, fused=step.pick((True, False)))


@op("attention with derived scale", TOKENS, safe=False)
def _attention_derived_scale(step: Step, shape: Shape) -> Part:
    def run(p: Part, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (p.heads, -1)).transpose(1, 2) for layer in (p.q, p.k, p.v))
        return x + p.out(F.scaled_dot_product_attention(q, k, v, is_causal=p.causal).transpose(1, 2).flatten(2))

    layers = {name: nn.Linear(shape[2], 8) for name in "qkv"}
    return Part(run, **layers, out=nn.Linear(8, shape[2]), heads=step.pick((2, 4)), causal=step.pick((True, False), 2))


@op("attention of channels", TOKENS, safe=False)
def _attention_of_channels(step: Step, shape: Shape) -> Part:
    """Channels attend to channels (XCiT)."""

    def run(p: Part, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = p.qkv(x).reshape(b, n, 3, p.heads, -1).permute(2, 0, 3, 4, 1)
        return x + p.out(((q @ k.transpose(-2, -1) / n).softmax(-1) @ v).permute(0, 3, 1, 2).reshape(b, n, -1))

    return Part(run, qkv=nn.Linear(shape[2], 24), out=nn.Linear(8, shape[2]), heads=2)


@op("multi-head attention", TOKENS, safe=False)
def _multi_head_attention(step: Step, shape: Shape) -> Part | None:
    heads = divisor(step, shape[2])
    return heads and Part(
        lambda p, x: x + p.layer(x, x, x, need_weights=False)[0],
        layer=nn.MultiheadAttention(shape[2], heads, batch_first=True),
    )

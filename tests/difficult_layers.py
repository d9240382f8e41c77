"""What the networks of difficulties.py are made of: layers, and what forwards do with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from proof import Net
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

CLASSES = 5

Run = Callable[[Net, Tensor], object]


def conv(inner: int, outer: int, kernel: int = 3, **further: int) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, kernel, padding=kernel // 2, **further)


def square(width: int) -> nn.Conv2d:
    return conv(width, width)


def squares(width: int, g: int = 1) -> dict[str, nn.Module]:
    """Two layers for two branches, the second `g` times as wide."""
    return {"f": square(width), "g": conv(width, g * width)}


def readout(width: int) -> nn.Conv2d:
    """A head on images."""
    return conv(width, CLASSES, 1)


def flat(width: int, pixels: int) -> nn.Linear:
    return nn.Linear(width * pixels, CLASSES)


def images(run: Run, width: int, head: int | nn.Module | None = None, **parts: nn.Module) -> Net:
    """A convolution to `width` channels, what `run` does with them, and a head."""
    last = head if isinstance(head, nn.Module) else readout(head or width)
    return Net(lambda net, x: net.head(run(net, net.a(x).relu())), a=conv(3, width), **parts, head=last)


def tokens(run: Run, width: int, head: int | None = None, **parts: nn.Module) -> Net:
    """A Linear to `width` features, what `run` does with them, and a head."""
    own = {"a": nn.Linear(5, width), **parts, "head": nn.Linear(head or width, CLASSES)}
    return Net(lambda net, x: net.head(run(net, net.a(x))), **own)


def layer(make: Callable[[int], nn.Module], run: Run = lambda net, y: net.layer(y)) -> Callable[[int], Net]:
    """Images through a layer of the builder's width."""
    return lambda width: images(run, width, layer=make(width))


class WithSizes(Net):
    """A network whose forward reads sizes from attributes."""

    def __init__(self, run: Run, parts: dict[str, nn.Module], **sizes: object) -> None:
        super().__init__(run, **parts)
        for name, size in sizes.items():
            setattr(self, name, size)


Halves = Callable[[Net, Tensor], tuple[Tensor, Tensor]]


def product_of(halves: Halves) -> Run:
    """The second half of the channels gates the first."""

    def run(net: Net, y: Tensor) -> Tensor:
        first, second = halves(net, y)
        return first * second.tanh()

    return run


def halved(halves: Halves) -> Callable[[int], nn.Module]:
    return lambda w: images(product_of(halves), w, w // 2)


def hard_coded(halves: Halves) -> Callable[[int], nn.Module]:
    """The same, where half the width is an attribute."""

    def build(width: int) -> WithSizes:
        parts = {"a": conv(3, width), "head": readout(width // 2)}
        return WithSizes(lambda n, x: n.head(product_of(halves)(n, n.a(x))), parts, half=width // 2)

    return build


class ChunksOfFour(nn.Module):
    """How many parts there are follows from the tensor: each is four channels wide, whatever the width."""

    def __init__(self, width: int, parts: int = 4) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 4 * parts), conv(4, width), readout(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.head(self.b(torch.stack(y.chunk(y.shape[1] // 4, 1)).sum(0)).relu())


class IndexPermutation(nn.Module):
    """A buffer says where each of 16 channels goes; only what comes behind may get narrower."""

    perm: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 16), conv(16, width), readout(width)
        self.register_buffer("perm", torch.randperm(16, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)[:, self.perm]).relu())


class PadShortcut(nn.Module):
    """A ResNet's shortcut, option A: eight channels of zeros on either side, a number that stands in the code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.f, self.g = conv(3, width), conv(width, 2 * width, stride=2), conv(2 * width, width + 16)
        self.shortcut = Net(lambda _, y: F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))
        self.head = readout(width + 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.head((self.shortcut(y) + self.g(self.f(y).relu())).relu())


def shuffled(y: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = y.shape
    y = y.view(batch, groups, channels // groups, height, width)
    return y.transpose(1, 2).reshape(batch, channels, height, width)


def heads_in_the_batch(net: Net, y: Tensor) -> Tensor:
    batch, channels, height, width = y.shape
    y = net.f(y.reshape(batch * 4, channels // 4, height, width))
    return y.reshape(batch, -1, height, width)


class MLP(nn.Sequential):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def normed_patches(width: int) -> Net:
    """Patches as tokens, an MLP with a LayerNorm before it, and one at the end."""

    def run(net: Net, x: Tensor) -> Tensor:
        y = net.a(x).flatten(2).transpose(1, 2)
        return net.head(net.last(y + net.mlp(net.norm(y))).mean(1))

    norms = {"norm": nn.LayerNorm(width), "last": nn.LayerNorm(width)}
    return Net(run, a=nn.Conv2d(3, width, 2, 2), mlp=MLP(width, width // 4), **norms, head=nn.Linear(width, CLASSES))


class HandMadeRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm whose parameters and statistics are buffers, as in torchvision."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "running_var", "bias", "running_mean"):
            self.register_buffer(name, torch.ones(width) if name in ("weight", "running_var") else torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        mean, variance = self.running_mean.reshape(1, -1, 1, 1), self.running_var.reshape(1, -1, 1, 1)
        scale = weight * (variance + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class OwnTensors(nn.Module):
    """Parameters and buffers that a module multiplies with."""

    def __init__(
        self, run: Callable[[OwnTensors, Tensor], Tensor], buffers: bool = False, **shapes: tuple[int, ...]
    ) -> None:
        super().__init__()
        self._run = run
        for name, shape in shapes.items():
            if buffers:
                self.register_buffer(name, torch.ones(shape))
            else:
                self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


class WeightedFusion(nn.Module):
    """Two branches, weighted as in BiFPN: one learned number each, made to sum to one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f, self.g = square(width), square(width)
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.relu()
        weight = weight / (weight.sum() + 1e-4)
        return weight[0] * self.f(x) + weight[1] * self.g(x)


class FunctionalConv(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(outer, inner, 3, 3)), nn.Parameter(torch.empty(outer))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


def tied(width: int) -> Net:
    net = tokens(lambda n, y: n.g(n.f(y).relu()).relu(), width, f=nn.Linear(width, width), g=nn.Linear(width, width))
    net.g.weight = net.f.weight
    return net


def squeeze(net: Net, y: Tensor) -> Tensor:
    return y * net.up(net.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid()


def squeeze_by_views(net: Net, y: Tensor) -> Tensor:
    batch, channels = y.shape[:2]
    pooled = F.adaptive_avg_pool2d(y, 1).view(batch, channels)
    return y * net.up(net.down(pooled).relu()).sigmoid().view(batch, channels, 1, 1)


def swiglu(width: int) -> Net:
    parts = {name: nn.Linear(width, 2 * width, bias=False) for name in ("w1", "w3")}
    parts["w2"] = nn.Linear(2 * width, width, bias=False)
    return tokens(lambda net, y: net.w2(F.silu(net.w1(y)) * net.w3(y)), width, **parts)


def where_to_look(net: Net, y: Tensor) -> Tensor:
    return y * net.f(torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)).sigmoid()


def gram(net: Net, x: Tensor) -> Tensor:
    features = net.a(x).flatten(2)
    return net.head(features @ features.mT / features.shape[2]).sum(1)


class FusedAttention(nn.Module):
    """Queries, keys and values from one Linear, as timm writes it."""

    def __init__(self, width: int, size: int = 8) -> None:
        super().__init__()
        self.num_heads = width // size
        self.scale = size**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def parts(self, x: Tensor) -> Tensor:
        """Return queries, keys and values of every head: (3, batch, heads, tokens, size)."""
        batch, length, width = x.shape
        made = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        return made.permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x).unbind(0)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class FusedAttentionMinusOne(FusedAttention):
    """The same, where the size of a head is left to reshape."""

    def parts(self, x: Tensor) -> Tensor:
        return self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)


class SeparateAttention(nn.Module):
    """Queries, keys and values from a Linear each; the numbers of heads and their size are attributes."""

    def __init__(self, width: int, size: int = 8, shared: int = 1) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = width // size, width // size // shared, size
        inner, fewer = self.num_heads * size, self.num_kv_heads * size
        self.q, self.k, self.v = nn.Linear(width, inner), nn.Linear(width, fewer), nn.Linear(width, fewer)
        self.proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.num_heads, self.head_dim)
        k = self.k(x).view(batch, length, self.num_kv_heads, self.head_dim)
        v = self.v(x).view(batch, length, self.num_kv_heads, self.head_dim)
        return self.proj(self.attend(q, k, v).reshape(batch, length, self.num_heads * self.head_dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class GroupedQueryAttention(SeparateAttention):
    """Two heads of queries share one of keys and values, as in Llama."""

    def __init__(self, width: int) -> None:
        super().__init__(width, shared=2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        times = self.num_heads // self.num_kv_heads
        return super().attend(q, k.repeat_interleave(times, 2), v.repeat_interleave(times, 2))


class EinsumAttention(SeparateAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bihd,bjhd->bhij", q, k) / self.head_dim**0.5
        return torch.einsum("bhij,bjhd->bihd", weights.softmax(-1), v)


def attend(make: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """Tokens through a layer of the builder's width."""
    return lambda width: tokens(lambda net, y: net.f(y), width, f=make(width))


class Mixer(nn.Module):
    """A block of MLP-Mixer on 16 patches: channels change places with tokens, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 2, 2)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_tokens, self.over_channels = MLP(16, 2 * width), MLP(width, 4 * width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).flatten(2).transpose(1, 2)
        y = y + self.over_tokens(self.norm1(y).transpose(1, 2)).transpose(1, 2)
        y = y + self.over_channels(self.norm2(y))
        return self.head(y.mean(1))


def encoder_layer(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, width // 8, 2 * width, dropout=0.0, batch_first=True)


def frozen_stem(width: int) -> Net:
    net = images(lambda n, y: n.f(y), width, f=square(width))
    net.a.requires_grad_(False)
    return net


def without_gradients(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.a(x).relu()
    return net.head(net.b(y).relu())


class Swish(torch.autograd.Function):
    """x * sigmoid(x), with a backward of its own."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = x.sigmoid()
        return gradient * gate * (1 + x * (1 - gate))


def steered(net: Net, y: Tensor) -> Tensor:
    return net.layer(y).relu() if y.abs().sum() > 0 else y


def pyramid(net: Net, x: Tensor) -> list[Tensor]:
    fine = net.a(x).relu()
    coarse = net.b(fine).relu()
    top = net.coarse(coarse)
    levels = [net.smooth(net.fine(fine) + F.interpolate(top, scale_factor=2)), net.smooth(top)]
    return [net.head(level) for level in levels]


def segment(net: Net, x: Tensor) -> Tensor:
    fine = net.norm(net.a(x)).relu()
    coarse = net.b(F.max_pool2d(fine, 2)).relu()
    large = F.interpolate(net.c(coarse).relu(), size=fine.shape[2:], mode="bilinear")
    return net.head(net.d(torch.cat([fine, large], 1)).relu())

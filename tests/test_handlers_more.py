"""Every handler, continued: fused attention, indexing, patches, complex numbers, distances, sampling, quantisation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
import torchvision.ops
from proof import Net, fits, summary
from test_handlers import FREE, HALVED, IMAGE, OUT, TOKENS, Case, c, check, on, tokens
from test_handlers_free import held
from torch import Tensor, nn
from versions import needs

from lightning_prune import find_groups, graph, prune
from lightning_prune.trace import SUBSTRATES

aten = torch.ops.aten
PICK = "is picked by number in aten.{}"


def frozen(reason: str) -> dict[str, int | str]:
    return {"a": reason, "head": OUT}


def attended(run: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    """Queries, keys and values of 4 heads of 3, 3 and 2, whose number stands in an attribute."""

    class Attended(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(3, 12), nn.Linear(3, 12), nn.Linear(3, 8)
            self.head, self.count = nn.Linear(8, 5), 4
            self.register_buffer("bias", torch.rand(4, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(2, (self.count, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.head(run(q, k, v, self.bias).transpose(1, 2).flatten(2))

    return Attended


ATTENTION: dict[str, Case] = {
    "scaled_dot_product_attention": (
        attended(lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v)),
        TOKENS,
        {"q": 4, "head": OUT},
    ),
    "with a bias for each head": (
        attended(lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, bias)),
        TOKENS,
        {"q": 4, "head": OUT},
    ),
    "causal": (
        attended(lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        TOKENS,
        {"q": 4, "head": OUT},
    ),
    "fused on a CPU": (
        attended(lambda q, k, v, bias: _flash(q, k, F.pad(v, (0, 1)))[..., :2]),
        TOKENS,
        {"q": 4, "head": OUT},
    ),
    "fused on a CPU, with a bias for each head": (
        attended(lambda q, k, v, bias: _flash(q, k, F.pad(v, (0, 1)), attn_mask=bias[None])[..., :2]),
        TOKENS,
        {"q": 4, "head": OUT},
    ),
    "fused on a CPU, causal": (
        attended(lambda q, k, v, bias: _flash(q, k, F.pad(v, (0, 1)), is_causal=True)[..., :2]),
        TOKENS,
        {"q": 4, "head": OUT},
    ),
}


def _flash(q: Tensor, k: Tensor, v: Tensor, **settings: object) -> Tensor:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **settings)[0]


SIX = torch.tensor([5, 0, 1, 1, 3, 2])

INDEXING: dict[str, Case] = {
    "rows by number": (tokens(lambda n, y: y[:, SIX]), TOKENS, FREE),
    "rows by two numbers": (tokens(lambda n, y: y[SIX % 2, SIX]), TOKENS, FREE),
    "rows by numbers with a gap": (on(lambda n, y: y[:, :, SIX][SIX % 2, :, :, SIX][..., None]), IMAGE, FREE),
    "channels by number": (tokens(lambda n, y: y[..., SIX], 6), TOKENS, frozen(PICK.format("index.Tensor"))),
    "a table of relative positions": (
        tokens(lambda n, y: y + n.table.value[SIX.unsqueeze(1) + SIX].mean(0), table=held(11, 8)),
        TOKENS,
        FREE,
    ),
    "rows that are written": (tokens(lambda n, y: _put(y.clone(), n.b(y)[:, :3]), b=nn.Linear(8, 8)), TOKENS, FREE),
    "rows that are added": (
        tokens(lambda n, y: aten.index_put(y, (None, SIX), n.b(y), True), b=nn.Linear(8, 8)),
        TOKENS,
        FREE,
    ),
    "one value for rows": (tokens(lambda n, y: aten.index_put(y, (None, SIX[:2]), y.new_zeros(()))), TOKENS, FREE),
    "channels that are written": (
        tokens(lambda n, y: aten.index_put(y, (None, None, SIX[:2]), y.new_zeros(()))),
        TOKENS,
        frozen(PICK.format("index_put.default")),
    ),
    "gather of rows": (
        tokens(lambda n, y: y.gather(1, SIX[None, :, None].expand(2, -1, y.shape[2]))),
        TOKENS,
        FREE,
    ),
    "gather of channels": (
        tokens(lambda n, y: y.gather(2, SIX.expand(2, 6, 6)), 6),
        TOKENS,
        frozen(PICK.format("gather.default")),
    ),
    "gather of some channels": (
        tokens(lambda n, y: y.gather(1, SIX[None, :, None].expand(2, -1, 5)), 5),
        TOKENS,
        frozen(PICK.format("gather.default")),
    ),
    "scatter of rows": (
        tokens(lambda n, y: y.scatter_add(1, SIX[None, :, None].expand(2, -1, y.shape[2]), n.b(y)), b=nn.Linear(8, 8)),
        TOKENS,
        FREE,
    ),
    "scatter_reduce of rows": (
        tokens(
            lambda n, y: y.scatter_reduce(1, SIX[None, :, None].expand(2, -1, y.shape[2]), n.b(y), "amax"),
            b=nn.Linear(8, 8),
        ),
        TOKENS,
        FREE,
    ),
    "scatter of channels": (
        tokens(lambda n, y: y.scatter(2, SIX[:2].expand(2, 6, 2), 0.5)),
        TOKENS,
        frozen(PICK.format("scatter.value")),
    ),
    "index_add of rows": (tokens(lambda n, y: y.index_add(1, SIX, n.b(y)), b=nn.Linear(8, 8)), TOKENS, FREE),
    "index_copy of rows": (
        tokens(lambda n, y: y.index_copy(1, SIX[:3], n.b(y)[:, :3]), b=nn.Linear(8, 8)),
        TOKENS,
        FREE,
    ),
    "index_fill of rows": (tokens(lambda n, y: y.index_fill(1, SIX[:2], 0.5)), TOKENS, FREE),
    "index_fill of channels": (
        tokens(lambda n, y: y.index_fill(2, SIX[:2], 0.5)),
        TOKENS,
        frozen(PICK.format("index_fill.int_Scalar")),
    ),
    "bags of embeddings": (
        lambda: Net(
            lambda n, x: n.head(n.a(x.abs().mul(3).long().flatten(1))), a=nn.EmbeddingBag(20, 8), head=nn.Linear(8, 5)
        ),
        TOKENS,
        FREE,
    ),
    "an embedding of an embedding's rank": (
        lambda: Net(
            lambda n, x: n.head(n.a(x.abs().long()) + n.b(torch.arange(x.shape[1]))[:, None]),
            **{"a": nn.Embedding(10, 8), "b": nn.Embedding(6, 8), "head": nn.Linear(8, 5)},
        ),
        TOKENS,
        FREE,
    ),
}


def _put(y: Tensor, rows: Tensor) -> Tensor:
    y[:, SIX[:3]] = rows
    return y


PATCHES: dict[str, Case] = {
    "pixel_shuffle": (on(lambda n, y: F.pixel_shuffle(y, 2), 2), IMAGE, {"a": 2, "head": OUT}),
    "pixel_unshuffle": (on(lambda n, y: F.pixel_unshuffle(y, 2), 32), IMAGE, FREE),
    "shuffled there and back": (
        on(lambda n, y: F.pixel_unshuffle(F.pixel_shuffle(y, 2), 2)),
        IMAGE,
        {"a": 2, "head": OUT},
    ),
    "channel_shuffle": (on(lambda n, y: F.channel_shuffle(y, 2)), IMAGE, HALVED),
    "channel_shuffle in a sum": (on(lambda n, y: y + F.channel_shuffle(y, 4)), IMAGE, {"a": 1, "head": OUT}),
    "im2col": (on(lambda n, y: F.unfold(y, 3)[..., None], 72), IMAGE, FREE),
    "im2col and back": (on(lambda n, y: F.fold(F.unfold(y, 3, padding=1), 6, 3, padding=1)), IMAGE, FREE),
    "col2im": (on(lambda n, y: F.fold(y.flatten(2)[..., :25], (6, 6), 2), 2), IMAGE, {"a": 2, "head": OUT}),
    "windows of space": (on(lambda n, y: y.unfold(2, 3, 1).mean(-1)), IMAGE, FREE),
    "windows of channels": (
        on(lambda n, y: y.unfold(1, 3, 1).mean(-1), 6),
        IMAGE,
        frozen("is cut into windows in aten.unfold.default"),
    ),
}

MOVEMENT: dict[str, Case] = {
    "triangle of space": (on(lambda n, y: y.tril() + y.triu(1) * 2), IMAGE, FREE),
    "triangle of channels": (
        tokens(lambda n, y: y.tril()),
        TOKENS,
        frozen("is masked by its position in aten.tril.default"),
    ),
    "diagonal of space": (on(lambda n, y: y.diagonal(0, 2, 3)[..., None]), IMAGE, FREE),
    "another diagonal of space": (on(lambda n, y: y.diagonal(1, -2, -1)[..., None]), IMAGE, FREE),
    "diagonal of what is multiplied": (
        tokens(lambda n, y: y @ torch.diag_embed(torch.diagonal(y.mT @ n.b(y), 0, 1, 2)), b=nn.Linear(8, 8)),
        TOKENS,
        FREE,
    ),
    "another diagonal of what is multiplied": (
        tokens(lambda n, y: y * torch.diagonal(y.mT @ n.b(y), 1, 1, 2).mean(), b=nn.Linear(8, 8)),
        TOKENS,
        {**dict.fromkeys("ab", "is read along a diagonal in aten.diagonal.default"), "head": OUT},
    ),
    "rotation by complex numbers": (
        on(lambda n, y: torch.view_as_real(torch.view_as_complex(y.unflatten(3, (3, 2))) * 1j).flatten(3)),
        IMAGE,
        FREE,
    ),
    "channels as complex numbers": (
        tokens(lambda n, y: torch.view_as_real(torch.view_as_complex(y.unflatten(2, (-1, 2))) * 1j).flatten(2)),
        TOKENS,
        HALVED,
    ),
    "channels as the parts of complex numbers": (
        tokens(
            lambda n, y: torch.view_as_real(
                torch.view_as_complex(y.unflatten(2, (2, -1)).mT.contiguous()) * 1j
            ).mT.flatten(2)
        ),
        TOKENS,
        HALVED,
    ),
    "stacked views": (on(lambda n, y: torch.hstack([y, n.b(y)]), 16, b=c(8, 8)), IMAGE, {"a": 8, "b": 8, "head": OUT}),
    "repeat_interleave of channels": (on(lambda n, y: y.repeat_interleave(2, 1), 16), IMAGE, FREE),
    "tile": (on(lambda n, y: y.tile(2, 1, 1), 16), IMAGE, FREE),
    "rotated images": (on(lambda n, y: y + torch.rot90(y, 1, (2, 3))), IMAGE, FREE),
    "atleast and broadcast": (
        on(lambda n, y: torch.add(*torch.broadcast_tensors(y, y.mean((0, 2, 3), keepdim=True)))),
        IMAGE,
        FREE,
    ),
}

POINTWISE: dict[str, Case] = {
    "complex and its parts": (
        tokens(lambda n, y: (torch.complex(y, n.b(y)) * 1j).real + torch.complex(y, y).conj().imag, b=nn.Linear(8, 8)),
        TOKENS,
        FREE,
    ),
    "polar": (tokens(lambda n, y: torch.polar(y.abs(), y).abs() * y.sgn()), TOKENS, FREE),
    "bucketize": (tokens(lambda n, y: y * torch.bucketize(y, torch.tensor([0.0, 1.0]).to(y))), TOKENS, FREE),
    "isin": (tokens(lambda n, y: y * (~torch.isin(y.long(), torch.tensor([5, 7]))).to(y)), TOKENS, FREE),
    "clamp, nan_to_num and copysign": (
        tokens(lambda n, y: torch.copysign(y.clamp(-1, 1).nan_to_num(), y) + y.clamp(y.mean(), None)),
        TOKENS,
        FREE,
    ),
    "threshold of a comparison": (tokens(lambda n, y: y * (y > y.mean(-1, keepdim=True))), TOKENS, FREE),
    "a scale for each channel": (tokens(lambda n, y: y.addcdiv(y, n.w.value + 2, value=0.5), w=held(8)), TOKENS, FREE),
}

CONTRACTION: dict[str, Case] = {
    "distances": (
        tokens(lambda n, y: torch.cdist(y, n.b(y)), 6, b=nn.Linear(8, 8)),
        TOKENS,
        FREE,
    ),
    "distances to prototypes": (
        tokens(lambda n, y: torch.cdist(y, n.w.value[None].expand(2, -1, -1)), 7, w=held(7, 8)),
        TOKENS,
        {"a": 8, "head": OUT, "w": 7},
    ),
    "bilinear": (
        tokens(lambda n, y: n.g(y, n.b(y)), 6, b=nn.Linear(8, 4), g=nn.Bilinear(8, 4, 6)),
        TOKENS,
        {"a": 8, "b": 4, "g": 6, "head": OUT},
    ),
    "bilinear form of one tensor": (
        tokens(lambda n, y: n.g(y, y), 6, g=nn.Bilinear(8, 8, 6, bias=False)),
        TOKENS,
        {"a": 8, "g": 6, "head": OUT},
    ),
    "baddbmm": (
        tokens(lambda n, y: torch.baddbmm(n.b(y), y, y.mT @ y), b=nn.Linear(8, 8)),
        TOKENS,
        FREE,
    ),
    "addbmm": (tokens(lambda n, y: torch.addbmm(y[0], y, y.mT @ y)), TOKENS, FREE),
    "mv and outer": (
        tokens(
            lambda n, y: y * torch.mv(n.w.value, n.v.value) + torch.outer(y[0, 0], n.v.value).mean(1),
            w=held(8, 6),
            v=held(6),
        ),
        TOKENS,
        {"a": 8, "head": OUT, "w": 6},
    ),
    "addmv and dot": (
        tokens(
            lambda n, y: y * torch.addmv(n.u.value, n.w.value, n.v.value) * torch.dot(n.v.value, n.v.value),
            **{"w": held(8, 6), "v": held(6), "u": held(8)},
        ),
        TOKENS,
        {"a": 8, "head": OUT, "w": 6},
    ),
    "tensordot": (
        tokens(lambda n, y: torch.tensordot(y, n.w.value, ([2], [1])), 6, w=held(6, 8)),
        TOKENS,
        {"a": 8, "w": 6, "head": OUT},
    ),
    "einsum with three": (
        tokens(lambda n, y: torch.einsum("btc,cd,ed->bte", y, n.w.value, n.v.value), 5, w=held(8, 6), v=held(5, 6)),
        TOKENS,
        {"a": 8, "w": 6, "v": 5, "head": OUT},
    ),
}

SAMPLING: dict[str, Case] = {
    "grid_sample": (on(lambda n, y: F.grid_sample(y, _grid(y), align_corners=False)), IMAGE, FREE),
    "a grid of its own making": (
        on(lambda n, y: F.grid_sample(y, n.b(y).tanh().permute(0, 2, 3, 1), align_corners=False), b=c(8, 2)),
        IMAGE,
        {"a": 8, "b": "is sampled in aten.grid_sampler_2d.default", "head": OUT},
    ),
    "roi_align": (on(lambda n, y: torchvision.ops.roi_align(y, _boxes(y), 3)), IMAGE, FREE),
    "roi_pool": (on(lambda n, y: torchvision.ops.roi_pool(y, _boxes(y), 3)), IMAGE, FREE),
    "fft of space": (on(lambda n, y: torch.fft.irfft2(torch.fft.rfft2(y) * 0.5, s=(6, 6)) + y), IMAGE, FREE),
    "fft of channels": (
        on(lambda n, y: y + torch.fft.fft(y, dim=1).real),
        IMAGE,
        frozen("is transformed in aten._fft_r2c.default"),
    ),
    "spectral convolution": (
        tokens(lambda n, y: torch.fft.irfft(torch.fft.rfft(y, dim=1) * n.w.value, n=6, dim=1), w=held(4, 8)),
        TOKENS,
        FREE,
    ),
}


def _grid(y: Tensor) -> Tensor:
    return F.affine_grid(torch.eye(2, 3)[None].expand(y.shape[0], -1, -1).to(y), [*y.shape], align_corners=False)


def _boxes(y: Tensor) -> Tensor:
    return torch.tensor([[0.0, 0, 0, 4, 4], [1, 1, 1, 5, 5]]).to(y)


REDUCTION: dict[str, Case] = {
    "aminmax": (tokens(lambda n, y: y - y.aminmax(dim=2, keepdim=True).min), TOKENS, FREE),
    "kthvalue over space": (on(lambda n, y: y + y.kthvalue(2, 2, keepdim=True).values), IMAGE, FREE),
    "kthvalue over channels": (on(lambda n, y: y + y.kthvalue(2, 1, keepdim=True).values), IMAGE, FREE),
    "cummax over space": (on(lambda n, y: y + y.cummax(2).values), IMAGE, FREE),
    "logcumsumexp over channels": (
        on(lambda n, y: y.logcumsumexp(1)),
        IMAGE,
        frozen("depends on the order of the channels in aten.logcumsumexp.default"),
    ),
    "any and all": (tokens(lambda n, y: y * (y > 0).any(2, True) + y * (y > -9).all(2, True)), TOKENS, FREE),
    "prod and nansum": (tokens(lambda n, y: y * y.prod(2, True) + y.nansum(2, keepdim=True)), TOKENS, FREE),
}

CASES = {
    f"{kind}: {name}": case
    for kind, table in {
        "attention": ATTENTION,
        "indexing": INDEXING,
        "patches": PATCHES,
        "movement": MOVEMENT,
        "pointwise": POINTWISE,
        "contraction": CONTRACTION,
        "sampling": SAMPLING,
        "reduction": REDUCTION,
    }.items()
    for name, case in table.items()
}


QUANTISATION: dict[str, Case] = {
    "for the tensor": (
        on(lambda n, y: y + torch.fake_quantize_per_tensor_affine(y, 0.1, 0, -128, 127)),
        IMAGE,
        FREE,
    ),
    "for the tensor, learnt": (
        on(
            lambda n, y: torch.fake_quantize_per_tensor_affine(
                y, y.new_ones(()), torch.zeros((), dtype=torch.int32), -128, 127
            )
        ),
        IMAGE,
        FREE,
    ),
    "for each channel": (
        on(
            lambda n, y: torch.fake_quantize_per_channel_affine(y, n.s.value, _zeros(y), 1, -128, 127),
            s=held(8, buffer=True),
        ),
        IMAGE,
        FREE,
    ),
}


def _zeros(y: Tensor) -> Tensor:
    return torch.zeros(y.shape[1], dtype=torch.int32)


@pytest.mark.parametrize("name", QUANTISATION)
def test_quantisation_that_is_only_pretended(name: str) -> None:
    """It has no rule for meta tensors in torch, so that such a model is read on fake ones."""
    build, shape, expected = QUANTISATION[name]
    net, x = build(), torch.randn(shape)
    groups = find_groups(net, x)
    assert fits(summary(groups), expected), summary(groups)
    prune(net, x, pruning_ratio=0.5)
    net(x).sum().backward()
    assert net.head.weight.grad.shape == (5, 4, 1, 1)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs("torch", "2.6", "has no derivative of `aminmax`")) if "aminmax" in name else name
        for name in CASES
    ],
)
def test_groups_are_found_proven_and_cut(name: str) -> None:
    check(*CASES[name])


@pytest.mark.parametrize("substrate", SUBSTRATES)
@pytest.mark.parametrize("name", CASES)
def test_all_substrates_find_the_same(name: str, substrate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, shape, expected = CASES[name]
    monkeypatch.setattr(graph, "SUBSTRATES", (substrate,))
    warned: AbstractContextManager[object] = nullcontext()
    if substrate == "real":
        warned = pytest.warns(UserWarning, match="depends on values")
    with warned:
        found = summary(find_groups(build(), torch.randn(shape)))
    assert fits(found, expected), found

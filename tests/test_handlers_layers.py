"""Every handler, continued: layers with weights, normalisations, pools, activations, weights used freely."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from proof import Net, summary
from test_handlers import FREE, HALVED, IMAGE, OUT, TOKENS, Case, Expected, c, check, on, tokens
from torch import Tensor, nn

from lightning_prune import find_groups

GROUPED: Expected = {"a": 4, "g": 6, "head": OUT}
BOTH: Expected = {"a": 8, "g": 12, "head": OUT}

CONTRACTION: dict[str, Case] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 3)),
        (3, 4),
        {"0": 8, "2": 6, "3": OUT},
    ),
    "linear without bias": (tokens(lambda n, y: n.g(y), 12, g=nn.Linear(8, 12, bias=False)), TOKENS, BOTH),
    "linear of one vector": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), (4,), {"0": 8, "1": OUT}),
    "residual": (on(lambda n, y: y + n.g(F.relu(n.f(y))), f=c(8, 6), g=c(6, 8)), IMAGE, {"a": 8, "f": 6, "head": OUT}),
    "strided and dilated": (on(lambda n, y: n.g(y), 12, g=c(8, 12, 3, stride=2, padding=2, dilation=2)), IMAGE, BOTH),
    "grouped": (on(lambda n, y: n.g(y), 12, g=c(8, 12, 3, groups=2, padding=1)), IMAGE, GROUPED),
    "grouped, one output each": (on(lambda n, y: n.g(y), 2, g=c(8, 2, groups=2)), IMAGE, {"a": 4, "g": 1, "head": OUT}),
    "depthwise": (on(lambda n, y: n.g(y), g=c(8, 8, 3, groups=8)), IMAGE, FREE),
    "depthwise, multiplier 2": (on(lambda n, y: n.g(y), 16, g=c(8, 16, 3, groups=8)), IMAGE, FREE),
    "depthwise on the raw input": (
        lambda: Net(lambda n, x: n.head(n.a(x)), a=c(3, 6, groups=3), head=c(6, 5)),
        IMAGE,
        {"a": "meets a dimension that holds no channels in aten.convolution.default", "head": OUT},
    ),
    "transposed": (on(lambda n, y: n.g(y), 12, g=nn.ConvTranspose2d(8, 12, 2, stride=2)), IMAGE, BOTH),
    "grouped transposed": (on(lambda n, y: n.g(y), 12, g=nn.ConvTranspose2d(8, 12, 2, groups=2)), IMAGE, GROUPED),
    "grouped transposed, one output each": (
        on(lambda n, y: n.g(y), 2, g=nn.ConvTranspose2d(8, 2, 2, groups=2)),
        IMAGE,
        {"a": 4, "g": "is a convolution group's only output channel in aten.convolution.default", "head": OUT},
    ),
    "depthwise transposed": (on(lambda n, y: n.g(y), g=nn.ConvTranspose2d(8, 8, 2, groups=8)), IMAGE, FREE),
    "depthwise transposed, multiplier 2": (
        on(lambda n, y: n.g(y), 16, g=nn.ConvTranspose2d(8, 16, 2, groups=8)),
        IMAGE,
        FREE,
    ),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 5, 1)), (2, 3, 9), {"0": 8, "1": OUT}),
    "three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(3, 8, 2), nn.Conv3d(8, 8, 1, groups=8), nn.Conv3d(8, 5, 1)),
        (2, 3, 4, 4, 4),
        {"0": 8, "2": OUT},
    ),
    "circular and reflecting borders": (
        on(
            lambda n, y: n.h(n.g(y)),
            6,
            g=c(8, 6, 3, padding=1, padding_mode="circular"),
            h=c(6, 6, 3, padding_mode="reflect"),
        ),
        IMAGE,
        {"a": 8, "g": 6, "h": 6, "head": OUT},
    ),
    "products of activations": (
        lambda: Net(
            lambda n, x: n.head(torch.bmm(n.q(x), n.k(x).mT).softmax(-1) @ n.v(x)), **_qkv(), head=nn.Linear(6, 5)
        ),
        TOKENS,
        {"q": 8, "v": 6, "head": OUT},
    ),
    "einsum": (
        lambda: Net(
            lambda n, x: n.head(torch.einsum("btc,bsc,bsd->btd", n.q(x), n.k(x), n.v(x))),
            **_qkv(),
            head=nn.Linear(6, 5),
        ),
        TOKENS,
        {"q": 8, "v": 6, "head": OUT},
    ),
    "embedding": (
        lambda: Net(lambda n, x: n.head(n.a(x.abs().long())), a=nn.Embedding(10, 8), head=nn.Linear(8, 5)),
        TOKENS,
        FREE,
    ),
}


def _qkv() -> dict[str, nn.Module]:
    return {"q": nn.Linear(3, 8), "k": nn.Linear(3, 8), "v": nn.Linear(3, 6)}


POOLS: dict[str, nn.Module] = {
    str(layer): layer
    for layer in (
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.LPPool2d(2, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d(3),
        nn.AdaptiveMaxPool2d(2),
        nn.FractionalMaxPool2d(2, output_size=3),
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=2, mode="nearest-exact"),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(scale_factor=2, mode="bicubic"),
        nn.ReflectionPad2d(1),
        nn.ReplicationPad2d(1),
        nn.ZeroPad2d(1),
        nn.ConstantPad2d(1, 0.5),
        nn.CircularPad2d(1),
    )
}

NORMS: dict[str, tuple[nn.Module, Expected]] = {
    str(layer): (layer, expected)
    for layer, expected in (
        (nn.BatchNorm2d(8), FREE),
        (nn.BatchNorm2d(8, affine=False), FREE),
        (nn.BatchNorm2d(8, track_running_stats=False), FREE),
        (nn.SyncBatchNorm(8), FREE),
        (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), FREE),
        (nn.GroupNorm(1, 8), FREE),
        (nn.GroupNorm(8, 8), FREE),
        (nn.GroupNorm(4, 8), {"a": 2, "head": OUT}),
        (nn.GroupNorm(2, 8), HALVED),
        (nn.LayerNorm([8, 6, 6]), FREE),
        (nn.LayerNorm(6), FREE),
        (nn.RMSNorm([8, 6, 6]), FREE),
        (nn.LocalResponseNorm(2), {"a": "is pooled or resampled in aten.avg_pool3d.default", "head": OUT}),
    )
}

ACTIVATIONS: dict[str, nn.Module] = {
    str(layer): layer
    for layer in (
        *(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(), nn.ELU(), nn.SELU(), nn.CELU(), nn.GELU()),
        *(nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Hardswish(inplace=True), nn.Hardsigmoid()),
        *(nn.Hardtanh(), nn.Hardshrink(), nn.Softplus(), nn.Softshrink(), nn.Softsign(), nn.Tanh(), nn.Tanhshrink()),
        *(nn.Sigmoid(), nn.LogSigmoid(), nn.Threshold(0.1, 0.0), nn.PReLU(), nn.PReLU(8), nn.RReLU(), nn.Identity()),
        *(nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout()),
        *(nn.Softmax(1), nn.LogSoftmax(1), nn.Softmin(1), nn.Softmax2d()),
    )
}


@pytest.mark.parametrize("name", CONTRACTION)
def test_contractions(name: str) -> None:
    check(*CONTRACTION[name])


@pytest.mark.parametrize("name", POOLS)
def test_pools_and_resampling_leave_channels_alone(name: str) -> None:
    check(on(lambda n, y: n.layer(y), layer=POOLS[name]), IMAGE, FREE)


@pytest.mark.parametrize("name", NORMS)
def test_normalisations(name: str) -> None:
    layer, expected = NORMS[name]
    check(on(lambda n, y: n.layer(y), layer=layer), IMAGE, expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    check(on(lambda n, y: n.layer(y), layer=ACTIVATIONS[name]), IMAGE, FREE)


@pytest.mark.parametrize("layer", [nn.LayerNorm(8), nn.RMSNorm(8), nn.PReLU()], ids=str)
def test_layers_on_tokens(layer: nn.Module) -> None:
    check(tokens(lambda n, y: n.layer(y), layer=layer), TOKENS, FREE)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(8), nn.MaxPool1d(2), nn.AvgPool1d(2), nn.AdaptiveMaxPool1d(3), nn.Upsample(12)], ids=str
)
def test_layers_of_one_dimension(layer: nn.Module) -> None:
    check(
        lambda: Net(lambda n, x: n.head(n.layer(n.a(x))), a=nn.Conv1d(3, 8, 1), layer=layer, head=nn.Conv1d(8, 5, 1)),
        (2, 3, 6),
        FREE,
    )


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm3d(8), nn.MaxPool3d(2), nn.AvgPool3d(2), nn.Upsample(scale_factor=2, mode="trilinear")],
    ids=str,
)
def test_layers_of_three_dimensions(layer: nn.Module) -> None:
    check(
        lambda: Net(lambda n, x: n.head(n.layer(n.a(x))), a=nn.Conv3d(3, 8, 1), layer=layer, head=nn.Conv3d(8, 5, 1)),
        (2, 3, 4, 4, 4),
        FREE,
    )


def test_pool_with_indices() -> None:
    pool = nn.MaxPool2d(2, return_indices=True)
    check(on(lambda n, y: n.pool(y)[0] + n.pool(y)[1].to(y), pool=pool), IMAGE, FREE)


@pytest.mark.parametrize("gate", [torch.sigmoid, F.silu, F.gelu], ids=lambda gate: gate.__name__)
def test_gated_units_by_chunk(gate: type[Tensor]) -> None:
    check(tokens(lambda n, y: torch.mul(gate(y.chunk(2, -1)[0]), y.chunk(2, -1)[1]), 4), TOKENS, HALVED)


def test_glu() -> None:
    check(tokens(lambda n, y: F.glu(y), 4), TOKENS, HALVED)


def test_the_kernel_is_no_channel() -> None:
    groups = find_groups(nn.Sequential(c(3, 8, 3), c(8, 5, 3)), torch.zeros(IMAGE))
    assert {member.dim for group in groups for member in group.members} == {0, 1}
    assert summary(groups) == {"0": 8, "1": OUT}

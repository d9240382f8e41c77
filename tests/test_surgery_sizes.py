"""Models with sizes written into their code: refused or right, never silently wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from proof import Net, outputs, randomise, relative_error
from test_surgery import zeroed
from torch import Tensor, nn

from lightning_prune import prune

TOKENS = torch.randn(3, 4, dtype=torch.float64)


def net_of(run: Callable[[Net, Tensor], object], **parts: nn.Module) -> Net:
    return randomise(Net(run, **parts).double()).eval()


def rest() -> dict[str, nn.Module]:
    """Layers that can be cut in any case."""
    return {"c": nn.Linear(4, 10), "d": nn.Linear(10, 5)}


REFUSED: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "view": (lambda n, y: y.view(3, 16), "aten.view.default"),
    "reshape": (lambda n, y: y.reshape(-1, 16), "aten.view.default"),
    "expand": (lambda n, y: y[..., None].expand(3, 16, 2).mean(-1), "aten.expand.default"),
    "split": (lambda n, y: torch.cat(y.split([4, 12], 1), 1), "aten.split_with_sizes.default"),
    "unpacking": (lambda n, y: torch.cat(_four(*y.split(4, 1)), 1), "aten.split"),
    "zeros": (lambda n, y: y + y.new_zeros(3, 16), "aten.new_zeros.default"),
    "normalized shape": (lambda n, y: F.layer_norm(y, (16,)), "aten.native_layer_norm.default"),
}


def _four(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    return a, b, c, d


@pytest.mark.parametrize("name", REFUSED)
def test_a_group_with_hard_coded_sizes_stays_and_the_rest_is_cut(name: str) -> None:
    run, operation = REFUSED[name]
    net = net_of(lambda n, x: n.b(run(n, n.a(x))) + n.d(n.c(x)), a=nn.Linear(4, 16), b=nn.Linear(16, 5), **rest())
    before = outputs(net.a, TOKENS)
    record = prune(net, TOKENS, pruning_ratio=0.5)
    held = {group: reason for group, reason in record.held_back.items() if not reason.startswith("frozen")}
    assert {group.partition("#")[0] for group in held} == {"a"}
    assert all(operation in reason for reason in held.values())
    assert (net.a.out_features, net.b.in_features, net.c.out_features, net.d.in_features) == (16, 16, 5, 5)
    assert relative_error(outputs(net.a, TOKENS), before) == 0
    net(TOKENS).sum().backward()


def test_the_record_counts_what_was_reached() -> None:
    net = net_of(lambda n, x: n.b(n.a(x).view(3, 16)) + n.d(n.c(x)), a=nn.Linear(4, 16), b=nn.Linear(16, 5), **rest())
    record = prune(net, TOKENS, pruning_ratio=0.5)
    assert record.reached == pytest.approx(5 / 26)
    assert record.channels["a"].after == 16
    assert record.channels["c"].removed == 0.5


PARTS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "misaligned slices": lambda n, y: n.b(y[:, :10]) + n.e(y[:, 10:]),
    "slices from behind": lambda n, y: n.b(y[:, :-6]) + n.e(y[:, -6:]),
    "a slice that is summed": lambda n, y: n.b(y[:, :10]).mul(0) + y[:, 10:].sum(1, keepdim=True) + n.e(y[:, 10:]),
    "uneven chunks": lambda n, y: n.b(y.split(10, 1)[0]) + n.e(y.split(10, 1)[1]),
}

WHOLE: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "halves by fixed slices": lambda n, y: torch.cat([y[:, :8].relu(), y[:, 8:16]], 1),
    "fixed chunks": lambda n, y: torch.cat([part.mul(place + 1) for place, part in enumerate(y.split(8, 1))], 1),
    "fixed blocks": lambda n, y: (
        y.view(3, -1, 8) * torch.arange(1, 17 // 8 + 1).to(y)[: y.shape[1] // 8, None]
    ).flatten(1),
    "a fixed slice that is written": lambda n, y: _first(y.clone(), 8),
    "a share that is written": lambda n, y: _first(y.clone(), y.shape[1] // 2),
}


def _first(y: Tensor, count: int) -> Tensor:
    y[:, :count] *= 3
    return y


SUMS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "a misaligned slice": lambda n, y: y[:, :10].sum(1, keepdim=True),
    "the rest of a slice": lambda n, y: y[:, 10:].sum(1, keepdim=True),
    "a quarter": lambda n, y: y[:, :4].sum(1, keepdim=True),
    "alternating signs": lambda n, y: y[:, :8].sum(1, keepdim=True) - y[:, 8:].sum(1, keepdim=True),
    "every third": lambda n, y: y[:, ::3].sum(1, keepdim=True),
    "every other of a strided slice": lambda n, y: y[:, ::2].sum(1, keepdim=True) * 2 - y[:, 1::2].sum(1, keepdim=True),
    "uneven split": lambda n, y: y.split(10, 1)[0].sum(1, keepdim=True),
    "a block of fixed width": lambda n, y: y.view(3, -1, 4).sum(2).square().sum(1, keepdim=True),
    "a fixed number of blocks": lambda n, y: y.view(3, 4, -1).sum(2).square().sum(1, keepdim=True),
    "interleaved blocks": lambda n, y: y.view(3, -1, 4).sum(1).square().sum(1, keepdim=True),
    "a cropped one": lambda n, y: F.pad(y, (-2, 0)).sum(1, keepdim=True),
    "shifted": lambda n, y: (y * y.roll(1, 1)).sum(1, keepdim=True),
    "norm of a part": lambda n, y: y[:, 3:12].norm(dim=1, keepdim=True),
    "narrow": lambda n, y: y.narrow(1, 2, 6).sum(1, keepdim=True),
    "unfolded": lambda n, y: y.unflatten(1, (4, 4)).sum(2).square().sum(1, keepdim=True),
}


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", PARTS)
def test_hard_coded_parts_are_refused_or_right(name: str, ratio: float) -> None:
    net = net_of(lambda n, x: PARTS[name](n, n.a(x)), a=nn.Linear(4, 16), b=nn.Linear(10, 5), e=nn.Linear(6, 5))
    dense = copy.deepcopy(net)
    record = prune(net, TOKENS, pruning_ratio=ratio)
    assert relative_error(outputs(net, TOKENS), outputs(zeroed(dense, record, {"a": 0}), TOKENS)) < 1e-12


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", WHOLE)
def test_parts_that_are_put_together_again_are_refused_or_right(name: str, ratio: float) -> None:
    net = net_of(lambda n, x: n.b(WHOLE[name](n, n.a(x))), a=nn.Linear(4, 16), b=nn.Linear(16, 5))
    dense = copy.deepcopy(net)
    record = prune(net, TOKENS, pruning_ratio=ratio)
    assert "share" not in name or record.reached > 0
    assert relative_error(outputs(net, TOKENS), outputs(zeroed(dense, record, {"a": 0}), TOKENS)) < 1e-12


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", SUMS)
def test_sums_over_hard_coded_parts_are_refused_or_right(name: str, ratio: float) -> None:
    net = net_of(lambda n, x: n.b(SUMS[name](n, n.a(x))) + n.d(n.c(x)), a=nn.Linear(4, 16), b=nn.Linear(1, 5), **rest())
    dense = copy.deepcopy(net)
    record = prune(net, TOKENS, pruning_ratio=ratio)
    assert net.c.out_features == 10 - int(10 * ratio + 0.5)
    assert relative_error(outputs(net, TOKENS), outputs(zeroed(dense, record, {"a": 0, "c": 0}), TOKENS)) < 1e-12


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_a_convolution_group_may_keep_one_channel(ratio: float) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1, groups=4), nn.Conv2d(16, 5, 1))
    record = prune(net, torch.randn(2, 3, 4, 4), pruning_ratio=ratio)
    assert record.reached == ratio
    assert net[1].weight.shape[1] == 4 * (1 - ratio)


@pytest.mark.parametrize("widths", [(8, 2), (2, 2), (2, 8)])
def test_a_part_of_a_concat_may_keep_one_channel(widths: tuple[int, int]) -> None:
    net = net_of(
        lambda n, x: n.b(torch.cat([n.a(x), n.e(x)], 1)),
        a=nn.Linear(4, widths[0]),
        e=nn.Linear(4, widths[1]),
        b=nn.Linear(sum(widths), 5),
    )
    dense = copy.deepcopy(net)
    record = prune(net, TOKENS, pruning_ratio=0.5)
    assert record.reached == 0.5
    assert relative_error(outputs(net, TOKENS), outputs(zeroed(dense, record, {"a": 0, "e": 0}), TOKENS)) < 1e-12


def test_what_is_left_after_refusals_may_be_too_small_to_cut() -> None:
    net = net_of(
        lambda n, x: n.b(n.a(x).view(3, 16)) + n.d(n.c(x).sum(1, keepdim=True)),
        a=nn.Linear(4, 16),
        b=nn.Linear(16, 5),
        c=nn.Linear(4, 2),
        d=nn.Linear(1, 5),
    )
    record = prune(net, TOKENS, pruning_ratio=0.8)
    assert "aten.view.default" in record.held_back["a"]
    assert record.channels["c"].after == 1
    assert net(TOKENS).shape == (3, 5)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(8, elementwise_affine=False),
        nn.GroupNorm(8, 8, affine=False),
        nn.GroupNorm(2, 8, affine=False),
        nn.BatchNorm1d(8, affine=False),
        nn.BatchNorm1d(8, affine=False, track_running_stats=False),
    ],
    ids=str,
)
def test_normalisations_without_weights_follow_or_stay(norm: nn.Module) -> None:
    net = Net(lambda n, x: n.b(n.norm(n.a(x))), a=nn.Linear(4, 8), norm=norm, b=nn.Linear(8, 5)).double()
    record = prune(net, TOKENS, pruning_ratio=0.5)
    assert net.a.out_features == (8 if "a" in record.held_back else 4)
    net(TOKENS).sum().backward()

"""Every handler: the groups that it should find, worked out by hand, and the proof that they are right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from proof import Net, fits, prove, summary
from torch import Tensor, nn

from lightning_prune import find_groups, graph, prune
from lightning_prune.inputs import tensors_in
from lightning_prune.trace import SUBSTRATES

OUT = "reaches the model's output"
CROPPED = "is cropped by a fixed number in aten.constant_pad_nd.default"
Expected = dict[str, int | str]
Case = tuple[Callable[[], nn.Module], tuple[int, ...], Expected]


def c(inner: int, outer: int, kernel: int = 1, **further: object) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, kernel, **further)


def on(run: Callable[[Net, Tensor], Tensor], head: int = 8, **parts: nn.Module) -> Callable[[], nn.Module]:
    """A net `a` -> run -> `head`, where run gets the net and what `a` returns: 8 channels of images."""
    own = {"a": c(3, 8), **parts}
    return lambda: copy.deepcopy(Net(lambda net, x: net.head(run(net, net.a(x))), **own, head=c(head, 5)))


def tokens(run: Callable[[Net, Tensor], Tensor], head: int = 8, **parts: nn.Module) -> Callable[[], nn.Module]:
    """The same on sequences of 6 tokens: a Linear before and one behind."""
    own = {"a": nn.Linear(3, 8), **parts}
    return lambda: copy.deepcopy(Net(lambda net, x: net.head(run(net, net.a(x))), **own, head=nn.Linear(head, 5)))


IMAGE, TOKENS = (2, 3, 6, 6), (2, 6, 3)
FREE: Expected = {"a": 8, "head": OUT}
HALVED: Expected = {"a": 4, "head": OUT}

MOVEMENT: dict[str, Case] = {
    "nested concat": (on(lambda n, y: torch.cat([torch.cat([y, F.relu(y)], 1), y], 1), 24), IMAGE, FREE),
    "concat of two": (
        lambda: Net(lambda n, x: n.head(torch.cat([n.a(x), n.b(x)], 1)), a=c(3, 4), b=c(3, 6), head=c(10, 5)),
        IMAGE,
        {"a": 4, "b": 6, "head": OUT},
    ),
    "concat of the same tensor": (on(lambda n, y: torch.cat([y, y], 1), 16), IMAGE, FREE),
    "concat along another dimension": (on(lambda n, y: torch.cat([y, n.b(y)], 2), b=c(8, 8)), IMAGE, FREE),
    "concat with the raw input": (
        lambda: Net(lambda n, x: n.head(torch.cat([x, n.a(x)], 1)), a=c(3, 4), head=c(7, 5)),
        IMAGE,
        {"a": 4, "head": OUT},
    ),
    "sum with a concat with the raw input": (
        lambda: Net(lambda n, x: n.head(torch.cat([x, n.a(x)], 1) + n.b(x)), a=c(3, 4), b=c(3, 7), head=c(7, 5)),
        IMAGE,
        {"a": 4, "b": "is aligned with a part that holds no channels in aten.cat.default", "head": OUT},
    ),
    "chunk": (on(lambda n, y: torch.mul(*y.chunk(2, 1)), 4), IMAGE, HALVED),
    "split": (on(lambda n, y: torch.mul(*y.split(y.shape[1] // 2, 1)), 4), IMAGE, HALVED),
    "tensor_split": (on(lambda n, y: torch.mul(*y.tensor_split(2, 1)), 4), IMAGE, HALVED),
    "chunk along another dimension": (on(lambda n, y: torch.mul(*y.chunk(2, 2))), IMAGE, FREE),
    "stack": (on(lambda n, y: torch.stack([y, n.b(y)], 2).sum(2), b=c(8, 8)), IMAGE, FREE),
    "unbind of a stack": (on(lambda n, y: torch.mul(*torch.stack([y, n.b(y)]).unbind(0)), b=c(8, 8)), IMAGE, FREE),
    "unbind of halves": (on(lambda n, y: torch.mul(*y.unflatten(1, (2, -1)).unbind(1)), 4), IMAGE, HALVED),
    "unbind of channels": (
        on(lambda n, y: torch.stack(y.unbind(1), 1)),
        IMAGE,
        {"a": "is read by its number in aten.unbind.int", "head": OUT},
    ),
    "halves by slices": (
        on(lambda n, y: y[:, : y.shape[1] // 2] * y[:, y.shape[1] // 2 :].tanh(), 4),
        IMAGE,
        HALVED,
    ),
    "a quarter by a slice": (on(lambda n, y: y[:, : y.shape[1] // 4], 2), IMAGE, {"a": 2, "head": OUT}),
    "strided slices": (on(lambda n, y: y[:, ::2] * y[:, 1::2].tanh(), 4), IMAGE, HALVED),
    "slices of space": (on(lambda n, y: y[:, :, 1:-1, ::2]), IMAGE, FREE),
    "select of space": (on(lambda n, y: y[:, :, 0][..., None]), IMAGE, FREE),
    "select of a channel": (
        on(lambda n, y: y * y[:, 0:1].mean() + y[:, 3].mean()),
        IMAGE,
        {"a": "is read by its number in aten.select.int", "head": OUT},
    ),
    "narrow": (on(lambda n, y: y.narrow(1, 0, y.shape[1] // 2), 4), IMAGE, HALVED),
    "permute": (
        lambda: Net(
            lambda n, x: n.head(n.b(n.a(x).permute(0, 2, 3, 1))), a=c(3, 8), b=nn.Linear(8, 6), head=nn.Linear(6, 5)
        ),
        IMAGE,
        {"a": 8, "b": 6, "head": OUT},
    ),
    "transposes": (
        tokens(lambda n, y: n.b(y.mT).transpose(1, 2), 6, b=nn.Conv1d(8, 6, 1)),
        TOKENS,
        {"a": 8, "b": 6, "head": OUT},
    ),
    "movedim and swapaxes": (on(lambda n, y: y.movedim(1, -1).swapaxes(-1, 1)), IMAGE, FREE),
    "flip of space": (on(lambda n, y: y + y.flip(2, 3)), IMAGE, FREE),
    "flip of channels": (on(lambda n, y: y.flip(1)), IMAGE, FREE),
    "sum with flipped channels": (on(lambda n, y: y + 2 * y.flip(1)), IMAGE, HALVED),
    "roll of space": (on(lambda n, y: y + y.roll((1, 1), (2, 3))), IMAGE, FREE),
    "roll of channels": (
        on(lambda n, y: y.roll(1, 1)),
        IMAGE,
        {"a": "is shifted by a fixed number in aten.roll.default", "head": OUT},
    ),
    "index_select of space": (on(lambda n, y: y.index_select(2, torch.tensor([1, 0]))), IMAGE, FREE),
    "index_select of channels": (
        on(lambda n, y: y.index_select(1, torch.tensor([5, 0, 2])), 3),
        IMAGE,
        {"a": "is picked by number in aten.index_select.default", "head": OUT},
    ),
    "spatial padding": (on(lambda n, y: F.pad(y, (1, 2, 0, 1))), IMAGE, FREE),
    "padding of channels": (
        on(lambda n, y: F.pad(y, (0, 0, 0, 0, 2, 2)) + n.b(y), 12, b=c(8, 12)),
        IMAGE,
        {
            "a": 8,
            "b": "is aligned with a fixed number of padded positions in aten.constant_pad_nd.default",
            "head": OUT,
        },
    ),
    "cropping of channels": (
        on(lambda n, y: F.pad(y, (0, 0, 0, 0, -1, -1)), 6),
        IMAGE,
        {"a": CROPPED, "a#2": CROPPED, "head": OUT},
    ),
    "other memory format": (
        on(lambda n, y: y.contiguous(memory_format=torch.channels_last).contiguous().clone()),
        IMAGE,
        FREE,
    ),
}

RESHAPE: dict[str, Case] = {
    "flatten": (
        lambda: nn.Sequential(c(3, 8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)),
        IMAGE,
        {"0": 8, "3": OUT},
    ),
    "flatten of one position": (
        lambda: nn.Sequential(c(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
        IMAGE,
        {"0": 8, "3": OUT},
    ),
    "flatten with the channels last": (
        lambda: Net(lambda n, x: n.head(n.a(x).permute(0, 2, 3, 1).flatten(1)), a=c(3, 8), head=nn.Linear(288, 5)),
        IMAGE,
        {"a": 8, "head": OUT},
    ),
    "channel shuffle": (on(lambda n, y: y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)), IMAGE, HALVED),
    "view to groups and back": (
        on(lambda n, y: y.unflatten(1, (2, -1)).tanh().flatten(1, 2)),
        IMAGE,
        HALVED,
    ),
    "squeeze and unsqueeze": (
        on(lambda n, y: y.mean((2, 3)).unsqueeze(-1).unsqueeze(-1).squeeze(-1)[..., None]),
        IMAGE,
        FREE,
    ),
    "patches": (on(lambda n, y: y.flatten(2).transpose(1, 2).transpose(1, 2).reshape(y.shape)), IMAGE, FREE),
    "expand of space": (on(lambda n, y: y + y.mean((2, 3), keepdim=True).expand(-1, -1, 6, 6)), IMAGE, FREE),
    "expand to channels": (on(lambda n, y: y * y.mean(1, keepdim=True).expand_as(y)), IMAGE, FREE),
    "repeat of channels": (on(lambda n, y: y.repeat(1, 2, 1, 1), 16), IMAGE, FREE),
    "repeat to channels": (on(lambda n, y: y + y.mean(1, keepdim=True).repeat(1, y.shape[1], 1, 1)), IMAGE, FREE),
    "repeat in space": (on(lambda n, y: y.repeat(1, 1, 2, 1)), IMAGE, FREE),
    "attention heads": (
        lambda: Net(_attention, q=nn.Linear(3, 8), k=nn.Linear(3, 8), v=nn.Linear(3, 12), head=nn.Linear(12, 5)),
        TOKENS,
        {"q": 2, "head": OUT},
    ),
}


def _attention(net: Net, x: Tensor) -> Tensor:
    """Two heads, each with its queries, keys and values."""
    q, k, v = (layer(x).unflatten(2, (-1, d)).transpose(1, 2) for layer, d in ((net.q, 4), (net.k, 4), (net.v, 6)))
    return net.head((torch.softmax(q @ k.transpose(2, 3), -1) @ v).transpose(1, 2).flatten(2))


FACTORIES: dict[str, Case] = {
    "ones": (on(lambda n, y: y * torch.ones(y.shape)), IMAGE, FREE),
    "full": (on(lambda n, y: y + torch.full((y.shape[1], 1, 1), 0.5)), IMAGE, FREE),
    "zeros_like": (on(lambda n, y: y + torch.zeros_like(y)), IMAGE, FREE),
    "ones_like then scaled": (on(lambda n, y: y + torch.ones_like(y).mul_(3)), IMAGE, FREE),
    "new_zeros in a concat": (on(lambda n, y: torch.cat([y, y.new_zeros(2, 4, 6, 6)], 1), 12), IMAGE, FREE),
    "a buffer that is written": (
        on(lambda n, y: _written(torch.zeros(2, y.shape[1], 6, 6, dtype=y.dtype), y)),
        IMAGE,
        FREE,
    ),
    "a new_empty that is written": (on(lambda n, y: _written(y.new_empty(y.shape), y)), IMAGE, FREE),
    "halves that are written": (
        on(lambda n, y: _two_halves(y, n.b(y)), 16, b=c(8, 8)),
        IMAGE,
        FREE,
    ),
    "a flattened sum with zeros": (
        lambda: Net(lambda n, x: n.head(_plus_zeros(n.a(x)).flatten(1)), a=c(3, 4), head=nn.Linear(144, 5)),
        IMAGE,
        {"a": 4, "head": OUT},
    ),
    "a counter": (
        on(lambda n, y: y * torch.arange(y.shape[1])[:, None, None]),
        IMAGE,
        {"a": "meets a dimension that holds no channels in aten.mul.Tensor", "head": OUT},
    ),
    "a counter that is written": (
        on(lambda n, y: _written(torch.arange(y.numel()).to(y).view(y.shape), y)),
        IMAGE,
        {"a": "meets a dimension that holds no channels in aten.copy_.default", "head": OUT},
    ),
}


def _plus_zeros(y: Tensor) -> Tensor:
    return y + torch.zeros(y.shape)


def _written(buffer: Tensor, y: Tensor) -> Tensor:
    buffer[:, : y.shape[1]] = y
    return buffer


def _two_halves(y: Tensor, z: Tensor) -> Tensor:
    buffer = torch.zeros(y.shape[0], 2 * y.shape[1], *y.shape[2:], dtype=y.dtype)
    buffer[:, : y.shape[1]] = y
    buffer[:, y.shape[1] :] = z
    return buffer


CASES = {**MOVEMENT, **RESHAPE, **FACTORIES}


@pytest.mark.parametrize("name", CASES)
def test_groups_are_found_proven_and_cut(name: str) -> None:
    check(*CASES[name])


def check(build: Callable[[], nn.Module], shape: tuple[int, ...], expected: Expected) -> None:
    """Assert that a net has the expected groups on every substrate, that they are proven, and that they can be cut."""
    net, x = build(), torch.randn(shape)
    groups = find_groups(net, x)
    assert fits(summary(groups), expected), summary(groups)
    prove(net, x, groups)
    if any(size != 1 for size in expected.values() if isinstance(size, int)):
        record = prune(net, x, pruning_ratio=0.5)
        frozen = {name for name, found in expected.items() if isinstance(found, str)}
        assert set(record.held_back) == frozen
        sum(result.sum() for result in tensors_in(net(x))).backward()


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


@pytest.mark.parametrize("uneven", [(3, 5), (1, 7), (2, 2, 4)])
def test_uneven_parts_are_groups_of_their_own(uneven: tuple[int, ...]) -> None:
    heads = {f"head{place}": c(size, 5) for place, size in enumerate(uneven)}
    net = Net(
        lambda n, x: [getattr(n, h)(y) for h, y in zip(heads, n.a(x).split(uneven, 1), strict=True)], a=c(3, 8), **heads
    )
    x = torch.randn(IMAGE)
    groups = find_groups(net, x)
    names = ["a"] + [f"a#{place}" for place in range(2, len(uneven) + 1)]
    assert {name: size for name, size in summary(groups).items() if size != OUT} == dict(
        zip(names, uneven, strict=True)
    )
    prove(net, x, groups)


def test_positions_after_concat_and_flatten_are_worked_out() -> None:
    net = Net(
        lambda n, x: n.head(torch.cat([n.a(x), n.b(x), n.a(x)], 1).flatten(1)),
        a=c(3, 2),
        b=c(3, 1),
        head=nn.Linear(20, 5),
    )
    groups = {group.name: group for group in find_groups(net, torch.zeros(1, 3, 2, 2))}
    assert [str(member) for member in groups["a"].members] == [
        "a.weight [dim 0]",
        "a.bias [dim 0]",
        "head.weight [dim 1, 8 positions a channel]",
    ]
    assert groups["a"].members[2].positions.tolist() == [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 16, 17, 18, 19]]


def test_positions_after_a_flip_are_worked_out() -> None:
    groups = find_groups(on(lambda n, y: y.flip(1))(), torch.zeros(IMAGE))
    member = next(member for member in groups[0].members if member.tensor == "head.weight")
    assert member.positions.flatten().tolist() == [7, 6, 5, 4, 3, 2, 1, 0]

"""Every handler, continued: pointwise operations, reductions, weights that are used freely, and unknown operations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from proof import Net, prove, summary
from test_handlers import FREE, IMAGE, OUT, TOKENS, Case, c, check, on, tokens
from torch import Tensor, nn

from lightning_prune import find_groups, prune


class Holder(nn.Module):
    """A raw parameter or buffer in a module of its own."""

    def __init__(self, value: Tensor, *, buffer: bool = False) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("value", value)
        else:
            self.value = nn.Parameter(value)


def held(*shape: int, buffer: bool = False) -> Holder:
    return Holder(torch.rand(shape), buffer=buffer)


def standardised(weight: Tensor) -> Tensor:
    flat = weight.flatten(1)
    return (weight - flat.mean(1)[:, None, None, None]) / (flat.std(1)[:, None, None, None] + 1e-5)


POINTWISE: dict[str, Case] = {
    "squeeze and excitation": (
        on(
            lambda n, y: y * torch.sigmoid(n.up(F.relu(n.down(y.mean((2, 3), keepdim=True))))), down=c(8, 4), up=c(4, 8)
        ),
        IMAGE,
        {"a": 8, "down": 4, "head": OUT},
    ),
    "in place": (on(lambda n, y: y.add_(n.b(y.clone())).mul_(2).relu_(), b=c(8, 8)), IMAGE, FREE),
    "where": (on(lambda n, y: torch.where(y > 0, y, n.b(y)), b=c(8, 8)), IMAGE, FREE),
    "masked_fill": (on(lambda n, y: y.masked_fill(y > 0.5, 0.0)), IMAGE, FREE),
    "lerp, addcmul and maximum": (
        on(lambda n, y: torch.maximum(torch.lerp(y, n.b(y), 0.3), torch.addcmul(y, y, n.b(y))), b=c(8, 8)),
        IMAGE,
        FREE,
    ),
    "broadcast of one channel": (
        on(lambda n, y: y * torch.sigmoid(n.b(y)), b=c(8, 1)),
        IMAGE,
        {"a": 8, "b": 1, "head": OUT},
    ),
    "other dtype": (on(lambda n, y: (y > 0).to(y.dtype) * y.double().to(y)), IMAGE, FREE),
    "detach": (on(lambda n, y: y.detach() + y), IMAGE, FREE),
    "layer scale": (on(lambda n, y: n.gamma.value * y, gamma=held(8, 1, 1)), IMAGE, FREE),
    "scaled by a buffer": (on(lambda n, y: n.gamma.value * y, gamma=held(8, 1, 1, buffer=True)), IMAGE, FREE),
    "scaled by a raw vector": (tokens(lambda n, y: n.gamma.value * y, gamma=held(8)), TOKENS, FREE),
    "sum with a constant": (
        on(lambda n, y: y + torch.tensor([1.0] * 8).to(y)[:, None, None]),
        IMAGE,
        {"a": "meets a dimension that holds no channels in aten.add.Tensor", "head": OUT},
    ),
}

REDUCTION: dict[str, Case] = {
    "softmax over channels": (on(lambda n, y: y.softmax(1)), IMAGE, FREE),
    "mean over channels": (on(lambda n, y: y.mean(1, keepdim=True), 1), IMAGE, FREE),
    "sum over channels": (on(lambda n, y: y - y.sum(1, keepdim=True)), IMAGE, FREE),
    "variance over channels": (
        on(lambda n, y: (y - y.mean(1, True)) / (y.var(1, keepdim=True) + 1).sqrt()),
        IMAGE,
        FREE,
    ),
    "var_mean and std_mean": (
        on(lambda n, y: y * torch.var_mean(y, 1, keepdim=True)[1] + torch.std_mean(y)[0]),
        IMAGE,
        FREE,
    ),
    "maximum over channels": (on(lambda n, y: y / y.amax(1, keepdim=True).exp()), IMAGE, FREE),
    "values of max": (on(lambda n, y: y + y.max(1, keepdim=True).values + y.max()), IMAGE, FREE),
    "values of min and median": (on(lambda n, y: y + y.min(1, True).values * y.median(1, True).values), IMAGE, FREE),
    "log of summed exponentials": (on(lambda n, y: y - y.logsumexp(1, keepdim=True)), IMAGE, FREE),
    "norm over channels": (on(lambda n, y: y / (1 + y.norm(dim=1, keepdim=True))), IMAGE, FREE),
    "normalize over channels": (on(lambda n, y: F.normalize(y, dim=1)), IMAGE, FREE),
    "normalize over space": (on(lambda n, y: F.normalize(y, dim=2)), IMAGE, FREE),
    "pooling over space": (on(lambda n, y: y.mean((2, 3))[..., None, None]), IMAGE, FREE),
    "argmax over channels": (
        on(lambda n, y: y * (y.argmax(1, keepdim=True) == 0)),
        IMAGE,
        {"a": "is addressed by number after aten.argmax.default", "head": OUT},
    ),
    "indices of max": (
        on(lambda n, y: y + y.max(1, keepdim=True).indices),
        IMAGE,
        {"a": "is addressed by number after aten.max.dim", "head": OUT},
    ),
    "argmax over space": (on(lambda n, y: y * y.argmax(2, keepdim=True)), IMAGE, FREE),
    "cumulated over channels": (
        on(lambda n, y: y.cumsum(1)),
        IMAGE,
        {"a": "depends on the order of the channels in aten.cumsum.default", "head": OUT},
    ),
    "topk of channels": (
        on(lambda n, y: y.topk(3, dim=1).values, 3),
        IMAGE,
        {"a": "depends on the order of the channels in aten.topk.default", "head": OUT},
    ),
    "sorted and cumulated over space": (on(lambda n, y: y.sort(2).values.cumsum(3)), IMAGE, FREE),
}

WEIGHTS: dict[str, Case] = {
    "convolution with a raw parameter": (
        on(lambda n, y: F.conv2d(y, n.w.value, padding=1), 6, w=held(6, 8, 3, 3)),
        IMAGE,
        {"a": 8, "w": 6, "head": OUT},
    ),
    "linear with a raw parameter": (
        tokens(lambda n, y: y @ n.w.value, 6, w=held(8, 6)),
        TOKENS,
        {"a": 8, "w": 6, "head": OUT},
    ),
    "a module used twice": (tokens(lambda n, y: n.g(n.g(y)), g=nn.Linear(8, 8)), TOKENS, FREE),
    "standardised weight": (
        on(lambda n, y: F.conv2d(y, standardised(n.w.value)), 6, w=held(6, 8, 3, 3)),
        IMAGE,
        {"a": 8, "w": 6, "head": OUT},
    ),
    "masked weight": (
        on(
            lambda n, y: F.conv2d(y, n.w.value * n.mask.value),
            6,
            w=held(6, 8, 1, 1),
            mask=held(6, 8, 1, 1, buffer=True),
        ),
        IMAGE,
        {"a": 8, "w": 6, "head": OUT},
    ),
    "stacked weights": (
        tokens(lambda n, y: y @ torch.cat([n.w.value, n.v.value], 1), 10, w=held(8, 4), v=held(8, 6)),
        TOKENS,
        {"a": 8, "w": 4, "v": 6, "head": OUT},
    ),
    "weight as a sum": (
        tokens(
            lambda n, y: y @ (n.w.value + n.down.value @ n.up.value), 6, w=held(8, 6), down=held(8, 2), up=held(2, 6)
        ),
        TOKENS,
        {"a": 8, "up": 6, "head": OUT, "down": 2},
    ),
}

CASES = {**POINTWISE, **REDUCTION, **WEIGHTS}


@pytest.mark.parametrize("name", CASES)
def test_groups_are_found_proven_and_cut(name: str) -> None:
    check(*CASES[name])


def test_tied_weights_are_one_member() -> None:
    net = Net(
        lambda n, i: n.out(n.mid(n.emb(i))),
        emb=nn.Embedding(10, 8),
        mid=nn.Linear(8, 8),
        out=nn.Linear(8, 10, bias=False),
    )
    net.out.weight = net.emb.weight
    tokens_in = torch.randint(0, 10, (3, 4))
    groups = find_groups(net, tokens_in)
    found = summary(groups)
    assert (found["emb"], len(found)) == (8, 2)
    assert "picked by number in aten.embedding.default" in str(found["emb#2"])
    assert [member.tensor for member in groups[0].members] == ["emb.weight", "mid.weight", "mid.weight", "mid.bias"]
    prove(net, tokens_in, groups)
    prune(net, tokens_in, pruning_ratio=0.5)
    assert net.out.weight is net.emb.weight
    assert net.emb.weight.shape == (10, 4)
    assert (net.out.in_features, net.emb.embedding_dim, net.mid.in_features, net.mid.out_features) == (4, 4, 4, 4)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_parametrised_weights(kind: str) -> None:
    layer = getattr(nn.utils.parametrizations, kind)(nn.Linear(8, 6))
    net = Net(lambda n, x: n.head(n.g(n.a(x))), a=nn.Linear(3, 8), g=layer, head=nn.Linear(6, 5))
    x = torch.randn(2, 3)
    groups = find_groups(net, x)
    assert sorted(group.size for group in groups if not group.frozen) == [6, 8]
    prove(net, x, groups)
    kinds = [type(module) for module in net.modules()]
    prune(net, x, pruning_ratio=0.5)
    assert [type(module) for module in net.modules()] == kinds
    assert net.g.weight.shape == (3, 4)
    assert (net.g.in_features, net.g.out_features, net.head.in_features) == (4, 3, 3)


def test_a_parametrisation_of_which_only_some_tensors_are_cut() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 5)))
    assert prune(net, torch.randn(2, 3), pruning_ratio=0.5).reached == 0.5
    assert (net[1].in_features, net[1].weight.shape) == (4, (5, 4))


UNKNOWN = {
    "renorm": lambda n, y: y.renorm(2, 1, 1.0),
    "linalg_svd": lambda n, y: y * torch.linalg.svdvals(y)[..., None],
    "linalg_qr": lambda n, y: torch.linalg.qr(y)[0],
}


@pytest.mark.parametrize("operation", UNKNOWN)
def test_an_operation_without_a_handler_freezes_and_is_named(operation: str) -> None:
    net, x = on(UNKNOWN[operation])(), torch.randn(IMAGE)
    with pytest.warns(UserWarning, match=rf"No handler for .*aten\._?({operation})"):
        groups = find_groups(net, x)
    found = summary(groups)
    assert set(found) == {"a", "head"}
    assert "has no handler" in str(found["a"])
    prove(net, x, groups)


def test_an_unknown_form_of_a_known_operation_freezes_and_is_named() -> None:
    net = on(lambda n, y: torch.as_strided(y, y.shape, (1, 72, 2, 12)))()
    with pytest.warns(UserWarning, match="aten.as_strided"):
        found = summary(find_groups(net, torch.randn(IMAGE)))
    assert "in a form that its handler does not know (strides of no known memory format)" in str(found["a"])


def test_a_wrong_group_fails_the_proof() -> None:
    net, x = on(lambda n, y: y)(), torch.randn(IMAGE)
    group, *others = find_groups(net, x)
    prove(net, x, [group])
    for missing in range(len(group.members)):
        wrong = copy.copy(group)
        object.__setattr__(wrong, "members", group.members[:missing] + group.members[missing + 1 :])
        with pytest.raises(AssertionError):
            prove(net, x, [wrong])
    thawed = copy.copy(others[0])
    object.__setattr__(thawed, "frozen", None)
    with pytest.raises(AssertionError):
        prove(net, x, [thawed])


def test_a_handler_registered_after_a_reading_is_found() -> None:
    """As in a notebook: the warning says to write one, one writes it, and reads again."""
    from lightning_prune.handlers import registry

    op = torch.ops.aten.geqrf

    def later(call: object) -> None:
        """Say nothing."""

    assert registry.handler_for(op.default) is None
    try:
        registry.handles(op)(later)
        assert registry.handler_for(op.default) is later
    finally:
        del registry._handlers[op]
        registry.handler_for.cache_clear()

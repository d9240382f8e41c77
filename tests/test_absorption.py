"""What removed channels emit is not lost: exactly where they are constant, on average where they are not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import erf, exp, pi, sqrt

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from versions import older

from lightning_prune import history_of, load_pruned, prune, save_pruned
from lightning_prune.absorption import absorb
from lightning_prune.criteria import BNScale
from lightning_prune.graph import read
from lightning_prune.types import PruningPlan

EXACT = 1e-12


def lively(net: nn.Module, *, dead: float = 0.5, seed: int = 0) -> nn.Module:
    """Give all norms something to say, and the first part of their scales nothing."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    net = net.double().eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            size = module.num_features
            module.weight.data = drawn(size).abs() + 0.5
            gone = _first_of_both_halves(size, int(dead * size))
            module.weight.data[gone] = 0
            module.bias.data, module.running_mean = drawn(size), drawn(size)
            module.running_var = drawn(size).abs() + 0.5
            module.bias.data[gone] = module.bias.data[gone].abs() + 0.1  # so that ReLU lets it pass
    for name, parameter in net.named_parameters():
        if parameter.dim() > 1:
            parameter.data = drawn(*parameter.shape) / sqrt(parameter[0].numel())
        elif name.endswith("bias") and not parameter.any():
            parameter.data = drawn(*parameter.shape)
    return net


def _first_of_both_halves(size: int, count: int) -> list[int]:
    """Positions that go together also where something ties the halves of a dimension."""
    return [half * (size // 2) + place for place in range(size // 2) for half in (0, 1)][:count]


class Branches(nn.Module):
    """Two branches that are concatenated, shuffled and added up."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.Hardswish(inplace=True))
        self.right = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.PReLU(6))
        self.head = nn.Conv2d(12, 5, 1, bias=False)
        self.after = nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.left(x), self.right(x)], 1)
        batch, channels, height, width = both.shape
        both = both.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(both.shape)
        return self.after(torch.sigmoid(self.head(both * 2 + 0.5)))


class Residual(nn.Module):
    """A trunk to which two norms contribute."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        inner = (nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.block = nn.Sequential(*inner, nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8))
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.block(x) + x))


class InPlaceViews(nn.Module):
    """Half of the channels are written to through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x[:, :4].relu_()
        return self.head(x)


def conv_bn(*between: nn.Module, channels: int = 8) -> list[nn.Module]:
    return [nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), *between]


NETS: dict[str, Callable[[], nn.Module]] = {
    "bias of a convolution": lambda: nn.Sequential(*conv_bn(nn.ReLU()), nn.Conv2d(8, 4, 3)),
    "running mean": lambda: nn.Sequential(
        *conv_bn(nn.LeakyReLU(0.2)), nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 1)
    ),
    "new bias of a convolution": lambda: nn.Sequential(*conv_bn(nn.SiLU()), nn.Conv2d(8, 4, 3, bias=False), nn.Tanh()),
    "new bias of a linear layer": lambda: nn.Sequential(
        *conv_bn(nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(8, 4, bias=False), nn.Tanh()
    ),
    "flattened maps": lambda: nn.Sequential(*conv_bn(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()), nn.Linear(128, 5)),
    "padded pool": lambda: nn.Sequential(*conv_bn(nn.ReLU(), nn.MaxPool2d(3, 1, 1)), nn.Conv2d(8, 4, 1)),
    "average pool": lambda: nn.Sequential(*conv_bn(nn.ELU(), nn.AvgPool2d(2)), nn.Conv2d(8, 4, 1)),
    "upsampling": lambda: nn.Sequential(*conv_bn(nn.ReLU6(), nn.Upsample(scale_factor=2)), nn.Conv2d(8, 4, 1)),
    "depthwise": lambda: nn.Sequential(
        *conv_bn(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Hardswish()), nn.Conv2d(8, 4, 1)
    ),
    "depthwise without a norm": lambda: nn.Sequential(
        *conv_bn(nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8), nn.ReLU()), nn.Conv2d(16, 4, 1)
    ),
    "grouped consumer": lambda: nn.Sequential(*conv_bn(nn.ReLU()), nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 2, 1)),
    "transposed consumer": lambda: nn.Sequential(*conv_bn(nn.ReLU()), nn.ConvTranspose2d(8, 4, 1), nn.Tanh()),
    "norm upon norm": lambda: nn.Sequential(*conv_bn(nn.ReLU(), nn.BatchNorm2d(8), nn.SiLU()), nn.Conv2d(8, 4, 1)),
    "one dimension": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(300, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4)
    ),
    "written out swish": lambda: nn.Sequential(*conv_bn(Swish()), nn.Conv2d(8, 4, 3)),
    "branches": Branches,
    "residual sum": Residual,
}


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.5 * x)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dead_channels_go_without_a_trace(name: str, memory_format: torch.memory_format) -> None:
    if older("torch", "2.6") and (name, memory_format) == ("new bias of a linear layer", torch.channels_last):
        pytest.skip("torch before 2.6 flattens channels that lie last with `as_strided_`, which freezes them")
    torch.manual_seed(0)
    net = lively(NETS[name]()).to(memory_format=memory_format)
    naive = copy.deepcopy(net)
    images = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    before = net(images)
    record = prune(net, images, pruning_ratio=0.3, criterion=BNScale())
    assert record.reached > 0.1
    assert (net(images) - before).abs().max() < EXACT
    prune(naive, images, pruning_ratio=0.3, criterion=BNScale(), constants="drop")
    assert (naive(images) - before).abs().max() > 1e-3


def test_what_a_view_has_overwritten_is_not_guessed() -> None:
    torch.manual_seed(0)
    net, images = lively(InPlaceViews()), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    graph = read(net, images)
    group = next(group for group in graph.groups if not group.frozen)
    assert not absorb(net, graph, PruningPlan({group.name: torch.tensor([0, 1])})).added


@pytest.mark.parametrize("padding", [1, 2])
def test_under_zero_padding_the_interior_is_exact(padding: int) -> None:
    torch.manual_seed(0)
    net = lively(nn.Sequential(*conv_bn(nn.ReLU()), nn.Conv2d(8, 4, 3, padding=padding)))
    images = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    before = net(images)
    prune(net, images, pruning_ratio=0.5, criterion=BNScale())
    off = (net(images) - before).abs()
    inside = off[:, :, padding:-padding, padding:-padding]
    assert inside.max() < EXACT
    assert off.max() > 1e-3


def relu_mean(beta: float, gamma: float) -> float:
    """E[max(0, gamma z + beta)] of methods.md C.1."""
    t = beta / gamma
    return beta * 0.5 * (1 + erf(t / sqrt(2))) + gamma * exp(-t * t / 2) / sqrt(2 * pi)


@pytest.mark.parametrize(("beta", "gamma"), [(0.3, 0.1), (-0.1, 0.2), (0.0, 0.5), (1.0, 0.01), (-2.0, 0.3)])
def test_small_scales_are_absorbed_by_the_closed_form(beta: float, gamma: float) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 1)).double().eval()
    net[1].weight.data, net[1].bias.data = torch.tensor([gamma, 1.0]).double(), torch.tensor([beta, 0.0]).double()
    graph = read(net, torch.zeros(1, 1, 4, 4).double())
    offsets = absorb(net, graph, PruningPlan({"0": torch.tensor([0])}))
    expected = relu_mean(beta, gamma) * net[3].weight[0, 0].item()
    got = offsets.added["3.bias"].item() if offsets.added else 0.0
    assert got == pytest.approx(expected, abs=2e-3 * gamma)


def test_the_sum_of_independent_norms_is_normal() -> None:
    torch.manual_seed(0)
    net = lively(Residual(), dead=0)
    graph = read(net, torch.zeros(1, 3, 4, 4).double())
    trunk = next(group for group in graph.groups if group.size == 8 and not group.frozen)
    gone = torch.tensor([2])
    offset = absorb(net, graph, PruningPlan({trunk.name: gone})).added["head.bias"]
    stem, block = net.stem[1], net.block[4]
    first = [relu_mean(stem.bias[2].item(), stem.weight[2].item())]
    z = torch.randn(400_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = F.relu(z[:, 0] * stem.weight[2] + stem.bias[2])
    assert drawn.mean().item() == pytest.approx(first[0], abs=5e-3)
    total = F.relu(z[:, 1] * block.weight[2] + block.bias[2] + drawn).mean()
    assert torch.allclose(offset, net.head.weight[:, 2, 0, 0] * total, atol=0.05)


def test_kept_channels_are_not_taken_for_constants() -> None:
    torch.manual_seed(0)
    net = lively(nn.Sequential(*conv_bn(nn.ReLU()), nn.Conv2d(8, 4, 3)), dead=0)
    graph = read(net, torch.zeros(1, 3, 8, 8).double())
    one, two = (absorb(net, graph, PruningPlan({"0": torch.tensor(gone)})).added["3.bias"] for gone in ([1], [1, 5]))
    alone = absorb(net, graph, PruningPlan({"0": torch.tensor([5])})).added["3.bias"]
    assert torch.allclose(one + alone, two)


def test_a_layer_that_is_called_twice_gets_the_mean() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
            self.b = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.head(self.a(x)), self.head(self.b(x))], 1)

    net = lively(Twice(), dead=0)
    for branch, shift in ((net.a, 1.0), (net.b, 3.0)):
        branch[1].weight.data[0], branch[1].bias.data[0] = 0, shift
    graph = read(net, torch.zeros(1, 3, 4, 4).double())
    group = next(group for group in graph.groups if not group.frozen)
    offset = absorb(net, graph, PruningPlan({group.name: torch.tensor([0])})).added["head.bias"]
    assert torch.allclose(offset, net.head.weight[:, 0, 0, 0] * 2.0)


def test_dead_neurons_emit_their_bias() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    net[0].weight.data[[1, 3]] = 0
    net[2].weight.data[2] = 0
    x = torch.randn(7, 6, dtype=torch.float64)
    before, dense = net(x), copy.deepcopy(net)
    graph = read(net, x)
    offsets = absorb(net, graph, PruningPlan({"0": torch.tensor([1, 3]), "2": torch.tensor([2])}))
    assert torch.allclose(offsets.added["2.bias"], dense[2].weight[:, [1, 3]] @ torch.sigmoid(dense[0].bias[[1, 3]]))
    record = prune(net, x, pruning_ratio=0.3, allocation=None)
    assert record.reached > 0
    assert (net(x) - before).abs().max() < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_keep_theirs(dtype: torch.dtype) -> None:
    net = lively(NETS["new bias of a linear layer"]()).to(dtype)
    prune(net, torch.zeros(1, 3, 10, 10, dtype=dtype), pruning_ratio=0.5, criterion=BNScale())
    assert {tensor.dtype for tensor in net.parameters()} == {dtype}


class TestNewBiases:
    def pruned(self) -> tuple[nn.Module, Tensor]:
        net, images = lively(NETS["new bias of a linear layer"]()), torch.randn(2, 3, 10, 10, dtype=torch.float64)
        prune(net, images, pruning_ratio=0.5, criterion=BNScale())
        return net, images

    def test_they_are_in_the_record_and_counted(self) -> None:
        net, _ = self.pruned()
        record = history_of(net)[-1]
        assert record.biases == {"5": 4}
        assert record.params.after == sum(parameter.numel() for parameter in net.parameters())

    def test_they_are_trained_if_their_weight_is(self) -> None:
        net, _ = self.pruned()
        assert net[5].bias.requires_grad
        frozen = lively(NETS["new bias of a linear layer"]())
        frozen[5].weight.requires_grad_(False)
        prune(frozen, torch.zeros(1, 3, 10, 10).double(), pruning_ratio=0.5, criterion=BNScale())
        assert not frozen[5].bias.requires_grad

    def test_they_are_loaded_into_a_dense_model(self, tmp_path) -> None:
        net, images = self.pruned()
        save_pruned(net, tmp_path / "net.pt")
        loaded = load_pruned(NETS["new bias of a linear layer"]().double(), tmp_path / "net.pt").eval()
        assert torch.equal(loaded(images), net(images))

    def test_a_second_cut_removes_theirs(self) -> None:
        net, images = self.pruned()
        net.append(nn.Linear(4, 2).double())
        before = net(images)
        prune(net, images, pruning_ratio=0.6)
        assert len(net[5].bias) == net[5].out_features < 4
        assert net(images).shape == before.shape


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`constants` is one of 'absorb', 'drop'; got 'keep'"):
        prune(nn.Linear(2, 2), torch.zeros(1, 2), pruning_ratio=0.5, constants="keep")


def test_the_model_is_not_changed_by_looking() -> None:
    net = lively(NETS["depthwise"]())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    graph = read(net, torch.zeros(1, 3, 10, 10).double())
    groups: Sequence[str] = [group.name for group in graph.groups if not group.frozen]
    absorb(net, graph, PruningPlan({groups[0]: torch.tensor([0, 1])}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())

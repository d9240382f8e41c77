"""The signal of Fisher pruning equals per-example gradients of masks, however a loss joins its examples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad

from lightning_prune.criteria import Fisher, Taylor, score_groups
from lightning_prune.criteria.readers import readers_of
from lightning_prune.errors import ScoreError
from lightning_prune.graph import read
from lightning_prune.types import ChannelGroup

EXACT = 1e-9


class Residual(nn.Module):
    """Two blocks on a trunk, one of them depthwise, a grouped layer, and a flatten before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.outer = nn.Conv2d(8, 6, 1)
        self.wide = nn.Conv2d(6, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm = nn.BatchNorm2d(12)
        self.narrow = nn.Conv2d(12, 6, 1)
        self.grouped = nn.Conv2d(6, 4, 1, groups=2)
        self.head = nn.Linear(4 * 9, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(images)), 2)
        x = F.relu(x + self.outer(F.silu(self.inner(x))))
        x = x + self.narrow(F.relu6(self.norm(self.depthwise(self.wide(x)))))
        logits: Tensor = self.head(F.gelu(self.grouped(x)).flatten(1))
        return logits


class Tokens(nn.Module):
    """Linear layers on sequences; the first norm is over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 6), nn.LayerNorm(6)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = self.norm(x)
        x = x + self.attend(y, y, y, need_weights=False)[0]
        x = x + self.down(torch.tanh(self.up(x)))
        logits: Tensor = self.head(x.mean(1))
        return logits


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.ConvTranspose2d(4, 5, 2, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 3))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.ReLU(), nn.Linear(9, 5), nn.Sigmoid(), nn.Linear(5, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutional": (convolutional, (2, 6, 6)),
    "residual": (Residual, (2, 6, 6)),
    "perceptron": (perceptron, (2, 6, 6)),
    "tokens": (Tokens, (4, 3)),
}


def made(name: str, count: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    build, shape = NETS[name]
    net = build().double().eval()
    return net, torch.randn(count, *shape, dtype=torch.float64), torch.arange(count) % 3


def mask_gradients(net: nn.Module, group: ChannelGroup, inputs: Tensor, labels: Tensor) -> Tensor:
    """Gradients of each example's loss with respect to factors on the weights that read a group: (examples, size)."""
    graph = read(net, inputs)
    readers = readers_of(net, graph)[group.name]
    weights = dict(net.named_parameters())
    reading = {name: weights[name] for reader in readers for name in _weights_of(net, reader.module)}
    members = [
        member for member in group.members if member.tensor in reading and member.dim == _dim(net, member.tensor)
    ]

    def loss(mask: Tensor, example: Tensor, label: Tensor) -> Tensor:
        changed = dict(weights)
        for member in members:
            weight = changed[member.tensor]
            factor = torch.ones(weight.shape[member.dim], dtype=weight.dtype)
            factor = factor.index_put((member.positions.flatten(),), mask.repeat_interleave(member.positions.shape[1]))
            shape = [-1 if dim == member.dim else 1 for dim in range(weight.dim())]
            changed[member.tensor] = weight * factor.view(shape)
        return F.cross_entropy(functional_call(net, changed, (example.unsqueeze(0),)), label.unsqueeze(0))

    ones = torch.ones(group.size, dtype=inputs.dtype)
    return torch.stack([grad(loss)(ones, *example) for example in zip(inputs, labels, strict=True)])


def _weights_of(net: nn.Module, module: str) -> list[str]:
    names = {"weight", "in_proj_weight"}
    return [
        f"{module}.{name}" for name, _ in net.get_submodule(module).named_parameters(recurse=False) if name in names
    ]


def _dim(net: nn.Module, tensor: str) -> int:
    return 0 if isinstance(net.get_submodule(tensor.rpartition(".")[0]), nn.ConvTranspose2d) else 1


def gathered(net: nn.Module, inputs: Tensor, labels: Tensor, criterion: Fisher | Taylor, **options: object) -> None:
    with criterion.gathering(net, inputs):
        F.cross_entropy(net(inputs), labels, reduction=criterion.reduction).backward()
        criterion.take()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NETS)
def test_the_signal_is_that_of_masks_on_single_examples(name: str, reduction: str) -> None:
    net, inputs, labels = made(name)
    fisher, taylor = Fisher(reduction), Taylor(reduction)
    groups = [group for group in read(net, inputs).groups if not group.frozen]
    for criterion in (fisher, taylor):
        gathered(net, inputs, labels, criterion)
    seen = 0
    for group in groups:
        score = fisher.score(net, group)
        if score is None:
            continue
        seen += 1
        expected = mask_gradients(net, group, inputs, labels)
        torch.testing.assert_close(score, expected.square().mean(0) / 2, rtol=EXACT, atol=0)
        torch.testing.assert_close(taylor.score(net, group), expected.mean(0).square(), rtol=1e-6, atol=1e-16)
    assert seen == len(groups) - (name == "tokens")  # heads: `MultiheadAttention` does not call its projection


def test_steps_add_up_and_a_short_batch_counts_for_what_it_is() -> None:
    net, inputs, labels = made("convolutional", 7)
    whole, parts = Fisher(), Fisher()
    gathered(net, inputs, labels, whole)
    with parts.gathering(net, inputs):
        for some in (slice(0, 4), slice(4, 6), slice(6, 7)):
            (F.cross_entropy(net(inputs[some]), labels[some]) / 5).backward()
            parts.take(scale=5)
    assert (parts.steps, parts.examples) == (3, 7)
    scores = score_groups(whole, net, read(net, inputs).groups)
    for name, expected in score_groups(parts, net, read(net, inputs).groups).items():
        torch.testing.assert_close(scores[name], expected, rtol=EXACT, atol=0)


def test_in_homogeneous_networks_every_layer_knows_the_whole_slope() -> None:
    """Without biases, sum_k g_nk = <dl_n/df, f_n> in every layer of a ReLU network (methods.md F.1)."""
    torch.manual_seed(0)
    layers = [
        nn.Linear(6, 9, bias=False),
        nn.ReLU(),
        nn.Linear(9, 7, bias=False),
        nn.ReLU(),
        nn.Linear(7, 3, bias=False),
    ]
    net, inputs, labels = nn.Sequential(*layers).double(), torch.randn(8, 6).double(), torch.arange(8) % 3
    outputs = net(inputs).detach().requires_grad_()
    slope = torch.autograd.grad(F.cross_entropy(outputs, labels, reduction="sum"), outputs)[0]
    expected = (slope * outputs.detach()).sum(1)
    for group in read(net, inputs).groups:
        if not group.frozen:
            found = mask_gradients(net, group, inputs, labels).sum(1)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    fisher = Fisher("sum")
    noted = []
    fisher._concluded = lambda gradients: noted.append(gradients) or gradients.square().sum(0)  # type: ignore[method-assign]
    gathered(net, inputs, labels, fisher)
    assert len(noted) == 2
    for gradients in noted:
        torch.testing.assert_close(gradients.sum(1), expected, rtol=0, atol=1e-15)


def test_rows_that_are_folded_examples_are_unfolded() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            flat = self.down(torch.relu(self.up(tokens.flatten(0, 1))))
            return flat.unflatten(0, tokens.shape[:2]).mean(1)

    torch.manual_seed(0)
    net, inputs, labels = Folded().double(), torch.randn(5, 4, 3).double(), torch.arange(5) % 3
    group = next(group for group in read(net, inputs).groups if not group.frozen)
    found = Fisher()
    found.begin(net, read(net, inputs))
    found.look(rows=5)
    F.cross_entropy(net(inputs), labels).backward()
    found.take()
    expected = mask_gradients(net, group, inputs, labels).square().mean(0) / 2
    torch.testing.assert_close(found.score(net, group), expected, rtol=EXACT, atol=0)
    found.look(rows=3)
    with pytest.raises(ScoreError, match=r"reads 20 rows for 3 examples.*ignore"):
        F.cross_entropy(net(inputs), labels).backward()


def test_nothing_is_left_on_the_network_and_a_copy_is_not_watched() -> None:
    from copy import deepcopy

    net, inputs, labels = made("perceptron")
    fisher = Fisher()
    with fisher.gathering(net, inputs):
        F.cross_entropy(deepcopy(net)(inputs), labels).backward()
        fisher.take()
        assert fisher.steps == 0
        with torch.no_grad():
            net(inputs)
        F.cross_entropy(net(inputs), labels).backward()
    assert not any(module._forward_pre_hooks for module in net.modules())
    fisher.take()
    assert fisher.steps == 0  # a step that was not taken in is forgotten


def test_what_cannot_be_scored_is_told() -> None:
    net, inputs, labels = made("perceptron")
    fisher = Fisher()
    group = next(group for group in read(net, inputs).groups if not group.frozen)
    with pytest.raises(ScoreError, match=r"has seen nothing of the training yet.*gathering"):
        fisher.score(net, group)
    gathered(net, inputs, labels, fisher)
    net[1] = nn.Linear(72, 8).double()
    net[3] = nn.Linear(8, 5).double()
    smaller = next(group for group in read(net, inputs).groups if not group.frozen)
    with pytest.raises(ScoreError, match="gathered for 9 channels of 1, which has 8 now"):
        fisher.score(net, smaller)
    with pytest.raises(ValueError, match=r"`reduction` is how the loss.*got 'max'"):
        Fisher("max")  # type: ignore[arg-type]


def test_a_reader_that_is_never_called_leaves_its_group_out() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = F.relu(F.linear(F.relu(self.first(inputs)), self.second.weight, self.second.bias))
            logits: Tensor = self.third(hidden)
            return logits

    net, inputs = Functional(), torch.randn(4, 3)
    fisher = Fisher()
    gathered(net, inputs, torch.arange(4) % 3, fisher)
    assert set(score_groups(fisher, net, read(net, inputs).groups)) == {"second"}

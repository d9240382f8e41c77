"""Channels that lost all their weights are cut out for real; output, masks, optimizer and counts follow."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import STEPS, Module, momentum, network, states, trainer, widths
from lightning.pytorch import callbacks as neighbours
from lightning.pytorch.callbacks import Callback
from masked import Exact, is_exact, masked, weights_of
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_prune import find_groups, history_of
from lightning_prune.callbacks import Retraining
from lightning_prune.callbacks.masking import MaskPruneCallback
from lightning_prune.criteria import Alive
from lightning_prune.masks.allocations import PerLayer
from lightning_prune.masks.held import masks_of
from lightning_prune.schedules import linear

IMAGES = torch.randn(4, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def linear_net() -> nn.Sequential:
    """A neuron that hears nothing and emits 0.7 (row 1), one that nobody hears (column 2), and one with both."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    weaken(net[1].weight[1], net[3].weight[:, 2], net[1].weight[4], net[3].weight[:, 4], net[3].weight[3])
    net[1].bias.data[1] = 0.7
    return net


def weaken(*parts: Tensor) -> None:
    for part in parts:
        part.data.mul_(1e-6)


def conv_net(first: int = 2) -> nn.Sequential:
    """Without padding, so that what a dead channel emits is the same at all places."""
    torch.manual_seed(0)
    stem = nn.Conv2d(1, first, 1) if first > 1 else nn.Identity()
    inner, last = nn.Conv2d(first, 6, 3), nn.Conv2d(6, 5, 2)
    weaken(inner.weight[1], last.weight[:, 2], last.weight[3])
    norm = nn.BatchNorm2d(6)
    norm.bias.data.fill_(0.3)
    return nn.Sequential(stem, inner, norm, nn.LeakyReLU(), last, nn.GELU(), nn.Flatten(), nn.Linear(45, 4))


class Residual(nn.Module):
    """A trunk that a block adds to: its channels live in both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner, self.outer = nn.Linear(36, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 4)
        weaken(self.stem.weight[1], self.outer.weight[1])  # dead in the trunk: both make it, and neither does
        weaken(
            self.stem.weight[2], self.inner.weight[3]
        )  # the trunk's 2 is alive through the block; the block's 3 dead
        weaken(self.inner.weight[:, 5], self.head.weight[:, 5])  # nobody hears the trunk's 5

    def forward(self, images: Tensor) -> Tensor:
        trunk = self.stem(images.flatten(1))
        return self.head(trunk + self.outer(self.inner(trunk).relu()))


class Depthwise(nn.Module):
    """A depthwise layer in between: only linear and ordinary convolutional layers are known to lead."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.depth = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 2, groups=6)
        self.last, self.head = nn.Conv2d(6, 5, 1), nn.Linear(5 * 9, 4)
        weaken(self.first.weight[1], self.last.weight[2])

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.last(self.depth(self.first(images)).relu()).relu().flatten(1))


NETS: dict[str, tuple[Callable[[], nn.Module], float, dict[str, int]]] = {
    "linear": (linear_net, 0.5, {"net.1": 3, "net.3": 4}),
    "convolutions": (conv_net, 0.35, {"net.1": 4, "net.4": 4}),
    "residual": (Residual, 0.45, {"net.stem": 6, "net.inner": 5}),
    "depthwise": (Depthwise, 0.25, {"net.first": 6, "net.last": 4}),
}


class Before(MaskPruneCallback):
    """Notes the network between the masks and the cut, and after it."""

    def _remove_dead(self, trainer: pl.Trainer, pl_module: pl.LightningModule, example: Any) -> Any:
        before = deepcopy(pl_module.net).eval()
        self.taken = dict(masks_of(pl_module))
        self.old = states(pl_module, trainer.optimizers)
        found = super()._remove_dead(trainer, pl_module, example)
        after = deepcopy(pl_module.net).eval()
        with torch.no_grad():
            kind = next(after.parameters()).dtype
            self.outputs = before(IMAGES.to(kind)), after(IMAGES.to(kind))
        self.new = states(pl_module, trainer.optimizers)
        return found


def events(ratio: float, begin: int = 1, retraining: Retraining | None = None, **more: Any) -> Before:
    from lightning_prune.masks.granularity import Weights

    options: dict[str, Any] = {"granularity": Weights(), "begin": begin, "end": begin, "retraining": retraining}
    return Before(ratio, **(options | more))


def of_layers(module: nn.Module, names: Any) -> dict[str, int]:
    return {name: module.get_submodule(name).weight.shape[0] for name in names}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("make", [momentum, partial(AdamW, lr=1e-9)], ids=["momentum", "adamw"])
def test_the_output_is_what_it_was(name: str, make: Callable[..., Optimizer]) -> None:
    """To 1e-12, with what dead neurons emit: into the next bias. The weak ones go first."""
    make_net, ratio, expected = NETS[name]
    small = partial(SGD, lr=1e-9, momentum=0.9) if make is momentum else make
    own, look = events(ratio, ignore=["net.0"] if name == "convolutions" else ()), Exact()
    module = Module(small, net=make_net(), example=IMAGES[:2])
    trainer(own, look, max_epochs=2, precision="64-true").fit(module)
    assert of_layers(module, expected) == expected
    before, after = own.outputs
    assert float((before - after).abs().max()) < 1e-12
    assert float(before.abs().max()) > 0.01
    assert look.wrong == []
    assert is_exact(module)


def test_the_output_is_what_it_was_behind_a_single_channel() -> None:
    """Grey images, as MNIST's: the first layer's dead channels."""
    net = conv_net(1)
    module, own = Module(partial(SGD, lr=1e-9), net=net, example=IMAGES[:2]), events(0.35)
    trainer(own, max_epochs=2, precision="64-true").fit(module)
    assert of_layers(module, ["net.1", "net.4"]) == {"net.1": 4, "net.4": 4}
    before, after = own.outputs
    assert float((before - after).abs().max()) < 1e-12


@pytest.mark.parametrize("name", [name for name in NETS if name != "depthwise"])
@pytest.mark.parametrize("make", [partial(SGD, lr=1e-6, momentum=0.9), partial(AdamW, lr=1e-6)], ids=["sgd", "adamw"])
def test_masks_and_optimizer_are_cut_along(name: str, make: Callable[..., Optimizer]) -> None:
    make_net, ratio, _ = NETS[name]
    module, own = Module(make, net=make_net()), events(ratio)
    trainer(own, max_epochs=2).fit(module)
    taken, old = own.taken, own.old
    for record in history_of(module):
        for where, dims in record.kept.items():
            for dim, positions in dims.items():
                pick = partial(torch.index_select, dim=dim, index=torch.as_tensor(positions))
                taken |= {where: pick(taken[where])} if where in taken else {}
                state = old.get(where, {}).items()
                old[where] = {key: pick(value) if value.dim() else value for key, value in state if key != "self"}
    assert masks_of(module).keys() == taken.keys()
    assert all(torch.equal(mask, taken[where]) for where, mask in masks_of(module).items())
    assert all(mask.shape == weights_of(module)[where].shape for where, mask in masks_of(module).items())
    for where in weights_of(module):
        for key, value in own.new[where].items():
            assert key == "self" or torch.equal(value, old[where][key]), (where, key)


def test_all_that_stays_moves_afterwards() -> None:
    module, own = Module(partial(AdamW, lr=1e-4), net=linear_net()), events(0.5)
    look = Exact(lambda _, module: {name: weight.clone() for name, weight in weights_of(module).items()})
    trainer(own, look, max_epochs=3).fit(module)
    first, last = look.seen[STEPS], look.seen[-1]
    assert first.keys() == last.keys()
    for name, mask in masks_of(module).items():
        assert bool((first[name] != last[name])[mask].any()), name
    assert look.wrong == []


def test_ratios_are_counted_against_the_dense_network() -> None:
    """Of 680 weights, whatever part of them has been cut out since: what is left never falls below what was asked."""
    asked, left = [], []

    class Look(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.is_last_batch or len(left) == trainer.global_step:
                left.append({name: int(mask.count_nonzero()) for name, mask in masks_of(pl_module).items()})

    net = network()
    weaken(net[0].weight[:3], net[3].weight[:4])
    module, own = Module(partial(SGD, lr=1e-6), net=net), masked(0.8, end=4, schedule=linear, retraining=None)
    trainer(own, Look(), max_epochs=6).fit(module)
    sizes = {"net.0.weight": 72, "net.3.weight": 576, "net.8.weight": 32}
    assert len(own.events) == 4
    assert widths(module)[0] <= 5
    assert len(history_of(module)) > 1
    for epoch, share in own.events.items():
        for name, size in sizes.items():
            most = size - round(0.8 * share * size)
            asked.append(left[epoch * STEPS][name] <= most)
    assert all(asked)
    masks = masks_of(module)
    assert int(masks["net.0.weight"].count_nonzero()) == left[-1]["net.0.weight"] > 0


def test_they_can_be_kept() -> None:
    module, own, look = Module(net=linear_net()), events(0.5, retraining=Retraining(dead="keep")), Exact()
    trainer(own, look, max_epochs=2).fit(module)
    assert of_layers(module, ["net.1", "net.3"]) == {"net.1": 6, "net.3": 5}
    assert history_of(module) == ()
    assert look.wrong == []


def test_a_layer_never_ends_without_a_channel() -> None:
    """All of its weights are asked for but one; one channel stays, and the network still runs."""
    net = linear_net()
    module = Module(partial(SGD, lr=1e-6), net=net)
    trainer(events(0.5, weight_allocation=PerLayer({"net.1": 0.999, "net.3": 0.999})), max_epochs=2).fit(module)
    assert min(of_layers(module, ["net.1", "net.3"]).values()) >= 1
    assert module(torch.zeros(2, 1, 6, 6)).shape == (2, 4)
    assert is_exact(module)


def test_neighbours_that_die_of_it_go_too() -> None:
    """The only reader of neuron 0 is a neuron that nobody hears: one cut after the other."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    weaken(net[3].weight[1:, 0], net[5].weight[:, 0])
    net[3].weight.data[0] += 1.0
    module, own = Module(partial(SGD, lr=1e-9), net=net), events(0.3)
    trainer(own, max_epochs=2, precision="64-true").fit(module)
    assert of_layers(module, ["net.1", "net.3"]) == {"net.1": 5, "net.3": 5}
    assert len(history_of(module)) == 2
    before, after = own.outputs
    assert float((before - after).abs().max()) < 1e-12


@pytest.mark.skipif(not hasattr(neighbours, "EMAWeightAveraging"), reason="this Lightning has none")
def test_the_average_is_cut_along() -> None:
    module, own = Module(partial(SGD, lr=1e-6), net=linear_net()), events(0.5)
    average = neighbours.EMAWeightAveraging(decay=0.5)
    shapes: list[bool] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            copy = average._average_model.module
            shapes.append(
                is_exact(copy) == bool(masks_of(pl_module))
                and {name: weight.shape for name, weight in weights_of(copy).items()}
                == {name: weight.shape for name, weight in weights_of(pl_module).items()}
            )

    trainer(own, average, Look(), max_epochs=2).fit(module)
    assert of_layers(module, ["net.1", "net.3"]) == {"net.1": 3, "net.3": 4}
    assert all(shapes)
    assert is_exact(module)


# the criterion


def test_scores_by_hand() -> None:
    """Channel 0 has both, 1 nothing that leads to it, 2 nothing that leads away; biases do not count."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    net[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    net[2].weight.data = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    (group,) = [group for group in find_groups(net, torch.zeros(1, 2)) if group.frozen is None]
    scores = Alive().score(net, group)
    assert scores is not None
    assert scores.tolist() == [1, 0, 0]


def test_transposed_convolutions_lead_the_other_way() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(1, 3, 2), nn.ReLU(), nn.ConvTranspose2d(3, 2, 2))
    net[0].weight.data[:, 1] = 0
    net[2].weight.data[2] = 0
    groups = [group for group in find_groups(net, torch.zeros(1, 1, 4, 4)) if group.frozen is None]
    assert [scores.tolist() for group in groups if (scores := Alive().score(net, group)) is not None] == [[1, 0, 0]]


def test_channels_behind_a_flatten_have_several_inputs() -> None:
    """One of the 9 columns that read channel 1 is enough."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 16, 3))
    net[2].weight.data[:] = 0
    net[2].weight.data[1, 20] = 1.0
    (group,) = [group for group in find_groups(net, torch.zeros(1, 1, 6, 6)) if group.frozen is None]
    scores = Alive().score(net, group)
    assert scores is not None
    assert scores.tolist() == [0, 1]


@pytest.mark.parametrize("net", [Depthwise(), nn.LSTM(3, 4)], ids=["depthwise", "recurrent"])
def test_what_it_does_not_know_is_passed_over(net: nn.Module) -> None:
    example: Any = torch.zeros(1, 1, 6, 6) if isinstance(net, Depthwise) else torch.zeros(2, 1, 3)
    scored = {group.name: Alive().score(net, group) for group in find_groups(net, example)}
    if isinstance(net, Depthwise):
        assert scored["first"] is None
        assert scored["last"] is not None
    else:
        assert all(scores is None for scores in scored.values())

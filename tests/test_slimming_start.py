"""What scales start at, and which are penalised: in fresh, resumed and trained networks, frozen, shared and lazy."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import Module, Resumable, equal, momentum, network, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks as neighbours
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD
from versions import needs

from lightning_prune import history_of
from lightning_prune.callbacks import BNSlimmingCallback
from lightning_prune.callbacks.scales import OptimizedScales, penalised_scales

# Lightning, where the resumed fit writes no checkpoints itself; and fits of a few steps, in which no scale gets to zero
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:BNSlimmingCallback. the scales cannot reach zero"),
]

KEPT = "was not set: it is for networks trained from scratch"


def slimming(**settings: Any) -> BNSlimmingCallback:
    return BNSlimmingCallback(0.5, **({"initial_scale": 0.5, "begin": 2} | settings))


class First(Callback):
    """The scales before the first forward of a fit, in the sanity check or in training."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def note(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.seen.append([*pl_module.net[1].weight.tolist(), *pl_module.net[4].weight.tolist()])

    on_validation_batch_start = on_train_batch_start = note


@pytest.mark.parametrize("settings", [{}, {"num_sanity_val_steps": 0}], ids=["sanity check", "none"])
def test_scales_start_at_it_before_the_first_forward(settings: dict[str, Any]) -> None:
    first = First()
    trainer(slimming(), first, max_epochs=3, **settings).fit(Module())
    assert first.seen[0] == [0.5] * 16


def test_layers_under_ignore_keep_theirs() -> None:
    first = First()
    trainer(slimming(ignore=["net.4"], begin=1), first, max_epochs=2).fit(Module())
    assert first.seen[0] == [0.5] * 8 + [1.0] * 8


def test_without_it_scales_are_left_alone() -> None:
    first = First()
    trainer(slimming(initial_scale=None), first, max_epochs=3).fit(Module())
    assert first.seen[0] == [1.0] * 16


class Later(Module):
    """Its network is made in `configure_model`, after the callback's `setup`."""

    def __init__(self) -> None:
        super().__init__(momentum)
        del self.net

    def configure_model(self) -> None:
        self.net = network()


def test_a_network_made_in_configure_model() -> None:
    module = Later()
    trainer(slimming(begin=1), max_epochs=2).fit(module)
    assert max(module.net[1].weight.tolist()) < 0.8
    assert len(history_of(module)) == 1


@pytest.mark.parametrize("step", [3, 6, 14])
def test_a_resumed_fit_keeps_what_it_had(tmp_path: Path, step: int) -> None:
    """From the middle of an epoch, from its end, from after the cut: bit for bit the unbroken fit, unwarned."""
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    make = Resumable if step % 6 else Module
    unbroken = make()
    trainer(slimming(warmup=1.5), keep, max_epochs=3, enable_checkpointing=True).fit(unbroken)
    resumed = make(seed=9)
    trainer(slimming(warmup=1.5), max_epochs=3).fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert equal(resumed.state_dict(), unbroken.state_dict())


def test_a_checkpoint_of_another_training_keeps_its_scales(tmp_path: Path) -> None:
    """Written without this callback: its scales are trained ones."""
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(keep, max_epochs=1, enable_checkpointing=True).fit(Module())
    module, first = Module(seed=9), First()
    trainer(slimming(), first, max_epochs=3).fit(module, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert min(first.seen[0]) > 0.6


def test_a_second_fit_goes_on_with_what_the_first_has_trained() -> None:
    module, callback = Module(), slimming(begin=5, end=5)
    trainer(callback, max_epochs=6).fit(module)
    trained = module.net[4].weight.tolist()
    first = First()
    with pytest.warns(UserWarning, match=rf"initial_scale=0\.5 {KEPT}, and net\.1 is trained already\. Leave it out"):
        trainer(callback, first, max_epochs=6).fit(module)
    assert first.seen[0][-len(trained) :] == trained


def test_one_callback_serves_several_fresh_networks() -> None:
    """As in cross-validation."""
    callback = slimming()
    for seed in (0, 1):
        first = First()
        trainer(callback, first, max_epochs=3).fit(Module(seed=seed))
        assert first.seen[0] == [0.5] * 16


def test_pretrained_scales_are_kept_also_without_a_count_of_batches() -> None:
    module, first = Module(), First()
    with torch.no_grad():
        module.net[1].weight.copy_(torch.linspace(0.2, 1.2, 8))
    with pytest.warns(UserWarning, match=KEPT):
        trainer(slimming(), first, max_epochs=3).fit(module)
    assert first.seen[0][8:] == [1.0] * 8


def test_layers_without_running_statistics_start_at_it_once() -> None:
    net = network()
    for at in (1, 4):
        net[at] = nn.BatchNorm2d(8, track_running_stats=False)
    module, callback, first = Module(net=net), slimming(begin=5, end=5), First()
    trainer(callback, first, max_epochs=6).fit(module)
    assert first.seen[0] == [0.5] * 16
    with pytest.warns(UserWarning, match=KEPT):
        trainer(callback, max_epochs=6).fit(module)


def test_a_pruned_network_keeps_its_scales() -> None:
    module = Module()
    trainer(slimming(begin=0, end=0), max_epochs=1, limit_train_batches=1).fit(module)
    for at in (1, 4):
        module.net[at].reset_parameters()
    with pytest.warns(UserWarning, match=rf"{KEPT}, and it has been pruned already"):
        trainer(slimming(begin=0, end=0), max_epochs=1, limit_train_batches=1).fit(module)


@needs("lightning", "2.6", "has no EMAWeightAveraging")
def test_an_average_of_the_weights_has_them_too() -> None:
    module, average = Module(partial(SGD, lr=0.0)), neighbours.EMAWeightAveraging(decay=0.9)
    trainer(slimming(begin=1), average, max_epochs=2).fit(module)
    assert set(module.net[1].weight.tolist()) == {0.5}


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_an_initial_scale_out_of_range(scale: float) -> None:
    with pytest.raises(ValueError, match=rf"`initial_scale` is what BatchNorm scales start at, above 0; got {scale}"):
        slimming(initial_scale=scale)


# which layers


class Zoo(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.BatchNorm1d(2), nn.BatchNorm2d(3), nn.BatchNorm3d(4)
        self.sync, self.bare = nn.SyncBatchNorm(5), nn.BatchNorm2d(6, affine=False)
        self.tied = nn.BatchNorm2d(3)
        self.tied.weight = self.two.weight
        self.other = nn.ModuleList([nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.InstanceNorm2d(2, affine=True)])


def test_all_batchnorms_with_a_scale_are_penalised_and_shared_ones_once() -> None:
    assert [len(scale) for scale in penalised_scales(Zoo(), [])] == [2, 3, 4, 5]
    assert [len(scale) for scale in penalised_scales(Zoo(), ["one", "three"])] == [3, 5]


class Lazy(Module):
    def __init__(self, *, seen: bool) -> None:
        torch.manual_seed(0)
        layers = [nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(partial(SGD, lr=0.1), net=nn.Sequential(*layers, nn.LazyLinear(4)))
        if seen:
            with torch.no_grad():
                self.eval()(torch.zeros(2, 1, 6, 6))
                self.train()


def test_lazy_layers_that_have_seen_an_input_are_like_any_other() -> None:
    module = Lazy(seen=True)
    trainer(slimming(begin=1, strength=0.01, update="proximal"), max_epochs=2).fit(module)
    assert module.net[0].out_channels == 4
    assert max(module.net[1].weight.tolist()) < 0.8


def test_lazy_layers_that_have_seen_none_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"initial_scale=0\.5 cannot be set: net\.1 is lazy .*Run the"):
        trainer(slimming(begin=1), max_epochs=2, num_sanity_val_steps=0).fit(Lazy(seen=False))


def test_a_group_is_searched_anew_only_when_it_changes() -> None:
    a, b, c = (Parameter(torch.ones(2)) for _ in range(3))
    found = OptimizedScales([a, c])
    group = {"params": [a, b]}
    assert [scale is a for scale in found.of(group)] == [True]
    assert found.of(group) == found.of(group)
    group["params"].append(c)
    assert [id(scale) for scale in found.of(group)] == [id(a), id(c)]
    group["params"][0] = b
    assert [id(scale) for scale in found.of(group)] == [id(c)]
    c.requires_grad_(requires_grad=False)
    assert found.of(group) == []
    c.requires_grad_()
    group["params"] = [a]
    assert [id(scale) for scale in found.of(group)] == [id(a)]


class Branches(nn.Module):
    """x + f(x): two BatchNorms in one group, and a third one that feeds the second branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8)
        self.inner, self.bn1 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.conv, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn0(self.stem(x)).relu()
        z = self.bn1(self.inner(y)).relu()
        return self.head((y + self.bn2(self.conv(z))).mean((2, 3)))


def test_a_group_that_is_partly_ignored_stays_whole_and_its_other_scales_shrink_all_the_same() -> None:
    """As the paper exempts no layer: to spare the partners, ignore them too."""
    module = Module(partial(SGD, lr=0.1), net=Branches())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Asked .* reached")
        trainer(BNSlimmingCallback(0.5, strength=1.0, begin=1, ignore=["net.bn2"]), max_epochs=2).fit(module)
    (record,) = history_of(module)
    channels = {name: (change.before, change.after) for name, change in record.channels.items()}
    assert channels == {"net.stem": (8, 8), "net.inner": (8, 4), "net.head": (4, 4)}
    assert "net.bn2" in record.held_back["net.stem"]
    assert module.net.bn0.weight.abs().max() < 0.8
    assert module.net.bn2.weight.abs().min() > 0.8

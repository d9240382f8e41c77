"""Dropout follows the capacity of the layer that it acts on: D_r = D_o sqrt(C_ir / C_io)."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import Module, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from masked import masked
from torch import Tensor, nn

from lightning_prune.callbacks import Retraining
from lightning_prune.callbacks.masking import MaskPruneCallback
from lightning_prune.dropout import dropout_layers, ratios
from lightning_prune.errors import PruningError
from lightning_prune.masks.allocations import PerLayer
from lightning_prune.masks.held import masks_of
from lightning_prune.schedules import linear

FOLLOW = Retraining(dead="keep")


def dense(rate: float = 0.5) -> nn.Sequential:
    """Two dropouts, each behind the layer that it acts on."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(36, 20),
        nn.ReLU(),
        nn.Dropout(rate),
        nn.Linear(20, 10),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(10, 4),
    )


def rates(module: nn.Module) -> dict[str, float]:
    return {name: layer.p for name, layer in module.named_modules() if isinstance(layer, nn.modules.dropout._DropoutNd)}


# the formula


@pytest.mark.parametrize(
    ("before", "left", "after"),
    [(0.5, 0.5, 0.354), (0.5, 0.1, 0.158), (0.5, 1 / 12, 0.144), (0.2, 0.25, 0.1), (0.5, 1, 0.5)],
)
def test_by_hand(before: float, left: float, after: float) -> None:
    mask = torch.zeros(1200, dtype=torch.bool)
    mask[: round(1200 * left)] = True
    found = ratios({"drop": ["fc"]}, {"drop": before}, {"fc": mask}, {"fc": 1200})
    assert round(found["drop"], 3) == after


def test_connections_of_several_layers_are_counted_together() -> None:
    """Of 300 + 100 connections 75 + 25 are left: a quarter."""
    taken = {"a": torch.arange(300) < 75, "b": torch.arange(100) < 25}
    assert ratios({"drop": ["a", "b"]}, {"drop": 0.5}, taken, {"a": 300, "b": 100}) == {"drop": 0.25}
    assert ratios({"drop": ["a", "b"]}, {"drop": 0.5}, {}, {"a": 300, "b": 100}) == {"drop": 0.5}


def test_channels_that_were_cut_count_as_gone() -> None:
    """The mask is smaller than the dense layer: 10 of 40."""
    assert ratios({"drop": ["a"]}, {"drop": 0.5}, {"a": torch.ones(2, 5).bool()}, {"a": 40}) == {"drop": 0.25}


# which layer

IMAGE = torch.zeros(2, 1, 6, 6)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (dense(), {"3": ["1.weight"], "6": ["4.weight"]}),
        (nn.Sequential(nn.Dropout(), nn.Conv2d(1, 4, 3)), {"0": ["1.weight"]}),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d()), {"3": ["0.weight"]}),
        (
            nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(36, 4), nn.Sequential(nn.ReLU(), nn.AlphaDropout()))),
            {"1.1.1": ["1.0.weight"]},
        ),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Dropout(), nn.Dropout(0.1)),
            {"2": ["1.weight"], "3": ["1.weight"]},
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), {}),
    ],
    ids=["behind", "before the first", "behind a norm", "nested", "two of them", "none"],
)
def test_the_layer_that_runs_before_it_or_else_after_it(net: nn.Module, expected: dict[str, list[str]]) -> None:
    assert dropout_layers(net, IMAGE) == expected


class Shared(nn.Module):
    """One dropout behind two layers, declared before them, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.idle = nn.Dropout(), nn.Dropout()
        self.first, self.second = nn.Linear(36, 8), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.drop(self.second(self.drop(self.first(images.flatten(1)).relu())))


def test_a_dropout_that_is_called_twice_acts_on_both() -> None:
    assert dropout_layers(Shared(), IMAGE) == {"drop": ["first.weight", "second.weight"]}


def test_a_recurrent_layer_has_all_of_its_weights() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.drop = nn.LSTM(6, 5, batch_first=True), nn.Dropout()

        def forward(self, images: Tensor) -> Tensor:
            return self.drop(self.rnn(images[:, 0])[0])

    assert dropout_layers(Sequence(), IMAGE) == {"drop": ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]}


def test_no_hooks_are_left() -> None:
    net = dense()
    dropout_layers(net, IMAGE)
    assert not any(module._forward_pre_hooks for module in net.modules())


# in a fit


def test_it_falls_with_every_event() -> None:
    module, seen = Module(net=dense()), list[dict[str, float]]()

    class Look(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.is_last_batch:
                seen.append(rates(pl_module))

    callback = masked(0.75, begin=0, end=2, schedule=linear, retraining=FOLLOW)
    trainer(callback, Look()).fit(module)
    assert list(callback.events) == [1, 2]
    sizes = {"net.3": 720, "net.6": 200}
    for epoch, ratio in enumerate([0, 0.375, 0.75, 0.75]):
        for (name, size), before in zip(sizes.items(), (0.5, 0.2), strict=True):
            left = (size - round(size * ratio)) / size
            assert seen[epoch][name] == pytest.approx(before * sqrt(left)), (epoch, name)


@pytest.mark.parametrize(
    ("arguments", "still"),
    [
        ({"ignore": ["net.1"]}, {"net.3"}),
        ({"allocation": PerLayer({"net.4": 0.5})}, {"net.3"}),
        ({"retraining": Retraining(dropout="keep", dead="keep")}, {"net.3", "net.6"}),
    ],
    ids=["ignored", "not pruned", "keep"],
)
def test_the_dropout_of_other_layers_stays(arguments: dict[str, Any], still: set[str]) -> None:
    module = Module(net=dense())
    trainer(masked(0.5, begin=1, end=1, **({"retraining": FOLLOW} | arguments)), max_epochs=2).fit(module)
    assert rates(module) == {
        "net.3": 0.5 if "net.3" in still else pytest.approx(0.5 * sqrt(0.5)),
        "net.6": 0.2 if "net.6" in still else pytest.approx(0.2 * sqrt(0.5)),
    }


def test_two_callbacks_lower_those_of_their_own_layers() -> None:
    module = Module(net=dense())
    first = masked(0.5, ignore=["net.4", "net.7"], begin=1, end=1, retraining=FOLLOW)
    second = masked(0.5, ignore=["net.1"], begin=2, end=2, retraining=FOLLOW)
    trainer(first, second).fit(module)
    assert rates(module) == {"net.3": pytest.approx(0.5 * sqrt(0.5)), "net.6": pytest.approx(0.2 * sqrt(0.5))}


def test_dead_neurons_have_no_connections() -> None:
    """They are counted as gone: against the dense layer, whatever was cut out."""
    net = dense()
    net[1].weight.data[:10] *= 1e-4
    module = Module(net=net)
    trainer(masked(0.5, begin=0, end=0, retraining=Retraining()), max_epochs=1).fit(module)
    left = int(masks_of(module)["net.1.weight"].count_nonzero())
    assert net[1].out_features < 20
    assert rates(module)["net.3"] == pytest.approx(0.5 * sqrt(360 / 720))
    assert left == 360


def test_a_second_network_has_its_own_rates() -> None:
    callback, seen = masked(0.5, begin=1, end=1, retraining=FOLLOW), list[float]()

    class Look(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(rates(pl_module)["net.3"])

    for rate in (0.5, 0.3):
        trainer(Look(), callback, max_epochs=3).fit(Module(net=dense(rate)))
    assert seen == [0.5, 0.5, pytest.approx(0.5 * sqrt(0.5)), 0.3, 0.3, pytest.approx(0.3 * sqrt(0.5))]


def test_the_same_network_again_is_not_lowered_twice() -> None:
    """Pruned further, it has the rates of what is left of the dense one."""
    module, callback = Module(net=dense()), masked(0.5, begin=1, end=1, retraining=FOLLOW)
    for _ in range(2):
        trainer(callback, max_epochs=2).fit(module)
    assert rates(module)["net.3"] == pytest.approx(0.5 * sqrt(0.5))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_resumed_fit_has_them_lowered_before_its_first_step(tmp_path: Path, epoch: int) -> None:
    def callback() -> MaskPruneCallback:
        return masked(0.75, begin=0, end=2, schedule=linear, retraining=FOLLOW)

    seen: dict[int, dict[str, float]] = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            seen.setdefault(trainer.global_step, rates(pl_module))
            assert seen[trainer.global_step] == rates(pl_module)

    keep = ModelCheckpoint(tmp_path, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    trainer(callback(), Look(), keep, enable_checkpointing=True).fit(Module(net=dense()))
    module = Module(net=dense())
    trainer(callback(), Look()).fit(module, ckpt_path=tmp_path / f"{epoch}.ckpt")
    assert rates(module)["net.3"] == pytest.approx(0.25)


# refusals


class Elsewhere(nn.Module):
    """Its dropouts have nothing that can be pruned around them: a lookup and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Parameter(torch.randn(36, 4)), nn.Sequential(nn.Sequential(nn.Dropout()))

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images.flatten(1)) @ self.table


def test_a_dropout_without_a_layer_is_refused_before_training_starts() -> None:
    class Apart(Elsewhere):
        """Its only layer is not called in `forward`."""

        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(36, 4)

    module, fit = Module(net=Apart()), trainer(masked(0.5, retraining=FOLLOW))
    with pytest.raises(PruningError, match=r"dropout 'net\.inner\.0\.0' has no layer to act on .*dropout=\"keep\""):
        fit.fit(module)
    assert fit.global_step == 0
    assert masks_of(module) == {}
    assert rates(module) == {"net.inner.0.0": 0.5}
    trainer(masked(0.5, begin=1, end=1), max_epochs=2).fit(module)


def test_a_network_without_a_layer_to_prune_is_refused_before_training_starts() -> None:
    module, fit = Module(net=Elsewhere()), trainer(masked(0.5, retraining=FOLLOW))
    with pytest.raises(PruningError, match=r"has no weight that a mask can be put on.*`ignore`"):
        fit.fit(module)
    assert fit.global_step == 0

"""Fisher pruning: a few channels at each event until the ratio is reached, or as many as a schedule says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fits import Module, Resumable, equal, images, trainer, widths
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_prune import history_of
from lightning_prune.allocation import ByCost, Global
from lightning_prune.callbacks import FisherPruneCallback, Retraining
from lightning_prune.information import fisher_information
from lightning_prune.masks import StdThreshold, magnitude_masks, masks_of


def test_one_channel_goes_every_few_steps_until_enough_are_gone() -> None:
    module = Module()
    cut = FisherPruneCallback(0.3, channels_per_event=1, every_n_steps=3)
    trainer(cut, max_epochs=4).fit(module)
    records = history_of(module)
    assert [record.step for record in records] == [3, 6, 9, 12, 15]  # 5 of 16 are 31 %
    gone = [sum(change.dense - change.after for change in record.channels.values()) for record in records]
    assert gone == [1, 2, 3, 4, 5]
    assert cut.is_finished


def test_several_at_once_until_the_macs_are_reached() -> None:
    module = Module()
    trainer(FisherPruneCallback(0.5, of="macs", channels_per_event=2, every_n_steps=2)).fit(module)
    *sooner, last = history_of(module)
    assert last.macs.removed >= 0.5
    assert all(record.macs.removed < 0.5 for record in sooner)


def test_the_least_useful_channel_goes_first() -> None:
    """A channel that nobody listens to costs nothing, and is the first to go, whatever its weights are."""
    module = Module()
    with torch.no_grad():
        module.net[3].weight[:, 5] = 0
        module.net[0].weight[5] *= 100
    module.net[3].weight.register_hook(lambda gradient: gradient.index_fill(1, torch.tensor([5]), 0))
    trainer(FisherPruneCallback(1 / 16, channels_per_event=1, every_n_steps=1), max_epochs=1).fit(module)
    assert history_of(module)[0].kept["net.0.weight"][0] == (0, 1, 2, 3, 4, 6, 7)


def test_a_schedule_says_how_many_go() -> None:
    module = Module()
    trainer(FisherPruneCallback(0.5, begin=1, end=3)).fit(module)
    assert [record.epoch for record in history_of(module)] == [2, 3]
    assert sum(widths(module)) == 8


def test_it_ends_where_nothing_more_can_go() -> None:
    module = Module()
    with (
        pytest.warns(UserWarning, match=r"Asked 90.0% of channels, reached 25.0%"),  # told before the first step
        pytest.warns(UserWarning, match=r"FisherPruneCallback: asked 90.0%.* reached 25.0%.*min_channels=6"),
    ):
        trainer(FisherPruneCallback(0.9, channels_per_event=2, every_n_steps=2, min_channels=6)).fit(module)
    assert widths(module) == [6, 6]


def test_a_fit_that_goes_on_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    def fit(path: Path | None) -> Module:
        module = Resumable()
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        cut = FisherPruneCallback(0.4, channels_per_event=1, every_n_steps=3, window=2)
        trainer(cut, saving, enable_checkpointing=True).fit(module, ckpt_path=path)
        return module

    unbroken = fit(None)
    for step in (2, 3, 7, 20):
        resumed = fit(tmp_path / f"step={step}.ckpt")
        assert equal(resumed.state_dict(), unbroken.state_dict()), step
        assert history_of(resumed) == history_of(unbroken)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels_per_event": 0}, "`channels_per_event` is 1 or more"),
        ({"channels_per_event": 1, "of": "latency"}, "got 'latency'"),
        ({"window": 0}, "`window` is the optimizer steps"),
        ({"reduction": "none"}, "`reduction` is how the loss joins"),
        ({"pruning_ratio": 1.0}, "`pruning_ratio` is the fraction"),
    ],
)
def test_wrong_arguments_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FisherPruneCallback(**settings)  # type: ignore[arg-type]


def test_an_endless_fit_needs_an_end() -> None:
    with pytest.raises(MisconfigurationException, match="nobody knows when that is"):
        trainer(FisherPruneCallback(0.5, channels_per_event=1, every_n_steps=3), max_epochs=-1).fit(Module())


def test_weights_go_by_what_they_carry() -> None:
    """By F w^2: a large weight that no gradient reaches is worth less than a small one."""
    net = nn.Linear(4, 1, bias=False)
    net.weight.data = torch.tensor([[3.0, -1.0, 0.5, -2.0]])
    information = {"weight": torch.tensor([[0.1, 1.0, 16.0, 0.1]])}  # F w^2: 0.9, 1, 4, 0.4
    assert magnitude_masks(net, 0.5, information=information)["weight"].tolist() == [[False, True, True, False]]
    assert magnitude_masks(net, 0.5, "2:4", information=information)["weight"].tolist() == [[False, True, True, False]]
    with pytest.raises(ValueError, match=r"`information` has the shape None for 'weight', which has \(1, 4\)"):
        magnitude_masks(net, 0.5, information={})
    with pytest.raises(ValueError, match=r"compares weights with their deviation"):
        magnitude_masks(net, 0.5, information=information, allocation=StdThreshold(1.0))


def test_masks_in_a_fit_are_those_of_the_information(tmp_path: Path) -> None:
    module, saving = Module(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, auto_insert_metric_name=False)
    cut = FisherPruneCallback(0.5, granularity="weights", begin=2, end=2, batches=6)
    trainer(cut, saving, max_epochs=3, enable_checkpointing=True).fit(module)
    earlier = Module()
    earlier.load_state_dict(torch.load(tmp_path / "1.ckpt", weights_only=True)["state_dict"])
    information = fisher_information(earlier, images())  # all images, in another order
    expected = magnitude_masks(earlier, 0.5, allocation=Global(), information=information)
    assert {name: mask.tolist() for name, mask in masks_of(module).items()} == {
        name: mask.tolist() for name, mask in expected.items()
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "weights", "of": "macs"}, "`of` is about channels; got 'macs'"),
        ({"granularity": "weights", "channels_per_event": 1}, "`channels_per_event` is about channels; got 1"),
        ({"granularity": "weights", "batches": 0}, "`batches` is what the information"),
        ({"granularity": "weights", "allocation": ByCost()}, "does not share out weights"),
        ({"allocation": StdThreshold(1.0)}, "does not share out channels"),
        ({"retraining": Retraining()}, "`retraining` is about weights"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FisherPruneCallback(**settings)  # type: ignore[arg-type]

"""BatchNorm statistics that are estimated anew after a cut."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from fits import Module, Resumable, equal, network, states, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune.calibration import recalibrate
from lightning_prune.callbacks import PruneCallback
from lightning_prune.errors import PruningError


class TestRecalibrate:
    def test_the_statistics_are_the_averages_over_the_batches(self) -> None:
        norm = nn.BatchNorm2d(3, momentum=0.3)
        norm(torch.randn(4, 3, 2, 2) + 5)
        batches = [torch.randn(4, 3, 5, 5) * scale for scale in (1, 2, 3)]
        assert recalibrate(norm, batches) == 3
        means = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
        variances = torch.stack([batch.var((0, 2, 3)) for batch in batches]).mean(0)
        assert torch.allclose(norm.running_mean, means, atol=1e-6)
        assert torch.allclose(norm.running_var, variances, rtol=1e-5)
        assert (norm.momentum, int(norm.num_batches_tracked)) == (0.3, 1)

    def test_nothing_else_changes(self) -> None:
        net = nn.Sequential(nn.Dropout(0.5), network())
        net[1][0].eval()
        modes = [module.training for module in net.modules()]
        batches = iter([torch.randn(4, 1, 6, 6)] * 5)
        before, draws = copy.deepcopy(net.state_dict()), torch.get_rng_state()
        recalibrate(net, batches, most=2)
        assert [module.training for module in net.modules()] == modes
        moved = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved == {f"1.{layer}.running_{name}" for layer in (1, 4) for name in ("mean", "var")}
        assert torch.equal(draws, torch.get_rng_state())

    def test_a_failure_takes_it_back(self) -> None:
        net = network()
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(RuntimeError):
            recalibrate(net, [torch.randn(4, 1, 6, 6), torch.randn(4, 2, 6, 6)])
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
        with pytest.raises(PruningError, match="no batch"):
            recalibrate(net, [])
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())

    def test_without_a_norm_it_is_refused(self) -> None:
        with pytest.raises(PruningError, match="no BatchNorm with running statistics"):
            recalibrate(nn.Linear(2, 2), [torch.zeros(1, 2)])


class Look(pl.Callback):
    """Notes the statistics at the first batch after a cut, before any training on it."""

    def __init__(self) -> None:
        self.variances: list[torch.Tensor] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.variances.append(pl_module.net[4].running_var.clone())


def fitted(recalibrated: int, **settings: object) -> tuple[Module, pl.Trainer, Look]:
    module, look = Module(), Look()
    fit = trainer(PruneCallback(0.5, begin=1, end=1, recalibrate=recalibrated), look, max_epochs=3, **settings)
    fit.fit(module)
    return module, fit, look


def test_after_a_cut_the_statistics_are_those_of_the_network_that_is_left() -> None:
    module, _, look = fitted(6)
    plain, _, naive = fitted(0)
    assert look.variances[0].equal(naive.variances[0])
    assert not look.variances[1].equal(naive.variances[1])
    assert len(look.variances[1]) == 4
    assert plain.net[4].running_var.shape == module.net[4].running_var.shape


def test_the_training_goes_on_with_the_batches_it_would_have_seen() -> None:
    class Seen(Module):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch[0].sum().item())
            return super().training_step(batch, batch_idx)

        def train_dataloader(self) -> DataLoader:
            return DataLoader(super().train_dataloader().dataset, batch_size=8, shuffle=True)

    orders = []
    for recalibrated in (0, 4):
        pl.seed_everything(0, verbose=False)
        module = Seen()
        module.seen = []
        trainer(PruneCallback(0.5, begin=1, end=1, recalibrate=recalibrated), max_epochs=3).fit(module)
        orders.append(module.seen)
    assert orders[0] == orders[1]


def test_a_resumed_fit_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    def fit(name: str, epochs: int, ckpt: Path | None = None) -> tuple[Module, pl.Trainer]:
        module = Resumable()
        done = trainer(PruneCallback(0.5, begin=1, end=1, recalibrate=3), max_epochs=epochs)
        done.fit(module, ckpt_path=ckpt)
        done.save_checkpoint(tmp_path / name)
        return module, done

    whole, last = fit("whole.ckpt", 4)
    fit("half.ckpt", 2)
    again, end = fit("again.ckpt", 4, tmp_path / "half.ckpt")
    left, right = states(whole, last.optimizers), states(again, end.optimizers)
    assert left.keys() == right.keys()
    assert all(equal(left[name], right[name]) for name in left)


def test_wrong_numbers_and_data_are_refused() -> None:
    with pytest.raises(ValueError, match="`recalibrate` is a number of batches, 0 or more; got -1"):
        PruneCallback(0.5, recalibrate=-1)

    class TwoLoaders(Module):
        def train_dataloader(self):
            return {"a": super().train_dataloader(), "b": super().train_dataloader()}

        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    with pytest.raises(MisconfigurationException, match="reads the training data a second time"):
        trainer(PruneCallback(0.5, recalibrate=2)).fit(TwoLoaders())
    with pytest.raises(PruningError, match="no BatchNorm"):
        trainer(PruneCallback(0.5, recalibrate=2)).fit(
            Module(net=nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4)))
        )

"""Where a scan's batches come from: data modules, loaders, lists, and what is none of these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from scans import Data, Module, two_batches, two_layers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.sensitivity import batches, sensitivity


class TestData:
    def test_a_data_module_is_asked_as_lightning_asks_it(self) -> None:
        Data.calls.clear()
        module = Module()
        scan = sensitivity(module, Data(), (0.5,))
        assert Data.calls == ["prepare_data", "setup validate"]
        inputs = [(2 * x, y) for x, y in Data().val_dataloader()]
        assert sensitivity(module, inputs, (0.5,)) == scan

    def test_a_loader_and_a_list_of_its_batches_give_the_same(self) -> None:
        loader = Data().val_dataloader()
        assert sensitivity(Module(), loader, (0.5,)).dense.keys() == {"accuracy", "loss"}
        module = Module()
        assert sensitivity(module, loader, (0.5,)) == sensitivity(module, list(loader), (0.5,))

    def test_several_loaders_count_together(self) -> None:
        class Two(Data):
            def val_dataloader(self) -> Any:
                return [super(Two, self).val_dataloader()] * 2

        module = Module()
        assert sensitivity(module, Two(), (0.5,)).dense == pytest.approx(sensitivity(module, Data(), (0.5,)).dense)

    def test_small_data_is_read_once_and_large_data_each_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Counted(list[Any]):
            passes = 0

            def __iter__(self) -> Iterator[Any]:
                self.passes += 1
                return super().__iter__()

        net, small, large = two_layers(), Counted(two_batches()), Counted(two_batches())
        kept = sensitivity(net, small, (0.5, 0.75))
        monkeypatch.setattr(batches, "_KEPT", 50)
        assert sensitivity(net, large, (0.5, 0.75)) == kept
        assert (small.passes, large.passes) == (1, 5)

    def test_a_few_batches_only(self) -> None:
        first = sensitivity(two_layers(), two_batches()[:1], (0.5,))
        assert sensitivity(two_layers(), two_batches(), (0.5,), batches=1) == first


class Without(pl.LightningDataModule):
    pass


class Empty(pl.LightningDataModule):
    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found

    def val_dataloader(self) -> Any:
        return self.found


class TestRefused:
    @pytest.mark.parametrize("data", [Without(), Empty(None), Empty([]), [], Empty(DataLoader([]))])
    def test_no_validation_batches(self, data: Any) -> None:
        with pytest.raises(
            ValueError, match=r"`datamodule` gives no validation batches; got \w+\. Let its `val_dataloader`"
        ):
            sensitivity(two_layers(), data, (0.5,))

    @pytest.mark.parametrize(
        "data", [3, "mnist", torch.zeros(2, 4), {"x": 1}, TensorDataset(torch.zeros(2, 4)), nn.ReLU()]
    )
    def test_data_of_another_kind(self, data: Any) -> None:
        with pytest.raises(TypeError, match="`datamodule` is a LightningDataModule, a DataLoader or a list of batches"):
            sensitivity(two_layers(), data, (0.5,))

    def test_an_iterator_is_gone_after_one_pass(self) -> None:
        with pytest.raises(TypeError, match="gone through many times, and a list_iterator only once"):
            sensitivity(two_layers(), iter(two_batches()), (0.5,))

    @pytest.mark.parametrize(
        "data", [two_batches()[0], [(torch.zeros(2, 4), torch.zeros(2))], [(torch.zeros(2, 4), "a")]]
    )
    def test_batches_without_classes(self, data: Any) -> None:
        with pytest.raises(ValueError, match="measures loss and accuracy of class logits"):
            sensitivity(two_layers(), data, (0.5,))

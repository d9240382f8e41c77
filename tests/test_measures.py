"""What a scan measures: torchmetrics, functions, and what a LightningModule logs."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from scans import Data, Module, assert_same, linear, snapshot, two_batches, two_layers, values
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.sensitivity import sensitivity


class TestMetrics:
    def test_a_torchmetrics_metric_says_its_way_and_stays_as_it_was(self) -> None:
        metric = MulticlassAccuracy(2, average="micro")
        metric.update(torch.tensor([0]), torch.tensor([1]))
        scan = sensitivity(two_layers(), two_batches(), (0.5,), metric=metric)
        assert scan.dense == {"MulticlassAccuracy": 1.0}
        assert scan.better == {"MulticlassAccuracy": "higher"}
        assert metric.compute() == 0

    def test_a_function_is_weighted_by_the_examples(self) -> None:
        def mean_target(outputs: Tensor, targets: Tensor) -> Tensor:
            return targets.float().mean()

        scan = sensitivity(two_layers(), two_batches(), (0.5,), metric=mean_target, better="lower")
        assert scan.dense == {"mean_target": pytest.approx(1 / 3)}

    def test_batches_that_are_no_pairs_are_inputs_and_targets(self) -> None:
        def error(outputs: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.mse_loss(outputs, targets)

        net, data = linear([[1.0, 0.0], [0.0, 1.0]]), torch.ones(3, 2)
        assert sensitivity(net, [data], (0.75,), metric=error, better="lower").rows[0].values == {"error": (0.5,)}

    def test_a_dict_goes_by_name(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = linear([[1.0, 0.0], [0.0, 1.0]])

            def forward(self, pixels: Tensor) -> Tensor:
                out: Tensor = self.layer(pixels)
                return out

        def right(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
            return (outputs.argmax(1) == batch["labels"]).float().mean()

        batch = {"pixels": torch.eye(2), "labels": torch.tensor([0, 1])}
        scan = sensitivity(Named(), [batch], (0.75,), metric=right, better="higher")
        assert (scan.dense, values(scan, "right")) == ({"right": 1.0}, {"layer": (1.0,)})

    def test_several_inputs(self) -> None:
        class Sum(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(2, 2)

            def forward(self, a: Tensor, b: Tensor) -> Tensor:
                out: Tensor = self.layer(a + b)
                return out

        data = [(torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0, 1, 1]))]
        assert len(sensitivity(Sum(), data, (0.5,)).rows) == 1

    def test_a_number_that_the_module_logs(self) -> None:
        module = Module()
        before = snapshot(module)
        trainer = pl.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
        by_hand = sensitivity(module, Data(), (0.5, 0.9))
        logged = sensitivity(module, Data(), (0.5, 0.9), metric="val/loss", better="lower", trainer=trainer)
        assert logged.dense["val/loss"] == pytest.approx(by_hand.dense["loss"], rel=1e-5)
        for layer, line in values(logged, "val/loss").items():
            assert line == pytest.approx(values(by_hand, "loss")[layer], rel=1e-5)
        assert_same(module, before)

    def test_a_name_that_is_not_logged(self) -> None:
        trainer = pl.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
        with pytest.raises(
            ValueError, match=r"`metric` 'val/acc' is not logged in `validation_step`. These are: val/loss"
        ):
            sensitivity(Module(), Data(), (0.5,), metric="val/acc", better="higher", trainer=trainer)

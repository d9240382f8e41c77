"""What the check of a file finds, and what stands in its way."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from exports import FORMATS, needs_onnx
from fits import EXAMPLE, Module, trainer
from torch import Tensor, nn

from lightning_prune import save_pruned
from lightning_prune.callbacks import DistillationCallback, FisherPruneCallback, MagnitudePruneCallback
from lightning_prune.errors import ExportError, HistoryError
from lightning_prune.exporting import export
from lightning_prune.exporting import export as exporting
from lightning_prune.exporting.export import _difference
from lightning_prune.inputs import Inputs

ROWS = torch.rand(2, 4) + 0.1
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("found", "wanted", "difference"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([1.0, NAN], [1.0, 2.0], INF),
        ([1.0, 2.0], [1.0, NAN], INF),
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([1.0, INF], [1.0, -INF], INF),
        ([1.0, NAN], [1.0, INF], INF),
        ([1.5, -INF], [2.0, -INF], 0.25),
        ([1.0], [1.0, 1.0], INF),
        ([], [], 0.0),
    ],
)
def test_difference(found: list[float], wanted: list[float], difference: float) -> None:
    assert _difference([torch.tensor(found)], [torch.tensor(wanted)]) == difference


def test_an_output_more_is_a_difference() -> None:
    assert _difference([ROWS], [ROWS, ROWS]) == INF


def test_a_file_of_nan_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__("sys").modules["lightning_prune.exporting.export"]
    write = module.write

    def wrong(format: Any, model: nn.Module, inputs: Inputs, path: Path, *, dynamic: bool) -> None:
        broken = nn.Linear(4, 3)
        nn.init.constant_(broken.weight, NAN)
        write(format, broken, inputs, path, dynamic=dynamic)

    monkeypatch.setattr(module, "write", wrong)
    with pytest.raises(ExportError, match="off by inf"):
        exporting(nn.Linear(4, 3), tmp_path / "net.pt2", format="torch_export", example_inputs=ROWS)
    assert not list(tmp_path.iterdir())


class Made(nn.Module):
    """A layer, and something made of what it returns."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.layer.weight)
        self.make = make

    def forward(self, rows: Tensor) -> Tensor:
        made: Tensor = self.make(self.layer(rows))
        return made


def test_a_network_of_positive_numbers_is_checked_with_those_of_the_example(tmp_path: Path) -> None:
    """Of noise it returns NaN throughout, which would agree with any file that does so too."""
    net = Made(lambda rows: rows.sqrt().sum((0, 1), keepdim=True) + rows * 0)
    with torch.no_grad():
        assert net(torch.randn(3, 4)).isnan().all()
    assert export(net, tmp_path / "net.pt2", format="torch_export", example_inputs=ROWS).difference < 1e-5


def test_a_network_that_has_diverged_is_refused(tmp_path: Path) -> None:
    net = nn.Linear(4, 2)
    nn.init.constant_(net.bias, NAN)
    with pytest.raises(ExportError, match="Linear returns no finite number"):
        export(net, tmp_path / "net.pt2", format="torch_export", example_inputs=ROWS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_chance_is_found_and_leaves_no_trace(tmp_path: Path, format: Any) -> None:
    net = Made(lambda rows: rows + torch.rand_like(rows))
    state = torch.get_rng_state()
    with pytest.raises(ExportError, match="on chance in eval mode"):
        export(net, tmp_path / "net", format=format, example_inputs=ROWS)
    assert torch.equal(state, torch.get_rng_state())
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_what_an_engine_cannot_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"The onnx file cannot be opened: .*float32"):
        export(nn.Linear(4, 2).bfloat16(), tmp_path / "net.onnx", example_inputs=ROWS.bfloat16())
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_what_onnx_does_not_know_is_named(tmp_path: Path) -> None:
    """The reason is that of torch.export or of the operation; not that some step of three has failed."""
    with pytest.raises(ExportError, match="geqrf") as caught:
        export(Made(lambda rows: torch.geqrf(rows)[0]), tmp_path / "net.onnx", example_inputs=ROWS)
    assert "step" not in str(caught.value)


def test_what_cannot_be_copied_is_told(tmp_path: Path) -> None:
    net = nn.Linear(4, 2)
    net.kept = net(ROWS)
    with pytest.raises(ExportError, match="Linear cannot be copied"):
        export(net, tmp_path / "net.onnx", example_inputs=ROWS)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`path` is the file to write; .* is a folder"):
        export(nn.Linear(4, 2), tmp_path, example_inputs=ROWS)


def test_a_batch_that_is_fixed_is_not_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__("sys").modules["lightning_prune.exporting.export"]

    def broken(inputs: Inputs) -> list[Tensor]:
        raise RuntimeError("out of order")

    monkeypatch.setattr(module, "opened", lambda format, path: broken)
    with pytest.raises(ExportError, match=r"does not run: out of order\. Try another format"):
        exporting(nn.Linear(4, 2), tmp_path / "n.pt2", format="torch_export", example_inputs=ROWS, batch="fixed")
    with pytest.raises(ExportError, match=r"does not run with 1 examples: .* pass batch='fixed'"):
        exporting(nn.Linear(4, 2), tmp_path / "n.pt2", format="torch_export", example_inputs=ROWS)


def test_the_class_of_a_checkpoint(tmp_path: Path) -> None:
    module = Module(example=EXAMPLE)
    trainer(MagnitudePruneCallback(0.5, begin=1, end=1)).fit(module)
    save_pruned(module, tmp_path / "saved.ckpt")
    done = export(
        tmp_path / "saved.ckpt", tmp_path / "net.pt2", format="torch_export", example_inputs=EXAMPLE, into=Module
    )
    assert done.difference < 1e-5
    content = (tmp_path / "saved.ckpt").read_bytes()
    (tmp_path / "torn.ckpt").write_bytes(content[: len(content) // 2])
    for into in (Module, Module(example=EXAMPLE)):
        with pytest.raises(HistoryError, match=r"torn\.ckpt"):
            export(tmp_path / "torn.ckpt", tmp_path / "torn.onnx", example_inputs=EXAMPLE, into=into)
    assert not (tmp_path / "torn.onnx").exists()


@pytest.mark.parametrize("kind", ["distillation", "fisher"])
def test_in_the_middle_of_a_fit(tmp_path: Path, kind: str) -> None:
    """Callbacks have hooks on the network then, and its gradients are there."""

    class Exporting(pl.Callback):
        def on_train_batch_end(self, fit: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            if fit.global_step == 2:
                done.append(export(module, tmp_path / "net.pt2", format="torch_export", example_inputs=EXAMPLE))
                assert module.training
                assert module.trainer is fit

    done: list[Any] = []
    others = {"distillation": DistillationCallback(0.5), "fisher": FisherPruneCallback(0.5)}
    trainer(others[kind], Exporting()).fit(Module(example=EXAMPLE))
    assert done[0].difference < 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_said(
    tmp_path: Path, format: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        export(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), tmp_path / "net", format=format, example_inputs=ROWS)
    said = capfd.readouterr()
    assert (said.out, said.err, caplog.text) == ("", "", "")

"""Files for others: what comes out is what the network gives, at any batch size, and the network is left alone."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from exports import FORMATS, needs_onnx
from fits import EXAMPLE, Module, trainer
from torch import Tensor, nn

from lightning_prune import load_pruned, prune, save_pruned
from lightning_prune.callbacks import L0PruneCallback, MagnitudePruneCallback
from lightning_prune.errors import ExportError, HistoryError
from lightning_prune.exporting import export, onnx_latency
from lightning_prune.exporting import export as exporting
from lightning_prune.exporting.formats import opened, session_of
from lightning_prune.inputs import Inputs
from lightning_prune.layers.channel_equilibrium import ChannelEquilibrium

IMAGES = torch.rand(2, 3, 8, 8)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 4)
    )
    net(torch.rand(16, 3, 8, 8))
    return net


def outputs(path: Path, format: Any, inputs: Inputs) -> list[Tensor]:
    return opened(format, path)(inputs)


@pytest.mark.parametrize("format", FORMATS)
def test_a_pruned_network(tmp_path: Path, format: Any) -> None:
    net = small()
    prune(net, IMAGES, pruning_ratio=0.5)
    before, state = deepcopy(net.state_dict()), torch.get_rng_state()
    done = export(net, tmp_path / "deep" / "net.bin", format=format, example_inputs=IMAGES[:1])
    assert done.difference < 1e-5
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert [path.name for path in done.path.parent.iterdir()] == ["net.bin"], "nothing unfinished is left"
    for size in (1, 2, 7):
        images = torch.randn(size, 3, 8, 8)
        (found,) = outputs(done.path, format, Inputs((images,)))
        torch.testing.assert_close(found, net.eval()(images), rtol=1e-4, atol=1e-5)
        net.train()


@needs_onnx
def test_weights_in_the_file_are_those_that_are_left(tmp_path: Path) -> None:
    sizes = []
    for ratio in (0.0, 0.75):
        net = small()
        prune(net, IMAGES, pruning_ratio=ratio)
        sizes.append(export(net, tmp_path / f"{ratio}.onnx", example_inputs=IMAGES).path.stat().st_size)
    assert sizes[1] < 0.7 * sizes[0]


class Two(nn.Module):
    """Two inputs, one with a default; outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        features = self.table(tokens)
        logits = self.head(features.mean(1))
        return {"logits": logits if scale is None else logits * scale, "features": features}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("form", ["positional", "keywords", "one of two"])
def test_inputs_and_outputs_have_their_names(tmp_path: Path, format: Any, form: str) -> None:
    torch.manual_seed(0)
    tokens, scale = torch.randint(0, 10, (4, 5)), torch.rand(4, 1)
    example: Any = {
        "positional": (tokens, scale),
        "keywords": {"tokens": tokens, "scale": scale},
        "one of two": tokens,
    }[form]
    net = Two().eval()
    done = export(net, tmp_path / "net", format=format, example_inputs=example)
    assert done.difference < 1e-5
    if format == "onnx":
        session = session_of(done.path, 1)
        wanted = ["tokens"] if form == "one of two" else ["tokens", "scale"]
        assert [each.name for each in session.get_inputs()] == wanted
        assert [each.name for each in session.get_outputs()] == ["logits", "features"]
        assert session.get_inputs()[0].shape[0] == "batch"


@pytest.mark.parametrize("format", FORMATS)
def test_a_module_after_its_fit(tmp_path: Path, format: Any) -> None:
    module = Module(example=EXAMPLE)
    fit = trainer(MagnitudePruneCallback(0.5, begin=1, end=1))
    fit.fit(module)
    done = export(module, tmp_path / "net", format=format)
    assert done.difference < 1e-5
    assert module.trainer is fit
    images = torch.randn(3, *EXAMPLE.shape[1:])
    torch.testing.assert_close(outputs(done.path, format, Inputs((images,)))[0], module.eval()(images))


@needs_onnx
@pytest.mark.parametrize("kind", ["trainer", "saved", "dense"])
def test_checkpoints(tmp_path: Path, kind: str) -> None:
    module, file = Module(example=EXAMPLE), tmp_path / "last.ckpt"
    callbacks = [] if kind == "dense" else [MagnitudePruneCallback(0.5, begin=1, end=1)]
    fit = trainer(*callbacks)
    fit.fit(module)
    if kind == "saved":
        save_pruned(module, file)
    else:
        fit.save_checkpoint(file)
    into = Module(example=EXAMPLE)
    dense = deepcopy(into.state_dict())
    done = export(file, tmp_path / "net.onnx", into=into)
    assert all(torch.equal(dense[name], value) for name, value in into.state_dict().items()), "`into` is left alone"
    images = torch.randn(3, *EXAMPLE.shape[1:])
    (found,) = outputs(done.path, "onnx", Inputs((images,)))
    torch.testing.assert_close(found, module.eval()(images), rtol=1e-4, atol=1e-5)
    if kind != "dense":
        assert torch.equal(load_pruned(Module(), file).eval()(images), module(images))


def test_masks_are_zeros_in_the_file(tmp_path: Path) -> None:
    module = Module(example=EXAMPLE)
    trainer(MagnitudePruneCallback(0.8, granularity="weights", begin=1, end=1)).fit(module)
    done = export(module, tmp_path / "net.pt2", format="torch_export")
    found = dict(torch.export.load(done.path).named_parameters())
    zeros = sum(int((weight == 0).sum()) for weight in found.values())
    assert zeros == sum(int((weight == 0).sum()) for weight in module.parameters()) > 0


@pytest.mark.parametrize("format", FORMATS)
def test_equilibrium_blocks(tmp_path: Path, format: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), ChannelEquilibrium(8), nn.ReLU(), nn.Flatten())
    net(torch.rand(8, 3, 8, 8))
    assert export(net, tmp_path / "net", format=format, example_inputs=IMAGES).difference < 1e-5


def test_gates_are_refused(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, fit: pl.Trainer, module: pl.LightningModule) -> None:
            with pytest.raises(ExportError, match="still has gates"):
                export(module, tmp_path / "net.onnx", example_inputs=EXAMPLE)
            fit.should_stop = True

    trainer(L0PruneCallback(0.5, gate_lr=0.7), Stop()).fit(Module(example=EXAMPLE))
    assert not list(tmp_path.glob("*.onnx"))


@needs_onnx
def test_latency_of_a_file(tmp_path: Path) -> None:
    done = export(small(), tmp_path / "net.onnx", example_inputs=IMAGES)
    assert 0 < onnx_latency(done.path, Inputs((IMAGES,)), seconds=0.01) < 1000


class BySize(nn.Module):
    """Reads the batch size as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.head(rows)
        return logits * float(len(rows)) if len(rows) < 3 else logits


@pytest.mark.parametrize("format", FORMATS)
def test_a_batch_size_that_matters_is_found_out(tmp_path: Path, format: Any) -> None:
    with pytest.raises(ExportError, match="batch='fixed'"):
        export(BySize(), tmp_path / "net", format=format, example_inputs=torch.rand(2, 3))
    assert not list(tmp_path.iterdir()), "no file is left, nor a part of one"
    done = export(BySize(), tmp_path / "net", format=format, example_inputs=torch.rand(4, 3), batch="fixed")
    assert done.difference < 1e-5


class Branching(nn.Module):
    """Branches on values, which a trace cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.head(rows)
        return logits if bool(rows[0, 0] > 0.9) else -logits


@pytest.mark.parametrize("format", FORMATS)
def test_a_branch_on_values_is_found_out(tmp_path: Path, format: Any) -> None:
    with pytest.raises(ExportError, match="Branching"):
        export(Branching(), tmp_path / "net", format=format, example_inputs=torch.rand(2, 3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"format": "tflite"}, ValueError, "`format` is one of 'onnx', 'torch_export', 'torchscript'; got 'tflite'"),
        ({"batch": 4}, ValueError, "`batch` is 'dynamic' or 'fixed'"),
        ({"example_inputs": None}, ValueError, "`example_inputs` is what the forward of Sequential"),
        ({"example_inputs": torch.rand(1, 5), "format": "torchscript"}, ExportError, "be written as torchscript"),
        ({"source": "nowhere.ckpt"}, ValueError, "pass `into`"),
        ({"source": "nowhere.ckpt", "into": small()}, FileNotFoundError, "nowhere.ckpt"),
        ({"source": __file__, "into": small()}, HistoryError, "test_exporting.py"),
    ],
)
def test_wrong_arguments(tmp_path: Path, given: dict[str, Any], kind: type[Exception], words: str) -> None:
    settings: dict[str, Any] = {"source": small(), "example_inputs": IMAGES, **given}
    with pytest.raises(kind, match=words):
        export(settings.pop("source"), tmp_path / "net", **settings)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-prune\[onnx\]'"):
        export(small(), tmp_path / "net.onnx", example_inputs=IMAGES)


def test_a_wrong_file_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is real: a writer that writes other weights is found out, and the old file stays."""
    module = __import__("sys").modules["lightning_prune.exporting.export"]
    done = exporting(small(), tmp_path / "net.pt2", format="torch_export", example_inputs=IMAGES)
    good, write = done.path.read_bytes(), module.write

    def wrong(format: Any, model: nn.Module, inputs: Inputs, path: Path, *, dynamic: bool) -> None:
        other = deepcopy(model)
        other[0].weight.mul_(1.01)
        write(format, other, inputs, path, dynamic=dynamic)

    monkeypatch.setattr(module, "write", wrong)
    with pytest.raises(ExportError, match="off by"):
        exporting(small(), tmp_path / "net.pt2", format="torch_export", example_inputs=IMAGES)
    assert done.path.read_bytes() == good

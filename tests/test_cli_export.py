"""`lightning-prune export` from outside: the run that wrote a checkpoint says what network it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exports import needs_onnx
from sweeping import run

from lightning_prune.exporting.formats import opened
from lightning_prune.inputs import Inputs
from lightning_prune.sensitivity import Sensitivity


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    done = run(folder, "experiment=smoke", "model=lenet_300_100", "dense_twin=false", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    (found,) = folder.rglob("*.ckpt")
    return found.rename(found.with_name("epoch=1.ckpt"))


@pytest.mark.parametrize(
    ("format", "ending"),
    [pytest.param("onnx", "onnx", marks=needs_onnx), ("torch_export", "pt2"), ("torchscript", "ts")],
)
def test_the_network_is_that_of_the_run(checkpoint: Path, format: str, ending: str, tmp_path: Path) -> None:
    """The default model is a ResNet-20; that of the run is found in its config."""
    done = run(tmp_path, "export", f"ckpt_path={checkpoint}", f"format={format}", f"out=net.{ending}")
    assert done.returncode == 0, done.stderr
    assert f"net.{ending}: {format}, off by" in done.stdout
    assert ("onnxruntime" in done.stdout) is (format == "onnx")
    (logits,) = opened(format, tmp_path / f"net.{ending}")(Inputs((torch.rand(3, 1, 8, 8),)))  # type: ignore[arg-type]
    assert logits.shape == (3, 10)


@needs_onnx
def test_the_file_lies_beside_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "export", f"ckpt_path={checkpoint}", "latency_batch=null")
    assert done.returncode == 0, done.stderr
    assert checkpoint.with_suffix(".onnx").exists()
    assert not list(tmp_path.iterdir()), "it leaves the file and nothing else"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("ckpt_path=nowhere.ckpt", "nowhere.ckpt is no file"),
        ("", "Missing mandatory value: ckpt_path"),
        ("ckpt_path=foreign.ckpt", "foreign.ckpt is no checkpoint"),
        ("ckpt_path={checkpoint} format=tflite", "`format` is one of 'onnx'"),
        ("ckpt_path={checkpoint} model=resnet20", "epoch=1.ckpt"),
    ],
)
def test_errors_are_words(checkpoint: Path, tmp_path: Path, arguments: str, words: str) -> None:
    (tmp_path / "foreign.ckpt").write_bytes(b"PK not a checkpoint")
    done = run(tmp_path, "export", *arguments.format(checkpoint=checkpoint).split())
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_config_of_others_is_passed_by(checkpoint: Path, tmp_path: Path) -> None:
    """On the way up from the checkpoint lie files that only have the name."""
    inner = tmp_path / "out" / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "config.yaml").write_text("model: resnet\ndata: digits\n")
    (inner.parent / "config.yaml").write_text("{: no yaml")
    ours = next(path for folder in checkpoint.parents if (path := folder / "config.yaml").is_file())
    (inner.parent.parent / "config.yaml").write_text(ours.read_text())
    (inner / "last.ckpt").write_bytes(checkpoint.read_bytes())
    done = run(tmp_path, "export", "ckpt_path=out/a/b/last.ckpt", "out=net.pt2", "format=torch_export")
    assert done.returncode == 0, done.stderr


@needs_onnx
def test_a_single_value_is_set_in_the_network_of_the_run(checkpoint: Path, tmp_path: Path) -> None:
    fits = run(tmp_path, "export", f"ckpt_path={checkpoint}", "+model.num_classes=10", "out=net.onnx")
    assert fits.returncode == 0, fits.stderr
    other = run(tmp_path, "export", f"ckpt_path={checkpoint}", "+model.num_classes=7", "out=other.onnx")
    assert other.returncode == 1
    assert "fc3" in other.stderr
    assert not (tmp_path / "other.onnx").exists()


def test_a_fixed_batch_is_that_of_the_latency(checkpoint: Path, tmp_path: Path) -> None:
    fixed = ["batch=fixed", "latency_batch=4", "format=torch_export", "out=net.pt2"]
    done = run(tmp_path, "export", f"ckpt_path={checkpoint}", *fixed)
    assert done.returncode == 0, done.stderr
    assert "batch 4: torch" in done.stdout
    net = torch.export.load(tmp_path / "net.pt2").module()
    assert net(torch.rand(4, 1, 8, 8)).shape == (4, 10)
    with pytest.raises(Exception, match="4"):
        net(torch.rand(2, 1, 8, 8))


def test_blocks_that_a_callback_put_in(tmp_path: Path) -> None:
    """Blocks that a callback of the run put in are in the checkpoint, and not in the network that the config names."""
    settings = ["callbacks=[channel_equilibrium]", "model=resnet20", "dense_twin=false", "hydra.run.dir=out"]
    done = run(tmp_path, "experiment=smoke", *settings, "trainer.max_epochs=1", "schedule.begin=0", "schedule.end=0")
    assert done.returncode == 0, done.stderr
    (found,) = tmp_path.rglob("*.ckpt")
    done = run(tmp_path, "export", f'ckpt_path="{found}"', "out=net.pt2", "format=torch_export")  # for the "=" in it
    assert done.returncode == 0, done.stderr
    names = dict(torch.export.load(tmp_path / "net.pt2").named_parameters())
    assert any("equilibrium" in name for name in names)
    done = run(tmp_path, "analyze", f"ckpt_path={found}", "hydra.run.dir=looked", "pruning_ratio=0")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "looked" / "analysis.json").is_file()
    done = run(tmp_path, "sensitivity", f"checkpoint={found}", "batches=1", "ratios=[0.5]", "hydra.run.dir=scanned")
    assert done.returncode == 0, done.stderr
    assert len(Sensitivity.load(tmp_path / "scanned" / "sensitivity.json").rows) > 20

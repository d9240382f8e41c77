"""The speed benchmark: the net built narrow, what is told of a cut net, resuming, failures, and the table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.tensors import named_tensors

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import speedup
from circumstances import note, noted
from speedup_nets import added_biases, left_behind, livened, narrow_of, operations

IMAGES = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 10)),
    )


class Emitting(nn.Module):
    """What a removed channel emits is taken up by a bias that the last convolution did not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu()).mean((2, 3))


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "emitting": Emitting,
    "convnext": lambda: torchvision.models.ConvNeXt(
        [torchvision.models.convnext.CNBlockConfig(16, 32, 1), torchvision.models.convnext.CNBlockConfig(32, None, 1)]
    ),
    "vit": lambda: torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=10),
    "regnet": lambda: torchvision.models.RegNet(
        torchvision.models.regnet.BlockParams([1, 1], [16, 32], [8, 8], [1, 1], [2, 2], 0.25), 10, 8
    ),
}


def cut(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Return a cut network, and the one that is built narrow."""
    pruned = livened(build(), 32)
    prune(pruned, IMAGES, pruning_ratio=0.5, of="macs")
    return pruned, narrow_of(build(), pruned)


def arguments(out: Path, **changed: Any) -> argparse.Namespace:
    given = {"models": ["plain"], "shares": [0.5], "pixels": 32, "rounds": 4, "round_to": None, "compile": []}
    return argparse.Namespace(**{**given, "out": out, **changed})


def build(name: str, pixels: int) -> nn.Module:
    if name == "broken":
        raise RuntimeError("no such network\nand more")
    return BUILDS[name]()


@pytest.fixture(autouse=True)
def _only_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speedup, "ENGINES", {"torch": speedup.eager})
    monkeypatch.setattr(speedup, "TURN", 0.0)


@pytest.mark.parametrize("name", BUILDS)
def test_the_narrow_net_has_the_shapes_of_the_cut_one_and_shares_no_memory_with_it(name: str) -> None:
    pruned, narrow = cut(BUILDS[name])
    dense, found, plain = (named_tensors(net) for net in (BUILDS[name](), pruned, narrow))
    assert list(plain) == list(dense)
    assert {key: tensor.shape for key, tensor in plain.items()} == {key: found[key].shape for key in plain}
    assert any(tensor.shape != dense[key].shape for key, tensor in plain.items())
    held = [{tensor.untyped_storage().data_ptr() for tensor in tensors.values()} for tensors in (found, plain)]
    assert not held[0] & held[1]
    assert not {id(module) for module in pruned.modules()} & {id(module) for module in narrow.modules()}


@pytest.mark.parametrize("name", [name for name in BUILDS if name != "emitting"])
def test_both_do_the_same_operations_and_return_the_same(name: str) -> None:
    pruned, narrow = cut(BUILDS[name])
    assert added_biases(pruned, narrow) == []
    assert left_behind(pruned, narrow, IMAGES) == []
    with torch.no_grad():
        assert torch.equal(pruned(IMAGES), narrow(IMAGES))


def test_a_bias_that_the_cut_puts_in_is_not_in_the_narrow_net() -> None:
    pruned, narrow = cut(Emitting)
    assert added_biases(pruned, narrow) == ["last.bias"]
    assert narrow.last.bias is None
    assert left_behind(pruned, narrow, IMAGES) == []


def test_what_a_cut_leaves_behind_is_told() -> None:
    pruned, narrow = cut(plain)
    assert isinstance(pruned[4], nn.Conv2d)
    whole = torch.zeros(*pruned[4].weight.shape[:3], 9)
    pruned[4].weight.data = whole[..., :3]
    pruned[0].register_forward_hook(lambda *_: None)
    pruned[2] = nn.Sequential(pruned[2])
    found = left_behind(pruned, narrow, IMAGES)
    assert "0 has forward hooks" in found
    assert "2 is a Sequential" in found
    assert any(line.startswith("4.weight has strides") for line in found)
    assert any(line.startswith("4.weight holds") for line in found)


def test_a_gather_in_the_forward_is_told() -> None:
    net = plain().eval()
    gathering = deepcopy(net)
    gathering[2].register_forward_hook(lambda module, inputs, output: output.index_select(1, torch.arange(16)))
    assert any("index_select" in line for line in left_behind(gathering, net, IMAGES))
    assert len(operations(gathering, IMAGES)) > len(operations(net, IMAGES))


def test_a_net_that_cannot_be_built_narrow_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"1\.running_mean"):
        narrow_of(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)))


def test_everyone_runs_everywhere_in_a_round_and_after_everyone() -> None:
    orders = [speedup.order(number) for number in range(8)]
    assert all(sorted(order) == sorted(speedup.KINDS) for order in orders)
    assert {order[0] for order in orders} == {order[-1] for order in orders} == set(speedup.KINDS)
    assert {("dense", "pruned"), ("pruned", "dense")} <= {pair for order in orders for pair in pairwise(order)}


def test_a_row_is_written_at_once_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(tmp_path / "speedup.jsonl")
    speedup.measure(given, build)
    (row,) = noted(given.out)
    assert (row["model"], row["share"], row["engine"]) == ("plain", 0.5, "torch")
    assert {kind: len(times) for kind, times in row["ms"].items()} == dict.fromkeys(speedup.KINDS, 4)
    assert row["macs"]["pruned"] == row["macs"]["narrow"] < 0.55 * row["macs"]["dense"]
    assert (row["left behind"], row["off"]) == ([], 0.0)
    monkeypatch.setattr(speedup, "timed", lambda opened, rounds: {kind: [1.0] for kind in speedup.KINDS})
    speedup.measure(arguments(given.out, models=["plain", "emitting"]), build)
    first, second = noted(given.out)
    assert first == row
    assert (second["model"], second["ms"]["dense"], second["off"]) == ("emitting", [1.0], None)


def test_a_file_of_other_images_is_not_gone_on_with(tmp_path: Path) -> None:
    given = arguments(tmp_path / "speedup.jsonl", models=["broken"])
    speedup.measure(given, build)
    with pytest.raises(SystemExit, match="was measured with pixels 32"):
        speedup.measure(arguments(given.out, pixels=64), build)


def test_what_fails_leaves_its_row_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(nets: speedup.Nets, images: Tensor, folder: Path) -> speedup.Opened:
        raise KeyError("no engine")

    monkeypatch.setattr(speedup, "ENGINES", {"failing": fails, "torch": speedup.eager})
    given = arguments(tmp_path / "speedup.jsonl", models=["broken", "plain"])
    speedup.measure(given, build)
    rows = noted(given.out)
    errors = [row.get("error") for row in rows]
    assert errors == ["RuntimeError: no such network"] * 2 + ["KeyError: 'no engine'", None]
    said = speedup.table(rows)
    assert "broken at 50% in torch fails: RuntimeError: no such network" in said
    assert "plain at 50% in failing fails: KeyError: 'no engine'" in said


def test_without_onnxruntime_its_rows_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speedup, "ENGINES", {"onnxruntime": speedup.onnxruntime})
    monkeypatch.setattr(speedup, "installed", lambda package: None)
    given = arguments(tmp_path / "speedup.jsonl")
    speedup.measure(given, build)
    rows = noted(given.out)
    assert rows[0]["skipped"] == "onnxruntime is not installed"
    assert "onnxruntime is not installed" in speedup.table(rows)


def test_the_dense_file_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def export(net: nn.Module, path: Path, **settings: Any) -> None:
        written.append(path.name)
        path.write_text("a file of it")

    class Session:
        def run(self, names: None, arrays: dict[str, Any]) -> None: ...

    monkeypatch.setattr(speedup, "export", export)
    monkeypatch.setattr(speedup, "session_of", lambda path, threads: Session() if path.read_text() else None)
    monkeypatch.setattr(speedup, "feed", lambda session, inputs: {})
    monkeypatch.setattr(speedup, "installed", lambda package: "1.0")
    monkeypatch.setattr(speedup, "ENGINES", {"onnxruntime": speedup.onnxruntime})
    given = arguments(tmp_path / "speedup.jsonl", shares=[0.25, 0.5])
    speedup.measure(given, build)
    rows = noted(given.out)
    assert [row["same file"] for row in rows] == [True, True]
    assert "2 of 2 ONNX files of cut networks are those of the narrow ones" in speedup.table(rows)
    assert written == ["dense.onnx", "pruned.onnx", "narrow.onnx", "pruned.onnx", "narrow.onnx"]


def row(model: str, pruned: list[float], **more: Any) -> dict[str, Any]:
    times = {"dense": [8.0] * 4, "pruned": pruned, "narrow": [4.0] * 4, "again": [4.0, 4.0, 4.0, 4.1]}
    counts = {"dense": 200, "pruned": 100, "narrow": 100}
    found = {"macs": counts, "params": counts, "added biases": 0, "left behind": [], "off": 0.0, "ms": times}
    return {"model": model, "share": 0.5, "engine": "torch", "pixels": 128, **found, **more}


def test_the_table_tells_ratios_and_what_is_beyond_noise() -> None:
    rows = [
        row("even", [3.9, 4.0, 4.0, 4.1]),
        row("slower", [5.0, 5.0, 5.2, 5.2], **{"left behind": ["0 is a Gather"], "added biases": 3, "off": None}),
    ]
    assert [found["model"] for found in speedup.beyond(rows, "torch")] == ["slower"]
    said = speedup.table(rows)
    assert "| even | 50% | 50% | 2.00 | 2.00 (1.99 to 2.01) | 1.00 (0.99 to 1.01) |" in said
    assert "beyond noise: slower at 50%" in said
    assert "Left behind in slower at 50%: 0 is a Gather" in said
    assert "slower: the cut puts in 3 biases" in said
    assert "1 of 2 cut networks do the same operations" in said
    head, _, *lines = [line for line in said.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {head.count("|")}


def test_the_table_is_printed_from_the_file_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "speedup.jsonl"
    note(out, row("even", [4.0] * 4))
    monkeypatch.setattr(speedup, "measure", lambda given: pytest.fail("it measures"))
    speedup.main(["--table", "--out", str(out)])
    assert "| even | 50% |" in capsys.readouterr().out

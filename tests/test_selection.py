"""Networks in which norms read a shared trunk: every reader picks its own channels."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from proof import permute_channels
from torch import Tensor, nn
from versions import older

from lightning_prune import find_groups, history_of, load_pruned, prune, save_pruned
from lightning_prune.allocation import Global
from lightning_prune.criteria import BNScale
from lightning_prune.errors import HistoryError
from lightning_prune.graph import read
from lightning_prune.layers import ChannelSelect
from lightning_prune.selection import selected, trunk_readers
from lightning_prune.workbench import resnet20


class PreAct(nn.Module):
    """Norm, activation, convolution, twice, beside a shortcut."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, inner, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(inner), nn.Conv2d(inner, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(y)))


class PreActNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1, bias=False)
        self.blocks = nn.Sequential(PreAct(8, 6), PreAct(8, 6))
        self.bn, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.blocks(self.stem(x)))).mean((2, 3)))


class Dense(nn.Module):
    """Each layer reads what all layers before it have made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * place) for place in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 3 * place, 3, 1, bias=False) for place in range(2))
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.fc(F.relu(self.norms[2](x)).mean((2, 3)))


def lively(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 1)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    return net.double().eval()


NETS = {"pre-activation": PreActNet, "dense": Dense}
NORMS = {
    "pre-activation": ("blocks.0.bn1", "blocks.1.bn1", "bn"),
    "dense": ("norms.0", "norms.1", "norms.2"),
}
IMAGES = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETS)
class TestTrunks:
    def test_the_norms_that_read_them_are_found(self, name: str) -> None:
        net = lively(NETS[name]())
        assert trunk_readers(net, read(net, IMAGES)) == NORMS[name]

    def test_with_the_layers_each_reader_is_a_group_and_nothing_else_changes(self, name: str) -> None:
        net = lively(NETS[name]())
        before, names = net(IMAGES), list(net.state_dict())
        with selected(net, NORMS[name]):
            assert torch.equal(net(IMAGES), before)
            groups = find_groups(net, IMAGES)
            free = {group.name: group.size for group in groups if not group.frozen}
            assert set(NORMS[name]) <= {key.removesuffix(".0").removesuffix(".1") for key in free}
            permute_channels(net, [group for group in groups if not group.frozen])
            assert torch.allclose(net(IMAGES), before, atol=1e-12, rtol=0)
        assert list(net.state_dict()) == names

    def test_removing_is_zeroing_and_the_trunk_stays(self, name: str) -> None:
        net = lively(NETS[name]())
        masked = copy.deepcopy(net)
        record = prune(net, IMAGES, pruning_ratio=0.5, criterion=BNScale(), trunks="selected", constants="drop")
        assert record.selects == NORMS[name]
        assert record.reached == pytest.approx(0.5, abs=0.05)
        assert net.stem.out_channels == masked.stem.out_channels
        for norm in NORMS[name]:
            gone = torch.ones(masked.get_submodule(norm).num_features, dtype=torch.bool)
            gone[net.get_submodule(norm)[0].indices] = False
            assert gone.any()
            for parameter in masked.get_submodule(norm).parameters():
                parameter.data[gone] = 0
        if name == "pre-activation":
            for place in (0, 1):
                kept = torch.tensor(record.kept[f"blocks.{place}.bn2.weight"][0])
                gone = torch.ones(6, dtype=torch.bool)
                gone[kept] = False
                for parameter in masked.blocks[place].bn2.parameters():
                    parameter.data[gone] = 0
        assert torch.allclose(net(IMAGES), masked(IMAGES), atol=1e-12, rtol=0)

    def test_constants_are_absorbed(self, name: str) -> None:
        net = lively(NETS[name]())
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data[: len(module.weight) // 2] = 0
                module.bias.data.abs_()
        before, naive = net(IMAGES), copy.deepcopy(net)
        how = {"pruning_ratio": 0.3, "criterion": BNScale(), "allocation": Global(), "trunks": "selected"}
        prune(net, IMAGES, **how)
        assert (net(IMAGES) - before).abs().max() < 1e-12
        prune(naive, IMAGES, **how, constants="drop")
        assert (naive(IMAGES) - before).abs().max() > 1e-2

    def test_a_second_cut_goes_on_with_the_layers_that_are_there(self, name: str) -> None:
        net = lively(NETS[name]())
        prune(net, IMAGES, pruning_ratio=0.3, criterion=BNScale(), trunks="selected")
        record = prune(net, IMAGES, pruning_ratio=0.5, criterion=BNScale(), trunks="selected")
        assert record.selects == ()
        assert record.reached == pytest.approx(0.5, abs=0.06)
        assert sum(isinstance(module, ChannelSelect) for module in net.modules()) == 3

    def test_a_file_brings_them_along(self, name: str, tmp_path: Path) -> None:
        net = lively(NETS[name]())
        for ratio in (0.3, 0.5):
            prune(net, IMAGES, pruning_ratio=ratio, criterion=BNScale(), trunks="selected")
        save_pruned(net, tmp_path / "net.pt")
        loaded = load_pruned(NETS[name]().double(), tmp_path / "net.pt").eval()
        assert torch.equal(loaded(IMAGES), net(IMAGES))
        assert history_of(loaded) == history_of(net)

    def test_it_compiles_and_exports(self, name: str, tmp_path: Path) -> None:
        if older("torch", "2.6") and name == "dense":
            pytest.skip("torch before 2.6 does not compile a `zip` with strict=True")
        net = lively(NETS[name]()).float()
        prune(net, IMAGES.float(), pruning_ratio=0.5, criterion=BNScale(), trunks="selected")
        images = IMAGES.float()
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(images), net(images))
        exported = torch.export.export(net, (images,)).module()
        assert torch.allclose(exported(images), net(images))

    def test_it_is_exported_to_onnx(self, name: str, tmp_path: Path) -> None:
        onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
        pytest.importorskip("onnxscript", reason="torch exports with onnxscript")
        net, images = lively(NETS[name]()).float(), IMAGES.float()
        prune(net, images, pruning_ratio=0.5, criterion=BNScale(), trunks="selected")
        torch.onnx.export(net, (images,), str(tmp_path / "net.onnx"), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
        found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
        assert torch.allclose(torch.from_numpy(found), net(images), atol=1e-5)

    def test_a_failure_leaves_no_layer_behind(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        net = lively(NETS[name]())
        before = net(IMAGES)

        def fail(*_: object) -> None:
            raise RuntimeError("struck")

        monkeypatch.setattr("lightning_prune.surgery._exchange", fail)
        with pytest.raises(RuntimeError, match="struck"):
            prune(net, IMAGES, pruning_ratio=0.5, criterion=BNScale(), trunks="selected")
        monkeypatch.undo()
        assert not any(isinstance(module, ChannelSelect) for module in net.modules())
        assert torch.equal(net(IMAGES), before)


def test_ignored_norms_get_none() -> None:
    net = lively(PreActNet())
    record = prune(net, IMAGES, pruning_ratio=0.5, criterion=BNScale(), trunks="selected", ignore=["blocks.0*"])
    assert record.selects == ("blocks.1.bn1", "bn")


def test_networks_without_shared_trunks_get_none() -> None:
    net = resnet20(3, 8).eval()
    record = prune(net, torch.zeros(2, 3, 8, 8), pruning_ratio=0.5, trunks="selected")
    assert record.selects == ()
    assert record.reached == pytest.approx(0.5, abs=0.02)


def test_a_file_that_selects_before_something_else_is_refused(tmp_path: Path) -> None:
    net = lively(PreActNet())
    prune(net, IMAGES, pruning_ratio=0.5, criterion=BNScale(), trunks="selected")
    save_pruned(net, tmp_path / "net.pt")
    content = torch.load(tmp_path / "net.pt")
    content["pruning_history"][0]["selects"] = ["fc"]
    torch.save(content, tmp_path / "net.pt")
    fresh = PreActNet().double()
    with pytest.raises(HistoryError, match="puts a ChannelSelect before 'fc'"):
        load_pruned(fresh, tmp_path / "net.pt")
    assert list(fresh.state_dict()) == list(PreActNet().state_dict())


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`trunks` is one of 'whole', 'selected', 'sampled'; got 'cut'"):
        prune(nn.Linear(2, 2), torch.zeros(1, 2), pruning_ratio=0.5, trunks="cut")

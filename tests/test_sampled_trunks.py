"""Networks in which convolutions read a shared trunk: each samples its own channels, and the trunk stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from fits import Module, images, momentum, trainer
from gated_networks import gated
from proof import permute_channels
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune import PruneRecord, find_groups, history_of, load_pruned, prune, save_pruned
from lightning_prune.callbacks import FisherPruneCallback, MagnitudePruneCallback, PruneCallback
from lightning_prune.cut import cut_tensor
from lightning_prune.errors import HistoryError, PruningError
from lightning_prune.history import commit, reach
from lightning_prune.layers import ChannelSelect
from lightning_prune.masks import masks_of
from lightning_prune.masks.held import hold
from lightning_prune.optimizers import rebuild
from lightning_prune.pruner import Request, draft_cut
from lightning_prune.selection import selected
from lightning_prune.workbench import resnet20


class Block(nn.Module):
    """Two convolutions beside a shortcut, or a projection."""

    def __init__(self, channels: int, inner: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.project = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.project(x))


class Residual(nn.Sequential):
    def __init__(self, colours: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(colours, 8, 3, padding=1, bias=False)
        self.first, self.second, self.third = Block(8, 6, 8), Block(8, 6, 8), Block(8, 6, 12)
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)


SAMPLED = ("first.conv1", "second.conv1", "third.conv1", "third.project")


def lively(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
    return net.double().eval()


def _heads(*blocks: int, projected: tuple[int, ...], shortcut: str, stage: str, first: int) -> tuple[str, ...]:
    """Name what reads the trunk of a ResNet: each block's first convolution, and the projections."""
    names = []
    for place, count in enumerate(blocks):
        for block in range(count):
            name = f"{stage}{place + first}.{block}"
            names += [f"{name}.conv1"] + ([f"{name}.{shortcut}.0"] if block == 0 and place in projected else [])
    return tuple(names)


IMAGES = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: resnet20(3, 16),
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
}
READERS = {
    "resnet20": _heads(3, 3, 3, projected=(1, 2), shortcut="shortcut", stage="stage", first=1),
    "resnet18": _heads(2, 2, 2, 2, projected=(1, 2, 3), shortcut="downsample", stage="layer", first=1),
    "resnet50": _heads(3, 4, 6, 3, projected=(0, 1, 2, 3), shortcut="downsample", stage="layer", first=1),
}


def sampled(net: nn.Module, x: Tensor = IMAGES, ratio: float = 0.5, **arguments: object) -> PruneRecord:
    return prune(net, x, pruning_ratio=ratio, trunks="sampled", **arguments)


def zeroed(net: nn.Module, record: PruneRecord) -> nn.Module:
    """Return a copy in which what a cut removes is zero: what sampled convolutions read, and what norms make."""
    net = copy.deepcopy(net)
    for name in record.selects:
        kept = torch.tensor(record.kept[f"{name}.1.weight"][1])
        mask = torch.zeros(net.get_submodule(name).in_channels, dtype=torch.float64).index_fill(0, kept, 1.0)
        net.get_submodule(name).register_forward_pre_hook(lambda _, args, mask=mask: args[0] * mask[:, None, None])
    for name, norm in net.named_modules():
        if isinstance(norm, nn.BatchNorm2d) and f"{name}.weight" in record.kept:
            gone = torch.ones(norm.num_features, dtype=torch.bool)
            gone[list(record.kept[f"{name}.weight"][0])] = False
            norm.weight.data[gone], norm.bias.data[gone] = 0.0, 0.0
    return net


@pytest.mark.parametrize("name", NETS)
class TestResNets:
    def test_removing_is_zeroing_and_the_trunk_stays(self, name: str) -> None:
        net = lively(NETS[name]())
        dense = copy.deepcopy(net)
        record = sampled(net, constants="drop")
        assert sorted(record.selects) == sorted(READERS[name])
        assert record.reached == pytest.approx(0.5, abs=0.01)
        last = "conv3" if name == "resnet50" else "conv2"
        for name_, module in dense.named_modules():
            if isinstance(module, nn.Conv2d) and (name_ == "conv1" or name_.endswith(last)):
                assert net.get_submodule(name_).out_channels == module.out_channels
        for reader in record.selects:
            select, conv = net.get_submodule(reader)
            assert len(select.indices) == conv.in_channels < dense.get_submodule(reader).in_channels
        out = zeroed(dense, record)(IMAGES).detach()
        assert torch.allclose(net(IMAGES), out, atol=1e-10 * float(out.abs().max()), rtol=0)

    def test_the_record_tells_the_macs_that_torch_counts(self, name: str) -> None:
        net = lively(NETS[name]())
        record = sampled(net, of="macs")
        with FlopCounterMode(display=False) as counter:
            net(IMAGES)
        assert counter.get_total_flops() / 2 / len(IMAGES) == record.macs.after
        assert record.macs.after / record.macs.dense == pytest.approx(0.5, abs=0.02)

    def test_a_second_cut_goes_on_and_a_file_brings_both_along(self, name: str, tmp_path: Path) -> None:
        net = lively(NETS[name]())
        sampled(net, ratio=0.3)
        record = sampled(net, ratio=0.5)
        assert record.selects == ()
        assert record.reached == pytest.approx(0.5, abs=0.01)
        assert sum(isinstance(module, ChannelSelect) for module in net.modules()) == len(READERS[name])
        save_pruned(net, tmp_path / "net.pt")
        loaded = load_pruned(NETS[name]().double(), tmp_path / "net.pt").eval()
        assert torch.equal(loaded(IMAGES), net(IMAGES))
        assert history_of(loaded) == history_of(net)
        assert list(loaded.state_dict()) == list(net.state_dict())


class TestASmallOne:
    def test_with_the_layers_each_reader_is_a_group_and_the_trunk_is_frozen(self) -> None:
        net = lively(Residual())
        before, names = net(IMAGES), list(net.state_dict())
        with selected(net, SAMPLED):
            assert torch.equal(net(IMAGES), before)
            groups = find_groups(net, IMAGES)
            assert {group.name: group.frozen is None for group in groups} == {
                **{"stem": False, "third.conv2": True, "fc": False},
                **dict.fromkeys([f"{block}.conv1.1" for block in ("first", "second", "third")], True),
                **dict.fromkeys([f"{block}.conv1.1#2" for block in ("first", "second", "third")], True),
                "third.project.1": True,
            }
            permute_channels(net, [group for group in groups if not group.frozen])
            assert torch.allclose(net(IMAGES), before, atol=1e-12, rtol=0)
        assert list(net.state_dict()) == names

    def test_parameters_stay_the_same_objects_and_momentum_follows(self) -> None:
        net = lively(Residual())
        optimizer = momentum(net.parameters())
        net(IMAGES).square().sum().backward()
        optimizer.step()
        held = {id(parameter): optimizer.state[parameter]["momentum_buffer"] for parameter in net.parameters()}
        draft = draft_cut(net, IMAGES, Request(0.5, trunks="sampled"))
        commit(net, draft.cut, draft.record, draft.offsets)
        rebuild(optimizer, net, draft.cut)
        assert {id(parameter) for parameter in net.parameters()} == held.keys()
        assert "first.conv1.1.weight" in dict(net.named_parameters())
        assert {0, 1} == draft.cut.kept["first.conv1.1.weight"].keys()
        for name, parameter in net.named_parameters():
            expected = cut_tensor(held[id(parameter)], draft.cut.kept.get(name, {}))
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"], expected)
        net(IMAGES).square().sum().backward()
        optimizer.step()

    def test_a_cut_can_be_taken_back(self) -> None:
        net = lively(Residual())
        dense = copy.deepcopy(net)
        record = sampled(net, constants="drop")
        out = net(IMAGES)
        reach(net, ())
        assert {name: tensor.shape for name, tensor in net.state_dict().items()} == {
            name: tensor.shape for name, tensor in dense.state_dict().items()
        }
        assert torch.allclose(net(IMAGES), out, atol=1e-12, rtol=0)
        reach(net, [record])
        assert torch.equal(net(IMAGES), out)

    def test_it_compiles_and_exports(self) -> None:
        net, pictures = lively(Residual()).float(), IMAGES.float()
        sampled(net, pictures)
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(pictures), net(pictures))
        assert torch.allclose(torch.export.export(net, (pictures,)).module()(pictures), net(pictures))

    def test_a_file_that_selects_before_something_else_is_refused(self, tmp_path: Path) -> None:
        net = lively(Residual())
        sampled(net)
        save_pruned(net, tmp_path / "net.pt")
        content = torch.load(tmp_path / "net.pt")
        content["pruning_history"][0]["selects"] = ["fc"]
        torch.save(content, tmp_path / "net.pt")
        with pytest.raises(HistoryError, match="before 'fc', which is no BatchNorm of the model, and no convolution"):
            load_pruned(Residual().double(), tmp_path / "net.pt")


class TestWhoSamples:
    def test_selected_leaves_convolutions_alone(self) -> None:
        net = lively(Residual())
        assert prune(net, IMAGES, pruning_ratio=0.5, trunks="selected").selects == ()

    def test_ignored_convolutions_do_not(self) -> None:
        record = sampled(lively(Residual()), ignore=["first*", "third.project"])
        assert record.selects == ("second.conv1", "third.conv1")

    def test_a_norm_that_selects_does_it_for_the_convolution_behind_it(self) -> None:
        x = IMAGES[:, :1]
        assert sampled(lively(_PreActivation()), x).selects == ("norm", "end")
        assert sampled(lively(_PreActivation()), x, ignore=["norm"]).selects == ("end", "conv")

    def test_convolutions_of_an_image_do_not(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
                self.a, self.b, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
                self.fc = nn.Linear(8, 4)

            def forward(self, x: Tensor) -> Tensor:
                x = x - self.mean
                y: Tensor = self.fc(F.relu(self.norm(self.a(x) + self.b(x))).mean((2, 3)))
                return y

        assert sampled(lively(Two())).selects == ()

    def test_convolutions_in_groups_do_not(self) -> None:
        net = Residual()
        net.second.conv1 = nn.Conv2d(8, 6, 3, padding=1, groups=2, bias=False)
        assert sampled(lively(net)).selects == ("first.conv1", "third.conv1", "third.project")

    def test_those_of_one_dimension_and_of_three_do(self) -> None:
        class Volume(nn.Module):
            def __init__(self, dims: int) -> None:
                super().__init__()
                conv = (nn.Conv1d, nn.Conv3d)[dims // 2]
                self.stem, self.branch, self.end = conv(2, 8, 1), conv(8, 8, 1), conv(8, 3, 1)

            def forward(self, x: Tensor) -> Tensor:
                x = self.stem(x)
                y: Tensor = self.end(F.relu(x + self.branch(F.relu(x))))
                return y

        for dims in (1, 3):
            net, x = lively(Volume(dims)), torch.randn(2, 2, *[5] * dims, dtype=torch.float64)
            dense = copy.deepcopy(net)
            record = sampled(net, x)
            assert record.selects == ("branch", "end")
            for reader in record.selects:
                gone = torch.ones(8, dtype=torch.bool)
                gone[net.get_submodule(reader)[0].indices] = False
                assert gone.sum() == 4
                dense.get_submodule(reader).weight.data[:, gone] = 0
            assert torch.allclose(net(x), dense(x), atol=1e-12, rtol=0)
            assert torch.allclose(net(x[0]), dense(x[0]), atol=1e-12, rtol=0)  # without a batch


class TestNeighbours:
    def test_masks_take_the_new_names(self) -> None:
        net = lively(Residual())
        mask = torch.rand(6, 8, 3, 3) > 0.5
        net.first.conv1.weight.data *= mask
        hold(net, {"first.conv1.weight": mask})
        record = sampled(net)
        kept = {dim: torch.tensor(places) for dim, places in record.kept["first.conv1.1.weight"].items()}
        assert masks_of(net).keys() == {"first.conv1.1.weight"}
        assert torch.equal(masks_of(net)["first.conv1.1.weight"], cut_tensor(mask, kept))

    def test_layers_that_read_through_gates_are_refused(self) -> None:
        net = Residual().eval()
        gated(net, IMAGES.float())
        before = list(net.state_dict())
        with pytest.raises(PruningError, match=r"reads through gates.*trunks=.whole"):
            sampled(net, IMAGES.float())
        assert list(net.state_dict()) == before

    def test_masks_of_weights_are_not_put_on_while_sampling(self) -> None:
        with pytest.raises(ValueError, match='`trunks` "sampled" gives convolutions other names'):
            MagnitudePruneCallback(0.5, granularity="weights", trunks="sampled")

    def test_masks_beside_a_callback_that_samples_go_on(self) -> None:
        module = Module(net=Residual(1))
        weights = MagnitudePruneCallback(0.6, granularity="weights", begin=1, end=3)
        trainer(PruneCallback(0.5, begin=2, end=2, trunks="sampled"), weights, max_epochs=4).fit(module, images())
        assert "net.first.conv1.1.weight" in masks_of(module)
        for name, mask in masks_of(module).items():
            assert not module.get_parameter(name)[~mask].any()

    @pytest.mark.parametrize("trunks", ["selected", "sampled"])
    @pytest.mark.parametrize("channels", [None, 4])
    def test_what_was_gathered_scores_what_is_sampled(self, trunks: str, channels: int | None) -> None:
        net = nn.Sequential(Residual(1)) if trunks == "sampled" else _PreActivation()
        module = Module(net=net)
        fisher = FisherPruneCallback(0.4, channels_per_event=channels, begin=1, end=2, trunks=trunks)
        trainer(fisher, max_epochs=3).fit(module, images())
        selects = [part for part in module.modules() if isinstance(part, ChannelSelect)]
        assert selects
        assert any(len(part.indices) < 8 for part in selects)

    def test_a_fit_writes_checkpoints_that_load(self, tmp_path: Path) -> None:
        module = Module(net=Residual(1))
        fit = trainer(PruneCallback(0.5, begin=1, end=2, trunks="sampled"), max_epochs=3)
        fit.fit(module, images())
        fit.save_checkpoint(tmp_path / "fit.ckpt")
        loaded = load_pruned(Module(net=Residual(1)), tmp_path / "fit.ckpt").eval()
        x = torch.randn(3, 1, 6, 6)
        assert torch.equal(loaded(x), module.eval()(x))


class _PreActivation(nn.Module):
    """One residual branch that begins with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.end, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv(F.relu(self.norm(x)))
        y: Tensor = self.fc(F.relu(self.end(x)).mean((2, 3)))
        return y

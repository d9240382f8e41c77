"""Where equilibrium blocks go, how they come and go, how they fold away, and what they make of a scale."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from fits import EXAMPLE, equal, network
from proof import Net, outputs, randomise, relative_error
from torch import Tensor, nn

from lightning_prune import find_groups, prune
from lightning_prune.criteria import BNScale
from lightning_prune.criteria.bn_scale import effective_scale
from lightning_prune.equilibrium import Branches, Equilibrium, blocks_of, equilibrate, fold, places, remove
from lightning_prune.errors import PruningError
from lightning_prune.layers import BatchDecorrelation, ChannelEquilibrium, Equilibrated, InstanceReweighting
from lightning_prune.layers.norms import named_norms
from lightning_prune.workbench import resnet20

DECORRELATION = Equilibrium("decorrelation", group_size=4)

PICTURES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def bottlenecks(blocks: int, stages: int, name: str) -> list[str]:
    return [f"layer{stage}.{block}.{name}" for stage in range(1, stages + 1) for block in range(blocks)]


def encoder(layers: int, *, norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class TestPlaces:
    def test_a_residual_network_for_small_images(self) -> None:
        stages = [f"stage{stage}.{block}.bn2" for stage in (1, 2) for block in range(3)]
        assert places(resnet20(), "auto", PICTURES) == ["bn1", *stages]

    @pytest.mark.parametrize("option", ["A", "B"])
    def test_whatever_the_shortcut(self, option: Any) -> None:
        assert places(resnet20(option=option), "auto", PICTURES) == places(resnet20(), "auto", PICTURES)

    def test_they_are_those_of_the_network_that_is_built_with_blocks(self) -> None:
        assert places(resnet20(), "auto", PICTURES) == list(blocks_of(resnet20(norm="ce")))

    def test_torchvision_basic_blocks(self) -> None:
        found = places(torchvision.models.resnet18(), "auto", PICTURES)
        assert found == ["bn1", *bottlenecks(2, 3, "bn2")]

    def test_torchvision_bottlenecks(self) -> None:
        depths = {1: 3, 2: 4, 3: 6}
        ends = [f"layer{stage}.{block}.bn3" for stage, depth in depths.items() for block in range(depth)]
        assert places(torchvision.models.resnet50(), "auto", PICTURES) == ["bn1", *ends]

    def test_a_residual_network_inside_of_another_module(self) -> None:
        found = places(nn.Sequential(nn.Identity(), resnet20()), "auto", PICTURES)
        assert found == [f"1.{name}" for name in places(resnet20(), "auto", PICTURES)]

    def test_linear_bottlenecks_are_not_mistaken_for_shortcuts(self) -> None:
        """A MobileNetV2 block without a sum ends on a norm, which the next block adds to its own."""
        net = torchvision.models.mobilenet_v2(width_mult=0.25)
        found = places(net, "auto", PICTURES)
        residual = [name for name, part in net.named_modules() if getattr(part, "use_res_connect", False)]
        assert found[0] == "features.0.1"
        assert {name.partition(".conv.")[0] for name in found[1:]} < set(residual)
        assert len(found) > 3

    def test_without_sums_all_norms(self) -> None:
        assert places(network(), "auto", EXAMPLE) == ["1", "4"]

    def test_norms_before_the_branches(self) -> None:
        net = torchvision.models.convnext._convnext(
            [
                torchvision.models.convnext.CNBlockConfig(8, 16, 2),
                torchvision.models.convnext.CNBlockConfig(16, None, 1),
            ],
            0.0,
            None,
            progress=False,
        )
        assert places(net, "auto", PICTURES) == list(named_norms(net))

    @pytest.mark.parametrize("layers", [1, 2, 3])
    @pytest.mark.parametrize("norm_first", [True, False], ids=["before the branches", "behind the sums"])
    def test_transformers(self, layers: int, norm_first: bool) -> None:
        """Their norms are not at the end of a branch, be they before it or behind the sum."""
        net = encoder(layers, norm_first=norm_first)
        assert len(named_norms(net)) == 2 * layers
        assert places(net, "auto", torch.zeros(2, 5, 8)) == list(named_norms(net))

    def test_a_branch_of_tokens_that_ends_on_a_norm(self) -> None:
        net = Net(lambda net, x: x + net.after(net.mix(x)), mix=nn.Linear(8, 8), after=nn.LayerNorm(8))
        whole = nn.Sequential(nn.LayerNorm(8), net, nn.LayerNorm(8))
        assert places(whole, "auto", torch.zeros(2, 5, 8)) == ["0", "1.after"]

    def test_all(self) -> None:
        assert places(resnet20(), "all") == list(named_norms(resnet20()))

    def test_patterns(self) -> None:
        assert places(network(), ["4"]) == ["4"]
        found = places(resnet20(), ["bn1", "stage3.*.bn?"])
        assert found == ["bn1", *(f"stage3.{block}.bn{norm}" for block in range(3) for norm in (1, 2))]

    def test_a_pattern_that_matches_nothing(self) -> None:
        with pytest.raises(ValueError, match=r"The pattern '\*.bn9' in `where` matches none of the norms 1, 4\."):
            places(network(), ["1", "*.bn9"])

    @pytest.mark.parametrize("where", ["some", "", [], (), None, 3])
    def test_what_says_no_place(self, where: Any) -> None:
        with pytest.raises(ValueError, match="`where` is 'auto', 'all', or patterns"):
            places(network(), where)

    def test_no_norms(self) -> None:
        with pytest.raises(PruningError, match="Sequential has no norms for an equilibrium block"):
            places(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "all")

    def test_auto_wants_a_run(self) -> None:
        with pytest.raises(PruningError, match=r"where='auto' looks at a run.*or say where='all'"):
            places(network())

    @pytest.mark.parametrize("where", ["auto", "all", ["4"]])
    def test_blocks_that_are_there(self, where: Any) -> None:
        net = network()
        equilibrate(net, where=["1"])
        with pytest.raises(PruningError, match=r"has equilibrium blocks already, at 1\. Go on with them, or"):
            equilibrate(net, EXAMPLE, where=where)
        assert list(blocks_of(net)) == ["1"]

    def test_norms_with_an_activation_inside(self, caplog: pytest.LogCaptureFixture) -> None:
        layers = pytest.importorskip("timm.layers")
        net = nn.Sequential(nn.Conv2d(3, 8, 3), layers.BatchNormAct2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        with caplog.at_level(logging.INFO, "lightning_prune"):
            assert places(net, "auto", PICTURES) == ["3"]
        assert "1 apply an activation themselves" in caplog.text
        with pytest.raises(PruningError, match="no norms for"):
            places(net[:2], "all")

    def test_timm_norms_whose_activation_is_taken_out(self) -> None:
        layers = pytest.importorskip("timm.layers")
        assert places(nn.Sequential(layers.BatchNormAct2d(8, apply_act=False)), "all") == ["0"]


class TestInserting:
    @pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)])
    def test_untrained_decorrelation_is_the_identity(self, norm: nn.Module) -> None:
        net = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU()).double()).eval()
        before = outputs(net, PICTURES.double())
        assert equilibrate(net, where="all", equilibrium=DECORRELATION) == ["1"]
        assert isinstance(net[1].equilibrium, BatchDecorrelation)
        assert relative_error(outputs(net, PICTURES.double()), before) < 1e-14

    def test_remove_gives_the_plain_network_back(self) -> None:
        net = randomise(resnet20(width=0.25)).eval()
        plain, before = copy.deepcopy(net), outputs(net, PICTURES)
        names = equilibrate(net, PICTURES)
        assert net.state_dict().keys() != plain.state_dict().keys()
        assert relative_error(outputs(net, PICTURES), before) > 1e-3
        assert remove(net) == names
        assert equal(net.state_dict(), plain.state_dict())
        assert equal(dict(enumerate(outputs(net, PICTURES))), dict(enumerate(before)))  # type: ignore[arg-type]
        assert remove(net) == []

    def test_tensors_of_the_norm_stay_what_they_are(self) -> None:
        net = network()
        weight = net[1].weight
        equilibrate(net, where="all")
        assert net[1].norm.weight is weight

    @pytest.mark.parametrize(
        ("branches", "kind"),
        [("both", ChannelEquilibrium), ("decorrelation", BatchDecorrelation), ("reweighting", InstanceReweighting)],
    )
    def test_branches(self, branches: Branches, kind: type[nn.Module]) -> None:
        net = network()
        settings = Equilibrium(branches, group_size=2, iterations=5, reduction=2, momentum=0.3, eps=1e-3)
        equilibrate(net, where="all", equilibrium=settings)
        block = net[1].equilibrium
        assert type(block) is kind
        first = getattr(block, "decorrelation", block)
        second = getattr(block, "reweighting", block)
        assert (first.momentum, first.eps) == (second.momentum, second.eps) == (0.3, 1e-3)
        if branches != "reweighting":
            assert first.running_whitening.shape == (4, 2, 2)
            assert first.iterations == 5
            assert first.over_ranks
        if branches != "decorrelation":
            assert second.gate[0].out_features == 4

    @pytest.mark.parametrize("branches", ["both", "decorrelation", "reweighting"])
    def test_channels_last_of_all(self, branches: Branches) -> None:
        net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        equilibrate(net, where="all", equilibrium=Equilibrium(branches))
        assert net[1].equilibrium.channel_dim == -1
        assert net(torch.randn(2, 5, 8)).shape == (2, 5, 8)

    def test_over_ranks(self) -> None:
        for branches in ("both", "decorrelation"):
            block = Equilibrium(branches, over_ranks=False).block(nn.BatchNorm2d(8))
            assert not getattr(block, "decorrelation", block).over_ranks

    def test_a_norm_in_two_places_becomes_one_wrapper(self) -> None:
        norm = nn.BatchNorm2d(8)
        net = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.Sequential(nn.ReLU(), norm))
        assert equilibrate(net, where="all") == ["1"]
        assert isinstance(net[1], Equilibrated)
        assert net[1] is net[2][1]
        assert remove(net) == ["1"]
        assert net[1] is net[2][1] is norm

    def test_a_norm_with_two_names_in_one_module(self) -> None:
        net = nn.Module()
        net.first = net.second = nn.BatchNorm2d(8)
        equilibrate(net, where="all")
        assert isinstance(net.first, Equilibrated)
        assert net.first is net.second

    def test_copies(self) -> None:
        net = network()
        equilibrate(net, where="all")
        net(torch.randn(4, 1, 6, 6))
        fresh = network(1)
        equilibrate(fresh, where="all")
        fresh.load_state_dict(net.state_dict())
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), fresh):
            assert equal(other.state_dict(), net.state_dict())
            assert list(blocks_of(other)) == ["1", "4"]
            assert all(
                torch.equal(*each) for each in zip(*(outputs(n.eval(), EXAMPLE) for n in (net, other)), strict=True)
            )
            assert not {*map(id, other.parameters())} & {*map(id, net.parameters())}

    def test_mode_and_dtype_are_those_of_the_norm(self) -> None:
        net = network().double()
        net[4].eval()
        equilibrate(net, where="all")
        assert {tensor.dtype for tensor in net.state_dict().values() if tensor.is_floating_point()} == {torch.float64}
        assert all(part.training for part in net[1].modules())
        assert not any(part.training for part in net[4].modules())

    def test_on_tensors_without_memory(self) -> None:
        net = network().to("meta")
        equilibrate(net, where="all")
        assert {tensor.device.type for tensor in net.state_dict().values()} == {"meta"}

    def test_norms_without_tensors(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8)).double()
        assert equilibrate(net, PICTURES.double()) == ["1"]

    def test_synchronised_norms(self) -> None:
        net = network()
        equilibrate(net, where="all")
        found = blocks_of(nn.SyncBatchNorm.convert_sync_batchnorm(net))
        assert list(found) == ["1", "4"]
        assert all(isinstance(block.norm, nn.SyncBatchNorm) for block in found.values())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"branches": "neither"}, "`branches` is 'both', 'decorrelation' or 'reweighting'; got 'neither'"),
            ({"group_size": 0}, "`group_size` is 1 or more; got 0"),
            ({"branches": "reweighting", "iterations": 0}, "`iterations`.*got 0"),
            ({"reduction": 0}, "`reduction`.*got 0"),
            ({"momentum": 1.5}, "`momentum`.*got 1.5"),
            ({"eps": 0.0}, "`eps` is above 0; got 0.0"),
        ],
    )
    def test_settings_out_of_their_range(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Equilibrium(**arguments)


def conv(kind: type[nn.Module], norm: type[nn.Module], *, into: int = 8, **settings: Any) -> nn.Sequential:
    options = {"kernel_size": 3, "padding": 1} | settings
    return nn.Sequential(kind(4, into, **options), norm(into), nn.Tanh())


FOLDABLE: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "conv1d": (lambda: conv(nn.Conv1d, nn.BatchNorm1d), (5,)),
    "conv2d": (lambda: conv(nn.Conv2d, nn.BatchNorm2d), (5, 4)),
    "conv3d": (lambda: conv(nn.Conv3d, nn.BatchNorm3d), (3, 5, 4)),
    "no bias": (lambda: conv(nn.Conv2d, nn.BatchNorm2d, bias=False), (5, 4)),
    "strided, dilated": (lambda: conv(nn.Conv2d, nn.BatchNorm2d, stride=2, dilation=2), (9, 8)),
    "padded by reflection": (lambda: conv(nn.Conv2d, nn.BatchNorm2d, padding_mode="reflect"), (5, 4)),
    "groups that fit": (lambda: conv(nn.Conv2d, nn.BatchNorm2d, groups=2), (5, 4)),
    "groups of groups": (lambda: conv(nn.Conv2d, nn.BatchNorm2d, groups=2, into=16), (5, 4)),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), ()),
    "linear, no bias": (lambda: nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8)), ()),
    "norm without scales": (lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8, affine=False)), (5, 4)),
}


KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "GroupNorm": (lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8)), "the norm before it is no BatchNorm"),
    "no statistics": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)),
        "no BatchNorm with running statistics",
    ),
    "depthwise": (lambda: conv(nn.Conv2d, nn.BatchNorm2d, groups=4), "its groups of 4 channels mix convolution groups"),
    "transposed": (lambda: conv(nn.ConvTranspose2d, nn.BatchNorm2d), "no convolution or linear layer goes into"),
    "an activation between": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.Tanh(), nn.BatchNorm2d(8)),
        "no convolution or linear layer goes into its norm alone",
    ),
}


def another_reader() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        y = net.conv(x)
        return net.norm(y) + y

    return Net(run, conv=nn.Conv2d(4, 8, 1), norm=nn.BatchNorm2d(8))


def shared_conv() -> nn.Module:
    layer = nn.Conv2d(4, 4, 1)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.BatchNorm2d(4))


def tied_weights() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    net[0].weight = net[2].weight
    return net


def tied_to_what_does_not_run() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    net[0].spare = nn.Conv2d(4, 4, 1)
    net[0].spare.weight = net[0].weight
    return net


def shared_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    return nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.Tanh(), nn.Conv2d(4, 4, 1), norm)


ALONE = "no convolution or linear layer goes into its norm alone"
for maker in (another_reader, shared_conv, tied_weights, tied_to_what_does_not_run, shared_norm):
    KEPT[maker.__name__.replace("_", " ")] = maker, ALONE


def with_blocks(net: nn.Module, equilibrium: Equilibrium = DECORRELATION) -> nn.Module:
    equilibrate(net, where="all", equilibrium=equilibrium)
    return randomise(net.double()).eval()


def inputs(*sizes: int) -> Tensor:
    return torch.randn(3, 4, *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class TestFolding:
    @pytest.mark.parametrize(("make", "sizes"), FOLDABLE.values(), ids=FOLDABLE)
    def test_outputs_stay(self, make: Callable[[], nn.Sequential], sizes: tuple[int, ...]) -> None:
        net, x = with_blocks(make()), inputs(*sizes)
        before = outputs(net, x)
        assert relative_error(outputs(remove_copy(net), x), before) > 1e-2
        found = fold(net, x)
        assert (found.layers, found.kept) == ({"1": "0"}, {})
        assert relative_error(outputs(net, x), before) < 1e-10
        assert blocks_of(net) == {}
        assert not any(isinstance(part, (BatchDecorrelation, *NORMS)) for part in net.modules())
        assert net.state_dict().keys() == {"0.weight", "0.bias"}
        assert net[0].weight.dtype == net[0].bias.dtype == torch.float64

    @pytest.mark.parametrize(("make", "reason"), KEPT.values(), ids=KEPT)
    def test_what_stays(self, make: Callable[[], nn.Module], reason: str) -> None:
        net, x = with_blocks(make()), inputs(5, 4)
        before, state = outputs(net, x), copy.deepcopy(net.state_dict())
        found = fold(net, x)
        assert found.layers == {}
        assert found.kept.keys() == blocks_of(net).keys() != set()
        assert all(reason in each for each in found.kept.values())
        assert equal(net.state_dict(), state)
        assert relative_error(outputs(net, x), before) == 0.0

    @pytest.mark.parametrize("branches", ["both", "reweighting"])
    def test_what_depends_on_the_example_stays(self, branches: Branches) -> None:
        net = with_blocks(nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)), Equilibrium(branches))
        state = copy.deepcopy(net.state_dict())
        assert fold(net, inputs(5, 4)).kept == {"1": "its weights depend on the example"}
        assert equal(net.state_dict(), state)

    def test_some_go_and_some_stay(self) -> None:
        first, second = conv(nn.Conv2d, nn.BatchNorm2d), nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8))
        net, x = with_blocks(nn.Sequential(first, second)), inputs(5, 4)
        before = outputs(net, x)
        found = fold(net, x)
        assert found.layers == {"0.1": "0.0"}
        assert list(found.kept) == list(blocks_of(net)) == ["1.1"]
        assert relative_error(outputs(net, x), before) < 1e-10

    def test_a_residual_network(self) -> None:
        net = resnet20(width=0.25)
        names = equilibrate(net, PICTURES, equilibrium=DECORRELATION)
        randomise(net.double()).eval()
        x = PICTURES.double()
        before = outputs(net, x)
        found = fold(net, x)
        assert found.layers == {name: name.replace("bn", "conv") for name in names}
        assert relative_error(outputs(net, x), before) < 1e-10

    def test_after_training_and_a_cut(self) -> None:
        net = resnet20(width=0.5)
        equilibrate(net, PICTURES, equilibrium=Equilibrium("decorrelation"))
        net.train()(PICTURES)
        record = prune(net, PICTURES, pruning_ratio=0.4)
        assert record.reached > 0.3
        net = net.double().eval()
        before = outputs(net, PICTURES.double())
        assert fold(net, PICTURES.double()).kept == {}
        assert blocks_of(net) == {}
        assert relative_error(outputs(net, PICTURES.double()), before) < 1e-10
        assert find_groups(net, PICTURES.double())

    def test_the_mode_stays(self) -> None:
        net, x = with_blocks(conv(nn.Conv2d, nn.BatchNorm2d)), inputs(5, 4)
        before = outputs(net, x)
        fold(net.train(), x)
        assert all(part.training for part in net.modules())
        assert relative_error(outputs(net, x), before) < 1e-10

    def test_single_precision_and_memory_format(self) -> None:
        net = with_blocks(conv(nn.Conv2d, nn.BatchNorm2d)).float().to(memory_format=torch.channels_last)
        before = outputs(net, inputs(5, 4).float())
        fold(net, inputs(5, 4).float())
        assert net[0].weight.dtype == torch.float32
        assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(outputs(net, inputs(5, 4).float()), before) < 1e-5

    def test_frozen_layers_stay_frozen(self) -> None:
        net = with_blocks(conv(nn.Conv2d, nn.BatchNorm2d)).requires_grad_(False)
        fold(net, inputs(5, 4))
        assert not any(parameter.requires_grad for parameter in net.parameters())

    def test_nothing_to_fold(self) -> None:
        found = fold(network(), EXAMPLE)
        assert (found.layers, found.kept) == ({}, {})


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def remove_copy(net: nn.Module) -> nn.Module:
    plain = copy.deepcopy(net)
    remove(plain)
    return plain


class TestScales:
    def test_without_a_block_it_is_gamma(self) -> None:
        net = randomise(network())
        net[1].weight.data[0] *= -1
        assert torch.equal(effective_scale(net, "1.weight"), net[1].weight.detach().abs())
        assert torch.equal(effective_scale(nn.BatchNorm2d(3), "weight"), torch.ones(3))

    def test_decorrelation_raises_it_by_its_diagonal(self) -> None:
        net = network()
        equilibrate(net, where=["1"], equilibrium=DECORRELATION)
        net[1].norm.weight.data = torch.tensor([-1.0, 2, 3, 4, 1, 2, 3, 4])
        net[1].equilibrium.running_whitening.copy_(torch.stack([torch.diag(torch.tensor([1.0, 2, 3, 4]))] * 2) + 0.1)
        found = effective_scale(net, "1.norm.weight")
        assert found.tolist() == pytest.approx([1.1, 4.2, 9.3, 16.4] * 2)
        assert not found.requires_grad
        (first, *_) = find_groups(net, EXAMPLE)
        assert torch.equal(BNScale().score(net, first), found[first_positions(first)])
        assert torch.equal(effective_scale(net, "4.weight"), torch.ones(8))

    def test_the_full_block_mixes_both(self) -> None:
        net = network()
        equilibrate(net, where=["1"], equilibrium=Equilibrium(group_size=4))
        block = net[1].equilibrium
        block.decorrelation.running_whitening.mul_(3)
        block.reweighting.running_scale.fill_(0.25)
        block.mixing.data.fill_(torch.tensor(0.8).logit())
        assert effective_scale(net, "1.norm.weight").tolist() == pytest.approx([0.8 * 3 + 0.2 * 2] * 8)

    def test_what_goes_first_changes(self) -> None:
        """A weak gamma that whitening has raised stays; a middling one that it has not goes."""
        for blocks in (False, True):
            net = network()
            net[1].weight.data = torch.tensor([0.1, 0.2, 0.3, 0.4, 1.0, 1.0, 1.0, 1.0])
            if blocks:
                equilibrate(net, where=["1"], equilibrium=Equilibrium("decorrelation"))
                net[1].equilibrium.running_whitening[0] = torch.diag(torch.tensor([20.0, 10, 1, 1, 1, 1, 1, 1]))
            record = prune(net, EXAMPLE, pruning_ratio=0.25, criterion=BNScale())
            gone = {0, 1, 2, 3} - set(record.kept["1.norm.weight" if blocks else "1.weight"][0])
            assert gone == ({2, 3} if blocks else {0, 1})


def first_positions(group: Any) -> Tensor:
    member = next(member for member in group.members if member.tensor == "1.norm.weight")
    positions: Tensor = member.positions[:, 0]
    return positions

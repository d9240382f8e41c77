"""Channels go, and least squares lets the layers that read the others make up for it: what must hold of every cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
import torchvision
from own_forwards import SameConv2d, Standardized
from proof import same_state, snapshot
from rebuilt_networks import HARD, IMAGE, Basic, batches, lively, normed, readout
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_prune import history_of, load_pruned, prune, reconstruct, save_pruned
from lightning_prune.criteria import Criterion, FirstK, Lasso, Magnitude, MaxResponse, Random
from lightning_prune.errors import PruningError
from lightning_prune.graph import read
from lightning_prune.one_shot import Reconstructed
from lightning_prune.pruner import Draft, Request, draft_cut
from lightning_prune.reconstruction import Reconstruction
from lightning_prune.reconstruction.sites import find_sites
from lightning_prune.restoring import Sights

EVERYWHERE = 10**6
EXACT = 1e-8


def missed(net: nn.Module, dense: nn.Module, images: Tensor) -> float:
    """Return the relative error of a network's outputs."""
    with torch.no_grad():
        before, after = dense(images), net(images)
    return float((after - before).norm() / before.norm())


def rebuilt(
    net: nn.Module, seen: list[Tensor], ratio: float = 0.5, criterion: Criterion | None = None, **settings: object
) -> Reconstructed:
    found = Reconstruction(**{"points": EVERYWHERE, **settings})
    return reconstruct(net, seen, pruning_ratio=ratio, of="channels", criterion=criterion, reconstruction=found)


@pytest.mark.parametrize("name", ["residual", "GroupNorm", "tied"])
def test_where_nothing_goes_nothing_changes(name: str) -> None:
    hard = HARD[name]
    net, dense = hard.dense(), hard.dense()
    assert rebuilt(net, hard.batches(), 0.0).refits == ()
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), dense.state_dict().values(), strict=True))


def deaf(net: nn.Module, draft: Draft, seen: list[Tensor]) -> None:
    """Let all layers that would be refitted hear nothing of the channels that go."""
    groups = [group for group, gone in draft.plan.removed.items() if len(gone)]
    for name, site in find_sites(net, read(net, seen[0]), groups).all.items():
        layer = net.get_submodule(name)
        dim = 0 if isinstance(layer, _ConvTransposeNd) else 1
        for group, positions in site.reads.items():
            gone = positions[draft.plan.removed[group]].flatten() % layer.weight.shape[dim]
            layer.weight.data.index_fill_(dim, gone, 0)


@pytest.mark.parametrize("name", ["chain, flatten", "residual", "grouped", "depthwise", "transposed, grouped"])
def test_channels_that_nobody_hears_go_and_all_weights_stay(name: str) -> None:
    """Every layer is refitted, with nothing missing: least squares gives the weights that there were."""
    hard = HARD[name]
    net, seen = hard.dense(), hard.batches()
    request = Request(0.4, "channels", Random(1), reconstruction=Reconstruction(points=EVERYWHERE))
    deaf(net, draft_cut(net, seen[0], request, Sights(seen)), seen)
    draft = draft_cut(net, seen[0], request, Sights(seen))
    assert draft.refits
    assert max(refit.error for refit in draft.refits) < 1e-6
    changes = [float(added.abs().max()) for added in draft.offsets.added.values()]
    assert max(changes) < EXACT


def informative(width: int = 16, told: int = 5) -> nn.Module:
    """A layer of which the first channels alone say anything; the others are read loudly, and are next to silent."""
    net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 6)).double().eval()
    first, last = net[0], net[2]
    with torch.no_grad():
        first.weight[told:], first.bias[told:] = 0, 0
        first.weight[told : 2 * told] = 1e-12 * torch.randn(told, 8)
        last.weight[:, told : 2 * told] = 10
    return net


def test_a_known_support_is_found() -> None:
    net, seen = informative(), batches((8,))
    dense, loud = copy.deepcopy(net), copy.deepcopy(net)
    done = rebuilt(net, seen, 11 / 16)
    assert done.record.kept["0.weight"][0] == (0, 1, 2, 3, 4)
    assert missed(net, dense, torch.cat(seen)) < EXACT
    worse = rebuilt(loud, seen, 11 / 16, MaxResponse())
    assert worse.record.kept["0.weight"][0] == (5, 6, 7, 8, 9)
    assert missed(loud, dense, torch.cat(seen)) > 0.05


def twins(*, heard_alike: bool = False) -> nn.Module:
    """Each channel of the first half stands in the second once more."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(192, 4))
    for layer, reader in ((net[0], net[2]), (net[2], net[5])):
        half, heard = layer.out_channels // 2, reader.weight.shape[1] // 2
        layer.weight.data[half:], layer.bias.data[half:] = layer.weight.data[:half], layer.bias.data[:half]
        if heard_alike:
            reader.weight.data[:, heard:] = 0.5 * reader.weight.data[:, :heard]
    return net.double().eval()


@pytest.mark.parametrize("make", [Lasso, FirstK])
def test_of_twins_one_goes_without_a_loss(make: Callable[[], Criterion]) -> None:
    """The LASSO, which scales what channels give but does not turn it, finds those that are heard alike."""
    net, seen = twins(heard_alike=make is Lasso), batches(IMAGE, 8)
    dense, sliced = copy.deepcopy(net), copy.deepcopy(net)
    rebuilt(net, seen, criterion=make())
    assert (net[0].out_channels, net[2].out_channels) == (8, 6)
    assert missed(net, dense, torch.cat(seen)) < 1e-6
    prune(sliced, seen[0], pruning_ratio=0.5, criterion=FirstK())
    assert missed(sliced, dense, torch.cat(seen)) > 0.1


def test_the_more_channels_stay_the_less_is_missed() -> None:
    hard = HARD["chain, flatten"]
    errors = []
    for ratio in (0.75, 0.5, 0.25, 0.1):
        net = hard.dense()
        errors.append([refit.error for refit in rebuilt(net, hard.batches(), ratio).refits])
    assert all(less < more for layer in zip(*errors, strict=True) for more, less in pairwise(layer))


@pytest.fixture(scope="module")
def digits() -> Tensor:
    load = pytest.importorskip("sklearn.datasets").load_digits
    return torch.tensor(load().images, dtype=torch.float32).unsqueeze(1) / 16


@pytest.fixture(scope="module")
def classifiers(digits: Tensor) -> list[nn.Module]:
    """Three small networks, trained for about a second each."""
    load = pytest.importorskip("sklearn.datasets").load_digits
    labels = torch.tensor(load().target)
    nets = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 10)),
        )
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for chosen in torch.stack([torch.randperm(1297)[:64] for _ in range(80)]):
            optimizer.zero_grad()
            F.cross_entropy(net(digits[chosen]), labels[chosen]).backward()
            optimizer.step()
        nets.append(net.eval())
    return nets


def errors_of(
    nets: list[nn.Module], digits: Tensor, make: Callable[[], Criterion], ratio: float, **settings: object
) -> tuple[float, list[float]]:
    """Return the mean error of outputs of unseen images, and that of each layer."""
    whole, layers = [], []
    for dense in nets:
        net = copy.deepcopy(dense)
        done = rebuilt(net, list(digits[:600].split(200)), ratio, make(), points=10, **settings)
        whole.append(missed(net, dense, digits[1297:]))
        layers.append([refit.error for refit in done.refits])
    return mean(whole), [mean(errors) for errors in zip(*layers, strict=True)]


def test_lasso_before_max_response_before_chance(classifiers: list[nn.Module], digits: Tensor) -> None:
    """Three quarters of the channels gone, the mean over three networks: 0.196, 0.246 and 0.305 when written."""
    ways = (Lasso, MaxResponse, lambda: Random(1))
    lasso, response, chance = (errors_of(classifiers, digits, make, 0.75) for make in ways)
    assert lasso[0] < 0.95 * response[0] < 0.95 * chance[0]
    assert lasso[1][0] < 0.9 * response[1][0], "the layer before which nothing was lost"


def test_original_outputs_are_the_better_target(classifiers: list[nn.Module], digits: Tensor) -> None:
    """With it, later layers make up for what earlier ones have lost: 0.196 against 0.241 when written."""
    original, current = (errors_of(classifiers, digits, Lasso, 0.75, targets=t) for t in ("original", "current"))
    assert original[0] < 0.92 * current[0]
    assert original[1][0] == pytest.approx(current[1][0], rel=1e-6)


@pytest.mark.parametrize("make", [Magnitude, MaxResponse])
def test_a_refit_is_worth_much_more_than_none(
    classifiers: list[nn.Module], digits: Tensor, make: Callable[[], Criterion]
) -> None:
    """Half of the channels gone: 0.08 against 0.82 with `Magnitude` when written."""
    with_refit, _ = errors_of(classifiers, digits, make, 0.5)
    without = []
    for dense in classifiers:
        net = copy.deepcopy(dense)
        prune(net, digits[:2], pruning_ratio=0.5, criterion=make())
        without.append(missed(net, dense, digits[1297:]))
    assert with_refit < 0.25 * mean(without)


def block_error(net: nn.Module, dense: nn.Module, images: Tensor, place: int) -> float:
    return missed(net[: place + 1], dense[: place + 1], images)


def residual() -> nn.Module:
    torch.manual_seed(0)
    return lively(nn.Sequential(*normed(3, 10), *(Basic(10, 8, 10) for _ in range(3)), *readout(10)))


def test_a_branch_makes_up_for_its_shortcut() -> None:
    seen = batches(IMAGE)
    dense, images, errors = residual(), torch.cat(seen), {}
    for shortcuts in (True, False):
        net = residual()
        reconstruct(
            net,
            seen,
            pruning_ratio=0.5,
            of="channels",
            ignore=["0"],
            criterion=Random(0),
            reconstruction=Reconstruction(points=EVERYWHERE, shortcuts=shortcuts),
        )
        assert net[3].conv1.out_channels == 4
        errors[shortcuts] = [block_error(net, dense, images, place) for place in (3, 4, 5)]
    assert errors[True][0] == pytest.approx(errors[False][0], abs=EXACT), "nothing was lost before the first block"
    assert errors[True][1] < errors[False][1]
    assert errors[True][2] < 0.97 * errors[False][2]


@pytest.mark.slow
def test_a_residual_network_of_torchvision() -> None:
    torch.manual_seed(0)
    net = lively(torchvision.models.resnet18(num_classes=10))
    dense, seen = copy.deepcopy(net), batches((3, 16, 16), 2, 8)
    done = reconstruct(
        net, seen, pruning_ratio=0.3, of="channels", criterion=Random(0), reconstruction=Reconstruction(ridge=1e-3)
    )
    assert len(done.refits) == 20
    assert missed(net, dense, torch.cat(seen)) < 0.5
    assert "fc: " in str(done)


def test_trunks_that_are_sampled_stay_whole() -> None:
    seen = batches(IMAGE)
    net, dense = residual(), residual()
    done = reconstruct(
        net,
        seen,
        pruning_ratio=0.4,
        of="channels",
        trunks="sampled",
        reconstruction=Reconstruction(points=EVERYWHERE),
    )
    assert net[0].out_channels == 10
    assert {"3.conv1.1", "4.conv1.1", "5.conv1.1"} <= {refit.layer for refit in done.refits}
    whole = residual()
    rebuilt(whole, seen, 0.4)
    assert missed(net, dense, torch.cat(seen)) < 0.8 * missed(whole, dense, torch.cat(seen))


def test_one_event_after_the_other(tmp_path: Path) -> None:
    """Each refits to the network that it finds; shapes, weights and history come back from a file."""
    hard = HARD["residual"]
    net, seen = hard.dense(), hard.batches()
    for ratio in (0.2, 0.4, 0.6):
        before = copy.deepcopy(net)
        done = rebuilt(net, seen, ratio)
        assert done.record.reached == pytest.approx(ratio, abs=0.05)
        assert done.refits[-1].error == pytest.approx(missed(net, before, torch.cat(seen)), abs=1e-6)
    assert len(history_of(net)) == 3
    save_pruned(net, tmp_path / "pruned.pt")
    again = hard.dense()
    load_pruned(again, tmp_path / "pruned.pt")
    assert missed(again, net, torch.cat(seen)) == 0


def test_parameters_stay_the_same_objects_in_the_same_dtype() -> None:
    hard = HARD["residual"]
    net = hard.dense().float()
    before = dict(net.named_parameters())
    net[3].conv1.weight.requires_grad_(False)
    rebuilt(net, [images.float() for images in hard.batches()])
    after = dict(net.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {parameter.dtype for parameter in after.values()} == {torch.float32}
    assert not net[3].conv1.weight.requires_grad


def test_a_draft_leaves_the_network_alone() -> None:
    hard = HARD["depthwise"]
    net, seen = hard.dense(), hard.batches()
    before = snapshot(net)
    for mode in (True, False):
        net.train(mode)
        before = snapshot(net)
        draft_cut(net, seen[0], Request(0.4, "channels", Lasso(), reconstruction=Reconstruction()), Sights(seen))
        assert same_state(snapshot(net), before)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_the_same_seed_gives_the_same_bits() -> None:
    hard = HARD["residual"]
    nets = [hard.dense() for _ in range(3)]
    told = [str(rebuilt(net, hard.batches(), points=7, seed=seed)) for net, seed in zip(nets, (0, 0, 1), strict=True)]
    states = [list(net.state_dict().values()) for net in nets]
    assert told[0] == told[1]
    assert all(torch.equal(one, other) for one, other in zip(*states[:2], strict=True))
    assert not torch.equal(nets[0][7].weight, nets[2][7].weight)


def test_the_order_of_the_images_does_not_matter_where_all_points_are_taken() -> None:
    hard = HARD["residual"]
    one, other, seen = hard.dense(), hard.dense(), hard.batches()
    shuffled = torch.cat(seen)[torch.randperm(96)]
    first, second = rebuilt(one, seen), rebuilt(other, list(shuffled.split(40)))
    assert first.record.kept == second.record.kept
    assert missed(other, one, torch.cat(seen)) < EXACT


def test_no_more_images_are_looked_at_than_asked() -> None:
    hard = HARD["MLP without bias"]
    seen = torch.cat(hard.batches())
    some, all_of_some = hard.dense(), hard.dense()
    rebuilt(some, list(seen.split(25)), images=60)
    rebuilt(all_of_some, [seen[:60]])
    assert missed(some, all_of_some, seen) < EXACT


def test_labels_and_dicts_are_no_hindrance() -> None:
    hard = HARD["MLP without bias"]
    seen = hard.batches()
    plain, labelled = hard.dense(), hard.dense()
    rebuilt(plain, seen)
    rebuilt(labelled, [[images, torch.zeros(24)] for images in seen])  # type: ignore[misc]
    assert torch.equal(plain[4].weight, labelled[4].weight)


def of(kind: type[nn.Conv2d], padding: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(kind(3, 8, 3, stride=2, padding=padding), nn.ReLU(), kind(8, 8, 3, stride=2, groups=8, padding=padding)),
        *(nn.ReLU(), kind(8, 6, 3, padding=padding), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    ).eval()


@pytest.mark.parametrize("criterion", [Lasso(), Magnitude()], ids=["LASSO", "magnitude"])
def test_layers_that_pad_by_themselves_are_fitted_to_what_they_have_padded(criterion: Criterion) -> None:
    """The same network with the padding outside of the layers is refitted the same way."""
    seen, nets = [torch.randn(40, 3, 13, 13)], [of(SameConv2d, 0), of(nn.Conv2d, 0)]
    outside = nets[1]
    assert isinstance(outside, nn.Sequential)
    for place in (0, 2, 4):
        outside[place] = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), outside[place])
    for net in nets:
        rebuilt(net, seen, 0.3, copy.deepcopy(criterion))
    with torch.no_grad():
        assert torch.allclose(nets[0](seen[0]), nets[1](seen[0]), atol=1e-5)


def test_a_layer_that_convolves_with_another_weight_is_refused_and_nothing_is_cut() -> None:
    net, seen = of(Standardized, 1), [torch.randn(40, 3, 13, 13)]
    before = snapshot(net)
    with pytest.raises(PruningError, match=r"A Standardized does more than a Conv2d.*`ignore`"):
        rebuilt(net, seen, 0.3)
    assert same_state(before, snapshot(net))

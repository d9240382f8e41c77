"""In every kind of network, layers return after the cut what the reconstruction says that they do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from rebuilt_networks import HARD, Hard
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_prune.criteria import Criterion, Lasso, Random
from lightning_prune.cut import Offsets, prepare
from lightning_prune.graph import read
from lightning_prune.history import commit
from lightning_prune.pruner import Draft, Request, draft_cut
from lightning_prune.reconstruction import Reconstruction
from lightning_prune.reconstruction.settings import Targets
from lightning_prune.reconstruction.sites import Site, Sites, find_sites
from lightning_prune.reconstruction.student import normed_across
from lightning_prune.restoring import Sights
from lightning_prune.surgery import apply
from lightning_prune.tensors import named_tensors
from lightning_prune.types import PruningPlan

EXACT = 1e-6  # squares in float64, of which differences are taken
EVERYWHERE = 10**6


def drafted(net: nn.Module, hard: Hard, targets: Targets = "original", make: Callable[[], Criterion] = Lasso) -> Draft:
    settings, batches = Reconstruction(points=EVERYWHERE, targets=targets), hard.batches()
    return draft_cut(net, batches[0], Request(0.4, "channels", make(), reconstruction=settings), Sights(batches))


def rows_of(net: nn.Module, name: str, images: Tensor, *, last: bool) -> Tensor:
    """Return what a module returns in all of its calls: (rows, channels)."""
    found: list[Tensor] = []
    hook = net.get_submodule(name).register_forward_hook(lambda module, args, output: found.append(output.clone()))
    with torch.no_grad():
        net(images)
    hook.remove()
    return torch.cat([(output if last else output.movedim(1, -1)).flatten(0, -2) for output in found])


class Stages:
    """The networks in which layers were refitted: with the new weights, and without some channels.

    Where nothing but the layers that are refitted reads a channel, and no norm looks across it, it has gone by zeros,
    and all that makes it is still there: for these, the network is not cut.
    """

    def __init__(self, net: nn.Module, hard: Hard, draft: Draft) -> None:
        self.net, self.hard, self.draft = net, hard, draft
        self.images = torch.cat(hard.batches())
        self.graph = read(net, self.images)
        going = [name for name, gone in draft.plan.removed.items() if len(gone)]
        self.sites: Sites = find_sites(net, self.graph, going)
        self.order = [refit.layer for refit in draft.refits]

    def error(self, name: str) -> float:
        """Return what a layer misses of what it is to return, in all positions of all images."""
        site, stage = self.sites.all[name], copy.deepcopy(self.net)
        tensors = named_tensors(stage)
        for tensor, added in self.draft.offsets.added.items():
            tensors[tensor].data.add_(added.to(tensors[tensor]))
        self._take_back(stage, name)
        cut = prepare(stage, self.graph, self._cut_by(name))
        apply(stage, cut, offsets=Offsets())
        kept = outputs_kept(self.net.get_submodule(name), cut.kept.get(f"{name}.weight", {}))
        wanted, found = self._target(site, stage, kept), self._rows(stage, name)
        if site.norm is not None:  # a layer without a bias has it in the norm behind
            moved = [named_tensors(net)[site.norm.running_mean] for net in (stage, self.net)]
            found = found - (moved[0] - moved[1][kept])
        return float((found - wanted).norm() / wanted.norm())

    def _take_back(self, stage: nn.Module, name: str) -> None:
        """Let a projection beside a layer be as it was, but for zeros, when that was refitted before it."""
        beside, place = self.hard.beside.get(name, name), self.order.index(name)
        if beside not in self.order[place + 1 :]:
            return
        weight = stage.get_submodule(beside).weight.data.copy_(self.net.get_submodule(beside).weight.data)
        for group, positions in self.sites.all[beside].reads.items():
            if set(self.sites.of_group[group]) & set(self.order[: place + 1]):
                weight[:, positions[self.draft.plan.removed[group]].flatten()] = 0

    def _cut_by(self, name: str) -> PruningPlan:
        across, done = normed_across(self.graph), self.order[: self.order.index(name) + 1]
        of_group = self.sites.of_group
        return PruningPlan(
            {
                group: gone
                for group, gone in self.draft.plan.removed.items()
                if group not in of_group or (group in across and set(of_group[group]) & set(done))
            }
        )

    def _target(self, site: Site, stage: nn.Module, kept: Tensor) -> Tensor:
        """Return what the layer returned, and what the one beside it has lost."""
        wanted, beside = self._rows(self.net, site.name)[:, kept], self.hard.beside.get(site.name)
        if beside is None:
            return wanted
        lost = self._rows(self.net, beside)[:, kept] - self._rows(stage, beside)
        return wanted + lost / (1 if site.norm is None else site.norm.scale(named_tensors(self.net))[kept])

    def _rows(self, net: nn.Module, name: str) -> Tensor:
        return rows_of(net, name, self.images, last=self.hard.last)


def outputs_kept(layer: nn.Module, kept: Mapping[int, Tensor]) -> Tensor:
    """Return the outputs that a layer has after a cut, by what stays of its weight."""
    if not isinstance(layer, _ConvTransposeNd):
        return kept.get(0, torch.arange(len(layer.weight)))
    inputs, each = layer.weight.shape[:2]
    groups = kept.get(0, torch.arange(inputs)).div(inputs // layer.groups, rounding_mode="floor").unique()
    return torch.cat([kept.get(1, torch.arange(each)) + int(group) * each for group in groups])


def assert_network_misses_what_its_last_layer_does(net: nn.Module, draft: Draft, images: Tensor) -> None:
    """The class output is cut nowhere: what is said of it must hold of the network as it is after the cut."""
    with torch.no_grad():
        before = net(images)
        commit(net, draft.cut, draft.record, draft.offsets)
        after = net(images)
    assert sum(map(len, draft.plan.removed.values())) > 0
    assert draft.refits[-1].error == pytest.approx(float((after - before).norm() / before.norm()), abs=EXACT)


@pytest.mark.parametrize("name", HARD)
def test_errors_are_those_of_the_network_that_is_left(name: str) -> None:
    hard = HARD[name]
    net = hard.dense()
    draft = drafted(net, hard)
    assert tuple(refit.layer for refit in draft.refits) == hard.layers
    stages = Stages(net, hard, draft)
    for refit in draft.refits:
        assert refit.error == pytest.approx(stages.error(refit.layer), abs=EXACT), refit
        assert refit.error <= refit.sliced + EXACT
    assert_network_misses_what_its_last_layer_does(net, draft, torch.cat(hard.batches()))


SOME = ("residual", "depthwise", "MLP on tokens", "called twice", "GroupNorm, transposed, grouped")


@pytest.mark.parametrize("name", SOME)
def test_current_outputs_as_targets(name: str) -> None:
    """Errors are then of another target; the first layer that is refitted has the same."""
    hard = HARD[name]
    current, original = (drafted(hard.dense(), hard, targets) for targets in ("current", "original"))
    assert [refit.layer for refit in current.refits] == list(hard.layers)
    assert current.refits[0].error == pytest.approx(original.refits[0].error, abs=EXACT)
    assert current.record.channels.keys() == original.record.channels.keys()
    assert all(refit.error <= refit.sliced + EXACT for refit in current.refits)


@pytest.mark.parametrize("name", SOME)
def test_channels_of_any_criterion_are_left_alone(name: str) -> None:
    hard = HARD[name]
    net = hard.dense()
    draft = drafted(net, hard, make=lambda: Random(3))
    plain = draft_cut(net, hard.batches()[0], Request(0.4, "channels", Random(3)))
    assert {name: gone.tolist() for name, gone in draft.plan.removed.items()} == {
        name: gone.tolist() for name, gone in plain.plan.removed.items()
    }
    stages = Stages(net, hard, draft)
    assert draft.refits[-1].error == pytest.approx(stages.error(draft.refits[-1].layer), abs=EXACT)

"""What was done to a network is taken back: shapes, attributes, formats, identity, and values where they are kept."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from itertools import count

import pytest
import torch
from fits import EXAMPLE, network, widths
from proof import same_state, snapshot
from striking import FaultError, at, fails, struck
from torch import Tensor, nn

from lightning_prune.cut import Cut
from lightning_prune.pruner import Request, draft_cut
from lightning_prune.surgery import apply, revert, together
from lightning_prune.tensors import named_tensors


class Mixed(nn.Module):
    """Convolutions in two and three dimensions, a list and a tuple of sizes, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.next = nn.Conv2d(8, 6, 3, padding=1)
        self.deep, self.head = nn.Conv3d(6, 5, 3, padding=1), nn.Linear(5, 4)
        self.width, self.parts, self.window = 8, [8, 8], (8, 2)
        self.register_buffer("scale", torch.rand(8))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.flat(x)) * self.scale.view(self.width, 1, 1)
        x = sum(torch.cat((x, x), 1).split(self.parts, 1), torch.zeros(()))
        x = x.reshape(x.shape[0], self.window[0], *x.shape[2:])
        result: Tensor = self.head(self.deep(self.next(x)[..., None]).mean((2, 3, 4)))
        return result


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))


def mixed(*, last: bool = False) -> Mixed:
    """A network with gradients and statistics, in either memory format."""
    torch.manual_seed(4)
    model = Mixed()
    if last:
        for layer, form in ((model.flat, torch.channels_last), (model.next, torch.channels_last)):
            layer.to(memory_format=form)
        model.deep.to(memory_format=torch.channels_last_3d)
    model(X).square().sum().backward()
    return model


def planned(model: nn.Module, ratio: float = 0.5) -> Cut:
    return draft_cut(model, X, Request(ratio)).cut


def sizes(model: Mixed) -> list[object]:
    layers = [(model.flat.out_channels, model.norm.num_features, model.next.in_channels, model.next.out_channels)]
    return [*layers, model.deep.in_channels, model.head.in_features, model.width, model.parts, model.window]


FORMS = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])


@FORMS
def test_reverting_gives_shapes_attributes_formats_and_identity_back(last: bool) -> None:
    model = mixed(last=last)
    cut, dense, dense_sizes = planned(model), deepcopy(model), sizes(model)
    before = named_tensors(model)
    apply(model, cut)
    assert sizes(model) == [(4, 4, 4, 3), 3, 2, 4, [4, 4], (4, 2)]
    revert(model, cut)
    assert sizes(model) == dense_sizes == [(8, 8, 8, 6), 6, 5, 8, [8, 8], (8, 2)]
    assert type(model.parts) is list
    assert all(tensor is before[name] for name, tensor in named_tensors(model).items())
    for name, tensor in named_tensors(dense).items():
        assert (before[name].shape, before[name].stride()) == (tensor.shape, tensor.stride()), name
        assert before[name].requires_grad is tensor.requires_grad
    assert model(X).shape == (2, 4)


@FORMS
def test_reverting_brings_kept_values_and_zeros(last: bool) -> None:
    model = mixed(last=last)
    cut, dense = planned(model), named_tensors(deepcopy(model))
    gradients = {name: tensor.grad.clone() for name, tensor in named_tensors(model).items() if tensor.grad is not None}
    apply(model, cut)
    revert(model, cut)
    assert len(cut.kept) > 10
    for name, tensor in named_tensors(model).items():
        stays = torch.ones_like(tensor, dtype=torch.bool)
        for dim, positions in cut.kept.get(name, {}).items():
            gone = [place for place in range(tensor.shape[dim]) if place not in positions.tolist()]
            assert gone
            stays.index_fill_(dim, torch.tensor(gone), False)
        assert torch.equal(tensor, torch.where(stays, dense[name], torch.zeros_like(tensor))), name
        if name in gradients:
            assert tensor.grad is not None
            assert torch.equal(tensor.grad, torch.where(stays, gradients[name], torch.zeros_like(tensor)))


@FORMS
def test_cutting_after_reverting_is_the_first_cut(last: bool) -> None:
    model = mixed(last=last)
    cut = planned(model)
    apply(model, cut)
    first, output = snapshot(model), model.eval()(X)
    model.train()
    revert(model, cut)
    apply(model, cut)
    assert same_state(snapshot(model), first)
    assert torch.equal(model.eval()(X), output)


@FORMS
@pytest.mark.parametrize("trained", [False, True], ids=["", "trained between"])
def test_undoing_a_cut_restores_bit_for_bit(last: bool, trained: bool) -> None:
    model = mixed(last=last)
    before, places = snapshot(model), [tensor.data_ptr() for tensor in named_tensors(model).values()]
    undo = apply(model, planned(model), {"note": 1})
    assert model.__dict__["note"] == 1
    if trained:
        for name, tensor in named_tensors(model).items():
            if name in planned(mixed()).kept:
                tensor.data.add_(1)
    undo()
    assert same_state(snapshot(model), before)
    assert places == [tensor.data_ptr() for tensor in named_tensors(model).values()]


@FORMS
def test_undoing_a_reversion_restores_the_cut_network_bit_for_bit(last: bool) -> None:
    model = mixed(last=last)
    cut = planned(model)
    apply(model, cut, {"note": 1})
    before = snapshot(model)
    undo = revert(model, cut, {"note": 2, "other": 3})
    assert (model.__dict__["note"], model.__dict__["other"]) == (2, 3)
    undo()
    assert same_state(snapshot(model), before)


def test_a_fault_while_reverting_leaves_the_cut_network() -> None:
    model = mixed()
    cut = planned(model)
    apply(model, cut)
    before = snapshot(model)
    for number in count():
        try:
            with struck(at(number, partial(fails, KeyboardInterrupt))) as points:
                revert(model, cut)
        except KeyboardInterrupt:
            assert same_state(snapshot(model), before), points[number]
        else:
            break
    assert number > 30
    assert sizes(model) == sizes(mixed())


def test_several_cuts_are_reverted_one_after_the_other() -> None:
    model, cuts, seen = mixed(), [], [sizes(mixed())]
    for _ in range(3):
        cuts.append(planned(model, 0.34))
        apply(model, cuts[-1])
        seen.append(sizes(model))
    assert len({repr(one) for one in seen}) > 2
    for cut in reversed(cuts):
        assert sizes(model) == seen.pop()
        revert(model, cut)
    assert [sizes(model)] == seen


@pytest.mark.parametrize("fault", [FaultError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_was_done_together_is_taken_back_the_latest_first(fault: type[BaseException]) -> None:
    order: list[int] = []

    def run() -> None:
        with together() as done:
            done += [partial(order.append, number) for number in range(3)]
            raise fault

    with pytest.raises(fault):
        run()
    assert order == [2, 1, 0]


def test_what_went_well_together_stays() -> None:
    order: list[int] = []
    with together() as done:
        done.append(partial(order.append, 1))
    assert order == []


def test_networks_cut_together_are_taken_back_together() -> None:
    nets = [network(seed) for seed in range(3)]
    cut = draft_cut(nets[0], EXAMPLE, Request(0.5)).cut
    before = [snapshot(net) for net in nets]

    def run() -> None:
        with together() as done:
            for net in nets:
                done.append(apply(net, cut))
            assert [widths(net) for net in nets] == [[4, 4]] * 3
            raise FaultError

    with pytest.raises(FaultError):
        run()
    assert all(same_state(snapshot(net), old) for net, old in zip(nets, before, strict=True))

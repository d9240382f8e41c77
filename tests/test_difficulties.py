"""Eighty-eight difficulties: the groups are proven, the cut is exact, and what can be cut is cut."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from difficulties import DIFFICULTIES, Difficulty
from proof import outputs, prove, relative_error
from torch import Tensor, nn

from lightning_prune import ChannelGroup, PruneRecord, find_groups, prune
from lightning_prune.allocation import Global
from lightning_prune.cost import count_params
from lightning_prune.criteria import Random
from lightning_prune.inputs import tensors_in
from lightning_prune.tensors import named_tensors

OUT = "reaches the model's output"


@dataclass(frozen=True)
class Trial:
    """A dense network, what was read of it, and what was made of it."""

    dense: nn.Module
    groups: tuple[ChannelGroup, ...]
    cut: nn.Module
    record: PruneRecord


@cache
def trial(name: str) -> Trial:
    difficulty = DIFFICULTIES[name]
    dense, x = difficulty.dense(), difficulty.example()
    cut = copy.deepcopy(dense).train()
    with told(difficulty):
        groups = find_groups(dense, x)
    with told(difficulty):
        record = prune(cut, x, pruning_ratio=difficulty.ratio, constants="drop")
    return Trial(dense.eval(), groups, cut, record)


def told(difficulty: Difficulty) -> AbstractContextManager[object]:
    """Expect the warning that belongs to a network, if there is one."""
    return pytest.warns(UserWarning, match=difficulty.warns) if difficulty.warns else nullcontext()


def where(names: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", list(names))


def test_there_are_eighty_eight() -> None:
    assert len(DIFFICULTIES) == 88


@where(DIFFICULTIES)
def test_permuting_the_channels_leaves_the_output_unchanged(name: str) -> None:
    difficulty = DIFFICULTIES[name]
    with told(difficulty):
        groups = find_groups(difficulty.build(difficulty.width), difficulty.example().float())
    assert any(group.size > 1 for group in groups if not group.frozen)
    prove(difficulty.dense(), difficulty.example(), groups)


@where(DIFFICULTIES)
def test_the_cut_network_trains(name: str) -> None:
    dense, cut = (copy.deepcopy(net).train() for net in (trial(name).dense, trial(name).cut))
    assert _kinds(cut) == _kinds(dense)
    results = [list(tensors_in(net(DIFFICULTIES[name].example()))) for net in (cut, dense)]
    shapes = [[(result.shape, result.dtype) for result in each] for each in results]
    assert shapes[0] == shapes[1]
    for each in results:
        sum(result.square().sum() for result in each).backward()
    wide = dict(dense.named_parameters())
    for path, parameter in cut.named_parameters():
        assert parameter.requires_grad == wide[path].requires_grad
        assert (parameter.grad is None) == (wide[path].grad is None)
        if parameter.grad is not None:
            assert parameter.grad.shape == parameter.shape
            assert parameter.grad.isfinite().all()


def _kinds(model: nn.Module) -> dict[str, tuple[type, int]]:
    """Tell of each module its type and how many hooks it has."""
    return {
        name: (type(part), sum(len(hooks) for key, hooks in vars(part).items() if key.endswith("_hooks")))
        for name, part in model.named_modules()
    }


@where(DIFFICULTIES)
def test_whole_channels_go_and_all_else_stays(name: str) -> None:
    dense, groups, cut, record = (getattr(trial(name), part) for part in ("dense", "groups", "cut", "record"))
    kept = {path: {dim: set(places) for dim, places in dims.items()} for path, dims in record.kept.items()}
    gone = {(path, dim): set(range(record.shapes[path][dim])) - kept[path][dim] for path in kept for dim in kept[path]}
    assert set(record.channels) == {group.name for group in groups}
    for group in groups:
        left = [_left(kept, member.tensor, member.dim, member.positions) for member in group.members]
        change = record.channels[group.name]
        assert (change.dense, change.before, change.after) == (group.size, group.size, int(left[0].sum()))
        assert all(torch.equal(left[0], other) for other in left)
        assert group.frozen is None or left[0].all()
        for member in group.members:
            removed = member.positions[~left[0]].flatten().tolist()
            gone.get((member.tensor, member.dim), set()).difference_update(removed)
    assert not any(gone.values()), "positions outside all groups are gone"
    for path, tensor in named_tensors(cut).items():
        expected = named_tensors(dense)[path]
        for dim, places in record.kept.get(path, {}).items():
            expected = expected.index_select(dim, torch.tensor(places))
        assert torch.equal(tensor, expected)


def _left(kept: dict[str, dict[int, set[int]]], tensor: str, dim: int, positions: Tensor) -> Tensor:
    """Tell of each channel whether its positions stay; they must do so together."""
    places = kept.get(tensor, {}).get(dim)
    stays = torch.tensor([[places is None or place in places for place in row] for row in positions.tolist()])
    assert torch.equal(stays.all(1), stays.any(1))
    return stays.all(1)


@where(name for name, difficulty in DIFFICULTIES.items() if not difficulty.normed)
def test_removing_channels_is_the_same_as_zeroing_them(name: str) -> None:
    found, x = trial(name), DIFFICULTIES[name].example()
    expected = outputs(zeroed(found.dense, found.record), x)
    assert relative_error(outputs(copy.deepcopy(found.cut).eval(), x), expected) < 1e-10
    assert relative_error(outputs(found.dense, x), expected) > 1e-3


@where(name for name, difficulty in DIFFICULTIES.items() if not difficulty.normed)
def test_groups_that_lose_unequal_shares_are_exact_too(name: str) -> None:
    difficulty = DIFFICULTIES[name]
    dense, x = difficulty.dense().eval(), difficulty.example()
    cut = copy.deepcopy(dense)
    with told(difficulty):
        how = {"allocation": Global(cap=0.8), "criterion": Random(seed=1), "constants": "drop"}
        record = prune(cut, x, pruning_ratio=0.4, **how)
    assert relative_error(outputs(cut, x), outputs(zeroed(dense, record), x)) < 1e-10


def zeroed(model: nn.Module, record: PruneRecord) -> nn.Module:
    """Return a copy in which all that a record removes is zero."""
    twin = copy.deepcopy(model)
    for path, dims in record.kept.items():
        for dim, places in dims.items():
            tensor = named_tensors(twin)[path].data
            gone = sorted(set(range(tensor.shape[dim])) - set(places))
            tensor.index_fill_(dim, torch.tensor(gone), 0)
    return twin


@where(name for name, difficulty in DIFFICULTIES.items() if not difficulty.at_least)
def test_the_cut_network_is_the_one_written_smaller(name: str) -> None:
    """Sizes in attributes are those of the smaller network too, and it takes the weights and computes the same."""
    difficulty, cut = DIFFICULTIES[name], copy.deepcopy(trial(name).cut).eval()
    smaller = difficulty.smaller().eval()
    assert _shapes(cut) == _shapes(smaller)
    smaller.load_state_dict(cut.state_dict())
    assert repr(cut) == repr(smaller)
    assert _sizes(cut) == _sizes(smaller)
    results = outputs(smaller, difficulty.example())
    assert any(result.std() > 1e-6 for result in results)
    assert relative_error(outputs(cut, difficulty.example()), results) < 1e-10


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {path: tuple(tensor.shape) for path, tensor in model.state_dict().items()}


def _sizes(model: nn.Module) -> dict[str, object]:
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, float, tuple, list)) and not key.startswith("_")
    }


@where(DIFFICULTIES)
def test_nothing_stays_that_could_go(name: str) -> None:
    difficulty, found = DIFFICULTIES[name], trial(name)
    params, expected = count_params(found.cut), count_params(difficulty.smaller())
    assert params == found.record.params.after
    assert params <= expected if difficulty.at_least else params == expected
    inner = {group.name: group.frozen for group in found.groups if group.frozen and OUT not in group.frozen}
    single = {group.name for group in found.groups if group.size == 1}
    if difficulty.stays is None:
        assert inner == {}
    else:
        assert all(reason and difficulty.stays in reason for reason in inner.values())
    if not difficulty.at_least:
        assert set(found.record.held_back) - single == {group.name for group in found.groups if group.frozen} - single


def test_tied_weights_stay_tied() -> None:
    cut = trial("tied").cut
    assert cut.g.weight is cut.f.weight
    assert cut.g.bias is not cut.f.bias

"""Segmentation and detection: the groups are proven, half of the channels go, the cut networks train and load."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from proof import permute_channels, randomise, relative_error
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from vision_tasks import TASKS, CachingDetect, Task

from lightning_prune import ChannelGroup, PruneRecord, find_groups, load_pruned, prune, save_pruned
from lightning_prune.inputs import tensors_in
from lightning_prune.sizes import stale_sizes
from lightning_prune.tensors import named_tensors, tensor_at

NAMES = [pytest.param(name, marks=pytest.mark.slow) if task.detects else name for name, task in TASKS.items()]


class Pruned(NamedTuple):
    """A dense network with random statistics, its twin without half of its channels, and what was done."""

    dense: nn.Module
    model: nn.Module
    record: PruneRecord


def model_of(task: Task) -> nn.Module:
    torch.manual_seed(0)
    return randomise(task.build().double()).eval()


def inputs_of(task: Task) -> tuple[Any, ...]:
    return tree_map(lambda tensor: tensor.double(), task.inputs())


def told(task: Task) -> AbstractContextManager[object]:
    """Expect to be told where a network had to be read on real tensors."""
    return pytest.warns(UserWarning, match="depends on values") if task.values else nullcontext()


@cache
def pruned(name: str) -> Pruned:
    task = TASKS[name]
    dense = model_of(task)
    model = copy.deepcopy(dense)
    with told(task):
        record = prune(model, inputs_of(task), pruning_ratio=0.5, constants="drop")
    return Pruned(dense, model, record)


def results(model: nn.Module, task: Task) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors_in(model(*inputs_of(task))))


def layers_of(model: nn.Module, groups: Iterable[ChannelGroup]) -> set[str]:
    """Return the convolutions and linear layers, of more than one channel, that make the channels of some groups."""
    owners = {
        member.tensor.rpartition(".")[0]
        for group in groups
        for member in group.members
        if member.dim == 0 and member.tensor.endswith(".weight")
    }
    layers = {name: model.get_submodule(name) for name in owners}
    return {name for name, layer in layers.items() if isinstance(layer, LAYERS) and len(layer.weight) > 1}


LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


@pytest.mark.parametrize("name", NAMES)
def test_permuting_the_channels_leaves_the_outputs_unchanged(name: str) -> None:
    task = TASKS[name]
    model = model_of(task)
    with told(task):
        groups = find_groups(model, inputs_of(task))
    assert layers_of(model, (group for group in groups if group.frozen or group.size == 1)) == set(task.frozen)
    before = results(model, task)
    permute_channels(model, (group for group in groups if not group.frozen))
    assert all(len(part) and part.isfinite().all() for part in before)
    assert any(part.std() > 1e-3 for part in before)
    assert relative_error(results(model, task), before) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_half_of_the_channels_go(name: str) -> None:
    task, (_, model, record) = TASKS[name], pruned(name)
    assert record.reached == pytest.approx(0.5, abs=0.01)
    assert record.macs.removed > task.macs
    assert record.params.after == sum(parameter.numel() for parameter in model.parameters())
    several = {group for group, change in record.channels.items() if change.dense > 1}
    held_back = {group: reason for group, reason in record.held_back.items() if group in several}
    assert all(reason.startswith("frozen") for reason in held_back.values()), held_back
    assert stale_sizes(model) == {}


@pytest.mark.parametrize("name", NAMES)
def test_removing_channels_is_the_same_as_zeroing_them(name: str) -> None:
    task, (dense, model, record) = TASKS[name], pruned(name)
    twin = copy.deepcopy(dense)
    tensors = named_tensors(twin)
    for tensor, dims in record.kept.items():
        for dim, kept in dims.items():
            gone = sorted(set(range(tensors[tensor].shape[dim])) - set(kept))
            tensors[tensor].data.index_fill_(dim, torch.tensor(gone), 0)
    assert relative_error(results(model, task), results(twin, task)) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_the_cut_network_trains(name: str) -> None:
    task, model = TASKS[name], copy.deepcopy(pruned(name).model).train()
    sum(part.square().mean() for part in tensors_in(model(*inputs_of(task), *targets(task)))).backward()
    for tensor, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, tensor
            assert parameter.grad.shape == parameter.shape
            assert parameter.grad.isfinite().all(), tensor


def targets(task: Task) -> tuple[Any, ...]:
    """Return what a detector should find: a box in each image."""
    if not task.detects:
        return ()
    boxes = torch.tensor([[8.0, 8.0, 60.0, 60.0]], dtype=torch.float64)
    return ([{"boxes": boxes, "labels": torch.tensor([1])} for _ in task.inputs()[0]],)


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_dense_network_is_cut_to_fit(name: str, tmp_path: Path) -> None:
    task, model = TASKS[name], pruned(name).model
    save_pruned(model, tmp_path / "pruned.pt")
    loaded = load_pruned(task.build().double(), tmp_path / "pruned.pt").eval()
    assert all(map(torch.equal, results(loaded, task), results(model, task)))


WIDTHS: dict[str, dict[str, tuple[int, ...]]] = {
    "unet": {
        "stem.0.weight": (4, 3, 3, 3),
        "down.1.3.weight": (16, 16, 3, 3),
        "lift.0.weight": (16, 8, 2, 2),
        "lift.1.bias": (4,),
        "up.0.0.weight": (8, 16, 3, 3),
        "head.weight": (5, 4, 1, 1),
    },
    "yolo, split": {
        "stem.2.cv1.conv.weight": (8, 8, 1, 1),
        "stem.2.cv2.conv.weight": (8, 12, 1, 1),
        "stage2.2.cv2.conv.weight": (32, 64, 1, 1),
        "up1.cv1.conv.weight": (16, 48, 1, 1),
        "detect.cv2.0.2.weight": (16, 8, 1, 1),
        "detect.cv3.2.2.weight": (5, 8, 1, 1),
        "detect.dfl.conv.weight": (1, 4, 1, 1),
    },
}


@pytest.mark.parametrize("name", WIDTHS)
def test_widths_are_halved(name: str) -> None:
    model = pruned(name).model
    assert {tensor: tuple(tensor_at(model, tensor).shape) for tensor in WIDTHS[name]} == WIDTHS[name]


def test_a_size_in_a_split_follows() -> None:
    _, model, record = pruned("yolo, split")
    halves = {"stem.2": 4, "stage1.1": 8, "stage2.1": 16, "up1": 8, "up2": 4, "out1": 8, "out2": 16}
    assert {name: model.get_submodule(name).c for name in halves} == halves
    assert {name: record.attributes[name]["c"] for name in halves} == halves


def test_what_forward_caches_is_not_kept_by_a_reading() -> None:
    task = TASKS["yolo, anchors kept"]
    model = task.build().eval()
    with told(task):
        prune(model, task.inputs(), pruning_ratio=0.5)
    detect = model.detect
    assert isinstance(detect, CachingDetect)
    assert (detect.shape, detect.anchors.numel(), detect.strides.numel()) == (None, 0, 0)

"""Seventeen networks of torchvision: the groups are proven, the cut networks train."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from proof import outputs, permute_channels, randomise, relative_error
from torch import Tensor, nn
from zoo import CLASSES, ZOO, class_outputs, zoo_input, zoo_model

from lightning_prune import PruneRecord, find_groups, prune
from lightning_prune.cost import count_params
from lightning_prune.inputs import tensors_in
from lightning_prune.sizes import stale_sizes

CROSS_CHANNEL_NORM = {"convnext_tiny"}
ONLY_IN_TRAIN_MODE = {"googlenet", "inception_v3"}


@pytest.mark.parametrize("name", ZOO)
def test_permuting_the_channels_leaves_the_output_unchanged(name: str) -> None:
    model = zoo_model(name)
    groups = find_groups(model, zoo_input(name))
    assert {group.name for group in groups if group.frozen} == class_outputs(name, model)
    assert {group.size for group in groups if group.frozen} == {CLASSES}
    assert len({group.name for group in groups}) == len(groups) >= 8
    randomise(model.double()).eval()
    x = zoo_input(name, training=False).double()
    before = outputs(model, x)
    permute_channels(model, [group for group in groups if not group.frozen])
    assert before[0].std() > 0.1
    assert relative_error(outputs(model, x), before) < 1e-12


@pytest.mark.parametrize("name", sorted(ONLY_IN_TRAIN_MODE))
def test_heads_that_only_run_in_train_mode_are_read_too(name: str) -> None:
    model = zoo_model(name)
    groups = find_groups(model, zoo_input(name))
    randomise(model.double()).train()
    x = zoo_input(name).double()
    before = outputs(model, x)
    permute_channels(model, [group for group in groups if not group.frozen])
    assert len(before) == len(class_outputs(name, model)) > 1
    assert relative_error(outputs(model, x), before) < 1e-9


@pytest.mark.parametrize("name", ZOO)
def test_the_cut_network_trains(name: str) -> None:
    model = zoo_model(name).train()
    x = zoo_input(name)
    kinds = {module: type(part) for module, part in model.named_modules()}
    tensors = {key: id(tensor) for key, tensor in [*model.named_parameters(), *model.named_buffers()]}
    params = count_params(model)
    record = prune(model, x, pruning_ratio=0.5)
    assert record.reached == pytest.approx(0.5, abs=0.02)
    assert set(record.held_back) == class_outputs(name, model)
    assert count_params(model) == record.params.after < 0.4 * params
    assert 0 < record.macs.after < 0.5 * record.macs.dense
    assert {module: type(part) for module, part in model.named_modules()} == kinds
    there = {key: id(tensor) for key, tensor in [*model.named_parameters(), *model.named_buffers()]}
    made = {f"{module}.bias" for module in record.biases}  # for what removed channels emit
    assert {key: number for key, number in there.items() if key not in made} == tensors
    assert made.isdisjoint(tensors)
    assert all(part.training and not _hooks(part) for part in model.modules())
    assert stale_sizes(model) == {}
    results = list(tensors_in(model(x)))
    assert [tuple(result.shape) for result in results] == [(2, CLASSES)] * len(class_outputs(name, model))
    sum(result.square().sum() for result in results).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.isfinite().all()


def _hooks(module: nn.Module) -> list[object]:
    return [hook for key, hooks in module.__dict__.items() if key.endswith("_hooks") for hook in hooks]


@pytest.mark.parametrize("name", [name for name in ZOO if name not in CROSS_CHANNEL_NORM])
def test_removing_channels_is_the_same_as_zeroing_them(name: str) -> None:
    model = randomise(zoo_model(name).double()).eval()
    dense = copy.deepcopy(model)
    record = prune(model, zoo_input(name).double(), pruning_ratio=0.5, constants="drop")
    zero_what_leaves(dense, record)
    x = zoo_input(name, training=False).double()
    before = outputs(model, x)
    assert before[0].std() > 0.01
    assert relative_error(before, outputs(dense, x)) < 1e-12


def zero_what_leaves(model: nn.Module, record: PruneRecord) -> None:
    """Let no layer read the channels that a record removes: its weights for them become zero."""
    for module in (part for part in model.named_modules() if isinstance(part[1], (nn.Conv2d, nn.Linear))):
        kept = record.kept.get(f"{module[0]}.weight", {}).get(1)
        if kept is not None:
            weight = module[1].weight
            assert isinstance(weight, Tensor)
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[list(kept)] = False
            weight.data[:, gone] = 0


@pytest.mark.parametrize(("name", "seconds"), [("resnet50", 1.0), ("densenet121", 2.0)])
def test_reading_is_fast(name: str, seconds: float) -> None:
    model, x, times = zoo_model(name), torch.zeros(1, 3, 224, 224), []
    for _ in range(3):
        start = time.process_time()
        find_groups(model, x)
        times.append(time.process_time() - start)
    assert min(times) < seconds

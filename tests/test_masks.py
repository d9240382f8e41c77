"""Masks as values: put on weights exactly, measured, carried through a cut, packed and read back with a strict eye."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from math import inf, nan
from typing import Any

import pytest
import torch
from fits import EXAMPLE, network
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.cut import Cut, cut_tensor
from lightning_prune.errors import HistoryError, PruningError
from lightning_prune.graph import read
from lightning_prune.masks.held import (
    ATTRIBUTE,
    Masks,
    apply,
    cut_masks,
    hold,
    layer_sparsity,
    masks_of,
    pack,
    sparsity,
    unpack,
)
from lightning_prune.masks.magnitude import magnitude_masks
from lightning_prune.surgery import remove
from lightning_prune.types import PruningPlan


def same(one: Masks, other: Masks) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TestApply:
    @pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
    def test_pruned_weights_are_exactly_zero_and_others_untouched(self, kind: torch.dtype) -> None:
        net = nn.Linear(4, 1, bias=False, dtype=kind)
        net.weight.data = torch.tensor([[-2.0, nan, inf, -3.0]], dtype=kind)
        apply({"weight": torch.tensor([[False, False, False, True]])}, net)
        assert torch.equal(net.weight, torch.tensor([[0, 0, 0, -3.0]], dtype=kind))
        assert not torch.view_as_real(net.weight.detach().cfloat())[0, :3].signbit().any()

    def test_it_is_seen_through_wrappers_and_by_autograd(self) -> None:
        net = nn.Linear(2, 1)
        apply({"weight": torch.tensor([[True, False]])}, torch.compile(net))  # type: ignore[arg-type]
        assert net.weight[0, 1] == 0
        assert net.weight.requires_grad
        assert net.weight.is_leaf

    @pytest.mark.parametrize(
        ("masks", "message"),
        [
            ({"weight": torch.ones(1, 2).bool(), "wait": torch.ones(1, 2).bool()}, "'wait', but the model has no such"),
            ({"weight": torch.ones(2, 1).bool()}, r"shape \(2, 1\), but the weight has the shape \(1, 2\)"),
            ({"weight": torch.ones(1, 2)}, "is torch.float32 of shape"),
        ],
    )
    def test_what_does_not_fit_is_refused_and_nothing_has_changed(self, masks: Masks, message: str) -> None:
        net = nn.Linear(2, 1)
        before = deepcopy(net.state_dict())
        for change in (apply, lambda masks, net: hold(net, masks)):
            with pytest.raises(PruningError, match=message):
                change({**masks, "bias": torch.zeros(1).bool()}, net)
        assert masks_of(net) == {}
        assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


class TestHeldMasks:
    def test_they_stay_with_the_model_and_its_copies(self) -> None:
        net = network()
        masks = magnitude_masks(net, 0.5)
        hold(net, masks)
        assert same(masks_of(net), masks)
        assert same(masks_of(deepcopy(net)), masks)
        assert same(masks_of(nn.DataParallel(net)), masks)
        assert not any("mask" in name for name in net.state_dict())

    def test_a_cut_can_be_made_beside_them(self) -> None:
        net = network()
        hold(net, magnitude_masks(net, 0.5))
        prune(net, EXAMPLE, pruning_ratio=0.5)
        assert ATTRIBUTE in net.__dict__

    def test_there_are_none_before(self) -> None:
        assert masks_of(network()) == {}


class TestSparsity:
    def test_by_hand(self) -> None:
        masks = {"a": torch.tensor([[True, False], [False, False]]), "b": torch.ones(4).bool()}
        assert layer_sparsity(masks) == {"a": 0.75, "b": 0}
        assert sparsity(masks) == 0.375
        assert sparsity({}) == 0


class TestCut:
    def test_each_weight_keeps_its_mask(self) -> None:
        net = network()
        masks = magnitude_masks(net, 0.5)
        apply(masks, net)
        graph = read(net, EXAMPLE)
        groups = [group for group in graph.groups if not group.frozen]
        plan = PruningPlan({group.name: torch.arange(0, group.size, 3) for group in groups})
        before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
        cut = remove(net, graph, plan)
        smaller = cut_masks(masks, cut)
        assert any(smaller[name].shape != masks[name].shape for name in masks)
        weights = dict(net.named_parameters())
        for name, mask in smaller.items():
            assert mask.shape == weights[name].shape
            assert torch.equal(mask, cut_tensor(before[name] != 0, cut.kept.get(name, {})))
            assert not weights[name][~mask].any()
        hold(net, smaller)

    def test_what_the_cut_does_not_touch_stays(self) -> None:
        masks = {"a": torch.ones(2, 2).bool()}
        assert same(cut_masks(masks, Cut()), masks)

    def test_masks_of_other_shapes_are_refused(self) -> None:
        cut = Cut({"a": (4, 2)}, {"a": {0: torch.tensor([0, 1])}})
        with pytest.raises(PruningError, match=r"'a' has the shape \(2, 2\), but the cut is one of .*\(4, 2\)"):
            cut_masks({"a": torch.ones(2, 2).bool()}, cut)


def saved(value: object) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class TestPacking:
    @given(st.lists(st.booleans(), min_size=1, max_size=40))
    def test_there_and_back(self, marks: list[bool]) -> None:
        net = nn.Linear(len(marks), 1)
        masks = {"weight": torch.tensor([marks])}
        assert same(unpack(pack(masks), net), masks)

    def test_one_bit_a_weight_the_first_in_the_highest(self) -> None:
        packed = pack({"a": torch.tensor([[True, False, False], [False, False, True]] * 2)})
        assert packed["a"]["shape"] == [4, 3]
        assert packed["a"]["bits"].tolist() == [0b10000110, 0b00010000]

    def test_through_a_file_that_is_read_as_plain_data(self) -> None:
        net = network()
        masks = magnitude_masks(net, 0.6)
        assert same(unpack(saved(pack(masks)), net), masks)

    def test_the_layout_of_a_mask_makes_no_difference(self) -> None:
        net = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        masks = magnitude_masks(net, 0.5)
        assert masks["weight"].is_contiguous(memory_format=torch.channels_last)
        assert same(unpack(pack(masks), net), masks)

    @pytest.mark.parametrize(
        "change",
        [
            lambda packed: [packed],
            lambda packed: None,
            lambda packed: {"fc": packed["weight"]},
            lambda packed: {0: packed["weight"]},
            lambda packed: {("weight",): packed["weight"]},
            lambda packed: {"weight": None},
            lambda packed: {"weight": torch.ones(1, 12)},
            lambda packed: {"weight": {"shape": [1, 12]}},
            lambda packed: {"weight": {**packed["weight"], "more": 1}},
            lambda packed: {"weight": {**packed["weight"], "shape": [12, 1]}},
            lambda packed: {"weight": {**packed["weight"], "shape": (1, 12)}},
            lambda packed: {"weight": {**packed["weight"], "shape": [1, 10**30]}},
            lambda packed: {"weight": {**packed["weight"], "bits": b"\xff\xf0"}},
            lambda packed: {"weight": {**packed["weight"], "bits": torch.ones(2)}},
            lambda packed: {"weight": {**packed["weight"], "bits": torch.zeros(3, dtype=torch.uint8)}},
            lambda packed: {"weight": {**packed["weight"], "bits": torch.zeros(1, dtype=torch.uint8)}},
            lambda packed: {"weight": {**packed["weight"], "bits": torch.zeros(1, 2, dtype=torch.uint8)}},
            lambda packed: {"weight": {**packed["weight"], "bits": torch.zeros(2, dtype=torch.uint8, device="meta")}},
            lambda packed: {"weight": {**packed["weight"], "bits": torch.tensor([255, 255], dtype=torch.uint8)}},
        ],
    )
    def test_what_does_not_fit_is_refused(self, change: Callable[[dict[str, Any]], object]) -> None:
        net = nn.Linear(12, 1)
        packed = pack({"weight": torch.ones(1, 12).bool()})
        with pytest.raises(HistoryError, match=r"masks do not fit the model, or are damaged .*Build the model"):
            unpack(change(packed), net)

    def test_masks_lie_where_the_weights_do(self) -> None:
        mask: Tensor = torch.ones(1, 3).bool()
        assert unpack(pack({"weight": mask}), nn.Linear(3, 1, device="meta"))["weight"].is_meta

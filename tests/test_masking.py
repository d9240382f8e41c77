"""Masks by magnitude: exact counts under ties, pruned stays pruned, all float types, 100M weights, every error."""

from __future__ import annotations

import subprocess
import sys
from math import floor, inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prune.allocation import Allocation, DenseLayer, Global, Uniform, WeightAllocation
from lightning_prune.errors import PruningError, ScoreError
from lightning_prune.masks.allocations import ERK, LAMP, PerLayer, StdThreshold
from lightning_prune.masks.granularity import NM, Blocks
from lightning_prune.masks.held import Masks, apply, layer_sparsity, sparsity
from lightning_prune.masks.magnitude import magnitude_masks
from lightning_prune.masks.maskable import dense_layers


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def row(*values: float) -> nn.Linear:
    net = nn.Linear(len(values), 1, bias=False)
    net.weight.data = torch.tensor([values])
    return net


def kept(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


class TestByHand:
    def test_the_smallest_magnitudes_go(self) -> None:
        masks = magnitude_masks(row(3.0, -1.0, 0.5, -2.0), 0.5)
        assert masks["weight"].tolist() == [[True, False, False, True]]

    def test_of_equal_weights_the_first_go(self) -> None:
        assert magnitude_masks(row(1.0, -1.0, 1.0, -1.0), 0.5)["weight"].tolist() == [[False, False, True, True]]

    def test_two_of_four(self) -> None:
        masks = magnitude_masks(row(3.0, -1.0, 0.5, -2.0, 1.0, 1.0, 1.0, 1.0), 0.9, "2:4")
        assert masks["weight"].int().tolist() == [[1, 0, 0, 1, 0, 0, 1, 1]]

    def test_blocks(self) -> None:
        masks = magnitude_masks(row(3.0, -1.0, 0.5, -2.0), 0.5, Blocks(1, 2))
        assert masks["weight"].tolist() == [[True, True, False, False]]

    def test_transposed_convolutions_are_grouped_along_their_input(self) -> None:
        net = nn.ConvTranspose1d(4, 3, 2, bias=False)
        net.weight.data = torch.arange(24.0).view(4, 3, 2)
        assert magnitude_masks(net, 0.0, "2:4")["weight"][:, 0, 0].tolist() == [False, False, True, True]
        blocks = magnitude_masks(net, 0.5, "1x2")["weight"]
        assert blocks[2:].all()
        assert not blocks[:2].any()

    @pytest.mark.parametrize("allocation", [Uniform(), Global(), LAMP(), ERK()], ids=repr)
    def test_lenet_at_90_percent(self, allocation: WeightAllocation) -> None:
        assert kept(magnitude_masks(lenet(), 0.9, allocation=allocation)) == 26620

    def test_weights_are_not_touched(self) -> None:
        net = lenet()
        before = net[1].weight.detach().clone()
        magnitude_masks(net, 0.9)
        assert torch.equal(net[1].weight, before)


VALUES = st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0]), min_size=24, max_size=24)
RATIOS = st.floats(0, 0.99)
ALLOCATIONS = st.sampled_from([Uniform(), Global(), LAMP(), ERK()])


def two_layers(values: list[float]) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False))
    net[0].weight.data = torch.tensor(values[:12]).view(3, 4)
    net[1].weight.data = torch.tensor(values[12:]).view(4, 3)
    return net


class TestInvariants:
    @given(VALUES, RATIOS, st.sampled_from([Global(), LAMP(), ERK()]))
    def test_counts_are_exact_under_ties(self, values: list[float], ratio: float, allocation: WeightAllocation) -> None:
        masks = magnitude_masks(two_layers(values), ratio, allocation=allocation)
        assert kept(masks) == max(24 - floor(ratio * 24 + 0.5), 2)

    @given(VALUES, RATIOS, RATIOS, ALLOCATIONS, ALLOCATIONS)
    def test_what_is_pruned_stays_pruned(
        self, values: list[float], one: float, other: float, first: WeightAllocation, then: WeightAllocation
    ) -> None:
        net = two_layers(values)
        before = magnitude_masks(net, one, allocation=first)
        apply(before, net)
        after = magnitude_masks(net, other, allocation=then, before=before)
        assert not any((after[name] & ~before[name]).any() for name in before)

    @given(VALUES, RATIOS, RATIOS, st.sampled_from([Uniform(), Global(), LAMP(), ERK()]))
    def test_later_events_reach_their_ratio_also_where_kept_weights_are_zero(
        self, values: list[float], one: float, other: float, allocation: WeightAllocation
    ) -> None:
        net = two_layers(values)
        low, high = sorted((one, other))
        before = magnitude_masks(net, low, allocation=Uniform())
        apply(before, net)
        again = magnitude_masks(net, high, allocation=allocation, before=before)
        if not isinstance(allocation, ERK):
            fresh = magnitude_masks(two_layers(values), high, allocation=allocation)
            assert kept(again) == min(kept(fresh), kept(before))  # Uniform rounds each layer, and so may be ahead
        assert kept(again) <= kept(before)

    @given(VALUES, st.sampled_from(["1:2", "2:4", "1:3"]), RATIOS)
    def test_patterns_hold_over_what_was_pruned(self, values: list[float], pattern: str, ratio: float) -> None:
        net = nn.Linear(12, 2, bias=False)
        net.weight.data = torch.tensor(values).view(2, 12)
        before = magnitude_masks(net, ratio)
        masks = magnitude_masks(net, 0.0, pattern, before=before)["weight"]
        n, m = map(int, pattern.split(":"))
        assert ((masks.view(-1, m).sum(1)) == before["weight"].view(-1, m).sum(1).clamp(max=n)).all()

    @pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_every_float_type(self, kind: torch.dtype) -> None:
        net = nn.Conv2d(8, 8, 3, dtype=kind).to(memory_format=torch.channels_last)
        mask = magnitude_masks(net, 0.7, allocation=Global())["weight"]
        assert int(mask.sum()) == 576 - floor(0.7 * 576 + 0.5)
        assert net.weight[mask].abs().min() >= net.weight[~mask].abs().max()

    def test_layers_of_several_types_are_ranked_together(self) -> None:
        net = nn.Sequential(nn.Linear(2, 1, bias=False, dtype=torch.float64), nn.Linear(1, 2, bias=False))
        net[0].weight.data = torch.tensor([[1.0, 1 + 2**-40]], dtype=torch.float64)
        net[1].weight.data = torch.tensor([[1.0], [2.0]])
        masks = magnitude_masks(net, 0.5, allocation=Global())
        assert [mask.flatten().tolist() for mask in masks.values()] == [[False, True], [False, True]]


class TestDense:
    def test_ratios_count_what_channel_cuts_took(self) -> None:
        net = nn.Linear(10, 4, bias=False)
        dense = dense_layers(net)
        net.weight.data = net.weight.data[:, :5]
        assert kept(magnitude_masks(net, 0.5, dense=dense)) == 20
        assert kept(magnitude_masks(net, 0.75, dense=dense)) == 10
        assert kept(magnitude_masks(net, 0.75, "1x5", dense=dense)) == 10

    def test_thresholds_stay_those_of_the_dense_weights(self) -> None:
        net = lenet()
        dense = dense_layers(net)
        first = magnitude_masks(net, 0.0, allocation=StdThreshold(1.0), dense=dense)
        apply(first, net)
        again = magnitude_masks(net, 0.0, allocation=StdThreshold(1.0), before=first, dense=dense)
        assert all(torch.equal(first[name], again[name]) for name in first)
        moved = magnitude_masks(net, 0.0, allocation=StdThreshold(1.0, of="nonzero"), before=first)
        assert sparsity(moved) > sparsity(first)

    def test_erf_of_q_goes(self) -> None:
        net = nn.Linear(500, 400)
        nn.init.normal_(net.weight, std=0.02)
        assert sparsity(magnitude_masks(net, 0.0, allocation=StdThreshold(1.0))) == pytest.approx(0.683, abs=0.004)

    def test_a_ratio_for_each_layer(self) -> None:
        masks = magnitude_masks(lenet(), 0.0, allocation=PerLayer({"1": 0.92, "3": 0.91, "5": 0.74}))
        assert layer_sparsity(masks) == pytest.approx({"1.weight": 0.92, "3.weight": 0.91, "5.weight": 0.74}, abs=1e-6)


class TestErrors:
    @pytest.mark.parametrize("ratio", [-0.1, 1.0, nan])
    def test_ratios_outside_are_refused(self, ratio: float) -> None:
        with pytest.raises(ValueError, match=rf"`ratio` is the fraction .* in \[0, 1\); got {ratio}"):
            magnitude_masks(lenet(), ratio)

    @pytest.mark.parametrize("value", [nan, inf, -inf])
    def test_weights_that_are_no_numbers_are_named(self, value: float) -> None:
        net = lenet()
        net[3].weight.data[5, 5] = value
        with pytest.raises(ScoreError, match="weight of '3' holds NaN or infinite values"):
            magnitude_masks(net, 0.5)
        assert "3.weight" not in magnitude_masks(net, 0.5, ignore=["3"])

    def test_a_pattern_has_nothing_to_share_out(self) -> None:
        with pytest.raises(ValueError, match=r"NM\(2, 4\) says of each layer .* `allocation` Uniform\(\)"):
            magnitude_masks(lenet(), 0.5, NM(2, 4), allocation=Uniform())

    def test_a_pattern_that_does_not_divide_is_refused(self) -> None:
        with pytest.raises(ValueError, match="The weight of '0' has 6 inputs"):
            magnitude_masks(nn.Sequential(nn.Linear(6, 4)), 0.5, "2:4")
        with pytest.raises(ValueError, match="The weight of 'weight' has 6 inputs"):
            magnitude_masks(nn.Linear(6, 4), 0.5, "2:4")

    def test_allocations_of_channels_are_refused(self) -> None:
        class OnlyChannels(Allocation):
            widths = Uniform.widths

        with pytest.raises(TypeError, match=r"OnlyChannels\(\) does not share weights out"):
            magnitude_masks(lenet(), 0.5, allocation=OnlyChannels())  # type: ignore[arg-type]

    def test_a_deviation_that_nobody_kept_is_an_error(self) -> None:
        net = lenet()
        before = magnitude_masks(net, 0.5)
        with pytest.raises(ValueError, match="not known any more"):
            magnitude_masks(net, 0.5, allocation=StdThreshold(1.0), before=before)

    def test_masks_that_do_not_fit_are_refused(self) -> None:
        net = lenet()
        before = magnitude_masks(net, 0.5)
        with pytest.raises(PruningError, match=r"`before` masks '1\.weight', which is no weight to be masked now"):
            magnitude_masks(net, 0.6, ignore=["1"], before=before)
        with pytest.raises(PruningError, match="has the shape"):
            magnitude_masks(net, 0.6, before={"1.weight": torch.ones(2, 2).bool()})

    def test_dense_layers_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"`dense` does not know '1\.weight'"):
            magnitude_masks(lenet(), 0.5, dense={})
        for shape in ((2, 784), (300, 784, 1)):
            with pytest.raises(ValueError, match="which is no part of it"):
                magnitude_masks(nn.Linear(784, 300), 0.5, dense={"weight": DenseLayer(shape)})


MANY = """
import resource, torch
from lightning_prune.allocation import Global
from lightning_prune.masks.magnitude import magnitude_masks
net = torch.nn.Linear(10_000, 10_000, bias=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mask = magnitude_masks(net, 0.9, allocation=Global())["weight"]
assert int(mask.count_nonzero()) == 10_000_000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_100_million_weights_take_twice_their_memory_at_most() -> None:
    told = subprocess.run([sys.executable, "-c", MANY], capture_output=True, text=True, check=True)
    assert float(told.stdout) < 800

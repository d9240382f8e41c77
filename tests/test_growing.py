"""Masks drawn by lot and the exchange of weights: by hand, and what holds for all of them."""

from __future__ import annotations

from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune.allocation import Global, Uniform
from lightning_prune.errors import PruningError
from lightning_prune.masks.allocations import ERK, LAMP, PerLayer, StdThreshold
from lightning_prune.masks.growing import constant, cosine_decay, exchange, lot, random_masks
from lightning_prune.masks.held import sparsity


def mask_of(*places: int, size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(places)] = True
    return mask


def places(mask: Tensor) -> list[int]:
    return mask.flatten().nonzero().flatten().tolist()


def exchanged(kept: list[int], weight: list[float], wanted: list[float], share: float) -> list[int]:
    return places(exchange(mask_of(*kept, size=len(weight)), torch.tensor(weight), torch.tensor(wanted), share))


def test_the_smallest_go_and_the_most_wanted_grow() -> None:
    """Two of four: |w| = 1 and 2 go; |wanted| = 9 and 8 grow, whatever is wanted at places that stay."""
    weight = [4.0, -1.0, 2.0, -3.0, 0.0, 0.0, 0.0, 0.0]
    wanted = [99.0, 0.1, 0.1, 99.0, 8.0, 0.5, -9.0, 7.0]
    assert exchanged([0, 1, 2, 3], weight, wanted, 0.5) == [0, 3, 4, 6]


def test_a_dropped_weight_comes_back_where_nothing_is_wanted_more() -> None:
    assert exchanged([0, 1], [5.0, 1.0, 0.0], [0.0, 3.0, 2.0], 0.5) == [0, 1]


def test_nothing_changes_where_nothing_is_wanted() -> None:
    """Gradients that are all 0, as of a dead layer: whatever is dropped comes back, wherever it lies."""
    assert exchanged([5, 6, 7], [0.0] * 5 + [3.0, 1.0, 2.0], [0.0] * 8, 0.7) == [5, 6, 7]
    assert exchanged([4, 5, 6, 7], [0.0] * 4 + [4.0, 1.0, 2.0, 3.0], [0.0, 0.0, -1e-6, 0.0] * 2, 0.5) == [2, 4, 6, 7]


def test_of_equal_ones_the_first() -> None:
    assert exchanged([0, 1, 2, 3], [1.0] * 4 + [0.0] * 4, [1.0] * 8, 0.5) == [0, 1, 2, 3]
    assert exchanged([4, 5, 6, 7], [0.0] * 4 + [1.0] * 4, [1.0] * 8, 0.5) == [0, 1, 6, 7]


@pytest.mark.parametrize(("share", "gone"), [(0.3, 3), (0.29, 2), (0.1, 1), (0.099, 0), (0.7, 7), (1.0, 10)])
def test_the_share_is_rounded_down(share: float, gone: int) -> None:
    """0.7 * 10 is not quite 7 for a computer."""
    mask = mask_of(*range(10), size=40)
    after = exchange(mask, mask.float(), (~mask).float(), share)
    assert int((mask & ~after).count_nonzero()) == gone


@pytest.mark.parametrize("kept", [range(0), range(2), range(5)], ids=["none", "too few", "dense"])
def test_layers_that_have_nothing_to_exchange_keep_their_mask(kept: range) -> None:
    mask = mask_of(*kept, size=5)
    assert exchange(mask, mask.float(), torch.rand(5), 0.4 if len(kept) < 5 else 0.9) is mask


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, -1.0, 1.0, 2.5]), st.sampled_from([0.0, -2.0, 2.0, 3.0]))),
    st.floats(0, 1),
)
def test_as_many_as_before_under_any_ties(rows: list[tuple[bool, float, float]], share: float) -> None:
    mask = torch.tensor([row[0] for row in rows], dtype=torch.bool)
    weight = torch.tensor([row[1] if row[0] else 0.0 for row in rows])
    wanted = torch.tensor([row[2] for row in rows])
    after = exchange(mask, weight, wanted, share)
    kept = int(mask.count_nonzero())
    assert int(after.count_nonzero()) == kept
    gone, grown, others = mask & ~after, after & ~mask, ~mask & ~after
    assert int(gone.count_nonzero()) <= floor(share * kept + 1e-9)
    if grown.any() and others.any():
        assert wanted[grown].abs().min() >= wanted[others].abs().max()
    if grown.any():
        assert wanted[grown].abs().min() >= wanted[gone].abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_other_types(dtype: torch.dtype) -> None:
    weight = torch.tensor([3.0, 1.0, 0.0, 0.0]).to(dtype)
    after = exchange(mask_of(0, 1, size=4), weight, torch.tensor([0.0, 0.0, 1.0, 2.0]).to(dtype), 0.5)
    assert places(after) == [0, 3]


def test_nothing_that_comes_in_is_changed() -> None:
    mask, weight, wanted = mask_of(0, 1, 2, size=9), torch.rand(9), torch.rand(9)
    copies = [each.clone() for each in (mask, weight, wanted)]
    exchange(mask, weight, wanted, 0.5)
    assert all(map(torch.equal, copies, (mask, weight, wanted)))


def test_decays() -> None:
    """alpha / 2 * (1 + cos(pi t / T)): at a third three quarters, at the end nothing."""
    assert [round(cosine_decay(t), 10) for t in (0, 1 / 3, 1 / 2, 2 / 3, 1)] == [1, 0.75, 0.5, 0.25, 0]
    assert {constant(t) for t in (0, 0.5, 1)} == {1.0}


def lenet() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def test_counts_of_erk() -> None:
    """LeNet-300-100 at 90 %: the densities of methods.md H, and 26,620 of 266,200 weights exactly."""
    masks = random_masks(lenet(), 0.9)
    shares = {name: int(mask.count_nonzero()) / mask.numel() for name, mask in masks.items()}
    assert shares == pytest.approx({"0.weight": 0.0796, "2.weight": 0.2302, "4.weight": 1.0}, abs=1e-4)
    assert sum(int(mask.count_nonzero()) for mask in masks.values()) == 26_620


@pytest.mark.parametrize(
    ("allocation", "kept"), [(Uniform(), [75, 3]), (PerLayer({"0": 0.9}), [15, 6]), (ERK(), [75, 3])], ids=repr
)
def test_counts_of_each_layer(allocation: Uniform | PerLayer | ERK, kept: list[int]) -> None:
    net = nn.Sequential(nn.Linear(15, 10), nn.Linear(3, 2))
    found = {name: int(mask.count_nonzero()) for name, mask in random_masks(net, 0.5, allocation).items()}
    assert sum(found.values()) == sum(kept)
    assert isinstance(allocation, ERK) or list(found.values()) == kept


def test_the_draw_depends_on_seed_and_name_alone() -> None:
    net, same = lenet(), nn.Sequential(*lenet())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = random_masks(net, 0.9), random_masks(same, 0.9), random_masks(net, 0.9, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert not torch.equal(lot((5,), 0, "a", 100), lot((5,), 0, "a", 200))
    rows = first["0.weight"].sum(0).double()
    assert rows.std() / rows.mean() ** 0.5 == pytest.approx(1, abs=0.15)  # spread as by lot, not in some corner


def test_ignored_layers_stay_dense_and_formats_are_kept() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(4, 4)).to(memory_format=torch.channels_last)
    masks = random_masks(net, 0.5, ignore=["1"])
    assert masks.keys() == {"0.weight"}
    assert masks["0.weight"].is_contiguous(memory_format=torch.channels_last)
    assert sparsity(masks) == 0.5


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 2.0])
def test_sparsities_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"`sparsity` is the fraction .* in \[0, 1\); got {ratio}. Try 0.9."):
        random_masks(lenet(), ratio)


@pytest.mark.parametrize("allocation", [Global(), LAMP(), StdThreshold(1.0), "2:4"], ids=repr)
def test_allocations_that_need_scores(allocation: object) -> None:
    with pytest.raises(TypeError, match=r"drawn by lot, before any has a score; got .*Use ERK\(\), Uniform\(\)"):
        random_masks(lenet(), 0.9, allocation)  # type: ignore[arg-type]


def test_networks_without_weights() -> None:
    with pytest.raises(PruningError, match="no weight that a mask can be put on"):
        random_masks(nn.BatchNorm2d(3), 0.5)

"""Granularity: parsing, scores of units by hand, masks spread over weights, and shapes that do not divide."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune.masks.granularity import NM, Blocks, Granularity, Weights, granularity


class TestParsing:
    @pytest.mark.parametrize(
        ("text", "meant"),
        [
            ("weights", "Weights()"),
            ("2:4", "NM(2, 4)"),
            ("1:16", "NM(1, 16)"),
            ("blocks", "Blocks(4, 4)"),
            ("8x1", "Blocks(8, 1)"),
        ],
    )
    def test_strings(self, text: str, meant: str) -> None:
        assert repr(granularity(text)) == meant

    def test_an_object_is_returned(self) -> None:
        unit = NM(1, 4)
        assert granularity(unit) is unit

    @pytest.mark.parametrize("text", ["channels", "", "n:m", "2:4:8", "2 : 4", "-1:4", "4x", "2.0:4", "٢:٤", "2:4\n"])
    def test_other_strings_are_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="`granularity` of masks is 'weights', 'n:m'"):
            granularity(text)

    @pytest.mark.parametrize("text", ["4:4", "5:4", "0:4", "0:0"])
    def test_impossible_patterns_are_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=f"1 <= n < m; got {text}"):
            granularity(text)

    def test_other_types_are_refused(self) -> None:
        with pytest.raises(TypeError, match="got 4"):
            granularity(4)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="whole numbers"):
            NM(True, 4)
        with pytest.raises(ValueError, match="0x4"):
            Blocks(0, 4)
        with pytest.raises(ValueError, match="whole numbers from 1"):
            Blocks(4, 2.0)  # type: ignore[arg-type]


class TestUnits:
    def test_weights_are_scored_by_magnitude(self) -> None:
        weight = torch.tensor([[-3.0, 1.0], [0.0, -0.0]])
        assert Weights().scores(weight).tolist() == [[3, 1], [0, 0]]
        assert not Weights().scores(weight)[1].signbit().any()

    def test_blocks_are_scored_by_mean_magnitude(self) -> None:
        weight = torch.tensor([[1.0, -1.0, 4.0, 0.0], [2.0, 0.0, 0.0, -4.0]])
        assert Blocks(2, 2).scores(weight).tolist() == [[1, 2]]
        assert Blocks(1, 4).scores(weight).tolist() == [[1.5], [1.5]]
        assert Blocks(2, 1).scores(weight).tolist() == [[1.5, 0.5, 2, 2]]

    def test_the_mean_of_half_precision_is_not_rounded(self) -> None:
        weight = torch.tensor([[1.0, 1 + 2**-7]], dtype=torch.bfloat16)
        assert Blocks(1, 2).scores(weight).item() == 1 + 2**-8

    def test_blocks_of_convolutions_lie_at_one_position_of_the_kernel(self) -> None:
        weight = torch.arange(32.0).view(2, 4, 2, 2)
        scores = Blocks(2, 2).scores(weight)
        assert scores.shape == (1, 2, 2, 2)
        assert scores[0, 0, 1, 1] == weight[:, :2, 1, 1].mean()

    def test_a_mask_of_blocks_is_spread(self) -> None:
        units = torch.tensor([[True, False]])
        assert Blocks(2, 2).spread(units, (2, 4)).tolist() == [[True, True, False, False]] * 2

    def test_blocks_with_any_weight_left_are_kept(self) -> None:
        mask = torch.tensor([[True, False, False, False], [False, False, False, False]])
        assert Blocks(2, 2).units(mask).tolist() == [[True, False]]

    @pytest.mark.parametrize(
        ("unit", "shape"), [(Blocks(2, 3), (4, 9)), (Blocks(2, 3), (4, 6, 3, 2)), (Weights(), (3, 5)), (NM(), (2, 8))]
    )
    def test_units_of_a_spread_mask_are_the_mask(self, unit: Granularity, shape: tuple[int, ...]) -> None:
        kept = torch.rand(unit.scores(torch.ones(shape)).shape) < 0.5
        spread = unit.spread(kept, shape)
        assert spread.shape == shape
        assert torch.equal(unit.units(spread), kept)
        assert spread.sum() == kept.sum() * unit.size


class TestNM:
    def test_the_largest_of_each_group_stay(self) -> None:
        scores = torch.tensor([[1.0, 3.0, 2.0, 4.0, 8.0, 7.0, 6.0, 5.0]])
        assert NM(2, 4).keep(scores).int().tolist() == [[0, 1, 0, 1, 1, 1, 0, 0]]
        assert NM(1, 4).keep(scores).int().tolist() == [[0, 0, 0, 1, 1, 0, 0, 0]]
        assert NM(3, 8).keep(scores).int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 0]]

    def test_of_equal_weights_the_first_go(self) -> None:
        assert NM(2, 4).keep(torch.ones(1, 4)).int().tolist() == [[0, 0, 1, 1]]
        assert NM(1, 4).keep(torch.tensor([[2.0, 2, 1, 1]])).int().tolist() == [[0, 1, 0, 0]]

    def test_kernels_are_grouped_along_the_input(self) -> None:
        scores = torch.zeros(1, 4, 1, 2)
        scores[0, :, 0, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
        scores[0, :, 0, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        kept = NM(2, 4).keep(scores).int()
        assert kept[0, :, 0, 0].tolist() == [1, 1, 0, 0]
        assert kept[0, :, 0, 1].tolist() == [0, 0, 1, 1]

    @given(
        st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=24, max_size=24), st.sampled_from([(1, 2), (2, 4), (3, 8)])
    )
    def test_every_group_keeps_exactly_n(self, values: list[float], pattern: tuple[int, int]) -> None:
        unit = NM(*pattern)
        scores = torch.tensor(values).view(1, 24)
        kept = unit.keep(scores).view(-1, unit.m)
        assert kept.sum(1).tolist() == [unit.n] * (24 // unit.m)
        for group, marks in zip(scores.view(-1, unit.m), kept, strict=True):
            order = group.argsort(stable=True)[: unit.m - unit.n]
            assert sorted(order.tolist()) == (~marks).nonzero().squeeze(1).tolist()


class TestShapes:
    @pytest.mark.parametrize("shape", [(8, 6), (4, 3, 3, 3), (4, 1, 3, 3), (8,)])
    def test_what_m_does_not_divide_is_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"'features\.0' has .* inputs .*NM\(2, 4\) cannot group by 4.*`ignore`"):
            NM(2, 4).check("features.0", shape)

    @pytest.mark.parametrize("shape", [(8, 6), (6, 8), (8, 2, 4, 4), (16,)])
    def test_what_blocks_do_not_divide_is_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"'fc' has the shape .* blocks of 4x4 do not divide.*`ignore`"):
            Blocks().check("fc", shape)

    def test_others_are_accepted(self) -> None:
        Weights().check("fc", (3,))
        NM(2, 4).check("fc", (3, 8))
        Blocks().check("fc", (4, 8, 3, 3))


def test_scores_do_not_require_gradients() -> None:
    weight: Tensor = torch.ones(4, 4, requires_grad=True)
    assert not any(unit.scores(weight).requires_grad for unit in (Weights(), NM(), Blocks()))

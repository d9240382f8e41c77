"""Codes of sparse tensors: bits by hand, there and back bit for bit in every type, and codes that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from versions import needs

from lightning_prune.masks.coding import Coded, decode, encode, from_plain, occupied, places

KINDS = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.int8, torch.bool,
    pytest.param(torch.float8_e4m3fn, marks=needs("torch", "2.6", "does not index 8-bit floats on the CPU")),
]  # fmt: skip


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Compare bit for bit: also NaN payloads and the sign of 0."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def there_and_back(tensor: Tensor) -> Tensor:
    return decode(from_plain(encode(tensor, occupied(tensor)).to_plain(), tensor.shape))


def at(size: int, *where: int) -> Tensor:
    tensor = torch.zeros(size)
    tensor[list(where)] = torch.arange(1.0, len(where) + 1)
    return tensor


class TestByHand:
    def test_a_bitmap(self) -> None:
        coded = encode(at(8, 0, 1, 2, 5, 7), at(8, 0, 1, 2, 5, 7) != 0)
        assert (coded.width, coded.codes, coded.index.tolist()) == (0, 0, [0b11100101])
        assert coded.values.tolist() == [1, 2, 3, 4, 5]

    def test_relative_indices(self) -> None:
        tensor = at(64, 2, 3, 20)
        coded = encode(tensor, tensor != 0)
        # gaps 2, 0, 16: in 3 bits 010 000, twice 7 skipped (111 111), 010; 4 bits would take 4 codes, 5 bits 3
        assert (coded.width, coded.codes) == (3, 5)
        assert coded.index.tolist() == [0b01000011, 0b11110100]

    def test_a_gap_that_fills_the_width_is_skipped_with_a_code_of_its_own(self) -> None:
        for gap in range(70):
            tensor = at(200, gap, gap + 1, 199)
            assert same_bits(there_and_back(tensor), tensor)

    def test_two_of_four_take_their_values_and_four_bits_a_group(self) -> None:
        tensor = torch.tensor([0.0, 1, 2, 0, 3, 0, 0, 4]).repeat(100)
        coded = encode(tensor, tensor != 0)
        assert coded.bytes == 200 * 2 * 4 + 100
        assert coded.width == 0

    def test_kept_zeros_are_kept(self) -> None:
        where = torch.tensor([True, False, True, False])
        coded = encode(torch.tensor([1.0, 0, 0, 0]), where)
        assert coded.values.tolist() == [1, 0]
        assert places(coded).tolist() == [0, 2]


class TestThereAndBack:
    @given(st.lists(st.integers(0, 400), max_size=40), st.integers(401, 3000))
    def test_anywhere(self, where: list[int], size: int) -> None:
        tensor = at(size, *where)
        assert same_bits(there_and_back(tensor), tensor)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.5, 1.0])
    def test_every_type_and_density(self, kind: torch.dtype, density: float) -> None:
        tensor = (torch.randint(1, 9, (37, 5, 11)) * (torch.rand(37, 5, 11) < density)).to(kind)
        assert same_bits(there_and_back(tensor), tensor)

    @pytest.mark.parametrize("integer", [torch.int16, torch.int32, torch.int64])
    def test_odd_numbers_come_back_bit_for_bit(self, integer: torch.dtype) -> None:
        """-0, NaN with other payloads and signs, infinities and subnormal numbers."""
        kind = {torch.int16: torch.bfloat16, torch.int32: torch.float32, torch.int64: torch.float64}[integer]
        last = torch.iinfo(integer)
        bits = torch.zeros(1000, dtype=integer)
        bits[::37] = torch.randint(last.min, last.max, (28,), dtype=torch.int64).to(integer)
        bits[5], bits[7], bits[11], bits[13] = last.min, last.max, -1, 1
        tensor = bits.view(kind)
        assert same_bits(there_and_back(tensor), tensor)

    def test_the_order_is_that_of_the_shape_whatever_lies_where_in_memory(self) -> None:
        tensor = (torch.rand(8, 4, 3, 3) < 0.1).float().contiguous(memory_format=torch.channels_last)
        assert same_bits(there_and_back(tensor), tensor)
        assert same_bits(there_and_back(tensor.transpose(0, 1)), tensor.transpose(0, 1))

    def test_codes_of_several_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lightning_prune.masks.coding._PIECE", 8)
        tensor = (torch.rand(5000) < 0.02).float()
        assert same_bits(there_and_back(tensor), tensor)

    def test_numbers_and_empty_tensors(self) -> None:
        for tensor in (torch.tensor(3.0), torch.tensor(0.0), torch.empty(0, 4)):
            assert same_bits(there_and_back(tensor), tensor)


PLAIN = encode(at(64, 2, 3, 20), at(64, 2, 3, 20) != 0).to_plain()
BITMAP = encode(at(8, 0, 1, 2, 5, 7), at(8, 0, 1, 2, 5, 7) != 0).to_plain()


@pytest.mark.parametrize(
    ("plain", "change"),
    [
        (PLAIN, {"shape": [65]}),
        (PLAIN, {"shape": [8, 8]}),
        (PLAIN, {"shape": (64,)}),
        (PLAIN, {"shape": [10**30]}),
        (PLAIN, {"width": 17}),
        (PLAIN, {"width": 1}),
        (PLAIN, {"width": -3}),
        (PLAIN, {"width": 4}),
        (PLAIN, {"width": True}),
        (PLAIN, {"width": 0}),
        (PLAIN, {"width": 0, "codes": 0}),
        (PLAIN, {"codes": 4}),
        (PLAIN, {"codes": 10**30}),
        (PLAIN, {"codes": -5}),
        (PLAIN, {"codes": 5.0}),
        (PLAIN, {"values": torch.ones(2)}),
        (PLAIN, {"values": torch.ones(4)}),
        (PLAIN, {"values": torch.ones(1, 3)}),
        (PLAIN, {"values": torch.ones(3, device="meta")}),
        (PLAIN, {"values": [1.0, 2.0, 3.0]}),
        (PLAIN, {"index": torch.tensor([0b01000011, 0b11110101], dtype=torch.uint8)}),
        (PLAIN, {"index": torch.tensor([0b01000011], dtype=torch.uint8)}),
        (PLAIN, {"index": b"ab"}),
        (PLAIN, {"index": torch.zeros(2)}),
        (PLAIN, {"more": 1}),
        (BITMAP, {"index": torch.tensor([0b11100111], dtype=torch.uint8)}),
        (BITMAP, {"codes": 1}),
        (BITMAP, {"width": 2, "codes": 4}),
    ],
)
def test_what_contradicts_itself_is_refused(plain: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        decode(from_plain({**plain, **change}, (64,) if plain is PLAIN else (8,)))


def test_places_behind_the_end_are_refused() -> None:
    far = encode(at(64, 2, 3, 60), at(64, 2, 3, 60) != 0)
    with pytest.raises(ValueError, match="3 values for 3 places among 50"):
        decode(Coded((50,), far.values, far.index, far.width, far.codes))

"""Ranking: the lowest of many numbers as a stable sort finds them, in every float type and under ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune import ranking
from lightning_prune.ranking import lowest, shares_of_lowest

NUMBERS = st.lists(
    st.one_of(
        st.sampled_from([0.0, 1.0, -1.0, 2.0, 1e-45, 3.4e38, -3.4e38, float("inf"), float("-inf")]),
        st.floats(width=32, allow_nan=False),
    ),
    min_size=1,
    max_size=40,
).map(lambda values: [value + 0.0 for value in values])  # -0.0 + 0.0 is 0.0: a sort takes them for equal


def by_sorting(values: Tensor, count: int) -> Tensor:
    marked = torch.zeros(len(values), dtype=torch.bool)
    marked[values.sort(stable=True).indices[: max(count, 0)]] = True
    return marked


@given(NUMBERS, st.integers(-2, 45), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_the_lowest_are_those_of_a_stable_sort(numbers: list[float], count: int, kind: torch.dtype) -> None:
    values = torch.tensor(numbers, dtype=torch.float64).to(kind)
    assert torch.equal(lowest(values, count), by_sorting(values, count))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_numbers_that_differ_in_the_last_bit_are_told_apart(kind: torch.dtype) -> None:
    integer = torch.int32 if kind is torch.float32 else torch.int64
    values = (torch.tensor(1.0, dtype=kind).view(integer) + torch.arange(200_000, dtype=integer)).view(kind)
    shuffled = values[torch.randperm(len(values))]
    assert torch.equal(lowest(shuffled, 131_071), shuffled < values[131_071])


def test_ties_over_several_pieces_go_from_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_PIECE", 3)
    for count in range(12):
        assert lowest(torch.ones(11), count).tolist() == [place < count for place in range(11)]
        values = torch.tensor([1.0, 0, 1, 1, 0, 2, 1, 1, 2, 1, 0])
        assert torch.equal(lowest(values, count), by_sorting(values, count))


def test_the_shape_and_not_the_memory_format_gives_the_order() -> None:
    values = torch.ones(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    assert lowest(values, 5).flatten().tolist() == [True] * 5 + [False] * 19
    assert lowest(torch.ones(3, 2).t(), 2).tolist() == [[True, True, False], [False] * 3]


class TestShares:
    def test_equal_values_count_in_the_order_of_the_tensors(self) -> None:
        tensors = [torch.ones(4), torch.ones(6), torch.ones(10)]
        assert shares_of_lowest(tensors, 7, [4, 6, 10]) == [4, 3, 0]

    def test_what_one_may_not_give_the_others_do(self) -> None:
        tensors = [torch.zeros(4), torch.tensor([1.0, 2.0]), torch.tensor([1.5, 3.0])]
        assert shares_of_lowest(tensors, 5, [1, 2, 2]) == [1, 2, 2]
        assert shares_of_lowest(tensors, 3, [1, 1, 2]) == [1, 1, 1]
        assert shares_of_lowest(tensors, 99, [1, 1, 1]) == [1, 1, 1]
        assert shares_of_lowest(tensors, 0, [0, 0, 0]) == [0, 0, 0]
        assert shares_of_lowest([], 3, []) == []

    @given(st.lists(st.tuples(NUMBERS, st.integers(0, 40)), min_size=1, max_size=4), st.integers(0, 120))
    def test_they_are_those_of_a_stable_sort(self, parts: list[tuple[list[float], int]], count: int) -> None:
        tensors = [torch.tensor(numbers, dtype=torch.float32) for numbers, _ in parts]
        most = [min(limit, len(numbers)) for numbers, limit in parts]
        open_to_go = [tensor.sort(stable=True).values[:limit] for tensor, limit in zip(tensors, most, strict=True)]
        owner = torch.cat([torch.full((limit,), place) for place, limit in enumerate(most)])
        order = torch.cat(open_to_go).argsort(stable=True)[:count]
        assert shares_of_lowest(tensors, count, most) == owner[order].bincount(minlength=len(parts)).tolist()

    def test_types_are_compared_without_rounding(self) -> None:
        near = torch.tensor([1 + 2**-40], dtype=torch.float64)
        assert shares_of_lowest([near, torch.ones(1)], 1, [1, 1]) == [0, 1]

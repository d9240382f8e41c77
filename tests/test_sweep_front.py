"""The Pareto front, against brute force and by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.sweeps import pareto_front

# few different values, so that ties are the rule
points = st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(lambda n: n / 6)), max_size=25)


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and one != other


@given(points)
def test_the_front_is_what_nothing_dominates(networks: list[tuple[float, float]]) -> None:
    front = pareto_front([cost for cost, _ in networks], [accuracy for _, accuracy in networks])
    expected = {i for i, each in enumerate(networks) if not any(dominates(other, each) for other in networks)}
    assert set(front) == expected
    assert len(front) == len(expected)
    assert [networks[i] for i in front] == sorted(networks[i] for i in front)


@given(points, st.randoms())
def test_the_order_of_the_networks_does_not_matter(networks: list[tuple[float, float]], chance: object) -> None:
    def front(given_in: list[tuple[float, float]]) -> list[tuple[float, float]]:
        chosen = pareto_front([cost for cost, _ in given_in], [accuracy for _, accuracy in given_in])
        return [given_in[i] for i in chosen]

    shuffled = list(networks)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert front(shuffled) == front(networks)


def test_by_hand() -> None:
    costs, accuracies = [5.0, 1.0, 3.0, 3.0, 4.0, 1.0], [0.9, 0.5, 0.8, 0.7, 0.8, 0.5]
    assert pareto_front(costs, accuracies) == (1, 5, 2, 0)
    assert pareto_front([], []) == ()
    assert pareto_front([2.0], [0.1]) == (0,)


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match="come in pairs; got 2 and 1"):
        pareto_front([1.0, 2.0], [0.5])
    with pytest.raises(ValueError, match="got NaN"):
        pareto_front([1.0], [math.nan])

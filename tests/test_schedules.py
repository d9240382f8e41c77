"""Schedules: the published curves in numbers, their invariants on a grid, and how they are laid out over epochs."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.schedules import (
    Schedule,
    cosine,
    cubic,
    events,
    exponential,
    linear,
    one_cycle,
    one_shot,
    staircase,
)

CURVES: dict[str, Schedule] = {
    "one_shot": one_shot,
    "linear": linear,
    "cubic": cubic,
    "cosine": cosine,
    "exponential": exponential,
    "steep exponential": partial(exponential, rate=20.0),
    "one_cycle": one_cycle,
    "gentle one_cycle": partial(one_cycle, steepness=4.0, offset=1.0),
    "stairs of a line": staircase(linear, 7),
    "stairs of a cubic": staircase(cubic, 3),
}


@pytest.mark.parametrize(
    ("schedule", "progress", "share"),
    [
        (cubic, 9 / 20, 0.833625),  # 1 - (11/20)^3
        (cubic, 0.25, 0.578125),  # 1 - 27/64
        (linear, 0.3, 0.3),
        (cosine, 0.25, 0.1464466094),  # (1 - sqrt(1/2)) / 2
        (cosine, 0.5, 0.5),
        (exponential, 0.5, 0.8175744762),  # 1 / (1 + e^-1.5)
        (one_cycle, 3 / 7, 0.5001677313),  # the middle of the sigmoid: (1 + e^-8) / 2
        (one_cycle, 0.0, 0.0024734528),  # (1 + e^-8) / (1 + e^6)
        (one_shot, 0.0, 1.0),
    ],
)
def test_curves_in_numbers(schedule: Schedule, progress: float, share: float) -> None:
    assert schedule(progress) == pytest.approx(share, abs=1e-9)


def test_jaxpruners_ramp() -> None:
    """Half way through a cubic ramp to 0.5, jaxpruner's test has 0.4375."""
    assert 0.5 * cubic(0.5) == 0.4375


@pytest.mark.parametrize("schedule", CURVES.values(), ids=CURVES)
def test_curves_start_in_bounds_end_at_1_and_never_fall(schedule: Schedule) -> None:
    shares = [schedule(step / 200) for step in range(201)]
    assert shares[0] >= 0
    assert shares[-1] == pytest.approx(1.0, abs=1e-12)
    assert all(sooner <= later + 1e-12 for sooner, later in pairwise(shares))


@pytest.mark.parametrize("curve", [linear, cubic, cosine, exponential])
def test_gradual_curves_start_at_0(curve: Schedule) -> None:
    assert curve(0.0) == 0.0


def test_staircase_rests_between_strides() -> None:
    stairs = staircase(linear, 4)
    assert [stairs(t) for t in (0.0, 0.24, 0.25, 0.49, 0.74, 0.75, 1.0)] == [0, 0, 0.25, 0.25, 0.5, 0.75, 1]
    assert staircase(cubic, 2)(0.9) == 0.875


@pytest.mark.parametrize(("epochs", "steps", "epoch"), [(44, 22, 30), (22, 22, 15), (26, 26, 15), (100, 10, 30)])
def test_staircase_takes_each_stair_on_time(epochs: int, steps: int, epoch: int) -> None:
    """The progress of an epoch is no exact float: 15 / 22 * 22 is 14.999999999999998."""
    assert staircase(linear, steps)(epoch / epochs) == pytest.approx(epoch * steps // epochs / steps)


@pytest.mark.parametrize("steps", [0, -3])
def test_staircase_needs_a_stair(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"`steps` is the number of stairs, at least 1; got {steps}"):
        staircase(linear, steps)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (events(linear, 0, 4), {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}),
        (events(linear, 2, 6, 2), {4: 0.5, 6: 1.0}),
        (events(linear, 0, 5, 3), {3: 0.6, 5: 1.0}),  # the last event is at `end`, off the beat
        (events(cubic, 10, 12), {11: 0.875, 12: 1.0}),
        (events(cubic, 3, 4, 100), {4: 1.0}),
        (events(one_shot, 3, 9), {3: 1.0}),
        (events(one_shot, 0, 0), {0: 1.0}),
        (events(linear, 5, 5), {5: 1.0}),
        (events(staircase(linear, 2), 0, 4), {2: 0.5, 4: 1.0}),
    ],
)
def test_layouts_by_hand(layout: dict[int, float], expected: dict[int, float]) -> None:
    assert layout == pytest.approx(expected)
    assert list(layout) == sorted(layout)


def test_cubic_over_20_epochs() -> None:
    layout = events(cubic, 0, 20)
    assert layout[9] == pytest.approx(0.833625)
    assert list(layout) == list(range(1, 21))


@settings(deadline=None)
@given(
    curve=st.sampled_from(list(CURVES)),
    begin=st.integers(0, 40),
    length=st.integers(0, 60),
    every=st.integers(1, 70),
)
def test_layouts_rise_strictly_to_1(curve: str, begin: int, length: int, every: int) -> None:
    layout = events(CURVES[curve], begin, begin + length, every)
    shares = list(layout.values())
    assert shares[-1] == pytest.approx(1.0)
    assert all(0 < share <= 1 for share in shares)
    assert all(sooner < later for sooner, later in pairwise(shares))
    assert all(begin <= epoch <= begin + length for epoch in layout)
    assert all(epoch == begin + length or (epoch - begin) % every == 0 for epoch in layout)


@pytest.mark.parametrize(("begin", "end"), [(5, 4), (-1, 3), (-2, -1)])
def test_begin_and_end_out_of_order(begin: int, end: int) -> None:
    with pytest.raises(ValueError, match=rf"0 <= begin <= end; got begin={begin}, end={end}"):
        events(linear, begin, end)


@pytest.mark.parametrize("every", [0, -2])
def test_every_below_1(every: int) -> None:
    with pytest.raises(ValueError, match=rf"`every` is .* at least 1; got {every}"):
        events(linear, 0, 5, every)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (lambda t: 1 - t, r"\[1.0, 0.5, 0.0\]"),
        (lambda t: t - 0.5, r"\[-0.5, 0.0, 0.5\]"),
        (lambda t: 3 * t, r"\[0.0, 1.5, 3.0\]"),
    ],
    ids=["falls", "below 0", "above 1"],
)
def test_schedules_that_are_none(schedule: Schedule, values: str) -> None:
    with pytest.raises(ValueError, match=rf"`schedule` must rise from 0 or more to 1; it gives {values}"):
        events(schedule, 0, 2)

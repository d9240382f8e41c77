"""The rhythm of slimming in numbers: where passes cut, when the penalty is on, and how it warms up."""

from __future__ import annotations

from math import floor, inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_prune.callbacks.passes import Course, Passes, PassTiming, phases_of
from lightning_prune.callbacks.timing import Timing
from lightning_prune.schedules import linear, one_shot

HALVES = Passes((0.5, 0.75, 0.875))


def pass_timing(
    *, fine_tuning: float = 0.5, begin: int | None = None, end: int | None = None, every: int = 1
) -> PassTiming:
    return PassTiming(HALVES, begin, end, every, None, fine_tuning)


@pytest.mark.parametrize(
    ("length", "fine_tuning", "cuts"),
    [
        (60, 0.5, [10, 30, 50]),  # 20 a pass: slim 10, fine-tune 10
        (60, 0.25, [15, 35, 55]),
        (60, 0.0, [20, 40, 59]),  # the last epoch is there for the cut to happen in
        (60, 0.9, [2, 22, 42]),
        (7, 0.5, [1, 4, 6]),
        (3, 0.5, [1, 2]),
        (1, 0.5, [0]),
    ],
)
def test_passes_share_the_fit_equally(length: int, fine_tuning: float, cuts: list[int]) -> None:
    assert list(pass_timing(fine_tuning=fine_tuning).lay_out(length, "x")) == cuts


@pytest.mark.parametrize(
    ("begin", "end", "every", "cuts"),
    [(5, 45, 1, [5, 25, 45]), (5, None, 1, [5, 28, 50]), (None, 30, 1, [10, 20, 30]), (5, 45, 8, [5, 29, 45])],
)
def test_begin_and_end_are_the_first_and_the_last_cut(
    begin: int | None, end: int | None, every: int, cuts: list[int]
) -> None:
    assert list(pass_timing(begin=begin, end=end, every=every).lay_out(60, "x")) == cuts


def test_a_fit_without_end_needs_begin_and_end() -> None:
    assert list(pass_timing(begin=5, end=45).lay_out(inf, "x")) == [5, 25, 45]
    with pytest.raises(MisconfigurationException, match=r"nobody knows how many.*Set Trainer\(max_epochs=...\)"):
        pass_timing(begin=5).lay_out(inf, "x")


ratios = st.lists(st.integers(1, 999), min_size=1, max_size=6, unique=True).map(
    lambda ks: [k / 1000 for k in sorted(ks)]
)


@given(ratios, st.integers(1, 5000))
def test_each_pass_reaches_its_ratio_to_the_channel(wanted: list[float], channels: int) -> None:
    """The engine multiplies share and last ratio: what that rounds off must not cost a channel."""
    passes = Passes(tuple(wanted))
    for at, ratio in enumerate(wanted):
        share = passes(at / max(len(wanted) - 1, 1) if len(wanted) > 1 else 1.0)
        assert floor(share * wanted[-1] * channels + 0.5) == floor(ratio * channels + 0.5)


@pytest.mark.parametrize("wrong", [[], [0.5, 0.5], [0.5, 0.4], [0.0, 0.5], [-0.1, 0.5], [0.5, 1.0], [0.5, nan]])
def test_ratios_that_do_not_rise(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match=r"`pruning_ratio` of several passes .* rising, above 0 and below 1; got \["):
        Passes(tuple(wrong))


@pytest.mark.parametrize("wrong", [1.0, -0.1, nan])
def test_fine_tuning_out_of_range(wrong: float) -> None:
    with pytest.raises(ValueError, match=rf"`fine_tuning` is the fraction of each pass .* in \[0, 1\); got {wrong}"):
        pass_timing(fine_tuning=wrong)


# phases


def test_one_ratio_is_one_phase_up_to_the_last_event() -> None:
    assert phases_of(Timing(one_shot), [10]) == ((0.0, 10.0),)
    assert phases_of(Timing(linear), [4, 6, 8]) == ((0.0, 8.0),)
    assert phases_of(Timing(linear), []) == ()


@pytest.mark.parametrize(
    ("fine_tuning", "phases"),
    [
        (0.5, ((0.0, 10.0), (20.0, 30.0), (40.0, 50.0))),
        (0.25, ((0.0, 10.0), (15.0, 30.0), (35.0, 50.0))),
        (0.0, ((0.0, 10.0), (10.0, 30.0), (30.0, 50.0))),
    ],
)
def test_fine_tuning_follows_each_cut(fine_tuning: float, phases: tuple[tuple[float, float], ...]) -> None:
    assert phases_of(pass_timing(fine_tuning=fine_tuning), [10, 30, 50]) == phases


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_the_share_rises_in_each_phase_and_is_off_between_them(unit: str) -> None:
    course = Course(((0.0, 4.0), (6.0, 8.0)), warmup=2.0, unit=unit)
    moments = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.0, 4: 0.0, 5: 0.0, 6: 0.0, 7: 0.5, 8: 0.0, 9: 0.0}
    for moment, share in moments.items():
        assert course.share_at(*((moment, 99) if unit == "epoch" else (99, moment))) == share


def test_without_warmup_the_penalty_is_whole_at_once() -> None:
    course = Course(((0.0, 4.0), (6.5, 8.0)))
    assert [course.share_at(epoch, 0) for epoch in (0, 3.99, 4, 6.49, 6.5)] == [1, 1, 0, 0, 1]
    assert [course.ended_by(epoch, 0) for epoch in (0, 3.99, 4, 8)] == [0, 0, 1, 2]
    assert Course().share_at(0, 0) == 0

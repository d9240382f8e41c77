"""Allocations that grade the groups: how much more a deep one keeps, or in proportion to what a scan has found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.allocation import Allocation, Limits, Uniform, allocate
from lightning_prune.allocation.graded import InProportion, ShallowToDeep
from lightning_prune.sensitivity import Row, Sensitivity

WIDTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)
RATIOS = st.floats(0, 0.99)
QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def scored(widths: list[int]) -> dict[str, Tensor]:
    return {f"group {place}": torch.rand(width) for place, width in enumerate(widths)}


def kept(
    rule: Allocation, widths: list[int], ratio: float, dense: dict[str, int] | None = None, least: int = 1
) -> list[int]:
    scores = scored(widths)
    limits = {name: min(least, len(values)) for name, values in scores.items()}
    found = rule.widths(scores, dense or {name: len(values) for name, values in scores.items()}, ratio, limits)
    return list(found.values())


def test_the_last_group_keeps_so_much_more_than_the_first() -> None:
    """By hand: 150 of 300 stay in steps of 1 : 1.2247 : 1.5, at the level 0.4033, from which on 60.5 is 61."""
    assert kept(ShallowToDeep(1.5), [100, 100, 100], 0.5) == [40, 49, 61]


def test_a_factor_below_1_spares_the_shallow() -> None:
    deep, shallow = (kept(ShallowToDeep(factor), [60, 60, 60], 0.5) for factor in (2.0, 0.5))
    assert shallow == deep[::-1]
    assert deep == sorted(deep)


@given(WIDTHS, RATIOS)
@QUICK
def test_a_factor_of_1_is_uniform(widths: list[int], ratio: float) -> None:
    """Up to the rounding of each group, which for the one is of what goes, for the other of what stays."""
    graded, uniform = (kept(rule, widths, ratio) for rule in (ShallowToDeep(1.0), Uniform()))
    assert all(abs(one - other) <= 1 for one, other in zip(graded, uniform, strict=True))


RULES = st.one_of(
    st.builds(ShallowToDeep, st.floats(0.2, 5)),
    st.builds(
        lambda shares: InProportion({f"group {place}": share for place, share in enumerate(shares)}),
        st.lists(st.floats(0.05, 1), min_size=6, max_size=6),
    ),
)


@given(RULES, WIDTHS, RATIOS)
@QUICK
def test_the_ratio_is_reached_but_for_one_rounding(rule: Allocation, widths: list[int], ratio: float) -> None:
    """At the level found at least as many go as asked; those above it round at the same point of the level."""
    found = kept(rule, widths, ratio, least=0)
    gone, asked = sum(widths) - sum(found), int(ratio * sum(widths) + 0.5)
    assert gone >= asked
    assert gone - asked < len(widths)
    assert all(0 <= now <= width for now, width in zip(found, widths, strict=True))


@given(RULES, WIDTHS, RATIOS, RATIOS)
@QUICK
def test_more_is_asked_more_goes_of_each(rule: Allocation, widths: list[int], one: float, other: float) -> None:
    less, more = (kept(rule, widths, ratio) for ratio in sorted((one, other)))
    assert all(after <= before for after, before in zip(more, less, strict=True))


@given(RULES, WIDTHS)
@QUICK
def test_nothing_is_asked_nothing_goes(rule: Allocation, widths: list[int]) -> None:
    assert kept(rule, widths, 0.0) == widths


def test_groups_that_are_full_leave_it_to_the_others() -> None:
    """The deep ones would keep more than all that they have; the shallow one gives the rest."""
    assert kept(ShallowToDeep(10.0), [100, 100], 0.2) == [60, 100]


def test_a_group_keeps_what_limits_say() -> None:
    assert min(kept(ShallowToDeep(10.0), [100, 100], 0.8, least=30)) == 30
    plan = allocate(scored([100, 100]), 0.5, ShallowToDeep(10.0, cap=0.6), Limits(1))
    assert len(plan.removed["group 0"]) == 60
    plan = allocate(scored([100, 100]), 0.5, InProportion({"group 0": 1.0}, event_cap=0.25), Limits(1))
    assert {name: len(gone) for name, gone in plan.removed.items()} == {"group 0": 25}


def test_what_has_gone_counts() -> None:
    """Half of the dense channels, of which a quarter has gone: the fractions are of the dense ones."""
    dense = {"group 0": 40, "group 1": 40}
    again = kept(ShallowToDeep(1.0), [20, 40], 0.5, dense)
    assert again == [20, 20]
    assert kept(ShallowToDeep(1.0), [10, 40], 0.5, dense) == [10, 30]


def test_in_proportion_to_what_each_can_bear() -> None:
    rule = InProportion({"group 0": 0.1, "group 1": 0.3, "group 2": 0.2})
    assert kept(rule, [100, 100, 100], 0.2) == [90, 70, 80]
    assert kept(rule, [100, 100, 100], 0.4) == [80, 40, 60]


def test_a_group_that_no_pattern_matches_gives_nothing() -> None:
    rule = InProportion({"*1": 0.5})
    assert kept(rule, [10, 10, 10], 0.2) == [10, 4, 10]
    assert kept(rule, [10, 10, 10], 0.9) == [10, 1, 10]
    assert kept(InProportion({"group 1": 0.0, "*": 0.5}), [10, 10], 0.3) == [4, 10]


def test_a_scan_of_channels_says_what_each_can_bear() -> None:
    rows = (
        Row("0", 16, {"accuracy": (0.90, 0.80, 0.50)}),
        Row("2", 16, {"accuracy": (0.90, 0.90, 0.90)}),
    )
    scan = Sensitivity("channels", (0.2, 0.4, 0.6), {"accuracy": 0.9}, {"accuracy": "higher"}, rows)
    bearable = scan.thresholds(drop=0.05)
    assert bearable == pytest.approx({"0": 0.3, "2": 0.6})
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    record = prune(net, torch.zeros(1, 4), pruning_ratio=9 / 32, allocation=InProportion(bearable))
    assert [record.channels[name].after for name in ("0", "2")] == [13, 10]


def test_neither_asks_scores() -> None:
    assert not ShallowToDeep.asks_scores
    assert not InProportion.asks_scores


@pytest.mark.parametrize("factor", [0, -1.5, float("nan"), float("inf")])
def test_a_factor_that_is_none(factor: float) -> None:
    with pytest.raises(ValueError, match=r"`factor` is how much more the last group keeps .* above 0; got"):
        ShallowToDeep(factor)


@pytest.mark.parametrize("bearable", [{}, {"*": 0.0}, {"a": 1.5}, {"a": 0.5, "b": -0.1}, {"a": float("nan")}])
def test_fractions_that_are_none(bearable: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"`bearable` maps patterns of group names to fractions in \[0, 1\]"):
        InProportion(bearable)


@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_caps_that_are_none(cap: float) -> None:
    for rule in (ShallowToDeep, lambda **caps: InProportion({"*": 1.0}, **caps)):
        with pytest.raises(ValueError, match="`event_cap`"):
            rule(event_cap=cap)


def test_they_say_how_they_were_made() -> None:
    assert repr(ShallowToDeep()) == "ShallowToDeep(1.5)"
    assert repr(ShallowToDeep(2.0, cap=0.5)) == "ShallowToDeep(2.0, cap=0.5)"
    assert repr(InProportion({"a": 0.5}, event_cap=0.25)) == "InProportion({'a': 0.5}, event_cap=0.25)"

"""Labels: hand-computed ties, a naive union-find as reference, reasons."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.flow import Flow
from lightning_prune.labels import LabelArray, LabelSpace


def labels(*values: int) -> LabelArray:
    return np.array(values, dtype=np.int64)


class TestUnionFind:
    def test_nothing_is_tied_at_first(self) -> None:
        assert LabelSpace(3).roots().tolist() == [0, 1, 2]
        assert LabelSpace().roots().tolist() == []

    def test_the_smallest_label_is_the_root(self) -> None:
        space = LabelSpace(6)
        space.tie(labels(5, 4), labels(4, 2))
        space.tie(labels(3), labels(0))
        assert space.roots().tolist() == [0, 1, 2, 0, 2, 2]

    def test_ties_join_what_was_resolved_before(self) -> None:
        space = LabelSpace(6)
        space.tie(labels(1, 3), labels(2, 4))
        assert space.roots().tolist() == [0, 1, 1, 3, 3, 5]
        space.tie(labels(4), labels(2))
        assert space.roots().tolist() == [0, 1, 1, 1, 1, 5]

    def test_what_is_tied_or_made_later_changes_later_answers_only(self) -> None:
        space = LabelSpace(6)
        space.tie(labels(1, 3), labels(2, 4))
        first, again = space.roots(), space.roots()
        space.tie(labels(4), labels(2))
        second = space.roots()
        space.fresh(2)
        third = space.roots()
        assert first.tolist() == again.tolist() == [0, 1, 1, 3, 3, 5]
        assert second.tolist() == [0, 1, 1, 1, 1, 5]
        assert third.tolist() == [0, 1, 1, 1, 1, 5, 6, 7]
        assert space.roots_of(labels(4, 7)).tolist() == [1, 7]

    def test_a_long_chain_in_the_worst_order(self) -> None:
        space = LabelSpace(1000)
        space.tie(np.arange(999, 0, -1), np.arange(998, -1, -1))
        assert not space.roots().any()

    def test_arrays_broadcast(self) -> None:
        space = LabelSpace(6)
        space.tie(np.arange(6).reshape(2, 3), np.arange(3))
        assert space.roots().tolist() == [0, 1, 2, 0, 1, 2]
        space.tie(np.arange(3)[:, None], labels(0))
        assert not space.roots().any()

    def test_fresh_labels_are_new(self) -> None:
        space = LabelSpace(2)
        assert space.fresh(3).tolist() == [2, 3, 4]
        space.tie(labels(4), labels(0))
        assert space.fresh(1).tolist() == [5]
        assert space.fresh(0).tolist() == []
        assert space.roots().tolist() == [0, 1, 2, 3, 0, 5]

    @given(st.integers(1, 30).flatmap(lambda size: st.tuples(st.just(size), _ties(size))), st.integers(1, 4))
    def test_equals_a_naive_union_find(self, case: tuple[int, list[tuple[int, int]]], rounds: int) -> None:
        size, ties = case
        space, naive = LabelSpace(size), list(range(size))
        for part in range(rounds):
            for left, right in ties[part::rounds]:
                space.tie(labels(left), labels(right))
                low, high = sorted((naive[left], naive[right]))
                naive = [low if root == high else root for root in naive]
            assert space.roots().tolist() == naive

    @given(st.integers(1, 30).flatmap(lambda size: st.tuples(st.just(size), _ties(size))))
    def test_one_call_or_many_make_no_difference(self, case: tuple[int, list[tuple[int, int]]]) -> None:
        size, ties = case
        space = LabelSpace(size)
        space.tie(labels(*(left for left, _ in ties)), labels(*(right for _, right in ties)))
        single = LabelSpace(size)
        for left, right in reversed(ties):
            single.tie(labels(right), labels(left))
        assert space.roots().tolist() == single.roots().tolist()


def _ties(size: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    label = st.integers(0, size - 1)
    return st.lists(st.tuples(label, label), max_size=40)


class TestReasons:
    @staticmethod
    def of(space: LabelSpace) -> list[str | None]:
        first, texts = space.reasons()
        return [None if index < 0 else texts[index] for index in first]

    def test_free_labels_have_none(self) -> None:
        assert self.of(LabelSpace(2)) == [None, None]

    def test_the_first_reason_wins(self) -> None:
        space = LabelSpace(3)
        space.freeze(labels(0), "first")
        space.freeze(labels(0, 2), "second")
        space.freeze(labels(2), "first")
        assert self.of(space) == ["first", None, "first"]

    def test_reasons_spread_over_ties_made_before_and_after(self) -> None:
        space = LabelSpace(5)
        space.tie(labels(4), labels(2))
        space.freeze(labels(4), "second in time")
        space.freeze(labels(1), "third in time")
        assert self.of(space) == [None, "third in time", "second in time", None, "second in time"]
        space.tie(labels(1), labels(2))
        assert self.of(space) == [None, "second in time", "second in time", None, "second in time"]

    def test_fresh_labels_can_freeze(self) -> None:
        space = LabelSpace(1)
        space.freeze(space.fresh(2), "fixed")
        assert self.of(space) == [None, "fixed", "fixed"]

    @given(
        st.integers(1, 20).flatmap(
            lambda size: st.tuples(st.just(size), _ties(size), st.lists(st.integers(0, size - 1)))
        )
    )
    def test_the_earliest_reason_of_all_tied_labels(self, case: tuple[int, list[tuple[int, int]], list[int]]) -> None:
        size, ties, frozen = case
        space = LabelSpace(size)
        for left, right in ties:
            space.tie(labels(left), labels(right))
        for time, label in enumerate(frozen):
            space.freeze(labels(label), f"at {time}")
        roots = space.roots()
        expected = [
            next((f"at {time}" for time, label in enumerate(frozen) if roots[label] == roots[mine]), None)
            for mine in range(size)
        ]
        assert self.of(space) == expected


class TestFlow:
    def test_a_dimension_of_size_one_carries_labels_too(self) -> None:
        flow, tensor = Flow(LabelSpace(4)), torch.zeros(2, 1)
        assert Flow.of(tensor) == (None, None)
        assert not Flow.is_labelled(tensor)
        flow.put(tensor, [labels(0, 1), labels(2)])
        first, second = Flow.of(tensor)
        assert first is not None
        assert second is not None
        assert (first.tolist(), second.tolist()) == ([0, 1], [2])
        assert Flow.is_labelled(tensor)

    def test_a_dimension_that_meets_none_freezes(self) -> None:
        flow = Flow(LabelSpace(4))
        flow.tie(labels(0, 1), None, "op")
        flow.tie(None, labels(2), "another")
        flow.tie(None, None, "nothing")
        text = "meets a dimension that holds no channels in"
        assert TestReasons.of(flow.space) == [f"{text} op", f"{text} op", f"{text} another", None]

    def test_fixed_labels_are_frozen_from_the_start(self) -> None:
        flow = Flow(LabelSpace(1))
        assert flow.fixed(2, "padding").tolist() == [1, 2]
        assert TestReasons.of(flow.space) == [None, "padding", "padding"]

    def test_a_tensor_freezes_in_all_dimensions(self) -> None:
        flow, tensor = Flow(LabelSpace(5)), torch.zeros(2, 2)
        flow.put(tensor, [labels(0, 1), labels(2, 3)])
        flow.freeze_tensor(tensor, "output")
        assert TestReasons.of(flow.space) == ["output"] * 4 + [None]

    def test_channel_numbers_freeze_when_they_are_read(self) -> None:
        flow, index = Flow(LabelSpace(2)), torch.zeros(1)
        flow.taint(index, labels(0), "addressed")
        assert TestReasons.of(flow.space) == [None, None]
        flow.read_taint(index)
        assert TestReasons.of(flow.space) == ["addressed", None]

    def test_makers_are_noted_in_order(self) -> None:
        flow = Flow(LabelSpace(3))
        for made in (labels(2), None, labels(0, 1)):
            flow.make(made)
        assert [made.tolist() for made in flow.made] == [[2], [0, 1]]

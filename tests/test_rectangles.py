"""Which factor of a dimension is cut, on rectangles made by hand: split and merged, of attentions and of others."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from lightning_prune.labels import LabelArray, LabelSpace
from lightning_prune.rectangles import Rectangle, check_heads, settle
from lightning_prune.types import HEADS, Heads

INSIDE = "lies inside attention heads, which are cut whole"
COUNTS = "counts attention heads, which are cut inside"
KEPT = "belongs to attention heads, which are kept"
SPLIT = "is split off from another dimension that is cut, in here"
MERGED = "is merged with another dimension that is cut, in here"


@dataclass
class Scene:
    """A model's dimension or more, and what views have done to them.

    Attributes:
        count: The labels of the model's tensors.
    """

    count: int
    rectangles: list[Rectangle] = field(default_factory=list)
    attended: list[LabelArray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.space = LabelSpace(self.count)

    def split(self, labels: LabelArray, *sizes: int) -> tuple[LabelArray, ...]:
        """Split a dimension into factors, and return their labels."""
        axes = tuple(self.space.fresh(size) for size in sizes)
        self.rectangles.append(Rectangle(labels.reshape(sizes), axes, merged=False, where="here"))
        return axes

    def merge(self, *axes: LabelArray) -> LabelArray:
        """Merge dimensions, and return the labels of the result."""
        sizes = tuple(map(len, axes))
        box = self.space.fresh(int(np.prod(sizes))).reshape(sizes)
        self.rectangles.append(Rectangle(box, axes, merged=True, where="here"))
        return box.reshape(-1)

    def settle(self, heads: Heads = "whole") -> None:
        settle(self.space, self.rectangles, self.attended, self.count, heads)

    def channels(self, labels: LabelArray) -> list[list[int]]:
        """List the positions that go together."""
        roots = self.space.roots()[labels]
        return sorted(np.flatnonzero(roots == root).tolist() for root in np.unique(roots))

    def reason(self, labels: LabelArray) -> str | None:
        """Return why all of these are frozen, or None if none is."""
        which, texts = self.space.reasons()
        (one,) = set(which[labels].tolist())
        return None if one < 0 else texts[one]

    def together(self, left: LabelArray, right: LabelArray) -> bool:
        """Tell whether two dimensions go together, position by position."""
        return bool((self.space.roots()[left] == self.space.roots()[right]).all())


def rows(outer: int, inner: int) -> list[list[int]]:
    return [[row * inner + column for column in range(inner)] for row in range(outer)]


def columns(outer: int, inner: int) -> list[list[int]]:
    return [[row * inner + column for row in range(outer)] for column in range(inner)]


WHOLE = np.arange(12)


class TestSplit:
    """A dimension of 12 that is seen as 3 x 4."""

    def test_elsewhere_the_innermost_factor_is_cut(self) -> None:
        scene = Scene(12)
        outer, inner = scene.split(WHOLE, 3, 4)
        scene.settle()
        assert scene.channels(WHOLE) == columns(3, 4)
        assert (scene.reason(outer), scene.reason(inner), scene.reason(WHOLE)) == (SPLIT, None, None)
        assert scene.together(WHOLE[:4], inner)

    def test_of_three_factors_the_innermost_is_cut(self) -> None:
        scene = Scene(12)
        axes = scene.split(WHOLE, 3, 2, 2)
        scene.settle()
        assert scene.channels(WHOLE) == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
        assert [scene.reason(axis) for axis in axes] == [SPLIT, SPLIT, None]

    def test_a_frozen_factor_leaves_the_cut_to_the_other(self) -> None:
        scene = Scene(12)
        outer, inner = scene.split(WHOLE, 3, 4)
        scene.space.freeze(inner, "as planned")
        scene.settle()
        assert scene.channels(WHOLE) == rows(3, 4)
        assert (scene.reason(outer), scene.reason(inner)) == (None, "as planned")

    def test_with_all_factors_frozen_nothing_is_cut(self) -> None:
        scene = Scene(12)
        for axis in scene.split(WHOLE, 3, 4):
            scene.space.freeze(axis, "as planned")
        scene.settle()
        assert scene.reason(WHOLE) == "as planned"

    @pytest.mark.parametrize(
        ("heads", "channels", "reasons"),
        [
            ("whole", rows(3, 4), (None, INSIDE)),
            ("inside", columns(3, 4), (COUNTS, None)),
            ("keep", [[position] for position in range(12)], (KEPT, KEPT)),
        ],
    )
    def test_heads(self, heads: Heads, channels: list[list[int]], reasons: tuple[str | None, ...]) -> None:
        scene = Scene(12)
        outer, inner = scene.split(WHOLE, 3, 4)
        scene.attended.append(outer)
        scene.settle(heads)
        assert scene.channels(WHOLE) == channels
        assert (scene.reason(outer), scene.reason(inner)) == reasons
        assert scene.reason(WHOLE) == (KEPT if heads == "keep" else None)

    def test_heads_are_the_innermost_factor_too(self) -> None:
        scene = Scene(12)
        outer, inner = scene.split(WHOLE, 4, 3)
        scene.attended.append(inner)
        scene.settle()
        assert scene.channels(WHOLE) == columns(4, 3)
        assert (scene.reason(outer), scene.reason(inner)) == (INSIDE, None)

    def test_queries_keys_and_values_in_one_dimension(self) -> None:
        scene = Scene(24)
        kinds, heads, width = scene.split(np.arange(24), 3, 4, 2)
        scene.attended.append(heads)
        scene.settle()
        assert scene.channels(np.arange(24)) == [
            [2 * head + at + i for at in (0, 8, 16) for i in (0, 1)] for head in range(4)
        ]
        assert [scene.reason(axis) for axis in (kinds, heads, width)] == [INSIDE, None, INSIDE]

    @pytest.mark.parametrize("only", ["outer", "inner"])
    def test_attention_over_a_dimension_that_is_all_heads(self, only: str) -> None:
        scene = Scene(12)
        outer, inner = scene.split(WHOLE, 3, 4)
        scene.attended += [outer, inner]
        scene.space.freeze(inner if only == "outer" else outer, "as planned")
        scene.settle()
        assert scene.channels(WHOLE) == (rows(3, 4) if only == "outer" else columns(3, 4))


class TestGroupedQueries:
    """Eight heads of queries share two heads of keys."""

    def scene(self) -> tuple[Scene, dict[str, LabelArray]]:
        scene = Scene(24)
        queries, keys = np.arange(16), np.arange(16, 20)
        heads, width = scene.split(queries, 8, 2)
        key_heads, key_width = scene.split(keys, 2, 2)
        copies = scene.space.fresh(4)
        scene.space.tie(heads, scene.merge(key_heads, copies))
        scene.space.tie(width, key_width)
        scene.attended.append(heads)
        parts = {"queries": queries, "keys": keys, "heads": heads, "key heads": key_heads, "copies": copies}
        return scene, parts

    def test_a_head_of_keys_goes_with_all_its_queries(self) -> None:
        scene, parts = self.scene()
        scene.settle("whole")
        assert scene.channels(parts["queries"]) == rows(2, 8)
        assert scene.channels(parts["keys"]) == rows(2, 2)
        assert scene.together(parts["queries"][::8], parts["keys"][::2])
        assert scene.reason(parts["copies"]) is not None

    def test_the_same_part_goes_of_all_heads(self) -> None:
        scene, parts = self.scene()
        scene.settle("inside")
        assert scene.channels(parts["queries"]) == columns(8, 2)
        assert scene.channels(parts["keys"]) == columns(2, 2)
        assert scene.reason(parts["heads"]) == COUNTS

    def test_nothing_goes(self) -> None:
        scene, parts = self.scene()
        scene.settle("keep")
        assert scene.reason(parts["queries"]) == scene.reason(parts["keys"]) == KEPT


class TestMerge:
    """Two dimensions that a view makes one."""

    @pytest.mark.parametrize(("sizes", "cut"), [((3, 4), 1), ((5, 2), 0), ((3, 3), 0)])
    def test_the_larger_is_cut_and_the_other_frozen(self, sizes: tuple[int, int], cut: int) -> None:
        scene = Scene(sum(sizes))
        axes = (np.arange(sizes[0]), np.arange(sizes[0], sum(sizes)))
        box = scene.merge(*axes)
        scene.settle()
        assert [scene.reason(axis) for axis in axes] == [MERGED if place != cut else None for place in (0, 1)]
        assert scene.channels(box) == (rows(*sizes) if cut == 0 else columns(*sizes))
        assert scene.together(box.reshape(sizes).take(0, 1 - cut), axes[cut])

    def test_what_belongs_to_the_model_goes_before_anonymous_copies(self) -> None:
        scene = Scene(3)
        copies = scene.space.fresh(10)
        box = scene.merge(np.arange(3), copies)
        scene.settle()
        assert scene.channels(box) == rows(3, 10)
        assert (scene.reason(np.arange(3)), scene.reason(copies)) == (None, MERGED)

    def test_what_is_frozen_leaves_the_cut_to_the_other(self) -> None:
        scene = Scene(7)
        scene.space.freeze(np.arange(3, 7), "as planned")
        box = scene.merge(np.arange(3), np.arange(3, 7))
        scene.settle()
        assert scene.channels(box) == rows(3, 4)
        assert (scene.reason(np.arange(3)), scene.reason(np.arange(3, 7))) == (None, "as planned")

    def test_a_factor_of_the_model_belongs_to_the_model(self) -> None:
        scene = Scene(12)
        _, inner = scene.split(WHOLE, 3, 4)
        copies = scene.space.fresh(9)
        scene.merge(inner, copies)
        scene.settle()
        assert (scene.reason(inner), scene.reason(copies)) == (None, MERGED)

    @pytest.mark.parametrize(("heads", "reason"), [("whole", None), ("inside", None), ("keep", KEPT)])
    def test_a_merge_that_attention_treats_one_by_one(self, heads: Heads, reason: str | None) -> None:
        scene = Scene(8)
        box = scene.merge(np.arange(3), np.arange(3, 8))
        scene.attended.append(box)
        scene.settle(heads)
        assert scene.reason(box) == reason

    def test_heads_and_width_that_are_merged_again(self) -> None:
        scene = Scene(24)
        heads, width = scene.split(WHOLE, 3, 4)
        scene.attended.append(heads)
        merged = scene.merge(heads, width)
        scene.space.tie(merged, np.arange(12, 24))
        scene.settle()
        assert scene.channels(np.arange(12, 24)) == rows(3, 4)
        assert scene.together(WHOLE, np.arange(12, 24))


def test_attention_decides_before_the_innermost_factor_does() -> None:
    scene = Scene(12)
    outer, inner = scene.split(WHOLE, 2, 6)
    heads, width = scene.split(WHOLE, 6, 2)
    scene.attended.append(heads)
    scene.settle()
    assert scene.channels(WHOLE)[0][:2] == [0, 1]
    assert scene.reason(width) == INSIDE
    assert scene.reason(heads) is None
    assert scene.reason(outer) == SPLIT
    assert scene.together(inner[::2], inner[1::2])


def test_nothing_to_settle() -> None:
    scene = Scene(3)
    scene.settle()
    assert scene.channels(np.arange(3)) == [[0], [1], [2]]
    assert scene.reason(np.arange(3)) is None


@pytest.mark.parametrize("heads", ["all", "Whole", "", None, True, 4, ["whole"]], ids=repr)
def test_heads_are_one_of_three(heads: str) -> None:
    with pytest.raises(ValueError, match=r"^`heads` says how .* one of 'whole', 'inside', 'keep'; got .*\.$"):
        check_heads(heads)


def test_known_heads_are_fine() -> None:
    assert [check_heads(heads) for heads in HEADS] == [None, None, None]

"""Attributes that hold sizes: which new values are tried, in which order, and how they are set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune.cut import Cut
from lightning_prune.mending import Misfit, mendings, modules_of
from lightning_prune.sizes import stale_sizes
from lightning_prune.tensors import set_attributes
from lightning_prune.types import Attributes

HALF = ((8,), (4,))
"""One dimension of 8, of which 4 are left."""


class Part(nn.Module):
    """Holds what it is given."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


class Other(Part):
    """The same, but another class."""


def model_of(**parts: nn.Module) -> nn.Module:
    model = Part()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


def cut_of(**left: int) -> Cut:
    """A cut that leaves some of the 8 rows of a tensor in each of the named modules."""
    return Cut({f"{name}.w": (8, 3) for name in left}, {f"{name}.w": {0: torch.arange(n)} for name, n in left.items()})


def tried(
    model: nn.Module,
    *modules: str,
    sizes: list[Any] | None = None,
    attributes: Attributes | None = None,
    cut: Cut | None = None,
) -> list[Attributes]:
    """List what is tried when these modules were at work, the innermost first."""
    at_work = {name: model.get_submodule(name) for name in modules}
    misfit = Misfit((0, 3), [], "as planned", at_work, [HALF] if sizes is None else sizes, [])
    return list(mendings(model, cut or Cut(), attributes or {}, misfit))


class TestValues:
    @pytest.mark.parametrize(
        ("value", "new"),
        [
            (8, [4]),
            (7, []),
            (4, [2]),
            (2, [1]),
            (3, []),
            (1, []),
            (16, []),
            ((8, 3), [(4, 3)]),
            ([3, 8], [(3, 4)]),
            ((8, 8), [(4, 4)]),
            ((2, 2), []),
            ((), []),
            ((8, 0.5), []),
            (8.0, []),
            ("8", []),
            (True, []),
            ({"n": 8}, []),
            (None, []),
        ],
        ids=repr,
    )
    def test_a_size_that_is_no_longer_so(self, value: object, new: list[object]) -> None:
        assert tried(model_of(a=Part(n=value)), "a") == [{"a": {"n": one}} for one in new]

    @pytest.mark.parametrize(
        ("value", "sizes", "new"),
        [
            ([6, 10], [((6, 10), (3, 5))], [(3, 5), (3, 10), (6, 5)]),
            ((8, 8), [((8, 8), (2, 6))], [(2, 6), (2, 2), (6, 6)]),
            (8, [((8, 8), (2, 6))], [2, 6]),
            (8, [((12,), (6,)), ((8,), (4,)), ((8,), (5,))], [4, 5]),
            (3, [((12,), (8,))], [2]),
            (3, [((12,), (7,))], []),
            (6, [((12,), (10,))], [5]),
            (12, [((12, 12), (12, 12))], []),
        ],
    )
    def test_sizes_of_several_outputs(self, value: object, sizes: list[Any], new: list[object]) -> None:
        assert tried(model_of(a=Part(n=value)), "a", sizes=sizes) == [{"a": {"n": one}} for one in new]

    def test_what_is_private_is_left_alone(self) -> None:
        model = model_of(a=Part(_n=8, _sizes=(8, 8), n_=8))
        assert tried(model, "a") == [{"a": {"n_": 4}}]

    def test_without_a_size_that_changes_nothing_is_tried(self) -> None:
        assert tried(model_of(a=Part(n=8)), "a", sizes=[]) == []


class TestOrder:
    def test_exact_sizes_come_before_those_in_proportion(self) -> None:
        model = model_of(a=Part(count=2), b=Part(width=8))
        assert tried(model, "a", "b") == [{"b": {"width": 4}}, {"a": {"count": 1}}]

    def test_the_innermost_module_comes_first(self) -> None:
        model = model_of(outer=model_of(inner=Other(n=8)))
        model.outer.n = 8
        assert tried(model, "outer.inner", "outer") == [{"outer.inner": {"n": 4}}, {"outer": {"n": 4}}]
        assert tried(model, "outer", "outer.inner") == [{"outer": {"n": 4}}, {"outer.inner": {"n": 4}}]

    def test_modules_of_the_same_class_that_are_cut_alike_are_changed_together_then_alone(self) -> None:
        model = model_of(a=Part(n=8), b=Part(n=8), c=Other(n=8), d=Part(n=6), e=Part(n=8), f=Part(n=8), g=Part(n=8))
        cut = cut_of(a=4, b=4, c=4, d=4, e=4, f=5)
        together = {name: {"n": 4} for name in "abe"}
        assert tried(model, "b", cut=cut) == [together, {"b": {"n": 4}}]

    def test_without_a_cut_inside_a_module_is_changed_alone(self) -> None:
        assert tried(model_of(a=Part(n=8), b=Part(n=8)), "b", cut=cut_of(a=4)) == [{"b": {"n": 4}}]

    def test_one_that_is_set_already_is_left_as_it_is(self) -> None:
        model = model_of(a=Part(n=8), b=Part(n=8), c=Part(n=8))
        found = tried(model, "b", attributes={"a": {"n": 5}}, cut=cut_of(a=4, b=4, c=4))
        assert found == [{"a": {"n": 5}, "c": {"n": 4}, "b": {"n": 4}}, {"a": {"n": 5}, "b": {"n": 4}}]

    def test_several_attributes_are_changed_one_by_one_then_all_together(self) -> None:
        model = model_of(a=Part(n=8, parts=[8, 1], m=8))
        assert tried(model, "a") == [
            {"a": {"n": 4}},
            {"a": {"parts": (4, 1)}},
            {"a": {"m": 4}},
            {"a": {"n": 4, "parts": (4, 1), "m": 4}},
        ]

    def test_all_together_takes_the_likeliest_value_of_each(self) -> None:
        model = model_of(a=Part(n=8, m=8))
        assert tried(model, "a", sizes=[((8, 8), (2, 6))])[-1] == {"a": {"n": 2, "m": 2}}

    def test_at_last_what_was_set_is_undone(self) -> None:
        model = model_of(a=Part(n=8, m=3), b=Part(k=9))
        attributes = {"a": {"n": 4, "m": 2}, "b": {"k": 1}}
        assert tried(model, "a", "b", attributes=attributes) == [
            {"b": {"k": 1}, "a": {"m": 2}},
            {"b": {"k": 1}, "a": {"n": 4}},
            {"a": {"n": 4, "m": 2}},
        ]

    def test_modules_that_were_not_at_work_are_not_undone(self) -> None:
        model = model_of(a=Part(n=7), b=Part(k=9))
        assert tried(model, "a", attributes={"b": {"k": 1}}) == []

    def test_what_is_set_to_the_new_value_is_not_tried_again(self) -> None:
        model = model_of(a=Part(n=8, m=8))
        assert tried(model, "a", attributes={"a": {"n": 4}}) == [{"a": {"n": 4, "m": 4}}, {}]

    def test_nothing_that_is_given_is_changed(self) -> None:
        attributes = {"a": {"n": 4}}
        tried(model_of(a=Part(n=8, m=8)), "a", attributes=attributes)
        assert attributes == {"a": {"n": 4}}


class TestSetting:
    @pytest.mark.parametrize(
        ("old", "new", "expected"),
        [([8, 8], (4, 4), [4, 4]), ((8, 8), (4, 4), (4, 4)), (8, 4, 4), ([], (4,), [4])],
        ids=repr,
    )
    def test_a_list_stays_a_list_and_a_tuple_a_tuple(self, old: object, new: Any, expected: object) -> None:
        part = Part(n=old)
        set_attributes(part, {"n": new})
        assert part.n == expected
        assert type(part.n) is type(old)

    def test_the_old_list_is_not_written_to(self) -> None:
        old = [8, 8]
        part = Part(n=old)
        set_attributes(part, {"n": (4, 4)})
        assert old == [8, 8]


def test_sizes_of_torch_s_own_layers_need_no_guess() -> None:
    layer = nn.Linear(3, 8)
    layer.weight = nn.Parameter(layer.weight.data[:4])
    assert stale_sizes(nn.Sequential(layer)) == {"0": {"out_features": 4}}


def test_the_modules_at_work_are_those_on_the_stack() -> None:
    class Failing(nn.Module):
        def forward(self) -> None:
            raise RuntimeError("as planned")

    class Calling(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.idle = inner, nn.Identity()

        def forward(self) -> None:
            foreign = nn.Identity()
            self.inner()
            foreign(None)

    model = Calling(Calling(Failing()))
    with pytest.raises(RuntimeError) as caught:
        model()
    found = modules_of(model, caught.value)
    assert list(found) == ["inner.inner", "inner", ""]
    assert all(found[name] is model.get_submodule(name) for name in found)

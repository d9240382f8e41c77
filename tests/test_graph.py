"""What a reading of a model gives, in whatever form the model, its inputs and its outputs come."""

from __future__ import annotations

import random
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from proof import Net, fits, prove, same_state, snapshot, summary
from torch import Tensor, nn

from lightning_prune import ChannelGroup, Member, find_groups
from lightning_prune.errors import PruningError, TraceError

OUT = "reaches the model's output"
X = torch.randn(2, 4)
FREE = {"a": 8, "b": OUT}


def mlp() -> Net:
    return Net(lambda n, x: n.b(n.a(x).relu()), a=nn.Linear(4, 8), b=nn.Linear(8, 3))


def images() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 5, 3))


class TestGroups:
    def test_members_name_all_places(self) -> None:
        first, last = find_groups(images(), torch.zeros(1, 3, 8, 8))
        assert (first.name, first.size, first.frozen) == ("0", 8, None)
        assert {(member.tensor, member.dim) for member in first.members} == {
            *(("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0)),
            *(("1.running_mean", 0), ("1.running_var", 0), ("4.weight", 1)),
        }
        assert (last.name, last.size, last.frozen) == ("4", 5, OUT)
        for member in first.members:
            assert member.positions.dtype == torch.int64
            assert member.positions.tolist() == [[channel] for channel in range(8)]

    def test_several_positions_a_channel(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(36, 2))
        member = find_groups(net, torch.zeros(1, 3, 3, 3))[0].members[-1]
        assert (member.tensor, member.dim, tuple(member.positions.shape)) == ("2.weight", 1, (4, 9))
        assert member.positions[2].tolist() == list(range(18, 27))

    def test_printing(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Flatten(), nn.Linear(36, 2, bias=False))
        first, last = find_groups(net, torch.zeros(1, 3, 3, 3))
        assert str(first) == "0: 4 channels, prunable\n  0.weight [dim 0]\n  2.weight [dim 1, 9 positions a channel]"
        assert str(last) == f"2: 2 channels, frozen: {OUT}\n  2.weight [dim 0]"

    def test_comparing(self) -> None:
        assert find_groups(mlp(), X) == find_groups(mlp(), X)
        assert find_groups(mlp(), X) != find_groups(images(), torch.zeros(1, 3, 8, 8))
        member = Member("w", 0, torch.tensor([[0], [1]]))
        assert member != Member("w", 0, torch.tensor([[1], [0]]))
        assert member != "w"
        assert hash(member) == hash(Member("w", 0, torch.tensor([[0], [1]])))
        assert ChannelGroup("g", 2, (member,)) == ChannelGroup("g", 2, (member,))

    def test_order_and_names_follow_the_making(self) -> None:
        net = Net(
            lambda n, x: n.z(n.m(n.b(x)) + n.a(x)),
            a=nn.Linear(4, 6),
            z=nn.Linear(6, 3),
            m=nn.Linear(5, 6),
            b=nn.Linear(4, 5),
        )
        assert summary(find_groups(net, X)) == {"b": 5, "m": 6, "z": OUT}

    def test_every_group_has_a_name(self) -> None:
        class Raw(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w, self.v = nn.Parameter(torch.rand(8, 4)), nn.Parameter(torch.rand(3, 8))

            def forward(self, x: Tensor) -> Tensor:
                return (x @ self.w.T).relu() @ self.v.T

        groups = find_groups(Raw(), X)
        assert [group.size for group in groups] == [8, 3]
        assert all(group.name for group in groups), "a parameter of the root module gives its own name"

    def test_unused_parameters_are_no_group(self) -> None:
        net = mlp()
        net.add_module("idle", nn.Linear(4, 8))
        assert summary(find_groups(net, X)) == FREE

    def test_parts_that_are_not_trained_are_read_too(self) -> None:
        net = mlp()
        net.a.requires_grad_(False)
        assert summary(find_groups(net, X)) == FREE

    def test_shared_tensors_have_one_name(self) -> None:
        net = Net(lambda n, x: n.c(n.b(n.a(x)).relu()), a=nn.Linear(4, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8))
        net.c.weight = net.b.weight
        groups = find_groups(net, X)
        assert summary(groups) == {"a": OUT}
        assert {member.tensor for member in groups[0].members} == {"a.weight", "a.bias", "b.weight", "b.bias", "c.bias"}

    def test_a_model_without_parameters(self) -> None:
        assert find_groups(nn.ReLU(), X) == ()


class TestIgnore:
    @pytest.mark.parametrize("pattern", ["a", "?", "[ab]"])
    def test_a_pattern_freezes(self, pattern: str) -> None:
        assert summary(find_groups(mlp(), X, ignore=[pattern]))["a"] == f"is ignored by the pattern {pattern!r}"

    @pytest.mark.parametrize("pattern", ["block", "bl*", "block.in*", "block.inner.0"])
    def test_a_pattern_covers_all_that_is_inside(self, pattern: str) -> None:
        block = nn.Sequential()
        block.add_module("inner", nn.Sequential(nn.Linear(4, 6)))
        net = nn.Sequential()
        net.add_module("block", block)
        net.add_module("mid", nn.Linear(6, 7))
        net.add_module("head", nn.Linear(7, 2))
        found = summary(find_groups(net, X, ignore=(pattern,)))
        assert fits(found, {"block.inner.0": "is ignored by the pattern", "mid": 7, "head": OUT})

    def test_a_consumer_that_is_ignored_keeps_its_channels(self) -> None:
        found = summary(find_groups(mlp(), X, ignore=["b"]))
        assert found["a"] == "is ignored by the pattern 'b'"

    def test_a_pattern_without_a_match_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"`ignore` pattern 'layer9' matches no module.*for example a, b"):
            find_groups(mlp(), X, ignore=["a", "layer9"])

    def test_a_string_is_an_error(self) -> None:
        with pytest.raises(TypeError, match="got the string 'a': put it in a list"):
            find_groups(mlp(), X, ignore="a")


class TestInputs:
    @pytest.mark.parametrize(
        "example", [X, (X,), [X], [X, torch.zeros(2)], (X, torch.zeros(2))], ids=lambda e: type(e).__name__
    )
    def test_one_input(self, example: object) -> None:
        assert summary(find_groups(nn.Sequential(mlp()), example)) == {"0.a": 8, "0.b": OUT}

    @pytest.mark.parametrize("keys", [("x", "y"), ("x", "y", "label"), ("label", "y", "x")])
    def test_keywords(self, keys: tuple[str, ...]) -> None:
        assert summary(find_groups(Two(), dict.fromkeys(keys, X))) == FREE

    @pytest.mark.parametrize("example", [(X, X), [X, X], [X, X, X]])
    def test_two_inputs(self, example: object) -> None:
        assert summary(find_groups(Two(), example)) == FREE

    def test_an_optional_input_is_not_fed_with_labels(self) -> None:
        assert summary(find_groups(Two(), [X, X, torch.zeros(7)])) == FREE

    def test_a_mapping_as_a_whole(self) -> None:
        class Whole(Two):
            def forward(self, batch: dict[str, Tensor]) -> Tensor:
                return super().forward(**batch)

        assert summary(find_groups(Whole(), {"x": X, "y": X})) == FREE

    def test_any_keywords(self) -> None:
        class Any(Two):
            def forward(self, **batch: Tensor) -> Tensor:
                return super().forward(batch["x"], batch["y"])

        assert summary(find_groups(Any(), {"x": X, "y": X, "z": X})) == FREE

    def test_a_named_tuple_as_a_whole(self) -> None:
        pair = namedtuple("Pair", "x y")

        class Whole(Two):
            def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
                return super().forward(batch[0], batch[1])

        assert summary(find_groups(Whole(), pair(X, X))) == FREE

    @pytest.mark.parametrize("batch", [1, 2, 5])
    def test_any_batch_size(self, batch: int) -> None:
        assert summary(find_groups(images(), torch.zeros(batch, 3, 8, 8))) == {"0": 8, "4": OUT}

    def test_none_is_an_error(self) -> None:
        with pytest.raises(TypeError, match=r"`example_inputs` is what the model's forward is called with: .*got None"):
            find_groups(mlp(), None)

    @pytest.mark.parametrize("example", [{}, [], "x", 3], ids=str)
    def test_inputs_without_a_tensor_are_an_error(self, example: object) -> None:
        with pytest.raises(TypeError, match="`example_inputs`"):
            find_groups(mlp(), example)


class Two(nn.Module):
    """Two inputs and an option."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return self.b(self.a(x + y)) * scale


@dataclass
class Result:
    logits: Tensor
    hidden: list[Tensor]


class TestOutputs:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda y: {"y": {"z": y}},
            lambda y: [1, (y, None)],
            lambda y: Result(y, []),
            lambda y: namedtuple("N", "y")(y),
        ],
    )
    def test_any_container(self, wrap: object) -> None:
        assert summary(find_groups(Net(lambda n, x: wrap(n.m(x)), m=mlp()), X)) == {"m.a": 8, "m.b": OUT}

    def test_what_is_returned_beside_is_frozen_too(self) -> None:
        class Beside(Two):
            def forward(self, x: Tensor) -> Result:
                hidden = self.a(x)
                return Result(self.b(hidden), [hidden.relu()])

        assert summary(find_groups(Beside(), X)) == {"a": OUT, "b": OUT}

    @pytest.mark.parametrize("result", [None, 3, [], "text"])
    def test_no_tensor_is_an_error(self, result: object) -> None:
        with pytest.raises(TraceError, match="returned no tensor") as caught:
            find_groups(Net(lambda n, x: (n.m(x), result)[1], m=mlp()), X)
        assert isinstance(caught.value, PruningError)

    def test_a_forward_that_fails_is_an_error(self) -> None:
        with pytest.raises(TraceError, match=r"forward of Net fails on `example_inputs`: RuntimeError.*Pass inputs"):
            find_groups(mlp(), torch.zeros(2, 5))


def test_the_groups_do_not_depend_on_the_grad_mode() -> None:
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            assert summary(find_groups(mlp(), X)) == FREE
            assert summary(find_groups(images(), torch.zeros(1, 3, 8, 8))) == {"0": 8, "4": OUT}


def test_branches_that_depend_on_values_are_read_on_real_tensors() -> None:
    net = Net(lambda n, x: n.b(n.a(x)) if x.sum() > 0 else n.a(x), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    for sign, expected in ((1, FREE), (-1, {"a": OUT})):
        with pytest.warns(UserWarning, match="depends on values, so it was read on the real tensors"):
            groups = find_groups(net, sign * X.abs())
        assert summary(groups) == expected
    prove(net, X.abs(), groups)


def test_seeds_of_other_generators_are_not_used_up() -> None:
    net = Net(lambda n, x: n.m(x) * (random.random() + np.random.rand()), m=mlp())
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist()
    find_groups(net, X)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_snapshots_tell_changes() -> None:
    net = images()
    before = snapshot(net)
    assert same_state(before, snapshot(net))
    net[1].num_batches_tracked += 1
    assert not same_state(before, snapshot(net))

"""The trial of a cut: what would move channels is refused by name, sizes follow, wrong guesses do not stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from proof import Net, outputs, randomise, relative_error, same_state, snapshot
from torch import Tensor, nn

from lightning_prune import PruneRecord, find_groups, history_of, prune
from lightning_prune.cut import prepare
from lightning_prune.graph import read
from lightning_prune.history import replay
from lightning_prune.types import PruningPlan
from lightning_prune.verification import Trial, verify

X = torch.randn(3, 4)
OUT = "frozen: reaches the model's output"


def trial_of(model: nn.Module, x: Tensor = X, **gone: list[int]) -> Trial:
    """Try to remove channels, given by group name."""
    graph = read(model, x)
    plan = PruningPlan({name: torch.tensor(indices) for name, indices in gone.items()})
    return verify(model, graph, plan, prepare(model, graph, plan))


def two(run: Callable[[Net, Tensor], Tensor], width: int = 16, inner: int | None = None) -> Net:
    """A part under test `a` -> run -> `b`, beside a part `c` -> `d` that can be cut in any case."""
    return Net(
        lambda n, x: n.b(run(n, n.a(x))) + n.d(n.c(x)),
        **{"a": nn.Linear(4, width), "b": nn.Linear(inner or width, 5), "c": nn.Linear(4, 10), "d": nn.Linear(10, 5)},
    )


class TestTrial:
    def test_a_cut_that_works(self) -> None:
        net = two(lambda n, y: y.relu())
        before = snapshot(net)
        trial = trial_of(net, a=[0, 5], c=[1])
        assert trial.refused == {}
        assert trial.cut.shapes == {"a.weight": (16, 4), "a.bias": (16,), "b.weight": (5, 16), **_rest()}
        assert trial.cut.kept["b.weight"][1].tolist() == [1, 2, 3, 4, *range(6, 16)]
        assert trial.cut.attributes["a"] == {"out_features": 14}
        assert trial.macs == 3 * (4 * 14 + 14 * 5 + 4 * 9 + 9 * 5)
        assert same_state(snapshot(net), before)

    def test_a_cut_of_nothing(self) -> None:
        trial = trial_of(two(lambda n, y: y.relu()))
        assert (trial.refused, trial.cut.kept, trial.cut.attributes) == ({}, {}, {})
        assert trial.macs == 3 * (4 * 16 + 16 * 5 + 4 * 10 + 10 * 5)

    def test_a_refused_cut_has_no_cost(self) -> None:
        assert trial_of(two(lambda n, y: y.view(-1, 16)), a=[0]).macs == 0


def _rest() -> dict[str, tuple[int, ...]]:
    return {"c.weight": (10, 4), "c.bias": (10,), "d.weight": (5, 10)}


MOVED: dict[str, tuple[Callable[[Net, Tensor], Tensor], int, str]] = {
    "a slice": (lambda n, y: y[:, :6].sum(1, keepdim=True), 1, "aten.slice.Tensor"),
    "a slice from behind": (lambda n, y: y[:, -6:].sum(1, keepdim=True), 1, "aten.slice.Tensor"),
    "every third": (lambda n, y: y[:, ::3].sum(1, keepdim=True), 1, "aten.slice.Tensor"),
    "a fixed split": (lambda n, y: y.split(6, 1)[0].sum(1, keepdim=True), 1, "aten.split.Tensor"),
}


@pytest.mark.parametrize("name", MOVED)
def test_what_would_move_channels_is_refused_by_the_name_of_its_group(name: str) -> None:
    run, inner, operation = MOVED[name]
    net = two(run, inner=inner)
    before = snapshot(net)
    names = [group.name for group in find_groups(net, X) if group.name.partition("#")[0] == "a"]
    trial = trial_of(net, **{group: [0] for group in names}, c=[1])
    assert trial.refused
    assert set(trial.refused) <= set(names)
    assert all(reason == f"the cut would move its channels in {operation}" for reason in trial.refused.values())
    assert same_state(snapshot(net), before)


def _sixteen(y: Tensor) -> Tensor:
    if y.shape[1] != 16:
        raise ValueError("sixteen, please")
    return y


@pytest.mark.parametrize(
    ("run", "operation", "message"),
    [
        (lambda n, y: y.view(3, 16), "aten.view.default", "invalid for input of size 45"),
        (lambda n, y: _sixteen(y), "aten.", "sixteen, please"),
    ],
    ids=["a view", "a check"],
)
def test_what_fails_is_refused_with_the_operation_and_its_message(
    run: Callable[[Net, Tensor], Tensor], operation: str, message: str
) -> None:
    trial = trial_of(two(run), a=[3], c=[1])
    assert list(trial.refused) == ["a"]
    assert trial.refused["a"].startswith(f"the cut model fails in {operation}")
    assert trial.refused["a"].endswith(message)


def test_an_output_of_another_shape_is_refused() -> None:
    net = Net(lambda n, x: (n.b(n.a(x)), x.new_zeros(n.a.out_features)), a=nn.Linear(4, 16), b=nn.Linear(16, 5))
    (reason,) = trial_of(net, a=[3]).refused.values()
    assert "aten.new_zeros.default" in reason or "it returns shapes" in reason


def test_a_step_that_is_left_out_is_refused() -> None:
    net = two(lambda n, y: y.relu() if y.shape[1] == 16 else y)
    assert list(trial_of(net, a=[3], c=[1]).refused) == ["a"]


def test_a_step_more_is_refused() -> None:
    net = two(lambda n, y: y if y.shape[1] == 16 else y.relu())
    assert list(trial_of(net, a=[3], c=[1]).refused) == ["a"]


def test_the_order_of_channels_is_compared() -> None:
    net = two(lambda n, y: y if y.shape[1] == 16 else y.flip(1))
    assert list(trial_of(net, a=[3]).refused) == ["a"]


def held_back(record: PruneRecord) -> dict[str, str]:
    return {name: reason for name, reason in record.held_back.items() if reason != OUT}


class TestWidthOfOne:
    """A single channel may take another path through torch."""

    @pytest.mark.parametrize(
        ("run", "width"), [(lambda n, y: y.squeeze(), 4), (lambda n, y: y.squeeze(1), 4), (lambda n, y: y.squeeze(), 8)]
    )
    def test_a_second_channel_is_spared_with_the_reason(self, run: Callable[[Net, Tensor], Tensor], width: int) -> None:
        net = two(run, width)
        record = prune(net, X, pruning_ratio=0.9)
        assert held_back(record) == {"a": "keeps 2 channels in place of 1: a single one cannot be verified"}
        assert (net.a.out_features, net.b.in_features, net.c.out_features) == (2, 2, 1)
        assert record.channels["a"].after == 2
        assert net(X).shape == (3, 5)

    def test_the_stronger_of_the_others_is_spared(self) -> None:
        net = two(lambda n, y: y.squeeze(), 4)
        for part in (net.a.weight.data, net.a.bias.data, net.b.weight.data.T):
            part.copy_(torch.tensor([3.0, 1, 4, 2]).reshape(-1, *[1] * (part.dim() - 1)).expand_as(part))
        assert prune(net, X, pruning_ratio=0.9).kept["a.weight"][0] == (0, 2)

    def test_one_channel_is_kept_where_that_is_fine(self) -> None:
        record = prune(two(lambda n, y: y.relu()), X, pruning_ratio=0.92)
        assert (held_back(record), record.channels["a"].after, record.channels["c"].after) == ({}, 1, 1)

    def test_a_group_of_two_is_left_alone(self) -> None:
        net = two(lambda n, y: y.squeeze(), 2)
        record = prune(net, X, pruning_ratio=0.5)
        assert (net.a.out_features, list(held_back(record))) == (2, ["a"])


class Sized(nn.Module):
    """A layer behind which a view takes sizes from attributes; others hold the same number by chance.

    Args:
        run: What happens between the layers.
        attributes: In the order in which they are tried.
    """

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **attributes: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 5)
        self._run = run
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self._run(self, self.a(x)))


class TestAttributes:
    def test_the_attribute_that_is_used_is_set_and_no_other(self) -> None:
        net = Sized(lambda s, y: y.view(-1, s.width), decoy=16, width=16, limit=16)
        record = prune(net, X, pruning_ratio=0.5)
        assert (net.decoy, net.width, net.limit) == (16, 8, 16)
        assert record.attributes == {"": {"width": 8}, "a": {"out_features": 8}, "b": {"in_features": 8}}
        assert net(X).shape == (3, 5)

    def test_two_that_are_needed_at_once(self) -> None:
        net = Sized(lambda s, y: y.view(-1, s.count, s.each).mean(2).repeat_interleave(s.each, 1), count=4, each=4)
        record = prune(net, X, pruning_ratio=0.5)
        assert net.count * net.each == 8 or "a" in held_back(record)
        assert net(X).shape == (3, 5)

    def test_a_guess_that_leads_into_a_dead_end_does_not_stay(self) -> None:
        net = Sized(lambda s, y: y.view(-1, s.width) * y.new_ones(s.length)[-1], length=16, width=16)
        record = prune(net, X, pruning_ratio=0.5)
        assert (net.length, net.width) == (16, 8)
        assert record.attributes[""] == {"width": 8}

    def test_sizes_in_a_list_and_in_a_tuple(self) -> None:
        net = Sized(lambda s, y: torch.cat(y.split(s.parts, 1), 1).view(-1, *s.shape), parts=[8, 8], shape=(16,))
        record = prune(net, X, pruning_ratio=0.5)
        assert (net.parts, net.shape) == ([4, 4], (8,))
        assert record.attributes[""] == {"parts": (4, 4), "shape": (8,)}

    def test_a_size_that_stands_in_the_model_around(self) -> None:
        class Around(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.width, self.inner, self.b = 16, nn.Linear(4, 16), nn.Linear(16, 5)

            def forward(self, x: Tensor) -> Tensor:
                return self.b(self.inner(x).reshape(x.shape[0], self.width))

        net = nn.Sequential(Around())
        prune(net, X, pruning_ratio=0.25)
        assert net[0].width == 12
        assert net(X).shape == (3, 5)

    def test_modules_of_the_same_class_follow_each_other(self) -> None:
        def part() -> Sized:
            net = Sized(lambda s, y: y.view(-1, s.width), width=16)
            net.b = nn.Linear(16, 4)
            return net

        net = nn.Sequential(*(part() for _ in range(5)))
        record = prune(net, X, pruning_ratio=0.5)
        assert [layer.width for layer in net] == [8] * 5
        assert record.reached == 0.5

    def test_sizes_that_no_attribute_holds_are_refused_and_the_attributes_stay(self) -> None:
        net = Sized(lambda s, y: y.view(-1, 16), width=16, count=4)
        net = nn.Sequential(net, nn.Linear(5, 10), nn.Linear(10, 3))
        record = prune(net, X, pruning_ratio=0.5)
        assert list(held_back(record)) == ["0.a"]
        assert (net[0].width, net[0].count, net[0].a.out_features, net[1].out_features) == (16, 4, 16, 5)
        assert "0" not in record.attributes

    def test_replay_sets_what_was_found(self) -> None:
        def build() -> Sized:
            return Sized(lambda s, y: y.view(-1, s.width), decoy=16, width=16)

        net, fresh = build(), build()
        prune(net, X, pruning_ratio=0.5)
        replay(fresh, history_of(net))
        assert (fresh.decoy, fresh.width) == (16, 8)


def test_what_was_verified_computes_what_the_kept_channels_computed() -> None:
    net = randomise(two(lambda n, y: torch.tanh(y) * y.mean(1, keepdim=True).mul(0).add(1)).double())
    dense = copy.deepcopy(net)
    record = prune(net, X.double(), pruning_ratio=0.5)
    for name in "ac":
        gone = sorted(set(range(len(dense.get_submodule(name).bias))) - set(record.kept[f"{name}.weight"][0]))
        consumer = dense.get_submodule({"a": "b", "c": "d"}[name])
        consumer.weight.data[:, gone] = 0
    assert relative_error(outputs(net, X.double()), outputs(dense, X.double())) < 1e-12

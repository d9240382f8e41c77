"""Predicted latency: which operations are timed, what lies between them, and that none is timed twice."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune.cost import (
    Bench,
    LatencyPrice,
    LatencyTable,
    Machine,
    batch_of,
    measure_latency,
    predicted_latency,
    preferred_multiple,
)
from lightning_prune.cost.grid import between, corners, grid
from lightning_prune.cost.operations import Operation, Placed
from lightning_prune.errors import LatencyTableError
from lightning_prune.fate import Fate
from lightning_prune.graph import Graph, read
from lightning_prune.history import commit
from lightning_prune.inputs import bind
from lightning_prune.pruner import Request, draft_cut
from lightning_prune.types import PruningPlan

HERE = Machine.here(torch.device("cpu"))


class Counted:
    """A stopwatch that computes times instead of measuring them, and notes what it was asked."""

    def __init__(self, time: Callable[[Operation], float | None] = lambda operation: 1.0) -> None:
        self.time = time
        self.asked: list[str] = []

    def __call__(self, operations: Sequence[Operation]) -> list[float | None]:
        self.asked += [operation.key for operation in operations]
        return [self.time(operation) for operation in operations]


def work(operation: Operation) -> float:
    """Multilinear in the widths: the elements of the weight of what has one, else of the first tensor."""
    tensors = operation.tensors
    return float(prod(tensors[-1 if "mm" in operation.key else min(1, len(tensors) - 1)].shape))


def priced(model: nn.Module, images: Tensor, stopwatch: Counted, **given: object) -> LatencyPrice:
    return LatencyPrice(read(model, images), model, table=LatencyTable(HERE), stopwatch=stopwatch, **given)  # type: ignore[arg-type]


def same(shape: tuple[int, ...], labels: object) -> tuple[int, ...]:
    return tuple(shape)


def keys(price: LatencyPrice, shape_of: Callable[..., tuple[int, ...]]) -> list[str]:
    """List the operations that are done, at the very widths that are left."""
    return [
        replay.at({width: now for width, (_, now) in replay.sizes(shape_of).items()}).key
        for replay in price.replays
        if not replay.free
    ]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(12, 16), nn.LayerNorm(16)
        self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(self.embed(tokens))
        return self.head(tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0])


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 12, 3), nn.Conv2d(3, 20, 3)
        self.norm, self.last = nn.GroupNorm(4, 32), nn.Conv2d(32, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        both = torch.cat([self.left(images), self.right(images)], 1)
        return self.last(self.norm(both).relu() * torch.zeros(2, device=both.device).sum())


def residual() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet18(num_classes=10)


def inverted() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.5)


def grouped() -> nn.Module:
    layers = [nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=4), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))


def transposed() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3), nn.ConvTranspose2d(16, 24, 2, stride=2), nn.Hardswish(inplace=True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(24, 24, 3, groups=24), nn.Conv2d(24, 3, 1))


IMAGES = torch.rand(1, 3, 16, 16)
NETWORKS = {
    "residual": (residual, torch.rand(1, 3, 32, 32)),
    "inverted": (inverted, torch.rand(1, 3, 32, 32)),
    "grouped": (grouped, IMAGES),
    "transposed": (transposed, IMAGES),
    "branches": (Branches, IMAGES),
    "attention": (Attention, torch.rand(2, 6, 12)),
    "channels last": (residual, torch.rand(1, 3, 32, 32).to(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch_size", [None, 3])
def test_what_is_replayed_is_what_the_pruned_network_does(name: str, batch_size: int | None) -> None:
    make, images = NETWORKS[name]
    model = make().eval()
    if name == "channels last":
        model = model.to(memory_format=torch.channels_last)
    draft = draft_cut(model, images, Request(0.5, constants="drop"))
    price = priced(model, images, Counted(), batch_size=batch_size)
    planned = keys(price, Fate(price.graph, draft.plan).shape_left)
    pruned = copy.deepcopy(model)
    commit(pruned, draft.cut, draft.record, draft.offsets)
    inputs = images if batch_size is None else batch_of(bind(model, images), batch_size)
    assert planned == keys(priced(pruned, inputs, Counted()), same)
    assert planned != keys(price, same)
    assert ("in 0231" in "".join(planned)) is (name == "channels last")


def test_activations_between_layers_in_channels_last_are_in_channels_last() -> None:
    last = torch.channels_last
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=last)
    found = keys(priced(net, torch.rand(2, 3, 8, 8).to(memory_format=last), Counted()), same)
    assert [key.partition("]")[0].partition("float32[")[2] for key in found] == [
        "2x3x8x8 in 0231",
        "2x8x6x6 in 0231",
        "2x8x6x6 in 0231",
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_operation_can_be_done_alone_at_the_corners(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, images = NETWORKS[name]
    model = make().eval()
    draft = draft_cut(model, images, Request(0.5, constants="drop"))
    asked: list[Operation] = []

    def stopwatch(operations: Sequence[Operation]) -> list[float | None]:
        asked.extend(operations)
        return [1.0] * len(operations)

    price = LatencyPrice(read(model, images), model, table=LatencyTable(HERE), stopwatch=stopwatch)
    with caplog.at_level(logging.WARNING):
        assert predicted_latency(price.graph, draft.plan, price) > 0
    assert "cannot be timed" not in caplog.text
    assert all(Bench(torch.device("cpu")).can(asked))


def test_a_prediction_is_the_sum_of_the_operations_times() -> None:
    net = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 4, 3), nn.Flatten(), nn.Linear(4 * 144, 2))
    price = priced(net, IMAGES, Counted(work))
    dense = 10 * 27 + 10 * 196 + 4 * 90 + 2 * 576
    assert predicted_latency(price.graph, PruningPlan({}), price) == dense
    plan = PruningPlan({"0": torch.tensor([1, 3, 5])})
    assert predicted_latency(price.graph, plan, price) == pytest.approx(7 * 27 + 7 * 196 + 4 * 63 + 2 * 576)


@given(out=st.integers(1, 69), inner=st.integers(1, 89))
def test_interpolation_is_exact_where_the_time_is_multilinear(out: int, inner: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 90, 1), nn.Conv2d(90, 70, 1), nn.Conv2d(70, 4, 1))
    price = priced(net, torch.rand(1, 3, 2, 2), Counted(work))
    plan = PruningPlan({"0": torch.arange(90 - inner), "1": torch.arange(70 - out)})
    exact = inner * 3 + out * inner + 4 * out
    assert predicted_latency(price.graph, plan, price) == pytest.approx(exact, rel=1e-9)


def test_a_second_prediction_measures_nothing(tmp_path: Path) -> None:
    net, images = grouped(), IMAGES
    draft = draft_cut(net, images, Request(0.5, constants="drop"))
    first, second = Counted(work), Counted(work)
    price = LatencyPrice(read(net, images), net, table=LatencyTable(HERE, tmp_path / "t.json"), stopwatch=first)
    predicted = predicted_latency(price.graph, draft.plan, price)
    assert len(first.asked) == len(set(first.asked)) > 0
    predicted_latency(price.graph, draft.plan, price)
    again = LatencyPrice(read(net, images), net, table=LatencyTable.load(tmp_path / "t.json"), stopwatch=second)
    assert predicted_latency(again.graph, draft.plan, again) == predicted
    assert len(first.asked) == len(set(first.asked))
    assert not second.asked


def test_the_price_of_one_step_measures_that_step_only() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    stopwatch = Counted()
    price = priced(net, IMAGES, stopwatch)
    steps = next(iter(price.graph.runs.values())).steps
    assert price(steps[0], same) == 1.0
    assert [key.partition("(")[0] for key in stopwatch.asked] == ["aten.convolution.default"]


def test_the_measurements_of_a_plan_are_bounded() -> None:
    net, images = residual(), torch.rand(1, 3, 32, 32)
    stopwatch = Counted()
    price = priced(net, images, stopwatch)
    plans = [draft_cut(net, images, Request(ratio, constants="drop")).plan for ratio in (0.3, 0.31, 0.7)]
    for plan in plans[:2]:
        predicted_latency(price.graph, plan, price)
    assert len(stopwatch.asked) <= 80
    predicted_latency(price.graph, plans[2], price)
    assert len(stopwatch.asked) <= 160


@given(dense=st.integers(1, 3000), width=st.integers(1, 3000))
def test_a_width_lies_between_neighbours_on_the_grid(dense: int, width: int) -> None:
    width = min(width, dense)
    points = grid(dense)
    low, high, share = between(width, dense)
    assert points[0] == 1
    assert points[-1] == dense
    assert low <= width <= high
    assert low + share * (high - low) == pytest.approx(width)
    assert {low, high} <= set(points)
    assert high - low <= max(8, low / 4)


def test_a_step_in_time_after_a_multiple_is_kept() -> None:
    stairs = {point: -(-point // 16) for point in grid(128)}
    for width in range(1, 129):
        low, high, share = between(width, 128)
        assert (1 - share) * stairs[low] + share * stairs[high] == pytest.approx(-(-width // 16))


def test_many_widths_have_eight_corners_and_shares_of_one() -> None:
    sizes = {number: (64, 18 + number) for number in range(5)}
    found = list(corners(sizes))
    assert len(found) == 8
    assert sum(share for share, _ in found) == pytest.approx(1)
    assert all(size in grid(64) for _, corner in found for size in corner.values())


def test_what_cannot_be_done_alone_counts_nothing_and_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    price = priced(net, torch.rand(2, 8), Counted(lambda operation: None if "relu" in operation.key else 1.0))
    with caplog.at_level(logging.WARNING):
        assert predicted_latency(price.graph, PruningPlan({}), price) == 3.0
        assert predicted_latency(price.graph, PruningPlan({"0": torch.tensor([0])}), price) == pytest.approx(3.0)
    assert [record.args for record in caplog.records] == [("aten.relu.default",)]


def test_the_bench_returns_none_for_what_fails() -> None:
    matrix = Placed((4, 4), torch.float32, (0, 1), held=False)
    fine = Operation(torch.ops.aten.mm.default, (("self", matrix), ("mat2", matrix)))
    broken = Operation(torch.ops.aten.view.default, (("self", matrix), ("size", [3, 3, 3])))
    time, none = Bench(torch.device("cpu"))([fine, broken])
    assert none is None
    assert time is not None
    assert time > 0


def test_views_are_free() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (3, 256)), nn.Flatten())
    price = priced(net, IMAGES, Counted())
    assert predicted_latency(price.graph, PruningPlan({}), price) == 0


def stairs_of(period: int) -> Callable[[Operation], float]:
    """Return the time of a processor that computes so many channels at once."""

    def time(operation: Operation) -> float:
        out, inner = operation.tensors[1].shape[:2]
        return float(-(-out // period) * -(-inner // period))

    return time


@pytest.mark.parametrize("period", [1, 2, 4, 8, 16, 32])
def test_the_preferred_multiple_is_the_period_of_the_stairs(period: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 128, 3), nn.Conv2d(128, 256, 3), nn.Conv2d(256, 64, 3), nn.Conv2d(64, 2, 3))
    assert preferred_multiple(priced(net, IMAGES, Counted(stairs_of(period)))) == period


def test_without_wide_convolutions_no_multiple_is_preferred() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3))
    assert preferred_multiple(priced(net, IMAGES, Counted(stairs_of(8)))) == 1


def test_a_batch_size_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`batch_size`.*got 0\. Pass 1\."):
        priced(grouped(), IMAGES, Counted(), batch_size=0)


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, rows: Tensor) -> Tensor:
        rows = self.layer(rows)
        return rows.relu() if len(rows) > 2 else rows


def test_a_model_that_does_other_operations_at_a_batch_size_is_refused() -> None:
    with pytest.raises(ValueError, match="`batch_size` 4: Moody does other operations"):
        priced(Moody(), torch.rand(1, 4), Counted(), batch_size=4)


def test_a_step_of_another_reading_is_refused() -> None:
    net = grouped()
    price = priced(net, IMAGES, Counted())
    other: Graph = read(net, IMAGES)
    with pytest.raises(ValueError, match=r"`step` aten\.\S+ is of another reading"):
        predicted_latency(other, PruningPlan({}), price)


def test_a_table_of_another_machine_is_refused() -> None:
    table = LatencyTable(Machine("abacus", 1, "1.0"))
    with pytest.raises(LatencyTableError, match="those of abacus"):
        LatencyPrice(read(grouped(), IMAGES), grouped(), table=table)


def test_the_clock_of_a_tiny_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path))
    net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).eval()
    images = torch.rand(1, 3, 32, 32)
    state = torch.get_rng_state()
    price = LatencyPrice(read(net, images), net, batch_size=2)
    dense = predicted_latency(price.graph, PruningPlan({}), price)
    cut = predicted_latency(price.graph, PruningPlan({"0": torch.arange(48)}), price)
    assert 0 < cut < dense
    assert torch.equal(torch.get_rng_state(), state)
    measured = measure_latency(net, batch_of(price.graph.inputs, 2), seconds=0.1)
    assert 0.1 < dense / measured < 10
    assert len(list(tmp_path.iterdir())) == 1

"""What channels have responded as a torchmetrics state: forward, merging, collections, saving, devices, processes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MetricCollection
from versions import needs

from lightning_prune.errors import PruningError
from lightning_prune.metrics import ChannelActivity, InhibitedChannels, channel_activity

KINDS = [ChannelActivity, InhibitedChannels]


def net(*widths: int) -> nn.Sequential:
    """Norms one behind another, each with its own shifts; channels come and go between them."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for before, width in zip((3, *widths), widths, strict=False):
        norm = nn.BatchNorm1d(width)
        nn.init.uniform_(norm.bias, -1.0, 1.0)
        parts += [nn.Linear(before, width), norm]
    return nn.Sequential(*parts)


def batch(examples: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(examples, 3, generator=torch.Generator().manual_seed(seed))


def same(found: Any, told: Any) -> bool:
    if isinstance(told, dict):
        return list(found) == list(told) and all(same(found[name], each) for name, each in told.items())
    return bool(torch.equal(found, told))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> type[ChannelActivity]:
    made: type[ChannelActivity] = request.param
    return made


def whole(kind: type[ChannelActivity], *parts: Tensor, widths: tuple[int, ...] = (5, 4)) -> ChannelActivity:
    metric = kind()
    for part in parts:
        metric.update(net(*widths), part)
    return metric


class TestOneProcess:
    def test_forward_tells_the_batch_and_keeps_all(self, kind: type[ChannelActivity]) -> None:
        metric, parts = kind(), batch().split([5, 7])
        for part in parts:
            assert same(metric(net(5, 4), part), whole(kind, part).compute())
        assert same(metric.compute(), whole(kind, *parts).compute())
        assert metric.total.shape == (9,), "the state does not grow with the batches"

    def test_forward_after_a_cut_wants_a_reset(self, kind: type[ChannelActivity]) -> None:
        metric = whole(kind, batch())
        with pytest.raises(PruningError, match="reset it after a cut"):
            metric(net(5, 3), batch())

    @needs("torchmetrics", "1.5", "has no `merge_state`")
    def test_merging(self, kind: type[ChannelActivity]) -> None:
        first, second = batch().split([5, 7])
        for begun in (kind(), whole(kind, first)):
            seen = [first] if begun.update_called else []
            begun.merge_state(whole(kind, second))
            begun.merge_state(kind())
            begun.merge_state(kind().metric_state)
            begun.update(net(5, 4), batch(3, 1))
            assert same(begun.compute(), whole(kind, *seen, second, batch(3, 1)).compute())

    @needs("torchmetrics", "1.5", "has no `merge_state`")
    def test_merging_what_saw_other_layers(self, kind: type[ChannelActivity]) -> None:
        metric, other = whole(kind, batch(), widths=(5,)), kind(layers=["3"])
        other.update(net(5, 4), batch())
        metric.merge_state(other)
        assert same(dict(sorted(metric.activities().items())), whole(kind, batch()).activities())

    @needs("torchmetrics", "1.5", "has no `merge_state`")
    def test_merging_other_widths_is_refused(self, kind: type[ChannelActivity]) -> None:
        with pytest.raises(PruningError, match=r"layer '3' was seen with 3 channels and with 4.*reset it after a cut"):
            whole(kind, batch()).merge_state(whole(kind, batch(), widths=(5, 3)))

    def test_layers_may_join(self) -> None:
        """A network whose ways differ from batch to batch: each layer's mean is over the batches that it saw."""
        metric, model = ChannelActivity(), net(5, 4)
        metric.update(model[:2], batch())
        metric.update(model, batch(7, 1))
        metric.update(model[:2], batch(3, 2))
        first = ChannelActivity()
        for each in (batch(), batch(7, 1), batch(3, 2)):
            first.update(model[:2], each)
        assert same(metric.compute()["1"], first.compute()["1"])
        assert same(metric.compute()["3"], whole(ChannelActivity, batch(7, 1)).compute()["3"])

    def test_collections_and_other_widths_after_a_reset(self) -> None:
        both = MetricCollection([InhibitedChannels(), ChannelActivity()])
        for widths in ((5, 4), (5, 4, 6), (2,)):
            both.reset()
            for part in batch().split([5, 7]):
                both.update(net(*widths), part)
            told = whole(ChannelActivity, *batch().split([5, 7]), widths=widths).compute()
            inhibited = whole(InhibitedChannels, *batch().split([5, 7]), widths=widths).compute()
            assert same(both.compute(), {"InhibitedChannels": inhibited, **told})
        assert len(both.compute_groups) == 1, "they share their state"

    def test_other_layers_are_another_state(self) -> None:
        """Two layers of one width that respond alike are not taken for one."""
        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, eps=0.0)).eval()
        both = MetricCollection({"a": InhibitedChannels(layers=["0"]), "b": InhibitedChannels(layers=["1"])})
        both.update(model, batch())
        assert len(both.compute_groups) == 2

    def test_a_saved_state_goes_into_a_fresh_metric(self, kind: type[ChannelActivity]) -> None:
        metric, fresh = whole(kind, batch()), kind()
        metric.persistent(True)
        fresh.load_state_dict(metric.state_dict())
        fresh.update(net(5, 4), batch(3, 1))
        assert same(fresh.compute(), whole(kind, batch(), batch(3, 1)).compute())
        fresh.reset()
        fresh.update(net(2), batch())
        assert same(fresh.compute(), whole(kind, batch(), widths=(2,)).compute())

    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric))])
    def test_copies(self, kind: type[ChannelActivity], twin: Any) -> None:
        metric = whole(kind, batch())
        again = twin(metric)
        again.update(net(5, 4), batch(3, 1))
        assert same(metric.compute(), whole(kind, batch()).compute())
        assert same(again.compute(), whole(kind, batch(), batch(3, 1)).compute())

    def test_before_the_first_batch(self) -> None:
        with pytest.warns(UserWarning, match="was called before the ``update`` method"):
            assert InhibitedChannels().compute().isnan()
        with pytest.warns(UserWarning, match="was called before the ``update`` method"):
            assert ChannelActivity().compute() == {}

    def test_names_of_any_letters(self) -> None:
        model, metric = nn.Sequential(), ChannelActivity()
        model.add_module("naïve, \"norm\" 層", nn.BatchNorm1d(3))  # fmt: skip
        metric.update(model, batch())
        assert list(metric.compute()) == ['naïve, "norm" 層']


class TestExactness:
    def test_many_small_responses_beside_a_large_one(self) -> None:
        """In float32 each of the small ones would be lost."""
        metric, model = ChannelActivity(), nn.Sequential(nn.Linear(1, 1, bias=False))
        model[0].weight.data.fill_(1.0)
        metric.layers = ("0",)
        metric.update(model, torch.tensor([[2.0**25]]))
        for _ in range(64):
            metric.update(model, torch.ones(1, 1))
        assert float(metric.total) == 2.0**25 + 64
        assert int(metric.count) == 65

    def test_a_large_batch_is_summed_exactly_where_it_is(self) -> None:
        metric = ChannelActivity(layers=["0"])
        responses = torch.ones(2**10, 1, 1)
        responses[0] = 2.0**25
        metric.update(nn.Sequential(nn.BatchNorm1d(1, eps=0.0).eval()), responses)
        assert float(metric.total) == 2.0**25 + 2**10 - 1

    def test_set_dtype_leaves_the_sums(self) -> None:
        metric = whole(ChannelActivity, batch())
        metric.set_dtype(torch.half)
        assert metric.total.dtype == torch.float64
        assert same(metric.compute(), whole(ChannelActivity, batch()).compute())


class WithoutDouble(TorchDispatchMode):
    """The device "meta" refuses float64, as MPS does, and no device sums in it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        double = isinstance(result, Tensor) and result.dtype == torch.float64
        if double and (result.device.type == "meta" or function.overloadpacket is torch.ops.aten.sum):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return result


class TestDevicesWithoutDouble:
    @pytest.fixture(autouse=True)
    def _probe_anew(self) -> Iterator[None]:
        channel_activity.has_double.cache_clear()
        yield
        channel_activity.has_double.cache_clear()

    def test_what_is_asked_of_a_device(self) -> None:
        assert channel_activity.has_double(torch.device("cpu"))
        with WithoutDouble():
            assert not channel_activity.has_double(torch.device("meta"))

    def test_the_sums_stay_on_the_cpu(self) -> None:
        metric = whole(InhibitedChannels, batch())
        with WithoutDouble():
            with pytest.raises(TypeError, match="doesn't support float64"):
                metric.total.to("meta")
            metric = metric.to("meta")
        assert (metric.device.type, metric.total.device.type, metric.total.dtype) == ("meta", "cpu", torch.float64)
        assert metric.compute().device.type == "meta"
        metric.reset()
        assert metric.total.device.type == "cpu"

    @needs("torchmetrics", "1.5", "takes the CPU for the device of every new metric")
    def test_made_there(self) -> None:
        with torch.device("meta"), WithoutDouble():
            metric = InhibitedChannels()
        assert (metric.device.type, metric.total.device.type) == ("meta", "cpu")

    def test_batches_are_summed_in_float32_and_added_up_in_float64(self, monkeypatch: pytest.MonkeyPatch) -> None:
        exact = whole(ChannelActivity, *batch(400).split(100)).compute()
        with WithoutDouble(), pytest.raises(TypeError, match="doesn't support float64"):
            whole(ChannelActivity, batch())
        monkeypatch.setattr(channel_activity, "has_double", lambda device: False)
        with WithoutDouble():
            metric = whole(ChannelActivity, *batch(400).split(100))
        assert metric.total.dtype == torch.float64
        for name, activity in metric.compute().items():
            assert torch.allclose(activity, exact[name], rtol=1e-6, atol=0.0)


def _on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = (Path(folder) / "meeting").as_uri()
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    idle, apart, silent = ChannelActivity(), ChannelActivity(layers=["1" if rank else "3"]), InhibitedChannels()
    if rank:
        idle.update(net(5, 4), batch())
    apart.update(net(5, 4), batch())
    found = [metric.compute() for metric in (idle, apart, silent)]
    own = [sorted(metric.activities()) for metric in (idle, apart, silent)]  # after the sync each rank has its own
    other = whole(ChannelActivity, batch(), widths=(5, 3 + rank))
    try:
        other.compute()
        message = ""
    except PruningError as error:
        message = str(error)
    torch.save([*found, own, message], Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_a_rank_that_saw_nothing_or_other_layers_takes_part(tmp_path: Path) -> None:
    mp.spawn(_on_rank, (str(tmp_path),), nprocs=2)
    told = whole(ChannelActivity, batch()).compute()
    for rank in range(2):
        idle, apart, silent, own, message = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert same(idle, told)
        assert same({name: apart[name] for name in told}, told)
        assert silent.isnan()
        assert own == [["1", "3"] if rank else [], ["1" if rank else "3"], []]
        assert "reset it after a cut" in message

"""A cut is a transaction: all of it or nothing, and what is left computes what the kept channels computed before."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from proof import Net, outputs, randomise, relative_error, same_state, snapshot
from torch import Tensor, nn

from lightning_prune import PruneRecord, find_groups, history, history_of, prune, pruner, surgery
from lightning_prune.cut import cut_tensor
from lightning_prune.errors import PruningError, ScoreError, SurgeryError
from lightning_prune.graph import read
from lightning_prune.sizes import stale_sizes
from lightning_prune.types import PruningPlan

X = torch.randn(2, 3, 6, 6)


def images(width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, groups=width),
        nn.Conv2d(width, 2 * width, 1),
        nn.GroupNorm(2, 2 * width),
        nn.PReLU(2 * width),
        nn.Flatten(),
        nn.Linear(8 * width, 5),
    )


def zeroed(model: nn.Module, record: PruneRecord, producers: dict[str, int]) -> nn.Module:
    """Return a copy of a dense model in which the named layers make zeros where a record removes channels."""
    twin = copy.deepcopy(model)
    for name, dim in producers.items():
        kept = record.kept.get(f"{name}.weight", {}).get(dim)
        layer = twin.get_submodule(name)
        gone = torch.ones(layer.weight.shape[dim], dtype=torch.bool)
        gone[list(range(len(gone)) if kept is None else kept)] = False
        layer.weight.data.movedim(dim, 0)[gone] = 0
        layer.bias.data[gone] = 0
    return twin


class TestCut:
    def test_sizes_and_tensors_agree(self) -> None:
        net = images()
        record = prune(net, X, pruning_ratio=0.5)
        assert record.reached == 0.5
        assert [tuple(parameter.shape) for parameter in net.parameters()] == [
            *((4, 3, 3, 3), (4,), (4,), (4,), (4, 1, 3, 3), (4,)),
            *((8, 4, 1, 1), (8,), (8,), (8,), (8,), (5, 32), (5,)),
        ]
        assert (net[0].out_channels, net[1].num_features, net[3].groups, net[3].in_channels) == (4, 4, 4, 4)
        assert (net[5].num_channels, net[5].num_groups, net[6].num_parameters, net[8].in_features) == (8, 2, 8, 32)
        assert stale_sizes(net) == {}
        assert net(X).shape == (2, 5)

    def test_the_kept_channels_keep_their_values(self) -> None:
        net = randomise(images())
        dense = copy.deepcopy(net)
        record = prune(net, X, pruning_ratio=0.5)
        kept = torch.tensor(record.kept["0.weight"][0])
        assert torch.equal(net[0].weight, dense[0].weight[kept])
        assert torch.equal(net[1].running_var, dense[1].running_var[kept])
        assert net[1].num_batches_tracked == dense[1].num_batches_tracked
        wide = torch.tensor(record.kept["4.weight"][0])
        assert torch.equal(net[4].weight, dense[4].weight[wide][:, kept])
        places = (wide[:, None] * 4 + torch.arange(4)).flatten()
        assert torch.equal(net[8].weight, dense[8].weight[:, places])

    def test_parameters_stay_the_same_objects(self) -> None:
        net = images()
        net[0].weight.requires_grad_(False)
        net(X).sum().backward()
        dense = copy.deepcopy(net)
        gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
        before = {name: (id(parameter), parameter.requires_grad) for name, parameter in net.named_parameters()}
        record = prune(net, X, pruning_ratio=0.5, constants="drop")
        assert {name: (id(parameter), parameter.requires_grad) for name, parameter in net.named_parameters()} == before
        assert len(record.kept) > 10
        for name, parameter in net.named_parameters():
            dims = record.kept.get(name, {})
            for tensor, whole in ((parameter, dense.get_parameter(name)), (parameter.grad, gradients[name])):
                for dim, kept in dims.items() if whole is not None else ():
                    whole = whole.index_select(dim, torch.tensor(kept))
                assert (tensor is None and whole is None) or torch.equal(tensor, whole)

    @pytest.mark.parametrize("width", [4, 8])
    def test_memory_format_is_kept(self, width: int) -> None:
        net = nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3), nn.Conv2d(width, 5, 1))
        net.to(memory_format=torch.channels_last)
        prune(net, X, pruning_ratio=0.5)
        weight = net[1].weight
        assert weight.shape == (width // 2, width // 2, 3, 3)
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
        assert all(parameter.is_contiguous() for parameter in images().parameters())

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    @pytest.mark.parametrize("shape", [(9, 5, 3, 3), (9, 5), (4, 8, 2)])
    def test_a_large_tensor_is_cut_as_any_other(
        self, shape: tuple[int, ...], order: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tensor = torch.randn(shape, requires_grad=True)
        tensors = [tensor, tensor.to(memory_format=torch.channels_last)] if len(shape) == 4 else [tensor]
        positions = {0: torch.tensor([0, 2, 3]), 1: torch.tensor([1, 4])}
        kept = {dim: positions[dim] for dim in order}
        small = [cut_tensor(whole, kept) for whole in tensors]
        monkeypatch.setattr("lightning_prune.cut._LARGE", 10)
        monkeypatch.setattr("lightning_prune.cut._PIECE", 2 * tensor[0].numel())
        for whole, expected in zip(tensors, small, strict=True):
            found = cut_tensor(whole, kept)
            assert torch.equal(found, expected)
            assert found.stride() == expected.stride()
            assert not found.requires_grad

    @pytest.mark.parametrize("ratio", [0.0, 0.01])
    def test_nothing_to_remove_leaves_all_bits(self, ratio: float) -> None:
        net = randomise(images()).eval()
        before, result = snapshot(net), net(X)
        record = prune(net, X, pruning_ratio=ratio)
        assert (record.reached, record.kept, record.attributes) == (0.0, {}, {})
        assert same_state(
            {key: value for key, value in snapshot(net).items() if key != ": module"}, _without_root(before)
        )
        assert torch.equal(net(X), result)
        assert history_of(net) == (record,)

    def test_a_graph_from_before_the_cut_may_still_be_alive(self) -> None:
        net = images()
        alive = net(X).sum()
        prune(net, X, pruning_ratio=0.5)
        net(X).sum().backward()
        for parameter in net.parameters():
            assert parameter.grad.shape == parameter.shape
        assert alive.requires_grad

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_a_cut_in_any_grad_mode_leaves_a_network_that_trains(self, mode: Callable[[], object]) -> None:
        net = images()
        with mode():
            assert prune(net, X, pruning_ratio=0.5).reached == 0.5
        net(X).sum().backward()
        assert net[0].weight.grad.shape == (4, 3, 3, 3)

    def test_tied_weights_stay_tied(self) -> None:
        net = Net(lambda n, x: n.c(n.b(n.a(x).relu())), a=nn.Linear(4, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3))
        net.add_module("again", net.b)
        twin = nn.Linear(8, 8)
        twin.weight = net.b.weight
        net.add_module("twin", twin)
        net._run = lambda n, x: n.c(n.twin(n.again(n.b(n.a(x).relu()))))
        prune(net, torch.zeros(2, 4), pruning_ratio=0.5)
        assert net.twin.weight is net.b.weight
        assert net.again is net.b
        assert (twin.in_features, twin.out_features, net.b.in_features, net.b.weight.shape) == (4, 4, 4, (4, 4))

    def test_ratios_are_counted_against_the_dense_model(self) -> None:
        net = images()
        assert [prune(net, X, pruning_ratio=ratio).reached for ratio in (0.25, 0.5, 0.5, 0.25)] == [0.25, 0.5, 0.5, 0.5]
        assert net[0].out_channels == 4
        assert [record.params.dense for record in history_of(net)] == [history_of(net)[0].params.before] * 4

    def test_attributes_of_other_layouts_are_left_alone(self) -> None:
        class Transposed(nn.Linear):
            def __init__(self, inner: int, outer: int) -> None:
                super().__init__(inner, outer)
                self.weight = nn.Parameter(self.weight.data.T.contiguous())

            def forward(self, x: Tensor) -> Tensor:
                return x @ self.weight + self.bias

        net = nn.Sequential(Transposed(4, 8), Transposed(8, 3))
        prune(net, torch.zeros(2, 4), pruning_ratio=0.0)
        assert [(layer.in_features, layer.out_features) for layer in net] == [(4, 8), (8, 3)]


def _without_root(state: dict[str, object]) -> dict[str, object]:
    """Leave out the root module's attributes, where the history is written."""
    return {key: value for key, value in state.items() if key != ": module"}


class TestSabotage:
    """With a cut that cuts nothing, the checks of these files must fail."""

    @pytest.mark.parametrize(
        "check",
        [
            TestCut().test_sizes_and_tensors_agree,
            TestCut().test_the_kept_channels_keep_their_values,
            TestCut().test_parameters_stay_the_same_objects,
            lambda: TestCut().test_memory_format_is_kept(8),
            TestCut().test_tied_weights_stay_tied,
            TestCut().test_ratios_are_counted_against_the_dense_model,
            lambda: TestCut().test_a_cut_in_any_grad_mode_leaves_a_network_that_trains(torch.no_grad),
        ],
    )
    def test_checks_fail(self, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(history, "apply", lambda model, cut, notes, _: model.__dict__.update(notes))
        with pytest.raises((AssertionError, RuntimeError)):
            check()


class FaultError(Exception):
    """The fault that a test injects."""


class TestTransaction:
    @pytest.mark.parametrize("place", ["cut_tensor", "_exchange"])
    @pytest.mark.parametrize("call", [0, 1, 5, 12])
    def test_a_fault_while_cutting_leaves_everything(
        self, place: str, call: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        net = images()
        net(X).sum().backward()
        before = snapshot(net)
        real, calls = getattr(surgery, place), [0]

        def faulty(*arguments: object) -> object:
            calls[0] += 1
            if calls[0] == call + 1:
                raise FaultError
            return real(*arguments)

        monkeypatch.setattr(surgery, place, faulty)
        with pytest.raises(FaultError):
            prune(net, X, pruning_ratio=0.5)
        assert same_state(snapshot(net), before)
        assert history_of(net) == ()

    def test_a_fault_within_an_exchange_leaves_everything(self, monkeypatch: pytest.MonkeyPatch) -> None:
        net = images()
        net(X).sum().backward()
        before, real, calls = snapshot(net), surgery._exchange, [0]

        def faulty(tensor: Tensor, data: Tensor, gradient: Tensor | None) -> None:
            calls[0] += 1
            real(tensor, data, None if calls[0] == 4 else gradient)
            if calls[0] == 4:
                raise KeyboardInterrupt

        monkeypatch.setattr(surgery, "_exchange", faulty)
        with pytest.raises(KeyboardInterrupt):
            prune(net, X, pruning_ratio=0.5)
        assert same_state(snapshot(net), before)

    def test_a_fault_while_attributes_are_set_leaves_everything(self) -> None:
        net = images()
        graph = read(net, X)
        plan = PruningPlan({"0": torch.tensor([0, 3])})
        cut = surgery.prepare(net, graph, plan)
        before = snapshot(net)
        wrong = surgery.Cut(cut.shapes, cut.kept, {**cut.attributes, "4": {"in_channels": _Faulty(), "nowhere": 3}})
        with pytest.raises((AttributeError, FaultError)):
            surgery.apply(net, wrong)
        assert same_state(snapshot(net), before)

    @pytest.mark.parametrize("place", ["verify", "prepare", "history.commit"])
    def test_a_fault_in_a_step_leaves_everything(self, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def faulty(*arguments: object) -> object:
            raise FaultError

        net = images()
        before = snapshot(net)
        monkeypatch.setattr(f"lightning_prune.pruner.{place}", faulty)
        with pytest.raises(FaultError):
            prune(net, X, pruning_ratio=0.5)
        assert same_state(snapshot(net), before)

    def test_planning_changes_nothing(self) -> None:
        net = images()
        net(X).sum().backward()
        before = snapshot(net)
        draft = pruner.draft_cut(net, X, pruner.Request(0.5))
        assert same_state(snapshot(net), before)
        assert draft.record.params.after < draft.record.params.before

    def test_remove_refuses_what_would_not_work(self) -> None:
        net = Net(lambda n, x: n.b(n.a(x).view(-1, 8)), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
        graph, before = read(net, torch.zeros(2, 4)), snapshot(net)
        with pytest.raises(SurgeryError, match=r"model is unchanged\. a: .*aten\.view\.default.*`ignore`") as caught:
            surgery.remove(net, graph, PruningPlan({"a": torch.tensor([1])}))
        assert isinstance(caught.value, PruningError)
        assert same_state(snapshot(net), before)

    def test_remove_cuts_what_is_planned(self) -> None:
        net = images()
        dense = copy.deepcopy(net)
        cut = surgery.remove(net, read(net, X), PruningPlan({"0": torch.tensor([0, 3, 4])}))
        assert torch.equal(net[0].weight, dense[0].weight[[1, 2, 5, 6, 7]])
        assert torch.equal(net[4].weight, dense[4].weight[:, [1, 2, 5, 6, 7]])
        assert cut.shapes["0.weight"] == (8, 3, 3, 3)
        assert cut.attributes["3"] == {"out_channels": 5, "in_channels": 5, "groups": 5}
        assert net(X).shape == (2, 5)


class _Faulty(int):
    pass


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["0.weight", "4.bias", "1.running_var"])
def test_weights_that_are_not_finite_are_an_error(value: float, place: str) -> None:
    net = images()
    dict([*net.named_parameters(), *net.named_buffers()])[place].data[0] = value
    before = snapshot(net)
    with pytest.raises(ScoreError, match=rf"^{place} holds NaN or infinite values\. Nothing was cut"):
        prune(net, X, pruning_ratio=0.5)
    assert same_state(snapshot(net), before)


def test_large_weights_in_half_precision_are_finite() -> None:
    net = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 3)).half()
    nn.init.ones_(net[0].weight)
    assert prune(net, torch.zeros(2, 300).half(), pruning_ratio=0.5).reached == 0.5


def test_no_group_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"finds nothing to prune in Linear: weight: reaches the model's output"):
        prune(nn.Linear(4, 3), torch.zeros(2, 4), pruning_ratio=0.5)
    with pytest.raises(ValueError, match=r"0: is ignored by the pattern '0'; 1: reaches.*loosen `ignore`"):
        prune(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.zeros(2, 4), pruning_ratio=0.5, ignore=["0"])


def test_removing_is_zeroing_where_nothing_normalises_across_channels() -> None:
    net = randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
        ).double()
    )
    dense = copy.deepcopy(net)
    record = prune(net, X.double(), pruning_ratio=0.5)
    assert sorted(record.kept) == ["0.bias", "0.weight", "2.bias", "2.weight", "5.weight"]
    twin = zeroed(dense, record, {"0": 0, "2": 0})
    assert relative_error(outputs(net, X.double()), outputs(twin, X.double())) < 1e-12
    assert relative_error(outputs(dense, X.double()), outputs(twin, X.double())) > 1e-3


def test_groups_of_the_cut_model_are_those_of_the_record() -> None:
    net = images()
    record = prune(net, X, pruning_ratio=0.5)
    assert {group.name: group.size for group in find_groups(net, X)} == {
        name: change.after for name, change in record.channels.items()
    }
    assert F.relu(net(X)).shape == (2, 5)

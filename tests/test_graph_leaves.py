"""Reading a model leaves no trace in it, and sees what only train mode runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from proof import Net, same_state, snapshot, summary
from torch import Tensor, nn

from lightning_prune import find_groups, graph
from lightning_prune.trace import SUBSTRATES

OUT = "reaches the model's output"
X = torch.randn(2, 3, 6, 6)


class Busy(nn.Module):
    """A net that changes whatever a forward can change."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 5, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))
        self.count, self.last, self.fails = 0, None, fails
        self.seen: list[Tensor] = []
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.norm(self.a(x)))
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * y.mean((0, 2, 3))
        self.count += 1
        self.last = y
        self.extra = torch.randn(3)
        self.eval()
        if self.fails:
            raise RuntimeError("as planned")
        return self.b(y) + torch.rand(1)


def busy(*, fails: bool = False) -> Busy:
    net = Busy(fails=fails).train()
    net.drop.eval()
    net.a.weight.requires_grad_(False)
    net.b.weight.grad = torch.ones_like(net.b.weight)
    return net


@pytest.mark.parametrize("substrate", SUBSTRATES)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_changes(substrate: str, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "SUBSTRATES", (substrate,))
    net = busy(fails=fails)
    before, state, grad_mode = snapshot(net), torch.get_rng_state(), torch.is_grad_enabled()
    real = (
        pytest.warns(UserWarning, match="real tensors")
        if substrate == "real" and not fails
        else contextlib.nullcontext()
    )
    failure = pytest.raises(graph.TraceError, match="as planned") if fails else contextlib.nullcontext()
    with real, failure:
        assert summary(find_groups(net, X)) == {"a": 8, "b": OUT}
    assert same_state(snapshot(net), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() == grad_mode
    assert not hasattr(net, "extra")
    assert (net.training, net.drop.training, net.norm.training, net.count, net.last) == (True, False, True, 0, None)


def test_containers_that_forward_fills_are_emptied_again() -> None:
    class Keeping(Busy):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.seen.append(y)
            self.cache["y"] = y
            return y

    net = Keeping()
    find_groups(net, X)
    assert (net.seen, net.cache) == ([], {})


def test_modules_that_forward_adds_are_taken_out_again() -> None:
    class Growing(Busy):
        def forward(self, x: Tensor) -> Tensor:
            self.late = nn.Conv2d(5, 5, 1)
            return self.late(super().forward(x))

    net = Growing()
    names = [name for name, _ in net.named_modules()]
    with contextlib.suppress(graph.TraceError):
        find_groups(net, X)
    assert [name for name, _ in net.named_modules()] == names


def test_the_model_runs_in_eval_mode_whatever_its_mode() -> None:
    modes = []
    net = Net(lambda n, x: (modes.append(n.a.training), n.a(x))[1], a=nn.Conv2d(3, 8, 1)).train()
    find_groups(net, X)
    assert modes == [False]
    assert net.training


def test_frozen_batch_statistics_stay_frozen() -> None:
    net = busy()
    net.norm.eval()
    assert summary(find_groups(net, X)) == {"a": 8, "b": OUT}
    assert (net.training, net.norm.training) == (True, False)


class Heads(nn.Module):
    """An auxiliary head that runs in train mode only, as GoogLeNet's."""

    def __init__(self, tell: Callable[[nn.Module, Tensor], Tensor] = lambda head, y: head(y)) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)
        self.aux = nn.Sequential(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1))
        self.tell = tell

    def forward(self, x: Tensor) -> object:
        y = self.norm(self.a(x))
        return (self.b(y), self.tell(self.aux, y)) if self.training else self.b(y)


@pytest.mark.parametrize("batch", [1, 2])
def test_heads_of_the_train_mode_are_found(batch: int) -> None:
    groups = find_groups(Heads(), X[:batch])
    assert summary(groups) == {"a": 8, "b": OUT, "aux.0": 6, "aux.1": OUT}
    assert {member.tensor for member in groups[0].members} >= {"b.weight", "aux.0.weight"}


def test_a_batch_of_one_pixel_is_doubled_for_the_train_mode() -> None:
    assert "aux.0" in summary(find_groups(Heads(), X[:1, :, :1, :1]))


def test_a_train_mode_that_fails_is_reported() -> None:
    def fail(head: nn.Module, y: Tensor) -> Tensor:
        raise RuntimeError("as planned")

    with pytest.warns(
        UserWarning, match=r"\d parameters, aux\.0\.bias among them, are not read in eval mode.*as planned"
    ):
        found = summary(find_groups(Heads(fail), X))
    assert found == {"a": 8, "b": OUT}


def test_tensors_in_lists_and_attributes_are_followed() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
            self.flat = [self.a.weight, self.b.weight]

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.flat[0].T) @ self.flat[1].T

    assert summary(find_groups(Listed(), torch.zeros(2, 4))) == {"a": 8, "b": OUT}

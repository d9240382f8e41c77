"""The optimizer after a cut: the same object, state of the new shapes, and every parameter still moves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from lightning_prune import optimizers
from lightning_prune.criteria import Random
from lightning_prune.errors import PruningError
from lightning_prune.pruner import Request, draft_cut
from lightning_prune.surgery import Cut, apply

EXAMPLE = torch.zeros(2, 1, 6, 6)
MAKERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9),
    "nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "sgd fused": partial(SGD, lr=0.1, momentum=0.9, fused=True),
    "adam": partial(Adam, lr=0.01),
    "adam foreach": partial(Adam, lr=0.01, foreach=True),
    "adam fused": partial(Adam, lr=0.01, fused=True),
    "adamw": partial(AdamW, lr=0.01),
    "adamw amsgrad": partial(AdamW, lr=0.01, amsgrad=True),
    "adamw amsgrad foreach": partial(AdamW, lr=0.01, amsgrad=True, foreach=True),
    "adamw amsgrad fused": partial(AdamW, lr=0.01, amsgrad=True, fused=True),
    "adamw tensor lr": partial(AdamW, lr=torch.tensor(0.01)),
    "rmsprop": partial(RMSprop, lr=0.01),
    "rmsprop centered": partial(RMSprop, lr=0.01, centered=True, momentum=0.9),
    "adagrad": partial(Adagrad, lr=0.01),
    "adadelta": partial(Adadelta, lr=1.0),
    "nadam": partial(NAdam, lr=0.01),
    "radam": partial(RAdam, lr=0.01),
    "adamax": partial(Adamax, lr=0.01),
    "asgd": partial(ASGD, lr=0.01),
    "rprop": partial(Rprop, lr=0.01),
    "adafactor": partial(Adafactor, lr=0.01),
}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),  # a bias before BatchNorm would not move
        nn.BatchNorm2d(8),
        nn.PReLU(8),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 36, 4),
    )


def take_steps(net: nn.Module, optimizer: Optimizer, count: int = 3, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (net(torch.randn(4, 1, 6, 6, generator=generator)) ** 2).mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def cut_net(net: nn.Module, ratio: float = 0.5) -> Cut:
    cut = draft_cut(net, EXAMPLE, Request(ratio, criterion=Random(1))).cut
    apply(net, cut)
    return cut


def snapshot(net: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Parameter name -> copies of its state."""
    return {
        name: {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        for name, parameter in net.named_parameters()
    }


def index(tensor: Tensor, kept: Iterable[tuple[int, Tensor]]) -> Tensor:
    """Cut by hand; a dimension of size 1 is shared by all channels."""
    for dim, positions in kept:
        if tensor.shape[dim] > 1:
            tensor = tensor.index_select(dim, positions)
    return tensor


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[..., Optimizer]:
    return request.param  # type: ignore[no-any-return]


def test_state_of_kept_channels_is_unchanged_bit_for_bit(make: Callable[..., Optimizer]) -> None:
    net = network()
    optimizer = make(net.parameters())
    take_steps(net, optimizer)
    before = snapshot(net, optimizer)
    cut = cut_net(net)
    assert len(cut.kept) == 9  # 7 parameters, and the running mean and variance
    optimizers.rebuild(optimizer, net, cut)
    after = snapshot(net, optimizer)
    assert before.keys() == after.keys()
    for name, state in before.items():
        assert after[name].keys() == state.keys()
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                value = index(value, cut.kept.get(name, {}).items())
                assert torch.equal(after[name][key], value), (name, key)
            else:
                assert after[name][key] == value, (name, key)


def test_state_has_the_new_shapes(make: Callable[..., Optimizer]) -> None:
    net = network()
    optimizer = make(net.parameters())
    take_steps(net, optimizer)
    optimizers.rebuild(optimizer, net, cut_net(net))
    optimizers.check([optimizer], net)
    for parameter in net.parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim() and not isinstance(optimizer, Adafactor):
                assert value.shape == parameter.shape, key


def test_param_groups_are_what_they_were(make: Callable[..., Optimizer]) -> None:
    net = network()
    optimizer = make([{"params": list(net[:3].parameters()), "lr": 0.03}, {"params": list(net[3:].parameters())}])
    take_steps(net, optimizer)
    before = [dict(group) for group in optimizer.param_groups]
    held = [list(group["params"]) for group in optimizer.param_groups]
    optimizers.rebuild(optimizer, net, cut_net(net))
    assert optimizer.param_groups == before
    assert all(
        now is was
        for group, parameters in zip(optimizer.param_groups, held, strict=True)
        for now, was in zip(group["params"], parameters, strict=True)
    )
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in net.parameters()}


def test_all_parameters_move_at_the_next_step(make: Callable[..., Optimizer]) -> None:
    net = network()
    optimizer = make(net.parameters())
    take_steps(net, optimizer)
    optimizers.rebuild(optimizer, net, cut_net(net))
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    take_steps(net, optimizer, count=2, seed=1)
    for name, parameter in net.named_parameters():
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, before[name]), name


def test_next_step_is_that_of_a_small_network_with_this_state(make: Callable[..., Optimizer]) -> None:
    """A fresh optimizer that loads the cut state goes on in exactly the same way."""
    net = network()
    optimizer = make(net.parameters())
    take_steps(net, optimizer)
    cut = cut_net(net)
    optimizers.rebuild(optimizer, net, cut)
    twin = network()
    apply(twin, cut)
    twin.load_state_dict(net.state_dict())
    other = make(twin.parameters())
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    take_steps(net, optimizer, seed=1)
    take_steps(twin, other, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_before_the_first_step_there_is_nothing_to_do(make: Callable[..., Optimizer]) -> None:
    net = network()
    optimizer = make(net.parameters())
    optimizers.rebuild(optimizer, net, cut_net(net))
    optimizers.check([optimizer], net)
    take_steps(net, optimizer)
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_pending_gradients_are_cut_along() -> None:
    net = network()
    (net(torch.randn(4, 1, 6, 6)) ** 2).mean().backward()
    before = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    cut = cut_net(net)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.grad, index(before[name], cut.kept.get(name, {}).items()))


def test_steps_keep_counting() -> None:
    net = network()
    optimizer = AdamW(net.parameters())
    take_steps(net, optimizer, count=3)
    optimizers.rebuild(optimizer, net, cut_net(net))
    take_steps(net, optimizer, count=1)
    assert {state["step"].item() for state in optimizer.state.values()} == {4.0}


# state of other shapes


class Factored(Optimizer):
    """Second moments of rows and columns, set up where there is no state yet, as in Adafactor and Shampoo."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        for parameter in self.param_groups[0]["params"]:
            squared = parameter.grad.flatten(1) ** 2 if parameter.dim() > 1 else parameter.grad[:, None] ** 2
            state = self.state[parameter]
            if not state:
                state.update(step=0, row=torch.zeros_like(squared[:, 0]), column=torch.zeros_like(squared[0]))
            state["step"] += 1
            state["row"] += squared.mean(1)
            state["column"] += squared.mean(0)
            scale = (state["row"][:, None] * state["column"]).sqrt() / state["row"].mean().sqrt() + 1e-8
            parameter -= self.param_groups[0]["lr"] * (parameter.grad.reshape(scale.shape) / scale).view_as(parameter)


def test_state_without_a_rule_is_dropped_with_a_warning() -> None:
    net = network()
    optimizer = Factored(net.parameters())
    take_steps(net, optimizer)
    with pytest.warns(UserWarning, match=r"Factored keeps \{.*'row'.*\} for .* was dropped") as caught:
        optimizers.rebuild(optimizer, net, cut_net(net))
    assert "for 0.weight, which does not follow its shape (8, 1, 3, 3)" in str(caught[0].message)
    optimizers.check([optimizer], net)


@pytest.mark.filterwarnings("ignore:.* keeps .* was dropped and builds up anew")
def test_training_goes_on_after_state_was_dropped() -> None:
    """ "It builds up anew" holds only if nothing is left that tells the optimizer to go on."""
    net = network()
    optimizer = Factored(net.parameters())
    take_steps(net, optimizer)
    optimizers.rebuild(optimizer, net, cut_net(net))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    take_steps(net, optimizer, seed=1)
    assert all(not torch.equal(now, was) for now, was in zip(net.parameters(), before, strict=True))


# the check


def test_lbfgs_forgets_its_curvature_with_a_warning_and_goes_on() -> None:
    net = network()
    optimizer = LBFGS(net.parameters(), max_iter=3)
    take_steps(net, optimizer)
    optimizers.check([optimizer], net)
    with pytest.warns(UserWarning, match="LBFGS keeps one flat history .* it was dropped"):
        undo = optimizers.rebuild(optimizer, net, cut_net(net))
    twin = deepcopy(net)
    take_steps(net, optimizer)
    take_steps(twin, LBFGS(twin.parameters(), max_iter=3))
    assert all(torch.equal(left, right) for left, right in zip(net.parameters(), twin.parameters(), strict=True))
    undo()
    assert any(optimizer.state.values())


def test_lbfgs_before_its_first_step_is_quiet() -> None:
    net = network()
    optimizer = LBFGS(net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizers.rebuild(optimizer, net, cut_net(net))


@pytest.mark.parametrize("name", ["ZeroRedundancyOptimizer", "PostLocalSGDOptimizer"])
def test_check_refuses_state_that_is_spread_over_processes(name: str) -> None:
    net = network()
    spread = type(name, (SGD,), {})(net.parameters(), lr=0.1)
    with pytest.raises(PruningError, match=f"{name} spreads its state over the processes.*use the optimizer inside"):
        optimizers.check([spread], net)


def test_check_refuses_a_foreign_parameter() -> None:
    net = network()
    optimizer = SGD([*net.parameters(), nn.Parameter(torch.zeros(5, 2))], lr=0.1)
    with pytest.raises(PruningError, match=r"SGD holds a parameter of shape \(5, 2\) that is not in the model; build"):
        optimizers.check([Adam(net.parameters()), optimizer], net)


def test_check_refuses_state_of_another_shape() -> None:
    net = network()
    optimizer = Adam(net.parameters())
    take_steps(net, optimizer)
    cut_net(net)
    with pytest.raises(PruningError, match=r"Adam has 'exp_avg' of shape \(8, 1, 3, 3\) for 0\.weight of shape \(4,"):
        optimizers.check([optimizer], net)


def test_check_accepts_part_of_a_model_and_tied_parameters() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    optimizers.check([SGD(net[:1].parameters(), lr=0.1), Adam([net[1].bias])], net)
    assert len(list(net.parameters())) == 3

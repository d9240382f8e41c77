"""Steps that do not depend on the scale of the gradients: numbers by hand, beside Adam, resumed, scaled, cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
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
    lr_scheduler,
)
from versions import older

from lightning_prune.callbacks.param_groups import join
from lightning_prune.callbacks.steady_steps import SteadySteps, is_adaptive
from lightning_prune.errors import PruningError

ADAPTIVE = (Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop)
PLAIN: dict[str, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "momentum": partial(SGD, momentum=0.9),
    "nesterov": partial(SGD, momentum=0.9, nesterov=True),
    "foreach": partial(SGD, foreach=True),
    "fused": partial(SGD, fused=True, momentum=0.9),
    "tensor lr": partial(SGD, lr=torch.tensor(0.01), momentum=0.9),
    "asgd": ASGD,
}


class Own(Adam):
    """A subclass with a constructor of its own."""

    def __init__(self, params: Any, *, secret: int) -> None:
        super().__init__(params, lr=0.1)
        self.secret = secret


class Still(SGD):
    """Moves nothing."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


def parameter(size: int = 3) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size))


def gradients(count: int, size: int = 3, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(size, generator=generator) for _ in range(count)]


def course(optimizer: Optimizer, gate: nn.Parameter, steps: list[Tensor]) -> list[Tensor]:
    places = []
    for gradient in steps:
        gate.grad = gradient.clone()
        optimizer.step()
        places.append(gate.detach().clone())
    return places


def steady(make: Callable[..., Optimizer] = SGD, size: int = 3) -> tuple[SteadySteps, Optimizer, nn.Parameter]:
    gate, steps = parameter(size), SteadySteps()
    optimizer = make([gate])
    steps.attach(optimizer, [gate])
    return steps, optimizer, gate


@pytest.mark.parametrize("kind", ADAPTIVE, ids=lambda kind: kind.__name__)
def test_adaptive_optimizers_are_left_alone(kind: Any) -> None:
    if older("torch", "2.6") and kind is Adagrad:
        pytest.skip("torch before 2.6 makes Adagrad's memory in its constructor only, so that it is refused")
    steps, optimizer, gate = steady(kind)
    assert steps.state_dict() == {"squares": [], "weights": []}
    other = parameter()
    plain = course(kind([other]), other, gradients(5))
    assert all(torch.equal(*pair) for pair in zip(course(optimizer, gate, gradients(5)), plain, strict=True))


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_all_others_are_made_steady(make: Any) -> None:
    small, large = steady(make), steady(make)
    moved = course(*small[1:], gradients(20)), course(*large[1:], gradients(20, scale=1000.0))
    assert float(moved[0][-1].abs().min()) > 0
    for ours, scaled in zip(*moved, strict=True):
        torch.testing.assert_close(ours, scaled, rtol=1e-4, atol=1e-6)


def test_subclasses_and_schedules_are_tried_out_without_a_trace() -> None:
    gate = parameter()
    own = Own([gate], secret=3)
    lr_scheduler.LambdaLR(own, lambda epoch: 0.0)  # warm-up from 0, and a wrapped `step`
    assert is_adaptive(own, own.param_groups[0])
    assert torch.equal(gate, torch.zeros(3))
    assert (own.param_groups[0]["lr"], len(own.state), own.param_groups[0]["params"][0]) == (0.0, 0, gate)


def test_numbers_by_hand() -> None:
    _, optimizer, gate = steady(partial(SGD, lr=0.1), size=1)
    first, second, third = course(optimizer, gate, [torch.tensor([g]) for g in (3.0, -4.0, 0.0)])
    assert float(first) == pytest.approx(-0.1)  # v = 0.009, w = 0.001: 3 / 3
    v, w = 0.999 * 0.009 + 0.001 * 16, 0.999 * 0.001 + 0.001
    assert v / w == pytest.approx(12.50175, rel=1e-5)
    assert float(second - first) == pytest.approx(0.1 * 4 / 12.50175**0.5, rel=1e-4)
    assert torch.equal(third, second)


def test_momentum_is_damped_and_its_schedule_followed() -> None:
    _, optimizer, gate = steady(partial(SGD, lr=0.1, momentum=0.5, nesterov=True), size=1)
    places = course(optimizer, gate, [torch.tensor([5.0])] * 3)
    assert [float(place) for place in places] == pytest.approx([-0.1, -0.2, -0.3])  # not 0.1 / (1 - 0.5) each
    group = optimizer.param_groups[0]
    group["momentum"] = 0.9
    places = course(optimizer, gate, [torch.tensor([5.0])] * 2)
    assert [float(place) for place in places] == pytest.approx([-0.4, -0.5])
    assert (group["dampening"], group["nesterov"]) == (0.9, False)


def test_sgd_goes_where_adam_goes() -> None:
    """With a constant gradient to 1e-5 of the way. With noise around a mean of half its size both go as far to 5 %."""
    for noise, tolerance in ((0.0, 1e-5), (1.0, 0.05)):
        steps = [0.5 + noise * gradient for gradient in gradients(1000, 8)]
        _, optimizer, gate = steady(partial(SGD, lr=0.01, momentum=0.9), size=8)
        other = parameter(8)
        ours = course(optimizer, gate, steps)[-1]
        adams = course(Adam([other], lr=0.01, betas=(0.9, 0.999)), other, steps)[-1]
        assert float((ours / adams - 1).abs().max()) < tolerance


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("early", [True, False], ids=["loaded before", "loaded after"])
def test_resumes_bit_for_bit(make: Any, early: bool) -> None:
    all_steps = gradients(20)
    steps, optimizer, gate = steady(make)
    course(optimizer, gate, all_steps[:8])
    file = BytesIO()
    torch.save((gate.detach(), optimizer.state_dict(), steps.state_dict()), file)
    file.seek(0)
    place, state, known = torch.load(file)
    again, fresh = nn.Parameter(place), SteadySteps()
    built = make([again])
    if early:
        fresh.load_state_dict(known)
    fresh.attach(built, [again])
    built.load_state_dict(state)
    if not early:
        fresh.load_state_dict(known)
    pairs = zip(course(optimizer, gate, all_steps[8:]), course(built, again, all_steps[8:]), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_saved_state_does_not_go_on() -> None:
    steps, optimizer, gate = steady()
    course(optimizer, gate, gradients(2))
    state = steps.state_dict()
    before = state["squares"][0].clone()
    course(optimizer, gate, gradients(2))
    assert torch.equal(state["squares"][0], before)
    steps.load_state_dict(state)
    course(optimizer, gate, gradients(2))
    assert torch.equal(state["squares"][0], before)


def test_detached_it_leaves_gradients_alone() -> None:
    steps, optimizer, gate = steady(partial(SGD, lr=0.1))
    course(optimizer, gate, gradients(2))
    steps.detach()
    before = gate.detach().clone()
    (after,) = course(optimizer, gate, [torch.full((3,), 7.0)])
    torch.testing.assert_close(after, before - 0.7)
    assert not optimizer._optimizer_step_pre_hooks
    assert steps.state_dict() == {"squares": [], "weights": []}


def test_gradients_are_replaced_after_the_closure_and_others_left_alone() -> None:
    gate, body = parameter(), parameter()
    optimizer = SGD([body], lr=0.1)
    join(optimizer, [gate], 0.1, schedulers=[], name="gates")
    SteadySteps().attach(optimizer, [gate])

    def closure() -> float:
        gate.grad, body.grad = torch.full((3,), 50.0), torch.full((3,), 50.0)
        return 2.0

    assert optimizer.step(closure) == 2.0
    torch.testing.assert_close(gate.detach(), torch.full((3,), -0.1))
    torch.testing.assert_close(body.detach(), torch.full((3,), -5.0))


def test_a_parameter_without_gradient_waits() -> None:
    first, second, steps = parameter(), parameter(), SteadySteps()
    optimizer = SGD([first, second], lr=0.1)
    steps.attach(optimizer, [first, second])
    course(optimizer, first, gradients(5))
    assert torch.equal(second, torch.zeros(3))
    first.grad, second.grad = None, torch.full((3,), 9.0)
    optimizer.step()
    torch.testing.assert_close(second.detach(), torch.full((3,), -0.1))  # its first step, with its own bias correction


def test_follows_a_cut() -> None:
    kept = torch.tensor([0, 2])
    steps, optimizer, gate = steady(size=3)
    whole = steady(size=3)
    course(optimizer, gate, gradients(4)), course(*whole[1:], gradients(4))
    gate.grad = None
    gate.data = gate.data[kept]
    undo = steps.follow(gate, {0: kept})
    assert steps.state_dict()["squares"][0].shape == (2,)
    later = gradients(9)[4:]
    ours, all_three = course(optimizer, gate, [step[kept] for step in later]), course(*whole[1:], later)
    assert all(torch.equal(cut, full[kept]) for cut, full in zip(ours, all_three, strict=True))
    undo()
    assert steps.state_dict()["squares"][0].shape == (3,)
    steps.follow(parameter(), {0: kept})()  # not looked after


def test_a_cut_that_it_was_not_told_of_is_refused() -> None:
    steps, optimizer, gate = steady(size=3)
    gate.data = gate.data[:2]
    with pytest.raises(PruningError, match=r"have the shape \(3,\), their parameter \(2,\); tell `follow`"):
        course(optimizer, gate, gradients(1, 2))
    with pytest.raises(PruningError, match="tell `follow` of each cut"):
        steps.follow(gate, {0: torch.tensor([1])})
    assert steps.state_dict()["squares"][0].shape == (3,)


@pytest.mark.parametrize("overflow", [0.0, 1.0])
def test_fused_optimizers_get_scaled_gradients_back(overflow: float) -> None:
    steps, optimizer, gate = steady(partial(SGD, lr=0.1, fused=True))
    course(optimizer, gate, gradients(3))
    plain = steady(partial(SGD, lr=0.1, fused=True))
    course(*plain[1:], gradients(3))
    before, place = steps.state_dict(), gate.detach().clone()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(overflow)  # as GradScaler does
    gradient = gradients(4)[3]
    course(optimizer, gate, [gradient * 1024 if not overflow else torch.full((3,), float("inf"))])
    if overflow:
        assert torch.equal(gate, place)
        assert all(
            torch.equal(*pair) for key in before for pair in zip(before[key], steps.state_dict()[key], strict=True)
        )
    else:
        assert torch.equal(gate, course(*plain[1:], [gradient])[0])


def test_low_precision_keeps_its_means_in_float32() -> None:
    gate, steps = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)), SteadySteps()
    optimizer = SGD([gate], lr=1.0)
    steps.attach(optimizer, [gate])
    course(optimizer, gate, [torch.full((3,), 0.5, dtype=torch.bfloat16)] * 3)
    assert steps.state_dict()["squares"][0].dtype == torch.float32
    assert torch.equal(gate.detach(), torch.full((3,), -3.0, dtype=torch.bfloat16))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"`beta`.*got 1"):
        SteadySteps(beta=1.0)
    with pytest.raises(ValueError, match=r"`eps`.*got 0"):
        SteadySteps(eps=0.0)
    gate, other = parameter(), parameter()
    for parameters in ([gate], []):
        with pytest.raises(ValueError, match="has no param group of just these"):
            SteadySteps().attach(SGD([gate, other]), parameters)
    with pytest.raises(MisconfigurationException, match="LBFGS could not be tried out"):
        SteadySteps().attach(LBFGS([gate]), [gate])
    with pytest.raises(MisconfigurationException, match="Still did not move"):
        SteadySteps().attach(Still([gate]), [gate])
    steps, _, _ = steady(size=3)
    with pytest.raises(PruningError, match="shape"):
        steps.load_state_dict({"squares": [torch.zeros(2)], "weights": [torch.zeros(2)]})
    with pytest.raises(PruningError, match="one of 2 parameters, but 1 are attached"):
        steps.load_state_dict({"squares": [torch.zeros(3)] * 2, "weights": [torch.zeros(3)] * 2})

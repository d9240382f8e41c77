"""The L1 penalty and its smooth form: how fast they shrink a parameter, where it rests, who gets which update."""

from __future__ import annotations

from collections.abc import Callable
from math import nan

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from lightning_prune.penalties import L1

LR, STRENGTH = 0.1, 0.01


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def soft_threshold(values: Tensor, by: float) -> Tensor:
    return torch.where(values.abs() > by, values - by * values.sign(), torch.zeros_like(values))


def test_subgradient_walks_straight_to_zero_and_then_oscillates() -> None:
    """gamma_t = gamma_0 - t * lr * lambda until |gamma| < lr * lambda, for either sign."""
    scale = parameter(0.0205, -0.0205, 0.0)
    optimizer, penalty = SGD([scale], lr=LR), L1(STRENGTH)
    stride = LR * STRENGTH
    for step in range(1, 21):
        scale.grad = torch.zeros_like(scale)
        penalty.add_to_gradients([scale])
        optimizer.step()
        left = 0.0205 - step * stride
        assert scale.tolist() == pytest.approx([left, -left, 0.0], abs=1e-12)
    for _ in range(10):
        scale.grad = torch.zeros_like(scale)
        penalty.add_to_gradients([scale])
        optimizer.step()
        assert float(scale.detach().abs().max()) <= stride + 1e-12
    assert float(scale.detach()[0]) != 0


def test_travel_with_momentum_is_what_the_docstring_says() -> None:
    scale = parameter(1.0)
    optimizer, penalty, steps = SGD([scale], lr=LR, momentum=0.9), L1(STRENGTH), 100
    for _ in range(steps):
        scale.grad = torch.zeros_like(scale)
        penalty.add_to_gradients([scale])
        optimizer.step()
    longest = STRENGTH * steps * LR / (1 - 0.9)
    assert 0.8 * longest < 1 - scale.item() <= longest


def test_gradient_is_that_of_autograd() -> None:
    scales = [parameter(0.5, -2.0, 0.0, 1e-9), parameter(-3.0)]
    for scale in scales:
        (scale**2).sum().backward()
    expected = [2 * scale.detach() + STRENGTH * scale.detach().sign() for scale in scales]
    L1(STRENGTH).add_to_gradients(scales)
    for scale, gradient in zip(scales, expected, strict=True):
        assert torch.equal(scale.grad, gradient)
        twin = scale.detach().clone().requires_grad_()
        ((twin**2).sum() + STRENGTH * twin.abs().sum()).backward()
        assert torch.allclose(scale.grad, twin.grad, rtol=0, atol=1e-15)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    bare, used = parameter(1.0), parameter(1.0)
    used.grad = torch.zeros_like(used)
    L1(STRENGTH).add_to_gradients([bare, used])
    assert bare.grad is None
    assert used.grad.item() == STRENGTH


def test_nothing_to_penalise() -> None:
    penalty = L1(STRENGTH)
    penalty.add_to_gradients([])
    penalty.shrink([], LR)
    assert penalty.strength == STRENGTH


def test_proximal_reaches_exactly_zero_and_stays() -> None:
    scale = parameter(0.0205, -0.0105, 0.0)
    penalty = L1(STRENGTH, "proximal")
    for _ in range(21):
        penalty.shrink([scale], LR)
    assert scale.tolist() == [0.0, 0.0, 0.0]


@settings(deadline=None)
@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=8), st.floats(0.0, 10.0), st.floats(0.001, 1.0))
def test_proximal_is_the_soft_threshold(values: list[float], lr: float, strength: float) -> None:
    scale = parameter(*values)
    before = scale.detach().clone()
    L1(strength, "proximal").shrink([scale], lr)
    assert torch.allclose(scale.detach(), soft_threshold(before, lr * strength), rtol=0, atol=1e-14)


def test_proximal_touches_no_gradient_and_builds_no_graph() -> None:
    scale = parameter(1.0)
    scale.grad = torch.ones_like(scale)
    L1(STRENGTH, "proximal").shrink([scale], LR)
    assert scale.grad.item() == 1
    assert scale.is_leaf
    assert scale.item() == pytest.approx(1 - LR * STRENGTH)


@pytest.mark.parametrize("make", [Adam, AdamW, RMSprop, Adagrad, Adadelta, NAdam])
def test_auto_takes_the_proximal_step_where_gradients_are_rescaled(make: Callable[..., Optimizer]) -> None:
    assert L1(STRENGTH).update_for(make([parameter(1.0)])) == "proximal"


def test_auto_takes_the_subgradient_for_sgd_and_its_kin() -> None:
    class Mine(SGD):
        pass

    assert L1(STRENGTH).update_for(SGD([parameter(1.0)], lr=LR)) == "subgradient"
    assert L1(STRENGTH).update_for(Mine([parameter(1.0)], lr=LR)) == "subgradient"


@pytest.mark.parametrize("make", [SGD, Adam])
def test_a_choice_is_kept(make: Callable[..., Optimizer]) -> None:
    optimizer = make([parameter(1.0)], lr=LR)
    assert L1(STRENGTH, "proximal").update_for(optimizer) == "proximal"
    assert L1(STRENGTH, "subgradient").update_for(optimizer) == "subgradient"


@pytest.mark.parametrize("strength", [0, 0.0, -1e-4, nan])
def test_strength_out_of_range(strength: float) -> None:
    with pytest.raises(ValueError, match=rf"`strength` is the lambda of the penalty, above 0.*; got {strength}"):
        L1(strength)


def test_unknown_update() -> None:
    with pytest.raises(ValueError, match="`update` is one of 'auto', 'subgradient', 'proximal'; got 'prox'"):
        L1(STRENGTH, "prox")  # type: ignore[arg-type]


# smooth-L1


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=8), st.sampled_from([1e-3, 0.25, 1.0]))
@settings(deadline=None)
def test_smooth_gradient_is_that_of_torch(values: list[float], delta: float) -> None:
    scale, twin = parameter(*values), parameter(*values)
    scale.grad = torch.zeros_like(scale)
    L1(STRENGTH, delta=delta).add_to_gradients([scale])
    (STRENGTH * F.smooth_l1_loss(twin, torch.zeros_like(twin), reduction="sum", beta=delta)).backward()
    assert torch.allclose(scale.grad, twin.grad, rtol=1e-12, atol=1e-15)


@given(st.floats(-3, 3, width=32), st.floats(0.001, 2.0), st.sampled_from([1e-3, 0.25, 1.0]))
@settings(deadline=None)
def test_smooth_proximal_step_minimises_what_it_should(value: float, stride: float, delta: float) -> None:
    """x + stride * h'(x) = the old value: half the squared distance and the penalty are least together."""
    scale = parameter(value)
    L1(stride, "proximal", delta).shrink([scale], 1.0)
    reached = scale.detach()
    assert (reached + stride * (reached / delta).clamp(-1, 1)).item() == pytest.approx(value, abs=1e-12)


def test_smooth_gradient_decays_inside_the_corner_where_the_sharp_one_jumps() -> None:
    """gamma_t = gamma_0 - t lr lambda down to delta, and (1 - lr lambda / delta)^t delta from there."""
    scale, delta, stride = parameter(0.02), 0.01, LR * STRENGTH
    optimizer, penalty = SGD([scale], lr=LR), L1(STRENGTH, delta=delta)
    for step in range(1, 31):
        scale.grad = torch.zeros_like(scale)
        penalty.add_to_gradients([scale])
        optimizer.step()
        expected = 0.02 - step * stride if step <= 10 else delta * (1 - stride / delta) ** (step - 10)
        assert scale.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_a_share_is_a_smaller_strength(delta: float) -> None:
    for share in (0.25, 1.0):
        scale, twin = parameter(0.3, -2.0), parameter(0.3, -2.0)
        scale.grad, twin.grad = torch.zeros_like(scale), torch.zeros_like(twin)
        L1(STRENGTH, delta=delta).add_to_gradients([scale], share)
        L1(STRENGTH * share, delta=delta).add_to_gradients([twin])
        L1(STRENGTH, delta=delta).shrink([scale], LR, share)
        L1(STRENGTH * share, delta=delta).shrink([twin], LR)
        assert torch.equal(scale.grad, twin.grad)
        assert torch.equal(scale, twin)


def test_no_share_is_no_penalty() -> None:
    scale = parameter(0.3)
    scale.grad = torch.zeros_like(scale)
    L1(STRENGTH).add_to_gradients([scale], 0.0)
    L1(STRENGTH).shrink([scale], LR, 0.0)
    assert (scale.item(), scale.grad.item()) == (0.3, 0.0)


@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_a_learning_rate_on_the_device_will_do(delta: float) -> None:
    scale, twin = parameter(0.3, -2.0), parameter(0.3, -2.0)
    L1(STRENGTH, delta=delta).shrink([scale], torch.tensor(LR, dtype=torch.float64))
    L1(STRENGTH, delta=delta).shrink([twin], LR)
    assert torch.allclose(scale, twin, rtol=0, atol=1e-15)


@pytest.mark.parametrize("delta", [-0.1, nan])
def test_delta_out_of_range(delta: float) -> None:
    with pytest.raises(ValueError, match=rf"`delta` is the half-width .* 0 or more; got {delta}\. 0 is plain L1"):
        L1(STRENGTH, delta=delta)

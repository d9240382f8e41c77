"""Estimates of the gradient of an expected loss over 0/1 gates, against going through all settings of the gates."""

from __future__ import annotations

from math import inf, log

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.errors import PruningError
from lightning_prune.estimators import EPS, enumerated, logistic_noise, rebar, reinforce, relax, relaxed_given
from lightning_prune.layers import Bernoulli

DRAWS = 100_000
LOG_ALPHA = torch.tensor([-1.5, 0.3, 0.0, 1.2])


def loss_of(gates: Tensor) -> Tensor:
    """A loss that is linear in no gate: a constant, a square, and a product of three."""
    weights = torch.tensor([0.7, -1.3, 0.4, 0.9]).to(gates)
    return 1 + (gates @ weights - 0.45) ** 2 + gates[..., :3].prod(-1)


def noises(draws: int = DRAWS, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return logistic_noise(draws, 4, generator=generator), logistic_noise(draws, 4, generator=generator)


def assert_mean(estimates: Tensor, expected: Tensor) -> None:
    """The mean of the estimates, along the first dimension, is what is expected within 4 standard errors."""
    estimates, expected = estimates.double(), expected.double()
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - expected).abs() <= 4 * error + 1e-7).all(), (estimates.mean(0), expected, error)


# the gradient itself


def test_enumeration_of_one_gate() -> None:
    """d/da [f(0) + p (f(1) - f(0))] = p (1 - p) (f(1) - f(0)): with p = 1/4 and a step of 5, 15/16."""
    gradient = enumerated(lambda gates: 2 + 5 * gates[..., 0], torch.tensor([log(1 / 3)]))
    assert gradient.tolist() == pytest.approx([15 / 16])


def test_enumeration_is_the_slope_of_the_expected_loss() -> None:
    log_alpha = LOG_ALPHA.double().requires_grad_()
    gates = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)
    p = log_alpha.sigmoid()
    expected_loss = ((gates * p + (1 - gates) * (1 - p)).prod(-1) * loss_of(gates)).sum()
    (slope,) = torch.autograd.grad(expected_loss, log_alpha)
    assert torch.allclose(enumerated(loss_of, log_alpha), slope, rtol=0, atol=1e-14)


# estimates


def test_noise_is_logistic_and_bounded() -> None:
    noise = logistic_noise(1_000_000, generator=torch.Generator().manual_seed(1))
    assert noise.dtype == torch.float32
    assert noise.abs().max().item() <= log((1 - EPS) / EPS) + 0.07  # float32 knows 1 - EPS to 6 %
    for threshold in (-3.0, 0.0, 1.5):
        assert_mean((noise > threshold).float(), torch.tensor(-threshold).sigmoid())


@pytest.mark.parametrize("baseline", [0.0, 3.0])
def test_reinforce_is_unbiased(baseline: float) -> None:
    estimates = reinforce(loss_of, LOG_ALPHA, baseline=baseline, noise=noises()[0])
    assert estimates.shape == (DRAWS, 4)
    assert_mean(estimates, enumerated(loss_of, LOG_ALPHA))


@pytest.mark.parametrize(("eta", "temperature"), [(1.0, 0.5), (0.6, 0.1), (-2.0, 1.5)])
def test_rebar_is_unbiased(eta: float, temperature: float) -> None:
    estimates = rebar(loss_of, LOG_ALPHA, eta=eta, temperature=temperature, noises=noises(seed=2))
    assert_mean(estimates, enumerated(loss_of, LOG_ALPHA))


@pytest.mark.parametrize("seed", [0, 1])
def test_relax_is_unbiased_with_any_control_variate(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inner, outer = torch.randn(4, 6, generator=generator), torch.randn(6, generator=generator)

    def control(z: Tensor) -> Tensor:
        return 0.4 + (z @ inner).tanh() @ outer

    estimates = relax(loss_of, control, LOG_ALPHA, noises=noises(seed=seed + 3))
    assert_mean(estimates, enumerated(loss_of, LOG_ALPHA))
    assert (estimates - reinforce(loss_of, LOG_ALPHA, noise=noises(seed=seed + 3)[0])).abs().mean() > 0.1


def test_relax_by_hand() -> None:
    """theta = v = 1/2, z = 1, b = 1: z~ = log(1 + 1 + 1), which moves with log_alpha by 2/3 * 1/2; c(z) = z^2."""
    given = torch.tensor([1.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    estimate = relax(lambda b: 7 * b[..., 0], lambda z: z[..., 0] ** 2, torch.zeros(1).double(), noises=given)
    assert estimate.tolist() == pytest.approx([(7 - log(3) ** 2) * 0.5 + 2 * 1 - 2 * log(3) / 3], abs=1e-12)


def test_a_control_variate_takes_most_of_the_variance() -> None:
    plain = reinforce(loss_of, LOG_ALPHA, noise=noises()[0]).var(0).sum()
    assert rebar(loss_of, LOG_ALPHA, noises=noises()).var(0).sum() < 0.3 * plain

    def linear(gates: Tensor) -> Tensor:
        return 5 + gates.sum(-1)

    def control(z: Tensor) -> Tensor:
        return linear((z / 0.1).sigmoid())

    plain = reinforce(linear, LOG_ALPHA, noise=noises()[0]).var(0).sum()
    assert relax(linear, control, LOG_ALPHA, noises=noises()).var(0).sum() < 0.1 * plain


def test_rebar_without_eta_is_reinforce() -> None:
    given = noises(100)
    expected = reinforce(loss_of, LOG_ALPHA, noise=given[0])
    assert torch.allclose(rebar(loss_of, LOG_ALPHA, eta=0.0, noises=given), expected, rtol=0, atol=1e-6)


def test_relaxed_gates_given_the_hard_ones_follow_the_paper() -> None:
    """z~ = log_alpha + logit(u~), u~ = v theta + 1 - theta if b else v (1 - theta)."""
    log_alpha = torch.linspace(-4, 4, 9, dtype=torch.float64)
    v = torch.linspace(0.01, 0.99, 7, dtype=torch.float64).unsqueeze(-1)
    theta = log_alpha.sigmoid()
    for gate, u in ((1.0, v * theta + 1 - theta), (0.0, v * (1 - theta))):
        z = relaxed_given(torch.tensor(gate).double(), log_alpha, v.logit())
        assert torch.allclose(z, log_alpha + u.logit(), rtol=0, atol=1e-12)
        assert ((z > 0) == bool(gate)).all()


def test_relaxed_gates_given_the_hard_ones_are_distributed_like_the_relaxed_ones() -> None:
    first, second = noises()
    gates = (LOG_ALPHA + first > 0).float()
    again = relaxed_given(gates, LOG_ALPHA, second)
    for threshold in (-2.0, -0.3, 0.0, 0.5, 3.0):
        assert_mean((again > threshold).float(), (LOG_ALPHA - threshold).sigmoid())


def test_relaxed_gates_stay_finite_where_one_value_is_nearly_certain() -> None:
    log_alpha = torch.tensor([-40.0, 40.0]).requires_grad_()
    z = relaxed_given(torch.tensor([1.0, 0.0]), log_alpha, torch.tensor([13.8, -13.8]))
    z.sum().backward()
    assert z.isfinite().all()
    assert log_alpha.grad is not None
    assert log_alpha.grad.isfinite().all()


def test_one_draw_comes_from_the_generator() -> None:
    state = torch.get_rng_state()
    for estimate in (reinforce, rebar):
        one, same, other = (estimate(loss_of, LOG_ALPHA, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6))
        assert one.shape == LOG_ALPHA.shape
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_estimates_carry_no_graph_and_leave_gradients_alone() -> None:
    log_alpha = LOG_ALPHA.clone().requires_grad_()
    with torch.no_grad():  # as in a hook of an optimizer
        estimates = [rebar(loss_of, log_alpha), reinforce(loss_of, log_alpha), enumerated(loss_of, log_alpha)]
    assert not any(estimate.requires_grad for estimate in estimates)
    assert log_alpha.grad is None


@pytest.mark.parametrize("temperature", [0.0, -1.0, inf])
def test_temperature_out_of_range(temperature: float) -> None:
    message = rf"`temperature` of the relaxed gates is above 0; got {temperature}\. REBAR starts"
    with pytest.raises(ValueError, match=message):
        rebar(loss_of, LOG_ALPHA, temperature=temperature)
    with pytest.raises(ValueError, match=message):
        Bernoulli(4, temperature=temperature)


@pytest.mark.parametrize("shape", [(21,), (2, 2)])
def test_too_many_gates_to_go_through(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`log_alpha` is a vector of at most 20 gates.* got shape .*`relax`"):
        enumerated(loss_of, torch.zeros(shape))


# gates that learn by them


def bernoulli(log_alpha: Tensor = LOG_ALPHA, **settings: float) -> Bernoulli:
    gate = Bernoulli(*log_alpha.shape, **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        gate.log_alpha.copy_(log_alpha)
    return gate


def step(gate: Bernoulli, generator: torch.Generator | None = None) -> Tensor:
    gate.log_alpha.grad = None
    gate.draw(generator)
    loss = loss_of(gate.values(training=True).flatten())
    loss.backward()
    gate.take(loss)
    assert gate.log_alpha.grad is not None
    return gate.log_alpha.grad


def test_take_is_unbiased_while_its_control_variate_moves() -> None:
    gate, generator, draws = bernoulli(), torch.Generator().manual_seed(0), 1000
    estimates = torch.stack([step(gate, generator) for _ in range(draws)])
    truth = enumerated(loss_of, LOG_ALPHA)
    assert gate.slope.abs().min() > 1e-3
    assert_mean(estimates, truth)
    plain = reinforce(loss_of, LOG_ALPHA, noise=noises(20_000)[0]).var(0).sum()
    assert estimates[100:].var(0).sum() < 0.3 * plain


def test_take_is_unbiased_with_a_strange_control_variate() -> None:
    gate, generator = bernoulli(), torch.Generator().manual_seed(1)
    estimates = []
    for _ in range(500):
        gate.slope.copy_(torch.tensor([2.0, -1.0, 0.5, 3.0]))
        gate.offset.fill_(-1.5)
        estimates.append(step(gate, generator))
    assert_mean(torch.stack(estimates), enumerated(loss_of, LOG_ALPHA))


def test_take_is_relax_and_moves_its_control_variate_afterwards() -> None:
    gate = bernoulli(temperature=0.7, momentum=0.75)
    slope = torch.tensor([2.0, -1.0, 0.5, 3.0])
    gate.slope.copy_(slope)
    gate.offset.fill_(4.0)
    found = step(gate)

    def control(z: Tensor) -> Tensor:
        return 4 + (slope * (z / 0.7).sigmoid()).sum(-1)

    expected = relax(loss_of, control, LOG_ALPHA, noises=(gate.noise, gate.second_noise))
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    sample = (LOG_ALPHA + gate.noise > 0).float().requires_grad_()
    loss = loss_of(sample)
    (gradient,) = torch.autograd.grad(loss, sample)
    assert torch.allclose(gate.slope, 0.75 * slope + 0.25 * gradient, rtol=0, atol=1e-5)
    left = loss.item() - (slope * sample).sum().item()
    assert gate.offset.item() == pytest.approx(0.75 * 4 + 0.25 * left, abs=1e-5)


def test_take_adds_to_the_gradient_that_is_there() -> None:
    gate = bernoulli()
    gate.draw(torch.Generator().manual_seed(0))
    loss = loss_of(gate.values(training=True))
    (loss + 5 * gate.open_probability().sum()).backward()
    assert gate.log_alpha.grad is not None
    before = gate.log_alpha.grad.clone()
    assert torch.allclose(before, 5 * LOG_ALPHA.sigmoid() * (1 - LOG_ALPHA.sigmoid()))
    gate.take(loss)
    assert torch.allclose(gate.log_alpha.grad - before, step(bernoulli(), torch.Generator().manual_seed(0)), atol=1e-6)


def test_the_backward_pass_leaves_a_gradient_of_zero_for_ddp() -> None:
    gate = bernoulli()
    gate.draw()
    loss_of(gate.values(training=True)).backward()
    assert gate.log_alpha.grad is not None
    assert gate.log_alpha.grad.tolist() == [0.0] * 4
    assert gate.sample.grad is not None
    assert gate.sample.grad.abs().sum() > 0


def test_several_passes_share_a_sample_and_their_gradients_add_up() -> None:
    gate = bernoulli()
    gate.draw()
    first = gate.values(training=True)
    second = gate.values(training=True)
    assert torch.equal(first, second)
    (3 * first.sum()).backward()
    (4 * second.sum()).backward()
    assert gate.sample.grad is not None
    assert gate.sample.grad.tolist() == [7.0] * 4


def test_gates_of_any_shape_and_in_half_can_take() -> None:
    gate = bernoulli(LOG_ALPHA.view(2, 2)).half()
    gradient = step(gate)
    assert gradient.shape == (2, 2)
    assert gradient.dtype == gate.slope.dtype == torch.float16
    assert gate.values(training=True).dtype == torch.float32
    assert gradient.isfinite().all()


def test_a_loss_that_overflows_does_not_stay_in_the_control_variate() -> None:
    gate = bernoulli()
    gate.draw()
    loss = gate.values(training=True).sum() * torch.tensor([inf])
    loss.backward()
    gate.take(loss)
    assert gate.slope.tolist() == [0.0] * 4
    assert gate.offset.item() == 0


def test_a_new_noise_is_a_new_sample() -> None:
    """As after a cut, which leaves fewer gates."""
    gate = bernoulli()
    gate.draw()
    assert gate.values(training=True).shape == (4,)
    gate.log_alpha = torch.nn.Parameter(LOG_ALPHA[:2].clone())
    gate.noise = torch.zeros(2)
    assert gate.values(training=True).tolist() == [0.0, 1.0]


def test_take_without_a_backward_pass() -> None:
    gate = bernoulli()
    message = r"No gradient has reached this draw .*Call `draw`, .* once for each draw"
    with pytest.raises(PruningError, match=message):
        gate.take(torch.tensor(1.0))
    step(gate)
    with pytest.raises(PruningError, match=message):
        gate.take(torch.tensor(1.0))


def test_take_wants_one_number() -> None:
    with pytest.raises(ValueError, match=r"`loss` is one number; got shape \(3,\)\. Give what was backpropagated"):
        bernoulli().take(torch.zeros(3))


def test_bernoulli_refuses_a_sample_per_example() -> None:
    with pytest.raises(ValueError, match=r"`examples` must be None, .*; got 8\. Share one sample .* HardConcrete"):
        bernoulli().draw(examples=8)
    with pytest.raises(ValueError, match="`examples` must be None"):
        bernoulli()(torch.ones(8, 4), per_example=True)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_out_of_range(momentum: float) -> None:
    with pytest.raises(ValueError, match=rf"`momentum` .* in \[0, 1\); got {momentum}\. Try 0\.9"):
        Bernoulli(4, momentum=momentum)


def test_gates_learn_which_channels_help() -> None:
    """Of four channels two help and two harm: descent on the estimates opens the one and shuts the other kind."""
    gate, generator = bernoulli(torch.zeros(4)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    wanted = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for _ in range(150):
        optimizer.zero_grad()
        gate.draw(generator)
        loss = F.mse_loss(gate.values(training=True), wanted)
        loss.backward()
        gate.take(loss)
        optimizer.step()
    assert gate.test_values().tolist() == wanted.tolist()
    assert (gate.log_alpha.abs() > 1.5).all()

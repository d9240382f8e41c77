"""Stochastic gates: their probabilities against samples, what they are at test time, and how they live in a network."""

from __future__ import annotations

import pickle
from copy import deepcopy
from math import inf, log, nan

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.layers import Bernoulli, Gate, HardConcrete

SAMPLES = 1_000_000
KINDS = [HardConcrete, Bernoulli]
STRETCHES = [(2 / 3, -0.1, 1.1), (0.3, -0.05, 1.3), (1.0, -0.4, 1.02), (2.0, -0.1, 1.1)]
FINE = np.polynomial.legendre.leggauss(200)
LOGITS = (-3.0, -1.0, 0.0, 0.7, 4.0)


def gate_at(*log_alpha: float, kind: type[Gate] = HardConcrete, **settings: float) -> Gate:
    gate = kind(len(log_alpha), **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor(log_alpha))
    return gate


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_mean(samples: Tensor, expected: Tensor) -> None:
    """The mean of samples along the last dimension is what is expected within 4 standard errors."""
    error = samples.double().std(-1) / samples.shape[-1] ** 0.5
    assert ((samples.double().mean(-1) - expected.double()).abs() <= 4 * error + 1e-7).all()


def fine_mean(log_alpha: float, beta: float, gamma: float, zeta: float) -> float:
    """E[z] over the uniform noise itself: the integral of z(u), split where z leaves 0 and reaches 1."""
    bounds = [(0 - gamma) / (zeta - gamma), (1 - gamma) / (zeta - gamma)]
    low, high = (1 / (1 + np.exp(-(beta * np.log(s / (1 - s)) - log_alpha))) for s in bounds)
    u = low + (high - low) * (FINE[0] + 1) / 2
    s = 1 / (1 + np.exp(-(np.log(u) - np.log1p(-u) + log_alpha) / beta))
    return float(1 - high + ((s * (zeta - gamma) + gamma) * FINE[1]).sum() * (high - low) / 2)


# probabilities


@pytest.mark.parametrize(("beta", "gamma", "zeta"), STRETCHES)
def test_probabilities_and_mean_are_those_of_samples(beta: float, gamma: float, zeta: float) -> None:
    gate = gate_at(*LOGITS, beta=beta, gamma=gamma, zeta=zeta)
    gate.draw(seeded(), examples=SAMPLES)
    samples = gate.values(training=True).detach().T
    assert samples.shape == (5, SAMPLES)
    assert_mean((samples != 0).float(), gate.open_probability().detach())
    assert_mean((samples == 1).float(), gate.full_probability().detach())
    assert_mean(samples, gate.mean().detach())
    assert samples.min() == 0
    assert samples.max() == 1


@pytest.mark.parametrize(("beta", "gamma", "zeta"), [*STRETCHES, (0.05, -0.1, 1.1), (0.5, -1e-3, 1.001)])
def test_mean_is_exact_to_a_millionth(beta: float, gamma: float, zeta: float) -> None:
    logits = np.linspace(-5, 5, 21)
    gate = gate_at(*logits.tolist(), beta=beta, gamma=gamma, zeta=zeta)
    expected = [fine_mean(logit, beta, gamma, zeta) for logit in logits]
    assert gate.mean().tolist() == pytest.approx(expected, abs=1e-6)


def test_mean_is_a_half_in_the_middle_and_symmetric_around_it() -> None:
    mean = gate_at(-2.0, 0.0, 2.0).mean()
    assert mean[1].item() == pytest.approx(0.5, abs=1e-6)
    assert (mean[0] + mean[2]).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("drop_rate", "expected"), [(0.2, 0.952), (0.5, 0.832), (0.3, 0.920)])
def test_open_probability_of_the_papers_drop_rates(drop_rate: float, expected: float) -> None:
    gate = gate_at(log((1 - drop_rate) / drop_rate))
    assert gate.open_probability().item() == pytest.approx(expected, abs=5e-4)


def test_full_probability_mirrors_open_probability() -> None:
    there, back = gate_at(0.4, -1.3), gate_at(-0.4, 1.3)
    assert torch.allclose(there.full_probability(), 1 - back.open_probability(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_slope_of_the_open_probability(kind: type[Gate]) -> None:
    gate = gate_at(*LOGITS, kind=kind)
    p = gate.open_probability()
    p.sum().backward()
    assert gate.log_alpha.grad is not None
    assert torch.allclose(gate.log_alpha.grad, (p * (1 - p)).detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("beta", "gamma", "zeta"), STRETCHES[:3])
def test_gradient_along_samples_is_that_of_the_mean(beta: float, gamma: float, zeta: float) -> None:
    logits, samples = torch.tensor([-2.0, 0.3, 1.5]), 300_000
    gate = HardConcrete(3, samples, beta=beta, gamma=gamma, zeta=zeta)
    with torch.no_grad():
        gate.log_alpha.copy_(logits.unsqueeze(-1).expand(-1, samples))
    gate.draw(seeded())
    gate.values(training=True).sum().backward()
    few = gate_at(*logits.tolist(), beta=beta, gamma=gamma, zeta=zeta)
    few.mean().sum().backward()
    assert gate.log_alpha.grad is not None
    assert few.log_alpha.grad is not None
    assert (few.log_alpha.grad > 0.01).all()
    assert_mean(gate.log_alpha.grad, few.log_alpha.grad)


def test_a_sample_by_hand() -> None:
    """s = sigmoid((noise + log_alpha) / beta): with beta 1/2 and logits that add up to log 2, 4/5, stretched to .86."""
    gate = gate_at(log(4.0), -9.0, 9.0, beta=0.5)
    gate.noise = torch.tensor([-log(2.0), 0.0, 0.0])
    assert gate.values(training=True).tolist() == pytest.approx([0.8 * 1.2 - 0.1, 0.0, 1.0])


def test_bernoulli_is_open_with_its_probability() -> None:
    gate = Bernoulli(4, 250_000)
    logits = torch.tensor([-2.0, -0.5, 0.5, 3.0])
    with torch.no_grad():
        gate.log_alpha.copy_(logits.unsqueeze(-1).expand(-1, 250_000))
    gate.draw(seeded())
    samples = gate.values(training=True).detach()
    assert samples.unique().tolist() == [0.0, 1.0]
    assert_mean(samples, logits.sigmoid())
    for probability in (gate.open_probability(), gate.full_probability(), gate.mean()):
        assert torch.equal(probability[:, 0], logits.sigmoid())


def test_log_alpha_starts_near_the_drop_rate() -> None:
    torch.manual_seed(0)
    for kind in KINDS:
        start = kind(20_000, drop_rate=0.2).log_alpha
        assert start.dtype == torch.float32
        assert start.mean().item() == pytest.approx(log(4), abs=4e-4)
        assert start.std().item() == pytest.approx(0.01, rel=0.03)


# test time


@pytest.mark.parametrize("beta", [2 / 3, 0.2])
def test_test_gate_shuts_and_opens_fully_at_log_11(beta: float) -> None:
    edge, step = log(11), 1e-5
    values = gate_at(-edge - step, -edge, -edge + step, 0.0, edge - step, edge, edge + step, beta=beta).test_values()
    assert values[0] == 0
    assert values[1].item() == pytest.approx(0, abs=2e-8)
    assert 0 < values[2] < 2e-6
    assert values[3].item() == pytest.approx(0.5)
    assert 1 - 2e-6 < values[4] < 1
    assert values[5].item() == pytest.approx(1, abs=2e-7)
    assert values[6] == 1


def test_a_gate_is_shut_at_test_time_long_before_its_samples_are() -> None:
    gate = gate_at(-log(11) - 1e-5, 3.0)
    assert gate.is_open().tolist() == [False, True]
    assert gate.open_probability()[0].item() == pytest.approx(0.31, abs=1e-3)


def test_test_gate_of_bernoulli() -> None:
    assert gate_at(-1e-6, 0.0, 1e-6, kind=Bernoulli).test_values().tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_test_time_neither_samples_nor_touches_random_states(kind: type[Gate]) -> None:
    gate = gate_at(*LOGITS, kind=kind)
    gate.draw()
    gate.eval()
    noise, state, x = gate.noise.clone(), torch.get_rng_state(), torch.ones(3, 5)
    outputs = [gate(x), gate(x), gate(x, per_example=True)]
    assert torch.equal(gate.noise, noise)
    assert torch.equal(torch.get_rng_state(), state)
    for output in outputs:
        assert torch.equal(output, gate.test_values().expand(3, 5))
    assert torch.equal(gate.values(), gate.values(training=False))
    assert torch.equal(gate.train().values(training=False), outputs[0][0])


def test_guard_leaves_the_best_gate_its_mean() -> None:
    gate = gate_at(-4.0, -3.0, -5.0)
    assert gate.only_guard_holds().item() is True
    assert gate.test_values().tolist() == [0.0, gate.mean()[1].item(), 0.0]
    assert gate.test_values()[1].item() == pytest.approx(fine_mean(-3.0, 2 / 3, -0.1, 1.1), abs=1e-6)
    assert gate.is_open().tolist() == [False, True, False]


def test_guard_of_bernoulli() -> None:
    gate = gate_at(-4.0, -3.0, kind=Bernoulli)
    assert gate.test_values().tolist() == pytest.approx([0.0, torch.tensor(-3.0).sigmoid().item()])
    assert gate.only_guard_holds().item() is True


@pytest.mark.parametrize("kind", KINDS)
def test_guard_does_nothing_where_a_gate_is_open(kind: type[Gate]) -> None:
    guarded, plain = gate_at(-4.0, 0.5, -5.0, kind=kind), gate_at(-4.0, 0.5, -5.0, kind=kind, guarded=False)
    assert torch.equal(guarded.test_values(), plain.test_values())
    assert guarded.only_guard_holds().item() is False


@pytest.mark.parametrize("kind", KINDS)
def test_without_guard_all_gates_can_shut(kind: type[Gate]) -> None:
    gate = gate_at(-4.0, -3.0, kind=kind, guarded=False)
    assert gate.test_values().tolist() == [0.0, 0.0]
    assert not gate.is_open().any()
    assert gate.only_guard_holds().item() is False


def test_guard_keeps_one_of_equals_and_looks_at_all_dimensions() -> None:
    gate = HardConcrete(2, 3)
    with torch.no_grad():
        gate.log_alpha.fill_(-4.0)
    assert gate.is_open().sum().item() == 1
    with torch.no_grad():
        gate.log_alpha[1, 2] = -3.5
    assert gate.is_open().nonzero().tolist() == [[1, 2]]


def test_guard_does_not_hold_samples_open() -> None:
    gate = gate_at(-4.0, -4.0)
    gate.noise = torch.tensor([-1.0, -1.0])
    assert gate.values(training=True).tolist() == [0.0, 0.0]


# draws


@pytest.mark.parametrize("kind", KINDS)
def test_passes_share_a_sample_until_the_next_draw(kind: type[Gate]) -> None:
    gate = gate_at(*[0.0] * 50, kind=kind)
    gate.draw(seeded())
    first = gate.values()
    assert torch.equal(first, gate.values())
    first.sum().backward()
    gate.values().sum().backward()
    gate.draw(seeded(1))
    assert not torch.equal(first, gate.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_gives_the_same_draws_and_leaves_torchs_own_alone(kind: type[Gate]) -> None:
    one, other = gate_at(*LOGITS, kind=kind), gate_at(*LOGITS, kind=kind)
    state, a, b = torch.get_rng_state(), seeded(3), seeded(3)
    for _ in range(3):
        one.draw(a)
        other.draw(b)
        assert torch.equal(one.noise, other.noise)
        assert torch.equal(one.values(), other.values())
    assert torch.equal(torch.get_rng_state(), state)
    if isinstance(one, Bernoulli) and isinstance(other, Bernoulli):
        assert torch.equal(one.second_noise, other.second_noise)
        assert not torch.equal(one.second_noise, one.noise)


def test_a_sample_for_each_example() -> None:
    gate = HardConcrete(30)
    gate.draw(seeded(), examples=4)
    values = gate.values()
    assert values.shape == gate.noise.shape == (4, 30)
    assert len(values.unique(dim=0)) == 4
    gate.draw(seeded())
    assert gate.values().shape == (30,)


# as a layer


def test_layer_multiplies_along_dimension_1() -> None:
    gate = gate_at(-9.0, 0.0, 9.0).eval()
    x = torch.arange(24.0).view(2, 3, 2, 2)
    expected = x * torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1)
    assert torch.allclose(gate(x), expected)
    assert torch.allclose(gate(x[..., 0, 0]), expected[..., 0, 0])


def test_layer_draws_one_sample_per_batch_or_per_example() -> None:
    gate, x = HardConcrete(40), torch.ones(3, 40, 2)
    shared, again, own = gate(x), gate(x), gate(x, per_example=True)
    assert torch.equal(shared[0], shared[2])
    assert not torch.equal(shared, again)
    assert len(own.unique(dim=0)) == 3
    assert torch.equal(own[..., 0], gate.values())
    assert torch.equal(own[..., 0], own[..., 1])


def test_layer_over_several_dimensions() -> None:
    gate, x = HardConcrete(3, 2), torch.ones(4, 3, 2, 5)
    assert torch.equal(gate(x)[1, :, :, 2], gate.values())
    assert torch.equal(gate(x, per_example=True)[..., 2], gate.values())


@pytest.mark.parametrize("shape", [(2, 1), (2, 4), (3,), (2, 4, 3)])
def test_layer_refuses_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`x` has the gates' shape \(3,\) behind .* got .*Build the gate with Hard"):
        HardConcrete(3)(torch.ones(shape))


# kinds of numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gates_are_computed_in_float32(kind: type[Gate], dtype: torch.dtype) -> None:
    gate = gate_at(*LOGITS, kind=kind).to(dtype)
    exact = gate_at(*gate.log_alpha.float().tolist(), kind=kind)
    gate.draw(seeded())
    exact.draw(seeded())
    assert gate.log_alpha.dtype == dtype
    assert gate.noise.dtype == torch.float32
    for name in ("test_values", "open_probability", "full_probability", "mean", "values"):
        value = getattr(gate, name)()
        assert value.dtype == torch.float32, name
        assert torch.equal(value, getattr(exact, name)()), name
    gate.values().sum().backward()
    assert gate.log_alpha.grad is not None
    assert gate.log_alpha.grad.dtype == dtype
    assert gate(torch.ones(2, 5, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind: type[Gate]) -> None:
    gate = gate_at(*LOGITS, kind=kind)
    gate.draw(seeded())
    names = ("test_values", "open_probability", "full_probability", "mean", "values")
    expected = {name: getattr(gate, name)() for name in names}
    with torch.autocast("cpu", torch.bfloat16):
        for name in names:
            assert torch.equal(getattr(gate, name)(), expected[name]), name
        assert gate(torch.ones(2, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_default_dtype_does_not_matter() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        gate = Bernoulli(3)
        gate.draw()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in (gate.log_alpha, *gate.buffers())} == {torch.float32}


# life in a network


@pytest.mark.parametrize("kind", KINDS)
def test_copies_keep_the_sample(kind: type[Gate]) -> None:
    gate = gate_at(*LOGITS, kind=kind)
    gate.draw()
    expected = gate.values()
    for copy in (deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert torch.equal(copy.values(), expected)
        assert copy.settings == gate.settings
        copy.values().sum().backward()
        assert gate.log_alpha.grad is None


def test_state_dict_holds_what_is_learned_and_not_the_noise() -> None:
    assert set(HardConcrete(3).state_dict()) == {"log_alpha"}
    assert set(Bernoulli(3).state_dict()) == {"log_alpha", "slope", "offset"}


@pytest.mark.parametrize(
    "gate",
    [
        HardConcrete(3, 2, drop_rate=0.3, guarded=False, beta=0.5, gamma=-0.2, zeta=1.3),
        Bernoulli(3, 2, drop_rate=0.3, guarded=False, temperature=0.2, momentum=0.99),
    ],
)
def test_settings_make_such_a_gate_again(gate: Gate) -> None:
    again = type(gate)(*gate.shape, **gate.settings)
    again.load_state_dict(gate.state_dict())
    assert again.settings == gate.settings
    assert all(type(value) in (float, bool) for value in gate.settings.values())
    assert torch.equal(again.mean(), gate.mean())
    assert not torch.equal(again.mean(), type(gate)(*gate.shape).mean())
    assert repr(gate).startswith(f"{type(gate).__name__}(3, 2, drop_rate=0.3, guarded=0")


@pytest.mark.parametrize("kind", KINDS)
def test_clamp_holds_log_alpha_in_place(kind: type[Gate]) -> None:
    gate = gate_at(-9.0, -1.0, 9.0, kind=kind)
    parameter = gate.log_alpha
    gate.clamp_()
    assert gate.log_alpha is parameter
    assert parameter.is_leaf
    assert parameter.requires_grad
    assert parameter.tolist() == pytest.approx([log(1e-2), -1.0, log(1e2)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log_alpha", [(-4.0, -3.0), (1.0, -3.0)], ids=["guard", "open"])
def test_compiles_and_exports_as_one_graph(kind: type[Gate], log_alpha: tuple[float, float]) -> None:
    gate, x = gate_at(*log_alpha, kind=kind).eval(), torch.ones(3, 2, 4)
    expected = gate(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(gate, fullgraph=True, backend="eager")(x), expected)
    assert torch.equal(torch.export.export(nn.Sequential(gate), (x,)).module()(x), expected)


def test_a_gate_on_the_meta_device_can_be_made_real() -> None:
    with torch.device("meta"):
        gate = HardConcrete(3)
    gate = gate.to_empty(device="cpu")
    gate.reset_parameters()
    gate.draw(seeded())
    with torch.device("meta"):
        gate.draw(seeded())
    twin = gate_at(*gate.log_alpha.tolist())
    twin.draw(seeded())
    assert torch.equal(gate.values(), twin.values())
    assert torch.equal(gate.mean(), twin.mean())


# bad arguments


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drop_rate", [0.0, 1.0, -0.5, nan])
def test_drop_rate_out_of_range(kind: type[Gate], drop_rate: float) -> None:
    with pytest.raises(ValueError, match=rf"`drop_rate` .* in \(0, 1\); got {drop_rate}\. 0\.5 is usual"):
        kind(3, drop_rate=drop_rate)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (0,), (3, -1)])
def test_shape_out_of_range(kind: type[Gate], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`shape` is one or more sizes, each 1 or more; got \(.*\)\. Give the number"):
        kind(*shape)


@pytest.mark.parametrize(
    ("name", "value"),
    [("beta", 0.0), ("beta", inf), ("gamma", 0.0), ("gamma", 0.1), ("gamma", nan), ("zeta", 1.0), ("zeta", inf)],
)
def test_stretch_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` is the .*; got {value}\. The paper has"):
        HardConcrete(3, **{name: value})  # type: ignore[arg-type]


def test_examples_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"`examples` is the size of the batch, 1 or more; got 0\. None shares"):
        HardConcrete(3).draw(examples=0)

"""Whitening: Newton's iteration against eigh, the moments of channels, and what decorrelation makes of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from lightning_prune.layers import BatchDecorrelation
from lightning_prune.layers.whitening import Moments, inverse_root


def with_condition(condition: float, size: int = 16, seed: int = 0) -> Tensor:
    """A covariance whose eigenvalues go down from 3 in equal ratios, (d, d)."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    values = 3 * condition ** -torch.linspace(0, 1, size, dtype=torch.float64)
    covariance = basis @ values.diag() @ basis.T
    return 0.5 * (covariance + covariance.T)


def normalised(covariance: Tensor, eps: float = 0.0) -> Tensor:
    raised = covariance + eps * torch.eye(len(covariance), dtype=covariance.dtype)
    return raised / raised.trace()


def exact_root(covariance: Tensor) -> Tensor:
    values, basis = torch.linalg.eigh(normalised(covariance))
    return basis @ values.rsqrt().diag() @ basis.T


def uncoupled(covariance: Tensor, iterations: int) -> Tensor:
    """P_k = (3 P - P^3 N) / 2, as it stands in the paper."""
    n, p = normalised(covariance), torch.eye(len(covariance), dtype=covariance.dtype)
    for _ in range(iterations):
        p = 1.5 * p - 0.5 * p @ p @ p @ n
    return p


def away_from_root(covariance: Tensor, inverse: Tensor) -> float:
    """How far P N P is from I."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    return float((inverse @ normalised(covariance) @ inverse - eye).abs().max())


class TestInverseRoot:
    @pytest.mark.parametrize("condition", [1.0, 2.0, 4.0, 8.0])
    def test_ten_iterations_find_the_inverse_root(self, condition: float) -> None:
        """The smallest eigenvalue of N is to be above 0.0063; here it is so up to condition 8."""
        covariance = with_condition(condition)
        found = inverse_root(covariance, iterations=10, eps=0.0)
        assert torch.allclose(found, exact_root(covariance), rtol=0, atol=1e-6)

    def test_ten_iterations_are_too_few_for_more(self) -> None:
        """So that the bound above says something."""
        covariance = with_condition(100.0)
        assert away_from_root(covariance, inverse_root(covariance, iterations=10, eps=0.0)) > 1e-4

    @pytest.mark.parametrize("iterations", range(1, 7))
    @pytest.mark.parametrize("condition", [3.0, 50.0, 1e4])
    def test_it_is_the_papers_iteration(self, iterations: int, condition: float) -> None:
        covariance = with_condition(condition)
        found = inverse_root(covariance, iterations=iterations, eps=0.0)
        assert torch.allclose(found, uncoupled(covariance, iterations), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("condition", [36.0, 45.0, 62.0, 1e3, 1e4])
    def test_many_iterations_do_not_let_rounding_grow(self, condition: float) -> None:
        covariance = with_condition(condition)
        for iterations in (25, 40):
            inverse = inverse_root(covariance, iterations=iterations, eps=0.0)
            assert away_from_root(covariance, inverse) < 1e-9
            assert torch.allclose(inverse, inverse.T, rtol=0, atol=1e-8)

    def test_the_papers_form_lets_it_grow(self) -> None:
        covariance = with_condition(1e4)
        assert not away_from_root(covariance, uncoupled(covariance, 40)) < 1.0

    def test_three_iterations_are_a_polynomial_of_the_eigenvalues(self) -> None:
        shares = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 - 21 / 64], dtype=torch.float64)
        found = inverse_root(7 * shares.diag(), iterations=3, eps=0.0)
        p = torch.ones_like(shares)
        for _ in range(3):
            p = 1.5 * p - 0.5 * p**3 * shares
        assert torch.allclose(found, p.diag(), rtol=0, atol=1e-12)
        assert found.diagonal()[:3].tolist() == pytest.approx([1.95, 2.87, 3.23], abs=5e-3)
        alone = inverse_root(torch.full((1, 1), 5.0), iterations=3, eps=0.0)
        assert alone.item() == pytest.approx(1.0, abs=1e-6)

    def test_no_iteration_is_the_identity(self) -> None:
        assert torch.equal(inverse_root(with_condition(9.0), iterations=0, eps=0.0), torch.eye(16).double())

    def test_eps_is_added_before_the_trace_is_taken(self) -> None:
        covariance = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
        found = inverse_root(covariance, iterations=30, eps=0.5)
        assert torch.allclose(found, (torch.tensor([1.5, 0.5]) / 2.0).rsqrt().diag().double())

    def test_groups_do_not_know_of_each_other(self) -> None:
        several = torch.stack([with_condition(4.0, 5, seed=1), 1e3 * with_condition(30.0, 5, seed=2)])
        found = inverse_root(several, iterations=4, eps=1e-5)
        for one, inverse in zip(several, found, strict=True):
            assert torch.allclose(inverse, inverse_root(one, iterations=4, eps=1e-5), atol=1e-12)

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(
        seed=st.integers(0, 10_000),
        size=st.integers(1, 12),
        rank=st.integers(0, 12),
        scale=st.floats(-4, 4),
        iterations=st.integers(1, 12),
    )
    def test_properties(self, seed: int, size: int, rank: int, scale: float, iterations: int) -> None:
        """Between I and the inverse root, one more iteration is nearer, for any positive semidefinite matrix."""
        draws = torch.randn(size, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        covariance, eps = 10**scale * draws @ draws.T, 1e-5
        found = inverse_root(covariance, iterations=iterations, eps=eps)
        assert found.isfinite().all()
        n = normalised(covariance, eps)
        reached = torch.linalg.eigvalsh(0.5 * (found + found.T) @ n @ found)
        assert reached.max() <= 1 + 1e-8
        values = torch.linalg.eigvalsh(0.5 * (found + found.T))
        assert values.min() >= 1 - 1e-8
        further = inverse_root(covariance, iterations=iterations + 1, eps=eps)
        assert torch.linalg.eigvalsh(0.5 * (further - found + (further - found).T)).min() >= -1e-7 * values.max()


X = torch.randn(6, 2, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
"""Six examples, 2 groups of 4 channels, 9 positions."""


def covariance_of(x: Tensor) -> Tensor:
    return Moments.of(x).covariance(over_ranks=True)


def reference_covariance(x: Tensor) -> Tensor:
    return torch.stack([torch.cov(group.transpose(0, 1).flatten(1), correction=0) for group in x.unbind(1)])


class TestMoments:
    def test_the_covariance_is_that_of_all_examples_and_positions(self) -> None:
        mixed = X + 3 * X.roll(1, 2) + torch.arange(6.0).view(6, 1, 1, 1)
        assert torch.allclose(covariance_of(mixed), reference_covariance(mixed), rtol=0, atol=1e-12)

    def test_the_variance_is_that_of_each_example(self) -> None:
        away = X + torch.arange(6.0).view(6, 1, 1, 1)
        assert torch.allclose(Moments.of(away).variance(), away.var(-1, correction=0), rtol=0, atol=1e-12)

    def test_a_large_mean_costs_no_digits(self) -> None:
        far = X.float() + 1e4  # 3 to 4 digits are left of x itself
        known = far.double()
        for found, exact in (
            (covariance_of(far), reference_covariance(known)),
            (Moments.of(far).variance(), known.var(-1, correction=0)),
        ):
            assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-5)

    def test_a_variance_is_never_below_0(self) -> None:
        flat = torch.randn(50, 1, 4, 1).expand(50, 1, 4, 7) * 1e3
        variance = Moments.of(flat).variance()
        assert variance.min() >= 0
        assert variance.max() < 1e-6 * flat.square().max()

    def test_gradients(self) -> None:
        x = X[:3, :, :3, :4].clone().requires_grad_()
        assert gradcheck(covariance_of, x)
        assert gradgradcheck(covariance_of, x)
        assert gradcheck(lambda x: Moments.of(x).variance(), x)
        assert gradgradcheck(lambda x: Moments.of(x).variance(), x)

    def test_gradients_are_those_of_the_plain_formula(self) -> None:
        x, weight = X.clone().requires_grad_(), torch.randn(2, 4, 4, dtype=torch.float64)
        found, expected = (
            torch.autograd.grad((function(x) * weight).sum(), x)[0]
            for function in (covariance_of, reference_covariance)
        )
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)

    def test_they_go_through_vmap(self) -> None:
        batches = torch.stack([X, X.flip(0) * 2, X.roll(1, 2)])
        found = torch.func.vmap(covariance_of)(batches)
        assert torch.allclose(found, torch.stack([reference_covariance(x) for x in batches]), rtol=0, atol=1e-12)
        total = torch.func.grad(lambda x: covariance_of(x).square().sum())
        found = torch.func.vmap(total)(batches)
        assert torch.allclose(found, torch.stack([total(x) for x in batches]), rtol=0, atol=1e-12)


def tangled(channels: int = 8, seed: int = 0, examples: int = 64) -> Tensor:
    """Channels that depend on each other, at 5 x 5 positions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, channels, 5, 5, dtype=torch.float64, generator=generator)
    mix = torch.eye(channels) + 0.2 * torch.randn(channels, channels, generator=generator)
    return torch.einsum("oc,nchw->nohw", mix.double(), x) + torch.arange(channels).view(-1, 1, 1)


def over_channels(x: Tensor) -> Tensor:
    return torch.cov(x.transpose(0, 1).flatten(1), correction=0)


class TestDecorrelation:
    @pytest.mark.parametrize(("eps", "tolerance"), [(1e-5, 1e-3), (1e-12, 1e-7)])
    def test_all_channels_share_the_energy(self, eps: float, tolerance: float) -> None:
        """The covariance of the output is tr(Sigma) I."""
        x = tangled()
        iterations = 10 if eps == 1e-5 else 20
        found = over_channels(BatchDecorrelation(8, iterations=iterations, eps=eps).double()(x))
        trace = over_channels(x).trace()
        assert torch.allclose(found, trace * torch.eye(8).double(), rtol=0, atol=tolerance * float(trace))

    def test_each_group_for_itself(self) -> None:
        x = tangled()
        y = BatchDecorrelation(8, group_size=4, iterations=10).double()(x)
        for own in (slice(0, 4), slice(4, 8)):
            alone = BatchDecorrelation(4, iterations=10).double()(x[:, own])
            assert torch.allclose(y[:, own], alone, rtol=0, atol=1e-10)
            energy = over_channels(x[:, own]).trace()
            found = over_channels(y[:, own])
            assert torch.allclose(found, energy * torch.eye(4).double(), rtol=0, atol=1e-3 * float(energy))
        assert over_channels(y)[:4, 4:].abs().max() > 0.1

    def test_the_input_is_not_centred(self) -> None:
        x = tangled()
        block = BatchDecorrelation(8).double()
        whitening = inverse_root(over_channels(x), iterations=3, eps=1e-5)
        assert torch.allclose(block(x), torch.einsum("oc,nchw->nohw", whitening, x), rtol=0, atol=1e-10)

    def test_scales_grow(self) -> None:
        """Proposition 1: |diag(P_T)_c gamma_c| >= |gamma_c|, strictly if channels are several."""
        for seed in range(200):
            generator = torch.Generator().manual_seed(seed)
            size = int(torch.randint(2, 17, (), generator=generator))
            draws = torch.randn(size, 40, dtype=torch.float64, generator=generator)
            gamma = torch.randn(size, dtype=torch.float64, generator=generator)
            correlation = torch.corrcoef(draws)
            whitening = inverse_root(gamma[:, None] * gamma * correlation, iterations=3, eps=1e-5)
            assert ((whitening.diagonal() * gamma).abs() > gamma.abs()).all()

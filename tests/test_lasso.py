"""The LASSO on moments: coordinate descent against scikit-learn, and the path against coordinate descent."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune.errors import PruningError
from lightning_prune.lasso import LassoPath, choose, lasso, lasso_path, nested_errors

Rows = tuple[Tensor, Tensor]


def drawn(rows: int, channels: int, seed: int, *, factors: int = 0) -> Rows:
    """Rows Z and y; with factors, channels are what few factors leave above 0, and alike."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    z = normal(rows, channels)
    if factors:
        z = (normal(rows, factors) @ normal(factors, channels)).relu() + 0.3 * z
    return z, z @ normal(channels) + normal(rows)


def moments(rows: Rows) -> Rows:
    z, y = rows
    return z.T @ z / len(z), z.T @ y / len(z)


def missed(gram: Tensor, target: Tensor, coefficients: Tensor, alpha: float) -> float:
    """By how much the conditions of the optimum are missed, as a share of max |t|."""
    rest = target - gram @ coefficients
    active = coefficients != 0
    by = torch.where(active, (rest - alpha * coefficients.sign()).abs(), (rest.abs() - alpha).clamp(min=0))
    return float(by.max() / target.abs().max().clamp(min=1e-300))


def assert_optimal(path: LassoPath, gram: Tensor, target: Tensor, tolerance: float = 1e-9) -> None:
    """The path falls from max |t| to 0 and is optimal at its knots and between them."""
    assert float(path.alphas[0]) == float(target.abs().max())
    assert float(path.alphas[-1]) == 0
    assert (path.alphas.diff() < 0).all()
    for high, low in pairwise(path.alphas.tolist()):
        for alpha in (high, 0.7 * high + 0.3 * low, low):
            assert missed(gram, target, path.at(alpha), alpha) < tolerance


PROBLEMS = [
    pytest.param(drawn(50, 10, 0), id="independent"),
    pytest.param(drawn(200, 40, 1, factors=8), id="correlated"),
    pytest.param(drawn(100, 24, 2, factors=3), id="alike"),
    pytest.param(drawn(15, 25, 3), id="more channels than rows"),
]


# coordinate descent


@pytest.mark.parametrize("rows", PROBLEMS)
def test_coordinate_descent_is_that_of_scikit_learn(rows: Rows) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    gram, target = moments(rows)
    for share in (0.9, 0.5, 0.2, 0.05, 0.01):
        alpha = share * float(target.abs().max())
        model = linear_model.Lasso(alpha=alpha, fit_intercept=False, tol=1e-14, max_iter=1_000_000)
        expected = model.fit(rows[0].numpy(), rows[1].numpy()).coef_
        assert np.abs(lasso(gram, target, alpha, tolerance=1e-13).numpy() - expected).max() < 1e-8


def test_without_penalty_it_is_least_squares() -> None:
    z, y = drawn(100, 8, 4)
    assert torch.allclose(lasso(*moments((z, y)), 0.0), torch.linalg.lstsq(z, y.unsqueeze(1)).solution[:, 0], atol=1e-8)


def test_a_good_start_needs_no_sweep() -> None:
    gram, target = moments(drawn(50, 10, 0))
    solved = lasso(gram, target, 0.1)
    assert torch.equal(lasso(gram, target, 0.1, start=solved, most=1), solved)
    assert missed(gram, target, lasso(gram, target, 0.2, start=100 * solved), 0.2) < 1e-10


def test_no_convergence_is_an_error_with_the_way_out() -> None:
    gram, target = moments(drawn(200, 40, 1, factors=2))
    with pytest.raises(PruningError, match=r"after 10 sweeps.*`lasso_path`"):
        lasso(gram, target, 1e-6, most=10)


def test_float32_and_bfloat16_are_taken() -> None:
    gram, target = (given.float() for given in moments(drawn(50, 10, 0)))
    assert lasso(gram, target, 0.1).dtype == torch.float64
    assert len(choose(gram.bfloat16(), target.bfloat16(), 4)) == 4


# the path


def test_path_by_hand() -> None:
    """Channel 1 enters at |t| = 2 with slope 1; then r_0 = 1.5 - (2 - alpha) / 2 reaches alpha at 1."""
    path = lasso_path(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.tensor([1.5, 2.0]))
    assert path.alphas.tolist() == pytest.approx([2, 1, 0])
    assert path.coefficients.flatten().tolist() == pytest.approx([0, 0, 0, 1, 2 / 3, 5 / 3])
    assert path.entered == (1, 0)


@pytest.mark.parametrize("rows", PROBLEMS)
def test_path_is_coordinate_descent_at_and_between_its_knots(rows: Rows) -> None:
    gram, target = moments(rows)
    path = lasso_path(gram, target)
    assert_optimal(path, gram, target)
    for high, low in list(pairwise(path.alphas.tolist()))[:12]:
        for alpha in (high, (high + low) / 2):
            assert torch.allclose(path.at(alpha), lasso(gram, target, alpha, tolerance=1e-13), rtol=0, atol=1e-8)


def test_channels_fall_silent_and_come_back() -> None:
    """Somewhere fewer are active than before, and the path stays optimal."""
    gram, target = moments(drawn(60, 40, 5, factors=6))
    path = lasso_path(gram, target)
    active = (path.coefficients != 0).sum(1)
    assert (active.diff() < 0).any()
    assert_optimal(path, gram, target)


def test_path_above_its_start_and_below_its_end() -> None:
    gram, target = moments(drawn(50, 10, 0))
    path = lasso_path(gram, target, most=3)
    assert not path.at(2 * float(path.alphas[0])).any()
    assert (path.coefficients[-1] != 0).sum() == 3
    assert torch.equal(path.coefficients, lasso_path(gram, target).coefficients[: len(path.alphas)])
    with pytest.raises(ValueError, match="where this path ends"):
        path.at(0.99 * float(path.alphas[-1]))
    with pytest.raises(ValueError, match="got nan"):
        path.at(float("nan"))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), channels=st.integers(1, 14), rows=st.integers(1, 20), kind=st.integers(0, 3))
@example(seed=0, channels=14, rows=7, kind=1)
def test_path_is_optimal_and_every_count_is_met(seed: int, channels: int, rows: int, kind: int) -> None:
    """Normal, small integers (ties, dependences), equal or opposite twins, and channels of very different energy."""
    z, y = drawn(rows, channels, seed)
    if kind == 1:
        z, y = z.mul(1.5).round(), y.round()
    elif kind == 2:
        z[:, channels // 2 :] = -z[:, : channels - channels // 2]
        z[:, -1] = z[:, 0]
    elif kind == 3:
        z = z * 10 ** torch.linspace(-2, 1, channels, dtype=torch.float64)
    gram, target = moments((z, y))
    path = lasso_path(gram, target)
    if not target.any():
        assert path.alphas.tolist() == [0]
    else:
        assert_optimal(path, gram, target, 1e-8)
    for count in range(1, channels + 1):
        chosen = choose(gram, target, count)
        assert len(chosen) == count
        assert (chosen.diff() > 0).all()


NASTY = {
    "equal correlations": (0.5 * torch.eye(30) + 0.5, torch.ones(30)),
    "equal targets": (moments(drawn(60, 30, 6))[0], torch.ones(30)),
    "opposite": (torch.eye(30) * 31 / 30 - 1 / 30, torch.ones(30)),
    "twins": (torch.ones(30, 30), torch.ones(30)),
    "a chain": (0.9 ** (torch.arange(30).unsqueeze(1) - torch.arange(30)).abs().double(), torch.ones(30)),
}


@pytest.mark.parametrize("name", NASTY)
def test_ties_end(name: str) -> None:
    gram, target = (given.double() for given in NASTY[name])
    assert_optimal(lasso_path(gram, target), gram, target)
    assert [len(choose(gram, target, count)) for count in range(1, 31)] == list(range(1, 31))


def worst(path: LassoPath, gram: Tensor, target: Tensor) -> float:
    return max(missed(gram, target, path.at(alpha), alpha) for alpha in path.alphas.tolist())


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-5, 3e-5])
def test_sums_of_others_but_for_noise_are_left_out(noise: float) -> None:
    """The second six are sums of two of the first, as exactly as float32 or less tells: so exact is the path."""
    for seed in range(60):
        z, y = drawn(20, 12, seed)
        z[:, 6:] = z[:, :6].roll(1, 1) + z[:, :6] + noise * z[:, 6:]
        gram, target = moments((z, y))
        path = lasso_path(gram, target)
        assert float(path.alphas[-1]) == 0
        assert worst(path, gram, target) < 1e-12 + 10 * noise


@pytest.mark.parametrize("width", [3.0, 10.0])
def test_bells_that_only_rounding_tells_apart(width: float) -> None:
    at = torch.arange(40, dtype=torch.float64)
    gram = (-(((at.unsqueeze(1) - at) / width) ** 2)).exp()
    path = lasso_path(gram, gram.sum(1))
    assert worst(path, gram, gram.sum(1)) < 1e-6  # as far as the path goes: how far that is lies with the processor
    assert len(choose(gram, gram.sum(1), 37)) == 37


def test_paths_that_float64_cannot_follow_end_where_they_are_lost() -> None:
    """Hilbert matrices, of condition 1e120 and more. Which of them are lost, a third, lies with the processor."""
    ends = []
    for size in range(80, 200, 3):
        at = torch.arange(size, dtype=torch.float64)
        gram = 1 / (at.unsqueeze(1) + at + 1)
        path = lasso_path(gram, gram.sum(1))
        ends.append(float(path.alphas[-1] / path.alphas[0]))
        assert worst(path, gram, gram.sum(1)) < 1e-5
        assert len(choose(gram, gram.sum(1), size - 5)) == size - 5
    assert sorted(ends)[len(ends) // 2] < 1e-3
    assert max(ends) > 0


def test_twins_enter_once() -> None:
    z, y = drawn(50, 6, 7)
    twice = moments((torch.cat([z, -z], 1), y))
    once = lasso_path(*moments((z, y)))
    path = lasso_path(*twice)
    assert path.entered == once.entered
    assert torch.allclose(path.coefficients[:, :6], once.coefficients, rtol=0, atol=1e-10)
    assert not path.coefficients[:, 6:].any()


def test_silent_channels_never_enter() -> None:
    z, y = drawn(50, 6, 8)
    z[:, [1, 4]] = 0
    gram, target = moments((z, y))
    gram[4, 4], target[4] = -1e-18, 1e-17  # as rounding leaves it
    path = lasso_path(gram, target)
    assert not {1, 4} & set(path.entered)
    assert choose(gram, target, 5).tolist() == [0, 1, 2, 3, 5]
    assert not lasso(gram, target, 0.0)[[1, 4]].any()


def test_nothing_to_explain() -> None:
    gram = moments(drawn(50, 4, 9))[0]
    path = lasso_path(gram, torch.zeros(4))
    assert path.alphas.tolist() == [0]
    assert path.entered == ()
    assert choose(gram, torch.zeros(4), 2).tolist() == [0, 1]


# choosing


def test_the_known_support_is_found() -> None:
    """Channels 0..4 carry the output; 5..9 have large weights on next to nothing, and the rest is small."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 16, generator=generator, dtype=torch.float64)
    x[:, 5:10] *= 1e-2
    x[:, 10:] *= 1e-1
    weights = torch.randn(16, 8, generator=generator, dtype=torch.float64) / 8**0.5
    weights[5:10] *= 20
    z = x.unsqueeze(2) * weights  # rows, channels, outputs
    z = z.transpose(1, 2).reshape(-1, 16)
    gram, target = moments((z, z.sum(1)))
    assert choose(gram, target, 5).tolist() == [0, 1, 2, 3, 4]
    assert weights.norm(dim=1).topk(5).indices.sort().values.tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("rows", PROBLEMS)
def test_chosen_are_those_active_at_the_largest_such_alpha(rows: Rows) -> None:
    gram, target = moments(rows)
    path = lasso_path(gram, target)
    active = [set(np.flatnonzero(path.at((high + low) / 2)).tolist()) for high, low in pairwise(path.alphas.tolist())]
    for count in range(1, max(map(len, active)) + 1):
        assert set(choose(gram, target, count).tolist()) == next(some for some in active if len(some) == count)


def test_beyond_the_path_the_most_useful_follow() -> None:
    """A path of one knot: 2 is the twin of 0, 1 and 3 are of no use, and the least index goes first."""
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    gram[0, 2] = gram[2, 0] = 1
    target = torch.tensor([2.0, 0.0, 2.0, 0.0])
    assert [choose(gram, target, count).tolist() for count in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize("rows", PROBLEMS)
def test_all_are_chosen_when_all_are_asked_for(rows: Rows) -> None:
    gram, target = moments(rows)
    assert choose(gram, target, len(target)).tolist() == list(range(len(target)))


# nested errors


@pytest.mark.parametrize("rows", PROBLEMS)
def test_nested_errors_are_those_of_least_squares(rows: Rows) -> None:
    z, y = rows
    order = torch.randperm(z.shape[1], generator=torch.Generator().manual_seed(0))
    errors = nested_errors(*moments(rows), float(y.square().mean()), order)
    assert errors.shape == (z.shape[1] + 1,)
    for count, error in enumerate(errors.tolist()):
        kept = z[:, order[:count]].numpy()
        left = y.numpy() - kept @ np.linalg.lstsq(kept, y.numpy(), rcond=None)[0]
        assert error == pytest.approx(float(np.square(left).mean()), abs=1e-9)
    assert (errors >= 0).all()
    assert (errors.diff() <= 0).all()


def test_dependent_channels_lower_nothing() -> None:
    z, y = drawn(50, 5, 10)
    z[:, 2], z[:, 3], z[:, 4] = z[:, 0], 0, z[:, 0] - 3 * z[:, 1]
    errors = nested_errors(*moments((z, y)), float(y.square().mean()), torch.arange(5))
    assert errors[1] < errors[0]
    assert errors[3:].tolist() == [errors[2]] * 3


# what is refused

GRAM, TARGET = torch.eye(3), torch.ones(3)
BAD = [
    (torch.eye(3, 4), TARGET, r"`gram` .* got shape \(3, 4\)"),
    (torch.zeros(0, 0), torch.zeros(0), r"`gram` .* got shape \(0, 0\)"),
    (GRAM, torch.ones(4), r"`target` has one entry for each of the 3 channels; got shape \(4,\)"),
    (GRAM, torch.ones(3, 1), r"`target`.* got shape \(3, 1\)"),
    (GRAM * float("nan"), TARGET, "`gram` holds values that are not finite"),
    (GRAM, TARGET / 0, "`target` holds values that are not finite"),
    (GRAM + torch.ones(3, 3).triu(1), TARGET, "`gram` is symmetric"),
]


@pytest.mark.parametrize(("gram", "target", "message"), BAD)
def test_bad_moments_are_refused_everywhere(gram: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lasso(gram, target, 0.1)
    with pytest.raises(ValueError, match=message):
        lasso_path(gram, target)
    with pytest.raises(ValueError, match=message):
        choose(gram, target, 1)
    with pytest.raises(ValueError, match=message):
        nested_errors(gram, target, 1.0, torch.arange(3))


@pytest.mark.parametrize("alpha", [-1e-9, float("inf"), float("nan")])
def test_bad_alphas_are_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="`alpha` weighs"):
        lasso(GRAM, TARGET, alpha)


@pytest.mark.parametrize("count", [0, 4, -1])
def test_bad_counts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"`count` is a number of channels, 1\.\.3; got {count}"):
        choose(GRAM, TARGET, count)
    with pytest.raises(ValueError, match="`most` is a number of channels"):
        lasso_path(GRAM, TARGET, most=count)


def test_bad_starts_orders_and_energies_are_refused() -> None:
    with pytest.raises(ValueError, match="`start` has one entry"):
        lasso(GRAM, TARGET, 0.1, start=torch.zeros(2))
    with pytest.raises(ValueError, match="`start` holds values that are not finite"):
        lasso(GRAM, TARGET, 0.1, start=TARGET / 0)
    for order in ([0, 1], [0, 1, 1], [1, 2, 3]):
        with pytest.raises(ValueError, match="`order` names each of the 3 channels once"):
            nested_errors(GRAM, TARGET, 1.0, torch.tensor(order))
    for energy in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="`energy` is the mean square"):
            nested_errors(GRAM, TARGET, energy, torch.arange(3))

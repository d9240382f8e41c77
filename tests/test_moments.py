"""Moments give what the rows themselves would give: least squares, errors, and what channels contribute."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from lightning_prune.moments import Fit, Moments, Responses, among_channels, by_channel, joined

ROWS, GROUPS, COLUMNS, OUTPUTS = 200, 2, 6, 3
EXACT = 1e-9


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=Generator().manual_seed(seed))


X = torch.einsum("rgp,gpq->rgq", random(ROWS, GROUPS, COLUMNS), random(GROUPS, COLUMNS, COLUMNS, seed=2)) + 0.7
Y = (
    torch.einsum("rgp,gop->rgo", X, random(GROUPS, OUTPUTS, COLUMNS, seed=3))
    + random(ROWS, GROUPS, OUTPUTS, seed=4)
    + 1
)
W = random(GROUPS, OUTPUTS, COLUMNS, seed=5)


def moments_of(x: Tensor = X, y: Tensor = Y, parts: int = 1) -> Moments:
    moments = Moments(x.shape[1], x.shape[2], y.shape[2])
    for rows, returns in zip(x.chunk(parts), y.chunk(parts), strict=True):
        moments.add(rows, returns)
    return moments


def made(fit: Fit, x: Tensor = X) -> Tensor:
    """What refitted weights return."""
    product = torch.einsum("rgp,gop->rgo", x, fit.matrix)
    return product if fit.intercept is None else product + fit.intercept


def missed(y: Tensor, found: Tensor) -> float:
    return float((y - found).norm() / y.norm())


def near(left: Tensor, right: Tensor, tolerance: float = EXACT) -> bool:
    return left.shape == right.shape and float((left - right).abs().max()) <= tolerance * max(
        float(right.abs().max()), 1
    )


def same(left: Responses, right: Responses) -> bool:
    return (
        near(left.gram, right.gram)
        and near(left.target, right.target)
        and left.energy == pytest.approx(right.energy, rel=EXACT)
    )


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("removed", [(), (0, 4), tuple(range(5))], ids=str)
def test_a_refit_is_least_squares(intercept: bool, removed: tuple[int, ...]) -> None:
    gone = torch.zeros(GROUPS, COLUMNS, dtype=torch.bool)
    gone[:, list(removed)] = True
    stay = [column for column in range(COLUMNS) if column not in removed]
    fit = moments_of().without(gone).refit(W[:, :, stay], intercept=intercept)
    for group in range(GROUPS):
        x = X[:, group, stay]
        x = torch.cat([x, torch.ones(ROWS, 1, dtype=x.dtype)], 1) if intercept else x
        solved = torch.linalg.lstsq(x, Y[:, group], driver="gelsd").solution
        assert near(fit.matrix[group], solved[: len(stay)].T)
        if fit.intercept is not None:
            assert near(fit.intercept[group], solved[-1])
    assert (fit.intercept is not None) is intercept
    assert fit.ridge == 0
    assert fit.error == pytest.approx(missed(Y, made(fit, X[:, :, stay])), rel=EXACT)


def test_of_each_group_other_columns_may_go() -> None:
    gone = torch.zeros(GROUPS, COLUMNS, dtype=torch.bool)
    gone[0, 0] = gone[1, 5] = True
    fit = moments_of().without(gone).refit(torch.stack([W[0, :, 1:], W[1, :, :5]]))
    alone = moments_of(X[:, :1, 1:], Y[:, :1]).refit(W[:1, :, 1:])
    assert near(fit.matrix[0], alone.matrix[0])


def test_without_leaves_the_whole_as_it_was() -> None:
    moments = moments_of()
    before = moments.refit(W)
    moments.without(torch.eye(GROUPS, COLUMNS, dtype=torch.bool)).refit(W[:, :, 1:])
    assert torch.equal(moments.refit(W).matrix, before.matrix)


@pytest.mark.parametrize("bias", [None, random(GROUPS, OUTPUTS, seed=6)], ids=["no bias", "bias"])
def test_the_error_of_given_weights_is_the_direct_one(bias: Tensor | None) -> None:
    direct = missed(Y, torch.einsum("rgp,gop->rgo", X, W) + (0 if bias is None else bias))
    assert moments_of().error(W, bias) == pytest.approx(direct, rel=EXACT)


def test_no_weights_miss_less_than_the_refit() -> None:
    moments = moments_of()
    fit = moments.refit(W)
    assert fit.error == pytest.approx(moments.error(fit.matrix, fit.intercept), rel=EXACT)
    for seed in range(5):
        other = fit.matrix + 0.1 * random(GROUPS, OUTPUTS, COLUMNS, seed=seed)
        assert moments.error(other, fit.intercept) > fit.error
    assert moments.error(W) > fit.error
    assert moments.refit(W, intercept=False).error > fit.error


def test_weights_that_return_the_target_miss_nothing_and_stay() -> None:
    y = torch.einsum("rgp,gop->rgo", X, W) + 2.5
    moments = moments_of(X, y)
    fit = moments.refit(W)
    assert near(fit.matrix, W, 1e-10)
    assert fit.intercept is not None
    assert near(fit.intercept, torch.full((GROUPS, OUTPUTS), 2.5, dtype=torch.float64), 1e-10)
    assert fit.error < 1e-7  # squares in float64: half of its digits
    assert moments.error(W, torch.full((GROUPS, OUTPUTS), 2.5)) < 1e-7


@pytest.mark.parametrize("parts", [2, 7, ROWS])
def test_parts_equal_the_whole(parts: int) -> None:
    whole, streamed = moments_of().refit(W), moments_of(parts=parts).refit(W)
    assert near(streamed.matrix, whole.matrix)
    assert moments_of(parts=parts).rows == ROWS
    assert streamed.error == pytest.approx(whole.error, rel=EXACT)


def test_processes_together_equal_one() -> None:
    """Two that have half of the rows each, the sum taken part by part."""
    half, other = moments_of(X[:70], Y[:70]), moments_of(X[70:], Y[70:])
    waiting = [part.clone() for part in other._parts] + [torch.tensor(float(other.rows), dtype=torch.float64)]
    half.reduce(lambda part: part + waiting.pop(0))
    assert (half.rows, waiting) == (ROWS, [])
    assert near(half.refit(W).matrix, moments_of().refit(W).matrix)
    assert same(half.responses(W, 2), moments_of().responses(W, 2))


def test_half_precision_rows_are_summed_in_float64() -> None:
    x, y = X.to(torch.bfloat16), Y.to(torch.bfloat16)
    assert torch.equal(moments_of(x, y).refit(W).matrix, moments_of(x.double(), y.double()).refit(W).matrix)


def contributions(x: Tensor, matrix: Tensor, taps: int, scale: Tensor | None = None) -> Tensor:
    """Return Z: what each channel adds to all outputs, less its mean, as columns (rows * outputs, channels)."""
    parts = []
    for group in range(x.shape[1]):
        for channel in range(x.shape[2] // taps):
            columns = slice(channel * taps, (channel + 1) * taps)
            z = torch.zeros(len(x), x.shape[1], matrix.shape[1], dtype=torch.float64)
            z[:, group] = x[:, group, columns] @ matrix[group, :, columns].T
            z = z if scale is None else z * scale
            parts.append((z - z.mean(0)).flatten())
    return torch.stack(parts, 1)


def wanted(y: Tensor, scale: Tensor | None = None) -> Tensor:
    y = y if scale is None else y * scale
    return (y - y.mean(0)).flatten()


SCALE = random(GROUPS, OUTPUTS, seed=7)


@pytest.mark.parametrize("scale", [None, SCALE], ids=["no norm", "a norm behind"])
@pytest.mark.parametrize("taps", [1, 2, 3])
def test_responses_are_those_of_explicit_contributions(taps: int, scale: Tensor | None) -> None:
    z, y = contributions(X, W, taps, scale), wanted(Y, scale)
    found = moments_of().responses(W, taps, scale)
    assert same(found, Responses(z.T @ z, z.T @ y, float(y @ y)))


@pytest.mark.parametrize("scale", [None, SCALE], ids=["no norm", "a norm behind"])
def test_channels_at_several_positions_beside_a_rest_that_is_given(scale: Tensor | None) -> None:
    members = torch.tensor([[0, 7], [3, 9], [10, 4]])
    rest = [1, 2, 5, 6, 8, 11]
    z = contributions(X, W, 1, scale)
    y = wanted(Y, scale) - z[:, rest].sum(1)
    together = z[:, members].sum(2)
    found = moments_of().responses(W, 1, scale).of(members)
    assert same(found, Responses(together.T @ together, together.T @ y, float(y @ y)))


def test_all_channels_each_at_one_position_are_as_they_were() -> None:
    found = moments_of().responses(W, 1)
    assert same(found.of(torch.arange(12).unsqueeze(1)), found)


def test_nothing_is_left_to_give_where_the_rest_gives_all() -> None:
    y = torch.einsum("rgp,gop->rgo", X, W)
    found = moments_of(X, y).responses(W, 1).of(torch.arange(4).unsqueeze(1))
    z = contributions(X, W, 1)
    assert near(found.target, (z[:, :4].T @ z[:, :4]).sum(1), 1e-8)
    assert found.energy == pytest.approx(float(z[:, :4].sum(1).square().sum()), rel=1e-8)


def test_layers_are_joined_in_shares_of_their_energy() -> None:
    one = Responses(torch.eye(2), torch.tensor([1.0, 2.0]), 4.0)
    other = Responses(2 * torch.ones(2, 2), torch.tensor([5.0, 0.0]), 10.0)
    found = joined([(one, 4.0), (other, 20.0), (one, 0.0)])
    assert torch.allclose(found.gram, torch.tensor([[0.35, 0.1], [0.1, 0.35]]))
    assert torch.allclose(found.target, torch.tensor([0.5, 0.5]))
    assert found.energy == 1.5


def test_channels_sum_over_taps_and_not_over_groups() -> None:
    """By hand: two groups of one channel with two taps, one output each."""
    gram = torch.tensor([[[1.0, 2.0], [2.0, 3.0]], [[5.0, 0.0], [0.0, 7.0]]])
    weight = torch.tensor([[[1.0, -1.0]], [[2.0, 1.0]]])
    assert among_channels(gram, weight, 2).tolist() == [[1 - 2 - 2 + 3, 0], [0, 20 + 7]]
    assert by_channel(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 2, 1).tolist() == [[3, 7]]


def test_dependent_columns_stay_near_their_weights_and_cost_nothing() -> None:
    """Of a column and its double, any share gives the same: the two together give what least squares gives."""
    x = torch.cat([X, 2 * X[:, :, :1]], 2)
    matrix = torch.cat([W, W[:, :, :1]], 2)
    fit, alone = moments_of(x).refit(matrix), moments_of().refit(W)
    assert fit.ridge > 0
    assert near(fit.matrix[:, :, 0] + 2 * fit.matrix[:, :, 6], alone.matrix[:, :, 0], 1e-7)
    assert near(made(fit, x), made(alone), 1e-7)
    assert fit.error == pytest.approx(alone.error, rel=1e-7)
    change = fit.matrix - matrix
    assert near(2 * change[:, :, 6], change[:, :, 0], 1e-4), "the change is the least that does it"


def test_dependent_columns_change_nothing_where_nothing_is_missing() -> None:
    x = torch.cat([X, X[:, :, 1:3].sum(2, keepdim=True)], 2)
    matrix = torch.cat([W, W[:, :, :1]], 2)
    y = torch.einsum("rgp,gop->rgo", x, matrix)
    fit = moments_of(x, y).refit(matrix)
    assert near(made(fit, x), y, 1e-8)
    assert near(fit.matrix, matrix, 1e-4)  # the ridge of 1e-10 lets that much of the rounding through


@pytest.mark.parametrize("value", [0.0, 3.7, 1 / 3])
def test_a_column_that_never_moves_keeps_its_weights(value: float) -> None:
    """With an intercept a constant one is as silent as 0: else the bias of what it holds would rest on rounding."""
    x = X.clone()
    x[:, :, 2] = value
    fit = moments_of(x, parts=3).refit(W)
    assert torch.equal(fit.matrix[:, :, 2], W[:, :, 2])
    others = [0, 1, 3, 4, 5]
    alone = moments_of(x[:, :, others]).refit(W[:, :, others])
    assert near(fit.matrix[:, :, others], alone.matrix, 1e-8)
    assert near(made(fit, x), made(alone, x[:, :, others]), 1e-8)


def test_a_constant_column_stands_in_for_the_bias_that_there_is_not() -> None:
    x = X.clone()
    x[:, :, 2] = 3.7
    fit, other = moments_of(x).refit(W, intercept=False), moments_of(x).refit(W)
    assert near(made(fit, x), made(other, x), 1e-8)


def test_a_group_that_is_silent_throughout() -> None:
    x = X.clone()
    x[:, 1] = 0
    fit = moments_of(x).refit(W)
    assert torch.equal(fit.matrix[1], W[1])
    assert fit.intercept is not None
    assert near(fit.intercept[1], Y[:, 1].mean(0))


def test_columns_of_very_different_size_are_fitted_alike() -> None:
    size = torch.tensor([1e-4, 1e4, 1.0, 1e-2, 1e2, 1.0], dtype=torch.float64)
    fit, alone = moments_of(X * size).refit(W / size), moments_of().refit(W)
    assert fit.ridge == 0
    assert near(fit.matrix * size, alone.matrix, 1e-7)


def test_a_ridge_pulls_back_to_the_weights_that_there_were() -> None:
    """By hand: two columns at right angles, of energy 4 and 1, so 2.5 on average; one output that each gives once."""
    x = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    y = torch.tensor([[[2.0]], [[1.0]]], dtype=torch.float64)
    fit = moments_of(x, y).refit(torch.zeros(1, 1, 2), intercept=False, ridge=1.0)
    assert near(fit.matrix, torch.tensor([[[4 / 6.5, 1 / 3.5]]], dtype=torch.float64), 1e-15)
    assert fit.ridge == 0.0
    standing = moments_of(x, y).refit(torch.ones(1, 1, 2), intercept=False, ridge=1.0)
    assert standing.matrix.tolist() == [[[1.0, 1.0]]]


@pytest.mark.parametrize("intercept", [True, False])
def test_a_ridge_is_that_of_scikit_learn_around_the_weights_that_there_were(intercept: bool) -> None:
    ridge = pytest.importorskip("sklearn.linear_model").Ridge
    fit = moments_of().refit(W, intercept=intercept, ridge=0.3)
    for group in range(GROUPS):
        x, left = X[:, group].numpy(), (Y[:, group] - X[:, group] @ W[group].T).numpy()
        energy = np.square(x - x.mean(0) if intercept else x).sum(0).mean()
        solved = ridge(alpha=0.3 * energy, fit_intercept=intercept, solver="svd").fit(x, left)
        assert near(fit.matrix[group], W[group] + torch.from_numpy(solved.coef_))
        if fit.intercept is not None:
            assert near(fit.intercept[group], torch.from_numpy(np.asarray(solved.intercept_)))


def test_with_a_ridge_what_is_faintly_seen_changes_little() -> None:
    """A column that is next to nothing in these rows would else explain what they leave open, and spoil all others."""
    torch.manual_seed(0)
    x = torch.randn(20, 1, 30, dtype=torch.float64) * torch.tensor([1.0] * 29 + [1e-3], dtype=torch.float64)
    y = torch.randn(20, 1, 1, dtype=torch.float64)
    changes = [moments_of(x, y).refit(torch.zeros(1, 1, 30), ridge=ridge).matrix[0, 0] for ridge in (0.0, 1e-2)]
    assert changes[0][-1].abs() > 10 * changes[0][:-1].abs().max()
    assert changes[1][-1].abs() < changes[1][:-1].abs().max() / 10


def test_the_more_ridge_the_nearer_and_the_worse() -> None:
    fits = [moments_of().refit(W, ridge=ridge) for ridge in (0.0, 1e-3, 0.1, 10.0, 1e6)]
    assert all(less.error < more.error for less, more in pairwise(fits))
    assert all((less.matrix - W).norm() > (more.matrix - W).norm() for less, more in pairwise(fits))
    assert near(fits[-1].matrix, W, 1e-4)


def test_fewer_rows_than_columns_are_fitted_with_the_least_change() -> None:
    few = moments_of(X[:4], Y[:4])
    fit = few.refit(W)
    assert fit.ridge > 0
    assert fit.error < 1e-4
    assert all(few.refit(W, ridge=ridge).error > fit.error for ridge in (1e-3, 1.0))


def test_memory_is_told() -> None:
    assert moments_of().nbytes == 8 * GROUPS * (COLUMNS**2 + COLUMNS * OUTPUTS + 2 * OUTPUTS + COLUMNS)


def test_without_rows_all_stays() -> None:
    empty = Moments(GROUPS, COLUMNS, OUTPUTS)
    fit = empty.refit(W)
    assert torch.equal(fit.matrix, W)
    assert (fit.error, empty.error(W)) == (0.0, 0.0)

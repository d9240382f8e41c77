"""What cannot be reconstructed is refused with a way out, and the network is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from gated_networks import gated
from proof import same_state, snapshot
from rebuilt_networks import HARD, Hard
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import history_of, reconstruct
from lightning_prune.allocation import ByCost
from lightning_prune.criteria import Random
from lightning_prune.errors import PruningError
from lightning_prune.layers.gates import gates_of
from lightning_prune.masks.held import hold
from lightning_prune.moments import Fit, Moments
from lightning_prune.one_shot import Reconstructed
from lightning_prune.reconstruction import Reconstruction
from lightning_prune.restoring import check_restorable

CHAIN = HARD["chain, flatten"]


def cut(net: nn.Module, seen: object, **settings: object) -> Reconstructed:
    found = Reconstruction(**{"points": 10**6, **settings})
    return reconstruct(net, seen, pruning_ratio=0.4, of="channels", reconstruction=found)  # type: ignore[arg-type]


def assert_as_it_was(net: nn.Module, run: Callable[[], object], error: type[Exception], match: str) -> None:
    before = snapshot(net)
    with pytest.raises(error, match=match):
        run()
    assert same_state(snapshot(net), before)
    assert history_of(net) == ()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_fewer_rows_than_columns() -> None:
    """Layer 8 keeps 24 of its 40 columns, so that it takes 25 images."""
    net, seen = CHAIN.dense(), torch.cat(CHAIN.batches())
    few = "8 keeps 24 columns .* there are 12.*Pass at least 3 times the images.*`points`.*`ridge`"
    assert_as_it_was(net, lambda: cut(net, [seen[:12]]), PruningError, few)
    assert_as_it_was(net, lambda: cut(net, [seen[:24]]), PruningError, "8 keeps 24 columns")
    assert cut(net, [seen[:25]]).refits


def test_fewer_rows_than_columns_and_a_ridge() -> None:
    net, seen = CHAIN.dense(), torch.cat(CHAIN.batches())
    done = cut(net, [seen[:12]], ridge=1e-3)
    assert net[8].in_features == 24
    assert all(refit.error < refit.sliced for refit in done.refits)


@pytest.mark.parametrize("batches", [[], iter(())], ids=["list", "iterator"])
def test_a_loader_that_yields_nothing(batches: object) -> None:
    net = CHAIN.dense()
    assert_as_it_was(net, lambda: cut(net, batches), PruningError, "yields nothing to reconstruct with. Pass")


def test_a_loader_that_shuffles_is_gone_through_once() -> None:
    """Both networks see the same images in each pass: else nothing that is left would give what was returned."""
    net, images = CHAIN.dense(), torch.cat(CHAIN.batches())
    passes = 0

    class Counted(DataLoader[tuple[Tensor, ...]]):
        def __iter__(self) -> Iterator[tuple[Tensor, ...]]:  # type: ignore[override]
            nonlocal passes
            passes += 1
            return super().__iter__()

    done = cut(net, Counted(TensorDataset(images, torch.zeros(96)), 24, shuffle=True))
    assert passes == 1
    ordered = cut(CHAIN.dense(), [images])
    assert [refit.error for refit in done.refits] == pytest.approx([refit.error for refit in ordered.refits], rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite(value: float) -> None:
    net, seen = CHAIN.dense(), CHAIN.batches()
    seen[2][3, 0, 0, 0] = value
    assert_as_it_was(net, lambda: cut(net, seen), PruningError, "^3 reads or returns NaN or infinite values.*inputs")


def test_a_layer_that_returns_nan() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    net = CHAIN.dense()
    net[9] = Log()
    assert_as_it_was(
        net,
        lambda: reconstruct(net, CHAIN.batches(), pruning_ratio=0.4, of="channels", criterion=Random(0)),
        PruningError,
        "^10 reads or returns NaN",
    )


def test_train_mode() -> None:
    net = CHAIN.dense().train()
    assert_as_it_was(net, lambda: cut(net, CHAIN.batches()), ValueError, r"train mode.*Call `model.eval\(\)` first")


@pytest.mark.parametrize("speed_up", [1.0, 0.5, -2.0, float("inf"), float("nan")])
def test_a_speed_up_that_is_none(speed_up: float) -> None:
    net = CHAIN.dense()
    run = lambda: reconstruct(net, CHAIN.batches(), speed_up=speed_up)  # noqa: E731
    assert_as_it_was(net, run, ValueError, "`speed_up` is how many times fewer MACs there will be, above 1; got")


@pytest.mark.parametrize("given", [{}, {"pruning_ratio": 0.5, "speed_up": 2}], ids=["none", "both"])
def test_one_of_ratio_and_speed_up(given: dict[str, float]) -> None:
    net = CHAIN.dense()
    run = lambda: reconstruct(net, CHAIN.batches(), **given)  # type: ignore[arg-type]  # noqa: E731
    assert_as_it_was(net, run, ValueError, "Either `pruning_ratio` or `speed_up` is given")


def test_a_speed_up_of_something_else() -> None:
    net = CHAIN.dense()
    run = lambda: reconstruct(net, CHAIN.batches(), speed_up=2, of="params")  # noqa: E731
    assert_as_it_was(net, run, ValueError, '`speed_up` counts "macs".*Say `pruning_ratio`')


def test_a_speed_up_is_a_ratio_of_macs() -> None:
    net = CHAIN.dense()
    record = reconstruct(net, CHAIN.batches(), speed_up=2, reconstruction=Reconstruction(points=10**6)).record
    assert (record.asked, record.of) == (0.5, "macs")
    assert 0.5 <= record.reached < 0.6


def test_gates() -> None:
    net = gated(nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 4)), torch.zeros(1, 7)).eval()
    assert gates_of(net) is not None
    with pytest.raises(PruningError, match=r"A network with gates cannot be reconstructed.*Reconstruct before"):
        reconstruct(net, [torch.rand(96, 7)], pruning_ratio=0.5)


def test_masked_weights() -> None:
    net = nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    hold(net, {"0.weight": (torch.rand(12, 7) > 0.5)})
    with pytest.raises(PruningError, match=r"A network with masked weights cannot be reconstructed"):
        reconstruct(net, [torch.rand(96, 7)], pruning_ratio=0.5)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"targets": "both"}, "`targets` is one of 'original', 'current'; got 'both'"),
        ({"images": 0}, "`images` is how many are looked at, 1 or more; got 0"),
        ({"points": -1}, "`points` is how many are looked at, 1 or more; got -1"),
        ({"ridge": -1e-3}, "`ridge` is how dear .*, 0 or more; got -0.001"),
        ({"ridge": float("nan")}, "`ridge`"),
    ],
)
def test_settings_that_are_none(given: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Reconstruction(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["residual", "GroupNorm", "depthwise"])
def test_a_failure_at_the_third_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hard: Hard = HARD[name]
    net, calls, refit = hard.dense(), 0, Moments.refit

    def failing(moments: Moments, matrix: Tensor, **settings: object) -> Fit:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of memory")
        return refit(moments, matrix, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(Moments, "refit", failing)
    assert_as_it_was(net, lambda: cut(net, hard.batches()), RuntimeError, "out of memory")
    monkeypatch.undo()
    again = hard.dense()
    cut(net, hard.batches())
    cut(again, hard.batches())
    both = zip(net.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in both)


def test_a_failure_while_criteria_look(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = CHAIN.dense(), CHAIN.batches()
    seen[1] = seen[1][:, :2]
    run = lambda: reconstruct(net, seen, pruning_ratio=0.4, allocation=ByCost())  # noqa: E731
    assert_as_it_was(net, run, RuntimeError, "channels")


def test_a_plain_network_is_restorable() -> None:
    check_restorable(CHAIN.dense())

"""Gates in a real fit: what is asked is reached and nothing of them is left; the penalty enters once, as it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fits import EXAMPLE, Module, equal, images, momentum, network, trainer, widths
from gated import EAGER, Gradients, Outputs, adam, alphas, fitted, mlp, nothing_left
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import history_of, load_pruned
from lightning_prune.callbacks import L0PruneCallback
from lightning_prune.layers.gates import Gates, gates_of
from lightning_prune.masks import masks_of

# a ratio


def cosine(optimizer: Optimizer) -> dict[str, Any]:
    return {"lr_scheduler": {"scheduler": CosineAnnealingLR(optimizer, 150, eta_min=1e-4), "interval": "step"}}


def plateau(optimizer: Optimizer) -> dict[str, Any]:
    found = ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    return {"lr_scheduler": {"scheduler": found, "monitor": "train_loss"}}


class Rates(Callback):
    """Notes the learning rate of the user's group at each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append(float(trainer.optimizers[0].param_groups[0]["lr"]))


@pytest.mark.parametrize(
    ("of", "make", "scheduler"),
    [
        ("channels", adam, cosine),
        ("params", momentum, None),
        ("macs", adam, plateau),
        ("macs", momentum, cosine),
    ],
)
def test_a_ratio_is_reached_and_nothing_is_left_of_the_gates(
    tmp_path: Path, of: Any, make: Callable[..., Optimizer], scheduler: Any
) -> None:
    module, rates, saving = Module(make, scheduler), Rates(), ModelCheckpoint(tmp_path, "last")
    callback = L0PruneCallback(0.5, of=of, begin=120, every_n_steps=1)
    fit = trainer(callback, rates, saving, max_epochs=22, limit_val_batches=0, enable_checkpointing=True)
    fit.fit(module)
    (record,) = history_of(module)
    assert 0.5 <= record.reached <= (0.625 if of == "channels" else 0.7)
    assert record.asked == 0.5
    assert record.step == 120
    nothing_left(module, fit)
    if scheduler is not plateau:  # which goes by the loss
        plain = Rates()
        trainer(plain, max_epochs=22, limit_val_batches=0).fit(Module(make, scheduler))
        assert rates.seen == plain.seen
    for config in fit.lr_scheduler_configs:
        assert len(config.scheduler._last_lr) == 1
    loaded = load_pruned(Module(make, scheduler, seed=5), tmp_path / "last.ckpt")
    assert equal(loaded.state_dict(), module.state_dict())
    nothing_left(loaded)


@pytest.mark.parametrize("granularity", ["inputs", "weights"])
@pytest.mark.parametrize("make", [adam, momentum], ids=["adam", "sgd"])
def test_a_ratio_of_masks_is_held_to_the_end(granularity: Any, make: Callable[..., Optimizer]) -> None:
    callback = L0PruneCallback(0.6, granularity=granularity, begin=120, every_n_steps=1)
    module, fit = fitted(callback, steps=138, make=make, net=mlp())
    masks = masks_of(module)
    assert masks.keys() == {"net.1.weight", "net.3.weight", "net.5.weight"}
    gone = sum(int((~mask).sum()) for mask in masks.values())
    assert gone >= 0.6 * 584 - 36
    for name, mask in masks.items():
        weight = module.get_parameter(name)
        assert torch.equal(weight != 0, mask), name
    assert history_of(module) == ()
    nothing_left(module, fit)


def test_at_the_last_event_the_lowest_go_too_if_too_few_have_closed() -> None:
    """Gates that hardly move: all of the ratio is left to the cut."""
    callback = L0PruneCallback(0.5, of="channels", gate_lr=1e-3, begin=6, every_n_steps=1)
    with pytest.warns(UserWarning, match="Gates cannot close in time"):
        module, fit = fitted(callback, steps=12)
    assert sum(widths(module)) == 8
    nothing_left(module, fit)


# events


class Open(Callback):
    """In the list before the prune callback: notes at some steps how many gates are open, and then the sizes."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.before: list[dict[str, int]] = []
        self.after: list[dict[str, int]] = []
        self.moved: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if trainer.global_step in self.steps and index % trainer.accumulate_grad_batches == 0:
            gates = gates_of(pl_module)
            assert gates is not None
            self.before.append({name: int(gate.is_open().sum()) for name, gate in gates.named().items()})

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if len(self.after) < len(self.before):
            self.after.append(dict(zip(("net.0", "net.3"), widths(pl_module), strict=True)))
            if gates_of(pl_module) is not None:
                self.alphas = alphas(pl_module)
                assert {name: len(alpha) for name, alpha in self.alphas.items()} == self.after[-1]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if len(self.moved) < len(self.after) and gates_of(pl_module) is not None and trainer.global_step % 2:
            now = alphas(pl_module)
            self.moved.append(any(bool((now[name] != alpha).any()) for name, alpha in self.alphas.items()))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [adam, momentum], ids=["adam", "sgd"])
def test_what_has_closed_is_cut_at_each_event_and_gates_go_on(accumulate: int, make: Callable[..., Optimizer]) -> None:
    steps = (10, 14, 18, 22, 26, 30)
    look = Open(*steps)
    strength = {"net.0": 0.4, "net.3": 4.0}
    callback = L0PruneCallback(
        strength=strength, of="channels", gate_lr=0.25, begin=10, end=30, every_n_steps=4, drop_rate=0.3
    )
    module, fit = fitted(
        look,
        callback,
        steps=36 * accumulate,
        make=make,
        accumulate_grad_batches=accumulate,  # type: ignore[arg-type]
    )
    assert look.before == look.after
    assert look.moved == [True] * 5
    assert len({sum(each.values()) for each in look.after}) > 2, "the test is to see several cuts"
    assert [record.step for record in history_of(module)] == list(steps)
    nothing_left(module, fit)


def test_events_by_epochs_and_a_late_start() -> None:
    class Gated(Callback):
        seen: list[bool]

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.seen.append(gates_of(pl_module) is not None)

    look = Gated()
    look.seen = []
    callback = L0PruneCallback(0.4, of="channels", gate_lr=0.4, start=2, begin=4, end=6, every=2)
    module, fit = fitted(callback, look, steps=48)
    assert look.seen == [False, False, True, True, True, True, False, False]
    assert [record.epoch for record in history_of(module)] == [4, 6]
    assert history_of(module)[-1].reached >= 0.4 - 1 / 32
    nothing_left(module, fit)


@pytest.mark.parametrize("granularity", ["channels", {"net.1": "channels", "net.[35]": "inputs"}], ids=str)
def test_eval_outputs_stay_what_they_were_at_every_event(granularity: Any) -> None:
    before, after = Outputs(12, 16, 20), Outputs(12, 16, 20)
    callback = L0PruneCallback(
        strength=2.0, granularity=granularity, gate_lr=0.25, begin=12, end=20, every_n_steps=4, drop_rate=0.3
    )
    fitted(before, callback, after, steps=24, net=mlp())  # type: ignore[arg-type]
    assert before.sizes[0] != after.sizes[-1]
    for old, new in zip(before.seen, after.seen, strict=True):
        assert torch.allclose(old, new, atol=1e-5)
        assert old.abs().max() > 0.01


@pytest.mark.parametrize("make", [adam, momentum], ids=["adam", "sgd"])
@pytest.mark.parametrize("granularity", ["channels", "all"])
def test_eval_outputs_with_norms_and_with_gates_on_weights(make: Callable[..., Optimizer], granularity: str) -> None:
    kinds: Any = {"net.1": "channels", "net.3": "weights", "net.5": "inputs"} if granularity == "all" else "channels"
    before, after = Outputs(14, 20), Outputs(14, 20)
    callback = L0PruneCallback(
        strength=2.0, granularity=kinds, gate_lr=0.3, begin=14, end=20, every_n_steps=6, drop_rate=0.4
    )
    net = mlp() if granularity == "all" else network()
    module, fit = fitted(before, callback, after, steps=30, make=make, net=net)  # type: ignore[arg-type]
    assert before.sizes[0] != after.sizes[-1]
    for old, new in zip(before.seen, after.seen, strict=True):
        assert torch.allclose(old, new, atol=1e-5)
    nothing_left(module, fit)


# a strength


def slope(alpha: Tensor) -> Tensor:
    """dP(z > 0) / dlog_alpha, by hand."""
    p = torch.sigmoid(alpha + 2 / 3 * torch.tensor(11.0).log())
    return p * (1 - p)


def chance(alpha: Tensor) -> Tensor:
    return torch.sigmoid(alpha + 2 / 3 * torch.tensor(11.0).log())


def key(name: str) -> str:
    return f"pruning_gates.gates.{name.replace('.', '/')}.log_alpha"


SETTINGS: list[tuple[dict[str, Any], int]] = [
    ({}, 48),
    ({"accumulate_grad_batches": 3}, 48),
    ({"precision": "bf16-mixed"}, 48),
    ({"limit_train_batches": 4}, 32),
    ({"gradient_clip_val": 0.01}, 48),
]


@pytest.mark.parametrize(("settings", "count"), SETTINGS, ids=str)
def test_the_penalty_enters_once_a_step(settings: dict[str, Any], count: int) -> None:
    """(36 + 1) P1 + P1 P2 + P2 + 4 P2 + 4 weights and biases."""
    before, after = Gradients(), Gradients()
    callback = L0PruneCallback(strength={"net.1": 0.7, "net.3": 2.0}, begin=10, **EAGER)
    _, fit = fitted(before, callback, after, steps=54, net=mlp(), max_epochs=20, max_steps=12, **settings)  # type: ignore[arg-type]
    assert len(before.seen) == fit.global_step == 12
    for old, new, alpha in list(zip(before.seen, after.seen, before.alphas, strict=True))[:10]:
        one, two = alpha["net.1"], alpha["net.3"]
        expected = {
            "net.1": 0.7 / count * (37 + chance(two).sum()) * slope(one),
            "net.3": 2.0 / count * (chance(one).sum() + 5) * slope(two),
        }
        for name, value in expected.items():
            torch.testing.assert_close(new[key(name)] - old[key(name)], value, atol=1e-5, rtol=1e-3)
        for name in old:
            assert "gates" in name or torch.equal(old[name], new[name]), name
    assert before.alphas[10:] == [{}, {}]
    assert all(torch.equal(before.seen[-1][name], after.seen[-1][name]) for name in before.seen[-1])


def test_clipping_sees_the_penalty() -> None:
    norms: list[float] = []

    class Norm(Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            grads = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
            norms.append(float(torch.stack(grads).norm()) if grads else 0.0)

    callback = L0PruneCallback(strength=1e4, begin=10, **EAGER)
    fitted(callback, Norm(), steps=12, net=mlp(), gradient_clip_val=0.5)
    assert 0.49 < max(norms) <= 0.5 + 1e-5


def test_decay_is_weighted_by_the_chance_that_a_gate_is_open() -> None:
    """Of net.3 and net.5, which read through gates, and of nothing else; 1/2 wd P w^2 pulls at the gates too."""
    before, after = Gradients(), Gradients()
    callback = L0PruneCallback(strength=1e-9, weight_decay=0.3, begin=10, **EAGER)
    fitted(before, callback, after, steps=12, net=mlp())  # type: ignore[arg-type]
    for old, new, alpha, weight in zip(before.seen[:9], after.seen, before.alphas, before.weights, strict=False):
        for layer, gate in (("net.net.3", "net.1"), ("net.net.5", "net.3")):
            name = f"{layer}.weight".removeprefix("net.")
            added, w = new[name] - old[name], weight[name]
            torch.testing.assert_close(added, 0.3 * chance(alpha[gate]) * w, atol=1e-6, rtol=1e-4)
            pull = 0.15 * w.square().sum(0) * slope(alpha[gate])
            torch.testing.assert_close(new[key(gate)] - old[key(gate)], pull, atol=1e-6, rtol=1e-3)
        assert torch.equal(new["net.1.weight"], old["net.1.weight"])


def test_a_huge_strength_leaves_one_channel_in_each_group(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        module, fit = fitted(L0PruneCallback(strength=1e5, begin=24, **EAGER), steps=30)
    assert widths(module) == [1, 1]
    assert "all gates of net.0, net.3 would be closed; the best of each stays open" in caplog.text
    assert "net.0 8 -> 1, net.3 8 -> 1; parameters 716 -> 30" in caplog.text
    assert module(EXAMPLE).isfinite().all()
    nothing_left(module, fit)


class Line(pl.LightningModule):
    """Linear regression."""

    def __init__(self, data: TensorDataset) -> None:
        super().__init__()
        self.layer, self.data = nn.Linear(20, 1), data
        self.example_input_array = torch.zeros(2, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.data, 64)

    def configure_optimizers(self) -> Optimizer:
        return Adam(self.parameters(), lr=0.05)


@pytest.mark.parametrize("granularity", ["inputs", "weights"])
def test_regression_finds_the_inputs_that_matter(granularity: Any) -> None:
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x, true = torch.randn(256, 20, generator=generator), torch.randperm(20, generator=generator)[:3]
        w = torch.zeros(20)
        w[true] = torch.tensor([1.0, -1.5, 0.7])
        y = (x @ w + 0.3 * torch.randn(256, generator=generator))[:, None]
        torch.manual_seed(seed)
        module = Line(TensorDataset(x, y))
        callback = L0PruneCallback(
            strength=40.0, granularity=granularity, gate_lr=0.15, begin=100, every_n_steps=1, seed=seed
        )
        trainer(callback, max_epochs=26).fit(module)
        (mask,) = masks_of(module).values()
        assert mask.nonzero()[:, 1].tolist() == sorted(true.tolist()), seed
        torch.testing.assert_close(module.layer.weight[0], w, atol=0.15, rtol=0)


# estimators


def test_true_gates_learn_without_a_derivative() -> None:
    seen = Gradients()
    callback = L0PruneCallback(0.5, of="channels", estimator="bernoulli", begin=60, every_n_steps=1)
    module, fit = fitted(callback, seen, steps=66)
    moved = [
        {name: bool((one[name] != two[name]).all()) for name in one}
        for one, two in zip(seen.alphas[:50], seen.alphas[1:], strict=False)
    ]
    assert all(all(each.values()) for each in moved)
    assert sum(widths(module)) <= 8
    nothing_left(module, fit)


def test_true_gates_are_0_or_1_at_test_time() -> None:
    values: list[float] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            for gate in gates_of(pl_module).named().values() if gates_of(pl_module) is not None else ():  # type: ignore[union-attr]
                values.extend(gate.test_values().tolist())
                assert set(gate.values(training=True).tolist()) <= {0.0, 1.0}

    fitted(L0PruneCallback(strength=1.0, of="channels", estimator="bernoulli", begin=20, **EAGER), Look(), steps=24)
    assert set(values) <= {0.0, 1.0}


class Uneven(Module):
    """Its last batch has 8 images, the others 10."""

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(images().dataset, batch_size=10)


@pytest.mark.parametrize("make", [adam, momentum], ids=["adam", "sgd"])
def test_a_sample_for_each_example(make: Callable[..., Optimizer]) -> None:
    sizes: list[int] = []

    class Look(Callback):
        def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
            gates = gates_of(pl_module)
            if gates is not None:
                sizes.extend(gate.noise.shape[0] for gate in gates.named().values())

    module = Uneven(make)
    callback = L0PruneCallback(0.5, of="channels", per_example=True, begin=20, gate_lr=0.3, every_n_steps=1)
    fit = trainer(callback, Look(), max_epochs=5, limit_val_batches=1)
    fit.fit(module)
    assert set(sizes) == {10, 8}
    assert sum(widths(module)) <= 8
    nothing_left(module, fit)


# chance


class Noisy(Module):
    """Draws from torch's own generator in each step."""

    def __init__(self) -> None:
        super().__init__(adam, net=nn.Sequential(mlp(), nn.Dropout(0.3)))
        self.drawn: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.drawn.append(float(torch.rand(())))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("estimator", ["hard_concrete", "bernoulli"])
def test_nobody_elses_random_numbers_change(estimator: Any) -> None:
    def drawn(*callbacks: Callback) -> list[float]:
        module = Noisy()
        torch.manual_seed(7)
        trainer(*callbacks, max_epochs=3).fit(module)
        return module.drawn

    callback = L0PruneCallback(strength=1e-9, estimator=estimator, gate_lr=0.4, begin=14, every_n_steps=1)
    assert drawn(callback) == drawn()


def test_validation_never_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[bool] = []
    real = Gates.draw

    def draw(self: Gates, *given: Any) -> None:
        draws.append(self.training)
        real(self, *given)

    monkeypatch.setattr(Gates, "draw", draw)

    class Twice(Callback):
        seen = 0

        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            gates = gates_of(pl_module)
            if gates is not None and trainer.global_step:
                one = pl_module(EXAMPLE + 1)
                gates.draw(torch.Generator().manual_seed(trainer.global_step))
                assert torch.equal(one, pl_module(EXAMPLE + 1))
                draws.pop()
                self.seen += 1

    look = Twice()
    callback = L0PruneCallback(strength=0.1, begin=14, **EAGER)
    fitted(callback, look, steps=18, limit_val_batches=2)
    assert draws == [True] * 14
    assert look.seen == 2

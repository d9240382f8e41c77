"""Several passes in a real fit: slim, cut, fine-tune, again, each to its own ratio, resumed bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fits import STEPS, Module, Resumable, equal, momentum, states, trainer, widths
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from omegaconf import OmegaConf
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_prune import history_of
from lightning_prune.allocation import Global, Uniform
from lightning_prune.callbacks import BNSlimmingCallback
from lightning_prune.schedules import cubic, linear

# Lightning, where the resumed fit writes no checkpoints itself; and fits of a few steps, in which no scale gets to zero
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:BNSlimmingCallback. the scales cannot reach zero"),
]

RATIOS = [0.25, 0.5, 0.75]
CUTS = [2, 6, 10]
"""Of 12 epochs: 2 slim, the cut, 2 to fine-tune, again."""


def passes(**settings: Any) -> BNSlimmingCallback:
    return BNSlimmingCallback(RATIOS, **({"strength": 0.01} | settings))


class Alone(Module):
    """The loss gives the scales no gradient but zero, so that they move by the penalty alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0 * F.cross_entropy(self(batch[0]), batch[1])


class Walk(Callback):
    """How far the largest scale comes in each epoch, in strides of lr * strength; cuts keep the largest."""

    def __init__(self, stride: float) -> None:
        self.stride = stride
        self.strides: list[float] = []
        self.before = 1.0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = float(pl_module.net[1].weight.detach().max())
        self.strides.append((self.before - now) / self.stride)
        self.before = now


@pytest.mark.parametrize("make", [partial(SGD, lr=0.1), partial(AdamW, lr=0.1, weight_decay=0.0)], ids=["sgd", "adamw"])
def test_slim_cut_fine_tune_again(make: Callable[..., Optimizer]) -> None:
    module, walk = Alone(make), Walk(0.1 * 0.01)
    trainer(passes(), walk, max_epochs=12, limit_val_batches=0).fit(module)
    assert [record.epoch for record in history_of(module)] == CUTS
    assert [record.asked for record in history_of(module)] == RATIOS
    assert [record.reached for record in history_of(module)] == RATIOS
    on, off = [STEPS] * 2, [0] * 2
    assert walk.strides == pytest.approx([*on, *off, *on, *off, *on, *off], abs=1e-2)


def test_each_pass_warms_up_anew() -> None:
    """0, 1/6, ... 5/6 of the strength in the first epoch of a phase."""
    module, walk = Alone(partial(SGD, lr=0.1)), Walk(0.1 * 0.01)
    trainer(passes(warmup=1), walk, max_epochs=12, limit_val_batches=0).fit(module)
    phase = [15 / 6, STEPS, 0, 0]
    assert walk.strides == pytest.approx(phase * 3, abs=1e-2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_warmup_in_mid_epoch_counts_batches(accumulate: int) -> None:
    module, walk = Alone(partial(SGD, lr=0.1)), Walk(0.1 * 0.01)
    callback = BNSlimmingCallback(0.5, strength=0.01, warmup=1.5, begin=3)
    trainer(callback, walk, max_epochs=4, accumulate_grad_batches=accumulate).fit(module)
    batches = [at for at in range(18) if (at + 1) % accumulate == 0]
    shares = [min(at / 9, 1.0) for at in batches]
    each = STEPS // accumulate
    expected = [sum(shares[each * epoch : each * (epoch + 1)]) for epoch in range(3)]
    assert walk.strides == pytest.approx([*expected, 0], abs=1e-2)


def test_warmup_in_steps() -> None:
    module, walk = Alone(partial(SGD, lr=0.1)), Walk(0.1 * 0.01)
    callback = BNSlimmingCallback(0.5, strength=0.01, warmup=8, begin=12, end=12, every_n_steps=1)
    trainer(callback, walk, max_epochs=3).fit(module)
    assert walk.strides == pytest.approx([15 / 8, 6 / 8 + 7 / 8 + 4, 0], abs=1e-2)


def test_passes_in_steps() -> None:
    """36 steps, 12 a pass: cuts at 6, 18 and 30, and the second begins in mid-epoch."""
    module, walk = Alone(partial(SGD, lr=0.1)), Walk(0.1 * 0.01)
    trainer(passes(every_n_steps=1), walk, max_epochs=6).fit(module)
    assert [(record.epoch, record.step) for record in history_of(module)] == [(1, 6), (3, 18), (5, 30)]
    assert [record.reached for record in history_of(module)] == RATIOS
    assert walk.strides == pytest.approx([6, 0, 6, 0, 6, 0], abs=1e-2)


def test_fine_tuning_may_end_in_mid_epoch() -> None:
    """Cuts at 5 and 10, a quarter of 5 epochs later the penalty is back: from the third batch of epoch 6 on."""
    module, walk = Alone(partial(SGD, lr=0.1)), Walk(0.1 * 0.01)
    callback = BNSlimmingCallback([0.25, 0.5], strength=0.01, fine_tuning=0.25)
    trainer(callback, walk, max_epochs=12, limit_val_batches=0).fit(module)
    assert [record.epoch for record in history_of(module)] == [5, 10]
    assert walk.strides == pytest.approx([6] * 5 + [0, 4, 6, 6, 6, 0, 0], abs=1e-2)


@pytest.mark.parametrize("allocation", [None, Uniform(), Global(cap=0.75)], ids=["global", "uniform", "cap"])
def test_counts_are_exact_in_every_pass_and_no_layer_is_ever_empty(allocation: Global | Uniform | None) -> None:
    """All scales tie, as they move by the penalty alone."""
    module = Alone(partial(SGD, lr=0.1))
    trainer(passes(allocation=allocation, min_channels=2), max_epochs=12, limit_val_batches=0).fit(module)
    after = [sum(change.after for name, change in r.channels.items() if name != "net.8") for r in history_of(module)]
    assert after == [12, 8, 4]
    assert min(widths(module)) >= 2


def test_a_layer_of_small_scales_is_never_emptied() -> None:
    module = Alone(partial(SGD, lr=0.0))
    module.net[1].weight.data.copy_(torch.linspace(0.01, 0.02, 8))
    trainer(BNSlimmingCallback([0.25, 0.5]), max_epochs=8, limit_val_batches=0).fit(module)
    assert widths(module) == [1, 7]
    assert module.net[1].weight.tolist() == pytest.approx([0.02])
    assert history_of(module)[1].held_back["net.0"] == "keeps 1 channels in place of 0: min_channels=1"


def test_the_smallest_scales_of_all_layers_go_in_each_pass() -> None:
    module = Alone(partial(SGD, lr=0.0))
    with torch.no_grad():
        module.net[1].weight.copy_(torch.tensor([1.0, 5, 9, 13, 2, 6, 10, 14]))
        module.net[4].weight.copy_(-torch.tensor([3.0, 7, 11, 15, 4, 8, 12, 16]))
    trainer(passes(), max_epochs=12, limit_val_batches=0).fit(module)
    assert module.net[1].weight.tolist() == [13, 14]
    assert module.net[4].weight.tolist() == [-15, -16]
    first = history_of(module)[0]
    assert first.kept["net.1.weight"][0] == (1, 2, 3, 5, 6, 7)


def cosine(optimizer: Optimizer) -> dict[str, Any]:
    return {"lr_scheduler": {"scheduler": CosineAnnealingLR(optimizer, 72), "interval": "step"}}


@pytest.mark.parametrize("unit", [{}, {"every_n_steps": 1}], ids=["epochs", "steps"])
@pytest.mark.parametrize("make", [momentum, partial(AdamW, lr=0.01)], ids=["momentum", "adamw"])
def test_a_resumed_fit_is_the_unbroken_one(
    tmp_path: Path, make: Callable[..., Optimizer], unit: dict[str, Any]
) -> None:
    """From each stretch of each pass, in mid-epoch: slimming, warming up, at the cut, fine-tuning."""

    def slimming() -> BNSlimmingCallback:
        return passes(initial_scale=0.5, warmup=1.5 if not unit else 9, delta=1e-3, **unit)

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    unbroken = Resumable(make, cosine)
    settings: dict[str, Any] = {"max_epochs": 12, "limit_val_batches": 0}
    whole = trainer(slimming(), keep, enable_checkpointing=True, **settings)
    whole.fit(unbroken)
    expected = states(unbroken, whole.optimizers)
    assert len(history_of(unbroken)) == 3
    for step in (3, 11, 13, 20, 26, 37, 62):
        resumed = Resumable(make, cosine, seed=9)
        rest = trainer(slimming(), **settings)
        rest.fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert equal(resumed.state_dict(), unbroken.state_dict()), step
        assert history_of(resumed) == history_of(unbroken)
        found = states(resumed, rest.optimizers)
        assert all(equal(found[name], state) for name, state in expected.items()), step


def test_a_dry_run_needs_no_room_for_passes() -> None:
    module = Module()
    trainer(passes(), fast_dev_run=True).fit(module)
    assert len(history_of(module)) == 1


def test_one_ratio_in_a_list_is_one_pass() -> None:
    module = Module()
    trainer(BNSlimmingCallback([0.5]), max_epochs=4).fit(module)
    assert [(record.epoch, record.reached) for record in history_of(module)] == [(2, 0.5)]


def test_from_a_config() -> None:
    made = {
        "_target_": "lightning_prune.callbacks.BNSlimmingCallback",
        "pruning_ratio": [0.5, 0.75],
        "fine_tuning": 0.4,
    }
    callback = instantiate(OmegaConf.create(made))
    assert callback.request.pruning_ratio == 0.75
    assert callback.timing.schedule.ratios == (0.5, 0.75)
    assert callback.timing.fine_tuning == 0.4
    assert callback.state_key == instantiate(OmegaConf.create(made)).state_key
    assert callback.state_key != BNSlimmingCallback([0.6, 0.75], fine_tuning=0.4).state_key


# what is wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pruning_ratio": []}, r"`pruning_ratio` of several passes .* got \[\]"),
        ({"pruning_ratio": [0.5, 0.4]}, r"rising, above 0 and below 1; got \[0\.5, 0\.4\].* \[0\.5, 0\.75, 0\.875\]"),
        ({"pruning_ratio": [0.5, 1.0]}, r"got \[0\.5, 1\.0\]"),
        ({"pruning_ratio": [0.5, 0.75], "schedule": cubic}, r"`schedule` is not asked where `pruning_ratio` is a list"),
        ({"pruning_ratio": [0.5, 0.75], "fine_tuning": 1.0}, r"`fine_tuning` is the fraction .* got 1\.0"),
        ({"pruning_ratio": 0.5, "fine_tuning": 0.5}, r"`fine_tuning` divides passes, and there is one ratio; got 0\.5"),
        ({"warmup": -1}, r"`warmup` is the number of epochs, or steps, .* 0 or more; got -1"),
        ({"warmup": float("inf")}, r"`warmup` .* got inf"),
        ({"delta": -0.1}, r"`delta` is the half-width of smooth-L1's rounded corner, 0 or more; got -0\.1"),
        ({"pruning_ratio": [0.5, 0.75], "begin": 5, "end": 4}, r"0 <= begin <= end; got begin=5, end=4"),
        ({"pruning_ratio": [0.5, 0.75], "every": 0}, r"`every` is the number of epochs"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BNSlimmingCallback(**arguments)


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [({"max_epochs": 2}, {}), ({"max_epochs": 12}, {"begin": 2, "end": 3}), ({"max_epochs": 12}, {"every": 9})],
)
def test_passes_that_do_not_fit(settings: dict[str, Any], arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"3 passes do not fit in: .* can cut only at epochs \[.*steps"):
        trainer(passes(**arguments), **settings).fit(Module())


def test_passes_beyond_the_end_are_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"ends at epoch 6, but max_epochs=5: this fit reaches only 67% of"):
        trainer(passes(begin=2, end=6), max_epochs=5).fit(Module())


def test_a_gradual_schedule_is_one_phase() -> None:
    module, walk = Alone(partial(SGD, lr=0.1)), Walk(0.1 * 0.01)
    callback = BNSlimmingCallback(0.5, strength=0.01, schedule=linear, begin=1, end=3)
    trainer(callback, walk, max_epochs=4).fit(module)
    assert walk.strides == pytest.approx([6, 6, 6, 0], abs=1e-2)


def test_no_pass_takes_more_than_half_of_what_a_layer_has() -> None:
    module = Alone(partial(SGD, lr=0.0))
    module.net[1].weight.data.fill_(0.01)
    trainer(BNSlimmingCallback([0.375, 0.625], allocation=Global(event_cap=0.5)), max_epochs=8).fit(module)
    widths_of = [
        {name: (change.before, change.after) for name, change in record.channels.items() if name != "net.8"}
        for record in history_of(module)
    ]
    assert widths_of == [{"net.0": (8, 4), "net.3": (8, 6)}, {"net.0": (4, 2), "net.3": (6, 4)}]
    assert "event_cap=0.5" in history_of(module)[0].held_back["net.0"]

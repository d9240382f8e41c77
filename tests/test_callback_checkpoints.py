"""Checkpoints around a cut: a file's score is that of its network, and a resumed fit is the unbroken one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import EXAMPLE, STEPS, Module, Resumable, equal, images, momentum, network, states, trainer, widths
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_prune import history_of, load_pruned
from lightning_prune.callbacks import BNSlimmingCallback, MagnitudePruneCallback, PruneCallback
from lightning_prune.errors import HistoryError
from lightning_prune.history import KEY
from lightning_prune.schedules import linear

# Lightning, where the resumed fit writes no checkpoints itself
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

EPOCHS = 7
CUTS = [3, 5]
METHODS: dict[str, Callable[[], PruneCallback]] = {
    "magnitude": lambda: MagnitudePruneCallback(0.5, schedule=linear, begin=1, end=5, every=2),
    "slimming": lambda: BNSlimmingCallback(0.5, strength=0.01, schedule=linear, begin=1, end=5, every=2),
}
OPTIMIZERS = {"momentum": momentum, "adamw": partial(AdamW, lr=0.01)}


def cosine(optimizer: Optimizer) -> dict[str, Any]:
    return {"lr_scheduler": CosineAnnealingLR(optimizer, EPOCHS)}


def all_epochs(folder: Path, **settings: Any) -> ModelCheckpoint:
    options = {"filename": "{epoch}", "auto_insert_metric_name": False, "save_top_k": -1}
    return ModelCheckpoint(folder, **(options | settings))


def fit(module: pl.LightningModule, *callbacks: Callback, epochs: int = EPOCHS, ckpt: Path | None = None) -> pl.Trainer:
    made = trainer(
        *callbacks, max_epochs=epochs, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks)
    )
    made.fit(module, ckpt_path=ckpt)
    return made


def read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


# scores


@pytest.mark.parametrize("example", [EXAMPLE, None], ids=["example", "first batch"])
@pytest.mark.parametrize("at_train_end", [True, False, None])
def test_the_score_of_each_file_is_that_of_its_network(
    tmp_path: Path, at_train_end: bool | None, example: Tensor | None
) -> None:
    keep = all_epochs(tmp_path, monitor="val_loss", save_on_train_epoch_end=at_train_end)
    fit(Module(example=example), METHODS["magnitude"](), keep)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == EPOCHS
    for file in files:
        loaded = load_pruned(Module(seed=9), file)
        assert len(history_of(loaded)) == sum(epoch <= int(file.stem) for epoch in CUTS)
        (score,) = [state["current_score"] for name, state in read(file)["callbacks"].items() if "Checkpoint" in name]
        (metrics,) = trainer().validate(loaded, verbose=False)
        assert metrics["val_loss"] == pytest.approx(float(score), abs=1e-7), file.name


def test_the_best_file_holds_the_best_network(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="val_loss")
    fit(Module(partial(AdamW, lr=0.02)), METHODS["magnitude"](), keep)
    loaded = load_pruned(Module(seed=9), keep.best_model_path)
    (metrics,) = trainer().validate(loaded, verbose=False)
    assert metrics["val_loss"] == pytest.approx(float(keep.best_model_score), abs=1e-7)


@pytest.mark.parametrize(
    ("keep", "settings", "warned"),
    [
        ({"monitor": "val_loss", "save_on_train_epoch_end": True}, {"val_check_interval": 0.5}, True),
        ({"monitor": "val_loss", "save_on_train_epoch_end": True}, {"check_val_every_n_epoch": 2}, True),
        ({"monitor": "val_loss", "every_n_train_steps": 2}, {}, True),
        ({"monitor": "val_loss", "save_on_train_epoch_end": True}, {}, False),
        ({"monitor": "val_loss"}, {"val_check_interval": 0.5}, False),
        ({"monitor": "train_loss", "every_n_train_steps": 2}, {}, False),
        ({"every_n_train_steps": 2}, {}, False),
    ],
)
def test_scores_from_before_a_cut_are_warned_about(
    tmp_path: Path, keep: dict[str, Any], settings: dict[str, Any], warned: bool
) -> None:
    made = trainer(ModelCheckpoint(tmp_path, **keep), enable_checkpointing=True, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        METHODS["magnitude"]().setup(made, Module(), "fit")
    assert any("saves between validations with the last 'val_loss'" in str(one.message) for one in caught) is warned


# resuming


@pytest.mark.parametrize("example", [EXAMPLE, None], ids=["example", "first batch"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_resumed_fit_is_the_unbroken_one(
    tmp_path: Path, method: Callable[[], PruneCallback], optimizer: Callable[..., Optimizer], example: Tensor | None
) -> None:
    """From before the cuts, between them and after them, bit for bit: weights, optimizer, history."""
    unbroken = Module(optimizer, cosine, example=example)
    whole = fit(unbroken, method(), all_epochs(tmp_path))
    expected = states(unbroken, whole.optimizers)
    assert sum(widths(unbroken)) == 8
    for epoch in (0, 2, 3, 4, 6 - 1):
        resumed = Module(optimizer, cosine, example=example, seed=9)
        callback = method()
        rest = fit(resumed, callback, ckpt=tmp_path / f"{epoch}.ckpt")
        assert equal(resumed.state_dict(), unbroken.state_dict()), epoch
        assert history_of(resumed) == history_of(unbroken)
        found = states(resumed, rest.optimizers)
        assert all(equal(found[name], state) for name, state in expected.items()), epoch
        assert callback.is_finished


class Crash(Callback):
    """Stops the fit at a step, as a broken machine would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("example", [EXAMPLE, None], ids=["example", "first batch"])
@pytest.mark.parametrize("steps_after_cut", [-1, 1, 4])
def test_a_crash_in_the_middle_of_an_epoch(tmp_path: Path, steps_after_cut: int, example: Tensor | None) -> None:
    """A checkpoint just before the cut, just after it, and later in the epoch of the cut, which must not cut again."""
    unbroken = Resumable(example=example)
    fit(unbroken, METHODS["magnitude"]())
    step = CUTS[0] * STEPS + steps_after_cut
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    broken = Resumable(example=example)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(broken, METHODS["magnitude"](), keep, Crash(step + 1))
    resumed = Resumable(example=example, seed=9)
    fit(resumed, METHODS["magnitude"](), ckpt=tmp_path / f"step={step}.ckpt")
    assert equal(resumed.state_dict(), unbroken.state_dict())
    assert history_of(resumed) == history_of(unbroken)


def test_a_cut_model_may_be_resumed_in_place(tmp_path: Path) -> None:
    module = Module()
    fit(module, METHODS["magnitude"](), all_epochs(tmp_path))
    expected = deepcopy(module.state_dict())
    fit(module, METHODS["magnitude"](), ckpt=tmp_path / "5.ckpt")
    assert equal(module.state_dict(), expected)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_earlier_checkpoint_brings_the_larger_network_back(
    tmp_path: Path, method: Callable[[], PruneCallback]
) -> None:
    """After the fit, the best network may be one from before the cuts."""
    module = Module()
    made = fit(module, method(), all_epochs(tmp_path))
    for epoch in (0, 3, 6, 0):
        path = tmp_path / f"{epoch}.ckpt"
        (found,) = made.validate(module, ckpt_path=path, verbose=False)
        assert len(history_of(module)) == sum(cut <= epoch for cut in CUTS)
        assert equal(module.state_dict(), read(path)["state_dict"])
        assert trainer().validate(load_pruned(Module(seed=9), path), verbose=False) == [found]


def test_the_fit_goes_on_from_an_earlier_checkpoint(tmp_path: Path) -> None:
    module = Module()
    fit(module, METHODS["magnitude"](), all_epochs(tmp_path))
    expected = deepcopy(module.state_dict())
    fit(module, METHODS["magnitude"](), ckpt=tmp_path / "1.ckpt")
    assert equal(module.state_dict(), expected)


def test_events_that_a_resumed_fit_has_missed_are_made_up_for(tmp_path: Path) -> None:
    """Trained for five epochs, then resumed with an event at epoch 2: it must not stay dense."""
    fit(Module(), all_epochs(tmp_path), epochs=5)
    module = Module()
    fit(module, PruneCallback(0.5, begin=2, end=2), ModelCheckpoint(tmp_path / "more"), ckpt=tmp_path / "4.ckpt")
    assert widths(module) == [4, 4]
    assert [record.epoch for record in history_of(module)] == [5]


# what stands in a checkpoint


def test_history_stands_in_every_checkpoint(tmp_path: Path) -> None:
    fit(Module(), METHODS["magnitude"](), all_epochs(tmp_path))
    lengths = [len(read(tmp_path / f"{epoch}.ckpt")[KEY]) for epoch in range(EPOCHS)]
    assert lengths == [0, 0, 0, 1, 1, 2, 2]
    (state,) = [state for name, state in read(tmp_path / "3.ckpt")["callbacks"].items() if "Magnitude" in name]
    assert state == {"done": 3}


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_checkpoint_serves_other_stages(tmp_path: Path, verb: str) -> None:
    class Tested(Module):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self(batch[0]).mean())

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

    made = fit(Tested(), METHODS["magnitude"]())
    made.save_checkpoint(tmp_path / "net.ckpt")
    module = Tested(seed=9)
    getattr(trainer(METHODS["magnitude"]()), verb)(module, images(), ckpt_path=tmp_path / "net.ckpt")
    assert widths(module) == [4, 4]


def test_the_modules_own_hook_still_runs(tmp_path: Path) -> None:
    class Own(Module):
        loaded: dict[str, Any] | None = None

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.loaded = checkpoint

    fit(Own(), METHODS["magnitude"](), all_epochs(tmp_path))
    module = Own()
    fit(module, METHODS["magnitude"](), ckpt=tmp_path / "4.ckpt")
    assert module.loaded is not None
    assert module.loaded["epoch"] == 4


def test_a_module_is_copied_with_its_hook_in_the_middle_of_a_fit() -> None:
    """The batch-size finder and averaging callbacks do so."""

    class Copy(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.twin = deepcopy(pl_module)

    copy, module = Copy(), Module()
    fit(module, METHODS["magnitude"](), copy)
    assert copy.twin.on_load_checkpoint.args[0] is copy.twin
    assert history_of(copy.twin) == history_of(module)


def test_a_damaged_history_stops_the_resuming(tmp_path: Path) -> None:
    fit(Module(), METHODS["magnitude"](), all_epochs(tmp_path))
    checkpoint = read(tmp_path / "4.ckpt")
    checkpoint[KEY][0]["kept"]["net.0.weight"][0] = [3, 3]
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    module = Module()
    with pytest.raises(HistoryError, match=r"impossible positions of net\.0\.weight"):
        fit(module, METHODS["magnitude"](), ckpt=tmp_path / "damaged.ckpt")
    assert widths(module) == [8, 8]


def test_resuming_into_another_network_is_refused(tmp_path: Path) -> None:
    fit(Module(), METHODS["magnitude"](), all_epochs(tmp_path))
    other = network()
    other[0] = nn.Conv2d(1, 9, 3, padding=1, bias=False)
    with pytest.raises(HistoryError, match="Build the model with the arguments that it was trained with"):
        fit(Module(net=other), METHODS["magnitude"](), ckpt=tmp_path / "4.ckpt")
    assert other[0].out_channels == 9


def test_a_list_of_patterns_is_the_same_callback_as_a_tuple() -> None:
    """A script passes (), a yaml gives []: a checkpoint of one is resumed by the other."""
    keys = {MagnitudePruneCallback(0.5, ignore=ignore).state_key for ignore in ((), [])}
    assert len(keys) == 1
    assert (
        MagnitudePruneCallback(0.5, ignore=["stem"]).state_key
        == MagnitudePruneCallback(0.5, ignore=("stem",)).state_key
    )

"""A fit with masks ends bit for bit as the unbroken one, whichever of its files it goes on from; damage is refused."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import STEPS, Module, Resumable, equal, network, states, trainer
from lightning.pytorch import callbacks as neighbours
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from masked import KEEP, Exact, is_exact, masked, weights_of
from torch import Tensor, nn, optim
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_prune import history_of, load_pruned
from lightning_prune.callbacks import PruneCallback, Retraining
from lightning_prune.callbacks.masking import MaskPruneCallback
from lightning_prune.errors import HistoryError, PruningError
from lightning_prune.history import save_pruned
from lightning_prune.masks.held import KEY, masks_of, pack, sparsity
from lightning_prune.schedules import linear

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:LBFGS keeps one flat history"),
    pytest.mark.filterwarnings("ignore:Asked .* of channels, reached"),
]


def dropping(seed: int = 0) -> nn.Sequential:
    """Its neurons emit something when they are dead, and what follows has no bias for it yet."""
    torch.manual_seed(seed)
    first, second = nn.Linear(36, 12), nn.Linear(12, 8, bias=False)
    first.weight.data[:2] *= 0.1
    first.bias.data.fill_(0.5)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Dropout(0.5), second, nn.ReLU(), nn.Linear(8, 4))


class Net(Resumable):
    """Its dropout draws the same numbers at the same step, also in another process."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(self.trainer.fit_loop.epoch_loop._batches_that_stepped)


def cosine(optimizer: Optimizer) -> dict[str, Any]:
    return {"lr_scheduler": {"scheduler": CosineAnnealingLR(optimizer, 4 * STEPS, eta_min=1e-4), "interval": "step"}}


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": partial(AdamW, lr=0.01),
    "rprop": partial(optim.Rprop, lr=0.001),
    "lbfgs": partial(optim.LBFGS, lr=0.1, max_iter=2),
}
if hasattr(optim, "Adafactor"):
    OPTIMIZERS["adafactor"] = partial(optim.Adafactor, lr=0.01)

WHOLE = Retraining(lr_factor=0.5, alternate=[["net.1"], ["net.[46]"]], rewind_to=3)

callback = partial(masked, 0.75, schedule=linear, begin=2, end=17, every_n_steps=5)  # at steps 7, 12 and 17


def ended(module: pl.LightningModule, fit: pl.Trainer, own: MaskPruneCallback) -> dict[str, Any]:
    """All that a fit leaves behind."""
    (optimizer,) = fit.optimizers
    rates = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {
        "state": states(module, fit.optimizers),
        "weights": module.state_dict(),
        "masks": dict(masks_of(module)),
        "flat": {key: value for key, value in next(iter(optimizer.state.values())).items() if key != "func_evals"},
        "rates": [{key: float(value) for key, value in group.items() if type(value) is float} for group in rates],
        "schedulers": [config.scheduler.state_dict() for config in fit.lr_scheduler_configs],
        "dropouts": [layer.p for layer in module.modules() if isinstance(layer, nn.Dropout)],
        "history": history_of(module),
        "own": own.state_dict(),
        "parts": [[tuple(parameter.shape) for parameter in part] for part in own._parts],
    }


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def fitted(
    make: Callable[..., Optimizer], retraining: Retraining, *others: Callback, seed: int = 0, file: Path | None = None
) -> dict[str, Any]:
    own, module, look = callback(retraining=retraining), Net(make, cosine, net=dropping(seed)), Exact()
    keeps = any(isinstance(one, ModelCheckpoint) for one in others)
    fit = trainer(own, *others, look, enable_checkpointing=keeps)
    fit.fit(module, ckpt_path=file)
    assert look.wrong == []
    return ended(module, fit, own)


def files(folder: Path, **settings: Any) -> ModelCheckpoint:
    options = {"filename": "{step}", "auto_insert_metric_name": False, "save_top_k": -1, "every_n_train_steps": 1}
    return ModelCheckpoint(folder, **(options | settings))


@pytest.mark.parametrize("retraining", [WHOLE, KEEP, Retraining()], ids=["all of it", "nothing", "default"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_it_ends_as_the_unbroken_fit(tmp_path: Path, make: Callable[..., Optimizer], retraining: Retraining) -> None:
    """From before, at, between and after events; not from the end of an epoch, where Lightning 2.6 skips one."""
    whole = fitted(make, retraining, files(tmp_path))
    assert sparsity(whole["masks"]) > 0.6
    every = (2, 3, 4, 7, 8, 11, 13, 16, 17, 20) if make is OPTIMIZERS["adamw"] else (3, 7, 11, 16)
    for step in every:
        resumed = fitted(make, retraining, seed=9, file=tmp_path / f"{step}.ckpt")
        for key, value in whole.items():
            assert alike(value, resumed[key]), (step, key)


def test_all_that_there_is_was_there_to_be_lost() -> None:
    """Of the fit that is broken above: events, dead neurons, rates, dropouts, an early copy, a bias that a cut made."""
    whole = fitted(OPTIMIZERS["adamw"], WHOLE)
    assert whole["own"]["done"] == 17
    assert whole["own"]["earlier"]
    assert whole["dropouts"][0] < 0.3
    assert whole["schedulers"][0]["base_lrs"] == [pytest.approx(0.005)]
    assert len(whole["history"]) >= 1
    assert "net.4.bias" in whole["weights"]


def test_by_epochs(tmp_path: Path) -> None:
    def run(seed: int = 0, file: Path | None = None, *others: Callback) -> dict[str, Any]:
        own = masked(0.75, begin=0, end=3, schedule=linear, retraining=Retraining(lr_factor=0.1, rewind_to=2))
        module = Net(OPTIMIZERS["adamw"], cosine, seed=seed)
        fit = trainer(own, *others, max_epochs=5, enable_checkpointing=bool(others))
        fit.fit(module, ckpt_path=file)
        return ended(module, fit, own)

    whole = run(0, None, files(tmp_path, filename="{epoch}", every_n_train_steps=None))
    for epoch in range(5):
        assert alike(whole, run(9, tmp_path / f"{epoch}.ckpt")), epoch


def test_with_an_average_and_cuts_of_another_callback(tmp_path: Path) -> None:
    """Masks and history of the copy are those of the network."""
    if not hasattr(neighbours, "EMAWeightAveraging"):
        pytest.skip("this Lightning has none")

    def run(seed: int = 0, file: Path | None = None, *others: Callback) -> dict[str, Any]:
        own, average = masked(0.6, begin=0, end=3, schedule=linear), neighbours.EMAWeightAveraging(decay=0.8)
        module = Net(OPTIMIZERS["adamw"], cosine, seed=seed)
        channels = PruneCallback(0.5, begin=2, end=2)
        fit = trainer(channels, own, average, *others, max_epochs=5, enable_checkpointing=bool(others))
        fit.fit(module, ckpt_path=file)
        assert is_exact(module)
        return ended(module, fit, own)

    whole = run(0, None, files(tmp_path, filename="{epoch}", every_n_train_steps=None))
    assert len(whole["history"]) == 1
    for epoch in range(4):
        resumed = run(9, tmp_path / f"{epoch}.ckpt")
        assert equal(resumed["weights"], whole["weights"]), epoch
        assert alike(resumed["masks"], whole["masks"]), epoch


def again(own: MaskPruneCallback, name: str) -> list[str]:
    """Let a step of each event fail behind its work, and the event come a second time."""
    real, hook, struck = getattr(own, name), own.on_train_batch_start, list[int]()
    failed: list[str] = []

    def fails(*given: Any, **also: Any) -> Any:
        result = real(*given, **also)
        if own._done not in struck and own.upkeep._handles:
            struck.append(own._done)
            raise RuntimeError("power cut")
        return result

    def twice(*given: Any) -> None:
        try:
            hook(*given)
        except RuntimeError as error:
            failed.append(str(error))
            hook(*given)

    setattr(own, name, fails)
    own.on_train_batch_start = twice  # type: ignore[method-assign]
    return failed


@pytest.mark.parametrize("name", ["_lower_dropouts", "_remove_dead", "_cut"])
def test_an_event_that_was_struck_comes_again_as_if_it_had_come_once(name: str) -> None:
    retraining = replace(WHOLE, rewind_to=None) if name == "_cut" else WHOLE
    whole = fitted(OPTIMIZERS["momentum"], retraining)
    own, module = callback(retraining=retraining), Net(OPTIMIZERS["momentum"], cosine, net=dropping())
    failed, fit = again(own, name), trainer(own)
    fit.fit(module)
    assert len(failed) == (len({record.step for record in whole["history"]}) if name == "_cut" else 3)
    found = ended(module, fit, own)
    for key in ("weights", "masks", "rates", "schedulers", "dropouts", "own", "state"):
        assert alike(found[key], whole[key]), key


# what does not fit


@pytest.fixture
def file(tmp_path: Path) -> Path:
    module = Module()
    trainer(masked(0.7), files(tmp_path, filename="{epoch}", every_n_train_steps=None), enable_checkpointing=True).fit(
        module
    )
    return tmp_path / "3.ckpt"


def first(found: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = found[KEY]["net.3.weight"]
    return entry


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no dict": lambda found: found.update({KEY: [1]}),
    "another name": lambda found: found[KEY].update({"net.7.weight": found[KEY].pop("net.3.weight")}),
    "a buffer": lambda found: found[KEY].update({"net.1.running_mean": found[KEY].pop("net.3.weight")}),
    "another shape": lambda found: first(found).update(shape=[8, 8, 9]),
    "a smaller shape": lambda found: first(found).update(shape=[4, 8, 3, 3], bits=torch.zeros(36, dtype=torch.uint8)),
    "no bits": lambda found: first(found).pop("bits"),
    "floats": lambda found: first(found).update(bits=torch.zeros(72)),
    "too many bits": lambda found: first(found).update(bits=torch.zeros(73, dtype=torch.uint8)),
    "a last bit": lambda found: found[KEY]["net.8.weight"].update(shape=[4, 7]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_masks_that_do_not_fit_are_refused_and_nothing_has_changed(
    file: Path, damage: Callable[[dict[str, Any]], object]
) -> None:
    found = torch.load(file, weights_only=True)
    damage(found)
    torch.save(found, file)
    module, own = Module(seed=9), masked(0.7)
    was = deepcopy(module.state_dict())
    for load in (
        lambda: trainer(own).fit(module, ckpt_path=file),
        lambda: trainer(own).validate(module, ckpt_path=file, verbose=False),
        lambda: load_pruned(module, file),
    ):
        with pytest.raises(HistoryError, match="masks do not fit the model, or are damaged"):
            load()
        assert equal(module.state_dict(), was)
        assert masks_of(module) == {}
        assert history_of(module) == ()
    assert own.state_dict()["done"] == -1


def test_masks_of_another_network_are_refused(file: Path) -> None:
    other = network()
    other[0], other[3] = nn.Conv2d(1, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
    module = Module(net=other)
    with pytest.raises(HistoryError, match=r"the mask for 'net\.0\.weight' has the shape \[8, 1, 3, 3\]"):
        trainer(masked(0.7)).fit(module, ckpt_path=file)
    assert masks_of(module) == {}


def flipped(file: Path) -> None:
    """Let the mask say that weights are pruned which are not."""
    found = torch.load(file, weights_only=True)
    bits = first(found)["bits"]
    first(found)["bits"] = bits & torch.tensor([0b10101010] * len(bits), dtype=torch.uint8)
    torch.save(found, file)


def test_flipped_bits_are_refused_before_the_first_step(file: Path) -> None:
    """A pruned weight would stand there that is not 0, and never become it."""
    flipped(file)
    module = Module(seed=9)
    fit = trainer(masked(0.7), max_epochs=6)
    with pytest.raises(PruningError, match=r"'net\.3\.weight' prunes \d+ weights that are not 0"):
        fit.fit(module, ckpt_path=file)
    assert fit.global_step == 4 * STEPS


def test_flipped_bits_are_refused_by_load_pruned(file: Path) -> None:
    flipped(file)
    with pytest.raises(PruningError, match="not 0"):
        load_pruned(Module(seed=9), file)


def test_masks_come_back_from_save_pruned(file: Path, tmp_path: Path) -> None:
    module = load_pruned(Module(seed=9), file)
    save_pruned(module, tmp_path / "again.ckpt")
    again = load_pruned(Module(seed=8), tmp_path / "again.ckpt")
    assert alike(pack(masks_of(again)), pack(masks_of(module)))
    assert equal(weights_of(again), weights_of(module))
    assert is_exact(again)

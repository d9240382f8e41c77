"""A fit with gates ends bit for bit as the unbroken one, whichever of its files it goes on from; damage is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import Resumable, network, trainer
from gated import adam, mlp, nothing_left
from lightning.pytorch import callbacks as neighbours
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from test_mask_resume import alike, cosine, files
from torch import nn
from torch.optim import SGD, Optimizer

from lightning_prune import history_of, load_pruned
from lightning_prune.callbacks import L0PruneCallback, PrunedStateMixin
from lightning_prune.callbacks.base import unwrapped
from lightning_prune.errors import HistoryError
from lightning_prune.layers.gates import KEY, gates_of
from lightning_prune.masks import masks_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]

sgd = partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01)

MIXED: Any = {"net.1": "channels", "net.3": "weights", "net.5": "inputs"}

GOALS: dict[str, dict[str, Any]] = {
    "ratio": {"pruning_ratio": 0.5},
    "strength": {"strength": 0.3, "weight_decay": 0.01},
    "bernoulli": {"pruning_ratio": 0.5, "estimator": "bernoulli"},
}

callback = partial(L0PruneCallback, gate_lr=0.3, start=2, begin=14, end=20, every_n_steps=3, drop_rate=0.3)


def ended(module: pl.LightningModule, fit: pl.Trainer, own: L0PruneCallback) -> dict[str, Any]:
    """All that a fit leaves behind."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    (optimizer,) = map(unwrapped, fit.optimizers)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {
        "weights": module.state_dict(),
        "masks": dict(masks_of(module)),
        "optimizer": {names[parameter]: state for parameter, state in optimizer.state.items()},
        "groups": groups,
        "schedulers": [config.scheduler.state_dict() for config in fit.lr_scheduler_configs],
        "history": history_of(module),
        "own": own.state_dict(),
    }


def fitted(
    make: Callable[..., Optimizer],
    goal: dict[str, Any],
    *others: Callback,
    seed: int = 0,
    file: Path | None = None,
    net: Callable[[int], nn.Module] = mlp,
    **settings: Any,
) -> dict[str, Any]:
    own = callback(**goal)
    module = Resumable(make, cosine, net=net(seed))
    keeps = any(isinstance(one, ModelCheckpoint) for one in others)
    options = {"max_epochs": 4, "limit_val_batches": 0, "enable_checkpointing": keeps} | settings
    fit = trainer(own, *others, **options)
    fit.fit(module, ckpt_path=file)
    if fit.global_step == 24:
        nothing_left(module, fit)
    return ended(module, fit, own)


@pytest.mark.parametrize("goal", GOALS.values(), ids=GOALS)
@pytest.mark.parametrize("make", [adam, sgd], ids=["adam", "sgd"])
def test_it_ends_as_the_unbroken_fit(tmp_path: Path, make: Callable[..., Optimizer], goal: dict[str, Any]) -> None:
    """From before there were gates, with them, at and between events, and after the closing."""
    goal = {**goal, "granularity": MIXED}
    whole = fitted(make, goal, files(tmp_path))
    assert len(whole["history"]) == 3
    assert whole["masks"].keys() == {"net.3.weight", "net.5.weight"}
    for step in (1, 2, 14, 17, 22):
        resumed = fitted(make, goal, seed=9, file=tmp_path / f"{step}.ckpt")
        for key, value in whole.items():
            assert alike(value, resumed[key]), (step, key)


def test_there_was_something_to_lose(tmp_path: Path) -> None:
    """Of the fit that is broken above: a multiplier, gates that were cut, running means of gradients."""
    fitted(sgd, {**GOALS["ratio"], "granularity": MIXED}, files(tmp_path))
    found = {step: torch.load(tmp_path / f"{step}.ckpt", weights_only=True) for step in (8, 15, 17, 22)}
    states = {
        step: next(value for name, value in file["callbacks"].items() if name.startswith("L0PruneCallback"))
        for step, file in found.items()
    }
    assert float(states[8]["constraint"]["multiplier"]) != 0
    assert states[8]["constraint"]["steps"] == 18
    assert [value.shape for value in states[8]["steady"]["squares"]] != [
        value.shape for value in states[17]["steady"]["squares"]
    ]
    assert len(found[8]["optimizer_states"][0]["param_groups"]) == 2
    assert len(found[22]["optimizer_states"][0]["param_groups"]) == 1
    assert KEY in found[17]
    assert KEY not in found[22]
    assert states[22]["masked"]


@pytest.mark.parametrize("make", [adam, sgd], ids=["adam", "sgd"])
def test_by_epochs_with_norms(tmp_path: Path, make: Callable[..., Optimizer]) -> None:
    """Also from the end of the epoch before an event, which comes before the first batch of the resumed fit."""

    def run(seed: int = 0, file: Path | None = None, *others: Callback) -> dict[str, Any]:
        own = L0PruneCallback(0.4, of="macs", gate_lr=0.3, start=1, begin=3, end=5)
        module = Resumable(make, cosine, net=network(seed))
        fit = trainer(own, *others, max_epochs=7, limit_val_batches=0, enable_checkpointing=bool(others))
        fit.fit(module, ckpt_path=file)
        nothing_left(module, fit)
        return ended(module, fit, own)

    whole = run(0, None, files(tmp_path, filename="{epoch}", every_n_train_steps=None))
    assert [record.epoch for record in whole["history"]] == [3, 4, 5]
    for epoch in (0, 2, 3, 4, 5):
        resumed = run(9, tmp_path / f"{epoch}.ckpt")
        for key, value in whole.items():
            assert alike(value, resumed[key]), (epoch, key)


@pytest.mark.skipif(not hasattr(neighbours, "EMAWeightAveraging"), reason="this Lightning has none")
@pytest.mark.parametrize("first", [True, False], ids=["gates first", "average first"])
def test_with_an_average(tmp_path: Path, first: bool) -> None:
    def run(seed: int = 0, file: Path | None = None, *others: Callback) -> dict[str, Any]:
        own, average = callback(0.5), neighbours.EMAWeightAveraging(decay=0.8)
        module = Resumable(adam, cosine, net=network(seed))
        fit = trainer(*[own, average][:: 1 if first else -1], *others, enable_checkpointing=bool(others))
        fit.fit(module, ckpt_path=file)
        return {"weights": module.state_dict(), "history": history_of(module)}

    whole = run(0, None, files(tmp_path))
    for step in (1, 15, 22):
        assert alike(whole, run(9, tmp_path / f"{step}.ckpt")), step


class Mixed(PrunedStateMixin, Resumable):
    """Its files bring their gates along."""


def test_files_from_the_middle_give_the_logged_score(tmp_path: Path) -> None:
    """With gates on, after a first cut with gates still on, and after the closing."""
    module = Resumable(adam, seed=0)
    own = L0PruneCallback(strength=0.5, of="channels", gate_lr=0.3, begin=2, end=4, every=1)
    keep = ModelCheckpoint(
        tmp_path, monitor="val_loss", filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1
    )
    seen: dict[int, float] = {}

    class Scores(Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not trainer.sanity_checking:
                seen[trainer.current_epoch] = float(trainer.callback_metrics["val_loss"])

    trainer(own, keep, Scores(), max_epochs=6, enable_checkpointing=True).fit(module)
    gated = {}
    for epoch, score in seen.items():
        file = tmp_path / f"{epoch}.ckpt"
        for validate in ("validate", "load_pruned", "load_from_checkpoint"):
            if validate == "validate":
                other: pl.LightningModule = Resumable(adam, seed=7)
                found = trainer(L0PruneCallback(0.5)).validate(other, ckpt_path=file, verbose=False)
            else:
                other = Resumable(adam, seed=7) if validate == "load_pruned" else None  # type: ignore[assignment]
                other = load_pruned(other, file) if other is not None else Mixed.load_from_checkpoint(file)
                found = trainer().validate(other, verbose=False)
            assert found[0]["val_loss"] == pytest.approx(score, abs=1e-6), (epoch, validate)
            gated[epoch] = gates_of(other) is not None
    assert gated == {0: True, 1: True, 2: True, 3: True, 4: False, 5: False}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    fitted(sgd, {"pruning_ratio": 0.5}, files(tmp_path))
    return tmp_path / "16.ckpt"


def damaged(content: dict[str, Any], how: str) -> None:
    packed = content[KEY]
    gate = packed["gates"]["net.1"]
    alpha = next(key for key in content["state_dict"] if key.endswith("net/1.log_alpha"))
    if how == "other shape":
        gate["shape"] = [gate["shape"][0] + 1]
    elif how == "another kind":
        gate["kind"] = "soft"
    elif how == "no gate of that name":
        del packed["gates"]["net.1"]
    elif how == "another layer":
        packed["readings"]["net.9"] = packed["readings"].pop("net.3")
    elif how == "an index beyond":
        packed["readings"]["net.3"]["index"][0] = 99
    elif how == "no dictionary":
        content[KEY] = [1, 2]
    elif how == "weights of another shape":
        content["state_dict"][alpha] = torch.zeros(3)
    else:
        raise AssertionError(how)


DAMAGES = (
    "other shape",
    "another kind",
    "no gate of that name",
    "another layer",
    "an index beyond",
    "no dictionary",
    "weights of another shape",
)


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_gates_are_refused(file: Path, how: str) -> None:
    content = torch.load(file, weights_only=True)
    damaged(content, how)
    torch.save(content, file)
    module = Resumable(sgd, cosine, net=mlp(3))
    was = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(HistoryError):
        load_pruned(module, file)
    assert alike(was, module.state_dict())
    assert gates_of(module) is None
    error = RuntimeError if how in ("weights of another shape", "other shape") else HistoryError
    with pytest.raises((error, HistoryError)):
        fitted(sgd, {"pruning_ratio": 0.5}, file=file)


def test_a_network_of_other_sizes_is_refused(file: Path) -> None:
    def wider(seed: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 13), nn.ReLU(), nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 4))

    with pytest.raises(HistoryError):
        load_pruned(Resumable(sgd, cosine, net=wider(0)), file)
    with pytest.raises(HistoryError):
        fitted(sgd, {"pruning_ratio": 0.5}, file=file, net=wider)

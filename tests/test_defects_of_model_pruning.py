"""The defects of Lightning's ModelPruning, and of plain surgery inside a fit, one by one: none of them can happen here.

Two of the list need several processes and stand with the tests of DDP: masks that differ by rank, and the reducer.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import EXAMPLE, STEPS, Module, equal, kept_of, momentum, states, trainer, widths
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_prune import history_of, load_pruned
from lightning_prune.callbacks import BNSlimmingCallback, MagnitudePruneCallback, PruneCallback, SparsityMonitor
from lightning_prune.callbacks.base import unwrapped
from lightning_prune.schedules import linear
from lightning_prune.tensors import named_tensors

# Lightning, where the resumed fit writes no checkpoints itself
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

EPOCHS = 6

METHODS: dict[str, Callable[..., PruneCallback]] = {
    "prune": partial(PruneCallback, constants="drop"),
    "magnitude": partial(MagnitudePruneCallback, constants="drop"),
    "slimming": partial(BNSlimmingCallback, strength=0.01, constants="drop"),
}
ALL = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


class Around(Callback):
    """Copies what stands before and after every cut; one goes before the prune callback, one after it."""

    def __init__(self, seen: list[dict[str, Tensor]]) -> None:
        self.seen = seen

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append({name: tensor.detach().clone() for name, tensor in named_tensors(pl_module).items()})


def fit(module: Module, *callbacks: Callback, ckpt: Path | None = None, **settings: Any) -> pl.Trainer:
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    made = trainer(*callbacks, **({"max_epochs": EPOCHS, "enable_checkpointing": saves} | settings))
    made.fit(module, ckpt_path=ckpt)
    return made


def every_epoch(folder: Path, **settings: Any) -> ModelCheckpoint:
    options: dict[str, Any] = {"filename": "{epoch}", "auto_insert_metric_name": False, "save_top_k": -1}
    return ModelCheckpoint(folder, **(options | settings))


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


# Lightning's ModelPruning


@ALL
def test_defect_1_weights_are_reset_after_every_epoch_by_default(method: Callable[..., PruneCallback]) -> None:
    """What survives a cut is what was trained, bit for bit, and no initial value comes back."""
    module = Module()
    initial = deepcopy(module.state_dict())
    before, after = list[dict[str, Tensor]](), list[dict[str, Tensor]]()
    fit(module, Around(before), method(0.5), Around(after))
    cuts = {record.epoch: record for record in history_of(module)}
    assert cuts
    for epoch in range(EPOCHS):
        for name, tensor in before[epoch].items():
            stays = kept_of(tensor, cuts[epoch], name) if epoch in cuts else tensor
            assert torch.equal(after[epoch][name], stays), (epoch, name)
    for at, record in cuts.items():
        assert at is not None
        assert not torch.equal(after[at]["net.0.weight"], kept_of(initial["net.0.weight"], record, "net.0.weight"))


@ALL
def test_defect_2_what_somebody_keeps_of_the_start_trains_along(method: Callable[..., PruneCallback]) -> None:
    """A cut puts new memory into place, and the callback keeps no weights at all."""

    class Keeps(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 2:
                self.held = {name: tensor.data for name, tensor in named_tensors(pl_module).items()}
                self.values = {name: tensor.clone() for name, tensor in self.held.items()}

    keeps, callback, module = Keeps(), method(0.5, begin=2, end=2), Module()
    fit(module, keeps, callback)
    (record,) = history_of(module)
    assert len(record.kept) == 11
    for name in record.kept:
        assert torch.equal(keeps.held[name], keeps.values[name])
    assert not any(isinstance(value, Tensor) for value in callback.__dict__.values())
    assert not any(isinstance(value, Tensor) for value in callback.state_dict().values())


@ALL
def test_defect_3_biases_and_norms_are_pruned_entry_by_entry_by_default(method: Callable[..., PruneCallback]) -> None:
    """Whole channels go, from all tensors that they run through; nothing is masked, and the outputs are not touched."""
    module, after = Module(), list[dict[str, Tensor]]()
    fit(module, method(0.5, begin=2, end=2), Around(after))
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if tensor.dim()}
    first, second = widths(module)
    assert first + second == 8
    assert shapes["net.0.weight"] == (first, 1, 3, 3)
    assert shapes["net.3.weight"] == (second, first, 3, 3)
    assert {shapes[f"net.1.{part}"] for part in ("weight", "bias", "running_mean", "running_var")} == {(first,)}
    assert {shapes[f"net.4.{part}"] for part in ("weight", "bias", "running_mean", "running_var")} == {(second,)}
    assert shapes["net.8.weight"] == (4, second)
    assert shapes["net.8.bias"] == (4,)
    for name in ("net.0.weight", "net.3.weight", "net.8.weight", "net.8.bias"):
        assert (after[2][name] != 0).all(), "a mask"


@ALL
@pytest.mark.parametrize("events", [1, 2, 4])
def test_defect_4_the_amount_compounds(method: Callable[..., PruneCallback], events: int) -> None:
    """However many events there are, and in a second fit, the ratio is that of the dense network."""
    module = Module()
    fit(module, method(0.5, schedule=linear, begin=1, end=events))
    assert 1 <= len(history_of(module)) <= events
    assert history_of(module)[-1].reached == 0.5
    assert sum(widths(module)) == 8
    fit(module, method(0.5, begin=1, end=1))
    assert history_of(module)[-1].reached == 0.5
    assert sum(widths(module)) == 8


@ALL
def test_defect_5_resuming_loses_the_sparsity(tmp_path: Path, method: Callable[..., PruneCallback]) -> None:
    module, callback = Module(), partial(method, 0.5, begin=1, end=1)
    fit(module, callback(), every_epoch(tmp_path))
    params = sum(parameter.numel() for parameter in module.parameters())
    for epoch in (1, EPOCHS - 2):
        resumed = Module(seed=9)
        fit(resumed, callback(), ckpt=tmp_path / f"{epoch}.ckpt")
        assert widths(resumed) == widths(module)
        assert sum(parameter.numel() for parameter in resumed.parameters()) == params < 500
        assert len(history_of(resumed)) == 1


@ALL
def test_defect_6_resuming_crashes_on_missing_and_unexpected_keys(
    tmp_path: Path, method: Callable[..., PruneCallback]
) -> None:
    """The names in a checkpoint are those of the dense module, and the resumed fit is the unbroken one."""
    module = Module()
    names = set(module.state_dict())
    fit(module, method(0.5, begin=2, end=2), every_epoch(tmp_path))
    for epoch in (0, 1, 2, 4):
        assert set(read(tmp_path / f"{epoch}.ckpt")["state_dict"]) == names
        resumed = Module(seed=9)
        fit(resumed, method(0.5, begin=2, end=2), ckpt=tmp_path / f"{epoch}.ckpt")
        assert equal(resumed.state_dict(), module.state_dict())


@ALL
@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "EMAWeightAveraging"])
@pytest.mark.parametrize("first", [False, True], ids=["averaging last", "averaging first"])
def test_defect_7_averaging_callbacks_crash(method: Callable[..., PruneCallback], name: str, first: bool) -> None:
    """The parameters keep their order, and the averaged copy is cut with the network."""
    kind = getattr(pl.callbacks, name, None)
    if kind is None:
        pytest.skip(f"this Lightning has no {name}")
    averaging = kind(**({"swa_lrs": 0.01, "swa_epoch_start": 1} if name.startswith("Stoch") else {"decay": 0.9}))
    module, prune = Module(), method(0.5, begin=3, end=3)
    order = [parameter for _, parameter in module.named_parameters()]
    fit(module, *((averaging, prune) if first else (prune, averaging)))
    assert all(now is then for now, then in zip(module.parameters(), order, strict=True))
    copy = averaging._average_model
    copy = getattr(copy, "module", copy)
    assert widths(copy) == widths(module)
    assert sum(widths(module)) == 8
    assert history_of(copy) == history_of(module)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@ALL
@pytest.mark.parametrize("at_train_end", [True, False, None])
def test_defect_8_the_best_score_is_that_of_another_model(
    tmp_path: Path, method: Callable[..., PruneCallback], at_train_end: bool | None
) -> None:
    keep = every_epoch(tmp_path, monitor="val_loss", save_on_train_epoch_end=at_train_end)
    fit(Module(), method(0.5, schedule=linear, begin=1, end=3), keep)
    assert len(keep.best_k_models) == EPOCHS
    for path, score in keep.best_k_models.items():
        (metrics,) = trainer().validate(load_pruned(Module(seed=9), path), verbose=False)
        assert metrics["val_loss"] == pytest.approx(float(score), abs=1e-7)


@ALL
def test_defect_10a_one_dimensional_tensors_raise_by_default(method: Callable[..., PruneCallback]) -> None:
    module = Module()
    assert {tensor.dim() for tensor in module.parameters()} == {1, 2, 4}
    fit(module, method(0.5))
    assert sum(widths(module)) == 8


@ALL
@pytest.mark.parametrize("example", [EXAMPLE, None], ids=["example", "first batch"])
def test_defect_10b_without_a_validation_loop_nothing_is_pruned(
    method: Callable[..., PruneCallback], example: Tensor | None
) -> None:
    module = Module(example=example)
    fit(module, method(0.5), limit_val_batches=0)
    assert sum(widths(module)) == 8


@ALL
def test_defect_10c_a_callback_that_never_prunes_says_nothing(method: Callable[..., PruneCallback]) -> None:
    with pytest.raises(MisconfigurationException, match=r"never fires.*Lower `begin`"):
        fit(Module(), method(0.5, begin=EPOCHS))


@ALL
def test_defect_11a_nothing_reaches_the_logger(method: Callable[..., PruneCallback]) -> None:
    module = Module()
    metrics = fit(module, method(0.5, begin=2, end=2), SparsityMonitor()).callback_metrics
    assert float(metrics["prune/pruning_ratio"]) == 0.5
    assert int(metrics["prune/params"]) == sum(parameter.numel() for parameter in module.parameters())
    assert [int(metrics[f"prune/channels/net.{layer}"]) for layer in (0, 3)] == widths(module)
    assert metrics["prune/macs"] > 0


@ALL
def test_defect_11b_the_callback_keeps_no_state(tmp_path: Path, method: Callable[..., PruneCallback]) -> None:
    callback = method(0.5, begin=2, end=2)
    before = callback.state_dict()
    fit(Module(), callback, every_epoch(tmp_path))
    assert callback.state_dict() != before
    assert read(tmp_path / "4.ckpt")["callbacks"][callback.state_key] == callback.state_dict()
    fresh = method(0.5, begin=2, end=2)
    fit(Module(), fresh, ckpt=tmp_path / "4.ckpt")
    assert fresh.is_finished


@ALL
def test_defect_of_issue_8542_a_callback_cannot_be_used_or_copied_again(method: Callable[..., PruneCallback]) -> None:
    callback, ends = method(0.5, begin=2, end=2), []
    for _ in range(3):
        module = Module()
        fit(module, callback)
        ends.append(deepcopy(module.state_dict()))
        callback = deepcopy(callback)
    assert equal(ends[0], ends[1])
    assert equal(ends[0], ends[2])
    assert sum(widths(module)) == 8


# plain surgery inside a fit


class Moves(Callback):
    """Tells which parameters have moved in the step after the cut."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.still, self.strange = epoch, ["not seen"], 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.before = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step == self.epoch * STEPS + 1:
            named = dict(pl_module.named_parameters())
            self.still = [name for name, now in named.items() if torch.equal(now, self.before[name])]
            held = {
                id(p) for one in trainer.optimizers for group in unwrapped(one).param_groups for p in group["params"]
            }
            self.strange = len(held ^ set(map(id, named.values())))


@ALL
@pytest.mark.parametrize("optimizer", [momentum, partial(Adam, lr=0.01)], ids=["momentum", "adam"])
def test_defect_of_surgery_the_optimizer_keeps_one_parameter_of_ten_and_the_others_stand_still(
    method: Callable[..., PruneCallback], optimizer: Callable[..., Optimizer]
) -> None:
    moves = Moves(epoch=2)
    fit(Module(optimizer), method(0.5, begin=2, end=2), moves)
    assert moves.still == []
    assert moves.strange == 0


class Rates(Callback):
    """Writes down learning rates before each step, and the optimizer's state around the cut."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        if trainer.global_step == 2 * STEPS:
            self.after = states(pl_module, trainer.optimizers)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 2:
            self.before = states(pl_module, trainer.optimizers)


@ALL
@pytest.mark.parametrize("optimizer", [momentum, partial(Adam, lr=0.01)], ids=["momentum", "adam"])
def test_defect_of_surgery_momentum_is_lost_and_the_learning_rates_start_again(
    method: Callable[..., PruneCallback], optimizer: Callable[..., Optimizer]
) -> None:
    def cosine(made: Optimizer) -> dict[str, Any]:
        return {"lr_scheduler": CosineAnnealingLR(made, EPOCHS)}

    module, plain, cut = Module(optimizer, cosine), Rates(), Rates()
    fit(Module(optimizer, cosine), plain)
    fit(module, cut, method(0.5, begin=2, end=2))
    assert cut.rates == plain.rates
    assert len(set(cut.rates)) == EPOCHS
    (record,) = history_of(module)
    for name, state in cut.before.items():
        assert len(state) > 1
        for key, value in state.items():
            assert torch.equal(cut.after[name][key], kept_of(value, record, name)), (name, key)


@ALL
def test_defect_of_surgery_a_checkpoint_does_not_fit_the_network(
    tmp_path: Path, method: Callable[..., PruneCallback]
) -> None:
    """Larger files into smaller networks and smaller ones into larger: all of them, in one module, again and again."""
    module = Module()
    made = fit(module, method(0.5, schedule=linear, begin=1, end=3), every_epoch(tmp_path))
    for epoch in (5, 0, 2, 1, 3, 5):
        path = tmp_path / f"{epoch}.ckpt"
        for network in (module, Module(seed=9)):
            made.validate(network, ckpt_path=path, verbose=False)
            assert equal(network.state_dict(), read(path)["state_dict"])
    dense = nn.Module.load_state_dict
    with pytest.raises(RuntimeError, match=r"size mismatch for net\.0\.weight"):
        dense(Module(seed=9), read(tmp_path / "5.ckpt")["state_dict"])

"""Weights are exchanged beside mixed precision, averaging and other masks, in resumed fits, and in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import rigl_ddp_fits
import torch
from fits import STEPS, Module, Resumable, equal, states, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks as neighbours
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from test_rigl import OPTIMIZERS, Undisturbed, Watch, kept, sparse
from torch.amp import GradScaler
from torch.optim import SGD, Optimizer

from lightning_prune.callbacks import MagnitudePruneCallback, PrunedStateMixin, RigLCallback
from lightning_prune.masks.growing import random_masks
from lightning_prune.masks.held import masks_of


def test_bfloat16() -> None:
    module, watch = Module(OPTIMIZERS["adamw"]), Undisturbed()
    trainer(sparse(), watch, precision="bf16-mixed").fit(module)
    assert watch.changed == [4, 8, 12, 16]
    assert watch.zero == [True] * 24


def half_precision(scale: float) -> dict[str, Any]:
    return {"plugins": MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=scale, growth_interval=1000))}


@pytest.mark.parametrize("optimizer", [OPTIMIZERS["sgd"], OPTIMIZERS["adamw"], OPTIMIZERS["fused adamw"]])
def test_a_grad_scaler(optimizer: Callable[..., Optimizer]) -> None:
    """Also with fused optimizers, for which it looks at the gradients a second time."""
    module, watch = Module(optimizer), Undisturbed()
    fit = trainer(sparse(), watch, **half_precision(2.0**8))
    fit.fit(module)
    assert watch.changed == [4, 8, 12, 16]
    assert watch.zero == [True] * 24
    assert fit.precision_plugin.scaler.get_scale() == 2.0**8  # type: ignore[union-attr]


class Overflows(Module):
    """At given steps a gradient is infinite: of a masked weight, or of a bias alone."""

    def __init__(self, optimizer: Callable[..., Optimizer], at: dict[int, str]) -> None:
        super().__init__(optimizer)
        self.at = at

    def on_after_backward(self) -> None:
        name = self.at.get(self.trainer.fit_loop.epoch_loop.total_batch_idx)
        if name is not None:
            gradient = dict(self.named_parameters())[name].grad
            assert gradient is not None
            gradient.view(-1)[0] = torch.inf


@pytest.mark.parametrize("optimizer", [OPTIMIZERS["sgd"], OPTIMIZERS["fused adamw"]], ids=["sgd", "fused"])
def test_gradients_that_overflow(optimizer: Callable[..., Optimizer]) -> None:
    """Of masked weights: the exchange waits. Of others: it does not, and the step after it is one like any other."""
    module, watch = Overflows(optimizer, {4: "net.3.weight", 8: "net.8.bias"}), Undisturbed()
    fit = trainer(sparse(), watch, **half_precision(2.0**8))
    fit.fit(module)
    assert watch.changed == [5, 8, 12, 16]
    assert watch.zero == [True] * 24
    assert fit.precision_plugin.scaler.get_scale() == 2.0**6  # type: ignore[union-attr]
    steps = {int(state["step"]) for state in states(module, fit.optimizers).values() if "step" in state}
    assert steps <= {24 - 5}


@pytest.mark.skipif(not hasattr(neighbours, "EMAWeightAveraging"), reason="Lightning 2.6 has it")
@pytest.mark.parametrize("side", [1, -1], ids=["first", "last"])
def test_averaged_copies_follow(side: int) -> None:
    averaging = neighbours.EMAWeightAveraging(decay=0.9)
    module = Module()
    seen: list[bool] = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            copy = dict(averaging._average_model.module.named_parameters())  # type: ignore[union-attr]
            masks = masks_of(pl_module)
            seen.append(all(bool((copy[name][~mask] == 0).all()) for name, mask in masks.items()))

    trainer(*[sparse(), averaging][::side], Looks()).fit(module)
    assert seen == [True] * 24
    assert kept(module) == {name: int(mask.count_nonzero()) for name, mask in random_masks(module, 0.8).items()}
    assert all(
        bool((dict(module.named_parameters())[name][~mask] == 0).all()) for name, mask in masks_of(module).items()
    )


weights = partial(MagnitudePruneCallback, 0.5, granularity="weights", begin=1, end=2)


@pytest.mark.parametrize("side", [1, -1], ids=["first", "last"])
def test_two_that_mask_the_same_weight_are_refused(side: int) -> None:
    module = Module()
    with pytest.raises(MisconfigurationException, match=r"both mask 'net.0.weight'. Keep one of .*`ignore`"):
        trainer(*[sparse(), weights()][::side]).fit(module)
    assert masks_of(module) == {}


@pytest.mark.parametrize("side", [1, -1], ids=["first", "last"])
def test_layers_can_be_divided_between_callbacks(side: int) -> None:
    """Three of them: each keeps to its own weights."""
    module = Module()
    callbacks = [
        RigLCallback(0.7, every_n_steps=3, ignore=["net.0", "net.8"]),
        RigLCallback(0.5, grow="random", every_n_steps=4, ignore=["net.3", "net.8"]),
        weights(ignore=["net.0", "net.3"]),
    ]
    watch = Watch()
    trainer(*callbacks[::side], watch).fit(module)
    assert kept(module) == {"net.0.weight": 36, "net.3.weight": 173, "net.8.weight": 16}
    assert watch.zero == [True] * 24


def test_a_search_for_the_learning_rate_takes_no_part() -> None:
    searched, plain = Module(SearchedSGD), Module(SearchedSGD)
    fit = trainer(sparse())
    searched.lr = 0.05
    Tuner(fit).lr_find(searched, num_training=12, update_attr=False)
    fit.fit(searched)
    trainer(sparse()).fit(plain)
    assert equal(searched.state_dict(), plain.state_dict())


SearchedSGD = partial(SGD, lr=0.05, momentum=0.9)


METHODS: dict[str, Callable[[], Callback]] = {
    "rigl": partial(sparse, every_n_steps=3, end=12),
    "set": partial(sparse, every_n_steps=3, end=12, grow="random"),
}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_fit_resumed_within_an_epoch_is_the_unbroken_one(
    tmp_path: Path, method: Callable[[], Callback], optimizer: str, accumulate: int
) -> None:
    """From before the first exchange, right before one, right after one and between two."""
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    unbroken, watch = Resumable(OPTIMIZERS[optimizer]), Watch()
    whole = trainer(method(), keep, watch, enable_checkpointing=True, **settings)
    whole.fit(unbroken)
    assert len(watch.changed) == 3
    expected = states(unbroken, whole.optimizers)
    for step in (at for at in (1, 3, 4, 5, 7, 9, 10, 11) if at % (STEPS // accumulate)):
        resumed = Resumable(OPTIMIZERS[optimizer], seed=9)
        rest = trainer(method(), **settings)
        rest.fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert equal(dict(masks_of(resumed)), dict(masks_of(unbroken))), step
        assert equal(resumed.state_dict(), unbroken.state_dict()), step
        found = states(resumed, rest.optimizers)
        assert all(equal(found[name], state) for name, state in expected.items()), step


class Sparse(PrunedStateMixin, Module):
    """Its files bring the masks along."""


def test_files_hold_the_masks(tmp_path: Path) -> None:
    module, loaded = Sparse(), Sparse(seed=5)
    fit = trainer(sparse())
    fit.fit(module)
    fit.save_checkpoint(tmp_path / "end.ckpt")
    loaded = Sparse.load_from_checkpoint(tmp_path / "end.ckpt")
    assert equal(dict(masks_of(loaded)), dict(masks_of(module)))
    assert equal(loaded.state_dict(), module.state_dict())


Ranks = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What became of all fits, on both ranks; they run once, for the processes take long to start."""
    folder, here = tmp_path_factory.mktemp("rigl_ddp"), Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "MASTER", "LOCAL_RANK"))}
    command = [sys.executable, rigl_ddp_fits.__file__, str(folder)]
    ran = subprocess.run(
        command, env={**clean, "PYTHONPATH": paths}, cwd=folder, timeout=300, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    return first, second


@pytest.mark.parametrize("name", rigl_ddp_fits.FITS)
def test_ranks_exchange_the_same_weights(ranks: Ranks, name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert "unexpected" not in first, first
    assert first == second
    assert first["exchanges"] == 4
    assert first["zero"]
    assert sum(first["kept"].values()) == 136

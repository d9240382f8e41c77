"""Fits on two processes; each rank writes what became of them to `<folder>/rank<n>.json`. Run by test_ddp.py.

python ddp_fits.py <folder>
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fits import Module, images, trainer, widths
from gated import mlp
from lightning.pytorch import callbacks as neighbours
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune import history_of
from lightning_prune.allocation import Global
from lightning_prune.callbacks import (
    BNSlimmingCallback,
    DistillationCallback,
    EWCCallback,
    FisherRaoMonitor,
    L0PruneCallback,
    MagnitudePruneCallback,
    PruneCallback,
)
from lightning_prune.criteria import Fisher, Magnitude
from lightning_prune.layers.gates import gates_of
from lightning_prune.schedules import linear
from lightning_prune.types import ChannelGroup

twice = partial(MagnitudePruneCallback, 0.5, schedule=linear, begin=1, end=3, every=1)


class Shuffled(Module):
    """Other images on each rank, and noise that no seed makes the same."""

    def on_fit_start(self) -> None:
        torch.manual_seed(100 + self.global_rank)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return super().training_step((images + 0.1 * torch.randn_like(images), labels), batch_idx)


class ByHand(Shuffled):
    """Steps by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]
        return loss.detach()


class Spare(Shuffled):
    """Has a layer that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)


class Stumbles(Magnitude):
    """Fails on one rank."""

    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        if torch.distributed.get_rank() == 1 and isinstance(model, pl.LightningModule) and model.current_epoch == 2:
            raise RuntimeError("no scores on this rank")
        return super().score(model, group)


class Chance(Magnitude):
    """Draws from the random state of the rank."""

    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        return torch.rand(group.size)


class Deceived(Callback):
    """On one rank, what the first has sent arrives as something else."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == 1 and trainer.current_epoch == 2:
            own = trainer.strategy.broadcast

            def wrong(draft: Any, src: int = 0) -> Any:
                right = own(draft, src)
                return replace(right, record=replace(right.record, asked=0.1))

            trainer.strategy.broadcast = wrong  # type: ignore[method-assign]


class Different(Callback):
    """On one rank, the network has been through something else."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == 1 and trainer.current_epoch == 3:
            pl_module.__dict__["_pruning_history"] = ()


def ddp(**settings: Any) -> Callable[[], DDPStrategy]:
    return lambda: DDPStrategy(process_group_backend="gloo", **settings)


def fit(
    module: pl.LightningModule,
    *callbacks: Callback,
    strategy: Callable[[], DDPStrategy] | None = None,
    **settings: Any,
) -> pl.Trainer:
    options = {"max_epochs": 5, "devices": 2, "strategy": (strategy or ddp())(), "enable_checkpointing": False}
    ckpt = settings.pop("ckpt_path", None)
    options["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    made = trainer(*callbacks, **(options | settings))
    made.fit(module, ckpt_path=ckpt)
    return made


def hashed(values: dict[str, Any]) -> str:
    tensors = [value.detach().float() for value in values.values() if isinstance(value, Tensor)]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def outcome(module: pl.LightningModule, made: pl.Trainer | None = None) -> dict[str, Any]:
    """What all ranks must agree on: weights (statistics of BatchNorm are each rank's own), and the cuts."""
    state = [] if made is None else [value for item in made.optimizers for value in item.state.values()]
    return {
        "weights": hashed(dict(module.named_parameters())),
        "state": hashed({f"{at} {key}": value for at, one in enumerate(state) for key, value in one.items()}),
        "widths": widths(module),
        "cuts": [[record.epoch, record.step] for record in history_of(module)],
        "kept": [repr(record.kept) for record in history_of(module)],
        "finite": all(bool(parameter.isfinite().all()) for parameter in module.parameters()),
    }


def moved(module: pl.LightningModule, made: pl.Trainer) -> bool:
    """Whether one more epoch moves every parameter."""
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    made.fit_loop.max_epochs += 1  # type: ignore[operator]
    made.fit(module)
    return all(not torch.equal(before[name], parameter) for name, parameter in module.named_parameters())


def plain(module: Callable[[], pl.LightningModule], *callbacks: Callable[[], Callback], **settings: Any) -> Any:
    def run(folder: Path) -> dict[str, Any]:
        net = module()
        made = fit(net, *(make() for make in callbacks), **settings)
        return outcome(net, made) | {"all parameters move": moved(net, made)}

    return run


def failing(*callbacks: Callable[[], Callback]) -> Any:
    def run(folder: Path) -> dict[str, Any]:
        net = Shuffled()
        start = time.monotonic()
        try:
            fit(net, *(make() for make in callbacks))
        except Exception as error:
            return outcome(net) | {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - start}
        return {"error": None}

    return run


def resumed(folder: Path) -> dict[str, Any]:
    """The unbroken fit, and one that goes on from each of its checkpoints."""
    whole, ends = Module(), {}
    keep = ModelCheckpoint(folder / "resumed", filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    fit(whole, twice(), keep)
    for epoch in (0, 2, 3):
        net = Module(seed=9)
        fit(net, twice(), ckpt_path=folder / "resumed" / f"{epoch}.ckpt")
        ends[str(epoch)] = outcome(net)["weights"] == outcome(whole)["weights"]
    return outcome(whole) | {"resumed": ends}


class Noting(Fisher):
    """Keeps the last scores."""

    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor | None:
        found = super().score(model, group)
        self._last = {**getattr(self, "_last", {}), group.name: found}
        return found


class Still(Module):
    """Its weights stay as they are, and its norms in eval mode."""

    def __init__(self) -> None:
        super().__init__(partial(SGD, lr=0.0))

    def on_train_epoch_start(self) -> None:
        self.eval()


def signal(folder: Path) -> dict[str, Any]:
    """What a criterion has gathered on all ranks in an epoch."""
    net, criterion = Still(), Noting()
    made = fit(net, PruneCallback(0.5, criterion=criterion, begin=1, end=1), max_epochs=2, accumulate_grad_batches=2)
    scores = {name: [float(score) for score in found] for name, found in criterion._last.items()}
    return outcome(net, made) | {"scores": scores}


def consolidated(folder: Path) -> dict[str, Any]:
    """A second task, held by what the first has taught."""
    net, ewc = Shuffled(), EWCCallback(2.0, consolidate_on="fit_end")
    fit(net, ewc, max_epochs=1)
    made = fit(net, ewc, FisherRaoMonitor(), twice())
    found = {"information": hashed(dict(ewc.information)), "norm": float(made.callback_metrics["fisher_rao/after"])}
    return outcome(net, made) | found | {"all parameters move": moved(net, made)}


def refused_by_hand(folder: Path) -> dict[str, Any]:
    try:
        fit(ByHand(), twice(), strategy=ddp(static_graph=True))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


class Watch(Callback):
    """Notes of gates at each step what they are and what was drawn."""

    def __init__(self) -> None:
        self.alphas: list[str] = []
        self.noises: list[str] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        gates = gates_of(pl_module)
        if gates is not None:
            named = gates.named().items()
            self.alphas.append(hashed({name: gate.log_alpha for name, gate in named}))
            self.noises.append(hashed({name: gate.noise for name, gate in named}))


def gated(**settings: Any) -> Any:
    """Gates on, cut, and closed, with images and noise that differ between the ranks."""

    def run(folder: Path) -> dict[str, Any]:
        strategy, accumulate = settings.get("strategy"), settings.get("accumulate_grad_batches", 1)
        estimator = settings.get("estimator", "hard_concrete")
        net, watch = Shuffled(), Watch()
        events = {"begin": 12, "end": 18, "every_n_steps": 3, "gate_lr": 0.4}
        own = L0PruneCallback(0.5, of="channels", estimator=estimator, **events)
        made = fit(net, own, watch, max_epochs=8 * accumulate, strategy=strategy, accumulate_grad_batches=accumulate)
        assert gates_of(net) is None
        watched = {"alphas": watch.alphas, "noises": watch.noises}
        return outcome(net, made) | watched | {"all parameters move": moved(net, made)}

    return run


class Parted(Module):
    """Without BatchNorm, and in batches of which each rank has its part."""

    def __init__(self, batch: int) -> None:
        super().__init__(partial(SGD, lr=0.05, momentum=0.9), net=mlp())
        self.batch = batch

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        dataset, ranks = images().dataset, self.trainer.world_size
        sampler = DistributedSampler(dataset, ranks, self.global_rank, shuffle=False)  # Lightning's own would shuffle
        return DataLoader(dataset, self.batch, sampler=sampler)


def parted(devices: int, **settings: Any) -> dict[str, list[float]]:
    """What becomes of a network and its gates; one process has batches of 16, and two have 8 each."""
    net, found = Parted(16 // devices), {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step in (11, 17, 21):
                values = [value.detach().flatten() for value in pl_module.parameters()]
                found[str(trainer.global_step)] = torch.cat(values).tolist()

    own = L0PruneCallback(begin=12, end=18, every_n_steps=6, gate_lr=0.35, drop_rate=0.4, **settings)
    made = {"max_epochs": 8, "limit_val_batches": 0}
    fit(net, own, Keep(), **made) if devices == 2 else trainer(own, Keep(), **made).fit(net)
    return found


GOALS: dict[str, dict[str, Any]] = {"ratio": {"pruning_ratio": 0.5}, "strength": {"strength": 1.0, "weight_decay": 0.1}}


def in_parts(folder: Path) -> dict[str, Any]:
    return {name: parted(2, **goal) for name, goal in GOALS.items()}


adamw = partial(Shuffled, partial(AdamW, lr=0.01))
on_steps = partial(MagnitudePruneCallback, 0.5, schedule=linear, begin=2, end=8, every_n_steps=3)

FITS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "plain": plain(Shuffled, twice),
    "on the first batch": plain(partial(Shuffled, example=None), twice),
    "find_unused_parameters": plain(Shuffled, twice, strategy=ddp(find_unused_parameters=True)),
    "static_graph": plain(Shuffled, twice, strategy=ddp(static_graph=True)),
    "gradient_as_bucket_view": plain(Shuffled, twice, strategy=ddp(gradient_as_bucket_view=True)),
    "all three": plain(
        Shuffled,
        twice,
        strategy=ddp(find_unused_parameters=True, static_graph=True, gradient_as_bucket_view=True),
    ),
    "accumulated": plain(Shuffled, twice, accumulate_grad_batches=3, strategy=ddp(gradient_as_bucket_view=True)),
    "adamw": plain(adamw, twice),
    "by hand": plain(ByHand, twice),
    "clipped": plain(adamw, twice, gradient_clip_val=0.5),
    "bf16-mixed": plain(Shuffled, twice, precision="bf16-mixed"),
    "slimming": plain(Shuffled, partial(BNSlimmingCallback, 0.5, strength=0.01, begin=1, end=2)),
    "random": plain(Shuffled, partial(PruneCallback, 0.5, criterion=Chance(), allocation=Global(), begin=1, end=2)),
    "fisher": plain(Shuffled, lambda: PruneCallback(0.5, criterion=Fisher(), schedule=linear, begin=1, end=3)),
    "fisher's signal": signal,
    "on steps": plain(Shuffled, on_steps),
    "on steps, accumulated": plain(Shuffled, on_steps, accumulate_grad_batches=2, max_epochs=8),
    "distilled": plain(Shuffled, DistillationCallback, twice),
    "consolidated": consolidated,
    "resumed": resumed,
    "gates": gated(),
    "gates, static_graph": gated(strategy=ddp(static_graph=True, gradient_as_bucket_view=True)),
    "gates, accumulated": gated(accumulate_grad_batches=2),
    "gates, bernoulli": gated(estimator="bernoulli"),
    "gates in parts": in_parts,
    "a rank that fails": failing(partial(PruneCallback, 0.5, criterion=Stumbles(), begin=2, end=2)),
    "a rank with another plan": failing(Deceived, twice),
    "a rank with another network": failing(Different, twice),
    "static graph by hand": refused_by_hand,
}

if hasattr(neighbours, "EMAWeightAveraging"):  # Lightning 2.6
    FITS["averaged"] = plain(Shuffled, twice, partial(neighbours.EMAWeightAveraging, decay=0.9))


def run_all(fits: dict[str, Callable[[Path], dict[str, Any]]], folder: Path) -> None:
    """Run fits, one after the other, and leave what each rank has found in a folder."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, run in fits.items():
        start = time.monotonic()
        try:
            results[name] = run(folder)
        except Exception as error:
            results[name] = {"unexpected": f"{type(error).__name__}: {error}"}
        results[name]["took"] = time.monotonic() - start
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        (folder / f"rank{rank}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    run_all(FITS, Path(sys.argv[1]))

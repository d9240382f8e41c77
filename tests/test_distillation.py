"""Distillation: the loss is the written one, the teacher stays as it was, and files bring it back."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fits import STEPS, Module, Resumable, equal, momentum, network, states, trainer, widths
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Adam

from lightning_prune import prune
from lightning_prune.callbacks import DistillationCallback, MagnitudePruneCallback, PruneCallback
from lightning_prune.callbacks.distillation import divergence
from lightning_prune.schedules import linear

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]


class Inner(Module):
    """Calls its network, not itself, and returns more than the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": F.cross_entropy(self.net(batch[0]), batch[1]), "more": batch_idx}


class Skipping(Module):
    """Skips every other step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if batch_idx % 2 else None


class Noted(Callback):
    """What the training steps return, and the gradients of the first one."""

    def __init__(self) -> None:
        self.returned: list[Any] = []
        self.gradients: dict[str, Tensor] = {}
        self.batch: Any = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.returned.append(outputs)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        own = {name: each.grad for name, each in pl_module.named_parameters() if each.grad is not None}
        self.gradients = self.gradients or {name: gradient.clone() for name, gradient in own.items()}


def teacher() -> nn.Module:
    """Another network of the same outputs."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4))


def by_hand(
    student: nn.Module, said: Tensor, batch: Any, alpha: float, temperature: float
) -> tuple[Tensor, list[Tensor]]:
    """The formula in plain sums of p log(p / q)."""
    logits = student(batch[0])
    p, q = ((each / temperature).softmax(1) for each in (said, logits))
    kl = (p * (p.log() - q.log())).sum() / len(logits)
    loss = (1 - alpha) * F.cross_entropy(logits, batch[1]) + alpha * temperature**2 * kl
    return loss.detach(), list(torch.autograd.grad(loss, list(student.parameters())))


@pytest.mark.parametrize("kind", [Module, Inner])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.9, 1.0), (0.3, 4.0), (0.0, 1.0), (1.0, 2.0)])
def test_loss_and_gradients_are_the_written_ones(kind: Any, alpha: float, temperature: float) -> None:
    module, own, noted = kind(), teacher(), Noted()
    student, batch = deepcopy(module.net).train(), next(iter(module.train_dataloader()))
    loss, gradients = by_hand(student, own(batch[0]).detach(), batch, alpha, temperature)
    distilling = DistillationCallback(alpha, temperature, teacher=own, outputs_of="net" if kind is Inner else "")
    fit = trainer(distilling, noted, max_epochs=1, limit_train_batches=1)
    fit.fit(module)
    assert torch.allclose(noted.returned[0]["loss"], loss, rtol=1e-5)
    assert all(
        torch.allclose(noted.gradients[f"net.{name}"], expected, rtol=1e-4, atol=1e-6)
        for (name, _), expected in zip(student.named_parameters(), gradients, strict=True)
    )
    if kind is Inner:
        assert noted.returned[0]["more"] == 0
    assert float(fit.callback_metrics["distillation/divergence"]) >= 0
    assert all(parameter.grad is None for parameter in own.parameters())


def test_temperature_and_dimension() -> None:
    student, said = torch.randn(2, 3, 5, 7)
    moved = divergence(student.movedim(1, -1), said.movedim(1, -1), 3.0, dim=-1)
    p, q = (said / 3).softmax(1), (student / 3).softmax(1)
    assert torch.allclose(divergence(student, said, 3.0), (p * (p / q).log()).sum(1).mean(), rtol=1e-5)
    assert torch.allclose(moved, divergence(student, said, 3.0))


class Kept(Callback):
    """A copy of the network as the fit begins."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.net = deepcopy(pl_module.net).eval()


def cutting() -> PruneCallback:
    return MagnitudePruneCallback(0.5, schedule=linear, begin=0, end=2)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_the_dense_network_teaches_what_is_left_of_it(first: bool) -> None:
    module, distilling, kept = Module(), DistillationCallback(), Kept()
    trainer(kept, *([distilling, cutting()] if first else [cutting(), distilling])).fit(module)
    assert widths(module) == [4, 4]
    former = distilling._former
    assert isinstance(former, Module)
    assert widths(former) == [8, 8]
    assert equal(former.net.state_dict(), kept.net.state_dict())
    assert not former.training
    assert not any(each.requires_grad or each.grad is not None for each in former.parameters())
    assert "training_step" not in vars(module)
    assert module.state_dict().keys() == Module().state_dict().keys()
    assert not module._forward_hooks


def test_it_draws_the_student_to_the_teacher() -> None:
    """With alpha = 1 labels do not count: the student of another seed comes nearer to what the teacher says."""
    own, module = network(seed=3).eval(), Module()
    fit = trainer(DistillationCallback(1.0, teacher=own), max_epochs=1)
    fit.fit(module)
    early = float(fit.callback_metrics["distillation/divergence"])
    fit = trainer(DistillationCallback(1.0, teacher=own), max_epochs=15)
    fit.fit(module)
    assert float(fit.callback_metrics["distillation/divergence"]) < early / 2


def ended(module: pl.LightningModule, fit: pl.Trainer, own: DistillationCallback) -> dict[str, Tensor]:
    flat = {
        f"{name} {key}": each for name, kinds in states(module, fit.optimizers).items() for key, each in kinds.items()
    }
    former = {} if own._former is None else own._former.state_dict()
    return {**module.state_dict(), **flat, **{f"teacher {name}": each for name, each in former.items()}}


@pytest.mark.parametrize("given", [None, teacher], ids=["itself", "another"])
@pytest.mark.parametrize("make", [momentum, partial(Adam, lr=0.01)], ids=["momentum", "adam"])
def test_a_resumed_fit_ends_as_the_unbroken_one(
    tmp_path: Path, make: Any, given: Callable[[], nn.Module] | None
) -> None:
    weights = teacher().state_dict()

    def callback() -> DistillationCallback:
        own = None if given is None else given()
        if own is not None:
            own.load_state_dict(weights)
        return DistillationCallback(0.7, 2.0, teacher=own)

    keep = ModelCheckpoint(
        tmp_path, filename="{step}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=1
    )
    module, own = Resumable(make), callback()
    fit = trainer(own, cutting(), keep, enable_checkpointing=True)
    fit.fit(module)
    whole = ended(module, fit, own)
    for step in (1, STEPS + 1, 2 * STEPS + 3):
        again, fresh = callback(), Resumable(make, seed=5)
        resumed = trainer(again, cutting())
        resumed.fit(fresh, ckpt_path=tmp_path / f"{step}.ckpt")
        assert equal(ended(fresh, resumed, again), whole), step
        torch.load(tmp_path / f"{step}.ckpt", weights_only=True)


def test_a_fit_goes_on_in_the_same_objects(tmp_path: Path) -> None:
    """From a file before the cuts, with the network cut since; and in the same Trainer, for longer."""
    module, own = Resumable(), DistillationCallback()
    fit = trainer(own, cutting(), enable_checkpointing=False)
    fit.fit(module)
    fit.save_checkpoint(tmp_path / "end.ckpt")
    former = deepcopy(own._former)
    assert former is not None
    fit.fit_loop.max_epochs = 5
    fit.fit(module)
    assert equal(own._former.state_dict(), former.state_dict())  # type: ignore[union-attr]
    longer = trainer(own, cutting(), max_epochs=5)
    longer.fit(module, ckpt_path=tmp_path / "end.ckpt")
    assert equal(own._former.state_dict(), former.state_dict())  # type: ignore[union-attr]
    trainer(own, max_epochs=1).fit(module)
    assert widths(own._former) == [4, 4]  # type: ignore[arg-type]


def test_a_network_that_was_cut_before_the_fit_teaches_as_it_was(tmp_path: Path) -> None:
    module, own = Module(), DistillationCallback()
    prune(module, module.example_input_array, pruning_ratio=0.25)
    fit = trainer(own, PruneCallback(0.5, begin=1, end=1), max_epochs=2)
    fit.fit(module)
    fit.save_checkpoint(tmp_path / "end.ckpt")
    again, fresh = DistillationCallback(), Module(seed=9)
    trainer(again, PruneCallback(0.5, begin=1, end=1), max_epochs=3).fit(fresh, ckpt_path=tmp_path / "end.ckpt")
    assert widths(again._former) == [6, 6]  # type: ignore[arg-type]
    assert equal(again._former.state_dict(), own._former.state_dict())  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_skipped_steps_stay_skipped() -> None:
    module, noted = Skipping(), Noted()
    trainer(DistillationCallback(), noted, max_epochs=1).fit(module)
    assert [bool(each) for each in noted.returned] == [False, True] * (STEPS // 2)


def test_a_step_of_ones_own_comes_back() -> None:
    module = Module()
    own = partial(Module.training_step, module)
    vars(module)["training_step"] = own
    trainer(DistillationCallback(), max_epochs=1, limit_train_batches=1).fit(module)
    assert vars(module).pop("training_step") is own

    class Stopped(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        trainer(DistillationCallback(), Stopped(), max_epochs=1).fit(module)
    assert "training_step" not in vars(module)
    assert not module._forward_hooks


def test_the_module_can_be_copied_and_pickled_meanwhile() -> None:
    class Copying(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            twin = deepcopy(pl_module)
            assert equal(twin.state_dict(), pl_module.state_dict())
            assert equal(pickle.loads(pickle.dumps(pl_module)).state_dict(), pl_module.state_dict())

    module, alone = Module(), Module()
    trainer(DistillationCallback(), Copying(), max_epochs=1, limit_train_batches=2).fit(module)
    trainer(DistillationCallback(), max_epochs=1, limit_train_batches=2).fit(alone)
    assert equal(module.state_dict(), alone.state_dict())


def test_several_calls_are_averaged() -> None:
    class Views(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            both = [self(batch[0]), self(-batch[0])]
            return sum(F.cross_entropy(each, batch[1]) for each in both)  # type: ignore[return-value]

    module, own = Views(), teacher()
    images = next(iter(module.train_dataloader()))[0]
    student = deepcopy(module.net).train()
    terms = [float(divergence(student(each).detach(), own(each).detach())) for each in (images, -images)]
    fit = trainer(DistillationCallback(teacher=own), max_epochs=1, limit_train_batches=1)
    fit.fit(module)
    assert float(fit.callback_metrics["distillation/divergence"]) == pytest.approx(sum(terms) / 2, rel=1e-5)


def test_gradients_accumulate() -> None:
    module = Module()
    fit = trainer(DistillationCallback(), cutting(), accumulate_grad_batches=2, precision="bf16-mixed")
    fit.fit(module)
    assert fit.global_step == 4 * STEPS // 2
    assert all(bool(each.isfinite().all()) for each in module.parameters())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"alpha": 1.5}, r"`alpha` is the weight of the teacher, in \[0, 1\]; got 1.5"),
    ({"alpha": float("nan")}, r"`alpha` .* got nan"),
    ({"temperature": 0.0}, r"`temperature` divides the logits, above 0; got 0.0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationCallback(**arguments)


def test_outputs_that_do_not_go_together() -> None:
    wide = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    with pytest.raises(ValueError, match=r"one shape.*got \(8, 4\) and \(8, 5\).*teacher with the same outputs"):
        trainer(DistillationCallback(teacher=wide)).fit(Module())
    with pytest.raises(ValueError, match=r"got tuple and tuple"):
        divergence((torch.zeros(2, 2),), (torch.zeros(2, 2),))
    with pytest.raises(ValueError, match="classes along dimension 1"):
        divergence(torch.zeros(2), torch.zeros(2))


def test_outputs_nobody_hears() -> None:
    with pytest.raises(MisconfigurationException, match=r"did not call `self\(\.\.\.\)`.*outputs_of='net'"):
        trainer(DistillationCallback()).fit(Inner())
    with pytest.raises(MisconfigurationException, match=r"`outputs_of` names a submodule.*got 'nett'.*'net'"):
        trainer(DistillationCallback(outputs_of="nett")).fit(Module())


def test_manual_optimization_is_refused() -> None:
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="under manual optimization nobody uses it"):
        trainer(DistillationCallback()).fit(module)

"""Retraining: learning rates that are scaled, weights that go back, parts that stand still."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import cos, pi
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import STEPS, Module, momentum, trainer, widths
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from masked import Exact, is_exact, masked, weights_of
from torch import Tensor, nn, optim
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as rates

from lightning_prune import history_of
from lightning_prune.callbacks import PruneCallback, Retraining
from lightning_prune.masks.held import masks_of
from lightning_prune.schedules import linear

EPOCHS = 6
ALL = EPOCHS * STEPS
KEEP = partial(Retraining, dead="keep", dropout="keep")

# learning rates


def in_turn(optimizer: Optimizer) -> Any:
    warm = rates.LinearLR(optimizer, 0.1, 1.0, total_iters=2)
    return rates.SequentialLR(optimizer, [warm, rates.CosineAnnealingLR(optimizer, 4, eta_min=1e-3)], [2])


def in_turn_late(optimizer: Optimizer) -> Any:
    """The second one begins after the event."""
    return rates.SequentialLR(
        optimizer, [rates.ConstantLR(optimizer, 0.5, 9), rates.ExponentialLR(optimizer, 0.5)], milestones=[4]
    )


def at_once(optimizer: Optimizer) -> Any:
    return rates.ChainedScheduler([rates.LinearLR(optimizer, 0.1, total_iters=4), rates.ExponentialLR(optimizer, 0.9)])


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda item: rates.LambdaLR(item, lambda at: 0.9**at),
    "multiplied": lambda item: rates.MultiplicativeLR(item, lambda _: 0.9),
    "step": lambda item: rates.StepLR(item, 2),
    "several steps": lambda item: rates.MultiStepLR(item, [1, 4]),
    "constant": lambda item: rates.ConstantLR(item, 0.3, 4),
    "linear": lambda item: rates.LinearLR(item, 0.1, total_iters=5),
    "exponential": lambda item: rates.ExponentialLR(item, 0.9),
    "polynomial": lambda item: rates.PolynomialLR(item, EPOCHS, 2.0),
    "cosine": lambda item: rates.CosineAnnealingLR(item, EPOCHS),
    "cosine to a floor": lambda item: rates.CosineAnnealingLR(item, EPOCHS, eta_min=0.01),
    "warm restarts": lambda item: rates.CosineAnnealingWarmRestarts(item, 2, eta_min=0.01),
    "in turn": in_turn,
    "in turn, late": in_turn_late,
    "at once": at_once,
    "averaging": lambda item: optim.swa_utils.SWALR(item, swa_lr=0.01, anneal_epochs=4),
    "averaging, linear": lambda item: optim.swa_utils.SWALR(item, 0.01, 4, "linear"),
    "cycle": lambda item: rates.OneCycleLR(item, 0.1, total_steps=ALL),
    "three phases": lambda item: rates.OneCycleLR(item, 0.1, total_steps=ALL, three_phase=True),
    "cyclic": lambda item: rates.CyclicLR(item, 0.01, 0.1, step_size_up=7),
    "cyclic, decaying": lambda item: rates.CyclicLR(item, 0.01, 0.1, step_size_up=7, mode="exp_range", gamma=0.99),
}
ON_STEPS = {"cycle", "three phases", "cyclic", "cyclic, decaying"}


def curve(scheduler: Callable[[Optimizer], Any], interval: str, *callbacks: Callback) -> list[list[float]]:
    """The learning rates of each step, of two param groups."""

    class Groups(Module):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[:3].parameters()}, {"params": self.net[3:].parameters(), "lr": 0.02}]
            optimizer = SGD(groups, lr=0.05, momentum=0.9)
            return [optimizer], [{"scheduler": scheduler(optimizer), "interval": interval, "monitor": "train_loss"}]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("never better", float(self.current_epoch))
            return loss

    look = Exact(lambda trainer, _: [group["lr"] for group in trainer.optimizers[0].param_groups])
    trainer(*callbacks, look, max_epochs=EPOCHS, limit_val_batches=0).fit(Groups())
    return look.seen


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rates_are_multiplied_from_the_first_event_on(name: str, interval: str) -> None:
    """Once, whatever number of events follows; and by the factor of what they would have been."""
    if name in ON_STEPS and interval == "epoch":
        pytest.skip("made for steps")
    plain = curve(SCHEDULERS[name], interval)
    scaled = curve(SCHEDULERS[name], interval, masked(begin=0, end=5, every=3, retraining=KEEP(lr_factor=0.1)))
    event = 3 * STEPS
    assert scaled[:event] == plain[:event]
    for at in range(event, ALL):
        assert scaled[at] == pytest.approx([0.1 * rate for rate in plain[at]], rel=1e-6), at - event


def test_a_plateau_lowers_what_was_lowered() -> None:
    """Its rates never fall below a tenth of its floor."""

    def plateau(optimizer: Optimizer) -> Any:
        return rates.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0, min_lr=[0.01, 0.004])

    class Groups(Module):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[:3].parameters()}, {"params": self.net[3:].parameters(), "lr": 0.02}]
            optimizer = SGD(groups, lr=0.05)
            return [optimizer], [{"scheduler": plateau(optimizer), "monitor": "score"}]

        def on_validation_epoch_end(self) -> None:
            self.log("score", -float(self.current_epoch))

    seen = []
    for callbacks in ([], [masked(begin=2, end=2, retraining=KEEP(lr_factor=0.1))]):
        look = Exact(lambda trainer, _: [group["lr"] for group in trainer.optimizers[0].param_groups])
        trainer(*callbacks, look, max_epochs=EPOCHS).fit(Groups())
        seen.append(look.seen)
    plain, scaled = seen
    assert scaled[: 2 * STEPS] == plain[: 2 * STEPS]
    assert [pytest.approx([0.1 * rate for rate in rates]) for rates in plain[2 * STEPS :]] == scaled[2 * STEPS :]
    assert plain[-1] == [0.01, 0.004]


def test_learning_rates_without_a_scheduler_and_by_default() -> None:
    look = Exact(lambda trainer, _: trainer.optimizers[0].param_groups[0]["lr"])
    trainer(masked(begin=1, end=3, schedule=linear, retraining=KEEP(lr_factor=0.2)), look).fit(Module())
    assert look.seen == [0.05] * 2 * STEPS + [pytest.approx(0.01)] * 2 * STEPS
    look = Exact(lambda trainer, _: trainer.optimizers[0].param_groups[0]["lr"])
    trainer(masked(), look).fit(Module())
    assert set(look.seen) == {0.05}


def test_an_event_that_fails_has_not_scaled_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes again where the fit goes on, and would scale them twice."""
    module, callback = Module(), masked(0.85, begin=1, end=1, retraining=Retraining(lr_factor=0.1))

    def fails(*_: Any) -> None:
        raise RuntimeError("no cut")

    monkeypatch.setattr(callback, "_remove_dead", fails)
    fit = trainer(callback)
    with pytest.raises(RuntimeError, match="no cut"):
        fit.fit(module)
    assert fit.optimizers[0].param_groups[0]["lr"] == 0.05
    assert callback.state_dict()["done"] == -1


# rewinding


class AtStart(Callback):
    """Notes the weights before a step, and the weights and the optimizer's state at the end of each event."""

    def __init__(self, step: int) -> None:
        self.step, self.early = step, dict[str, Tensor]()
        self.after: list[tuple[dict[str, Tensor], dict[str, Tensor], bool]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        now = {name: weight.clone() for name, weight in weights_of(pl_module).items()}
        if trainer.global_step == self.step:
            self.early = now
        forgotten = not any(trainer.optimizers[0].state.values())
        self.after.append((now, dict(masks_of(pl_module)), forgotten))


@pytest.mark.parametrize("step", [0, 1, STEPS + 3])
@pytest.mark.parametrize("make", [momentum, partial(AdamW, lr=0.01)], ids=["momentum", "adamw"])
def test_survivors_go_back_to_early_weights(make: Callable[..., Optimizer], step: int) -> None:
    module, look = Module(make), AtStart(step)
    trainer(masked(0.7, begin=2, end=4, schedule=linear, retraining=KEEP(rewind_to=step)), look, max_epochs=5).fit(
        module
    )
    for event in (3 * STEPS, 4 * STEPS):
        now, taken, forgotten = look.after[event]
        for name, early in look.early.items():
            assert torch.equal(now[name], early * taken.get(name, torch.tensor(True))), (event, name)
        assert forgotten
    assert is_exact(module)


def test_without_it_survivors_go_on() -> None:
    """Never initialised again, unless it is asked for."""
    module, look = Module(), AtStart(0)
    assert Retraining().rewind_to is None
    trainer(masked(0.5, begin=2, end=2), look).fit(module)
    before, (now, taken, forgotten) = look.after[2 * STEPS - 1][0], look.after[2 * STEPS]
    mask = taken["net.3.weight"]
    assert not torch.equal(now["net.3.weight"], look.early["net.3.weight"] * mask)
    assert torch.allclose(now["net.3.weight"], before["net.3.weight"] * mask, atol=0.05)
    assert not forgotten


def test_early_weights_are_cut_as_the_network_has_been() -> None:
    """By the cuts of dead channels, and by those of another callback."""
    module, look = Module(), AtStart(0)
    channels = PruneCallback(0.25, begin=2, end=2)
    weights = masked(0.85, begin=0, end=3, schedule=linear, retraining=Retraining(rewind_to=0))
    trainer(channels, weights, look, max_epochs=5).fit(module)
    records = history_of(module)
    assert len(records) > 1
    early = look.early["net.3.weight"]
    for record in records:
        for dim, positions in record.kept.get("net.3.weight", {}).items():
            early = early.index_select(dim, torch.as_tensor(positions))
    now, taken, _ = look.after[3 * STEPS]
    assert torch.equal(now["net.3.weight"], early * taken["net.3.weight"])
    assert sum(widths(module)) < 12


def test_rewinding_at_the_very_first_step_leaves_all_as_it_is() -> None:
    """An event at the start goes back to where it is."""
    ended = []
    for rewind_to in (0, None):
        module = Module()
        trainer(masked(0.5, begin=0, end=0, retraining=KEEP(rewind_to=rewind_to)), max_epochs=2).fit(module)
        ended.append(weights_of(module))
    assert all(torch.equal(weight, ended[1][name]) for name, weight in ended[0].items())


def test_steps_of_several_optimizers_are_counted_past_it() -> None:
    """Each batch has two steps: step 3 lies inside of the second, and the third is the first after it."""

    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [momentum(self.net[:3].parameters()), momentum(self.net[3:].parameters())]

    module, look = Two(), AtStart(4)
    trainer(masked(0.5, begin=2, end=2, retraining=KEEP(rewind_to=3)), look).fit(module)
    now, taken, _ = look.after[2 * STEPS]
    assert torch.equal(now["net.3.weight"], look.early["net.3.weight"] * taken["net.3.weight"])


def test_an_event_before_the_step_to_go_back_to() -> None:
    module = Module()
    with pytest.raises(MisconfigurationException, match=r"`rewind_to` is step 20.*Lower it, or raise `begin`"):
        trainer(masked(0.5, begin=1, end=1, retraining=KEEP(rewind_to=20))).fit(module)
    assert masks_of(module) == {}


# parts in turn

PARTS = [["net.0", "net.3"], ["net.8"]]


@pytest.mark.parametrize(
    "make",
    [
        partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
        partial(AdamW, lr=0.01, weight_decay=0.1),
        partial(optim.LBFGS, lr=0.1, max_iter=3),
    ],
    ids=["momentum", "adamw", "lbfgs"],
)
def test_parts_are_retrained_in_turn(
    make: Callable[..., Optimizer],
) -> None:
    """Before the first event and after the last one all of them move, between them one; the rest always does."""
    module, moved = Module(make), list[set[str]]()
    was = {name: weight.clone() for name, weight in weights_of(module).items()}

    def look(_: pl.Trainer, module: pl.LightningModule) -> None:
        now = {name: weight.clone() for name, weight in weights_of(module).items()}
        moved.append({name for name, weight in now.items() if not torch.equal(weight, was[name])})
        was.update(now)

    class BeforeFirst(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            was.update({name: weight.clone() for name, weight in weights_of(pl_module).items()})

    turns = masked(0.6, begin=0, end=4, schedule=linear, retraining=KEEP(alternate=PARTS))
    trainer(turns, BeforeFirst(), Exact(look), max_epochs=6).fit(module)
    convolutions, head = {"net.0.weight", "net.3.weight"}, {"net.8.weight", "net.8.bias"}
    everything = set(weights_of(module))
    still = {0: set(), 1: head, 2: convolutions, 3: head, 4: set(), 5: set()}
    assert list(turns.events) == [1, 2, 3, 4]
    for step, names in enumerate(moved):
        assert names == everything - still[step // STEPS], step


def test_a_bias_that_a_cut_makes_belongs_to_its_part() -> None:
    """Also between the event that makes it and the next one."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    net[1].bias.data[0] = 1.0
    net[1].weight.data[0] *= 1e-3
    still: list[bool] = []
    was: dict[str, Tensor] = {}

    def look(_: pl.Trainer, module: pl.LightningModule) -> None:
        now = {name: weight.clone() for name, weight in weights_of(module).items() if name.startswith("net.3")}
        still.append(all(torch.equal(weight, was.get(name, torch.empty(0))) for name, weight in now.items()))
        was.update(now)

    module = Module(partial(SGD, lr=1e-4), net=net)
    turns = masked(0.4, begin=0, end=3, schedule=linear, retraining=Retraining(alternate=[["net.1"], ["net.3"]]))
    trainer(turns, Exact(look)).fit(module)
    assert "net.3.bias" in weights_of(module)
    assert net[1].out_features < 8
    assert still[STEPS + 1 : 2 * STEPS] == [True] * (STEPS - 1)
    assert still[2 * STEPS + 1 : 3 * STEPS] == [False] * (STEPS - 1)


@pytest.mark.parametrize(("end", "count"), [(0, 1), (1, 1), (2, 2)])
def test_each_part_has_a_turn_or_it_is_refused(end: int, count: int) -> None:
    module, fit = Module(), trainer(masked(0.5, begin=0, end=end, schedule=linear, retraining=KEEP(alternate=PARTS)))
    with pytest.raises(MisconfigurationException, match=rf"2 parts take turns .* there are {count} events: one more"):
        fit.fit(module)
    assert fit.global_step == 0
    assert masks_of(module) == {}


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    module, fit = Module(), trainer(masked(retraining=KEEP(alternate=[["conv*"], ["net.8"]])))
    with pytest.raises(ValueError, match=r"`alternate` pattern 'conv\*' matches no module.*named_modules"):
        fit.fit(module)
    assert fit.global_step == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_factor": 0}, r"`lr_factor` is what learning rates are multiplied by, above 0; got 0"),
        ({"lr_factor": float("inf")}, "got inf"),
        ({"lr_factor": float("nan")}, "got nan"),
        ({"dropout": "lower"}, "`dropout` is one of 'follow', 'keep'; got 'lower'"),
        ({"dead": True}, "`dead` is one of 'remove', 'keep'; got True"),
        ({"rewind_to": -1}, "`rewind_to` is an optimizer step, 0 or more; got -1"),
        ({"alternate": "net*"}, "`alternate` is a list of parts, each a list of patterns"),
        ({"alternate": ["net.0", "net.8"]}, "`alternate` is a list of parts, each a list of patterns"),
        ({"alternate": [["net.0"]]}, "`alternate` needs two parts"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Retraining(**arguments)


def test_the_rates_of_the_figure_by_hand() -> None:
    """Cosine from 0.05 over 6 epochs: epoch 4 has 0.05 (1 + cos(4 pi / 6)) / 2 = 0.0125, then a tenth of it."""
    found = curve(SCHEDULERS["cosine"], "epoch", masked(begin=3, end=3, retraining=KEEP(lr_factor=0.1)))
    assert found[4 * STEPS][0] == pytest.approx(0.1 * 0.05 * (1 + cos(4 * pi / 6)) / 2)

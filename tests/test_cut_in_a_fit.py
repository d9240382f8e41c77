"""The cut inside a fit is all or nothing: for faults at any of its steps, for signals, for those who take it back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch.nn.functional as F
from fits import EXAMPLE, Module, equal, images, states, trainer, widths
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from proof import same_state, snapshot
from striking import INSIDE, WHOLE, FaultError, at, fails, handled, sends, struck
from torch import Tensor
from torch.optim import LBFGS, SGD, Adam

from lightning_prune import history_of, load_pruned
from lightning_prune.callbacks import PruneCallback, base
from lightning_prune.callbacks.averages import averaged_copies
from lightning_prune.callbacks.base import unwrapped
from lightning_prune.pruner import draft_cut
from lightning_prune.workbench.batches import TensorImages, loader

# Lightning, where the resumed fit writes no checkpoints itself, and where OnExceptionCheckpoint finds no file yet
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings(r"ignore:`\.fit\(ckpt_path=None\)` was called without a model"),
    pytest.mark.filterwarnings(r"ignore:\.fit\(ckpt_path=.last.\) is set, but there is no last checkpoint"),
]

CUT = 1
"""The epoch of the cut: all optimizers have state by then."""

EPOCHS = 3


class Two(Module):
    """Two optimizers of different kinds: one for the convolutions, one for the rest."""

    def __init__(self, example: Tensor | None = EXAMPLE, seed: int = 0) -> None:
        super().__init__(example=example, seed=seed)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        outer = [parameter for parameter in self.parameters() if parameter.dim() == 4]
        inner = [parameter for parameter in self.parameters() if parameter.dim() != 4]
        return [SGD(outer, lr=0.05, momentum=0.9), Adam(inner, lr=0.01, amsgrad=True)]

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.zero_grad()
        self.manual_backward(loss)
        both: Any = self.optimizers()
        for optimizer in both:
            optimizer.step()
        return loss


class Resumable(Two):
    """Its loader goes on in the middle of an epoch."""

    def train_dataloader(self) -> Any:
        tensors: Any = images().dataset
        return loader(TensorImages(*tensors.tensors), 8)


def pruning() -> PruneCallback:
    return PruneCallback(0.5, begin=CUT, end=CUT)


def averaging() -> Callback:
    """An averaged copy that is held from the first step on."""
    kind = getattr(pl.callbacks, "EMAWeightAveraging", None)
    if kind is None:
        pytest.skip("this Lightning has no EMAWeightAveraging")
    made: Callback = kind(decay=0.9)
    return made


def fit(module: Module, *callbacks: Callback, ckpt: Path | None = None) -> pl.Trainer:
    """Train without validation, which would drop the gradients that are there at the cut."""
    saves = any(isinstance(callback, OnExceptionCheckpoint) for callback in callbacks)
    settings = {"max_epochs": EPOCHS, "limit_val_batches": 0, "enable_checkpointing": saves}
    made = trainer(*callbacks, **settings)
    made.fit(module, ckpt_path=ckpt)
    return made


def held(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, object]:
    """Copy all that a cut may touch: networks with attributes and history, optimizers, the callback's own state."""
    found: dict[str, object] = {}
    for number, net in enumerate((module, *averaged_copies(trainer))):
        found |= {f"network {number}: {key}": value for key, value in snapshot(net).items()}
        found[f"network {number}: history"] = history_of(net)
    for number, optimizer in enumerate(map(unwrapped, trainer.optimizers)):
        groups = [{**group, "params": list(map(id, group["params"]))} for group in optimizer.param_groups]
        found[f"optimizer {number}: groups"] = groups
        found[f"optimizer {number}: known"] = list(map(id, optimizer.state))
        for place, state in enumerate(optimizer.state.values()):
            found |= {f"optimizer {number}: {place}: {key}": deepcopy(value) for key, value in state.items()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, PruneCallback):
            found["callback"] = (callback.state_dict(), callback.is_finished)
    return found


class AtTheCut(Callback):
    """Does something to a prune callback where it is about to cut, on a plan that is drawn up once."""

    def __init__(self, action: Callable[[Callable[[], None], pl.Trainer, pl.LightningModule], None]) -> None:
        self.action, self.done = action, False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.example_input_array is not None:
            self._act("on_train_epoch_start", trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, number: int) -> None:
        if pl_module.example_input_array is None:
            self._act("on_train_batch_start", trainer, pl_module, batch, number)

    def _act(self, hook: str, trainer: pl.Trainer, pl_module: pl.LightningModule, *more: Any) -> None:
        if trainer.current_epoch != CUT or self.done:
            return
        (callback,) = (one for one in trainer.callbacks if isinstance(one, PruneCallback))  # type: ignore[attr-defined]
        planned = draft_cut(pl_module, EXAMPLE, callback.request)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base, "draft_cut", lambda *_: planned)
            self.action(lambda: getattr(callback, hook)(trainer, pl_module, *more), trainer, pl_module)
        self.done = True


# faults


def test_the_points_of_a_cut_cover_all_its_steps() -> None:
    """Two networks of 12 tensors in 5 layers, an average, and two optimizers with 2 and 5 parameters.

    11 tensors are cut; the head's bias, which has a gradient too, takes up what their channels emit.
    """

    def watch(cut: Callable[[], None], trainer: pl.Trainer, module: pl.LightningModule) -> None:
        before = held(trainer, module)
        with struck(lambda *_: None) as points:
            cut()
        counts = {name: points.count(f"before {name}") for _, name in (*INSIDE, *WHOLE)}
        assert counts == {
            "_exchange": 2 * 12,
            "set_attributes": 10,
            "_forget_what_was_computed": 2,
            "cut_tensor": 2 * 12 + 8 + 2 * 1 + 5 * 3,
            "_cut_state": 7,
            "check": 2,
            "commit": 2,
            "rebuild": 2,
        }
        after = held(trainer, module)
        changed = {key.split(":")[0] for key in after if not same_state({key: before[key]}, {key: after[key]})}
        assert changed == {"network 0", "network 1", "optimizer 0", "optimizer 1", "callback"}

    watched = AtTheCut(watch)
    fit(Two(), watched, averaging(), pruning())
    assert watched.done


@pytest.mark.parametrize("fault", [FaultError, KeyboardInterrupt])
def test_a_fault_at_any_point_leaves_everything_and_the_fit_goes_on(fault: type[BaseException]) -> None:
    """The cut is tried with a fault at each of its points in turn, in one fit, before it may be."""
    smooth, plain_average = Two(), averaging()
    expected = fit(smooth, pruning(), plain_average)
    faults: list[str] = []

    def try_all(cut: Callable[[], None], trainer: pl.Trainer, module: pl.LightningModule) -> None:
        before = held(trainer, module)
        for number in count():
            try:
                with struck(at(number, partial(fails, fault))) as points:
                    cut()
            except fault:
                assert same_state(held(trainer, module), before), points[number]
                faults.append(points[number])
            else:
                return

    torn, average = Two(), averaging()
    found = fit(torn, AtTheCut(try_all), average, pruning())
    assert len(faults) > 150
    assert set(faults) >= {f"before {name}" for _, name in (*INSIDE, *WHOLE)}
    assert widths(torn) == [4, 4]
    assert equal(torn.state_dict(), smooth.state_dict())
    assert history_of(torn) == history_of(smooth)
    left, right = (states(net, made.optimizers) for net, made in ((torn, found), (smooth, expected)))
    assert all(equal(left[name], right[name]) for name in right)


def fails_at(name: str, occurrence: int, fault: type[BaseException]) -> AtTheCut:
    """Fail where a point of this name is reached for the nth time, and end the fit with it."""

    def action(cut: Callable[[], None], *_: object) -> None:
        seen = count()
        with struck(lambda _, point: fails(fault) if point == name and next(seen) == occurrence else None):
            cut()

    return AtTheCut(action)


EARLY = [
    ("before commit", 0),
    ("after _exchange", 4),
    ("after set_attributes", 2),
    ("before rebuild", 0),
    ("after _cut_state", 1),
    ("after check", 1),
]
LATE = [("before commit", 1), ("before _exchange", 17), ("before cut_tensor", 30), ("after a whole step", 3)]
"""Points that only an averaged copy brings."""


@pytest.mark.parametrize(
    ("averaged", "name", "occurrence"),
    [(False, *point) for point in EARLY] + [(True, *point) for point in EARLY + LATE],
)
def test_a_fit_that_a_fault_has_ended_is_resumed(tmp_path: Path, averaged: bool, name: str, occurrence: int) -> None:
    """On the first batch: Lightning resumes from a file of `on_train_epoch_start` with an epoch left out."""

    def more() -> list[Callback]:
        return [averaging()] if averaged else []

    unbroken = Two(None)
    fit(unbroken, *more(), pruning())
    broken = Two(None)
    with pytest.raises(FaultError):
        fit(broken, fails_at(name, occurrence, FaultError), *more(), pruning(), OnExceptionCheckpoint(tmp_path))
    assert widths(broken) == [8, 8]
    path = tmp_path / "on_exception.ckpt"
    assert not history_of(load_pruned(Two(None, seed=9), path))
    resumed = Two(None, seed=9)
    fit(resumed, *more(), pruning(), ckpt=path)
    assert equal(resumed.state_dict(), unbroken.state_dict())
    assert history_of(resumed) == history_of(unbroken)


@pytest.mark.filterwarnings("ignore:LBFGS keeps one flat history")
def test_what_lbfgs_knows_comes_back() -> None:
    kept: list[bool] = []

    def try_it(cut: Callable[[], None], trainer: pl.Trainer, module: pl.LightningModule) -> None:
        (optimizer,) = map(unwrapped, trainer.optimizers)
        (state,) = optimizer.state.values()
        before = list(state.items())
        for fault in (FaultError, KeyboardInterrupt):
            with pytest.raises(fault), struck(lambda _, name: fails(fault) if name == "after a whole step" else None):  # noqa: B023
                cut()
            kept.append([*map(id, dict(before).values())] == [*map(id, state.values())] and len(before) > 3)

    module = Module(partial(LBFGS, lr=0.01, max_iter=2))
    fit(module, AtTheCut(try_it), pruning())
    assert kept == [True, True]
    assert widths(module) == [4, 4]


def test_a_warning_that_is_an_error_takes_the_cut_back() -> None:
    """Under `-W error` the optimizer's own warning ends the cut in the middle; spent gradients are gone by then."""

    def try_it(cut: Callable[[], None], trainer: pl.Trainer, module: pl.LightningModule) -> None:
        before = held(trainer, module)
        before = {key: value for key, value in before.items() if "network" in key and "gradient" not in key}
        with pytest.raises(UserWarning, match="LBFGS keeps one flat history"):
            cut()
        after = held(trainer, module)
        assert same_state({key: after[key] for key in before}, before)
        raise FaultError

    with pytest.raises(FaultError):
        fit(Module(partial(LBFGS, lr=0.01, max_iter=2)), AtTheCut(try_it), pruning())


# signals

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGALRM])
def test_a_handler_sees_the_new_network_whole_wherever_its_signal_comes(number: signal.Signals) -> None:
    seen: list[dict[str, object]] = []
    sent: list[str] = []

    def strike(_: int, point: str) -> None:
        sends(number)
        sent.append(point)
        assert not seen, "the handler did not wait"

    def watch(cut: Callable[[], None], trainer: pl.Trainer, module: pl.LightningModule) -> None:
        before = held(trainer, module)

        def look(came: int, frame: FrameType | None) -> None:
            assert came == number
            assert frame is not None
            seen.append(held(trainer, module))

        with handled([number], look):
            with struck(strike):
                cut()
            assert signal.getsignal(number) is look
        after = held(trainer, module)
        assert not same_state(before, after)
        assert all(same_state(state, after) for state in seen)

    module = Two()
    fit(module, AtTheCut(watch), averaging(), pruning())
    assert len(seen) == len(sent) > 150


@pytest.mark.usefixtures("_handlers")
def test_a_handler_sees_the_old_network_whole_where_the_cut_fails() -> None:
    seen: list[dict[str, object]] = []

    def strike(point: int, name: str) -> None:
        for number in SIGNALS if point % 5 == 0 else ():
            sends(number)
        if name == "after check" and point > 10:
            raise FaultError

    def watch(cut: Callable[[], None], trainer: pl.Trainer, module: pl.LightningModule) -> None:
        before = held(trainer, module)
        with handled(SIGNALS, lambda *_: seen.append(held(trainer, module))), pytest.raises(FaultError), struck(strike):
            cut()
        assert len(seen) > 90
        assert all(same_state(state, before) for state in seen)

    fit(Two(), AtTheCut(watch), averaging(), pruning())
    assert seen


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize(("name", "occurrence"), EARLY + LATE)
def test_a_handlers_checkpoint_holds_the_new_network_and_is_resumed(tmp_path: Path, name: str, occurrence: int) -> None:
    path, seen = tmp_path / "handler.ckpt", count()

    def save(cut: Callable[[], None], trainer: pl.Trainer, module: pl.LightningModule) -> None:
        def strike(_: int, point: str) -> None:
            if point == name and next(seen) == occurrence:
                sends(signal.SIGUSR1)
                assert not path.exists()

        with handled([signal.SIGUSR1], lambda *_: trainer.save_checkpoint(path)), struck(strike):
            cut()

    unbroken = Two(None)
    fit(unbroken, AtTheCut(save), averaging(), pruning())
    loaded = load_pruned(Two(None, seed=9), path)
    assert widths(loaded) == [4, 4]
    assert history_of(loaded) == history_of(unbroken)
    resumed = Two(None, seed=9)
    fit(resumed, averaging(), pruning(), ckpt=path)
    assert equal(resumed.state_dict(), unbroken.state_dict())
    assert history_of(resumed) == history_of(unbroken)


def sends_at(name: str, occurrence: int, number: int) -> AtTheCut:
    def action(cut: Callable[[], None], *_: object) -> None:
        seen = count()
        with struck(lambda _, point: sends(number) if point == name and next(seen) == occurrence else None):
            cut()

    return AtTheCut(action)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("averaged", [False, True], ids=["", "averaged"])
@pytest.mark.parametrize(("name", "occurrence"), EARLY[:5])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_fit_after_the_cut_and_the_file_is_resumed(
    tmp_path: Path, number: signal.Signals, name: str, occurrence: int, averaged: bool
) -> None:
    """Ctrl+C, and SIGTERM as Lightning takes it: it ends the fit at the next batch."""
    more: list[Callback] = [averaging()] if averaged else []
    kind = Two if number == signal.SIGINT else Resumable
    unbroken = kind(None)
    fit(unbroken, *deepcopy(more), pruning())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    broken = kind(None)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(broken, sends_at(name, occurrence, number), *deepcopy(more), pruning(), OnExceptionCheckpoint(tmp_path))
    assert widths(broken) == [4, 4]
    path = tmp_path / "on_exception.ckpt"
    assert len(history_of(load_pruned(kind(None, seed=9), path))) == 1
    resumed = kind(None, seed=9)
    fit(resumed, *deepcopy(more), pruning(), ckpt=path)
    assert equal(resumed.state_dict(), unbroken.state_dict())
    assert history_of(resumed) == history_of(unbroken)


def test_a_fit_in_another_thread_is_cut_as_ever() -> None:
    expected, module = Two(), Two()
    fit(expected, pruning())
    handlers: list[object] = []
    failures: list[BaseException] = []

    def watch(cut: Callable[[], None], *_: object) -> None:
        with struck(lambda *_: handlers.append(signal.getsignal(signal.SIGINT))):
            cut()

    def run() -> None:
        try:
            fit(module, AtTheCut(watch), pruning())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures
    assert len(handlers) > 80
    assert set(handlers) == {signal.getsignal(signal.SIGINT)}
    assert equal(module.state_dict(), expected.state_dict())

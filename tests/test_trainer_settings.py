"""Settings of the Trainer, compiled modules, several fits and several callbacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from beside import CUT, Moves, beside, cut, either_side
from fits import EXAMPLE, STEPS, Module, equal, trainer, widths
from torch import Tensor
from torch.utils.data import DataLoader
from versions import older

from lightning_prune import history_of
from lightning_prune.callbacks import BNSlimmingCallback, MagnitudePruneCallback, PruneCallback

# torch.compile


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Quiet(Module):
    """Logs nothing, which takes the compiler long to follow."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("what", "example"),
    [("module", EXAMPLE), ("network", None), ("network in place", EXAMPLE), ("layer", None)],
    ids=["module", "network", "network in place", "layer"],
)
def test_what_was_compiled_is_compiled_anew_after_the_cut(what: str, example: Tensor | None) -> None:
    if older("torch", "2.6") and what != "module":
        pytest.skip("torch before 2.6 hands a backend no parameters: they are attributes of the graph")
    shapes: set[tuple[int, ...]] = set()

    def backend(graph: Any, inputs: Any) -> Any:
        shapes.update(tuple(item.shape) for item in inputs if isinstance(item, Tensor))
        return graph.forward

    module, plain, moves = Quiet(example=example), Quiet(example=example), Moves()
    fitted: Any = module
    if what == "module":
        fitted = torch.compile(module, backend=backend)
    elif what == "network":
        module.net = torch.compile(module.net, backend=backend)
    elif what == "network in place":
        module.net.compile(backend=backend)
    else:
        module.net[3] = torch.compile(module.net[3], backend=backend)
    settings = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 0}
    trainer(cut(1), moves, **settings).fit(fitted)
    trainer(cut(1), **settings).fit(plain)
    assert widths(module) == [4, 4]
    assert moves.still == [[]] * 6
    assert {(8, 8, 3, 3), (4, 4, 3, 3)} <= shapes
    for value, expected in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, expected)


# settings of the Trainer


class Counting(Module):
    """Counts what the Trainer's settings are about."""

    def __init__(self) -> None:
        super().__init__()
        self.loads = self.checks = self.validations = 0

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        self.loads += 1
        return super().train_dataloader()

    def on_validation_epoch_end(self) -> None:
        self.checks += self.trainer.sanity_checking
        self.validations += not self.trainer.sanity_checking


SETTINGS: list[tuple[dict[str, Any], int, dict[str, int]]] = [
    ({"num_sanity_val_steps": 2}, 12, {"checks": 1, "validations": 4}),
    ({"val_check_interval": 0.5}, 12, {"validations": 8}),
    ({"val_check_interval": 5, "check_val_every_n_epoch": None}, 12, {"validations": 4}),
    ({"check_val_every_n_epoch": 2}, 12, {"validations": 2}),
    ({"limit_train_batches": 2}, 4, {"validations": 4}),
    ({"limit_val_batches": 0}, 12, {"validations": 0}),
    ({"overfit_batches": 2}, 4, {"validations": 4}),
    ({"max_steps": 14}, 12, {"validations": 2}),
    ({"max_epochs": -1, "max_steps": 14}, 12, {"validations": 2}),
    ({"reload_dataloaders_every_n_epochs": 1}, 12, {"loads": 4}),
    ({"barebones": True}, 12, {"checks": 0, "validations": 4}),
    ({"inference_mode": False}, 12, {"validations": 4}),
]


@pytest.mark.filterwarnings("ignore:You are running with .Trainer.barebones=True", "ignore:.*Anomaly Detection")
@pytest.mark.filterwarnings("ignore:You requested to overfit", "ignore:.*barebones=True.* is configured")
@pytest.mark.parametrize(
    ("settings", "step", "counts"), SETTINGS, ids=lambda value: str(value) if "_" in str(value) else ""
)
@pytest.mark.usefixtures("in_a_folder_of_its_own")
def test_settings_of_the_trainer(settings: dict[str, Any], step: int, counts: dict[str, int]) -> None:
    module, moves = Counting(), Moves()
    trainer(cut(), moves, **settings).fit(module)
    assert [(record.epoch, record.step) for record in history_of(module)] == [(CUT, step)]
    assert widths(module) == [4, 4]
    assert {name: getattr(module, name) for name in counts} == counts
    assert not any(moves.still)
    trainer().validate(module, verbose=False)


@pytest.mark.parametrize("timing", [{"begin": 1}, {"begin": 1, "end": 8, "every_n_steps": 2}], ids=["epochs", "steps"])
def test_a_fit_without_batches_cuts_nothing(timing: dict[str, Any]) -> None:
    module, was = Module(), Module().state_dict()
    trainer(PruneCallback(0.5, **timing), limit_train_batches=0).fit(module)
    assert history_of(module) == ()
    assert equal(module.state_dict(), was)


# several fits, several callbacks


def test_a_network_that_was_cut_is_cut_further_in_another_fit() -> None:
    module = Module()
    trainer(cut(1), max_epochs=2).fit(module)
    trainer(PruneCallback(0.75, begin=1), max_epochs=2).fit(module)
    assert [record.reached for record in history_of(module)] == [0.5, 0.75]
    assert widths(module) == [2, 2]


def test_a_fit_that_was_stopped_in_its_first_epoch_goes_on_without_another_cut() -> None:
    module, callback = Module(), PruneCallback(0.5, begin=2, end=2, every_n_steps=1)
    fit = trainer(callback, max_steps=4)
    fit.fit(module)
    fit.fit_loop.epoch_loop.max_steps = 10
    fit.fit(module)
    assert fit.global_step == 10
    assert [record.step for record in history_of(module)] == [2]


@either_side
@pytest.mark.parametrize("steps", [False, True], ids=["epochs", "steps"])
def test_slimming_and_magnitude_at_the_same_moment(steps: bool, side: int) -> None:
    """Whichever is the larger fraction of the dense model holds in the end, in any order."""
    unit: dict[str, Any] = {"every_n_steps": 1} if steps else {}
    slimming = BNSlimmingCallback(0.25, strength=1e-3, begin=1, end=1, **unit)
    magnitude = MagnitudePruneCallback(0.5, begin=1, end=1, **unit)
    module, moves = Module(), Moves()
    trainer(*beside(slimming, magnitude, side=side), moves).fit(module)
    assert sum(widths(module)) == 8
    assert history_of(module)[-1].reached == 0.5
    assert slimming.is_finished
    assert magnitude.is_finished
    assert moves.still == [[]] * 4 * STEPS

"""Reconstruction inside the Trainer: at the start of a fit, at any event of any prune callback, and without a fit."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fits import EXAMPLE, Module, Resumable, equal, images, momentum, network, states, trainer, widths
from gated_networks import gated
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import history_of, load_pruned, prune, reconstruct
from lightning_prune.allocation import ByCost, Global, ShallowToDeep
from lightning_prune.callbacks import (
    BNSlimmingCallback,
    FisherPruneCallback,
    LassoPruneCallback,
    MagnitudePruneCallback,
    PruneCallback,
)
from lightning_prune.callbacks.averages import averaged_copies
from lightning_prune.callbacks.calibration import training_batches
from lightning_prune.criteria import Criterion, FirstK, Fisher, Lasso, Magnitude, MaxResponse, Random
from lightning_prune.errors import PruningError
from lightning_prune.history import replay
from lightning_prune.masks.held import hold
from lightning_prune.reconstruction import Reconstruction
from lightning_prune.schedules import linear

# Lightning, where the resumed fit writes no checkpoints itself
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

LOOK = Reconstruction(images=40, points=9)
EXAMPLES = pytest.mark.parametrize("example", [EXAMPLE, None], ids=["example", "first batch"])


def trained(**arguments: Any) -> Module:
    """A network that has learnt something."""
    module = Module(**arguments)
    trainer(max_epochs=2, limit_val_batches=0).fit(module)
    return module


def same(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    return left.keys() == right.keys() and all(
        left[name].shape == right[name].shape and torch.allclose(left[name], right[name], rtol=0, atol=tolerance)
        for name in left
    )


class Before(Callback):
    """Stands before the pruning callback: keeps the network at some epochs, and the examples that are looked at."""

    def __init__(self, *epochs: int) -> None:
        self.epochs, self.networks, self.seen = epochs, {}, {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch in self.epochs:
            self.networks[trainer.current_epoch] = deepcopy(pl_module)
            with isolate_rng():
                self.seen[trainer.current_epoch] = [batch[0] for batch in training_batches(trainer)]


class After(Callback):
    """Stands behind it: keeps weights and the state of the optimizer as the first batch of an epoch finds them."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.states: dict[int, Any] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, number: int) -> None:
        if number == 0:
            self.weights[trainer.current_epoch] = {key: value.clone() for key, value in pl_module.state_dict().items()}
            self.states[trainer.current_epoch] = states(pl_module, trainer.optimizers)


# inside a fit


@EXAMPLES
def test_the_cut_is_that_of_reconstruct_on_the_same_examples(example: Tensor | None) -> None:
    module, before, after = trained(example=example), Before(0), After()
    own = LassoPruneCallback(0.5, of="channels", reconstruction=LOOK)
    trainer(before, own, after, max_epochs=1).fit(module)
    twin = before.networks[0].eval()
    done = reconstruct(twin, before.seen[0], pruning_ratio=0.5, of="channels", reconstruction=LOOK)
    assert widths(module) == [4, 4]
    assert [(record.epoch, record.step) for record in history_of(module)] == [(0, 0)]
    assert history_of(module)[0].kept == done.record.kept
    assert same(after.weights[0], twin.state_dict())
    assert not equal(after.weights[0], module.state_dict()), "it is trained on"


def test_the_optimizer_and_the_learning_rates_go_on() -> None:
    def cosine(optimizer: Any) -> dict[str, Any]:
        return {"lr_scheduler": CosineAnnealingLR(optimizer, 4)}

    class Rates(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    curves, after = [], After()
    for callbacks in ([], [LassoPruneCallback(0.5, of="channels", reconstruction=LOOK, begin=2), after]):
        rates = Rates()
        trainer(*callbacks, rates).fit(Module(momentum, cosine))
        curves.append(rates.seen)
    assert curves[0] == curves[1]
    was, now = after.states[1], after.states[2]
    assert now["net.0.weight"]["momentum_buffer"].shape == (4, 1, 3, 3)
    assert was["net.0.weight"]["momentum_buffer"].shape == (8, 1, 3, 3)
    assert all(float(state["momentum_buffer"].abs().sum()) > 0 for state in now.values())


def test_each_event_refits_what_it_leaves() -> None:
    module, before, after = Module(), Before(1, 3), After()
    own = LassoPruneCallback(0.5, of="channels", reconstruction=LOOK, schedule=linear, begin=0, end=3)
    trainer(before, own, after).fit(module)
    assert [record.epoch for record in history_of(module)] == [1, 2, 3]
    for epoch in (1, 3):
        twin = before.networks[epoch].eval()
        ratio = history_of(module)[epoch - 1].asked
        reconstruct(twin, before.seen[epoch], pruning_ratio=ratio, of="channels", reconstruction=LOOK)
        assert same(after.weights[epoch], twin.state_dict())
    assert sum(widths(module)) == 8


CRITERIA: dict[str, Callable[[], PruneCallback]] = {
    "magnitude": lambda: PruneCallback(0.5, criterion=Magnitude(), begin=1, end=1, reconstruction=LOOK),
    "random": lambda: PruneCallback(0.5, criterion=Random(3), begin=1, end=1, reconstruction=LOOK),
    "max response": lambda: PruneCallback(0.5, criterion=MaxResponse(), begin=1, end=1, reconstruction=LOOK),
    "first k": lambda: PruneCallback(0.5, criterion=FirstK(), begin=1, end=1, reconstruction=LOOK),
    "lasso": lambda: PruneCallback(0.5, criterion=Lasso(), begin=1, end=1, reconstruction=LOOK),
    "lasso by cost": lambda: PruneCallback(
        0.5, criterion=Lasso(), allocation=ByCost(), begin=1, end=1, reconstruction=LOOK
    ),
    "lasso, global": lambda: PruneCallback(
        0.5, criterion=Lasso(), allocation=Global(), begin=1, end=1, reconstruction=LOOK
    ),
    "shallow to deep": lambda: LassoPruneCallback(
        0.5, of="channels", allocation=ShallowToDeep(), begin=1, reconstruction=LOOK
    ),
    "fisher": lambda: PruneCallback(0.5, criterion=Fisher(), begin=1, end=1, reconstruction=LOOK),
    "fisher callback": lambda: FisherPruneCallback(0.5, of="channels", begin=1, end=1, reconstruction=LOOK),
    "magnitude callback": lambda: MagnitudePruneCallback(0.5, schedule=linear, begin=0, end=1, reconstruction=LOOK),
    "slimming callback": lambda: BNSlimmingCallback(0.5, strength=0.01, begin=1, end=1, reconstruction=LOOK),
    "on steps": lambda: PruneCallback(0.5, begin=6, end=6, every_n_steps=3, reconstruction=LOOK),
}


@pytest.mark.parametrize("name", CRITERIA)
@EXAMPLES
def test_any_criterion_goes_with_a_refit(name: str, example: Tensor | None) -> None:
    module, before, after = Module(example=example), Before(1), After()
    trainer(before, CRITERIA[name](), after, max_epochs=2).fit(module)
    (record,) = history_of(module)
    assert sum(widths(module)) == 8
    assert (record.epoch, record.step) == (1, 6)
    was, now = before.networks[1], load(before.networks[1], record, after.weights[1])
    images = torch.cat(before.seen[1])
    naive = deepcopy(was)
    replayed(naive, record)
    errors = [off(net, was, images) for net in (now, naive)]
    assert errors[0] < 0.8 * errors[1], "the refit makes up for a good part of what went"


def load(dense: nn.Module, record: Any, weights: dict[str, Tensor]) -> nn.Module:
    """A network after the cut."""
    net = deepcopy(dense)
    replayed(net, record)
    net.load_state_dict(weights)
    return net


def replayed(net: nn.Module, record: Any) -> None:
    replay(net, [record])


def off(net: nn.Module, target: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float((net.eval()(images) - target.eval()(images)).norm())


def test_what_gathers_from_the_training_waits_for_it() -> None:
    with pytest.raises(MisconfigurationException, match="by what Fisher has seen of the training"):
        trainer(LassoPruneCallback(0.5, criterion=Fisher(), reconstruction=LOOK)).fit(Module())


class Shuffled(Module):
    """Reads its images in an order drawn from the global random state, and notes it; drops out at random."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(net=nn.Sequential(nn.Dropout(0.2), *network()), **arguments)
        self.seen: list[float] = []

    def train_dataloader(self) -> Any:
        return DataLoader(images().dataset, batch_size=8, shuffle=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(float(batch[0].sum()))
        return super().training_step(batch, batch_idx)


@EXAMPLES
def test_a_cut_of_nothing_changes_nothing(example: Tensor | None) -> None:
    """Weights, order of the images, and random numbers: bit for bit those of a fit without the callback."""
    ends = []
    for callbacks in ([], [LassoPruneCallback(0.0, reconstruction=LOOK)], [PruneCallback(0.0, reconstruction=LOOK)]):
        pl.seed_everything(0, verbose=False)
        module = Shuffled(example=example)
        trainer(*callbacks, max_epochs=3).fit(module)
        ends.append((module.state_dict(), module.seen, torch.get_rng_state()))
    for weights, seen, numbers in ends[1:]:
        assert equal(weights, ends[0][0])
        assert seen == ends[0][1]
        assert torch.equal(numbers, ends[0][2])


def test_a_cut_takes_no_random_numbers() -> None:
    ends = []
    for callbacks in ([], [LassoPruneCallback(0.5, of="channels", reconstruction=LOOK, begin=1)]):
        pl.seed_everything(0, verbose=False)
        module = Shuffled()
        trainer(*callbacks, max_epochs=3).fit(module)
        ends.append(module.seen)
    assert ends[0] == ends[1]


def test_recalibration_comes_after_the_refit() -> None:
    module, after = trained(), After()
    before = deepcopy(module.state_dict())
    own = LassoPruneCallback(0.5, of="channels", reconstruction=LOOK, recalibrate=3)
    trainer(own, after, max_epochs=1).fit(module)
    (record,) = history_of(module)
    stays = list(record.kept["net.0.weight"][0])
    assert not torch.equal(after.weights[0]["net.1.running_mean"], before["net.1.running_mean"][stays])
    assert after.weights[0]["net.1.running_mean"].isfinite().all()


# resuming


@EXAMPLES
@pytest.mark.parametrize("optimizer", [momentum, lambda parameters: AdamW(parameters, lr=0.01)])
def test_a_resumed_fit_is_the_unbroken_one(tmp_path: Path, optimizer: Any, example: Tensor | None) -> None:
    def fit(module: Module, *callbacks: Callback, ckpt: Path | None = None) -> pl.Trainer:
        made = trainer(lasso(), *callbacks, enable_checkpointing=bool(callbacks))
        made.fit(module, ckpt_path=ckpt)
        return made

    def lasso() -> LassoPruneCallback:
        settings = {"reconstruction": LOOK, "schedule": linear, "begin": 1, "end": 3, "every": 1}
        return LassoPruneCallback(0.5, of="channels", **settings)

    keep = ModelCheckpoint(tmp_path, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    unbroken = Resumable(optimizer, example=example)
    expected = states(unbroken, fit(unbroken, keep).optimizers)
    assert [record.epoch for record in history_of(unbroken)] == [2, 3]
    for epoch in (0, 1, 2):
        resumed = Resumable(optimizer, example=example, seed=9)
        found = states(resumed, fit(resumed, ckpt=tmp_path / f"{epoch}.ckpt").optimizers)
        assert equal(resumed.state_dict(), unbroken.state_dict()), epoch
        assert all(equal(found[name], state) for name, state in expected.items()), epoch
        assert history_of(resumed) == history_of(unbroken)
    loaded = load_pruned(Module(seed=9), tmp_path / "2.ckpt")
    assert sum(widths(loaded)) == 12
    assert equal(loaded.state_dict(), torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"])


# averaged copies


def test_averaged_copies_are_refitted_with_their_own_weights() -> None:
    kind = getattr(pl.callbacks, "EMAWeightAveraging", None)
    if kind is None:
        pytest.skip("this Lightning has no EMAWeightAveraging")
    found: dict[str, nn.Module] = {}

    class Copied(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 2:
                found[self.name] = deepcopy(next(averaged_copies(trainer)))

    module, before = Module(), Before(2)
    own = PruneCallback(0.5, criterion=Magnitude(), begin=2, end=2, reconstruction=LOOK)
    trainer(kind(decay=0.9), before, Copied("before"), own, Copied("after"), max_epochs=3).fit(module)
    (record,) = history_of(module)
    assert history_of(found["after"]) == (record,)
    naive = deepcopy(found["before"])
    replayed(naive, record)
    seen = torch.cat(before.seen[2])
    assert off(found["after"], found["before"], seen) < 0.8 * off(naive, found["before"], seen)

    class Same(Criterion):
        """The channels of the network that is trained."""

        def score(self, model: nn.Module, group: Any) -> Tensor:
            stays = torch.zeros(group.size)
            stays[list(record.kept[f"{group.name}.weight"][0])] = 1
            return stays

    twin = found["before"].eval()
    reconstruct(twin, before.seen[2], pruning_ratio=0.5, of="channels", criterion=Same(), reconstruction=LOOK)
    assert same(found["after"].state_dict(), twin.state_dict())


# precision


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_are_reconstructed_too(precision: Any) -> None:
    module, before, after = trained(), Before(0), After()
    own = LassoPruneCallback(0.5, of="channels", reconstruction=LOOK)
    trainer(before, own, after, max_epochs=1, precision=precision).fit(module)
    (record,) = history_of(module)
    dense = before.networks[0]
    kind = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert all(value.dtype == kind for value in after.weights[0].values() if value.is_floating_point())
    assert all(value.isfinite().all() for value in after.weights[0].values())
    naive = deepcopy(dense)
    replayed(naive, record)
    seen = torch.cat(before.seen[0]).to(kind)
    assert off(load(dense, record, after.weights[0]), dense, seen) < 0.8 * off(naive, dense, seen)


def test_little_is_lost_to_bf16() -> None:
    errors = {}
    for precision in ("32-true", "bf16-true"):
        module, before, after = trained(), Before(0), After()
        own = LassoPruneCallback(0.5, of="channels", reconstruction=LOOK)
        trainer(before, own, after, max_epochs=1, precision=precision).fit(module)
        cut = load(before.networks[0], history_of(module)[0], after.weights[0]).float()
        errors[precision] = off(cut, trained(), torch.cat(before.seen[0]).float())
    assert errors["bf16-true"] < 1.1 * errors["32-true"]


# without a fit


@EXAMPLES
def test_validating_cuts_once(example: Tensor | None) -> None:
    module = trained(example=example)
    twin = deepcopy(module).eval()
    own = LassoPruneCallback(0.5, of="channels", reconstruction=LOOK)
    made = trainer(own)
    (first,) = made.validate(module, verbose=False)
    done = reconstruct(twin, [batch[0] for batch in images()], pruning_ratio=0.5, of="channels", reconstruction=LOOK)
    assert history_of(module) == (done.record,)
    assert same(module.state_dict(), twin.state_dict())
    assert trainer().validate(twin, verbose=False) == [first]
    expected = deepcopy(module.state_dict())
    assert made.validate(module, verbose=False) == [first]
    assert equal(module.state_dict(), expected)


def test_what_was_cut_while_validating_can_be_trained_on(tmp_path: Path) -> None:
    module = trained()
    trainer(LassoPruneCallback(0.5, of="channels", reconstruction=LOOK)).validate(module, verbose=False)
    assert not any(tensor.is_inference() for tensor in (*module.parameters(), *module.buffers()))
    before = deepcopy(module.state_dict())
    made = trainer(max_epochs=1)
    made.fit(module)
    assert not any(torch.equal(before[name], parameter) for name, parameter in module.named_parameters())
    made.save_checkpoint(tmp_path / "net.ckpt")
    assert equal(load_pruned(Module(seed=9), tmp_path / "net.ckpt").state_dict(), module.state_dict())


class Data(pl.LightningDataModule):
    """Has other training data than the module."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)

    def train_dataloader(self) -> Any:
        assert "fit" in self.stages
        return images(seed=7)

    def val_dataloader(self) -> Any:
        return images(seed=1)


class Bare(Module):
    """Brings no data along."""

    train_dataloader = pl.LightningModule.train_dataloader
    val_dataloader = pl.LightningModule.val_dataloader


def cut_while_validating(module: pl.LightningModule, own: LassoPruneCallback, **data: Any) -> dict[str, Tensor]:
    trainer(own).validate(module, verbose=False, **data)
    assert sum(widths(module)) == 8
    return module.state_dict()


def test_where_the_examples_come_from() -> None:
    settings = {"of": "channels", "reconstruction": LOOK}
    dense = trained()

    def expected(seed: int) -> dict[str, Tensor]:
        twin, batches = deepcopy(dense).eval(), [batch[0] for batch in images(seed)]
        reconstruct(twin, batches, pruning_ratio=0.5, **settings)
        return twin.state_dict()

    bare = Bare()
    bare.load_state_dict(dense.state_dict())
    validation = {"dataloaders": images(seed=1)}
    given = LassoPruneCallback(0.5, batches=images(seed=5), **settings)
    assert same(cut_while_validating(deepcopy(bare), given, **validation), expected(5))
    assert same(cut_while_validating(deepcopy(dense), given), expected(5))
    assert same(
        cut_while_validating(deepcopy(bare), LassoPruneCallback(0.5, **settings), datamodule=Data()), expected(7)
    )
    with pytest.raises(MisconfigurationException, match=r"nothing to look at in `trainer\.validate`. Pass `batches`"):
        cut_while_validating(bare, LassoPruneCallback(0.5, **settings), **validation)
    assert widths(bare) == [8, 8]


def test_a_generator_serves_as_batches() -> None:
    own = LassoPruneCallback(0.5, of="channels", batches=(batch[0] for batch in images()), reconstruction=LOOK)
    cut_while_validating(trained(), own)


@pytest.mark.parametrize("example", [EXAMPLE, None], ids=["example", "first batch"])
def test_no_batches_are_said_so(example: Tensor | None) -> None:
    module = Module(example=example)
    with pytest.raises(PruningError, match="LassoPruneCallback got no batch to look at"):
        trainer(LassoPruneCallback(0.5, batches=[])).validate(module, verbose=False)
    assert widths(module) == [8, 8]


def test_only_validating_by_itself_cuts() -> None:
    """Neither the sanity check, nor validation in a fit, nor one after it, nor a test."""

    class Tested(Module):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self(batch[0]).mean())

    module = Tested()
    own = LassoPruneCallback(0.5, of="channels", begin=2, reconstruction=LOOK)
    made = trainer(own, max_epochs=3)
    made.fit(module)
    assert [record.epoch for record in history_of(module)] == [2]
    made.validate(module, verbose=False)
    assert len(history_of(module)) == 1
    dense = Tested()
    trainer(own).test(dense, images(), verbose=False)
    assert history_of(dense) == ()


def test_a_fit_after_validating_cuts_no_further() -> None:
    module = trained()
    own = LassoPruneCallback(0.5, of="channels", reconstruction=LOOK)
    trainer(own).validate(module, verbose=False)
    trainer(own, max_epochs=1).fit(module)
    assert widths(module) == [4, 4]


def test_a_checkpoint_is_cut_while_validating_it(tmp_path: Path) -> None:
    dense = trained()
    made = trainer(max_epochs=0)
    made.strategy.connect(dense)
    made.save_checkpoint(tmp_path / "dense.ckpt")
    own = LassoPruneCallback(0.5, of="channels", reconstruction=LOOK)
    one, other = Module(seed=9), deepcopy(dense)
    trainer(own).validate(one, ckpt_path=tmp_path / "dense.ckpt", verbose=False)
    trainer(own).validate(other, verbose=False)
    assert sum(widths(one)) == 8
    assert equal(one.state_dict(), other.state_dict())


# what is told


@pytest.mark.filterwarnings("ignore:.*does not support.*:UserWarning")
@pytest.mark.parametrize("bar", [True, False])
def test_tables_go_where_the_progress_bar_goes(bar: bool, capsys: pytest.CaptureFixture[str]) -> None:
    own = LassoPruneCallback(0.5, of="channels", reconstruction=LOOK)
    trainer(own, max_epochs=1, enable_progress_bar=bar).fit(trained())
    trainer(own, enable_progress_bar=bar).validate(trained(), verbose=False)
    told = capsys.readouterr().out
    assert ("sliced" in told.lower()) is bar
    assert ("without training" in told) is bar


# wrong input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "Either `pruning_ratio` or `speed_up` is given; got None and None"),
        ({"pruning_ratio": 0.5, "speed_up": 2}, "Either `pruning_ratio` or `speed_up` is given; got 0.5 and 2"),
        ({"speed_up": 1}, "`speed_up` is how many times fewer MACs there will be, above 1; got 1"),
        ({"speed_up": float("nan")}, "above 1; got nan"),
        ({"speed_up": 2, "of": "params"}, "`speed_up` counts \"macs\"; got it with of='params'"),
        ({"pruning_ratio": 1.0}, r"in \[0, 1\); got 1.0"),
        ({"pruning_ratio": 0.5, "begin": 3, "end": 1}, "begin"),
        ({"pruning_ratio": 0.5, "trunks": "some"}, "`trunks` is one of"),
        ({"pruning_ratio": 0.5, "recalibrate": -1}, "`recalibrate` is a number of batches"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LassoPruneCallback(**arguments)


def test_masks_are_not_reconstructed() -> None:
    with pytest.raises(ValueError, match="`reconstruction` is about channels: masks leave all of them"):
        MagnitudePruneCallback(0.5, granularity="weights", reconstruction=LOOK)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(images().dataset)  # type: ignore[call-overload]


class Counting(Module):
    steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return super().training_step(batch, batch_idx)


def test_data_that_cannot_be_read_twice_are_refused_before_the_first_step() -> None:
    class Streamed(Counting):
        def train_dataloader(self) -> Any:
            return DataLoader(Stream(), batch_size=8)

    module = Streamed()
    with pytest.raises(MisconfigurationException, match=r"`reconstruction` reads .*`lightning_prune\.reconstruct`"):
        trainer(LassoPruneCallback(0.5, begin=1)).fit(module)
    assert module.steps == 0
    trainer(LassoPruneCallback(0.5, of="channels", reconstruction=LOOK)).validate(module, verbose=False)
    assert sum(widths(module)) == 8


@pytest.mark.parametrize("example", [EXAMPLE, None], ids=["example", "first batch"])
def test_gates_and_masks_are_refused_before_the_first_step(example: Tensor | None) -> None:
    masked, open_or_shut = Counting(example=example), Counting(example=example)
    hold(masked, {"net.3.weight": torch.rand(8, 8, 3, 3) > 0.5})
    gated(open_or_shut, EXAMPLE)
    for module, what in ((masked, "masked weights"), (open_or_shut, "gates")):
        with pytest.raises(PruningError, match=f"A network with {what} cannot be reconstructed"):
            trainer(LassoPruneCallback(0.5, begin=2, reconstruction=LOOK)).fit(module)
        assert module.steps == 0


def test_masks_that_came_in_the_same_fit_are_refused_when_it_cuts() -> None:
    module = Counting()
    masks = MagnitudePruneCallback(0.5, granularity="weights", begin=0, end=0)
    with pytest.raises(PruningError, match="A network with masked weights cannot be reconstructed"):
        trainer(masks, LassoPruneCallback(0.5, begin=2, reconstruction=LOOK)).fit(module)
    assert widths(module) == [8, 8]
    assert history_of(module) == ()


def test_too_few_rows_leave_the_network_as_it_was() -> None:
    module = Module()
    before = deepcopy(module.state_dict())
    few = Reconstruction(images=8, points=1)
    with pytest.raises(PruningError, match=r"net\.3 keeps \d+ columns"):
        trainer(LassoPruneCallback(0.5, of="channels", reconstruction=few)).fit(module)
    assert equal(module.state_dict(), before)
    assert history_of(module) == ()


def test_images_that_are_not_finite_leave_the_network_as_it_was() -> None:
    class Tainted(Counting):
        def train_dataloader(self) -> Any:
            loader = images()
            loader.dataset.tensors[0][3] = torch.nan  # type: ignore[attr-defined]
            return loader

    module = Tainted()
    with pytest.raises(PruningError, match="reads or returns NaN"):
        trainer(LassoPruneCallback(0.5, of="channels", reconstruction=Reconstruction(48))).fit(module)
    assert widths(module) == [8, 8]
    assert module.steps == 0


def test_a_network_that_was_pruned_before_is_reconstructed_further() -> None:
    module = trained()
    prune(module, EXAMPLE, pruning_ratio=0.25)
    trainer(LassoPruneCallback(0.5, of="channels", reconstruction=LOOK), max_epochs=1).fit(module)
    assert widths(module) == [4, 4]
    assert len(history_of(module)) == 2


class AsksTheTrainer(Module):
    def forward(self, x: Tensor) -> Tensor:
        assert self.trainer.max_epochs == 1
        return super().forward(x)


def test_a_forward_that_asks_the_trainer_finds_it() -> None:
    module = AsksTheTrainer()
    trainer(LassoPruneCallback(0.5, of="channels", reconstruction=LOOK), max_epochs=1).fit(module)
    assert len(history_of(module)) == 1

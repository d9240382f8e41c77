"""The Fisher-Rao norm is what its definition says, with one forward pass a batch, and is logged around each cut."""

from __future__ import annotations

import csv
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fits import STEPS, Module, images, network, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from test_information import NETWORKS, data
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import history_of, prune
from lightning_prune.callbacks import FisherRaoMonitor, MagnitudePruneCallback, PruneCallback
from lightning_prune.callbacks.calibration import training_batches
from lightning_prune.errors import PruningError
from lightning_prune.metrics import FisherRaoNorm
from lightning_prune.schedules import linear
from lightning_prune.witnesses import leave, watch, witnesses_of

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def norm(model: nn.Module, *batches: tuple[Tensor, Tensor], **settings: Any) -> float:
    metric = FisherRaoNorm(**settings)
    for inputs, targets in batches:
        metric.update(model, inputs, targets)
    return float(metric.compute())


def by_hand(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """The definition, one example after the other."""
    model = deepcopy(model).eval()
    products = []
    for one, target in zip(inputs.split(1), targets.split(1), strict=True):
        model.zero_grad()
        F.cross_entropy(model(one), target).backward()
        parts = [(each * each.grad).sum() for each in model.parameters() if each.grad is not None]
        products.append(torch.stack(parts).sum())
    return float(torch.stack(products).detach().square().mean())


@pytest.mark.parametrize(("make", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_it_is_that_of_single_gradients(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """In forward mode, and where attention has none and vmap cannot look at values, by gradients."""
    model = make().double().train()
    one, other = data(shape), data(shape, 3)
    if "other" in dict(model.named_children()):  # its way depends on the whole batch
        one, other = (one[0].abs(), one[1]), (other[0].abs(), other[1])
    whole = [torch.cat(parts) for parts in zip(one, other, strict=True)]
    assert norm(model, one, other) == pytest.approx(by_hand(model, *whole), rel=1e-10, abs=0)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("hidden", [0, 1, 3])
def test_relu_nets_without_biases(hidden: int) -> None:
    """Liang et al. 2017: L^2 E[<dl/df, f>^2] for L weight layers."""
    widths = [6, *[8] * hidden, 4]
    layers: list[nn.Module] = []
    for entering, leaving in pairwise(widths):
        layers += [nn.Linear(entering, leaving, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    inputs, targets = torch.randn(9, 6, dtype=torch.float64), torch.randint(4, (9,))
    outputs = model(inputs).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(F.cross_entropy(outputs, targets, reduction="sum"), outputs)
    expected = (hidden + 1) ** 2 * float((slopes * outputs.detach()).sum(1).square().mean())
    assert norm(model, (inputs, targets)) == pytest.approx(expected, rel=1e-10, abs=0)


def test_weights_of_the_same_function_have_the_same_norm() -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)).double()
    batch = torch.randn(9, 6, dtype=torch.float64), torch.randint(4, (9,))
    before = norm(model, batch)
    model[0].weight.data *= 3.0
    model[2].weight.data /= 3.0
    assert norm(model, batch) == pytest.approx(before, rel=1e-12)


def test_labels_of_the_model() -> None:
    """A linear Gaussian model has E[f^2 r^2] = f^2."""
    model = nn.Linear(3, 1, bias=False).double()
    inputs = torch.randn(20, 3, dtype=torch.float64).repeat(4000, 1)
    targets = torch.full((len(inputs), 1), 1e6, dtype=torch.float64)  # not looked at
    expected = float(model(inputs).detach().square().mean())
    assert norm(model, (inputs, targets), labels="model") == pytest.approx(expected, rel=0.03)


def test_states_add_up() -> None:
    """What ranks add together is what one sees that has all batches."""
    model, batches = NETWORKS["convolution"][0](), [data((1, 6, 6)), data((1, 6, 6), 3)]
    model = model.double()
    parts = [FisherRaoNorm() for _ in batches]
    for metric, batch in zip(parts, batches, strict=True):
        metric.update(model, *batch)
    assert [rule.__name__ for rule in parts[0]._reductions.values()] == ["dim_zero_sum"] * 2
    assert parts[0].full_state_update is False
    whole = FisherRaoNorm()
    values = [float(whole(model, *batch)) for batch in batches]
    assert values == [float(metric.compute()) for metric in parts]
    total = sum(float(metric.total) for metric in parts) / sum(int(metric.count) for metric in parts)
    assert float(whole.compute()) == pytest.approx(total, rel=1e-14)
    whole.reset()
    assert int(whole.count) == 0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="`labels` is one of"):
        FisherRaoNorm(labels="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`loss` returns one number for each example"):
        norm(nn.Linear(3, 5).double(), data((3,)), loss=F.cross_entropy)
    with pytest.raises(ValueError, match=r"`batches` is how many.*got 0"):
        FisherRaoMonitor(0)


def twice(**settings: Any) -> PruneCallback:
    return MagnitudePruneCallback(0.5, schedule=linear, begin=0, end=2, **settings)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("steps", [None, 4], ids=["epochs", "steps"])
def test_it_is_logged_around_each_cut(tmp_path: Path, first: bool, steps: int | None) -> None:
    settings = {} if steps is None else {"every_n_steps": steps, "begin": 0, "end": 8}
    prune_callback = MagnitudePruneCallback(0.5, schedule=linear, **{"begin": 0, "end": 2, **settings})
    monitor, module = FisherRaoMonitor(), Module()
    both = [monitor, prune_callback] if first else [prune_callback, monitor]
    fit = trainer(*both, logger=CSVLogger(tmp_path, version=0), log_every_n_steps=1000)
    fit.fit(module)
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["fisher_rao/before"]]
    records = history_of(module)
    assert [int(row["step"]) for row in rows] == [record.step for record in records]
    assert len(rows) == 2
    for row in rows:
        assert 0 < float(row["fisher_rao/after"]) != float(row["fisher_rao/before"])
    assert float(fit.callback_metrics["fisher_rao/after"]) == pytest.approx(float(rows[-1]["fisher_rao/after"]))
    assert witnesses_of(module) == ()


def test_before_and_after_are_those_networks() -> None:
    """The first cut falls before any training: what is logged can be measured on twins."""

    class Kept(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.dense = deepcopy(pl_module.net)
            torch.manual_seed(0)
            batch = next(iter(training_batches(trainer)))
            self.batch = (batch[0], batch[1])

    cut, kept, values = PruneCallback(0.5, begin=0, end=0), Kept(), []

    class Told(FisherRaoMonitor):
        def on_train_batch_end(self, *args: Any) -> None:
            values.extend(self._unlogged)
            super().on_train_batch_end(*args)

    module = Module()
    trainer(Told(), cut, kept, max_epochs=1, limit_train_batches=1).fit(module)
    before = norm(kept.dense, kept.batch)
    prune(kept.dense, torch.zeros(2, 1, 6, 6), pruning_ratio=0.5)
    ((step, told),) = values
    assert step == 0
    assert told == pytest.approx({"fisher_rao/before": before, "fisher_rao/after": norm(kept.dense, kept.batch)})


def test_it_changes_nothing_of_the_fit() -> None:
    module, watched = Module(), Module()
    trainer(twice()).fit(module)
    trainer(twice(), FisherRaoMonitor(2, labels="model")).fit(watched)
    assert all(torch.equal(tensor, watched.state_dict()[name]) for name, tensor in module.state_dict().items())


def test_data_that_cannot_be_read_twice_are_refused() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(images().dataset)

    with pytest.raises(MisconfigurationException, match="FisherRaoMonitor reads the training data a second time"):
        trainer(twice(), FisherRaoMonitor(), limit_train_batches=STEPS).fit(Module(), DataLoader(Endless(), 8))


class Following:
    """A witness that fails on demand."""

    def __init__(self, fails: bool = False) -> None:
        self.told, self.fails = list[str](), fails

    def before_cut(self, model: nn.Module) -> None:
        self.told.append(f"before {len(history_of(model))}")

    def after_cut(self, model: nn.Module, *_: Any) -> Callable[[], None]:
        if self.fails:
            raise PruningError("no")
        self.told.append(f"after {len(history_of(model))}")
        return lambda: self.told.append("back")


def test_witnesses_follow_a_cut_or_take_it_back() -> None:
    model, following, failing = network(), Following(), Following(fails=True)
    example = torch.zeros(2, 1, 6, 6)
    watch(model, following)
    prune(model, example, pruning_ratio=0.25)
    assert following.told == ["before 0", "after 1"]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    watch(model, failing)
    with pytest.raises(PruningError, match="no"):
        prune(model, example, pruning_ratio=0.5)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert len(history_of(model)) == 1
    assert following.told[2:] in (["before 1"], ["before 1", "after 2", "back"])
    leave(model, failing)
    assert witnesses_of(model) == (following,)
    assert witnesses_of(deepcopy(model)) == ()

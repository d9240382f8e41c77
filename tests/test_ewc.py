"""Elastic weight consolidation: the penalty is the written one, enters once a step, and travels with files and cuts."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fits import STEPS, Module, Resumable, equal, images, momentum, states, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from masked import KEEP, is_exact, masked
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_prune import history_of, prune
from lightning_prune.callbacks import EWCCallback, MagnitudePruneCallback, PruneCallback
from lightning_prune.consolidation import Consolidation
from lightning_prune.cut import Cut, Offsets
from lightning_prune.errors import PruningError
from lightning_prune.information import fisher_information
from lightning_prune.likelihoods import Gaussian
from lightning_prune.schedules import linear

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]


class Line(pl.LightningModule):
    """Least squares by plain gradient descent on all data at once."""

    def __init__(self, features: int, data: tuple[Tensor, Tensor], lr: float = 0.25) -> None:
        super().__init__()
        self.layer = nn.Linear(features, 1, bias=False).double()
        self.data, self.lr = data, lr

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.5 * (self(batch[0]) - batch[1]).square().sum(1).mean()

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*self.data), batch_size=len(self.data[0]))

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=self.lr)


class Signs(Gaussian):
    """A Gaussian whose noise is +1 or -1: the squares of the gradients are exactly those of the inputs."""

    def draw(self, outputs: Tensor) -> Tensor:
        return outputs.detach() + torch.randn_like(outputs).sign()


def task(seed: int) -> tuple[Tensor, Tensor]:
    """Noisy data of a linear model, with orthogonal features."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    features = torch.linalg.qr(draw(8, 3)).Q * 8**0.5 * torch.tensor([0.8, 1.0, 1.2])
    return features, features @ draw(3, 1) + draw(8, 1)


def least_squares(*tasks: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = (torch.cat(parts) for parts in zip(*tasks, strict=True))
    return torch.linalg.lstsq(inputs, targets).solution.mT


@pytest.mark.parametrize("count", [2, 3])
def test_gaussian_tasks_end_where_all_of_them_together_do(count: int) -> None:
    """With one merged penalty, also after three tasks (Huszar 2017)."""
    tasks = [task(seed) for seed in range(count)]
    ewc, module = EWCCallback(1.0, loss=Signs()), Line(3, tasks[0])
    for data in tasks:
        module.data = data
        trainer(ewc, max_epochs=200).fit(module)
        ewc.consolidate(module, [data])
    assert torch.allclose(module.layer.weight, least_squares(*tasks), rtol=0, atol=1e-10)
    squares = torch.stack([inputs.square().mean(0) for inputs, _ in tasks]).sum(0)
    assert torch.allclose(ewc.information["layer.weight"][0], squares, rtol=0, atol=1e-10)
    assert ewc.held.tasks == count


def test_without_it_the_last_task_is_all_that_is_left() -> None:
    tasks = [task(seed) for seed in range(2)]
    module = Line(3, tasks[0])
    for data in tasks:
        module.data = data
        trainer(EWCCallback(0.0, labels="data"), max_epochs=200).fit(module)
    assert torch.allclose(module.layer.weight, least_squares(tasks[1]), rtol=0, atol=1e-10)
    assert not torch.allclose(module.layer.weight, least_squares(*tasks), atol=0.1)


def held_by(module: nn.Module, **settings: Any) -> EWCCallback:
    """A callback that holds a network near to another one."""
    ewc = EWCCallback(**({"strength": 2.0, "labels": "data"} | settings))
    kind = next(module.parameters()).dtype
    ewc.consolidate(module, [(inputs.to(kind), labels) for inputs, labels in images()])
    for name, anchor in ewc.held.anchors.items():
        anchor.add_(0.1 * torch.randn(anchor.shape, generator=torch.Generator().manual_seed(len(name))))
    return ewc


class Gradients(Callback):
    """Notes what an optimizer is about to use, and the parameters."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.parameters: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        own = dict(pl_module.named_parameters())
        self.before.append({name: each.grad.clone() for name, each in own.items() if each.grad is not None})
        self.parameters.append({name: each.detach().clone() for name, each in own.items()})


def written(ewc: EWCCallback, parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The penalty as it stands in the docstring, and its gradient by autograd."""
    own = {name: each.clone().requires_grad_() for name, each in parameters.items()}
    held = ewc.held
    penalty = sum(
        ewc.strength / 2 * (held.information[name] * (own[name] - held.anchors[name]) ** 2).sum()
        for name in held.anchors
    )
    assert isinstance(penalty, Tensor)
    found = torch.autograd.grad(penalty, list(own.values()), allow_unused=True)
    return penalty.detach(), {name: each for name, each in zip(own, found, strict=True) if each is not None}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_gradient_is_that_of_the_penalty_once_a_step(accumulate: int) -> None:
    module = Module().double()
    ewc, first, last = held_by(module), Gradients(), Gradients()
    fit = trainer(first, ewc, last, max_epochs=1, accumulate_grad_batches=accumulate, precision="64-true")
    fit.fit(module)
    assert len(first.before) == STEPS // accumulate
    for before, after, parameters in zip(first.before, last.before, first.parameters, strict=True):
        penalty, pull = written(ewc, parameters)
        assert all(torch.allclose(after[name], before[name] + pull[name], rtol=1e-12) for name in pull)
    assert float(fit.callback_metrics["ewc/penalty"]) == pytest.approx(float(penalty), rel=1e-12)
    assert float(ewc.held.penalty(parameters, ewc.strength)) == pytest.approx(float(penalty), rel=1e-12)


def test_nothing_is_added_before_a_task_is_consolidated() -> None:
    module, alone = Module(), Module()
    fit = trainer(EWCCallback(10.0))
    fit.fit(module)
    trainer().fit(alone)
    assert equal(module.state_dict(), alone.state_dict())
    assert "ewc/penalty" not in fit.callback_metrics


def test_frozen_parameters_and_those_without_gradient_are_free() -> None:
    module = Module()
    ewc, before = held_by(module, strength=1e3), deepcopy(module.state_dict())
    module.net[0].requires_grad_(False)
    trainer(ewc, max_epochs=1).fit(module)
    assert torch.equal(module.net[0].weight, before["net.0.weight"])
    assert not torch.equal(module.net[3].weight, before["net.3.weight"])


def test_several_optimizers_and_one_that_maximizes() -> None:
    class Both(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            loss = F.cross_entropy(self(batch[0]), batch[1])
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return SGD(self.net[0].parameters(), lr=0.01), SGD(self.net[3].parameters(), lr=0.01, maximize=True)

    module = Both()
    ewc, first, last = held_by(module), Gradients(), Gradients()
    fit = trainer(first, ewc, last, max_epochs=1, limit_train_batches=1)
    fit.fit(module)
    _, pull = written(ewc, first.parameters[0])
    for at, (name, sign) in enumerate([("net.0.weight", 1), ("net.3.weight", -1)]):
        added = last.before[at][name] - first.before[at][name]
        assert torch.allclose(added, sign * pull[name], rtol=1e-4, atol=1e-7)
    part = Consolidation({name: ewc.held.anchors[name] for name in ("net.0.weight", "net.3.weight")}, ewc.information)
    expected = float(part.penalty(first.parameters[0], 2.0))
    assert float(fit.callback_metrics["ewc/penalty"]) == pytest.approx(expected, rel=1e-2)


def files(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, filename="{step}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=1
    )


def cutting() -> PruneCallback:
    """Cuts at epochs 1 and 2."""
    return MagnitudePruneCallback(0.5, schedule=linear, begin=0, end=2)


def ended(module: pl.LightningModule, fit: pl.Trainer, ewc: EWCCallback) -> dict[str, Any]:
    held = {**ewc.held.anchors, **{f"F {name}": each for name, each in ewc.information.items()}}
    flat = {
        f"{name} {key}": value for name, kinds in states(module, fit.optimizers).items() for key, value in kinds.items()
    }
    return {**module.state_dict(), **flat, **held}


@pytest.mark.parametrize("others", [(), (cutting,)], ids=["alone", "with cuts"])
@pytest.mark.parametrize("make", [momentum, partial(Adam, lr=0.01)], ids=["momentum", "adam"])
def test_a_resumed_fit_ends_as_the_unbroken_one(
    tmp_path: Path, make: Any, others: tuple[Callable[[], Callback], ...]
) -> None:
    module = Resumable(make)
    ewc = held_by(module)
    fit = trainer(ewc, *[other() for other in others], files(tmp_path), enable_checkpointing=True)
    fit.fit(module)
    whole = ended(module, fit, ewc)
    for step in (1, STEPS + 1, 2 * STEPS + 3):
        again, fresh = EWCCallback(2.0, labels="data"), Resumable(make, seed=5)
        resumed = trainer(again, *[other() for other in others])
        resumed.fit(fresh, ckpt_path=tmp_path / f"{step}.ckpt")
        assert equal(ended(fresh, resumed, again), whole), step
        assert torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["callbacks"]["EWCCallback"]["tasks"] == 1
    assert again.held.tasks == 1


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_anchors_and_information_are_cut_with_the_channels(first: bool) -> None:
    module = Module(net=biased())
    ewc = held_by(module)
    dense, own = ewc.held, cutting()
    fit = trainer(*([ewc, own] if first else [own, ewc]))
    fit.fit(module)
    kept: dict[str, Any] = {**dense.anchors}, {**dense.information}
    for record in history_of(module):
        for name, dims in record.kept.items():
            for tensors in kept:
                if name in tensors:
                    for dim, places in dims.items():
                        tensors[name] = tensors[name].index_select(dim, torch.tensor(places))
    assert len(history_of(module)) == 2
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    for found, expected in zip((ewc.held.anchors, ewc.information), kept, strict=True):
        assert found.keys() == expected.keys()
        assert all(found[name].shape == shapes[name] for name in found)
        assert all(torch.equal(found[name], expected[name]) for name in found if not name.endswith("bias"))


def biased() -> nn.Sequential:
    """What its first layer emits when it is cut goes into biases that there are, and one that is made."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, bias=False),
    )  # fmt: skip


def test_an_absorbed_constant_moves_the_anchor_as_far() -> None:
    """The penalty of what stays is what it was: nothing pulls the constant back out."""
    module = Module(net=biased())
    ewc = held_by(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    away = {name: weights[name] - anchor for name, anchor in ewc.held.anchors.items()}
    prune(module, module.example_input_array, pruning_ratio=0.5)
    (record,) = history_of(module)
    moved = module.net[3].bias.detach()
    assert not torch.allclose(moved, weights["net.3.bias"][list(record.kept["net.3.bias"][0])], atol=1e-4)
    for name, parameter in module.named_parameters():
        if name in ewc.held.anchors:
            left = away[name]
            for dim, places in record.kept.get(name, {}).items():
                left = left.index_select(dim, torch.tensor(places))
            assert torch.allclose(parameter - ewc.held.anchors[name], left, atol=1e-6), name
    ewc.held.check_fit(dict(module.named_parameters()))
    trainer(ewc, max_epochs=1).fit(module)


def test_a_bias_that_a_cut_makes_is_free() -> None:
    made = Cut(biases={"net.7": 4})
    held = Consolidation({"net.7.weight": torch.ones(4, 8)}, {"net.7.weight": torch.ones(4, 8)}, 1)
    after = held.after(made, Offsets(biases={"net.7": torch.ones(4)}))
    assert after.anchors.keys() == {"net.7.weight"}


def test_a_norm_that_gets_a_select_takes_its_anchor_along() -> None:
    cut = Cut(kept={"a.1.weight": {0: torch.tensor([0, 2])}}, selects=("a",))
    held = Consolidation({"a.weight": torch.arange(3.0)}, {"a.weight": torch.arange(3.0) + 1}, 1)
    after = held.after(cut, Offsets({"a.1.weight": torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)}))
    assert {name: each.tolist() for name, each in after.anchors.items()} == {"a.1.weight": [1.0, 3.0]}
    assert {name: each.tolist() for name, each in after.information.items()} == {"a.1.weight": [1.0, 3.0]}


def test_a_cut_that_fails_leaves_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module()
    ewc = held_by(module)
    before = ewc.held

    def fail(*_: Any) -> None:
        raise PruningError("no")

    monkeypatch.setattr("lightning_prune.optimizers.rebuild", fail)
    with pytest.raises(PruningError, match="no"):
        trainer(ewc, cutting()).fit(module)
    assert ewc.held.anchors.keys() == before.anchors.keys()
    assert all(torch.equal(anchor, before.anchors[name]) for name, anchor in ewc.held.anchors.items())
    ewc.held.check_fit(dict(module.named_parameters()))


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_masked_weights_stay_zero(first: bool) -> None:
    module = Module()
    ewc, masking = held_by(module, strength=50.0), masked(0.5, retraining=KEEP)
    trainer(*([ewc, masking] if first else [masking, ewc])).fit(module)
    assert is_exact(module)


def test_nothing_pulls_at_masked_weights() -> None:
    """Not even for a moment: clipping and momentum do not see them, and the penalty does not count them."""
    weight = nn.Parameter(torch.tensor([0.0, 2.0]))
    weight.grad = torch.tensor([0.0, 1.0])
    held = Consolidation({"a": torch.ones(2)}, {"a": torch.tensor([5.0, 3.0])}, 1)
    penalty = held.add_to_gradients({"a": weight}, 2.0, {"a": torch.tensor([False, True])})
    assert weight.grad.tolist() == [0.0, 1.0 + 2.0 * 3.0]
    assert float(penalty) == 3.0


@pytest.mark.parametrize("labels", ["data", "model"])
def test_consolidation_at_the_end_of_a_fit(labels: Any) -> None:
    module = Module()
    ewc = EWCCallback(1.0, consolidate_on="fit_end", labels=labels)
    fit = trainer(ewc, max_epochs=1)
    fit.fit(module)
    assert ewc.held.tasks == 1
    assert equal(dict(ewc.held.anchors), {name: each.detach() for name, each in module.named_parameters()})
    if labels == "data":
        expected = fisher_information(module, images())
        assert all(torch.allclose(ewc.information[name], each, atol=1e-9) for name, each in expected.items())
    plain = Module()
    trainer(max_epochs=1).fit(plain)
    assert equal(plain.state_dict(), module.state_dict())


def test_the_trainer_and_data_modules_give_the_data() -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return images()

    module = Module()
    fit = trainer(max_epochs=1)
    fit.fit(module)
    ways: list[tuple[Any, ...]] = [
        (fit,),
        (fit, images()),
        (module, Data()),
        (module, list(images())),
        (module.net, images()),
    ]
    found = []
    for way in ways:
        ewc = EWCCallback(1.0, labels="data")
        ewc.consolidate(*way)
        found.append(list(ewc.information.values()))
    assert all(torch.equal(one, other) for each in found[1:] for one, other in zip(found[0], each, strict=True))
    one = EWCCallback(1.0, labels="data")
    one.consolidate(fit, batches=1)
    assert not torch.equal(next(iter(one.information.values())), found[0][0])


def test_online_consolidation_forgets() -> None:
    """F <- decay * F + F_new, around the last optimum (Schwarz et al. 2018)."""
    first = Consolidation().then({"a": torch.tensor([1.0])}, {"a": torch.tensor([4.0])})
    second = first.then({"a": torch.tensor([3.0]), "b": torch.tensor([5.0])}, {"b": torch.tensor([7.0])}, decay=0.5)
    third = second.then({"a": torch.tensor([2.0]), "b": torch.tensor([6.0])}, {"a": torch.tensor([1.0])}, decay=0.5)
    assert {name: each.item() for name, each in third.information.items()} == {"a": 2.0, "b": 3.5}
    assert {name: each.item() for name, each in third.anchors.items()} == {"a": 2.0, "b": 6.0}
    assert third.tasks == 3


BAD: list[tuple[dict[str, Any], str]] = [
    ({"strength": -1.0}, r"`strength` is the lambda of the penalty, 0 or more; got -1.0"),
    ({"strength": float("nan")}, r"`strength` .* got nan"),
    ({"strength": 1.0, "decay": 1.5}, r"`decay` .* in \[0, 1\]; got 1.5"),
    ({"strength": 1.0, "batches": 0}, r"`batches` .* 1 or more; got 0"),
    ({"strength": 1.0, "labels": "true"}, r"`labels` is one of 'data', 'model'; got 'true'"),
    ({"strength": 1.0, "loss": F.cross_entropy}, r"labels='model' draws targets from the model"),
    ({"strength": 1.0, "consolidate_on": "epoch"}, r"`consolidate_on` is 'fit_end' or None; got 'epoch'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EWCCallback(**arguments)


def test_consolidating_what_is_not_there() -> None:
    ewc = EWCCallback(1.0)
    with pytest.raises(MisconfigurationException, match=r"a Trainer that has fitted no network yet.*after"):
        ewc.consolidate(trainer(), images())
    with pytest.raises(MisconfigurationException, match=r"`data` is a loader or a list of batches.*got None"):
        ewc.consolidate(Module())


def test_another_network_is_refused() -> None:
    ewc = held_by(Module())
    other = Module(net=nn.Sequential(nn.Flatten(), nn.Linear(36, 4)))
    with pytest.raises(
        MisconfigurationException, match=r"'net.0.weight' of shape \(8, 1, 3, 3\), but the model has no"
    ):
        trainer(ewc).fit(other)
    with pytest.raises(PruningError, match="or consolidate the task anew"):
        ewc.consolidate(other, images())
    smaller = Module()
    prune(smaller, smaller.example_input_array, pruning_ratio=0.5)
    with pytest.raises(MisconfigurationException, match=r"has it in the shape \(4, 1, 3, 3\)"):
        trainer(ewc).fit(smaller)


def test_data_that_cannot_be_read_twice_are_refused_before_the_fit() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(images().dataset)

    with pytest.raises(
        MisconfigurationException, match=r"consolidate_on='fit_end'\) reads .* Call `consolidate` yourself"
    ):
        trainer(EWCCallback(1.0, consolidate_on="fit_end")).fit(Module(), DataLoader(Stream(), 8))
